"""What `pgtask top` makes of figures: words, orders and widths, without a server."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from rich.cells import cell_len

from pgtask import config
from pgtask.user.top import look
from pgtask.user.top.look import COUNTED, Failure, Figures, Group, Leader, Rates, Running, Sight, place
from pgtask.user.top.page import page
from pgtask.user.top.summary import summary
from pgtask.user.top.views import VIEWS, Order, chosen, columns_of, doing, listed, short_names, widths
from pgtask.user.top.words import age, clean, fit, number, rate, spark

RUN = Running(
    id=7,
    state="WORK",
    group="mail",
    remote="",
    pid=4711,
    attempt=1,
    elapsed=2.5,
    timeout=0,
    session="active",
    wait_event_type=None,
    wait_event=None,
    percent=None,
    message=None,
    input="SELECT 1",
)
GROUP = Group(
    group="mail", remote="", running=1, slots=2, due=3, oldest=4.0, done=0.5, failed=0,
    held=False, held_for=None, held_by=None,
)  # fmt: skip
FAILURE = Failure(
    id=3, group="mail", remote="", ago=60.0, ran=1.0, attempt=1, code="22012", input="x",
    error="ERROR:  division by zero\nSTATEMENT:  x",
)  # fmt: skip
LEADER = Leader(term=3, host="db1", pid=42, since="2026-01-01T00:00:00Z", serving=90.0, leads=True)
FIGURES = Figures(
    at="2026-01-01T00:00:00Z", server="15", leader=LEADER, standing_by=1, workers=2, slots=1, due=3, oldest=4.0,
    planned=0, next=None, waiting=0, done_per_second=1.5, removed_per_second=1.0, failed_per_second=0.0,
    inserted_per_second=1.0,
    failed=1, group_count=1, lacks=(), running=(RUN,), groups=(GROUP,), failures=(FAILURE,),
)  # fmt: skip


def sight(**changed: Any) -> Sight:
    return Sight(
        label="app@billing public.task", figures=dataclasses.replace(FIGURES, **changed), seen=time.monotonic()
    )


def rows_of(view: str, *sights: Sight, words: str = "", order: Order | None = None) -> Sequence[Any]:
    named = [(index, one, f"t{index}") for index, one in enumerate(sights)]
    return [row.item for row in listed(VIEWS[view], named, words, order)]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"), (-1, "0.0s"), (0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1:00"),
        (3599.6, "1:00:00"), (86399, "23:59:59"), (86400 * 2.5, "2d 12h"), (86400 * 1234.5, "1,234d"),
    ],
)  # fmt: skip
def test_age_is_as_short_as_may_be(seconds: float | None, words: str) -> None:
    assert age(seconds) == words


def test_a_number_beyond_what_is_counted_says_so() -> None:
    assert (number(COUNTED), number(COUNTED + 1), number(812, True), number(None)) == ("10,000", "10,000+", "812+", "-")
    assert (rate(None), rate(0.26), rate(12345.6)) == ("-", "0.3", "12,346")


def test_what_is_shown_is_one_line_without_passwords_and_control_characters() -> None:
    assert clean("a\x1b[2Jb\n\tc  d\u202e") == "a·[2Jb c d·"
    assert "hunter2" not in clean("SELECT dblink('host=h password=hunter2')")
    assert clean(None) == ""


@pytest.mark.parametrize("width", [0, 1, 2, 5, 9, 20])
@pytest.mark.parametrize("text", ["", "mail", "日本語の名前", "a日b本c", "e\u0301te\u0301"])
def test_fit_takes_the_cells_it_is_given(text: str, width: int) -> None:
    assert cell_len(fit(text, width)) == width
    assert cell_len(fit(text, width, right=True)) == width


def test_bars_have_the_greatest_value_for_their_height() -> None:
    assert spark([0, 1, 2, 4], 3) == "▃▅█"
    assert spark([0, 0], 5) == "▁▁"
    assert spark([], 5) == spark([1], 0) == ""


def test_rates_are_of_the_last_seconds_and_begin_anew_after_a_reset() -> None:
    rates = Rates()
    assert rates.add(100, 10, 0) == (None, None)
    assert rates.add(102, 30, 4) == (10, 2)
    assert rates.add(112, 30, 4) == (0, 0)  # since 102
    assert rates.add(113, 5, 0) == (None, None)  # the statistics were reset
    assert rates.add(114, 7, 0) == (2, 0)


def test_where_a_remote_task_runs_is_told_without_how_to_get_in() -> None:
    assert place("host=crm dbname=app user=u password=hunter2") == "app@crm"
    assert place("postgresql://u:hunter2@crm/app") == "app@crm"
    assert place("user=u password=hunter2") == place("no=conninfo hunter2") == "remote"
    assert place("") == ""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"state": "TAKE"}, "starting"),
        ({"state": "STOP"}, "stopping"),
        ({"remote": "app@crm"}, "remote"),
        ({"session": None}, "?"),
        ({}, "on CPU"),
        ({"session": "idle in transaction"}, "idle in transaction"),
        ({"wait_event_type": "Lock", "wait_event": "tuple"}, "Lock:tuple"),
    ],
)
def test_what_a_run_waits_for(changed: dict[str, Any], words: str) -> None:
    assert doing(dataclasses.replace(RUN, **changed)) == words


def test_rows_are_sorted_and_what_is_not_known_comes_last() -> None:
    runs = [dataclasses.replace(RUN, id=id, elapsed=elapsed) for id, elapsed in ((1, 5.0), (2, None), (3, 9.0))]
    one = sight(running=tuple(runs))
    assert [row.id for row in rows_of("running", one)] == [3, 1, 2]
    assert [row.id for row in rows_of("running", one, order=Order(column="for", falling=False))] == [1, 3, 2]
    assert [row.id for row in rows_of("running", one, order=chosen(VIEWS["running"], "id"))] == [1, 2, 3]


def test_a_filter_has_words_that_all_must_be_there() -> None:
    runs = tuple(dataclasses.replace(RUN, id=id, group=group) for id, group in ((1, "Mail A"), (2, "mail q"), (3, "x")))
    one = sight(running=runs)
    assert [row.id for row in rows_of("running", one, words="MAIL")] == [1, 2]
    assert [row.id for row in rows_of("running", one, words="q mail")] == [2]
    assert [row.id for row in rows_of("running", one, sight(running=()), words="t0 x")] == [3]


def test_tables_have_the_shortest_names_that_tell_them_apart() -> None:
    def tables(*names: tuple[str, str, str]) -> list[config.TableConfig]:
        found = [config.load(None, [f"user={u} dbname={d}"], {"schema": s}, {}).tables[0] for u, d, s in names]
        return list(found)

    assert short_names(tables(("u", "a", "public"), ("u", "b", "public"))) == ["a", "b"]
    assert short_names(tables(("u", "a", "x"), ("u", "a", "y"))) == ["a x.task", "a y.task"]
    assert short_names(tables(("u", "a", "x"), ("v", "a", "x"))) == ["u@a x.task", "v@a x.task"]


LONG_RUN = dataclasses.replace(
    RUN, id=9223372036854775807, group="日本語の長い名前 " * 9, elapsed=1e9, wait_event_type="Timeout",
    attempt=2147483647, wait_event="RecoveryRetrieveRetryInterval", input="SELECT " + "x" * 400, percent=99.99,
    message="m" * 1000,
)  # fmt: skip
MOST = COUNTED + 1
LONG_GROUP = dataclasses.replace(
    GROUP, group="g" * 99, slots=2147483648, due=MOST, oldest=1e8, failed=MOST, held=True, held_by="r" * 63
)
LONG_FAILURE = dataclasses.replace(FAILURE, id=9223372036854775807, group="g" * 99, ago=1e6, error="e" * 400)
LONGEST = dataclasses.replace(
    FIGURES, due=MOST, planned=MOST, waiting=MOST, slots=100, workers=100, failed=6000, oldest=1e8,
    running=(LONG_RUN,), done_per_second=12345.6, failed_per_second=1234.5, inserted_per_second=12345.6, standing_by=10,
    leader=dataclasses.replace(LEADER, host="database-1", pid=4194304, serving=86400 * 99.0),
    groups=(LONG_GROUP,), failures=(LONG_FAILURE,),
)  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
@pytest.mark.parametrize("several", [False, True])
def test_columns_have_room_on_every_terminal(view: Any, width: int, several: bool) -> None:
    one = Sight(label="l", figures=LONGEST, seen=time.monotonic())
    rows = listed(view, [(0, one, "a database with a long name")], "", None)
    columns = columns_of(view, width, several)
    cells = [[column.shown(row) for column in columns] for row in rows]
    sizes = widths(columns, cells, width, {})
    assert sum(sizes.values()) + 2 * (len(columns) - 1) <= width
    essential = {
        "running": {"id", "group", "for", "waits", "input"},
        "groups": {"group", "run", "slots", "due", "oldest"},
    }
    assert essential.get(view.name, {"failed"} if view.name == "tables" else {"id", "error"}) <= {
        c.name for c in columns
    }


def test_columns_do_not_become_narrower_while_they_are_looked_at() -> None:
    columns = [one for one in columns_of(VIEWS["running"], 80, False) if one.name in ("id", "input")]
    before = widths(columns, [["123456789", "x"]], 80, {})
    assert widths(columns, [["1", "x"]], 80, before) == before


def test_figures_above_the_lists_have_room_at_80_columns() -> None:
    found = summary([Sight(label="l", figures=LONGEST, seen=time.monotonic())], ["l"])
    for parts in (found.leader, found.load, found.ends):
        assert len("  ".join(f"{label} {value}".strip() for label, value, _ in parts)) <= 78


def test_a_page_is_as_wide_as_it_may_be_and_says_what_is_down() -> None:
    down = Sight(label="x", error="connection refused")
    lines = list(page([sight(), down], ["billing", "crm"], 80))
    assert all(cell_len(line) <= 80 for line in lines)
    assert "tables led 1 of 2  by db1  down 1" in lines
    assert "crm: down: connection refused" in lines
    assert any(line.split()[:3] == ["billing", "db1", "42"] for line in lines)
    assert any("division by zero" in line for line in lines)


def test_a_table_that_nobody_serves_says_who_was_the_last() -> None:
    alone = summary([sight(leader=dataclasses.replace(LEADER, leads=False))], ["a"]).leader
    assert alone[:2] == [("", "no master serves this table", "bad"), ("the last was", "db1 pid 42", "")]
    assert summary([sight(leader=None)], ["a"]).leader == [("", "no master serves this table", "bad")]


def test_a_watch_that_gets_no_answer_says_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hang(table: Any) -> Any:
        asked.set()
        answer.wait(60)
        raise OSError("at last")

    monkeypatch.setattr(look, "connect", hang)
    [table] = config.load(None, ["dbname=a"], {}, {}).tables
    told = threading.Event()
    watch = look.Watch(table, 3600, told.set)
    watch.start()
    assert asked.wait(30)
    now = time.monotonic()
    assert watch.sight.trouble(now) is None
    assert (watch.sight.trouble(now + 30) or "").startswith("no answer for 3")
    answer.set()
    assert told.wait(30)
    assert watch.sight.trouble(time.monotonic()) == "at last"
    watch.stop()
    watch.join(30)
    assert not watch.is_alive()
