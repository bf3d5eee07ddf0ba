"""`pgtask top` on a terminal. Only here is the terminal library imported, by the one command that needs it.

The screen is drawn from what the watches saw last, and never waits for a database: what its user asks for is done by a
short-lived thread with a session of its own, and its answer stands in the line above the keys.
"""

import asyncio
import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

import psycopg
from rich.console import Group as Stack
from rich.syntax import Syntax
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.theme import Theme
from textual.widgets import DataTable, Input, Static

from pgtask.config import TableConfig
from pgtask.errors import OK, UserError
from pgtask.log import redact
from pgtask.user.top import look
from pgtask.user.top.look import Watch
from pgtask.user.top.summary import Part, summary
from pgtask.user.top.views import VIEWS, Order, Row, View, chosen, columns_of, first_order, listed, short_names, widths
from pgtask.user.top.words import clean, fit, spark
from pgtask.user.where import one_line

TICK = 1.0
"""Seconds after which the screen is drawn anew although nothing was read: ages grow."""

REMEMBERED = 60
"""Rates that the bars show at most."""

WIDE = 100
"""Cells of a terminal that has room for more than what is essential."""

COLOURS = {"bad": "bold #ff6b6b", "doubt": "#ffd166", "good": "bold #7ee0a2", "quiet": "#8a94a6", "name": "#7cc7ff"}
LABEL, VALUE = "#8a94a6", "bold"

THEME = Theme(
    name="pgtask",
    primary="#336791",  # PostgreSQL's own blue
    accent="#ffd166",
    foreground="#dde3ec",
    background="#11161d",
    surface="#11161d",
    panel="#1b232e",
    dark=True,
)

HELP = """\
[b]Keys[/b]
  [k]1 2 3 4[/k]    running tasks, groups, failed tasks, tables
  [k]t[/k]          of several tables: all, or one after another
  [k]Enter[/k]      a task's details: input, error, output, earlier runs;
             what runs of a group; one table alone
  [k]s  r[/k]       sort by the next column; the other way round
  [k]/[/k]          show only rows with these words; Esc shows all again
  [k]c[/k]          cancel the task, after a question
  [k]R[/k]          run a failed task again, after a question
  [k]h[/k]          hold the row's group, or release it, after a question
  [k]p  Space[/k]   read nothing, so that nothing moves; again: go on
  [k]q  ^C[/k]      leave

[b]Figures[/b]
  [k]running[/k]    rows that have a slot: in TAKE or WORK, or stopped but not
             over yet
  [k]workers[/k]    sessions of workers in the database, idle ones too
  [k]backlog[/k]    rows that are due: in PLAN, and plan is over; [k]oldest[/k] is for
             how long the first of them has been due
  [k]planned[/k]    rows in PLAN that are due later
  [k]waiting[/k]    rows in WAIT: for other tasks
  [k]new/s[/k]      rows inserted: n_tup_ins of pg_stat_user_tables
  [k]done/s[/k]     rows looked at that came to DONE, and rows removed (n_tup_del):
             a task that is done and has nothing to say is removed; but
             what "keep", or somebody, removes counts here too
  [k]failed/s[/k]   rows looked at that came to FAIL; [k]failed 1h[/k]: in the last hour
  [k]WAITS FOR[/k]  the wait event of the run's session in pg_stat_activity;
             Client:ClientRead is between two statements, ? is where there
             is no right to see it
  [k]SLOTS[/k]      runs that the group is allowed: its greatest max, and one
  [k]KEPT/S[/k]     the group's rows looked at that came to DONE

Rates are of the last 10 seconds. Rows are counted up to 10,000; a figure
with + is at least that. How tasks ended is not looked for in the whole
table: [k]rows looked at[/k] are 2,000 by id before each of the newest row, the
newest that runs, and the first that is due. The statistics of the server
come a second or so late, and count what was rolled back too."""


class Seen(Message):
    """A watch has looked."""


class Answered(Message):
    """What was asked for is done, or why not."""

    def __init__(self, text: str, *, good: bool) -> None:
        super().__init__()
        self.text = text
        self.good = good


class Told(Message):
    """A task's row has come."""

    def __init__(self, read: Mapping[str, Any]) -> None:
        super().__init__()
        self.read = read


class Question(ModalScreen[bool]):
    """Yes or no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,escape,q", "dismiss(False)"),
        Binding("ctrl+c", "app.leave", priority=True),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Static(Text(self._text))
            yield Static(_keys((("y", "yes"), ("n", "no"))))


class Sheet(ModalScreen[None]):
    """A text to be read, as long as it may be."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter,question_mark", "dismiss"),
        Binding("ctrl+c", "app.leave", priority=True),
    ]

    def __init__(self, title: str, body: Any) -> None:
        super().__init__()
        self._title = title
        self._body = body

    def compose(self) -> ComposeResult:
        with Vertical(classes="sheet"):
            yield Static(Text(self._title), classes="title")
            with VerticalScroll():
                yield Static(self._body, id="body")
            yield Static(_keys((("↑↓", "scroll"), ("Esc", "back"))))

    def show(self, body: Any) -> None:
        self.query_one("#body", Static).update(body)


class Rows(DataTable[Text]):
    """The list; Enter is the application's."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "app.detail", priority=False)]

    class Steered(Message):
        """The cursor was moved by its user."""

    def on_key(self, event: events.Key) -> None:
        if event.key in ("up", "down", "pageup", "pagedown", "home", "end"):
            self.post_message(self.Steered())

    def on_click(self) -> None:
        self.post_message(self.Steered())


class Top(App[None]):
    """Everything on one screen."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "pgtask top"
    CSS = """
    Screen { background: $background; }
    #head { height: auto; background: $panel; padding: 0 1; }
    #tabs { height: 1; background: $primary; padding: 0 1; color: #dde3ec; }
    Rows { height: 1fr; background: $background; scrollbar-size: 1 1; overflow-x: hidden; }
    Rows:focus { background-tint: $background 0%; }
    Rows > .datatable--header { background: $background; color: #8a94a6; text-style: bold; }
    Rows > .datatable--cursor { background: #2b4a68; color: #ffffff; text-style: none; }
    #empty { height: 1fr; color: #8a94a6; padding: 1 2; display: none; }
    #filter { display: none; height: 1; border: none; padding: 0 1; background: $panel; }
    #answer { height: 1; padding: 0 1; }
    #keys { height: 1; background: $panel; padding: 0 1; }
    Question { align: center middle; background: $background 60%; }
    .box { width: auto; max-width: 76; height: auto; border: round $accent; padding: 1 2; background: $panel; }
    .box Static { width: auto; max-width: 70; }
    .box Static:last-child { margin-top: 1; }
    Sheet { align: center middle; background: $background 60%; }
    .sheet { width: 100%; height: 100%; background: $panel; padding: 0 1; }
    .sheet .title { text-style: bold; color: $accent; height: 1; }
    .sheet VerticalScroll { height: 1fr; scrollbar-size: 1 1; background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *[Binding(str(number), f"view('{name}')") for number, name in enumerate(VIEWS, 1)],
        Binding("t", "table"),
        Binding("s", "sort"),
        Binding("r", "reverse"),
        Binding("slash", "filter"),
        Binding("escape", "all"),
        Binding("c,k", "cancel"),
        Binding("R", "retry"),
        Binding("h", "hold"),
        Binding("d", "detail"),
        Binding("p,space", "pause"),
        Binding("question_mark,f1", "help"),
        Binding("q", "leave"),
        Binding("ctrl+c", "leave", priority=True),
    ]

    def __init__(self, tables: Sequence[TableConfig], interval: float) -> None:
        super().__init__()
        self._names = short_names(tables)
        self._interval = interval
        self._watches = [Watch(table, interval, self._saw) for table in tables]
        self._only: int | None = None if len(tables) > 1 else 0
        self._view: View = VIEWS["running"]
        self._orders: dict[str, Order] = {}
        self._words = ""
        self._paused = False
        self._rows: list[Row] = []
        self._steered = False  # has the cursor been moved in this list?
        self._widths: dict[str, int] = {}
        self._laid: tuple[object, ...] = ()
        self._done: deque[float] = deque(maxlen=REMEMBERED)

    # What is on the screen.

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="tabs")
        yield Rows(cursor_type="row", cursor_foreground_priority="css", header_height=1)
        yield Static(id="empty")
        yield Input(id="filter", placeholder="words that the rows must have", compact=True)
        yield Static(id="answer")
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.register_theme(THEME)
        self.theme = THEME.name
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.action_leave)
        for watch in self._watches:
            watch.start()
        self.query_one(Rows).focus()
        self.set_interval(TICK, self._draw)
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    @on(Seen)
    def _seen(self) -> None:
        if not self._paused:
            self._draw(seen=True)

    def _saw(self) -> None:
        """In a watch's thread."""
        self.post_message(Seen())

    @property
    def _chosen(self) -> list[int]:
        """The tables that are looked at."""
        return list(range(len(self._watches))) if self._only is None else [self._only]

    def _draw(self, *, seen: bool = False) -> None:
        chosen = self._chosen
        found = summary([self._watches[one].sight for one in chosen], [self._names[one] for one in chosen])
        if seen and found.done is not None:
            self._done.append(found.done)
        width = self.size.width
        lines = [self._title(width - 2), *(_parts(one, width - 2) for one in (found.leader, found.load, found.ends))]
        room = width - 2 - lines[-1].cell_len - 3
        if room >= 8 and any(self._done):
            lines[-1].append("   ").append(spark(list(self._done), min(room, REMEMBERED)), style="#7ee0a2")
        lines += [Text(fit(trouble, width - 2), style=COLOURS["bad"]) for trouble in found.troubles[:3]]
        for line in lines:
            line.truncate(max(1, width - 2), overflow="ellipsis")
        self._put("#head", Text("\n").join(lines))
        self._list(width)
        self._put("#tabs", self._tabs(width - 2))
        self._put("#keys", _keys(self._offered(), width - 2))

    def _put(self, where: str, text: Text) -> None:
        self.query_one(where, Static).update(text)

    def _title(self, width: int) -> Text:
        if self._only is None:
            what = f"{len(self._watches)} tables"
        else:
            what = clean(self._watches[self._only].sight.label)
        left = Text.assemble(("pgtask top", f"bold {THEME.accent}"), "  ", (what, VALUE))
        right = Text(f"{datetime.now():%H:%M:%S}", style=LABEL)
        right.append(f"  every {self._interval:g}s", style=LABEL)
        if self._paused:
            right = Text(" PAUSED ", style=f"bold {THEME.background} on {THEME.accent}")
        left.truncate(max(1, width - right.cell_len - 2), overflow="ellipsis")
        return left + Text(" " * max(1, width - left.cell_len - right.cell_len)) + right

    def _tabs(self, width: int) -> Text:
        sights = [(one, self._watches[one].sight, self._names[one]) for one in self._chosen]
        line = Text()
        for number, view in enumerate(VIEWS.values(), 1):
            count = sum(1 for sight in sights for _ in view.rows(*sight))
            text = f" {number} {view.title} {count} "
            line.append(text, style=f"bold {THEME.background} on {THEME.accent}" if view is self._view else "").append(
                " "
            )
            line.apply_meta({"view": view.name}, len(line) - len(text) - 1, len(line) - 1)
        if self._words and self._view.name != "tables":
            line.append(f" /{self._words} {len(self._rows)}", style=f"bold {THEME.accent}")
        line.truncate(max(1, width), overflow="ellipsis")
        return line

    def _offered(self) -> list[tuple[str, str]]:
        """The keys that do something here, the most needed first."""
        keys = [("?", "help"), ("q", "quit"), ("s", "sort")]
        if self._view.name != "tables":
            keys.append(("/", "filter"))
        if self._view.name in ("running", "failed"):
            keys.append(("⏎", "detail"))
        if self._view.name == "running":
            keys.append(("c", "cancel"))
        if self._view.name == "failed":
            keys.append(("R", "run again"))
        if self._view.name != "tables":
            keys.append(("h", "hold"))
        else:
            keys.append(("⏎", "only this"))
        keys.append(("p", "go on" if self._paused else "pause"))
        if len(self._watches) > 1:
            keys.append(("t", "table"))
        return [*keys, ("r", "reverse")]

    # The list.

    def _list(self, width: int) -> None:
        sights = [(one, self._watches[one].sight, self._names[one]) for one in self._chosen]
        order = self._orders.get(self._view.name) or first_order(self._view)
        words = "" if self._view.name == "tables" else self._words
        rows = listed(self._view, sights, words, order)[: look.LISTED]
        columns = columns_of(self._view, width, len(sights) > 1)
        cells = [[column.shown(row) for column in columns] for row in rows]
        sizes = widths(columns, cells, width - 1, self._widths)  # one is the scrollbar's
        self._widths = {column.name: sizes[column.name] for column in columns if column.most}
        table = self.query_one(Rows)
        held = self._key_at(table.cursor_row)
        laid = (self._view.name, order, tuple(sizes.items()))
        if laid != self._laid:
            self._lay(table, columns, sizes, order)
        texts = [
            [_cell(row, column, text, sizes[column.name]) for column, text in zip(columns, line, strict=True)]
            for row, line in zip(rows, cells, strict=True)
        ]
        _fill(table, texts)
        self._rows, self._laid = rows, laid
        self._follow(table, held)
        table.display = bool(rows)
        empty = self.query_one("#empty", Static)
        empty.display = not rows
        empty.update(Text(f"no row has these words: {self._words}" if self._words else self._why_empty()))

    def _why_empty(self) -> str:
        known = any(self._watches[one].sight.figures for one in self._chosen)
        return self._view.empty if known else "nothing was read yet"

    def _lay(self, table: Rows, columns: Sequence[Any], sizes: Mapping[str, int], order: Order) -> None:
        table.clear(columns=True)
        for column in columns:
            mark = ("▼" if order.falling else "▲") if column.name == order.column else ""
            label = fit(column.title + mark, sizes[column.name], column.right)
            table.add_column(Text(label, style="bold" if mark else ""), width=sizes[column.name], key=column.name)

    def _key_at(self, index: int) -> str | None:
        return self._rows[index].key if 0 <= index < len(self._rows) else None

    def _follow(self, table: Rows, key: str | None) -> None:
        """The cursor stays with the row that it was moved to; one that is gone leaves it where it is."""
        if not self._steered:
            return
        place = next((index for index, row in enumerate(self._rows) if row.key == key), None)
        if place is None:
            place = min(table.cursor_row, len(self._rows) - 1)
        if place >= 0 and place != table.cursor_row:
            table.move_cursor(row=place, animate=False)

    @property
    def _at(self) -> Row | None:
        index = self.query_one(Rows).cursor_row
        return self._rows[index] if 0 <= index < len(self._rows) else None

    # What the keys do.

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While something is on top only what belongs to it."""
        return action in ("leave",) or not isinstance(self.screen, ModalScreen)

    def action_view(self, name: str) -> None:
        if self._view is not VIEWS[name]:
            self._view = VIEWS[name]
            self._widths = {}
            self._rows = []
            self._steered = False
            self._draw()
            self.query_one(Rows).move_cursor(row=0, animate=False)

    @on(events.Click, "#tabs")
    def _tab(self, event: events.Click) -> None:
        if name := event.style.meta.get("view"):
            self.action_view(name)

    def action_table(self) -> None:
        """All, the first, the next, ... and all again."""
        if len(self._watches) > 1:
            following = 0 if self._only is None else self._only + 1
            self._show_only(following if following < len(self._watches) else None)

    def _show_only(self, number: int | None) -> None:
        self._only = number
        self._widths = {}
        self._done.clear()
        self._draw()

    def action_sort(self) -> None:
        names = [one.name for one in columns_of(self._view, self.size.width, len(self._chosen) > 1)]
        order = self._orders.get(self._view.name) or first_order(self._view)
        after = names.index(order.column) + 1 if order.column in names else 0
        self._sort(chosen(self._view, names[after % len(names)]))

    def action_reverse(self) -> None:
        order = self._orders.get(self._view.name) or first_order(self._view)
        self._sort(Order(column=order.column, falling=not order.falling))

    def _sort(self, order: Order) -> None:
        self._orders[self._view.name] = order
        self._draw()

    @on(DataTable.HeaderSelected)
    def _header(self, event: DataTable.HeaderSelected) -> None:
        name = str(event.column_key.value)
        order = self._orders.get(self._view.name) or first_order(self._view)
        if order.column == name:
            self.action_reverse()
        else:
            self._sort(chosen(self._view, name))

    def action_filter(self) -> None:
        if self._view.name == "tables":
            self._answer("the tables are always all there; t chooses one", good=False)
            return
        field = self.query_one("#filter", Input)
        field.value = self._words
        field.display = True
        field.focus()

    @on(Input.Changed, "#filter")
    def _typed(self, event: Input.Changed) -> None:
        self._words = event.value
        self._draw()

    @on(Input.Submitted, "#filter")
    def _entered(self) -> None:
        self.query_one("#filter", Input).display = False
        self.query_one(Rows).focus()

    def action_all(self) -> None:
        self._entered()
        self._words = ""
        self._draw()

    def action_pause(self) -> None:
        self._paused = not self._paused
        for watch in self._watches:
            watch.pause(self._paused)
        self._draw()

    def action_help(self) -> None:
        markup = HELP.replace("[k]", f"[bold {THEME.accent}]").replace("[/k]", "[/]")
        self.push_screen(Sheet("pgtask top: keys and figures", Text.from_markup(markup)))

    def action_leave(self) -> None:
        for watch in self._watches:
            watch.stop()
        self.exit(return_code=OK)

    def action_cancel(self) -> None:
        row = self._at
        if row is None or self._view.name != "running":
            self._answer("choose a running task first (1): only what runs is cancelled here", good=False)
            return
        id, table = row.item.id, self._watches[row.number].table
        what = clean(row.item.input)[:120]
        self._ask(f"Cancel task {id} of {clean(table.label)}?\n\n{what}", row, lambda: look.cancel(table, id))

    def action_retry(self) -> None:
        row = self._at
        if row is None or self._view.name != "failed":
            self._answer("choose a failed task first (3)", good=False)
            return
        id, table = row.item.id, self._watches[row.number].table
        self._ask(f"Run task {id} of {clean(table.label)} again?", row, lambda: look.retry(table, id))

    def action_hold(self) -> None:
        row = self._at
        if row is None or self._view.name == "tables":
            self._answer("choose a group, or a task of it, first (2)", good=False)
            return
        group, table = row.item.group, self._watches[row.number].table
        held = row.figures is not None and any(one.held for one in row.figures.groups if one.group == group)
        if held:
            text = f"Release group {clean(group)} of {clean(table.label)}?\n\nIts tasks begin again."
            self._ask(text, row, lambda: look.release(table, group))
        else:
            text = (
                f"Hold group {clean(group)} of {clean(table.label)}?\n\nWhat runs goes on; nothing more of it begins."
            )
            self._ask(text, row, lambda: look.hold(table, group))

    def _ask(self, text: str, row: Row, act: Callable[[], str]) -> None:
        def decided(yes: bool | None) -> None:
            if yes:
                self._answer("asked the database, no answer yet", good=True)
                self._in_thread(act, self._watches[row.number])

        self.push_screen(Question(text), decided)

    def _in_thread(self, act: Callable[[], str], watch: Watch) -> None:
        def run() -> None:
            try:
                text, good = act(), True
            except (psycopg.Error, OSError, UserError) as error:
                text, good = redact(one_line(error)), False
            self.post_message(Answered(text, good=good))
            watch.look_now()

        threading.Thread(target=run, name="act", daemon=True).start()

    @on(Answered)
    def _answered(self, event: Answered) -> None:
        self._answer(event.text, good=event.good)

    def _answer(self, text: str, *, good: bool) -> None:
        said = Text(f"{datetime.now():%H:%M:%S} ", style=LABEL)
        said.append(clean(text), style=COLOURS["good" if good else "bad"])
        said.truncate(max(1, self.size.width - 2), overflow="ellipsis")
        self._put("#answer", said)

    def action_detail(self) -> None:
        row = self._at
        if row is None:
            return
        if self._view.name == "tables":
            self._show_only(row.number)
            self.action_view("running")
        elif self._view.name == "groups":
            self._words = row.item.group
            self.action_view("running")
        else:
            self._tell(self._watches[row.number].table, row.item.id)

    @on(Rows.Steered)
    def _was_steered(self) -> None:
        self._steered = True

    @on(DataTable.RowSelected)
    def _selected(self) -> None:
        """By the mouse, or by Enter."""
        self.action_detail()

    def _tell(self, table: TableConfig, id: int) -> None:
        self.push_screen(Sheet(f"task {id} of {clean(table.label)}", Text("reading ...", style=LABEL)))

        def read() -> None:
            try:
                self.post_message(Told(look.task(table, id)))
            except (psycopg.Error, OSError, UserError) as error:
                self.post_message(Told({"why not": redact(one_line(error))}))

        threading.Thread(target=read, name="detail", daemon=True).start()

    @on(Told)
    def _told(self, event: Told) -> None:
        if isinstance(self.screen, Sheet):
            self.screen.show(_task(event.read))


def _cell(row: Row, column: Any, text: str, width: int) -> Text:
    return Text(fit(text, width, column.right), style=COLOURS.get(column.mark(row), ""), no_wrap=True)


def _fill(table: Rows, texts: Sequence[Sequence[Text]]) -> None:
    """Cell by cell: a list that is made anew would jump."""
    while table.row_count > len(texts):
        table.remove_row(str(table.row_count - 1))
    for index, cells in enumerate(texts):
        if index >= table.row_count:
            table.add_row(*cells, key=str(index))
            continue
        for number, cell in enumerate(cells):
            before = table.get_cell_at((index, number))  # type: ignore[arg-type]
            if before.plain != cell.plain or before.style != cell.style:
                table.update_cell_at((index, number), cell)  # type: ignore[arg-type]


def _parts(parts: Sequence[Part], width: int) -> Text:
    line = Text(no_wrap=True)
    wide = sum(len(label) + len(value) + 4 for label, value, _ in parts) <= width
    for label, value, mark in parts:
        if line:
            line.append("   " if wide else "  ")
        if label:
            line.append(f"{label} ", style=LABEL)
        line.append(value, style=COLOURS.get(mark, VALUE))
    return line


def _keys(keys: Sequence[tuple[str, str]], width: int = 80) -> Text:
    """As many as there is room for."""
    line = Text(no_wrap=True)
    for key, what in keys:
        piece = Text.assemble((key, f"bold {THEME.accent}"), (f" {what}  ", LABEL))
        if line.cell_len + piece.cell_len - 2 <= width:
            line.append_text(piece)
    return line


LONG = ("input", "error", "output", "notice", "attempts")


def _task(read: Mapping[str, Any]) -> Stack:
    """The row for people: short values in lines, long ones under their names."""
    parts: list[Any] = []
    for name, value in read.items():
        if name in LONG or value in (None, "", [], 0, "00:00:00"):
            continue
        parts.append(Text.assemble((f"{name:<10}", LABEL), clean(str(value))))
    for name in LONG:
        if read.get(name) in (None, ""):
            continue
        parts += [Text(""), Text(name, style=f"bold {THEME.accent}")]
        if name == "attempts":
            parts.append(Text(_printable(json.dumps(read[name], indent=1, ensure_ascii=False))))
        elif name == "input":
            parts.append(Syntax(_printable(read[name]), "postgresql", word_wrap=True, background_color=THEME.panel))
        else:
            parts.append(Text(_printable(str(read[name])), style=COLOURS["bad"] if name == "error" else ""))
    return Stack(*parts)


def _printable(text: str) -> str:
    """Its lines, without what would move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else "    " if c == "\t" else "·" for c in text)
