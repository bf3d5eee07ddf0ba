"""What each signal does to a master with tasks in hand, and to a single worker."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, Signals

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held
from tests.fixtures.master import Master
from tests.fixtures.patient import patient
from tests.fixtures.processes import processes
from tests.fixtures.wait import eventually


def ours(database: Database) -> list[tuple[object, ...]]:
    """Sessions of the master or its workers in this database."""
    query = "SELECT pid, query FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'pgtask%%'"
    return database.admin_execute(query, [database.name])


def long_run(database: Database, input: str = "SELECT pg_sleep(600)", **columns: object) -> int:
    id = database.insert(input, **{"delete": False, **columns})
    database.wait_running(id)
    return id


def is_quick(since: float) -> None:
    """Nobody waited for a run, nor for `stop_timeout`, which is 30 s."""
    assert time.monotonic() - since < 25


def is_back(database: Database, id: int) -> bool:
    row = database.task(id)
    assert row is not None
    return (row["state"], row["attempt"], row["pid"], row["start"], row["error"]) == ("PLAN", 0, None, None, None)


def warm(database: Database) -> bool:
    """Does a session wait for a worker?"""
    query = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgtask warm'"
    return bool(database.admin_execute(query, [database.name]))


def test_term_lets_runs_end_and_takes_nothing_more(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    with held(database):
        id = long_run(database, WAIT)
        waiting = database.insert("SELECT 1")
        eventually(lambda: warm(database))
        one.signal(SIGTERM)
        one.wait_log("stopping")
        eventually(lambda: not warm(database))  # it says so first, and then tells the workers
        late = database.insert("SELECT 1", group="other")
    assert one.process.wait(20) == 0
    assert database.wait(id)["state"] == "DONE"
    assert is_back(database, waiting)
    assert is_back(database, late)
    eventually(lambda: ours(database) == [])


@pytest.mark.parametrize("sig", [SIGTERM, SIGINT, SIGQUIT])
def test_signal_ends_an_idle_master_at_once(database: Database, master: Callable[..., Master], sig: Signals) -> None:
    one = master("--spare", "1", "--linger", "20s", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    since = time.monotonic()
    assert one.stop(sig) == 0
    is_quick(since)
    eventually(lambda: ours(database) == [])


def test_run_longer_than_stop_timeout_is_cancelled_and_costs_no_attempt(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--stop-timeout", "500ms", database.conninfo, tables=1, through=patient())
    ids = [long_run(database, group=f"g{n}") for n in range(3)]
    since = time.monotonic()
    assert one.stop(SIGTERM) == 0
    assert time.monotonic() - since >= 0.5
    is_quick(since)
    assert all(is_back(database, id) for id in ids)
    eventually(lambda: ours(database) == [])


def test_int_cancels_at_once_and_costs_no_attempt(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo, through=patient())
    ids = [long_run(database, group=f"g{n}") for n in range(3)]
    since = time.monotonic()
    assert one.stop(SIGINT) == 0
    is_quick(since)
    assert all(is_back(database, id) for id in ids)
    eventually(lambda: ours(database) == [])


def test_run_that_catches_the_cancel_is_ended_and_its_row_is_not_left_in_work(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo, through=patient(grace=1.5))
    one.may_log_errors = True
    id = long_run(database)
    database.execute("DELETE FROM task WHERE id = %s", [id])
    stubborn = database.insert(
        "DO $$BEGIN LOOP BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END$$",
        group="stubborn",
    )
    database.wait_running(stubborn)
    since = time.monotonic()
    assert one.stop(SIGINT) == 0
    is_quick(since)
    row = database.task(stubborn)
    assert row is not None
    assert row["state"] == "PLAN"
    eventually(lambda: ours(database) == [])


def test_harsher_signal_cuts_a_gentle_stop_short(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo, through=patient())
    id = long_run(database)
    one.signal(SIGTERM)
    one.wait_log("stopping signal=TERM")
    assert one.stop(SIGINT) == 0
    assert is_back(database, id)


def test_gentler_or_repeated_signal_changes_nothing(database: Database, master: Callable[..., Master]) -> None:
    one = master("--stop-timeout", "60s", database.conninfo, tables=1)
    with held(database):
        id = long_run(database, WAIT)
        one.signal(SIGTERM)
        one.wait_log("stopping")
        one.signal(SIGTERM)
        one.signal(SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            one.process.wait(0.3)
    assert one.process.wait(20) == 0
    assert database.wait(id)["state"] == "DONE"
    assert len(one.logged("stopping")) == 1


def test_quit_leaves_at_once_and_workers_record_their_runs_by_themselves(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    with held(database):
        id = long_run(database, WAIT)
        worker = one.worker("running")
        assert one.stop(SIGQUIT) == 0
        assert database.task(id)["state"] == "WORK"  # type: ignore[index]
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    eventually(lambda: worker not in {p.pid for p in processes() if p.state != "Z"})


def test_quit_during_a_gentle_stop_leaves_at_once(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    with held(database):
        id = long_run(database, WAIT)
        one.signal(SIGTERM)
        one.wait_log("stopping")
        since = time.monotonic()
        assert one.stop(SIGQUIT) == 0
        is_quick(since)
    assert database.wait(id)["state"] == "DONE"


def test_ctrl_c_of_the_whole_process_group_is_a_clean_stop(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo, through=patient())
    ids = [long_run(database, group=f"g{n}") for n in range(3)]
    os.killpg(one.pid, SIGINT)
    assert one.process.wait(20) == 0
    assert all(is_back(database, id) for id in ids)
    assert one.logged("ERROR|Traceback|run_lost") == []


def test_stop_while_workers_are_being_forked_loses_nothing(database: Database, master: Callable[..., Master]) -> None:
    for sig in (SIGTERM, SIGINT):
        one = master(database.conninfo, through=patient())
        database.execute(
            'INSERT INTO task (input, "group", delete)'
            " SELECT 'SELECT 1', n::text, false FROM generate_series(1, 40) AS n"
        )
        one.wait_log("worker_forked")
        assert one.stop(sig) == 0
        assert {row["state"] for row in database.tasks()} <= {"PLAN", "DONE"}
        assert {row["attempt"] for row in database.tasks("state = 'PLAN'")} <= {0}
        assert one.logged("ERROR|run_lost|workers_cannot_open") == []


def test_worker_that_is_killed_during_a_stop_delays_it_by_nothing_and_its_row_is_rescued(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    id = long_run(database)
    worker = one.worker("running")
    one.signal(SIGTERM)
    one.wait_log("stopping")
    os.kill(worker, SIGKILL)
    since = time.monotonic()
    assert one.process.wait(20) == 0
    is_quick(since)
    row = database.task(id)
    assert row is not None
    assert (row["state"], row["attempt"]) == ("PLAN", 1)
    assert row["error"].startswith("LOST:  run 1 of ")


def test_stop_while_workers_end_is_clean(database: Database, master: Callable[..., Master]) -> None:
    for _ in range(2):
        one = master("--linger", "0", database.conninfo, tables=1, through=patient())
        ids = [database.insert("SELECT 1", group=f"g{n}", delete=False) for n in range(10)]
        for id in ids:
            database.wait(id)
        assert one.stop(SIGINT) == 0


def test_stop_does_not_wait_for_a_server_that_does_not_answer(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("host=192.0.2.1 dbname=nowhere user=nobody", wait=False)
    one.wait_log("master_started")
    since = time.monotonic()
    assert one.stop(SIGTERM) == 0
    is_quick(since)


def test_term_to_a_worker_ends_it_after_its_run(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    with held(database):
        id = long_run(database, WAIT)
        following = database.insert("SELECT 1", delete=False)
        worker = one.worker("running")
        os.kill(worker, SIGTERM)
    first, second = database.wait(id), database.wait(following)
    assert (first["state"], second["state"]) == ("DONE", "DONE")
    assert first["pid"] != second["pid"]
    one.wait_log(rf"worker_ended worker={worker} .*exit status 0")


def test_term_to_an_idle_worker_ends_it(database: Database, master: Callable[..., Master]) -> None:
    one = master("--linger", "20s", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    worker = one.worker("idle")
    os.kill(worker, SIGTERM)
    one.wait_log(rf"worker_ended worker={worker} .*exit status 0")


def entry(database: Database, more: str = "") -> str:
    return f'[[database]]\nconninfo = "{database.conninfo}"\n{more}\n'


def test_reload_adds_removes_and_changes_tables_without_touching_runs(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master], tmp_path: Path
) -> None:
    second, third = new_database(), new_database()
    one = master(config=entry(database) + entry(second))
    file = tmp_path / "master0.toml"
    with held(database), held(second):
        here, there = long_run(database, WAIT), long_run(second, WAIT)
        file.write_text(entry(database, "run = 7") + entry(third))
        one.signal(SIGHUP)
        one.wait_log("reloaded tables=2")
        one.wait_log(f"leading .*{third.name}")
        assert third.wait(third.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert len(one.logged("table_changed")) == len(one.logged("table_removed")) == len(one.logged("table_added")) == 1
    for place, id in ((database, here), (second, there)):
        row = place.wait(id)
        assert (row["state"], row["attempt"]) == ("DONE", 1)
    eventually(lambda: ours(second) == [])
    unserved = second.insert("SELECT 1", delete=False)
    file.write_text(entry(database) + entry(second))
    one.signal(SIGHUP)
    assert second.wait(unserved)["state"] == "DONE"
    one.wait_log("reloaded tables=2", 2)


def test_table_that_is_removed_and_added_while_its_run_goes_on_is_served_again(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master], tmp_path: Path
) -> None:
    second = new_database()
    one = master(config=entry(database) + entry(second))
    file = tmp_path / "master0.toml"
    with held(second):
        id = long_run(second, WAIT)
        for text, count in ((entry(database), 1), (entry(database) + entry(second), 2)):
            file.write_text(text)
            one.signal(SIGHUP)
            one.wait_log("reloaded", count)
        later = second.insert("SELECT 1", delete=False)
    assert second.wait(later)["state"] == "DONE"
    assert second.wait(id)["attempt"] == 1


def test_bad_file_changes_nothing(database: Database, master: Callable[..., Master], tmp_path: Path) -> None:
    one = master(config=entry(database))
    one.may_log_errors = True
    file = tmp_path / "master0.toml"
    with held(database):
        id = long_run(database, WAIT)
        bad = ("nonsense", "[master]\nworker = 3\n", '[master]\nlog = "/nowhere/at/all"\n', None)
        for count, text in enumerate(bad, 1):
            file.write_text(text) if text else file.unlink()
            one.signal(SIGHUP)
            one.wait_log("reload_refused", count)
    assert one.logged("reloaded|table_removed|table_changed") == []
    assert database.wait(id)["state"] == "DONE"
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"


def test_reload_with_fewer_workers_and_spares_bounds_what_comes(
    database: Database, master: Callable[..., Master], tmp_path: Path
) -> None:
    one = master(config="[master]\nspare = 3\nlinger = 0\n" + entry(database))
    eventually(lambda: len(one.workers()) == 3)
    (tmp_path / "master0.toml").write_text("[master]\nspare = 1\nworkers = 1\nlinger = 0\n" + entry(database))
    one.signal(SIGHUP)
    one.wait_log("reloaded")
    eventually(lambda: len(one.workers()) == 1)
    ids = [database.insert("SELECT pg_sleep(0.2)", group=f"g{n}", delete=False) for n in range(3)]
    rows = sorted((database.wait(id) for id in ids), key=lambda row: row["start"])
    assert all(rows[n]["stop"] <= rows[n + 1]["start"] for n in range(2))


def test_usr1_opens_the_log_anew_after_it_was_moved(
    database: Database, master: Callable[..., Master], tmp_path: Path
) -> None:
    file = tmp_path / "own.log"
    one = master("--log", str(file), database.conninfo, wait=False)
    eventually(lambda: file.exists() and "leading" in file.read_text())
    file.rename(tmp_path / "own.log.1")
    one.signal(SIGUSR1)
    eventually(file.exists)
    database.wait(database.insert("SELECT 1", delete=False))
    eventually(lambda: " worker_forked " in file.read_text())
    assert "worker_forked" not in (tmp_path / "own.log.1").read_text()
