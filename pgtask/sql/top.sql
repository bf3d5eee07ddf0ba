-- What `pgtask top` reads of a table (user/top/look.py): read only, in a session whose search_path is the server's own and
-- which walks indexes in order. Nothing here costs more where more rows are finished, planned for later, or due.

-- name: top_rights — what there is to be read: the task table (null: there is none), and the small tables beside it
SELECT has_table_privilege(to_regclass({regclass})::oid, 'SELECT'),
    coalesce(has_table_privilege(to_regclass({master_text})::oid, 'SELECT'), false),
    coalesce(has_table_privilege(to_regclass({held_text})::oid, 'SELECT'), false),
    coalesce(has_table_privilege(to_regclass({report_text})::oid, 'SELECT'), false),
    current_setting('server_version'), current_setting('server_encoding'), session_user::text;

-- name: top — everything at once, as one JSON document with ages in seconds. {leader_row}, {held_rows} and {report_rows}
-- are the statements below. $1 running rows at most, $2 due rows, and others counted, at most, $3 rows looked at for how
-- they ended, before each of three places: the newest row, the newest that runs, and the first that is due; $4 seconds
-- that a rate is of, $5 seconds that failures are counted for, $6 groups, and failed rows, at most
WITH instant AS MATERIALIZED (
    SELECT clock_timestamp() AS now
), held AS MATERIALIZED (
    {held_rows}
), report AS MATERIALIZED (
    {report_rows}
), running AS MATERIALIZED (
    SELECT t.id, t.state::text AS state, t."group", coalesce(t.remote, '') AS remote, t.max, t.pid, t.attempt, t.start,
        date_part('epoch', t.timeout) AS timeout, left(t.input, 400) AS input
    FROM {task} AS t
    WHERE {running}
    LIMIT $1::int
), due AS MATERIALIZED (
    SELECT t.id, t."group", coalesce(t.remote, '') AS remote, t.max, t.plan
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= (SELECT i.now FROM instant AS i)
    ORDER BY t.plan, t.id
    LIMIT $2::int
), edge AS MATERIALIZED (
    SELECT max(t.id) AS id FROM {task} AS t
    UNION
    SELECT max(r.id) FROM running AS r
    UNION
    (SELECT d.id FROM due AS d ORDER BY d.plan, d.id LIMIT 1)
), ended AS MATERIALIZED (
    SELECT DISTINCT l.id, l.state, l."group", l.remote, l.stop
    FROM edge AS e
    CROSS JOIN LATERAL (
        SELECT t.id, t.state::text AS state, t."group", coalesce(t.remote, '') AS remote, t.stop
        FROM {task} AS t
        WHERE t.id <= e.id
        ORDER BY t.id DESC
        LIMIT $3::int
    ) AS l
    WHERE l.stop IS NOT NULL
), lately AS MATERIALIZED (
    SELECT e.state, e."group", e.remote, e.stop
    FROM ended AS e
    WHERE e.stop > (SELECT i.now FROM instant AS i) - make_interval(secs => $4::float8)
), span AS MATERIALIZED (
    -- Where more have ended than were looked at, those that were are of a shorter time.
    SELECT CASE WHEN count(*) < $3::int THEN $4::float8
        ELSE greatest(0.001, date_part('epoch', (SELECT i.now FROM instant AS i) - min(l.stop))) END AS seconds
    FROM lately AS l
), failed AS MATERIALIZED (
    SELECT e.id, e."group", e.remote, e.stop
    FROM ended AS e
    WHERE e.state = 'FAIL'
), groups AS MATERIALIZED (
    SELECT g."group", g.remote, sum(g.running)::int AS running, sum(g.due)::int AS due, CASE WHEN max(g.max) IS NOT NULL THEN greatest(max(g.max), 0)::bigint + 1 END AS slots, min(g.plan) AS plan, sum(g.done)::int AS done, sum(g.failed)::int AS failed
    FROM (
        SELECT r."group", r.remote, 1 AS running, 0 AS due, r.max, NULL::timestamptz AS plan, 0 AS done, 0 AS failed FROM running AS r
        UNION ALL
        SELECT d."group", d.remote, 0, 1, d.max, d.plan, 0, 0 FROM due AS d
        UNION ALL
        SELECT l."group", l.remote, 0, 0, NULL, NULL, 1, 0 FROM lately AS l WHERE l.state = 'DONE'
        UNION ALL
        SELECT f."group", f.remote, 0, 0, NULL, NULL, 0, 1
        FROM failed AS f
        WHERE f.stop > (SELECT i.now FROM instant AS i) - make_interval(secs => $5::float8)
        UNION ALL
        SELECT h."group", '', 0, 0, NULL, NULL, 0, 0 FROM held AS h
    ) AS g
    GROUP BY 1, 2
), relation AS MATERIALIZED (
    SELECT {regclass}::regclass::oid AS oid
    UNION
    SELECT p.relid::oid FROM pg_partition_tree({regclass}::regclass) AS p
)
SELECT json_build_object(
    'at', to_char(i.now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
    'epoch', date_part('epoch', i.now),
    'leader', (SELECT row_to_json(m) FROM ({leader_row}) AS m),
    'standing_by', (
        SELECT count(*) FROM pg_stat_get_activity(NULL) AS a
        WHERE a.application_name = 'pgtask master' AND a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND NOT EXISTS (
                SELECT FROM pg_locks AS l
                WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted AND l.objid = 4294967294 AND l.objsubid = 2
            )
    ),
    'workers', (
        SELECT count(*) FROM pg_stat_get_activity(NULL) AS a
        WHERE a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
            AND (a.application_name = 'pgtask worker' OR a.pid IN (SELECT r.pid FROM running AS r WHERE r.state <> 'TAKE'))
    ),
    'slots', (SELECT count(*) FROM running),
    'due', (SELECT count(*) FROM due),
    'oldest', (SELECT date_part('epoch', i.now - min(d.plan)) FROM due AS d WHERE isfinite(d.plan)),
    'planned', (SELECT count(*) FROM (
        SELECT FROM {task} AS t WHERE t.state = 'PLAN' AND t.plan > i.now ORDER BY t.plan LIMIT $2::int) AS p),
    'next', (
        SELECT CASE WHEN isfinite(p.plan) THEN date_part('epoch', p.plan - i.now) END
        FROM (SELECT t.plan FROM {task} AS t WHERE t.state = 'PLAN' AND t.plan > i.now ORDER BY t.plan LIMIT 1) AS p
    ),
    'waiting', (SELECT count(*) FROM (SELECT FROM {task} AS t WHERE t.state = 'WAIT' LIMIT $2::int) AS w),
    'done', (SELECT count(*) FROM lately AS l WHERE l.state = 'DONE'),
    'failing', (SELECT count(*) FROM lately AS l WHERE l.state = 'FAIL'),
    'span', (SELECT s.seconds FROM span AS s),
    'failed', (SELECT count(*) FROM failed AS f WHERE f.stop > i.now - make_interval(secs => $5::float8)),
    'inserted', (SELECT sum(pg_stat_get_tuples_inserted(r.oid)) FROM relation AS r),
    'removed', (SELECT sum(pg_stat_get_tuples_deleted(r.oid)) FROM relation AS r),
    'running', (
        SELECT coalesce(json_agg(row_to_json(r)), '[]')
        FROM (
            SELECT r.id, r.state, r."group", r.remote, r.pid, r.attempt, date_part('epoch', i.now - r.start) AS elapsed, r.timeout,
                a.state AS session, a.wait_event_type, a.wait_event, p.percent, p.message, r.input
            FROM running AS r
            LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = r.pid AND r.state <> 'TAKE'
            LEFT JOIN report AS p ON p.id = r.id AND p.attempt = r.attempt
        ) AS r
    ),
    'groups', (
        SELECT coalesce(json_agg(row_to_json(g)), '[]')
        FROM (
            SELECT g."group", g.remote, g.running, g.due, g.slots,
                CASE WHEN isfinite(g.plan) THEN date_part('epoch', i.now - g.plan) END AS oldest,
                g.done, g.failed, h."group" IS NOT NULL AS held, date_part('epoch', i.now - h.since) AS held_for, h.by AS held_by
            FROM groups AS g
            LEFT JOIN held AS h ON h."group" = g."group"
            ORDER BY g.running DESC, g.due DESC, g.failed DESC, g.done DESC
            LIMIT $6::int
        ) AS g
    ),
    'group_count', (SELECT count(*) FROM groups),
    'failures', (
        SELECT coalesce(json_agg(row_to_json(f)), '[]')
        FROM (
            SELECT f.id, f."group", f.remote, date_part('epoch', i.now - f.stop) AS ago, date_part('epoch', f.stop - t.start) AS ran,
                t.attempt, t.code, left(t.error, 400) AS error, left(t.input, 400) AS input
            FROM (SELECT f.id, f."group", f.remote, f.stop FROM failed AS f ORDER BY f.stop DESC LIMIT $6::int) AS f
            JOIN {task} AS t ON t.id = f.id
        ) AS f
    )
)::text
FROM instant AS i;

-- name: top_leader — who serves the table, and whether its session still holds the lock of who does
SELECT m.term, m.host, m.pid, to_char(m.since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS since,
    date_part('epoch', clock_timestamp() - m.since) AS serving, EXISTS (
        SELECT FROM pg_locks AS l
        WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {regclass}::regclass::oid AND l.objid = 4294967294
            AND l.objsubid = 2 AND l.pid = m.backend
            AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    ) AS leads
FROM {master} AS m
WHERE m.term > 0

-- name: top_lock — the same for whom the master's table is not to be read: the lock alone
SELECT NULL::bigint AS term, NULL::text AS host, NULL::int AS pid, NULL::text AS since, NULL::float8 AS serving, true AS leads
FROM pg_locks AS l
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {regclass}::regclass::oid AND l.objid = 4294967294
    AND l.objsubid = 2 AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
LIMIT 1

-- name: top_held — the groups that somebody holds
SELECT h."group", h.since, h.by FROM {held} AS h

-- name: top_no_held
SELECT NULL::text AS "group", NULL::timestamptz AS since, NULL::text AS by WHERE false

-- name: top_report — how far runs are that have said so
SELECT p.id, p.attempt, p.percent, p.message FROM {report} AS p

-- name: top_no_report
SELECT NULL::bigint AS id, NULL::int AS attempt, NULL::numeric AS percent, NULL::text AS message WHERE false

-- name: top_task — one row, for people: one JSON document. $1 id
SELECT json_build_object(
    'id', t.id, 'state', t.state, 'group', t."group", 'remote', t.remote, 'parent', t.parent, 'plan', t.plan, 'start', t.start,
    'stop', t.stop, 'pid', t.pid, 'attempt', t.attempt, 'retry', t.retry, 'max', t.max, 'timeout', t.timeout, 'repeat', t.repeat,
    'cron', t.cron, 'zone', t.zone, 'key', t.key, 'depend', t.depend, 'data', left(t.data, 10000), 'input', left(t.input, 100000),
    'output', left(t.output, 100000), 'code', t.code, 'error', left(t.error, 100000), 'notice', left(t.notice, 10000),
    'attempts', t.attempts)::text
FROM {task} AS t
WHERE t.id = $1::bigint;
