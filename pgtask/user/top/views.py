"""What `pgtask top` lists: each view's columns, its rows, their order, and how wide each column is."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.cells import cell_len

from pgtask.config import TableConfig
from pgtask.user.top.look import COUNTED, Failure, Figures, Group, Running, Sight
from pgtask.user.top.words import age, clean, number, rate

GAP = 2
"""Cells between two columns."""

LEAST = 8
"""Cells of a text at least."""

SLOW, LONG = 60.0, 600.0
"""Seconds after which a run is marked as slow, and as very slow."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """`item` is what the row is about. `number`: the table's; `key`: the same for the same thing in every look."""

    number: int
    table: str
    key: str
    item: Any
    figures: Figures | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """`shown` is a cell's text, `order` what it is sorted by; `most`: cells, 0 for what is left of the line.

    `needs`: the terminal's width from which the column is there at all. `mark`: the cell's colour, a word of MARKS.
    """

    name: str
    title: str
    shown: Callable[[Row], str]
    order: Callable[[Row], Any] | None = None
    most: int = 30
    right: bool = False
    falling: bool = False  # the greatest first, when it is chosen
    needs: int = 0
    mark: Callable[[Row], str] = field(default=lambda row: "")


@dataclass(frozen=True, kw_only=True)
class View:
    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Callable[[int, Sight, str], Iterable[Row]]
    first: str  # the column that it is sorted by at first
    empty: str


@dataclass(frozen=True, kw_only=True)
class Order:
    column: str
    falling: bool


def _lower_bound(row: Row) -> bool:
    return row.figures is not None and row.figures.due > COUNTED


def doing(one: Running) -> str:
    """What the backend of a run waits for, as far as there is a right to see it."""
    if one.state == "TAKE":
        return "starting"
    if one.state == "STOP":
        return "stopping"
    if one.remote:
        return "remote"
    if one.session is None:
        return "?"
    if one.wait_event is None:
        return "on CPU" if one.session == "active" else one.session
    return f"{one.wait_event_type}:{one.wait_event}"


def progress(one: Running) -> str:
    if one.percent is None:
        return ""
    return f"{one.percent:g}%" + (f" {clean(one.message)}" if one.message else "")


def standing(row: Row) -> str:
    """Why nothing more of a group begins."""
    one: Group = row.item
    if one.held:
        return f"held by {clean(one.held_by)}"
    return "full" if one.due and one.slots and one.running >= one.slots else ""


def _group(row: Row) -> str:
    return clean(row.item.group) + (f" → {clean(row.item.remote)}" if row.item.remote else "")


def _slow(row: Row) -> str:
    """A run that has used most of its time, or much of ours."""
    one: Running = row.item
    if one.elapsed is None:
        return ""
    if one.elapsed > (min(0.8 * one.timeout, LONG) if one.timeout else LONG):
        return "bad"
    return "doubt" if one.elapsed > SLOW else ""


def _waits(row: Row) -> str:
    one: Running = row.item
    return "bad" if one.wait_event_type == "Lock" else "doubt" if one.state == "STOP" else "quiet"


def _running(index: int, sight: Sight, table: str) -> Iterable[Row]:
    for one in sight.figures.running if sight.figures else ():
        yield Row(number=index, table=table, key=f"{index} {one.id}", item=one, figures=sight.figures)


def _groups(index: int, sight: Sight, table: str) -> Iterable[Row]:
    for one in sight.figures.groups if sight.figures else ():
        key = f"{index} {one.remote} {one.group}"
        yield Row(number=index, table=table, key=key, item=one, figures=sight.figures)


def _failures(index: int, sight: Sight, table: str) -> Iterable[Row]:
    for one in sight.figures.failures if sight.figures else ():
        yield Row(number=index, table=table, key=f"{index} {one.id}", item=one, figures=sight.figures)


def _tables(index: int, sight: Sight, table: str) -> Iterable[Row]:
    yield Row(number=index, table=table, key=str(index), item=sight, figures=sight.figures)


def led(sight: Sight) -> str:
    """Who serves the table, or why that is not known."""
    if trouble := sight.trouble(time.monotonic()):
        return f"down: {clean(trouble)}"
    if sight.figures is None:
        return "connecting"
    one = sight.figures.leader
    if one is None or not one.leads:
        return "no master"
    return "led" if one.host is None else f"{clean(one.host)} {one.pid}"


def _value(row: Row, attribute: str) -> Any:
    """Of the item, or of the table's figures: .attribute."""
    if not attribute.startswith("."):
        return getattr(row.item, attribute)
    return None if row.figures is None else getattr(row.figures, attribute[1:])


def _column(name: str, title: str, attribute: str, words: Callable[[Any], str] = clean, **more: Any) -> Column:
    """Shows an attribute by these words, and is sorted by it."""
    return Column(
        name=name,
        title=title,
        shown=lambda row: words(_value(row, attribute)),
        order=lambda row: _value(row, attribute),
        **more,
    )


def _figure(name: str, title: str, attribute: str, words: Callable[[Any], str] = number, **more: Any) -> Column:
    """A number: the greatest first."""
    return _column(name, title, attribute, words, **({"right": True, "falling": True} | more))


def _told(name: str, title: str, shown: Callable[[Row], str], **more: Any) -> Column:
    """A text, sorted as it is shown."""
    return Column(name=name, title=title, shown=shown, order=shown, **more)


def _quiet(row: Row) -> str:
    return "quiet"


def _named(row: Row) -> str:
    return "name"


def _failed(attribute: str) -> Column:
    return _figure("failed", "FAILED", attribute, mark=lambda row: "bad" if _value(row, attribute) else "quiet")


TABLE = _told("table", "TABLE", lambda row: clean(row.table), most=16)
ID = _column("id", "ID", "id", str, right=True, most=19)
GROUP = _told("group", "GROUP", _group, most=20, mark=_named)
TRY = _figure("try", "TRY", "attempt", needs=100)

RUNNING = View(
    name="running",
    title="Running",
    rows=_running,
    first="for",
    empty="nothing runs",
    columns=(
        TABLE,
        ID,
        GROUP,
        _figure("for", "FOR", "elapsed", age, mark=_slow),
        _told("waits", "WAITS FOR", lambda row: doing(row.item), most=24, mark=_waits),
        TRY,
        _column("pid", "BACKEND", "pid", lambda pid: str(pid or ""), right=True, needs=110),
        Column(
            name="progress",
            title="PROGRESS",
            shown=lambda row: progress(row.item),
            order=lambda row: row.item.percent,
            most=24,
            falling=True,
            needs=120,
        ),
        _column("input", "INPUT", "input", most=0),
    ),
)
GROUPS = View(
    name="groups",
    title="Groups",
    rows=_groups,
    first="due",
    empty="no group has anything that runs, is due, or has ended lately",
    columns=(
        TABLE,
        _told("group", "GROUP", _group, most=0, mark=_named),
        _figure("run", "RUN", "running"),
        _figure("slots", "SLOTS", "slots"),
        replace(_figure("due", "DUE", "due"), shown=lambda row: number(row.item.due, _lower_bound(row))),
        _figure("oldest", "OLDEST", "oldest", age),
        _figure("done", "KEPT/S", "done", rate, needs=100),
        _failed("failed"),
        _told("standing", "", standing, most=20, mark=lambda row: "doubt"),
    ),
)
FAILED = View(
    name="failed",
    title="Failed",
    rows=_failures,
    first="ago",
    empty="no failed task among those looked at",
    columns=(
        TABLE,
        ID,
        GROUP,
        _figure("ago", "AGO", "ago", age, falling=False),
        _figure("ran", "RAN", "ran", age, needs=90),
        TRY,
        _column("code", "CODE", "code", mark=lambda row: "bad"),
        _told("error", "ERROR", lambda row: error(row.item), most=0),
        _column("input", "INPUT", "input", most=40, needs=120, mark=_quiet),
    ),
)
TABLES = View(
    name="tables",
    title="Tables",
    rows=_tables,
    first="table",
    empty="",
    columns=(
        replace(TABLE, most=24, mark=_named),
        _told(
            "leader",
            "LEADER",
            lambda row: led(row.item),
            most=0,
            mark=lambda row: "bad" if led(row.item).startswith(("down:", "no master")) else "",
        ),
        _figure("run", "RUN", ".slots"),
        _figure("due", "DUE", ".due"),
        _figure("oldest", "OLDEST", ".oldest", age),
        _figure("done", "DONE/S", ".done_per_second", rate),
        _failed(".failed"),
        Column(name="seen", title="SEEN", shown=lambda row: age(row.item.age(time.monotonic())), right=True, needs=90),
    ),
)
VIEWS: Mapping[str, View] = {view.name: view for view in (RUNNING, GROUPS, FAILED, TABLES)}


def error(one: Failure) -> str:
    """Its first line, without what all of them begin with."""
    return clean(one.error.partition("\n")[0].removeprefix("ERROR:"))


def short_names(tables: Sequence[TableConfig]) -> list[str]:
    """What tells the tables apart, as short as may be."""
    databases = [table.dbname for table in tables]
    if len(set(databases)) == len(tables):
        return databases
    if len({table.user for table in tables}) == 1:
        return [f"{table.dbname} {table.schema}.{table.table}" for table in tables]
    return [table.label for table in tables]


def listed(view: View, sights: Iterable[tuple[int, Sight, str]], words: str, order: Order | None) -> list[Row]:
    """The rows of the view in which each of the words stands, in their order."""
    rows = [row for sight in sights for row in view.rows(*sight)]
    if wanted := words.casefold().split():
        rows = [row for row in rows if all(word in _haystack(view, row) for word in wanted)]
    return _sorted(view, rows, order or first_order(view))


def first_order(view: View) -> Order:
    return chosen(view, view.first)


def chosen(view: View, name: str) -> Order:
    """By that column, as it is sorted when it is chosen."""
    return Order(column=name, falling=next(one.falling for one in view.columns if one.name == name))


def _haystack(view: View, row: Row) -> str:
    return " ".join([row.table, *(column.shown(row) for column in view.columns)]).casefold()


def _sorted(view: View, rows: list[Row], order: Order) -> list[Row]:
    """What is not known comes last, and equals in an order of their own, so that nothing jumps about."""
    column = next(one for one in view.columns if one.name == order.column)
    key = column.order or column.shown
    rows.sort(key=lambda row: row.key)
    known = [row for row in rows if key(row) is not None]
    known.sort(key=key, reverse=order.falling)
    return known + [row for row in rows if key(row) is None]


def columns_of(view: View, width: int, several: bool) -> list[Column]:
    """Those that a terminal of that width has room for; the table's name is there where there are several."""
    return [
        column
        for column in view.columns
        if column.needs <= width and (several or column.name != "table" or view.name == "tables")
    ]


def widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int, before: Mapping[str, int]
) -> dict[str, int]:
    """Cells of each column: as many as it needs, but not fewer than `before`, so that the columns do not tremble.

    Where there is not enough room texts are cut, the longest first; numbers never.
    """
    found = {}
    for index, column in enumerate(columns):
        need = max([cell_len(column.title) + 1, *(cell_len(row[index]) for row in cells)])
        wanted = max(need, before.get(column.name, 0))
        found[column.name] = LEAST if not column.most else wanted if column.right else min(wanted, column.most)
    left = width - GAP * len(columns) - sum(found.values())
    texts = [column.name for column in columns if column.most and not column.right]
    while left < 0 and texts and found[longest := max(texts, key=found.__getitem__)] > LEAST:
        found[longest] -= 1
        left += 1
    rest = [column.name for column in columns if not column.most]
    return found | {name: found[name] + max(0, left // len(rest)) for name in rest}
