"""A server in recovery, and a primary that dies: the master waits for, or finds, the server that takes writes."""

from collections.abc import Callable

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask import embedded
from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master
from tests.fixtures.proxy import Proxy
from tests.fixtures.trouble import keeps_calm, said_once, started
from tests.fixtures.wait import eventually


def follow(database: Database, server: embedded.Server) -> None:
    """Look at the same database on another server from now on."""
    database.close()
    database.server = server


def ask(server: embedded.Server, query: str) -> object:
    """The one value that the server's superuser gets; None from what is no query."""
    with psycopg.connect(server.conninfo(), autocommit=True) as session:
        cursor = session.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
        return row and row[0]


def caught_up(primary: embedded.Server, standby: embedded.Server) -> None:
    """Wait until the standby has replayed what the primary has written."""
    written = ask(primary, "SELECT pg_current_wal_lsn()")
    eventually(lambda: ask(standby, f"SELECT pg_last_wal_replay_lsn() >= '{written}'"))


def make_synchronous(primary: embedded.Server) -> None:
    """From now on nothing is committed that the standby has not got."""
    ask(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    ask(primary, "SELECT pg_reload_conf()")
    eventually(lambda: ask(primary, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"))


def first_of(*conninfos: str) -> str:
    """How to connect to the first of these that answers and takes writes."""
    places = [conninfo_to_dict(one) for one in conninfos]
    hosts, ports = (",".join(str(place[name]) for place in places) for name in ("host", "port"))
    return make_conninfo(conninfos[0], host=hosts, port=ports, target_session_attrs="read-write")


def test_master_of_a_standby_says_so_once_and_serves_after_its_promotion(
    own_database: Database,
    own_server: embedded.Server,
    own_ledger: Ledger,
    standby: embedded.Server,
    master: Callable[..., Master],
) -> None:
    assert master(own_database.conninfo).stop() == 0  # it has made the table
    own_ledger.fill(40)
    caught_up(own_server, standby)
    follow(own_database, standby)
    own_server.stop("immediate")
    one = master(own_database.conninfo, wait=False)
    [line] = one.wait_log("table_down")
    assert "the server is in recovery" in line
    keeps_calm(one, 2)
    assert own_ledger.unfinished() == 40
    ask(standby, "SELECT pg_promote()")
    own_ledger.settled()
    said_once(one, reasons=1)


def test_primary_that_dies_is_left_for_the_promoted_standby(
    own_database: Database,
    own_server: embedded.Server,
    own_ledger: Ledger,
    standby: embedded.Server,
    master: Callable[..., Master],
) -> None:
    make_synchronous(own_server)
    on_standby = standby.conninfo(own_database.name, own_database.user)
    one = master(first_of(own_database.conninfo, on_standby))
    own_ledger.fill(200, ms=20)
    started(own_ledger, 40)
    own_server.kill()
    follow(own_database, standby)
    one.wait_log("table_down")
    ask(standby, "SELECT pg_promote()")
    own_ledger.settled()
    said_once(one)
    assert len(one.logged("leading")) == 2
    # Somebody starts the old one: it is the first of the two again, and would take writes.
    own_server.start_again()
    eventually(lambda: one.workers() == [])
    own_ledger.fill(20)
    own_ledger.settled()
    assert {row["attempt"] for row in own_ledger.database.tasks(f"id > {own_ledger.wanted - 20}")} == {1}


def test_primary_that_vanishes_without_a_word_is_left_for_the_standby(
    own_database: Database,
    own_server: embedded.Server,
    own_ledger: Ledger,
    standby: embedded.Server,
    master: Callable[..., Master],
    new_proxy: Callable[..., Proxy],
) -> None:
    """The address of a machine that lost its power: no connection is refused, none is made."""
    assert master(own_database.conninfo).stop() == 0
    own_ledger.fill(40, groups=2)
    caught_up(own_server, standby)
    own_server.kill()
    ask(standby, "SELECT pg_promote()")
    follow(own_database, standby)
    nowhere = new_proxy(own_database.tcp, reachable=False)
    quick = {"tcp_user_timeout": 3000}
    one = master(make_conninfo(first_of(nowhere.conninfo, own_database.tcp), **quick), wait=False)
    one.wait_log("leading", timeout=30)
    own_ledger.settled(20)
    assert one.logged("workers_cannot_open") == []
