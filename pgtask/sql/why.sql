-- Why a task does not start, or what became of it: what `pgtask why` asks. These read, and write nothing; `claim` is
-- rolled back. Their session has the server's own search_path. Times are seconds since 1970 as text, which coming.py reads.

-- name: asked — the row, and how it stands to the clock and to its group. $1 id
SELECT t.id, t.state::text AS state, t."group", t.remote, {lane} AS lane, t.max, t.count, date_part('epoch', t.live) AS live,
    extract(epoch FROM clock_timestamp())::text AS now, extract(epoch FROM t.plan)::text AS plan,
    extract(epoch FROM t.start)::text AS start, extract(epoch FROM t.stop)::text AS stop,
    t.plan > clock_timestamp() AS later, t.plan = 'infinity' AS never,
    t.max >= 0 AND date_part('epoch', t.repeat) = 0 AND t.cron IS NULL
        AND date_part('epoch', clock_timestamp()) - date_part('epoch', t.plan) > date_part('epoch', t.active) AS late,
    t.active::text AS active, t.repeat <> interval '0' AS repeated, t.repeat::text AS repeat, t.cron,
    coalesce(t.zone, current_setting('TimeZone')) AS zone, t.first IS NOT NULL AS aligned, date_part('epoch', t.timeout) AS timeout,
    t.pid, t.attempt, t.retry, t.error, t.code, t.xmax::text <> '0' AS touched, t.depend, t.anyway, t.key, t.parent,
    extract(epoch FROM h.since)::text AS held_since, h.by AS held_by
FROM {task} AS t
LEFT JOIN {held} AS h ON h."group" = t."group"
WHERE t.id = $1::bigint;

-- name: last_id — the greatest id that was ever given, or 0, if it may be seen
SELECT CASE WHEN has_sequence_privilege(s.name, 'SELECT, USAGE') THEN coalesce(pg_sequence_last_value(s.name::regclass), 0) END AS last
FROM pg_get_serial_sequence({regclass}, 'id') AS s (name);

-- name: served — who serves the table: what he noted down, who holds the MASTER lock, and whether he sleeps; and whether
-- the trigger that wakes him is there ("O" or "A": it fires)
SELECT pg_is_in_recovery() AS standby, m.term, m.host, m.pid, m.backend, extract(epoch FROM m.since)::text AS since,
    l.pid AS holder, l.pid = m.backend AND (a.backend_start IS NULL OR a.backend_start = m.backend_start) AS leads,
    pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS name, a.state, a.wait_event_type, a.wait_event,
    extract(epoch FROM a.state_change)::text AS changed, pg_blocking_pids(l.pid) AS blockers,
    EXISTS (
        SELECT FROM pg_locks AS s
        WHERE s.locktype = 'advisory' AND s.granted AND s.mode = 'ExclusiveLock' AND s.database = d.oid
            AND s.classid = {regclass}::regclass::oid AND s.objid = 4294967295 AND s.objsubid = 2
    ) AS asleep,
    (SELECT t.tgenabled::text FROM pg_trigger AS t WHERE t.tgrelid = {regclass}::regclass AND t.tgname = 'pgtask_wake') AS wake
FROM pg_database AS d
LEFT JOIN {master} AS m ON true
LEFT JOIN pg_locks AS l ON l.locktype = 'advisory' AND l.granted AND l.database = d.oid
    AND l.classid = {regclass}::regclass::oid AND l.objid = 4294967294 AND l.objsubid = 2
LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = l.pid
WHERE d.datname = current_database();

-- name: beside — the runs of a group: who has its slots. $1 lane, $2 the id of a row that is asked for
SELECT t.id, t.state::text AS state, t.max, t.pid, extract(epoch FROM t.start)::text AS start, a.pid IS NOT NULL AS owned,
    a.state AS session, a.wait_event_type, a.wait_event
FROM {task} AS t
LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
WHERE (t.state IN ('TAKE', 'WORK') OR t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL AND a.pid IS NOT NULL)
    AND {lane} = $1::bigint AND t.id <> $2::bigint
ORDER BY t.start, t.id;

-- name: ahead — how many due rows of the group go before this one, up to $4. $1 lane, $2 max, $3 id
SELECT count(*) AS rows
FROM (
    SELECT FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} = $1::bigint AND t.plan <= clock_timestamp()
        AND (t.max > $2::int OR t.max = $2::int AND (t.plan, t.id) < ((SELECT r.plan FROM {task} AS r WHERE r.id = $3::bigint), $3::bigint))
    LIMIT $4::int
) AS a;

-- name: crowd — how much goes on in the table: its runs, the due rows planned before this one, and the workers of all
-- masters of this server that are busy. $1 id, $2 rows counted at most
SELECT (SELECT count(*) FROM {task} AS t WHERE t.state IN ('TAKE', 'WORK')) AS runs,
    (SELECT count(*) FROM (
        SELECT FROM {task} AS t
        WHERE t.state = 'PLAN' AND (t.plan, t.id) < ((SELECT r.plan FROM {task} AS r WHERE r.id = $1::bigint), $1::bigint)
        LIMIT $2::int
    ) AS b) AS before,
    (SELECT count(*) FROM pg_stat_get_activity(NULL) AS a WHERE a.application_name ~ '^pgtask .* .* .* [0-9]+$') AS workers;

-- name: rested — the last end of a run of the group that pauses, of the table's last $2 rows. $1 lane
SELECT extract(epoch FROM max(t.stop))::text AS stop
FROM (SELECT * FROM {task} AS t ORDER BY t.id DESC LIMIT $2::int) AS t
WHERE t.stop IS NOT NULL AND t.start IS NOT NULL AND t.max < 0 AND {lane} = $1::bigint;

-- name: claim — can the row be locked as a take locks it? $1 id
SELECT t.id FROM {task} AS t WHERE t.id = $1::bigint FOR NO KEY UPDATE SKIP LOCKED;

-- name: lockers — the transaction that has the row locked. $1 id
WITH row AS MATERIALIZED (
    SELECT t.xmax AS xid FROM {task} AS t WHERE t.id = $1::bigint AND t.xmax <> '0'
)
SELECT l.pid, pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS name, a.state,
    extract(epoch FROM a.xact_start)::text AS since, p.gid
FROM row AS r
JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = r.xid
LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = l.pid
LEFT JOIN pg_prepared_xacts AS p ON p.transaction = r.xid;

-- name: lockers_together — the same where several share the lock: only then their number is in xmax. $1 id
SELECT l.pid, pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS name, a.state,
    extract(epoch FROM a.xact_start)::text AS since, p.gid
FROM {task} AS t
CROSS JOIN LATERAL pg_get_multixact_members(t.xmax) AS m
JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = m.xid
LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = l.pid
LEFT JOIN pg_prepared_xacts AS p ON p.transaction = m.xid
WHERE t.id = $1::bigint AND m.mode <> 'keysh';

-- name: session — one session, and who keeps it waiting. $1 pid, $2 when its run began at the latest
SELECT a.pid, a.state, a.wait_event_type, a.wait_event, extract(epoch FROM a.state_change)::text AS changed,
    b.pid AS blocker, pg_get_userbyid(b.usesysid)::text AS role, b.application_name AS name, b.state AS doing,
    extract(epoch FROM b.xact_start)::text AS since
FROM pg_stat_get_activity(NULL) AS a
LEFT JOIN LATERAL unnest(pg_blocking_pids(a.pid)) AS w (pid) ON true
LEFT JOIN pg_stat_get_activity(NULL) AS b ON b.pid = w.pid
WHERE a.pid = $1::int AND (a.backend_start <= to_timestamp($2::float8) OR a.backend_start IS NULL);

-- name: reported — how far a run says that it is. $1 id, $2 attempt
SELECT p.percent, p.message, extract(epoch FROM p.at)::text AS at FROM {report} AS p WHERE p.id = $1::bigint AND p.attempt = $2::int;

-- name: chain — what a row waits for, directly or by what these wait for, up to $2 rows. An id without a row was removed.
-- $1 id
WITH RECURSIVE chain (id) AS (
    SELECT unnest(t.depend) FROM {task} AS t WHERE t.id = $1::bigint
    UNION
    SELECT u.id
    FROM chain AS c
    JOIN {task} AS t ON t.id = c.id AND t.state::text = 'WAIT'
    CROSS JOIN LATERAL unnest(t.depend) AS u (id)
)
SELECT c.id, t.state::text AS state, c.id = ANY (r.depend) AS direct, t.depend IS NOT NULL AND t.state::text = 'WAIT' AS waits,
    coalesce(t.state::text IN ('DONE', 'FAIL', 'GONE') OR t.state::text = 'STOP' AND (t.stop IS NOT NULL OR t.pid IS NULL), true) AS ended
FROM (SELECT c.id FROM chain AS c LIMIT $2::int) AS c
CROSS JOIN (SELECT t.depend FROM {task} AS t WHERE t.id = $1::bigint) AS r
LEFT JOIN {task} AS t ON t.id = c.id
ORDER BY c.id;

-- name: lockers_of_table — who has the whole table locked, so that nothing of it can be read
SELECT l.pid, pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS name, a.state, extract(epoch FROM a.xact_start)::text AS since,
    NULL::text AS gid
FROM pg_locks AS l
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'AccessExclusiveLock' AND l.relation = {regclass}::regclass
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database());
