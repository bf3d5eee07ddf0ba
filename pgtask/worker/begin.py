"""How a row becomes a worker's, in a durable transaction of its own: so a run that kills its backend is counted.

Either the master has taken it for the worker (`begin`), or it is the one row that is due, which the session looks for
and begins in one statement (`find`); that may have been sent before the worker was forked. What fails here the master
takes care of: the row is still his, or nobody's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from psycopg import OperationalError
from psycopg.pq.abc import PGresult

from pgtask import log
from pgtask.process import Found, Look, Run
from pgtask.store import Store, Task
from pgtask.worker.ours import PATIENCE, Fresh, Ours, Steps, explain
from pgtask.worker.session import Session, SessionLost, StatementFailed, Step

PAUSES = (0.1, 0.5, 2.0)
"""Seconds between the tries to begin a row."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a Look asks for has been sent already: the steps, and the answers that are to come."""

    steps: Steps
    waiting: Sequence[bytes | None]

    @classmethod
    def by(cls, look: Look, ready: "Ready", store: Store, encoding: str) -> Self:
        """Send it, without waiting, on a session that nothing has been done with. Raises SessionLost."""
        ours = Ours(ready.session, store, encoding)
        ours.fresh = ready.fresh
        steps = Steps()
        steps.own("open")
        ours.add(steps, clean=False, sure=False)
        _add_find(ours, steps, look)
        if ready.session.spoken:
            raise SessionLost("ended")
        try:
            waiting = ready.session.send_pipeline(steps.steps)
            ready.session.pgconn.flush()
        except OperationalError as error:
            raise SessionLost(ready.session.last_words()) from error
        return cls(steps=steps, waiting=waiting)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """A session and what a worker must know of it."""

    session: Session
    fresh: Fresh
    asked: Asked | None = None

    @property
    def since(self) -> str:
        """When its backend started."""
        return self.fresh.since.decode()


class Beginner:
    """A worker's. `reopen` gives it another session, which it is told of by `use`."""

    ours: Ours

    def __init__(self, reopen: Callable[[], None]):
        self.saved = False
        """What a task has SET may still be."""
        self._reopen = reopen
        self._vain = 0  # assignments in a row that could not be begun
        self._refusal = ""  # why the last begin failed, "" when it did not

    def use(self, ours: Ours) -> None:
        self.ours, self.saved = ours, False

    def begin(self, run: Run) -> Task | None:
        """Make the assigned row ours.

        One that is not to be had goes back to the master, who soon takes it again unless it was stopped or the term
        is over: a user's trigger may refuse it for ever. So the pause after such ones in a row grows.
        """
        task = self._try_to_begin(run) or self._begin_anew(run)
        self._vain = 0 if task is not None else self._vain + 1
        if self._vain > 1:
            time.sleep(min(2.0, 0.02 * 2 ** min(self._vain, 10)))
        return task

    def find(self, look: Look, asked: Asked | None) -> tuple[Task | None, int, Found]:
        """Begin the row that is due, if there is one that may start: it, its lane, and what the master is to hear."""
        answer = self._answer(look, asked) if asked or time.monotonic() < look.by else None
        if answer is None:
            return None, 0, Found(row=None)
        task = Task.read(answer) if answer.get_value(0, 0) is not None else None
        values = ((answer.get_value(0, column) or b"").decode() for column in range(24, 30))
        lane, seen, now, cost, place, next = values
        row: list[Any] = [int(seen), 0, now, None, float(cost), place, -(1 << 63), float(next) if next else None]
        if task is None:
            return None, 0, Found(row=[*row, *[None] * 7])
        row += [task.id, task.attempt - 1, False, int(lane), task.max, 0, 0.0]
        return task, int(lane), Found(row=row)

    def practise(self) -> None:
        """Have the session plan what `find` sends while nobody waits for it."""
        text = self.ours.encode(self.ours.store.text("find"))
        prepare = self._opened()
        prepare.add("find", Step(text, only_prepare=True))
        prepare.own("commit")
        if self._tried(prepare):
            plan = self._opened()
            plan.add("plan", explain(self.ours.session, text))
            plan.own("commit")
            self._tried(plan)

    def _answer(self, look: Look, asked: Asked | None) -> PGresult | None:
        if asked is None:
            steps = self._opened()
            _add_find(self.ours, steps, look)
        else:
            steps = asked.steps
        results = self._tried(steps, asked)
        return results[steps.names.index("find")] if results else None

    def _tried(self, steps: Steps, asked: Asked | None = None) -> Sequence[PGresult]:
        """The results, or none: what fails here the master does himself."""
        session = self.ours.session
        try:
            if asked is not None:
                return session.answers(asked.waiting, timeout=PATIENCE)
            return session.pipeline(steps.steps, timeout=PATIENCE)
        except StatementFailed as failure:
            if failure.code == "26000":
                session.forget_statements()
            log.debug("look_failed", code=failure.code, error=str(failure))
            self.saved = True
            self.ours.rewind(save=True)
            return ()

    def _begin_anew(self, run: Run) -> Task | None:
        """A session older than an ALTER ROLE or ALTER DATABASE ... SET begins nothing: another one in its place."""
        if (self.ours.transaction("mark").get_value(0, 0) or b"") == self.ours.fresh.mark:
            return None
        log.debug("session_outdated", backend=self.ours.session.pid)
        self.ours.session.close()
        self._reopen()
        return self._try_to_begin(run)

    def _try_to_begin(self, run: Run) -> Task | None:
        for pause in (*PAUSES, None):
            steps = self._opened()
            fresh = self.ours.fresh
            self.ours.task(steps, "begin", fresh.since, run.id, run.taker, run.attempt, run.term, fresh.mark)
            steps.own("commit")
            try:
                results = self.ours.session.pipeline(steps.steps, timeout=PATIENCE)
            except StatementFailed as failure:
                if failure.code == "26000":
                    self.ours.session.forget_statements()
                self.saved = True
                self._begin_failed(run, failure)
                if pause is not None:
                    time.sleep(pause)
                continue
            begun = results[steps.names.index("begin")]
            task = Task.read(begun) if begun.ntuples else None
            if task is not None and self._refusal:
                log.info("begin_recovered", id=run.id)
                self._refusal = ""
            return task
        return None

    def _opened(self) -> Steps:
        """What a transaction of our own begins with."""
        steps = Steps()
        if not self.ours.session.idle:
            steps.own("rollback")
        steps.own("open")
        self.ours.add(steps, clean=False, sure=self.saved)
        return steps

    def _begin_failed(self, run: Run, failure: StatementFailed) -> None:
        """Say it once for each reason, until a begin succeeds."""
        if failure.code != self._refusal:
            changed = f"{failure}: a trigger may have changed the state or pid that was written"
            error = changed if failure.code == "22012" else str(failure)
            log.warning("begin_failed", id=run.id, code=failure.code, error=error)
            self._refusal = failure.code


def _add_find(ours: Ours, steps: Steps, look: Look) -> None:
    """Add what a Look asks for, and its commit."""
    lanes = [lane for lane, numbers in look.used for _ in numbers]
    fences = (look.term, ours.fresh.mark, look.until)
    ours.task(steps, "find", look.now, _numbers(lanes), ours.fresh.since, *look.place, *fences)
    steps.own("commit")


def _numbers(values: Sequence[int]) -> str:
    """The literal of an array."""
    return f"{{{','.join(map(str, values))}}}"
