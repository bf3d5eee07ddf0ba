"""What waking costs: inserters that notify, strangers that do, tables that nobody wakes us for, many groups."""

import json
import re
import threading
import time
from collections.abc import Callable
from statistics import median

from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import asleep, passes, transactions
from tests.fixtures.master import Master
from tests.fixtures.processes import cpu_seconds
from tests.fixtures.wait import eventually

CLIENTS = 8


def looks(database: Database) -> int:
    """How often the master has looked for due rows: of an execution only the prepared statement's name is told."""
    mine = rf"\npgtask master\|{database.name}\|LOG:  "
    text = database.server.log_text()  # type: ignore[union-attr]
    names = set(re.findall(mine + r"execute (pgtask_\d+): WITH (?:RECURSIVE )?instant AS", text))
    return sum(name in names for name in re.findall(mine + r"execute (pgtask_\d+):", text))


def finds(database: Database) -> int:
    """How often the master, or a worker that it has asked, has looked for a single due row."""
    text = database.server.log_text()  # type: ignore[union-attr]
    return len(re.findall(rf"\npgtask [^|\n]*\|{database.name}\|LOG:  execute pgtask_\d+: WITH instant AS", text))


def channel(database: Database) -> str:
    return str(database.execute("SELECT 'pgtask_' || 'task'::regclass::oid")[0][0])


def test_inserts_at_full_rate_send_few_notifications(database: Database, master: Callable[..., Master]) -> None:
    """Where the master finds nothing to do: one that went on listening would be notified by most of the inserts."""
    master("--safety", "1h", database.conninfo, tables=1)
    listener = database.connect()
    listener.execute(f"LISTEN {channel(database)}".encode())
    each = 1000

    def insert() -> None:
        with database.connect() as session:
            for _ in range(each):
                session.execute("INSERT INTO task (input, plan) VALUES ('SELECT 1', 'infinity')")

    def sent() -> int:
        clients = [threading.Thread(target=insert) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return len(list(listener.notifies(timeout=0.5)))

    # Whoever inserts while a sleeping master waits for the processor notifies it: not at every time.
    eventually(lambda: sent() < 0.45 * CLIENTS * each, timeout=120)
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"


def test_stranger_who_floods_the_channel_costs_few_looks_and_delays_nobody(
    talkative: Database, master: Callable[..., Master]
) -> None:
    master(talkative.conninfo)
    stranger, name = talkative.connect(), channel(talkative)
    talkative.wait(talkative.insert("SELECT 1", delete=False))
    before, since, sent = looks(talkative), time.monotonic(), 0
    while time.monotonic() - since < 1.5 or sent < 1000:
        stranger.execute(f"NOTIFY {name}".encode())
        sent += 1
    spent = time.monotonic() - since
    assert looks(talkative) - before < 150 * spent
    for _ in range(5):
        stranger.execute(f"NOTIFY {name}".encode())
        id = talkative.insert("SELECT 1", delete=False)
        assert talkative.wait(id)["state"] == "DONE"


def walk_beside_a_full_group(database: Database, master: Callable[..., Master], due: str) -> None:
    """A master, and more rows of a group that is full than a look sees, due since then, beside 30,000 other groups."""
    master("--safety", "1h", database.conninfo, tables=1)
    database.wait(database.insert("SELECT pg_sleep(86400)", group="full"), "WORK")
    fill = """INSERT INTO task (input, "group", plan) SELECT 'SELECT 1', {}, {} FROM generate_series(1, {}) AS n"""
    database.execute(fill.format("'later ' || n", "now() + interval '1 day'", 30000))
    database.execute(fill.format("'full'", due, 500))


def test_long_walk_through_groups_costs_few_looks_and_delays_nobody(
    talkative: Database, master: Callable[..., Master]
) -> None:
    """Behind a group that is full. Between the pieces of the walk the master waits, and whoever inserts calls."""
    walk_beside_a_full_group(talkative, master, "now()")
    for number in range(3):  # it walks without a pause until somebody calls
        talkative.wait(talkative.insert("SELECT 1", group=f"first {number}", delete=False), "DONE")
    passes(0.2)
    backend = eventually(lambda: asleep(talkative))
    before, used, since = looks(talkative), cpu_seconds(backend), time.monotonic()
    passes(2.0)
    assert cpu_seconds(backend) - used < 0.12 * (time.monotonic() - since)
    walked = looks(talkative) - before
    assert walked > 0
    assert eventually(lambda: asleep(talkative)) == backend
    for number in range(5):
        id = talkative.insert("SELECT 1", group=f"other {number}", delete=False)
        assert talkative.wait(id)["state"] == "DONE"
    passes(0.5)  # it has not ended yet
    after = looks(talkative)
    eventually(lambda: looks(talkative) > after)
    talkative.execute("DELETE FROM task")


def test_task_that_comes_alone_during_a_walk_through_groups_is_looked_for_alone(
    talkative: Database, master: Callable[..., Master]
) -> None:
    """What is due for long in a group that is full need not be read for it, as soon as the walk has begun."""
    walk_beside_a_full_group(talkative, master, "now() - n * interval '1 s' - interval '100 s'")
    passes(0.2)
    before = finds(talkative)
    for number in range(20):
        id = talkative.insert("SELECT 1", group=f"other {number}", delete=False)
        assert talkative.wait(id)["state"] == "DONE"
        time.sleep(0.02)
    assert finds(talkative) - before >= 10
    after = looks(talkative)
    eventually(lambda: looks(talkative) > after)
    talkative.execute("DELETE FROM task")


def test_many_tables_that_are_polled_cost_less_than_half_a_core(
    database: Database, master: Callable[..., Master]
) -> None:
    """Each wants to be polled every millisecond, which no process could do."""
    conninfo = json.dumps(database.conninfo)
    entry = "[[database]]\nconninfo = {}\ntable = {}\nsleep = 1\nwake = false\n"
    tables = [f"polled_{n}" for n in range(8)]
    one = master(config="".join(entry.format(conninfo, json.dumps(table)) for table in tables))
    before, since, polls = cpu_seconds(one.pid), time.monotonic(), transactions(database)
    passes(1.5)
    spent = time.monotonic() - since
    assert cpu_seconds(one.pid) - before < 0.55 * spent
    eventually(lambda: transactions(database) - polls > 8 * 5 * spent)
    for table in tables[::4]:
        database.table = table
        assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"


def test_many_groups_with_one_task_each_need_no_more_workers_than_there_may_be(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--workers", "4", "--linger", "1 min", database.conninfo, tables=1)
    before = cpu_seconds(one.pid)
    database.execute(
        "INSERT INTO task (input, \"group\", delete) SELECT 'SELECT 1', n, false FROM generate_series(1, 200) AS n"
    )
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(200,)], timeout=40)
    assert len(one.wait_log("worker_forked", 4)) == 4
    assert cpu_seconds(one.pid) - before < 200 * 0.006


def test_insert_of_many_rows_costs_a_small_multiple_of_a_bare_table(database: Database) -> None:
    install(database)
    database.execute("CREATE TABLE bare (LIKE task INCLUDING DEFAULTS INCLUDING IDENTITY, PRIMARY KEY (id))")
    session = database.connect()

    def cost(table: str) -> float:
        before = cpu_seconds(session.info.backend_pid)
        query = f"INSERT INTO {table} (input, \"group\") SELECT 'SELECT 1', n % 100 FROM generate_series(1, 15000) AS n"
        session.execute(query.encode())
        return cpu_seconds(session.info.backend_pid) - before

    costs = [(cost("task"), cost("bare")) for _ in range(5)]
    # The median: one of them may by chance take half of what the others do.
    assert median(task / max(bare, 0.01) for task, bare in costs) < 3.5, costs
