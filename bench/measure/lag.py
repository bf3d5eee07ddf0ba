"""A master that also notes how late its event loop's timers are: `python -m measure.lag FILE ARGUMENT...`.

The master is the real one; its loop has one more timer, every few milliseconds, and what that saw is written to FILE
when the loop is closed.
"""

import asyncio
import json
import sys
from pathlib import Path

from pgtask.master import timers

EVERY = 0.005


class Lag:
    """When each tick of a loop came (time.monotonic()), and how late it was, in seconds."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due = loop.time() + EVERY
        loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        self.ticks.append((now, now - self._due))
        self.begin(self._loop)


class Watched(timers.Loop):
    """The master's loop, with a tick; a forked child leaves it alone."""

    file: Path

    def __init__(self) -> None:
        super().__init__()
        self._lag = Lag()
        self._lag.begin(self)

    def close(self) -> None:
        if not self.is_closed():
            self.file.write_text(json.dumps(self._lag.ticks), "utf-8")
        super().close()


if __name__ == "__main__":
    from pgtask.cli import master

    Watched.file = Path(sys.argv.pop(1))
    timers.Loop = Watched  # type: ignore[misc]
    master()
