"""The session of the master, and of `pgtask doctor`, on one task table: our own statements, from a loop.

So nothing here may block the loop, and nothing may wait for ever: a server that gives no answer in time is cut off by
shutting the socket down, which ends the wait with an error like any other loss. (Cancelling the coroutine instead
would make psycopg send a cancel request and then wait for the answer that does not come.)
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Self

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, conninfo, pq
from psycopg.adapt import Transformer

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
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""As startup options, which beat what the role or the database is set to."""

TRANSACTION = ("BEGIN", "COMMIT", "ROLLBACK")
SAVEPOINT = ("SAVEPOINT pgtask", "RELEASE pgtask", "ROLLBACK TO pgtask", "RELEASE pgtask")
"""How it begins, how it ends, and what undoes it."""

KEEPALIVES = {"keepalives_idle": "5", "keepalives_interval": "3", "keepalives_count": "3", "tcp_user_timeout": "12000"}


class AsyncSession:
    """An AsyncConnection in autocommit mode that hears notifications while it waits.

    `on_notify` is called with the payload of each. Every method raises psycopg.Error; the loss of the session is
    psycopg.OperationalError with the server's last words. Our own statements, each prepared once, go by its libpq
    connection: a cursor takes longer to send and read one than the server to run it.
    """

    def __init__(self, conn: AsyncConnection[Any], on_notify: Callable[[str], None]):
        self.conn = conn
        self._on_notify = on_notify
        self._last_words = ""
        self._names: dict[str, bytes] = {}  # of the prepared statements, by text
        self._loader = Transformer(conn)
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
                prepare_threshold=None,
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
            result = await self._run(text, [_text(value) for value in params])
        self._loader.set_pgresult(result)
        return self._loader.load_rows(0, result.ntuples, tuple)

    async def one(self, text: str, *params: object) -> tuple[Any, ...]:
        return (await self.rows(text, *params))[0]

    async def do(self, text: str, *params: object) -> None:
        await self.rows(text, *params)

    async def _run(self, text: str, params: Sequence[bytes | None]) -> pq.abc.PGresult:
        pgconn = self.conn.pgconn
        if (name := self._names.get(text)) is None:
            name = b"pgtask_%d" % len(self._names)
            pgconn.send_prepare(name, text.encode())
            await self._answer(pgconn)
            self._names[text] = name
        pgconn.send_query_prepared(name, params)
        return await self._answer(pgconn)

    async def _answer(self, pgconn: pq.abc.PGconn) -> pq.abc.PGresult:
        """The result of the one statement that was sent."""
        while pgconn.flush():
            await until_ready(pgconn.socket, write=True)
            pgconn.consume_input()
        lost: psycopg.OperationalError | None = None
        last: pq.abc.PGresult | None = None
        while True:
            while pgconn.is_busy() and lost is None:  # also before the end of the answer: get_result would wait for it
                await until_ready(pgconn.socket)
                lost = self._read(pgconn)
            if (result := pgconn.get_result()) is None:
                break
            if last is None or last.status != pq.ExecStatus.FATAL_ERROR:  # an error, before what libpq says of the end
                last = result
        self._hear(pgconn)  # what came with the end: nothing more may come to be read
        if last is None or last.status == pq.ExecStatus.FATAL_ERROR:
            if last is not None and last.error_field(pq.DiagnosticField.SQLSTATE):
                raise psycopg.errors.error_from_result(last, encoding="utf-8")
            raise lost or psycopg.OperationalError(self._last_words or pgconn.get_error_message())
        return last

    def _read(self, pgconn: pq.abc.PGconn) -> psycopg.OperationalError | None:
        """What has come, notifications among it; or the end of the session."""
        try:
            pgconn.consume_input()
        except psycopg.OperationalError as error:
            return error
        self._hear(pgconn)
        return None

    def _hear(self, pgconn: pq.abc.PGconn) -> None:
        """The notifications that have been read."""
        while (notify := pgconn.notifies()) is not None:
            self._on_notify(notify.extra.decode(errors="replace"))

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """A short transaction, or a savepoint inside of one.

        Not psycopg's: after a ROLLBACK it has the server forget every prepared statement, ours too.
        """
        inside = self.conn.pgconn.transaction_status != pq.TransactionStatus.IDLE
        begin, end, *undo = SAVEPOINT if inside else TRANSACTION
        with self.bounded(ANSWER):
            await self.do(begin)
            try:
                yield
            except Exception:
                for text in () if self.conn.closed else undo:
                    await self.do(text)
                raise
            await self.do(end)

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
            loop.add_reader(descriptor, self._readable, woken, descriptor)
            try:
                came = await event_or_timeout(woken, left)
            finally:
                if not self.conn.closed:
                    loop.remove_reader(descriptor)
            if self.conn.closed:
                raise psycopg.OperationalError(self._last_words or "the connection was closed")
            if not came and left == KEEPALIVE:
                await self._sign_of_life()

    def _readable(self, woken: asyncio.Event, descriptor: int) -> None:
        """Something came while we waited: notifications, or the end of the session.

        A lost session's descriptor is closed, and may be somebody else's before the one who waits goes on.
        """
        if self._read(self.conn.pgconn) is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            woken.set()

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


async def until_ready(descriptor: int, *, write: bool = False) -> None:
    """Until it can be read, or written."""
    loop = asyncio.get_running_loop()
    came = loop.create_future()
    loop.add_reader(descriptor, _came, came)
    if write:
        loop.add_writer(descriptor, _came, came)
    try:
        await came
    finally:
        loop.remove_reader(descriptor)
        if write:
            loop.remove_writer(descriptor)


def _came(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _text(value: object) -> bytes | None:
    """A parameter as the server reads it, of no type: one statement is prepared once, whatever its values are."""
    if value is None:
        return None
    if isinstance(value, list):
        return b"{%s}" % b",".join(map(_element, value))
    return str(value).encode()


def _element(value: object) -> bytes:
    """Of an array."""
    if value is None:
        return b"NULL"
    return b'"%s"' % str(value).replace("\\", "\\\\").replace('"', '\\"').encode()


def with_options(text: str, settings: dict[str, str]) -> dict[str, str]:
    """The conninfo's parameters, with these settings added to its (or the environment's) startup options."""
    params = {name: str(value) for name, value in conninfo.conninfo_to_dict(text).items()}
    options = params.get("options", os.environ.get("PGOPTIONS", ""))
    added = " ".join(_option(name, value) for name, value in settings.items())
    return {**params, "options": f"{options} {added}".strip()}


def _option(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace(" ", "\\ ")
    return f"-c {name}={escaped}"
