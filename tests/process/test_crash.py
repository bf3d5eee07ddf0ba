"""Nothing is lost: workers, backends and masters are killed in the middle of their work."""

import contextlib
import os
import time
from collections.abc import Callable
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP
from typing import Any

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.processes import processes
from tests.fixtures.wait import eventually

ONCE = (
    "SELECT CASE WHEN (SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint) = 1"
    " THEN pg_sleep(600) END"
)
"""The first run is long, to be killed; the next one ends at once."""


def backend(database: Database, pid: int) -> bool:
    return database.admin_execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]) == [(1,)]


def test_worker_killed_while_running_is_noticed_at_once_and_its_task_runs_again(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    id = database.insert(ONCE, delete=False)
    pid = database.wait(id, "WORK")["pid"]
    worker = one.worker("running")
    os.kill(worker, SIGKILL)
    one.wait_log(rf"worker_ended worker={worker} .*SIGKILL")
    row = database.wait(id)  # a look for what was lost comes every hour
    assert (row["state"], row["attempt"], row["error"]) == ("DONE", 2, None)
    assert row["pid"] != pid
    assert not backend(database, pid)
    eventually(lambda: one.children() == one.workers())


def test_lost_run_is_told_in_the_row_while_it_waits_and_runs_again(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    id = database.insert("SELECT pg_sleep(60)", delete=False)
    database.wait(id, "WORK")
    worker = one.worker("running")
    os.kill(worker, SIGKILL)
    row = eventually(lambda: (r := database.task(id)) and r["state"] == "WORK" and r["attempt"] == 2 and r)
    assert row["error"].startswith("LOST:  run 1 of 2")
    assert row["error"].endswith(f"worker {worker}: killed by SIGKILL")
    one.wait_log(rf"run_lost .*id={id} times=1 failed=false")
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    eventually(lambda: database.task(id)["stop"])  # type: ignore[index]


def test_run_is_not_rescued_before_the_backend_of_the_dead_worker_is_gone(
    own_database: Database, master: Callable[..., Master]
) -> None:
    database = own_database
    one = master(database.conninfo)
    one.may_log_errors = True
    id = database.insert(ONCE, delete=False)
    pid = database.wait(id, "WORK")["pid"]
    worker = one.worker("running")
    os.kill(pid, SIGSTOP)  # it cannot even hear that it is terminated
    os.kill(worker, SIGKILL)
    one.wait_log("worker_ended .*SIGKILL")
    polls = database.connect()
    since = time.monotonic()
    while time.monotonic() - since < 1:
        state, attempt, owner = polls.execute("SELECT state, attempt, pid FROM task").fetchone()  # type: ignore[misc]
        assert (state, attempt, owner) == ("WORK", 1, pid)
    os.kill(pid, SIGCONT)
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 2)


def test_backend_of_a_dead_worker_is_ended_under_whatever_name_its_task_gave_it(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    id = database.insert(
        f"SET application_name = 'other'; SET client_connection_check_interval = 0; {ONCE}", delete=False
    )
    database.wait(id, "WORK")
    eventually(lambda: database.admin_execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'other'"))
    os.kill(one.worker("running"), SIGKILL)
    assert database.wait(id)["state"] == "DONE"


def test_session_of_somebody_else_is_not_ended_with_a_dead_worker(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    mine = database.connect()
    id = database.insert(ONCE, delete=False)
    database.wait(id, "WORK")
    os.kill(one.worker("running"), SIGKILL)
    database.wait(id)
    assert mine.execute("SELECT 1").fetchone() == (1,)


def test_task_that_is_lost_too_often_fails_with_the_whole_story(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--crashes", "2", database.conninfo, tables=1)
    id = database.insert("SELECT pg_sleep(0.05),\npg_terminate_backend(pg_backend_pid())", delete=False)
    after = database.insert("SELECT 1", delete=False)
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("FAIL", 3)
    lines = row["error"].splitlines()
    assert lines[0] == "ERROR:  run lost 3 times"
    assert [line.split(" of ")[0] for line in lines if line.startswith("LOST:")] == [
        f"LOST:  run {n}" for n in (1, 2, 3)
    ]
    assert "terminating connection due to administrator command" in row["error"]
    assert lines[-2:] == ["STATEMENT:  SELECT pg_sleep(0.05),", "\tpg_terminate_backend(pg_backend_pid())"]
    assert row["stop"] >= row["start"]
    assert database.wait(after)["state"] == "DONE"
    assert len(one.logged("run_lost")) == 3


def test_repeated_task_that_is_lost_too_often_goes_on_with_its_next_row(
    database: Database, master: Callable[..., Master]
) -> None:
    master("--crashes", "0", database.conninfo, tables=1)
    id = database.insert("SELECT pg_terminate_backend(pg_backend_pid())", repeat="1 day", delete=False)
    assert database.wait(id)["state"] == "FAIL"
    eventually(lambda: [r["state"] for r in database.tasks(f"parent = {id}")] == ["PLAN"])


def test_next_row_that_is_refused_after_lost_runs_costs_the_master_nothing_but_a_line(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--crashes", "0", database.conninfo, tables=1)
    one.may_log_errors = True
    database.execute("ALTER TABLE task ADD CONSTRAINT mine CHECK (parent IS NULL)")
    id = database.insert("SELECT pg_terminate_backend(pg_backend_pid())", repeat="1 day", delete=False)
    assert database.wait(id)["state"] == "FAIL"
    assert "mine" in one.wait_log("repeat_refused")[0]
    for _ in range(2):
        assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert not one.logged("table_down|table_unstable")


def test_story_of_lost_runs_is_forgotten_when_a_run_ends_well(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    id = database.insert(ONCE, delete=False)
    database.wait(id, "WORK")
    os.kill(one.worker("running"), SIGKILL)
    row = database.wait(id)
    assert (row["state"], row["error"], row["code"], row["attempt"]) == ("DONE", None, None, 2)


@pytest.mark.parametrize("how", ["pg_terminate_backend", "kill -9"])
def test_backend_that_is_ended_in_the_middle_of_a_statement_costs_one_run(
    own_database: Database, master: Callable[..., Master], how: str
) -> None:
    database = own_database
    one = master(database.conninfo)
    id = database.insert(ONCE, delete=False)
    pid = database.wait_running(id)["pid"]
    if how == "kill -9":  # the server then ends every session and recovers
        os.kill(pid, SIGKILL)
    else:
        database.admin_execute("SELECT pg_terminate_backend(%s)", [pid])
    row = eventually(lambda: ended_as_far_as_known(database, id))
    assert (row["state"], row["attempt"]) == ("DONE", 2)
    assert one.process.poll() is None


def ended_as_far_as_known(database: Database, id: int) -> dict[str, Any]:
    """The row once it has ended; {} while it has not, or while the server is recovering."""
    try:
        row = database.task(id)
    except psycopg.OperationalError:
        database.close()
        return {}
    return row if row and row["state"] in ("DONE", "FAIL") else {}


def test_master_whose_session_is_ended_connects_again_and_disturbs_no_run(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--linger", "1min", database.conninfo, tables=1)
    with held(database):
        id = database.insert(WAIT, delete=False)
        worker = one.worker("running")
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'pgtask master' AND datname = %s"
        )
        assert database.admin_execute(query, [database.name]) == [(True,)]
        one.wait_log("leading", 2)
        other = database.insert("SELECT 1", group="other", delete=False)
        assert database.wait(other)["state"] == "DONE"
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    assert worker in one.workers()
    assert len(one.logged("table_down")) == 1
    following = database.insert("SELECT 1", delete=False)
    assert database.wait(following)["state"] == "DONE"


def test_workers_of_a_killed_master_end_their_run_record_it_and_exit(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.expect_exit = -SIGKILL
    with held(database):
        ids = [database.insert(f"{WAIT}, 'ended'", group=f"g{n}", delete=False) for n in range(3)]
        waiting = database.insert("SELECT 1", group="g0", delete=False)
        wait_runs(database, 3)
        workers = one.workers()
        one.process.kill()
        one.process.wait()
    for id in ids:
        row = database.wait(id)
        assert (row["state"], row["attempt"]) == ("DONE", 1)
        assert row["output"].endswith("\tended")
    eventually(lambda: not {p.pid for p in processes() if p.state != "Z"} & set(workers))
    assert database.task(waiting)["state"] == "PLAN"  # type: ignore[index]
    query = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pgtask%%' AND datname = %s"
    eventually(lambda: database.admin_execute(query, [database.name]) == [])


def test_next_master_carries_on_beside_the_runs_of_the_killed_one(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    one.expect_exit = -SIGKILL
    with held(database):
        long = database.insert(WAIT, group="g", delete=False)
        database.wait_running(long)
        next_one = database.insert("SELECT 1", group="g", delete=False)
        one.process.kill()
        one.process.wait()
        two = master(database.conninfo)
        assert database.wait(database.insert("SELECT 1", group="other", delete=False))["state"] == "DONE"
    row = database.wait(long)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    following = database.wait(next_one)
    assert following["start"] >= row["stop"], "the slot was taken"
    assert two.logged("run_lost") == []


def test_next_master_rescues_what_died_with_the_killed_one(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    one.expect_exit = -SIGKILL
    id = database.insert(ONCE, delete=False)
    worker = one.worker("running")
    one.process.kill()
    os.kill(worker, SIGKILL)
    one.process.wait()
    master(database.conninfo)
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 2)


def test_killed_workers_of_a_busy_table_lose_no_task(database: Database, master: Callable[..., Master]) -> None:
    one = master("--crashes", "1000", "--workers", "6", database.conninfo, tables=1)
    one.may_log_errors = True
    database.execute("CREATE TABLE effect (id bigint)")
    input = "INSERT INTO effect VALUES (current_setting('pg_task.id')::bigint); SELECT pg_sleep(0.005)"
    database.execute(
        'INSERT INTO task (input, "group", delete) SELECT %s, n %% 10, false FROM generate_series(1, 300) AS n', [input]
    )
    kills = 0

    def all_done() -> bool:
        nonlocal kills
        for worker in one.workers()[:1]:
            if kills < 15:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, SIGKILL)
                kills += 1
        return database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)]

    eventually(all_done, timeout=60, every=0.05)
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM effect") == [(300, 300)]


def test_worker_killed_while_idle_costs_nothing(database: Database, master: Callable[..., Master]) -> None:
    one = master("--linger", "20s", database.conninfo, tables=1)
    one.may_log_errors = True
    database.wait(database.insert("SELECT 1", delete=False))
    worker = one.worker("idle")
    os.kill(worker, SIGKILL)
    one.wait_log(rf"worker_ended worker={worker}")
    row = database.wait(database.insert("SELECT 1", delete=False))
    assert (row["state"], row["attempt"]) == ("DONE", 1)


def test_idle_workers_whose_sessions_are_ended_are_replaced(database: Database, master: Callable[..., Master]) -> None:
    one = master("--linger", "20s", database.conninfo, tables=1)
    pid = database.wait(database.insert("SELECT 1", delete=False))["pid"]
    database.admin_execute("SELECT pg_terminate_backend(%s)", [pid])
    one.wait_log("worker_ended .*exit status 1")
    row = database.wait(database.insert("SELECT 1", delete=False))
    assert (row["state"], row["attempt"]) == ("DONE", 1)


def test_worker_that_is_interrupted_gives_its_run_back(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    id = database.insert("SELECT pg_sleep(60)", delete=False)
    database.wait(id, "WORK")
    worker = one.worker("running")
    os.kill(worker, SIGINT)
    one.wait_log(rf"worker_ended worker={worker} .*exit status 0")
    row = database.wait(id, "WORK")
    assert (row["attempt"], row["error"]) == (1, None)
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    eventually(lambda: database.task(id)["stop"])  # type: ignore[index]
