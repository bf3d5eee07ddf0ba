-- The life of one run, as the worker that has it writes it. Every statement is fenced: it finds the row only while
-- it belongs to this session's run: by its id, and with the state compared as text, which no partial index offers, since
-- the index of slots, however small, may be full of dead entries. What they have in common stands in words.sql.

-- name: begin — the row that the poller took for this worker is ours. $1 when our backend started: nobody who started
-- later is the row's owner, also after the clock was set back; $2 id, $3 the poller's backend, $4 attempt, $5 term, $6 the
-- mark of the settings that our session began with
UPDATE {task} AS t
{begin}, start = greatest(clock_timestamp(), $1::timestamptz, t.start)
WHERE t.id = $2 AND t.state::text = 'TAKE' AND t.pid = $3 AND t.attempt = $4
    AND EXISTS (SELECT FROM {master} AS m WHERE m.term = $5) AND $6 = {mark}
RETURNING {row};

-- name: find — begin the one row that is due, in whatever group: what take_one of poll.sql does, for whom the master has
-- asked to look, and begin at once. Who begins the next term waits for us, so that he sees what we have begun. It answers as
-- that does, after the row, with what every DateStyle reads. $1 to $5 as there, $3 when our backend started, $6 term, $7 the
-- mark of the settings that our session began with, $8 when it is too late
WITH {one}, led AS MATERIALIZED (
    SELECT m.term FROM {master} AS m WHERE m.term = $6 FOR SHARE
), begun AS (
    UPDATE {task} AS t
    {begin}, start = greatest(clock_timestamp(), $3::timestamptz, t.plan)
    FROM one AS o
    WHERE t.id = o.id AND t.id = ANY (ARRAY(SELECT e.id FROM due AS e))
        -- The master knows whom else these admit.
        AND t.count = 0 AND t.live = interval '0'
        AND EXISTS (SELECT FROM led) AND $7 = {mark} AND clock_timestamp() < $8::timestamptz
    RETURNING {row}, o.lane
)
SELECT t.*, s.due AS seen, to_jsonb(i.now) #>> '{}', extract(epoch FROM clock_timestamp() - statement_timestamp()) AS cost,
    to_jsonb(i.now - interval '1 second') #>> '{}' AS place, {coming}::numeric AS next
FROM instant AS i
CROSS JOIN seen AS s
LEFT JOIN begun AS t ON true;

-- name: resume — the run of a row that was taken together with others begins by itself. $1 when our backend started,
-- $2 id, $3 attempt
UPDATE {task} AS t
SET start = greatest(clock_timestamp(), $1::timestamptz, t.start)
WHERE t.id = $2 AND t.attempt = $3 AND t.state::text = 'WORK' AND t.pid = pg_backend_pid()
RETURNING {row};

-- name: mark — of the settings that a new session of ours would have
SELECT {mark};

-- name: fresh — divides by zero where our session is older than an ALTER ROLE or ALTER DATABASE ... SET. $1 the mark of
-- the settings that it began with
SELECT 1 / ($1 = {mark})::int;

-- name: next — the group's next task, in the slot that the finished one leaves. $1 when our backend started, $2 group,
-- $3 remote or '', $4 runs of this worker, $5 its age in seconds, $6 term, $7 the key of the group that our slot is of, $8 the
-- slot's number; negative max is the poller's
WITH own AS (SELECT), first AS MATERIALIZED (
    {first}
)
{next};

-- name: next_below — the same where rows of a greater max are planned for later
WITH own AS (SELECT), first AS MATERIALIZED (
    {first_below}
)
{next};

-- name: next_after — the same while looks from the beginning are dear. $9 to $11 which and where the finished row was
WITH own AS (SELECT), first AS MATERIALIZED (
    {first_after}
)
{next};

-- name: look — the group's next task, while the end of the one before is not written yet: what `switch` will begin.
-- Parameters as of next, and $9 the id of the one before
WITH {own}, first AS MATERIALIZED (
    {first}
)
{looked};

-- name: look_below
WITH {own}, first AS MATERIALIZED (
    {first_below}
)
{looked};

-- name: look_after
WITH {own}, first AS MATERIALIZED (
    {first_after}
)
{looked};

-- name: next_batch — the group's first rows, for one transaction that they share: at most $9
WITH due AS MATERIALIZED (
    SELECT t.id, t.max, t.plan, t.batch, {admitted} AS admitted, {shares} AND t.attempt = 0 AS shares
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} = $7::bigint AND t.max >= {shared_floor} AND {serving} AND {untouched}
    ORDER BY t.max DESC, t.plan, t.id
    LIMIT $9::int
    FOR NO KEY UPDATE SKIP LOCKED
)
{together};

-- name: next_batch_after — the same as a quick look: after the finished row, whose $10 max, $11 plan and $12 id were
WITH due AS MATERIALIZED (
    SELECT t.id, t.max, t.plan, t.batch, {admitted} AS admitted, {shares} AND t.attempt = 0 AS shares
    FROM {task} AS t
    WHERE t.state = 'PLAN' AND {lane} = $7::bigint AND t.max = $10::int AND t.max >= $8::int
        AND (t.plan, t.id) >= ($11::timestamptz, $12::bigint) AND {serving} AND {untouched}
    ORDER BY t.plan, t.id
    LIMIT $9::int
    FOR NO KEY UPDATE SKIP LOCKED
)
{together};

-- name: finish_all — the good ends of runs that share a transaction; divides by zero, and so undoes it, unless each row
-- is still its run's, and none was moved. $1 backend, $2 how many, and of each: $3 id, $4 attempt, $5 state, $6 start,
-- $7 stop (null: now), $8 output, $9 error, $10 code, $11 notice. Not joined, as in `together`
WITH done AS (
    UPDATE {task} AS t
    SET (state, start, stop, output, error, code, notice) = (
        SELECT ($5::text[])[r.at]::{state}, ($6::timestamptz[])[r.at], coalesce(($7::timestamptz[])[r.at], clock_timestamp()),
            ($8::text[])[r.at], ($9::text[])[r.at], ($10::text[])[r.at], ($11::text[])[r.at]
        FROM array_position($3::bigint[], t.id) AS r (at)
    )
    WHERE t.id = ANY ($3::bigint[]) AND t.attempt = ($4::int[])[array_position($3::bigint[], t.id)]
        AND t.state::text = 'WORK' AND t.pid = $1::int AND t.plan <= t.start
    RETURNING t.id
)
SELECT 1 / (count(*) = $2::int)::int FROM done;

-- name: remove_all — the same for tasks that said nothing, have not run before, and are to be deleted. $1 backend, $2 how
-- many, and of each: $3 id, $4 attempt
WITH done AS (
    DELETE FROM {task} AS t
    WHERE t.id = ANY ($3::bigint[]) AND t.attempt = ($4::int[])[array_position($3::bigint[], t.id)]
        AND t.state::text = 'WORK' AND t.pid = $1::int AND t.plan <= t.start AND t.attempts IS NULL
    RETURNING t.id
)
SELECT 1 / (count(*) = $2::int)::int FROM done;

-- name: finish — the run's good end; divides by zero, and so undoes the transaction, unless the row is still this run's, and
-- was not moved.
-- $1 id, $2 attempt, $3 state, $4 output, $5 error, $6 code, $7 notice, $8 backend
WITH done AS (
    UPDATE {task} AS t
    SET state = $3::{state}, stop = clock_timestamp(), output = $4, error = $5, code = $6, notice = $7
    WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'WORK' AND t.pid = $8 AND t.plan <= t.start
    RETURNING t.id
)
SELECT 1 / count(*) FROM done;

-- name: switch — the same, and the beginning of the row that `look` has locked, if it is still wanted: both at the same
-- moment. Parameters as of finish, and $9 when our backend started, $10 whether it is wanted
WITH looked AS MATERIALIZED (
    SELECT nullif(current_setting('pgtask.looked', true), '')::bigint AS id WHERE $10::bool
), turned AS (
    UPDATE {task} AS t
    SET state = CASE WHEN t.id = $1 THEN $3::{state} ELSE 'WORK' END,
        pid = pg_backend_pid(),
        attempt = CASE WHEN t.id = $1 THEN t.attempt ELSE least(t.attempt, 2147483646) + 1 END,
        start = CASE WHEN t.id = $1 THEN t.start ELSE greatest(statement_timestamp(), $9::timestamptz, t.plan) END,
        stop = CASE WHEN t.id = $1 THEN statement_timestamp() END,
        output = CASE WHEN t.id = $1 THEN $4 END,
        error = CASE WHEN t.id = $1 THEN $5 ELSE t.error END,
        code = CASE WHEN t.id = $1 THEN $6 ELSE t.code END,
        notice = CASE WHEN t.id = $1 THEN $7 ELSE t.notice END
    WHERE t.id = ANY (ARRAY[$1, (SELECT l.id FROM looked AS l)])
        AND (t.id <> $1 OR t.attempt = $2 AND t.state::text = 'WORK' AND t.pid = $8 AND t.plan <= t.start)
    RETURNING CASE WHEN t.id <> $1 THEN {ours} + length(set_config('application_name', {name}, false)) END
)
SELECT 1 / (count(*) = 1 + (SELECT count(l.id) FROM looked AS l))::int FROM turned;

-- name: remove — the same for a task that said nothing, has not run before, and is to be deleted. $1 id, $2 attempt,
-- $3 backend
WITH done AS (
    DELETE FROM {task} AS t
    WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'WORK' AND t.pid = $3
        AND t.plan <= t.start AND t.attempts IS NULL
    RETURNING t.id
)
SELECT 1 / count(*) FROM done;

-- name: remove_done — the same where the end had to be written first: for the next row of a repeated task, or to see what the
-- row has behind it. One that has failed before stays. $1 id, $2 attempt, $3 backend
DELETE FROM {task} AS t
WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'DONE' AND t.pid = $3
    AND (t.attempts IS NULL OR NOT jsonb_path_exists(t.attempts, '$[*] ? (@.state != "DONE")'));

-- name: settle — the ends of runs that may not be the last of their rows. One that was moved runs again at its plan, one that
-- failed after a pause, if the error is worth it and a retry is left: the last note of an earlier run says how many there
-- were. What passes by itself is always worth it; else the longest word of retry_on that fits the code decides.
-- Parameters as of finish_all; start null: the row's own; and $12 the plans that the runs began with, which are what is
-- noted of them; null: not to be retried. Divides by zero as finish_all does; answers with each row's id, whether it runs
-- again, and how many milliseconds it ran
WITH run AS MATERIALIZED (
    SELECT t.id, t.attempts, t.attempt, coalesce(r.plan, t.plan) AS plan, r.plan IS NULL AS last, t.retry, t.retry_on, date_part('epoch', t.backoff) AS backoff, {moved} AS moved,
        r.state, coalesce(r.start, t.start) AS start, coalesce(r.stop, clock_timestamp()) AS stop,
        r.output, r.error, r.code, r.notice,
        CASE WHEN jsonb_typeof(t.attempts -> -1 -> 'retry') = 'number'
            THEN greatest(0, least((t.attempts -> -1 -> 'retry')::numeric, 2147483646))::int ELSE 0 END AS retries
    FROM unnest($3::bigint[], $4::int[], $5::text[], $6::timestamptz[], $7::timestamptz[], $8::text[], $9::text[],
        $10::text[], $11::text[], $12::timestamptz[]) AS r (id, attempt, state, start, stop, output, error, code, notice, plan)
    JOIN {task} AS t ON t.id = r.id AND t.id = ANY ($3::bigint[]) AND t.attempt = r.attempt AND t.state::text = 'WORK' AND t.pid = $1::int
    FOR NO KEY UPDATE OF t
), judged AS MATERIALIZED (
    SELECT r.*, (r.state = 'FAIL' AND r.retries < r.retry AND NOT r.moved AND NOT r.last AND (
        left(r.code, 2) = '08' OR r.code IN ('40001', '40P01', '55P03', '53300', '57P01', '57P02', '57P03')
        OR coalesce((
            SELECT w.word NOT LIKE '!%'
            FROM regexp_split_to_table(upper(r.retry_on), '[ ,]+') AS w (word)
            WHERE ltrim(w.word, '!') IN ('*', left(r.code, 2), r.code)
            ORDER BY length(ltrim(w.word, '!')) DESC, w.word LIKE '!%' DESC
            LIMIT 1
        ), false)
    )) IS TRUE AS retried
    FROM run AS r
), done AS (
    UPDATE {task} AS t
    SET state = CASE WHEN j.moved OR j.retried THEN 'PLAN'::{state} ELSE j.state::{state} END,
        plan = CASE WHEN j.retried THEN clock_timestamp() + make_interval(secs =>
            least(3600, least(3600, j.backoff * 2 ^ least(j.retries, 32)) * (0.8 + 0.4 * random()))) ELSE t.plan END,
        pid = CASE WHEN NOT (j.moved OR j.retried) THEN t.pid END,
        start = CASE WHEN NOT (j.moved OR j.retried) THEN j.start END,
        stop = CASE WHEN NOT (j.moved OR j.retried) THEN j.stop END,
        attempts = CASE WHEN j.moved OR j.retried THEN
            {noted}(j.attempts, j.attempt, j.plan, j.start, j.stop, j.state, j.code, j.error, CASE WHEN j.retried THEN j.retries + 1 END)
            ELSE t.attempts END,
        output = j.output, error = j.error, code = j.code, notice = j.notice
    FROM judged AS j
    WHERE t.id = j.id AND t.id = ANY ($3::bigint[])
    RETURNING t.id, j.moved OR j.retried AS again,
        CASE WHEN isfinite(j.start) THEN date_part('epoch', j.stop - j.start) * 1000 END AS ms
)
SELECT 1 / (count(*) = $2::int)::int, json_agg(json_build_array(d.id, d.again, d.ms)) FROM done AS d;

-- name: alive — is this backend still there? $1 pid
SELECT a.pid FROM pg_stat_get_activity($1) AS a;

-- name: end_backend — a session of ours that no cancel request can end. $1 pid
SELECT pg_terminate_backend($1);

-- name: owned — is the row still this run's? $1 id, $2 attempt, $3 backend
SELECT t.state FROM {task} AS t
WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'WORK' AND t.pid = $3;

-- name: back — a run interrupted by a stop of the master, or not begun at all, costs nothing; one that was stopped meanwhile
-- has ended. $1 backend, and of each: $2 id, $3 attempt
UPDATE {task} AS t
SET state = CASE t.state WHEN 'WORK' THEN 'PLAN' ELSE t.state END,
    pid = CASE t.state WHEN 'WORK' THEN NULL ELSE t.pid END,
    start = CASE t.state WHEN 'WORK' THEN NULL ELSE t.start END,
    stop = CASE t.state WHEN 'WORK' THEN NULL ELSE clock_timestamp() END,
    attempt = t.attempt - CASE t.state WHEN 'WORK' THEN 1 ELSE 0 END
FROM unnest($2::bigint[], $3::int[]) AS r (id, attempt)
WHERE t.id = r.id AND t.id = ANY ($2::bigint[]) AND t.attempt = r.attempt AND t.pid = $1::int
    AND (t.state::text = 'WORK' OR t.state::text = 'STOP' AND t.stop IS NULL);

-- name: stopped — say when a run that somebody stopped really ended, and how, after who stopped it. $1 id, $2 attempt,
-- $3 backend, $4 error
UPDATE {task} AS t
SET stop = clock_timestamp(), error = concat_ws(chr(10), t.error, $4::text)
WHERE t.id = $1 AND t.attempt = $2 AND t.state::text = 'STOP' AND t.pid = $3 AND t.stop IS NULL;

-- name: refused — the next row of a repeated task was refused: say so in the run's own row. $1 id, $2 attempt, $3 error
UPDATE {task} AS t
SET error = coalesce(t.error || chr(10), '') || $3
WHERE t.id = $1 AND t.attempt = $2;

-- name: copied — the columns that the next row of a repeated task copies, as the table is now
SELECT {copied};

-- name: repeat — plan the next row: without drift the first grid moment (first + n x repeat) that is after now and
-- after this plan, in closed form; with drift now + repeat. Nothing beyond what a timestamp can hold, or `until`, and nothing
-- while the row itself is to run again; the grid is that of its first plan. $1 id.
-- {columns} are the copied columns, {values} the same of t.
INSERT INTO {task} (parent, plan, first, {columns})
WITH run AS MATERIALIZED (
    SELECT t.id, coalesce((t.attempts -> 0 ->> 'plan')::timestamptz, t.plan) AS plan, t.first, t.repeat, t.drift, clock_timestamp() AS now,
        (date_part('year', t.repeat) * 12 + date_part('month', t.repeat)) * 2629746
            + date_part('day', t.repeat) * 86400
            + date_part('hour', t.repeat) * 3600 + date_part('minute', t.repeat) * 60 + date_part('second', t.repeat) AS length
    FROM {task} AS t
    WHERE t.id = $1 AND t.state::text IN ('DONE', 'FAIL') AND date_part('epoch', t.repeat) > 0 AND isfinite(t.repeat)
), grid AS MATERIALIZED (
    SELECT r.id, r.repeat, r.drift, r.now, r.length,
        -- Greater than now only where the clock was set back.
        greatest(r.now, CASE WHEN isfinite(r.plan) THEN r.plan END) AS since,
        CASE
            WHEN NOT isfinite(r.plan) THEN r.now
            WHEN r.first IS NULL OR NOT isfinite(r.first) OR r.first > r.plan THEN r.plan
            WHEN EXISTS (
                SELECT FROM generate_series(-2, 2) AS k
                WHERE CASE WHEN r.length < 1e12 AND date_part('epoch', r.plan) + 4 * r.length < 9e12 THEN
                    r.first + r.repeat * greatest(0, round((date_part('epoch', r.plan) - date_part('epoch', r.first)) / r.length) + k) = r.plan END
            ) THEN r.first
            ELSE r.plan
        END AS first
    FROM run AS r
), coming AS MATERIALIZED (
    SELECT g.id, g.drift, g.now, g.repeat, CASE WHEN NOT g.drift THEN g.first END AS first,
        CASE
            WHEN NOT (g.length > 0 AND g.length < 9e12 AND date_part('epoch', g.since) + 4 * g.length < 9e12) THEN NULL
            WHEN g.drift THEN g.now + g.repeat
            -- A grid of microseconds that is thousands of years old is too fine for a double: then from here on.
            ELSE coalesce((
                SELECT min(g.first + g.repeat * n)
                FROM (
                    SELECT greatest(1, floor((date_part('epoch', g.since) - date_part('epoch', g.first)) / g.length) + k) AS n
                    FROM generate_series(-2, 3) AS k
                ) AS step
                WHERE g.first + g.repeat * n > g.since
            ), g.since + g.repeat)
        END AS plan
    FROM grid AS g
)
SELECT c.id, c.plan, c.first, {values}
FROM coming AS c
JOIN {task} AS t ON t.id = c.id AND t.id = $1
WHERE c.plan IS NOT NULL AND (c.plan > t.until) IS NOT TRUE;
