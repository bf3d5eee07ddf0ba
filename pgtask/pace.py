"""How often a statement may look everywhere for what is due, when that has become dear.

An old transaction that somebody left open keeps the entries of every task that went by since in the indexes, and each
look from the beginning reads them all. So while such a look is dear the next ones start where the last one found
something; what they cannot see (a row that was committed late, or given back) waits for the next look everywhere.
"""

import time

SHARE = 20
"""After a dear look, this many times what it cost passes until the next one: they take a twentieth of the time."""

LONGEST = 10.0
"""Seconds that pass at most, whatever the server's clock said of the cost."""


class Pace:
    """Of one kind of look; one that costs less than `cheap` seconds may be made at any time."""

    def __init__(self, *, cheap: float):
        self._cheap = cheap
        self.until = 0.0
        """Before when it may not look everywhere (time.monotonic())."""

    @property
    def ready(self) -> bool:
        """May it look everywhere now?"""
        return time.monotonic() >= self.until

    def looked(self, cost: float, *, cheap: float | None = None) -> None:
        """A look everywhere has cost so many seconds; this one was only cheap below that."""
        pause = min(LONGEST, SHARE * cost) if cost >= (self._cheap if cheap is None else cheap) else 0.0
        self.until = time.monotonic() + pause
