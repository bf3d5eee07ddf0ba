-- What any session may call to run a task, wait for it, cancel it, hold a group, or tell how far it is. The caller's rights
-- on the task table decide, as if he wrote the statements himself. A function that runs SQL of the caller's has no
-- search_path of its own, and so names everything that it calls with its schema.

-- name: cancel — stop one task, running or not. False if it has ended before
CREATE OR REPLACE FUNCTION {cancel}(id bigint) RETURNS boolean LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    UPDATE {task} AS t SET state = 'STOP' WHERE t.id = $1 AND t.state::text IN ('PLAN', 'WAIT', 'TAKE', 'WORK');
    IF FOUND THEN
        RETURN true;
    END IF;
    PERFORM FROM {task} AS t WHERE t.id = $1;
    IF NOT FOUND THEN
        RAISE no_data_found USING
            MESSAGE = concat('there is no task ', coalesce($1::text, 'null')),
            HINT = 'A task with "delete" that has nothing to say is removed when it is done.';
    END IF;
    RETURN false;
END
$pgtask$;

-- name: cancel_filter — stop all unfinished tasks that fit a condition, as it could stand after WHERE; how many
CREATE OR REPLACE FUNCTION {cancel}(filter text) RETURNS bigint LANGUAGE plpgsql AS $pgtask$
#variable_conflict use_variable
DECLARE
    ids pg_catalog.int8[];
    stopped pg_catalog.int8;
BEGIN
    IF pg_catalog.btrim(filter, E' \t\r\n') OPERATOR(pg_catalog.=) '' IS NOT FALSE THEN
        RAISE invalid_parameter_value USING
            MESSAGE = 'the filter is empty',
            HINT = 'Write a condition on the task table, such as ''"group" = ''''mail'''''', or ''true'' for all.';
    END IF;
    BEGIN
        EXECUTE pg_catalog.concat('SELECT pg_catalog.array_agg(id) FROM ', {task_regclass}, ' WHERE (', filter, E'\n)') INTO STRICT ids;
    EXCEPTION
        WHEN insufficient_privilege THEN
            RAISE;
        WHEN syntax_error_or_access_rule_violation OR too_many_rows THEN
            RAISE EXCEPTION USING
                ERRCODE = SQLSTATE,
                MESSAGE = pg_catalog.concat('the filter is no condition on the task table: ', SQLERRM),
                HINT = 'Write what could stand after WHERE, such as ''"group" = ''''mail'''' AND plan > now()''.';
    END;
    -- Whatever the text has made of the statement above, no other rows than these are touched.
    UPDATE {task} AS t SET state = 'STOP'
    WHERE t.id OPERATOR(pg_catalog.=) ANY (ids)
        AND t.state::pg_catalog.text OPERATOR(pg_catalog.=) ANY ('{PLAN,WAIT,TAKE,WORK}'::pg_catalog.text[]);
    GET DIAGNOSTICS stopped = ROW_COUNT;
    RETURN stopped;
END
$pgtask$;

-- name: run — queue a task of which the row stays, so that its end can be waited for; its id. What is not given is as the
-- column's default says; it starts at plan, or now, and so much later
CREATE OR REPLACE FUNCTION {run}(
    sql text, plan timestamptz DEFAULT NULL, delay interval DEFAULT NULL, "group" text DEFAULT NULL, max integer DEFAULT NULL,
    timeout interval DEFAULT NULL, key text DEFAULT NULL, retry integer DEFAULT NULL, depend bigint[] DEFAULT NULL,
    remote text DEFAULT NULL, data text DEFAULT NULL, notify text DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    columns text;
    expressions text;
    made bigint;
BEGIN
    IF $1 IS NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'there is no SQL to run',
            HINT = 'A null anywhere in a concatenation makes all of it null: use format() or concat().';
    ELSIF $3 < interval '0' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = concat('a task cannot be delayed by ', $3),
            HINT = 'A delay is zero or more.';
    END IF;
    SELECT string_agg(given.name, ', '), string_agg(given.value, ', ')
    INTO columns, expressions
    FROM (VALUES
        ('input', '$1', true), ('"delete"', 'false', true),
        ('plan', 'coalesce($2, statement_timestamp()) + coalesce($3, interval ''0'')', num_nonnulls($2, $3) > 0),
        ('"group"', '$4', $4 IS NOT NULL), ('max', '$5', $5 IS NOT NULL), ('timeout', '$6', $6 IS NOT NULL),
        ('key', '$7', $7 IS NOT NULL), ('retry', '$8', $8 IS NOT NULL), ('depend', '$9', $9 IS NOT NULL),
        ('remote', '$10', $10 IS NOT NULL), ('data', '$11', $11 IS NOT NULL), ('notify', '$12', $12 IS NOT NULL)
    ) AS given (name, value, there)
    WHERE given.there;
    EXECUTE concat('INSERT INTO ', {task_regclass}, ' (', columns, ') VALUES (', expressions, ') RETURNING id')
    INTO made USING $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12;
    RETURN made;
END
$pgtask$;

-- name: wait_for — until every one of the tasks has ended, or one of them; or the timeout is over. Then each, in the order of
-- the ids, as it is. A run that was stopped ends when it is really over; what is not there any more was removed since it
-- was done. Every look is at the table as it is at that moment
CREATE OR REPLACE FUNCTION {wait_for}(ids bigint[], timeout interval, every boolean)
RETURNS TABLE (id bigint, state text, output text, error text, code text, notice text) LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_variable
DECLARE
    deadline timestamptz := clock_timestamp() + timeout;
    looked timestamptz;
    number bigint;
    at integer := 1;
    pause double precision := 0.001;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE invalid_transaction_state USING
            MESSAGE = concat('a transaction that is ', upper(current_setting('transaction_isolation')), ' sees no task end'),
            HINT = 'Wait in a READ COMMITTED transaction.';
    ELSIF timeout < interval '0' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = concat('the timeout ', timeout, ' is over before it begins'),
            HINT = 'A timeout is zero or more; null waits as long as it takes.';
    ELSIF coalesce(cardinality(ids), 0) = 0 OR array_position(ids, NULL) IS NOT NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'there is no task to wait for',
            HINT = 'Give the ids of tasks, as INSERT ... RETURNING id or task_run() have told them.';
    END IF;
    SELECT i.id INTO number FROM unnest(ids) AS i (id) WHERE NOT EXISTS (SELECT FROM {task} AS t WHERE t.id = i.id) LIMIT 1;
    IF FOUND THEN
        RAISE no_data_found USING
            MESSAGE = concat('there is no task ', number),
            HINT = 'A task with "delete" that has nothing to say is removed when it is done.';
    END IF;
    -- A row that we see and whose writer is still at work was written by ourselves, maybe behind a savepoint.
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        BEGIN
            SELECT min(t.id) INTO number
            FROM {task} AS t
            WHERE t.id = ANY (ids) AND (t.state::text IN ('PLAN', 'WAIT', 'TAKE', 'WORK') OR t.state::text = 'STOP' AND t.stop IS NULL)
                AND CASE WHEN age(t.xmin) <= 0 THEN pg_xact_status(
                    (pg_current_xact_id_if_assigned()::text::bigint - age(t.xmin))::text::xid8) = 'in progress' END;
        EXCEPTION WHEN invalid_parameter_value THEN
            number := NULL;  -- frozen for so long that its writer looks like one to come: not ours
        END;
        IF number IS NOT NULL THEN
            RAISE object_not_in_prerequisite_state USING
                MESSAGE = concat('task ', number, ' was written by this very transaction, so it can neither run nor end'),
                HINT = 'Commit first, then wait.';
        END IF;
    END IF;
    SELECT count(DISTINCT i.id) INTO number FROM unnest(ids) AS i (id);
    LOOP
        looked := clock_timestamp();
        IF every THEN  -- one after another: no look at those behind one that goes on
            WHILE at <= cardinality(ids) AND NOT EXISTS (
                SELECT FROM {task} AS t
                WHERE t.id = ids[at] AND (t.state::text IN ('PLAN', 'WAIT', 'TAKE', 'WORK')
                    OR t.state::text = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)
            ) LOOP
                at := at + 1;
            END LOOP;
            EXIT WHEN at > cardinality(ids);
        ELSE
            EXIT WHEN number > (
                SELECT count(*) FROM {task} AS t
                WHERE t.id = ANY (ids) AND (t.state::text IN ('PLAN', 'WAIT', 'TAKE', 'WORK')
                    OR t.state::text = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)
            );
        END IF;
        EXIT WHEN clock_timestamp() >= deadline;
        pause := least(0.005, pause * 1.5);
        -- However many tasks there are, less than half of the time is spent on looks.
        PERFORM pg_sleep(least(
            greatest(pause, date_part('epoch', clock_timestamp() - looked)), date_part('epoch', deadline - clock_timestamp())));
    END LOOP;
    RETURN QUERY
        SELECT i.id, coalesce(t.state::text, 'DONE'), t.output, t.error, t.code, t.notice
        FROM unnest(ids) WITH ORDINALITY AS i (id, number)
        LEFT JOIN {task} AS t ON t.id = i.id
        ORDER BY i.number;
END
$pgtask$;

-- name: wait — until the task has ended, or the timeout is over
CREATE OR REPLACE FUNCTION {wait}(
    INOUT id bigint, timeout interval DEFAULT NULL, OUT state text, OUT output text, OUT error text, OUT code text, OUT notice text
) RETURNS SETOF record LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    RETURN QUERY SELECT w.id, w.state, w.output, w.error, w.code, w.notice FROM {wait_for}(ARRAY[$1], $2, true) AS w;
END
$pgtask$;

-- name: wait_all — until all of the tasks have ended, or the timeout is over
CREATE OR REPLACE FUNCTION {wait_all}(ids bigint[], timeout interval DEFAULT NULL)
RETURNS TABLE (id bigint, state text, output text, error text, code text, notice text) LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    RETURN QUERY SELECT w.id, w.state, w.output, w.error, w.code, w.notice FROM {wait_for}($1, $2, true) AS w;
END
$pgtask$;

-- name: wait_any — until one of the tasks has ended, or the timeout is over; those that have ended come first
CREATE OR REPLACE FUNCTION {wait_any}(ids bigint[], timeout interval DEFAULT NULL)
RETURNS TABLE (id bigint, state text, output text, error text, code text, notice text) LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    RETURN QUERY
        SELECT w.id, w.state, w.output, w.error, w.code, w.notice
        FROM {wait_for}($1, $2, false) WITH ORDINALITY AS w
        ORDER BY w.state IN ('PLAN', 'WAIT', 'TAKE', 'WORK'), w.ordinality;
END
$pgtask$;

-- name: await — the same as wait for one task, but it commits between two looks: the caller's transaction lasts for no longer
-- than a few milliseconds, and vacuum is not held back
CREATE OR REPLACE PROCEDURE {await}(
    INOUT id bigint, timeout interval DEFAULT NULL, INOUT state text DEFAULT NULL, INOUT output text DEFAULT NULL,
    INOUT error text DEFAULT NULL, INOUT code text DEFAULT NULL, INOUT notice text DEFAULT NULL
) LANGUAGE plpgsql AS $pgtask$
#variable_conflict use_variable
DECLARE
    deadline pg_catalog.timestamptz := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) timeout;
    pause pg_catalog.float8 := 0.001;
    ended pg_catalog.bool;
BEGIN
    IF timeout OPERATOR(pg_catalog.<) '0'::pg_catalog.interval THEN
        RAISE invalid_parameter_value USING
            MESSAGE = pg_catalog.concat('the timeout ', timeout, ' is over before it begins'),
            HINT = 'A timeout is zero or more; null waits as long as it takes.';
    ELSIF pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE active_sql_transaction USING
            MESSAGE = 'this transaction has written something that the task may have to wait for',
            HINT = 'Commit first, then wait; outside of a transaction block.';
    ELSIF NOT EXISTS (SELECT FROM {task} AS t WHERE t.id OPERATOR(pg_catalog.=) $1) THEN
        RAISE no_data_found USING
            MESSAGE = pg_catalog.concat('there is no task ', coalesce($1::pg_catalog.text, 'null')),
            HINT = 'A task with "delete" that has nothing to say is removed when it is done.';
    END IF;
    LOOP
        ended := NOT EXISTS (
            SELECT FROM {task} AS t
            WHERE t.id OPERATOR(pg_catalog.=) $1
                AND (t.state::pg_catalog.text OPERATOR(pg_catalog.=) ANY ('{PLAN,WAIT,TAKE,WORK}'::pg_catalog.text[])
                    OR t.state OPERATOR(pg_catalog.=) 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)
        );
        EXIT WHEN ended OR pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>=) deadline;
        COMMIT;
        pause := LEAST(0.005, pause OPERATOR(pg_catalog.*) 1.5);
        PERFORM pg_catalog.pg_sleep(pause);
    END LOOP;
    SELECT t.state::pg_catalog.text, t.output, t.error, t.code, t.notice
    INTO state, output, error, code, notice
    FROM {task} AS t
    WHERE t.id OPERATOR(pg_catalog.=) $1;
    state := coalesce(state, 'DONE');
END
$pgtask$;

-- name: hold — begin nothing more of the group, on whatever remote, until it is released. False if it is held already
CREATE OR REPLACE FUNCTION {hold}("group" text) RETURNS boolean LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_column
BEGIN
    IF $1 IS NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'there is no group to hold',
            HINT = 'Tasks without a group of their own are in the group ''group''.';
    END IF;
    INSERT INTO {held} AS h ("group") VALUES ($1) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM pg_notify(concat('pgtask_', {task_regclass}::regclass::oid), 'hold');
        RETURN true;
    END IF;
    RETURN false;
END
$pgtask$;

-- name: release — let the group's tasks begin again. False if it is not held
CREATE OR REPLACE FUNCTION {release}("group" text) RETURNS boolean LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    DELETE FROM {held} AS h WHERE h."group" = $1;
    IF FOUND THEN
        PERFORM pg_notify(concat('pgtask_', {task_regclass}::regclass::oid), 'hold');
        RETURN true;
    END IF;
    RETURN false;
END
$pgtask$;

-- name: progress — say how far the run is that calls this, of 100, and in which words. Others see it at once
CREATE OR REPLACE FUNCTION {progress}(percent numeric, message text DEFAULT NULL) RETURNS void LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    IF coalesce(current_setting('pg_task.id', true), '') IN ('', '0') THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = 'there is no task here that could be so far',
            HINT = 'Call it in the input of a task, or in what that calls.';
    ELSIF $1 IS NULL OR $1 NOT BETWEEN 0 AND 100 THEN
        RAISE invalid_parameter_value USING
            MESSAGE = concat('a task cannot be ', coalesce($1::text, 'null'), ' percent done'),
            HINT = 'Give a number from 0 to 100.';
    END IF;
    RAISE INFO USING
        ERRCODE = 'PT002', MESSAGE = 'progress',
        DETAIL = json_build_object('percent', round($1, 2), 'message', left($2, 1000));
END
$pgtask$;
