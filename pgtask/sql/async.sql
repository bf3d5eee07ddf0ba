-- Asynchronous triggers: what happens to a table becomes a task, with the rows that it happened to. Names and values
-- come into a text only by format's %I and %L, quote_ident and quote_literal. A value is written by its type's own
-- output function, so that reading it gives the same again; a cast may lose some, and may be somebody else's code.

-- name: async_function — an AFTER trigger's, for any table. Its arguments are the statement that the task runs, with
-- the rows as new and old, and settings of the task, 'column = value'. It has its owner's rights: who may write a table
-- that has such a trigger need not even know of tasks; who makes one has the scheduler run what he likes. So it is
-- private. {async_columns} are those that are set, {async_values} what they are given, or their defaults
CREATE OR REPLACE FUNCTION {async}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path TO pg_catalog, pg_temp
SET datestyle TO iso SET intervalstyle TO postgres SET extra_float_digits TO 1 AS $pgtask$
DECLARE
    plan record;
    part record;
    settings jsonb;
    given {task};
    pause interval;
    alone boolean;
BEGIN  -- pgtask's: with these settings every session reads a value as it was written
    IF TG_WHEN <> 'AFTER' THEN
        RAISE trigger_protocol_violated USING
            MESSAGE = format('trigger %I on %s fires %s', TG_NAME, TG_RELID::regclass, TG_WHEN),
            HINT = 'Make it an AFTER trigger.';
    END IF;
    plan := {async_plan}(TG_NAME, TG_RELID, TG_LEVEL = 'ROW', TG_OP, TG_ARGV[0], TG_ARGV[1:]);
    FOR part IN EXECUTE plan.query USING NEW, OLD LOOP
        settings := jsonb_object(plan.settings, part.settings);
        BEGIN
            given := jsonb_populate_record(NULL::{task}, settings);
            pause := coalesce(settings ->> 'delay', settings ->> 'debounce');
            IF pause < interval '0' THEN
                RAISE invalid_parameter_value USING MESSAGE = 'delay and debounce cannot be negative';
            ELSIF ({async_holds}) IS FALSE THEN
                RAISE invalid_parameter_value USING
                    MESSAGE = (SELECT concat('the rule is ', r.rule) FROM (VALUES {async_rules}) AS r (holds, rule)
                               WHERE r.holds IS FALSE LIMIT 1);
            END IF;
            given.plan := statement_timestamp() + pause;
        EXCEPTION WHEN data_exception THEN
            RAISE EXCEPTION USING
                ERRCODE = SQLSTATE,
                MESSAGE = format('trigger %I on %s: %s', TG_NAME, TG_RELID::regclass, SQLERRM),
                HINT = format('The settings of the task are %s.', settings);
        END;
        given.input := {async_input}(TG_ARGV[0], plan.verb, plan.names, part.new, part.old);
        IF given.key IS NOT NULL THEN  -- which is unique, but not in a table with partitions
            alone := (SELECT c.relkind = 'p' FROM pg_class AS c WHERE c.oid = {task_regclass}::regclass);
        END IF;
        IF given.key IS NULL OR alone THEN
            INSERT INTO {task} ({async_columns}) VALUES ({async_values});
        ELSE
            -- A task that runs may have begun too early to see what happened here: it runs again. One that waits sees
            -- it, since its row is locked until we have committed.
            INSERT INTO {task} AS t ({async_columns}) VALUES ({async_values})
            ON CONFLICT (key) WHERE key IS NOT NULL AND state IN ('PLAN', 'TAKE', 'WORK', 'WAIT') DO UPDATE
            SET input = excluded.input, plan = CASE
                WHEN t.state IN ('TAKE', 'WORK') THEN greatest(excluded.plan, clock_timestamp())
                WHEN settings ->> 'debounce' IS NOT NULL THEN excluded.plan
                ELSE t.plan END;
        END IF;
    END LOOP;
    RETURN NULL;
END
$pgtask$;

-- name: async_plan_function — how such a trigger makes tasks of its rows. `query` gives, for each task, the values of
-- its `settings`, and its new and its old rows as the list of a SELECT. `names` is what the statement calls these two,
-- null where it does not; `verb` its first word
CREATE OR REPLACE FUNCTION {async_plan}(
    trigger name, relation regclass, single boolean, op text, statement text, arguments text[],
    OUT verb text, OUT names text[], OUT settings text[], OUT query text)
LANGUAGE plpgsql STABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    -- Of new and old, in this order. $1 and $2 are a row, n and o the rows of a statement.
    places CONSTANT text[] := CASE WHEN single THEN '{($1),($2)}' ELSE '{n,o}' END;
    tables text[] := '{new,old}';
    there boolean[] := ARRAY[op <> 'DELETE', op <> 'INSERT'];
    needed boolean[];
    lists text[] := ARRAY['NULL', 'NULL'];
    lacking text;
    own record;
BEGIN
    IF btrim(coalesce(statement, ''), E' \t\r\n') = '' THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('trigger %I on %s has no statement', trigger, relation),
            HINT = 'Give it as the first argument: ''SELECT recalculate(account) FROM new''.';
    ELSIF NOT single THEN
        SELECT ARRAY[t.tgnewtable, t.tgoldtable] INTO tables
        FROM pg_trigger AS t WHERE t.tgrelid = relation AND t.tgname = trigger;
        there := ARRAY[tables[1] IS NOT NULL, tables[2] IS NOT NULL];
        lacking := {async_lacking}(statement, tables);
        IF lacking IS NOT NULL THEN
            RAISE undefined_table USING
                MESSAGE = format('trigger %I on %s uses %s, but has no transition table of that name',
                    trigger, relation, lacking),
                HINT = format('Make it FOR EACH ROW, or for one event and REFERENCING %s TABLE AS %s.',
                    upper(lacking), lacking);
        END IF;
    END IF;
    own := {async_settings}(trigger, relation, arguments, single, places, there);
    settings := own.settings;
    needed := own.needed;

    verb := lower(substring(statement FROM
        E'^(?:[[:space:](]|--[^\n]*|/[*](?:[^*]|[*]+[^*/])*[*]+/)*([[:alpha:]]+)'));
    IF verb IN ('select', 'with', 'values', 'table', 'insert', 'update', 'delete', 'merge', 'call') THEN
        FOR i IN 1 .. 2 LOOP
            IF statement ~* format('(^|[^[:alnum:]_])%s($|[^[:alnum:]_])',
                regexp_replace(tables[i], '[^[:alnum:]_]', '.', 'g'))
            THEN
                names[i] := tables[i];
                needed[i] := needed[i] OR there[i];
                lists[i] := {async_list}(relation, CASE WHEN there[i] THEN places[i] END, NOT single);
                -- The other row of an INSERT or a DELETE: a relation without rows, a variable without values.
                IF NOT there[i] AND verb <> 'call' THEN
                    lists[i] := concat(lists[i], ' || '' WHERE false''');
                END IF;
            END IF;
        END LOOP;
    END IF;

    query := format('SELECT ARRAY[%s]::text[] AS settings, %s AS new, %s AS old', own.writers, lists[1], lists[2]);
    IF NOT single AND (there[1] OR there[2]) THEN
        IF NOT (needed[1] OR needed[2]) THEN  -- only whether there are rows at all
            needed := there;
        END IF;
        -- Of an UPDATE both tables are in the order in which its rows changed.
        query := concat(query, ' FROM ', array_to_string(ARRAY(
            SELECT format('(SELECT row_number() OVER () AS "pgtask row", * FROM %I) AS %s', w.name, w.place)
            FROM unnest(tables, places, needed) AS w (name, place, needed)
            WHERE w.needed), ' JOIN '),
            CASE WHEN needed[1] AND needed[2] THEN ' USING ("pgtask row")' END, ' GROUP BY 1 ORDER BY 1');
    END IF;
END
$pgtask$;

-- name: async_lacking_function — does a statement read from new or old where there is no such table? Then which.
-- Literals, quoted names and comments do not count
CREATE OR REPLACE FUNCTION {async_lacking}(statement text, tables text[]) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    code CONSTANT text := regexp_replace(
        statement, E'\'(?:[^\']|\'\')*\'|"(?:[^"]|"")*"|--[^\n]*|/[*](?:[^*]|[*]+[^*/])*[*]+/', ' ', 'g');
BEGIN
    RETURN (
        SELECT w.word FROM unnest('{new,old}'::text[]) AS w (word)
        WHERE (w.word = ANY (tables)) IS NOT TRUE
            AND code ~* format('(^|[^[:alnum:]_])(from|join|using)[[:space:]]+%s($|[^[:alnum:]_.])', w.word)
        LIMIT 1);
END
$pgtask$;

-- name: async_settings_function — the arguments after the statement: which `settings` they are, expressions that write
-- their values (a {column} that is null makes all of a value null), and of which rows, new or old, these need values
CREATE OR REPLACE FUNCTION {async_settings}(
    trigger name, relation regclass, arguments text[], single boolean, places text[], there boolean[],
    OUT settings text[], OUT writers text, OUT needed boolean[])
LANGUAGE plpgsql STABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    known CONSTANT text[] := {async_settable};
    argument text;
    setting text;
    value text;
    writer text;
    word text[];
    side int;
BEGIN
    settings := '{}';
    needed := '{f,f}';
    FOREACH argument IN ARRAY arguments LOOP
        setting := lower(btrim(split_part(argument, '=', 1), E' \t\r\n"'));
        IF strpos(argument, '=') = 0 OR NOT setting = ANY (known) THEN
            RAISE undefined_column USING
                MESSAGE = format('trigger %I on %s: %L sets nothing that a task has', trigger, relation, argument),
                HINT = concat('After the statement come settings, such as ''timeout = 10 s'': ',
                    array_to_string(known, ', '), '.');
        END IF;
        value := btrim(substr(argument, strpos(argument, '=') + 1), E' \t\r\n');
        IF setting = 'key' AND value ~ '^([{][^{}]*[}]\s*)+$' THEN  -- who writes the row could name any task
            RAISE invalid_parameter_value USING
                MESSAGE = format('trigger %I on %s: key %s is nothing but values of the row', trigger, relation, value),
                HINT = format('Keys are the whole table''s: begin with a word of the trigger''s own, ''key = total %s''.', value);
        END IF;
        writer := '';
        LOOP
            -- What comes before the next brace, what this is: one that is meant, or a column; what follows.
            word := regexp_match(value, '^([^{}]*)(?:([{][{]|[}][}]?)|[{](?:(new|old)[.])?([^{}]*)([}]?))(.*)$');
            EXIT WHEN word IS NULL;
            writer := concat(writer, quote_literal(word[1] || coalesce(left(word[2], 1), '')), ' || ');
            value := word[6];
            CONTINUE WHEN word[2] IS NOT NULL;
            IF word[5] = '' OR NOT EXISTS (
                SELECT FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = word[4]
                    AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> 'v')
            THEN
                RAISE undefined_column USING
                    MESSAGE = format('trigger %I on %s: {%s names no column that the row has',
                        trigger, relation, word[4] || word[5]),
                    HINT = 'Write {column}, {new.column} or {old.column}, and {{ for a brace itself.';
            END IF;
            side := CASE WHEN word[3] = 'old' OR word[3] IS NULL AND NOT there[1] THEN 2 ELSE 1 END;
            IF there[side] THEN
                needed[side] := true;
                writer := concat(writer, format('CASE WHEN num_nulls(%1$s.%2$I) = 0 THEN concat(%1$s.%2$I) END || ',
                    places[side], word[4]));
            ELSIF single THEN
                writer := concat(writer, 'NULL || ');
            ELSE
                RAISE undefined_table USING
                    MESSAGE = format('trigger %I on %s has no rows to take {%s} from', trigger, relation, word[4]),
                    HINT = 'Make it FOR EACH ROW, or for one event and with REFERENCING NEW TABLE AS new'
                        ' or OLD TABLE AS old.';
            END IF;
        END LOOP;
        settings := settings || setting;
        writers := concat_ws(', ', writers, concat(writer, quote_literal(value)));
    END LOOP;
    IF 'debounce' = ANY (settings) AND ('delay' = ANY (settings) OR NOT 'key' = ANY (settings)) THEN
        RAISE invalid_parameter_value USING
            MESSAGE = format('trigger %I on %s: debounce %s', trigger, relation,
                CASE WHEN 'delay' = ANY (settings) THEN 'and delay exclude each other' ELSE 'needs a key' END),
            HINT = 'It is the delay of the one task that a key has, counted anew each time: '
                '''key = account {account}'', ''debounce = 5 s''.';
    END IF;
END
$pgtask$;

-- name: async_list_function — an expression that writes rows as the list of a SELECT: the one at `place`, or one of
-- nulls where that is null; or `many`, as arrays that the list unnests side by side. Arrays of arrays would be arrays
-- of more dimensions: these go as text. Money goes as a number: its text depends on lc_monetary. A column that is
-- computed when it is read is computed by the list. To plan for each call would cost five times as much as the call
CREATE OR REPLACE FUNCTION {async_list}(relation regclass, place text, many boolean) RETURNS text
LANGUAGE plpgsql STABLE SET search_path TO pg_catalog, pg_temp
SET plan_cache_mode TO force_generic_plan AS $pgtask$
DECLARE
    shapes text[];  -- of each column, for format
    values text[];
    list text;
    columns text;
BEGIN
    SELECT array_agg(concat(CASE WHEN place IS NULL THEN 'NULL' WHEN many THEN 'unnest(%L' ELSE '%L' END,
            replace(concat('::', coalesce(c.carrier, c.type), CASE WHEN many AND place IS NOT NULL THEN '[])' END,
                CASE WHEN c.carrier IS NOT NULL THEN '::' || c.type END, ' AS ', c.name), '%', '%%'))),
        array_agg(format(CASE WHEN many THEN 'array_agg(%s)' ELSE '%s' END, CASE c.carrier
            WHEN 'numeric' THEN concat(c.value, '::numeric')
            WHEN 'text' THEN format('CASE WHEN num_nulls(%1$s) = 0 THEN concat(%1$s) END', c.value)
            ELSE c.value END))
    INTO shapes, values
    FROM (
        SELECT quote_ident(a.attname) AS name, format_type(a.atttypid, a.atttypmod) AS type,
            concat(place, '.', quote_ident(a.attname)) AS value, CASE
                WHEN a.atttypid = 'money'::regtype THEN 'numeric'
                WHEN many AND (SELECT t.typcategory = 'A' OR t.typarray = 0 FROM pg_type AS t
                               WHERE t.oid = a.atttypid) THEN 'text'
                END AS carrier
        FROM pg_attribute AS a
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> 'v'
        ORDER BY a.attnum
    ) AS c;
    IF place IS NULL THEN
        values := NULL;
    END IF;
    -- A function takes a hundred arguments.
    FOR i IN 1 .. coalesce(cardinality(shapes), 0) BY 90 LOOP
        list := concat_ws(' || '', '' || ', list, format('format(%s)', concat_ws(', ',
            quote_literal(array_to_string(shapes[i : i + 89], ', ')), array_to_string(values[i : i + 89], ', '))));
    END LOOP;
    IF list IS NULL THEN
        list := CASE WHEN many THEN 'concat(''FROM generate_series(1, '', count(*), '')'')' ELSE '''''' END;
    END IF;
    IF current_setting('server_version_num')::int >= 180000 THEN
        SELECT string_agg(concat('(' || pg_get_expr(d.adbin, d.adrelid) || ')::' || format_type(a.atttypid, a.atttypmod)
            || ' AS ', quote_ident(a.attname)), ', ' ORDER BY a.attnum)
        INTO columns
        FROM pg_attribute AS a
        LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum AND a.attgenerated = 'v'
        WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped
        HAVING bool_or(a.attgenerated = 'v');
        IF columns IS NOT NULL THEN
            list := format('concat(%L, %s, %L)', columns || ' FROM (SELECT ', list, ') AS "pgtask row"');
        END IF;
    END IF;
    RETURN list;
END
$pgtask$;

-- name: async_input_function — what the task runs: the statement with its rows as they were, which needs neither the
-- trigger nor its table. `names` is what it calls new and old, null where it does not; `new` and `old` are their lists
CREATE OR REPLACE FUNCTION {async_input}(statement text, verb text, names text[], new text, old text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path TO pg_catalog, pg_temp AS $pgtask$
DECLARE
    head text;
    body text;
    tag text := '$task$';
BEGIN
    IF num_nonnulls(names[1], names[2]) = 0 THEN
        RETURN statement;
    ELSIF verb <> 'call' THEN
        -- A WITH that it has goes on after ours.
        head := coalesce(substring(statement FROM
            E'(?i)^(?:[[:space:]]|--[^\n]*|/[*](?:[^*]|[*]+[^*/])*[*]+/)*with[[:>:]]'
            '(?:(?:[[:space:]]|--[^\n]*|/[*](?:[^*]|[*]+[^*/])*[*]+/)*recursive[[:>:]])?'), '');
        RETURN concat('WITH ', CASE WHEN head ~* 'recursive$' THEN 'RECURSIVE ' END,
            concat_ws(', ',
                quote_ident(names[1]) || ' AS (SELECT ' || new || ')',
                quote_ident(names[2]) || ' AS (SELECT ' || old || ')'),
            CASE WHEN head = '' THEN E'\n' ELSE ',' END, substr(statement, length(head) + 1));
    END IF;
    -- CALL takes no WITH: one call for each row, which is a variable.
    IF num_nulls(names[1], names[2]) = 1 THEN
        body := format(E'DECLARE\n    %1$I record;\nBEGIN\n    FOR %1$I IN SELECT %2$s LOOP\n',
            coalesce(names[1], names[2]), coalesce(new, old));
    ELSE
        body := format(E'DECLARE\n    %1$I record;\n    %2$I record;\n    pair record;\nBEGIN\n    FOR pair IN\n'
            '        SELECT a.one, b.other\n'
            '        FROM (SELECT row_number() OVER () AS i, "pgtask row" AS one\n'
            '              FROM (SELECT %3$s) AS "pgtask row") AS a\n'
            '        NATURAL JOIN (SELECT row_number() OVER () AS i, "pgtask row" AS other\n'
            '                      FROM (SELECT %4$s) AS "pgtask row") AS b\n'
            '    LOOP\n        %1$I := pair.one;\n        %2$I := pair.other;\n', names[1], names[2], new, old);
    END IF;
    body := concat(body, format(E'        %s\n        ;\n    END LOOP;\nEND\n', rtrim(statement, E' \t\r\n;')));
    WHILE strpos(body, tag) > 0 LOOP
        tag := replace(tag, 'k', 'kk');
    END LOOP;
    RETURN concat('DO ', tag, E'\n', body, tag);
END
$pgtask$;
