"""What a worker takes of its group next, while others touch the first rows: each statement that looks for it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgtask.async_session import SETTINGS, with_options
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

INSERT = """INSERT INTO task ("group", input, max) VALUES ('g', 'SELECT 1', %s) RETURNING id"""
LANE = "hashtextextended('g', hashtextextended('', 0))"


STATEMENTS = (
    "look",
    "look_below",
    "look_after",
    "next",
    "next_below",
    "next_after",
    "next_batch",
    "next_batch_after",
)


class Worker:
    """A session with a row of group g that runs, or has run, and a statement of a worker that takes the next one."""

    def __init__(self, database: Database, most: int, name: str = "look") -> None:
        self.session = database.connect(make_conninfo(**with_options(database.conninfo, SETTINGS)))
        self.session.execute(f"PREPARE it AS {Names(schema='public', table='task').store().text(name)}".encode())
        self.own = database.execute(INSERT, [most])[0][0]
        begin = "UPDATE task SET state = 'WORK', pid = %s, start = now() WHERE id = %s RETURNING plan::text"
        [(plan,)] = database.execute(begin, [self.session.info.backend_pid, self.own])
        if name.startswith("next"):  # stands behind its end
            database.execute("UPDATE task SET state = 'DONE', stop = now() WHERE id = %s", [self.own])
        after = f"{self.own}, {most}, '{plan}'"
        more = {
            "look": f", {self.own}",
            "look_below": f", {self.own}",
            "look_after": f", {after}",
            "next_after": f", {after}",
            "next_batch": ", 10",
            "next_batch_after": f", 10, {most}, '{plan}', {self.own}",
        }
        self._execute = f"EXECUTE it ('-infinity', 'g', '', 0, 1, 1, {LANE}, 0{more.get(name, '')})"

    def look(self) -> list[tuple[Any, ...]]:
        """In a transaction that stays open."""
        self.session.execute("BEGIN")
        return self.session.execute(self._execute.encode()).fetchall()


@pytest.fixture
def table(database: Database) -> Database:
    install(database)
    database.execute("UPDATE task_master SET term = 1")
    return database


def test_row_that_was_taken_since_the_look_began_is_not_locked(table: Database) -> None:
    """Whoever runs it would wait at its end for the transaction of whoever has looked."""
    worker = Worker(table, most=3)
    taken, free = (table.execute(INSERT, [3])[0][0] for _ in range(2))
    other = table.connect()
    found: list[tuple[Any, ...]] = []
    looking = threading.Thread(target=lambda: found.extend(worker.look()))
    with other.transaction():
        other.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [worker.own])
        looking.start()
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        eventually(lambda: table.admin_execute(waits, [worker.session.info.backend_pid]) == [(True,)])
        table.execute("UPDATE task SET state = 'WORK', pid = 1, start = now() WHERE id = %s", [taken])
    looking.join()
    assert [row[0] for row in found] == [free]
    lock = "SELECT id FROM task WHERE id = %s FOR NO KEY UPDATE NOWAIT"
    assert table.execute(lock, [taken]) == [(taken,)]
    assert table.execute("SELECT id FROM task WHERE id = %s FOR UPDATE SKIP LOCKED", [free]) == []


@pytest.mark.parametrize(("most", "first"), [(0, True), (3, False)], ids=["one after another", "side by side"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_row_that_was_just_locked_keeps_its_place_where_tasks_run_one_after_another(
    table: Database, name: str, most: int, first: bool
) -> None:
    """Elsewhere it is left, for a moment, to the next look."""
    worker = Worker(table, most, name)
    ids = [table.execute(INSERT, [most])[0][0] for _ in range(2)]
    with table.connect(autocommit=False) as user:
        user.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [ids[0]])
    assert [row[0] for row in worker.look()] == [ids[0] if first else ids[1]]
    worker.session.execute("ROLLBACK")
    for _ in range(20):
        table.execute("SELECT txid_current()")
    assert [row[0] for row in worker.look()] == [ids[0]]


def test_row_that_its_own_transaction_has_locked_is_not_left(table: Database) -> None:
    """By a foreign key of another table, say, that its application has filled in the same transaction."""
    worker = Worker(table, most=3)
    table.execute("CREATE TABLE job (task bigint REFERENCES task (id))")
    with table.connect(autocommit=False) as user:
        [(id,)] = user.execute(INSERT, [3]).fetchall()
        user.execute("INSERT INTO job VALUES (%s)", [id])
    assert [row[0] for row in worker.look()] == [id]


def test_row_that_a_worker_has_left_is_the_masters(database: Database, master: Callable[..., Master]) -> None:
    """At once: there may be nobody else who would take it."""
    master("--workers", "1", "--safety", "1h", database.conninfo)
    with held(database):
        first = database.insert(WAIT, max=3, delete=False)
        database.wait_running(first)
        left = database.insert("SELECT 1", max=3, delete=False)
        with database.connect(autocommit=False) as user:
            user.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [left])
    assert database.wait(left)["state"] == "DONE"
    assert database.task(first)["pid"] == database.task(left)["pid"]
