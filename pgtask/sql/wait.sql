-- Rows that wait: for their dependencies, or for the first match of their calendar. The poller says these. A row in WAIT
-- with pid null was not looked at yet, one with pid 0 was: then whatever it depends on had not ended.

-- name: waiting — rows to look at, in the order of their ids. $1 at most, $2 the id before the first, $3 null: those that
-- were not looked at yet; 0: the others, which have dependencies
SELECT t.id, t.depend IS NOT NULL AS depends, t.cron IS NOT NULL AND t.first IS NULL AS unplanned,
    t.cron, coalesce(t.zone, current_setting('TimeZone')) AS zone,
    date_part('epoch', CASE WHEN isfinite(t.plan) THEN t.plan ELSE clock_timestamp() END) AS plan, t.plan = 'infinity' AS never,
    date_part('epoch', t.until) AS until
FROM {task} AS t
WHERE t.state = 'WAIT' AND t.pid IS NOT DISTINCT FROM $3::int AND t.id > $2::bigint
ORDER BY t.id
LIMIT $1::int;

-- name: searching — for what follows in the transaction
SELECT set_config('enable_bitmapscan', 'on', true);

-- name: dependents — rows that wait for one of these to end. $1 ids
SELECT t.id FROM {task} AS t WHERE t.state = 'WAIT' AND t.depend && $1::bigint[];

-- name: waits — does any row wait for another?
SELECT EXISTS (SELECT FROM {task} AS t WHERE t.state = 'WAIT' AND t.depend IS NOT NULL);

-- name: align — rows of a calendar get their first plan, and those that depend on nothing go; or they have failed.
-- Answers with those that somebody has locked. Of each: $1 id, $2 calendar, $3 zone or '', as they were when the match was
-- looked for; $4 the first match (seconds since 1970, null where the row is never to run), $5 what is wrong, or null
WITH asked AS MATERIALIZED (
    SELECT r.id, r.cron, r.zone, to_timestamp(r.plan) AS plan, r.wrong
    FROM unnest($1::bigint[], $2::text[], $3::text[], $4::float8[], $5::text[]) AS r (id, cron, zone, plan, wrong)
), found AS MATERIALIZED (
    SELECT a.id, a.plan, a.wrong
    FROM asked AS a
    JOIN {task} AS t ON t.id = a.id AND t.state::text = 'WAIT' AND t.pid IS NULL AND t.first IS NULL
        AND t.cron = a.cron AND coalesce(t.zone, current_setting('TimeZone')) = a.zone
    FOR NO KEY UPDATE OF t SKIP LOCKED
), written AS (
    UPDATE {task} AS t
    SET state = CASE WHEN f.wrong IS NOT NULL THEN 'FAIL'::{state} WHEN t.depend IS NULL THEN 'PLAN'::{state} ELSE t.state END,
        plan = coalesce(f.plan, t.plan), first = CASE WHEN f.wrong IS NULL THEN coalesce(f.plan, t.plan) END,
        stop = CASE WHEN f.wrong IS NOT NULL THEN clock_timestamp() END,
        code = CASE WHEN f.wrong IS NOT NULL THEN '22023' END,
        error = CASE WHEN f.wrong IS NOT NULL THEN concat('ERROR:  ', f.wrong) END
    FROM found AS f
    WHERE t.id = f.id
    RETURNING t.id, f.wrong
)
SELECT coalesce((SELECT array_agg(w.id) FROM written AS w WHERE w.wrong IS NOT NULL), '{}'),
    (SELECT count(*) FROM asked) - (SELECT count(*) FROM written);

-- name: decide — of rows that wait for others: those whose dependencies have all ended are planned, those of which one has
-- ended otherwise than DONE are GONE, and all that wait for these, unless they are to run anyway; the rest is marked as
-- looked at. One that is not there any more was removed after it was done: whoever deletes another one tells its
-- dependents so. Answers with the rows that are GONE, and how many somebody has locked. $1 ids
WITH RECURSIVE asked AS MATERIALIZED (
    SELECT t.id, t.anyway, t.pid,
        (SELECT min(d.id) FROM unnest(t.depend) AS u (id) JOIN {task} AS d ON d.id = u.id
         WHERE d.state::text IN ('FAIL', 'GONE', 'STOP')) AS failed,
        EXISTS (SELECT FROM unnest(t.depend) AS u (id) JOIN {task} AS d ON d.id = u.id
                -- A run that was stopped goes on for a while.
                WHERE d.state::text NOT IN ('DONE', 'FAIL', 'GONE', 'STOP')
                    OR d.state::text = 'STOP' AND d.stop IS NULL AND d.pid IS NOT NULL) AS pending
    FROM unnest($1::bigint[]) AS i (id)
    JOIN {task} AS t ON t.id = i.id AND t.state::text = 'WAIT' AND t.depend IS NOT NULL AND NOT (t.cron IS NOT NULL AND t.first IS NULL)
), lost (id, cause) AS (
    SELECT a.id, a.failed FROM asked AS a WHERE a.failed IS NOT NULL AND NOT a.anyway
    UNION
    SELECT t.id, l.id FROM lost AS l JOIN {task} AS t ON t.state = 'WAIT' AND t.depend @> ARRAY[l.id] AND NOT t.anyway
), wanted AS MATERIALIZED (
    SELECT l.id, min(l.cause) AS cause, 'GONE' AS state, NOT EXISTS (
            SELECT FROM asked AS a WHERE a.id = l.id AND a.failed IS NOT NULL
        ) AS passed_on
    FROM lost AS l
    GROUP BY l.id
    UNION ALL
    SELECT a.id, NULL, CASE WHEN a.pending THEN 'WAIT' ELSE 'PLAN' END, false
    FROM asked AS a
    WHERE (a.failed IS NULL OR a.anyway) AND NOT (a.pending AND a.pid IS NOT NULL) AND a.id NOT IN (SELECT l.id FROM lost AS l)
), found AS MATERIALIZED (
    SELECT w.id, w.cause, w.state, w.passed_on
    FROM wanted AS w
    JOIN {task} AS t ON t.id = w.id AND t.state::text = 'WAIT'
    FOR NO KEY UPDATE OF t SKIP LOCKED
), written AS (
    UPDATE {task} AS t
    SET state = f.state::{state}, pid = CASE f.state WHEN 'WAIT' THEN 0 END,
        -- It is late by no fault of its own; a calendar's match stays what it is.
        plan = CASE WHEN f.state = 'PLAN' AND t.cron IS NULL THEN greatest(t.plan, clock_timestamp()) ELSE t.plan END,
        stop = CASE f.state WHEN 'GONE' THEN clock_timestamp() END,
        error = CASE f.state WHEN 'GONE' THEN concat('ERROR:  task ', f.cause, ', on which this one depends, is ',
            coalesce((SELECT nullif(d.state::text, 'WAIT') FROM {task} AS d WHERE d.id = f.cause), 'GONE')) END,
        code = CASE f.state WHEN 'GONE' THEN 'PT001' END
    FROM found AS f
    -- Whoever has a row locked may be taking it out of the chain: then nothing is passed on by any.
    WHERE t.id = f.id AND NOT (f.passed_on AND (SELECT count(*) FROM found) < (SELECT count(*) FROM wanted))
    RETURNING t.id, f.state
)
SELECT coalesce((SELECT array_agg(w.id) FROM written AS w WHERE w.state = 'GONE'), '{}'),
    (SELECT count(*) FROM wanted) - (SELECT count(*) FROM written);
