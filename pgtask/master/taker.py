"""What is due in one table: the take, and what is remembered from one to the next.

A take hands rows out to the pool. It looks at a bounded number of due rows; where more are waiting it walks from group
to group, some at a time. While a look at everything is dear (pace.py) the next ones start where the last one found
something. Nothing here decides when to look.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from pgtask import log, metrics
from pgtask.config import TableConfig
from pgtask.master.holds import Holds
from pgtask.master.mender import Mender, Term, lowest_free
from pgtask.master.pool import Client, Pool, Taken
from pgtask.pace import Pace
from pgtask.store import Store
from pgtask.telling import Telling

LOOK = 200
"""Due rows, and groups, that one take looks at; a glance at fewer."""

RECENT = 4
"""How many takes tell what one costs."""

LAST_LANE = 2**63 - 1

BEGINNING = ("-infinity", -(1 << 63))
"""The place, plan and id, before every due row."""

CHEAP = 0.005
"""Seconds that a full look may cost without being paced."""

CROWDED = 20
"""Looks, after one for a single row found more, before it is tried again."""

EXPIRE_GAP = 1.0
"""Seconds between looks for rows that came too late while their group was full: nobody waits for them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a take found: the rows for workers, how many were too late, and the instant.

    `left` is whether it saw due rows, in groups with a free slot, that it did not take: there was no place, or somebody
    holds them locked. `waiting` is whether groups with due rows are left of which nothing runs, `more` whether there
    may be due rows in groups that it did not look at. `next` is when the next planned moment after the instant comes
    (time.monotonic()), of a full look.
    """

    rows: list[Taken]
    late: int
    left: bool
    waiting: bool
    more: bool
    now: Any
    next: float


class Taker:
    """Of one table; what it knows outlives a session, what it does needs a term."""

    def __init__(
        self,
        client: Client,
        pool: Pool,
        store: Store,
        mender: Mender,
        holds: Holds,
        telling: Telling,
        config: TableConfig,
    ):
        self.config = config
        self.closed = False  # there will be no worker for what is taken now
        self.looked_at = 0.0  # when the last take ended (time.time())
        self._costs: deque[float] = deque([0.0], maxlen=RECENT)  # seconds that the last takes have lasted
        self._client = client
        self._pool = pool
        self._store = store
        self._mender = mender
        self._holds = holds
        self._telling = telling
        self._pace = Pace(cheap=CHEAP)
        self._walk_from: int | None = None  # the lane where the next take goes on; None: from the first
        self._filled = False  # did the last take find as many as there were workers for?
        self._crowded = 0  # looks to come that are not for a single row
        self._left = False  # due rows since the walk from group to group began
        self._place = BEGINNING  # of the first due row that the last take saw
        self._looked_at: Any = None  # the instant of the last full look
        self._resting: dict[int, float] = {}  # lane -> until when (time.monotonic()) its slot keeps a pause
        self._expired: tuple[str, int] | None = None  # up to where those were looked for that came too late
        self._expire_at = 0.0  # before when they are not looked for again (time.monotonic())
        self._term: Term

    def begin(self, term: Term) -> None:
        self._term = term
        self._pace = Pace(cheap=CHEAP)  # what happened meanwhile is seen at once

    def rest(self, taken: Taken, *, ran: bool) -> None:
        """A run with a negative `max` has ended: its group's next such one waits that many milliseconds."""
        if taken.max < 0 and ran:
            self._resting[taken.lane] = time.monotonic() - taken.max / 1000
        elif taken.max < 0:
            self._resting.pop(taken.lane, None)

    @property
    def unpaced(self) -> bool:
        """May a take look everywhere now?"""
        return self._pace.ready

    @property
    def gap(self) -> float:
        """Seconds until the next look while there is something to do: so a fifth of the time is spent on them.

        By the shortest of the last takes: what made the others longer is that they waited for a processor.
        """
        return max(0.001, 4 * min(self._costs))

    @property
    def walking(self) -> bool:
        """Will the next take go on where the last one has left the walk from group to group?"""
        return self._walk_from is not None

    def start_over(self) -> None:
        """The next walk begins with the first group."""
        self._walk_from, self._left = None, False

    def moments(self) -> list[float]:
        """When there is something to do without a word from anybody (time.monotonic())."""
        resting = list(self._resting.values())
        return resting if self._expired is None else [*resting, self._expire_at]

    async def take(self, now: Any = None, *, full: bool = False) -> Batch:
        """Take what may start (at that instant, as the server wrote it) and hand it to the pool.

        A `full` look sees every group. Others may be quick; or a glance at the earliest due rows, while each finds as
        many as there are workers for: other groups have not waited as long.
        """
        self._resting = {lane: until for lane, until in self._resting.items() if until > time.monotonic()}
        held = await self._mender.held(self._term)
        capacity = min(self._pool.capacity(self._client), self.config.limit)
        glance = self._filled and capacity > 0 and self._pace.ready and not (full or self.walking)
        started = time.monotonic()
        rows = await self._look(capacity, held, now, quick=not (full or self._pace.ready), glance=glance)
        cost = time.monotonic() - started
        self._costs.append(cost)
        self.looked_at = time.time()
        metrics.looked(self.config.label, cost)
        if cost > self._telling.slow_take:
            self._telling.take(cost, tasks=sum(row[8] is not None for row in rows))
        batch = self._batch(rows, held, started, glance=glance)
        self._filled = 0 < capacity <= len(batch.rows)
        if glance and not self._filled:
            batch = replace(batch, more=True)
        if self.closed:  # meanwhile
            self._mender.not_begun(*batch.rows)
            return batch
        self._hand_out(batch)
        if capacity or not (batch.left or batch.more):
            self._pool.served(self._client)
        if batch.left and not self._pool.capacity(self._client):  # again, behind those who have waited longer
            self._pool.want(self._client, room=batch.waiting)
        return batch

    async def _look(
        self, capacity: int, held: dict[int, set[int]], now: Any, *, quick: bool, glance: bool
    ) -> list[tuple[Any, ...]]:
        lanes = [lane for lane, numbers in held.items() for _ in numbers]
        keys = self._holds.keys
        if capacity and not (quick or glance or self._resting or self.walking):
            if not self._crowded:
                one = self._store.text("take_one")
                rows = await self._term.session.rows(one, now, lanes, self._term.since, keys)
                if rows[0][0] == 0 or rows[0][8] is not None:
                    return rows
                self._crowded = CROWDED
            self._crowded -= 1
        most = min(LOOK, 10 + 10 * capacity) if glance else LOOK
        who = (capacity, list(self._resting), most, now, lanes, self._term.since, keys)
        if glance:
            return await self._term.session.rows(self._store.text("glance"), *who)
        place = (*self._place, self._looked_at) if quick else (*BEGINNING, None)
        return await self._term.session.rows(self._store.text("take"), *who, self._walk_from, *place)

    def _batch(self, rows: list[tuple[Any, ...]], held: dict[int, set[int]], started: float, *, glance: bool) -> Batch:
        """What was taken, each row with the lowest free number of its lane: not above `max`, as `take` has counted."""
        taken: list[Taken] = []
        who = {"taker": self._term.session.pid, "term": self._term.number}
        for *_, id, attempt, late, lane, max, count, live in rows:
            if id is None or late:
                continue
            slot = lowest_free(held[lane])
            held[lane].add(slot)
            taken.append(Taken(id=id, attempt=attempt, lane=lane, slot=slot, max=max, count=count, live=live, **who))
        late = sum(bool(row[10]) for row in rows)
        seen, groups, now, walked, cost, *place, next = rows[0][:8]
        waiting = groups > len({one.lane for one in taken if one.slot == 0})
        if cost is not None:
            self._pace.looked(cost)
        if cost is not None and not glance:
            self._looked_at = now
            self._walk_from = None if walked in (None, LAST_LANE) else walked + 1
        self._place = (place[0], place[1])
        more, left = self.walking, self._left or seen > len(taken) + late
        self._left = left and more
        # The server has counted from the end of the look, not from when we hear of it.
        moment = math.inf if next is None else started + cost + next
        return Batch(rows=taken, late=late, left=left, waiting=waiting, more=more, now=now, next=moment)

    def _hand_out(self, batch: Batch) -> None:
        for taken in batch.rows:
            if taken.max < 0:  # its end is committed before we hear of it: until then nothing may slip in
                self._resting[taken.lane] = math.inf
            self._pool.assign(self._client, taken)
        metrics.taken(self.config.label, len(batch.rows))
        metrics.gone(self.config.label, batch.late)
        if batch.late:
            log.info("tasks_gone", table=self.config.label, count=batch.late)
            self._client.on_finished([])

    async def expire(self) -> None:
        """Rows that came too late while their group was full; some at a time, when there is nothing else to do.

        The first of them is where the full look that has just been made found the first due row.
        """
        if time.monotonic() < self._expire_at:
            return
        self._expire_at = time.monotonic() + EXPIRE_GAP
        plan, id = self._expired or (self._place[0], max(self._place[1] - 1, BEGINNING[1]))
        count, *place = await self._term.session.one(self._store.text("expire"), self.config.limit, plan, id)
        self._expired = (place[0], place[1]) if place[0] is not None else None
        if count:
            metrics.gone(self.config.label, count)
            log.info("tasks_gone", table=self.config.label, count=count)
            self._client.on_finished([])
