"""`pgtask import-cron` against the real pg_cron, where it is installed."""

from collections.abc import Callable

import psycopg
import pytest

from pgtask import embedded
from pgtask.user import import_cron
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.server import AnyServer
from tests.unit.test_cli import USER, call, refused


@pytest.fixture
def source(
    server: AnyServer, new_server: Callable[..., embedded.Server], new_database: Callable[..., Database]
) -> Database:
    """A database with pg_cron, and a task table that nobody serves."""
    with psycopg.connect(server.conninfo()) as session:
        if not session.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'pg_cron'").fetchall():
            pytest.skip(f"pg_cron is not installed for PostgreSQL {server.version}: postgresql-{server.version}-cron")
    name = "cron_source"
    own = new_server(**{"shared_preload_libraries": "pg_cron", "cron.database_name": name})
    database = new_database(on=own, name=name)
    database.admin_execute("CREATE EXTENSION pg_cron")
    database.admin_execute(f"GRANT USAGE ON SCHEMA cron TO {name}")
    install(database)
    return database


def job(database: Database, schedule: str, command: str, name: str | None = None) -> int:
    """The id of a new one, which is the role's own."""
    if name is None:
        return database.execute("SELECT cron.schedule(%s, %s)", [schedule, command])[0][0]
    return database.execute("SELECT cron.schedule(%s, %s, %s)", [name, schedule, command])[0][0]


def imported(database: Database, *options: str) -> list[str]:
    done = call(*USER, "import-cron", "-d", database.conninfo, *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_jobs_of_pg_cron_become_schedules_and_stay_there(source: Database) -> None:
    nightly = job(source, "0 3 * * *", "CALL night()", "nightly")
    nameless = job(source, "*/5 9-17 1 * 1-5", "SELECT 2")
    before = source.execute("SELECT * FROM cron.job ORDER BY jobid")
    assert imported(source, "--dry-run") == [
        f"would be scheduled: nightly (job {nightly}): 0 3 * * * in GMT",
        f"would be scheduled: cron job {nameless} (job {nameless}): */5 9-17 1 * 1-5 in GMT",
    ]
    assert source.tasks() == []
    lines = imported(source)
    rows = source.tasks()
    assert lines == [
        f"scheduled as task {rows[0]['id']}: nightly (job {nightly}): 0 3 * * * in GMT",
        f"scheduled as task {rows[1]['id']}: cron job {nameless} (job {nameless}): */5 9-17 1 * 1-5 in GMT",
        "pg_cron runs them too until it is told not to:",
        f"SELECT cron.unschedule({nightly});",
        f"SELECT cron.unschedule({nameless});",
    ]
    names = ("key", "group", "cron", "zone", "input", "repeat")
    assert [tuple(str(row[name]) for name in names) for row in rows] == [
        ("nightly", "nightly", "0 3 * * *", "GMT", "CALL night()", "0:00:00"),
        (f"cron job {nameless}", f"cron job {nameless}", "*/5 9-17 1 * 1-5", "GMT", "SELECT 2", "0:00:00"),
    ]
    assert imported(source) == lines
    assert [row["id"] for row in source.tasks()] == [row["id"] for row in rows]
    assert source.execute("SELECT * FROM cron.job ORDER BY jobid") == before


def test_what_cannot_be_carried_over_is_said(source: Database) -> None:
    for name in ("off", "elsewhere", "other database", "other role"):
        job(source, "@daily", "SELECT 1", name)
    source.admin_execute(
        """
        UPDATE cron.job SET active = jobname <> 'off',
            nodename = CASE WHEN jobname = 'elsewhere' THEN 'db7' ELSE 'localhost' END,
            database = CASE WHEN jobname = 'other database' THEN 'crm' ELSE database END,
            username = CASE WHEN jobname = 'other role' THEN 'postgres' ELSE username END
        """
    )
    job(source, "@reboot", "SELECT 1", "at the start")
    assert [line.split(": ", 2)[2] for line in imported(source, "--from", source.admin)] == [
        "it is not active",
        "it runs on db7: insert a task with that as remote",
        "it runs in database crm: import it there",
        f"it runs as postgres, here it would as {source.user}: import it as that role, or with --anyone",
        'cron "@reboot" is none of @yearly, @annually, @monthly, @weekly, @daily, @midnight, @hourly',
    ]
    assert source.tasks() == []
    admin = call(*USER, "import-cron", "-d", source.conninfo, "--from", source.admin, "--anyone")
    assert [row["key"] for row in source.tasks()] == ["other role"]
    assert "scheduled as task" in admin.stdout


def test_role_sees_its_own_jobs_and_a_database_without_pg_cron_is_said(source: Database) -> None:
    source.admin_execute("SELECT cron.schedule('of the superuser', '@daily', 'SELECT 1')")
    assert imported(source) == []
    other = source.server.conninfo("postgres")
    message = refused(*USER, "import-cron", "-d", source.conninfo, "--from", other)
    assert message == "pgtask: database postgres has no pg_cron; name the one that has with --from CONNINFO"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("0 3 $ * *", "0 3 L * *"), ("0  3\t*  * 1", "0 3 * * 1"), ("@daily", "@daily"), ("5 seconds", "5 seconds")],
)
def test_schedule_of_pg_cron_in_our_words(theirs: str, ours: str) -> None:
    assert import_cron.expression(theirs) == ours


def test_jobs_of_a_newer_pg_cron_are_read_as_they_are_laid_out(database: Database) -> None:
    """Seconds and a zone are newer than what Debian 12 has: the same table, filled by hand."""
    install(database)
    database.execute(
        """
        CREATE SCHEMA cron;
        CREATE TABLE cron.job (jobid bigint, schedule text, command text, nodename text DEFAULT 'localhost',
            nodeport int DEFAULT 5432, database text DEFAULT current_database(), username text DEFAULT current_user,
            active boolean DEFAULT true, jobname text);
        INSERT INTO cron.job (jobid, schedule, command, jobname) VALUES (1, '30 seconds', 'SELECT 1', 'often'),
            (2, '0 3 $ * *', 'SELECT 2', 'last day'), (3, '@daily', 'SELECT 3', 'last day');
        """
    )
    database.admin_execute(f"ALTER DATABASE {database.name} SET \"cron.timezone\" = 'Europe/Berlin'")
    lines = imported(database)
    assert lines[2] == "left out: last day (job 3): job 2 has that name too"
    rows = database.tasks()
    assert [(row["cron"], row["zone"], row["repeat"].total_seconds()) for row in rows] == [
        (None, None, 30), ("0 3 L * *", "Europe/Berlin", 0),
    ]  # fmt: skip


def test_nothing_is_read_from_a_server_that_is_not_there() -> None:
    assert "port 1" in refused(*USER, "import-cron", "-d", "host=127.0.0.1 port=1 dbname=x user=y")


def test_error_of_the_database_is_one_line(database: Database) -> None:
    with pytest.raises(psycopg.Error):
        database.execute("SELECT * FROM cron.job")
    assert "has no pg_cron" in refused(*USER, "import-cron", "-d", database.conninfo)
