"""The master's session on one task table: our own statements, from the loop that every table shares.

So nothing here may block the loop, and nothing may wait for ever: a server that gives no answer in time is cut off by
shutting the socket down, which ends the wait with an error like any other loss. (Cancelling the coroutine instead
would make psycopg send a cancel request and then wait for the answer that does not come.)
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, conninfo

from pgtask.config import TableConfig
from pgtask.process import Children
from pgtask.resolve import resolved

CONNECT_TIMEOUT = 30.0

KEEPALIVE = 3.0
"""Seconds between the bare Syncs of a waiting session; the server ends one that is silent for SILENCE."""

SILENCE = 10

ANSWER = 40.0
"""Seconds that the server may take for one of our statements: longer than it may take by its own statement_timeout."""

SETTINGS = {
    "search_path": "pg_catalog,pg_temp",
    "statement_timeout": "30s",
    "lock_timeout": "5s",
    "idle_session_timeout": f"{SILENCE}s",
    "idle_in_transaction_session_timeout": f"{SILENCE}s",
    "datestyle": "ISO",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    # What a take or a rescue wrote may be lost in a crash, with our session: it is done again. And what must last comes
    # later in the same log: a worker's begin.
    "synchronous_commit": "off",
    "client_min_messages": "error",
    "jit": "off",
    # Our statements walk indexes in order and stop early, whatever the statistics of a young table say.
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "enable_sort": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""As startup options, which beat what the role or the database is set to."""

KEEPALIVES = {"keepalives_idle": "5", "keepalives_interval": "3", "keepalives_count": "3", "tcp_user_timeout": "12000"}


class AsyncSession:
    """An AsyncConnection in autocommit mode that hears notifications while it waits.

    `on_notify` is called with the payload of each. Every method raises psycopg.Error; the loss of the session is
    psycopg.OperationalError with the server's last words.
    """

    def __init__(self, conn: AsyncConnection[Any], on_notify: Callable[[str], None]):
        self.conn = conn
        self._on_notify = on_notify
        self._last_words = ""
        conn.add_notify_handler(lambda notify: on_notify(notify.payload))
        conn.add_notice_handler(self._noticed)

    @classmethod
    async def open(
        cls, table: TableConfig, children: Children, *, name: str, on_notify: Callable[[str], None] = lambda _: None
    ) -> Self:
        """A session on the table's database, named for pg_stat_activity. Raises psycopg.Error, TimeoutError."""
        text = await resolved(table.conninfo, children, dict(os.environ))
        params = {**KEEPALIVES, **with_options(text, SETTINGS), "application_name": name}
        async with asyncio.timeout(CONNECT_TIMEOUT):
            conn = await AsyncConnection.connect(
                conninfo.make_conninfo(**params),
                autocommit=True,
                prepare_threshold=0,
                cursor_factory=AsyncRawCursor,
                client_encoding="utf8",
            )
        return cls(conn, on_notify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int:
        """The backend's, as the server told it at the start."""
        return self.conn.info.backend_pid

    def parameter(self, name: str) -> str:
        """A value that the server reports, such as server_encoding; "" if it does not."""
        return self.conn.info.parameter_status(name) or ""

    def place(self) -> dict[str, str]:
        """The parameters of a conninfo that lead to this very server."""
        info = self.conn.info
        return {"host": info.host, "hostaddr": info.hostaddr, "port": str(info.port)}

    async def close(self) -> None:
        await self.conn.close()

    async def rows(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        with self.bounded(ANSWER):
            cursor = await self.conn.execute(text.encode(), [_text(value) for value in params])
            rows: list[tuple[Any, ...]] = await cursor.fetchall()
            return rows

    async def one(self, text: str, *params: object) -> tuple[Any, ...]:
        return (await self.rows(text, *params))[0]

    async def do(self, text: str, *params: object) -> None:
        with self.bounded(ANSWER):
            await self.conn.execute(text.encode(), [_text(value) for value in params])

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """A short transaction, or a savepoint inside of one."""
        with self.bounded(ANSWER):
            async with self.conn.transaction():
                yield

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Cut the session off if what is done in this context takes longer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        timer = loop.call_at(began + seconds, self._cut_off)
        try:
            yield
        except psycopg.OperationalError as error:
            if loop.time() - began < seconds:
                raise
            raise psycopg.OperationalError(f"the server gave no answer for {seconds:.0f} s") from error
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        """The socket is libpq's: a duplicate shuts it down without closing what is not ours."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.conn.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    async def wait(self, woken: asyncio.Event, timeout: float | None) -> None:
        """Wait for the event, a notification or `timeout` seconds, with a sign of life every few seconds."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not woken.is_set():
            left = KEEPALIVE if deadline is None else min(KEEPALIVE, deadline - time.monotonic())
            if left <= 0:
                return
            descriptor = self.conn.fileno()
            loop.add_reader(descriptor, self._readable, woken)
            try:
                came = await event_or_timeout(woken, left)
            finally:
                loop.remove_reader(descriptor)
            if self.conn.closed:
                raise psycopg.OperationalError(self._last_words or "the connection was closed")
            if not came and left == KEEPALIVE:
                await self._sign_of_life()

    def _readable(self, woken: asyncio.Event) -> None:
        """Something came while we waited: notifications, or the end of the session."""
        pgconn = self.conn.pgconn
        try:
            pgconn.consume_input()
        except psycopg.OperationalError:
            woken.set()
            return
        while (notify := pgconn.notifies()) is not None:
            self._on_notify(notify.extra.decode(errors="replace"))

    async def _sign_of_life(self) -> None:
        """A bare Sync: no statement, but the server's idle_session_timeout starts anew."""
        with self.bounded(SILENCE):
            async with self.conn.pipeline() as pipeline:
                await pipeline.sync()

    def _noticed(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """What a server says before it ends a waiting session comes as a notice."""
        if diagnostic.severity_nonlocalized in ("FATAL", "PANIC"):
            self._last_words = diagnostic.message_primary or ""


async def event_or_timeout(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event came within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _text(value: object) -> str | None:
    """A parameter as the server reads it, of no type: one statement is prepared once, whatever its values are."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return "{" + ",".join(map(_element, value)) + "}"
    return str(value)


def _element(value: object) -> str:
    """Of an array."""
    if value is None:
        return "NULL"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def with_options(text: str, settings: dict[str, str]) -> dict[str, str]:
    """The conninfo's parameters, with these settings added to its (or the environment's) startup options."""
    params = {name: str(value) for name, value in conninfo.conninfo_to_dict(text).items()}
    options = params.get("options", os.environ.get("PGOPTIONS", ""))
    added = " ".join(_option(name, value) for name, value in settings.items())
    return {**params, "options": f"{options} {added}".strip()}


def _option(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace(" ", "\\ ")
    return f"-c {name}={escaped}"
