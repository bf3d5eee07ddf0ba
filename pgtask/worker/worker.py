"""A worker: a forked process with one session, that runs the tasks of a group one after another.

Plain synchronous code: take what the master assigns, or find the one task that it says is due, begin it, run it, finish
it and take the group's next one in the same transaction (or several next ones, which share one: shared.py), until there
is none. Where it can, the next one's input goes down before it is known what became of the one before (`_follow`).
Then say "idle" and wait for the master's word or its end. It always waits on the session, the master and the deadline
together. A worker never ends because it is idle: only the master ends it, by closing its end of the channel, so that an
expiry cannot race with an assignment. If the master is gone, the run in hand is finished and recorded first.

Exit status: 0 done, 1 the session was lost or could not be opened; anything else is a crash.
"""

import signal
import time
from collections import deque
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
from pgtask.worker.begin import Beginner, Ready
from pgtask.worker.finish import Finisher
from pgtask.worker.following import Want
from pgtask.worker.ours import PATIENCE, Fresh, Ours, Steps, own_text
from pgtask.worker.progress import Reporter
from pgtask.worker.remote import Remote
from pgtask.worker.run import PREFIX, Limits, Outcome, execute, readable, receive
from pgtask.worker.session import Session, SessionLost, StatementFailed, Step
from pgtask.worker.shared import GRACE, Shared, Unshared
from pgtask.worker.turn import Turn
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

UNHEARD = 0.001
"""Seconds after which a worker looks for the master's word although it has not waited since."""

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


class Worker:
    """The process's whole state. It may be forked with something to do, and a session that the master has opened."""

    def __init__(self, spec: Spec, channel: Channel, word: Run | Look | None = None, ready: Ready | None = None):
        self.spec = spec
        self.ready = ready
        self.channel = channel
        self.watch = Watch(channel)
        self.turn = Turn(spec.batch_time)
        self.hand: deque[Task] = deque()  # rows that are ours and to be run next
        self.running: frozenset[int] = frozenset()  # ids of the run that is going on, or of those that share
        self.named = 0  # the id whose settings the session has
        self.limits = Limits()
        self.doing = self.what = ""  # as ps shows it
        self.looked_at = 0.0  # when we last took in what the master said (time.monotonic())
        self.assigned = word
        self.asked = None if ready is None else ready.asked
        self.practised = False  # has the session the plan of what a Look asks for?
        self.reporting = False  # the master wants to know what has ended
        self.ended: list[int] = []  # what has, last
        self.owed = False  # some of it could not be told
        self.leaving = False  # take nothing more at all
        self.interrupted = False  # cancel the run in hand and give it back
        self.ways = Ways()
        self.beginner = Beginner(self._open)
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
        self.finisher = Finisher(self.ours, self.spec.telling, self._wants_to_leave, self._show_try, self._follow)
        self.marked_at = time.monotonic()
        self.beginner.use(self.ours)
        self.limited = self.practised = False

    def _show_try(self, number: int) -> None:
        """The end of a run could not be written."""
        self._show(f"recording (try {number})", self.what)

    def _wants_to_leave(self) -> bool:
        self._look()
        return self.leaving

    def _serve(self) -> None:
        while (word := self._await_word()) is not None:
            if isinstance(word, Look):
                first = self._find(word)
                if first is None:
                    continue
            else:
                self.turn.enter(word.term, word.lane, word.slot)
                self._show("beginning", f" {word.id}")
                first = self.beginner.begin(word)
            begun = first is not None
            if first is not None:
                self.hand.append(first)
                self.named = first.id
                metrics.begun(first)
            while self.hand:
                self._go_on()
            self.turn.over()
            if not self.leaving:
                self.turn.forget_others()
                if self.owed:
                    self._report()
                self.channel.send(Idle(runs=self.turn.runs, begun=begun), patience=PATIENCE)

    def _await_word(self) -> Run | Look | None:
        """The next assignment; None when the master wants no more of us, or is gone."""
        self._look()
        if self.assigned is None and not self.leaving and self.doing != "idle":
            self._show("idle")
        while self.assigned is None and not self.leaving:
            if self.watch.wait(self.session.pgconn.socket, timeout=None if self.practised else QUIET, listen=True):
                self._drain()
            elif not (self.practised or self.watch.heard):
                self.practised = True
                self.beginner.practise()
            self._look()
        word, self.assigned = self.assigned, None
        return None if self.leaving and self.asked is None else word

    def _find(self, look: Look) -> Task | None:
        """Begin the row that is due, if there is one that may start, and tell the master what there is."""
        asked, self.asked = self.asked, None
        task, lane, found = self.beginner.find(look, asked)
        if task is None:
            self.turn.forget_others()
        else:
            self.turn.enter(look.term, lane, lowest_free(dict(look.used).get(lane, ())))
        self.channel.send(found, patience=PATIENCE)
        return task

    def _drain(self) -> None:
        """Something came from an idle session: a notice, a changed parameter, or its end."""
        try:
            self.session.pgconn.consume_input()
        except OperationalError as error:
            raise SessionLost(self.session.last_words()) from error

    def _look(self) -> None:
        """Take in what the master said; also called while a run goes on."""
        self.watch.heard = False
        self.looked_at = time.monotonic()
        for message in self.channel.receive():
            match message:
                case Run() | Look():
                    self.assigned = message
                case Room(now=now):
                    self.turn.make_room(now=now)
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

    def _go_on(self) -> None:
        """Run what comes first in hand: together with others, or by itself."""
        if self.leaving and (len(self.hand) > 1 or self.hand[0].id != self.named):
            self._keep(0)
        elif len(together := list(takewhile(self._admits, self.hand))) > 1:
            self._run_together(together)
        else:
            if self.turn.each > self.spec.batch_time:
                self._keep(1)
            task: Task | None = self.hand.popleft()
            if task is not None and task.id != self.named:
                task = self._resume(task)
            if task is not None:
                self.hand += self._run(task)

    def _took(self, tasks: list[Task]) -> None:
        """These are ours; the session has the settings of one alone, not those of several."""
        metrics.begun(*tasks, also_taken=True)
        self.named = tasks[0].id if len(tasks) == 1 else 0

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
        shared = Shared(self.ours, self.finisher, seconds=self.spec.batch_time, each=self.turn.each, tick=self._tick)
        self.limits = shared.limits
        self.running = frozenset(task.id for task in tasks)
        try:
            shared.run(tasks)
            self.running = frozenset()
            ended = len(shared.ends)
            each = (time.monotonic() - started) / max(1, ended + shared.apart)
            self.turn.took(each)
            metrics.ran(each, ended)
            self.turn.runs += ended
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
        self._took(following)
        if shared.apart:
            if shared.never:
                self.ways.run_alone(self.hand[0])
            self.hand[0] = self.hand[0]._replace(batch=1)
            if shared.limits.cancelled:
                self._keep(1)
        self.hand += following

    def _run(self, task: Task) -> list[Task]:
        """Run one task to its end. Returns the group's next ones, already ours."""
        self.running = frozenset((task.id,))
        started = time.monotonic()
        self.turn.runs += 1
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
        self._took(following)
        return following

    def _carry_out(self, task: Task, started: float) -> list[Task]:
        """Run the input and write what became of it."""
        outcome = self._execute_or_bury(task)
        self.reporter.flush()
        seconds = time.monotonic() - started
        self.turn.took(seconds)
        metrics.ran(seconds)
        if self.watch.heard or time.monotonic() - self.looked_at > UNHEARD:
            self._look()
        following = self._end(task, outcome)
        self._report(task.id)
        self.beginner.saved = task.save
        seconds = time.monotonic() - started
        if seconds > self.spec.telling.slow_run:
            self._tell_slow(task, outcome, seconds)
        if log.enabled("debug"):
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
        looks = not self.session.streams
        want = self._want(also=bool(self.hand), batch=task.batch, looks=looks)
        return self.finisher.finish(task, outcome, want)

    def _want(self, *, also: bool, batch: int, looks: bool = True, ahead: int = 0) -> Want:
        """What of the group is wanted: nothing while there are others in hand `also`.

        `looks`: is it looked for with this? Then it is seen, now and then, whether the session's settings still hold.
        """
        want = self.turn.want(more=not (self.leaving or also), batch=batch, ahead=ahead)
        if not (looks and want.next and time.monotonic() - self.marked_at > OUTDATED):
            return want
        self.marked_at = time.monotonic()
        return want._replace(mark=self.ours.fresh.mark)

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
        if self.turn.had < 2 or not self.ours.streams or not self.ways.follows(task):
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


@lru_cache(maxsize=64)
def _shown(group: bytes, encoding: str) -> str:
    return shown(readable(group, encoding), LONGEST_GROUP)
