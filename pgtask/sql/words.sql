-- What several statements on the task table have in common: {name} stands for it there, and in what comes after it here.

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
            'error', 'code', 'notice', 'output']))

-- name: shares — may the row run in one transaction with others? Not if it was begun before: it may be what killed the
-- session of them all
(t.batch > 1 AND t.atomic AND NOT t.save AND t.remote IS NULL AND t.max >= 0 AND t.repeat = interval '0'
        AND t.count = 0 AND t.live = interval '0')

-- name: row — what a worker needs of a row, in the order of Task.read (store.py), and whether it is ours: divides by zero
-- if a user's trigger has made another's of it, since its end could not be written. On the way the run's own settings
-- are made
t.id, t.attempt, t."group", t.remote, t.input,
    CASE WHEN t.timeout = interval '0' THEN 0
        ELSE greatest(1, least(2147483647, ceil(date_part('epoch', t.timeout) * 1000)))::int END AS timeout_ms,
    t.max, to_jsonb(t.plan) #>> '{}' AS plan, t."delete", t.save, t.atomic, t.repeat <> interval '0' AS repeated,
    t.header, t.string, t.delimiter, t.escape, t.quote, t."null",
    CASE WHEN {shares} AND t.attempt = 1 THEN t.batch ELSE 1 END AS batch,
    1 / (t.state = 'WORK' AND t.pid = pg_backend_pid())::int,
    set_config('pg_task.id', t.id::text, false), set_config('pg_task.group', t."group", false),
    set_config('pg_task.schema', {schema_text}, false), set_config('pg_task.table', {table_text}, false),
    set_config('application_name', concat_ws(' ', 'pgtask', {schema_text}, {table_text},
        left(t."group", greatest(0, 53 - length(concat({schema_text}, {table_text}, t.id)))), t.id), false)

-- name: begin — what makes a row ours. $1 when our backend started: nobody who started later is the row's owner, also
-- after the clock was set back
SET state = 'WORK', pid = pg_backend_pid(), start = greatest(clock_timestamp(), $1::timestamptz), stop = NULL,
    output = NULL, attempt = least(t.attempt, 2147483646) + 1

-- name: serving — may a worker take a row at all? $6 term; not if its task's snapshot is older than what others took
current_setting('transaction_isolation') = 'read committed'
        AND EXISTS (SELECT FROM {master} AS m WHERE m.term = $6)

-- name: floor — the least max that a row in our slot may have: the slot's number ($8), and how many others of the group
-- ($7 its key) run; those that share a transaction run one after another
greatest($8::int, (
            SELECT count(DISTINCT t.pid) FILTER (WHERE t.batch > 1 AND t.state = 'WORK')
                + count(*) FILTER (WHERE t.batch <= 1 OR t.state = 'TAKE')
            FROM {task} AS t WHERE t.state IN ('TAKE', 'WORK') AND {lane} = $7::bigint
        ))

-- name: admitted — may this worker run the row? $2 group, $3 remote or '', $4 its runs so far, $5 its age in seconds
t."group" = $2 AND coalesce(t.remote, '') = $3 AND t.plan <= statement_timestamp()
            AND (t.count = 0 OR t.count > $4::int)
            AND (t.live = interval '0' OR date_part('epoch', t.live) > $5::float8)
            AND (t.repeat <> interval '0'
                OR date_part('epoch', statement_timestamp()) - date_part('epoch', t.plan) <= date_part('epoch', t.active))

-- name: next — how each look for the group's next task ends; cost in seconds
UPDATE {task} AS t
{begin}
FROM first AS f
WHERE t.id = f.id AND f.admitted
RETURNING {row}, date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost

-- name: together — the same for rows that will share a transaction, of `due`, the first ones of the group: as many as each
-- of them allows, in their order, up to the first that may not share; that one only if it is the very first
, numbered AS MATERIALIZED (
    SELECT d.id, d.admitted, row_number() OVER line AS number,
        bool_and(d.admitted AND d.shares) OVER line AS shares, min(d.batch) OVER line AS batch
    FROM due AS d
    WINDOW line AS (ORDER BY d.max DESC, d.plan, d.id)
)
UPDATE {task} AS t
{begin}
FROM numbered AS n
WHERE t.id = n.id AND (n.number = 1 AND n.admitted OR n.shares AND n.number <= n.batch)
RETURNING {row}, n.number, date_part('epoch', clock_timestamp() - statement_timestamp()) AS cost
