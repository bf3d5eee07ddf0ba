-- The SQL objects beside a task table. Functions find their table by the trigger's own words, never by a literal
-- oid, and name everything they call with its schema; a caller needs no right but INSERT.

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

-- name: change_function — of what was written to a row: refuse a forged run, which would hold a slot of its group; wake the
-- master for a row set back to PLAN, or moved, unless that is off; tell the worker whose row was stopped. Without a WHEN:
-- its text would be read anew for every statement. $1 the master's table, $2 'wake'
CREATE OR REPLACE FUNCTION {change}() RETURNS trigger LANGUAGE plpgsql AS $pgtask$
DECLARE
    target pg_catalog.oid;
BEGIN
    -- What most statements write, in one expression. An insert has no OLD.
    IF (CASE WHEN OLD.state IS NULL
        THEN NEW.state OPERATOR(pg_catalog.=) 'PLAN' AND NEW.pid IS NULL AND NEW.start IS NULL AND NEW.stop IS NULL
            AND NEW.attempt OPERATOR(pg_catalog.=) 0
        ELSE NEW.state OPERATOR(pg_catalog.<>) 'PLAN' AND NEW.state OPERATOR(pg_catalog.<>) 'STOP'
    END) THEN
        RETURN NULL;
    END IF;
    IF OLD.state IS NULL THEN
        IF pg_catalog.has_table_privilege(pg_catalog.to_regclass(TG_ARGV[0])::pg_catalog.oid, 'UPDATE') IS NOT TRUE THEN
            RAISE insufficient_privilege USING
                MESSAGE = pg_catalog.concat('a task cannot be inserted as ', NEW.state, ', with a pid, a start or an attempt'),
                HINT = 'Leave state, pid, start, stop and attempt to the scheduler.';
        END IF;
        RETURN NULL;
    END IF;
    target := coalesce(pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid, TG_RELID);
    IF NEW.state OPERATOR(pg_catalog.=) 'STOP' THEN
        IF OLD.state OPERATOR(pg_catalog.=) 'TAKE' OR OLD.state OPERATOR(pg_catalog.=) 'WORK' THEN
            PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), OLD.id::pg_catalog.text);
        END IF;
    ELSIF TG_ARGV[1] OPERATOR(pg_catalog.=) 'wake'
        AND pg_catalog.record_ne(
            ROW(NEW.state, NEW.plan, NEW."group", NEW.max, NEW.remote), ROW(OLD.state, OLD.plan, OLD."group", OLD.max, OLD.remote))
        AND NOT pg_catalog.pg_try_advisory_xact_lock_shared(target::int, -1)
    THEN
        PERFORM pg_catalog.pg_notify(pg_catalog.concat('pgtask_', target), '');
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: stop_function — a running task was deleted: its worker must hear of it, unless it is the one that deletes
CREATE OR REPLACE FUNCTION {stop}() RETURNS trigger LANGUAGE plpgsql AS $pgtask$
BEGIN
    IF (OLD.state OPERATOR(pg_catalog.=) 'TAKE' OR OLD.state OPERATOR(pg_catalog.=) 'WORK')
        AND (OLD.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid()) IS NOT FALSE
    THEN
        PERFORM pg_catalog.pg_notify(
            pg_catalog.concat('pgtask_', coalesce(pg_catalog.pg_partition_root(TG_RELID)::pg_catalog.oid, TG_RELID)),
            OLD.id::pg_catalog.text);
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: guard_function — refuse what only the scheduler may write: what anybody else may change is a PLAN row, STOP, a
-- finished row's return to PLAN, data, own columns
CREATE OR REPLACE FUNCTION {guard}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN  -- pgtask's: only those come here who may not write the master's table
    IF (NEW.id, NEW.parent, NEW.pid, NEW.attempt, NEW.first) IS DISTINCT FROM (OLD.id, OLD.parent, OLD.pid, OLD.attempt, OLD.first)
        OR (NEW.start, NEW.stop, NEW.output, NEW.error, NEW.code, NEW.notice)
            IS DISTINCT FROM (OLD.start, OLD.stop, OLD.output, OLD.error, OLD.code, OLD.notice)
        OR (NEW.state <> OLD.state
            AND NOT (NEW.state = 'STOP' AND OLD.state IN ('PLAN', 'TAKE', 'WORK'))
            AND NOT (NEW.state = 'PLAN' AND OLD.state IN ('DONE', 'FAIL', 'GONE', 'STOP')))
        OR (OLD.state IN ('TAKE', 'WORK') AND
            (NEW.plan, NEW."group", NEW.remote, NEW.max, NEW.input, NEW.repeat, NEW.drift, NEW."delete")
            IS DISTINCT FROM (OLD.plan, OLD."group", OLD.remote, OLD.max, OLD.input, OLD.repeat, OLD.drift, OLD."delete"))
    THEN
        RAISE insufficient_privilege USING
            MESSAGE = concat('task ', OLD.id, ' cannot be changed like this while it is in state ', OLD.state),
            HINT = 'Change a task that is in PLAN, set state to STOP, or set a finished task back to PLAN; the rest is the scheduler''s.';
    END IF;
    RETURN NEW;
END
$pgtask$;

-- name: wake_trigger
CREATE OR REPLACE TRIGGER pgtask_wake AFTER INSERT ON {task} FOR EACH {each} EXECUTE FUNCTION {wake}();

-- name: change_trigger
CREATE OR REPLACE TRIGGER pgtask_change AFTER INSERT OR UPDATE ON {task} FOR EACH ROW EXECUTE FUNCTION {change}({arguments});

-- name: drop_trigger — not for each of the finished rows that somebody clears away
CREATE OR REPLACE TRIGGER pgtask_drop AFTER DELETE ON {task} FOR EACH ROW
WHEN (OLD.stop IS NULL) EXECUTE FUNCTION {stop}();

-- name: guard_trigger — a long condition would be read anew for every statement of the scheduler's own, and a trigger
-- before the update would lock each row once more; but after one that moves a row to another partition there is none
CREATE OR REPLACE TRIGGER pgtask_guard {guards} UPDATE ON {task} FOR EACH ROW
WHEN (NOT has_table_privilege({master_regclass}::regclass::oid, 'UPDATE'))
EXECUTE FUNCTION {guard}();

-- name: due_index — what is due, in order
CREATE INDEX {index} ON {task} (plan, id) WHERE state = 'PLAN';

-- name: lane_index — the first due row of one group; by hash, so that a long name costs nothing and none is too long
CREATE INDEX {index} ON {task} ((hashtextextended("group", hashtextextended(coalesce(remote, ''), 0))), max DESC, plan, id)
WHERE state = 'PLAN';

-- name: slot_index — slots in use, also by runs that were stopped and have not ended yet
CREATE INDEX {index} ON {task} ((hashtextextended("group", hashtextextended(coalesce(remote, ''), 0))))
WHERE state IN ('TAKE', 'WORK') OR state = 'STOP' AND stop IS NULL AND pid IS NOT NULL;

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

-- name: layout — which defaults the table was given
INSERT INTO {master} AS m (one, term, layout) VALUES (true, 0, {layout})
ON CONFLICT (one) DO UPDATE SET layout = excluded.layout;
