"""Which rows a command means: the options that say so, and the statement that finds them.

An index finds what has not ended, and ids. Nothing finds by its group or its time what has ended: such a search walks
down the ids, in a session that changes nothing, and for no longer than a minute.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from psycopg import Connection

from pgtask.config import TableConfig
from pgtask.log import redact
from pgtask.objects import COLUMNS, Names, identifier
from pgtask.user.shown import rows
from pgtask.user.where import asking

LONG = ("input", "output", "notice", "error")
"""Columns of which a list shows a line."""

TIMES = tuple(column.name for column in COLUMNS if column.type.startswith("timestamp"))
INTERVAL = re.compile(r"(\s*\d+(\.\d+)?\s*[a-z]+)+\s*", re.IGNORECASE)
"""`1 hour` is that long before now; anything else is a time."""

ORDERS = {"plan": "order_plan", "due": "order_plan", "running": "order_running", "wait": "order_wait"}


def _range(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int | None] | None:
    """The first id, and the last one if there is one."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,18})(?:(-)(\d{0,18}))?", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no range of ids, such as 7, 7-9 or 7-")
    first, several, last = found.groups()
    return int(first), int(last) if last else None if several else int(first)


def filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose rows; the command gets them by the names of the fields of `Search`."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


_FILTERS = (
    click.option("-g", "--group", "groups", multiple=True, metavar="GROUP", help="In this group; may be repeated."),
    click.option("--key", metavar="KEY", help="With this key."),
    click.option("--id", "ids", callback=_range, metavar="ID[-ID]", help="With these ids: 7, 7-9 or 7-."),
    click.option("--since", metavar="TIME", help="Begun or planned since then: a time, or '1 hour' before now."),
    click.option("--until", metavar="TIME", help="Begun or planned before then."),
    click.option("--data", metavar="TEXT", help="With this in the column data."),
    click.option("--code", metavar="SQLSTATE", help="With this SQLSTATE, or one that begins so: 57 is 57014 too."),
    click.option("--grep", metavar="REGEX", help="With this in input, output or error, in whatever case."),
    click.option("--where", "condition", metavar="SQL",
                 help="For which this holds, as after WHERE; what is not PostgreSQL's own is written with its schema."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is looked for: `kind` is that of a statement kind_... in user.sql, the rest as the options have it."""

    kind: str = "any"
    states: Sequence[str] = ()
    groups: Sequence[str] = ()
    key: str | None = None
    ids: tuple[int, int | None] | None = None
    since: str | None = None
    until: str | None = None
    data: str | None = None
    code: str | None = None
    grep: str | None = None
    condition: str | None = None

    @property
    def narrow(self) -> bool:
        """Was anything said but the kind?"""
        return self != Search(kind=self.kind)

    def lines(
        self, session: Connection[Any], table: TableConfig, columns: Sequence[str], limit: int
    ) -> list[dict[str, object]]:
        """Rows for people: long texts in one line, times to the second. `limit` 0: all. Raises psycopg.Error."""
        return [_discreet(row) for row in rows(session.execute(self._text(table, columns), self._values(limit)))]

    def documents(
        self, session: Connection[Any], table: TableConfig, columns: Sequence[str], limit: int
    ) -> list[dict[str, object]]:
        """Rows as JSON has them, by default with every column. Raises psycopg.Error."""
        query = self._text(table, columns, plain=True).decode()
        return documents(session, table, query, self._values(limit))

    def ids_of(self, session: Connection[Any], table: TableConfig) -> list[int]:
        """All that fit. Raises psycopg.Error."""
        found = session.execute(self._text(table, ["id"], plain=True), self._values(0)).fetchall()
        return [row[0] for row in found]

    def _text(self, table: TableConfig, columns: Sequence[str], *, plain: bool = False) -> bytes:
        store = Names(schema=table.schema, table=table.table).store()

        def column(name: str) -> str:
            if name == "took":
                return store.text("took_column")
            how = "plain" if plain else "short" if name in LONG else "time" if name in TIMES else "plain"
            return store.text(f"{how}_column", column=identifier(name))

        listed = store.text(
            "listed",
            columns=", ".join(map(column, columns)) or store.text("every_column"),
            kind=store.text(f"kind_{self.kind}"),
            order=store.text(ORDERS.get(self.kind, "order_any")),
            where=self.condition or "true",
        )
        return listed.encode()

    def _values(self, limit: int) -> list[object]:
        first, last = self.ids or (None, None)
        times = [part for time in (self.since, self.until) for part in (time, _is_interval(time))]
        given = [list(self.states) or None, list(self.groups) or None, self.key, first, last, *times]
        return [*given, self.data, self.code, self.grep, limit or None]


@contextmanager
def reading(table: TableConfig) -> Iterator[Connection[Any]]:
    """A session with the table's database that changes nothing, and takes no statement too long. Raises UserError."""
    with asking(table) as session:
        session.execute(Names(schema=table.schema, table=table.table).store().text("reading").encode())
        yield session


def documents(
    session: Connection[Any], table: TableConfig, query: str, values: Sequence[object]
) -> list[dict[str, object]]:
    """The rows of a query as JSON has them; intervals as ISO 8601. Raises psycopg.Error."""
    store = Names(schema=table.schema, table=table.table).store()
    session.execute(b"SET intervalstyle TO iso_8601")
    found = session.execute(store.text("documents", query=query).encode(), values)
    return [_discreet(json.loads(str(row["document"]))) for row in rows(found)]


def _discreet(row: dict[str, object]) -> dict[str, object]:
    """Without the passwords of a remote."""
    remote = row.get("remote")
    return row | {"remote": redact(remote)} if isinstance(remote, str) else row


def _is_interval(time: str | None) -> bool:
    return time is not None and INTERVAL.fullmatch(time) is not None
