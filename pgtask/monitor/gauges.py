"""What the monitor reads from the databases when somebody asks for metrics.

Each database is read by a thread of its own, over one session from a small pool of its own, and for a bounded time: so
one that is down, slow or silent costs the others nothing, and itself no more than one thread and one session, however
often is asked. A silent server is cut off, for no setting of a server's can end the wait for what does not come.
"""

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import Connection, RawCursor, conninfo
from psycopg_pool import ConnectionPool, PoolTimeout

from pgtask import log
from pgtask.async_session import KEEPALIVES, SETTINGS, with_options
from pgtask.config import TableConfig
from pgtask.metrics import GROUPS, MOST, OTHER
from pgtask.objects import Names
from pgtask.store import Store
from pgtask.worker.run import readable

PATIENCE = 4.0
"""Seconds in which all databases must have answered."""

OPEN, ANSWER = 2.0, 2.0
"""Seconds for a session to be had, and for each statement."""

THREADS = 32
"""Databases that are read at a time, at most."""

IDLE = 120.0
"""Seconds after which a session that nobody has used is closed."""

READING = {
    **SETTINGS,
    "statement_timeout": f"{ANSWER:.0f}s",
    "lock_timeout": "500ms",
    "default_transaction_read_only": "on",
    "idle_session_timeout": f"{2 * IDLE:.0f}s",
}

Shares = dict[str, tuple[int, float]]
"""By group: how many rows, and how many seconds ago the first of them was due, or begun."""


@dataclass(kw_only=True)
class Reading:
    """What was read of a table. Without `error` all of it."""

    error: str = ""
    seconds: float = 0.0
    backlog: Shares = field(default_factory=dict)
    in_use: Shares = field(default_factory=dict)
    planned: int = 0
    waiting: int = 0
    term: int = 0


class Databases:
    """Those of a configuration. `read` may be called by one thread at a time."""

    def __init__(self, tables: Iterable[TableConfig]):
        by_conninfo: dict[str, list[TableConfig]] = {}
        for table in tables:
            by_conninfo.setdefault(table.conninfo, []).append(table)
        self._databases = [_Database(text, found) for text, found in by_conninfo.items()]
        self._threads = ThreadPoolExecutor(max_workers=min(THREADS, len(self._databases)), thread_name_prefix="read")

    def read(self) -> dict[str, Reading]:
        """Every table's, by its label."""
        deadline = time.monotonic() + PATIENCE
        for one in self._databases:
            if one.future is None or one.future.done():
                one.future = self._threads.submit(one.read)
        wait([one.future for one in self._databases if one.future is not None], max(0.0, deadline - time.monotonic()))
        found: dict[str, Reading] = {}
        for one in self._databases:
            found |= one.found()
        return found


class _Database:
    """One conninfo and the tables there."""

    def __init__(self, text: str, tables: Sequence[TableConfig]):
        self.future: Future[dict[str, Reading]] | None = None
        self._stores = {table.label: Names(schema=table.schema, table=table.table).store() for table in tables}
        self._conn: Connection[Any] | None = None  # while it is used
        self._late = False  # it was given up
        params = {**KEEPALIVES, **with_options(text, READING), "application_name": "pgtask monitor"}
        self._pool = ConnectionPool(
            conninfo.make_conninfo(**{**params, "connect_timeout": f"{OPEN:.0f}"}),
            kwargs={
                "autocommit": True,
                "client_encoding": "utf8",
                "cursor_factory": RawCursor,
                "prepare_threshold": None,
            },
            min_size=0,
            max_size=1,
            num_workers=1,
            max_idle=IDLE,
            timeout=OPEN,
            reconnect_timeout=OPEN,
            open=False,
        )
        self._pool.open()

    def found(self) -> dict[str, Reading]:
        """What was read; one that has not answered is cut off."""
        if self.future is not None and self.future.done():
            return self.future.result()
        self._late = True
        self._cut_off()
        return self._failed(f"no answer within {PATIENCE:.0f} s")

    def read(self) -> dict[str, Reading]:
        """Every table's. A session that the pool has kept may have ended since: then once more, by a new one."""
        self._late = False
        readings: dict[str, Reading] = {}
        try:
            try:
                self._visit(readings)
            except psycopg.OperationalError as error:
                if readings or self._late or isinstance(error, PoolTimeout):
                    raise
                self._visit(readings)
        except psycopg.Error as error:
            readings = self._failed(_line(error)) | readings
        return readings

    def _visit(self, readings: dict[str, Reading]) -> None:
        try:
            with self._pool.connection() as self._conn:
                for label, store in self._stores.items():
                    readings[label] = _read(self._conn, store)
        finally:
            self._conn = None

    def _failed(self, error: str) -> dict[str, Reading]:
        return {label: Reading(error=error) for label in self._stores}

    def _cut_off(self) -> None:
        """The socket is libpq's: a duplicate shuts it down without closing what is not ours."""
        if (conn := self._conn) is not None:
            with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)


def _read(conn: Connection[Any], store: Store) -> Reading:
    """One table's. Raises psycopg.Error if the session is lost; what is wrong with the table only, is said of it."""
    began = time.monotonic()
    try:
        planned, waiting, term = conn.execute(store.text("at_rest"), [MOST]).fetchall()[0]
        backlog = conn.execute(store.text("backlog"), [MOST, GROUPS]).fetchall()
        in_use = conn.execute(store.text("in_use"), [MOST, GROUPS]).fetchall()
    except psycopg.Error as error:
        if conn.broken or conn.closed:
            raise
        return Reading(error=_line(error), seconds=time.monotonic() - began)
    encoding = conn.info.parameter_status("server_encoding") or ""
    return Reading(
        seconds=time.monotonic() - began,
        backlog=_shares(backlog, encoding),
        in_use=_shares(in_use, encoding),
        planned=planned,
        waiting=waiting,
        term=term or 0,
    )


def _shares(rows: Iterable[tuple[bytes | None, int, float | None]], encoding: str) -> Shares:
    """Whatever a group is called, its name is no secret and no second one of another's."""
    shares: Shares = {}
    for group, count, age in rows:
        name = OTHER if group is None else log.redact(readable(group, encoding))
        before, oldest = shares.get(name, (0, 0.0))
        seconds = max(0.0, age or 0.0)
        shares[name] = before + count, max(oldest, seconds if math.isfinite(seconds) else 0.0)
    return shares


def _line(error: Exception) -> str:
    return log.redact(" ".join(str(error).split())) or type(error).__name__
