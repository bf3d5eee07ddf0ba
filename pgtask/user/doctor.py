"""`pgtask doctor`: what is wrong with a task table, its server or its master, and the command that mends it.

What is looked at stands in checks.py; here it is asked for each table, and shown. Nothing is changed.
"""

import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click
from psycopg import Error

from pgtask import config
from pgtask.command import LAYOUT, printable
from pgtask.errors import OK, USER, UserError
from pgtask.settings import did_you_mean
from pgtask.user.shown import print_json
from pgtask.user.where import Where, as_json, of_tables, one_line, open_session

if TYPE_CHECKING:
    from pgtask.user.checks import Finding

WRONG = 1
"""The exit status where something is worse than a note."""

WIDTH = 76
HOW = {"sql": "SQL", "shell": "run", "config": "set"}
COLORS = {"error": "red", "warning": "yellow", "note": "cyan", "ok": "green"}


@click.command("doctor")
@click.option("--check", "only", multiple=True, metavar="NAME", help="Only this check; may be given several times.")
@of_tables
@as_json
def command(where: Where, only: Sequence[str], as_json: bool) -> int:
    """Look for what is wrong, and say what mends it.

    Everything is only read. The worst comes first, each with the command that mends it: as SQL, as a command to run, or
    as lines to set in the configuration. Connect as the role that pgtask-master uses, best with its own --config.

    The exit status is 0 if nothing is worse than a note, 1 if something is, 2 if a database cannot be reached.
    """
    from pgtask.user.checks import CHECKS, SEVERITIES, Look, examine

    names = [one.name for one in CHECKS]
    for name in only:
        if name not in names:
            raise UserError(f"--check {name}: no such check{did_you_mean(name, names) or ': ' + ', '.join(names)}")
    tables = where.all()
    known = where.master()
    workers = (known or config.load(None, [], {}, os.environ).master).workers
    file = str(where.file) if where.file is not None else None
    found: dict[str, list[Finding]] = {}
    unreached: list[str] = []
    for table in tables:
        try:
            with open_session(table, "pgtask doctor") as session:
                look = Look(
                    session=session,
                    table=table,
                    named=where.arguments(table),
                    workers=workers,
                    tables=len(tables),
                    file=file,
                )
                found[table.label] = examine(look, only)
        except Error as error:
            unreached.append(f"{table.label}: {one_line(error)}")
    if not found:
        raise UserError("; ".join(unreached))
    _show(found, as_json=as_json)
    for line in unreached:
        click.echo(f"pgtask doctor: {line}", err=True)
    worst = max((SEVERITIES.index(one.severity) for all in found.values() for one in all), default=0)
    return USER if unreached else WRONG if worst > SEVERITIES.index("note") else OK


def _show(found: Mapping[str, Sequence["Finding"]], *, as_json: bool) -> None:
    if as_json:
        print_json([{"table": label, "findings": [one.__dict__ for one in all]} for label, all in found.items()])
        return
    for number, (label, findings) in enumerate(found.items()):
        click.echo("\n".join([*([""] if number else []), *lines(label, findings)]))


def lines(label: str, findings: Sequence["Finding"]) -> Iterator[str]:
    """What was found, for people."""
    from pgtask.user.checks import CHECKS, SEVERITIES

    about = {one.name: one.about for one in CHECKS}
    numbers = Counter(one.severity for one in findings)
    counts = [f"{numbers[s]} {s}{'s' * (numbers[s] != 1)}" for s in reversed(SEVERITIES[1:]) if numbers[s]]
    yield f"{label}: {', '.join(counts) or 'all is well'}"
    for one in findings:
        if one.severity != "ok":
            yield ""
            yield f"{click.style(one.severity, fg=COLORS[one.severity])}  {one.check}: {printable(one.what)}"
            yield f"  {printable(one.why)}"
            yield f"  {HOW[one.how]}: {printable(one.mend, but=LAYOUT)}"
    well = [one for one in findings if one.severity == "ok"]
    names = [one.check for one in well if one.what == about[one.check]]
    ok = click.style("ok", fg=COLORS["ok"])
    yield ""
    yield from (f"{ok}  {one.check}: {one.what}" for one in well if one.check not in names)
    for number, line in enumerate(textwrap.wrap(", ".join(names), WIDTH)):
        yield f"{'  ' if number else ok}  {line}"
