"""How far the runs of a table are: what workers tell is written down, and forgotten soon after the run has ended.

The task's own row is not touched: the run that goes on would have to wait for that, or it for the run.
"""

import asyncio
import math
import time

from pgtask.master.handles import Client
from pgtask.master.mender import Term
from pgtask.process import Progress
from pgtask.store import Store

GAP = 0.05
"""Seconds for which what is told is gathered, whoever tells it."""

SWEEP = 1.0
"""Seconds between looks for what is to be forgotten, while there is something."""


class Reports:
    """Of one table; what was told outlives a session."""

    def __init__(self, client: Client, store: Store):
        self._client = client
        self._store = store
        self._told: dict[int, Progress] = {}  # the last of each task
        self._write_at = self._sweep_at = math.inf  # time.monotonic()

    def begin(self) -> None:
        """There may be what another master has left."""
        self._sweep_at = 0.0

    def told(self, progress: Progress) -> None:
        if not self._told:
            self._write_at = time.monotonic() + GAP
            asyncio.get_running_loop().call_later(GAP, self._client.wake)
        self._told[progress.id] = progress

    def next_look(self) -> float:
        """When there is something to do (time.monotonic())."""
        return min(self._write_at, self._sweep_at)

    async def write(self, term: Term) -> None:
        """Write down what was told, and forget what is over, as it is time to."""
        if time.monotonic() >= self._write_at:
            told, self._told, self._write_at = list(self._told.values()), {}, math.inf
            columns = [[getattr(one, name) for one in told] for name in ("id", "attempt", "percent", "message")]
            await term.session.do(self._store.text("report"), *columns)
            self._sweep_at = min(self._sweep_at, time.monotonic() + SWEEP)
        if time.monotonic() >= self._sweep_at:
            [left] = await term.session.one(self._store.text("forget_reports"))
            self._sweep_at = time.monotonic() + SWEEP if left else math.inf
