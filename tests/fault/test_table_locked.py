"""The task table is locked, rebuilt or emptied by its users while it is busy: nothing is lost, nothing runs twice."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.locks import cpu_seconds, held, passes, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

LONGER = 6.5
"""Seconds; our own statements give up a lock after five."""

RUNNING = 900
"""An advisory lock that runs wait for, so that they end while the table is locked."""


PLAIN = "INSERT INTO ledger (id) VALUES (current_setting('pg_task.id')::bigint)"
"""An entry in the ledger by a task that does not touch the task table itself, and so holds no lock on it."""


@dataclass(frozen=True)
class Hold:
    """What a user's transaction does, and what of the table's work goes on meanwhile."""

    name: str
    statement: str
    inserts: bool  # an application can insert


HOLDS = (
    Hold("access exclusive", "LOCK TABLE task IN ACCESS EXCLUSIVE MODE", inserts=False),
    Hold("share", "LOCK TABLE task IN SHARE MODE", inserts=False),
    Hold("who is held", "LOCK TABLE task_held IN ACCESS EXCLUSIVE MODE", inserts=True),
    Hold("planned rows", "SELECT FROM task WHERE state = 'PLAN' FOR UPDATE", inserts=True),
    Hold("running rows", "SELECT FROM task WHERE state = 'WORK' FOR UPDATE", inserts=True),
)


class Held:
    """A served database whose task table somebody holds."""

    def __init__(self, database: Database, hold: Hold) -> None:
        self.database, self.hold = database, hold
        self.ledger = Ledger(database)
        self.session = database.connect(autocommit=False)
        self.gate = database.connect()

    def begin(self) -> None:
        """Runs of all kinds that wait at the gate, more that are planned, and then the lock."""
        self.gate.execute(f"SELECT pg_advisory_lock({RUNNING})".encode())
        wait = f"{PLAIN}; SELECT pg_advisory_lock_shared({RUNNING})"
        self.ledger.fill(2, groups=2, input=wait, ms=0, max=1)
        self.ledger.fill(2, groups=2, input=wait, ms=0, atomic=False, max=1)
        self.ledger.fill(8, groups=2, input=PLAIN)
        wait_runs(self.database, 4)
        self.session.execute(self.hold.statement.encode())
        self.gate.close()

    def insert(self) -> None:
        """As an application would, on a session of its own; this may wait until the lock is gone."""
        with psycopg.connect(self.database.conninfo, autocommit=True) as session:
            for n in range(6):
                session.execute(
                    'INSERT INTO task ("group", input, delete) VALUES (%s, %s, false)', [f"ledger late {n % 3}", PLAIN]
                )


def test_locks_that_are_held_for_longer_than_ours_wait_lose_nothing(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    """All kinds of locks at once, each in a database of its own, since the time that they take is the same."""
    holds = [Held(one, hold) for hold, one in zip(HOLDS, [database, *(new_database() for _ in HOLDS[1:])], strict=True)]
    one = master(*(h.database.conninfo for h in holds))
    for each in holds:
        each.begin()
    with ThreadPoolExecutor(len(holds)) as pool:
        inserts = [pool.submit(each.insert) for each in holds]
        for each, insert in zip(holds, inserts, strict=True):
            each.ledger.wanted += 6
            if each.hold.inserts:
                insert.result(60)
        passes(2)
        before = cpu_seconds([one.pid, *one.workers()])
        passes(LONGER - 2)
        assert cpu_seconds([one.pid, *one.workers()]) - before < 2, "somebody spins"
        finished = {each.hold.name: each.ledger.finished for each in holds}
        eventually(lambda: finished["planned rows"]() >= 2 + 6 and finished["running rows"]() >= 6)
        counts = {each.hold.name: each.ledger.finished() for each in holds}
        for each in holds:
            each.session.rollback()
        for insert in inserts:
            insert.result(60)
    for each in holds:
        each.ledger.settled()
    # Rows that are held keep only themselves: what came later has run meanwhile.
    assert counts["planned rows"] >= 2 + 6, counts
    assert counts["running rows"] >= 6, counts
    complaints = one.logged("WARNING|ERROR")
    assert len(complaints) < 40, "\n".join(complaints)
    up = {h.database.name for h in holds if one.logged(f"table_up.*{h.database.name}")}
    down = {h.database.name for h in holds if one.logged(f"table_down.*{h.database.name}")}
    assert up == down


# Rebuilt while it is busy


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("rebuilt")) as one:
        yield one


@pytest.fixture(scope="module")
def book(base: Served) -> Ledger:
    return Ledger(base.database)


REBUILDS = {
    "vacuum full": ["VACUUM FULL task"] * 3,
    "create index": ["CREATE INDEX task_data ON task (data)", "DROP INDEX task_data"] * 3,
    "add column": [
        "ALTER TABLE task ADD COLUMN own text",
        "ALTER TABLE task ADD COLUMN more double precision DEFAULT random()",  # rewrites the table
        "ALTER TABLE task ALTER COLUMN own TYPE varchar(9)",
        "ALTER TABLE task DROP COLUMN own, DROP COLUMN more",
    ],
    "analyze": ["ANALYZE task", "VACUUM ANALYZE task"] * 3,
    "reindex": ["REINDEX TABLE task", "REINDEX TABLE CONCURRENTLY task"],
    "cluster": ["CLUSTER task USING task_pkey"] * 3,
    "statistics": ["ALTER TABLE task ALTER COLUMN input SET STATISTICS 10", "ALTER TABLE task SET (fillfactor = 50)"],
}


@pytest.mark.parametrize("statements", REBUILDS.values(), ids=REBUILDS)
def test_table_is_rebuilt_under_load_and_every_task_runs_once(
    base: Served, book: Ledger, statements: list[str]
) -> None:
    before = book.finished()
    book.fill(60, groups=4, ms=2)
    # The next row of a repeated task is inserted with the columns of now.
    chain = base.database.insert("SELECT 1", repeat="3 ms", group="chain")
    for n, statement in enumerate(statements):
        eventually(lambda n=n: book.finished() > before + 5 * n)  # type: ignore[misc]
        eventually(lambda statement=statement: rebuilt(base.database, statement))  # type: ignore[misc]
    book.settled()
    eventually(lambda: chain_ends(base.database))
    assert base.database.tasks("\"group\" = 'chain' AND (state <> 'DONE' OR error IS NOT NULL OR attempt <> 1)") == []
    assert len(base.database.tasks("\"group\" = 'chain'")) > 1, chain
    base.database.execute("DELETE FROM task WHERE \"group\" = 'chain'")


def chain_ends(database: Database) -> bool:
    """Its last row may be planned while the others are changed: again, until there is none."""
    database.execute("UPDATE task SET repeat = '0' WHERE \"group\" = 'chain'")
    return not database.tasks("\"group\" = 'chain' AND state IN ('PLAN', 'TAKE', 'WORK')")


def rebuilt(database: Database, statement: str) -> bool:
    """REINDEX locks the table and then its indexes; who uses them goes the other way: either may be the victim."""
    try:
        database.execute(statement)
    except psycopg.errors.DeadlockDetected:
        return False
    return True


def test_row_that_is_truncated_away_while_it_runs_leaves_no_work_behind(base: Served, book: Ledger) -> None:
    database = base.database
    with held(database, RUNNING):
        database.insert(f"{PLAIN}; SELECT pg_advisory_xact_lock({RUNNING})", group="truncated")
        database.insert(f"{PLAIN}; SELECT pg_advisory_xact_lock({RUNNING}), 2", group="truncated too", delete=False)
        wait_runs(database, 2)
        before = book.finished()
        database.execute("TRUNCATE task")
        following = database.insert("SELECT 1", group="truncated", delete=False)
    assert database.wait(following)["state"] == "DONE"
    base.master.wait_log("run_disowned", count=2)
    assert book.finished() == before
