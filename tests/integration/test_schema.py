"""What the master makes in a database, leaves alone, puts back and refuses."""

import asyncio
import secrets
from collections.abc import Callable, Mapping

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgtask.objects import INDEXES, SIDES, TRIGGERS, Names
from pgtask.schema import Refused
from tests.fixtures.catalog import install, installed, snapshot
from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

COLUMNS: Mapping[str, tuple[str, bool, str | None]] = {
    "id": ("bigint", True, "d"),
    "parent": ("bigint", False, "pg_task.id"),
    "plan": ("timestamp with time zone", True, "statement_timestamp()"),
    "start": ("timestamp with time zone", False, None),
    "stop": ("timestamp with time zone", False, None),
    "active": ("interval", True, "'1 hour'"),
    "live": ("interval", True, "'0'"),
    "repeat": ("interval", True, "'0'"),
    "timeout": ("interval", True, "'0'"),
    "count": ("integer", True, "'0'"),
    "max": ("integer", True, "'0'"),
    "pid": ("integer", False, None),
    "state": ("state", True, "'PLAN'"),
    "delete": ("boolean", True, "'true'"),
    "drift": ("boolean", True, "'false'"),
    "header": ("boolean", True, "'true'"),
    "save": ("boolean", True, "'false'"),
    "string": ("boolean", True, "'true'"),
    "delimiter": ('"char"', True, "'\t'"),
    "escape": ('"char"', True, "''"),
    "quote": ('"char"', True, "''"),
    "data": ("text", False, None),
    "error": ("text", False, None),
    "group": ("text", True, "'group'"),
    "input": ("text", True, None),
    "null": ("text", True, "'\\N'"),
    "output": ("text", False, None),
    "remote": ("text", False, None),
}
"""pg_task's 28: type, NOT NULL, what the default holds."""

FOUND = """
    SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
        coalesce(pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, '')),
        col_description(a.attrelid, a.attnum)
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = 'task'::regclass AND a.attnum > 0 AND NOT a.attisdropped"""

SHORT = "CREATE TABLE public.task (id bigserial PRIMARY KEY, input text NOT NULL)"

ODD_NAMES = (
    "with space",
    'quo"te',
    "apos'trophe",
    "back\\slash",
    "semi;colon -- drop",
    "per%cent %s %(x)s %%",
    "{task} {0} {master}",
    "$1 $$ $pgtask$",
    "größe 仕事 🐘",
    "UPPER lower",
    "tab\tline\nend",
    "dot.ted",
    "x" * 63,
)


def table_config(database: Database, schema: str = "public", table: str = "task", **more: str) -> str:
    def text(value: str) -> str:
        return '"' + "".join(f"\\u{ord(c):04x}" if c < " " or c in '"\\' else c for c in value) + '"'

    keys = {"conninfo": database.conninfo, "schema": schema, "table": table} | more
    return "[[database]]\n" + "".join(f"{name} = {text(value)}\n" for name, value in keys.items())


def one_line(refused: pytest.ExceptionInfo[Refused]) -> str:
    text = str(refused.value)
    assert "\n" not in text
    return text


# What is made


def test_columns_of_a_new_table_have_their_types_defaults_and_comments(database: Database) -> None:
    install(database)
    found = {name: rest for name, *rest in database.execute(FOUND)}
    assert set(COLUMNS) <= set(found)
    for name, (type, notnull, default) in COLUMNS.items():
        assert found[name][:2] == [type, notnull], name
        assert (default in (found[name][2] or "")) if default else found[name][2] is None, (name, found[name][2])
    assert [name for name, rest in found.items() if not rest[3]] == []


def test_new_table_has_its_key_indexes_and_triggers(database: Database) -> None:
    install(database)
    indexes = database.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'task' ORDER BY 1")
    assert [name for (name,) in indexes] == sorted(f"task_{one}" for one in (*INDEXES, "pkey"))
    triggers = database.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = 'task'::regclass ORDER BY 1")
    assert [name for (name,) in triggers] == sorted(f"pgtask_{one}" for one in TRIGGERS)


def test_states_stand_in_the_order_of_pg_task(database: Database) -> None:
    install(database)
    labels = database.execute("SELECT unnest(enum_range(NULL::state))::text")
    assert [name for (name,) in labels] == ["PLAN", "GONE", "TAKE", "WORK", "DONE", "FAIL", "STOP", "WAIT"]


@pytest.mark.parametrize(
    ("column", "value"), [("active", "0"), ("live", "-1 s"), ("repeat", "-1 s"), ("timeout", "-1 s"), ("count", "-1")]
)
def test_check_refuses_an_impossible_value(database: Database, column: str, value: str) -> None:
    install(database)
    with pytest.raises(psycopg.errors.CheckViolation, match=column):
        database.insert("SELECT 1", **{column: value})


@pytest.mark.parametrize("column", ["id", "plan", "state", "group", "input", "max", "delimiter"])
def test_column_that_must_have_a_value_refuses_null(database: Database, column: str) -> None:
    install(database)
    with pytest.raises(psycopg.errors.NotNullViolation, match=column):
        database.insert(**{"input": "SELECT 1"} | {column: None})  # type: ignore[arg-type]


def test_nothing_is_granted_to_public(database: Database) -> None:
    install(database)
    granted = database.admin_execute("SELECT relname, relacl::text FROM pg_class WHERE relname LIKE 'task%'")
    assert [row for row in granted if row[1] is not None] == []


def test_schema_is_created_when_it_is_missing(database: Database) -> None:
    assert install(database, "jobs")[0] == "create schema jobs"
    assert database.execute("SELECT count(*) FROM jobs.task") == [(0,)]


# What is left alone


def test_second_installation_writes_nothing(database: Database) -> None:
    install(database)
    before = snapshot(database, touched=True)
    assert install(database) == []
    assert snapshot(database, touched=True) == before


def test_second_start_of_the_master_writes_nothing(database: Database, master: Callable[..., Master]) -> None:
    first = master()
    assert first.logged("schema_changed")
    first.stop()
    before = snapshot(database, touched=True)
    assert master().logged("schema_changed") == []
    assert snapshot(database, touched=True) == before


def test_objects_of_the_user_stay(database: Database) -> None:
    install(database)
    database.execute("ALTER TABLE task ADD COLUMN customer int NOT NULL DEFAULT 7 CHECK (customer > 0)")
    database.execute("COMMENT ON COLUMN task.customer IS 'mine'")
    database.execute("COMMENT ON TABLE task IS 'mine too'")
    database.execute("CREATE INDEX task_input_hash ON task USING hash (input)")
    database.execute("CREATE INDEX mine ON task (input)")
    database.execute("CREATE INDEX part_input_idx ON task (input) WHERE state = 'FAIL'")
    database.execute("CREATE INDEX task_state_idx ON task (state)")
    database.execute("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    database.execute("CREATE TRIGGER mine BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION f()")
    database.execute("ALTER TABLE task ALTER COLUMN state SET DEFAULT 'STOP'")
    before = snapshot(database, touched=True)
    assert install(database) == []
    assert snapshot(database, touched=True) == before


def test_column_of_the_user_with_a_name_in_no_encoding_disturbs_nothing(database: Database) -> None:
    recreate(database, "SQL_ASCII")
    install(database)
    session = database.connect()
    session.execute(b'ALTER TABLE task ADD COLUMN "\xe9" int')
    session.execute(b'CREATE INDEX "\xe9" ON task ("\xe9")')
    assert install(database) == []


# What is put back

DAMAGES = {
    "column": "ALTER TABLE task DROP COLUMN data",
    "column that indexes use": "ALTER TABLE task DROP COLUMN remote CASCADE",
    "index": "DROP INDEX task_due",
    "trigger": "DROP TRIGGER pgtask_wake ON task",
    "default": "ALTER TABLE task ALTER COLUMN timeout DROP DEFAULT",
    "default of the extension": "ALTER TABLE task ALTER COLUMN max SET DEFAULT current_setting('pg_task.max')::int",
    "default of no setting": "ALTER TABLE task ALTER COLUMN plan DROP DEFAULT",
    "comment": "COMMENT ON COLUMN task.input IS NULL",
    "check": "DROP TRIGGER pgtask_check ON task",
    "not null": "ALTER TABLE task ALTER COLUMN plan DROP NOT NULL",
    "null": "ALTER TABLE task ALTER COLUMN error SET NOT NULL",
    "primary key": "ALTER TABLE task DROP CONSTRAINT task_pkey",
    "function": "CREATE OR REPLACE FUNCTION task_wake() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN /* pgtask */ RETURN NULL; END'",
    "functions": "DROP FUNCTION task_wake, task_change, task_stop, task_guard, task_check CASCADE",
    "master table": "DROP TABLE task_master CASCADE",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_missing_is_put_back(database: Database, damage: str) -> None:
    install(database)
    before = snapshot(database)
    database.execute(damage)
    assert snapshot(database) != before
    assert install(database) != []
    assert snapshot(database) == before
    assert install(database) == []


def test_comment_of_the_users_own_stays(database: Database) -> None:
    install(database)
    database.execute("COMMENT ON COLUMN task.data IS 'order number'")
    assert install(database) == []
    assert database.execute(
        "SELECT col_description('task'::regclass, attnum) FROM pg_attribute "
        "WHERE attrelid = 'task'::regclass AND attname = 'data'"
    ) == [("order number",)]


STORAGE = {"autovacuum_vacuum_scale_factor=0.01", "vacuum_index_cleanup=on"}
STORED = "SELECT reloptions FROM pg_class WHERE oid = 'task'::regclass"


def test_table_is_vacuumed_as_a_queue(database: Database) -> None:
    install(database)
    [(options,)] = database.execute(STORED)
    assert set(options) == STORAGE


def test_table_that_was_there_is_vacuumed_as_a_queue_but_where_the_user_has_said_otherwise(database: Database) -> None:
    database.execute(f"{SHORT} WITH (autovacuum_vacuum_scale_factor = 0.3, fillfactor = 70)")
    assert "set vacuum_index_cleanup" in install(database)
    [(options,)] = database.execute(STORED)
    assert set(options) == {"autovacuum_vacuum_scale_factor=0.3", "fillfactor=70", "vacuum_index_cleanup=on"}
    assert install(database) == []


def test_table_is_served_without_that_where_nothing_may_be_changed(
    database: Database, master: Callable[..., Master]
) -> None:
    install(database)
    database.execute("ALTER TABLE task RESET (vacuum_index_cleanup)")
    master("--no-create", database.conninfo, tables=1)
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert database.execute(STORED) == [(["autovacuum_vacuum_scale_factor=0.01"],)]


def test_vacuum_removes_the_index_entries_of_a_few_dead_rows_among_many(database: Database) -> None:
    """Left to itself the server passes over them, and each look for a group's next task goes through them all."""
    install(database)
    database.execute("ALTER TABLE task DISABLE TRIGGER USER, SET (autovacuum_enabled = off)")
    insert = "INSERT INTO task (state, input, \"group\") SELECT '{}', 'SELECT 1', 'g' FROM generate_series(1, {})"
    database.execute(insert.format("DONE", 100_000))
    database.execute(insert.format("PLAN", 1500))
    database.execute("UPDATE task SET state = 'DONE' WHERE state = 'PLAN'")
    [next] = database.execute(insert.format("PLAN", 1) + " RETURNING id")
    database.execute("VACUUM task")
    key = Names(schema="public", table="task").store().text("next").partition(" = $7")[0].rpartition(" AND ")[2]
    look = f"SELECT t.id FROM task AS t WHERE state = 'PLAN' AND {key} = (SELECT {key} FROM task AS t WHERE id = %s)"
    look += " ORDER BY max DESC, plan, id LIMIT 1"
    session = database.connect()
    for setting in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
        session.execute(f"SET {setting} = off".encode())
    plan = session.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {look}".encode(), next).fetchall()[0][0]
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 20


def test_id_without_a_default_counts_on_from_the_greatest(database: Database) -> None:
    database.execute("CREATE TABLE task (id bigint PRIMARY KEY, input text)")
    database.execute("INSERT INTO task VALUES (41, 'SELECT 1')")
    install(database)
    assert database.insert("SELECT 1") == 42
    assert install(database) == []


def test_table_with_another_key_gets_a_unique_id(database: Database) -> None:
    database.execute("CREATE TABLE task (number uuid PRIMARY KEY DEFAULT gen_random_uuid(), input text NOT NULL)")
    install(database)
    assert install(database) == []
    assert database.insert("SELECT 1", id=5) == 5
    with pytest.raises(psycopg.errors.UniqueViolation):
        database.insert("SELECT 1", id=5)


def test_short_table_of_the_user_is_completed_and_its_rows_run(
    database: Database, master: Callable[..., Master]
) -> None:
    database.execute(SHORT)
    database.execute("INSERT INTO task (input) VALUES ('SELECT 6 * 7')")
    master()
    assert database.wait(1)["output"] == "42"


def test_wake_switched_off_takes_the_triggers_that_notify_away(database: Database) -> None:
    install(database)
    changed = [f"{verb} trigger pgtask_{one}" for one in ("change", "align", "enter") for verb in ("create", "mark")]
    assert install(database, wake=False) == ["drop trigger pgtask_wake", *changed]
    assert install(database, wake=False) == []
    install(database)
    assert database.execute("SELECT count(*) FROM pg_trigger WHERE tgrelid = 'task'::regclass") == [(len(TRIGGERS),)]


FORMER = """
    CREATE FUNCTION former() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''pgtask: not any more''; END';
    CREATE TRIGGER pgtask_move AFTER UPDATE OF state, plan, "group", max, remote ON task FOR EACH ROW
        WHEN (NEW.state = 'PLAN') EXECUTE FUNCTION former();
    CREATE TRIGGER pgtask_stop AFTER UPDATE OF state ON task FOR EACH ROW
        WHEN (OLD.state IN ('TAKE', 'WORK') AND NEW.state = 'STOP') EXECUTE FUNCTION former();
    CREATE TRIGGER pgtask_birth BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION former();
    DROP TRIGGER pgtask_change ON task"""


def test_triggers_of_an_earlier_layout_go(database: Database) -> None:
    install(database)
    before = snapshot(database)
    database.execute(FORMER)
    install(database)
    database.execute("DROP FUNCTION former()")
    assert snapshot(database) == before


# What is refused

NOT_OURS = {
    "column": ("CREATE TABLE task (id bigserial PRIMARY KEY, data jsonb)", "column data of public.task has type jsonb"),
    "short id": ("CREATE TABLE task (id serial PRIMARY KEY)", "column id of public.task has type integer, not bigint"),
    "view": ("CREATE VIEW task AS SELECT 1 AS id", "public.task is not a table"),
    "sequence": ("CREATE SEQUENCE task", "public.task is not a table"),
    "materialized view": ("CREATE MATERIALIZED VIEW task AS SELECT 1 AS id", "public.task is not a table"),
    "partition": (
        "CREATE TABLE whole (id bigint) PARTITION BY RANGE (id); CREATE TABLE task PARTITION OF whole DEFAULT",
        "public.task is a partition",
    ),
    "enum": ("CREATE TYPE state AS ENUM ('open', 'closed')", "type public.state exists and is not the scheduler's"),
    "empty enum": ("CREATE TYPE state AS ENUM ()", "type public.state exists and is not the scheduler's"),
    "table called state": ("CREATE TABLE state (name text)", "type public.state exists and is not the scheduler's"),
    "master table": ("CREATE TABLE task_master (name text)", "public.task_master exists and is not the scheduler's"),
    "function": (
        "CREATE FUNCTION task_wake() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "function public.task_wake() exists and is not the scheduler's",
    ),
    "nulls": (
        "CREATE TABLE task (id bigserial PRIMARY KEY, plan timestamptz); INSERT INTO task DEFAULT VALUES",
        'public.task: cannot set plan not null: column "plan" of relation "task" contains null values',
    ),
    "same id twice": (
        "CREATE TABLE task (id bigint, input text); INSERT INTO task VALUES (1, ''), (1, '')",
        "public.task: cannot add primary key (id)",
    ),
    "index of another table": (
        "CREATE TABLE other (id int); CREATE INDEX task_due ON other (id)",
        'public.task: cannot create index task_due: relation "task_due" already exists',
    ),
}


@pytest.mark.parametrize(("made", "line"), NOT_OURS.values(), ids=NOT_OURS.keys())
def test_what_is_not_ours_is_refused_in_one_line_and_stays(database: Database, made: str, line: str) -> None:
    database.execute(made)
    before = {name: rows for name, rows in snapshot(database).items() if name != "labels"}
    with pytest.raises(Refused) as refused:
        install(database)
    assert line in one_line(refused)
    assert {name: rows for name, rows in snapshot(database).items() if name != "labels"} == before


def test_table_called_state_is_refused(database: Database) -> None:
    with pytest.raises(Refused, match="choose another name"):
        install(database, table="state")


def test_role_without_the_right_to_create_is_told_so_in_one_line(database: Database) -> None:
    database.admin_execute("ALTER SCHEMA public OWNER TO postgres")
    database.admin_execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(Refused) as refused:
        install(database)
    assert one_line(refused).startswith(
        f"to do: create type public.state, but user {database.user} may not create in schema public; GRANT CREATE ON"
    )


def test_refused_table_is_logged_once_retried_and_disturbs_no_other(
    database: Database, master: Callable[..., Master]
) -> None:
    database.execute("CREATE VIEW bad AS SELECT 1 AS id")
    one = master(config=table_config(database) + table_config(database, table="bad"), tables=1)
    one.may_log_errors = True
    one.wait_log("ERROR .*table_down.*public.bad is not a table")
    assert database.wait(database.insert("SELECT 1"))["state"] == "DONE"
    database.execute("DROP VIEW bad")
    one.wait_log("leading.*public.bad")
    assert len(one.logged("table_down")) == 1
    database.table = "bad"
    assert database.wait(database.insert("SELECT 2"))["output"] == "2"


def test_another_reason_is_logged_again(database: Database, master: Callable[..., Master]) -> None:
    database.execute("CREATE VIEW task AS SELECT 1 AS id")
    one = master(wait=False)
    one.may_log_errors = True
    one.wait_log("table_down.*is not a table")
    database.execute("DROP VIEW task; CREATE TABLE task (id serial PRIMARY KEY)")
    one.wait_log("table_down.*has type integer")
    database.execute("DROP TABLE task")
    one.wait_log("leading")
    # A look just while the table is dropped may have a reason of its own.
    assert [len(one.logged(f"table_down.*{reason}")) for reason in ("is not a table", "has type integer")] == [1, 1]


# Together


def test_eight_installations_at_once_do_not_collide(database: Database) -> None:
    async def all_at_once() -> list[list[str]]:
        return await asyncio.gather(*(installed(database, "jobs", f"task{n % 2}") for n in range(8)))

    made = [line for lines in asyncio.run(all_at_once()) for line in lines]
    tables = [f"create table jobs.{table}" for table in ("task0", "task1")]
    sides = [f"{table}_{side.suffix}" for table in tables for side in SIDES]
    wanted = sorted(["create schema jobs", *tables, *sides, "create type jobs.state"])
    assert sorted(line for line in made if line.startswith(("create schema", "create type", "create table"))) == wanted
    assert install(database, "jobs", "task0") == []


def test_two_masters_that_start_together_do_not_collide(database: Database, master: Callable[..., Master]) -> None:
    both = [master(wait=False), master(wait=False)]
    eventually(lambda: sorted(bool(one.logged("leading")) for one in both) == [False, True])
    eventually(lambda: any(one.logged("standing_by") for one in both))
    assert [line for one in both for line in one.logged("table_down")] == []
    assert database.wait(database.insert("SELECT 1"))["state"] == "DONE"


# Partitions

PARTITIONED = {
    "plan": (
        """CREATE TABLE task (id bigserial, plan timestamptz NOT NULL DEFAULT now(), input text NOT NULL,
        PRIMARY KEY (id, plan)) PARTITION BY RANGE (plan)""",
        "CREATE TABLE task_old PARTITION OF task FOR VALUES FROM (MINVALUE) TO ('2020-01-01')",
    ),
    "id": (
        "CREATE TABLE task (id bigserial PRIMARY KEY, input text NOT NULL) PARTITION BY RANGE (id)",
        "CREATE TABLE task_old PARTITION OF task FOR VALUES FROM (MINVALUE) TO (0)",
    ),
    "group without a key": (
        'CREATE TABLE task (id bigserial, input text NOT NULL, "group" text) PARTITION BY LIST ("group")',
        "CREATE TABLE task_old PARTITION OF task FOR VALUES IN ('old')",
    ),
}


def asleep(database: Database) -> bool:
    """Whether the master waits for a notification: it says so by a lock."""
    query = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted
        AND classid = 'task'::regclass AND objid = 4294967295"""
    return database.execute(query) == [(1,)]


@pytest.mark.parametrize("made", PARTITIONED.values(), ids=PARTITIONED.keys())
def test_rows_put_into_a_partition_itself_are_run(
    database: Database, master: Callable[..., Master], made: tuple[str, str]
) -> None:
    for statement in (*made, "CREATE TABLE task_new PARTITION OF task DEFAULT"):
        database.execute(statement)
    one = master()
    assert database.wait(database.insert("SELECT 1"))["output"] == "1"
    eventually(lambda: not one.workers() and asleep(database))
    [(id,)] = database.execute("INSERT INTO task_new (input, repeat) VALUES ('SELECT 2', '1 hour') RETURNING id")
    assert database.wait(id)["output"] == "2"
    assert [row["state"] for row in database.tasks(f"parent = {id}")] == ["PLAN"]
    database.execute("CREATE TABLE task_late (LIKE task INCLUDING DEFAULTS)")
    before = snapshot(database, touched=True)
    assert install(database) == []
    assert snapshot(database, touched=True) == before


def test_default_of_the_configuration_reaches_the_partitions(database: Database) -> None:
    for statement in (*PARTITIONED["plan"], "CREATE TABLE task_new PARTITION OF task DEFAULT"):
        database.execute(statement)
    install(database)
    install(database, defaults={"group": "configured"})
    [(group,)] = database.execute("""INSERT INTO task_new (input) VALUES ('SELECT 1') RETURNING "group" """)
    assert group == "configured"


# Names


def test_derived_names_of_long_names_are_short_and_unique() -> None:
    tables = ["t" * 50 + end * 13 for end in "ab"] + ["ö" * 25 + "t" * 13, "task"]
    suffixes = ("due", "lane", "master", "check")
    derived = [Names(schema="s", table=table).derived(suffix) for table in tables for suffix in suffixes]
    assert len(set(derived)) == len(derived)
    assert max(len(name.encode()) for name in derived) <= 63


def test_tables_whose_long_names_begin_alike_are_both_served(database: Database, master: Callable[..., Master]) -> None:
    tables = ["t" * 50 + end * 13 for end in "ab"]
    master(config="".join(table_config(database, "jobs", table) for table in tables))
    database.schema = "jobs"
    for table in tables:
        database.table = table
        assert database.wait(database.insert("SELECT current_setting('pg_task.table')"))["output"] == table
        assert install(database, "jobs", table) == []


def test_a_task_runs_whatever_schema_table_and_group_are_called(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(config="".join(table_config(database, name, name) for name in ODD_NAMES))
    words = ("schema", "table", "group")
    for name in ODD_NAMES:
        database.schema = database.table = name
        query = " || '|' || ".join(f"current_setting('pg_task.{word}')" for word in words)
        row = database.wait(database.insert(f"SELECT {query}", group=name, repeat="1 day"))
        assert row["output"] == "|".join([name] * 3)
        assert [row["group"] for row in database.tasks("state = 'PLAN'")] == [name]
        assert install(database, name, name) == []
    assert one.logged("table_down") == []


def test_a_task_runs_whatever_database_and_role_are_called(
    new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    made = []
    for name in ODD_NAMES:
        unique = (secrets.token_hex(3) + " " + name)[:63]
        made.append(new_database(name=unique, user=unique))
    master(config="".join(map(table_config, made)))
    for one in made:
        row = one.wait(one.insert("SELECT current_user::text || '|' || current_database()"))
        assert row["output"] == f"{one.user}|{one.name}"


# Encodings


def recreate(database: Database, encoding: str) -> None:
    name, owner = sql.Identifier(database.name), sql.Identifier(database.user)
    query = "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'"
    with psycopg.connect(database.server.conninfo(), autocommit=True) as session:
        session.execute(sql.SQL("DROP DATABASE {}").format(name))
        session.execute(sql.SQL(query).format(name, owner, sql.Literal(encoding)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoding", "word"),
    [("LATIN1", "größe"), ("SQL_ASCII", "größe"), ("EUC_JP", "仕事"), ("WIN1251", "задача"), ("UTF8", "🐘")],
)
def test_a_task_runs_in_a_database_of_any_encoding(
    database: Database, master: Callable[..., Master], encoding: str, word: str
) -> None:
    recreate(database, encoding)
    master(config=table_config(database, word, word))
    session = database.connect(make_conninfo(database.conninfo, client_encoding="UTF8"))
    table = sql.Identifier(word, word)
    query = sql.SQL("INSERT INTO {} (input, {}) VALUES (%s, %s)").format(table, sql.Identifier("group"))
    session.execute(query, [f"SELECT '{word}', current_setting('pg_task.group')", word])

    def ended() -> list[tuple[str, str]]:
        query = sql.SQL("SELECT output, error FROM {} WHERE state IN ('DONE', 'FAIL')").format(table)
        return session.execute(query).fetchall()

    assert [(row[0].splitlines()[1], row[1]) for row in eventually(ended)] == [(f"{word}\t{word}", None)]
    assert install(database, word, word) == []
