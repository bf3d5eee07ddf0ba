"""Runs that share one transaction and its commit: the column `batch`.

Each input runs behind a savepoint of its own, so that one that fails is undone alone, and with the settings of a new
session; one statement writes the ends of them all. Inputs of one statement go down together, as many as should fit into
the time that is left, the others one by one. What cannot share is rolled back and run by itself: an input that no
transaction block admits, one that was cancelled because it took too long, one that met a conflict. When anything else
goes wrong, nothing of the transaction stays, and each of its tasks is run by itself, as if it had never been tried.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

from psycopg import pq

from pgtask import metrics
from pgtask.store import Task
from pgtask.worker.finish import Finisher, columns, silent
from pgtask.worker.following import Want
from pgtask.worker.ours import PATIENCE, Ours, Steps
from pgtask.worker.progress import swallow
from pgtask.worker.run import Limits, Outcome, Transcript, execute, watcher
from pgtask.worker.session import StatementFailed, Step
from pgtask.worker.ways import LONERS, Way, way

APART = ("25", "2D", "40", "57", "08")
"""Classes of errors after which a task is run by itself: no block admits it, a conflict, a cancel, a parameter."""

LEFT = ("42P03", "42P05")
"""A cursor or prepared statement of this name exists: maybe it was left by one before in the same transaction."""

GRACE = 2
"""A run is cancelled when this many times the batch's time has gone by."""

MOST = 1 << 28
"""Bytes of output that are written together."""


class Unshared(Exception):
    """Nothing of the transaction may stay."""


class End(NamedTuple):
    """How a run ended: `start` and `stop` are the server's; without `stop` it is when that is written."""

    task: Task
    outcome: Outcome
    start: bytes
    stop: bytes | None = None


class Shared:
    """One transaction. `seconds` is how long tasks begin in it, `each` how long one is expected to take.

    `tick` is called whenever something may have happened; it may end the session.
    """

    def __init__(
        self, ours: Ours, finisher: Finisher, *, seconds: float, each: float, tick: Callable[[], None]
    ) -> None:
        self.ends: list[End] = []
        self.apart = self.never = False
        """Must the first task that has not ended run by itself? Has its input never to be shared?"""
        self.limits = Limits(deadline=time.monotonic() + GRACE * seconds)
        self._session, self._ours, self._finisher = ours.session, ours, finisher
        self._until = time.monotonic() + seconds
        self._each = each
        self._watch = watcher(ours.session, self.limits, tick)
        self._tick = tick
        self._before: tuple[str, ...] = ("begin",)  # what the next pipeline has to say first

    def run(self, tasks: Sequence[Task]) -> None:
        """Run the first of the tasks, in their order. Raises Unshared, SessionLost."""
        left = deque(tasks)
        try:
            while left and not self.apart and not self.limits.cancelled and time.monotonic() < self._until:
                wave = self._wave(left)
                ended = self._send(wave) if way(wave[0].input) is Way.PIPELINE else self._query(wave[0])
                for _ in range(ended):
                    left.popleft()
            if self.limits.tries:
                self._session.settle()
        except StatementFailed as failure:
            raise Unshared(str(failure)) from failure
        finally:
            self._session.on_notice = None

    def finish(self, want: Want) -> list[Task]:
        """Write all ends, take the group's next tasks, commit. Returns those. Raises Unshared, SessionLost."""
        if sum(len(end.outcome.output or b"") for end in self.ends) > MOST:
            raise Unshared("too much output")
        finisher = self._finisher
        steps = self._steps()
        steps.own("reset", "constraints")
        steps.add("ours", self._ours.fresh.again)
        written = [(end, finisher.verdict(end.task, end.outcome)) for end in self.ends]
        removed = [(b"%d" % end.task.id, b"%d" % end.task.attempt) for end, said in written if silent(end.task, said)]
        kept = [(end, verdict) for end, verdict in written if not silent(end.task, verdict)]
        good = [(end, verdict) for end, verdict in kept if verdict.state == "DONE"]
        bad = [(end, verdict) for end, verdict in kept if verdict.state == "FAIL"]
        if good:
            finisher.write(steps, "finish_all", [columns(end.task, said, end.start, end.stop) for end, said in good])
        if bad:
            rows = [(*columns(end.task, said, end.start, end.stop), end.task.plan) for end, said in bad]
            finisher.write(steps, "settle", rows)
        if removed:
            finisher.write(steps, "remove_all", removed)
        finisher.following.add_next(steps, self.ends[-1].task, want)
        steps.own("commit")
        self._ours.tidy_up(steps)
        try:
            failed = [(end.task, verdict) for end, verdict in bad]
            following = finisher.committed(steps, failed, timeout=PATIENCE)
        except StatementFailed as failure:
            raise Unshared(f"{steps.names[failure.step]}: {failure}") from failure
        metrics.ended(*((verdict.state, verdict.code) for _, verdict in written))
        return following

    def _wave(self, left: deque[Task]) -> list[Task]:
        """Tasks that go down together: as many as should end in time."""
        room = max(1, int((self._until - time.monotonic()) / self._each))
        return list(takewhile(lambda task: way(task.input) is Way.PIPELINE, islice(left, room))) or [left[0]]

    def _steps(self) -> Steps:
        steps = Steps()
        steps.own(*self._before)
        self._before = ()
        return steps

    def _send(self, wave: Sequence[Task]) -> int:
        """Run them in one pipeline, until one fails. Returns how many have ended."""
        steps = self._steps()
        ahead = len(steps.names)
        for task in wave:
            self._ours.turn(steps, task)
            steps.add("input", Step(task.input, plain=True))
            steps.own("release")
        turn, width = steps.names.index("turn"), (len(steps.names) - ahead) // len(wave)
        transcripts = [Transcript(session=self._session, format=task.format, heed=swallow) for task in wave]

        def notice(result: pq.abc.PGresult) -> None:
            transcripts[max(0, self._session.answered - ahead) // width].notice(result)

        self._session.on_notice = notice
        failure: StatementFailed | None = None
        try:
            results = self._session.pipeline(steps.steps, tick=self._watch)
        except StatementFailed as failed:
            if steps.names[failed.step] != "input":
                raise
            failure, results = failed, list(failed.before)
        count = max(0, len(results) - ahead) // width
        for at in range(count):
            transcripts[at].add(results[turn + at * width + 1])
            self._end(wave[at], transcripts[at].outcome(), results[turn + at * width])
        if failure is None:
            return count
        transcripts[count].add(failure.result)
        return count + self._failed(wave[count], transcripts[count].outcome(), results[turn + count * width])

    def _query(self, task: Task) -> int:
        """Run one by the simple protocol. Returns 1 when it has ended, 0 when it must run by itself."""
        steps = self._steps()
        self._ours.turn(steps, task)
        turn = self._session.pipeline(steps.steps, tick=self._watch)[-1]
        how: dict[str, Any] = {"limits": self.limits, "tick": self._tick, "heed": swallow}
        outcome = execute(self._session, task.input, task.format, prefix=b"", **how)
        if not outcome.ok:
            return self._failed(task, outcome, turn)
        if not self._session.in_transaction:
            raise AssertionError(f"task {task.id} has ended the transaction of others")
        self._before = ("release",)
        self._end(task, outcome, turn)
        return 1

    def _failed(self, task: Task, outcome: Outcome, turn: pq.abc.PGresult) -> int:
        """Undo it, and no other. Returns 1 if that is its end."""
        self._before = ("rollback_to", "release")
        self.never = outcome.code in LONERS
        if self.never or self.limits.cancelled or outcome.code[:2] in APART or outcome.code in LEFT:
            self.apart = True
            return 0
        self._end(task, outcome, turn)
        return 1

    def _end(self, task: Task, outcome: Outcome, turn: pq.abc.PGresult) -> None:
        start = turn.get_value(0, turn.nfields - 1) or b""
        if self.ends and self.ends[-1].stop is None:
            self.ends[-1] = self.ends[-1]._replace(stop=start)
        self.ends.append(End(task, outcome, start))
