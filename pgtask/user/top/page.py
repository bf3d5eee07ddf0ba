"""`pgtask top --once`: everything at one moment, as a page of plain text for a script, or for `watch`."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pgtask.user.top.look import Sight
from pgtask.user.top.summary import Part, Summary, summary
from pgtask.user.top.views import GAP, VIEWS, View, columns_of, listed, widths
from pgtask.user.top.words import clean, fit

MOST = 20
"""Lines of each list."""


def page(sights: Sequence[Sight], names: Sequence[str], width: int) -> Iterator[str]:
    """The lines, none of them longer than the width."""
    yield fit(f"pgtask top  {datetime.now(UTC).astimezone():%Y-%m-%d %H:%M:%S}  {title(sights, names)}", width).rstrip()
    for line in heading(summary(sights, names)):
        yield fit(line, width).rstrip()
    shown = ("tables", "groups", "running", "failed") if len(sights) > 1 else ("groups", "running", "failed")
    for name in shown:
        yield ""
        yield from _list(VIEWS[name], sights, names, width)


def title(sights: Sequence[Sight], names: Sequence[str]) -> str:
    """Which tables these are."""
    return clean(sights[0].label if len(sights) == 1 else ", ".join(names))


def heading(of: Summary) -> Iterator[str]:
    for parts in (of.leader, of.load, of.ends):
        yield "  ".join(map(_said, parts))
    yield from of.troubles


def _said(part: Part) -> str:
    return f"{part[0]} {part[1]}".strip()


def _list(view: View, sights: Sequence[Sight], names: Sequence[str], width: int) -> Iterator[str]:
    rows = listed(view, zip(range(len(sights)), sights, names, strict=True), "", None)
    yield f"{view.title} ({len(rows)})"
    if not rows:
        return
    columns = columns_of(view, width, len(sights) > 1)
    cells = [[column.shown(row) for column in columns] for row in rows[:MOST]]
    sizes = widths(columns, cells, width, {})
    for line in [[column.title for column in columns], *cells]:
        parts = [fit(text, sizes[one.name], one.right) for text, one in zip(line, columns, strict=True)]
        yield fit((" " * GAP).join(parts), width).rstrip()
    if len(rows) > MOST:
        yield f"and {len(rows) - MOST} more"
