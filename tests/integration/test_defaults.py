"""Where the value of a column comes from that the INSERT does not name."""

from collections.abc import Callable
from dataclasses import dataclass
from signal import SIGHUP
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgtask import settings
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually


@dataclass(frozen=True, kw_only=True)
class Case:
    """Six different values of a setting as the table shows them: one for each place that may say it."""

    built_in: str
    configured: str
    database: str
    role: str
    session: str
    inserted: str


def flag(built_in: str) -> Case:
    """There are only two values: each place says the other one than the place below it."""
    other = {"true": "false", "false": "true"}[built_in]
    return Case(built_in=built_in, configured=other, database=built_in, role=other, session=built_in, inserted=other)


def of(*values: str) -> Case:
    return Case(**dict(zip(Case.__dataclass_fields__, values, strict=True)))


CASES = {
    "active": of("01:00:00", "02:00:00", "03:00:00", "04:00:00", "05:00:00", "06:00:00"),
    "live": of("00:00:00", "00:00:02", "00:00:03", "00:00:04", "00:00:05", "00:00:06"),
    "repeat": of("00:00:00", "00:00:02", "00:00:03", "00:00:04", "00:00:05", "1 mon"),
    "timeout": of("00:00:00", "00:00:00.002", "00:00:03", "00:00:04", "00:00:05", "00:00:06"),
    "count": of("0", "2", "3", "4", "5", "6"),
    "max": of("0", "-2", "3", "4", "5", "6"),
    "delete": flag("true"),
    "drift": flag("false"),
    "header": flag("true"),
    "save": flag("false"),
    "string": flag("true"),
    "delimiter": of("\t", ";", "|", ",", ":", " "),
    "escape": of("", "\\", "/", "!", "~", "'"),
    "quote": of("", '"', "'", "`", "%", "\\"),
    "group": of("group", "configured", "data base", "ro'le", "se\\ssion", "größe"),
    "null": of("\\N", "NULL", "~", "'", "n/a", ""),
    "atomic": flag("true"),
    "batch": of("1", "2", "3", "4", "5", "50"),
    "retry": of("0", "1", "2", "3", "4", "5"),
    "backoff": of("00:00:01", "00:00:02", "00:00:03", "00:00:04", "00:00:05", "00:00:06"),
    "retry_on": of("* !0A !42", "*", "22", "40 55P03", "P0001", "!23 *"),
    "missed": of("once", "skip", "all", "once", "skip", "all"),
}


def test_every_task_setting_has_a_case() -> None:
    assert set(CASES) == set(settings.by_name("task"))


def inserted(session: psycopg.Connection[Any], name: str, value: str | None = None) -> str:
    """What a new row has in the column."""
    column = sql.Identifier(name)
    names = sql.SQL(", ").join([sql.Identifier("input")] + [column] * (value is not None))
    values = sql.SQL(", ").join([sql.Literal("")] + [sql.Literal(value)] * (value is not None))
    query = sql.SQL("INSERT INTO task ({}) VALUES ({}) RETURNING {}::text").format(names, values, column)
    row = session.execute(query).fetchone()
    assert row is not None
    return str(row[0])


def set_for(kind: str, owner: str, name: str, value: str) -> sql.Composed:
    query = "ALTER ROLE {} SET {} = {}" if kind == "role" else "ALTER DATABASE {} SET {} = {}"
    return sql.SQL(query).format(sql.Identifier(owner), sql.Identifier("pg_task", name), sql.Literal(value))


@pytest.mark.parametrize("name", CASES)
def test_the_nearer_place_wins(database: Database, name: str) -> None:
    case, setting = CASES[name], sql.Identifier("pg_task", name)
    install(database)
    assert inserted(database.connect(), name) == case.built_in
    install(database, defaults={name: case.configured})
    assert inserted(database.connect(), name) == case.configured
    database.admin_execute(set_for("database", database.name, name, case.database))
    assert inserted(database.connect(), name) == case.database
    database.admin_execute(set_for("role", database.user, name, case.role))
    session = database.connect()
    assert inserted(session, name) == case.role
    session.execute(sql.SQL("SET {} = {}").format(setting, sql.Literal(case.session)))
    assert inserted(session, name) == case.session
    assert inserted(session, name, case.inserted) == case.inserted
    session.execute(sql.SQL("RESET {}").format(setting))
    assert inserted(session, name) == case.role


@pytest.mark.parametrize("name", CASES)
def test_set_local_holds_for_its_transaction_and_leaves_no_trace(database: Database, name: str) -> None:
    case = CASES[name]
    install(database, defaults={name: case.configured})
    session = database.connect()
    with session.transaction():
        query = sql.SQL("SET LOCAL {} = {}").format(sql.Identifier("pg_task", name), sql.Literal(case.database))
        session.execute(query)
        assert inserted(session, name) == case.database
    assert session.execute(f"SELECT current_setting('pg_task.{name}')".encode()).fetchone() == ("",)
    assert inserted(session, name) == case.configured


def test_parent_is_the_task_that_inserts(database: Database) -> None:
    install(database)
    session = database.connect()

    def parent() -> object:
        row = session.execute("INSERT INTO task (input) VALUES ('') RETURNING parent").fetchone()
        return row and row[0]

    assert parent() is None
    for value, expected in (("7", 7), ("0", None), ("", None)):
        session.execute("SELECT set_config('pg_task.id', %s, false)", [value])
        assert parent() == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timeout", "soon", 'interval: "soon"'),
        ("count", "many", 'integer: "many"'),
        ("delete", "maybe", 'boolean: "maybe"'),
        ("count", "-1", "count cannot be -1: the rule is count >= 0"),
        ("active", "0", "active cannot be 00:00:00: the rule is active > interval '0'"),
        ("max", "99999999999", '"99999999999" is out of range'),
    ],
)
def test_impossible_value_of_a_setting_is_named_in_the_error(
    database: Database, name: str, value: str, message: str
) -> None:
    install(database)
    session = database.connect()
    session.execute(sql.SQL("SET {} = {}").format(sql.Identifier("pg_task", name), sql.Literal(value)))
    with pytest.raises(psycopg.DatabaseError, match=message):
        inserted(session, name)


def test_owner_that_is_no_superuser_may_be_granted_to_set_defaults_of_his_role(database: Database) -> None:
    install(database)
    role = sql.Identifier(database.user)
    database.admin_execute(sql.SQL("GRANT SET ON PARAMETER pg_task.max TO {}").format(role))
    try:
        database.execute(set_for("role", database.user, "max", "3"))
        assert inserted(database.connect(), "max") == "3"
    finally:
        database.admin_execute(sql.SQL("REVOKE SET ON PARAMETER pg_task.max FROM {}").format(role))


def test_only_the_changed_configuration_rewrites_the_defaults(database: Database) -> None:
    install(database)
    assert install(database, defaults={"timeout": "5 s"}) == [
        "create function public.task_async()",
        "let nobody else call task_async",
        "set the columns' defaults",
        "note which defaults the table has",
    ]
    assert install(database, defaults={"timeout": "5 s"}) == []
    install(database)
    assert inserted(database.connect(), "timeout") == "00:00:00"


def test_reload_brings_the_new_defaults_to_the_table(
    database: Database, master: Callable[..., Master], tmp_path: Any
) -> None:
    config = f'[[database]]\nconninfo = "{database.conninfo}"\n[defaults]\ngroup = "before"\n'
    one = master(config=config)
    assert inserted(database.connect(), "group") == "before"
    (tmp_path / "master0.toml").write_text(config.replace("before", "after"), "utf-8")
    one.signal(SIGHUP)
    one.wait_log("schema_changed.*defaults")
    eventually(lambda: inserted(database.connect(), "group") == "after")


def test_task_takes_the_defaults_of_its_own_session(database: Database, master: Callable[..., Master]) -> None:
    master()
    query = "SET pg_task.max = 5; SET pg_task.delete = false; INSERT INTO task (input) VALUES ('')"
    row = database.wait(database.insert(query))
    [child] = database.tasks(f"parent = {row['id']}")
    assert (row["state"], child["max"], child["delete"]) == ("DONE", 5, False)


def test_setting_of_the_role_holds_for_the_next_task_of_a_lingering_worker(
    database: Database, master: Callable[..., Master]
) -> None:
    master("--linger", "1 min", database.conninfo, tables=1)
    ask = "SELECT current_setting('work_mem')"
    first = database.wait(database.insert(ask, delete=False))
    for memory in ("5MB", "6MB"):
        database.execute(f"ALTER ROLE \"{database.user}\" SET work_mem = '{memory}'")
        row = database.wait(database.insert(ask, delete=False))
        assert (row["state"], row["output"], row["attempt"]) == ("DONE", memory, 1)
        assert row["pid"] != first["pid"]
    database.execute(f"ALTER DATABASE {database.name} SET work_mem = '7MB'")
    database.execute(f'ALTER ROLE "{database.user}" RESET work_mem')
    assert database.wait(database.insert(ask, delete=False))["output"] == "7MB"


def test_setting_of_the_role_reaches_a_worker_that_goes_from_task_to_task(
    database: Database, master: Callable[..., Master]
) -> None:
    database.execute(f"ALTER ROLE \"{database.user}\" SET work_mem = '5MB'")
    master(database.conninfo)
    wait = "pg_sleep(0.05), pg_advisory_xact_lock_shared(7000)"
    ask = f"COPY (SELECT current_setting('work_mem') FROM {wait}) TO STDOUT"
    with held(database):
        database.execute("INSERT INTO task (input, delete) SELECT %s, false FROM generate_series(1, 60)", [ask])
        wait_runs(database)
        database.execute(f"ALTER ROLE \"{database.user}\" SET work_mem = '6MB'")
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)], timeout=40)
    outputs = [row["output"] for row in database.tasks()]
    assert set(outputs) == {"5MB\n", "6MB\n"}
    assert outputs == sorted(outputs), "once new, it stays so"
    assert {row["attempt"] for row in database.tasks()} == {1}
