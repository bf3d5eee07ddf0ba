"""A worker's look for its group's next row, while others touch the first ones."""

import threading
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgtask.async_session import SETTINGS, with_options
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.wait import eventually

INSERT = """INSERT INTO task ("group", input, max) VALUES ('g', 'SELECT 1', %s) RETURNING id"""
LANE = "hashtextextended('g', hashtextextended('', 0))"


class Worker:
    """A session with a running row of group g, and the statement of a worker that looks for the next one."""

    def __init__(self, database: Database, most: int) -> None:
        self.session = database.connect(make_conninfo(**with_options(database.conninfo, SETTINGS)))
        look = Names(schema="public", table="task").store().text("look")
        self.session.execute(f"PREPARE look AS {look}".encode())
        self.own = database.execute(INSERT, [most])[0][0]
        begin = "UPDATE task SET state = 'WORK', pid = %s, start = now() WHERE id = %s"
        database.execute(begin, [self.session.info.backend_pid, self.own])

    def look(self) -> list[tuple[Any, ...]]:
        """In a transaction that stays open."""
        self.session.execute("BEGIN")
        values = f"'-infinity', 'g', '', 0, 'inf', 1, {LANE}, 0, {self.own}"
        return self.session.execute(f"EXECUTE look ({values})".encode()).fetchall()


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


@pytest.mark.parametrize(("most", "first"), [(0, True), (3, False)])
def test_row_that_was_just_locked_keeps_its_place_where_tasks_run_one_after_another(
    table: Database, most: int, first: bool
) -> None:
    """Elsewhere it is left, for a moment, to the next look."""
    worker = Worker(table, most)
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
