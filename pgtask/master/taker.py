"""What is due in one table: the take, and what is remembered from one to the next.

A take hands rows out to the pool. It looks at a bounded number of due rows; where more are waiting it walks from group
to group, some at a time. While a look at everything is dear (pace.py) the next ones start where the last one found
something. Nothing here decides when to look.
"""

import math
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pgtask import log, metrics
from pgtask.config import TableConfig
from pgtask.master.backlog import Backlog, Place
from pgtask.master.handles import Client, Looking, Taken
from pgtask.master.holds import Holds
from pgtask.master.mender import Mender, Term
from pgtask.master.pool import Pool
from pgtask.pace import Pace
from pgtask.process import Look, lowest_free
from pgtask.store import Store
from pgtask.telling import Telling

LOOK = 200
"""Due rows, and groups, that one take looks at; a glance at fewer."""

MOST_LANES = 100
"""Groups with slots in use that a worker is told of: a message has an end."""

ALONE, ALONE_GAPS = 0.005, 2
"""A task comes alone, so that a worker may look for it, so many seconds, and gaps between looks, after others."""

PROMPT, NEW = 0.25, 1.0
"""Seconds in which a worker has to begin what it looks for, and one that is forked for it."""

RECENT = 4
"""How many takes tell what one costs."""

LAST_LANE = 2**63 - 1

TAKEN = 15
"""Columns of a take's answer that tell what was taken."""

BEGINNING: Place = ("-infinity", -(1 << 63))
"""The place before every due row."""

CHEAP = 0.005
"""Seconds that a full look may cost without being paced."""

WARY = 10
"""Calls, after one that meant nothing, until another worker is forked for one that may mean nothing."""

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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A worker looks: with these slots in use, since `started` (time.monotonic()), nothing later than `until`."""

    looking: Looking
    held: dict[int, set[int]]
    started: float
    until: str


class Uncertain(Exception):
    """A worker that was to begin what it finds has ended without a word."""


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
        self._backlog = Backlog()
        self._named_pace = Pace(cheap=CHEAP)  # of looks at lanes by name
        self._known_holds = 0  # how often they had changed when the last take looked
        self._walk_from: int | None = None  # the lane where the next take goes on; None: from the first
        self._hasty = True  # is there reason to believe that a walk will find something?
        self._filled = False  # did the last take find as many as there were workers for?
        self._found_behind = False  # has the last look behind the backlog, or what is taken for it, found anything?
        self._begun = False  # by a worker, what the last take found
        self._asked: Asked | None = None  # before the take whose look it is
        self._may_ask = True  # nobody has looked for this take yet
        self._wary = 0  # calls to come for which no worker is forked, since they may mean nothing
        self._now: tuple[datetime, float] | None = None  # the server's clock, and ours (time.monotonic()) not later
        self._handed_at = 0.0  # when something was found last (time.monotonic())
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
        self.look_everywhere()
        self._pace = Pace(cheap=CHEAP)  # what happened meanwhile is seen at once
        self._now = None  # it may be another server

    def look_everywhere(self) -> None:
        """What is due anywhere is to be seen by a take soon."""
        self._backlog.forget()
        self._walk_from, self._left = None, False
        self._hasty = True

    def stir(self) -> None:
        """There may be more that is due, of which nobody need have told us."""
        self._backlog.stir()

    def call(self) -> None:
        """Somebody says that there is."""
        self._backlog.call()

    def rest(self, taken: Taken, *, ran: bool) -> None:
        """A run with a negative `max` has ended: its group's next such one waits that many milliseconds."""
        if taken.max < 0 and ran:
            self._resting[taken.lane] = time.monotonic() - taken.max / 1000
        elif taken.max < 0:
            self._resting[taken.lane] = 0.0

    def _end_rests(self) -> None:
        now = time.monotonic()
        for lane in [lane for lane, until in self._resting.items() if until <= now]:
            del self._resting[lane]
            self._backlog.free(lane)

    @property
    def sure(self) -> bool:
        """Will the next take see all that is due, be it that it looks everywhere?"""
        return self._pace.ready or self._backlog.place is not None

    @property
    def ready_at(self) -> float:
        """When it may look everywhere, or walk on (time.monotonic())."""
        return self._pace.until

    @property
    def gap(self) -> float:
        """Seconds until the next look while there is something to do: so a fifth of the time is spent on them.

        By the shortest of the last takes: what made the others longer is that they waited for a processor.
        """
        return max(0.001, 4 * min(self._costs))

    @property
    def walking(self) -> bool:
        """Will the next take go on where the last one has left the walk from group to group?"""
        return self._walk_from is not None and self._backlog.place is None

    def start_over(self) -> None:
        """The next walk begins with the first group."""
        if self._backlog.place is None:
            self._walk_from, self._left = None, False

    def moments(self) -> list[float]:
        """When there is something to do without a word from anybody (time.monotonic())."""
        moments = list(self._resting.values())
        if self._expired is not None:
            moments.append(self._expire_at)
        if self._backlog.place is not None:
            moments.append(max(self._pace.until, self._walk_at()))
        if self._backlog.lanes and self._pool.capacity(self._client):  # else whoever makes room calls
            moments.append(self._named_pace.until)
        return moments

    async def take(self, now: Any = None, *, full: bool = False) -> Batch:
        """Take what may start (at that instant, as the server wrote it) and hand it to the pool.

        A `full` look sees every group. Others may be quick; or a glance at the earliest due rows, while each finds as
        many as there are workers for: other groups have not waited as long.
        """
        self._end_rests()
        self._begun = False
        try:
            batch, capacity = await self._take_asked() or await self._take(now, full=full)
        except Uncertain:
            return self._soon(now)
        self._filled = 0 < capacity <= len(batch.rows)
        if self.closed and not self._begun:  # meanwhile
            self._mender.not_begun(*batch.rows)
            return batch
        self._hand_out(batch)
        if capacity or not (batch.left or batch.more):
            self._pool.served(self._client)
        if batch.left and not self._pool.capacity(self._client):  # again, behind those who have waited longer
            self._pool.want(self._client, room=batch.waiting)
        return batch

    def look_ahead(self) -> None:
        """Somebody has called while we sleep: have a worker look before the next take, whose look it is."""
        settled = self._mender.calm and self._holds.changes == self._known_holds and not self._resting
        everywhere = self._pace.ready and self._walk_from is None and self._backlog.place is None
        if settled and everywhere and not (self.closed or self._crowded) and self._pool.capacity(self._client):
            self._backlog.set_out()
            self._asked = self._ask(self._mender.slots(), None, BEGINNING, fork=not self._wary)
            self._wary -= bool(self._wary)

    async def _take_asked(self) -> tuple[Batch, int] | None:
        """What a worker has found who was asked before; and how many we could have taken."""
        asked, self._asked = self._asked, None
        self._may_ask = asked is None
        rows = [] if asked is None else await self._hear(asked)
        if asked is None or not rows:
            return None
        new = asked.looking.forked
        batch = self._seen(rows, asked.held, asked.started, [], everywhere=True, first=True, new=new)
        return batch, min(self._pool.capacity(self._client) + len(batch.rows), self.config.limit)

    async def _take(self, now: Any, *, full: bool) -> tuple[Batch, int]:
        """What there is now; and how many we could have taken."""
        if self._mender.uncertain:
            raise Uncertain
        held = await self._mender.held(self._term)
        if self._holds.changes != self._known_holds:
            self._known_holds = self._holds.changes
            self.look_everywhere()
            self._pace = Pace(cheap=CHEAP)
        self._backlog.count(held)
        capacity = min(self._pool.capacity(self._client), self.config.limit)
        behind, batch = self._backlog.place, None
        if behind is not None and not (self._found_behind and self._may_walk()):
            batch = await self._take_behind(behind, capacity, held, now)
        elif self.walking and not (full or (self._found_behind and self._pace.ready)):
            batch = await self._take_beside(capacity, held, now)
        if batch is None:
            batch = await self._take_anywhere(capacity, held, now, full=full)
        return batch, capacity

    def _soon(self, now: Any) -> Batch:
        """Nothing may be taken, while nobody knows whose slot a worker has that was to begin what it finds."""
        self.look_everywhere()
        return Batch(rows=[], late=0, left=True, waiting=False, more=False, now=now, next=math.inf)

    def _may_walk(self) -> bool:
        """Is it time to walk on through the full groups, behind whose backlog the takes look?"""
        return self._pace.ready and time.monotonic() >= self._walk_at()

    def _walk_at(self) -> float:
        return self._backlog.walk_at(self.config.safety.total_seconds())

    async def _take_behind(self, place: Place, capacity: int, held: dict[int, set[int]], now: Any) -> Batch | None:
        """What may start behind the backlog of full groups; None if there is nothing, and it is time to walk on."""
        named = self._backlog.lanes if self._named_pace.ready else []
        lanes = await self._due_in(named, now)
        started = time.monotonic()
        calls = self._backlog.calls
        rows = await self._look_behind(place, lanes, capacity, held, now)
        self._looked(started, rows)
        batch = self._batch(rows, held, started)
        if lanes:
            self._named_pace.looked(rows[0][4])
        self._backlog.looked(held, {one.lane for one in batch.rows}, named, left=batch.left)
        self._backlog.answer(calls, len(batch.rows) + batch.late)
        self._found_behind = bool(batch.rows or batch.late or batch.left)
        if rows[0][TAKEN : TAKEN + 1] == (True,):  # so many are new that they hide others
            self.look_everywhere()
            batch = replace(batch, more=True)
        again = self._backlog.place is None or self._may_walk()
        return None if again and not self._found_behind else batch

    async def _take_beside(self, capacity: int, held: dict[int, set[int]], now: Any) -> Batch | None:
        """What comes alone while a walk goes on that has told where to look for it; None if there may be more."""
        since, calls, named = self._backlog.since, self._backlog.calls, self._backlog.lanes
        if since is None or not capacity or await self._due_in(named, now):
            return None
        started = time.monotonic()
        rows = await self._look_for_one(held, now, since)
        if not rows:
            return None
        self._looked(started, rows)
        batch = self._batch(rows, held, started)
        self._backlog.looked(held, {one.lane for one in batch.rows}, named, left=batch.left)
        self._backlog.answer(calls, len(batch.rows))
        self._found_behind = bool(batch.rows)
        return replace(batch, left=self._left or batch.left, more=True) if batch.rows or not self._pace.ready else None

    async def _take_anywhere(self, capacity: int, held: dict[int, set[int]], now: Any, *, full: bool) -> Batch:
        started = time.monotonic()
        behind = self._backlog.place is not None
        glance = self._filled and capacity > 0 and self._pace.ready and not (full or behind or self.walking)
        everywhere = not glance and (full or behind or self._pace.ready)
        first = self._walk_from is None
        if everywhere and first:
            self._backlog.set_out()
        lanes = self._backlog.lanes
        rows = await self._look(lanes, capacity, held, now, quick=not (everywhere or glance), glance=glance)
        batch = self._seen(rows, held, started, lanes, everywhere=everywhere, first=first)
        if glance:
            self._pace.looked(rows[0][4], cheap=CHEAP if self._backlog.place is None else 0.0)
        return replace(batch, more=batch.more or (glance and len(batch.rows) < capacity))

    def _seen(
        self,
        rows: list[tuple[Any, ...]],
        held: dict[int, set[int]],
        started: float,
        lanes: list[int],
        *,
        everywhere: bool,
        first: bool,
        new: bool = False,
    ) -> Batch:
        """What a look has shown, maybe a piece, and maybe the `first`, of one that goes everywhere.

        By a `new` session, which has never looked before, it says nothing of what looks cost.
        """
        self._looked(started, rows)
        batch = self._batch(rows, held, started)
        walked, cost, *place = rows[0][3:7]
        self._place = (place[0], place[1])
        if everywhere:
            self._looked_at = batch.now
            self._walk_from = None if walked in (None, LAST_LANE) else walked + 1
        left = self._left or batch.left
        self._left = left and self._walk_from is not None
        taken = {one.lane for one in batch.rows}
        known = self._backlog.known
        if everywhere:
            self._conclude(rows[0][TAKEN:], taken, left=left, first=first)
        self._backlog.looked(held, taken, lanes, left=batch.left)
        self._found_behind = False
        if self._backlog.known is not known:
            self._crowded = 0  # that was elsewhere
        if everywhere and not new:
            hasty = self._hasty or first or bool(batch.rows)
            self._pace.looked(cost, cheap=CHEAP if hasty and self._backlog.place is None else 0.0)
            self._hasty = self._hasty and self._walk_from is not None
        return replace(batch, left=left, more=self.walking)

    def _conclude(self, seen: tuple[Any, ...], taken: Collection[int], *, left: bool, first: bool) -> None:
        """What a piece of a walk, maybe the `first`, says of the backlog of full groups."""
        if left or not seen or not self.config.wake:
            self._backlog.forget()
            return
        hidden, *recent = seen
        place = None if recent[0] is None else (recent[0], recent[1])
        self._backlog.walked(place, first=first, last=self._walk_from is None, hidden=hidden)
        for lane in taken:  # there may be more of it
            self._backlog.free(lane)

    def _looked(self, started: float, rows: list[tuple[Any, ...]]) -> None:
        cost = time.monotonic() - started
        self._costs.append(cost)
        self.looked_at = time.time()
        metrics.looked(self.config.label, cost)
        if cost > self._telling.slow_take:
            self._telling.take(cost, tasks=sum(row[8] is not None for row in rows))

    async def _look_behind(
        self, place: Place, lanes: list[int], capacity: int, held: dict[int, set[int]], now: Any
    ) -> list[tuple[Any, ...]]:
        if capacity and not lanes and (rows := await self._look_for_one(held, now, place)):
            return rows
        who = (capacity, list(self._resting), LOOK, now, _slots(held), self._term.since)
        where = (None, *place, self._looked_at, lanes)
        return await self._term.session.rows(self._store.text("take"), *who, *where)

    async def _due_in(self, lanes: list[int], now: Any) -> list[int]:
        """Those in which something is due: a look at them by name costs more than to see that there is nothing."""
        rows = await self._term.session.rows(self._store.text("due_in"), lanes, now) if lanes else []
        return [lane for (lane,) in rows]

    async def _look(
        self, lanes: list[int], capacity: int, held: dict[int, set[int]], now: Any, *, quick: bool, glance: bool
    ) -> list[tuple[Any, ...]]:
        aside = quick or glance or self._walk_from is not None or self._backlog.place is not None
        if capacity and not aside and (rows := await self._look_for_one(held, now, BEGINNING)):
            return rows
        most = min(LOOK, 10 + 10 * capacity) if glance else LOOK
        who = (capacity, list(self._resting), most, now, _slots(held), self._term.since)
        if glance:
            return await self._term.session.rows(self._store.text("glance"), *who)
        place = (*self._place, self._looked_at) if quick else (*BEGINNING, None)
        where = (self._walk_from, *place, lanes)
        return await self._term.session.rows(self._store.text("take"), *who, *where)

    async def _look_for_one(self, held: dict[int, set[int]], now: Any, place: Place) -> list[tuple[Any, ...]]:
        """For a single due row from the place on; no answer where there are more, or it may not start."""
        if self._resting:
            return []
        if not self._crowded:
            asked = self._ask(held, now, place) if self._may_ask else None
            rows = (asked is not None and await self._hear(asked)) or await self._take_one(held, now, place)
            if rows[0][0] == 0 or rows[0][8] is not None:
                return rows
            self._crowded = CROWDED
        self._crowded -= 1
        return []

    async def _take_one(self, held: dict[int, set[int]], now: Any, place: Place) -> list[tuple[Any, ...]]:
        one = self._store.text("take_one")
        return await self._term.session.rows(one, now, _slots(held), self._term.since, *place)

    def _ask(self, held: dict[int, set[int]], now: Any, place: Place, *, fork: bool = False) -> Asked | None:
        """Have a worker look for it, and begin it at once; None if there is none, or it is not for him."""
        started = time.monotonic()
        alone = started - self._handed_at > max(ALONE, ALONE_GAPS * self.gap)
        if not (alone and self.config.wake and self._now) or len(held) > MOST_LANES:
            return None
        by = started + (PROMPT if self._pool.idle(self._client) is not None else NEW)
        until = str(self._now[0] + timedelta(seconds=by - self._now[1]))
        look = Look(
            term=self._term.number,
            used=[(lane, list(numbers)) for lane, numbers in held.items() if numbers],
            now=None if now is None else str(now),
            place=place,
            until=until,
            by=by,
        )
        looking = self._pool.have_look(self._client, look, lambda row: self._taken(row, held), fork=fork)
        return None if looking is None else Asked(looking=looking, held=held, started=started, until=until)

    async def _hear(self, asked: Asked) -> list[tuple[Any, ...]]:
        """What he has found, as a take answers; nothing if he cannot tell, or may not begin it. Raises Uncertain."""

        async def at_rest(backend: int | None) -> bool:
            return bool((await self._term.session.one(self._store.text("resting"), backend, asked.until))[0])

        row = await asked.looking.hear(at_rest)
        if self._mender.uncertain:
            raise Uncertain
        if asked.looking.forked and (row is None or row[8] is None):
            self._wary = WARY
        if row is None or (row[0] and row[8] is None):
            return []
        self._begun = row[8] is not None
        return [(*row[:2], datetime.fromisoformat(row[2]), *row[3:])]

    def _taken(self, row: Sequence[Any], held: Mapping[int, set[int]]) -> Taken:
        """In the lowest free slot of its lane: its number is not above `max`, as the statement has counted."""
        id, attempt, _, lane, max, count, live = row[8:TAKEN]
        return Taken(
            id=id,
            attempt=attempt,
            taker=self._term.session.pid,
            term=self._term.number,
            lane=lane,
            slot=lowest_free(held.get(lane, ())),
            max=max,
            count=count,
            live=live,
        )

    def _batch(self, rows: list[tuple[Any, ...]], held: dict[int, set[int]], started: float) -> Batch:
        """What was taken, each row in a slot, which is in use from now on."""
        taken: list[Taken] = []
        for row in rows:
            if row[8] is not None and not row[10]:
                one = self._taken(row, held)
                held[one.lane].add(one.slot)
                taken.append(one)
        late = sum(bool(row[10]) for row in rows)
        seen, groups, now, _, cost, _, _, next = rows[0][:8]
        self._now = (now, started)
        # The server has counted from the end of the look, not from when we hear of it.
        moment = math.inf if next is None else started + cost + next
        return Batch(
            rows=taken,
            late=late,
            left=seen > len(taken),  # one that came too late was in the place of another
            waiting=groups > len({one.lane for one in taken if one.slot == 0}),
            more=False,
            now=now,
            next=moment,
        )

    def _hand_out(self, batch: Batch) -> None:
        if batch.rows:
            self._handed_at = time.monotonic()
        for taken in batch.rows:
            if taken.max < 0:  # its end is committed before we hear of it: until then nothing may slip in
                self._resting[taken.lane] = math.inf
            if not self._begun:
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


def _slots(held: dict[int, set[int]]) -> list[int]:
    """The lane of each slot in use."""
    return [lane for lane, numbers in held.items() for _ in numbers]
