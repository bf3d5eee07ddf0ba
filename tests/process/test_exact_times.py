"""Planned tasks start at their time, whatever happens to the plan meanwhile."""

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise
from math import ceil

import pytest
from psycopg import RawCursor, sql

from pgtask.master import timers
from pgtask.master.taker import BEGINNING
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import passes
from tests.fixtures.served import served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

STALL = 20
"""Seconds: on no machine is a task so late that was not forgotten; what would find it otherwise comes after an hour."""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """Of a master that is of no use unless its timers and notifications are."""
    config = 'safety = "1h"\nsleep = "1h"'
    directory = tmp_path_factory.mktemp("exact")
    with served(server, directory, config=config, more='[master]\nlinger = "1min"') as one:
        yield one.database


@pytest.fixture
def slow(base: Database) -> Iterator[Database]:
    """The same with an empty table."""
    base.execute("DELETE FROM task")
    yield base
    base.close()


def in_ms(milliseconds: float) -> sql.SQL:
    return sql.SQL(f"clock_timestamp() + interval '{milliseconds} ms'")  # type: ignore[arg-type]


def lateness(database: Database, ids: list[int]) -> list[float]:
    rows = [database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE"] * len(ids)
    return [(row["start"] - row["plan"]).total_seconds() for row in rows]


def test_none_of_many_planned_tasks_is_early_or_forgotten(slow: Database) -> None:
    ids = [slow.insert("SELECT 1", group=f"g{n % 3}", plan=in_ms(300 + 17.3 * n), delete=False) for n in range(100)]
    late = sorted(lateness(slow, ids))
    assert late[0] >= 0
    assert late[-1] < STALL, late


def test_plan_that_was_moved_earlier_later_or_deleted_is_what_counts(slow: Database) -> None:
    earlier, later, deleted, untouched = (
        slow.insert("SELECT 1", group=f"g{n}", plan=in_ms(plan), delete=False)
        for n, plan in enumerate((3600_000, 1500, 1500, 900))
    )
    slow.execute("UPDATE task SET plan = clock_timestamp() + interval '200 ms' WHERE id = %s", [earlier])
    slow.execute("UPDATE task SET plan = plan + interval '200 ms' WHERE id = %s", [later])
    slow.execute("DELETE FROM task WHERE id = %s", [deleted])
    late = lateness(slow, [earlier, untouched, later])
    assert 0 <= min(late) <= max(late) < STALL
    assert slow.task(deleted) is None


def test_rows_that_were_long_uncommitted_start_at_once_when_they_are(slow: Database) -> None:
    for asleep in (True, False):
        passes(0.3)
        if not asleep:
            slow.insert("SELECT 1", group="busy")
        writer = slow.connect(autocommit=False)
        writer.execute(
            "INSERT INTO task (input, \"group\", delete, data) SELECT 'SELECT 1', n, false, %s"
            " FROM generate_series(1, 3) AS n",
            [str(asleep)],
        )
        passes(1.2)
        writer.commit()
        [(committed,)] = slow.execute("SELECT clock_timestamp()")
        where = f"data = '{asleep}'"
        eventually(lambda: [row["state"] for row in slow.tasks(where)] == ["DONE"] * 3)  # noqa: B023
        assert max((row["start"] - committed).total_seconds() for row in slow.tasks(where)) < STALL


def test_repeat_of_a_second_keeps_its_grid(slow: Database) -> None:
    id = slow.insert("SELECT 1", repeat="1 s", plan=in_ms(100), delete=False)
    slow.wait(id)
    eventually(lambda: slow.execute("SELECT count(*) >= 4 FROM task WHERE state = 'DONE'") == [(True,)])
    rows = slow.tasks("state = 'DONE'")
    for before, after in pairwise(rows):
        step = (after["plan"] - before["plan"]).total_seconds()
        # The next one, or the one after those that a run was too late for.
        assert step == max(1, ceil((before["stop"] - before["plan"]).total_seconds()))
    assert all(0 <= (row["start"] - row["plan"]).total_seconds() < STALL for row in rows)
    slow.execute("UPDATE task SET state = 'STOP' WHERE state = 'PLAN'")


def test_plan_that_falls_between_the_instant_and_the_take_is_not_missed(database: Database) -> None:
    """The next moment is the first one after the instant that is taken for, also where it has passed meanwhile."""
    install(database)
    store = Names(schema="public", table="task").store()
    id = database.insert("SELECT 1", plan=in_ms(300))
    with database.connect() as session:
        cursor = RawCursor(session)
        [(instant,)] = cursor.execute(b"SELECT clock_timestamp()").fetchall()
        eventually(
            lambda: database.execute("SELECT plan < clock_timestamp() FROM task WHERE id = %s", [id]) == [(True,)]
        )
        parameters = [10, [], 200, instant, [], "2000-01-01", None, *BEGINNING, None, []]
        [row] = cursor.execute(store.text("take").encode(), parameters).fetchall()
    seen, next, taken = row[0], row[7], row[8]
    assert (seen, taken) == (0, None)
    assert next < 0


def test_timer_is_not_rounded_to_milliseconds() -> None:
    async def naps() -> list[float]:
        lengths = []
        for _ in range(200):
            began = time.monotonic()
            await asyncio.sleep(0.0002)
            lengths.append(time.monotonic() - began)
        return lengths

    lengths = timers.run(naps())
    assert 0.0002 <= min(lengths) < 0.001
