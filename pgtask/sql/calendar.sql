-- Rows with a calendar: what comes after one, as the worker that runs it plans it (coming.py says when).

-- name: calendar — what the next row of a repeated task copies, and what the next plan of one with a calendar depends on,
-- as text, times as seconds since 1970: coming.py reads it. A run that is repeated counts from its first plan. $1 id
SELECT {copied} AS copied, t.cron,
    -- What the session says may be a task's.
    CASE WHEN t.cron IS NOT NULL THEN coalesce(t.zone, (SELECT s.reset_val FROM pg_settings AS s WHERE s.name = 'TimeZone')) END AS zone,
    -- What ran before it got the calendar that it has now does not count.
    extract(epoch FROM CASE
        WHEN (t.attempts -> 0 ->> 'plan')::timestamptz < t.first THEN t.plan
        ELSE coalesce((t.attempts -> 0 ->> 'plan')::timestamptz, t.plan)
    END)::text AS plan,
    extract(epoch FROM t.until)::text AS until, t.missed,
    (date_part('epoch', clock_timestamp()) - date_part('epoch', t.plan) > date_part('epoch', t.active))::text AS late,
    (t.attempts IS NOT NULL)::text AS again, extract(epoch FROM clock_timestamp())::text AS now
FROM {task} AS t
WHERE t.id = $1;

-- name: repeat_cron — plan the next row, and note the runs that were missed. Nothing if the row has no calendar any more,
-- or is to run once more itself; where it has got another calendar meanwhile the next row has no `first`, so that the
-- master finds its plan. {columns} are the copied columns, {values} the same of t. $1 id, $2 cron, $3 the zone,
-- $4 plan of the next row (null: none), $5 plans of those that were missed
WITH run AS MATERIALIZED (
    SELECT t.id, coalesce(t.first, t.plan) AS first, t.cron = $2::text AND coalesce(t.zone, $3::text) = $3::text AS same
    FROM {task} AS t
    WHERE t.id = $1::bigint AND t.cron IS NOT NULL AND t.state::text <> 'PLAN'
), coming AS MATERIALIZED (
    SELECT r.id, CASE WHEN r.same THEN $4::timestamptz ELSE clock_timestamp() END AS plan, CASE WHEN r.same THEN r.first END AS first
    FROM run AS r
), missed AS (
    INSERT INTO {task} (parent, plan, first, state, stop, error, {columns})
    SELECT r.id, m.plan, r.first, 'GONE', clock_timestamp(), 'ERROR:  run missed', {values}
    FROM run AS r
    JOIN {task} AS t ON t.id = r.id AND t.id = $1::bigint
    CROSS JOIN unnest($5::timestamptz[]) AS m (plan)
    WHERE r.same
)
INSERT INTO {task} (parent, plan, first, {columns})
SELECT c.id, c.plan, c.first, {values}
FROM coming AS c
JOIN {task} AS t ON t.id = c.id AND t.id = $1::bigint
WHERE c.plan <= coalesce(t.until, 'infinity');

-- name: unbegun — a row that ended without a run. $1 id, $2 attempt
UPDATE {task} AS t
SET attempt = t.attempt - 1, start = NULL, pid = NULL
WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'GONE';

-- name: upcoming — a row, and as text the next $2 plans of one that is repeated by an interval: those of its grid, if it is on
-- one, from its own, or about now if it runs. Times as in `calendar`. $1 id
SELECT t.state::text AS state, t.cron, coalesce(t.zone, current_setting('TimeZone')) AS zone, extract(epoch FROM t.plan)::text AS plan,
    t.first IS NOT NULL AS aligned, extract(epoch FROM coalesce(t.until, 'infinity'))::text AS until,
    extract(epoch FROM clock_timestamp())::text AS now, CASE WHEN t.repeat > interval '0' AND t.drift THEN t.repeat::text END AS drift,
    CASE WHEN t.repeat > interval '0' AND NOT t.drift THEN ARRAY(
        SELECT extract(epoch FROM CASE
            WHEN grid.number IS NULL THEN t.plan + t.repeat * n
            ELSE t.first + t.repeat * (grid.number + n)
        END)::text
        FROM generate_series(far.past, far.past + $2::int - 1) AS n
        ORDER BY n
    ) END AS plans
FROM {task} AS t
CROSS JOIN LATERAL (
    SELECT (date_part('year', t.repeat) * 12 + date_part('month', t.repeat)) * 2629746 + date_part('day', t.repeat) * 86400
        + date_part('hour', t.repeat) * 3600 + date_part('minute', t.repeat) * 60 + date_part('second', t.repeat) AS seconds
) AS length
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN t.state IN ('TAKE', 'WORK') AND length.seconds > 0 THEN
            greatest(0, floor((date_part('epoch', clock_timestamp()) - date_part('epoch', t.plan)) / length.seconds) - 1)
        ELSE 0
    END::bigint AS past
) AS far
LEFT JOIN LATERAL (
    SELECT d.number
    FROM (
        SELECT greatest(0, round((date_part('epoch', t.plan) - date_part('epoch', t.first)) / length.seconds) + k) AS number
        FROM generate_series(-2, 2) AS k
        WHERE length.seconds > 0
    ) AS d
    WHERE t.first + t.repeat * d.number = t.plan
    LIMIT 1
) AS grid ON true
WHERE t.id = $1::bigint;
