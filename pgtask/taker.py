"""What is due in one table: the take, and what is remembered from one to the next.

A take hands rows out to the pool. It looks at a bounded number of due rows; where more are waiting it walks from group
to group, some at a time. While a look at everything is dear (pace.py) the next ones start where the last one found
something. Nothing here decides when to look.
"""

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from pgtask import log
from pgtask.config import TableConfig
from pgtask.mender import Mender, Term, lowest_free
from pgtask.pace import Pace
from pgtask.pool import Client, Pool, Taken
from pgtask.store import Store

LOOK = 200
"""Due rows, and groups, that one take looks at."""

RECENT = 4
"""How many takes tell what one costs."""

LAST_LANE = 2**63 - 1

BEGINNING = ("-infinity", -(1 << 63))
"""The place, plan and id, before every due row."""

CHEAP = 0.005
"""Seconds that a full look may cost without being paced."""

EXPIRE_GAP = 1.0
"""Seconds between looks for rows that came too late while their group was full: nobody waits for them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a take found: the rows for workers, how many were too late, and the instant.

    `left` is whether it saw due rows, in groups with a free slot, that it did not take: there was no place, or somebody
    holds them locked. `waiting` is how many it saw in groups of which nothing runs. `more` is whether there may be due
    rows in groups that it did not look at. `next` is when the next planned moment after the instant comes
    (time.monotonic()), of a full look.
    """

    rows: list[Taken]
    late: int
    left: bool
    waiting: int
    more: bool
    now: Any
    next: float


class Taker:
    """Of one table; what it knows outlives a session, what it does needs a term."""

    def __init__(self, client: Client, pool: Pool, store: Store, mender: Mender, config: TableConfig):
        self.config = config
        self.closed = False  # there will be no worker for what is taken now
        self._costs: deque[float] = deque([0.0], maxlen=RECENT)  # seconds that the last takes have lasted
        self._client = client
        self._pool = pool
        self._store = store
        self._mender = mender
        self._pace = Pace(cheap=CHEAP)
        self._walk_from: int | None = None  # the lane where the next take goes on; None: from the first
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
        """Take what may start (at that instant, as the server wrote it) and hand it to the pool."""
        full = full or self._pace.ready
        self._resting = {lane: until for lane, until in self._resting.items() if until > time.monotonic()}
        held = await self._mender.held(self._term)
        capacity = min(self._pool.capacity(self._client), self.config.limit)
        resting = list(self._resting)
        lanes = [lane for lane, numbers in held.items() for _ in numbers]
        looked = (self._walk_from, *(BEGINNING if full else self._place), None if full else self._looked_at)
        started = time.monotonic()
        rows = await self._term.session.rows(
            self._store.text("take"), capacity, resting, LOOK, now, lanes, self._term.since, *looked
        )
        self._costs.append(time.monotonic() - started)
        batch = self._batch(rows, held, started)
        if self.closed:  # meanwhile
            self._mender.not_begun(*batch.rows)
            return batch
        self._hand_out(batch)
        if capacity == 0 and batch.left:
            self._pool.want(self._client, room=batch.waiting > 0)
        elif capacity or not batch.more:
            self._pool.served(self._client)
        return batch

    def _batch(self, rows: list[tuple[Any, ...]], held: dict[int, set[int]], started: float) -> Batch:
        """What was taken, each row with the lowest free number of its lane: not above `max`, as `take` has counted."""
        taken: list[Taken] = []
        who = {"taker": self._term.session.pid, "term": self._term.number}
        for *_, id, attempt, late, lane, max, count, live in rows:
            if id is None or late:
                continue
            slot = lowest_free(held[lane])
            held[lane].add(slot)
            taken.append(Taken(id=id, attempt=attempt, lane=lane, slot=slot, max=max, count=count, live=live, **who))
        late = sum(bool(row[9]) for row in rows)
        seen, waiting, now, walked, cost, *place, next = rows[0][:8]
        if cost is not None:
            self._pace.looked(cost)
            self._looked_at = now
            self._walk_from = None if walked in (None, LAST_LANE) else walked + 1
        self._place = (place[0], place[1])
        more, left = self._walk_from is not None, self._left or seen > len(taken) + late
        self._left = left and more
        # The server has counted from the end of the look, not from when we hear of it.
        moment = math.inf if next is None else started + cost + next
        return Batch(rows=taken, late=late, left=left, waiting=waiting, more=more, now=now, next=moment)

    def _hand_out(self, batch: Batch) -> None:
        for taken in batch.rows:
            if taken.max < 0:  # its end is committed before we hear of it: until then nothing may slip in
                self._resting[taken.lane] = math.inf
            self._pool.assign(self._client, taken)
        if batch.late:
            log.info("tasks_gone", table=self.config.label, count=batch.late)

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
            log.info("tasks_gone", table=self.config.label, count=count)
