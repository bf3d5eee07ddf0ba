"""Whether tasks start later while a million finished rows are removed.

A client inserts a task every 50 ms: before, in the full table that nobody clears; during, by a master that keeps rows
for an hour, until all have gone; and after. What finding the task costs is the server's own word, as in flat.py.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import psycopg

from measure import pickup
from measure.figure import Course, Figure, Outcome, quantile, subject
from measure.flat import QUICKLY, durations
from measure.ground import Ground, said, until
from storm.stand import Master

GAP = 0.05
FINISHED = """INSERT INTO task (plan, start, stop, state, pid, attempt, input, output, "group")
SELECT old, old, old, 'DONE', 1, 1, 'SELECT 1', '1', 'history'
FROM generate_series(1, {}) AS n, LATERAL (SELECT now() - interval '1 day' - n * interval '1 ms' AS old) AS o"""
STARTS = """SELECT id, extract(epoch FROM start)::float8 FROM task WHERE id = ANY (%s)"""
LONGEST = 600.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one phase: milliseconds from commit to start of each task, and in the server of what finds it; its seconds."""

    starts: list[float]
    find: float | None
    seconds: float


@subject
def history(course: Course) -> Outcome:
    """Tasks that start while a million finished rows are removed, against before and after."""
    outcome = Outcome()
    rows, tasks = course.size(1_000_000, 3000), course.size(400, 10)
    figures = _figures(outcome, rows)
    with course.site.ground("history") as ground:
        ground.install()
        for number in course.rounds():
            course.say(f"filling: {rows:,} finished rows, run {number + 1}")
            _fill(ground, rows)
            before = _phase(ground, (), lambda count, _: count < tasks)
            during = _phase(ground, ("--keep", "1 hour"), lambda _, master: "history_removed" not in said(master))
            ground.ask("VACUUM task")
            after = _phase(ground, ("--keep", "1 hour"), lambda count, _: count < tasks)
            figures["removed"].add(rows / during.seconds)
            for name, seen in (("during", during), ("after", after)):
                _add(figures, name, seen, before)
    return outcome


def _figures(outcome: Outcome, rows: int) -> Mapping[str, Figure]:
    figures = {"removed": outcome.figure(f"{rows:,} finished rows: removed", "rows/s", headline=True)}
    for name in ("during", "after"):
        for what, unit, mark in (
            ("start, p50", "ms", 1.3),
            ("start, p99", "ms", None),
            ("find, in the server", "ms", 1.3),
        ):
            figures[f"{name} {what}"] = outcome.figure(
                f"{name} the removal: {what}",
                unit,
                against="before it",
                better="less",
                mark=mark,
                headline=what != "start, p99",
            )
    return figures


def _add(figures: Mapping[str, Figure], name: str, seen: Seen, before: Seen) -> None:
    figures[f"{name} start, p50"].add(median(seen.starts), median(before.starts))
    figures[f"{name} start, p99"].add(quantile(seen.starts, 0.99), quantile(before.starts, 0.99))
    if seen.find is not None and before.find is not None:
        figures[f"{name} find, in the server"].add(seen.find, before.find)


def _fill(ground: Ground, rows: int) -> None:
    ground.own("TRUNCATE task")
    ground.ask("SET session_replication_role = replica")  # the triggers are another subject's
    ground.ask(FINISHED.format(rows))
    ground.ask("RESET session_replication_role")
    ground.ask("VACUUM ANALYZE task")
    ground.ask("CHECKPOINT")


def _phase(ground: Ground, arguments: tuple[str, ...], more: Callable[[int, Master], bool]) -> Seen:
    """Tasks one by one for as long as there shall be `more` after so many; that master is asked, too."""
    commits: dict[int, float] = {}
    with ground.logged("log_min_duration_statement", "0") as records:
        with (
            ground.master(*QUICKLY, *arguments, sleeps=False) as master,
            psycopg.connect(ground.conninfo, autocommit=True) as client,
        ):
            since = time.monotonic()
            while more(len(commits), master) and time.monotonic() - since < LONGEST:
                commits.update(pickup.insert(client, "task"))
                time.sleep(GAP)
            seconds = time.monotonic() - since
            until(lambda: not ground.value(pickup.LEFT, [list(commits)]), "tasks do not end")
        found = records()
    starts = [(start - commits[id]) * 1000 for id, start in ground.ask(STARTS, [list(commits)])]
    found_by = durations(found, "task", "find")["find"] if ground.site.server is not None else None
    return Seen(starts=starts[1:], find=found_by, seconds=seconds)
