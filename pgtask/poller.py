"""One table: connect, install, lead, take, wait.

A poller is a coroutine that serves one task table of one database for as long as the configuration names it. It holds
one session. While there is work it polls; when there is none it says so with a lock and sleeps until an insert, a
planned moment, a worker or a signal wakes it: between, no statement is sent. What fails (a server that is down, a
statement that is refused) is logged once, retried with growing pauses, and disturbs no other table.

What goes wrong with runs is mended by mender.py; how outages are told is outage.py's. The poller decides nothing about
processes (pool.py) and writes no SQL on the task table (store.py, schema.py).
"""

import asyncio
import math
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import psycopg
from psycopg import conninfo

from pgtask import log, maintenance, objects, schema
from pgtask.async_session import ANSWER, KEEPALIVES, AsyncSession, event_or_timeout, with_options
from pgtask.config import TableConfig
from pgtask.errors import PgtaskError
from pgtask.mender import Mender, Term, lowest_free
from pgtask.outage import Outage
from pgtask.pace import Pace
from pgtask.pool import Fate, Pool, Taken
from pgtask.process import Children
from pgtask.store import Store
from pgtask.warm import Warm
from pgtask.worker import Ready, Spec

STANDBY_GAP = 0.5
"""Seconds between the tries of a poller that stands by; never waiting in the server: that would hold back vacuum."""

LONGEST_GAP = 0.05
"""Seconds between polls while an insert is in flight, or a due row is locked by somebody."""

LOOK = 200
"""Due rows, and groups, that one take looks at."""

LAST_LANE = 2**63 - 1

BEGINNING = ("-infinity", -(1 << 63))
"""The place, plan and id, before every due row."""

CHEAP = 0.005
"""Seconds that a full look may cost without being paced."""

EXPIRE_GAP = 1.0
"""Seconds between looks for rows that came too late while their group was full: nobody waits for them."""

LONGEST_DEAFNESS = 0.01
"""Seconds between polls when what we are told again and again means nothing to us."""

MOST_CPU = 0.4
"""Of one core, that the polling of tables that nobody wakes us for may cost all together."""

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


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a take found: the rows for workers, how many were too late, whether it saw due rows; and the instant.

    `more` is whether there may be due rows in groups that it did not look at.
    """

    rows: list[Taken]
    late: int
    seen: bool
    waiting: int
    more: bool
    now: Any


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
        self._mender = Mender(self, pool, self._store, config)
        self._spec: Spec | None = None
        self._warm = Warm()
        self._wake = asyncio.Event()
        self._walk_from: int | None = None  # the lane where the next take goes on; None: from the first
        self._pace = Pace(cheap=CHEAP)
        self._place = BEGINNING  # of the first due row that the last take saw
        self._looked_at: Any = None  # the instant of the last full look
        self._expired: tuple[str, int] | None = None  # up to where those were looked for that came too late
        self._resting: dict[int, float] = {}  # lane -> until when (time.monotonic()) its slot keeps a pause
        self._asleep = False  # we hold the lock that says so
        self._instant: Any = None  # when we got it, until everything was looked at since
        self._told = False  # a notification has come since
        self._seen = False  # due rows since the walk from group to group began
        self._empty = self._vain = 0  # looks in a row that found nothing, and notifications in a row that meant nothing
        self._gap = 0.0  # seconds between two looks
        self._cpu = self._used = 0.0  # processor time of the master until the last look, and between the last two
        self._expire_at = 0.0  # before when rows that came too late are not looked for again (time.monotonic())
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
        self._wake.set()

    def ready(self) -> Ready | None:
        return self._warm.take()

    def on_reopened(self) -> None:
        self._warm.renew()

    def stop(self) -> None:
        """Take nothing more; end when the table's workers have ended."""
        self.stopping = True
        self._warm.drop()
        self._pool.served(self)
        if self._opening is not None:
            self._opening.cancel()
        self.wake()

    def reconfigure(self, config: TableConfig) -> None:
        """The same table with other settings; running tasks are not touched."""
        self.config = self._mender.config = config
        self._changed = True
        self.wake()

    def on_idle(self, taken: Taken | None, begun: bool) -> None:
        if taken is not None:
            self._rest(taken, ran=begun)
            if not begun:
                self._mender.not_begun(taken)
        self.wake()

    def on_end(self, fate: Fate) -> None:
        if fate.assigned is not None:
            self._rest(fate.assigned, ran=fate.opened)
            self._mender.not_begun(fate.assigned)
        self._mender.ended(fate)
        self.wake()

    def _rest(self, taken: Taken, *, ran: bool) -> None:
        """A run with a negative `max` has ended: its group's next such one waits that many milliseconds."""
        if taken.max < 0 and ran:
            self._resting[taken.lane] = time.monotonic() - taken.max / 1000
        elif taken.max < 0:
            self._resting.pop(taken.lane, None)

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
            self._wake.clear()
            await event_or_timeout(self._wake, left)
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
        self._pace = Pace(cheap=CHEAP)  # what happened meanwhile is seen at once
        await self._mender.begin(self._term)
        self._keep_warm()
        self._become(Role.LEADING)
        self._outage.report("leading", term=number, backend=self._session.pid)
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
            (log.debug if change.minor else log.info)("schema_changed", table=self.label, change=change.what)

    async def _stand_by(self) -> None:
        if self.role is not Role.STANDBY:
            self._become(Role.STANDBY)
            leader = await self._session.rows(self._store.text("leader"))
            host, pid = leader[0][:2] if leader else (None, None)
            log.info("standing_by", table=self.label, leader=host, pid=pid)
        self._wake.clear()
        await event_or_timeout(self._wake, STANDBY_GAP)
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
            encoding=encoding,
            store=self._store,
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
        self._asleep, self._instant = False, None
        while not self._done():
            self._wake.clear()
            self._outage.stable()
            await self._mend()
            if self.stopping:
                if not self._done():
                    await self._wait(None)
                continue
            batch = await self._look()
            if batch.rows or batch.late:
                self._empty = self._vain = 0
                await self._rise()
                await self._wait(min(self._sleep(), self._gap))
            elif not batch.more:
                self._empty += 1
                await self._pause(batch)
            elif not self._asleep or self._wake.is_set():
                await self._rise()
                await self._wait(min(self._sleep(), self._gap))
        await self._mender.release(self._term)

    def _sleep(self) -> float:
        return self.config.sleep.total_seconds()

    async def _look(self) -> Batch:
        """Take; once asleep everywhere, and all of it for the same instant, after which the next moment is read."""
        used = time.process_time()
        self._used, self._cpu = used - self._cpu, used
        if self._instant is None and not self._pace.ready:
            await self._rise()
        begins = self._walk_from is None
        batch = await self._take(self._instant, full=self._asleep)
        self._instant = batch.now if self._asleep and batch.more else None
        if begins and self._asleep and batch.more:  # what is planned next does not wait for the end of the walk
            for left in await self._planned(batch.now):
                asyncio.get_running_loop().call_later(max(0.0, left), self.wake)
        return batch

    async def _pause(self, batch: Batch) -> None:
        """Nothing could be taken: sleep if nothing can be missed, else look again soon."""
        pause = min(self._sleep(), 0.001 * 2 ** min(self._empty, 10))
        if not self.config.wake:
            # However many such tables there are, the master has time left for workers and signals.
            await self._wait(max(self._sleep(), min(LONGEST_GAP, max(self._gap, self._used / MOST_CPU))))
        elif self._asleep and batch.seen and self._pool.capacity(self):
            await self._rise()  # due rows that somebody holds locked: no notification will tell when he lets go
            await self._wait(min(pause, LONGEST_GAP))
        elif self._asleep and self._told:
            await self._doze()
        elif self._asleep:
            await self._sleep_until_next(batch.now)
        elif self._empty < self.config.idle:
            await self._wait(pause)
        elif not self._pace.ready or not await self._fall_asleep():
            await self._wait(min(pause, LONGEST_GAP))

    async def _fall_asleep(self) -> bool:
        """Take the ASLEEP lock: the next look, in new statements, misses nothing. False if an insert is in flight.

        Whoever inserts from now on finds the lock taken and notifies; whoever inserted before and did not notify
        holds it shared, so that we do not get it.
        """
        self._told, self._walk_from, self._seen = False, None, False
        self._asleep, self._instant = await self._session.one(self._store.text("lock_asleep"), self._oid)
        return self._asleep

    async def _rise(self) -> None:
        """From now on inserts cost no notification."""
        if self._asleep:
            self._asleep, self._instant = False, None
            await self._session.one(self._store.text("unlock_asleep"), self._oid)

    async def _sleep_until_next(self, now: Any) -> None:
        """The lock stays ours: what wakes us may turn out to be nothing."""
        if time.monotonic() >= self._expire_at:
            self._expire_at = time.monotonic() + EXPIRE_GAP
            await self._expire()
        left, since = await self._until_next(now), time.monotonic()
        await self._wait(left)
        if time.monotonic() - since > LONGEST_GAP:
            self._vain = 0

    async def _doze(self) -> None:
        """We were told, and found nothing: for a moment, which grows, have no notifications sent and heed none.

        They may be of inserts into groups that are full, or a stranger's, who sends what he likes.
        """
        self._vain += 1
        await self._rise()
        self._wake.clear()  # by what has come since we looked: it is looked for when the pause is over
        await self._wait(min(self._sleep(), LONGEST_DEAFNESS, 0.001 * 2 ** min(self._vain, 10)))
        if self._pace.ready:
            await self._fall_asleep()

    async def _expire(self) -> None:
        """Rows that came too late while their group was full; some at a time, when there is nothing else to do.

        The first of them is where the full look that has just been made found the first due row.
        """
        plan, id = self._expired or (self._place[0], max(self._place[1] - 1, BEGINNING[1]))
        count, *place = await self._session.one(self._store.text("expire"), self.config.limit, plan, id)
        self._expired = (place[0], place[1]) if place[0] is not None else None
        if count:
            log.info("tasks_gone", table=self.label, count=count)

    async def _until_next(self, now: Any) -> float:
        """Seconds until something is planned, may start after a pause, or must be looked at."""
        now_here = time.monotonic()
        moments = [self.config.safety.total_seconds(), self._mender.next_look() - now_here]
        moments += [until - now_here for until in self._resting.values()]
        if (stable_at := self._outage.stable_at) is not None:
            moments.append(stable_at - now_here)
        if (retry := self._pool.retry_at(self)) is not None:
            moments.append(retry - now_here)
        if self._expired is not None:  # there were more than one look could bury
            moments.append(self._expire_at - now_here)
        moments += await self._planned(now)
        return max(0.0, min(moments))

    async def _planned(self, now: Any) -> list[float]:
        """Seconds until the next planned moment after that instant, if there is one."""
        rows = await self._session.rows(self._store.text("next_plan"), now)
        return [seconds for (seconds,) in rows if seconds is not None]

    async def _take(self, now: Any = None, *, full: bool = False) -> Batch:
        """Take what may start and hand it to the pool."""
        full = full or self._pace.ready
        self._resting = {lane: until for lane, until in self._resting.items() if until > time.monotonic()}
        held = await self._mender.held(self._term)
        capacity = min(self._pool.capacity(self), self.config.limit)
        resting = list(self._resting)
        lanes = [lane for lane, numbers in held.items() for _ in numbers]
        looked = (self._walk_from, *(BEGINNING if full else self._place), None if full else self._looked_at)
        started = time.monotonic()
        rows = await self._session.rows(
            self._store.text("take"), capacity, resting, LOOK, now, lanes, self._term.since, *looked
        )
        self._gap = max(0.001, 4 * (time.monotonic() - started))
        batch = self._batch(rows, held)
        if self.stopping:  # meanwhile: there will be no worker for them
            self._mender.not_begun(*batch.rows)
            return batch
        for taken in batch.rows:
            if taken.max < 0:  # its end is committed before we hear of it: until then nothing may slip in
                self._resting[taken.lane] = math.inf
            self._pool.assign(self, taken)
        if batch.late:
            log.info("tasks_gone", table=self.label, count=batch.late)
        if capacity == 0 and batch.seen:
            self._pool.want(self, room=batch.waiting > 0)
        elif capacity or not batch.more:
            self._pool.served(self)
        return batch

    def _batch(self, rows: list[tuple[Any, ...]], held: dict[int, set[int]]) -> Batch:
        """What was taken, each row with the lowest free number of its lane: not above `max`, as `take` has counted."""
        taken: list[Taken] = []
        for *_, id, attempt, late, lane, max, count, live in rows:
            if id is None or late:
                continue
            slot = lowest_free(held[lane])
            held[lane].add(slot)
            who = {"taker": self._session.pid, "term": self._term.number}
            taken.append(Taken(id=id, attempt=attempt, lane=lane, slot=slot, max=max, count=count, live=live, **who))
        late = sum(bool(row[9]) for row in rows)
        seen, waiting, now, walked, cost, *place = rows[0][:7]
        if cost is not None:
            self._pace.looked(cost)
            self._looked_at = now
            self._walk_from = None if walked in (None, LAST_LANE) else walked + 1
        self._place = (place[0], place[1])
        more, seen = self._walk_from is not None, self._seen or seen > 0
        self._seen = seen and more
        return Batch(rows=taken, late=late, seen=seen, waiting=waiting, more=more, now=now)

    async def _mend(self) -> None:
        """What went wrong, or was changed, since the last look."""
        if self._changed:
            self._changed = False
            await self._install()
            self._spec = self._worker_spec()
            self._keep_warm()
        await self._mender.mend(self._term)
        if not self.stopping:
            self._pool.fork_ahead(self)

    def _notified(self, payload: str) -> None:
        """An insert while we slept (no payload), or a running row that was stopped or deleted (its id).

        Or whatever else anybody says on our channel. While we are awake we look by ourselves.
        """
        if ID.fullmatch(payload) and -(1 << 63) <= int(payload) < 1 << 63 and self._pool.of(self):
            self._mender.stopped(int(payload))
            self.wake()
        elif self._asleep:
            self._told = True
            self.wake()

    async def _wait(self, timeout: float | None) -> None:
        """Wait for a notification, a wake-up or `timeout` seconds."""
        await self._session.wait(self._wake, timeout)
