"""Tasks a second with a backlog: ours against bare loops, one and as many as there are workers; held: the same while
an old snapshot keeps the server from forgetting what is gone."""

from dataclasses import dataclass

import psycopg

from measure import bare, tasks
from measure.figure import Course, Figure, Outcome, subject
from measure.ground import Ground
from measure.tasks import Work

LOG = "CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, note text, at timestamptz DEFAULT now())"
WRITE = "INSERT INTO log (note) VALUES (''done'')"
BATCH = 50
ONE, MANY = "one group, max 3", "100 groups, workers 4"


@dataclass(frozen=True, kw_only=True)
class Case:
    """`workers` is how many run at once, and so how many bare loops there are; `arguments` are the master's."""

    name: str
    work: Work
    workers: int
    arguments: tuple[str, ...] = ()
    marks: tuple[float | None, float | None] = (None, None)  # against one loop, against as many
    within: bool = False  # also against as many loops that work on our table


def cases(count: int) -> list[Case]:
    groups = {"columns": '"group"', "values": "'g' || n % 100"}
    return [
        Case(name="one group, max 0", work=Work(count=count), workers=1, marks=(0.75, None), within=True),
        Case(name="one group, max 1", work=Work(count=count, columns="max", values="1"), workers=2),
        Case(name=ONE, work=Work(count=count, columns="max", values="3"), workers=4, marks=(None, 0.75), within=True),
        Case(name=MANY, work=Work(count=count, **groups), workers=4, arguments=("--workers", "4")),
        Case(name="100 groups, workers 16 (default)", work=Work(count=count, **groups), workers=16),
        Case(name="one group, each writes a row", work=Work(count=count, input=WRITE, output="INSERT 0 1"), workers=1),
        Case(
            name="one group, 1 ms tasks",
            work=Work(count=max(1, count // 4), input="SELECT 1 FROM pg_sleep(0.001)"),
            workers=1,
        ),
        Case(
            name=f"one group, max 0, batch {BATCH}",
            work=Work(count=count, columns="batch", values=str(BATCH)),
            workers=1,
            marks=(2.2, None),
        ),
        Case(
            name=f"one group, max 3, batch {BATCH}",
            work=Work(count=count, columns="max, batch", values=f"3, {BATCH}"),
            workers=4,
        ),
    ]


@subject
def throughput(course: Course) -> Outcome:
    """Tasks a second of a backlog of 10,000 (SELECT 1 with its output kept), in one group and in a hundred."""
    outcome = Outcome()
    chosen = cases(course.size(10_000, 200))
    with course.site.ground("throughput") as ground:
        ground.install()
        ground.own(LOG)
        bare.create(ground)
        if course.quick:
            chosen = chosen[:2]
        figures = {case.name: _figures(outcome, case) for case in chosen}
        spread = outcome.figure(MANY, "tasks/s", against=f"ours, {ONE}", mark=1.0)
        for _ in course.rounds():
            rates: dict[str, float] = {}
            for case in chosen:
                course.say(case.name)
                plain = Work(count=case.work.count, input=case.work.input, output=case.work.output)
                loops = [tasks.loops(ground, plain, many) for many in sorted({1, case.workers})]
                if case.within:
                    loops.append(tasks.loops(ground, plain, case.workers, table="task"))
                with ground.master(*case.arguments):
                    ours = rates[case.name] = tasks.ours(ground, case.work)
                for figure, reference in zip(figures[case.name], loops, strict=True):
                    figure.add(ours, reference)
            if MANY in rates:
                spread.add(rates[MANY], rates[ONE])
    outcome.note("Rate: tasks / (last stop - first start), by the table, if every one is DONE once with its output.")
    return outcome


def _figures(outcome: Outcome, case: Case) -> list[Figure]:
    made = []
    for many in sorted({1, case.workers}):
        who = "one bare loop" if many == 1 else f"{many} bare loops"
        mark = case.marks[0] if many == 1 else case.marks[1]
        made.append(outcome.figure(case.name, "tasks/s", against=who, mark=mark, headline=many == case.workers))
    if case.within:
        made.append(outcome.figure(case.name, "tasks/s", against=f"{who}, on our table", headline=True))
    return made


@subject
def held(course: Course) -> Outcome:
    """Tasks a second while 100,000 go by under a snapshot that is never let go, against the same without it."""
    outcome = Outcome()
    work = Work(count=course.size(100_000, 500), columns="max", values="3")
    against = "ours, without the snapshot"
    figure = outcome.figure("4 workers, a snapshot held", "tasks/s", against=against, mark=0.85, headline=True)
    last = outcome.figure("of these the last tenth", "tasks/s", against=against, mark=0.85)
    with course.site.ground("held") as ground:
        ground.install()
        for _ in course.rounds():
            without = _held(course, ground, work, hold=False)
            with_it = _held(course, ground, work, hold=True)
            figure.add(with_it[0], without[0])
            last.add(with_it[1], without[1])
    return outcome


LAST_TENTH = """SELECT count(*) / extract(epoch FROM max(stop) - min(stop))::float8
FROM (SELECT stop FROM task ORDER BY stop DESC LIMIT %s) AS t"""


def _held(course: Course, ground: Ground, work: Work, hold: bool) -> tuple[float, float]:
    course.say("with a snapshot held" if hold else "without")
    # A new table each time: what a run left behind must not be the next one's trouble.
    ground.own("TRUNCATE task")
    with ground.master(), psycopg.connect(ground.conninfo) as old:
        if hold:
            # After the last use of TRUNCATE: it would wait for us.
            ground.settle()
            old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            old.execute("SELECT txid_current(), count(*) FROM task")
        rate = tasks.ours(ground, work, empty=False)
        return rate, float(ground.value(LAST_TENTH, [work.count // 10]))
