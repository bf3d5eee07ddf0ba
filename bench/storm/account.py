"""The account of a scenario: what clients were told, against the rows and the ledger that are there at the end.

Nothing here trusts the task table alone. A task of an atomic kind has run exactly once if its row says so (or is gone,
as a silent one's must be) and the ledger of its database has exactly one entry of its; a failed one left none.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from storm.clients import Answer, Insert
from storm.kinds import REMOTE_LOST, Kind, Promise
from storm.scenarios import Strike
from storm.stand import Stand

ROWS = r"""SELECT id, parent, data, state::text, attempt, code,
    regexp_replace(split_part(error, chr(10), 1), '^\w+:  ', ''),
    extract(epoch FROM start)::float8, extract(epoch FROM stop)::float8
FROM task ORDER BY id"""
ENTRIES = "SELECT key, id, pid, extract(epoch FROM at)::float8 FROM ledger ORDER BY at"
UNFINISHED = "SELECT count(*) FROM task WHERE state IN ('PLAN', 'TAKE', 'WORK')"
END_REPEATS = "UPDATE task SET state = 'STOP' WHERE state = 'PLAN' AND repeat > interval '0'"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A task as the table has it; moments in seconds of the server's clock, which is ours."""

    id: int
    parent: int | None
    key: str
    state: str
    attempt: int
    code: str | None
    error: str | None
    start: float | None
    stop: float | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run's line in the ledger."""

    key: str
    id: int
    pid: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that is known at the end of a scenario."""

    inserts: Sequence[Insert]
    rows: Sequence[Row]
    entries: Sequence[Entry]
    strikes: Sequence[Strike]


@dataclass(kw_only=True)
class Account:
    """What came out. Every task that is in is done, failed or lost; `wrong` says what must not be."""

    scenario: str
    faults: int = 0
    done: int = 0
    meant: Counter[str] = field(default_factory=Counter)  # failures that had to come, by reason
    unmeant: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    twice: Counter[str] = field(default_factory=Counter)  # by what was promised
    unknown: int = 0  # commits without an answer
    unknown_in: int = 0  # of these, tasks that turned out to be in
    recoveries: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> int:
        return self.done + self.meant.total() + self.unmeant.total() + self.lost

    @property
    def median(self) -> float | None:
        return median(self.recoveries) if self.recoveries else None

    @property
    def longest(self) -> float | None:
        return max(self.recoveries, default=None)


def read(stand: Stand, inserts: Sequence[Insert], strikes: Sequence[Strike]) -> Found:
    """Both ledgers and the whole table, as a superuser, so that nothing can be hidden."""
    names = list(Row.__annotations__)
    entries = stand.ask(ENTRIES) + stand.ask(ENTRIES, dbname=f"{stand.name}_other")
    return Found(
        inserts=inserts,
        rows=[Row(**_named(names, row)) for row in stand.ask(ROWS)],
        entries=[Entry(**_named(list(Entry.__annotations__), entry)) for entry in entries],
        strikes=strikes,
    )


def settled(stand: Stand) -> bool:
    """Whether everything has ended; on the way what repeats itself is told to stop."""
    stand.ask(END_REPEATS)
    return stand.ask(UNFINISHED) == [(0,)]


def account(scenario: str, found: Found) -> Account:
    made = Account(scenario=scenario, faults=len(found.strikes), recoveries=_recoveries(found))
    rows: dict[str, list[Row]] = defaultdict(list)
    entries: dict[str, list[Entry]] = defaultdict(list)
    for row in found.rows:
        rows[row.key].append(row)
    for entry in found.entries:
        entries[entry.key].append(entry)
    for insert in found.inserts:
        _judge_insert(made, insert, rows.pop(insert.key, []), entries.pop(insert.key, []))
    made.wrong += [f"nobody inserted the task of {row}" for row in [*rows.values(), *entries.values()]]
    return made


def _judge_insert(made: Account, insert: Insert, rows: list[Row], entries: list[Entry]) -> None:
    made.unknown += insert.answer is Answer.UNKNOWN
    if insert.answer is Answer.NEVER:
        if rows or entries:
            made.wrong.append(f"never committed, and yet there: {insert.key}: {rows} {entries}")
        return
    if insert.answer is Answer.UNKNOWN:
        if not rows and not entries:
            return
        made.unknown_in += 1
    if insert.kind.repeated:
        _judge_chain(made, insert, rows, entries)
    elif len(rows) > 1 or {entry.id for entry in entries} - {insert.id}:
        made.wrong.append(f"one insert, several tasks: {insert}: {rows} {entries}")
    else:
        _judge(made, insert.kind, insert.key, rows[0] if rows else None, entries)


def _judge(made: Account, kind: Kind, key: str, row: Row | None, entries: list[Entry]) -> None:
    what = f"{kind.name} task {key}: {row}, ledger {entries}"
    if row is None and not (kind.silent and entries):
        _lost(made, f"lost: {what}")
    elif row is not None and row.state == "FAIL":
        _judge_failure(made, kind, row, entries, what)
    elif row is not None and row.state != "DONE":
        _lost(made, f"not finished: {what}")
    elif not entries:
        _lost(made, f"done without its work: {what}")
    else:
        made.done += 1
        if kind.code is not None:
            made.wrong.append(f"done, but it must fail: {what}")
        if len(entries) > 1:
            _twice(made, kind.promise, what)


def _judge_failure(made: Account, kind: Kind, row: Row, entries: list[Entry], what: str) -> None:
    reason = f"{row.code} {row.error}"
    if kind.promise is Promise.ATOMIC and entries:
        made.wrong.append(f"failed, and yet its work is there: {what}")
    if row.code == kind.code or (kind.promise is Promise.REMOTE and row.code in REMOTE_LOST):
        made.meant[reason] += 1
    else:
        made.unmeant[reason] += 1
        made.wrong.append(f"failed: {what}")


def _judge_chain(made: Account, insert: Insert, rows: list[Row], entries: list[Entry]) -> None:
    """A repeated task: each row of it is a task, and each that ran made the next one; we stopped the last."""
    runs: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        runs[entry.id].append(entry)
    children = Counter(row.parent for row in rows)
    if not rows:
        _lost(made, f"lost: {insert}: ledger {entries}")
    for row in rows:
        own = runs.pop(row.id, [])
        if row.state == "STOP":
            if own:
                made.wrong.append(f"stopped before it ran, and yet its work is there: {row}, ledger {own}")
            continue
        _judge(made, insert.kind, insert.key, row, own)
        if not children[row.id]:
            _lost(made, f"its repetition is lost: {row}")
        if children[row.id] > 1:
            _twice(made, Promise.ATOMIC, f"repeated twice: {row}")
    if runs:
        made.wrong.append(f"repeated runs without a row: {insert}: {dict(runs)}")


def _lost(made: Account, what: str) -> None:
    made.lost += 1
    made.wrong.append(what)


def _twice(made: Account, promise: Promise, what: str) -> None:
    made.twice[promise.value] += 1
    if promise is Promise.ATOMIC:
        made.wrong.append(f"ran twice: {what}")


def _recoveries(found: Found) -> list[float]:
    """For each fault the seconds to the first finish of a run that began after it: runs that survived prove nothing."""
    ended = sorted((row.start, row.stop) for row in found.rows if row.start is not None and row.stop is not None)
    starts = [start for start, _ in ended]
    firsts: list[float] = []
    for _, stop in reversed(ended):
        firsts.append(min(stop, firsts[-1]) if firsts else stop)
    firsts.reverse()
    places = [(strike.at, bisect_right(starts, strike.at)) for strike in found.strikes]
    return [firsts[place] - at for at, place in places if place < len(firsts)]


def _named(names: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))
