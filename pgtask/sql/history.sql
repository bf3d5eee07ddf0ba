-- What removes finished rows when they have been kept long enough. $N are the parameters of each statement.

-- name: newest — what time it is, in seconds, and the greatest id there is (null: none). Whatever is inserted after it with a
-- greater id ends later than this
SELECT date_part('epoch', clock_timestamp()), (SELECT max(t.id) FROM {task} AS t);

-- name: sweep — remove rows that ended too long ago, of the next ones by id. By the primary key: an index on when they ended
-- would be paid for by every finish. What somebody has locked (a foreign key's check, say) stays for the next pass. A row
-- that was stopped has ended when its run has.
-- Answers with how many were seen and removed, the last one seen, and the first one that stays (null: none).
-- $1 the id to go on after, $2 the last one to look at, $3 rows looked at, $4 $5 seconds that DONE, GONE and STOP, and
-- FAIL rows are kept (null: for ever)
WITH instant AS MATERIALIZED (
    SELECT date_part('epoch', clock_timestamp()) AS now
), looked AS MATERIALIZED (
    SELECT t.id, {expired} AS expired
    FROM {task} AS t
    WHERE t.id > $1::bigint AND t.id <= $2::bigint
    ORDER BY t.id
    LIMIT $3::int
), old AS MATERIALIZED (
    SELECT t.id
    FROM looked AS l
    -- When it is locked it must still be what was seen.
    JOIN {task} AS t ON t.id = l.id AND t.id >= (SELECT min(e.id) FROM looked AS e) AND t.id <= (SELECT max(e.id) FROM looked AS e)
        AND {expired}
    WHERE l.expired
    FOR UPDATE OF t SKIP LOCKED
), removed AS (
    DELETE FROM {task} AS t USING old AS o
    WHERE t.id = o.id AND t.id >= (SELECT min(e.id) FROM looked AS e) AND t.id <= (SELECT max(e.id) FROM looked AS e) AND {expired}
    RETURNING t.id
)
SELECT (SELECT count(*) FROM looked), (SELECT count(*) FROM removed), (SELECT max(l.id) FROM looked AS l),
    (SELECT min(l.id) FROM looked AS l WHERE NOT EXISTS (SELECT FROM removed AS r WHERE r.id = l.id));
