"""The benchmark: every figure beside a reference that was measured in turns with it, on the same server.

It starts a PostgreSQL server of its own with durable commits, real masters and real clients. What is measured stands in
`measure/`, a function a subject; other queues stand in `peers/`.
"""

import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click
import psycopg
from rich.console import Console
from rich.table import Table

import peers.race
from measure import crowd, flat, history, inserts, pickup, report, rest, throughput, triggers
from measure.figure import SUBJECTS, Course, explained
from measure.ground import Site
from pgtask.embedded import ServerError, find
from pgtask.errors import UserError
from storm.stand import Broken

MODULES = (throughput, pickup, rest, flat, history, inserts, triggers, crowd, peers.race)
"""Importing them makes their subjects known."""

WIDTH = 150
"""Of a table in a file."""

ROOT = Path(__file__).resolve().parent.parent
HELP = "\n\n".join(["Subjects:", *(f"{name}: {doc}" for name, doc in explained(report.ORDER).items())])


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=HELP)
@click.argument("subjects", nargs=-1, type=click.Choice(report.ORDER), metavar="[SUBJECT...]")
@click.option("--pg", type=int, metavar="VERSION", help="Major version of the server; by default the wheel's newest.")
@click.option("--dsn", help="A server of yours instead, as a superuser: each subject makes and drops a database there.")
@click.option(
    "--runs",
    type=click.IntRange(1),
    help="How often each figure is measured; the median counts. [default: 5; quick: 1]",
)
@click.option("--quick", is_flag=True, help="Few and small: tries the program out, and measures nothing.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to this file, too."
)
@click.option(
    "--publish",
    is_flag=True,
    help="Put the result into bench/results.json, draw bench/plots, and renew the tables of the docs.",
)
def main(
    subjects: Sequence[str],
    pg: int | None,
    dsn: str | None,
    runs: int | None,
    quick: bool,
    file: Path | None,
    publish: bool,
) -> None:
    """Measure pgtask; by default all subjects.

    Every figure is a median, and has a reference that was measured in the same run on the same server.
    """
    _leave_by_the_door()
    try:
        binaries = None if dsn else find(pg)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    if pg is not None and dsn is not None:
        raise click.UsageError("--pg picks one of our servers, --dsn names yours: give one of them")
    if quick and publish:
        raise click.UsageError("--quick measures nothing that could be published")
    show = Show(
        names=list(dict.fromkeys(subjects)) or list(report.ORDER), runs=runs or (1 if quick else 5), quick=quick
    )
    try:
        with Site(binaries, dsn) as site:
            show.measure(site)
    except KeyboardInterrupt:
        show.trouble = "interrupted"
    except (Broken, ServerError, psycopg.Error) as error:
        show.trouble = f"cannot go on: {error}"
    show.write(file, publish)
    if show.trouble:
        click.echo(show.trouble, err=True)
        sys.exit(1)


class Show:
    """Subject after subject; what is there is printed and written even if the next one fails."""

    def __init__(self, *, names: Sequence[str], runs: int, quick: bool) -> None:
        self.names = names
        self.runs = runs
        self.quick = quick
        self.trouble = ""
        self.told: dict[str, object] = {}
        self.done: dict[str, dict[str, object]] = {}

    def measure(self, site: Site) -> None:
        console, progress = Console(), Console(stderr=True)
        if not console.is_terminal:
            console.width = WIDTH
        self.told = {
            "server": site.described,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "quick": self.quick,
        }
        console.print(f"PostgreSQL {self.told['server']}, {os.cpu_count()} cores, {self.runs} runs", highlight=False)
        for name in self.names:
            with progress.status(name) as status:

                def say(text: str, name: str = name) -> None:
                    status.update(f"{name}: {text}")

                course = Course(site=site, runs=self.runs, quick=self.quick, say=say)
                outcome = SUBJECTS[name](course)
            if self.quick:
                outcome.forget_marks()
            about = {"about": explained([name])[name], "runs": self.runs}
            self.done[name] = about | outcome.as_json()
            show(console, name, self.done[name])

    def write(self, file: Path | None, publish: bool) -> None:
        told = {**self.told, "trouble": self.trouble, "subjects": self.done}
        if file is not None:
            file.write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        if publish and self.done:
            from measure import plot

            told = report.merged(report.RESULTS, {**self.told, "subjects": self.done})
            report.RESULTS.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
            plot.draw(told, report.RESULTS.parent / "plots")
            os.spawnv(os.P_WAIT, sys.executable, [sys.executable, str(ROOT / "bin/generate")])


def show(console: Console, name: str, subject: dict[str, object]) -> None:
    table = Table(title=name, title_justify="left", title_style="bold", caption=None)
    for head in report.HEADS:
        table.add_column(head, justify="right" if head in ("ours", "reference", "ratio") else "left", overflow="fold")
    for line in report.lines(subject):
        table.add_row(*line)
    console.print(table)
    for note in subject["notes"]:
        console.print(f"- {note}", highlight=False, markup=False)
    console.print()


def _leave_by_the_door() -> None:
    """Signals raise, so that everything that was started ends; what comes while that happens changes nothing."""

    def leave(number: int, _: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


if __name__ == "__main__":
    main()
