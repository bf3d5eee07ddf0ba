"""Two masters on one table: one serves it, the other stands by and takes over."""

from collections.abc import Callable
from signal import SIGKILL, SIGTERM, Signals

import pytest

from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually


def stand_by(database: Database, master: Callable[..., Master]) -> Master:
    two = master(database.conninfo, wait=False)
    two.wait_log("standing_by")
    return two


def test_second_master_stands_by_and_says_so(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    two = stand_by(database, master)
    assert f"pid={one.pid}" in two.logged("standing_by")[0]
    eventually(lambda: two.title() == "pgtask: master (1 table standing by, 0 workers)")
    database.wait(database.insert("SELECT 1", delete=False))
    assert len(one.wait_log("worker_forked")) == 1
    assert two.logged("worker_forked|leading") == []
    assert len(two.logged("standing_by")) == 1


@pytest.mark.parametrize("sig", [SIGKILL, SIGTERM])
def test_standby_takes_over_when_the_first_ends(
    database: Database, master: Callable[..., Master], sig: Signals
) -> None:
    one = master(database.conninfo)
    one.expect_exit = -SIGKILL if sig == SIGKILL else 0
    two = stand_by(database, master)
    one.stop(sig)
    [line] = two.wait_log("leading")
    assert "term=2" in line
    eventually(lambda: two.title() == "pgtask: master (1 table leading, 0 workers)")
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert database.execute("SELECT term, pid FROM task_master") == [(2, two.pid)]


def test_standby_stops_at_once(database: Database, master: Callable[..., Master]) -> None:
    master(database.conninfo)
    two = stand_by(database, master)
    assert two.stop(timeout=25) == 0  # stop_timeout is longer


def test_no_task_runs_twice_through_take_overs(database: Database, master: Callable[..., Master]) -> None:
    database.execute("CREATE TABLE effect (id bigint)")
    masters = [master(database.conninfo)]
    input = "INSERT INTO effect VALUES (current_setting('pg_task.id')::bigint); SELECT pg_sleep(0.01)"
    database.execute(
        'INSERT INTO task (input, "group", delete) SELECT %s, n %% 8, false FROM generate_series(1, 400) AS n', [input]
    )
    for _ in range(3):
        two = stand_by(database, master)
        masters[-1].expect_exit = -SIGKILL
        masters[-1].stop(SIGKILL)
        two.wait_log("leading")
        masters.append(two)
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)], timeout=60)
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM effect") == [(400, 400)]
    assert database.execute("SELECT DISTINCT attempt FROM task") == [(1,)]


def test_two_masters_that_start_together_install_once_and_one_leads(
    database: Database, master: Callable[..., Master]
) -> None:
    both = [master(database.conninfo, wait=False) for _ in range(2)]
    for one in both:
        one.wait_log("leading|standing_by")
    assert sorted(len(one.logged("leading")) for one in both) == [0, 1]
    assert sum(len(one.logged('create table public.task"')) for one in both) == 1
    assert [one for one in both if one.logged("table_down")] == []


def test_standby_session_holds_no_snapshot_and_no_lock_wait(database: Database, master: Callable[..., Master]) -> None:
    master(database.conninfo)
    stand_by(database, master)
    query = "SELECT state, backend_xmin, wait_event_type FROM pg_stat_activity WHERE application_name = 'pgtask master'"

    def at_rest() -> bool:
        """The columns are not of one moment: a session may have begun a statement in between."""
        rows = database.admin_execute(query + " AND datname = %s", [database.name])
        return {row[1:2] for row in rows if row[0] != "active"} == {(None,)}

    eventually(at_rest)
    assert "Lock" not in [row[2] for row in database.admin_execute(query + " AND datname = %s", [database.name])]


def test_master_whose_term_was_ended_by_hand_begins_a_new_one(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo)
    database.wait(database.insert("SELECT 1", delete=False))
    database.execute("UPDATE task_master SET term = term + 7")
    row = database.wait(database.insert("SELECT 1", delete=False))
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    assert len(one.logged("term 1 has ended")) == 1
    assert database.execute("SELECT term FROM task_master") == [(9,)]
