"""The end of a run: what became of it, the group's next task and the next row of a repeated one, in one transaction.

When the input left its transaction open, that is the transaction: the effect of a task and its being done commit
together, in one round trip. Everything that a task may have done to its session is met here: our statements run
behind a savepoint, with the role and settings put back; what fails there costs the task neither its work nor its
result. The row is written only while it belongs to this run, or the work is undone.

`Finisher.finish` is a loop over attempts: each sends one pipeline, and each failure names the step that failed and
so what to try next. It ends with the row finished, or with the knowledge that it is no longer ours.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from psycopg.pq.abc import PGresult

from pgtask import log
from pgtask.errors import PASSING
from pgtask.output import Error, statement_line
from pgtask.pace import Pace
from pgtask.run import Outcome, python_codec, read_error, transcode
from pgtask.session import SYNC, Session, SessionLost, StatementFailed, Step
from pgtask.store import Store, Task, statements

LONGEST = (1 << 30) - (1 << 20)
"""A PostgreSQL value may not have more bytes than about this."""

PATIENCE = 60.0
"""Seconds that the server may take to answer a finish (it waits for locks at most five)."""

LOUD = 5
"""Failures in a row after which a person must act: the row keeps its slot until the server takes its end."""

NEEDED = {
    "role": "none",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "on",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "enable_sort": "off",
}
"""What our statements need, as in the statement `ours`: only what a new session has otherwise is set each time."""

ASKED = (*NEEDED, "client_encoding")
"""Settings whose values in a new session matter."""

TIDY = ("close", "unlisten", "sequences", "leftovers", "temporary")
"""Steps after the commit: what tells whether the first three are needed would cost more than they do."""

SLOW = 0.02
"""Seconds after which a finish, with which no next task came, is taken for a look that has read many dead entries."""

CHEAP = 0.001
"""Seconds that a full look for the group's next task may cost without being paced."""

NEXT = ("next", "next_below", "next_after", "next_batch", "next_batch_after")
"""Statements that take the group's next task."""

CLEANUP = ("reset_role", "close", "unlisten", "unlock", "temporary", "sequences", "prepared")
"""What makes a session of ours as clean as a new one."""

PLAIN = ("constraints", "savepoint", "rollback_to")
"""Steps on whose success the task's work hangs: they do not rely on prepared statements."""
LOST_CODES = ("40001", "40P01")
GONE = ("42P01", "3F000")
"""The table, or its schema, is not there."""

BROKEN = ("42", "3F")
"""Classes of errors that say that the table, or our right to it, is not what it was."""


class Verdict(NamedTuple):
    """What is to be written into the row: `state` DONE or FAIL, and texts in the server's encoding."""

    state: str
    output: bytes | None = None
    error: bytes | None = None
    code: bytes | None = None
    notice: bytes | None = None


class Want(NamedTuple):
    """Whether the group's next task is wanted, and what decides if this worker may take it."""

    next: bool
    runs: int
    age: float
    term: int
    lane: int
    slot: int
    below: bool  # rows of a greater max are planned for later
    batch: int = 1  # how many that share a transaction
    mark: bytes | None = None  # of the settings, when it is time to see whether they have changed


class Steps:
    """A pipeline with a name for each step, so that a failure can be told by what failed."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[Step] = []

    def add(self, name: str, step: Step) -> None:
        self.names.append(name)
        self.steps.append(step)

    def own(self, *names: str) -> None:
        """Statements without parameters of sql/session.sql."""
        self.names += names
        self.steps += map(_own, names)

    def sync(self) -> None:
        self.steps.append(SYNC)


@cache
def own_text(name: str) -> bytes:
    """A statement of sql/session.sql, which knows no names of a user's."""
    return statements("session")[name].encode()


@cache
def _own(name: str) -> Step:
    return Step(own_text(name), plain=name in PLAIN)


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What a session was like while it was new, and the `mark` of the settings that it began with."""

    since: bytes  # when its backend started, a timestamptz as text
    limit_ms: int  # its statement_timeout; 0 is none
    user: bytes  # who logged in
    role: bytes  # its setting of that name
    again: Step  # the statement `ours_again`
    mark: bytes

    @classmethod
    def read(cls, steps: Steps, results: Sequence[PGresult], encoding: str) -> "Fresh":
        """From the answers to `Finisher.questions`."""
        facts, defaults, mark = (results[steps.names.index(name)] for name in ("facts", "defaults", "mark"))
        limit, since, user, role = (facts.get_value(0, column) or b"" for column in range(4))
        has = {name: (defaults.get_value(row, 0) or b"").decode() for row, name in enumerate(ASKED)}
        needed = NEEDED | {"client_encoding": encoding}
        changed = {name: value for name, value in needed.items() if has[name] != value}
        text = "".join(f", pg_catalog.set_config('{name}', '{value}', true)" for name, value in changed.items())
        again = Step(own_text("ours_again").replace(b"{settings}", text.encode()), (user, role))
        mark_text = mark.get_value(0, 0) or b""
        return cls(since=since, limit_ms=int(limit), user=user, role=role, again=again, mark=mark_text)


class Finisher:
    """Ends the runs of one session of a worker. `encoding` is the server's, PostgreSQL's name for it."""

    fresh: Fresh
    """Set by whoever has asked `questions`."""

    def __init__(self, session: Session, store: Store, encoding: str, leaving: Callable[[], bool]):
        self.session = session
        self._leaving = leaving  # does the worker want to end?
        self._store = store
        self._encoding = encoding
        # A server that knows no encoding keeps names as the master wrote them.
        anything = encoding == "SQL_ASCII"
        self._codec, self._errors = ("utf-8", "surrogateescape") if anything else (python_codec(encoding), "replace")
        self.owner = session.pid
        """The backend that began the run; another than the session's when that one had to be terminated."""
        self._pace = Pace(cheap=CHEAP)
        self._texts: dict[str, bytes] = {}  # the statements on the task table, by name
        self._temporary = False  # has the session a schema for temporary objects?

    def questions(self) -> Steps:
        """What a new session is asked before it is of use."""
        steps = Steps()
        steps.own("open", "facts")
        steps.add("defaults", Step(own_text("defaults"), (b"{%s}" % ",".join(ASKED).encode(),)))
        self.ours(steps, clean=False)
        self.task(steps, "mark")
        steps.own("commit")
        return steps

    def encode(self, text: str) -> bytes:
        return text.encode(self._codec, self._errors)

    def ours(self, steps: Steps, *, clean: bool, sure: bool = True) -> None:
        """Add what makes the rest of the transaction ours; `clean` also drops what the task has SET.

        Unless we make `sure`, it fails where the task has changed the session's user or role.
        """
        if clean and not sure:
            steps.own("reset")
            steps.add("ours", self.fresh.again)
            return
        steps.own(*(("authorization", "reset") if clean else ("local_authorization",)))
        steps.add("ours", Step(own_text("ours"), (self._encoding.encode(),)))

    def task(self, steps: Steps, name: str, *params: object) -> None:
        """Add a statement on the task table."""
        text = self._texts.get(name)
        if text is None:
            text = self._texts[name] = self.encode(self._store.text(name))
        steps.add(name, Step(text, [_param(value) for value in params]))

    def verdict(self, task: Task, outcome: Outcome) -> Verdict:
        """DONE or FAIL, with every text in the server's encoding."""

        def ours(text: bytes | None) -> bytes | None:
            return None if text is None else transcode(text, outcome.encoding, self._encoding)

        error = b"\n".join(ours(e.text()) or b"" for e in outcome.errors) or None
        if error is not None:
            error += b"\n" + statement_line(task.input)
        return Verdict(
            state="DONE" if outcome.ok else "FAIL",
            output=ours(outcome.output),
            error=error,
            code=outcome.errors[0].code if outcome.errors else None,
            notice=ours(outcome.notice),
        )

    def finish(self, task: Task, outcome: Outcome, want: Want) -> list[Task]:
        """Write the outcome, take the group's next task, or several that share a transaction, commit. Returns those.

        Raises SessionLost when the session ends; what was not committed then never was.
        """
        if outcome.output is not None and len(outcome.output) > LONGEST:
            outcome = _too_long(outcome)
        inside = outcome.ok and self.session.in_transaction
        attempt = _Attempt(task, self.verdict(task, outcome), want, inside=inside, copied=task.copied)
        failures = 0
        while True:
            steps = self._steps(attempt)
            try:
                # What the task has deferred to its end may take as long as its timeout allows.
                following = self.committed(steps, timeout=None if attempt.inside and not failures else PATIENCE)
            except StatementFailed as failure:
                failures += 1
                answer = self._failed(attempt, steps.names[failure.step], failure, failures)
                if answer is None:
                    return []
                attempt = answer
                continue
            if failures > 1:
                log.info("finish_recovered", id=task.id, tries=failures + 1)
            return following

    def committed(self, steps: Steps, *, timeout: float | None) -> list[Task]:
        """Send what finishes runs, commits and cleans up. Returns the tasks that were taken.

        Raises StatementFailed when it is not committed, SessionLost when nobody knows.
        """
        sent = time.monotonic()
        try:
            results = self.session.pipeline(steps.steps, timeout=timeout)
        except StatementFailed as failure:
            if steps.names[failure.step] not in TIDY:
                raise
            # Somebody's cancel has hit the clean-up, say: once more.
            self._say_unclean(steps, failure)
            self.clean()
            return self._next(steps, failure.before)
        following = self._settled(steps, results)
        if not following and time.monotonic() - sent > SLOW:
            self._pace.looked(time.monotonic() - sent)
        return following

    def columns(self) -> bytes | None:
        """What the next row of a repeated task copies, as the table is now. Raises SessionLost if it cannot be read."""
        for final in (False, True):
            steps = Steps()
            if not self.session.idle:
                steps.own("rollback")
            steps.own("open")
            self.ours(steps, clean=False)
            steps.add("copied", Step(self.encode(self._store.copied())))
            steps.own("commit")
            try:
                results = self.session.pipeline(steps.steps, timeout=PATIENCE)
            except StatementFailed as failure:
                if final:
                    raise SessionLost(f"copied: {failure}") from failure
                self.session.forget_statements()
                continue
            return results[steps.names.index("copied")].get_value(0, 0)
        return None

    def clean(self) -> None:
        """Drop whatever the session has that a new one has not. Raises SessionLost when that fails twice."""
        steps = Steps()
        steps.own(*CLEANUP)
        try:
            results = self.session.pipeline(steps.steps, timeout=PATIENCE)
        except StatementFailed as failure:
            self._say_unclean(steps, failure)
            try:
                results = self.session.pipeline(steps.steps, timeout=PATIENCE)
            except StatementFailed as final:
                raise SessionLost(f"cleaning the session: {final}") from final
        left = results[-1]
        if left.ntuples:
            names = [left.get_value(row, 0) or b"" for row in range(left.ntuples)]
            text = b";".join(b"DEALLOCATE " + name for name in names)
            self.session.query(text, lambda result: None, lambda data: None, lambda: None)

    def _say_unclean(self, steps: Steps, failure: StatementFailed) -> None:
        log.warning("cleanup_failed", step=steps.names[failure.step], code=failure.code, error=str(failure))

    def give_back(self, *tasks: Task) -> None:
        """Return a run that was interrupted, or not begun, to PLAN; its work is undone and it costs nothing."""
        columns = zip(*((b"%d" % task.id, b"%d" % task.attempt) for task in tasks), strict=True)
        self._aside("back", self.owner, *map(array, columns))

    def note_stop(self, task: Task, outcome: Outcome | None) -> None:
        """The row was stopped, deleted or taken away while it ran: undo its work, and say when it ended."""
        error = self.verdict(task, outcome).error if outcome is not None and not outcome.ok else None
        self._aside("stopped", task.id, task.attempt, self.owner, error)
        if self._owned(task):  # the stop was for an earlier run of the row, which was set back to PLAN since
            self.give_back(task)

    def rewind(self, *, save: bool) -> None:
        """Undo what an input did in our transaction, so that it can run without it. What the run needs stays set."""
        for final in (False, True):
            steps = Steps()
            steps.own("rollback")
            if not save:
                steps.sync()
                self.tidy_up(steps)
            try:
                self._settled(steps, self.session.pipeline(steps.steps, timeout=PATIENCE))
            except StatementFailed as failure:
                if final:
                    raise SessionLost(f"undoing the first try: {failure}") from failure
                self.session.forget_statements()
                continue
            if final:
                self.session.forget_statements()  # the second try will drop them again
            return

    def _aside(self, name: str, *params: object) -> None:
        for final in (False, True):
            steps = Steps()
            if not self.session.idle:
                steps.own("rollback")
            steps.own("open")
            self.ours(steps, clean=True)
            self.task(steps, name, *params)
            steps.own("commit")
            steps.sync()
            self.tidy_up(steps)
            try:
                self._settled(steps, self.session.pipeline(steps.steps, timeout=PATIENCE))
                return
            except StatementFailed as failure:
                if final:
                    raise SessionLost(f"{name}: {failure}") from failure
                self.session.forget_statements()

    def _steps(self, attempt: "_Attempt") -> Steps:
        task, verdict = attempt.task, attempt.verdict
        steps = Steps()
        if attempt.inside and attempt.again:
            steps.own("rollback_to")
        elif attempt.inside:
            steps.own("constraints", "savepoint")
        else:
            if not self.session.idle:
                steps.own("rollback")
            steps.own("open", "constraints")
        self.ours(steps, clean=not task.save, sure=attempt.sure)
        if task.delete and verdict.output is None and verdict.error is None and not (attempt.refused or attempt.keep):
            self._add_repeat(steps, attempt)
            self.task(steps, "remove", task.id, task.attempt, self.owner)
        else:
            texts = (verdict.output, verdict.error, verdict.code, verdict.notice)
            self.task(steps, "finish", task.id, task.attempt, verdict.state, *texts, self.owner)
            self._add_repeat(steps, attempt)
        if attempt.refused is not None:
            self.task(steps, "refused", task.id, task.attempt, attempt.refused)
        self.add_next(steps, task, attempt.want)
        steps.own("commit")
        steps.sync()
        if not task.save:
            self.tidy_up(steps)
        return steps

    def add_next(self, steps: Steps, task: Task, want: Want) -> None:
        """Add what takes the next of the group, after this task."""
        if not want.next or task.max < 0:
            return
        if want.mark is not None:
            self.task(steps, "fresh", want.mark)
        who = (self.fresh.since, task.group, task.remote or b"", want.runs, want.age, want.term, want.lane, want.slot)
        place = (task.max, task.plan, task.id)
        if want.batch > 1 and self._pace.ready:
            self.task(steps, "next_batch", *who, want.batch)
        elif want.batch > 1:
            self.task(steps, "next_batch_after", *who, want.batch, *place)
        elif not self._pace.ready:
            self.task(steps, "next_after", *who, *place)
        elif want.below:
            self.task(steps, "next_below", *who)
        else:
            self.task(steps, "next", *who)

    def _add_repeat(self, steps: Steps, attempt: "_Attempt") -> None:
        if attempt.copied is not None and attempt.refused is None:
            steps.own("savepoint_repeat")
            copied = attempt.copied.decode(self._codec, self._errors)
            steps.add("repeat", Step(self.encode(self._store.repeat(copied)), (_param(attempt.task.id),)))

    def tidy_up(self, steps: Steps) -> None:
        """Add what makes the session like a new one, and asks what else it takes."""
        steps.own("close", "unlisten", "sequences")
        if self._temporary:
            steps.own("temporary")
        steps.add("leftovers", Step(own_text("leftovers"), (self.fresh.role,)))

    def _settled(self, steps: Steps, results: Sequence[PGresult]) -> list[Task]:
        """After the commit: drop what the task has left behind, and read the next tasks."""
        if steps.names[-1] == "leftovers":
            role, temporary, prepared = (results[-1].get_value(0, column) == b"t" for column in (1, 2, 3))
            if role or prepared or temporary > self._temporary:
                self.clean()
            self._temporary = temporary
        return self._next(steps, results)

    def _next(self, steps: Steps, results: Sequence[PGresult]) -> list[Task]:
        for name, result in zip(steps.names, results, strict=False):
            if name in NEXT and result.ntuples:
                if not name.endswith("_after"):
                    self._pace.looked(float(result.get_value(0, result.nfields - 1) or 0) / result.ntuples)
                rows = list(range(result.ntuples))
                if len(rows) > 1:  # in the order of their numbers
                    rows.sort(key=lambda row: int(result.get_value(row, result.nfields - 2) or 0))
                return [Task.read(result, row) for row in rows]
        return []

    def resume(self, task: Task) -> Task | None:
        """Begin the run of a row that was taken together with others by itself. None when it is ours no more."""
        steps = Steps()
        steps.own("open")
        self.ours(steps, clean=False)
        self.task(steps, "resume", self.fresh.since, task.id, task.attempt)
        steps.own("commit")
        result = self.session.pipeline(steps.steps, timeout=PATIENCE)[-2]
        return Task.read(result) if result.ntuples else None

    def add_turn(self, steps: Steps, task: Task) -> None:
        """Add the settings of a run that is not the first since its row was taken."""
        group = (b"%d" % task.id, task.group, self.encode(self._store.schema), self.encode(self._store.table))
        steps.add("turn", Step(own_text("turn"), (*group, task.name, self.fresh.user, self.fresh.role)))

    def _failed(self, attempt: "_Attempt", name: str, failure: StatementFailed, failures: int) -> "_Attempt | None":
        """What to try after `name` failed; None when the row is not ours any more."""
        if failure.code in ("26000", "42P05") and name not in PLAIN:
            self.session.forget_statements()
            return replace(attempt, again=True)
        if name == "ours" and failure.code == "22012":
            return replace(attempt, sure=True, again=True)
        unfound = name in ("finish", "remove") and failure.code == "22012"
        if unfound and name == "remove":
            return replace(attempt, keep=True, again=True)  # a trigger of the user's keeps the row, say
        if unfound and (attempt.inside or not self._owned(attempt.task)):
            return self._not_ours(attempt)
        if name in ("constraints", "savepoint", "commit") and attempt.inside:
            return self._work_failed(attempt, failure)
        if name == "repeat" and failure.code[:2] not in PASSING:
            return self._repeat_failed(attempt, failure)
        if name in ("fresh", *NEXT):
            # A trigger of the user's refuses that row, say: this run is finished without it.
            return replace(attempt, want=attempt.want._replace(next=False), again=True)
        if failure.code in ("22021", "22P05", "54000"):
            return self._unstorable(attempt, failure)
        if attempt.inside and failure.code in LOST_CODES:
            self._lost(attempt)
            return None
        if attempt.inside and failure.code[:2] in BROKEN:
            return self._broken(attempt, failure)
        if attempt.inside and failure.code == "25006":
            return self._apart(attempt)
        if attempt.inside and failures > 2 and failure.code[:2] not in PASSING:
            return self._broken(attempt, failure)
        if failures >= LOUD and not attempt.inside and failure.code in GONE:
            raise SessionLost(f"{name}: {failure}")  # there is no row any more, and the master must hear of that
        hopeless = attempt.inside or failure.code[:2] not in PASSING
        if failures >= LOUD and hopeless and self._leaving():
            raise SessionLost(f"{name}: {failure}")  # a run that nobody could record is lost, not waited for for ever
        if failures in (1, LOUD):
            table = f"{self._store.schema}.{self._store.table}"
            report = log.warning if failures < LOUD else log.error
            report("finish_failed", table=table, id=attempt.task.id, step=name, code=failure.code, error=str(failure))
        time.sleep(min(5.0, 0.05 * 2 ** min(failures, 8)))
        return replace(attempt, again=True)

    def _work_failed(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt | None":
        """The task's own transaction could not be committed: that is the task's error."""
        if failure.code in LOST_CODES:
            time.sleep(random.uniform(0.05, 0.25))  # whom it met will have ended
            self.give_back(attempt.task)
            return None
        outcome = Outcome(
            output=attempt.verdict.output,
            errors=(read_error(failure.result),),
            notice=attempt.verdict.notice,
            encoding=self.session.parameter("client_encoding"),
        )
        return replace(attempt, verdict=self.verdict(attempt.task, outcome), inside=False, again=False)

    def _not_ours(self, attempt: "_Attempt") -> "_Attempt | None":
        """The finish found no row. A clean read decides; when it agrees, the work is undone."""
        if self._owned(attempt.task):
            error = Error(
                message=b"the run could not be recorded: its row is kept from the scheduler, so its work was undone",
                code=b"55000",
            )
            return self._undone(attempt, error)
        log.info("run_disowned", id=attempt.task.id)
        self.note_stop(attempt.task, None)
        return None

    def _lost(self, attempt: "_Attempt") -> None:
        """The task's snapshot is older than what became of its row: stopped, or changed and so to be run again."""
        if self._owned(attempt.task):
            self.give_back(attempt.task)
        else:
            self.note_stop(attempt.task, None)

    def _owned(self, task: Task) -> bool:
        """Undo the work, and read in a clean transaction whether the row is still this run's."""
        steps = Steps()
        steps.own("rollback", "open")
        self.ours(steps, clean=True)
        self.task(steps, "owned", task.id, task.attempt, self.owner)
        steps.own("rollback")
        results = dict(zip(steps.names, self.session.pipeline(steps.steps, timeout=PATIENCE), strict=True))
        return bool(results["owned"].ntuples)

    def _broken(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The task has dropped or changed its own table, or a trigger or constraint of the user's refuses the finish.

        Committed, nobody might ever be able to record it: so neither its work nor its being done.
        """
        log.warning("run_undone", id=attempt.task.id, code=failure.code, error=str(failure))
        message = b"the run could not be recorded in the task table, so its work was undone"
        detail = read_error(failure.result).message
        return self._undone(attempt, Error(message=message, code=failure.code.encode(), detail=detail))

    def _undone(self, attempt: "_Attempt", error: Error) -> "_Attempt":
        outcome = Outcome(output=None, errors=(error,), notice=attempt.verdict.notice, encoding=self._encoding)
        return replace(attempt, verdict=self.verdict(attempt.task, outcome), inside=False, again=False)

    def _unstorable(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The server will not take our texts as they are: without what is no text, or with a word on it instead."""
        said = attempt.verdict
        output, error_text, notice = map(self._storable, (said.output, said.error, said.notice))
        verdict = said._replace(output=output, error=error_text, notice=notice)
        if verdict != attempt.verdict:
            return replace(attempt, verdict=verdict, again=True)
        error = Error(message=b"the output cannot be stored", code=failure.code.encode())
        detail = read_error(failure.result).message
        text = b"\n".join([replace(error, detail=detail).text(), statement_line(attempt.task.input)])
        verdict = Verdict(state="FAIL", error=text, code=error.code)
        return replace(attempt, verdict=verdict, inside=False, again=False)

    def _storable(self, text: bytes | None) -> bytes | None:
        """A task that changes client_encoding in the middle may have said what is no text in ours."""
        return None if text is None else text.decode(self._codec, "replace").encode(self._codec, "replace")

    def _repeat_failed(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The next row was refused: once more with the columns of now, then say so and go on."""
        if attempt.copied == attempt.task.copied and failure.code in ("42703", "428C9", "42804"):
            steps = Steps()
            if attempt.inside:
                steps.own("rollback_to")
            else:
                steps.own("rollback", "open")
            self.ours(steps, clean=True)
            steps.add("copied", Step(self.encode(self._store.copied())))
            if not attempt.inside:
                steps.own("rollback")
            results = dict(zip(steps.names, self.session.pipeline(steps.steps, timeout=PATIENCE), strict=True))
            return replace(attempt, copied=results["copied"].get_value(0, 0), again=True)
        error = read_error(failure.result).text()
        log.warning("repeat_refused", id=attempt.task.id, code=failure.code, error=str(failure))
        return replace(attempt, refused=b"ERROR:  the next row was refused\n" + error, again=True)

    def _apart(self, attempt: "_Attempt") -> "_Attempt":
        """Our statements cannot run in the task's transaction: commit its work, and finish in our own."""
        steps = Steps()
        steps.own("rollback_to", "commit")
        self.session.pipeline(steps.steps, timeout=PATIENCE)
        return replace(attempt, inside=False, again=False)


@dataclass(frozen=True)
class _Attempt:
    """What one try at finishing sends."""

    task: Task
    verdict: Verdict
    want: Want
    inside: bool  # in the task's own transaction
    copied: bytes | None  # the columns of the next row, None if there is none to plan
    again: bool = False  # our savepoint exists already
    sure: bool = False  # set the session's user back, which the task has changed
    keep: bool = False  # the row cannot be removed, and so is finished
    refused: bytes | None = None


def _too_long(outcome: Outcome) -> Outcome:
    size = len(outcome.output or b"")
    error = Error(message=b"output of %d bytes is longer than a value may be" % size, code=b"54000")
    return outcome._replace(output=None, errors=(*outcome.errors, error))


def array(values: Sequence[bytes | None]) -> bytes:
    """The literal of an array of texts, which may be empty or null. Every server encoding is ASCII-safe."""
    return b"{%s}" % b",".join(
        b"NULL" if value is None else b'"%s"' % value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') for value in values
    )


def _param(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    return str(value).encode()
