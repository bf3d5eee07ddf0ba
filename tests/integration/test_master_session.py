"""The master's own session: what it says, and how."""

import asyncio
from typing import Any

from pgtask import config
from pgtask.async_session import AsyncSession
from pgtask.process import Children
from tests.fixtures.database import Database
from tests.fixtures.locks import runs_waiting

ASK = "SELECT $1::bigint, $2::text[], $3::text"
VALUES = ((1, [], None), (2**40, ["a", 'b"\\', None], "infinity"), (None, [1, 2], None))
PREPARED = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT $1%'"


def test_statement_is_prepared_once_whatever_its_values_are(database: Database) -> None:
    """None is as good as a value, a small number as a great one, and an empty list as a full one."""
    [table] = config.load(None, [database.conninfo], {}, {}).tables

    async def ask() -> list[tuple[Any, ...]]:
        async with await AsyncSession.open(table, Children(), name="pgtask test") as session:
            return [*[await session.one(ASK, *values) for values in VALUES], await session.one(PREPARED)]

    *answers, prepared = asyncio.run(ask())
    assert answers == [(1, [], None), (2**40, ["a", 'b"\\', None], "infinity"), (None, ["1", "2"], None)]
    assert prepared == (1,)


def test_notification_that_comes_while_a_statement_runs_is_heard_with_its_answer(database: Database) -> None:
    """The server tells it between the answer and being ready again: nothing that comes later would wake who waits."""
    [table] = config.load(None, [database.conninfo], {}, {}).tables
    heard: list[str] = []
    other = database.connect()
    other.execute("SELECT pg_advisory_lock(7)")

    async def ask() -> None:
        async with await AsyncSession.open(table, Children(), name="pgtask test", on_notify=heard.append) as session:
            await session.do("LISTEN news")
            asking = asyncio.create_task(session.do("SELECT pg_advisory_lock(7)"))
            while not runs_waiting(database):
                await asyncio.sleep(0.01)
            other.execute("NOTIFY news, 'told'")
            other.execute("SELECT pg_advisory_unlock(7)")
            await asking

    asyncio.run(ask())
    assert heard == ["told"]
