-- What the poller of a table says to it. These run in the poller's own session, whose search_path is the server's own.

-- name: lead — begin a new term; the session holds the MASTER lock; and when its backend started. $1 host, $2 pid
-- of the master
INSERT INTO {master} AS m (one, term, host, pid, backend, backend_start, since)
SELECT true, 1, $1, $2::int, pg_backend_pid(), a.backend_start, clock_timestamp()
FROM pg_stat_get_activity(pg_backend_pid()) AS a
ON CONFLICT (one) DO UPDATE
SET term = m.term + 1, host = excluded.host, pid = excluded.pid, backend = excluded.backend,
    backend_start = excluded.backend_start, since = excluded.since
RETURNING m.term, m.backend_start::text;

-- name: leader — who serves the table
SELECT m.host, m.pid, m.backend, m.term FROM {master} AS m;

-- name: holds — the groups that are held
SELECT h."group" FROM {held} AS h;

-- name: report — how far runs are that go on; what comes too late says nothing. Of each: $1 id, $2 attempt, $3 percent,
-- $4 message
INSERT INTO {report} AS p (id, attempt, percent, message, at)
SELECT r.id, r.attempt, r.percent, r.message, clock_timestamp()
FROM unnest($1::bigint[], $2::int[], $3::numeric[], $4::text[]) AS r (id, attempt, percent, message)
JOIN {task} AS t ON t.id = r.id AND t.id = ANY ($1::bigint[]) AND t.attempt = r.attempt AND t.state::text = 'WORK'
ON CONFLICT (id) DO UPDATE
SET attempt = excluded.attempt, percent = excluded.percent, message = excluded.message, at = excluded.at;

-- name: forget_reports — those of runs that have ended; how many there are left
WITH ended AS (
    DELETE FROM {report} AS p
    WHERE NOT EXISTS (SELECT FROM {task} AS t WHERE t.id = p.id AND t.attempt = p.attempt AND t.state::text = 'WORK')
    RETURNING p.id
)
SELECT (SELECT count(*) FROM {report}) - (SELECT count(*) FROM ended);

-- name: lock_master — at most one session in the cluster gets this. $1 table oid
SELECT pg_try_advisory_lock($1::oid::int, -2);

-- name: lock_asleep — say that we sleep, unless an insert that did not notify is in flight; and the instant. $1 table oid
SELECT pg_try_advisory_lock($1::oid::int, -1), clock_timestamp();

-- name: unlock_asleep — we are awake again. $1 table oid
SELECT pg_advisory_unlock($1::oid::int, -1);

-- name: take — the first due rows of every group, as many as it has free slots, the longest-waiting group first.
-- Rows that came too late become GONE on the way. Which groups have something due is read off the earliest due rows;
-- when these are as many as may be looked at, a backlog of full groups may hide others, which then are found at the other
-- end, where new rows come in, and by walking from group to group. So the cost is bounded whatever lies in the table, but
-- for dead entries of its indexes: a quick look starts from a place in the order of due rows, sees no more than the due
-- rows after it, the new ones and the first ones of some groups, and walks nowhere.
-- Answers with at least one row: for how many of the due rows that were seen their groups had free slots, how many groups with
-- due rows had no slot in use, the instant, where to walk on (null: every group was seen), what the look cost (seconds),
-- the place for the next quick look: a second ago at the latest, for inserts that are still in flight; the seconds until
-- the next moment that is planned after the instant (null: none); after the row that was taken, whether more rows are due
-- than were looked at from the place on; and a place a while ago from which on only some are due (null: too many are).
-- $1 rows at most, $2 lanes that rest after a negative max, $3 due rows, and groups, looked at, $4 the instant to take for now,
-- unless the clock was set back since, or null,
-- $5 the lanes of the slots in use, one for each: rows in TAKE and WORK are not counted, and so dead entries of the slot
-- index not read, $6 when this backend started: the owner of a row is known by having started before it, also after the clock was set
-- back, $7 the lane to walk on from, or null, $8 $9 the plan and id of the place to start from, $10 the instant of the last full look,
-- for a quick one, or null, $11 lanes to look at whatever else there is
WITH RECURSIVE instant AS MATERIALIZED (
    SELECT least($4::timestamptz, clock_timestamp()) AS now
), held AS MATERIALIZED (
    SELECT l.lane, count(*) AS used FROM unnest($5::bigint[]) AS l (lane) GROUP BY 1
), head AS MATERIALIZED (
    SELECT {lane} AS lane, t."group", coalesce(t.remote, '') AS remote, t.max, t.plan, t.id
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= (SELECT now FROM instant) AND (t.plan, t.id) >= ($8::timestamptz, $9::bigint)
    ORDER BY t.plan, t.id
    LIMIT $3::int
), place AS MATERIALIZED (
    SELECT h.plan, h.id FROM head AS h LIMIT 1
), hidden AS MATERIALIZED (
    SELECT count(*) >= $3::int AS rows, count(*) >= $3::int AND $10::timestamptz IS NULL AS walk FROM head
), tail AS MATERIALIZED (
    SELECT {lane} AS lane, t."group", coalesce(t.remote, '') AS remote, t.max, t.plan, t.id
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= (SELECT now FROM instant) AND t.plan >= coalesce($10::timestamptz - interval '1 second', '-infinity')
    ORDER BY t.plan DESC, t.id DESC
    LIMIT CASE WHEN (SELECT h.rows FROM hidden AS h) THEN $3::int ELSE 0 END
), walk (lane) AS (
    (SELECT {lane} FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} >= coalesce($7::bigint, -9223372036854775808)
    ORDER BY 1
    LIMIT CASE WHEN (SELECT h.walk FROM hidden AS h) THEN 1 ELSE 0 END)
    UNION ALL
    SELECT (SELECT {lane} FROM {task} AS t WHERE t.state = 'PLAN' AND {lane} > w.lane ORDER BY 1 LIMIT 1)
    FROM walk AS w
    WHERE w.lane IS NOT NULL
), walked AS MATERIALIZED (
    SELECT w.lane FROM walk AS w LIMIT $3::int
), named AS MATERIALIZED (
    SELECT unnest($11::bigint[]) AS lane
), first AS MATERIALIZED (
    SELECT g.lane, f."group", f.remote, f.max, f.plan, f.id
    FROM ((TABLE walked LIMIT {few}) UNION ALL TABLE named) AS g
    CROSS JOIN LATERAL (
        {levels}
        SELECT d."group", d.remote, d.max, d.plan, d.id
        FROM level AS l
        CROSS JOIN LATERAL (
            SELECT t."group", coalesce(t.remote, '') AS remote, t.max, t.plan, t.id
            FROM {task} AS t
            WHERE t.state = 'PLAN' AND {lane} = g.lane AND t.max = l.max AND t.plan <= (SELECT now FROM instant)
            ORDER BY t.plan, t.id
            LIMIT 1
        ) AS d
        LIMIT 1
    ) AS f
), looked AS (
    (TABLE head LIMIT {few}) UNION (TABLE tail LIMIT {few}) UNION TABLE first
{picked}
{answer}
    (SELECT max(lane) FROM walked HAVING count(lane) >= $3::int) AS walked,
    date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost,
    {place},
    {coming} AS next,
    t.id, t.attempt, t.late, t.lane, t.max, t.count, t.live,
    (SELECT h.rows FROM hidden AS h) AS hidden, greatest(n.plan, i.now - interval '1 minute')::text AS recent,
    CASE WHEN n.plan > i.now - interval '1 minute' THEN n.id ELSE -9223372036854775808 END AS recent_id
FROM instant AS i
LEFT JOIN (SELECT l.plan, l.id FROM tail AS l ORDER BY l.plan DESC, l.id DESC OFFSET 100 LIMIT 1) AS n
    ON n.plan < i.now - {recent}::interval
LEFT JOIN taken AS t ON true
ORDER BY t.plan, t.id;

-- name: glance — the same at the earliest due rows only, where there are more of them than workers: other groups have not
-- waited as long. $1 to $6 as above
WITH RECURSIVE instant AS MATERIALIZED (
    SELECT least($4::timestamptz, clock_timestamp()) AS now
), held AS MATERIALIZED (
    SELECT l.lane, count(*) AS used FROM unnest($5::bigint[]) AS l (lane) GROUP BY 1
), head AS MATERIALIZED (
    SELECT {lane} AS lane, t."group", coalesce(t.remote, '') AS remote, t.max, t.plan, t.id
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= (SELECT now FROM instant)
    ORDER BY t.plan, t.id
    LIMIT $3::int
), place AS MATERIALIZED (
    SELECT h.plan, h.id FROM head AS h LIMIT 1
), hidden AS MATERIALIZED (
    SELECT true AS walk
), named AS MATERIALIZED (
    SELECT NULL::bigint AS lane
), looked AS (
    TABLE head
{picked}
{answer}
    NULL::bigint AS walked, date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost,
    {place}, NULL::float8 AS next,
    t.id, t.attempt, t.late, t.lane, t.max, t.count, t.live
FROM instant AS i
LEFT JOIN taken AS t ON true
ORDER BY t.plan, t.id;

-- name: take_one — the same where not more than one row is due, and it may start: what the other statement has for more
-- costs it more than the taking does. It answers likewise; where more rows are due than it has taken, that one must look.
-- $1 the instant or null, $2 the lanes of the slots in use, $3 when this backend started, $4 $5 the plan and id of the
-- place to start from
WITH {one}, taken AS (
    UPDATE {task} AS t
    SET state = 'TAKE', pid = pg_backend_pid(), start = greatest(clock_timestamp(), $3::timestamptz, t.plan)
    FROM one AS o
    WHERE t.id = o.id AND t.id = ANY (ARRAY(SELECT e.id FROM due AS e))
    RETURNING t.id, t.attempt, o.lane, t.max, t.count, date_part('epoch', t.live) AS live
)
SELECT s.due AS seen, 0::bigint AS waiting, i.now, NULL::bigint AS walked,
    date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost,
    (i.now - interval '1 second')::text AS place, -9223372036854775808 AS place_id,
    {coming} AS next,
    t.id, t.attempt, false AS late, t.lane, t.max, t.count, t.live
FROM instant AS i
CROSS JOIN seen AS s
LEFT JOIN taken AS t ON true;

-- name: due_in — those of the lanes in which something is due, be it that somebody has it locked. $1 the lanes, $2 the
-- instant, or null
SELECT g.lane
FROM unnest($1::bigint[]) AS g (lane)
CROSS JOIN LATERAL (
    {levels}
    SELECT FROM level AS l
    CROSS JOIN LATERAL (
        SELECT FROM {task} AS t
        WHERE t.state = 'PLAN' AND {lane} = g.lane AND t.max = l.max AND t.plan <= least($2::timestamptz, statement_timestamp())
        LIMIT 1
    ) AS d
    LIMIT 1
) AS f;

-- name: expire — rows that came too late while their group was full, of the due rows after a place in their order.
-- Answers with how many there were and the place to go on from (null: the end). $1 rows looked at, $2 $3 the plan and
-- id of the place
WITH looked AS MATERIALIZED (
    SELECT t.id, t.plan, t.max, t.repeat, t.active
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= statement_timestamp() AND (t.plan, t.id) > ($2::timestamptz, $3::bigint)
    ORDER BY t.plan, t.id
    LIMIT $1::int
), passed AS MATERIALIZED (
    SELECT l.id, l.plan, l.max, l.repeat, l.active
    FROM looked AS l
    WHERE l.max >= 0 AND date_part('epoch', l.repeat) = 0
        AND date_part('epoch', statement_timestamp()) - date_part('epoch', l.plan) > date_part('epoch', l.active)
), late AS MATERIALIZED (
    SELECT t.id
    FROM passed AS o
    -- When it is locked it must still be what was seen.
    JOIN {task} AS t ON t.id = o.id AND t.id >= (SELECT min(e.id) FROM passed AS e) AND t.id <= (SELECT max(e.id) FROM passed AS e)
        AND t.state::text = 'PLAN' AND (t.plan, t.max, t.repeat, t.active) = (o.plan, o.max, o.repeat, o.active)
    WHERE t.cron IS NULL
    FOR NO KEY UPDATE OF t SKIP LOCKED
), gone AS (
    UPDATE {task} AS t
    SET state = 'GONE', stop = clock_timestamp(), error = 'ERROR:  task not active'
    FROM late AS l
    WHERE t.id = l.id AND t.id >= (SELECT min(e.id) FROM late AS e) AND t.id <= (SELECT max(e.id) FROM late AS e)
    RETURNING t.id
)
SELECT (SELECT count(*) FROM gone), l.plan::text, l.id
FROM (SELECT 1) AS one
LEFT JOIN (
    SELECT plan, id FROM looked WHERE (SELECT count(*) FROM looked) >= $1::int ORDER BY plan DESC, id DESC LIMIT 1
) AS l ON true;

-- name: release — rows that we took and no worker began. $1 ids
UPDATE {task} AS t
SET state = 'PLAN', pid = NULL, start = NULL
WHERE t.id = ANY ($1::bigint[]) AND t.state::text = 'TAKE' AND t.pid = pg_backend_pid();

-- name: terminate — end the sessions of dead workers that are still there. $1 their backends, $2 when these started
SELECT a.pid, pg_terminate_backend(a.pid)
FROM unnest($1::int[], $2::timestamptz[]) AS d (pid, start)
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = d.pid AND a.backend_start = d.start
WHERE a.pid <> pg_backend_pid();

-- name: resting — is the session of a worker doing nothing, later than this moment, and has it begun nothing? $1 its backend,
-- $2 the moment
SELECT clock_timestamp() > $2::timestamptz
    AND EXISTS (SELECT FROM pg_stat_get_activity($1) AS a WHERE a.state = 'idle')
    AND NOT EXISTS (SELECT FROM {task} AS t WHERE t.state = 'WORK' AND t.pid = $1::int);

-- name: unread — sessions of workers that have something to do, but whose server has said all it had to say and waits for
-- them, and since when; in the middle of a pipeline it calls that active. A remote task is run elsewhere meanwhile.
-- $1 the backends of our busy workers
SELECT a.pid, min(t.id), a.state_change::text
FROM pg_stat_get_activity(NULL) AS a
LEFT JOIN {task} AS t ON t.state = 'WORK' AND t.pid = a.pid
WHERE a.pid = ANY ($1::int[]) AND (a.state LIKE 'idle%' OR a.wait_event = 'ClientRead') AND t.remote IS NULL
GROUP BY a.pid, a.state_change;

-- name: unheard — rows of our busy workers that were stopped while nobody listened. $1 the workers' backends
SELECT t.id FROM {task} AS t WHERE t.state = 'STOP' AND t.stop IS NULL AND t.pid = ANY ($1::int[]);

-- name: owners — who runs these rows now, or is about to: anybody may send a notification, so what one says of a row
-- that was stopped is looked up. $1 ids
SELECT i.id, ARRAY(
    SELECT ARRAY[t.pid, t.attempt] FROM {task} AS t WHERE t.id = i.id AND t.state::text IN ('TAKE', 'WORK') AND t.pid IS NOT NULL
)
FROM unnest($1::bigint[]) AS i (id);

-- name: holder — who holds the MASTER lock without being the leader: anybody may take an advisory lock. $1 table oid
SELECT l.pid, pg_get_userbyid(a.usesysid)::text, a.application_name
FROM pg_locks AS l
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = $1::oid AND l.objid = 4294967294 AND l.objsubid = 2
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND NOT EXISTS (SELECT FROM {master} AS m WHERE m.backend = l.pid);

-- name: foreign — the sessions in which workers of another master run tasks, with the lane, and those known before
-- that are still there: what they ran may have been stopped or deleted. And, with its id, each row that is still to be
-- rescued: somebody has it locked, and may be beginning it. $1 the backends of our workers, $2 $3 $4 the sessions, their
-- starts and lanes as they were answered last
SELECT a.pid, a.backend_start, {lane} AS lane, CASE WHEN a.pid IS NULL THEN t.id END AS orphan
FROM {task} AS t
LEFT JOIN pg_stat_get_activity(NULL) AS a ON a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
WHERE (t.state IN ('TAKE', 'WORK') OR t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL AND a.pid IS NOT NULL)
    AND coalesce(t.pid, 0) <> ALL ($1::int[] || pg_backend_pid())
UNION
SELECT a.pid, a.backend_start, f.lane, NULL
FROM unnest($2::int[], $3::timestamptz[], $4::bigint[]) AS f (pid, start, lane)
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = f.pid AND a.backend_start IS NOT DISTINCT FROM f.start
WHERE f.pid <> ALL ($1::int[]);

-- name: stop_foreign — cancel the runs of another master's workers whose rows were stopped: he is gone, and they end
-- after their run, so that no other can be hit. $1 their sessions
SELECT pg_cancel_backend(a.pid)
FROM {task} AS t
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
WHERE t.state = 'STOP' AND t.stop IS NULL AND t.pid = ANY ($1::int[]);

-- name: rescue_stopped — stopped rows whose run ended without a word of its own
UPDATE {task} AS t
SET stop = clock_timestamp()
WHERE t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM pg_stat_get_activity(NULL) AS a
        WHERE a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
    );

-- name: rescue — rows whose owner is gone go back to PLAN; a run lost more than $1 times is FAIL, unless its row was moved
-- meanwhile. Of those that shared a transaction nobody knows which was its end: the first run of one that may share does
-- not count as lost, and the next is by itself.
-- $2 backends of dead workers, $3 what is known of each one's end, $4 those that a stop killed: their
-- runs never were, $5 those felled by a crash of the server that was not theirs: no run of theirs counts as lost
WITH lost AS MATERIALIZED (
    SELECT t.id, {moved} AS moved,
        t.state = 'WORK' AND t.pid <> ALL ($4::int[] || $5::int[]) AND NOT ({shares} AND t.attempt = 1) AS ran,
        CASE WHEN t.error LIKE 'LOST:  %' THEN (length(t.error) - length(replace(t.error, 'LOST:  ', ''))) / 7 ELSE 0 END + 1 AS times,
        coalesce(CASE WHEN t.error LIKE 'LOST:  %' THEN t.error || chr(10) END, '')
            || 'LOST:  run ' || t.attempt || ' of ' || coalesce(t.start, clock_timestamp()) || ': '
            || coalesce((SELECT replace(r.why, chr(10), chr(10) || chr(9)) FROM unnest($2::int[], $3::text[]) AS r (pid, why) WHERE r.pid = t.pid LIMIT 1),
                'its session ended') AS story
    FROM {task} AS t
    WHERE t.state IN ('TAKE', 'WORK')
        AND NOT EXISTS (
            SELECT FROM pg_stat_get_activity(NULL) AS a
            WHERE a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
        )
    FOR NO KEY UPDATE OF t SKIP LOCKED
)
UPDATE {task} AS t
SET state = CASE WHEN l.ran AND l.times > $1::int AND NOT l.moved THEN 'FAIL'::{state} ELSE 'PLAN'::{state} END,
    pid = CASE WHEN l.ran AND l.times > $1::int AND NOT l.moved THEN t.pid END,
    start = CASE WHEN l.ran AND l.times > $1::int AND NOT l.moved THEN t.start END,
    stop = CASE WHEN l.ran AND l.times > $1::int AND NOT l.moved THEN clock_timestamp() END,
    attempt = t.attempt - CASE WHEN t.state = 'WORK' AND t.pid = ANY ($4::int[]) THEN 1 ELSE 0 END,
    error = CASE
        WHEN NOT l.ran THEN t.error
        WHEN l.times > $1::int AND NOT l.moved THEN 'ERROR:  run lost ' || l.times || ' times' || chr(10) || l.story || chr(10)
            || 'STATEMENT:  ' || replace(t.input, chr(10), chr(10) || chr(9))
        ELSE l.story
    END
FROM lost AS l
WHERE t.id = l.id AND t.id = ANY (ARRAY(SELECT e.id FROM lost AS e))
RETURNING t.id, l.ran, t.state = 'FAIL' AS failed, l.times, date_part('epoch', t.repeat) > 0 OR t.cron IS NOT NULL AS repeated,
    convert_to(t."group", getdatabaseencoding()), t.attempt;
