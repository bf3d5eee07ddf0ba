-- The SQL objects beside a task table. Functions find it by the trigger's own words or by its name, never by a literal oid;
-- they name everything they call, types too, with its schema, or set their search_path. A caller needs no right but
-- INSERT: what takes more is SECURITY DEFINER, and then nobody else may call it or make a trigger of it.

-- name: wake_function — tell a sleeping master. While it is awake it holds no ASLEEP lock, the try succeeds, and the
-- lock keeps it awake until this transaction's rows can be seen: an insert then costs no NOTIFY.
CREATE OR REPLACE FUNCTION {wake}() RETURNS trigger LANGUAGE plpgsql AS $pgtask$
DECLARE
    target pg_catalog.oid := coalesce(pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid, TG_RELID);
BEGIN
    IF NOT pg_catalog.pg_try_advisory_xact_lock_shared(target::int, -1) THEN
        PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), '');
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: change_function — of what was written to a row: refuse a forged run, which would hold a slot of its group, and
-- nonsense in retry_on; wake the master for a row set back to PLAN, or moved, unless that is off, and say so if its plan is
-- older than it may look for (backlog.py); tell the worker whose row was stopped, and note in it who did that (who may not write so much stops it all the same); tell the channel of one that
-- has ended. Without a WHEN: its text would be read anew for every statement. $1 the master's table, $2 'wake'
CREATE OR REPLACE FUNCTION {change}() RETURNS trigger LANGUAGE plpgsql AS $pgtask$
DECLARE
    target pg_catalog.oid;
BEGIN
    -- What most statements write, in one expression. An insert has no OLD.
    IF (CASE WHEN OLD.state IS NULL
        THEN NEW.state OPERATOR(pg_catalog.=) 'PLAN' AND NEW.pid IS NULL AND NEW.start IS NULL AND NEW.stop IS NULL
            AND NEW.attempt OPERATOR(pg_catalog.=) 0 AND NEW.attempts IS NULL AND NEW.error IS NULL AND NEW.code IS NULL
            AND NEW.output IS NULL AND NEW.notice IS NULL AND NEW.retry_on OPERATOR(pg_catalog.=) '* !0A !42'
        ELSE NEW.state OPERATOR(pg_catalog.<>) 'PLAN' AND NEW.state OPERATOR(pg_catalog.<>) 'STOP' AND NEW.notify IS NULL
    END) THEN
        RETURN NULL;
    END IF;
    -- Here, since the literal would be read anew for every INSERT where the other rules are; and only of who has written it.
    IF (OLD.state IS NULL OR NEW.retry_on OPERATOR(pg_catalog.<>) OLD.retry_on)
        AND NEW.retry_on OPERATOR(pg_catalog.!~*) '^([ ,]*!?([*]|[0-9a-z][0-9a-z]([0-9a-z][0-9a-z][0-9a-z])?)(?=[ ,]|$))*[ ,]*$'
    THEN
        RAISE check_violation USING
            MESSAGE = pg_catalog.format('retry_on cannot be "%s"', NEW.retry_on),
            HINT = 'Write *, classes such as 40 and SQLSTATEs such as 40001, between blanks or commas, with ! before what is not meant.',
            SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'retry_on', CONSTRAINT = TG_NAME;
    END IF;
    IF OLD.state IS NULL THEN
        IF (NEW.state OPERATOR(pg_catalog.<>) 'PLAN' AND (NEW.state OPERATOR(pg_catalog.<>) 'WAIT' OR NEW.depend IS NULL AND (NEW.cron IS NULL OR NEW.first IS NOT NULL))
                OR NEW.attempt OPERATOR(pg_catalog.<>) 0
                OR pg_catalog.num_nonnulls(NEW.pid, NEW.start, NEW.stop, NEW.attempts, NEW.output, NEW.error, NEW.code, NEW.notice) OPERATOR(pg_catalog.>) 0)
            AND pg_catalog.has_table_privilege(pg_catalog.to_regclass(TG_ARGV[0])::pg_catalog.oid, 'UPDATE') IS NOT TRUE
        THEN
            RAISE insufficient_privilege USING
                MESSAGE = pg_catalog.concat('a task cannot be inserted as ', NEW.state, ', with a pid, a start, an attempt or an end'),
                HINT = 'Leave state, pid, start, stop, attempt, attempts, output, error, code and notice to the scheduler.';
        END IF;
        RETURN NULL;
    END IF;
    target := coalesce(pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid, TG_RELID);
    IF NEW.state OPERATOR(pg_catalog.=) 'STOP' THEN
        IF OLD.state OPERATOR(pg_catalog.=) 'TAKE' OR OLD.state OPERATOR(pg_catalog.=) 'WORK' THEN
            PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), OLD.id::pg_catalog.text);
        END IF;
        IF TG_ARGV[1] OPERATOR(pg_catalog.=) 'wake' THEN
            PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), 'ended');
        END IF;
        IF OLD.state OPERATOR(pg_catalog.<>) 'STOP' AND pg_catalog.has_table_privilege(target, 'SELECT')
            AND pg_catalog.has_table_privilege(target, 'UPDATE')
        THEN
            EXECUTE pg_catalog.format(
                'UPDATE %s AS t SET error = $1, code = ''57014'', stop = CASE WHEN $2 THEN t.stop ELSE pg_catalog.clock_timestamp() END'
                ' WHERE t.id OPERATOR(pg_catalog.=) $3 AND t.state OPERATOR(pg_catalog.=) ''STOP''', target::pg_catalog.regclass)
            USING pg_catalog.concat('ERROR:  task stopped by ', SESSION_USER,
                ' as ' OPERATOR(pg_catalog.||) NULLIF(CURRENT_USER, SESSION_USER)::pg_catalog.text),
                OLD.state OPERATOR(pg_catalog.=) 'WORK', OLD.id;
        END IF;
    ELSIF NEW.state OPERATOR(pg_catalog.=) 'PLAN' AND TG_ARGV[1] OPERATOR(pg_catalog.=) 'wake'
        AND pg_catalog.record_ne(
            ROW(NEW.state, NEW.plan, NEW."group", NEW.max, NEW.remote), ROW(OLD.state, OLD.plan, OLD."group", OLD.max, OLD.remote))
    THEN
        IF NEW.plan OPERATOR(pg_catalog.<) (pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) {recent}::pg_catalog.interval) THEN
            PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), 'old');
        ELSIF NOT pg_catalog.pg_try_advisory_xact_lock_shared(target::int, -1) THEN
            PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), '');
        END IF;
    END IF;
    IF NEW.notify IS NOT NULL AND NEW.state OPERATOR(pg_catalog.<>) OLD.state
        AND NEW.state::pg_catalog.text OPERATOR(pg_catalog.=) ANY ('{DONE,FAIL,GONE,STOP}'::pg_catalog.text[])
    THEN
        PERFORM pg_catalog.pg_notify(NEW.notify, pg_catalog.json_build_object('id', NEW.id, 'state', NEW.state, 'code',
            CASE WHEN NEW.state OPERATOR(pg_catalog.=) 'STOP' THEN '57014' ELSE pg_catalog.left(NEW.code, 5) END)::pg_catalog.text);
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: enter_function — a row that depends on others, or has a calendar, waits until the master has looked at it. What it
-- depends on must be there, and stay until this is committed; that says nothing of its state, so no run waits for us. With
-- the rights of the owner, since to lock a row takes more than an insert. $2 'wake'
CREATE OR REPLACE FUNCTION {enter}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path TO pg_catalog, pg_temp SET enable_seqscan TO off AS $pgtask$
DECLARE
    locked bigint[];
    missing bigint;
BEGIN
    IF cardinality(NEW.depend) = 0 THEN
        NEW.depend := NULL;
    END IF;
    IF array_ndims(NEW.depend) > 1 OR array_position(NEW.depend, NULL) IS NOT NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = format('depend cannot be %s: it is a list of ids', NEW.depend),
            HINT = 'Write it as ARRAY[12, 34] or ''{12,34}''.';
    END IF;
    IF cardinality(NEW.depend) > 10000 THEN
        RAISE program_limit_exceeded USING
            MESSAGE = format('a task cannot depend on %s others', cardinality(NEW.depend)),
            HINT = 'Up to 10000: let tasks between them gather some each.';
    END IF;
    SELECT array_agg(d.id) INTO locked
    FROM (SELECT t.id FROM {task} AS t WHERE t.id = ANY (NEW.depend) ORDER BY t.id FOR KEY SHARE) AS d;
    -- Not what is there by now, but what is locked.
    SELECT u.id INTO missing FROM (SELECT unnest(NEW.depend) EXCEPT SELECT unnest(locked)) AS u (id) ORDER BY u.id LIMIT 1;
    IF FOUND THEN
        RAISE foreign_key_violation USING
            MESSAGE = format('task %s, on which this one shall depend, does not exist', missing),
            HINT = CASE WHEN missing = NEW.id THEN 'A task cannot depend on itself.'
                ELSE 'It was never there, or was removed after it was done: insert it with "delete" false.' END;
    END IF;
    IF NEW.depend IS NULL AND (NEW.cron IS NULL OR NEW.first IS NOT NULL) THEN
        RETURN NEW;
    END IF;
    NEW.state := 'WAIT';
    IF TG_ARGV[1] = 'wake' THEN
        PERFORM pg_notify(concat('pgtask_', coalesce(pg_partition_root(TG_RELID)::oid, TG_RELID)), 'wait');
    END IF;
    RETURN NEW;
END
$pgtask$;

-- name: fixed_function — what a row depends on was checked when it was inserted
CREATE OR REPLACE FUNCTION {fixed}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN  -- pgtask's
    RAISE object_not_in_prerequisite_state USING
        MESSAGE = format('depend of task %s cannot be changed', OLD.id),
        HINT = 'Stop it and insert another one; or set its state to PLAN, so that it waits no more.';
END
$pgtask$;

-- name: stop_function — a row was deleted that is not DONE. If it was running, its worker must hear of it, unless that is who
-- deletes it, since it is done and has said nothing: that is told to the task's channel. So it is for each such task: what
-- others need, who wait for it, stands apart. With the rights of the owner, since that is not for everybody to say
CREATE OR REPLACE FUNCTION {stop}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $pgtask$
DECLARE
    channel pg_catalog.text;
BEGIN
    IF OLD.state OPERATOR(pg_catalog.=) 'WORK' AND OLD.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() THEN
        -- One that went to another partition was not removed.
        IF OLD.notify IS NOT NULL AND NOT EXISTS (SELECT FROM {task} AS t WHERE t.id OPERATOR(pg_catalog.=) OLD.id) THEN
            PERFORM pg_catalog.pg_notify(OLD.notify,
                pg_catalog.json_build_object('id', OLD.id, 'state', 'DONE', 'code', NULL)::pg_catalog.text);
        END IF;
        RETURN NULL;
    END IF;
    IF EXISTS (SELECT FROM {task} AS t WHERE t.id OPERATOR(pg_catalog.=) OLD.id) THEN
        RETURN NULL;
    END IF;
    channel := pg_catalog.concat('pgtask_', coalesce(pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid, TG_RELID));
    IF OLD.state OPERATOR(pg_catalog.=) 'TAKE' OR OLD.state OPERATOR(pg_catalog.=) 'WORK' THEN
        PERFORM pg_catalog.pg_notify(channel, OLD.id::pg_catalog.text);
    END IF;
    IF {orphan}(OLD.id) THEN
        PERFORM pg_catalog.pg_notify(channel, 'ended');
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: orphan_function — what a row depends on was deleted: it will not run, unless it does so anyway. Were there any? They
-- are found by an index that only bitmap scans can use, also in the sessions of ours that use none: history.sql removes
-- many rows
CREATE OR REPLACE FUNCTION {orphan}(deleted bigint) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path TO pg_catalog, pg_temp SET enable_bitmapscan TO on SET enable_seqscan TO off AS $pgtask$
BEGIN
    UPDATE {task} AS t
    SET state = 'GONE', stop = clock_timestamp(), pid = NULL, code = 'PT001',
        error = concat('ERROR:  task ', $1, ', on which this one depends, was deleted')
    WHERE t.state = 'WAIT' AND t.depend @> ARRAY[$1] AND NOT t.anyway;
    RETURN FOUND OR EXISTS (SELECT FROM {task} AS t WHERE t.state = 'WAIT' AND t.depend @> ARRAY[$1]);
END
$pgtask$;

-- name: guard_function — refuse what only the scheduler may write: what anybody else may change is a PLAN row, STOP, a
-- finished row's return to PLAN with a note of what it was, the plan of a running one that has a key, or is the caller,
-- data, own columns; that a row that waits is planned anew, that one that runs is not repeated; and the note of who stopped
-- it, as the trigger above writes it
CREATE OR REPLACE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN  -- pgtask's: only those come here who may not write the master's table
    IF OLD.state IN ('PLAN', 'WAIT') AND NEW.state IN ('WAIT', OLD.state) AND NEW.cron IS NOT NULL AND NEW.pid IS NULL AND NEW.first IS NULL
    THEN
        OLD.state := NEW.state;
        OLD.pid := NULL;
        OLD.first := NULL;
    END IF;
    OLD.repeat := CASE WHEN NEW.repeat = interval '0' THEN NEW.repeat ELSE OLD.repeat END;
    IF (NEW.id, NEW.parent, NEW.attempt, NEW.first) IS DISTINCT FROM (OLD.id, OLD.parent, OLD.attempt, OLD.first)
        OR (NEW.pid, NEW.start, NEW.stop, NEW.attempts, NEW.output, NEW.error, NEW.code, NEW.notice)
            IS DISTINCT FROM (OLD.pid, OLD.start, OLD.stop, OLD.attempts, OLD.output, OLD.error, OLD.code, OLD.notice)
            AND NOT (pg_trigger_depth() > 1 AND NEW.state = 'STOP' AND OLD.state = 'STOP' AND NEW.code = '57014'
                AND NEW.error IS NOT DISTINCT FROM
                    concat('ERROR:  task stopped by ', session_user, ' as ' || nullif(current_user, session_user)::text)
                AND (NEW.pid, NEW.start, NEW.attempts, NEW.output, NEW.notice)
                    IS NOT DISTINCT FROM (OLD.pid, OLD.start, OLD.attempts, OLD.output, OLD.notice))
            AND NOT (NEW.state IN ('PLAN', 'WAIT') AND OLD.state IN ('DONE', 'FAIL', 'GONE', 'STOP')
                AND num_nonnulls(NEW.pid, NEW.start, NEW.stop) = 0
                AND NEW.attempts = {noted}(OLD.attempts, OLD.attempt, OLD.plan, OLD.start, OLD.stop, OLD.state::text, OLD.code, OLD.error)
                AND (NEW.output, NEW.error, NEW.code, NEW.notice)
                    IS NOT DISTINCT FROM (OLD.output, OLD.error, OLD.code, OLD.notice))
        OR (NEW.state <> OLD.state
            AND NOT (NEW.state = 'STOP' AND OLD.state IN ('PLAN', 'WAIT', 'TAKE', 'WORK'))
            AND NOT (NEW.state = 'PLAN' AND OLD.state IN ('WAIT', 'DONE', 'FAIL', 'GONE', 'STOP'))
            AND NOT (NEW.state = 'WAIT' AND (NEW.depend IS NOT NULL OR NEW.cron IS NOT NULL AND NEW.first IS NULL)
                AND OLD.state IN ('DONE', 'FAIL', 'GONE', 'STOP')))
        OR (NEW.state IN ('PLAN', 'WAIT') AND OLD.state = 'STOP' AND OLD.stop IS NULL AND OLD.pid IS NOT NULL)
        OR (NEW.plan <> OLD.plan AND OLD.state IN ('TAKE', 'WORK') AND OLD.key IS NULL AND OLD.pid <> pg_backend_pid())
        OR (OLD.state IN ('TAKE', 'WORK') AND
            (NEW."group", NEW.remote, NEW.max, NEW.input, NEW.repeat, NEW.drift, NEW."delete")
            IS DISTINCT FROM (OLD."group", OLD.remote, OLD.max, OLD.input, OLD.repeat, OLD.drift, OLD."delete"))
    THEN
        RAISE insufficient_privilege USING
            MESSAGE = concat('task ', OLD.id, ' cannot be changed like this while it is in state ', OLD.state),
            HINT = 'Change a task that is in PLAN, set state to STOP, or set a finished task back to PLAN; the rest is the scheduler''s.';
    END IF;
    RETURN NEW;
END
$pgtask$;

-- name: moved_function — a plan for a running row with a key means another run, but what it says may be older than the run's
-- start: now() when the transaction began earlier. No such event may be lost. Comes here for these only
CREATE OR REPLACE FUNCTION {moved}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    EXECUTE format('UPDATE %I.%I SET plan = $2 WHERE id = $1 AND plan <= start', TG_TABLE_SCHEMA, TG_TABLE_NAME)
        USING NEW.id, greatest(clock_timestamp(), NEW.start + interval '1 us');
    RETURN NULL;
END
$pgtask$;

-- name: check_function — a column's value that it must not have: say which. The arguments are columns, each with its rule
CREATE OR REPLACE FUNCTION {check}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    holds boolean;
    value text;
BEGIN  -- pgtask's: comes here where one of the rules does not hold
    FOR i IN 0 .. TG_NARGS - 1 BY 2 LOOP
        EXECUTE format('SELECT %s, %s FROM (SELECT ($1).*) AS t', TG_ARGV[i + 1], TG_ARGV[i]) INTO holds, value USING NEW;
        IF NOT holds THEN
            RAISE check_violation USING
                MESSAGE = format('%s cannot be %s: the rule is %s', TG_ARGV[i], value, TG_ARGV[i + 1]),
                HINT = (SELECT format('%s: %s', a.attname, col_description(a.attrelid, a.attnum))
                    FROM pg_attribute AS a
                    WHERE a.attrelid = coalesce(pg_partition_root(TG_RELID)::oid, TG_RELID) AND a.attname = TG_ARGV[i]),
                SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = TG_ARGV[i], CONSTRAINT = TG_NAME;
        END IF;
    END LOOP;
    RETURN NULL;
END
$pgtask$;

-- name: wake_trigger
CREATE OR REPLACE TRIGGER pgtask_wake AFTER INSERT ON {task} FOR EACH {each} EXECUTE FUNCTION {wake}();

-- name: change_trigger
CREATE OR REPLACE TRIGGER pgtask_change AFTER INSERT OR UPDATE ON {task} FOR EACH ROW EXECUTE FUNCTION {change}({arguments});

-- name: drop_trigger — not for each of the rows that are done and that somebody clears away
CREATE OR REPLACE TRIGGER pgtask_drop AFTER DELETE ON {task} FOR EACH ROW
WHEN (OLD.stop IS NULL OR OLD.state <> 'DONE') EXECUTE FUNCTION {stop}();

-- name: enter_trigger
CREATE OR REPLACE TRIGGER pgtask_enter BEFORE INSERT ON {task} FOR EACH ROW
WHEN ((NEW.depend IS NOT NULL OR NEW.cron IS NOT NULL AND NEW.first IS NULL) AND NEW.state IN ('PLAN', 'WAIT'))
EXECUTE FUNCTION {enter}({arguments});

-- name: fixed_trigger
CREATE OR REPLACE TRIGGER pgtask_fixed AFTER UPDATE OF depend ON {task} FOR EACH ROW
WHEN (NEW.depend IS DISTINCT FROM OLD.depend) EXECUTE FUNCTION {fixed}();

-- name: guard_trigger — a long condition would be read anew for every statement of the scheduler's own, and a trigger
-- before the update would lock each row once more; but after one that moves a row to another partition there is none
CREATE OR REPLACE TRIGGER pgtask_guard {guards} UPDATE ON {task} FOR EACH ROW
WHEN (NOT has_table_privilege({master_regclass}::regclass::oid, 'UPDATE'))
EXECUTE FUNCTION {guard}();

-- name: moved_trigger — of the statements that write a plan; of the scheduler's none does that leaves a row running
CREATE OR REPLACE TRIGGER pgtask_moved AFTER UPDATE OF plan ON {task} FOR EACH ROW
WHEN (NEW.key IS NOT NULL AND NEW.state IN ('TAKE', 'WORK') AND NEW.plan <= NEW.start) EXECUTE FUNCTION {moved}();

-- name: check_trigger — what values the columns may have. A CHECK of each would be read anew for every UPDATE, also one
-- that touches none of them, like all of the scheduler's: a fifth of what a task costs the server. What a trigger of the
-- user's changes before an UPDATE is not seen
CREATE OR REPLACE TRIGGER pgtask_check AFTER INSERT OR UPDATE OF {checked} ON {task} FOR EACH ROW
WHEN (NOT ({checks})) EXECUTE FUNCTION {check}({rules});

-- name: align_trigger — nothing of the scheduler's writes these columns
CREATE OR REPLACE TRIGGER pgtask_align AFTER UPDATE OF cron, zone ON {task} FOR EACH ROW
WHEN (NEW.state IN ('PLAN', 'WAIT') AND NEW.cron IS NOT NULL AND (NEW.cron, NEW.zone) IS DISTINCT FROM (OLD.cron, OLD.zone))
EXECUTE FUNCTION {align}({arguments});

-- name: noted_function — the attempts of a row with one more: the first is kept, since its plan is what repetitions count from,
-- and the last 99
CREATE OR REPLACE FUNCTION {noted}(
    attempts jsonb, attempt integer, plan timestamptz, start timestamptz, stop timestamptz, state text, code text, error text,
    retry integer DEFAULT NULL
) RETURNS jsonb LANGUAGE sql STABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
    SELECT CASE
        WHEN jsonb_typeof($1) IS DISTINCT FROM 'array' THEN '[]'
        WHEN jsonb_array_length($1) < 100 THEN $1
        ELSE $1 - 1
    END || jsonb_strip_nulls(jsonb_build_object('attempt', $2, 'plan', $3, 'start', $4, 'stop', $5, 'state', $6,
        'code', $7, 'error', left($8, 4000), 'retry', $9))
$pgtask$;

-- name: due_index — what is due, in order
CREATE INDEX {index} ON {task} (plan, id) WHERE state = 'PLAN';

-- name: lane_index — the first due row of one group; by hash, so that a long name costs nothing and none is too long
CREATE INDEX {index} ON {task} ((hashtextextended("group", hashtextextended(coalesce(remote, ''), 0))), max DESC, plan, id)
WHERE state = 'PLAN';

-- name: wait_index — rows that wait, those that were not looked at yet apart
CREATE INDEX {index} ON {task} (pid, id) WHERE state = 'WAIT';

-- name: depend_index — who waits for a row
CREATE INDEX {index} ON {task} USING gin (depend) WITH (fastupdate = off) WHERE state = 'WAIT' AND depend IS NOT NULL;

-- name: slot_index — slots in use, also by runs that were stopped and have not ended yet
CREATE INDEX {index} ON {task} ((hashtextextended("group", hashtextextended(coalesce(remote, ''), 0))))
WHERE state IN ('TAKE', 'WORK') OR state = 'STOP' AND stop IS NULL AND pid IS NOT NULL;

-- name: key_index — one unfinished task for each key. ON CONFLICT clauses repeat the condition; almost no row has a key,
-- and so almost none is tested for more
CREATE UNIQUE INDEX {index} ON {task} (key) WHERE key IS NOT NULL AND state IN ('PLAN', 'TAKE', 'WORK', 'WAIT');

-- name: master_table — who serves the table: one row
CREATE TABLE {master} (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    term bigint NOT NULL,
    host text,
    pid integer,
    backend integer,
    backend_start timestamptz,
    since timestamptz,
    layout text
);

-- name: held_table — one row for each group of which nothing more is started
CREATE TABLE {held} (
    "group" text PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text NOT NULL DEFAULT session_user
);

-- name: report_table — one row for each run that goes on and has said how far it is
CREATE TABLE {report} (
    id bigint PRIMARY KEY,
    attempt integer NOT NULL,
    percent numeric NOT NULL,
    message text,
    at timestamptz NOT NULL
);

-- name: layout — which defaults the table was given
INSERT INTO {master} AS m (one, term, layout) VALUES (true, 0, {layout})
ON CONFLICT (one) DO UPDATE SET layout = excluded.layout;
