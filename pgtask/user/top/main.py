"""`pgtask top`: what a table's scheduler does right now. It reads; what it changes, its user asks it to."""

import logging
import os
import shutil
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

import click

from pgtask.config import TableConfig
from pgtask.errors import OK
from pgtask.user.shown import print_json
from pgtask.user.top.look import Sight, Watch
from pgtask.user.top.page import page
from pgtask.user.top.views import short_names
from pgtask.user.where import Where, as_json, of_tables

SHORTEST = 0.1
"""Seconds between two looks, at least."""

PATIENCE = 10.0
"""Seconds that a page waits for a table that gives no answer, beyond the interval."""

FAILED = 1
"""Exit status when no table could be looked at."""


@click.command("top")
@click.option(
    "--interval", type=click.FloatRange(SHORTEST, 3600), metavar="SECONDS", default=1, show_default=True,
    help="How often to look; for one page, the time that its rates are of.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one page of plain text. The default if this is no terminal.")
@of_tables
@as_json
def command(where: Where, interval: float, once: bool, as_json: bool) -> int:
    """Show live what runs, what is due, and what failed.

    On a terminal press ? for the keys and for what each figure means. Of several tables, and of several databases,
    each is watched by itself: one that does not answer is shown as down. With --json the answer is one snapshot.

    Exit status: of one page or a snapshot 1 if no table could be read.
    """
    tables = where.all()
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # what it warns of is told as a table's trouble
    if as_json or once or not _terminal():
        return _once(tables, interval, as_json=as_json)
    from pgtask.user.top.screen import Top

    app = Top(tables, interval)
    app.run()
    return app.return_code or OK


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _once(tables: list[TableConfig], interval: float, *, as_json: bool) -> int:
    """Two looks at each, since rates take that; what stands against it is part of the answer."""
    sights = _two_looks(tables, interval)
    if as_json:
        print_json([_plain(sight, table) for sight, table in zip(sights, tables, strict=True)])
    else:
        for line in page(sights, short_names(tables), shutil.get_terminal_size((120, 40)).columns):
            click.echo(line)
    return FAILED if all(sight.figures is None for sight in sights) else OK


def _two_looks(tables: list[TableConfig], interval: float) -> list[Sight]:
    changed = threading.Condition()

    def tell() -> None:
        with changed:
            changed.notify_all()

    watches = [Watch(table, interval, tell) for table in tables]
    for watch in watches:
        watch.start()
    deadline = time.monotonic() + interval + PATIENCE
    with changed:
        while not all(watch.sight.error or watch.looks >= 2 for watch in watches):
            if not changed.wait(deadline - time.monotonic()):
                break
    sights = [watch.sight for watch in watches]
    for watch in watches:
        watch.stop()
    return sights


def _plain(sight: Sight, table: TableConfig) -> dict[str, Any]:
    """A table's part of the snapshot."""
    now = time.monotonic()
    return {
        "database": table.dbname,
        "user": table.user,
        "schema": table.schema,
        "table": table.table,
        "down": sight.trouble(now) or (None if sight.figures else "no answer yet"),
        "age": sight.age(now),
        **(asdict(sight.figures) if sight.figures else {}),
    }
