-- What the monitor reads of a task table for each page of metrics. Every count ends at a bound and walks a partial index,
-- so that its cost depends neither on how many rows are finished nor on how many are planned. These run in a session of
-- the monitor's own that only reads, with the planner's settings of the poller's. A group comes as it is stored, for not
-- every text of every encoding is one in UTF8.

-- name: backlog — the due rows, at most $1, that have waited longest: how many, since when (seconds); of each of the $2
-- groups that have most of them and of all others together (null)
WITH seen AS MATERIALIZED (
    SELECT left(t."group", 60) AS "group", t.plan AS since
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= statement_timestamp()
    ORDER BY t.plan, t.id
    LIMIT $1::int
)
{by_group};

-- name: in_use — the same of the slots in use: and how long ago the longest of the runs began
WITH seen AS MATERIALIZED (
    SELECT left(t."group", 60) AS "group", CASE WHEN t.state = 'WORK' THEN t.start END AS since
    FROM {task} AS t
    WHERE t.state IN ('TAKE', 'WORK')
    ORDER BY {lane}
    LIMIT $1::int
)
{by_group};

-- name: at_rest — how many rows, at most $1, are planned for later, and how many wait for others; and the current term
SELECT (
    SELECT count(*) FROM (
        SELECT FROM {task} AS t
        WHERE t.state = 'PLAN' AND t.plan > statement_timestamp()
        ORDER BY t.plan, t.id
        LIMIT $1::int
    ) AS planned
), (
    SELECT count(*) FROM (
        SELECT FROM {task} AS t
        WHERE t.state = 'WAIT'
        ORDER BY t.pid, t.id
        LIMIT $1::int
    ) AS waiting
), (SELECT m.term FROM {master} AS m);
