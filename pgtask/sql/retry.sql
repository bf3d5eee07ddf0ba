-- Runs once more: from inside a task, and by hand. They write what whoever calls them may write.

-- name: again_function — from inside a task: it runs again so much after now. A plan that is beyond the start of the run is
-- what another run is planned by, so this holds as soon as the run ends well
CREATE OR REPLACE FUNCTION {again}(delay interval DEFAULT '0') RETURNS void LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    own text := current_setting('pg_task.id', true);
BEGIN
    IF $1 IS NULL OR $1 < interval '0' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('a task cannot run again after a delay of %s', coalesce($1::text, 'null')),
            HINT = 'The delay is an interval of 0 or more.';
    END IF;
    UPDATE {task} AS t
    SET plan = greatest(clock_timestamp(), t.start + interval '1 us') + $1
    WHERE t.id = CASE WHEN own ~ '^-?[0-9]{1,18}$' THEN own::bigint END AND t.state::text = 'WORK' AND t.pid = pg_backend_pid();
    IF NOT FOUND THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('no task of %s is running in this session', {task_regclass}),
            HINT = 'It is called from inside a task, on the task''s own database.';
    END IF;
END
$pgtask$;

-- name: put_back_function — those of the finished rows that may run once more are to, now: noted is how they ended. Of several
-- with one key the last, and none while another with it is unfinished. A repeated row that ended by itself has its next one,
-- and so is repeated no more, but for one whose calendar never had a first plan. Returns their ids
CREATE OR REPLACE FUNCTION {put_back}(ids bigint[]) RETURNS SETOF bigint LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH ended AS MATERIALIZED (
        SELECT t.id, t.key, t.depend IS NOT NULL OR t.cron IS NOT NULL AND t.first IS NULL AS waits,
            row_number() OVER (PARTITION BY t.key ORDER BY t.id DESC) AS number
        FROM {task} AS t
        WHERE t.id = ANY ($1) AND t.state IN ('DONE', 'FAIL', 'GONE', 'STOP')
            AND NOT (t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL)
    )
    UPDATE {task} AS t
    SET state = CASE WHEN e.waits THEN 'WAIT'::{state} ELSE 'PLAN'::{state} END, plan = clock_timestamp(),
        attempts = {noted}(t.attempts, t.attempt, t.plan, t.start, t.stop, t.state::text, t.code, t.error),
        pid = NULL, start = NULL, stop = NULL,
        repeat = CASE WHEN t.state = 'STOP' THEN t.repeat ELSE '0' END, cron = CASE WHEN t.state = 'STOP' OR t.first IS NULL THEN t.cron END
    FROM ended AS e
    WHERE t.id = e.id AND t.state IN ('DONE', 'FAIL', 'GONE', 'STOP')
        AND (e.key IS NULL OR e.number = 1 AND NOT EXISTS (
            SELECT FROM {task} AS u WHERE u.key = e.key AND u.state IN ('PLAN', 'TAKE', 'WORK', 'WAIT')))
    RETURNING t.id;
    IF EXISTS (SELECT FROM {task} AS t WHERE t.id = ANY ($1) AND t.state = 'WAIT') THEN
        PERFORM pg_notify(concat('pgtask_', {task_regclass}::regclass::oid), 'wait');
    END IF;
END
$pgtask$;

-- name: retry_function — run a task that has ended once more. False if it is about to run anyway
CREATE OR REPLACE FUNCTION {retry}(task bigint) RETURNS boolean LANGUAGE plpgsql
SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_column
DECLARE
    known text;
    its_key text;
    other bigint;
BEGIN
    SELECT CASE WHEN t.state = 'STOP' AND t.stop IS NULL AND t.pid IS NOT NULL THEN 'being stopped' ELSE t.state::text END, t.key
    INTO known, its_key
    FROM {task} AS t WHERE t.id = $1
    FOR NO KEY UPDATE;
    IF known IN ('PLAN', 'WAIT') THEN
        RETURN false;
    ELSIF known IS NULL THEN
        RAISE undefined_object USING
            MESSAGE = format('there is no task %s', coalesce($1::text, 'null')),
            HINT = 'It may have been removed after its run: one that said nothing is, unless its column "delete" is false.';
    ELSIF known NOT IN ('DONE', 'FAIL', 'GONE', 'STOP') THEN
        RAISE object_not_in_prerequisite_state USING
            MESSAGE = format('task %s has not ended: it is %s', $1, known),
            HINT = 'Wait for its end, or stop it before.';
    END IF;
    BEGIN
        IF EXISTS (SELECT FROM {put_back}(ARRAY[$1])) THEN
            RETURN true;
        END IF;
    EXCEPTION WHEN unique_violation THEN  -- a row that was inserted just now
        IF its_key IS NULL THEN
            RAISE;
        END IF;
    END;
    SELECT t.id INTO other FROM {task} AS t WHERE t.key = its_key AND t.state IN ('PLAN', 'TAKE', 'WORK', 'WAIT');
    RAISE unique_violation USING
        MESSAGE = format('task %s cannot run again: task %s with the same key "%s" has not ended', $1, other, its_key),
        HINT = 'Wait for the end of that one, or stop it.';
END
$pgtask$;

-- name: retry_filter_function — the same for all tasks in FAIL for which a condition holds, written as after WHERE. It is the
-- caller's SQL and looks up names as his does, so what is ours here is qualified instead. Returns how many
CREATE OR REPLACE FUNCTION {retry}(filter text) RETURNS bigint LANGUAGE plpgsql AS $pgtask$
DECLARE
    wanted bigint[];
    done bigint[];
BEGIN
    IF $1 IS NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'a filter is missing', HINT = 'It is a condition as after WHERE; ''true'' is all tasks in FAIL.';
    END IF;
    EXECUTE pg_catalog.concat('SELECT pg_catalog.array_agg(id) FROM ', {task_regclass},
        ' WHERE state OPERATOR(pg_catalog.=) ''FAIL'' AND (', $1, E'\n)')
    INTO wanted;
    FOR tries IN 1 .. 10 LOOP
        BEGIN
            done := ARRAY(SELECT p.id FROM {put_back}(wanted) AS p (id));
            EXIT;
        EXCEPTION WHEN unique_violation THEN  -- with a key that somebody has inserted just now: look again
            IF tries OPERATOR(pg_catalog.=) 10 THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    IF pg_catalog.cardinality(done) OPERATOR(pg_catalog.<) pg_catalog.cardinality(wanted) THEN
        RAISE NOTICE '% tasks are left as they are: another with the same key has not ended, or is later',
            pg_catalog.cardinality(wanted) OPERATOR(pg_catalog.-) pg_catalog.cardinality(done);
    END IF;
    RETURN pg_catalog.cardinality(done);
END
$pgtask$;
