"""What the log, ps, the files and the messages of a master show to others on its machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import conninfo

from pgtask.errors import UserError
from pgtask.master import pidfile as pidfiles
from tests.fixtures.catalog import install
from tests.fixtures.daemons import Daemon
from tests.fixtures.database import Database
from tests.fixtures.locks import held
from tests.fixtures.master import ROOT, Master
from tests.fixtures.processes import processes, title
from tests.fixtures.wait import eventually

SECRET = "hunt' er\\2@x%:/?#y"
PIECES = ("hunt", "er\\2", "2@x", "#y", "er%5C2", "%23y")
LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (DEBUG|INFO|WARNING|ERROR) \[\d+\] [a-z_]+( |$)")
EVIL = "\n2030-01-01T00:00:00.000Z ERROR [1] forged\x1b[2J\x9b31m\u202e\r\u2028x"


def leaks(text: str) -> list[str]:
    return [piece for piece in PIECES if piece in text]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user would run it."""
    command = [sys.executable, "-m", "pgtask", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=60)


@pytest.fixture
def secretive(database: Database) -> Iterator[Database]:
    """Its role has an awkward password, which is asked for by TCP."""
    literal = psycopg.sql.Literal(SECRET).as_string(None)
    database.execute(f'ALTER ROLE "{database.user}" PASSWORD {literal}')
    database.password = SECRET
    yield database


def forms(database: Database, directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The same database, once for each way to give its password; and the environment that some of them need."""
    given = conninfo.conninfo_to_dict(database.tcp)
    bare = conninfo.make_conninfo("", **{name: value for name, value in given.items() if name != "password"})
    host, port, name = (str(given[key]) for key in ("host", "port", "dbname"))
    secret = quote(SECRET, safe="")
    passfile = directory / "passfile"
    escaped = SECRET.replace("\\", "\\\\").replace(":", "\\:")
    passfile.write_text(f"*:*:*:*:{escaped}\n", "utf-8")
    passfile.chmod(0o600)
    return {
        "quoted": database.tcp,
        "unquoted": f"{bare} password=" + re.sub(r"(['\\ ])", r"\\\1", SECRET),
        "uri": f"postgresql://{name}:{secret}@{host}:{port}/{name}",
        "parameter": f"postgresql://{host}:{port}/{name}?user={name}&pass%77ord={secret}",
        "passfile": conninfo.make_conninfo(bare, passfile=str(passfile)),
        "variable": bare,
    }, {"PGPASSWORD": SECRET}


def test_password_is_seen_nowhere_in_whatever_form_it_is_given(
    secretive: Database, master: Callable[..., Master], tmp_path: Path
) -> None:
    given, env = forms(secretive, tmp_path)
    on_the_line = given.pop("quoted")
    tables = [{"conninfo": text, "table": f"task_{name}"} for name, text in given.items()]
    for name in ("quoted", *given):
        install(secretive, table="task" if name == "quoted" else f"task_{name}")
    wrong = {"conninfo": on_the_line.replace("hunt", "hunt wrong"), "table": "task_wrong"}
    absent = {"conninfo": re.sub(r":\d+/", ":1/", given["uri"]), "table": "task_absent"}
    config = "\n".join(
        "[[database]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in one.items())
        for one in [*tables, wrong, absent]
    )
    one = master("--workers", "32", on_the_line, config=config, env=env, tables=len(given) + 1)
    one.wait_log("table_down", 2)
    running = []
    for table in ("task", *(str(entry["table"]) for entry in tables)):
        secretive.table = table
        secretive.wait(secretive.insert("SELECT 1/0"), "FAIL")
        running.append((table, secretive.insert("SELECT pg_sleep(60)", group="running")))
        secretive.wait(running[-1][1], "WORK")
    lines = [title(each.pid) for each in processes() if each.session == one.pid]
    assert sum(line.startswith("pgtask: worker") for line in lines) >= len(running)
    assert not leaks("".join(lines))
    seen = secretive.admin_execute("SELECT a::text FROM pg_stat_activity AS a WHERE datname = current_database()")
    assert not leaks(repr(seen))
    for table, id in running:
        assert not leaks(repr(secretive.execute(f"SELECT t::text FROM {table} AS t")))
        secretive.execute(f"DELETE FROM {table} WHERE id = %s", [id])
    secretive.table = "task"
    file = str(tmp_path / "master0.toml")
    for arguments in (["--check"], ["--print-config"]):
        done = run("--config", file, *arguments, on_the_line, env=env)
        assert done.stdout.count("task_") >= len(tables)
        assert not leaks(done.stdout + done.stderr)
    assert one.stop() == 0
    assert not leaks(one.log())


@pytest.mark.parametrize(("to", "format"), [("syslog", "text"), ("journal", "text"), ("file", "json")])
def test_failing_and_slow_tasks_are_told_without_their_secrets(
    secretive: Database, master: Callable[..., Master], daemon: Daemon, tmp_path: Path, to: str, format: str
) -> None:
    file = tmp_path / "it.log"

    def told() -> str:
        return file.read_text("utf-8") if to == "file" else b"\n".join(daemon.datagrams()).decode()

    def state_and_read(input: str, **columns: object) -> str:
        """How the task has ended; one by one, since the daemon's queue is short, and we may be slow to read."""
        row = secretive.wait(secretive.insert(input, delete=False, **columns))
        told()
        return str(row["state"])

    target = str(file) if to == "file" else f"{to}:{daemon.path}"
    literal = psycopg.sql.Literal(SECRET).as_string(None).removeprefix(" ")
    wrong = secretive.tcp.replace("hunt", "hunt wrong")
    with daemon.reading():
        level = ("--log-level", "info")
        one = master("--log", target, "--log-format", format, *level, "--slow-run", "1us", secretive.tcp, wait=False)
        eventually(lambda: file.exists() and "leading" in told() if to == "file" else "leading" in told())
        states = [
            state_and_read(input, **columns)
            for input, columns in [
                (f"SELECT {literal}", {}),  # slow, as all are here
                (f"SELECT {literal}, 1/0", {}),
                (f"ALTER ROLE no_such_role PASSWORD {literal}", {}),
                (f"DO $$BEGIN RAISE 'password=%', quote_literal({literal}); END$$", {}),
                (f"DO $$BEGIN RAISE 'no' USING DETAIL = {literal}, HINT = {literal}; END$$", {}),
                ("SELECT 1", {"remote": wrong}),
                ("SELECT 1", {"remote": wrong.replace("port=", "prot=")}),
                ("SELECT 1/0", {"remote": secretive.tcp, "group": f"password={literal}"}),
            ]
        ]
        assert states == ["DONE", *["FAIL"] * (len(states) - 1)]
        eventually(lambda: told().count("task_failed") >= len(states) - 1 and "task_slow" in told())
        assert one.stop() == 0
    assert not leaks(told())
    assert one.log() == ""


def test_conninfo_that_is_wrong_is_told_without_its_password() -> None:
    done = run("postgresql:/u:hunt%zz2@x@h/d")
    assert done.returncode == 2
    assert not leaks(done.stdout + done.stderr)
    assert len(done.stderr.splitlines()) == 1


# Files


@pytest.fixture
def no_mask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_log_and_pidfile_can_be_written_by_nobody_else(
    database: Database, master: Callable[..., Master], tmp_path: Path, no_mask: None
) -> None:
    log, pidfile = tmp_path / "it.log", tmp_path / "it.pid"
    one = master("--log", str(log), "--pidfile", str(pidfile), database.conninfo, wait=False)
    eventually(lambda: log.exists() and "leading" in log.read_text("utf-8"))
    assert log.stat().st_mode & 0o777 == 0o640
    assert pidfile.stat().st_mode & 0o777 == 0o644
    assert pidfile.read_text("utf-8") == f"{one.pid}\n"
    assert one.stop() == 0
    assert not pidfile.exists()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hardlink", "fifo"])
def test_pidfile_that_somebody_has_laid_out_is_refused_and_nothing_is_emptied(tmp_path: Path, kind: str) -> None:
    victim, pidfile = tmp_path / "victim", tmp_path / "it.pid"
    victim.write_text("precious", "utf-8")
    {
        "symlink": lambda: pidfile.symlink_to(victim),
        "dangling": lambda: pidfile.symlink_to(tmp_path / "nothing"),
        "hardlink": lambda: pidfile.hardlink_to(victim),
        "fifo": lambda: os.mkfifo(pidfile),
    }[kind]()
    with pytest.raises(UserError, match=f"^pidfile {pidfile}: is "), pidfiles.held(pidfile):
        pass
    assert victim.read_text("utf-8") == "precious"
    assert not (tmp_path / "nothing").exists()


# Lines that are not ours


def test_names_and_errors_cannot_forge_a_line_of_the_log_or_a_title(
    database: Database, master: Callable[..., Master]
) -> None:
    tables = [
        {"conninfo": database.conninfo, "table": f"task{EVIL}"},
        {"conninfo": conninfo.make_conninfo(database.conninfo, user=f"nobody{EVIL}"), "schema": f"no{EVIL}"},
    ]
    config = "\n".join(
        "[[database]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in tables
    )
    one = master(config=config, tables=1)
    one.may_log_errors = True  # the word is in the forged lines
    one.wait_log("table_down")
    database.table = f"task{EVIL}"
    quoted = psycopg.sql.Identifier(database.table).as_string(None)
    literal = psycopg.sql.Literal(f"refused{EVIL}").as_string(None).removeprefix(" ")
    database.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN RAISE EXCEPTION USING MESSAGE = {literal}; END$$"
    )
    database.execute(
        f"CREATE TRIGGER refuse BEFORE INSERT ON {quoted} FOR EACH ROW WHEN (NEW.parent IS NOT NULL)"
        " EXECUTE FUNCTION refuse()"
    )
    with held(database, 7):
        id = database.insert("SELECT pg_advisory_xact_lock(7)", group=f"group{EVIL}", repeat="1 year", delete=False)

        def titles() -> list[str]:
            found = [one.title(pid) for pid in (one.pid, *one.children())]
            return found if any(f" running {id} in group " in title for title in found) else []

        assert all(title.isprintable() for title in eventually(titles))
    database.wait(id, "DONE")
    one.wait_log("repeat_refused")
    assert one.stop() == 0
    log = one.log()
    wrong = [line for line in log.split("\n") if (line and not LINE.match(line)) or not line.isprintable()]
    assert not wrong
    assert not re.search(r"^2030", log, re.MULTILINE)
    database.table = "task"
