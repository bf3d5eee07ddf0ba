"""What goes wrong with the runs of a table while a poller leads it, and how it is mended.

Rows that were taken and not begun go back. A dead worker's session is ended, and its row rescued when that session is
really gone: never before, since it may still be at work. Rows that were stopped or deleted have their runs cancelled;
such a run holds its group's slot to its end. The workers of a master that died end their runs by themselves, are
waited for, and hear of a stop from us. A worker and a server that wait for each other are told so. A worker that hangs
is killed only where it has begun nothing of what it was told.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from pgtask import log, metrics
from pgtask.async_session import AsyncSession
from pgtask.coming import Calendar
from pgtask.config import TableConfig
from pgtask.cron import Wrong
from pgtask.errors import PgtaskError
from pgtask.master.handles import Client, Fate, Taken
from pgtask.master.outage import line
from pgtask.master.pool import Pool
from pgtask.process import lowest_free
from pgtask.store import Store
from pgtask.telling import Telling
from pgtask.worker.run import readable

FOREIGN_GAP = 0.5
"""Seconds between looks at runs of another master's workers: nobody tells us when they end."""

DEAF_GAP = 0.05
"""Seconds after which a worker is told again that did not read what it was told."""

UNREAD = 10
"""Seconds that a server may wait for a worker that waits for it before we say that nothing passes between them."""

HUNG = 2 * UNREAD
"""Seconds without a sign of life of a worker that has begun nothing before it is killed, as it cannot be reached."""


class Deposed(PgtaskError):
    """Another master has begun a term; this one starts again, and stands by."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """The time that a poller leads its table: `since` is when the session's backend started, as the server wrote it."""

    session: AsyncSession
    number: int
    since: str


def lost(term: Term, error: psycopg.Error) -> bool:
    """Is it the session that failed, or only the statement?"""
    state = error.sqlstate or ""
    return not state or state.startswith(("08", "57P")) or term.session.conn.closed


class Mender:
    """For one table; what it knows outlives a session, what it does needs a term."""

    def __init__(self, client: Client, pool: Pool, store: Store, telling: Telling, config: TableConfig):
        self.config = config
        self._client = client
        self._pool = pool
        self._store = store
        self._telling = telling
        self._dead: list[Fate] = []
        self._burials = 0  # looks in a row after which a dead worker's session was still there
        # Sessions of another master's workers, since when, lanes; no session, but the id, where a row is to be rescued
        self._strangers: list[tuple[int | None, Any, int, int | None]] = []
        self._unbegun: list[Taken] = []
        self._stopped: set[int] = set()  # rows of whose stop or deletion somebody told us
        self._unread: dict[tuple[Any, ...], float] = {}  # runs whose worker has not read its answer, since when
        self._rescue_at = self._listen_at = 0.0

    # What is heard

    def not_begun(self, *taken: Taken) -> None:
        self._unbegun += taken

    def ended(self, fate: Fate) -> None:
        if not fate.clean and fate.backend is not None:
            self._dead.append(fate)

    def stopped(self, id: int) -> None:
        """Somebody says that a running row was stopped or deleted."""
        self._stopped.add(id)

    @property
    def waits(self) -> bool:
        """Is a dead worker's session still there?"""
        return bool(self._dead)

    @property
    def uncertain(self) -> bool:
        """Is there one of a worker that was to begin whatever it finds? Nobody knows whose slot it may have taken."""
        return self._pool.looking(self._client) or any(fate.looking for fate in self._dead)

    def give_up(self) -> None:
        """The dead are the next master's business: we may or can do nothing about them."""
        self._dead.clear()

    def next_look(self) -> float:
        """When something must be looked at again (time.monotonic())."""
        return min(self._rescue_at, self._listen_at) if self._pool.backends(self._client) else self._rescue_at

    # What is done

    async def begin(self, term: Term) -> None:
        """What happened while we had no session: rows that were stopped, and runs of another master's workers."""
        if backends := self._pool.backends(self._client):
            self._stopped |= {id for (id,) in await term.session.rows(self._store.text("unheard"), backends)}
        await self._look_at_strangers(term)
        self._rescue_at = 0.0

    async def mend(self, term: Term) -> None:
        """Everything that went wrong since the last look. Raises Deposed."""
        await self.release(term)
        if self._stopped:
            await self._cancel_stopped(term)
        if self._dead:
            await self._bury(term)
        if time.monotonic() >= self._rescue_at:
            await self._plan_rescue(term)  # first: a session that ends in between is rescued, or looked at again
            await self._rescue(term, interrupted=self._pool.killed(self._client))
        if time.monotonic() >= self._listen_at:
            await self._listen_to_workers(term)

    @property
    def calm(self) -> bool:
        """Is there nothing to mend, and nobody else's run, so that `slots` tells all that are in use?"""
        return not (self._dead or self._unbegun or self._stopped or self._strangers)

    async def held(self, term: Term) -> dict[int, set[int]]:
        """The numbers of the slots in use, by lane: all of them, since nobody counts rows.

        Ours are known: only this poller takes, or has a worker find a row and waits for the answer, and a worker stays
        in its slot. Rows that nobody began hold theirs
        until they are released, and a dead worker's until its session is gone and the row rescued: the session may
        still be at work, or commit. What others run is known from before our first take: a term begins with a look at
        every row in TAKE or WORK. An old master's worker whose next row is committed after that look was in the same
        group at the look, and is a stranger until its session ends. A row that it was beginning at the look belonged to
        a poller that is gone: it is held until it is rescued, or found to be run by a living session. What is begun
        later is fenced by the term. Strangers have no numbers: the lowest.
        """
        if self._strangers:
            await self._look_at_strangers(term)
        slots = self.slots()
        for _, _, lane, _ in self._strangers:
            slots[lane].add(lowest_free(slots[lane]))
        return slots

    def slots(self) -> dict[int, set[int]]:
        """Those of `held` that are ours."""
        dead = [fate.assigned for fate in self._dead if fate.assigned is not None]
        slots: dict[int, set[int]] = defaultdict(set)
        for taken in (*self._pool.assigned(self._client), *self._unbegun, *dead):
            slots[taken.lane].add(taken.slot)
        return slots

    async def release(self, term: Term) -> None:
        """Rows that nobody began go back; the reason may be that another master has begun a term meanwhile."""
        if not self._unbegun:
            return
        taken, self._unbegun = self._unbegun, []
        await term.session.do(self._store.text("release"), [t.id for t in taken if t.taker == term.session.pid])
        leader = await term.session.rows(self._store.text("leader"))
        if not leader or leader[0][3] != term.number:
            raise Deposed(f"term {term.number} has ended: {self.config.label} is served by another master")

    async def _cancel_stopped(self, term: Term) -> None:
        """Cancel the runs of rows that are theirs no more; a notification proves nothing, the row does."""
        ids, self._stopped = self._stopped, set()  # what is told from now on may be newer than the answer
        told = False
        try:
            rows = await term.session.rows(self._store.text("owners"), list(ids))
            told = self._pool.cancel(
                self._client, {id: {(pid, attempt) for pid, attempt in owners} for id, owners in rows}
            )
        finally:
            if not told:  # a row that was deleted tells nobody once more
                self._stopped |= ids
                asyncio.get_running_loop().call_later(DEAF_GAP, self._client.wake)

    async def _bury(self, term: Term) -> None:
        """End the sessions of dead workers, and rescue their rows when those are really gone."""
        backends = [fate.backend for fate in self._dead]
        reasons = [fate.why for fate in self._dead]
        # What a worker has begun without a word was no run: it says so before it sends the input.
        harmless = [fate.backend for fate in self._dead if fate.interrupted or fate.looking]
        # Of those that a stop kills together, one may end its session before we hear of its death.
        interrupted = [*harmless, *self._pool.killed(self._client)]
        felled = [fate.backend for fate in self._dead if fate.felled]
        since = [fate.since for fate in self._dead]
        alive = await term.session.rows(self._store.text("terminate"), backends, since)
        await self._rescue(term, backends, reasons, interrupted, felled)
        gone = set(backends) - {pid for pid, _ in alive}
        self._dead = [fate for fate in self._dead if fate.backend not in gone]
        if gone:
            self._client.on_finished([])  # one may have committed after the last look
            await self._plan_rescue(term)  # one of their rows may be locked by somebody
        self._burials = self._burials + 1 if self._dead else 0
        if self._dead:
            pause = min(1.0, 0.01 * 2 ** min(self._burials, 10))
            asyncio.get_running_loop().call_later(pause, self._client.wake)

    async def _rescue(
        self,
        term: Term,
        backends: Sequence[int | None] = (),
        reasons: Sequence[str] = (),
        interrupted: Sequence[int | None] = (),
        felled: Sequence[int | None] = (),
    ) -> None:
        known = map(list, (backends, reasons, interrupted, felled))
        label = self.config.label
        async with term.session.transaction():
            rows = await term.session.rows(self._store.text("rescue"), self.config.crashes, *known)
            for id, _, failed, _, repeated, _, _ in rows:
                if failed and repeated:
                    await self._repeat(term, id)
            await term.session.do(self._store.text("rescue_stopped"))
        for id, ran, failed, times, _, group, attempt in rows:  # now that it is committed
            if not ran:
                log.info("run_put_back", table=label, id=id)
                continue
            metrics.lost(label, failed=failed)
            log.warning("run_lost", table=label, id=id, times=times, failed=failed)
            if failed:
                name = readable(group, term.session.parameter("server_encoding"))
                self._telling.failed(id, f"run lost {times} times", group=name, attempt=attempt)
                self._client.on_finished([id])
        self._client.on_finished([])  # what dead sessions have committed in the end, also

    async def _repeat(self, term: Term, id: int) -> None:
        """Plan the row that comes after one whose runs were all lost."""
        try:
            async with term.session.transaction():
                copied, *values = await term.session.one(self._store.text("calendar"), id)
                calendar = Calendar.read(values, time.monotonic())
                if calendar is None:
                    await term.session.do(self._store.repeat(copied), id)
                    return
                coming = calendar.coming()
                known = (calendar.cron, calendar.zone, coming.plan, list(coming.missed))
                await term.session.do(self._store.repeat(copied, "repeat_cron"), id, *known)
        except (psycopg.Error, Wrong) as error:
            log.error("repeat_refused", table=self.config.label, id=id, error=line(error))

    async def _plan_rescue(self, term: Term) -> None:
        """Look again soon while another's workers, or nobody, run tasks: those slots become free without a word."""
        gap = self.config.reset.total_seconds()
        await self._look_at_strangers(term)
        if self._strangers:
            gap = min(gap, FOREIGN_GAP)
            self._client.on_finished([])  # of what they end they tell nobody
        self._rescue_at = time.monotonic() + gap

    async def _look_at_strangers(self, term: Term) -> None:
        """Who runs rows that are not ours: other sessions, also those whose rows were running when we looked last."""
        known: list[list[Any]] = [[row[column] for row in self._strangers] for column in range(3)]
        dead = [fate.backend for fate in self._dead if fate.backend is not None]
        ours = self._pool.backends(self._client) + dead
        before = self._strangers
        self._strangers = await term.session.rows(self._store.text("foreign"), ours, *known)
        if self._strangers != before:
            self._client.on_finished([])
        if sessions := [pid for pid, *_ in self._strangers if pid is not None]:
            await term.session.do(self._store.text("stop_foreign"), sessions)

    async def _listen_to_workers(self, term: Term) -> None:
        """Workers that wait for a server that waits for them: only a server that we can ask knows of it.

        Two looks decide, by our own clock: the server's may have been set.
        """
        now = time.monotonic()
        self._listen_at = now + self.config.safety.total_seconds()
        busy = self._pool.backends(self._client, busy=True)
        rows = await term.session.rows(self._store.text("unread"), busy) if busy else []
        self._unread = {row: self._unread.get(row, now) for row in rows}
        for (backend, id, _), since in self._unread.items():
            if now - since >= HUNG and id is None and await self._unbegun_by(term, backend):
                self._pool.kill(self._client, backend)
            elif now - since >= UNREAD:
                log.warning("worker_unheard", table=self.config.label, backend=backend, id=id)
                self._pool.doubt(self._client, backend)
        if self._unread:
            self._listen_at = min(self._listen_at, now + UNREAD)

    async def _unbegun_by(self, term: Term, backend: int) -> bool:
        """Is what this session's worker was told still to be begun: to look, to end, or a row that is in TAKE?"""
        given = self._pool.given(self._client, backend)
        if given is None:
            return True
        rows = await term.session.rows(self._store.text("owners"), [given.id])
        return any([given.taker, given.attempt] in owners for _, owners in rows)
