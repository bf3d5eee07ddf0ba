"""`pgtask why`: why a task does not start, or what became of it.

It asks what the scheduler itself goes by (poll.sql): the clock, the group's slots and hold, what the row depends on,
who has it locked, who serves the table. Each thing that is in the way is a `Reason`: the first one is the answer, the
others come after it. What only the master knows (how many workers it may have) is told where its configuration is
given. Nothing is written: the row is locked for a moment, as a take would, and let go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import click
from psycopg import Connection, Error, RawCursor, errors
from psycopg.rows import namedtuple_row

from pgtask.coming import moment
from pgtask.command import LAYOUT, printable
from pgtask.config import TableConfig
from pgtask.errors import OK, UserError
from pgtask.objects import Names, literal
from pgtask.user import spoken
from pgtask.user.shown import print_json
from pgtask.user.spoken import clock, several, span
from pgtask.user.where import Id, Where, as_json, of_tables, one_line, open_session, settled

BLOCKED = 1
"""The exit status where something is in the task's way, or it has ended otherwise than DONE."""

MOST = 10_000
"""Rows that are counted at most: beyond them the number says nothing new."""

LISTED = 20
"""Lines of facts of one kind."""

ROOTS = 3
"""Of the tasks that another one waits for, so many are asked in their turn."""

PATIENCE = timedelta(seconds=1)
"""How long a due row may lie there before it is a question why."""

SETTINGS = {
    "statement_timeout": "15s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "15s",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
    "enable_seqscan": "off",
    "jit": "off",
}


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One thing that is in the way: its name, a clause that says it, and what mends it, if a command does."""

    reason: str
    text: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`sentence` is the answer; `facts` are what it rests on, as (what, value)."""

    id: int
    state: str | None
    sentence: str
    reasons: Sequence[Reason] = ()
    facts: Sequence[tuple[str, str]] = ()
    in_the_way: bool = False


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What the master's configuration allows, where it is known."""

    workers: int
    run: int
    safety: timedelta
    sleep: timedelta


@click.command("why")
@click.argument("id", type=Id(-(2**63)))
@of_tables
@as_json
def command(id: int, where: Where, as_json: bool) -> int:
    """Say why a task does not start, or what became of it.

    The exit status is 0 if it runs, has run well, or will as planned; 1 if something is in its way; 2 for wrong usage.
    With --config also the limits of the master's configuration are taken into account.
    """
    table = where.one()
    master = where.master()
    caps = None
    if master is not None:
        caps = Caps(workers=master.workers, run=table.run, safety=table.safety, sleep=table.sleep)
    answer = ask(table, id, caps)
    if as_json:
        print_json({"table": table.label, **answer.__dict__, "reasons": [one.__dict__ for one in answer.reasons]})
    else:
        click.echo("\n".join(lines(answer)))
    return BLOCKED if answer.in_the_way else OK


def ask(table: TableConfig, id: int, caps: Caps | None = None) -> Answer:
    """Why that row does not start. Raises UserError, also where the row cannot be read."""
    names = Names(schema=table.schema, table=table.table)
    try:
        with open_session(table, "pgtask why") as session:
            return Why(session, names, caps).answer(id)
    except Error as error:
        raise UserError(f"{table.label}: {one_line(error)}") from error


def lines(answer: Answer) -> Iterator[str]:
    """The answer for people."""
    yield printable(answer.sentence)
    for one in answer.reasons:
        if one.text not in answer.sentence:
            yield f"  also: {printable(one.text)}"
    width = max((len(name) for name, _ in answer.facts), default=0)
    for name, value in answer.facts:
        yield f"  {name:{width}}  {printable(value)}"
    for one in answer.reasons:
        if one.mend:
            yield f"  mend: {printable(one.mend, but=LAYOUT)}"


@dataclass
class Why:
    """The questions of one session about one table."""

    session: Connection[Any]
    names: Names
    caps: Caps | None
    facts: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, id: int, *, deep: bool = True) -> Answer:
        """`deep`: ask also those that it waits for."""
        try:
            rows = self._rows("asked", id)
        except errors.LockNotAvailable:
            return self._table_locked(id)
        if not rows:
            return self._missing(id)
        row = rows[0]
        self.facts = []
        self._tell("group", row.group + (" on a remote database" if row.remote is not None else ""))
        if row.key is not None:
            self._tell("key", row.key)
        match row.state:
            case "PLAN":
                return self._planned(row)
            case "WAIT":
                return self._waiting(row, deep=deep)
            case "TAKE" | "WORK":
                return self._running(row)
        return self._ended(row)

    # What is asked

    def _rows(self, name: str, *parameters: object) -> list[Any]:
        cursor = RawCursor(self.session, row_factory=namedtuple_row)
        with self.session.transaction():
            self.session.execute(settled(SETTINGS))
            return cursor.execute(self.names.store().text(name).encode(), parameters).fetchall()

    def _tell(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    def _say(self, row: Any, text: str, reasons: Sequence[Reason] = (), *, in_the_way: bool | None = None) -> Answer:
        return Answer(
            id=row.id,
            state=row.state,
            sentence=f"Task {row.id} {text}.",
            reasons=list(reasons),
            facts=self.facts,
            in_the_way=bool(reasons) if in_the_way is None else in_the_way,
        )

    def _table_locked(self, id: int) -> Answer:
        lockers = [
            Reason(reason="locked", text=f"the whole table is locked by {_session(row)}", mend=_terminate(row))
            for row in self._rows("lockers_of_table")
        ]
        text = "; ".join(one.text for one in lockers) or "the whole table was locked, and cannot be read"
        return Answer(
            id=id, state=None, sentence=f"Task {id} cannot be seen: {text}.", reasons=lockers, in_the_way=True
        )

    def _missing(self, id: int) -> Answer:
        [(last,)] = self._rows("last_id")
        if last is not None and id > last:
            made = f"the last one that was ever made is {last}" if last else "none was ever made"
            raise UserError(f"{self.names.label} has no task {id}: {made}")
        facts = [
            ("removed", 'a task with "delete" whose run had nothing to say is removed when it is DONE'),
            (
                "or",
                "it was kept as long as keep or keep_failed say, deleted by somebody, or its INSERT was rolled back",
            ),
        ]
        return Answer(id=id, state=None, sentence=f"There is no task {id} any more: it was removed.", facts=facts)

    # PLAN

    def _planned(self, row: Any) -> Answer:
        now, plan = moment(row.now), moment(row.plan)
        if row.attempt:
            self._tell("runs", f"{several(row.attempt, 'run')} so far{_and_retries(row)}")
        if row.error:
            self._tell("last error", _first_line(row.error))
        self._tell_repetition(row)
        if not row.later:
            return self._due(row, now, plan)
        reasons = [*self._held(row, now), *self._unserved(now)]
        if row.never:
            return self._say(row, "is planned for infinity, which never comes", reasons, in_the_way=True)
        when = f"{clock(plan)}, in {span(plan - now)}"
        if row.attempt and row.error:
            text = f"is to run again at {when}: run {row.attempt} failed{_code(row)}"
        elif row.cron is not None:
            text = f"is planned for {when}, when its calendar comes round"
        else:
            text = f"is planned for {when}"
        return self._say(row, ", but ".join([text, *(one.text for one in reasons[:1])]), reasons)

    def _due(self, row: Any, now: datetime, plan: datetime) -> Answer:
        waited = now - plan
        self._tell("due", f"{clock(plan)}, {span(waited)} ago")
        unserved = list(self._unserved(now))
        reasons = [*self._late(row), *self._held(row, now), *unserved, *self._locked(row)]
        reasons += self._crowded(row, now, served=not unserved)
        if not reasons and waited > PATIENCE:
            reasons += [*self._capped(row), *self._unwoken()]
        if reasons:
            return self._say(row, f"is due, but {reasons[0].text}", reasons)
        if waited <= PATIENCE or self.caps is not None:
            return self._say(row, f"is due for {span(waited)}, nothing is in its way: it starts with the next look")
        text = f"is due for {span(waited)}, and nothing that the database knows of is in its way"
        self._tell(
            "workers", "whether all of them are busy, only the master's configuration tells: give it with --config"
        )
        return self._say(row, text, in_the_way=False)

    def _late(self, row: Any) -> Iterator[Reason]:
        if row.late:
            yield Reason(
                reason="late",
                text=f"it comes too late: it may start within {row.active} after its plan (active), and will be GONE",
                mend=self.names.store().text("mend_plan", id=str(row.id)),
            )

    def _held(self, row: Any, now: datetime) -> Iterator[Reason]:
        if row.held_since is not None:
            since = moment(row.held_since)
            release = self.names.quoted(self.names.derived("release"))
            yield Reason(
                reason="held",
                text=f'its group "{row.group}" is held by {row.held_by} since {clock(since)} ({span(now - since)})',
                mend=f"SELECT {release}({literal(row.group)})",
            )

    def _unserved(self, now: datetime) -> Iterator[Reason]:
        """Who serves the table, and is it anybody?"""
        [row] = self._rows("served")
        if row.standby:
            yield Reason(reason="standby", text="this server is a standby: tasks run on the one that takes writes")
            return
        last = None
        if row.host is not None:
            last = f"term {row.term}, pid {row.pid} on {row.host}, since {clock(moment(row.since))}"
            self._tell("master" if row.leads else "last master", last)
        if row.holder is None:
            yield Reason(reason="no master", text="no master serves the table", mend="start pgtask-master")
        elif not row.leads:
            name = f' "{row.name}"' if row.name else ""
            text = f"no master serves the table: its lock is held by session {row.holder} of {row.role}{name}"
            yield Reason(reason="no master", text=text, mend=f"SELECT pg_terminate_backend({row.holder})")
        elif row.wait_event_type == "Lock" and row.blockers:
            blockers = ", ".join(map(str, row.blockers))
            text = f"the master itself waits for a lock ({row.wait_event}) that session {blockers} has"
            yield Reason(reason="master waits", text=text, mend=f"SELECT pg_terminate_backend({row.blockers[0]})")

    def _locked(self, row: Any) -> Iterator[Reason]:
        """A take leaves out what others have locked."""
        if not row.touched or self._free(row):
            return
        try:
            lockers = self._rows("lockers", row.id) or self._rows("lockers_together", row.id)
        except errors.InvalidParameterValue:  # it has been let go since, and its number is no longer one of several
            return
        for one in lockers:
            yield Reason(reason="locked", text=f"its row is locked by {_session(one)}", mend=_terminate(one))

    def _free(self, row: Any) -> bool:
        """Whether the lock is none that a take minds, such as that of a foreign key."""
        try:
            with self.session.transaction(force_rollback=True):
                return bool(self._rows("claim", row.id))
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction):
            return False

    def _crowded(self, row: Any, now: datetime, *, served: bool) -> Iterator[Reason]:
        """The group's slots, its pause, and who in it goes first."""
        runs = self._rows("beside", row.lane, row.id)
        allowed = max(row.max, 0) + 1
        used = _slots(runs)
        if used >= allowed:
            whose = ", ".join(str(run.id) for run in runs[:5]) + (", ..." if len(runs) > 5 else "")
            tasks = f"task{'' if len(runs) == 1 else 's'} {whose}"
            its = "its slot" if allowed == 1 else f"all of its {allowed:,} slots"
            text = f'its group "{row.group}" is full: {tasks} {"has" if len(runs) == 1 else "have"} {its}'
            yield Reason(reason="group full", text=text)
        self._tell("slots", f"{used:,} of {allowed:,} in use")
        for run in runs[:LISTED]:
            self._tell(f"task {run.id}", _doing(run, now))
        if row.max < 0:
            yield from self._resting(row, now)
        [(ahead,)] = self._rows("ahead", row.lane, row.max, row.id, MOST)
        if ahead:
            text = f"{several(ahead, 'other due task', MOST)} of its group {'goes' if ahead == 1 else 'go'} first"
            if served and used + ahead >= allowed:
                yield Reason(reason="others first", text=f"{text}, by their max or plan")
            else:
                self._tell("before it", text)

    def _resting(self, row: Any, now: datetime) -> Iterator[Reason]:
        pause = timedelta(milliseconds=-row.max)
        self._tell("pause", f"{span(pause)} after each run of its group (max = {row.max})")
        [(stop,)] = self._rows("rested", row.lane, MOST)
        if stop is not None and (left := moment(stop) + pause - now) > timedelta(0):
            text = f'its group "{row.group}" rests for another {span(left)} after its last run (max = {row.max})'
            yield Reason(reason="resting", text=text)

    def _capped(self, row: Any) -> Iterator[Reason]:
        """What the master may do at most, where we know it."""
        [crowd] = self._rows("crowd", row.id, MOST)
        self._tell(
            "table", f"{several(crowd.runs, 'run')} now; {several(crowd.before, 'due task', MOST)} planned before it"
        )
        if self.caps is None:
            return
        if crowd.runs >= self.caps.run:
            text = f"its table has {several(crowd.runs, 'run')}, and may have {self.caps.run:,} (run)"
            yield Reason(reason="run", text=text, mend="raise run in the configuration, and send HUP to the master")
        elif crowd.workers >= self.caps.workers:
            text = f"all {self.caps.workers:,} workers are busy (workers); those that wait longer get one first"
            yield Reason(
                reason="workers", text=text, mend="raise workers in the configuration, and send HUP to the master"
            )

    def _unwoken(self) -> Iterator[Reason]:
        """Does the master sleep through it?"""
        [row] = self._rows("served")
        fires = row.wake in ("O", "A")
        trigger = "is not there" if row.wake is None else "is disabled"
        enable = f"ALTER TABLE {self.names.task} ENABLE TRIGGER pgtask_wake"
        mend = None if fires or row.wake is None else enable
        if row.asleep:
            missed = "nobody told it of this task" + ("" if fires else f" (trigger pgtask_wake {trigger})")
            again = f"within {span(self.caps.safety)}" if self.caps else "after `safety`"
            yield Reason(reason="asleep", text=f"the master sleeps, and {missed}; it looks again {again}", mend=mend)
        elif not fires:
            every = f"every {span(self.caps.sleep)}" if self.caps else "every `sleep`"
            text = f"no insert wakes the master (trigger pgtask_wake {trigger}): it looks {every}"
            yield Reason(reason="not woken", text=text, mend=mend)

    def _tell_repetition(self, row: Any) -> None:
        if row.cron is not None:
            aligned = "" if row.aligned else "; its first match is yet to be found"
            self._tell("calendar", f"{row.cron} in {row.zone}{aligned}")
        elif row.repeated:
            self._tell("repeated", f"every {row.repeat}")
        if row.count:
            self._tell("count", f"a worker that has run {row.count:,} leaves it to another")
        if row.live:
            self._tell("live", f"a worker older than {span(row.live)} leaves it to another")

    # WAIT

    def _waiting(self, row: Any, *, deep: bool) -> Answer:
        now = moment(row.now)
        unserved = list(self._unserved(now))
        self._tell_repetition(row)
        if row.cron is not None and not row.aligned:
            text = "waits for the master to find the first match of its calendar"
            return self._say(row, ", but ".join([text, *(one.text for one in unserved[:1])]), unserved)
        chain = self._rows("chain", row.id, MOST)
        for one in [one for one in chain if one.direct][:LISTED]:
            self._tell(f"task {one.id}", "removed since it was done" if one.state is None else one.state)
        pending = [one for one in chain if not one.ended]
        direct = [one for one in pending if one.direct]
        failed = [one for one in chain if one.direct and one.ended and one.state in ("FAIL", "GONE", "STOP")]
        if failed and not row.anyway:
            text = f"depends on task {failed[0].id}, which is {failed[0].state}, and will be GONE"
            return self._say(row, text, [Reason(reason="depend", text=text), *unserved])
        if not direct:
            text = "has nothing left to wait for: the master is about to plan it"
            return self._say(row, ", but ".join([text, *(one.text for one in unserved[:1])]), unserved)
        waits_for = f"waits for {_listed(direct)}"
        roots = [one for one in pending if not one.waits]
        reasons = self._roots(roots[:ROOTS]) if deep else []
        text = waits_for
        if reasons:
            text = f"{waits_for}. {reasons[0].text.removesuffix('.')}"
        blocked = [*unserved, *(one for one in reasons if one.reason != "depends on")]
        return self._say(row, text, [*reasons, *unserved], in_the_way=bool(blocked))

    def _roots(self, roots: Sequence[Any]) -> list[Reason]:
        """What the tasks at the other end of the chain say of themselves."""
        kept, reasons = self.facts, []
        for root in roots:
            answer = self.answer(root.id, deep=False)
            name = answer.reasons[0].reason if answer.reasons else "stuck" if answer.in_the_way else "depends on"
            mend = next((one.mend for one in answer.reasons if one.mend), None)
            reasons.append(Reason(reason=name, text=answer.sentence, mend=mend))
        self.facts = kept
        # What is in the way of one of them stands first.
        return sorted(reasons, key=lambda one: one.reason == "depends on")

    # TAKE, WORK

    def _running(self, row: Any) -> Answer:
        now, start = moment(row.now), moment(row.start)
        self._tell("since", f"{clock(start)}, {span(now - start)}")
        sessions = self._rows("session", row.pid, float(row.start)) if row.start and row.pid else []
        if not sessions:
            text = "was being run" if row.state == "WORK" else "was taken"
            [served] = self._rows("served")
            when = "as soon as the master looks (reset)" if served.leads else "when a master serves the table again"
            lost = Reason(reason="lost", text=f"its session {row.pid} is gone; it is put back {when}")
            return self._say(row, f"{text}, but {lost.text}", [lost, *self._unserved(now)])
        if row.state == "TAKE":
            self._tell("taken by", f"session {row.pid}")
            text = f"was taken {span(now - start)} ago, and is about to begin: a worker is on its way to it"
            return self._say(row, text)
        session = sessions[0]
        waits = f", waits for {session.wait_event_type}: {session.wait_event}" if session.wait_event_type else ""
        self._tell("session", f"{row.pid}, {session.state}{waits}")
        self._tell("run", f"{row.attempt}{_and_retries(row)}")
        if row.timeout:
            self._tell(
                "timeout", f"{span(row.timeout)}, {span(max(0.0, row.timeout - (now - start).total_seconds()))} left"
            )
        for percent, message, at in self._rows("reported", row.id, row.attempt):
            self._tell(
                "progress", f"{float(percent):g} %{': ' + message if message else ''}, {span(now - moment(at))} ago"
            )
        blocked = [
            Reason(
                reason="blocked", text=f"it waits for a lock of {_session(one, pid=one.blocker)}", mend=_terminate(one)
            )
            for one in sessions
            if one.blocker is not None
        ]
        where = " on its remote database" if row.remote is not None else ""
        text = f"runs{where} for {span(now - start)} in session {row.pid}"
        return self._say(row, ", but ".join([text, *(one.text for one in blocked[:1])]), blocked)

    # Ended

    def _ended(self, row: Any) -> Answer:
        now = moment(row.now)
        if row.state == "STOP" and row.stop is None and row.pid is not None:
            self._tell("session", str(row.pid))
            return self._say(row, f"was stopped{_by(row)}, and its run is being cancelled", in_the_way=True)
        stop = moment(row.stop) if row.stop is not None else None
        if stop is not None:
            self._tell("ended", f"{clock(stop)}, {span(now - stop)} ago")
        if row.start is not None and stop is not None:
            self._tell("took", span(stop - moment(row.start)))
        if row.attempt:
            self._tell("runs", several(row.attempt, "run") + _and_retries(row))
        retry = f"SELECT {self.names.quoted(self.names.derived('retry'))}({row.id})"
        ended = f" at {clock(stop)}" if stop is not None else ""
        match row.state:
            case "DONE":
                return self._say(row, f"is DONE{ended}")
            case "FAIL":
                text = f"failed{ended}{_code(row)}: {_first_line(row.error)}"
            case "STOP":
                text = f"was stopped{_by(row)}{ended}"
            case _:
                text = f"is GONE{ended}: {_first_line(row.error)}"
        return self._say(row, text, [Reason(reason="ended", text=text, mend=retry)])


def _slots(runs: Sequence[Any]) -> int:
    """Of runs that share a transaction, those of one session have one slot."""
    working = {run.pid for run in runs if run.state != "TAKE"}
    return len(working) + len([run for run in runs if run.state == "TAKE"])


def _doing(run: Any, now: datetime) -> str:
    """A run that has a slot."""
    since = f" for {span(now - moment(run.start))}" if run.start else ""
    if not run.owned:
        return f"{run.state}{since}, but its session {run.pid} is gone"
    waits = f", waits for {run.wait_event_type}: {run.wait_event}" if run.wait_event_type else ""
    return f"{run.state}{since} in session {run.pid}{waits}"


def _session(row: Any, pid: int | None = None) -> str:
    values = {**row._asdict(), "pid": row.pid if pid is None else pid}
    values["state"] = values.get("doing", values.get("state"))
    values.setdefault("gid", None)
    return spoken.session(values)


def _terminate(row: Any) -> str | None:
    gid = getattr(row, "gid", None)
    if gid is not None:
        return f"ROLLBACK PREPARED {literal(gid)}"
    pid = getattr(row, "blocker", row.pid)
    return None if pid is None else f"SELECT pg_terminate_backend({pid})"


def _listed(rows: Sequence[Any]) -> str:
    names = ", ".join(f"{row.id} ({row.state})" for row in rows[:5])
    return f"task{'' if len(rows) == 1 else 's'} {names}{', ...' if len(rows) > 5 else ''}"


def _and_retries(row: Any) -> str:
    return f", {row.retry:,} more allowed after failures" if row.retry else ""


def _code(row: Any) -> str:
    return f" ({row.code})" if row.code else ""


def _by(row: Any) -> str:
    """Who stopped it, as the trigger has noted."""
    text = _first_line(row.error)
    return " " + text.removeprefix("task stopped ") if text.startswith("task stopped by ") else ""


def _first_line(error: str | None) -> str:
    text = (error or "").partition("\n")[0]
    return text.partition(":  ")[2] or text
