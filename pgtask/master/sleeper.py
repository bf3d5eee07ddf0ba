"""How a poller sleeps and wakes: no wake-up is lost, and asleep it says nothing to the server.

A master that sleeps holds the ASLEEP lock of its table. Whoever inserts tries the same lock, shared: refused, he knows
that we sleep, and notifies; granted, he holds it until his rows can be seen, and we, who could not get it, look again.
So after a look that found nothing the lock is taken, and only what is looked at in new statements after that counts:
everything that was due at one instant, and the next moment that is planned after it. Then there is nothing to do until
that moment, or until somebody calls: a notification, a worker, a signal.

A long walk through all groups that a call has interrupted goes on in pieces. Between them the lock is held just so:
what comes in calls, and what was there before is found by the walk.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from pgtask.async_session import AsyncSession, event_or_timeout
from pgtask.config import TableConfig
from pgtask.master.handles import Client
from pgtask.master.pool import Pool
from pgtask.master.taker import Batch, Taker
from pgtask.store import Store

LONGEST_GAP = 0.05
"""Seconds between polls while an insert is in flight, or a due row is locked by somebody."""

LONGEST_DEAFNESS = 0.01
"""Seconds between polls when what we are told again and again means nothing to us."""

MOST_CPU = 0.4
"""Of one core, that the polling of tables that nobody wakes us for may cost all together."""


class Sleeper:
    """Of one table; `moments` says when something else must be looked at (time.monotonic())."""

    def __init__(
        self,
        client: Client,
        pool: Pool,
        store: Store,
        taker: Taker,
        config: TableConfig,
        moments: Callable[[], Iterable[float]],
    ):
        self.config = config
        self._client = client
        self._pool = pool
        self._store = store
        self._taker = taker
        self._moments = moments
        self._wake = asyncio.Event()
        self._asleep = False  # we hold the lock that says so
        self._still = False  # and there is nothing but to wait
        self._listens = False  # or not all was looked at since: we walk
        self._instant: Any = None  # when we got it, until everything was looked at since
        self._told = False  # a notification has come since
        self._found_at = 0.0  # when a look last found something (time.monotonic())
        self._empty = self._vain = 0  # looks in a row that found nothing, and notifications in a row that meant nothing
        self._cpu = self._used = 0.0  # processor time of the master until the last look, and between the last two
        self._session: AsyncSession
        self._oid = 0

    def begin(self, session: AsyncSession, oid: int) -> None:
        """Awake, in a new session."""
        self._session, self._oid = session, oid
        self._asleep, self._instant, self._listens = False, None, False

    def wake(self) -> None:
        self._wake.set()

    def tell(self, *, old: bool = False) -> None:
        """A notification, of what we find by ourselves while we are awake, unless it is planned `old`."""
        self._taker.call()
        if old:
            self._taker.look_everywhere()
        if self._asleep:
            if self._still and not self._wake.is_set():
                self._taker.look_ahead()
            self._told = True
            self._wake.set()

    def heed(self) -> None:
        """Whatever has called so far is answered now; the next call ends the next wait."""
        self._wake.clear()

    async def wait(self, timeout: float | None = None) -> None:
        """Until somebody calls, or for so many seconds."""
        await self._session.wait(self._wake, timeout)

    async def nap(self, seconds: float) -> None:
        """The same without a session."""
        self.heed()
        await event_or_timeout(self._wake, seconds)

    async def look(self) -> Batch:
        """Take; once asleep everywhere, and all of it for the same instant, after which the next moment is read."""
        used = time.process_time()
        self._used, self._cpu = used - self._cpu, used
        if not self.config.wake or not (self._instant is not None or self._taker.sure or self._listens):
            await self._rise()
        if not self._asleep:
            self._taker.stir()
        begins = not self._taker.walking
        asleep = self._asleep and not self._listens
        batch = await self._taker.take(self._instant, full=asleep)
        self._instant = batch.now if asleep and batch.more else None
        if begins and asleep and batch.more:  # what is planned next does not wait for the end of the walk
            asyncio.get_running_loop().call_later(batch.next - time.monotonic(), self.wake)
        return batch

    async def pause(self, batch: Batch) -> None:
        """After a look: go on soon where there is something to do, else sleep as soon as nothing can be missed."""
        if batch.left and batch.waiting and not self._pool.capacity(self._client):
            await self._await_place()
        elif batch.rows or batch.late:
            await self._go_on(batch)
        elif not batch.more:
            self._empty += 1
            if self._listens:
                await self._rise()
            await self._settle(batch)
        elif self.config.wake and not batch.left and (self._listens or not (self._asleep or self._taker.sure)):
            await self._listen(batch)
        elif self._listens or not self._asleep or self._wake.is_set():
            await self._rise()
            await self.wait(self._at_most(self._taker.gap))

    async def _go_on(self, batch: Batch) -> None:
        """Something was found. A task that comes alone does not wake us: inserts that follow soon may not notify."""
        now = time.monotonic()
        alone, self._found_at = now - self._found_at > LONGEST_GAP, now
        self._empty = self._vain = 0
        if alone and self._asleep and not (self._listens or batch.left or batch.more):
            self._told = False
            await self._sleep_until_next(batch)
        else:
            await self._rise()
            await self.wait(self._at_most(self._taker.gap))

    async def _await_place(self) -> None:
        """All workers are busy, and have been asked to make room: whoever does will call, nothing else matters."""
        self._empty = self._vain = 0
        await self._rise()
        await self._taker.expire()
        await self.wait(self._seconds_left())
        # Others may become free meanwhile; and no more than half of the time is spent on looks.
        await asyncio.sleep(self._taker.gap / 4)

    def _at_most(self, *seconds: float) -> float:
        return min(self.config.sleep.total_seconds(), *seconds)

    async def _settle(self, batch: Batch) -> None:
        """Nothing was found, everywhere: sleep if nothing can be missed, else look again soon."""
        pause = self._at_most(0.001 * 2 ** min(self._empty, 10))
        if not self.config.wake:
            # However many such tables there are, the master has time left for workers and signals.
            least = min(LONGEST_GAP, max(self._taker.gap, self._used / MOST_CPU))
            await self.wait(max(self.config.sleep.total_seconds(), least))
        elif self._asleep and batch.left and self._pool.capacity(self._client):
            await self._rise()  # due rows that somebody holds locked: no notification will tell when he lets go
            await self.wait(min(pause, LONGEST_GAP))
        elif self._asleep and self._told:
            await self._doze()
        elif self._asleep:
            await self._sleep_until_next(batch)
        elif self._empty < self.config.idle:
            await self.wait(pause)
        elif not self._taker.sure or not await self._fall_asleep():
            await self.wait(min(pause, LONGEST_GAP))

    async def _listen(self, batch: Batch) -> None:
        """Nothing was found, and the walk goes on when it may: until then whoever inserts calls."""
        if not self._asleep:  # what came before we have the lock is looked for once we have it
            self._told = False
            self._listens = self._asleep = (await self._session.one(self._store.text("lock_asleep"), self._oid))[0]
            if self._listens:
                self._taker.stir()  # what came while we were awake said nothing
            else:
                await self.wait(self._at_most(self._taker.gap))
        elif self._told:
            await self._doze()
        else:
            await self._taker.expire()
            walk_at = max(self._taker.ready_at, time.monotonic() + self._taker.gap)
            await self._wait_until(batch.next, walk_at)

    async def _fall_asleep(self) -> bool:
        """Take the ASLEEP lock: the next look, in new statements, misses nothing. False if an insert is in flight."""
        self._told = False
        self._taker.start_over()
        self._asleep, self._instant = await self._session.one(self._store.text("lock_asleep"), self._oid)
        if self._asleep:
            self._taker.stir()  # what came while we were awake said nothing
        return self._asleep

    async def _rise(self) -> None:
        """From now on inserts cost no notification."""
        if self._asleep:
            self._asleep, self._instant, self._listens = False, None, False
            await self._session.one(self._store.text("unlock_asleep"), self._oid)

    async def _sleep_until_next(self, batch: Batch) -> None:
        """Until something is planned, may start after a pause, or must be looked at.

        The lock stays ours: what wakes us may turn out to be nothing.
        """
        await self._taker.expire()
        self._still = True
        try:
            await self._wait_until(batch.next)
        finally:
            self._still = False

    async def _wait_until(self, *moments: float) -> None:
        """Until the first of the moments, or something else must be looked at, or somebody calls."""
        since = time.monotonic()
        await self.wait(self._seconds_left(*moments, *self._taker.moments()))
        if time.monotonic() - since > LONGEST_GAP:
            self._vain = 0

    def _seconds_left(self, *moments: float) -> float:
        """Until the first of the moments, or something else must be looked at."""
        now = time.monotonic()
        return max(0.0, min(now + self.config.safety.total_seconds(), *moments, *self._moments()) - now)

    async def _doze(self) -> None:
        """We were told, and found nothing: for a moment, which grows, have no notifications sent and heed none.

        They may be of inserts into groups that are full, or a stranger's, who sends what he likes.
        """
        self._vain += 1
        await self._rise()
        self.heed()  # by what has come since we looked: it is looked for when the pause is over
        await self.wait(self._at_most(LONGEST_DEAFNESS, 0.001 * 2 ** min(self._vain, 10)))
        if self._taker.sure:
            await self._fall_asleep()
