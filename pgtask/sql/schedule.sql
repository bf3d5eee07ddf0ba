-- Named schedules: a row with a key that is repeated, by a calendar or an interval, is put in place and taken away by name.

-- name: align_function — a row that waits has got another calendar or zone: the master finds its plan anew, from the plan
-- that was written with it, or from now. $1 the master's table, $2 'wake'
CREATE OR REPLACE FUNCTION {align}() RETURNS trigger LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    UPDATE {task} AS t
    SET state = 'WAIT', pid = NULL, first = NULL,
        plan = CASE WHEN OLD.cron IS NULL OR NEW.plan <> OLD.plan THEN NEW.plan ELSE statement_timestamp() END
    WHERE t.id = NEW.id AND t.state IN ('PLAN', 'WAIT');
    IF TG_ARGV[1] = 'wake' THEN
        PERFORM pg_notify(concat('pgtask_', coalesce(pg_partition_root(TG_RELID)::oid, TG_RELID)), 'wait');
    END IF;
    RETURN NULL;
END
$pgtask$;

-- name: cron_error_function — what is wrong with an expression, null if nothing is. Whether it ever matches the master finds
-- out; cron.py is what it follows
CREATE OR REPLACE FUNCTION {cron_error}(cron text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    words text[] := regexp_split_to_array(upper(btrim(cron, E' \t\n\r')), '\s+');
    months text[] := ARRAY['JAN', 'FEB', 'MAR', 'APR', 'MAY', 'JUN', 'JUL', 'AUG', 'SEP', 'OCT', 'NOV', 'DEC'];
    days text[] := ARRAY['SUN', 'MON', 'TUE', 'WED', 'THU', 'FRI', 'SAT'];
    known text[] := ARRAY['@YEARLY', '@ANNUALLY', '@MONTHLY', '@WEEKLY', '@DAILY', '@MIDNIGHT', '@HOURLY'];
    wrong text;
BEGIN
    IF words[1] LIKE '@%' THEN
        RETURN CASE WHEN words <> ALL (SELECT ARRAY[k] FROM unnest(known) AS k) THEN
            format('"%s" is none of %s', cron, lower(array_to_string(known, ', '))) END;
    END IF;
    IF cardinality(words) NOT IN (5, 6) OR length(cron) > 1000 THEN
        RETURN format('"%s" has not five or six fields: [second] minute hour day-of-month month day-of-week', left(cron, 100));
    END IF;
    SELECT format('"%s": bad %s "%s"', cron, f.name, f.word) INTO wrong
    FROM unnest(
        ARRAY['second', 'minute', 'hour', 'day-of-month', 'month', 'day-of-week'], ARRAY[0, 0, 0, 1, 1, 0], ARRAY[59, 59, 23, 31, 12, 7],
        CASE cardinality(words) WHEN 5 THEN array_prepend('0', words) ELSE words END
    ) AS f (name, least, most, word)
    CROSS JOIN regexp_split_to_table(f.word, ',') AS i (item)
    -- A star, a number or a range of two, and maybe a step; a name is a number.
    LEFT JOIN LATERAL regexp_match(i.item, '^(?:\*|([0-9]{1,9}|[A-Z]{3})(?:-([0-9]{1,9}|[A-Z]{3}))?)(?:/0*[1-9][0-9]{0,8})?$') AS m (part) ON true
    CROSS JOIN LATERAL (
        SELECT array_agg(CASE
            WHEN p.word ~ '^[0-9]' THEN p.word::int
            WHEN f.name = 'month' THEN array_position(months, p.word)
            WHEN f.name = 'day-of-week' THEN array_position(days, p.word) - 1
        END ORDER BY p.n) AS ends
        FROM unnest(m.part) WITH ORDINALITY AS p (word, n)
        WHERE p.word IS NOT NULL
    ) AS e
    WHERE NOT coalesce(
            CASE WHEN m.part IS NULL THEN false WHEN e.ends IS NULL THEN true
                ELSE e.ends[1] >= f.least AND e.ends[cardinality(e.ends)] <= f.most AND e.ends[1] <= e.ends[cardinality(e.ends)]
            END, false)
        AND NOT (f.name = 'day-of-month' AND i.item ~ '^LW?(/0*[1-9][0-9]{0,8})?$')
        AND NOT (f.name = 'day-of-week' AND (i.item ~ '^0*[0-7]L$' OR i.item ~ '^(0*[0-7]|SUN|MON|TUE|WED|THU|FRI|SAT)#0*[1-5]$'))
    LIMIT 1;
    RETURN wrong;
END
$pgtask$;

-- name: schedule_function — put the schedule of that key in place: the row that waits becomes what is asked for, one that
-- runs has no successor, and a new row comes after it. What is left out becomes what a new row would have. Its plan stays if
-- it is to come round as before
CREATE OR REPLACE FUNCTION {schedule}(
    key text, schedule text, input text, "group" text DEFAULT NULL, max integer DEFAULT NULL, timeout interval DEFAULT NULL,
    zone text DEFAULT NULL, until timestamptz DEFAULT NULL, missed text DEFAULT NULL, retry integer DEFAULT NULL,
    remote text DEFAULT NULL, data text DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_column
DECLARE
    name ALIAS FOR $1;
    comes ALIAS FOR $2;
    cron text;
    every interval := '0';
    names text;
    exprs text;
    found bigint;
BEGIN
    IF name IS NULL OR name = '' OR comes IS NULL OR $3 IS NULL THEN
        RAISE null_value_not_allowed USING
            MESSAGE = 'a schedule needs a key, a calendar or an interval, and an input',
            HINT = 'For example: (''nightly'', ''0 3 * * *'', ''CALL night()'').';
    END IF;
    -- Five or six words, of which the first two are numbers and signs, or @ and a word: no interval looks like that.
    IF comes ~ '^\s*@[[:alpha:]]|^\s*([0-9*/,-]+\s+){2}(\S+\s+){2,3}\S+\s*$' THEN
        cron := comes;
        IF {cron_error}(cron) IS NOT NULL THEN
            RAISE invalid_parameter_value USING
                MESSAGE = format('cron %s', {cron_error}(cron)),
                HINT = 'For example: "30 3 * * MON-FRI", "*/5 8-18 * * *", "0 0 L * *", or @daily.';
        END IF;
    ELSE
        BEGIN
            every := comes::interval;
        EXCEPTION WHEN data_exception THEN
            RAISE invalid_parameter_value USING
                MESSAGE = format('schedule "%s" is neither a calendar nor an interval', comes),
                HINT = 'A calendar has five or six fields, "minute hour day-of-month month day-of-week" with the second before them, '
                    'or is a word such as @daily; an interval is such as "90 seconds".';
        END;
        IF every <= interval '0' OR NOT isfinite(every) THEN
            RAISE invalid_parameter_value USING
                MESSAGE = format('schedule "%s" never comes round', comes),
                HINT = 'Give an interval greater than 0.';
        END IF;
    END IF;
    BEGIN
        PERFORM now() AT TIME ZONE $7;
    EXCEPTION WHEN invalid_parameter_value THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('time zone "%s" does not exist', $7),
            HINT = 'Give a name such as Europe/Berlin; pg_timezone_names has them all.';
    END;
    IF $8 <= clock_timestamp() THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('until %s is over', $8),
            HINT = 'Give a time to come, or end the schedule by its key.';
    END IF;
    SELECT string_agg(format('%I', c.name), ', ' ORDER BY c.n),
        string_agg(CASE WHEN c.given THEN '$' || c.n + 3 ELSE 'DEFAULT' END, ', ' ORDER BY c.n)
    INTO names, exprs
    FROM unnest(
        ARRAY['group', 'max', 'timeout', 'zone', 'until', 'missed', 'retry', 'remote', 'data'],
        ARRAY[$4 IS NOT NULL, $5 IS NOT NULL, $6 IS NOT NULL, $7 IS NOT NULL, $8 IS NOT NULL, $9 IS NOT NULL, $10 IS NOT NULL,
            $11 IS NOT NULL, $12 IS NOT NULL]
    ) WITH ORDINALITY AS c (name, given, n);
    -- One at a time for each key: the next one sees what this one has written.
    PERFORM pg_advisory_xact_lock(hashtextextended(name, {task_regclass}::regclass::oid::bigint));
    FOR tries IN 1 .. 10 LOOP
        EXECUTE format($query$
            UPDATE {task} AS t
            SET (input, cron, repeat, plan, first, %s) = ($3, $13, $14,
                CASE WHEN (t.cron, t.zone, t.repeat) IS NOT DISTINCT FROM ($13, $7, $14) THEN t.plan ELSE statement_timestamp() + $14 END,
                -- Where the new plan moves the row to another partition, this is what sends it to the master.
                CASE WHEN (t.cron, t.zone) IS NOT DISTINCT FROM ($13, $7) OR $13 IS NULL THEN t.first END,
                %s)
            WHERE t.key = $1 AND t.state IN ('PLAN', 'WAIT')
            RETURNING t.id
        $query$, names, exprs)
        INTO found
        USING $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, cron, every;
        EXIT WHEN found IS NOT NULL;
        UPDATE {task} AS t SET key = NULL, cron = NULL, repeat = '0' WHERE t.key = name AND t.state IN ('TAKE', 'WORK');
        EXECUTE format($query$
            INSERT INTO {task} (key, input, cron, repeat, plan, %s)
            VALUES ($1, $3, $13, $14, statement_timestamp() + $14, %s)
            ON CONFLICT DO NOTHING
            RETURNING id
        $query$, names, exprs)
        INTO found
        USING $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, cron, every;
        EXIT WHEN found IS NOT NULL;
    END LOOP;
    IF found IS NULL THEN
        RAISE unique_violation USING
            MESSAGE = format('schedule "%s" collides with another row', name),
            HINT = 'A unique index of your own, or others who write rows with this key: try again.';
    END IF;
    RETURN found;
END
$pgtask$;

-- name: every_function — the same for an interval that is one
CREATE OR REPLACE FUNCTION {schedule}(
    key text, schedule interval, input text, "group" text DEFAULT NULL, max integer DEFAULT NULL, timeout interval DEFAULT NULL,
    zone text DEFAULT NULL, until timestamptz DEFAULT NULL, missed text DEFAULT NULL, retry integer DEFAULT NULL,
    remote text DEFAULT NULL, data text DEFAULT NULL
) RETURNS bigint LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
BEGIN
    RETURN {schedule}($1, $2::text, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12);
END
$pgtask$;

-- name: unschedule_function — end the schedule of that key. True if it waited: it is stopped. False if it runs just now: it
-- runs to its end, and nothing comes after it
CREATE OR REPLACE FUNCTION {unschedule}(key text) RETURNS boolean
LANGUAGE plpgsql SET search_path TO pg_catalog, pg_temp AS $pgtask$
#variable_conflict use_column
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended($1, {task_regclass}::regclass::oid::bigint));
    FOR tries IN 1 .. 10 LOOP
        UPDATE {task} AS t SET state = 'STOP' WHERE t.key = $1 AND t.state IN ('PLAN', 'WAIT');
        IF FOUND THEN
            RETURN true;
        END IF;
        UPDATE {task} AS t SET key = NULL, cron = NULL, repeat = '0' WHERE t.key = $1 AND t.state IN ('TAKE', 'WORK');
        IF FOUND THEN
            RETURN false;
        END IF;
        -- It may have gone from one state to the other between the two looks.
        EXIT WHEN NOT EXISTS (SELECT FROM {task} AS t WHERE t.key = $1 AND t.state IN ('PLAN', 'WAIT', 'TAKE', 'WORK'));
    END LOOP;
    RAISE undefined_object USING
        MESSAGE = format('there is no schedule "%s"', $1),
        HINT = 'Its key stands in the column key of a row that waits or runs.';
END
$pgtask$;
