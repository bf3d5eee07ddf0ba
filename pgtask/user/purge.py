"""`pgtask purge`: finished rows are removed, in small steps, each a transaction of its own that may be the last.

A step is the one of history.sql: what somebody has locked is left, and no row is touched that runs. Between steps the
server has as long a rest as the step took.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from psycopg import Connection, Error, ProgrammingError, errors

from pgtask.command import printable
from pgtask.config import TableConfig
from pgtask.errors import INTERRUPTED, NO, OK, UserError
from pgtask.objects import Names
from pgtask.user.shown import print_json
from pgtask.user.where import Where, as_json, asking, of_tables, told

ENDED = ("DONE", "FAIL", "GONE", "STOP")

STEP = 0.05
"""Seconds that a step should last at most."""

MOST_ROWS, FIRST_ROWS = 5000, 200
"""Rows that a step looks at."""

LEAST_ID = -(1 << 63)


@dataclass
class Found:
    """What there was until now. `stayed`: rows that something forbids to remove, with its last word in `why`."""

    looked: int = 0
    removed: int = 0
    stayed: int = 0
    why: str | None = None


@click.command("purge", short_help="Remove rows of tasks that ended long ago.")
@click.option("--older-than", "age", metavar="INTERVAL", required=True, help="Those that ended so long ago: '30 days'.")
@click.option("-s", "--state", "states", type=click.Choice(ENDED, case_sensitive=False), multiple=True,
              help="Only those in this state; may be repeated. By default all that have ended.")  # fmt: skip
@click.option("-n", "--dry-run", is_flag=True, help="Count them, and remove nothing.")
@of_tables
@as_json
def purge(where: Where, age: str, states: Sequence[str], dry_run: bool, as_json: bool) -> int:
    """Remove rows of tasks that ended long ago, in small steps that disturb nobody.

    Rows that others wait for stay. When it is interrupted, what was removed until then is gone, and the rest is there.

    Exit status: 1 if a foreign key or a trigger of yours kept a row that was to go.
    """
    table = where.one()
    with asking(table, "SELECT" if dry_run else "SELECT, UPDATE, DELETE") as session:
        for setting in ("statement_timeout TO 0", "lock_timeout TO '2s'", "enable_seqscan TO off", "jit TO off"):
            session.execute(f"SET {setting}".encode())
        found = Found()
        try:
            _walk(session, table, age, states or ENDED, found, dry=dry_run, bar=not as_json)
        except KeyboardInterrupt:
            _tell(found, dry=dry_run, as_json=as_json)
            return INTERRUPTED
    _tell(found, dry=dry_run, as_json=as_json)
    return NO if found.stayed else OK


def _walk(
    session: Connection[Any], table: TableConfig, age: str, states: Sequence[str], found: Found, *, dry: bool, bar: bool
) -> None:
    store = Names(schema=table.schema, table=table.table).store()
    step = store.text("purge_count" if dry else "sweep", expired=store.text("purgeable")).encode()
    first, last, past = session.execute(store.text("extent").encode(), [age]).fetchall()[0]
    if not past:
        raise UserError(f"--older-than {age}: give an interval of zero or more")
    if first is None:
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (bar and console.is_terminal), transient=True) as progress:
        task = progress.add_task("", total=last - first + 1)
        place, size = max(LEAST_ID, first - 1), FIRST_ROWS
        while place < last:
            began = time.monotonic()
            values = [place, last, size, age, list(states)]
            try:
                seen, removed, reached, _ = session.execute(step, values).fetchall()[0]
            except Error as error:
                if session.closed or isinstance(error, ProgrammingError | errors.QueryCanceled):
                    raise
                if size > 1:  # one of these cannot be removed: find out which
                    size = max(1, size // 10)
                    continue
                found.stayed, found.why = found.stayed + 1, told(error)
                seen, removed, reached, _ = session.execute(step, [*values[:4], []]).fetchall()[0]
            found.looked, found.removed = found.looked + seen, found.removed + removed
            if seen == 0:
                break
            place = reached
            cost = time.monotonic() - began
            size = _fit(size, cost)
            progress.update(task, completed=place - first + 1, description=_counted(found, dry=dry))
            time.sleep(cost if removed and not dry else 0)


def _fit(size: int, cost: float) -> int:
    """How many rows the next step looks at, after one of so many has cost so many seconds."""
    if cost > STEP:
        return max(1, int(size * STEP / cost))
    return min(MOST_ROWS, 2 * size) if cost < STEP / 2 else size


def _tell(found: Found, *, dry: bool, as_json: bool) -> None:
    if as_json:
        print_json({"looked": found.looked, "removable" if dry else "removed": found.removed, "stayed": found.stayed})
        return
    click.echo(_counted(found, dry=dry))
    if found.stayed:
        click.echo(f"{found.stayed} rows stay: {printable(found.why or '')}", err=True)


def _counted(found: Found, *, dry: bool) -> str:
    return f"{found.removed:,} {'row' if found.removed == 1 else 'rows'} {'would be removed' if dry else 'removed'}"
