"""One table: connect, install, lead, take, wait.

A poller is a coroutine that serves one task table of one database for as long as the configuration names it. It holds
one session. What fails (a server that is down, a statement that is refused) is logged once, retried with growing
pauses, and disturbs no other table.

What is due, and who gets it, is taker.py's; when to look for it, and how to sleep between, sleeper.py's. What goes
wrong with runs is mended by mender.py, and what has been kept long enough removed by history.py; how outages are told
is outage.py's. The poller decides nothing about processes (pool.py) and writes no SQL on the task table (store.py,
schema.py).
"""

import asyncio
import os
import re
import socket
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import psycopg
from psycopg import conninfo

from pgtask import log, metrics, objects, schema
from pgtask.async_session import ANSWER, KEEPALIVES, AsyncSession, with_options
from pgtask.config import TableConfig
from pgtask.errors import PgtaskError
from pgtask.master import maintenance
from pgtask.master.handles import Fate, State, Taken
from pgtask.master.history import History
from pgtask.master.holds import Holds
from pgtask.master.mender import Mender, Term
from pgtask.master.outage import Outage
from pgtask.master.pool import Pool
from pgtask.master.reports import Reports
from pgtask.master.sleeper import Sleeper
from pgtask.master.taker import Taker
from pgtask.master.waiting import Waiting
from pgtask.master.warm import Warm
from pgtask.process import Children, Progress
from pgtask.store import Store
from pgtask.telling import Telling
from pgtask.worker.begin import Ready
from pgtask.worker.worker import Spec

STANDBY_GAP = 0.5
"""Seconds between the tries of a poller that stands by; never waiting in the server: that would hold back vacuum."""

ID = re.compile("-?[0-9]{1,19}")
"""The payload of a notification that is an id; anybody may send others."""

HOLDER_GAP = 3
"""Tries of a poller that stands by between two looks at who keeps it waiting."""

WORKER_SETTINGS = {"client_connection_check_interval": "1s", "idle_session_timeout": "0"}
"""What a worker's session adds to what a new session of this user has."""


class Recovering(PgtaskError):
    """The server is a standby; it may be promoted."""


class Role(Enum):
    """What a poller is doing, for ps and the log."""

    CONNECTING = "connecting"
    STANDBY = "standing by"
    LEADING = "leading"
    STOPPED = "stopped"


class Poller:
    """One table's coroutine, and its face to the pool."""

    def __init__(self, config: TableConfig, pool: Pool, children: Children, changed: Callable[[], None]):
        self.config = config
        self.role = Role.CONNECTING
        self.stopping = False
        self._role_changed = changed
        self._opening: asyncio.Task[None] | None = None
        self._pool = pool
        self._children = children
        self._names = objects.Names(schema=config.schema, table=config.table)
        self._store: Store = self._names.store()
        self._outage = Outage(config.label)
        self._telling = Telling(config)
        self._mender = Mender(self, pool, self._store, self._telling, config)
        self._waiting = Waiting(self, pool, self._store, self._telling, config)
        self._holds = Holds(self._store, config)
        self._reports = Reports(self, self._store)
        self._history = History(self._store, config)
        self._taker = Taker(self, pool, self._store, self._mender, self._holds, self._telling, config)
        self._sleeper = Sleeper(self, pool, self._store, self._taker, config, self._moments)
        self._spec: Spec | None = None
        self._warm = Warm()
        self._changed = False  # the configuration, while we serve
        self._warned = False  # of what is unsafe here
        self._holder: tuple[Any, ...] | None = None  # who kept us waiting when we looked last
        self._accused: tuple[Any, ...] | None = None  # whom the log has named for it
        self._oid = 0
        self._session: AsyncSession
        self._term: Term

    @property
    def spec(self) -> Spec:
        assert self._spec is not None, "no worker before the first connection"
        return self._spec

    @property
    def label(self) -> str:
        return self.config.label

    @property
    def run_limit(self) -> int:
        return self.config.run

    def wake(self) -> None:
        self._sleeper.wake()

    def ready(self) -> Ready | None:
        return self._warm.take()

    def on_reopened(self) -> None:
        self._warm.renew()

    def status(self) -> dict[str, Any]:
        """What the monitor tells of the table: `accused` is a backend that has our lock and leads nothing."""
        accused = self.role is Role.STANDBY and self._holder is not None and self._holder == self._accused
        busy = len([handle for handle in self._pool.of(self) if handle.state is State.BUSY])
        return {
            "role": self.role.value,
            "accused": self._holder[0] if accused and self._holder else None,
            "why": log.redact(self._outage.reason),
            "looked_at": self._taker.looked_at,
            "busy": busy,
            "idle": len(self._pool.of(self)) - busy,
        }

    def stop(self) -> None:
        """Take nothing more; end when the table's workers have ended."""
        self.stopping = self._taker.closed = True
        self._warm.drop()
        self._pool.served(self)
        if self._opening is not None:
            self._opening.cancel()
        self.wake()

    def reconfigure(self, config: TableConfig) -> None:
        """The same table with other settings; running tasks are not touched."""
        self.config = self._mender.config = self._waiting.config = self._holds.config = config
        self._taker.config = self._sleeper.config = config
        self._history.configure(config)
        self._telling.configure(config)
        self._changed = True
        self.wake()

    def on_idle(self, taken: Taken | None, begun: bool) -> None:
        if taken is not None:
            self._taker.rest(taken, ran=begun)
            if not begun:
                self._mender.not_begun(taken)
        self.wake()

    def on_finished(self, ids: list[int]) -> None:
        """Rows have ended, these or any."""
        self._waiting.ended(ids)
        if self._pool.reports(self):
            self.wake()

    def on_end(self, fate: Fate) -> None:
        if not fate.clean:
            self._waiting.ended()
        if fate.assigned is not None:
            self._taker.rest(fate.assigned, ran=fate.opened)
            self._mender.not_begun(fate.assigned)
        self._mender.ended(fate)
        self.wake()

    def on_progress(self, progress: Progress) -> None:
        self._reports.told(progress)

    async def run(self) -> None:
        """Serve the table until `stop`."""
        while not self._done():
            try:
                await self._connect()
                try:
                    await self._install_and_lead()
                    await self._serve()
                finally:
                    self._warm.drop()
                    await self._session.close()
            except (psycopg.Error, PgtaskError, OSError, TimeoutError) as error:
                await self._failed(error)
        self._telling.tell(last=True)
        self._become(Role.STOPPED)
        self._pool.forget(self)

    def _done(self) -> bool:
        return self.stopping and not self._pool.of(self) and not self._mender.waits

    def _become(self, role: Role) -> None:
        self.role = role
        self._role_changed()

    async def _failed(self, error: Exception) -> None:
        """Say it, then pause before the next try; a stop ends the pause."""
        self._become(Role.CONNECTING)
        self._pool.served(self)
        deadline = time.monotonic() + self._outage.down(error, refused=isinstance(error, schema.Refused))
        while not self.stopping and (left := deadline - time.monotonic()) > 0:
            await self._sleeper.nap(left)
        if self.stopping:
            self._mender.give_up()
            if not self._done():
                await asyncio.sleep(0.05)

    async def _connect(self) -> None:
        """Open the session; where the role or the database is missing, after they were made. A stop ends the wait."""
        self._become(Role.CONNECTING)
        self._opening = asyncio.get_running_loop().create_task(self._open_or_make())
        try:
            await self._opening
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise psycopg.OperationalError("stopped while connecting") from None
        finally:
            self._opening.cancel()
            self._opening = None

    async def _open_or_make(self) -> None:
        try:
            await self._open()
        except psycopg.OperationalError:
            if not await maintenance.ensure(self.config, self._children, quiet=self._outage.failures > 0):
                raise
            await self._open()

    async def _open(self) -> None:
        self._session = await AsyncSession.open(
            self.config, self._children, name="pgtask master", on_notify=self._notified
        )

    async def _install_and_lead(self) -> None:
        if self._session.parameter("in_hot_standby") == "on":
            raise Recovering("the server is in recovery: it is served when it takes writes")
        await self._install()
        self._oid = (
            await self._session.one("SELECT $1::regclass::oid::bigint", self._names.quoted(self.config.table))
        )[0]
        self._outage.up()
        tries = 0
        while not (await self._session.one(self._store.text("lock_master"), self._oid))[0]:
            tries += 1
            if tries % HOLDER_GAP == 0:
                await self._look_at_holder()
            await self._stand_by()
            if self._done():
                return
        number, since = await self._session.one(self._store.text("lead"), socket.gethostname(), os.getpid())
        self._term = Term(session=self._session, number=number, since=since)
        await self._session.do(f"LISTEN pgtask_{self._oid}")
        self._spec = self._worker_spec()
        self._taker.begin(self._term)
        self._sleeper.begin(self._session, self._oid)
        self._history.begin()
        self._waiting.begin()
        await self._mender.begin(self._term)
        await self._holds.begin(self._term)
        self._reports.begin()
        self._keep_warm()
        self._become(Role.LEADING)
        log.event(
            # It belongs to every start, and is not worth a line at each when the table is unstable.
            "debug" if self._outage.unstable else "info",
            "leading",
            table=self.label,
            term=number,
            backend=self._session.pid,
        )
        await self._warn()

    async def _warn(self) -> None:
        """Said once, and nothing is refused: whose rights the tasks have, and who else decides what is a task."""
        if self._warned:
            return
        self._warned = True
        user = self._session.conn.info.user
        with self._session.bounded(ANSWER):
            owner = await schema.foreign_owner(self._session.conn, self._oid)
        if owner is not None:
            hint = f"its owner may have any SQL run as {user}; make sure that it is the table that you meant"
            log.warning("table_of_another", table=self.label, owner=owner, hint=hint)
        if self._session.parameter("is_superuser") == "on":
            hint = "whoever may insert a task is a superuser: connect as a role with no more rights than tasks need"
            log.warning("connected_as_superuser", table=self.label, user=user, hint=hint)

    async def _install(self) -> None:
        conn, config = self._session.conn, self.config
        with self._session.bounded(ANSWER):
            look = schema.missing(conn, self._names, config.defaults, wake=config.wake, create=config.create)
            if not await look:
                return
        for change in await schema.install(conn, self._names, config.defaults, wake=config.wake):
            log.event("debug" if change.minor else "info", "schema_changed", table=self.label, change=change.what)

    async def _stand_by(self) -> None:
        if self.role is not Role.STANDBY:
            self._become(Role.STANDBY)
            leader = await self._session.rows(self._store.text("leader"))
            host, pid = leader[0][:2] if leader else (None, None)
            log.info("standing_by", table=self.label, leader=host, leader_pid=pid)
        await self._sleeper.nap(STANDBY_GAP)
        if self.stopping:
            self._mender.give_up()

    async def _look_at_holder(self) -> None:
        """Any role of the database can hold our lock: name it, once it has done so for two looks without leading."""
        found = await self._session.rows(self._store.text("holder"), self._oid)
        before, self._holder = self._holder, found[0] if found else None
        if self._holder is None or self._holder != before or self._holder == self._accused:
            return
        self._accused = self._holder
        backend, user, name = self._holder
        hint = f"no master holds it; SELECT pg_terminate_backend({backend}) ends that session"
        log.warning("lock_held_by_another", table=self.label, backend=backend, user=user, name=name, hint=hint)

    def _worker_spec(self) -> Spec:
        encoding = self._session.parameter("server_encoding") or "UTF8"
        options = with_options(self.config.conninfo, WORKER_SETTINGS)
        # Of several servers and addresses, only where the master is: its pids and rows mean nothing elsewhere.
        params = {**KEEPALIVES, **options, **self._session.place(), "client_encoding": encoding}
        return Spec(
            conninfo=conninfo.make_conninfo(**{"application_name": "pgtask worker", **params}),
            label=self.label,
            title=self.config.title,
            encoding=encoding,
            store=self._store,
            telling=self._telling,
            remote_password=self.config.remote_password,
            batch_time=self.config.batch_time.total_seconds(),
        )

    def _keep_warm(self) -> None:
        if not self.stopping:
            self._warm.keep(self.spec, self.config.warm)

    async def _serve(self) -> None:
        """The loop while we lead: mend, take, and wait for the nearest of what may come."""
        if self.role is not Role.LEADING:
            return
        while not self._done():
            self._sleeper.heed()
            self._outage.stable()
            await self._mend()
            if not self.stopping:
                batch = await self._sleeper.look()
                if not self.stopping:
                    self._pool.fork_ahead(self)
                    await self._history.sweep(self._term)
                await self._sleeper.pause(batch)
            elif not self._done():
                await self._sleeper.wait()
        await self._mender.release(self._term)

    async def _mend(self) -> None:
        """What went wrong, or was changed, since the last look."""
        if self._changed:
            self._changed = False
            await self._install()
            self._spec = self._worker_spec()
            self._keep_warm()
        await self._mender.mend(self._term)
        if not self.stopping:
            await self._waiting.look(self._term)
        await self._holds.look(self._term)
        await self._reports.write(self._term)
        self._telling.tell()

    def _moments(self) -> list[float]:
        """When something must be looked at that the table does not tell (time.monotonic())."""
        lookers = (self._mender, self._waiting, self._reports, self._history, self._telling)
        moments = (*(one.next_look() for one in lookers), self._outage.stable_at, self._pool.retry_at(self))
        return [moment for moment in moments if moment is not None]

    def _notified(self, payload: str) -> None:
        """An insert while we slept (no payload), an `old` plan, a running row that was stopped or deleted (its id).

        Or that a group was held, that rows wait, or that some have ended for which others may; or whatever else anybody
        says on our channel.
        """
        metrics.notified(self.label)
        if ID.fullmatch(payload) and -(1 << 63) <= int(payload) < 1 << 63 and self._pool.of(self):
            self._mender.stopped(int(payload))
            self.wake()
        elif payload in ("wait", "ended"):
            (self._waiting.inserted if payload == "wait" else self._waiting.ended)()
            self._taker.call()  # a calendar may have begun before
            self.wake()
        elif payload == "hold":
            self._holds.heard()
            self.wake()
        else:
            self._sleeper.tell(old=payload == "old")
