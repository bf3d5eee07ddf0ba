"""How a table's outages are told, and how long to pause in one.

A table that is down is said once when it begins, once for each other reason, and once when it ends. One whose session
is lost soon after it was opened, again and again, is said to be unstable, and then nothing more until it is stable.
"""

import random
import time

import psycopg

from pgtask import log
from pgtask.errors import PASSING

LONGEST = 5.0
"""Seconds between two tries, at most."""

QUIET = 10.0
"""Seconds without a loss after which a table whose session was lost again and again counts as stable."""


class Outage:
    """The table's ups and downs so far."""

    def __init__(self, label: str):
        self._label = label
        self.failures = 0  # since the table was up last
        self._losses = 0  # in a row, each within QUIET of the one before
        self._refusals = 0  # the same of statements that the server refused for no passing reason
        self._up_at = 0.0
        self.reason = ""  # of the last failure

    @property
    def unstable(self) -> bool:
        return self._losses > 1

    @property
    def stable_at(self) -> float | None:
        """When an unstable table will count as stable (time.monotonic())."""
        return self._up_at + QUIET if self.unstable else None

    def down(self, error: Exception, *, refused: bool) -> float:
        """The table is down; `refused`: a person must act. Returns the seconds to pause, longer each time."""
        reason = line(error)
        first = self.failures == 0
        self.failures += 1
        if first:
            self._losses = self._losses + 1 if self._soon() else 1
        if first and self._losses == 2:
            log.warning("table_unstable", table=self._label, error=reason)
        elif (first and self._losses == 1) or (not first and reason != self.reason):
            log.event("error" if refused else "warning", "table_down", table=self._label, error=reason)
        self.reason = reason
        self._count_refusal(error)
        tries = max(self.failures, self._refusals)
        return min(LONGEST, 0.05 * 2.0 ** min(tries, 10)) * random.uniform(0.5, 1.0)

    def _count_refusal(self, error: Exception) -> None:
        """A statement of a table that we lead is refused at every start, say by a trigger of the user's on taking."""
        refused = isinstance(error, psycopg.Error) and (error.sqlstate or "08")[:2] not in ("08", *PASSING)
        self._refusals = self._refusals + 1 if refused and self._soon() else int(refused)

    def _soon(self) -> bool:
        return time.monotonic() < self._up_at + QUIET

    def up(self) -> None:
        if self.failures and not self.unstable:
            log.info("table_up", table=self._label, failures=self.failures)
        self.failures = 0
        self._up_at = time.monotonic()

    def stable(self) -> None:
        """Say it, some time after the last of several losses."""
        if self.unstable and not self._soon():
            log.info("table_stable", table=self._label, losses=self._losses)
            self._losses = 0


def line(error: Exception) -> str:
    """An error as one line of a log."""
    return " ".join(str(error).split()) or type(error).__name__
