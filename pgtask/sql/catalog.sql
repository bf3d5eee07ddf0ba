-- What the database has of the objects of a task table (schema.py). Read with the server's own search_path, and only
-- what is ours by its name: what a user's is called may not even be text in our encoding.

-- name: relation — schema, the labels of the type state ({} if it is no enum), the table, its owner and the names of its
-- storage parameters; may we create a schema here, create in the schema, alter the table. $1 schema, $2 table
SELECT n.oid IS NOT NULL,
    (SELECT ARRAY(SELECT e.enumlabel::text FROM pg_enum AS e WHERE e.enumtypid = t.oid ORDER BY e.enumsortorder)
     FROM pg_type AS t
     WHERE t.typnamespace = n.oid AND t.typname = 'state'),
    c.oid, c.relkind::text, c.relispartition, pg_get_userbyid(c.relowner)::text,
    ARRAY(SELECT split_part(o.text, '=', 1) FROM unnest(c.reloptions) AS o (text)),
    has_database_privilege(current_database(), 'CREATE'),
    coalesce(has_schema_privilege(n.oid, 'CREATE'), true), coalesce(pg_has_role(c.relowner, 'USAGE'), true)
FROM (SELECT 1) AS one
LEFT JOIN pg_namespace AS n ON n.nspname = $1
LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = $2;

-- name: side — a relation beside the table, if there is one: may we write it, and its columns. $1 a quoted name, $2 columns
SELECT (SELECT bool_and(has_table_privilege(r.oid, p.name)) FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS p (name)),
    ARRAY(SELECT a.attname::text FROM pg_attribute AS a
             WHERE a.attrelid = r.oid AND NOT a.attisdropped AND a.attname = ANY ($2::name[]))
FROM (SELECT to_regclass($1)::oid AS oid) AS r
WHERE r.oid IS NOT NULL;

-- name: columns — $1 table oid, $2 names
SELECT a.attname::text,
    CASE WHEN t.typname = 'state' AND t.typnamespace = c.relnamespace THEN 'state' ELSE format_type(a.atttypid, a.atttypmod) END,
    a.attnotnull, col_description(a.attrelid, a.attnum),
    coalesce(pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, ''))
FROM pg_attribute AS a
JOIN pg_class AS c ON c.oid = a.attrelid
JOIN pg_type AS t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attname = ANY ($2);

-- name: keys — is there a primary key, an index that begins with id, a unique one on id alone. $1 table oid
SELECT coalesce(bool_or(i.indisprimary), false),
    coalesce(bool_or(i.indkey[0] = a.attnum), false),
    coalesce(bool_or(i.indkey[0] = a.attnum AND i.indisunique AND i.indnkeyatts = 1 AND i.indimmediate), false)
FROM pg_index AS i
LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = 'id'
WHERE i.indrelid = $1 AND i.indisvalid AND i.indpred IS NULL;

-- name: indexes — of these names; and the C extension's on input. $1 table oid, $2 names
SELECT c.relname::text, i.indisvalid, NOT c.relname = ANY ($2)
FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
JOIN pg_am AS m ON m.oid = c.relam
LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attname = 'input'
WHERE i.indrelid = $1
    AND (c.relname = ANY ($2)
        OR m.amname = 'btree' AND i.indnatts = 1 AND i.indkey[0] = a.attnum AND NOT i.indisunique
            AND i.indpred IS NULL AND c.relname ~ '_input_idx[0-9]*$');

-- name: triggers — of these names, with their comment; and what wakes the C extension. $1 table oid, $2 names
SELECT t.tgname::text, CASE WHEN t.tgname = ANY ($2) THEN coalesce(obj_description(t.oid, 'pg_trigger'), '') ELSE 'extension' END
FROM pg_trigger AS t
JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE t.tgrelid = $1 AND NOT t.tgisinternal
    AND (t.tgname = ANY ($2) OR p.prosrc ~ 'pg_cancel_backend' AND p.prosrc ~ 'pg_locks' AND p.prosrc ~ 'userlock');

-- name: routines — with the types of their arguments. $1 schema, $2 names
SELECT p.proname::text, oidvectortypes(p.proargtypes), p.prosrc
FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
WHERE n.nspname = $1 AND p.proname = ANY ($2);

-- name: strangers — objects of ours that were there before the table, or beside it, and whose owner is none of those
-- who have a say here anyway: ourselves, the table's owner, its schema's, the database's, superusers. Membership in a
-- role proves nothing: before PostgreSQL 16 a role may make anybody its member.
-- $1 schema, $2 table, $3 the other tables, $4 functions
SELECT o.what, pg_get_userbyid(o.owner)::text
FROM pg_namespace AS n
JOIN pg_database AS d ON d.datname = current_database()
LEFT JOIN pg_class AS t ON t.relnamespace = n.oid AND t.relname = $2
CROSS JOIN LATERAL (
    SELECT concat('table ', n.nspname, '.', c.relname) AS what, c.relowner AS owner
    FROM pg_class AS c WHERE c.relnamespace = n.oid AND c.relname = ANY ($3)
    UNION ALL
    SELECT concat('type ', n.nspname, '.state'), y.typowner
    FROM pg_type AS y WHERE y.typnamespace = n.oid AND y.typname = 'state'
    UNION ALL
    SELECT concat('function ', n.nspname, '.', p.proname, '(', oidvectortypes(p.proargtypes), ')'), p.proowner
    FROM pg_proc AS p WHERE p.pronamespace = n.oid AND p.proname = ANY ($4)
) AS o
JOIN pg_roles AS r ON r.oid = o.owner
WHERE n.nspname = $1 AND NOT r.rolsuper
    AND o.owner NOT IN (n.nspowner, d.datdba, coalesce(t.relowner, 0))
    AND r.rolname NOT IN (session_user, current_user)
ORDER BY o.what;

-- name: owner — of the table, where it is none of those who could have all of it anyway. $1 table oid
SELECT pg_get_userbyid(c.relowner)::text
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_database AS d ON d.datname = current_database()
JOIN pg_roles AS r ON r.oid = c.relowner
WHERE c.oid = $1 AND NOT r.rolsuper AND c.relowner NOT IN (n.nspowner, d.datdba)
    AND r.rolname NOT IN (session_user, current_user);

-- name: extension — a running worker of the C extension on this table: its versions call it, in application_name or
-- in backend_type, "pg_work SCHEMA TABLE SLEEP", with "USER DATABASE " before it in some; cut where the server cuts.
-- $1 schema, $2 table
SELECT w.title
FROM pg_stat_get_activity(NULL) AS a
CROSS JOIN LATERAL (VALUES (a.application_name), (a.backend_type)) AS w (title)
CROSS JOIN LATERAL (SELECT substr(w.title, strpos(concat(' ', w.title), ' pg_work ')) AS words) AS s
WHERE a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND a.pid <> pg_backend_pid()
    AND strpos(concat(' ', w.title), ' pg_work ') > 0
    AND (starts_with(concat(s.words, ' '), concat('pg_work ', $1::text, ' ', $2::text, ' '))
        OR octet_length(w.title) >= 63 AND starts_with(concat('pg_work ', $1::text, ' ', $2::text), s.words));
