"""A master that gets no process or no descriptor any more for a while: it waits, loses nothing, and goes on."""

import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from psycopg.conninfo import make_conninfo

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.locks import asleep, passes
from tests.fixtures.master import Master
from tests.fixtures.processes import cpu_seconds
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

# RLIMIT_NPROC does not bind root. Nobody may still read what root installed, wherever that is.
CAPS = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *CAPS, "--")
UNPRIVILEGED = AS_NOBODY if os.geteuid() == 0 else ()
QUIET = 10
"""Seconds without a refused worker after which the master says that it is over (pgtask/master/pool.py)."""


def limit_processes(one: Master, number: int) -> None:
    limit = "unlimited" if number == resource.RLIM_INFINITY else str(number)
    subprocess.run([*UNPRIVILEGED, "prlimit", f"--pid={one.pid}", f"--nproc={limit}:"], check=True)


def limit_descriptors(one: Master) -> tuple[int, int]:
    """From now on it can open nothing. Returns the limits that it had."""
    opened = {int(entry.name) for entry in Path(f"/proc/{one.pid}/fd").iterdir()}
    lowest_free = min(set(range(len(opened) + 1)) - opened)
    before = resource.prlimit(one.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    return before


def end_session(database: Database) -> None:
    database.admin_execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'pgtask master' AND datname = %s",
        [database.name],
    )


def assert_calm(one: Master, seconds: float = 1) -> None:
    """It neither spins nor floods the log while it can do nothing."""
    before, since, lines = cpu_seconds(one.pid), time.monotonic(), len(one.log().splitlines())
    passes(seconds)
    assert cpu_seconds(one.pid) - before < (time.monotonic() - since) / 4
    assert len(one.log().splitlines()) - lines < 10


def assert_said_once(one: Master, *patterns: str) -> None:
    for pattern in patterns:
        assert len(one.logged(pattern)) == 1, one.logged(pattern)


def test_fork_that_fails_for_a_while_loses_nothing(database: Database, ledger: Ledger, master: Start) -> None:
    conninfo = make_conninfo(database.tcp, host="localhost")  # a name: the resolver's child
    one = master("--linger", "0", conninfo, tables=1, through=UNPRIVILEGED)
    ledger.fill(4)
    ledger.settled()
    eventually(lambda: not one.children())
    limit_processes(one, 0)
    ledger.fill(20, groups=8)
    one.wait_log("workers_cannot_open")
    end_session(database)
    one.wait_log("table_down .*(terminating connection|server closed)")
    one.wait_log("table_down .*Resource temporarily unavailable")
    assert_calm(one)
    assert {row["state"] for row in database.tasks("attempt = 0")} <= {"PLAN", "TAKE"}
    limit_processes(one, resource.getrlimit(resource.RLIMIT_NPROC)[0])
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert_said_once(one, "workers_cannot_open", "table_up", "table_down .*unavailable")
    passes(QUIET)
    ledger.fill(1)
    one.wait_log("workers_open_again")
    ledger.settled()


def test_fork_that_fails_after_the_session_has_begun_the_task_costs_it_nothing(
    database: Database, master: Start
) -> None:
    """The session was ready, and is asked while its worker is forked."""
    one = master("--linger", "0", database.conninfo, tables=1, through=UNPRIVILEGED)
    ready = (
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgtask warm' AND state = 'idle'"
    )
    eventually(lambda: database.admin_execute(ready, [database.name]) and asleep(database))
    limit_processes(one, 0)
    id = database.insert("SELECT 1", delete=False)
    one.wait_log("workers_cannot_open .*fork")
    assert_calm(one)
    limit_processes(one, resource.getrlimit(resource.RLIMIT_NPROC)[0])
    row = database.wait(id)
    assert (row["state"], row["attempt"], row["error"]) == ("DONE", 1, None)


def test_descriptors_that_are_used_up_for_a_while_lose_nothing(
    database: Database, ledger: Ledger, master: Start
) -> None:
    one = master("--linger", "0", database.conninfo, tables=1)
    ledger.fill(4)
    ledger.settled()
    eventually(lambda: not one.children())
    before = limit_descriptors(one)
    ledger.fill(20, groups=8)
    one.wait_log("workers_cannot_open .*Too many open files")
    assert_calm(one)
    assert {row["state"] for row in database.tasks("attempt = 0")} <= {"PLAN", "TAKE"}
    assert one.logged("table_down") == [], "its session is well"
    end_session(database)
    one.wait_log("table_down")
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, before)
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert_said_once(one, "workers_cannot_open", "table_up")


def test_row_that_waits_for_a_workers_end_is_not_lost_when_no_descriptor_is_left(
    database: Database, master: Start
) -> None:
    one = master("--workers", "1", "--linger", "60s", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    before = limit_descriptors(one)
    # The idle worker has run one and may not run this: it has to end first.
    id = database.insert("SELECT 1", count=1, delete=False)
    one.wait_log("workers_cannot_open")
    assert one.workers() == []
    database.wait(id, "PLAN")
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, before)
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
