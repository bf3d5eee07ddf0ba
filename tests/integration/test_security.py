"""What a role that may only insert can do, and what somebody who may create objects in the schema cannot."""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

from pgtask import objects, settings
from pgtask.objects import ROUTINES, Names
from pgtask.schema import Refused
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.docs import ROOT
from tests.fixtures.master import Master
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

PAGE = ROOT / "docs/how-to/security.md"
[USAGE, WHOLE, NARROW] = re.findall(r"^GRANT .*TO app;$", PAGE.read_text("utf-8"), re.MULTILINE)
"""The rights of an inserter, as they are told."""

END_MASTERS_SESSION = """
    SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
    WHERE application_name = 'pgtask master' AND datname = current_database()"""

NAMES = Names(schema="public", table="task")


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("security")) as one:
        yield one


def session_of(database: Database, name: str, grants: str) -> Iterator[psycopg.Connection[Any]]:
    role = f"{database.name}_{name}"
    database.admin_execute(f'CREATE ROLE "{role}" LOGIN')
    database.admin_execute(re.sub("TO app;", f'TO "{role}";', grants))
    session = psycopg.connect(database.server.conninfo(database.name, role), autocommit=True)
    yield session
    session.close()
    database.admin_execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"')


@pytest.fixture(scope="module")
def inserter(base: Served) -> Iterator[psycopg.Connection[Any]]:
    yield from session_of(base.database, "inserter", USAGE + WHOLE)


@pytest.fixture(scope="module")
def narrow(base: Served) -> Iterator[psycopg.Connection[Any]]:
    yield from session_of(base.database, "narrow", USAGE + NARROW)


@pytest.fixture(scope="module")
def maker(base: Served) -> Iterator[psycopg.Connection[Any]]:
    """A role that may create in the schema of the task table, and nothing else."""
    yield from session_of(base.database, "maker", "GRANT USAGE, CREATE ON SCHEMA public TO app;")


@pytest.fixture
def mallory(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """The same in a database that has no task table yet."""
    yield from session_of(database, "mallory", "GRANT USAGE, CREATE ON SCHEMA public TO app;")


# Nothing but INSERT


def test_insert_alone_is_enough_to_have_tasks_run(
    base: Served, inserter: psycopg.Connection[Any], narrow: psycopg.Connection[Any]
) -> None:
    for session in (inserter, narrow):
        who = session.info.user
        session.execute("INSERT INTO task (input, data) VALUES ('SELECT session_user', %s)", [who])
        with session.cursor().copy("COPY task (input, data) FROM STDIN") as copy:
            copy.write_row(["SELECT session_user", who])
        eventually(lambda who=who: len(base.database.tasks(f"data = '{who}' AND state = 'DONE'")) == 2)
        assert {row["output"] for row in base.database.tasks(f"data = '{who}'")} == {base.database.user}


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT input FROM task",
        "SELECT count(*) FROM task",
        "INSERT INTO task (input) VALUES ('SELECT 1') RETURNING id",
        "INSERT INTO task (input) VALUES ('SELECT 1') RETURNING input",
        "INSERT INTO task (input) SELECT input FROM task",
        "INSERT INTO task (id, input) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET input = excluded.input",
        "INSERT INTO task (id, input) VALUES (1, 'x') ON CONFLICT (id) DO NOTHING",
        "UPDATE task SET state = 'STOP'",
        "DELETE FROM task",
        "TRUNCATE task",
        "SELECT * FROM task_master",
        "UPDATE task_master SET term = term + 1",
        "INSERT INTO task_master (term) VALUES (1)",
        "SELECT nextval('task_id_seq')",
        "COPY task TO STDOUT",
        "ALTER TABLE task DISABLE TRIGGER ALL",
        "CREATE TRIGGER mine AFTER INSERT ON task EXECUTE FUNCTION task_wake()",
        "CREATE INDEX ON task (id)",
        "CREATE TABLE pg_temp.mine () INHERITS (task)",
        "DROP TYPE state",
    ],
)
def test_insert_alone_is_enough_for_nothing_else(
    base: Served, inserter: psycopg.Connection[Any], statement: str
) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        inserter.execute(statement.encode())


def test_errors_of_an_inserter_tell_nothing_of_other_rows(base: Served, inserter: psycopg.Connection[Any]) -> None:
    id = base.database.insert("SELECT 'other people''s'", data="other people's", plan="infinity")
    for columns, values in {"id": str(id), "max, plan": "1, 'other'", "count": "-1", "state": "'WORK'"}.items():
        with pytest.raises(psycopg.Error) as refused:
            inserter.execute(f"INSERT INTO task (input, {columns}) VALUES ('SELECT 1', {values})".encode())
        said = [refused.value.diag.message_primary, refused.value.diag.message_detail, refused.value.diag.context]
        assert "other people" not in str(said)
        assert refused.value.diag.message_detail is None or "infinity" not in refused.value.diag.message_detail
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


def test_forged_run_is_not_copied_in_either(inserter: psycopg.Connection[Any]) -> None:
    with (
        pytest.raises(errors.InsufficientPrivilege),
        inserter.cursor().copy("COPY task (input, state) FROM STDIN") as to,
    ):
        to.write_row(["SELECT 1", "WORK"])


@pytest.mark.parametrize(
    "column", ["id", "remote", "state", "pid", "attempt", "output", "error", "first", '"delete"', "save", "repeat"]
)
def test_right_to_some_columns_is_no_right_to_others(narrow: psycopg.Connection[Any], column: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        narrow.execute(f"INSERT INTO task (input, {column}) VALUES ('SELECT 1', DEFAULT)".encode())


def test_check_of_the_owner_forbids_remote_tasks(base: Served, inserter: psycopg.Connection[Any]) -> None:
    base.database.execute("ALTER TABLE task ADD CONSTRAINT no_remote CHECK (remote IS NULL)")
    with pytest.raises(errors.CheckViolation):
        inserter.execute("INSERT INTO task (input, remote) VALUES ('SELECT 1', 'host=elsewhere password=x')")
    assert base.then_next("SELECT 1", repeat="1 year")["state"] == "DONE"
    base.database.execute("ALTER TABLE task DROP CONSTRAINT no_remote")
    base.database.execute("DELETE FROM task WHERE plan > now()")


# Our functions in other hands


def test_trigger_functions_have_the_rights_of_their_caller_and_cannot_be_called(
    base: Served, maker: psycopg.Connection[Any]
) -> None:
    query = """SELECT proname::text, oidvectortypes(proargtypes), prosecdef, prorettype = 'trigger'::regtype
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname LIKE 'task%'"""
    found = base.database.execute(query)
    assert {row[:2] for row in found} == {(f"task_{one.suffix}", one.types) for one in ROUTINES}
    private = {f"task_{one.suffix}" for one in ROUTINES if one.private}
    assert {name for name, _, definer, _ in found if definer} == private, "whose rights it has only some may use"
    for name in {name for name, *_, trigger in found if trigger} - private:
        with pytest.raises(errors.FeatureNotSupported):
            maker.execute(f"SELECT {name}()".encode())


def test_trigger_functions_on_a_table_of_anothers_reach_that_table_only(
    base: Served, maker: psycopg.Connection[Any]
) -> None:
    running = base.database.insert("SELECT pg_sleep(60)", group="running")
    before = base.database.wait(running, "WORK")
    ear = base.database.connect()
    [(ours,)] = base.database.execute("SELECT 'task'::regclass::oid::bigint")
    ear.execute(f"LISTEN pgtask_{ours}".encode())
    maker.execute("CREATE TABLE mine (id bigint, state state DEFAULT 'WORK', pid int) PARTITION BY LIST (id)")
    maker.execute("CREATE TABLE mine_too PARTITION OF mine DEFAULT")
    for name in ("enter", "stop"):  # they have the rights of their owner
        with pytest.raises(errors.InsufficientPrivilege):
            maker.execute(f"CREATE TRIGGER x AFTER DELETE ON mine FOR EACH ROW EXECUTE FUNCTION task_{name}()".encode())
    for event, suffix in [("INSERT", "wake"), ("UPDATE", "guard")]:
        for table in ("mine", "mine_too"):
            timing = "BEFORE" if suffix == "guard" else "AFTER"
            maker.execute(
                f"CREATE TRIGGER {table}_{suffix} {timing} {event} ON {table} FOR EACH ROW"
                f" EXECUTE FUNCTION task_{suffix}()".encode()
            )
    maker.execute("INSERT INTO mine VALUES (%s)", [running])
    with pytest.raises((errors.InsufficientPrivilege, errors.UndefinedColumn)):
        maker.execute("UPDATE mine SET id = 1")
    maker.execute("DELETE FROM mine")
    maker.execute("DROP TABLE mine")
    maker.execute("SELECT pg_notify(%s, 'last')", [f"pgtask_{ours}"])
    assert [notify.payload for notify in ear.notifies(timeout=20, stop_after=1)] == ["last"]
    assert base.database.task(running) == before
    base.database.execute("DELETE FROM task WHERE id = %s", [running])


# Objects that somebody has laid out before the master came


def planted(what: str) -> list[str]:
    """Objects of ours, to the letter, that their maker can change when the master has begun to use them."""
    if what == "state":
        return [objects.type_(NAMES), f"GRANT USAGE ON TYPE {NAMES.state} TO PUBLIC"]
    if what == "master":
        return [objects.side(objects.MASTER, NAMES), f"GRANT ALL ON {NAMES.quoted(NAMES.master)} TO PUBLIC"]
    if what == "view":
        columns = ", ".join(f"trap() AS {column}" for column in objects.MASTER.columns)
        return [
            "CREATE TABLE seen (who text); GRANT ALL ON seen TO PUBLIC",
            "CREATE FUNCTION trap() RETURNS text LANGUAGE sql AS 'INSERT INTO public.seen VALUES (user) RETURNING who'",
            f"CREATE VIEW {NAMES.quoted(NAMES.master)} AS SELECT {columns}",
            f"GRANT ALL ON {NAMES.quoted(NAMES.master)} TO PUBLIC",
        ]
    defaults = {name: one.sql_default for name, one in settings.by_name("task").items()}
    [text] = [objects.routine(one, NAMES, defaults) for one in ROUTINES if one.name == what]
    return ["CREATE TABLE mine ()", text.replace(NAMES.task, "public.mine")]  # one has a variable for the table's row


@pytest.mark.parametrize("what", ["state", "master", "view", *(one.name for one in ROUTINES)])
def test_object_that_a_stranger_has_laid_out_is_refused(
    database: Database, mallory: psycopg.Connection[Any], what: str
) -> None:
    for statement in planted(what):
        mallory.execute(statement.encode())
    with pytest.raises(Refused) as refused:
        install(database)
    assert f"belongs to {mallory.info.user}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert database.execute("SELECT to_regclass('public.task')") == [(None,)]
    if what == "view":
        assert mallory.execute("SELECT * FROM seen").fetchall() == []
        return
    database.admin_execute(f'REASSIGN OWNED BY "{mallory.info.user}" TO "{database.user}"')
    install(database)


def test_stranger_who_joins_our_role_to_his_own_is_refused_nonetheless(
    database: Database, mallory: psycopg.Connection[Any]
) -> None:
    for statement in planted("wake_function"):
        mallory.execute(statement.encode())
    database.admin_execute(f'GRANT "{mallory.info.user}" TO "{database.user}"')
    with pytest.raises(Refused):
        install(database)


def test_table_of_somebody_else_is_served_with_a_warning(
    database: Database, master: Callable[..., Master], mallory: psycopg.Connection[Any]
) -> None:
    install(database, conninfo=database.server.conninfo(database.name, mallory.info.user))
    mallory.execute(f'GRANT ALL ON task, task_master, task_held, task_report TO "{database.user}"'.encode())
    one = master()
    [line] = one.wait_log("table_of_another")
    assert f"owner={mallory.info.user}" in line
    assert " WARNING " in line
    one.stop()  # before the table goes with its owner


@pytest.mark.parametrize("trap", ["cast", "operator"])
def test_types_and_operators_of_a_stranger_in_the_schema_redirect_nothing(
    database: Database, master: Callable[..., Master], mallory: psycopg.Connection[Any], trap: str
) -> None:
    """He may make functions, operators and casts for types of his own; for ours only operators, and in his schema."""
    one = master()
    mallory.execute("CREATE FUNCTION bad(state, state) RETURNS bool LANGUAGE plpgsql AS 'BEGIN RAISE ''trapped''; END'")
    mallory.execute("CREATE FUNCTION to_text(state) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE ''trapped''; END'")
    if trap == "cast":
        with pytest.raises(errors.InsufficientPrivilege):
            mallory.execute("CREATE CAST (state AS text) WITH FUNCTION to_text AS IMPLICIT")
    else:
        for operator in ("=", "<>", "<", ">"):
            mallory.execute(f"CREATE OPERATOR {operator} (LEFTARG = state, RIGHTARG = state, FUNCTION = bad)".encode())
    database.execute(f'ALTER ROLE "{database.user}" SET search_path = public, pg_catalog')
    database.execute(END_MASTERS_SESSION)
    one.wait_log("leading", 2)
    id = database.insert("SELECT 1", delete=False, repeat="1 year")
    assert database.wait(id)["state"] == "DONE"
    database.execute("UPDATE public.task SET state = 'STOP' WHERE parent IS NOT NULL")
    assert not one.logged("trapped")


# What is only warned of


def test_master_that_connects_as_a_superuser_says_so_once(
    server: AnyServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served(server, tmp_path_factory.mktemp("superuser"), superuser=True) as one:
        [line] = one.master.wait_log("connected_as_superuser")
        assert f"user={one.database.user}" in line
        one.database.execute(END_MASTERS_SESSION)
        one.master.wait_log("leading", 2)
        assert one.run("SELECT 1")["state"] == "DONE"
        assert one.master.logged("connected_as_superuser") == [line]


def test_master_of_a_plain_role_has_nothing_to_warn_of_unless_it_is_root(base: Served) -> None:
    base.run("SELECT 1")
    assert len(base.master.logged("WARNING .*running_as_root")) == (os.geteuid() == 0)
    assert not base.master.logged("connected_as_superuser|table_of_another|lock_held_by_another")


def test_types_of_a_users_own_do_not_run_with_the_owners_rights(database: Database) -> None:
    """A function of the owner's that named a type without its schema would take the caller's temporary one."""
    install(database)
    database.insert("SELECT 1", plan="infinity")
    role = f"{database.user}_deletes"
    database.admin_execute(f'CREATE ROLE "{role}" LOGIN; CREATE TABLE seen (who text); GRANT ALL ON seen TO PUBLIC')
    database.execute(f'GRANT SELECT, DELETE ON task TO "{role}"')
    with psycopg.connect(database.server.conninfo(database.name, role), autocommit=True) as session:
        session.execute(
            """CREATE FUNCTION pg_temp.trap(pg_catalog.text) RETURNS bool LANGUAGE plpgsql AS
                $$BEGIN INSERT INTO public.seen VALUES (current_user); RETURN true; END$$"""
        )
        for name in ("text", "bool", "int8", "oid"):
            session.execute(
                f"CREATE DOMAIN pg_temp.{name} AS pg_catalog.text CHECK (pg_temp.trap(VALUE::pg_catalog.text))".encode()
            )
        assert session.execute("DELETE FROM public.task").rowcount == 1
    assert database.admin_execute("SELECT count(*) FROM seen") == [(0,)]
    database.admin_execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
