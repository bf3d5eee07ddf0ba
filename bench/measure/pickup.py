"""How soon a task starts: after its commit, and after the time it was planned for.

The moments are the server's own. A client sends `BEGIN; INSERT; clock; COMMIT; clock` as one query, so the commit lies
between two readings of the clock that are as far apart as the commit is long. A latency counts from the earlier
one, if not said otherwise: it has the commit's own time in it, and can only be too long.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from measure import bare
from measure.figure import Course, Figure, Outcome, quantile, subject
from measure.ground import Ground, until

GAP = 0.1
INSERT = """BEGIN;
INSERT INTO {} (input{}) VALUES ('SELECT clock_timestamp()'{}) RETURNING id;{}
SELECT extract(epoch FROM clock_timestamp())::float8;
COMMIT;
SELECT extract(epoch FROM clock_timestamp())::float8"""
STARTS = """SELECT id, extract(epoch FROM start)::float8, extract(epoch FROM output::timestamptz)::float8
FROM task WHERE "group" = 'pickup' AND state = 'DONE'"""
LEFT = "SELECT EXISTS (SELECT FROM task WHERE id = ANY (%s) AND state IN ('PLAN', 'TAKE', 'WORK'))"
LOAD_RATE = 1000
POINTS = 300
"""Of a plotted curve."""


@dataclass(kw_only=True)
class Latencies:
    """In milliseconds, of one run: until `start`, the input's first statement, and `after` the COMMIT until `start`."""

    start: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    arguments: tuple[str, ...] = ()
    fork: bool = False  # whether the reference forks, too
    load: bool = False
    plotted: bool = True
    mark_ms: float | None = None


def cases() -> list[Case]:
    nothing = ("--linger", "1ms")
    made = [Case(name="a worker lingers", mark_ms=1.5)]
    for spare, warm in ((0, 0), (0, 1), (1, 0), (1, 1)):
        name = f"no worker, warm {warm}" + (", spare 1" if spare else "")
        mark = 4.5 if (spare, warm) == (0, 1) else None
        arguments = (*nothing, "--spare", str(spare), "--warm", str(warm))
        made.append(Case(name=name, arguments=arguments, fork=True, plotted=not spare, mark_ms=mark))
    made.append(Case(name=f"{LOAD_RATE} tasks/s in other groups", load=True))
    return made


@subject
def pickup(course: Course) -> Outcome:
    """From an INSERT's commit to the task's start and its first statement; one task every 100 ms, 300 of them."""
    outcome = Outcome()
    count = course.size(300, 10)
    chosen = cases()[:1] if course.quick else cases()
    figures = {case.name: _figures(outcome, case) for case in chosen}
    pooled: dict[str, list[float]] = {}
    with course.site.ground("pickup") as ground:
        ground.install()
        bare.create(ground)
        for _ in course.rounds():
            for case in chosen:
                course.say(case.name)
                ours, reference = _measure(ground, case, count, outcome)
                figures[case.name].add(ours, reference)
                if case.plotted:
                    pooled.setdefault(f"pgtask, {case.name}", []).extend(ours.start)
                    pooled.setdefault(f"bare, {case.name}", []).extend(reference.start)
    outcome.curves["latency"] = {name: thinned(values) for name, values in pooled.items()}
    outcome.note(
        "Latencies count from just before COMMIT, whose own time is in them, but where its end is named. The reference "
        "is a session that LISTENs and takes from a bare table, with a fork where ours has no worker; its inserts fall "
        "between ours."
    )
    return outcome


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A case's figures."""

    lines: Sequence[tuple[Figure, str, float]]
    tail: Figure
    longest: Figure

    def add(self, ours: Latencies, reference: Latencies) -> None:
        for figure, what, part in self.lines:
            figure.add(quantile(getattr(ours, what), part), quantile(getattr(reference, what), part))
        self.tail.add(quantile(ours.start, 0.99), quantile(ours.start, 0.5))
        self.longest.add(max(ours.start), max(reference.start))


def _figures(outcome: Outcome, case: Case) -> Lines:
    against = "NOTIFY + take" + (" + fork" if case.fork else "")
    parts = (("start", 0.5), ("start", 0.95), ("start", 0.99), ("first", 0.5), ("first", 0.99), ("after", 0.5))
    names = {"start": "start", "first": "first statement", "after": "COMMIT's end to start"}
    lines = []
    for what, part in parts:
        first = (what, part) == ("start", 0.5)
        name = f"{case.name}: {names[what]}, p{part * 100:.0f}"
        limit = case.mark_ms if first else None
        lines.append(
            (outcome.figure(name, "ms", against=against, better="less", limit=limit, headline=first), what, part)
        )
    mark = None if case.load else 3.0
    tail = outcome.figure(f"{case.name}: start, p99", "ms", against="its own p50", better="less", mark=mark)
    longest = outcome.figure(f"{case.name}: start, longest", "ms", against=against, better="less")
    return Lines(lines=lines, tail=tail, longest=longest)


def _measure(ground: Ground, case: Case, count: int, outcome: Outcome) -> tuple[Latencies, Latencies]:
    ground.own("TRUNCATE task", "TRUNCATE bare")
    with contextlib.ExitStack() as stack:
        stack.enter_context(ground.master(*case.arguments))
        mode = "fork" if case.fork else "-"
        listener = stack.enter_context(bare.running("listen", ground.conninfo, "bare", mode))
        client = stack.enter_context(psycopg.connect(ground.conninfo, autocommit=True))
        loaded = stack.enter_context(_load(ground, outcome)) if case.load else None
        insert(client, "task")  # the first one finds everything cold
        insert(client, "bare")
        time.sleep(0.5)
        commits, bare_commits = {}, {}
        begun = time.monotonic()
        for number in range(count):
            _until(begun + (number + 0.5) * GAP)
            bare_commits.update(commit(client, "bare"))
            _until(begun + (number + 1) * GAP)
            commits.update(commit(client, "task"))
        time.sleep(GAP)
        if loaded is not None:
            loaded()
        # Only ours: what the load has left, if it was too much, is not waited for.
        until(lambda: not ground.value(LEFT, [list(commits)]), "tasks do not end")
        bare.go(listener)
        moments = {int(key): value for key, value in bare.found(listener).items()}
    starts = {key: moment for key, *moment in ground.ask(STARTS)}
    return _since(commits, starts), _since(bare_commits, moments)


def insert(client: psycopg.Connection[Any], table: str) -> dict[int, float]:
    """One task; its id, and the moment before its commit."""
    return {key: before for key, (before, _) in commit(client, table).items()}


def commit(client: psycopg.Connection[Any], table: str) -> dict[int, tuple[float, float]]:
    """One task; its id, and the moments before and after its commit."""
    group = ("", "", " NOTIFY bare;") if table == "bare" else (', "group"', ", 'pickup'", "")
    cursor = client.execute(INSERT.format(table, *group).encode())
    values = []
    while True:
        if cursor.description:
            values.append(cursor.fetchall()[0][0])
        if not cursor.nextset():
            break
    return {int(values[0]): (float(values[1]), float(values[2]))}


@contextlib.contextmanager
def _load(ground: Ground, outcome: Outcome) -> Iterator[Any]:
    """Other tasks go by; call what is yielded to end that."""
    with bare.running("load", ground.conninfo, LOAD_RATE) as process:
        time.sleep(1.0)

        def end() -> None:
            bare.go(process)
            sent = bare.found(process)
            left = ground.value("SELECT count(*) FROM task WHERE state IN ('PLAN', 'TAKE', 'WORK')")
            if left > sent / 100:
                outcome.note(
                    f"under load: when the last of {sent} other tasks was inserted, {left} were still to be done"
                )

        yield end


def _since(commits: dict[int, tuple[float, float]], moments: dict[int, Any]) -> Latencies:
    made = Latencies()
    for key, (before, after) in commits.items():
        start, first = moments[key]
        made.start.append((start - before) * 1000)
        made.first.append((first - before) * 1000)
        made.after.append((start - after) * 1000)
    return made


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def thinned(values: Sequence[float]) -> list[float]:
    """As many as a curve needs, the smallest and the greatest among them."""
    ordered = sorted(values)
    step = max(1, len(ordered) // POINTS)
    return [round(value, 4) for value in [*ordered[::step], ordered[-1]]]


# Planned tasks

LATENESS = """SELECT extract(epoch FROM start - plan)::float8 * 1000 FROM task WHERE "group" <> 'grid' ORDER BY plan"""
GRID = """SELECT count(*), count(*) FILTER (WHERE plan <> (SELECT min(plan) FROM task WHERE "group" = 'grid')
    + interval '1 second' * round(extract(epoch FROM plan - (SELECT min(plan) FROM task WHERE "group" = 'grid')))),
    percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM start - plan)) * 1000,
    max(extract(epoch FROM start - plan))::float8 * 1000
FROM task WHERE "group" = 'grid' AND state = 'DONE'"""
PLANS = """INSERT INTO {} (plan, input{}) SELECT clock_timestamp() + s * interval '1 second', 'SELECT 1'{}
FROM unnest(%s::float8[]) WITH ORDINALITY AS u (s, n)"""


@subject
def plans(course: Course) -> Outcome:
    """How late 2,000 tasks start that are planned over 20 seconds, and whether a 1-second repeat keeps its grid."""
    outcome = Outcome()
    count, seconds = course.size(2000, 50), course.size(20, 2)
    groups = {"one group": "'one'", "ten groups": "'g' || mod(n, 10)"}
    against = "a bare loop that sleeps until the next plan"
    lines = {
        name: [
            *(
                outcome.figure(
                    f"{name}: late, p{part * 100:.0f}", "ms", against=against, better="less", limit=limit, headline=True
                )
                for part, limit in ((0.5, 3), (0.99, 15))
            ),
            outcome.figure(f"{name}: late, most", "ms", against=against, better="less"),
            outcome.figure(f"{name}: of {count}, later than 50 ms", "", against=against, better="less", limit=0),
        ]
        for name in groups
    }
    pooled: dict[str, list[float]] = {}
    with course.site.ground("plans") as ground:
        ground.install()
        bare.create(ground)
        for number in course.rounds():
            moments = bare.planned(count, seconds, number)
            ground.own("TRUNCATE bare")
            with bare.running("timer", ground.conninfo, "bare") as timer:
                ground.ask(PLANS.format("bare", "", ""), [moments])
                bare.go(timer)
                reference = [late * 1000 for late in bare.found(timer)]
            for name, group in groups.items():
                course.say(name)
                ground.own("TRUNCATE task")
                with ground.master():
                    ground.ask(PLANS.format("task", ', "group"', f", {group}"), [moments])
                    time.sleep(seconds + 1.5)
                    ground.drained()
                ours = [late for (late,) in ground.ask(LATENESS)]
                for figure, of in zip(lines[name], (_part(0.5), _part(0.99), max, _late), strict=True):
                    figure.add(of(ours), of(reference))
                pooled.setdefault(f"pgtask, {name}", []).extend(ours)
            pooled.setdefault("bare timer", []).extend(reference)
        _grid(course, ground, outcome)
    outcome.curves["lateness"] = {name: thinned(values) for name, values in pooled.items()}
    outcome.note("Planned at random, so in one group some fall on top of each other and wait: in the reference, too.")
    return outcome


def _grid(course: Course, ground: Ground, outcome: Outcome) -> None:
    seconds = course.size(30, 3)
    kept = outcome.figure(f"repeat of 1 s, {seconds} s: runs off their grid", "", better="less", limit=0, headline=True)
    missed = outcome.figure("repeat of 1 s: runs missed", "", better="less", limit=0)
    usual = outcome.figure("repeat of 1 s: late, p50", "ms", better="less")
    most = outcome.figure("repeat of 1 s: late, most", "ms", better="less")
    course.say("the grid of a repeated task")
    ground.own("TRUNCATE task")
    with ground.master():
        ground.own("""INSERT INTO task (input, repeat, "group") VALUES ('SELECT 1', '1 second', 'grid')""")
        time.sleep(seconds + 0.5)
        ground.own("""UPDATE task SET state = 'STOP' WHERE "group" = 'grid' AND state = 'PLAN'""")
    runs, off, middle, longest = ground.ask(GRID)[0]
    kept.add(off)
    missed.add(max(0, seconds + 1 - runs))
    usual.add(middle)
    most.add(longest)


def _part(part: float) -> Any:
    return lambda values: quantile(values, part)


def _late(values: Sequence[float]) -> float:
    return float(sum(value > 50 for value in values))
