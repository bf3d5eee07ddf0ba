"""`pgtask sql` for a DBA who creates the objects himself, and what a master does that may create nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from pgtask.schema import Refused
from tests.fixtures.catalog import install, snapshot
from tests.fixtures.database import Database
from tests.fixtures.master import ROOT, Master

PGTASK = "from pgtask.cli import user; user()"


def pgtask_sql(*arguments: str) -> str:
    command = [sys.executable, "-c", PGTASK, "sql", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def check(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pgtask", "--check", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def apply(database: Database, script: str) -> None:
    """As psql would, by the superuser."""
    with psycopg.connect(database.admin, autocommit=True) as session:
        session.execute(script.encode())


@pytest.fixture
def plain(database: Database) -> Iterator[str]:
    """A role that owns nothing and may create nothing in the database."""
    role = f"plain {database.name}"
    database.admin_execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(sql.Identifier(role)))
    database.admin_execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield role
    with psycopg.connect(database.admin, autocommit=True) as session:
        session.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
        session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def as_role(database: Database, role: str) -> str:
    return database.server.conninfo(database.name, role, password="secret")


def test_script_makes_what_the_master_would_make(database: Database, new_database: Callable[..., Database]) -> None:
    apply(database, pgtask_sql("--owner", database.user))
    other = new_database()
    install(other)
    assert snapshot(database) == snapshot(other)
    assert install(database) == []


def test_script_is_the_same_every_time_and_may_be_run_again(database: Database) -> None:
    arguments = ("--schema", "jobs {0}", "--table", "it's a $pgtask$ task", "--owner", database.user)
    script = pgtask_sql(*arguments)
    assert pgtask_sql(*arguments) == script
    apply(database, script)
    before = snapshot(database, "jobs {0}")
    apply(database, script)
    assert snapshot(database, "jobs {0}") == before
    assert install(database, "jobs {0}", "it's a $pgtask$ task") == []


def test_script_brings_new_defaults_to_a_table_that_is_there(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "pgtask.toml"
    file.write_text('[defaults]\ntimeout = "7 s"\ngroup = "o\'clock"\n', "utf-8")
    apply(database, pgtask_sql("--owner", database.user))
    apply(database, pgtask_sql("--config", str(file), "--owner", database.user))
    assert install(database, create=False, defaults={"timeout": "7 s", "group": "o'clock"}) == []
    assert database.execute("""INSERT INTO task (input) VALUES ('') RETURNING "group" """) == [("o'clock",)]


def test_master_without_any_right_to_create_serves_what_the_script_made(
    database: Database, plain: str, master: Callable[..., Master]
) -> None:
    apply(database, pgtask_sql("--schema", "jobs", "--grant", plain))
    before = snapshot(database, "jobs", touched=True)
    one = master("--schema", "jobs", as_role(database, plain))
    assert one.logged("schema_changed") == []
    session = database.connect(as_role(database, plain))
    database._kept = session
    database.schema = "jobs"
    row = database.wait(database.insert("SELECT current_user::text", repeat="1 hour"))
    assert (row["state"], row["output"]) == ("DONE", plain)
    assert [row["state"] for row in database.tasks("parent IS NOT NULL")] == ["PLAN"]
    assert snapshot(database, "jobs", touched=True) == before


def test_owner_without_the_right_to_create_serves_what_the_script_made(
    database: Database, plain: str, master: Callable[..., Master]
) -> None:
    apply(database, pgtask_sql("--schema", "jobs", "--owner", plain))
    one = master("--schema", "jobs", "--no-create", as_role(database, plain))
    assert one.logged("schema_changed") == []
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        database.connect(as_role(database, plain)).execute("CREATE TABLE jobs.mine (id int)")


def test_create_switched_off_changes_nothing_and_says_what_is_missing(database: Database) -> None:
    with pytest.raises(Refused) as refused:
        install(database, create=False)
    assert "create type public.state" in str(refused.value)
    assert database.execute("SELECT to_regclass('task')::text, to_regtype('state')::text") == [(None, None)]
    install(database)
    database.execute("ALTER TABLE task ALTER COLUMN timeout DROP DEFAULT")
    with pytest.raises(Refused, match="the default of timeout"):
        install(database, create=False)


def test_table_without_a_comment_is_served_also_where_nothing_may_be_created(
    database: Database, plain: str, master: Callable[..., Master]
) -> None:
    apply(database, pgtask_sql("--grant", plain))
    apply(database, "COMMENT ON COLUMN task.input IS NULL")
    assert "nothing to change" in check(as_role(database, plain))[1]
    for more in ((), ("--no-create",)):
        one = master(*more, as_role(database, plain), tables=1)
        assert one.logged("schema_changed") == []
        one.stop()


def test_right_that_the_master_lacks_is_said_by_check_too(database: Database, plain: str) -> None:
    apply(database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    status, said = check(as_role(database, plain))
    assert (status, f"user {plain} may not create in schema public; GRANT CREATE" in said) == (2, True), said
    status, said = check("--schema", "jobs", as_role(database, plain))
    assert (status, "may not create schema jobs" in said) == (2, True), said
    apply(database, pgtask_sql("--grant", plain))
    apply(database, "DROP TRIGGER pgtask_wake ON task")
    status, said = check(as_role(database, plain))
    assert (status, f"user {plain} may not alter public.task, which is not its own" in said) == (2, True), said


def test_create_switched_off_leaves_the_master_waiting_for_the_dba(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--no-create", database.conninfo, wait=False)
    one.may_log_errors = True
    one.wait_log("ERROR .*table_down.*create is false")
    apply(database, pgtask_sql("--owner", database.user))
    one.wait_log("leading")
    assert database.wait(database.insert("SELECT 1"))["state"] == "DONE"


# --check


def test_check_prints_what_would_change_and_changes_nothing(database: Database) -> None:
    status, said = check(database.conninfo)
    assert status == 0
    assert "would create table public.task" in said
    assert database.execute("SELECT to_regclass('task')::text") == [(None,)]
    install(database)
    status, said = check(database.conninfo)
    assert (status, "nothing to change" in said) == (0, True)
    database.execute("DROP INDEX task_due")
    assert "would create index task_due" in check(database.conninfo)[1]


def test_check_of_a_refused_table_says_why_and_ends_with_2(database: Database) -> None:
    database.execute("CREATE VIEW task AS SELECT 1")
    status, said = check(database.conninfo)
    assert status == 2
    assert "public.task is not a table" in said


def test_check_of_a_table_that_may_not_be_created_ends_with_2(database: Database) -> None:
    status, said = check("--no-create", database.conninfo)
    assert status == 2
    assert "create is false" in said


def test_check_goes_through_every_table_though_one_server_is_down(database: Database) -> None:
    status, said = check("host=127.0.0.1 port=1 dbname=nowhere user=nobody password=hush", database.conninfo)
    assert status == 2
    assert "wrong" in said and "refused" in said and "hush" not in said
    assert "would create table public.task" in said


def test_check_says_that_role_and_database_would_be_made(database: Database) -> None:
    wanted = database.server.conninfo("not there", "nor he")
    status, said = check("--maintenance", database.admin, wanted)
    assert status == 0
    assert "would create role nor he" in said and "would create database not there" in said


@pytest.mark.parametrize("setting", ["log", "pidfile"])
def test_check_says_that_a_file_cannot_be_written(database: Database, tmp_path: Path, setting: str) -> None:
    file = tmp_path / "check.toml"
    file.write_text(f'[master]\n{setting} = "/proc/none/file"\n[[database]]\nconninfo = "{database.conninfo}"\n')
    done = subprocess.run(
        [sys.executable, "-m", "pgtask", "--config", str(file), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "wrong: /proc/none/file cannot be written" in done.stdout
