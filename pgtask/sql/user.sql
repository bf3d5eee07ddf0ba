-- What the command `pgtask` asks and does. It is a session like any other: the role's own rights decide. $N are the
-- parameters of each statement.

-- name: standing — why a statement may have been refused: is the table there, is it up to date with all beside it, and which
-- rights the role has not, as the statements that give them. $1 schema, $2 table, $3 the table whose rights are asked for,
-- $4 these rights, $5 our columns, $6 our functions
SELECT c.oid IS NOT NULL AS there,
    b.oid IS NOT NULL
        AND NOT EXISTS (
            SELECT unnest($5::text[])
            EXCEPT SELECT a.attname FROM pg_attribute AS a WHERE a.attrelid = c.oid AND NOT a.attisdropped)
        AND NOT EXISTS (SELECT unnest($6::text[]) EXCEPT SELECT p.proname FROM pg_proc AS p WHERE p.pronamespace = n.oid) AS whole,
    ARRAY(
        SELECT format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, current_user)
        WHERE NOT has_schema_privilege(n.oid, 'USAGE')
        UNION ALL
        SELECT format('GRANT %s ON %I.%I TO %I', string_agg(r.name, ', '), n.nspname, b.relname, current_user)
        FROM unnest($4::text[]) AS r (name)
        WHERE NOT has_table_privilege(b.oid, r.name)
        HAVING count(*) > 0
    ) AS lacking
FROM (VALUES (true)) AS one
LEFT JOIN pg_namespace AS n ON n.nspname = $1::text
LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = $2::text AND c.relkind IN ('r', 'p')
LEFT JOIN pg_class AS b ON b.relnamespace = n.oid AND b.relname = $3::text;

-- name: reading — for a session that only reads; one that has no limit gets one
SELECT set_config('default_transaction_read_only', 'on', false),
    set_config('statement_timeout', coalesce(nullif(current_setting('statement_timeout'), '0'), '1min'), false);

-- name: rights_to_submit — may the role read the new id, and say that the row stays?
SELECT has_column_privilege({regclass}::regclass, 'id', 'SELECT') AS told,
    has_column_privilege({regclass}::regclass, 'delete', 'INSERT') AS kept;

-- name: submit — {columns} and {values} are what was given, in the same order; {returning} is empty, or `told`
INSERT INTO {task} ({columns}) VALUES ({values}){returning};

-- name: told — the id, for who may read it
 RETURNING id

-- name: delayed — for `submit`: when it starts, {plan} and {delay} being parameters
coalesce({plan}::timestamptz, statement_timestamp()) + {delay}::interval

-- name: listed — rows that fit all that is given. {columns}, {kind}, {order} and {where} as below. $1 states, $2 groups, $3 key,
-- $4 $5 the first and last id, $6 $8 run or planned since and until, a time or, where $7 $9, an interval before now; $10 data,
-- $11 how the code begins, $12 a regular expression, $13 rows at most
SELECT {columns}
FROM {task} AS t
WHERE {kind}
    AND ($1::text[] IS NULL OR t.state::text = ANY ($1::text[]))
    AND ($2::text[] IS NULL OR t."group" = ANY ($2::text[]))
    AND ($3::text IS NULL OR t.key = $3::text)
    AND ($4::bigint IS NULL OR t.id >= $4::bigint)
    AND ($5::bigint IS NULL OR t.id <= $5::bigint)
    AND ($6::text IS NULL
        OR coalesce(t.start, t.plan) >= CASE WHEN $7::boolean THEN now() - $6::text::interval ELSE $6::text::timestamptz END)
    AND ($8::text IS NULL
        OR coalesce(t.start, t.plan) < CASE WHEN $9::boolean THEN now() - $8::text::interval ELSE $8::text::timestamptz END)
    AND ($10::text IS NULL OR t.data = $10::text)
    AND ($11::text IS NULL OR starts_with(t.code, $11::text))
    AND ($12::text IS NULL OR t.input ~* $12::text OR t.error ~* $12::text OR t.output ~* $12::text)
    AND ({where}
    )
ORDER BY {order}
LIMIT $13::bigint;

-- name: kind_any — which rows: all
true

-- name: kind_plan — planned ones, by the index of what is due
t.state = 'PLAN'

-- name: kind_due — those whose time has come
t.state = 'PLAN' AND t.plan <= statement_timestamp()

-- name: kind_wait — those that wait for others, by their index
t.state = 'WAIT'

-- name: kind_running — those that run, by the index of slots in use
{running}

-- name: kind_unfinished — all that have not ended
(t.state IN ('PLAN', 'WAIT', 'TAKE', 'WORK') OR t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)

-- name: kind_failed
t.state = 'FAIL'

-- name: order_any — the newest first
t.id DESC

-- name: order_plan — the next first
t.plan, t.id

-- name: order_running — the longest-running first
t.start, t.id

-- name: order_wait
t.id

-- name: plain_column — {column} as it is
t.{column}

-- name: short_column — a long text in one line
left(regexp_replace(left(t.{column}, 600), '\s+', ' ', 'g'), 300) AS {column}

-- name: time_column — a time to the second
date_trunc('second', t.{column}) AS {column}

-- name: took_column — how long the run took, or takes until now
date_trunc('milliseconds', CASE
    WHEN t.state IN ('TAKE', 'WORK') OR t.state = 'STOP' AND t.stop IS NULL THEN clock_timestamp()
    ELSE t.stop
END - t.start) AS took

-- name: every_column
t.*

-- name: documents — a statement's rows as JSON, a column's value as it is
SELECT row_to_json(r)::text AS document FROM ({query}) AS r;

-- name: whole — the row. $1 id
SELECT t.* FROM {task} AS t WHERE t.id = $1::bigint;

-- name: relatives — of a row: what it depends on, as it stands; who waits for it; and which tasks it made, of the next
-- 100,000, since no index finds them. $1 id
SELECT
    ARRAY(
        SELECT concat(u.id, ' ', coalesce(d.state::text, 'removed'))
        FROM {task} AS t
        CROSS JOIN unnest(t.depend) WITH ORDINALITY AS u (id, number)
        LEFT JOIN {task} AS d ON d.id = u.id
        WHERE t.id = $1::bigint
        ORDER BY u.number
    ) AS depend,
    ARRAY(
        SELECT t.id FROM {task} AS t
        WHERE t.state = 'WAIT' AND t.depend @> ARRAY[$1::bigint]
        ORDER BY t.id
        LIMIT 100
    ) AS dependents,
    ARRAY(
        SELECT n.id
        FROM (SELECT t.id, t.parent FROM {task} AS t WHERE t.id > $1::bigint ORDER BY t.id LIMIT 100000) AS n
        WHERE n.parent = $1::bigint
        LIMIT 100
    ) AS children;

-- name: progress — how far the run is, for who may read it. $1 id
SELECT concat(r.percent, '%', ' ' || r.message) AS progress FROM {report} AS r WHERE r.id = $1::bigint;

-- name: reads_progress — may the role?
SELECT has_table_privilege(to_regclass({report_text}), 'SELECT') IS TRUE;

-- name: pending — where each task stands; null where it is not there. A run that was stopped goes on until it is over. $1 ids
SELECT i.id, t.state::text AS state,
    (t.state::text IN ('PLAN', 'WAIT', 'TAKE', 'WORK') OR t.state::text = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL) IS TRUE AS pending
FROM unnest($1::bigint[]) WITH ORDINALITY AS i (id, number)
LEFT JOIN {task} AS t ON t.id = i.id
ORDER BY i.number;

-- name: ends — what became of them. $1 ids
SELECT i.id, coalesce(t.state::text, 'DONE') AS state, t.output, t.error, t.code, t.notice
FROM unnest($1::bigint[]) WITH ORDINALITY AS i (id, number)
LEFT JOIN {task} AS t ON t.id = i.id
ORDER BY i.number;

-- name: cancel_one — $1 id
SELECT {cancel}($1::bigint);

-- name: cancel_many — $1 ids
SELECT {cancel}(format('id = ANY (%L)', $1::bigint[]));

-- name: retry_one — $1 id
SELECT {retry}($1::bigint);

-- name: retry_many — $1 ids
SELECT {retry}(format('id = ANY (%L)', $1::bigint[]));

-- name: hold_group — $1 group
SELECT {hold}($1::text);

-- name: release_group — $1 group
SELECT {release}($1::text);

-- name: held_groups
SELECT h."group", date_trunc('second', h.since) AS since, h.by FROM {held} AS h ORDER BY h."group";

-- name: extent — the least and the greatest id there is, and whether this is an interval that lies in the past. $1 an interval
SELECT (SELECT min(t.id) FROM {task} AS t), (SELECT max(t.id) FROM {task} AS t), $1::text::interval >= interval '0';

-- name: purgeable — for `sweep` of history.sql, as {expired}: has the row ended, and longer ago than asked, and waits nobody for
-- it? One that never ran, stopped by somebody who may not write when, ended at its plan. $4 interval, $5 states
((t.stop IS NOT NULL OR t.state::text = 'STOP' AND t.pid IS NULL)
    AND t.state::text = ANY ($5::text[])
    AND (SELECT i.now FROM instant AS i) - date_part('epoch', coalesce(t.stop, t.plan)) > date_part('epoch', $4::text::interval)
    AND NOT EXISTS (SELECT FROM {task} AS w WHERE w.state = 'WAIT' AND w.depend @> ARRAY[t.id]))

-- name: purge_count — as `sweep`, but nothing is removed
WITH instant AS MATERIALIZED (
    SELECT date_part('epoch', clock_timestamp()) AS now
), looked AS MATERIALIZED (
    SELECT t.id, {expired} AS expired
    FROM {task} AS t
    WHERE t.id > $1::bigint AND t.id <= $2::bigint
    ORDER BY t.id
    LIMIT $3::int
)
SELECT count(*), count(*) FILTER (WHERE l.expired), max(l.id), NULL FROM looked AS l;
