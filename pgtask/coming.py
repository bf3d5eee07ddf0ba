"""What a row with a calendar is followed by: the next plan, and the runs that were missed meanwhile.

Pure: the row's values come from the statement `calendar` (sql/calendar.sql), before the run; what is decided here is
written by `repeat_cron`. The server's clock is read once: after that its time is told by our own monotonic one, since
at the end of a run a question to the server would be asked in a session as the task has left it. It is never ahead of
the server's but where that was set back.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple, Self

from pgtask import cron
from pgtask.cron import MOMENT

NOTED = 1000
"""Missed runs that get a row of their own: the last of them."""

COUNTED = 10_000
"""How far those before are counted."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST, LATEST = (datetime(year, 1, 1, tzinfo=UTC) for year in (2, 9999))
"""Those that go beyond are taken for these."""


class Coming(NamedTuple):
    """`plan` is that of the next row, None where there shall be none; `missed` are plans of runs that never were.

    `more` is how many there were before these, counted up to COUNTED.
    """

    plan: datetime | None
    missed: tuple[datetime, ...] = ()
    more: int = 0

    @property
    def notice(self) -> str | None:
        if not self.more:
            return None
        number = f"{self.more} or more" if self.more == COUNTED else str(self.more)
        return f"NOTICE:  {number} earlier runs were missed too"


class Calendar(NamedTuple):
    """Of one row, at the moment `now` of the server's clock, when our monotonic one showed `read_at` seconds.

    `plan` is that of its first run, if it is to be `again` after an earlier one; `late`: it is later than `active`.
    """

    cron: str
    zone: str
    plan: datetime
    until: datetime
    missed: str
    late: bool
    again: bool
    now: datetime
    read_at: float

    @classmethod
    def read(cls, values: Sequence[str | None], read_at: float) -> Self | None:
        """From what the statement `calendar` answers after `copied`. None if the row has no calendar."""
        expression, zone, plan, until, missed, late, again, now = values
        if expression is None:
            return None
        assert zone is not None and missed is not None
        return cls(
            cron=expression,
            zone=zone,
            plan=moment(plan),
            until=moment(until or "Infinity"),
            missed=missed,
            late=late == "true",
            again=again == "true",
            now=moment(now),
            read_at=read_at,
        )

    @property
    def skipped(self) -> bool:
        """Is the run missed, and shall for that not be? One whose calendar is wrong is not: that is said at its end."""
        if self.missed != "skip" or self.again:
            return False
        try:
            return self.late or self._following(self.plan) <= self.now
        except cron.Wrong:
            return False

    def coming(self) -> Coming:
        """What comes after the run, which ends now. Raises cron.Wrong."""
        since = self.plan if self.missed == "all" else max(self.plan, self._clock())
        plan = self._following(since)
        end = min(since, self.until) + MOMENT
        missed = cron.between(self.cron, self.zone, self.plan, end, NOTED)
        more = cron.count(self.cron, self.zone, self.plan, missed[0], COUNTED) if len(missed) == NOTED else 0
        return Coming(plan, tuple(missed), more)  # `until`, as it is by then, is the statement's

    def _following(self, after: datetime) -> datetime:
        return cron.following(self.cron, self.zone, after)

    def _clock(self) -> datetime:
        return self.now + timedelta(seconds=time.monotonic() - self.read_at)


def moment(seconds: str | None) -> datetime:
    """Of seconds since 1970 as the server writes them; beyond EARLIEST or LATEST it is that."""
    number = Decimal(seconds or 0)
    try:
        return min(max(EARLIEST, EPOCH + timedelta(microseconds=int(number * 1_000_000))), LATEST)
    except OverflowError:
        return EARLIEST if number < 0 else LATEST
