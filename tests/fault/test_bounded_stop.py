"""A stop ends in time whatever the tasks do, and what it interrupts was never begun as far as the rows tell."""

import time
from collections.abc import Callable
from signal import SIGINT, SIGTERM, Signals

import pytest

from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.patient import patient
from tests.fixtures.processes import frozen
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

SLEEPING = "SELECT pg_sleep(600)"
LOCKED = "UPDATE held SET x = x + 1"
STUBBORN = "DO $$BEGIN LOOP BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END$$"
UNTOUCHED = """SELECT DISTINCT state::text, attempt, pid, start, stop, error, code, output FROM task"""
OURS = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name LIKE 'pgtask%%'"
SLACK = 20
"""Seconds that a slow and busy machine may add to the two that a stop takes at most."""


def queue(database: Database, input: str, count: int) -> None:
    database.execute(
        'INSERT INTO task (input, "group", delete) SELECT %s, %s || n, false FROM generate_series(1, %s) AS n',
        [input, input[:20], count],
    )


def running(database: Database, count: int) -> None:
    """Wait until so many runs have come to where they stay."""
    waiting = """SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state = 'active'
        AND (wait_event = 'PgSleep' OR wait_event_type = 'Lock')"""
    eventually(lambda: database.admin_execute(waiting, [database.name]) == [(count,)], timeout=60)


def seconds_to_stop(one: Master, sig: Signals) -> float:
    since = time.monotonic()
    assert one.stop(sig, timeout=60) == 0
    return time.monotonic() - since


def assert_nothing_was_begun(database: Database, one: Master) -> None:
    assert database.execute(UNTOUCHED) == [("PLAN", 0, None, None, None, None, None, None)]
    assert one.left() == []
    eventually(lambda: database.admin_execute(OURS, [database.name]) == [])


@pytest.mark.parametrize(("sig", "limit"), [(SIGTERM, 3), (SIGINT, 2)])
def test_stop_with_fifty_busy_workers_is_bounded(database: Database, master: Start, sig: Signals, limit: int) -> None:
    arguments = ("--workers", "50", "--stop-timeout", "1s", database.conninfo)
    one = master(*arguments, tables=1, through=patient(grace=SLACK))
    queue(database, SLEEPING, 50)
    running(database, 50)
    assert seconds_to_stop(one, sig) < limit + SLACK
    assert_nothing_was_begun(database, one)
    assert one.logged("worker_killed") == []


@pytest.mark.parametrize(("sig", "limit"), [(SIGTERM, 3), (SIGINT, 2)])
def test_stop_is_bounded_when_workers_hang_and_tasks_swallow_the_cancel_or_wait_for_a_lock(
    database: Database, master: Start, sig: Signals, limit: int
) -> None:
    database.execute("CREATE TABLE held AS SELECT 1 AS x")
    arguments = ("--workers", "50", "--stop-timeout", "1s", database.conninfo)
    one = master(*arguments, tables=1, through=patient(grace=1.5))
    one.may_log_errors = True  # worker_killed
    locking = database.connect(autocommit=False)
    locking.execute(LOCKED)
    queue(database, SLEEPING, 4)
    running(database, 4)
    with frozen(*one.workers()):
        for input in (STUBBORN, LOCKED, SLEEPING.replace("600", "700")):
            queue(database, input, 4)
        running(database, 16)
        assert seconds_to_stop(one, sig) < limit + SLACK
    assert_nothing_was_begun(database, one)
