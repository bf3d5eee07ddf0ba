"""A network that cuts, and that leads nowhere, between the server and the master or a worker."""

import itertools
from collections.abc import Callable
from typing import Literal

import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.locks import passes
from tests.fixtures.master import Master
from tests.fixtures.proxy import Proxy
from tests.fixtures.trouble import keeps_calm, said_once, started
from tests.fixtures.wait import eventually

FINISH = b"SET CONSTRAINTS ALL IMMEDIATE"
"""The first statement of the message that finishes an atomic run; its COMMIT is in the same message."""

COMMITTED = b"COMMIT\0"
"""The server's answer to a COMMIT."""


def test_every_task_runs_once_while_the_network_is_cut(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    one = master("--crashes", "1000", proxy.conninfo, tables=1)
    ledger.fill(300, ms=30)
    started(ledger, 5)
    ways: list[Literal["FIN", "RST"]] = ["FIN", "RST"]
    for how in itertools.islice(itertools.cycle(ways), 6):
        eventually(lambda how=how: proxy.cut(how, "pgtask"))  # type: ignore[misc]
        passes(0.5)
    ledger.settled()
    assert 1 <= len(one.logged("table_down|table_unstable")) <= 6
    assert len(one.logged("table_up|table_stable")) <= 2


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_worker_cut_off_in_the_middle_of_a_run_costs_that_run_only(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy], how: str
) -> None:
    proxy = new_proxy(database.tcp)
    one = master("--warm", "0", proxy.conninfo, tables=1)
    once = "SELECT pg_sleep(CASE WHEN attempt = 1 THEN 60 ELSE 0 END) FROM task WHERE id = (SELECT max(id) FROM ledger)"
    ledger.fill(1, input=f"{ENTRY}; {once}")
    [row] = eventually(lambda: database.tasks("state = 'WORK'"))
    assert proxy.cut("FIN" if how == "FIN" else "RST", "pgtask worker") == 1
    ledger.settled()
    [after] = database.tasks()
    assert (after["id"], after["attempt"], after["error"]) == (row["id"], 2, None)
    [line] = one.logged("run_lost")
    assert "failed=false" in line
    assert one.logged("table_down") == []


def test_connection_lost_just_before_the_server_gets_the_commit_undoes_the_run(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    one = master(proxy.conninfo)
    trap = proxy.trap(FINISH)
    ledger.fill(1)
    assert trap.sprung.wait(20)
    ledger.settled()
    assert database.tasks()[0]["attempt"] == 2
    assert len(one.logged("run_lost")) == 1


def test_connection_lost_just_after_the_server_committed_leaves_the_run_done(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    one = master(proxy.conninfo)
    trap = proxy.trap(FINISH, answer=COMMITTED)
    ledger.fill(2, groups=1)  # the second is taken with the first one's finish, and nobody is told
    assert trap.sprung.wait(20)
    ledger.settled()
    assert [row["attempt"] for row in database.tasks()] in ([1, 1], [1, 2])
    assert len(one.logged("run_lost")) <= 1


def test_connection_lost_while_the_commit_waits_for_a_standby_leaves_the_run_done(
    own_database: Database, own_ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    """The server has committed, but has not said so; the work is there as soon as that session is ended."""
    database, proxy = own_database, new_proxy(own_database.tcp)
    one = master("--warm", "0", proxy.conninfo, tables=1)
    held = database.connect()
    held.execute("SELECT pg_advisory_lock(1)")
    own_ledger.fill(1, input=f"{ENTRY}; SELECT pg_advisory_xact_lock_shared(1)")
    eventually(lambda: database.tasks("state = 'WORK'"))
    database.admin_execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    database.admin_execute("SELECT pg_reload_conf()")
    eventually(lambda: database.connect().execute("SHOW synchronous_standby_names").fetchone() == ("nobody",))
    held.execute("SELECT pg_advisory_unlock(1)")
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'pgtask %'"
    eventually(lambda: database.admin_execute(waiting))
    assert proxy.cut("RST", "pgtask worker") == 1
    eventually(lambda: database.tasks("state = 'DONE'"))
    database.admin_execute("ALTER SYSTEM RESET synchronous_standby_names")
    database.admin_execute("SELECT pg_reload_conf()")
    own_ledger.settled()
    assert database.tasks()[0]["attempt"] == 1
    assert one.logged("run_lost") == []


def test_network_that_holds_everything_up_for_a_while_costs_nothing(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    one = master(proxy.conninfo)
    ledger.fill(600, ms=30)
    started(ledger, 10)
    assert proxy.deafen("pgtask") > 2
    keeps_calm(one, 2.5)
    assert ledger.unfinished()
    proxy.hear()
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert one.logged("table_down|worker_ended .*WARNING|run_lost") == []


def test_address_that_is_unreachable_at_first_is_served_when_it_answers(
    database: Database, ledger: Ledger, master: Callable[..., Master], new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp, reachable=False)
    one = master(f"{proxy.conninfo} tcp_user_timeout=2000", wait=False)
    one.wait_log("table_down")
    keeps_calm(one, 2.5)
    proxy.reach()
    one.wait_log("leading")
    ledger.fill(20)
    ledger.settled()
    said_once(one)
