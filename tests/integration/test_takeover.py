"""A table that the C extension pg_task made is taken over with its rows, once the extension has let go of it."""

from collections.abc import Callable

import pytest

from pgtask.schema import Refused
from tests.fixtures.catalog import install, snapshot
from tests.fixtures.database import Database
from tests.fixtures.master import Master


def setting(name: str, type: str) -> str:
    return f"DEFAULT (current_setting('pg_task.{name}'))::{type}"


EXTENSION = [
    "CREATE TYPE state AS ENUM ('PLAN', 'GONE', 'TAKE', 'WORK', 'DONE', 'FAIL', 'STOP')",
    f"""CREATE TABLE task (
        id bigserial PRIMARY KEY,
        parent bigint DEFAULT NULLIF((current_setting('pg_task.id'))::bigint, 0),
        plan timestamptz NOT NULL DEFAULT statement_timestamp(),
        start timestamptz,
        stop timestamptz,
        active interval NOT NULL {setting("active", "interval")} CHECK (active > '0'),
        live interval NOT NULL {setting("live", "interval")} CHECK (live >= '0'),
        repeat interval NOT NULL {setting("repeat", "interval")} CHECK (repeat >= '0'),
        timeout interval NOT NULL {setting("timeout", "interval")} CHECK (timeout >= '0'),
        count int NOT NULL {setting("count", "int")} CHECK (count >= 0),
        hash int NOT NULL GENERATED ALWAYS AS (hashtext("group" || COALESCE(remote, ''))) STORED,
        max int NOT NULL {setting("max", "int")},
        pid int,
        state state NOT NULL DEFAULT 'PLAN',
        delete boolean NOT NULL {setting("delete", "boolean")},
        drift boolean NOT NULL {setting("drift", "boolean")},
        header boolean NOT NULL {setting("header", "boolean")},
        save boolean NOT NULL {setting("save", "boolean")},
        string boolean NOT NULL {setting("string", "boolean")},
        delimiter "char" NOT NULL {setting("delimiter", '"char"')},
        escape "char" NOT NULL {setting("escape", '"char"')},
        quote "char" NOT NULL {setting("quote", '"char"')},
        data text,
        error text,
        "group" text NOT NULL {setting("group", "text")},
        input text NOT NULL,
        "null" text NOT NULL {setting("null", "text")},
        output text,
        remote text)""",
    *(f"CREATE INDEX ON task USING btree ({column})" for column in ("hash", "input", "parent", "plan", "state")),
    """CREATE FUNCTION task_wake_up() RETURNS trigger SET search_path = pg_catalog, pg_temp LANGUAGE plpgsql AS $$BEGIN
        PERFORM pg_cancel_backend(pid) FROM pg_locks WHERE locktype = 'userlock' AND granted AND objsubid = 3;
        RETURN NULL; END$$""",
    "CREATE TRIGGER wake_up AFTER INSERT ON task FOR EACH STATEMENT EXECUTE FUNCTION task_wake_up()",
]

ROWS = """INSERT INTO task (id, parent, plan, start, stop, active, live, repeat, timeout, count, max, pid, state,
        delete, drift, header, save, string, delimiter, escape, quote, "group", input, "null", output)
    SELECT n, NULL, now() - '1 minute'::interval,
        CASE WHEN s NOT IN ('PLAN', 'GONE') THEN now() - '1 minute'::interval END,
        CASE WHEN s IN ('DONE', 'FAIL', 'GONE') THEN now() END, '1 hour', '0', '0', '0', 0, 0,
        CASE WHEN s NOT IN ('PLAN', 'GONE') THEN 1999999999 END, s::state, false, false,
        true, false, true, E'\t', '', '', s, 'SELECT ' || n, '\\N', CASE WHEN s = 'DONE' THEN 'kept' END
    FROM unnest(enum_range(NULL::state)::text[]) WITH ORDINALITY AS u (s, n)"""


@pytest.fixture
def extension(database: Database) -> Database:
    """A database as the extension leaves it, with a row in every state."""
    for statement in EXTENSION:
        database.execute(statement)
    database.execute(ROWS)
    database.execute("SELECT setval('task_id_seq', 100)")
    return database


def test_rows_stay_and_what_was_to_run_runs(extension: Database, master: Callable[..., Master]) -> None:
    master()
    for id, output in {1: "1", 3: "3", 4: "4"}.items():
        row = extension.wait(id, "DONE")
        assert row["output"] == output
    rest = [(row["id"], row["state"], row["output"]) for row in extension.tasks("id NOT IN (1, 3, 4)")]
    assert rest == [(2, "GONE", None), (5, "DONE", "kept"), (6, "FAIL", None), (7, "STOP", None)]


def test_insert_needs_no_placeholder_setting_any_more(extension: Database, master: Callable[..., Master]) -> None:
    master()
    row = extension.wait(extension.insert("SELECT 1, 2"))
    assert (row["id"], row["parent"], row["state"]) == (101, None, "DONE")
    assert row["hash"] is not None


def test_a_long_input_can_be_inserted_and_runs(extension: Database, master: Callable[..., Master]) -> None:
    master()
    long = "SELECT md5('" + "".join(map(str, range(50_000))) + "')"
    assert extension.wait(extension.insert(long))["state"] == "DONE"


def test_repeated_task_of_the_extension_is_repeated(extension: Database, master: Callable[..., Master]) -> None:
    extension.execute("UPDATE task SET repeat = '1 hour', data = 'mine' WHERE id = 1")
    master()
    extension.wait(1, "DONE")
    [row] = extension.tasks("parent = 1")
    assert (row["state"], row["data"], row["group"]) == ("PLAN", "mine", "PLAN")


def test_only_what_stands_in_the_way_is_replaced(extension: Database) -> None:
    install(extension)
    labels = extension.execute("SELECT unnest(enum_range(NULL::state))::text")
    assert [name for (name,) in labels] == ["PLAN", "GONE", "TAKE", "WORK", "DONE", "FAIL", "STOP", "WAIT"]
    indexes = [name for (name,) in extension.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'task'")]
    assert {"task_hash_idx", "task_parent_idx", "task_plan_idx", "task_state_idx", "task_pkey"} < set(indexes)
    assert "task_input_idx" not in indexes
    triggers = extension.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = 'task'::regclass")
    assert ("wake_up",) not in triggers
    before = snapshot(extension, touched=True)
    assert install(extension) == []
    assert snapshot(extension, touched=True) == before


def test_triggers_of_the_user_survive_the_takeover(extension: Database) -> None:
    extension.execute("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    extension.execute("CREATE TRIGGER mine BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION f()")
    install(extension)
    assert extension.execute("SELECT count(*) FROM pg_trigger WHERE tgname = 'mine'") == [(1,)]


TITLES = ("pg_work public task 1000", "app app pg_work public task 1000", "pg_work public task")


@pytest.mark.parametrize("title", TITLES)
def test_table_that_the_extension_serves_is_refused(extension: Database, title: str) -> None:
    extension.connect(application_name=title)
    before = snapshot(extension, touched=True)
    with pytest.raises(Refused, match=f"the extension pg_task still serves public.task .{title}."):
        install(extension)
    assert snapshot(extension, touched=True) == before


@pytest.mark.parametrize(
    "title",
    ["pg_work public task2 1000", "pg_work publi task 1000", "pg_task public task group", "my_pg_work public task"],
)
def test_other_sessions_of_the_extension_are_no_obstacle(extension: Database, title: str) -> None:
    extension.connect(application_name=title)
    assert install(extension) != []


def test_worker_of_the_same_table_in_another_database_is_no_obstacle(
    extension: Database, new_database: Callable[..., Database]
) -> None:
    new_database().connect(application_name=TITLES[0])
    assert install(extension) != []


def test_worker_of_a_table_with_a_long_name_is_known_by_what_fits(database: Database) -> None:
    table = "t" * 60
    database.execute(f"CREATE TABLE {table} (id bigserial PRIMARY KEY)")
    database.connect(application_name=f"pg_work public {table} 1000")
    with pytest.raises(Refused, match="still serves"):
        install(database, table=table)


def test_worker_of_another_role_is_seen_by_an_ordinary_one(extension: Database) -> None:
    extension.connect(extension.admin, application_name=TITLES[0])
    with pytest.raises(Refused, match="still serves"):
        install(extension)


def test_master_takes_over_as_soon_as_the_extension_is_gone(extension: Database, master: Callable[..., Master]) -> None:
    worker = extension.connect(application_name=TITLES[0])
    one = master(wait=False)
    one.may_log_errors = True
    one.wait_log("ERROR .*table_down.*the extension pg_task still serves public.task")
    assert extension.tasks("state = 'PLAN'") != []
    worker.close()
    one.wait_log("leading")
    assert len(one.logged("table_down")) == 1
    assert extension.wait(1)["state"] == "DONE"
