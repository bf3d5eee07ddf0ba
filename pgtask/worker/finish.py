"""The end of a run: what became of it, the group's next task and the next row of a repeated one, in one transaction.

When the input left its transaction open, that is the transaction: the effect of a task and its being done commit
together, in one round trip. Everything that a task may have done to its session is met here: our statements run
behind a savepoint, with the role and settings put back; what fails there costs the task neither its work nor its
result. The row is written only while it belongs to this run, or the work is undone.

`Finisher.finish` is a loop over attempts: each sends one pipeline, and each failure names the step that failed and
so what to try next. It ends with the row finished, or with the knowledge that it is no longer ours.

Where inputs go down in a stream (`open`), the server need not wait for us between them: behind each stands what its
end begins with, a look for the next one included, and behind its end the next input. An end that fails there is
tried again outside of it.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from psycopg.pq.abc import PGresult

from pgtask import log, metrics
from pgtask.coming import Calendar, Coming
from pgtask.cron import Wrong
from pgtask.errors import PASSING
from pgtask.output import Error, statement_line
from pgtask.store import Task
from pgtask.telling import Telling
from pgtask.worker.following import LOOK, NEXT, Following, Want
from pgtask.worker.ours import PATIENCE, PLAIN, TIDY, Ours, Steps, array, param
from pgtask.worker.run import Outcome, read_error, transcode
from pgtask.worker.session import SessionLost, StatementFailed, Step

LONGEST = (1 << 30) - (1 << 20)
"""A PostgreSQL value may not have more bytes than about this."""

LOUD = 5
"""Failures in a row after which a person must act: the row keeps its slot until the server takes its end."""

LOST_CODES = ("40001", "40P01")
REMOVING = ("remove", "remove_done")
LOCKED = "55P03"
"""Somebody has locked the row, and not let go of it in time."""

GONE = ("42P01", "3F000")
"""The table, or its schema, is not there."""

MISSED = b"ERROR:  run missed"
REFUSED = b"ERROR:  the next row was refused\n"
NO_RETRY = b"ERROR:  the row was refused as one that is tried again\n"

REFUSING = ("23", "P0")
"""Classes of errors of whoever will not have a row as it is: a constraint, a trigger, want of a partition."""

BROKEN = ("42", "3F")
"""Classes of errors that say that the table, or our right to it, is not what it was."""


class Verdict(NamedTuple):
    """What is to be written into the row: `state` DONE, FAIL or GONE, and texts in the server's encoding."""

    state: str
    output: bytes | None = None
    error: bytes | None = None
    code: bytes | None = None
    notice: bytes | None = None


class Finisher:
    """Ends the runs of one session of a worker, and tells the log of those that failed.

    `leaving` says whether the worker wants to end; `trying` is told the number of each try after the first; `follow`
    opens the run of the group's next task behind the commit of the one before, if it may stand there.
    """

    def __init__(
        self,
        ours: Ours,
        telling: Telling,
        leaving: Callable[[], bool],
        trying: Callable[[int], None],
        follow: Callable[[Task], bool],
    ):
        self.session = ours.session
        self._ours = ours
        self._telling = telling
        self._leaving = leaving
        self._trying = trying
        self._follow = follow
        self.owner = ours.session.pid
        """The backend that began the run; another than the session's when that one had to be terminated."""
        self.following = Following(ours)
        self._opened = Steps()  # what stands behind the input in the stream
        self._saved = (0, 0)  # the run (id, attempt) whose stream has ended behind our savepoint

    def open(self, task: Task, limit: Step | None, want: Want) -> None:
        """Send a run's input, alone or behind the end of the one before, and behind it what its end begins with.

        `limit`: what sets its timeout. The outcome is to be had by `run.receive`. Raises SessionLost.
        """
        steps = Steps()
        if limit is not None:
            steps.add("limit", limit._replace(plain=True))
        steps.own("begin")
        steps.add("input", Step(task.input, plain=True))
        steps.own("encoding")
        self._opened = Steps()
        self._opened.own("constraints", "savepoint")
        self._ours.add(self._opened, clean=True, sure=False)
        self.following.add_look(self._opened, task, want)
        self.session.stream(steps.steps, self._opened.steps)

    def break_off(self, task: Task, outcome: Outcome) -> Outcome:
        """End the stream behind an input that ended well; what stands behind that may have been cancelled in its place.

        Raises SessionLost.
        """
        failure = self.session.end_stream(timeout=None)
        saved = failure is None or self._opened.names[failure.step] not in ("constraints", "savepoint")
        if failure is None or (saved and failure.code != "57014"):
            self._saved = (task.id, task.attempt)
            return outcome
        return outcome._replace(errors=(read_error(failure.result),))

    def verdict(self, task: Task, outcome: Outcome) -> Verdict:
        """DONE or FAIL, with every text in the server's encoding."""
        if outcome.ok and outcome.encoding == self._ours.encoding:
            return Verdict("DONE", outcome.output, notice=outcome.notice)

        def ours(text: bytes | None) -> bytes | None:
            return None if text is None else transcode(text, outcome.encoding, self._ours.encoding)

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
        verdict = self.verdict(task, outcome)
        if self.session.streams and (not outcome.ok or silent(task, verdict)):
            outcome = self.break_off(task, outcome)
            verdict = self.verdict(task, outcome)
        saved = outcome.ok and self._saved == (task.id, task.attempt)
        inside = outcome.ok and (self.session.streams or saved or self.session.in_transaction)
        return self._finish(_Attempt(task, verdict, want, inside=inside, copied=task.copied, again=saved))

    def skip(self, task: Task, want: Want) -> list[Task]:
        """End a row as one whose run was missed. Returns and raises as `finish` does."""
        verdict = Verdict(state="GONE", error=MISSED)
        return self._finish(_Attempt(task, verdict, want, inside=False, copied=task.copied))

    def _finish(self, attempt: "_Attempt") -> list[Task]:
        attempt = self._planned(attempt)
        task = attempt.task
        failures = 0
        while True:
            steps = self._switch(attempt) if self.session.streams else self._steps(attempt)
            try:
                if self.session.streams:
                    following = self._switched(steps, attempt.want)
                else:
                    # What the task has deferred to its end may take as long as its timeout allows.
                    timeout = None if attempt.inside and not failures else PATIENCE
                    failed = [(task, attempt.verdict)] if attempt.verdict.state == "FAIL" else []
                    following = self.committed(steps, failed, timeout=timeout)
            except StatementFailed as failure:
                failures += 1
                answer = self._failed(attempt, steps.names[failure.step], failure, failures)
                if answer is None:
                    return []
                attempt = answer
                continue
            metrics.ended((attempt.verdict.state, attempt.verdict.code))
            if failures > 1:
                log.info("finish_recovered", id=task.id, tries=failures + 1)
            return following

    def _switch(self, attempt: "_Attempt") -> Steps:
        """In a stream: what was opened, and behind that the end of the run, and the beginning of what it has found."""
        task, verdict, want = attempt.task, attempt.verdict, attempt.want
        texts = (verdict.output, verdict.error, verdict.code, verdict.notice)
        steps = Steps()
        steps.names += self._opened.names
        steps.steps += self._opened.steps
        wanted = want.next and self._opened.look != ""
        end = (task.id, task.attempt, verdict.state, *texts, self.owner, self._ours.fresh.since, wanted)
        self._ours.task(steps, "switch", *end)
        self._ours.commit_and_tidy_up(steps)
        return steps

    def _switched(self, steps: Steps, want: Want) -> list[Task]:
        """Send that, but for what went down with the input. Returns and raises as `committed` does.

        The session still streams if the run of what was taken has been opened.
        """
        opened = self._opened.names
        sent = time.monotonic()
        self.session.stream(steps.steps[len(opened) :])
        try:
            results = self.session.answer()
        except StatementFailed:
            self.session.end_stream(timeout=None)
            raise
        following: list[Task] = []
        if want.next and (look := self._opened.look):
            following = self.following.taken(look, results[opened.index(look)])
        self.following.found(following, sent)
        goes_on = bool(following) and self._follow(following[0])
        failure: StatementFailed | None = None
        try:
            if goes_on:
                self.session.answer(timeout=PATIENCE)
        except StatementFailed as failed:
            failure = failed
        if failure is not None or not goes_on:
            failure = self.session.end_stream(timeout=PATIENCE) or failure
        if failure is not None:
            failure.step += len(opened)
            if steps.names[failure.step] not in TIDY:
                raise failure
            self._ours.tidy_again(steps, failure)
        return following

    def committed(self, steps: Steps, failed: Sequence[tuple[Task, Verdict]], *, timeout: float | None) -> list[Task]:
        """Send what finishes runs, commits and tidies up. Returns the tasks that were taken.

        `failed` are those that `settle` writes as such. Raises StatementFailed when it is not committed, SessionLost
        when nobody knows.
        """
        sent = time.monotonic()
        results = self._ours.commit(steps, timeout=timeout)
        look = steps.look
        following = self.following.taken(look, results[steps.names.index(look)]) if look else []
        if failed:
            self._tell(failed, results[steps.names.index("settle")])
        self.following.found(following, sent)
        return following

    def _tell(self, failed: Sequence[tuple[Task, Verdict]], settled: PGresult) -> None:
        verdicts = {task.id: (task, verdict) for task, verdict in failed}
        for id, again, ms in json.loads(settled.get_value(0, 1) or b"[]"):
            if id in verdicts:
                task, verdict = verdicts[id]
                metrics.retried(again)
                self._telling.failed(
                    id,
                    self._ours.decode((verdict.error or b"").partition(b"\n")[0]),
                    retried=again,
                    group=self._ours.decode(task.group),
                    code=(verdict.code or b"").decode(errors="replace") or None,
                    attempt=task.attempt,
                    ms=None if ms is None else round(ms, 3),
                )

    def ahead(self, task: Task) -> Task:
        """A repeated task with what its next row copies, as the table is now, and with its calendar.

        Raises SessionLost if that cannot be read.
        """
        # A statement that was planned while a partition was attached to a table with sub-partitions may find nothing:
        # the server has pruned what it should not (seen with 15.18). Without an answer there would be no next row.
        result = self._ours.transaction("calendar", task.id)
        if not result.ntuples:
            result = self._ours.transaction("calendar", task.id)
        read_at = time.monotonic()
        if not result.ntuples:  # deleted meanwhile, which the end of the run will find out
            return task
        copied, *values = (result.get_value(0, column) for column in range(result.nfields))
        texts = [None if value is None else self._ours.decode(value) for value in values]
        return task._replace(copied=copied, calendar=Calendar.read(texts, read_at))

    def resume(self, task: Task) -> Task | None:
        """Begin the run of a row that was taken together with others by itself. None when it is ours no more."""
        result = self._ours.transaction("resume", self._ours.fresh.since, task.id, task.attempt)
        return Task.read(result) if result.ntuples else None

    def give_back(self, *tasks: Task) -> None:
        """Return a run that was interrupted, or not begun, to PLAN; its work is undone and it costs nothing."""
        columns = zip(*((b"%d" % task.id, b"%d" % task.attempt) for task in tasks), strict=True)
        self._ours.transaction("back", self.owner, *map(array, columns), clean=True)
        metrics.interrupted(len(tasks))

    def note_stop(self, task: Task, outcome: Outcome | None) -> None:
        """The row was stopped, deleted or taken away while it ran: undo its work, and say when it ended."""
        error = self.verdict(task, outcome).error if outcome is not None and not outcome.ok else None
        self._ours.transaction("stopped", task.id, task.attempt, self.owner, error, clean=True)
        if self._owned(task):  # the stop was for an earlier run of the row, which was set back to PLAN since
            self.give_back(task)
        else:
            metrics.stopped()

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
        self._ours.add(steps, clean=not task.save, sure=attempt.sure or task.save)
        removed = silent(task, verdict) and attempt.refused is None and not attempt.keep
        if attempt.settle or verdict.state == "FAIL":
            self.write(steps, "settle", [(*columns(task, verdict), None if attempt.last else task.plan)])
        elif removed and attempt.copied is None:
            self._ours.task(steps, "remove", task.id, task.attempt, self.owner)
        else:
            texts = (verdict.output, verdict.error, verdict.code, verdict.notice)
            self._ours.task(steps, "finish", task.id, task.attempt, verdict.state, *texts, self.owner)
        self._add_repeat(steps, attempt)
        if verdict.state == "GONE":
            self._ours.task(steps, "unbegun", task.id, task.attempt)
        if removed and (attempt.settle or attempt.copied is not None):
            self._ours.task(steps, "remove_done", task.id, task.attempt, self.owner)
        if attempt.refused is not None:
            self._ours.task(steps, "refused", task.id, task.attempt, attempt.refused)
        self.following.add_next(steps, task, attempt.want)
        steps.own("commit")
        if not task.save:
            self._ours.tidy_up(steps)
        return steps

    def write(self, steps: Steps, name: str, rows: Sequence[tuple[bytes | None, ...]]) -> None:
        """Add a statement for the ends of several runs, of each its `columns`."""
        self._ours.task(steps, name, self.owner, len(rows), *map(array, zip(*rows, strict=True)))

    def _add_repeat(self, steps: Steps, attempt: "_Attempt") -> None:
        if attempt.copied is None or attempt.refused is not None:
            return
        steps.own("savepoint_repeat")
        name, params = "repeat", [param(attempt.task.id)]
        if attempt.coming is not None and (calendar := attempt.task.calendar) is not None:
            name = "repeat_cron"
            params += [self._ours.encode(calendar.cron), self._ours.encode(calendar.zone)]
            params += [param(attempt.coming.plan), array(map(param, attempt.coming.missed))]
        text = self._ours.store.repeat(self._ours.decode(attempt.copied), name)
        steps.add("repeat", Step(self._ours.encode(text), params))

    def _planned(self, attempt: "_Attempt") -> "_Attempt":
        """With what comes after the run, if the row has a calendar."""
        if attempt.task.calendar is None:
            return attempt
        try:
            coming = attempt.task.calendar.coming()
        except Wrong as wrong:  # it was none when the row was planned, or the zone is not known here any more
            log.warning("repeat_refused", id=attempt.task.id, error=str(wrong))
            return attempt._replace(refused=REFUSED + b"ERROR:  " + self._ours.encode(str(wrong)))
        if coming.missed:
            log.info("runs_missed", id=attempt.task.id, noted=len(coming.missed), before=coming.more)
        notices = (attempt.verdict.notice, param(coming.notice))
        notice = b"\n".join(text for text in notices if text is not None) or None
        return attempt._replace(coming=coming, verdict=attempt.verdict._replace(notice=notice))

    def _failed(self, attempt: "_Attempt", name: str, failure: StatementFailed, failures: int) -> "_Attempt | None":
        """What to try after `name` failed; None when the row is not ours any more."""
        if failure.code in ("26000", "42P05") and name not in PLAIN:
            self.session.forget_statements()
            return attempt._replace(again=True)
        if name == "ours" and failure.code == "22012":
            return attempt._replace(sure=True, again=True)
        if name in REMOVING and failure.code == LOCKED:
            return attempt._replace(keep=True, again=True)  # a task that depends on it is being inserted
        unfound = name in ("finish", "remove", "settle") and failure.code == "22012"
        if unfound and name != "settle":  # it was moved, or run before, or a trigger of the user's keeps it, say
            return attempt._replace(settle=True, again=True)
        if unfound and (attempt.inside or not self._owned(attempt.task)):
            return self._not_ours(attempt)
        if name in ("constraints", "savepoint", "commit") and attempt.inside:
            return self._work_failed(attempt, failure)
        if name == "settle" and failure.code[:2] in REFUSING and not (attempt.inside or attempt.last):
            return self._retry_failed(attempt, failure)
        if name == "repeat" and failure.code[:2] not in PASSING:
            return self._repeat_failed(attempt, failure)
        if name in ("switch", *LOOK):
            return attempt._replace(again=True)  # outside of the stream it will be known which of the two fails
        if name in ("fresh", *NEXT):
            # A trigger of the user's refuses that row, say: this run is finished without it.
            return attempt._replace(want=attempt.want._replace(next=False), again=True)
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
            log.event(
                "warning" if failures < LOUD else "error",
                "finish_failed",
                id=attempt.task.id,
                step=name,
                code=failure.code,
                error=str(failure),
            )
        self._trying(failures + 1)
        time.sleep(min(5.0, 0.05 * 2 ** min(failures, 8)))
        return attempt._replace(again=True)

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
        return attempt._replace(verdict=self.verdict(attempt.task, outcome), inside=False, again=False)

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
        return bool(self._ours.transaction("owned", task.id, task.attempt, self.owner, clean=True).ntuples)

    def _broken(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The task has dropped or changed its own table, or a trigger or constraint of the user's refuses the finish.

        Committed, nobody might ever be able to record it: so neither its work nor its being done.
        """
        log.warning("run_undone", id=attempt.task.id, code=failure.code, error=str(failure))
        message = b"the run could not be recorded in the task table, so its work was undone"
        detail = read_error(failure.result).message
        return self._undone(attempt, Error(message=message, code=failure.code.encode(), detail=detail))

    def _undone(self, attempt: "_Attempt", error: Error) -> "_Attempt":
        outcome = Outcome(output=None, errors=(error,), notice=attempt.verdict.notice, encoding=self._ours.encoding)
        return attempt._replace(verdict=self.verdict(attempt.task, outcome), inside=False, again=False)

    def _unstorable(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The server will not take our texts as they are: without what is no text, or with a word on it instead."""
        said = attempt.verdict
        output, error_text, notice = map(self._storable, (said.output, said.error, said.notice))
        verdict = said._replace(output=output, error=error_text, notice=notice)
        if verdict != attempt.verdict:
            return attempt._replace(verdict=verdict, again=True)
        error = Error(message=b"the output cannot be stored", code=failure.code.encode())
        detail = read_error(failure.result).message
        text = b"\n".join([replace(error, detail=detail).text(), statement_line(attempt.task.input)])
        verdict = Verdict(state="FAIL", error=text, code=error.code)
        return attempt._replace(verdict=verdict, inside=False, again=False)

    def _storable(self, text: bytes | None) -> bytes | None:
        """A task that changes client_encoding in the middle may have said what is no text in ours."""
        return None if text is None else self._ours.storable(text)

    def _repeat_failed(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The next row was refused: once more with the columns of now, then say so and go on."""
        if attempt.copied == attempt.task.copied and failure.code in ("42703", "428C9", "42804"):
            steps = Steps()
            if attempt.inside:
                steps.own("rollback_to")
            else:
                steps.own("rollback", "open")
            self._ours.add(steps, clean=True)
            self._ours.task(steps, "copied")
            if not attempt.inside:
                steps.own("rollback")
            results = dict(zip(steps.names, self.session.pipeline(steps.steps, timeout=PATIENCE), strict=True))
            return attempt._replace(copied=results["copied"].get_value(0, 0), again=True)
        error = read_error(failure.result).text()
        log.warning("repeat_refused", id=attempt.task.id, code=failure.code, error=str(failure))
        return attempt._replace(refused=REFUSED + error, again=True)

    def _retry_failed(self, attempt: "_Attempt", failure: StatementFailed) -> "_Attempt":
        """The row cannot be planned again, beyond the last partition for example: then its run was the last."""
        log.warning("retry_refused", id=attempt.task.id, code=failure.code, error=str(failure))
        texts = (attempt.verdict.error, NO_RETRY + read_error(failure.result).text())
        error = b"\n".join(text for text in texts if text is not None)
        return attempt._replace(verdict=attempt.verdict._replace(error=error), last=True)

    def _apart(self, attempt: "_Attempt") -> "_Attempt":
        """Our statements cannot run in the task's transaction: commit its work, and finish in our own."""
        steps = Steps()
        steps.own("rollback_to", "commit")
        self.session.pipeline(steps.steps, timeout=PATIENCE)
        return attempt._replace(inside=False, again=False)


class _Attempt(NamedTuple):
    """What one try at finishing sends."""

    task: Task
    verdict: Verdict
    want: Want
    inside: bool  # in the task's own transaction
    copied: bytes | None  # the columns of the next row, None if there is none to plan
    coming: Coming | None = None  # what comes after the run of a row with a calendar
    again: bool = False  # our savepoint exists already
    sure: bool = False  # set the session's user back, which the task has changed
    keep: bool = False  # the row cannot be removed, and so stays
    settle: bool = False  # its end is not as simple as most: written by the statement that looks at all of the row
    last: bool = False  # it is not retried, whatever is left
    refused: bytes | None = None


def columns(
    task: Task, verdict: Verdict, start: bytes | None = None, stop: bytes | None = None
) -> tuple[bytes | None, ...]:
    """The end of a run as the statements take it that write several. Without `start` it is the row's own, without
    `stop` now."""
    return b"%d" % task.id, b"%d" % task.attempt, verdict.state.encode(), start, stop, *verdict[1:]


def silent(task: Task, verdict: Verdict) -> bool:
    """Is the row to be removed?"""
    return task.delete and verdict.output is None and verdict.error is None


def _too_long(outcome: Outcome) -> Outcome:
    size = len(outcome.output or b"")
    error = Error(message=b"output of %d bytes is longer than a value may be" % size, code=b"54000")
    return outcome._replace(output=None, errors=(*outcome.errors, error))
