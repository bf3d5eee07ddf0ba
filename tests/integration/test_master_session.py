"""The master's own session: what it says, and how."""

import asyncio
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from pgtask import config
from pgtask.async_session import AsyncSession
from pgtask.process import Children
from tests.fixtures.database import Database
from tests.fixtures.locks import passes, runs_waiting
from tests.fixtures.proxy import Proxy, Trap
from tests.fixtures.wait import eventually

ASK = "SELECT $1::bigint, $2::text[], $3::text"
VALUES = ((1, [], None), (2**40, ["a", 'b"\\', None], "infinity"), (None, [1, 2], None))
READY = b"Z\0\0\0\5"
"""How a server says that its answer has ended."""

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


def test_notification_that_is_read_with_the_end_of_an_answer_is_heard(database: Database) -> None:
    """It came before the loop had time to read the answer: nothing more will come to be read."""
    [table] = config.load(None, [database.conninfo], {}, {}).tables
    heard: list[str] = []

    async def ask() -> list[str]:
        async with await AsyncSession.open(table, Children(), name="pgtask test", on_notify=heard.append) as session:
            await session.do("LISTEN x")
            await session.one("SELECT 1")
            asking = asyncio.create_task(session.one("SELECT 1"))
            await asyncio.sleep(0)
            arrives(session.conn.fileno(), b"SELECT 1\0")
            database.execute("NOTIFY x, 'called'")
            arrives(session.conn.fileno(), b"called\0")
            await asking
            return list(heard)

    assert asyncio.run(ask()) == ["called"]


def test_loop_goes_on_while_the_end_of_an_answer_does_not_come(
    database: Database, new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    [table] = config.load(None, [proxy.conninfo], {}, {}).tables

    async def ask() -> bool:
        loop = asyncio.get_running_loop()
        async with await AsyncSession.open(table, Children(), name="pgtask test") as session:
            trap = proxy.trap(b"refused", answer=READY, deaf=True)
            asking = asyncio.create_task(session.one("SELECT 1 / (length('refused') - 7)"))
            turning = await asyncio.to_thread(turns_after, loop, trap, proxy)
            with pytest.raises(psycopg.errors.DivisionByZero):
                await asking
            return turning

    assert asyncio.run(ask())


def test_lost_session_lets_go_of_its_descriptor_at_once(database: Database) -> None:
    """Somebody else may have it before the waiting coroutine goes on."""
    [table] = config.load(None, [database.conninfo], {}, {}).tables
    read: list[bytes] = []

    async def lose() -> None:
        loop = asyncio.get_running_loop()
        session = await AsyncSession.open(table, Children(), name="pgtask test")
        waiting = asyncio.create_task(session.wait(asyncio.Event(), None))
        await asyncio.sleep(0)
        number = session.conn.fileno()
        database.admin_execute("SELECT pg_terminate_backend(%s, 5000)", [session.pid])
        while not session.conn.closed:
            await asyncio.sleep(0)
        left, right = socket.socketpair()
        with left, right:
            assert number in (left.fileno(), right.fileno())
            mine, other = (left, right) if left.fileno() == number else (right, left)
            loop.add_reader(mine, lambda: read.append(mine.recv(10)))
            with pytest.raises(psycopg.OperationalError):
                await waiting
            other.send(b"word")
            await asyncio.sleep(0.1)
            loop.remove_reader(mine)
        await session.close()

    asyncio.run(lose())
    assert read == [b"word"]


def arrives(descriptor: int, pattern: bytes) -> None:
    """Until it can be read there, without reading it."""
    with socket.socket(fileno=os.dup(descriptor)) as one:
        eventually(lambda: select.select([one], [], [], 0)[0] and pattern in one.recv(65536, socket.MSG_PEEK))


def turns_after(loop: asyncio.AbstractEventLoop, trap: Trap, proxy: Proxy) -> bool:
    """Does the loop turn while the proxy is deaf? It hears again afterwards."""
    turned = threading.Event()
    try:
        assert trap.sprung.wait(20)
        passes(0.1)  # what came before has been read
        loop.call_soon_threadsafe(turned.set)
        return turned.wait(20)
    finally:
        proxy.hear()
