"""The group's next task: what asks for it, behind the end of a run or before that is written, and what has come.

While looks from the beginning are dear (pace.py), the next ones start at the row that has just run.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from psycopg.pq.abc import PGresult

from pgtask.pace import Pace
from pgtask.store import Task
from pgtask.worker.ours import Ours, Steps

SLOW = 0.02
"""Seconds after which a finish, with which no next task came, is taken for a look that has read many dead entries."""

CHEAP = 0.001
"""Seconds that a full look for the group's next task may cost without being paced."""

NEXT = ("next", "next_below", "next_after", "next_batch", "next_batch_after")
"""Statements that take the group's next task."""

LOOK = ("look", "look_below", "look_after")
"""Statements that find it before the run has been finished; `switch` takes what they have found."""


ANY_AGE = b"inf"
"""Of a worker, in seconds: only what any may take is taken."""


class Want(NamedTuple):
    """Whether the group's next task is wanted, and what decides if this worker may take it."""

    next: bool
    runs: int
    age: float
    place: tuple[bytes, bytes, bytes]  # the term, the group's key and the slot
    below: bool  # rows of a greater max are planned for later
    batch: int = 1  # how many that share a transaction
    mark: bytes | None = None  # of the settings, when it is time to see whether they have changed


class Following:
    """Of one session of a worker."""

    def __init__(self, ours: Ours):
        self._ours = ours
        self._pace = Pace(cheap=CHEAP)

    def add_next(self, steps: Steps, task: Task, want: Want) -> None:
        """Add what takes it, after this task, whose end stands before."""
        if not self._add_mark(steps, task, want):
            return
        place = (task.max, task.plan, task.id)
        who = self._who(task, want, want.age)
        if want.batch > 1 and self._pace.ready:
            self._add(steps, "next_batch", *who, want.batch)
        elif want.batch > 1:
            self._add(steps, "next_batch_after", *who, want.batch, *place)
        else:
            self._add_one(steps, "next", task, who, (), below=want.below)

    def add_look(self, steps: Steps, task: Task, want: Want) -> None:
        """Add what finds it while this task, which has just begun, runs: how old the worker will be is not known."""
        if self._add_mark(steps, task, want):
            self._add_one(steps, "look", task, self._who(task, want, ANY_AGE), (task.id,), below=want.below)

    def taken(self, step: str, result: PGresult) -> list[Task]:
        """The tasks that the statement took, in their order."""
        if not result.ntuples:
            return []
        if not step.endswith("_after"):
            self._pace.looked(float(result.get_value(0, result.nfields - 1) or 0) / result.ntuples)
        rows = list(range(result.ntuples))
        if len(rows) > 1:  # in the order of their numbers
            rows.sort(key=lambda row: int(result.get_value(row, result.nfields - 2) or 0))
        return [Task.read(result, row) for row in rows]

    def found(self, following: Sequence[Task], sent: float) -> None:
        """By what was sent at that moment (time.monotonic()). A look that finds nothing cannot say what it has cost."""
        if not following and time.monotonic() - sent > SLOW:
            self._pace.looked(time.monotonic() - sent)

    def _add_mark(self, steps: Steps, task: Task, want: Want) -> bool:
        """Add what must be true before it is looked for; whether it is looked for at all."""
        wanted = want.next and task.max >= 0
        if wanted and want.mark is not None:
            self._ours.task(steps, "fresh", want.mark)
        return wanted

    def _who(self, task: Task, want: Want, age: float | bytes) -> tuple[object, ...]:
        since, remote = self._ours.fresh.since, task.remote or b""
        return since, task.group, remote, want.runs, age, *want.place

    def _add_one(
        self, steps: Steps, name: str, task: Task, who: Sequence[object], before: Sequence[object], *, below: bool
    ) -> None:
        if not self._pace.ready:
            self._add(steps, f"{name}_after", *who, task.id, task.max, task.plan)
        elif below:
            self._add(steps, f"{name}_below", *who, *before)
        else:
            self._add(steps, name, *who, *before)

    def _add(self, steps: Steps, name: str, *params: object) -> None:
        steps.look = name
        self._ours.task(steps, name, *params)
