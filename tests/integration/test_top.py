"""`pgtask top` on real servers: as a page, as JSON, on a terminal, and while what it watches goes away."""

import asyncio
import html
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ
from typing import Any

import psycopg
import pyte
import pytest
from textual.pilot import Pilot

from pgtask import config, embedded
from pgtask.errors import UserError
from pgtask.user.top import look
from pgtask.user.top.screen import Rows, Top
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import ROOT, Master
from tests.fixtures.proxy import Proxy
from tests.fixtures.wait import eventually

COMMAND = [sys.executable, "-c", "from pgtask.user import commands; commands.user(prog_name='pgtask')", "top"]
LONG = 60.0
"""Seconds to wait for what comes within one on a machine that has nothing else to do."""


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The terminal takes the signals over, and asyncio forgets whose they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def call(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environ}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=env)


def page(database: Database, *arguments: str) -> str:
    done = call("-d", database.conninfo, "--interval", "0.1", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def snapshot(database: Database) -> dict[str, Any]:
    [table] = json.loads(page(database, "--json"))
    return dict(table)


def table_of(conninfo: str) -> config.TableConfig:
    return config.load(None, [conninfo], {}, {}).tables[0]


def on_screen(app: Top) -> list[str]:
    """The lines as a picture of the screen has them."""
    parts = re.findall(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', app.export_screenshot())
    lines: dict[float, list[str]] = {}
    for x, y, text in parts:
        cell = round(float(x) / 12.2)
        line = lines.setdefault(float(y), [])
        line.append(" " * (cell - len("".join(line))) + html.unescape(text).replace("\xa0", " "))
    return ["".join(lines[y]) for y in sorted(lines)]


async def shows(app: Top, pilot: Pilot[None], what: str, *, gone: bool = False) -> list[str]:
    """The screen, once a line has that text; with `gone`, once none has it."""
    return await comes(app, pilot, lambda lines: any(what in line for line in lines) is not gone, what)


async def comes(app: Top, pilot: Pilot[None], fits: Callable[[list[str]], bool], what: object) -> list[str]:
    """The screen, once it fits."""
    deadline = time.monotonic() + LONG
    while not fits(lines := on_screen(app)):
        assert time.monotonic() < deadline, (what, lines)
        await pilot.pause(0.05)
    return lines


def piloted(
    act: Callable[[Top, Pilot[None]], Coroutine[Any, Any, None]], *conninfos: str, size: tuple[int, int] = (80, 24)
) -> None:
    async def run() -> None:
        app = Top([table_of(one) for one in conninfos], 0.2)
        async with app.run_test(size=size) as pilot:
            await act(app, pilot)
            await pilot.press("q")
        assert app.return_code == 0
        for watch in app._watches:
            watch.join(LONG)

    asyncio.run(run())


@contextmanager
def running(database: Database, group: str, **columns: Any) -> Iterator[int]:
    """A task that runs as long as the block."""
    with held(database):
        id = database.insert(WAIT, **({"group": group, "delete": False} | columns))
        database.wait(id, "WORK")
        wait_runs(database)
        yield id
    database.wait(id)


def failed(database: Database, group: str, input: str = "SELECT 1/0") -> int:
    id = database.insert(input, group=group)
    database.wait(id, "FAIL")
    return id


# As a page, and as JSON


def test_a_page_tells_who_leads_what_runs_what_is_due_and_what_failed(served: Database) -> None:
    bad = failed(served, "page bad")
    with running(served, "page") as id:
        due = served.insert("SELECT 1 WHERE false", group="page")
        lines = page(served, "--once").splitlines()
        assert lines[1].startswith("leader "), lines
        assert any(re.fullmatch(rf" *{id}  page +\S+s  Lock:advisory +1 +{re.escape(WAIT)}", x) for x in lines), lines
        assert any(re.match(r"page +1 +1 +1 +\S+s .* full$", line) for line in lines), lines
        assert any(re.match(rf" *{bad}  page bad .* 22012  division by zero", line) for line in lines), lines
        assert all(len(line) <= 100 for line in lines)
    served.wait(due, gone=True)


def test_json_is_one_document_with_every_figure(served: Database) -> None:
    bad = failed(served, "json bad")
    with running(served, "json", timeout="1 hour") as id:
        due = served.insert("SELECT 1 WHERE false", group="json")
        later = served.insert("SELECT 1", group="json", plan="2100-01-01")
        found = snapshot(served)
        assert (found["down"], found["schema"], found["table"]) == (None, "public", "task")
        assert found["leader"]["leads"] is True
        assert (found["slots"], found["planned"]) == (1, 1)
        assert found["due"] >= 1
        assert found["oldest"] > 0
        assert found["failed"] >= 1
        assert found["done_per_second"] >= 0
        [run] = [one for one in found["running"] if one["id"] == id]
        assert (run["state"], run["group"], run["wait_event_type"], run["timeout"]) == ("WORK", "json", "Lock", 3600)
        assert run["elapsed"] > 0
        [group] = [one for one in found["groups"] if one["group"] == "json"]
        assert (group["running"], group["slots"], group["due"], group["held"]) == (1, 1, 1, False)
        assert bad in [one["id"] for one in found["failures"]]
    served.wait(due, gone=True)
    served.execute("DELETE FROM task WHERE id = %s", [later])


def test_rates_count_what_is_kept_and_what_is_removed(served: Database) -> None:
    reader = look.Reader(table_of(served.conninfo))
    reader.look()
    served.execute(
        """INSERT INTO task ("group", max, input)
        SELECT 'rates', 3, unnest('{SELECT 1,SELECT 1 WHERE false}'::text[]) FROM generate_series(1, 20)"""
    )

    seen: set[str] = set()

    def counted() -> bool:
        """Each of them at some time: what a session has inserted or removed, it may tell ten seconds later."""
        figures = reader.look()
        kept = [group.done for group in figures.groups if group.group == "rates"]
        rates = {"kept": sum(kept), "removed": figures.removed_per_second, "inserted": figures.inserted_per_second}
        seen.update(name for name, rate in rates.items() if rate)
        return seen == set(rates)

    eventually(counted, LONG, every=0.1)
    reader.close()


def test_rows_that_ended_are_found_beside_a_backlog_and_behind_newer_ones(served: Database) -> None:
    served.execute("SELECT task_hold('backlog')")
    old = served.insert("SELECT 1/0", group="behind", plan="2100-01-01")
    query = """INSERT INTO task ("group", input, plan, active)
        SELECT 'backlog', 'SELECT 1', '2000-01-01', '100 years' FROM generate_series(1, %s)"""
    served.execute(query, [2 * look.PLACE])
    served.execute("UPDATE task SET plan = now() WHERE id = %s", [old])
    served.wait(old, "FAIL")
    found = snapshot(served)
    assert old in [one["id"] for one in found["failures"]]
    assert found["due"] == 2 * look.PLACE
    served.execute("""DELETE FROM task WHERE "group" = 'backlog'""")
    served.execute("SELECT task_release('backlog')")


def test_without_a_terminal_it_is_one_page(served: Database) -> None:
    assert page(served).startswith("pgtask top  ")
    assert page(served, "--once", "--config", os.devnull).startswith("pgtask top  ")


def test_names_that_would_move_the_cursor_are_shown_harmless(served: Database) -> None:
    with running(served, "a\x1b[31m日本\n\u202e"):
        text = page(served, "--once")
        assert "a·[31m日本 ·" in text
        assert "\x1b" not in text


def test_no_password_of_a_remote_task_is_shown(served: Database) -> None:
    remote = served.server.tcp(served.name, served.user, password=served.password)
    with held(served):
        id = served.insert(WAIT + " -- password=hunter2", group="remote", remote=remote)
        served.wait(id, "WORK")
        for text in (page(served, "--once"), page(served, "--json")):
            assert f"{served.name}@127.0.0.1" in text
            assert served.password not in text.replace(served.conninfo, "")
            assert "hunter2" not in text
        read = look.task(table_of(served.conninfo), id)
        assert (read["remote"], "hunter2" in read["input"]) == (f"{served.name}@127.0.0.1", False)
    served.wait(id)


# What may be missing


def test_a_table_without_a_master_says_so(database: Database) -> None:
    install(database)
    lines = page(database, "--once").splitlines()
    assert lines[1] == "no master serves this table"
    assert snapshot(database)["leader"] is None


def test_a_database_without_the_table_is_down_with_what_mends_it(database: Database) -> None:
    done = call("-d", database.conninfo, "--once")
    assert done.returncode == 1
    assert "down: there is no such table yet: pgtask-master makes it" in done.stdout


def test_a_role_sees_what_it_may_and_is_told_what_it_lacks(served: Database) -> None:
    role = f"{served.name}_reader"
    served.admin_execute(f'CREATE ROLE "{role}" LOGIN')
    try:
        conninfo = served.server.conninfo(served.name, role)
        with pytest.raises(UserError, match=r"may not read public\.task: GRANT SELECT ON"):
            look.Reader(table_of(conninfo)).look()
        served.execute(f'GRANT SELECT ON task TO "{role}"')
        with running(served, "rights") as id:
            reader = look.Reader(table_of(conninfo))
            figures = reader.look()
            reader.close()
            assert figures.lacks == ("task_master", "task_held", "task_report")
            assert figures.leader is not None
            assert figures.leader.leads
            assert [one.session for one in figures.running if one.id == id] == [None]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                look.cancel(table_of(conninfo), id)
            assert served.wait(id, "WORK")
    finally:
        served.execute(f'REVOKE ALL ON task FROM "{role}"')
        served.admin_execute(f'DROP ROLE "{role}"')


def test_a_look_walks_indexes_and_writes_nothing(served: Database) -> None:
    reader = look.Reader(table_of(served.conninfo))
    session = reader._open()
    limits = [look.RUNNING, look.COUNTED + 1, look.PLACE, look.SPAN, look.HISTORY, look.LISTED]
    with session.transaction():
        for name, value in look.SETTINGS.items():
            session.execute("SELECT set_config($1, $2, true)", [name, value])
        plan = "\n".join(row[0] for row in session.execute(b"EXPLAIN " + reader._statement.encode(), limits))
    reader.close()
    assert not re.search(r"Seq Scan on task ", plan), plan
    with look.connect(table_of(served.conninfo)) as other, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        look._read(other, "SELECT public.task_hold('x')")
    assert served.execute("SELECT * FROM task_held") == []


# On a terminal, through Textual's own pilot


def test_keys_sort_filter_and_change_what_is_listed(served: Database) -> None:
    failed(served, "keys bad", "SELECT 1/0 -- failing")

    async def act(app: Top, pilot: Pilot[None]) -> None:
        lines = await shows(app, pilot, "keys one")
        assert any("FOR▼" in line for line in lines)
        await pilot.press("s")
        await shows(app, pilot, "WAITS FOR▲")
        await pilot.press("r")
        await shows(app, pilot, "WAITS FOR▼")
        await pilot.press("slash", *"keys")
        await pilot.press("enter")
        await comes(app, pilot, lambda _: [row.item.group for row in app._rows] == ["keys one"], "only keys one")
        await pilot.press("slash", *"nosuch", "enter")
        await shows(app, pilot, "no row has these words: nosuch")
        await pilot.press("escape")
        await shows(app, pilot, "keys one")
        await pilot.press("3")
        lines = await shows(app, pilot, "keys bad")
        assert any("division by zero" in line for line in lines)
        await pilot.press("2")
        await shows(app, pilot, "DUE▼")
        await pilot.press("slash", *"keys one", "enter", "enter")  # what runs of that group
        lines = await shows(app, pilot, "FOR▼")
        assert any("keys one" in line for line in lines)
        await pilot.press("4")
        await shows(app, pilot, "LEADER")

    with running(served, "keys one"):
        piloted(act, served.conninfo)


def test_a_running_task_is_cancelled_after_a_question(served: Database) -> None:
    with held(served):
        id = served.insert(WAIT, group="cancel me", delete=False)
        other = served.insert(WAIT, group="cancel not", delete=False)
        wait_runs(served, 2)

        async def act(app: Top, pilot: Pilot[None]) -> None:
            await shows(app, pilot, "cancel me")
            await pilot.press("slash", *"cancel me", "enter", "c")
            await shows(app, pilot, f"Cancel task {id} of")
            await pilot.press("n")
            await shows(app, pilot, f"Cancel task {id} of", gone=True)
            assert served.wait(id, "WORK")
            await pilot.press("c", "y")
            await shows(app, pilot, f"task {id} is stopped")
            await shows(app, pilot, "no row has these words")

        piloted(act, served.conninfo)
        row = served.wait(id, "STOP")
        eventually(lambda: (served.task(id) or {})["stop"], LONG)  # the run is really over, although the lock is held
        assert "task stopped by" in row["error"]
        assert served.wait(other, "WORK")
    served.wait(other, "DONE")


def test_a_failed_task_runs_again_and_its_details_are_told(served: Database) -> None:
    id = failed(served, "details", "SELECT 1/0 -- [b]no markup[/b]")

    async def act(app: Top, pilot: Pilot[None]) -> None:
        await pilot.press("3")
        await shows(app, pilot, "details")
        await pilot.press("slash", *"details", "enter", "enter")
        lines = await shows(app, pilot, "SELECT 1/0 -- [b]no markup[/b]")
        assert any("ERROR:  division by zero" in line for line in lines)
        assert any("22012" in line for line in lines)
        await pilot.press("escape")
        await shows(app, pilot, "3 Failed")
        await pilot.press("R", "y")
        await shows(app, pilot, f"task {id} runs again")

    piloted(act, served.conninfo)
    eventually(lambda: (served.task(id) or {})["attempts"], LONG)
    assert served.wait(id, "FAIL")["attempt"] == 2


def test_a_group_is_held_and_released(served: Database) -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        await shows(app, pilot, "hold me")
        await pilot.press("2")
        await pilot.press("slash", *"hold me", "enter", "h")
        await shows(app, pilot, "Hold group hold me of")
        await pilot.press("y")
        await shows(app, pilot, "group hold me is held")
        await shows(app, pilot, f"held by {served.user}"[:15])
        assert served.execute('SELECT "group" FROM task_held') == [("hold me",)]
        await pilot.press("h")
        await shows(app, pilot, "Release group hold me of")
        await pilot.press("y")
        await shows(app, pilot, "group hold me is released")
        assert served.execute("SELECT * FROM task_held") == []

    with running(served, "hold me"):
        piloted(act, served.conninfo)


def test_what_the_database_refuses_is_said(served: Database) -> None:
    role = f"{served.name}_looker"
    served.admin_execute(f'CREATE ROLE "{role}" LOGIN')
    served.execute(f'GRANT SELECT ON task TO "{role}"')

    async def act(app: Top, pilot: Pilot[None]) -> None:
        await shows(app, pilot, "refused")
        await shows(app, pilot, "no right to read task_master, task_held")
        await pilot.press("c", "y")
        await shows(app, pilot, "permission denied for table task")

    try:
        with running(served, "refused"):
            piloted(act, served.server.conninfo(served.name, role))
    finally:
        served.execute(f'REVOKE ALL ON task FROM "{role}"')
        served.admin_execute(f'DROP ROLE "{role}"')


def test_pause_reads_nothing_until_it_goes_on(served: Database) -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        await shows(app, pilot, "running 1")
        await pilot.press("p")
        await shows(app, pilot, "PAUSED")
        id = served.insert("SELECT 1/0", group="pause bad")
        served.wait(id, "FAIL")
        await pilot.press("3")
        await pilot.pause(1)  # in which it would look several times
        assert not any("pause bad" in line for line in on_screen(app))
        await pilot.press("p")
        await shows(app, pilot, "pause bad")

    with running(served, "pause"):
        piloted(act, served.conninfo)


def test_essentials_are_there_at_80_columns_and_more_on_wider_terminals(served: Database) -> None:
    async def act(app: Top, pilot: Pilot[None]) -> None:
        lines = await shows(app, pilot, "BACKEND")
        assert any(WAIT in line for line in lines)
        await pilot.resize_terminal(80, 24)
        words = ["leader", "workers", "backlog", "oldest", "done/s", "failed/s", "1 Running", "4 Tables"]
        words += ["ID", "GROUP", "FOR▼", "WAITS FOR", "INPUT", "? help", "q quit", "s sort", "/ filter", "c cancel"]

        def essential(lines: list[str]) -> bool:
            text = "\n".join(lines)
            row = re.search(r"\d  narrow +\S+s  Lock:advisory +SELECT", text)
            return "BACKEND" not in text and row is not None and all(word in text for word in words)

        lines = await comes(app, pilot, essential, words)  # the terminal is smaller before its lists are drawn anew
        assert len(lines) <= 24
        await pilot.press("question_mark")
        await shows(app, pilot, "keys and figures")
        for _ in range(60):
            await pilot.press("down")
        await shows(app, pilot, "rolled back too")
        await pilot.press("escape")
        await shows(app, pilot, "narrow")

    with running(served, "narrow"):
        piloted(act, served.conninfo, size=(140, 40))


def test_the_cursor_stays_with_its_task_while_others_come(served: Database) -> None:
    with running(served, "cursor 1") as first, held(served, 7001):

        async def act(app: Top, pilot: Pilot[None]) -> None:
            await shows(app, pilot, "cursor 1")
            await pilot.press("s", "r")
            while app._orders["running"].column != "id":
                await pilot.press("s")
            await pilot.press("r", "down")  # the greatest first; there is only one
            assert app._at is not None
            assert app._at.item.id == first
            other = served.insert("SELECT pg_advisory_xact_lock_shared(7001)", group="cursor 2", delete=False)
            await shows(app, pilot, "cursor 2")
            assert [row.item.id for row in app._rows] == [other, first]
            assert app._at.item.id == first
            assert app.query_one(Rows).cursor_row == 1

        piloted(act, served.conninfo)


# Several tables, and what goes away meanwhile


def test_a_database_that_gives_no_answer_never_stops_the_others(
    served: Database, new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(served.tcp)

    async def act(app: Top, pilot: Pilot[None]) -> None:
        await shows(app, pilot, "2 tables")
        await shows(app, pilot, "tables led 2 of 2")
        proxy.deafen(future=True)
        await shows(app, pilot, "old: no answer for")
        number = app._watches[0].looks
        eventually(lambda: app._watches[0].looks > number, LONG)
        await pilot.press("4")
        lines = await shows(app, pilot, "tables led 1 of 2")
        assert any("down, figures " in line for line in lines)
        await pilot.press("t")
        await shows(app, pilot, "leader")
        proxy.hear()
        await pilot.press("t", "t")
        await shows(app, pilot, "tables led 2 of 2")

    # The same table twice, once by each way; the network between is what differs.
    piloted(act, served.conninfo, proxy.conninfo)


def test_a_server_that_restarts_comes_back(
    own_database: Database, own_server: embedded.Server, master: Callable[..., Master]
) -> None:
    one = master(own_database.conninfo)
    one.may_log_errors = True

    async def act(app: Top, pilot: Pilot[None]) -> None:
        await shows(app, pilot, "leader")
        own_server.stop()
        lines = await shows(app, pilot, "down, figures ")
        assert any("leader" in line for line in lines)  # what was known stays
        own_server.start_again()
        eventually(lambda: app._watches[0].sight.error is None, LONG)
        await shows(app, pilot, "leader")

    piloted(act, own_database.conninfo)


# A real terminal


class Terminal:
    """The command in a pseudo-terminal of 80 by 24; what it shows, as an emulator has it."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._main, other = pty.openpty()
        self.size(24, 80)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environ}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            if name not in environ:
                env.pop(name, None)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=other, stdout=other, stderr=other, env=env, start_new_session=True
        )
        os.close(other)
        self.raw = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def size(self, lines: int, columns: int) -> None:
        ioctl(self._main, TIOCSWINSZ, pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._main, 65536)
            except OSError:
                return
            if not data:
                return
            with self._lock:
                self.raw += data
                # Questions of the private kind, which the emulator would show.
                self._stream.feed(re.sub(rb"\x1b\[[<>=?][\d;]*[a-zA-Z]|\x1b\[\?[\d;$]*p", b"", data))

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    def shows(self, pattern: str) -> list[str]:
        def found() -> list[str]:
            assert self.process.poll() is None, (self.process.returncode, self.raw[-2000:])
            return [line for line in self.lines if re.search(pattern, line)]

        try:
            return eventually(found, LONG)
        except AssertionError:
            raise AssertionError((pattern, self.lines)) from None

    def press(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def ends(self) -> int:
        status = self.process.wait(LONG)
        self._thread.join(LONG)
        os.close(self._main)
        return status


@pytest.mark.parametrize("way", [b"q", b"\x03", signal.SIGTERM])
def test_on_a_real_terminal_it_shows_the_running_task_and_leaves_with_status_0(
    served: Database, way: bytes | signal.Signals
) -> None:
    with running(served, "terminal") as id:
        terminal = Terminal("-d", served.conninfo, "--interval", "0.2")
        terminal.shows(rf"\b{id}  terminal +\S+s  Lock:advisory  +SELECT")
        terminal.shows(r"^ *pgtask top  .*every 0.2s *$")
        terminal.press(b"2")
        terminal.shows(r"terminal +1 +1 +0")
        if isinstance(way, bytes):
            terminal.press(way)
        else:
            terminal.process.send_signal(way)
        assert terminal.ends() == 0
        assert b"\x1b[?1049l" in terminal.raw  # the terminal is as it was
        assert b"Traceback" not in terminal.raw


def test_a_terminal_without_colour_is_written_to_without_colour(served: Database) -> None:
    terminal = Terminal("-d", served.conninfo, NO_COLOR="1")
    terminal.shows(r"^ *leader ")
    terminal.press(b"q")
    assert terminal.ends() == 0
    colours = {
        tuple(one.split(b";")[2:5]) for one in re.findall(rb"\x1b\[(?:\d;)*((?:38|48);2;\d+;\d+;\d+)", terminal.raw)
    }
    assert all(red == green == blue for red, green, blue in colours), colours


def test_a_terminal_that_can_do_nothing_gets_one_page(served: Database) -> None:
    terminal = Terminal("-d", served.conninfo, "--interval", "0.1", TERM="dumb")
    assert terminal.ends() == 0
    assert b"\x1b" not in terminal.raw
    assert b"pgtask top  " in terminal.raw


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = call("--config", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
