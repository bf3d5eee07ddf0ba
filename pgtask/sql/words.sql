-- What several statements on the task table have in common: {name} stands for it there, and in what comes after it here.
--
-- Where a statement that runs all the time joins rows of the table by their ids to what it has found, it says once more which
-- ids these are, as an array. A plan that was made while the table was empty, as a queue is, and vacuumed, takes the table for the shortest of all
-- lists and reads it to its end; with the array it cannot (or, where there are many, with the first and the last of them). Nothing makes that plan anew until the next ANALYZE.

-- name: few — more rows than a take ever looks at ($3), as a number: the planner makes a hash table for as many as it expects,
-- in a large table for hundreds of thousands
1000

-- name: lane — the key of a row's group in the indexes: short whatever the group's name is. Always rechecked against
-- the text
hashtextextended(t."group", hashtextextended(coalesce(t.remote, ''), 0))

-- name: levels — every max that waiting rows of the group with the key g.lane have, the greatest first: one look into the
-- index for each
WITH RECURSIVE level (max) AS (
    (SELECT t.max FROM {task} AS t WHERE t.state = 'PLAN' AND {lane} = g.lane ORDER BY t.max DESC LIMIT 1)
    UNION ALL
    SELECT (
        SELECT t.max FROM {task} AS t
        WHERE t.state = 'PLAN' AND {lane} = g.lane AND t.max < l.max
        ORDER BY t.max DESC LIMIT 1
    )
    FROM level AS l
    WHERE l.max IS NOT NULL
)

-- name: mark — changes with every ALTER ROLE or ALTER DATABASE ... SET that a new session would see and ours does not, and
-- when the server's configuration is read anew: RESET ALL then goes back to other values than those of the beginning
(SELECT concat(pg_conf_load_time(), ' ', string_agg(concat(s.xmin, s.ctid), ' ' ORDER BY s.setdatabase, s.setrole))
    FROM pg_db_role_setting AS s
    WHERE s.setdatabase IN (0, (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()))
        AND s.setrole IN (0, quote_ident(session_user)::regrole))

-- name: copied — what the next row of a repeated task copies: all but what belongs to one run, generated and identity
-- columns
(SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute AS a
    WHERE a.attrelid = {regclass}::regclass AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attgenerated = '' AND a.attidentity = ''
        AND a.attname <> ALL (ARRAY['id', 'parent', 'plan', 'first', 'start', 'stop', 'pid', 'state', 'attempt',
            'attempts', 'depend', 'error', 'code', 'notice', 'output']))

-- name: shares — may the row run in one transaction with others? Not if it was begun before: it may be what killed the
-- session of them all
(t.batch > 1 AND t.atomic AND NOT t.save AND t.remote IS NULL AND t.max >= 0 AND t.repeat = interval '0'
        AND t.cron IS NULL AND t.count = 0 AND t.live = interval '0')

-- name: read — what a worker needs of a row, in the order of Task.read (store.py), after its id and attempt
t."group", t.remote, t.input, extract(epoch FROM t.timeout) AS timeout, t.max, to_jsonb(t.plan) #>> '{}' AS plan,
    t."delete", t.save, t.atomic, t.repeat <> interval '0' OR t.cron IS NOT NULL AS repeated, t.header, t.string, t.delimiter, t.escape, t.quote, t."null",
    t.batch, t.count, t.live <> interval '0' AS aging

-- name: name — what the session of a run is called: its application_name
concat('pgtask ', {schema_text}, ' ', {table_text}, ' ', left(t."group", greatest(0, {room} - length(t.id::text))), ' ', t.id)

-- name: set — the run's own settings are made
num_nulls(set_config('pg_task.id', t.id::text, false), set_config('pg_task.group', t."group", false),
        set_config('pg_task.schema', {schema_text}, false), set_config('pg_task.table', {table_text}, false)) = 0

-- name: ours — is the row this session's to run? Divides by zero if a user's trigger has made another's of it, since its
-- end could not be written. On the way its settings are made: each function that a statement names is looked up every
-- time, and each column described
1 / (t.state = 'WORK' AND t.pid = pg_backend_pid() AND {set})::int

-- name: waited — how long, in seconds, until its first run
CASE WHEN t.attempt = 1 AND t.depend IS NULL THEN date_part('epoch', t.start) - date_part('epoch', t.plan) END

-- name: row — a row that a worker has begun
t.id, t.attempt, {read}, {ours} AS ours, set_config('application_name', {name}, false) AS name, {waited} AS waited

-- name: begin — what makes a row ours
SET state = 'WORK', pid = pg_backend_pid(), stop = NULL, output = NULL, attempt = least(t.attempt, 2147483646) + 1

-- name: moved — was the plan set anew while the row runs? A run never starts before its plan, whatever becomes of the clock
((t.plan > t.start) IS TRUE)

-- name: serving — may a worker take a row of its group ($2) at all? $6 term; not if its task's snapshot is older than what
-- others took, nor while somebody holds the group
current_setting('transaction_isolation') = 'read committed'
        AND EXISTS (SELECT FROM {master} AS m WHERE m.term = $6)
        AND NOT EXISTS (SELECT FROM {held} AS h WHERE h."group" = $2)

-- name: running — those that run, as the index of slots in use has them: also who was stopped and has not ended yet
(t.state IN ('TAKE', 'WORK') OR t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)

-- name: floor — the least max that a row in our slot may have: the slot's number ($8), and how many others of the group
-- ($7 its key) run: not our own run, whose end may not be written yet. Of those that share a transaction one runs at a
-- time: where they are counted apart, a row is left to the poller
greatest($8::int, (
            SELECT count(*) FROM {task} AS t
            WHERE {running} AND {lane} = $7::bigint AND t.pid IS DISTINCT FROM pg_backend_pid()
        ))

-- name: shared_floor — the same, of runs that share a transaction only one
greatest($8::int, (
            SELECT count(DISTINCT t.pid) FILTER (WHERE t.batch > 1 AND t.state <> 'TAKE')
                + count(*) FILTER (WHERE t.batch <= 1 OR t.state = 'TAKE')
            FROM {task} AS t WHERE {running} AND {lane} = $7::bigint
        ))

-- name: admitted — may this worker run the row? $2 group, $3 remote or '', $4 its runs so far, $5 its age in seconds
t."group" = $2 AND coalesce(t.remote, '') = $3 AND t.plan <= statement_timestamp()
            AND (t.count = 0 OR t.count > $4::int)
            AND (t.live = interval '0' OR date_part('epoch', t.live) > $5::float8)
            AND (t.repeat <> interval '0' OR t.cron IS NOT NULL
                OR date_part('epoch', statement_timestamp()) - date_part('epoch', t.plan) <= date_part('epoch', t.active))

-- name: untouched — has nobody locked or written the row just now? A look that began before somebody took the row finds it
-- free, locks what has become of it, and sees only then that it runs: whoever runs it would wait for us. Who touched it last
-- is read from the row as it is by now; 20 transactions ago is long before, and the row's own was seen to end. Where tasks run
-- one after another nobody else takes any, and their order holds, whoever locks them
(t.max = 0 OR t.xmax = t.xmin OR age(t.xmax) > 20)

-- name: first — the group's first row, if it is due and this worker may take it, and if there is an `own`: what comes
-- before it
SELECT t.id, {admitted} AS admitted
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} = $7::bigint AND t.max >= {floor} AND {serving}
        AND EXISTS (SELECT FROM own) AND {untouched}
    ORDER BY t.max DESC, t.plan, t.id
    LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED

-- name: first_below — the same where rows of a greater max are planned for later: the first due row of the greatest max
-- that has one
SELECT d.id, d.admitted
    FROM (SELECT $7::bigint AS lane) AS g
    CROSS JOIN LATERAL (
        {levels}
        SELECT l.max FROM level AS l WHERE l.max >= {floor} AND {serving} AND EXISTS (SELECT FROM own)
    ) AS l
    CROSS JOIN LATERAL (
        SELECT t.id, {admitted} AS admitted
        FROM {task} AS t
        WHERE t.state = 'PLAN' AND {lane} = $7::bigint AND t.max = l.max AND t.plan <= statement_timestamp()
            AND {untouched}
        ORDER BY t.plan, t.id
        LIMIT 1
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS d
    LIMIT 1

-- name: first_after — a quick look, while those from the beginning are dear: the first row after our run's, whose $9 id,
-- $10 max and $11 plan are, of the same max. Nor are the others counted, of whom those of a greater max may be more than this
-- one admits: there are never more runs than the greatest max admits, since each has a slot of its own
SELECT t.id, {admitted} AS admitted
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} = $7::bigint AND t.max = $10::int AND t.max >= $8::int
        AND (t.plan, t.id) >= ($11::timestamptz, $9::bigint) AND {serving} AND EXISTS (SELECT FROM own)
        AND {untouched}
    ORDER BY t.plan, t.id
    LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED

-- name: own — our run's row, locked: whoever else locks both takes the earlier one first, and so would wait for us while
-- we wait for him. $9 its id
own AS MATERIALIZED (
    SELECT t.id FROM {task} AS t
    WHERE t.id = $9::bigint AND t.state::text = 'WORK' AND t.pid = pg_backend_pid()
    FOR NO KEY UPDATE
)

-- name: looked — how a look for the group's next task ends that comes before the end of our run: the row stays locked, and
-- `switch` finds its id in a setting, which our transaction forgets with its end, and gives the session its name. Cost in seconds
, found AS MATERIALIZED (
    SELECT set_config('pgtask.looked', coalesce((SELECT f.id FROM first AS f WHERE f.admitted)::text, ''), true) AS id
)
SELECT t.id, least(t.attempt, 2147483646) + 1 AS attempt, {read}, true AS ours, NULL AS name,
    CASE WHEN t.attempt = 0 AND t.depend IS NULL
        THEN date_part('epoch', greatest(statement_timestamp(), $1::timestamptz)) - date_part('epoch', t.plan) END AS waited,
    date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost
FROM {task} AS t
WHERE t.id = (SELECT nullif(f.id, '')::bigint FROM found AS f)

-- name: next — how a look ends that begins the row; cost in seconds
UPDATE {task} AS t
{begin}, start = greatest(clock_timestamp(), $1::timestamptz, t.plan)
WHERE t.id = (SELECT f.id FROM first AS f WHERE f.admitted)
RETURNING {row}, date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost

-- name: together — the same for rows that will share a transaction, of `due`, the first ones of the group: as many as each
-- of them allows, in their order, up to the first that may not share; that one only if it is the very first. By an array of
-- their ids: a join of as many rows on both sides might be done by comparing each with each. The settings are made for one
-- alone: each of several makes its own when it comes to it
, numbered AS MATERIALIZED (
    SELECT d.id, d.admitted, row_number() OVER line AS number,
        bool_and(d.admitted AND d.shares) OVER line AS shares, min(d.batch) OVER line AS batch
    FROM due AS d
    WINDOW line AS (ORDER BY d.max DESC, d.plan, d.id)
), chosen AS MATERIALIZED (
    SELECT array_agg(n.id ORDER BY n.number) AS ids, count(*) = 1 AS alone
    FROM numbered AS n
    WHERE n.number = 1 AND n.admitted OR n.shares AND n.number <= n.batch
)
UPDATE {task} AS t
{begin}, start = greatest(clock_timestamp(), $1::timestamptz, t.plan)
WHERE t.id = ANY ((SELECT c.ids FROM chosen AS c)::bigint[])
RETURNING t.id, t.attempt, {read},
    1 / (t.state = 'WORK' AND t.pid = pg_backend_pid() AND CASE WHEN (SELECT c.alone FROM chosen AS c) THEN {set} ELSE true END)::int AS ours,
    CASE WHEN (SELECT c.alone FROM chosen AS c) THEN set_config('application_name', {name}, false) ELSE {name} END AS name,
    {waited} AS waited, array_position((SELECT c.ids FROM chosen AS c), t.id) AS number,
    date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost

-- name: held_groups — a hash of the name of each group that is held, as this statement sees it: whoever sees a row that was
-- inserted after its group was held, sees that too
ARRAY(SELECT hashtextextended(h."group", 0) FROM {held} AS h)

-- name: picked — how each take ends, of the rows that it has `looked` at: the groups with a free slot that nobody holds, the
-- longest-waiting first; the first due rows of each, which need not be those, where `hidden` has others, from the place on,
-- unless the lane is one of those `named`; and these taken
), groups AS MATERIALIZED (
    SELECT d.lane, d."group", d.remote, EXISTS (SELECT FROM named AS n WHERE n.lane = d.lane) AS named, coalesce(s.used, 0) AS used,
        greatest(max(d.max), 0)::bigint - coalesce(s.used, 0) + 1 AS free, count(*) AS seen,
        array_agg(DISTINCT d.max ORDER BY d.max DESC) AS levels
    FROM looked AS d
    LEFT JOIN held AS s ON s.lane = d.lane
    WHERE greatest(d.max, 0) >= coalesce(s.used, 0) AND NOT (d.max < 0 AND d.lane = ANY ($2::bigint[]))
        AND hashtextextended(d."group", 0) <> ALL ({held_groups})
    GROUP BY 1, 2, 3, 4, 5
    ORDER BY min(d.plan)
), picked AS MATERIALIZED (
    SELECT p.id, p.late, g.lane
    FROM groups AS g
    CROSS JOIN LATERAL (
        {levels}
        SELECT q.id, q.max, q.late, g.used + row_number() OVER (ORDER BY q.max DESC, q.plan, q.id) - 1 AS slot
        FROM (
            SELECT d.id, d.max, d.plan, d.late
            FROM (
                SELECT v.max FROM level AS v WHERE (SELECT h.walk FROM hidden AS h)
                UNION ALL
                SELECT s.max FROM unnest(g.levels) AS s (max) WHERE NOT (SELECT h.walk FROM hidden AS h)
            ) AS l
            CROSS JOIN LATERAL (
                SELECT t.id, t.max, t.plan, t.max >= 0 AND date_part('epoch', t.repeat) = 0 AND t.cron IS NULL
                    AND date_part('epoch', (SELECT now FROM instant)) - date_part('epoch', t.plan) > date_part('epoch', t.active) AS late
                FROM {task} AS t
                WHERE t.state = 'PLAN' AND {lane} = g.lane AND t.max = l.max
                    AND t."group" = g."group" AND coalesce(t.remote, '') = g.remote
                    AND t.plan <= (SELECT now FROM instant)
                    AND (t.plan, t.id) >= (
                        CASE WHEN g.named THEN '-infinity' ELSE (SELECT s.plan FROM place AS s) END,
                        CASE WHEN g.named THEN -9223372036854775808 ELSE (SELECT s.id FROM place AS s) END
                    )
                    AND NOT (t.max < 0 AND g.lane = ANY ($2::bigint[]))
                ORDER BY t.plan, t.id
                LIMIT least(g.free, $1::int)
                FOR NO KEY UPDATE SKIP LOCKED
            ) AS d
            LIMIT least(g.free, $1::int)
        ) AS q
    ) AS p
    WHERE p.slot <= greatest(p.max, 0)
    LIMIT $1::int
), taken AS (
    UPDATE {task} AS t
    SET state = CASE WHEN p.late THEN 'GONE'::{state} ELSE 'TAKE'::{state} END,
        pid = CASE WHEN NOT p.late THEN pg_backend_pid() END,
        start = CASE WHEN NOT p.late THEN greatest(clock_timestamp(), $6::timestamptz, t.plan) END,
        stop = CASE WHEN p.late THEN clock_timestamp() END,
        error = CASE WHEN p.late THEN 'ERROR:  task not active' ELSE t.error END
    FROM picked AS p
    WHERE t.id = p.id AND t.id = ANY (ARRAY(SELECT q.id FROM picked AS q))
    RETURNING t.id, t.attempt, p.late, p.lane, t.max, t.count, date_part('epoch', t.live) AS live, t.plan
)

-- name: one — the one row that is due from the place ($4 $5) on, if it may start at the instant ($1, or now). $2 the lanes of
-- the slots in use
instant AS MATERIALIZED (
    SELECT least($1::timestamptz, clock_timestamp()) AS now
), due AS MATERIALIZED (
    SELECT t.id, {lane} AS lane, t.max
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= (SELECT now FROM instant) AND (t.plan, t.id) >= ($4::timestamptz, $5::bigint)
    ORDER BY t.plan, t.id
    LIMIT 2
), seen AS MATERIALIZED (
    SELECT count(*) AS due FROM due
), one AS MATERIALIZED (
    SELECT t.id, d.lane
    FROM due AS d
    JOIN {task} AS t ON t.id = d.id AND t.id = ANY (ARRAY(SELECT e.id FROM due AS e)) AND t.state::text = 'PLAN'
    -- All of it of the row as it is when it is locked: it may have been changed since it was seen.
    WHERE t.plan <= (SELECT now FROM instant) AND {lane} = d.lane AND t.max = d.max
        AND (SELECT s.due FROM seen AS s) = 1 AND hashtextextended(t."group", 0) <> ALL ({held_groups})
        AND d.max >= (SELECT count(*) FROM unnest($2::bigint[]) AS l (lane) WHERE l.lane = d.lane)
        AND (t.repeat <> interval '0' OR t.cron IS NOT NULL
            OR date_part('epoch', (SELECT now FROM instant)) - date_part('epoch', t.plan) <= date_part('epoch', t.active))
    FOR NO KEY UPDATE OF t SKIP LOCKED
)

-- name: coming — seconds until the next moment that is planned after the instant
(
        SELECT date_part('epoch', t.plan) - date_part('epoch', clock_timestamp())
        FROM {task} AS t
        WHERE t.state = 'PLAN' AND t.plan > (SELECT now FROM instant)
        ORDER BY t.plan
        LIMIT 1
    )

-- name: answer — what a take answers with first: the due rows seen that free slots are for, the groups of which nothing ran,
-- and the instant
SELECT coalesce((SELECT sum(least(seen, free)) FROM groups), 0)::bigint AS seen,
    (SELECT count(*) FROM groups WHERE used = 0) AS waiting, i.now,

-- name: place — and where the next quick look starts
least((SELECT s.plan FROM place AS s), i.now - interval '1 second')::text AS place,
    CASE WHEN (SELECT s.plan FROM place AS s) <= i.now - interval '1 second' THEN (SELECT s.id FROM place AS s)
        ELSE -9223372036854775808 END AS place_id

-- name: expired — for sweep of history.sql: has the row ended, and longer ago than such rows are kept? One that never ran,
-- stopped by somebody who may not write when, ended at its plan
((t.stop IS NOT NULL OR t.state::text = 'STOP' AND t.pid IS NULL)
    AND (SELECT i.now FROM instant AS i) - date_part('epoch', coalesce(t.stop, t.plan)) > CASE
        WHEN t.state::text IN ('DONE', 'GONE', 'STOP') THEN $4::float8
        WHEN t.state::text = 'FAIL' THEN $5::float8
    END)

-- name: by_group — for monitor.sql: how many rows were `seen`, and since when, of each of the $2 groups that have most of
-- them and of all others together (null)
, counted AS (
    SELECT s."group", count(*) AS tasks, min(s.since) AS since, row_number() OVER (ORDER BY count(*) DESC, s."group") AS place
    FROM seen AS s
    GROUP BY 1
)
SELECT convert_to(CASE WHEN c.place <= $2::int THEN c."group" END, getdatabaseencoding()), sum(c.tasks)::bigint,
    date_part('epoch', statement_timestamp()) - date_part('epoch', min(c.since))
FROM counted AS c
GROUP BY 1
