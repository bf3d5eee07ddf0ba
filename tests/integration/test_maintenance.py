"""The role and the database of a table are created where the configuration gives the right to do so."""

import secrets
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from pgtask import embedded
from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.server import AnyServer

PASSWORD = "Hush-hush 7"


@pytest.fixture
def absent(server: AnyServer) -> Iterator[Database]:
    """A database and a role of the same name that do not exist; whoever makes them, they go at the end."""
    name = f"absent {secrets.token_hex(6)}"
    database = Database(server, name, name)
    database.password = PASSWORD
    yield database
    database.close()
    for query in ("DROP DATABASE IF EXISTS {} WITH (FORCE)", "DROP ROLE IF EXISTS {}"):
        as_admin(server, sql.SQL(query).format(sql.Identifier(name)))


def as_admin(server: AnyServer, query: str | sql.Composable) -> list[tuple[object, ...]]:
    with psycopg.connect(server.conninfo(), autocommit=True) as session:
        cursor = session.execute(query.encode() if isinstance(query, str) else query)
        return cursor.fetchall() if cursor.description else []


def config(conninfo: str, maintenance: str) -> str:
    quoted = [text.replace("\\", "\\\\").replace('"', '\\"') for text in (conninfo, maintenance)]
    return '[[database]]\nconninfo = "{}"\nmaintenance = "{}"\n'.format(*quoted)


def test_missing_role_and_database_are_created_and_serve_at_once(
    absent: Database, server: AnyServer, master: Callable[..., Master]
) -> None:
    one = master(config=config(absent.tcp, server.conninfo()))
    row = absent.wait(absent.insert("SELECT current_user || ' ' || current_database()"))
    assert row["output"] == f"{absent.user} {absent.name}"
    assert len(one.logged("created")) == 2
    assert one.logged("table_down") == []
    assert PASSWORD not in one.log()
    found = "SELECT rolsuper, rolcreatedb, rolcreaterole, rolcanlogin FROM pg_roles WHERE rolname = {}"
    assert as_admin(server, sql.SQL(found).format(sql.Literal(absent.user))) == [(False, False, False, True)]


def test_existing_role_and_database_are_not_touched(
    database: Database, server: AnyServer, master: Callable[..., Master]
) -> None:
    def rows() -> list[tuple[object, ...]]:
        return as_admin(
            server,
            sql.SQL(
                "SELECT r.xmin::text, a.rolpassword, d.xmin::text FROM pg_authid AS r"
                " JOIN pg_authid AS a USING (oid), pg_database AS d WHERE r.rolname = {0} AND d.datname = {0}"
            ).format(sql.Literal(database.name)),
        )

    before = rows()
    one = master(config=config(database.conninfo, server.conninfo()))
    assert rows() == before
    assert one.logged(" created ") == []


def test_password_reaches_the_server_only_as_a_verifier(
    new_server: Callable[..., embedded.Server], master: Callable[..., Master]
) -> None:
    own = new_server(log_statement="all", log_min_duration_statement="0")
    absent = Database(own, "absent", "absent")
    absent.password = PASSWORD
    try:
        one = master(config=config(absent.tcp, own.tcp()))
        assert absent.wait(absent.insert("SELECT 1"))["state"] == "DONE"
        one.stop()
        assert "CREATE ROLE" in own.log_text()
        assert PASSWORD not in own.log_text()
        assert "SCRAM-SHA-256$" in own.log_text()
    finally:
        absent.close()


def test_role_that_may_create_is_enough(
    absent: Database, database: Database, server: AnyServer, master: Callable[..., Master]
) -> None:
    as_admin(server, sql.SQL("ALTER ROLE {} CREATEROLE CREATEDB").format(sql.Identifier(database.user)))
    master(config=config(absent.conninfo, database.conninfo))
    assert absent.wait(absent.insert("SELECT 1"))["state"] == "DONE"
    member = sql.SQL("SELECT pg_has_role({}, {}, 'USAGE')").format(sql.Literal(database.user), sql.Literal(absent.user))
    assert as_admin(server, member) == [(False,)]


def test_without_the_right_to_create_there_is_one_warning_until_somebody_does(
    absent: Database, database: Database, server: AnyServer, master: Callable[..., Master]
) -> None:
    one = master(config=config(absent.conninfo, database.conninfo), wait=False)
    one.wait_log("WARNING .*maintenance_failed.*permission denied to create role")
    one.wait_log("WARNING .*table_down")
    as_admin(server, sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(absent.user)))
    names = sql.Identifier(absent.name), sql.Identifier(absent.user)
    as_admin(server, sql.SQL("CREATE DATABASE {} OWNER {}").format(*names))
    one.wait_log("leading")
    assert len(one.logged("maintenance_failed")) == 1


def test_maintenance_server_that_comes_later_is_used_then(
    absent: Database, new_server: Callable[..., embedded.Server], master: Callable[..., Master]
) -> None:
    own = new_server()
    own.stop()
    missing = Database(own, "absent", "absent")
    try:
        one = master(config=config(missing.conninfo, own.conninfo()), wait=False)
        one.wait_log("table_down")
        own.start_again()
        one.wait_log("leading")
        assert missing.wait(missing.insert("SELECT 1"))["state"] == "DONE"
    finally:
        missing.close()
