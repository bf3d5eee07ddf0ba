"""`pgtask sql` for a DBA who creates the objects himself, and what a master does that may create nothing."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgtask.schema import Refused
from tests.fixtures.catalog import install, snapshot
from tests.fixtures.database import Database
from tests.fixtures.master import ROOT, Master
from tests.unit.test_cli import USER, refused

PGTASK = "from pgtask.user.commands import user; user()"


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
    with pytest.raises(Refused, match=r"the default of timeout.* apply what pgtask sql --upgrade prints"):
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


def test_right_to_a_small_table_that_the_master_lacks_is_said_with_what_grants_it(
    database: Database, plain: str
) -> None:
    apply(database, pgtask_sql("--grant", plain))
    apply(database, f'REVOKE UPDATE ON task_held FROM "{plain}"')
    status, said = check(as_role(database, plain))
    assert status == 2
    assert "permission denied for table task_held; the rights it needs are at the end of: pgtask sql" in said


def test_create_switched_off_leaves_the_master_waiting_for_the_dba(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--no-create", database.conninfo, wait=False)
    one.may_log_errors = True
    one.wait_log("ERROR .*table_down.*create is false")
    apply(database, pgtask_sql("--owner", database.user))
    one.wait_log("leading")
    assert database.wait(database.insert("SELECT 1"))["state"] == "DONE"


def test_script_for_a_table_that_nobody_wakes(database: Database) -> None:
    wake = {**os.environ, "PGTASK_WAKE": "false"}
    command = [sys.executable, "-c", PGTASK, "sql", "--owner", database.user]
    apply(database, subprocess.run(command, cwd=ROOT, env=wake, check=True, capture_output=True, text=True).stdout)
    assert install(database, create=False, wake=False) == []


# --upgrade

OLD = """
    CREATE TYPE state AS ENUM ('PLAN', 'GONE', 'TAKE', 'WORK', 'DONE', 'FAIL', 'STOP');
    CREATE TABLE task (id bigserial PRIMARY KEY, plan timestamptz NOT NULL DEFAULT now(), mine text,
        state state NOT NULL DEFAULT 'PLAN', input text NOT NULL, null_ text);
    CREATE INDEX task_input_idx ON task (input);
    INSERT INTO task (input) VALUES ('SELECT 7')"""


def test_upgrade_brings_the_table_to_what_a_master_makes_of_it(
    database: Database, new_database: Callable[..., Database]
) -> None:
    other = new_database()
    for one in (database, other):
        one.execute(OLD)
    script = pgtask_sql("--upgrade", "-d", database.admin)
    assert database.execute("SELECT count(*)::int FROM pg_attribute WHERE attrelid = 'task'::regclass") == [(12,)]
    apply(database, script)
    install(other)
    assert snapshot(database) == snapshot(other)
    assert install(database, create=False) == []
    assert pgtask_sql("--upgrade", "-d", database.admin) == "-- Task table public.task is as it should be.\n"


KEPT = ("relations", "indexes", "triggers", "functions", "labels")
"""What is the same again when a column has been dropped and added; its place is another."""


def test_upgrade_mends_only_what_is_wrong_and_gives_it_to_the_owner(
    database: Database, new_database: Callable[..., Database]
) -> None:
    other = new_database()
    for one in (database, other):
        install(one)
    database.execute("DROP TABLE task_report; DROP TRIGGER pgtask_wake ON task; DROP FUNCTION task_hold(text)")
    database.execute("DROP INDEX task_due; ALTER TABLE task DROP COLUMN notice, ALTER COLUMN timeout DROP DEFAULT")
    script = pgtask_sql("--upgrade", "-d", database.admin)
    assert "task_lane" not in script and "CREATE TYPE" not in script
    apply(database, script)
    mended, new = snapshot(database), snapshot(other)
    assert {kind: mended[kind] for kind in KEPT} == {kind: new[kind] for kind in KEPT}
    assert install(database, create=False) == []
    owner = "SELECT relowner::regrole::text FROM pg_class WHERE relname = 'task_report'"
    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname LIKE 'task%'"
    assert database.execute(f"{owner} UNION {owners}") == database.execute("SELECT quote_ident(current_user)")


def test_upgrade_brings_other_defaults_and_rights(database: Database, plain: str, tmp_path: Path) -> None:
    install(database)
    file = tmp_path / "pgtask.toml"
    file.write_text('[defaults]\ntimeout = "7 s"\n', "utf-8")
    apply(database, pgtask_sql("--upgrade", "--config", str(file), "-d", database.admin, "--grant", plain))
    assert install(database, create=False, defaults={"timeout": "7 s"}) == []
    assert install(database, create=False, defaults={"timeout": "7 s"}, conninfo=as_role(database, plain)) == []
    assert "as it should be" in pgtask_sql("--upgrade", "-d", database.admin)


def test_upgrade_of_what_is_not_there_or_cannot_be_upgraded_is_refused(database: Database) -> None:
    assert "there is no table public.task; without --upgrade" in refused_sql("-d", database.conninfo)
    assert "public.task: connection " in refused_sql("-d", make_conninfo(database.conninfo, port=1, password="hush"))
    database.execute("CREATE TABLE task (output int)")
    assert "column output of public.task has type integer" in refused_sql("-d", database.conninfo)


def refused_sql(*arguments: str) -> str:
    return refused(*USER, "sql", "--upgrade", *arguments)


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
