"""Many of everything: groups, workers and tables."""

import json
import time
from collections.abc import Sequence
from statistics import median

from measure import bare, tasks
from measure.figure import Course, Outcome, quantile, subject
from measure.ground import Ground, Usage, pss, until
from measure.tasks import Work

WORKING = "SELECT count(*) FROM task WHERE state = 'WORK'"


@subject
def many(course: Course) -> Outcome:
    """1,000 groups with a task each; 100 workers at once and their memory; 20 tables on one master."""
    outcome = Outcome()
    with course.site.ground("many") as ground:
        ground.install()
        bare.create(ground)
        _groups(course, ground, outcome)
        _workers(course, ground, outcome)
        _tables(course, ground, outcome)
    outcome.note(
        "The loop's lag: how late a 5 ms timer in the master's own loop is; the reference, in an idle loop meanwhile."
    )
    outcome.note("PSS: what a process has alone, and its part of what it shares with others.")
    return outcome


def _groups(course: Course, ground: Ground, outcome: Outcome) -> None:
    count = course.size(1000, 50)
    work = Work(count=count, columns='"group"', values="'g' || n")
    figure = outcome.figure(f"{count} groups with a task each", "tasks/s", against="16 bare loops", headline=True)
    for _ in course.rounds():
        reference = tasks.loops(ground, work, 16)
        with ground.master():
            figure.add(tasks.ours(ground, work), reference)


def _workers(course: Course, ground: Ground, outcome: Outcome) -> None:
    count = course.size(100, 4)
    started = outcome.figure(f"{count} workers: until all run", "s", better="less")
    memory = outcome.figure(
        f"{count} workers: memory of each (PSS)",
        "MB",
        against="a forked Python with a session",
        better="less",
        headline=True,
    )
    whole = outcome.figure(f"{count} workers: master's memory (PSS)", "MB", better="less")
    for _ in course.rounds():
        with bare.running("forks", ground.conninfo, count) as forks:
            bare.go(forks)
            reference = median(pss(pid) for pid in bare.found(forks))
            bare.go(forks)
        ground.own("TRUNCATE task")
        with ground.master("--workers", str(count), "--stop-timeout", "1ms") as master:
            begun = time.monotonic()
            sleeps = Work(count=count, input="SELECT pg_sleep(600)", columns='"group"', values="'g' || n")
            ground.own(sleeps.insert("task", sleeps.columns, sleeps.values))
            until(lambda: ground.value(WORKING) == count, f"{count} workers do not run at once")
            started.add(time.monotonic() - begun)
            memory.add(median(pss(pid) for pid in master.workers()), reference)
            whole.add(pss(master.pid))
    ground.own("TRUNCATE task")


CASES: Sequence[tuple[str, str, float]] = (
    ("asleep", "true", 0.0),
    ("20 tasks a second each", "true", 20.0),
    ("polling (wake = false)", "false", 0.0),
)
"""How busy the tables are: name, `wake`, tasks a second and table."""


def _tables(course: Course, ground: Ground, outcome: Outcome) -> None:
    count, seconds = course.size(20, 3), course.size(10, 1)
    names = [f"task{number}" for number in range(count)]
    config = ground.site.directory / "tables.toml"
    lines = {
        name: (
            outcome.figure(
                f"{count} tables, sleep 1 ms, {name}: loop's lag, p99", "ms", against="an idle loop", better="less"
            ),
            outcome.figure(
                f"{count} tables, sleep 1 ms, {name}: loop's lag, most",
                "ms",
                against="an idle loop",
                better="less",
                limit=10,
            ),
            outcome.figure(
                f"{count} tables, sleep 1 ms, {name}: master's CPU", "%", better="less", limit=50, headline=True
            ),
        )
        for name, _, _ in CASES
    }
    for _ in course.rounds():
        for name, wake, rate in CASES:
            course.say(name)
            config.write_text(_config(ground, names, wake), "utf-8")
            file = ground.site.directory / "lag.json"
            program = ("-m", "measure.lag", str(file))
            sleeps = wake == "true"
            with ground.master("--config", str(config), table=names[-1], program=program, sleeps=sleeps) as master:
                time.sleep(1.0)
                # At the same time: whatever else the machine does then delays both.
                with bare.running("ticks", "-") as loop:
                    before = Usage.of(master.pid)
                    begun = time.monotonic()
                    _feed(ground, names, seconds, rate)
                    ended = time.monotonic()
                    cpu = Usage.of(master.pid).since(before).cpu / (ended - begun)
                    bare.go(loop)
                    idle = bare.found(loop)
            ticks: list[tuple[float, float]] = json.loads(file.read_text("utf-8"))
            late = [late for moment, late in ticks if begun <= moment <= ended]
            lines[name][0].add(quantile(late, 0.99) * 1000, quantile(idle, 0.99) * 1000)
            lines[name][1].add(max(late) * 1000, max(idle) * 1000)
            lines[name][2].add(cpu * 100)


def _config(ground: Ground, names: Sequence[str], wake: str) -> str:
    """With places for a worker of each table: with fewer, every task ends one and forks another."""
    tables = (
        f'[[database]]\nconninfo = {json.dumps(ground.conninfo)}\ntable = "{name}"\nsleep = "1 ms"\nwake = {wake}\n'
        for name in names
    )
    return "\n".join([f"[master]\nworkers = {2 * len(names)}\n", *tables])


def _feed(ground: Ground, names: Sequence[str], seconds: float, rate: float) -> None:
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        if rate:
            for name in names:
                ground.ask(f"INSERT INTO {name} (input) VALUES ('SELECT 1')")
            time.sleep(max(0.0, now + 1 / rate - time.monotonic()))
        else:
            time.sleep(end - now)
