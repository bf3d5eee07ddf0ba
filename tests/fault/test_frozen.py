"""Processes that hang for a while and go on as if nothing had been: a paused machine, SIGSTOP, heavy swapping."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from signal import SIGKILL, SIGTERM
from typing import Any

import psycopg

from pgtask.objects import Names
from tests.fixtures.database import Database
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.locks import falls_asleep, held
from tests.fixtures.master import Master
from tests.fixtures.processes import frozen
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

WAIT = "SELECT pg_advisory_xact_lock_shared({})"


def stand_by(database: Database, master: Start) -> Master:
    two = master(database.conninfo, wait=False)
    two.wait_log("standing_by")
    return two


def leader(database: Database) -> int:
    """The backend that serves the table."""
    [(backend,)] = database.execute("SELECT backend FROM task_master")
    return int(backend)


def leading_pid(database: Database) -> int:
    """The master that serves the table."""
    [(pid,)] = database.execute("SELECT pid FROM task_master")
    return int(pid)


def taken(database: Database, backend: int) -> int:
    """How many rows a poller has taken that no worker has begun."""
    return int(database.execute("SELECT count(*) FROM task WHERE state = 'TAKE' AND pid = %s", [backend])[0][0])


@contextmanager
def frozen_with_a_take_unread(database: Database, ledger: Ledger, one: Master) -> Iterator[None]:
    """The master hangs, and the answer to its take, which has long been committed, waits in its socket."""
    backend = leader(database)
    waiting = "SELECT query FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    asleep = """SELECT 1 FROM pg_stat_activity AS a JOIN pg_locks AS l ON l.pid = a.pid
        WHERE a.pid = %s AND a.state = 'idle' AND a.state_change < clock_timestamp() - interval '200 ms'
            AND l.locktype = 'advisory' AND l.objid = 4294967295"""
    store = Names(schema="public", table="task").store()
    takes = [store.text("take_one"), store.text("take")]

    def take_waits(locking: psycopg.Connection[tuple[Any, ...]]) -> bool:
        """It may have something else to say first: that goes on then."""
        eventually(lambda: database.admin_execute(asleep, [backend]))
        locking.execute("LOCK TABLE task IN SHARE MODE")
        database.execute("SELECT pg_notify('pgtask_' || 'task'::regclass::oid, '')")  # it looks at the table
        [(query,)] = eventually(lambda: database.admin_execute(waiting, [backend]))
        if any(take.startswith(query) for take in takes):  # the server shows the beginning
            return True
        locking.rollback()
        return False

    with ExitStack() as until_then:
        with database.connect(autocommit=False) as locking:
            eventually(lambda: take_waits(locking))
            until_then.enter_context(frozen(one.pid))
            locking.execute(
                # Due at the instant that the take is for, and behind the place where it may start from. The only one:
                # a take of one row leaves more to the other statement.
                """INSERT INTO task (input, "group", delete, plan)
                    SELECT %s, 'ledger unread', false, max(plan) FROM task""",
                [ENTRY],
            )
            ledger.wanted += 1
        eventually(lambda: taken(database, backend) == 1)
        yield


def assert_led_by(one: Master, other: Master) -> None:
    """`ps` and the log say who leads."""
    eventually(lambda: one.title().startswith("pgtask: master (1 table leading, "))
    eventually(lambda: "1 table standing by" in other.title())
    pattern = r"\bleading\b|standing_by"
    eventually(lambda: " leading " in one.logged(pattern)[-1])
    eventually(lambda: f"pid={one.pid}" in other.logged(pattern)[-1])


def test_master_that_hangs_for_a_while_costs_nothing(database: Database, ledger: Ledger, master: Start) -> None:
    one = master(database.conninfo)
    chance = random.Random(3)
    for _ in range(4):
        ledger.fill(40, groups=8)
        time.sleep(chance.uniform(0, 0.1))
        with frozen(one.pid):
            ledger.fill(10, groups=8)
            time.sleep(chance.uniform(0, 0.5))
    ledger.settled()
    assert database.execute("SELECT DISTINCT attempt FROM task") == [(1,)]
    assert len(one.logged(r"\bleading\b")) == 1


def test_workers_that_hang_for_a_while_cost_nothing(database: Database, ledger: Ledger, master: Start) -> None:
    one = master("--workers", "4", database.conninfo, tables=1)
    chance = random.Random(4)
    ledger.fill(200, groups=6, ms=10)
    hung = 0
    while ledger.unfinished() and hung < 20:
        workers = one.workers()
        with frozen(*chance.sample(workers, min(2, len(workers)))):
            hung += min(2, len(workers))
            time.sleep(chance.uniform(0, 0.2))
    ledger.settled()
    assert database.execute("SELECT DISTINCT attempt FROM task") == [(1,)]
    assert one.logged("run_lost") == []


def test_run_that_was_stopped_counts_to_its_end_although_the_master_hangs(database: Database, master: Start) -> None:
    """Nobody cancels it meanwhile, and nobody tells the worker beside it."""
    one = master(database.conninfo, tables=1)
    with held(database, 731), ExitStack() as gate:
        gate.enter_context(held(database, 730))
        first, second = (database.insert(WAIT.format(key), group="beside", max=1, delete=False) for key in (730, 731))
        slow = database.wait(second, "WORK")
        database.wait(first, "WORK")
        third = database.insert("SELECT 3", group="beside", max=0, delete=False)
        falls_asleep(database)
        with frozen(one.pid):
            database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [second])
            gate.close()
            assert database.wait(first)["state"] == "DONE"
            eventually(lambda: any(one.title(pid).endswith(" idle") for pid in one.workers()))
            assert database.task(third)["state"] == "PLAN"
            query = "SELECT state FROM pg_stat_activity WHERE pid = %s"
            assert database.admin_execute(query, [slow["pid"]]) == [("active",)]
    last = database.wait(third)
    assert (last["state"], last["attempt"]) == ("DONE", 1)
    assert last["start"] >= database.task(second)["stop"]


def test_idle_worker_that_hangs_is_passed_over(database: Database, master: Start) -> None:
    """What it is told to look for it does not begin later, when another one has."""
    one = master("--linger", "60s", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    worker = one.worker("idle")
    falls_asleep(database, silent=2)  # after a look that was dear none everywhere is made for a while, by nobody
    with frozen(worker):
        rows = [database.wait(database.insert("SELECT 1", group=group, delete=False)) for group in ("group", "other")]
    later = database.insert("SELECT 1", group="later", delete=False)
    rows.append(database.wait(later))
    assert {(row["state"], row["attempt"]) for row in rows} == {("DONE", 1)}
    eventually(lambda: one.title(worker).endswith("idle"))


def test_idle_workers_that_do_not_come_back_are_replaced(database: Database, master: Start) -> None:
    """One was told to look for a row, one was given it, and one was told to end."""
    one = master("--linger", "4s", "--safety", "1s", "--workers", "3", database.conninfo, tables=1)
    one.may_log_errors = True
    with held(database, 730):
        for number in range(3):
            database.insert(WAIT.format(730), group=str(number))
        eventually(lambda: sum(" running " in one.title(pid) for pid in one.workers()) == 3)
    workers = set(one.workers())
    eventually(lambda: all(one.title(pid).endswith(" idle") for pid in workers))
    falls_asleep(database, silent=2)
    with frozen(*workers):
        id = database.insert("SELECT 1", delete=False)
        eventually(lambda: taken(database, leader(database)) == 1)
        assert database.wait(id, timeout=60)["attempt"] == 1
        one.wait_log("worker_killed", 3, timeout=60)
        assert not workers.intersection(one.workers())
    assert one.logged("run_lost") == []


def test_hung_master_is_replaced_and_woken_up_again_does_no_harm(
    database: Database, ledger: Ledger, master: Start
) -> None:
    one, two = master(database.conninfo), stand_by(database, master)
    with ExitStack() as first, ExitStack() as last:
        for key, gate in ((730, first), (731, last)):
            gate.enter_context(held(database, key))
            database.wait(database.insert(f"{ENTRY}; {WAIT.format(key)}", group=f"ledger {key}", delete=False), "WORK")
        last.enter_context(held(database, 732))
        with frozen_with_a_take_unread(database, ledger, one):
            nexts = [
                database.insert(f"{ENTRY}; {WAIT.format(732)}", group=f"ledger {key}", delete=False)
                for key in (730, 731)
            ]
            ledger.wanted += 4
            first.close()
            database.wait(nexts[0], "WORK")  # its worker needs no master for that
            assert two.logged(r"\bleading\b") == []
            two.wait_log(r"\bleading\b", timeout=60)  # the server ends a session that is silent for 10 s
            ledger.fill(20, groups=8)
            eventually(lambda: not database.tasks("\"group\" = 'ledger unread' AND state <> 'DONE'"))
            assert database.task(nexts[1])["state"] == "PLAN", "the slot of its group is in use"  # type: ignore[index]
            forked = len(one.logged("worker_forked"))
        one.wait_log("worker_forked", forked + 1)  # it has read the answer to its take
    one.wait_log("table_down")
    one.wait_log("standing_by")
    ledger.settled()
    assert_led_by(two, one)
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert len(one.logged(r"\bleading\b")) == 1
    eventually(lambda: not one.workers())
    since = time.monotonic()
    one.stop(SIGTERM)
    assert time.monotonic() - since < 20, "a stop of the one that stands by waits for nothing"


def test_masters_that_hang_at_random_moments_and_are_replaced_run_nothing_twice(
    database: Database, ledger: Ledger, master: Start
) -> None:
    masters = [master(database.conninfo), stand_by(database, master)]
    chance = random.Random(5)
    for _ in range(3):
        leads, stands = sorted(masters, key=lambda one: one.pid != leading_pid(database))
        ledger.fill(150, groups=12, ms=2)
        time.sleep(chance.uniform(0, 0.2))
        with frozen(leads.pid):
            # At once, instead of after idle_session_timeout.
            database.admin_execute("SELECT pg_terminate_backend(%s)", [leader(database)])
            eventually(lambda stands=stands: leading_pid(database) == stands.pid)
            time.sleep(chance.uniform(0, 0.2))
        eventually(lambda leads=leads: "standing by" in leads.title())
        assert_led_by(stands, leads)
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}


def test_deposed_master_whose_worker_was_killed_stops_without_delay(
    database: Database, ledger: Ledger, master: Start
) -> None:
    one, two = master(database.conninfo), stand_by(database, master)
    one.may_log_errors = True
    ledger.fill(1, ms=300)
    eventually(lambda: database.tasks("state = 'WORK'"))
    worker = one.worker("running")
    with frozen(one.pid):
        database.admin_execute("SELECT pg_terminate_backend(%s)", [leader(database)])
        two.wait_log(r"\bleading\b")
        os.kill(worker, SIGKILL)
    one.wait_log("standing_by")
    one.wait_log(f"worker_ended worker={worker}")
    since = time.monotonic()
    assert one.stop(SIGTERM) == 0
    assert time.monotonic() - since < 20
    ledger.settled()
