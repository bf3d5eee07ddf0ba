-- What `pgtask doctor` looks at (checks.py): read-only, each cheap on a table of any size. Their session has the server's own
-- search_path. Times are seconds since 1970, ages and lengths seconds.

-- name: check_server — version; is it a standby; do new sessions of this role write; the clock
SELECT current_setting('server_version_num')::int / 10000 AS version, pg_is_in_recovery() AS standby,
    extract(epoch FROM clock_timestamp())::float8 AS now;

-- name: check_pooler — the backend that answers, and where it listens, if it was reached by TCP
SELECT pg_backend_pid() AS pid, host(inet_server_addr()) AS host, current_setting('port') AS port;

-- name: check_relation — is the table there, and whose is it where we may not alter it
SELECT c.relkind::text AS kind, CASE WHEN NOT pg_has_role(c.relowner, 'USAGE') THEN pg_get_userbyid(c.relowner)::text END AS owner
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = {schema_text} AND c.relname = {table_text};

-- name: check_triggers — those of ours that are there and do not fire for everybody. On partitions each has its own
SELECT r.oid::regclass::text AS table, t.tgname::text AS name
FROM (SELECT {regclass}::regclass::oid AS oid UNION SELECT p.relid FROM pg_partition_tree({regclass}::regclass) AS p) AS r
JOIN pg_trigger AS t ON t.tgrelid = r.oid
WHERE starts_with(t.tgname::text, 'pgtask_') AND t.tgenabled NOT IN ('O', 'A')
ORDER BY 1, 2;

-- name: check_indexes — of the user's, or left behind by REINDEX, those that are no use. $1 the names of ours
SELECT i.indexrelid::regclass::text AS index
FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE i.indrelid = {regclass}::regclass AND NOT i.indisvalid AND NOT c.relname = ANY ($1::name[]) AND c.relkind = 'i'
ORDER BY 1;

-- name: check_standing_by — other sessions of masters in this database
SELECT count(*) AS sessions
FROM pg_stat_get_activity(NULL) AS a
WHERE a.application_name = 'pgtask master' AND a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND NOT EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted AND l.objid = 4294967294);

-- name: check_rights — what this role lacks, as GRANT names it, and what it is on. $1 the quoted names of the tables
SELECT string_agg(p.name, ', ' ORDER BY p.name) AS lacks, 'TABLE ' || o.name AS on
FROM unnest($1::text[]) AS o (name)
CROSS JOIN unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS p (name)
WHERE NOT has_table_privilege(o.name, p.name)
GROUP BY o.name
UNION ALL
SELECT 'USAGE', 'SEQUENCE ' || s.name
FROM pg_get_serial_sequence({regclass}, 'id') AS s (name)
JOIN pg_attribute AS a ON a.attrelid = {regclass}::regclass AND a.attname = 'id' AND a.attidentity = ''
WHERE NOT has_sequence_privilege(s.name, 'USAGE')
ORDER BY 2;

-- name: check_schema_rights — may this role use the schema at all? $1 schema
SELECT has_schema_privilege(n.oid, 'USAGE') AS may FROM pg_namespace AS n WHERE n.nspname = $1;

-- name: check_public — what everybody may do that only few should. $1 the quoted names of the tables, $2 schema
SELECT string_agg(DISTINCT a.privilege_type, ', ' ORDER BY a.privilege_type) AS may, 'TABLE ' || o.name AS on,
    o.name::regclass = {regclass}::regclass AS task
FROM unnest($1::text[]) AS o (name)
CROSS JOIN LATERAL (
    SELECT x.* FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS x WHERE c.oid = o.name::regclass
    UNION ALL
    SELECT x.* FROM pg_attribute AS b CROSS JOIN LATERAL aclexplode(b.attacl) AS x WHERE b.attrelid = o.name::regclass
) AS a
WHERE a.grantee = 0 AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
GROUP BY o.name
UNION ALL
SELECT 'CREATE', 'SCHEMA ' || quote_ident(n.nspname), NULL
FROM pg_namespace AS n
CROSS JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
WHERE n.nspname = $2 AND a.grantee = 0 AND a.privilege_type = 'CREATE';

-- name: check_role — the role that connects: is it a superuser, made with the cluster; may it see others' sessions; is it kept
-- from rows of the table
SELECT quote_ident(r.rolname) AS role, r.rolsuper AS superuser, r.oid = 10 AS first,
    pg_has_role('pg_read_all_stats', 'USAGE') AS sees, row_security_active({regclass}::regclass) AS filtered
FROM pg_roles AS r
WHERE r.rolname = current_user;

-- name: check_settings — of these what a new session of the role has, and who says so: the entry of ALTER ROLE or DATABASE, as
-- far as there is one. $1 names
SELECT s.name, s.reset_val AS value, s.unit, s.boot_val AS usual, e.entry
FROM pg_settings AS s
LEFT JOIN LATERAL (
    SELECT CASE
        WHEN d.setrole = 0 THEN format('DATABASE %I', current_database())
        WHEN d.setdatabase = 0 THEN format('ROLE %I', session_user)
        ELSE format('ROLE %I IN DATABASE %I', session_user, current_database())
    END AS entry
    FROM pg_db_role_setting AS d
    CROSS JOIN LATERAL unnest(d.setconfig) AS c (text)
    WHERE d.setdatabase IN (0, (SELECT o.oid FROM pg_database AS o WHERE o.datname = current_database()))
        AND d.setrole IN (0, quote_ident(session_user)::regrole)
        AND lower(split_part(c.text, '=', 1)) = lower(s.name)
    ORDER BY d.setrole = 0, d.setdatabase = 0
    LIMIT 1
) AS e ON true
WHERE s.name = ANY ($1::text[])
ORDER BY s.name;

-- name: check_connections — how many sessions there may be, and are: of all, of this role, in this database; ours are told by
-- their names
SELECT current_setting('max_connections')::int AS most, r.rolsuper AS superuser,
    current_setting('superuser_reserved_connections')::int + coalesce(current_setting('reserved_connections', true)::int, 0) AS reserved,
    quote_ident(r.rolname) AS role, r.rolconnlimit AS role_limit, quote_ident(d.datname) AS database, d.datconnlimit AS database_limit,
    a.sessions, a.of_role, a.in_database, a.ours
FROM pg_roles AS r
CROSS JOIN pg_database AS d
CROSS JOIN LATERAL (
    SELECT count(*) AS sessions, count(*) FILTER (WHERE s.usesysid = r.oid) AS of_role, count(*) FILTER (WHERE s.datid = d.oid) AS in_database,
        count(*) FILTER (WHERE s.usesysid = r.oid AND s.datid = d.oid AND starts_with(s.application_name, 'pgtask ')) AS ours
    FROM pg_stat_get_activity(NULL) AS s
    WHERE s.backend_type = 'client backend'
) AS a
WHERE r.rolname = session_user AND d.datname = current_database();

-- name: check_sessions — transactions that keep vacuum from removing what they might still see. $1 seconds from which on
SELECT a.pid, pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS name, a.state,
    extract(epoch FROM a.xact_start)::text AS since, date_part('epoch', clock_timestamp() - a.xact_start) AS age, NULL::text AS gid
FROM pg_stat_get_activity(NULL) AS a
WHERE a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()) AND a.pid <> pg_backend_pid()
    AND (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.backend_type <> 'autovacuum worker'
    AND date_part('epoch', clock_timestamp() - a.xact_start) > $1::float8
ORDER BY a.xact_start;

-- name: check_prepared — the same of prepared transactions
SELECT p.gid, date_part('epoch', clock_timestamp() - p.prepared) AS age
FROM pg_prepared_xacts AS p
WHERE p.database = current_database() AND date_part('epoch', clock_timestamp() - p.prepared) > $1::float8
ORDER BY p.prepared;

-- name: check_slots — the same of replication slots, by transactions. $1 how many from which on
SELECT s.slot_name::text AS name, s.active, age(s.xmin) AS rows, age(s.catalog_xmin) AS catalogs
FROM pg_replication_slots AS s
WHERE greatest(age(s.xmin), CASE WHEN s.database = current_database() THEN age(s.catalog_xmin) END) > $1::bigint
ORDER BY 1;

-- name: check_space — sizes, dead rows, and how they are looked after, of the table and its partitions
SELECT p.relid::regclass::text AS table, coalesce(s.n_live_tup, 0) AS live, coalesce(s.n_dead_tup, 0) AS dead,
    date_part('epoch', clock_timestamp() - greatest(s.last_vacuum, s.last_autovacuum)) AS vacuumed,
    EXISTS (SELECT FROM unnest(c.reloptions) AS o (text) WHERE o.text IN ('autovacuum_enabled=false', 'autovacuum_enabled=off')) AS neglected,
    pg_total_relation_size(p.relid) AS size
FROM (SELECT {regclass}::regclass AS relid UNION SELECT t.relid FROM pg_partition_tree({regclass}::regclass) AS t WHERE t.isleaf) AS p
JOIN pg_class AS c ON c.oid = p.relid AND c.relkind = 'r'
LEFT JOIN pg_stat_user_tables AS s ON s.relid = p.relid
ORDER BY 1;

-- name: check_index_sizes — the indexes that every take reads: bytes, and entries at the last vacuum. $1 their names, $2 bytes
-- from which on
SELECT i.indexrelid::regclass::text AS index, pg_relation_size(i.indexrelid) AS size, greatest(c.reltuples, 0)::float8 AS entries
FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid AND c.relkind = 'i'
WHERE i.indrelid = {regclass}::regclass AND c.relname = ANY ($1::name[]) AND pg_relation_size(i.indexrelid) > $2::bigint
ORDER BY 1;

-- name: check_due — how many rows are due, up to $1, and for how long the first of them
SELECT count(*) AS rows, date_part('epoch', clock_timestamp()) - date_part('epoch', min(d.plan)) AS oldest
FROM (
    SELECT t.plan FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= clock_timestamp() AND t.plan > '-infinity'
    ORDER BY t.plan
    LIMIT $1::int
) AS d;

-- name: check_backlog — of the first $1 due rows by group: how many, its slots, and is it held
WITH due AS MATERIALIZED (
    SELECT t."group", {lane} AS lane, t.max, t.plan FROM {task} AS t
    WHERE t.state = 'PLAN' AND t.plan <= clock_timestamp()
    ORDER BY t.plan, t.id
    LIMIT $1::int
)
SELECT d."group", count(*) AS rows, max(d.max) AS max, coalesce(r.runs, 0) AS runs, h."group" IS NOT NULL AS held
FROM due AS d
LEFT JOIN (
    SELECT {lane} AS lane, count(DISTINCT t.pid) AS runs FROM {task} AS t WHERE t.state IN ('TAKE', 'WORK') GROUP BY 1
) AS r ON r.lane = d.lane
LEFT JOIN {held} AS h ON h."group" = d."group"
GROUP BY d."group", d.lane, r.runs, h."group"
ORDER BY 2 DESC, 1;

-- name: check_lost — rows whose owner is gone. $1 seconds since when at least
SELECT t.id
FROM {task} AS t
WHERE t.state IN ('TAKE', 'WORK') AND date_part('epoch', clock_timestamp() - t.start) > $1::float8
    AND NOT EXISTS (
        SELECT FROM pg_stat_get_activity(NULL) AS a WHERE a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
    )
ORDER BY t.id
LIMIT 1000;

-- name: check_runs — runs that go on for longer than $1 seconds, and who blocks them
SELECT t.id, t."group", date_part('epoch', clock_timestamp() - t.start) AS age, pg_blocking_pids(t.pid) AS blockers
FROM {task} AS t
JOIN pg_stat_get_activity(NULL) AS a ON a.pid = t.pid AND (a.backend_start <= t.start OR a.backend_start IS NULL)
WHERE t.state = 'WORK' AND date_part('epoch', clock_timestamp() - t.start) > $1::float8
ORDER BY t.start
LIMIT 100;

-- name: check_waits — rows that wait for one that never comes, of the first $1 that wait
SELECT w.id, d.id AS on
FROM (SELECT t.id, t.depend FROM {task} AS t WHERE t.state = 'WAIT' ORDER BY t.pid, t.id LIMIT $1::int) AS w
CROSS JOIN LATERAL unnest(w.depend) AS u (id)
JOIN {task} AS d ON d.id = u.id AND d.state::text = 'PLAN' AND d.plan = 'infinity'
ORDER BY 1, 2
LIMIT 100;

-- name: check_failed — of the last $1 rows those that failed
SELECT count(*) AS rows, min(t.id) AS first, max(t.id) AS last,
    (array_agg(split_part(t.error, chr(10), 1) ORDER BY t.id DESC))[1] AS error
FROM (SELECT t.id, t.state, t.error FROM {task} AS t ORDER BY t.id DESC LIMIT $1::int) AS t
WHERE t.state::text = 'FAIL';

-- name: check_held — groups that are held for longer than $1 seconds
SELECT h."group", h.by, date_part('epoch', clock_timestamp() - h.since) AS age
FROM {held} AS h
WHERE date_part('epoch', clock_timestamp() - h.since) > $1::float8
ORDER BY h.since;

-- name: check_sequence — what the ids come from: how far it is, how far it goes, and the greatest id
SELECT s.name, q.seqmax::float8 AS most, pg_sequence_last_value(s.name::regclass) AS last, (SELECT max(t.id) FROM {task} AS t) AS greatest
FROM pg_get_serial_sequence({regclass}, 'id') AS s (name)
JOIN pg_sequence AS q ON q.seqrelid = s.name::regclass
WHERE has_sequence_privilege(s.name, 'SELECT, USAGE');

-- name: check_partitions — where those by a range of times end: the last one, its end, and how long it is. No row where the table has
-- a default partition, one without an end, or is parted otherwise
SELECT extract(epoch FROM max(b.until))::float8 AS until, max(b.until)::text AS begins,
    (max(b.until) + (array_agg(b.until - b.since ORDER BY b.until DESC))[1])::text AS ends,
    extract(epoch FROM clock_timestamp())::float8 AS now, to_char(max(b.until), 'YYYYMMDD') AS name
FROM pg_partitioned_table AS p
JOIN pg_attribute AS a ON a.attrelid = p.partrelid AND a.attnum = p.partattrs[0] AND a.atttypid = 'timestamptz'::regtype
JOIN pg_inherits AS i ON i.inhparent = p.partrelid
JOIN pg_class AS c ON c.oid = i.inhrelid
CROSS JOIN LATERAL (SELECT regexp_match(pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \(''([^'']+)''\) TO \(''([^'']+)''\)$') AS text) AS x
CROSS JOIN LATERAL (SELECT x.text[1]::timestamptz AS since, x.text[2]::timestamptz AS until) AS b
WHERE p.partrelid = {regclass}::regclass AND p.partstrat = 'r' AND p.partnatts = 1 AND p.partdefid = 0
HAVING bool_and(b.until IS NOT NULL);

-- name: check_two_phase — may transactions be prepared here, and do inserts notify; are there any that have written to the table
SELECT current_setting('max_prepared_transactions')::int > 0 AS possible,
    EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = {regclass}::regclass AND t.tgname = 'pgtask_wake') AS wake;

-- name: check_autovacuum
SELECT NOT current_setting('autovacuum')::bool OR NOT current_setting('track_counts')::bool AS off;

-- What mends it: printed, and run by whoever reads it.

-- name: mend_lost — {ids} is an array's text
UPDATE {task} AS t SET state = 'PLAN', pid = NULL, start = NULL WHERE t.id = ANY ({ids}) AND t.state IN ('TAKE', 'WORK') AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = t.pid AND a.backend_start <= t.start);

-- name: mend_slots — more of them for a group
UPDATE {task} SET max = {max} WHERE "group" = {group} AND state = 'PLAN';

-- name: mend_plan — run it now
UPDATE {task} SET plan = now() WHERE id = {id};
