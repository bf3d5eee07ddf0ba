"""One PostgreSQL session over libpq, for plain synchronous code that must never block on it alone.

Every wait goes through a `Waiter`, which also watches the master's channel, signals and a deadline. Three ways to
talk: `query` sends a text by the simple protocol and hands over each result as it comes; `pipeline` sends several
of our own prepared statements at once, for one round trip; `stream` sends some of them, and then more before it is
known what became of those. Nothing here knows what a task is.
"""

import os
import secrets
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from psycopg import OperationalError, capabilities, pq

from pgtask.errors import PgtaskError

Params = Sequence[bytes | None]


class Waiter(Protocol):
    """What a session waits with; returning early, and then False, is harmless.

    `doubted` after a wait: somebody who knows says that what we wait for was sent long ago.
    """

    doubted: bool

    def wait(
        self, fd: int | None, *, write: bool = False, timeout: float | None = None, listen: bool = False
    ) -> bool: ...


class SessionLost(PgtaskError):
    """The session could not be opened, or ended; the text is the server's or libpq's last word."""


class StatementFailed(PgtaskError):
    """A statement of a pipeline failed: `step` is its number from 0, `result` the server's error.

    `before` are the results of the statements before it.
    """

    def __init__(self, step: int, result: pq.abc.PGresult, before: Sequence[pq.abc.PGresult]):
        super().__init__((result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace"))
        self.step = step
        self.result = result
        self.before = before[:step]
        self.code = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()


class Step(NamedTuple):
    """One statement of a pipeline, with text parameters."""

    sql: bytes
    params: Params = ()
    plain: bool = False  # do not rely on a prepared statement: the task may have dropped all
    only_prepare: bool = False


CRASH_SHUTDOWN = b"57P02"
"""What a server says, as a warning, to every session before it ends them all because one backend has crashed."""

FATAL_ERROR, COMMAND_OK = int(pq.ExecStatus.FATAL_ERROR), int(pq.ExecStatus.COMMAND_OK)

SYNC = Step(b"")
"""Ends a transaction's part of a pipeline: what comes after runs even when something before has failed."""

Sink = Callable[[pq.abc.PGresult], None]


class Session:
    """A libpq connection in non-blocking mode."""

    def __init__(self, pgconn: pq.abc.PGconn, waiter: Waiter):
        self.pgconn = pgconn
        self._waiter = waiter
        self._names: dict[bytes, bytes] = {}
        self._prepared = 0
        # A task may prepare statements too: its names must not meet ours.
        self._token = secrets.token_hex(4).encode()
        self._listening = False  # only what has a `tick` is interrupted by what the master says
        self.felled = False  # the server ended it because another session's backend had crashed
        self.on_notice: Callable[[pq.abc.PGresult], None] | None = None
        self._results: list[pq.abc.PGresult] = []
        self.streams = False
        """Is a pipeline going on that `stream` has begun? Then nothing else may be asked."""
        self._parts: deque[list[bytes | None]] = deque()  # the answers that it still owes us
        pgconn.notice_handler = self._notice

    @classmethod
    def open(
        cls,
        conninfo: str,
        waiter: Waiter,
        *,
        timeout: float | None,
        stop: Callable[[], bool],
        listen: bool = False,
    ) -> "Session":
        """Connect. Raises SessionLost when that fails, takes longer than `timeout` seconds, or `stop` turns true.

        With `listen`, what the master says wakes it: `stop` must then read it.
        """
        pgconn = pq.PGconn.connect_start(conninfo.encode())
        deadline = None if timeout is None else time.monotonic() + timeout
        if pgconn.status == pq.ConnStatus.BAD:
            raise SessionLost(_words(pgconn))
        # Asked before the socket is ready, libpq takes it for connected, and tries no other host when it is not.
        status: int = pq.PollingStatus.WRITING
        while status != pq.PollingStatus.OK:
            if status == pq.PollingStatus.FAILED:
                raise SessionLost(_words(pgconn))
            writing = status == pq.PollingStatus.WRITING
            while not waiter.wait(pgconn.socket, write=writing, timeout=_gap(deadline), listen=listen):
                if stop() or _gap(deadline) == 0:
                    pgconn.finish()
                    raise SessionLost("connection timeout expired")
            status = pgconn.connect_poll()
        pgconn.nonblocking = 1
        return cls(pgconn, waiter)

    @property
    def pid(self) -> int:
        return self.pgconn.backend_pid

    def last_words(self) -> str:
        return _words(self.pgconn)

    @property
    def in_transaction(self) -> bool:
        return self.pgconn.transaction_status == pq.TransactionStatus.INTRANS

    @property
    def idle(self) -> bool:
        return self.pgconn.transaction_status == pq.TransactionStatus.IDLE

    def parameter(self, name: str) -> str:
        """A value that the server reports, such as client_encoding."""
        return (self.pgconn.parameter_status(name.encode()) or b"").decode(errors="replace")

    @property
    def spoken(self) -> bool:
        """Has the server said something that nobody has asked for? It is its end, mostly."""
        poll = select.poll()  # a master may have more descriptors than select() knows
        poll.register(self.pgconn.socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.pgconn.finish()

    def take_over(self, waiter: Waiter) -> None:
        """It was opened by the process that forked us, which has let it go."""
        self._waiter = waiter

    def let_go(self, nowhere: int) -> None:
        """Forget it: a child has it. What libpq says to the end of its copy goes to this descriptor of /dev/null."""
        os.dup2(nowhere, self.pgconn.socket, inheritable=False)
        self.pgconn.finish()

    def query(
        self, sql: bytes, sink: Sink, copy_out: Callable[[bytes], None], tick: Callable[[], float | None]
    ) -> None:
        """Send `sql` as one simple query; give each result to `sink` and each piece of COPY data to `copy_out`.

        `tick` is called before each wait: it may cancel, and returns the seconds until it must be called again.
        COPY FROM STDIN is refused. Raises SessionLost with the server's last words.
        """
        self._listening = True
        try:
            self._send(lambda: self.pgconn.send_query(sql))
            self._flush(tick)
            while (result := self._result(tick)) is not None:
                if result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_BOTH):
                    self._refuse_copy(tick)
                sink(result)
                if result.status == pq.ExecStatus.COPY_OUT:
                    self._copy(copy_out, tick)
        finally:
            self._listening = False
        self._alive()

    @property
    def answered(self) -> int:
        """How many steps of the pipeline that is being read have been answered."""
        return len(self._results)

    def pipeline(
        self, steps: Sequence[Step], *, timeout: float | None = None, tick: Callable[[], float | None] | None = None
    ) -> list[pq.abc.PGresult]:
        """Run statements in one round trip and return a result for each but SYNC; `tick` as for `query`.

        Raises StatementFailed for the first that fails, after the whole pipeline was read, and SessionLost when
        the server does not answer for `timeout` seconds.
        """
        try:
            waiting = self.send_pipeline(steps)
        except OperationalError as error:
            raise SessionLost(_words(self.pgconn)) from error
        if tick is None:
            return self.answers(waiting, timeout=timeout)
        self._listening = True
        try:
            return self._pipeline_results(waiting, tick)
        finally:
            self._listening = False

    def stream(self, *parts: Sequence[Step]) -> None:
        """Begin a pipeline, or go on with it. The server answers each part when it has done it: ask `answer` for each.

        Where a statement fails, it skips all that comes behind, until `end_stream`. Raises SessionLost.
        """
        try:
            if not self.streams:
                self.pgconn.enter_pipeline_mode()
                self.streams = True
            for part in parts:
                self._parts.append(self._queue(part))
                self.pgconn.send_flush_request()
        except OperationalError as error:
            raise SessionLost(_words(self.pgconn)) from error
        self._flush(lambda: None)

    def answer(
        self, *, timeout: float | None = None, tick: Callable[[], float | None] | None = None
    ) -> list[pq.abc.PGresult]:
        """A result for each statement of the next part; as `pipeline`, but after an error the stream must be ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._results = []
        self._listening = tick is not None
        try:
            failed = self._read(self._parts.popleft(), tick or (lambda: _left(deadline)))
        finally:
            self._listening = False
        if failed is not None:
            raise failed
        return self._results

    def end_stream(self, *, timeout: float | None) -> StatementFailed | None:
        """Throw away what was not asked for. Returns the first failure in that: its `step` counts on over all parts.

        Raises SessionLost.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = [sql for part in self._parts for sql in part]
        self._parts.clear()
        self._results = []
        try:
            self.pgconn.pipeline_sync()
        except OperationalError as error:
            raise SessionLost(_words(self.pgconn)) from error
        self._flush(lambda: _left(deadline))
        failed = self._read([*waiting, None], lambda: _left(deadline))
        self.pgconn.exit_pipeline_mode()
        self.streams = False
        return failed

    def send_pipeline(self, steps: Sequence[Step]) -> list[bytes | None]:
        """Queue the statements and a sync; for each answer to come: the text prepared, b"" a run, None a sync."""
        self.pgconn.enter_pipeline_mode()
        waiting = self._queue(steps)
        self.pgconn.pipeline_sync()
        waiting.append(None)
        return waiting

    def answers(self, waiting: Sequence[bytes | None], *, timeout: float | None) -> list[pq.abc.PGresult]:
        """To what `send_pipeline` has sent, maybe in another process. Returns and raises as `pipeline` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        return self._pipeline_results(waiting, lambda: _left(deadline))

    def _queue(self, steps: Sequence[Step]) -> list[bytes | None]:
        pgconn, names = self.pgconn, self._names
        waiting: list[bytes | None] = []
        for step in steps:
            if step is SYNC:
                pgconn.pipeline_sync()
                waiting.append(None)
                continue
            sql, params, plain, only_prepare = step
            if plain:
                pgconn.send_query_params(sql, params)
                waiting.append(b"")
                continue
            name = names.get(sql)
            if name is None:
                self._prepared += 1  # never a number twice: a failed pipeline forgets some of its names
                name = names[sql] = b"pgtask_%s_%d" % (self._token, self._prepared)
                pgconn.send_prepare(name, sql)
                waiting.append(sql)
            if not only_prepare:
                pgconn.send_query_prepared(name, params)
                waiting.append(b"")
        return waiting

    def _pipeline_results(
        self, waiting: Sequence[bytes | None], tick: Callable[[], float | None]
    ) -> list[pq.abc.PGresult]:
        self._results = []
        self._flush(tick)
        failed = self._read(waiting, tick)
        self.pgconn.exit_pipeline_mode()
        if failed is not None:
            raise failed
        return self._results

    def _read(self, waiting: Sequence[bytes | None], tick: Callable[[], float | None]) -> StatementFailed | None:
        """Take in the answers. Returns the first failure."""
        failed: StatementFailed | None = None
        results = self._results
        get, busy = self.pgconn.get_result, self.pgconn.is_busy
        for sql in waiting:
            result = self._result(tick) if busy() else get()
            if result is None:
                self._lost(None if failed is None else failed.result)
            status = result.status
            if status == FATAL_ERROR and self.pgconn.status == pq.ConnStatus.BAD:
                self._lost(result if failed is None else failed.result)
            if sql is None:
                late = self._sync(result, tick)
                if late is not None and failed is None:
                    failed = StatementFailed(max(0, len(results) - 1), late, results)
                continue
            if not sql:
                results.append(result)
            elif status != COMMAND_OK:
                del self._names[sql]
            if status == FATAL_ERROR:
                failed = failed or StatementFailed(len(results) - (not sql), result, results)
                self._result(tick)  # the end of this statement's results
            else:
                get()  # the same, for which nothing need be read
        return failed

    def _sync(self, result: pq.abc.PGresult, tick: Callable[[], float | None]) -> pq.abc.PGresult | None:
        """Read on to the end of a pipeline's part; the error, if it came as late as that (at an implicit commit)."""
        error = None
        while result.status != pq.ExecStatus.PIPELINE_SYNC:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                error = error or result
            following = self._result(tick) or self._result(tick)
            if following is None or self.pgconn.status == pq.ConnStatus.BAD:
                self._lost(error or following)
            result = following
        return error

    def _lost(self, last: pq.abc.PGresult | None) -> NoReturn:
        """The server's last words are in the last result that came, if any did."""
        words = last.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) if last is not None else None
        raise SessionLost((words or b"").decode(errors="replace") or _words(self.pgconn) or "no answer from the server")

    def prepared(self, sql: bytes) -> bytes:
        """The name of the prepared statement."""
        return self._names[sql]

    def forget_statements(self) -> None:
        """Our prepared statements are gone (DEALLOCATE ALL, DISCARD ALL): prepare them again when next used."""
        self._names.clear()
        self._token = secrets.token_hex(4).encode()

    def settle(self, *, timeout: float | None = None) -> None:
        """Exchange an empty Sync, so that a cancel request that was sent earlier cannot hit the next statement."""
        self.pipeline([], timeout=timeout)

    def cancel(self, *, timeout: float) -> bool:
        """Ask the server to cancel what runs, over the same kind of connection (encrypted if ours is).

        When it returns True the server has passed the request on. False: it could not be delivered in time.
        """
        deadline = time.monotonic() + timeout
        try:
            if not capabilities.has_cancel_safe():  # libpq before 17: unencrypted, and it blocks
                self.pgconn.get_cancel().cancel()
                return True
            request = self.pgconn.cancel_conn()
            request.start()
            while (status := request.poll()) not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
                writing = status == pq.PollingStatus.WRITING
                while not self._waiter.wait(request.socket, write=writing, timeout=_gap(deadline)):
                    if _gap(deadline) == 0:
                        return False
            return status == pq.PollingStatus.OK
        except OperationalError:
            return False

    def _send(self, send: Callable[[], None]) -> None:
        try:
            send()
        except OperationalError as error:
            raise SessionLost(_words(self.pgconn)) from error

    def _flush(self, tick: Callable[[], float | None]) -> None:
        """Send all that is queued, reading meanwhile: a server that cannot send does not read either."""
        try:
            while self.pgconn.flush():
                self._wait(tick(), write=True)
                self.pgconn.consume_input()
        except OperationalError:
            return  # the reader learns of the end, after the server's last words

    def _result(self, tick: Callable[[], float | None]) -> pq.abc.PGresult | None:
        pgconn = self.pgconn
        while pgconn.is_busy():
            self._wait(tick())
            try:
                pgconn.consume_input()
            except OperationalError:
                break  # the results that were read before the end are still to be had
        return pgconn.get_result()

    def _copy(self, copy_out: Callable[[bytes], None], tick: Callable[[], float | None]) -> None:
        while True:
            size, data = self.pgconn.get_copy_data(1)
            if size > 0:
                copy_out(bytes(data))
            elif size == 0:
                self._wait(tick())
                try:
                    self.pgconn.consume_input()
                except OperationalError:
                    return
            else:
                return

    def _wait(self, timeout: float | None, *, write: bool = False) -> None:
        came = self._waiter.wait(self.pgconn.socket, write=write, timeout=timeout, listen=self._listening)
        if self._waiter.doubted and not came:
            raise SessionLost("the server has answered, and its answer does not arrive")

    def _refuse_copy(self, tick: Callable[[], float | None]) -> None:
        while self.pgconn.put_copy_end(b"COPY FROM STDIN is not supported") == 0:
            self._wait(tick(), write=True)
        self._flush(tick)

    def _alive(self) -> None:
        if self.pgconn.status == pq.ConnStatus.BAD:
            raise SessionLost(_words(self.pgconn))

    def _notice(self, result: pq.abc.PGresult) -> None:
        if result.error_field(pq.DiagnosticField.SQLSTATE) == CRASH_SHUTDOWN:
            self.felled = True
        if self.on_notice is not None:
            self.on_notice(result)


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise SessionLost("the server did not answer in time")
    return left


def _gap(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _words(pgconn: pq.abc.PGconn) -> str:
    """The server's last words, without what libpq makes of the silence after them."""
    text = pgconn.get_error_message().strip()
    said = text.split("server closed the connection unexpectedly")[0].removesuffix("invalid socket").strip()
    return said or text
