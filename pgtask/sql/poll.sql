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
-- rows after it and the new ones, and walks nowhere.
-- Answers with at least one row: how many due rows of groups with a free slot were seen, how many of them of groups that
-- have no slot in use, the instant, where to walk on (null: every group was seen), what a full look cost (seconds),
-- the place for the next quick look: a second ago at the latest, for inserts that are still in flight; and after a full
-- look the seconds until the next moment that is planned after the instant (null: none).
-- $1 rows at most, $2 lanes that rest after a negative max, $3 due rows, and groups, looked at, $4 the instant to take for now,
-- unless the clock was set back since, or null,
-- $5 the lanes of the slots in use, one for each: rows in TAKE and WORK are not counted, and so dead entries of the slot
-- index not read, $6 when this backend started: the owner of a row is known by having started before it, also after the clock was set
-- back, $7 the lane to walk on from, or null, $8 $9 the plan and id of the place to start from, $10 the instant of the last
-- full look, for a quick one, or null
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
), first AS MATERIALIZED (
    SELECT g.lane, f."group", f.remote, f.max, f.plan, f.id
    FROM walked AS g
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
), groups AS MATERIALIZED (
    SELECT d.lane, d."group", d.remote, coalesce(s.used, 0) AS used,
        greatest(max(d.max), 0)::bigint - coalesce(s.used, 0) + 1 AS free, count(*) AS seen,
        array_agg(DISTINCT d.max ORDER BY d.max DESC) AS levels
    FROM (TABLE head UNION ALL TABLE tail UNION ALL TABLE first) AS d
    LEFT JOIN held AS s ON s.lane = d.lane
    WHERE greatest(d.max, 0) >= coalesce(s.used, 0) AND NOT (d.max < 0 AND d.lane = ANY ($2::bigint[]))
    GROUP BY 1, 2, 3, 4
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
                SELECT t.id, t.max, t.plan, t.max >= 0 AND date_part('epoch', t.repeat) = 0
                    AND date_part('epoch', (SELECT now FROM instant)) - date_part('epoch', t.plan) > date_part('epoch', t.active) AS late
                FROM {task} AS t
                WHERE t.state = 'PLAN' AND {lane} = g.lane AND t.max = l.max
                    AND t."group" = g."group" AND coalesce(t.remote, '') = g.remote
                    AND t.plan <= (SELECT now FROM instant)
                    AND (t.plan, t.id) >= ((SELECT s.plan FROM place AS s), (SELECT s.id FROM place AS s))
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
        start = CASE WHEN NOT p.late THEN greatest(clock_timestamp(), $6::timestamptz) END,
        stop = CASE WHEN p.late THEN clock_timestamp() END,
        error = CASE WHEN p.late THEN 'ERROR:  task not active' ELSE t.error END
    FROM picked AS p
    WHERE t.id = p.id
    RETURNING t.id, t.attempt, p.late, p.lane, t.max, t.count, date_part('epoch', t.live) AS live, t.plan
)
SELECT coalesce((SELECT sum(seen) FROM groups), 0)::bigint AS seen,
    coalesce((SELECT sum(seen) FROM groups WHERE used = 0), 0)::bigint AS waiting, i.now,
    (SELECT max(lane) FROM walked HAVING count(lane) >= $3::int) AS walked,
    CASE WHEN $10::timestamptz IS NULL THEN date_part('epoch', clock_timestamp() - statement_timestamp()) END AS cost,
    least((SELECT s.plan FROM place AS s), i.now - interval '1 second')::text AS place,
    CASE WHEN (SELECT s.plan FROM place AS s) <= i.now - interval '1 second' THEN (SELECT s.id FROM place AS s)
        ELSE -9223372036854775808 END AS place_id,
    CASE WHEN $10::timestamptz IS NULL THEN (
        SELECT date_part('epoch', t.plan) - date_part('epoch', clock_timestamp())
        FROM {task} AS t
        WHERE t.state = 'PLAN' AND t.plan > (SELECT now FROM instant)
        ORDER BY t.plan
        LIMIT 1
    ) END AS next,
    t.id, t.attempt, t.late, t.lane, t.max, t.count, t.live
FROM instant AS i
LEFT JOIN taken AS t ON true
ORDER BY t.plan, t.id;

-- name: expire — rows that came too late while their group was full, of the due rows after a place in their order.
-- Answers with how many there were and the place to go on from (null: the end). $1 rows looked at, $2 $3 the plan and
-- id of the place
WITH looked AS MATERIALIZED (
    SELECT t.id, t.plan, t.max, t.repeat, t.active
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= statement_timestamp() AND (t.plan, t.id) > ($2::timestamptz, $3::bigint)
    ORDER BY t.plan, t.id
    LIMIT $1::int
), late AS MATERIALIZED (
    SELECT t.id
    FROM looked AS l
    JOIN {task} AS t ON t.id = l.id AND t.state::text = 'PLAN'
    WHERE l.max >= 0 AND date_part('epoch', l.repeat) = 0
        AND date_part('epoch', statement_timestamp()) - date_part('epoch', l.plan) > date_part('epoch', l.active)
    FOR NO KEY UPDATE OF t SKIP LOCKED
), gone AS (
    UPDATE {task} AS t
    SET state = 'GONE', stop = clock_timestamp(), error = 'ERROR:  task not active'
    FROM late
    WHERE t.id = late.id
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

-- name: unread — sessions of workers that have something to do, but whose server has said all it had to say and waits for
-- them, and since when; a remote task is run elsewhere meanwhile. $1 the backends of our busy workers
SELECT a.pid, min(t.id), a.state_change::text
FROM pg_stat_get_activity(NULL) AS a
LEFT JOIN {task} AS t ON t.state = 'WORK' AND t.pid = a.pid
WHERE a.pid = ANY ($1::int[]) AND a.state LIKE 'idle%' AND t.remote IS NULL
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

-- name: rescue — rows whose owner is gone go back to PLAN; a run lost more than $1 times is FAIL. Of those that shared a
-- transaction nobody knows which was its end: the first run of one that may share does not count as lost, and the next
-- is by itself.
-- $2 backends of dead workers, $3 what is known of each one's end, $4 those that a stop killed: their
-- runs never were, $5 those felled by a crash of the server that was not theirs: no run of theirs counts as lost
WITH lost AS MATERIALIZED (
    SELECT t.id, t.state = 'WORK' AND t.pid <> ALL ($4::int[] || $5::int[]) AND NOT ({shares} AND t.attempt = 1) AS ran,
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
SET state = CASE WHEN l.ran AND l.times > $1::int THEN 'FAIL'::{state} ELSE 'PLAN'::{state} END,
    pid = CASE WHEN l.ran AND l.times > $1::int THEN t.pid END,
    start = CASE WHEN l.ran AND l.times > $1::int THEN t.start END,
    stop = CASE WHEN l.ran AND l.times > $1::int THEN clock_timestamp() END,
    attempt = t.attempt - CASE WHEN t.state = 'WORK' AND t.pid = ANY ($4::int[]) THEN 1 ELSE 0 END,
    error = CASE
        WHEN NOT l.ran THEN t.error
        WHEN l.times > $1::int THEN 'ERROR:  run lost ' || l.times || ' times' || chr(10) || l.story || chr(10)
            || 'STATEMENT:  ' || replace(t.input, chr(10), chr(10) || chr(9))
        ELSE l.story
    END
FROM lost AS l
WHERE t.id = l.id
RETURNING t.id, l.ran, t.state = 'FAIL' AS failed, l.times, CASE WHEN date_part('epoch', t.repeat) > 0 THEN {copied} END AS copied;
