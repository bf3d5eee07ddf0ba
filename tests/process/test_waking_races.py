"""The races that the ASLEEP lock closes, each with the master stopped in the middle of it.

A proxy holds back the one statement that comes next. What is inserted meanwhile must be found, with `safety` an hour
away.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import falls_asleep, held, passes
from tests.fixtures.master import Master
from tests.fixtures.proxy import Proxy
from tests.fixtures.wait import eventually

LOCK = "SELECT pg_try_advisory_lock($1::oid::int, -1)"
UNLOCK = "SELECT pg_advisory_unlock("
TAKE = "WITH RECURSIVE instant AS"

UNFINISHED = "state IN ('PLAN', 'TAKE', 'WORK')"

STEPS = [(2, LOCK), (2, TAKE), (2, UNLOCK), (1, TAKE)]
"""How many tasks come at once, and before which statement the master is stopped: one that is alone does not wake it."""


@dataclass
class Stopper:
    """Holds the master back at a statement of its own: it goes by the name that it was prepared with."""

    database: Database
    proxy: Proxy

    def stop_before(self, statement: str) -> Callable[[], bool]:
        """Whether the master has sent it; it does not arrive until `go_on`."""
        text = self.database.server.log_text()  # type: ignore[union-attr]
        start = rf"^pgtask master\|{self.database.name}\|LOG:  execute (\w+): {re.escape(statement)}"
        name = re.findall(start, text, re.MULTILINE)[0]  # of a look: while no worker is busy
        return self.proxy.trap(name.encode() + b"\0", name="pgtask master", deaf=True).sprung.is_set

    def go_on(self) -> None:
        self.proxy.hear()


@pytest.fixture
def stopper(talkative: Database, new_proxy: Callable[..., Proxy], master: Callable[..., Master]) -> Iterator[Stopper]:
    proxy = new_proxy(talkative.tcp)
    master("--safety", "1h", "--sleep", "1h", proxy.conninfo, tables=1)
    for _ in range(2):  # so that every statement has been prepared
        insert(talkative, "SELECT 1", 2)
        eventually(lambda: not talkative.tasks(UNFINISHED))
        falls_asleep(talkative)
    yield Stopper(talkative, proxy)
    eventually(lambda: not talkative.tasks(UNFINISHED))


def insert(database: Database, task: str, count: int) -> None:
    """So many at once, in one group; of different `max`, so that the master looks once more whether there is a slot."""
    database.execute(
        """INSERT INTO task (input, "group", max, delete)
        SELECT %s, 'wakes it', n - 1, false FROM generate_series(1, %s) AS n""",
        [task, count],
    )


def wake_and_stop(stopper: Stopper, tasks: int, statement: str) -> None:
    """By a task that goes on and on: the end of its run would wake the master once more."""
    there = stopper.stop_before(statement)
    insert(stopper.database, "SELECT pg_advisory_lock(7)", tasks)
    eventually(there)


@pytest.mark.parametrize(("tasks", "statement"), STEPS)
def test_insert_that_comes_between_two_steps_of_falling_asleep_or_waking_is_found(
    stopper: Stopper, tasks: int, statement: str
) -> None:
    database = stopper.database
    with held(database, 7):
        wake_and_stop(stopper, tasks, statement)
        id = database.insert("SELECT 1", group="in between", delete=False)
        stopper.go_on()
        assert database.wait(id)["state"] == "DONE"


@pytest.mark.parametrize(("tasks", "statement"), [step for step in STEPS if UNLOCK not in step])
def test_plan_that_comes_between_two_steps_of_falling_asleep_is_met(
    stopper: Stopper, tasks: int, statement: str
) -> None:
    """The next moment is the first one after the instant of the take."""
    database = stopper.database
    id = database.insert("SELECT 1", group="planned", plan="2100-01-01", delete=False)
    falls_asleep(database)
    # Without a word to the master.
    database.execute("ALTER TABLE task DISABLE TRIGGER pgtask_change")
    with held(database, 7):
        database.execute("UPDATE task SET plan = clock_timestamp() + interval '1 s' WHERE id = %s", [id])
        wake_and_stop(stopper, tasks, statement)
        due = "SELECT plan < clock_timestamp() FROM task WHERE id = %s"
        eventually(lambda: database.execute(due, [id]) == [(True,)])
        stopper.go_on()
        assert database.wait(id)["state"] == "DONE"


def test_due_row_that_was_locked_while_the_master_went_from_group_to_group_is_found(
    database: Database, master: Callable[..., Master]
) -> None:
    """It is seen in the first portion of a walk that takes more than one, before the master sleeps."""
    master("--safety", "1h", database.conninfo, tables=1)
    full = "INSERT INTO task (input, \"group\") SELECT 'SELECT 1', 'full' FROM generate_series(1, 300)"
    with held(database, 7):
        database.wait(database.insert("SELECT pg_advisory_lock(7)", group="full"), "WORK")
        database.execute(full)
        many = "SELECT 'SELECT 1', n, 'infinity' FROM generate_series(1, 500) AS n"
        database.execute(f'INSERT INTO task (input, "group", plan) {many}')
        [(lowest,)] = database.execute(
            "SELECT n::text FROM generate_series(1000, 3000) AS n"
            " ORDER BY hashtextextended(n::text, hashtextextended('', 0)) LIMIT 1"
        )
        plan = sql.SQL("clock_timestamp() + interval '500 ms'")
        id = database.insert("SELECT 1", group=lowest, delete=False, plan=plan)
        with database.connect(autocommit=False) as locking:
            locking.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [id])
            passes(0.6)
            database.execute(full)
            passes(1)
        assert database.wait(id)["state"] == "DONE"
        database.execute("DELETE FROM task WHERE \"group\" = 'full' AND state = 'PLAN'")
