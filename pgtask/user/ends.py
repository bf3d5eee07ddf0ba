"""`pgtask wait`, and how the end of a task is told.

It looks at the rows again and again, in statements of their own: a long one would keep vacuum from its work. The pauses
grow with the time that was waited. A server that is started anew meanwhile, or another that takes its place, is asked
again.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import click
from psycopg import Connection, OperationalError, RawCursor

from pgtask.config import TableConfig
from pgtask.durations import interval_seconds
from pgtask.errors import NO, OK, OVER, UserError
from pgtask.objects import Names
from pgtask.user.shown import echo_text, print_json, rows
from pgtask.user.where import Id, Where, as_json, asking, of_tables, one_line, open_session, program

SHORTEST, LONGEST = 0.01, 1.0
"""Seconds between two looks."""

SHARE = 0.1
"""Of the time that was waited so long a pause follows."""

PATIENCE = 60.0
"""Seconds for which a lost session is opened again."""


class Look:
    """At one table, for as long as it takes: for `timeout` seconds, or for ever."""

    def __init__(self, session: Connection[Any], table: TableConfig, timeout: float | None = None) -> None:
        self.table = table
        self._session = self._first = session
        self._store = Names(schema=table.schema, table=table.table).store()
        self._began = time.monotonic()
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not self._first:
            self._session.close()

    @property
    def waited(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds until the time is over."""
        return None if self._timeout is None else self._timeout - self.waited

    def ask(self, name: str, *parameters: object) -> RawCursor[Any]:
        """A statement that only reads; once more in a new session where this one is lost. Raises psycopg.Error."""
        query = self._store.text(name).encode()
        lost: float | None = None
        while True:
            try:
                if self._session.closed:
                    self._session = open_session(self.table, program())
                return self._session.execute(query, parameters)  # type: ignore[return-value]
            except OperationalError as error:
                over = self.left is not None and self.left <= 0
                if not self._session.closed or over or (lost is not None and time.monotonic() - lost > PATIENCE):
                    raise
                if lost is None:
                    lost = time.monotonic()
                    click.echo(f"{self.table.label}: {one_line(error)}; trying again", err=True)
            time.sleep(min(LONGEST, max(SHORTEST, (time.monotonic() - lost) * SHARE)))


def _seconds(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    seconds = interval_seconds(text)
    if seconds is None or seconds < 0:
        raise click.BadParameter(f"{text!r} is no duration, such as 30 (seconds) or '5 min'")
    return seconds


@click.command("wait")
@click.argument("ids", metavar="ID...", type=Id(), nargs=-1, required=True)
@click.option("--timeout", callback=_seconds, metavar="DURATION", help="Wait no longer: seconds, or '5 min'.")
@click.option("--any", "one", is_flag=True, help="Until one of them has ended, not all.")
@click.option("--output", is_flag=True, help="Print the outputs, and nothing else.")
@of_tables
@as_json
def wait(where: Where, ids: Sequence[int], timeout: float | None, one: bool, output: bool, as_json: bool) -> int:
    """Wait until tasks have ended, and tell how.

    A task that is removed meanwhile was DONE and had nothing to say, unless somebody deleted it. A server that goes
    away is asked again for a minute.

    Exit status: 0 if all that have ended are DONE; 1 if one has ended otherwise; 124 if the time is over.
    """
    table = where.one()
    with asking(table) as session, Look(session, table, timeout) as look:
        ended, over = until_ended(look, ids, one=one)
        return tell(look, ended, over=over, output=output, as_json=as_json)


def until_ended(look: Look, ids: Sequence[int], *, one: bool = False) -> tuple[list[int], bool]:
    """Those that have ended, and whether the time was over before. Raises UserError, psycopg.Error."""
    pending = list(dict.fromkeys(ids))
    first = True
    while True:
        found = look.ask("pending", pending).fetchall()
        missing = [id for id, state, _ in found if state is None]
        if first and missing:
            raise UserError(
                f"{look.table.label} has no task {missing[0]}: it was removed, or never was;"
                ' one whose column "delete" is false stays when it is done'
            )
        first = False
        pending = [id for id, _, goes_on in found if goes_on]
        if not pending or (one and len(pending) < len(set(ids))):
            return [id for id in dict.fromkeys(ids) if id not in set(pending)], False
        left = look.left
        if left is not None and left <= 0:
            return [id for id in dict.fromkeys(ids) if id not in set(pending)], True
        pause = min(LONGEST, max(SHORTEST, look.waited * SHARE))
        time.sleep(pause if left is None else min(pause, left))


def tell(look: Look, ids: Sequence[int], *, over: bool, output: bool, as_json: bool) -> int:
    """Print how they have ended; the exit status."""
    ends = rows(look.ask("ends", list(ids)))
    if as_json:
        print_json(ends)
    for end in [] if as_json else ends:
        _tell_one(end, output=output)
    if over:
        click.echo("the time is over", err=True)
        return OVER
    return OK if all(end["state"] == "DONE" for end in ends) else NO


def _tell_one(end: Mapping[str, object], *, output: bool) -> None:
    if output and end["output"] is not None:
        echo_text(str(end["output"]))
    if not output:
        click.echo(f"{end['id']} {end['state']}")
    if end["state"] != "DONE":
        error = end["error"] or f"task {end['id']} is {end['state']}"
        echo_text(str(error), err=True)
