"""Whether the cost of a task depends on what lies in the table.

Tables of the same database are filled with rows of each kind, and tasks are measured there in turns with an empty
table. What a statement costs is the server's own word: log_min_duration_statement = 0 for the sessions of that master;
each logged statement is known by its text.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import psycopg

from measure import pickup, tasks
from measure.figure import Course, Figure, Outcome, subject
from measure.ground import Ground
from measure.tasks import Work
from pgtask.objects import Names
from storm.stand import Broken

SPENT = re.compile(r"LOG:  duration: ([\d.]+) ms  (parse|bind|execute|statement)[^:]*: (.*)", re.DOTALL)
QUICKLY = ("--stop-timeout", "1ms")
HOT = {
    "find": ("find", "take_one"),
    "take": ("take", "glance"),
    "next": ("next", "next_below", "next_after"),
}
"""What finds a task that comes alone, what takes several, and a group's next one: by which statements."""

PAUSE = 0.03

FINISHED = """INSERT INTO {0} (plan, start, stop, state, pid, attempt, input, output, "group")
SELECT now() - n * interval '1 ms', now(), now(), 'DONE', 1, 1, 'SELECT 1', '1', 'done'
FROM generate_series(1, {1}) AS n"""
FUTURE = """INSERT INTO {0} (plan, input, "group")
SELECT now() + interval '1 day' + n * interval '1 ms', 'SELECT 1', {2} FROM generate_series(1, {1}) AS n"""
FULL = """INSERT INTO {0} (plan, input, "group", active)
SELECT now() - interval '1 hour' + n * interval '1 ms', 'SELECT 1', 'full', '1 year'
FROM generate_series(1, {1}) AS n"""
PAIR = """INSERT INTO {0} (input, "group") VALUES ('SELECT 1', 'one'), ('SELECT 1', 'other')"""
BLOCK = """INSERT INTO {0} (plan, input, "group", active)
VALUES (now() - interval '1 day', 'SELECT pg_sleep(86400)', 'full', '1 year')"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a table is full of."""

    name: str
    table: str
    fills: Sequence[str]
    full: bool = False  # one of its groups is


KINDS = (
    Kind(name="finished", table="task_finished", fills=[FINISHED]),
    Kind(name="planned for later, one group", table="task_future", fills=[FUTURE.replace("{2}", "'later'")]),
    Kind(
        name="planned for later, 100,000 groups",
        table="task_groups",
        fills=[FUTURE.replace("{2}", "'later ' || n % 100000")],
    ),
    Kind(name="due in a full group", table="task_full", fills=[FULL], full=True),
    Kind(
        name="all of these",
        table="task_all",
        fills=[FINISHED, FUTURE.replace("{2}", "'later ' || n % 100000"), FULL],
        full=True,
    ),
)


@dataclass(kw_only=True)
class Cost:
    """Of one table: tasks a second; ms until a start; ms in the server for a statement, and for all of a task's."""

    rate: float
    start: float
    statements: Mapping[str, float] = field(default_factory=dict)
    task: float = 0.0


@subject
def flat(course: Course) -> Outcome:
    """What a task costs beside a million rows: finished, planned, or due in a full group; against an empty table."""
    outcome = Outcome()
    sizes = (1000,) if course.quick else (10_000, 100_000, 1_000_000)
    curves: dict[str, list[tuple[int, float]]] = {}
    with course.site.ground("flat") as ground:
        ground.install("task", *(kind.table for kind in KINDS))
        for kind in KINDS[-1:] if course.quick else KINDS:
            if kind.full:
                ground.own(BLOCK.format(kind.table))
            there = 0
            for size in sizes:
                course.say(f"filling: {size:,} rows {kind.name}")
                _fill(ground, kind, size - there)
                there = size
                figures = _figures(outcome, kind, size) if size == sizes[-1] else {}
                costs = []
                for number in range(course.runs if figures else 1):
                    course.say(f"{size:,} rows {kind.name}, run {number + 1}")
                    empty = _cost(course, ground, "task")
                    there_too = _cost(course, ground, kind.table)
                    costs.append((empty, there_too))
                    _add(figures, there_too, empty)
                if course.site.server is not None:
                    line = curves.setdefault(kind.name, [(0, median(one.statements["take"] for one, _ in costs))])
                    line.append((size, median(one.statements["take"] for _, one in costs)))
            ground.own(f"DROP TABLE {kind.table} CASCADE")
    outcome.curves["take"] = curves
    outcome.note(
        '"all of these" has as many rows of each kind: finished, planned in 100,000 groups, due in a full group.'
    )
    return outcome


def _figures(outcome: Outcome, kind: Kind, size: int) -> dict[str, Figure]:
    name = f"{size:,} {kind.name}"
    against = "the empty table"
    return {
        "rate": outcome.figure(f"{name}: backlog", "tasks/s", against=against, mark=1 / 1.3),
        "start": outcome.figure(f"{name}: start, p50", "ms", against=against, better="less", mark=1.3, headline=True),
        "task": outcome.figure(f"{name}: all statements of a start", "ms", against=against, better="less", mark=1.3),
        **{
            hot: outcome.figure(f"{name}: {hot}, in the server", "ms", against=against, better="less", mark=1.3)
            for hot in HOT
        },
    }


def _add(figures: Mapping[str, Figure], there: Cost, empty: Cost) -> None:
    for name, figure in figures.items():
        if name not in HOT:
            figure.add(getattr(there, name), getattr(empty, name))
        elif there.statements:
            figure.add(there.statements[name], empty.statements[name])


def _fill(ground: Ground, kind: Kind, rows: int) -> None:
    ground.ask("SET session_replication_role = replica")  # the triggers are another subject's
    for fill in kind.fills:
        ground.ask(fill.format(kind.table, rows))
    ground.ask("RESET session_replication_role")
    ground.ask(f"VACUUM ANALYZE {kind.table}")


def _cost(course: Course, ground: Ground, table: str) -> Cost:
    last = ground.value(f"SELECT coalesce(max(id), 0) FROM {table}")
    with ground.master(*QUICKLY, table=table):
        starts = _starts(ground, table, course.size(50, 5))
        made = Cost(rate=_rate(ground, table, course.size(2000, 100)), start=median(starts))
    with ground.logged("log_min_duration_statement", "0") as records:
        with ground.master(*QUICKLY, table=table):
            before = len(records())
            count = len(_starts(ground, table, course.size(30, 5)))
            alone = records()[before:]
            _pairs(ground, table, course.size(30, 5))
            together = records()[before + len(alone) :]
        if ground.site.server is not None:  # another's log is not ours to read
            made.task = sum(float(said[1]) for said in said_in(alone)) / count
            made.statements = durations(together, table, "take", "next") | durations(alone, table, "find")
    ground.own(f"DELETE FROM {table} WHERE id > {last}")
    ground.ask(f"VACUUM {table}")
    return made


def _starts(ground: Ground, table: str, count: int) -> list[float]:
    """Milliseconds from commit to start, of tasks into groups of their own."""
    with psycopg.connect(ground.conninfo, autocommit=True) as client:
        commits: dict[int, float] = {}
        for number in range(count + 1):
            commits.update(pickup.insert(client, table))
            if number == 0:
                time.sleep(0.3)
                commits.clear()  # the first one finds everything cold
            time.sleep(PAUSE)
    ids = list(commits)
    ground.drained(table, after=min(ids) - 1)
    query = f"SELECT id, extract(epoch FROM start)::float8 FROM {table} WHERE id = ANY (%s)"
    return [(start - commits[key]) * 1000 for key, start in ground.ask(query, [ids])]


def _rate(ground: Ground, table: str, count: int) -> float:
    last = ground.value(f"SELECT max(id) FROM {table}")
    work = Work(count=count, columns='"group"', values="'backlog'")
    ground.own(work.insert(table, work.columns, work.values))
    ground.drained(table, after=last)
    return tasks.rate(ground, table, work, after=last)


def _pairs(ground: Ground, table: str, count: int) -> None:
    """Two tasks at once, which the master takes."""
    last = ground.value(f"SELECT max(id) FROM {table}")
    for _ in range(count):
        ground.own(PAIR.format(table))
        time.sleep(PAUSE)
    ground.drained(table, after=last)


def durations(records: Sequence[str], table: str, *names: str) -> dict[str, float]:
    """What these of HOT cost, in milliseconds. Raises Broken for what is not in the records."""
    store = Names(schema="public", table=table).store()
    known = [(name, store.text(statement)) for name in names for statement in HOT[name]]
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for said in said_in(records):
        for name, text in known:
            if said[3].startswith(text):
                times[name][said[2]].append(float(said[1]))
    if missing := [name for name in names if not times[name].keys() & {"bind", "execute"}]:
        raise Broken(f"not in the server's log: {', '.join(missing)}")
    # What is planned anew is planned when it is bound.
    return {
        name: sum(median(kinds[kind]) for kind in ("bind", "execute") if kinds[kind]) for name, kinds in times.items()
    }


def said_in(records: Sequence[str]) -> Iterator[re.Match[str]]:
    """Duration, kind and text of each statement that is not the client's."""
    for record in records:
        said = SPENT.match(record)
        if said is not None and not said[3].startswith(("BEGIN;\nINSERT", "INSERT INTO task")):
            yield said
