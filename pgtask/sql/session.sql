-- What a worker does to its own session around a task. No statement here touches the task table.

-- name: constraints — deferred constraints are checked while the task's own settings hold
SET CONSTRAINTS ALL IMMEDIATE;

-- name: savepoint — from here on the transaction's statements are ours
SAVEPOINT pgtask;

-- name: begin — a task's own transaction, or one that tasks share, of the kind that their role has as default
BEGIN;

-- name: encoding — what the run before it has said is in: the server tells of a change only when it waits for our word
SHOW client_encoding;

-- name: release — the savepoint's work stays
RELEASE SAVEPOINT pgtask;

-- name: rollback_to — undo our statements, keep the task's work
ROLLBACK TO SAVEPOINT pgtask;

-- name: savepoint_repeat — a user's trigger or constraint may refuse the next row of a repeated task
SAVEPOINT pgtask_repeat;

-- name: open — a transaction of our own, whatever the task set as default
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE;

-- name: commit
COMMIT;

-- name: rollback
ROLLBACK;

-- name: authorization — back to the user who logged in
SET SESSION AUTHORIZATION DEFAULT;

-- name: local_authorization — the same until the end of the transaction, for a task that saves its session
SET LOCAL SESSION AUTHORIZATION DEFAULT;

-- name: reset — every setting as in a new session
RESET ALL;

-- name: ours — the rest of the transaction is ours: the user who logged in, operators and functions that are the server's
-- own, and what our statements need; a task may have set anything. $1 the server's encoding, which the next input is
-- sent in as well, so it stays
SELECT
    pg_catalog.set_config('role', 'none', true),
    pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
    pg_catalog.set_config('client_encoding', $1, false),
    pg_catalog.set_config('statement_timeout', '0', true),
    pg_catalog.set_config('lock_timeout', '5s', true),
    pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true),
    pg_catalog.set_config('synchronous_commit', CASE
        WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) ANY ('{off,local}'::pg_catalog.text[]) THEN 'on'
        ELSE pg_catalog.current_setting('synchronous_commit') END, true),
    pg_catalog.set_config('row_security', 'on', true),
    pg_catalog.set_config('jit', 'off', true),
    -- Our statements walk indexes in order and stop early, whatever the statistics of a young table say.
    pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', true),
    pg_catalog.set_config('enable_bitmapscan', 'off', true),
    pg_catalog.set_config('enable_seqscan', 'off', true),
    pg_catalog.set_config('enable_sort', 'off', true),
    pg_catalog.set_config('enable_hashjoin', 'off', true),
    pg_catalog.set_config('enable_mergejoin', 'off', true);

-- name: ours_again — the same after RESET ALL, which puts back all but the user and the role: divides by zero where
-- the task has changed these and left them. {settings} are those that a new session has otherwise than we need. In one
-- column: each one is described with every answer. $1 the user who logged in, $2 the role that a new session has
SELECT
    1 OPERATOR(pg_catalog./) (SESSION_USER::pg_catalog.text OPERATOR(pg_catalog.=) $1::pg_catalog.text
        AND pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) $2::pg_catalog.text)::pg_catalog.int4,
    pg_catalog.num_nulls(
        pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
        -- Whatever the server's configuration has been changed to since.
        pg_catalog.set_config('statement_timeout', '0', true),
        pg_catalog.set_config('synchronous_commit', CASE
            WHEN pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) ANY ('{off,local}'::pg_catalog.text[]) THEN 'on'
            ELSE pg_catalog.current_setting('synchronous_commit') END, true){settings});

-- name: turn — the settings of a run that shares its transaction, and its beginning, as text that every DateStyle reads:
-- divides by zero where the one before has changed the user or the role, or has left what is temporary. $1 id, $2 group,
-- $3 schema, $4 table, $5 the application_name, $6 the user who logged in, $7 the role that a new session has, $8 whether
-- all that is temporary was dropped just now
SELECT
    1 OPERATOR(pg_catalog./) (SESSION_USER::pg_catalog.text OPERATOR(pg_catalog.=) $6::pg_catalog.text
        AND pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) $7::pg_catalog.text
        AND ($8::pg_catalog.bool OR pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.=) 0::pg_catalog.oid))::pg_catalog.int4,
    pg_catalog.set_config('pg_task.id', $1, false), pg_catalog.set_config('pg_task.group', $2, false),
    pg_catalog.set_config('pg_task.schema', $3, false), pg_catalog.set_config('pg_task.table', $4, false),
    pg_catalog.set_config('application_name', $5, false),
    pg_catalog.to_jsonb(pg_catalog.clock_timestamp()) OPERATOR(pg_catalog.#>>) '{}';

-- name: timeout — the server ends the statement by itself; a smaller limit of the role's wins. $1 milliseconds
SELECT pg_catalog.set_config('statement_timeout', $1, false);

-- name: reset_role — the role that a new session of this user has
RESET ROLE;

-- name: close — cursors WITH HOLD
CLOSE ALL;

-- name: unlisten
UNLISTEN *;

-- name: unlock — session-level advisory locks
SELECT pg_catalog.pg_advisory_unlock_all();

-- name: temporary — temporary tables
DISCARD TEMP;

-- name: sequences — what currval() and cached nextval() remember
DISCARD SEQUENCES;

-- name: prepared — what the task prepared and left
SELECT pg_catalog.quote_ident(name) FROM pg_catalog.pg_prepared_statements WHERE from_sql;

-- name: leftovers — session-level advisory locks are dropped; is the role not that of a new session, is there a temporary
-- schema, did the task prepare anything? $1 the role that a new session has
SELECT pg_catalog.pg_advisory_unlock_all(),
    pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) $1::pg_catalog.text,
    pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid,
    EXISTS (SELECT FROM pg_catalog.pg_prepared_statement() AS p WHERE p.from_sql);

-- name: spotless — the same where the next input comes right behind: divides by zero if there is any of it. $1 as above
SELECT pg_catalog.pg_advisory_unlock_all(),
    1 OPERATOR(pg_catalog./) (pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) $1::pg_catalog.text
        AND pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.=) 0::pg_catalog.oid
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_prepared_statement() AS p WHERE p.from_sql))::pg_catalog.int4;

-- name: warm — what others see of a session that waits for a worker, until a task's name takes the place
SELECT pg_catalog.set_config('application_name', 'pgtask warm', false);

-- name: since — when our backend started, as text that every DateStyle reads; only its own user may see that
SELECT pg_catalog.to_char(a.backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US"+00"')
FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) AS a;

-- name: facts — of a new session: its statement_timeout in milliseconds, its user and role. Not from pg_settings: that is long, and would spill to disk where a role's
-- work_mem is small
SELECT (pg_catalog.date_part('epoch', pg_catalog.current_setting('statement_timeout')::pg_catalog.interval)
    OPERATOR(pg_catalog.*) 1000::pg_catalog.float8)::pg_catalog.int8, SESSION_USER, pg_catalog.current_setting('role');

-- name: defaults — settings of a new session. $1 names
SELECT pg_catalog.current_setting(n.name) FROM pg_catalog.unnest($1::pg_catalog.text[]) AS n (name);
