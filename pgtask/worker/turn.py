"""A worker's turn in a group: how long it goes on there, and what it wants of it next."""

import math
import time

from pgtask.worker.following import Want

SOON, BELOW = 0.02, 1.0
"""A worker that gets a task of its group within so many seconds after it has found none looks below what is planned for
later, for so many seconds."""

WEIGHT = 0.3
"""Of the last run, in how long the next one is expected to take."""

SHORTEST = 0.00005
"""Seconds that a run takes at least."""

MOMENT, TURN, LONGEST = 0.01, 100, 0.15
"""A worker goes on with its group for so many seconds although others wait, and until it has run so many tasks, but for
no more than so many seconds: a change of the group costs as much as seven of them."""


class Turn:
    """Of one worker."""

    def __init__(self, batch_time: float):
        self.runs = 0
        """How many the worker has had."""
        self.lane = 0
        """The key of the group that it runs in."""
        self._batch_time = batch_time
        self._born = time.monotonic()
        self._place = (b"", b"", b"")  # as Want's
        self._each = 0.0  # that a run is expected to take
        self._entered = 0.0  # when we were given the group that we are in
        self._before = 0  # how many runs we had had by then
        self._until = math.inf  # others wait: take nothing more of it from then on
        self._idle_at = 0.0  # when we last found nothing more
        self._below_until = 0.0  # look below what is planned for later until then

    @property
    def each(self) -> float:
        """Seconds that a run is expected to take."""
        return max(self._each, SHORTEST)

    @property
    def had(self) -> int:
        """How many runs the turn has had, with the one that goes on."""
        return self.runs - self._before

    def enter(self, term: int, lane: int, slot: int) -> None:
        """The group and slot of an assignment. If we have just found nothing there, it was below what comes first."""
        now = time.monotonic()
        if lane == self.lane and now - self._idle_at < SOON:
            self._below_until = now + BELOW
        self.lane, self._place = lane, (b"%d" % term, b"%d" % lane, b"%d" % slot)
        self._entered, self._before = now, self.runs

    def over(self) -> None:
        """Nothing more was found."""
        self._idle_at = time.monotonic()

    def make_room(self, *, now: bool) -> None:
        """Others wait."""
        self._until = 0.0 if now else min(self._until, self._entered + MOMENT)

    def forget_others(self) -> None:
        """Whoever waited has got the place, or will be told of again."""
        self._until = math.inf

    def took(self, seconds: float) -> None:
        """A run, or each of several."""
        self._each += WEIGHT * (seconds - self._each)

    def want(self, *, more: bool, batch: int, ahead: int = 0) -> Want:
        """What of the group is wanted, if `more` is at all: at most `batch` together, and as many as the time for that
        allows. `ahead`: how many runs before it have not begun yet."""
        now = time.monotonic()
        late = now - self._until
        short = self._until > 0 and self.had < TURN and now - self._entered < LONGEST
        return Want(
            next=more and (late < 0 or short),
            runs=self.runs + ahead,
            age=now - self._born,
            place=self._place,
            below=now < self._below_until,
            batch=1 if batch == 1 else min(batch, max(1, int(self._batch_time / self.each))),
        )
