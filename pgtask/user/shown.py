"""How commands show what they found: as a table, row by row, or as one JSON document.

What comes from the database is shown as the server writes it, and what would move a terminal's cursor never gets there.
"""

import datetime
import decimal
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from psycopg import Cursor
from rich.cells import cell_len, set_cell_size

from pgtask.command import LAYOUT, printable


def rows(cursor: Cursor[Any]) -> list[dict[str, object]]:
    """What a statement returned, by the columns' names, as the server writes it; whole numbers are numbers."""
    result = cursor.pgresult
    assert result is not None
    names = [(result.fname(column) or b"").decode(errors="replace") for column in range(result.nfields)]
    numbers = [result.ftype(column) in NUMBERS for column in range(result.nfields)]

    def value(row: int, column: int) -> object:
        data = result.get_value(row, column)
        return None if data is None else int(data) if numbers[column] else data.decode(errors="replace")

    return [{name: value(row, column) for column, name in enumerate(names)} for row in range(result.ntuples)]


NUMBERS = (20, 21, 23)
"""The type oids of int8, int2 and int4."""


def show(found: Sequence[Mapping[str, object]], *, as_json: bool, columns: Sequence[str] | None = None) -> None:
    """Print rows as a table, or whole as JSON. `columns`: those of the table, in their order; by default all."""
    if as_json:
        print_json(found)
        return
    names = columns or list(found[0] if found else ())
    cells = [[_cell(name) for name in names], *([_cell(row[name]) for name in names] for row in found)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():  # what goes into a pipe is not cut
        widths = _fitting(cells, widths, shutil.get_terminal_size().columns - len(GAP) * (len(widths) - 1))
    numbers = [all(isinstance(row[name], int | float | None) for row in found) for name in names]
    for number, row in enumerate(cells):
        click.echo(GAP.join(map(_sized, row, widths, numbers)).rstrip())
        if number == 0:
            click.echo(GAP.join("-" * width for width in widths))


GAP = "  "

LEAST, FEWEST = 16, 8
"""Cells that the last column keeps, and any text: numbers and times are cut only where nothing else helps."""

FIRM = re.compile(r"[-+0-9:., %]*")


def _fitting(cells: Sequence[Sequence[str]], widths: Sequence[int], room: int) -> list[int]:
    """Less wide columns, until they fit."""
    widths, last = list(widths), len(widths) - 1
    soft = [n for n in range(last) if not all(FIRM.fullmatch(row[n]) for row in cells[1:])]
    while sum(widths) > room and max(widths) > 1:
        widest = max(soft, key=widths.__getitem__, default=last)
        if widths[last] > LEAST or widths[last] > FEWEST >= widths[widest]:
            widest = last
        elif widths[widest] <= FEWEST:
            widest = widths.index(max(widths))
        widths[widest] -= 1
    return widths


def _sized(cell: str, width: int, right: bool) -> str:
    """As many cells of the terminal."""
    length = cell_len(cell)
    if length > width:
        return set_cell_size(cell, width - 1) + "…"
    return " " * (width - length) + cell if right else cell + " " * (width - length)


def show_whole(title: str, row: Mapping[str, object]) -> None:
    """Print a row as psql's expanded display has it: a line for each column, more where the value has more."""
    row = {printable(name): value for name, value in row.items()}
    width = max([cell_len(name) for name in row] or [0])
    click.echo(f"-[ {title} ]".ljust(width + 40, "-"))
    for name, value in row.items():
        first, *more = printable(str(value), but=LAYOUT).expandtabs().split("\n")
        click.echo(f"{name}{' ' * (width - cell_len(name))} | {first}")
        for line in more:
            click.echo(f"{' ' * width} + {line}")


def note(text: str) -> None:
    """A remark for who sits before the terminal."""
    if sys.stdout.isatty():
        click.echo(text, err=True)


def echo_text(text: str, *, err: bool = False) -> None:
    """Print a text as it is, but a terminal gets nothing that is not to be seen there."""
    stream = sys.stderr if err else sys.stdout
    stream.write((printable(text, but=LAYOUT) if stream.isatty() else text) + "\n")


def print_json(value: object) -> None:
    """One JSON document: times as ISO 8601 with their zone, intervals in seconds."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=_json))


def _json(value: object) -> object:
    match value:
        case datetime.datetime() | datetime.date():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal():
            return float(value)
        case Path():
            return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _cell(value: object) -> str:
    """One line, without what would move the terminal's cursor."""
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
