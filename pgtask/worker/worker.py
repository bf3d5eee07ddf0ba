"""A worker: a forked process with one session, that runs the tasks of a group one after another.

Plain synchronous code: take what the master assigns, or find the one task that it says is due, begin it, run it, finish
it and take the group's next one in the same transaction (or several next ones, which share one: shared.py), until there
is none. Where it can, the next one's input goes down before it is known what became of the one before (`_follow`).
Then say "idle" and wait for the master's word or its end. It always waits on the session, the master and the deadline
together. A worker never ends because it is idle: only the master ends it, by closing its end of the channel, so that an
expiry cannot race with an assignment. If the master is gone, the run in hand is finished and recorded first.

Exit status: 0 done, 1 the session was lost or could not be opened; anything else is a crash.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any

from psycopg import OperationalError
from psycopg.pq.abc import PGresult

from pgtask import log, metrics
from pgtask.errors import LOST, OK
from pgtask.lines import shown
from pgtask.output import Error
from pgtask.process import (
    DOUBT,
    Cancel,
    Channel,
    Finished,
    Found,
    Idle,
    Look,
    Lost,
    Opened,
    Progress,
    Report,
    Room,
    Run,
    Watch,
    lowest_free,
    set_title,
    unblock,
)
from pgtask.store import Store, Task
from pgtask.telling import Telling
from pgtask.worker.finish import Finisher, Want
from pgtask.worker.ours import PATIENCE, Fresh, Ours, Steps, explain, own_text
from pgtask.worker.progress import Reporter
from pgtask.worker.remote import Remote
from pgtask.worker.run import PREFIX, Limits, Outcome, execute, readable, receive
from pgtask.worker.session import Session, SessionLost, StatementFailed, Step
from pgtask.worker.shared import GRACE, Shared, Unshared
from pgtask.worker.ways import REFUSED, Ways

MASTERS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Signals that are the master's; a terminal sends them to the whole group, and a worker ignores them."""

HELD = (signal.SIGTERM, signal.SIGINT, DOUBT, *MASTERS)
"""Signals that a worker is forked with blocked, until it has its own answer to each."""

RUNNING, REMOTE, CANCELLING = "running", "running remotely", "cancelling"
"""What ps says of a worker that has a task; the words after them are the task's."""

STUBBORN = 3
"""Cancel requests without effect before the backend is terminated."""

OPEN_TIMEOUT = 60.0
"""Seconds that opening a session may take where neither the conninfo nor the task says less."""

OUTDATED = 1.0
"""Seconds after which a worker that goes from task to task makes sure that its session's settings are still those of a
new one."""

SOON, BELOW = 0.02, 1.0
"""A worker that gets a task of its group within so many seconds after it has found none looks below what is planned for
later, for so many seconds."""

WEIGHT = 0.3
"""Of the last run, in how long the next one is expected to take."""

SHORTEST = 0.00005
"""Seconds that a run takes at least."""

MOMENT, TURN = 0.01, 10
"""A worker goes on with its group for so many seconds although others wait, or three times as long if it has not run so
many tasks: a change of the group costs as much as some of them."""

QUIET = 0.05
"""Seconds without a word after which an idle worker gets ready for what it has never been asked for."""

STALLED = 1.0
"""Seconds to wait, once, for a master that does not read what has ended; then it is only told that something has."""

LONGEST_GROUP = 100
"""Characters of a group's name that ps shows."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a worker is forked with: its table, `conninfo` to it, and what the log and ps call it.

    `batch_time`: seconds.
    """

    conninfo: str
    label: str
    title: str
    encoding: str
    store: Store
    telling: Telling
    remote_password: bool
    batch_time: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """A session and what a worker must know of it."""

    session: Session
    fresh: Fresh
    asked: "Asked | None" = None

    @property
    def since(self) -> str:
        """When its backend started."""
        return self.fresh.since.decode()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a Look asks for has been sent already: the steps, and the answers that are to come."""

    steps: Steps
    waiting: Sequence[bytes | None]

    @classmethod
    def by(cls, look: Look, ready: Ready, spec: Spec) -> "Asked":
        """Send it, without waiting, on a session that nothing has been done with. Raises SessionLost."""
        ours = Ours(ready.session, spec.store, spec.encoding)
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


class Worker:
    """The process's whole state. It may be forked with something to do, and a session that the master has opened."""

    def __init__(self, spec: Spec, channel: Channel, word: Run | Look | None = None, ready: Ready | None = None):
        self.spec = spec
        self.ready = ready
        self.channel = channel
        self.watch = Watch(channel)
        self.born = time.monotonic()
        self.runs = 0
        self.term = 0
        self.lane = self.slot = 0  # where we run: the group's key, and the number of the slot that is ours
        self.idle_at = self.below_until = 0.0
        self.hand: deque[Task] = deque()  # rows that are ours and to be run next
        self.running: frozenset[int] = frozenset()  # ids of the run that is going on, or of those that share
        self.named = 0  # the id whose settings the session has
        self.each = 0.0  # seconds that a run is expected to take
        self.limits = Limits()
        self.doing = self.what = ""  # as ps shows it
        self.assigned = word
        self.asked = None if ready is None else ready.asked
        self.practised = False  # has the session the plan of what a Look asks for?
        self.entered = 0.0  # when we were given the group that we are in
        self.turn = 0  # how many runs we had had by then
        self.until = math.inf  # others wait: take nothing more of it from then on
        self.reporting = False  # the master wants to know what has ended
        self.ended: list[int] = []  # what has, last
        self.owed = False  # some of it could not be told
        self.leaving = False  # take nothing more at all
        self.interrupted = False  # cancel the run in hand and give it back
        self.ways = Ways()
        self.vain = 0  # assignments in a row that could not be begun
        self.refusal = ""  # why the last begin failed, "" when it did not
        self.reporter = Reporter(self.limits, spec.encoding, lambda percent, message: None)  # of the run that goes on
        self.remote = Remote(self.watch, spec.encoding, password=spec.remote_password, heed=self._heed)

    def main(self) -> int:
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_interrupt)
        for number in MASTERS:
            signal.signal(number, signal.SIG_IGN)
        unblock(*HELD)
        log.bind(table=self.spec.label)
        self._show("starting")
        opened = False
        try:
            self._take_over_or_open()
            opened = True
            self._serve()
        except (SessionLost, StatementFailed) as lost:
            if self.leaving and not opened:
                return OK
            felled = opened and self.session.felled
            self.channel.send(Lost(why=str(lost)[:8000], opened=opened, felled=felled), patience=PATIENCE)
            return LOST
        return OK

    def _on_term(self, *_: object) -> None:
        self.leaving = True

    def _on_interrupt(self, *_: object) -> None:
        self.leaving = self.interrupted = True

    def _show(self, doing: str, what: str = "") -> None:
        """What ps shows: the table, what is done, and of which task; what users have named comes last."""
        self.doing, self.what = doing, what
        set_title(f"worker {self.spec.title} {doing}{what}")

    def _show_cancel(self) -> None:
        if self.doing != CANCELLING:
            self._show(CANCELLING, self.what)

    def _take_over_or_open(self) -> None:
        """The master's session, if nothing has come from it meanwhile: that would be its end."""
        if self.ready is None:
            self._open()
        elif self.asked is None and self.ready.session.spoken:
            self.ready.session.close()
            self._open()
        else:
            self.ready.session.take_over(self.watch)
            self._use(self.ready)
            self.practised = True

    def _open(self) -> None:
        self._show("opening a session")
        session = Session.open(
            self.spec.conninfo, self.watch, timeout=OPEN_TIMEOUT, stop=lambda: self.leaving or self.channel.closed
        )
        steps = Ours(session, self.spec.store, self.spec.encoding).questions()
        results = session.pipeline(steps.steps, timeout=PATIENCE)
        self._use(Ready(session=session, fresh=Fresh.read(steps, results, self.spec.encoding)))
        self.channel.send(Opened(pid=session.pid, since=self.ours.fresh.since.decode()), patience=PATIENCE)

    def _use(self, ready: Ready) -> None:
        self.session = ready.session
        self.ours = Ours(ready.session, self.spec.store, self.spec.encoding)
        self.ours.fresh = ready.fresh
        self.finisher = Finisher(self.ours, self.spec.telling, self._wants_to_leave, self._show_try)
        self.marked_at = time.monotonic()
        self.limited = self.saved = self.practised = False

    def _show_try(self, number: int) -> None:
        """The end of a run could not be written."""
        self._show(f"recording (try {number})", self.what)

    def _wants_to_leave(self) -> bool:
        self._look()
        return self.leaving

    def _settings_mark(self) -> bytes:
        """What tells the settings that a new session would have from those of another time."""
        return self.ours.transaction("mark").get_value(0, 0) or b""

    def _serve(self) -> None:
        while (word := self._await_word()) is not None:
            if isinstance(word, Look):
                first = self._find(word)
                if first is None:
                    continue
            else:
                self._enter(word.term, word.lane, word.slot)
                self._show("beginning", f" {word.id}")
                first = self._begin(word)
            begun = first is not None
            if first is not None:
                self.hand.append(first)
                self.named = first.id
                metrics.begun(first)
            while self.hand:
                self._go_on()
            self.idle_at = time.monotonic()
            if not self.leaving:
                self.until = math.inf
                if self.owed:
                    self._report()
                self.channel.send(Idle(runs=self.runs, begun=begun), patience=PATIENCE)

    def _enter(self, term: int, lane: int, slot: int) -> None:
        """The group and slot of an assignment. If we have just found nothing there, it was below what comes first."""
        now = time.monotonic()
        if lane == self.lane and now - self.idle_at < SOON:
            self.below_until = now + BELOW
        self.term, self.lane, self.slot, self.entered, self.turn = term, lane, slot, now, self.runs

    def _await_word(self) -> Run | Look | None:
        """The next assignment; None when the master wants no more of us, or is gone."""
        self._look()
        if self.assigned is None and not self.leaving and self.doing != "idle":
            self._show("idle")
        while self.assigned is None and not self.leaving:
            if self.watch.wait(self.session.pgconn.socket, timeout=None if self.practised else QUIET, listen=True):
                self._drain()
            elif not (self.practised or self.watch.heard):
                self._practise()
            self._look()
        word, self.assigned = self.assigned, None
        return None if self.leaving and self.asked is None else word

    def _practise(self) -> None:
        """Have the session plan what a Look asks for while nobody waits for it."""
        self.practised = True
        text = self.ours.encode(self.spec.store.text("find"))
        prepare = self._opened()
        prepare.add("find", Step(text, only_prepare=True))
        prepare.own("commit")
        if self._tried(prepare):
            plan = self._opened()
            plan.add("plan", explain(self.session, text))
            plan.own("commit")
            self._tried(plan)

    def _find(self, look: Look) -> Task | None:
        """Begin the row that is due, if there is one that may start, and tell the master what there is."""
        found = self._ask(look) if self.asked or time.monotonic() < look.by else None
        task = Task.read(found) if found is not None and found.get_value(0, 0) is not None else None
        if task is None:
            self.until = math.inf
        row: list[Any] | None = None
        if found is not None:
            values = ((found.get_value(0, column) or b"").decode() for column in range(24, 30))
            lane, seen, now, cost, place, next = values
            row = [int(seen), 0, now, None, float(cost), place, -(1 << 63), float(next) if next else None]
            if task is None:
                row += [None] * 7
            else:
                self._enter(look.term, int(lane), lowest_free(dict(look.used).get(int(lane), ())))
                row += [task.id, task.attempt - 1, False, int(lane), task.max, 0, 0.0]
        self.channel.send(Found(row=row), patience=PATIENCE)
        return task

    def _ask(self, look: Look) -> PGresult | None:
        asked, self.asked = self.asked, None
        if asked is None:
            steps = self._opened()
            _add_find(self.ours, steps, look)
        else:
            steps = asked.steps
        results = self._tried(steps, asked)
        return results[steps.names.index("find")] if results else None

    def _tried(self, steps: Steps, asked: Asked | None = None) -> Sequence[PGresult]:
        """The results, or none: what fails here the master does himself."""
        try:
            if asked is not None:
                return self.session.answers(asked.waiting, timeout=PATIENCE)
            return self.session.pipeline(steps.steps, timeout=PATIENCE)
        except StatementFailed as failure:
            if failure.code == "26000":
                self.session.forget_statements()
            log.debug("look_failed", code=failure.code, error=str(failure))
            self.saved = True
            self.ours.rewind(save=True)
            return ()

    def _drain(self) -> None:
        """Something came from an idle session: a notice, a changed parameter, or its end."""
        try:
            self.session.pgconn.consume_input()
        except OperationalError as error:
            raise SessionLost(self.session.last_words()) from error

    def _look(self) -> None:
        """Take in what the master said; also called while a run goes on."""
        self.watch.heard = False
        for message in self.channel.receive():
            match message:
                case Run() | Look():
                    self.assigned = message
                case Room(now=now):
                    self.until = 0.0 if now else min(self.until, self.entered + MOMENT)
                case Report(on=on):
                    self.reporting = on
                    self._report()  # it was committed after the master began to ask, maybe
                case Cancel(ids=ids, back=back):
                    if self.running and (ids is None or self.running.intersection(ids)):
                        self.limits.cancelled = "back" if back else "stop"
                        self._show_cancel()
                    if ids is None:
                        self.leaving = True
        if self.channel.closed:
            self.leaving = True
        if self.interrupted and self.running and not self.limits.cancelled:
            self.limits.cancelled = "back"
            self._show_cancel()

    def _report(self, *ids: int) -> None:
        """These runs have ended, and that is committed. What the master has not asked for yet, it may ask for soon."""
        self.ended = list(ids) or self.ended
        if self.reporting and self.ended:
            message = Finished(ids=[] if self.owed else self.ended)
            self.owed = not self.channel.send(message, patience=0.0 if self.owed else STALLED)

    def _begin(self, run: Run) -> Task | None:
        """Make the assigned row ours, durably, so that a run that kills its backend is counted.

        One that is not to be had goes back to the master, who soon takes it again unless it was stopped or the term
        is over: a user's trigger may refuse it for ever. So the pause after such ones in a row grows.
        """
        task = self._try_to_begin(run) or self._begin_anew(run)
        self.vain = 0 if task is not None else self.vain + 1
        if self.vain > 1:
            time.sleep(min(2.0, 0.02 * 2 ** min(self.vain, 10)))
        return task

    def _begin_anew(self, run: Run) -> Task | None:
        """A session older than an ALTER ROLE or ALTER DATABASE ... SET begins nothing: another one in its place."""
        if self._settings_mark() == self.ours.fresh.mark:
            return None
        log.debug("session_outdated", backend=self.session.pid)
        self.session.close()
        self._open()
        return self._try_to_begin(run)

    def _try_to_begin(self, run: Run) -> Task | None:
        for pause in (0.1, 0.5, 2.0, None):
            steps = self._opened()
            begin = (self.ours.fresh.since, run.id, run.taker, run.attempt, run.term, self.ours.fresh.mark)
            self.ours.task(steps, "begin", *begin)
            steps.own("commit")
            try:
                results = self.session.pipeline(steps.steps, timeout=PATIENCE)
            except StatementFailed as failure:
                if failure.code == "26000":
                    self.session.forget_statements()
                self.saved = True
                self._begin_failed(run, failure)
                if pause is not None:
                    time.sleep(pause)
                continue
            begun = results[steps.names.index("begin")]
            task = Task.read(begun) if begun.ntuples else None
            if task is not None and self.refusal:
                log.info("begin_recovered", id=run.id)
                self.refusal = ""
            return task
        return None

    def _opened(self) -> Steps:
        """What a transaction of our own begins with."""
        steps = Steps()
        if not self.session.idle:
            steps.own("rollback")
        steps.own("open")
        self.ours.add(steps, clean=False, sure=self.saved)
        return steps

    def _begin_failed(self, run: Run, failure: StatementFailed) -> None:
        """Say it once for each reason, until a begin succeeds."""
        if failure.code != self.refusal:
            changed = f"{failure}: a trigger may have changed the state or pid that was written"
            error = changed if failure.code == "22012" else str(failure)
            log.warning("begin_failed", id=run.id, code=failure.code, error=error)
            self.refusal = failure.code

    def _go_on(self) -> None:
        """Run what comes first in hand: together with others, or by itself."""
        if self.leaving and (len(self.hand) > 1 or self.hand[0].id != self.named):
            self._keep(0)
        elif len(together := list(takewhile(self._admits, self.hand))) > 1:
            self._run_together(together)
        else:
            if self.each > self.spec.batch_time:
                self._keep(1)
            task: Task | None = self.hand.popleft()
            if task is not None and task.id != self.named:
                task = self._resume(task)
            if task is not None:
                self.hand += self._run(task)

    def _keep(self, count: int) -> None:
        """Give the others in hand back: they would wait for the end of a long run, which others need not."""
        rest = list(self.hand)[count:]
        if rest:
            self.finisher.give_back(*rest)
            self.hand = deque(list(self.hand)[:count])

    def _resume(self, task: Task) -> Task | None:
        """The next in hand, by itself, if nobody has stopped or deleted it while others ran."""
        resumed = self.finisher.resume(task)
        if resumed is None:
            self.finisher.note_stop(task, None)
        return resumed

    def _admits(self, task: Task) -> bool:
        return self.ways.shares(task, most_ms=GRACE * self.spec.batch_time * 1000)

    def _run_together(self, tasks: list[Task]) -> None:
        """Run the first of those in hand in one transaction; whom it does not come to, stays."""
        self._show(RUNNING, f" {tasks[0].id} and {len(tasks) - 1} more in group {self._group(tasks[0])}")
        self.finisher.owner = self.session.pid
        started = time.monotonic()
        shared = Shared(
            self.ours, self.finisher, seconds=self.spec.batch_time, each=max(self.each, SHORTEST), tick=self._tick
        )
        self.limits = shared.limits
        self.running = frozenset(task.id for task in tasks)
        try:
            shared.run(tasks)
            self.running = frozenset()
            ended = len(shared.ends)
            each = (time.monotonic() - started) / max(1, ended + shared.apart)
            self._took(each)
            metrics.ran(each, ended)
            self.runs += ended
            self._look()
            if ended:
                following = shared.finish(self._want(also=len(self.hand) > ended, batch=shared.ends[-1].task.batch))
            else:
                self.ours.rewind(save=False)
                following = []
        except Unshared as why:
            log.debug("batch_undone", ids=[task.id for task in tasks], why=str(why))
            self.running = frozenset()
            self.ours.rewind(save=False)
            self.marked_at = -OUTDATED  # that may have been why
            self.hand = deque(task._replace(batch=1) for task in self.hand)
            return
        for end in shared.ends:
            task = self.hand.popleft()
            log.debug("run_ended", id=task.id, ok=end.outcome.ok, code=end.outcome.code, together=ended)
        if shared.ends:
            self._report(*(end.task.id for end in shared.ends))
        metrics.begun(*following, also_taken=True)
        self.named = following[-1].id if following else 0
        if shared.apart:
            if shared.never:
                self.ways.run_alone(self.hand[0])
            self.hand[0] = self.hand[0]._replace(batch=1)
            if shared.limits.cancelled:
                self._keep(1)
        self.hand += following

    def _took(self, seconds: float) -> None:
        self.each += WEIGHT * (seconds - self.each)

    def _run(self, task: Task) -> list[Task]:
        """Run one task to its end. Returns the group's next ones, already ours."""
        self.running = frozenset((task.id,))
        started = time.monotonic()
        self.runs += 1
        self._show(RUNNING if task.remote is None else REMOTE, f" {task.id} in group {self._group(task)}")
        self.limits = Limits(deadline=started + task.timeout_ms / 1000 if task.timeout_ms else None)
        self.reporter = Reporter(self.limits, self.spec.encoding, partial(self._tell, task))
        log.debug("run_begun", id=task.id, attempt=task.attempt, group=task.group)
        self.finisher.owner = self.session.pid
        if task.repeated:
            task = self.finisher.ahead(task)
        if task.calendar is not None and task.calendar.skipped:
            log.info("run_skipped", id=task.id)
            following = self.finisher.skip(task, self._want(also=bool(self.hand), batch=1))
            self._report(task.id)
        else:
            following = self._carry_out(task, started)
        self.running = frozenset()
        metrics.begun(*following, also_taken=True)
        self.named = following[-1].id if following else 0
        return following

    def _carry_out(self, task: Task, started: float) -> list[Task]:
        """Run the input and write what became of it."""
        outcome = self._execute_or_bury(task)
        self.reporter.flush()
        seconds = time.monotonic() - started
        self._took(seconds)
        metrics.ran(seconds)
        self._look()
        following = self._end(task, outcome)
        self._report(task.id)
        self.saved = task.save  # what the task has set may still be
        seconds = time.monotonic() - started
        if seconds > self.spec.telling.slow_run:
            self._tell_slow(task, outcome, seconds)
        log.debug("run_ended", id=task.id, ok=outcome.ok, code=outcome.code, ms=round(seconds * 1000, 3))
        return following

    def _group(self, task: Task) -> str:
        """The task's group, for ps."""
        return _shown(task.group, self.spec.encoding)

    def _tell_slow(self, task: Task, outcome: Outcome, seconds: float) -> None:
        group = readable(task.group, self.spec.encoding)
        self.spec.telling.slow(task.id, group=group, attempt=task.attempt, seconds=seconds, ok=outcome.ok)

    def _end(self, task: Task, outcome: Outcome) -> list[Task]:
        cancelled = self.limits.cancelled
        if cancelled and self.session.streams:
            outcome = self.finisher.break_off(task, outcome)
        if cancelled == "stop":
            self.finisher.note_stop(task, outcome)
            return []
        if cancelled == "back" and outcome.code == "57014":
            self.finisher.give_back(task)
            return []
        if cancelled == "timeout" and outcome.code == "57014":
            outcome = _timed_out(task, outcome)
        want = self._want(also=bool(self.hand), batch=task.batch, looks=not self.session.streams)
        return self.finisher.finish(task, outcome, want._replace(follow=self._follow))

    def _want(self, *, also: bool, batch: int, looks: bool = True, ahead: int = 0) -> Want:
        """What of the group is wanted: nothing while there are others in hand `also`, at most `batch` together.

        `looks`: is it looked for with this? `ahead`: how many runs before it have not begun yet.
        """
        late = time.monotonic() - self.until
        short = self.until > 0 and self.runs - self.turn < TURN and late < 2 * MOMENT
        next = not (self.leaving or also) and (late < 0 or short)
        outdated = looks and next and time.monotonic() - self.marked_at > OUTDATED
        if outdated:
            self.marked_at = time.monotonic()
        return Want(
            next=next,
            runs=self.runs + ahead,
            age=time.monotonic() - self.born,
            term=self.term,
            lane=self.lane,
            slot=self.slot,
            below=time.monotonic() < self.below_until,
            batch=min(batch, max(1, int(self.spec.batch_time / max(self.each, SHORTEST)))),
            mark=self.ours.fresh.mark if outdated else None,
        )

    def _follow(self, task: Task) -> bool:
        """Open its run behind the end of the one before, if it may stand there."""
        if self.leaving or not self.ways.follows(task):
            return False
        self._open_run(task, ahead=1)
        return True

    def _streams(self, task: Task) -> bool:
        """Does its run stand in a stream? One begins where a task comes right after another: more may follow."""
        if self.session.streams:
            return True
        if self.runs - self.turn < 2 or not self.ours.streams or not self.ways.follows(task):
            return False
        self._open_run(task, ahead=0)
        return True

    def _open_run(self, task: Task, ahead: int) -> None:
        limit = self._timeout(task) if task.timeout_ms or self.limited else None
        self.limited = False
        self.finisher.open(task, limit, self._want(also=bool(self.hand), batch=1, ahead=ahead))

    def _execute_or_bury(self, task: Task) -> Outcome:
        """Run the input; where no cancel request helped, over the dead body of its backend."""
        try:
            return self._execute(task)
        except SessionLost as lost:
            if not self.limits.buried:
                raise
            message = str(lost).encode()
        self.session.close()
        owner = self.finisher.owner
        self._open()
        self.finisher.owner = owner
        self._await_end(owner)
        self._keep(0)  # they belonged to that backend
        error = Error(severity=b"FATAL", message=message, code=b"57014")
        return Outcome(output=None, errors=(error,), notice=None, encoding=self.spec.encoding)

    def _await_end(self, backend: int) -> None:
        """A row is written for a terminated backend only when that one is really gone."""
        while True:
            steps = Steps()
            self.ours.task(steps, "alive", backend)
            [result] = self.session.pipeline(steps.steps, timeout=PATIENCE)
            if not result.ntuples:
                return
            time.sleep(0.05)

    def _execute(self, task: Task) -> Outcome:
        if task.remote is not None:
            return self.remote.execute(task, self.limits, self._tick_remote)
        if self._streams(task):
            outcome = receive(self.session, task.format, limits=self.limits, tick=self._tick, heed=self._heed)
        else:
            self._limit(task)
            if self.ways.bare(task):
                return self._send(task, b"")
            outcome = self._send(task, PREFIX)
        if outcome.code not in REFUSED or outcome.committed or self.limits.cancelled:
            return outcome
        self.ways.run_bare(task)
        self.ours.rewind(save=task.save)
        self._limit(task)
        return self._send(task, b"")

    def _send(self, task: Task, prefix: bytes) -> Outcome:
        how: dict[str, Any] = {"limits": self.limits, "tick": self._tick, "heed": self._heed}
        return execute(self.session, task.input, task.format, prefix=prefix, **how)

    def _heed(self, notice: PGresult, encoding: str) -> bool:
        return self.reporter.heed(notice, encoding)

    def _tell(self, task: Task, percent: str, message: str | None) -> None:
        self.channel.send(Progress(id=task.id, attempt=task.attempt, percent=percent, message=message))

    def _limit(self, task: Task) -> None:
        """Let the server end the statement by itself; the deadline here bounds the run as a whole."""
        if not task.timeout_ms and not self.limited:
            return
        self.session.pipeline([self._timeout(task)], timeout=PATIENCE)
        self.limited = task.save and bool(task.timeout_ms)

    def _timeout(self, task: Task) -> Step:
        limits = [limit for limit in (task.timeout_ms, self.ours.fresh.limit_ms) if limit]
        return Step(own_text("timeout"), (str(min(limits, default=0)).encode(),))

    def _tick_remote(self) -> None:
        self._look()
        if self.limits.tries:
            self._show_cancel()
        self.reporter.tick()

    def _tick(self) -> None:
        if self.watch.heard or self.interrupted:
            self._look()
        self.reporter.tick()
        if self.limits.tries:
            self._show_cancel()
        if self.limits.tries >= STUBBORN:
            self._terminate()

    def _terminate(self) -> None:
        """Cancel requests have no effect: end our own backend over a second session; this one is then lost."""
        log.warning("run_ignores_cancel", id=min(self.running), backend=self.session.pid)
        self.limits.buried = True
        other = Session.open(self.spec.conninfo, self.watch, timeout=5.0, stop=lambda: False)
        try:
            steps = Steps()
            self.ours.task(steps, "end_backend", self.session.pid)
            other.pipeline(steps.steps, timeout=5.0)
        finally:
            other.close()
        self.limits.tries = 0


def _timed_out(task: Task, outcome: Outcome) -> Outcome:
    """We cancelled because of the task's own timeout; the server thinks that a user did."""
    error = Error(
        message=b"canceling statement due to statement timeout",
        code=b"57014",
        detail=b"The task's timeout is %d ms." % task.timeout_ms,
        context=outcome.errors[0].context,
    )
    return Outcome(output=outcome.output, errors=(error,), notice=outcome.notice, encoding=outcome.encoding)


def _add_find(ours: Ours, steps: Steps, look: Look) -> None:
    """Add what a Look asks for, and its commit."""
    lanes = [lane for lane, numbers in look.used for _ in numbers]
    fences = (look.term, ours.fresh.mark, look.until)
    ours.task(steps, "find", look.now, _numbers(lanes), ours.fresh.since, *look.place, *fences)
    steps.own("commit")


def _numbers(values: Sequence[int]) -> str:
    """The literal of an array."""
    return f"{{{','.join(map(str, values))}}}"


@lru_cache(maxsize=64)
def _shown(group: bytes, encoding: str) -> str:
    return shown(readable(group, encoding), LONGEST_GROUP)
