"""A server that goes away and comes back, is full, or is read only, while a table is busy."""

import subprocess
from collections.abc import Callable

import psycopg
import pytest

from pgtask import embedded
from tests.fixtures.command import LONGEST, start
from tests.fixtures.database import Database
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.locks import passes
from tests.fixtures.master import Master
from tests.fixtures.processes import cpu_seconds
from tests.fixtures.trouble import keeps_calm, said_once, started
from tests.fixtures.wait import eventually


@pytest.mark.parametrize("how", ["fast", "immediate", "SIGKILL"])
def test_every_task_runs_once_while_the_server_is_restarted(
    own_server: embedded.Server, own_ledger: Ledger, master: Callable[..., Master], how: str
) -> None:
    one = master(own_ledger.database.conninfo)
    own_ledger.fill(200, ms=20)
    started(own_ledger, 20)
    own_ledger.database.close()
    if how == "SIGKILL":
        own_server.kill()
    else:
        own_server.stop("fast" if how == "fast" else "immediate")
    own_server.start_again()
    own_ledger.settled()
    said_once(one)


def test_server_that_is_down_for_a_while_is_asked_calmly_and_served_again(
    own_server: embedded.Server, own_ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master(own_ledger.database.conninfo)
    own_ledger.fill(100, ms=20)
    started(own_ledger, 20)
    own_ledger.database.close()
    own_server.stop("immediate")
    one.wait_log("table_down .*(No such file|refused)")
    eventually(lambda: one.workers() == [])
    keeps_calm(one, 2.5)
    assert len(one.logged("worker_forked")) < 15
    own_server.start_again()
    own_ledger.settled()
    said_once(one)


def test_who_waits_for_a_task_hears_of_its_end_although_the_server_was_down(
    own_server: embedded.Server, own_database: Database, master: Callable[..., Master]
) -> None:
    master(own_database.conninfo).may_log_errors = True
    id = own_database.insert("SELECT 1", plan="infinity", delete=False)
    words = ["wait", "-d", own_database.conninfo, str(id)]
    waiting = start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    bounded = start(*words, "--timeout", "10 s", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    look = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgtask wait' AND query ~ 'ORDINALITY'"
    eventually(lambda: own_database.admin_execute(look) == [(2,)])
    own_database.close()
    own_server.stop("fast")
    assert bounded.wait(LONGEST) == 2
    own_server.start_again()
    own_database.execute("UPDATE task SET plan = now() WHERE id = %s", [id])
    out, err = waiting.communicate(timeout=LONGEST)
    assert (waiting.returncode, out) == (0, f"{id} DONE\n".encode())
    assert err.decode().count("trying again") == 1
    out, err = bounded.communicate(timeout=LONGEST)
    [told, given_up] = err.decode().splitlines()
    assert (out, told.endswith("; trying again")) == (b"", True)
    assert given_up.startswith(f"pgtask: {told.split(': ')[0]}")


class Crowd:
    """Other clients, that hold every session of the server that ordinary users may have."""

    def __init__(self, database: Database) -> None:
        self.sessions: list[psycopg.Connection[tuple[object, ...]]] = []
        self._database = database

    def come(self) -> None:
        with pytest.raises(psycopg.OperationalError, match=r"connection slots|too many clients"):
            while True:
                self.sessions.append(psycopg.connect(self._database.conninfo, autocommit=True))

    def leave(self, count: int | None = None) -> None:
        leaving = self.sessions[:count]
        for session in leaving:
            session.close()
            self.sessions.remove(session)


@pytest.fixture
def full_database(new_server: Callable[..., embedded.Server], new_database: Callable[..., Database]) -> Database:
    """On a server that has no more than a few sessions for everybody."""
    return new_database(on=new_server(max_connections="10", superuser_reserved_connections="3"))


def test_master_that_finds_the_server_full_says_so_once_and_serves_when_there_is_room(
    full_database: Database, master: Callable[..., Master]
) -> None:
    crowd = Crowd(full_database)
    crowd.come()
    one = master(full_database.conninfo, wait=False)
    one.wait_log("table_down")
    keeps_calm(one, 1.5)
    crowd.leave()
    one.wait_log("leading")
    [down] = one.logged("table_down")
    assert "connection slots" in down or "too many clients" in down
    said_once(one)
    ledger = Ledger(full_database)
    ledger.fill(50)
    ledger.settled()


def test_workers_that_find_the_server_full_wait_and_lose_nothing(
    full_database: Database, master: Callable[..., Master]
) -> None:
    one = master("--warm", "0", full_database.conninfo, tables=1)
    ledger = Ledger(full_database)
    crowd = Crowd(full_database)
    crowd.come()
    ledger.fill(60, groups=6)
    one.wait_log("workers_cannot_open")
    keeps_calm(one, 1.5)
    assert ledger.unfinished() == 60
    crowd.leave(1)
    started(ledger, 30)
    crowd.leave()
    ledger.settled()
    assert len(one.logged("workers_cannot_open")) == 1
    assert one.logged("table_down|run_lost") == []
    assert len(one.logged("worker_forked")) < 40


TERMINATE = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE datname = %s AND application_name LIKE 'pgtask %%'"""


def test_every_task_runs_once_while_all_sessions_are_ended_twice_a_second(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master("--crashes", "1000", database.conninfo, tables=1)
    ledger.fill(300, ms=30)
    ended, times = 0, 0
    while times < 8 or ended <= 2 * times < 80:
        [(count,)] = database.admin_execute(TERMINATE, [database.name])
        ended, times = ended + count, times + 1
        passes(0.5)
    ledger.settled()
    assert ended > 2 * times
    assert 1 <= len(one.logged("table_down")) <= times
    assert len(one.logged("table_up")) <= times
    assert len(one.logged("worker_ended .*terminating connection due to administrator")) <= ended
    assert cpu_seconds(one.pid) < 10


WRITE = f"SET TRANSACTION READ WRITE; {ENTRY}; SELECT pg_sleep(0.02)"


@pytest.mark.parametrize("by", ["ROLE", "DATABASE"])
def test_user_or_database_that_is_made_read_only_is_served(
    database: Database, ledger: Ledger, master: Callable[..., Master], by: str
) -> None:
    set_read_only(master(database.conninfo), database, ledger, f'{by} "{database.name}"')


def test_server_that_is_made_read_only_is_served_also_from_the_start(
    own_database: Database, own_ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master(own_database.conninfo)
    set_read_only(one, own_database, own_ledger, "SYSTEM")
    one.stop()
    two = master(own_database.conninfo)
    own_ledger.fill(10, input=WRITE)
    own_ledger.settled()
    assert two.logged("table_down|finish_failed|begin_failed|workers_cannot_open|run_lost") == []


def set_read_only(one: Master, database: Database, ledger: Ledger, what: str) -> None:
    """Tasks that do not ask for more than they have fail, all others run, and nothing of ours is refused."""
    ledger.fill(60, input=WRITE)
    started(ledger, 5)
    database.admin_execute(f"ALTER {what} SET default_transaction_read_only = on")
    database.admin_execute("SELECT pg_reload_conf()")
    eventually(lambda: read_only(database))
    database.execute("SET default_transaction_read_only = off")
    # A new worker for each: a session that was there before has the role's and the database's settings of then.
    alone = {"group": "new", "count": 1, "delete": False}
    writes, reads = (database.wait(database.insert(input, **alone)) for input in ("CREATE TABLE no ()", "SELECT 1"))
    assert (writes["state"], writes["code"], writes["attempt"]) == ("FAIL", "25006", 1)
    assert (reads["state"], reads["output"]) == ("DONE", "1")
    ledger.settled()
    assert one.logged("table_down|finish_failed|begin_failed|workers_cannot_open|run_lost") == []


def read_only(database: Database) -> bool:
    """Is a new session of the tasks' user?"""
    database.close()
    return database.execute("SHOW default_transaction_read_only") == [("on",)]
