"""What the log tells of tasks that fail or are slow, wherever they run; and log daemons that come and go."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP
from typing import Any

import pytest

from tests.fixtures.daemons import Daemon
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, passes, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Start = Callable[..., Master]
INPUT = "SELECT 1/0 AS hunter2"


class Log:
    """The log of a master as a file of JSON lines."""

    def __init__(self, start: Start, database: Database, directory: Path, *arguments: str, **how: Any) -> None:
        self.file = directory / "json.log"
        to = ("--log", str(self.file), "--log-format", "json")
        self.master = start(*to, *arguments, database.conninfo, wait=False, **how)
        self.wait("leading")

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        lines = [json.loads(line) for line in self.file.read_text("utf-8").split("\n")[:-1]]
        return [line for line in lines if line["event"] == name and fields.items() <= line.items()]

    def wait(self, name: str, count: int = 1, **fields: object) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.events(name, **fields)
            return found if len(found) >= count else []

        return eventually(enough)


@pytest.fixture
def log(master: Start, database: Database, tmp_path: Path) -> Log:
    return Log(master, database, tmp_path)


# Tasks that fail


def test_failed_task_is_told_with_its_sqlstate_and_how_long_it_ran_never_its_input(
    log: Log, database: Database
) -> None:
    id = database.insert(INPUT, group="mail 1")
    database.wait(id, "FAIL")
    [line] = log.wait("task_failed")
    assert line.pop("time")
    assert line.pop("pid") != log.master.pid
    assert 0 < line.pop("ms") < 60_000
    assert line == {
        "level": "WARNING",
        "event": "task_failed",
        "id": id,
        "table": f"{database.user}@{database.name} public.task",
        "group": "mail 1",
        "code": "22012",
        "attempt": 1,
        "retried": False,
        "error": "ERROR:  division by zero",
    }
    for word in ("hunter2", "STATEMENT"):
        assert word not in log.file.read_text("utf-8")


def test_run_that_is_to_be_tried_again_is_told_as_such(log: Log, database: Database) -> None:
    id = database.insert("DO $$BEGIN RAISE 'no' USING ERRCODE = 'P0999'; END$$", retry=2, backoff="1ms")
    database.wait(id, "FAIL")
    lines = log.wait("task_failed", 3)
    assert [(line["attempt"], line["retried"], line["level"]) for line in lines] == [
        (1, True, "INFO"),
        (2, True, "INFO"),
        (3, False, "WARNING"),
    ]
    assert {line["code"] for line in lines} == {"P0999"}


def test_tasks_that_share_a_commit_are_told_one_by_one(log: Log, database: Database) -> None:
    query = """INSERT INTO task (input, batch, delete)
        SELECT CASE WHEN i % 3 = 1 THEN 'SELECT 1/0' ELSE 'SELECT 1' END, 50, false FROM generate_series(0, 29) AS i
        RETURNING id"""
    ids = [id for (id,) in database.execute(query)]
    states = {id: database.wait(id)["state"] for id in ids}
    failed = [id for id in ids if states[id] == "FAIL"]
    assert len(failed) == 10
    lines = log.wait("task_failed", 10)
    assert sorted(line["id"] for line in lines) == failed
    assert all(line["code"] == "22012" and line["ms"] > 0 for line in lines)
    # The worker says so after it has told who failed.
    eventually(lambda: any("together" in line for line in log.events("run_ended")))


def test_task_that_fails_at_its_commit_or_on_its_remote_or_in_time_is_told_too(log: Log, database: Database) -> None:
    database.execute("CREATE TABLE late (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    commit = database.insert("INSERT INTO late VALUES (1), (1)")
    remote = database.insert("SELECT 1/0", remote=database.tcp)
    with held(database):
        timeout = database.insert(WAIT, timeout="10ms", group="timeout")
        for id in (commit, remote, timeout):
            database.wait(id, "FAIL")
    lines = {line["id"]: line for line in log.wait("task_failed", 3)}
    assert {id: line["code"] for id, line in lines.items()} == {commit: "23505", remote: "22012", timeout: "57014"}
    assert lines[timeout]["ms"] >= 10


def test_task_whose_runs_are_lost_too_often_is_told(database: Database, master: Start, tmp_path: Path) -> None:
    log = Log(master, database, tmp_path, "--crashes", "0")
    id = database.insert("SELECT pg_terminate_backend(pg_backend_pid())", group="poison")
    database.wait(id, "FAIL")
    [line] = log.wait("task_failed", id=id)
    assert (line["error"], line["group"], line["attempt"]) == ("run lost 1 times", "poison", 1)
    log.wait("run_lost", id=id, failed=True)


def test_calendar_that_cannot_be_is_told(log: Log, database: Database) -> None:
    id = database.insert("SELECT 1", cron="0 0 31 2 *")
    database.wait(id, "FAIL")
    [line] = log.wait("task_failed")
    assert line["id"] == id
    assert "never" in line["error"]


def test_long_error_of_many_lines_is_told_by_the_beginning_of_its_first_line(log: Log, database: Database) -> None:
    text = "password=hunter2 " + "x" * 5000 + "\nsecond line"
    id = database.insert(f"DO $$BEGIN RAISE '{text}'; END$$")
    database.wait(id, "FAIL")
    [line] = log.wait("task_failed")
    assert line["error"].startswith("ERROR:  password=*** xxx")
    assert len(line["error"]) < 320
    assert "second" not in line["error"]


QUICKLY = """
import runpy, sys
import pgtask.telling
pgtask.telling.WINDOW = 1.0
sys.argv = ["pgtask-master", *sys.argv[4:]]
runpy.run_module("pgtask", run_name="__main__")
"""
"""A master for which a minute is a second."""


def test_storm_of_failing_tasks_is_told_in_part_and_the_rest_is_counted(
    database: Database, master: Start, tmp_path: Path
) -> None:
    log = Log(master, database, tmp_path, "--log-failed", "3", through=[sys.executable, "-c", QUICKLY])
    query = "INSERT INTO task (input, \"group\") SELECT 'SELECT 1/0', i % 5 FROM generate_series(1, 200) AS i"
    database.execute(query)
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'FAIL'") == [(200,)])

    def all_told() -> bool:
        lines = log.events("lines_left_out", of="task_failed", level="WARNING")
        # Of two that fail at the very same moment one may go uncounted.
        return len(log.events("task_failed")) + sum(line["count"] for line in lines) >= 190

    eventually(all_told)
    assert {line["pid"] for line in log.events("lines_left_out")} == {log.master.pid}
    assert len(log.events("task_failed")) < 100


def test_nothing_is_told_of_failing_tasks_where_that_is_not_wanted(
    database: Database, master: Start, tmp_path: Path
) -> None:
    log = Log(master, database, tmp_path, "--log-failed", "0")
    database.wait(database.insert(INPUT), "FAIL")
    log.wait("run_ended")
    assert not log.events("task_failed")
    assert not log.events("lines_left_out")


def test_what_was_left_out_is_told_at_the_end_at_the_latest(log: Log, database: Database) -> None:
    database.execute("INSERT INTO task (input) SELECT 'SELECT 1/0' FROM generate_series(1, 110)")
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'FAIL'") == [(110,)])
    assert log.master.stop() == 0
    [line] = log.events("lines_left_out")
    assert (len(log.events("task_failed")), line["of"], line["count"]) == (100, "task_failed", 10)


# What is slow


def test_slow_run_is_told_and_a_quick_one_is_not(database: Database, master: Start, tmp_path: Path) -> None:
    log = Log(master, database, tmp_path, "--slow-run", "200ms")
    quick = database.insert("SELECT 1", group="quick", delete=False)
    with held(database):
        slow = database.insert(WAIT, group="slow one")
        wait_runs(database)
        passes(0.2)
    database.wait(slow)
    [line] = log.wait("task_slow", id=slow)
    assert line["ms"] >= 200
    assert (line["level"], line["group"], line["attempt"], line["ok"]) == ("WARNING", "slow one", 1, True)
    database.wait(quick)
    assert not [line for line in log.events("task_slow", id=quick) if line["ms"] < 200]


def test_by_default_no_run_is_slow(log: Log, database: Database) -> None:
    database.wait(database.insert("SELECT pg_sleep(0.1)", delete=False))
    log.wait("run_ended")
    assert not log.events("task_slow")


def test_slow_take_is_told_once_in_a_while(database: Database, master: Start, tmp_path: Path) -> None:
    log = Log(master, database, tmp_path, "--slow-take", "0.001 ms")
    for _ in range(5):
        database.wait(database.insert("SELECT 1", delete=False))
    [line] = log.wait("take_slow")
    assert line["level"] == "WARNING"
    assert line["ms"] > 0
    assert line["tasks"] in (0, 1)


# Log daemons


@pytest.mark.parametrize("kind", ["syslog:local7", "journal"])
def test_master_and_workers_write_to_a_log_daemon_that_comes_and_goes(
    database: Database, master: Start, daemon: Daemon, kind: str
) -> None:
    def told(text: str) -> list[int]:
        """The processes that say so."""
        if kind == "journal":
            return [1 for entry in daemon.journal() if text in entry["MESSAGE"]]
        return [entry.pid for entry in daemon.syslog() if text in entry.text]

    with daemon.reading():
        to = ("--log", f"{kind}:{daemon.path}", "--log-level", "info")  # its queue is short, and we may be slow to read
        one = master(*to, "--linger", "1 min", database.conninfo, wait=False)
        eventually(lambda: told("leading"))
        id = database.insert("SELECT 1/0")
        database.wait(id, "FAIL")
        eventually(lambda: told(f"task_failed id={id} "))
        if kind != "journal":
            assert set(told("task_failed")) == set(one.workers())
    daemon.stop()
    one.signal(SIGHUP)
    lost = [database.insert("SELECT 1/0") for _ in range(3)]
    for id in lost:
        database.wait(id, "FAIL")
    # A worker commits, then logs, then says that it is idle.
    eventually(lambda: all(one.title(worker).endswith(" idle") for worker in one.workers()))
    daemon.start()
    with daemon.reading():
        id = database.insert("SELECT 1/0")
        database.wait(id, "FAIL")
        eventually(lambda: told("log_writable_again") and told(f"task_failed id={id} "))
        assert not any(told(f"task_failed id={id} ") for id in lost)
        assert one.stop() == 0
        assert told("master_stopped how=TERM")
    assert one.log() == "", "what cannot be written goes nowhere else"


def test_tasks_go_on_while_the_log_daemon_hangs(database: Database, master: Start, daemon: Daemon) -> None:
    with daemon.reading():
        one = master("--log", f"syslog:{daemon.path}", "--linger", "1 min", database.conninfo, wait=False)
        eventually(lambda: "(1 table leading," in one.title())
    database.execute("INSERT INTO task (input) SELECT 'SELECT 1' FROM generate_series(1, 1000)")  # 2000 lines
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)])
    daemon.datagrams()  # so that there is room for the last words
    with daemon.reading():
        assert one.stop() == 0
        said = [entry.text for entry in daemon.syslog()]
    runs = sum(" run_begun " in text or " run_ended " in text for text in said)
    lost = sum(int(text.split("lost=")[1]) for text in said if "log_writable_again" in text)
    assert lost > 0
    assert runs + lost >= 2000


def test_log_moves_to_another_destination_at_a_reload(
    database: Database, master: Start, daemon: Daemon, tmp_path: Path
) -> None:
    config = f'[master]\nlog = "{tmp_path}/one.log"\n[[database]]\nconninfo = "{database.conninfo}"\n'
    one = master(config=config, wait=False)
    eventually(lambda: (tmp_path / "one.log").exists() and "leading" in (tmp_path / "one.log").read_text("utf-8"))
    file = tmp_path / "master0.toml"
    with daemon.reading():
        file.write_text(config.replace(f"{tmp_path}/one.log", f"journal:{daemon.path}"), "utf-8")
        one.signal(SIGHUP)
        eventually(lambda: [entry for entry in daemon.journal() if entry["PGTASK_EVENT"] == "reloaded"])
        id = database.insert("SELECT 1/0")
        database.wait(id, "FAIL")
        eventually(lambda: [entry for entry in daemon.journal() if entry.get("PGTASK_ID") == str(id)])
        file.write_text(config.replace(f"{tmp_path}/one.log", "syslog:lokal1"), "utf-8")
        one.signal(SIGHUP)
        one.may_log_errors = True
        [refused] = eventually(
            lambda: [entry for entry in daemon.journal() if entry["PGTASK_EVENT"] == "reload_refused"]
        )
    assert 'no facility "lokal1"' in refused["PGTASK_ERROR"]
