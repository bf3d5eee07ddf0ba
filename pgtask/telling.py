"""What the log tells of a table's tasks: those that failed, those that were slow, and how many were left out.

A storm of failing tasks must not fill a disk: of each table so many lines are written in a minute, whichever process
writes them, and the master says at its end how many were not. The rows have them all. Of an error only the first line
is told, never the input.
"""

import math
import mmap
import time

from pgtask import log
from pgtask.config import TableConfig

WINDOW = 60.0
"""Seconds for which lines are counted, from the first one."""

SLOW = 100
"""Slow tasks that are told of a table in that time; the number of failed ones is the user's choice."""

FIRST_LINE = 300
"""Characters of an error that are told."""


def shared(count: int) -> list["memoryview[float]"]:
    """Memory of so many quotas, in one piece: each piece costs every fork."""
    memory = memoryview(mmap.mmap(-1, 3 * 8 * count)).cast("d")
    return [memory[3 * number : 3 * number + 3] for number in range(count)]


class Quota:
    """So many in a time, of this process and all that it has forked; those beyond are counted.

    Nothing is locked: of two at the very same moment one may go uncounted.
    """

    def __init__(self, most: int, shared: "memoryview[float]"):
        self.most = most
        self._shared = shared  # since when, how many, how many beyond

    def admits(self) -> bool:
        """Count one; whether it is within the bounds."""
        since, count, _ = self._shared
        if time.monotonic() - since >= WINDOW:
            self._shared[0], self._shared[1], count = time.monotonic(), 0.0, 0.0
        self._shared[1 if count < self.most else 2] += 1
        return count < self.most

    def next_look(self) -> float:
        """When it is time to say how many were beyond (time.monotonic()); never if none was."""
        since, _, beyond = self._shared
        return since + WINDOW if beyond else math.inf

    def beyond(self) -> int:
        """How many, since this was asked last."""
        count, self._shared[2] = self._shared[2], 0.0
        return int(count)


class Telling:
    """Of one table. Made before any of its workers is forked; `configure` holds for those that are forked then."""

    def __init__(self, config: TableConfig):
        failed, slow, takes = shared(3)
        self._quotas = {"task_failed": Quota(0, failed), "task_slow": Quota(SLOW, slow)}
        self._takes = Quota(1, takes)
        self.configure(config)

    def configure(self, config: TableConfig) -> None:
        self._label = config.label
        self._quotas["task_failed"].most = config.log_failed
        self.slow_run = config.slow_run.total_seconds() or math.inf
        self.slow_take = config.slow_take.total_seconds() or math.inf
        """Seconds from which on a run, or a take, is to be told."""

    def failed(
        self,
        id: int,
        error: str,
        *,
        retried: bool = False,
        group: str | None = None,
        code: str | None = None,
        attempt: int | None = None,
        ms: float | None = None,
    ) -> None:
        """A run failed, which is the task's end unless it is to be `retried`. What the level hides uses up nothing."""
        level = "info" if retried else "warning"
        quota = self._quotas["task_failed"]
        if not quota.most or not log.enabled(level) or not quota.admits():
            return
        line, _, _ = error.partition("\n")
        if len(line) > FIRST_LINE:
            line = line[:FIRST_LINE] + "..."
        log.event(
            "info" if retried else "warning",
            "task_failed",
            id=id,
            table=self._label,
            group=group,
            code=code,
            attempt=attempt,
            ms=ms,
            retried=retried,
            error=line,
        )

    def slow(self, id: int, *, group: str, attempt: int, seconds: float, ok: bool) -> None:
        """A run took longer than `slow_run`, with its end and commit."""
        if log.enabled("warning") and self._quotas["task_slow"].admits():
            ms = round(seconds * 1000, 3)
            log.warning("task_slow", id=id, table=self._label, group=group, attempt=attempt, ms=ms, ok=ok)

    def take(self, seconds: float, *, tasks: int) -> None:
        """A take lasted longer than `slow_take`; once a minute is enough."""
        if self._takes.admits():
            log.warning("take_slow", table=self._label, ms=round(seconds * 1000, 3), tasks=tasks)

    def next_look(self) -> float:
        """When there is something to tell of what was left out (time.monotonic())."""
        return min(quota.next_look() for quota in self._quotas.values())

    def tell(self, *, last: bool = False) -> None:
        """How much was left out, when its time is over, or for the `last` time. For the master."""
        for name, quota in self._quotas.items():
            if (quota.next_look() < math.inf) if last else (time.monotonic() >= quota.next_look()):
                log.warning("lines_left_out", table=self._label, of=name, count=quota.beyond())
