"""`pgtask next`: when a task, or a calendar that is yet to be used, comes round. It reads, and changes nothing."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, dropwhile, islice, takewhile

import click

from pgtask import cron
from pgtask.coming import moment
from pgtask.config import TableConfig
from pgtask.errors import OK, UserError
from pgtask.objects import Names
from pgtask.user.shown import print_json
from pgtask.user.where import Where, as_json, asking, of_tables

WAITS, RUNS = ("PLAN", "WAIT"), ("TAKE", "WORK")
SHOWN = "%Y-%m-%d %H:%M:%S%z %a"


@click.command("next")
@click.argument("what", metavar="ID|CRON")
@click.option("--zone", metavar="ZONE", help="The time zone; by default the task's own, or UTC.")
@click.option("-n", "--number", type=click.IntRange(1, 10_000), default=5, show_default=True, help="How many to show.")
@of_tables
@as_json
def command(what: str, where: Where, zone: str | None, number: int, as_json: bool) -> int:
    """Show when a task, or a calendar, comes round next.

    ID is that of a task. CRON is an expression in quotes, such as '0 3 * * MON-FRI', for which no database is needed.
    """
    if what.isdecimal():
        comes = of_task(where.one(), int(what), zone, number)
    else:
        comes = list(of_calendar(what, zone or "UTC", number))
    if as_json:
        print_json(comes)
    else:
        click.echo("\n".join([one if isinstance(one, str) else one.strftime(SHOWN) for one in comes] or ["never"]))
    return OK


def of_calendar(expression: str, zone: str, number: int) -> list[datetime]:
    """The next matches after now, as clocks in that zone show them. Raises cron.Wrong."""
    return list(islice(_shown(_matches(expression, zone, datetime.now(UTC)), zone), number))


def of_task(table: TableConfig, id: int, zone: str | None, number: int) -> list[datetime | str]:
    """The next runs of a row, as clocks in that zone show them, or in the row's own. Raises UserError.

    After them, where it cannot be known when the others come, what decides that.
    """
    names = Names(schema=table.schema, table=table.table)
    with asking(table) as session:
        rows = session.execute(names.store().text("upcoming").encode(), [id, number + 3]).fetchall()
    if not rows:
        raise UserError(f"{table.label} has no task {id}: it was removed, or never was")
    state, expression, its_zone, plan, aligned, until, now, drift, plans = rows[0]
    if state not in WAITS and state not in RUNS:
        raise UserError(f"task {id} is {state}, and does not run any more; a task that came after it has parent {id}")
    comes: Iterator[datetime] = map(moment, plans or [plan])
    if expression is not None:
        begins = state in WAITS and not aligned  # the master is yet to find its first plan
        after = max(moment(plan), moment(now)) if state in RUNS else moment(plan)
        comes = _matches(expression, its_zone, after, inclusive=begins)
        if state in WAITS and aligned:
            comes = chain([moment(plan)], comes)
    if state in RUNS:
        comes = dropwhile(lambda one: one <= max(moment(plan), moment(now)), comes)
    comes = takewhile(lambda one: one <= moment(until), comes)
    lines: list[datetime | str] = list(islice(_shown(comes, zone or its_zone), number))
    return lines if drift is None else [*lines, f"then {drift} after the end of each run"]


def _matches(expression: str, zone: str, after: datetime, *, inclusive: bool = False) -> Iterator[datetime]:
    match = cron.first(expression, zone, after) if inclusive else cron.following(expression, zone, after)
    while True:
        yield match
        match = cron.following(expression, zone, match)


def _shown(moments: Iterator[datetime], zone: str) -> Iterator[datetime]:
    clock = cron.clock(zone)
    return (one.astimezone(clock) for one in moments)
