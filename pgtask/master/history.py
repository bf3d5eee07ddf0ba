"""What becomes of finished rows: those that were kept as long as the table's settings say are removed.

There is no index that tells which these are, since every finish would pay for it. The primary key is walked instead, in
pass after pass with a pause between, and of each pass only the part that can hold such a row: what was inserted after
some moment cannot have ended before it, so the greatest id there was at the beginning of each pass is remembered.

The walk goes in small steps in the poller's own session, where starting tasks comes first: a step lasts a few
milliseconds at most, and after each comes a pause of several times as long. What a row's removal does to other tables
(a user's triggers, foreign keys) may fail: such a row stays, and disturbs nobody else.
"""

import math
import time
from collections import deque
from datetime import timedelta

import psycopg

from pgtask import log
from pgtask.config import TableConfig
from pgtask.master.mender import Term, lost
from pgtask.master.outage import line
from pgtask.store import Store

MOST_ROWS = 1000
"""Rows that one step looks at."""

LEAST_ROWS = 20
"""The same where a step takes long: on a busy machine most of it is waiting, however few they are."""

FIRST_ROWS = 100
"""The same for the first step, until it is known what one costs."""

STEP = 0.005
"""Seconds that a step should last at most: a task that becomes due meanwhile waits for its end."""

REST = 4
"""After a step so many times what it cost passes until the next: a fifth of the time is spent on them."""

PASSES = 20
"""How many passes there are in the time that rows are kept; and after so many one begins with the first row again."""

SHORTEST, LONGEST = 10.0, 3600.0
"""Seconds between two passes, at least and at most."""

MOST_REFUSALS = 10
"""Rows that cannot be removed, after which a pass rests: the server logs an error for each."""

LEAST_ID, GREATEST_ID = -(1 << 63), (1 << 63) - 1


class History:
    """Of one table; it may forget all it knows, and then reads more than it must."""

    def __init__(self, store: Store, config: TableConfig):
        self._store = store
        self._rows = FIRST_ROWS
        self._first = LEAST_ID  # no row before it stayed when they were looked at last
        self._passes = 0
        # What time the server had, in seconds, and the greatest id: of the beginning of each pass.
        self._marks: deque[tuple[float, int]] = deque()
        self._removed = self._refusals = 0  # in this pass
        self.configure(config)

    def configure(self, config: TableConfig) -> None:
        """With other settings rows may have to go that were to stay; so look at all of them, soon."""
        self._label = config.label
        self._keep = _seconds(config.keep)
        self._keep_failed = self._keep if config.keep_failed == "keep" else _seconds(config.keep_failed)
        self._renew()

    def begin(self) -> None:
        """A new term: others may have changed everything."""
        self._marks.clear()
        self._renew()

    def next_look(self) -> float:
        """When there is something to do again (time.monotonic()); never if all rows are kept for ever."""
        return self._at if self._shortest < math.inf else math.inf

    async def sweep(self, term: Term) -> None:
        """One step, if it is time for one. Raises psycopg.Error if the session is lost."""
        if time.monotonic() < self.next_look():
            return
        if self._place is None:
            await self._begin_pass(term)
        started = time.monotonic()
        try:
            ended = await self._step(term, self._rows, self._keep, self._keep_failed)
            self._fit(time.monotonic() - started)
        except psycopg.Error as error:
            if lost(term, error):
                raise
            ended = await self._refused(term, error)
        if ended or self._refusals >= MOST_REFUSALS:
            self._end_pass(ended=ended)
        else:
            self._at = time.monotonic() + REST * (time.monotonic() - started)

    @property
    def _shortest(self) -> float:
        """Seconds before which no row is removed, whatever its state is."""
        return min(one for one in (self._keep, self._keep_failed, math.inf) if one is not None)

    def _renew(self) -> None:
        self._at = 0.0
        self._place: int | None = None  # the id that this pass goes on after; None: the next one begins anew
        self._last = GREATEST_ID  # where this pass ends
        self._first = LEAST_ID

    async def _begin_pass(self, term: Term) -> None:
        """Up to where ids were when what is to be removed can have been inserted; all where that is not known."""
        now, newest = await term.session.one(self._store.text("newest"))
        while len(self._marks) > 1 and self._marks[1][0] < now - self._shortest:
            self._marks.popleft()
        known = self._marks and self._marks[0][0] < now - self._shortest
        self._last = self._marks[0][1] if known else GREATEST_ID
        self._marks.append((now, LEAST_ID if newest is None else newest))
        self._place = LEAST_ID if self._passes % PASSES == 0 else self._first
        self._passes += 1
        self._first = GREATEST_ID
        self._removed = self._refusals = 0

    async def _step(self, term: Term, rows: int, keep: float | None, keep_failed: float | None) -> bool:
        """Look at so many rows; whether these were the pass's last."""
        seen, removed, last, stays = await term.session.one(
            self._store.text("sweep"), self._place, self._last, rows, keep, keep_failed
        )
        self._removed += removed
        if stays is not None:
            self._first = min(self._first, stays - 1)
        if last is not None:
            self._place = last
        return bool(seen < rows)

    async def _refused(self, term: Term, error: psycopg.Error) -> bool:
        """Something forbids that one of these rows is removed: find out which, in smaller steps, and go past it."""
        if self._rows > 1:
            self._rows = max(1, self._rows // 10)
            return False
        ended = await self._step(term, 1, None, None)
        if not self._refusals:
            hint = "a trigger or a foreign key of yours forbids it, or waits for a lock"
            log.warning("history_refused", table=self._label, id=self._place, error=line(error), hint=hint)
        self._refusals += 1
        return ended

    def _fit(self, cost: float) -> None:
        """How many rows the next step looks at, after one has cost so many seconds."""
        if cost > STEP:
            self._rows = max(min(self._rows, LEAST_ROWS), int(self._rows * STEP / cost))
        elif cost < STEP / 2:
            self._rows = min(MOST_ROWS, 2 * self._rows)

    def _end_pass(self, *, ended: bool) -> None:
        """Where too much was refused the next pass goes on from here, a good while later."""
        if self._removed:
            log.info("history_removed", table=self._label, count=self._removed)
        self._removed = self._refusals = 0
        pause = min(LONGEST, max(SHORTEST, self._shortest / PASSES)) if ended else LONGEST
        self._at = time.monotonic() + pause
        if ended and self._place is not None:
            self._first, self._place = min(self._first, self._place), None


def _seconds(keep: timedelta | str) -> float | None:
    return keep.total_seconds() if isinstance(keep, timedelta) else None
