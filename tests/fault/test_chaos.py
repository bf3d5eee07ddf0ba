"""The chaos suite itself: a short run ends well, an interrupted one leaves nothing, the account sees what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from storm.account import Account, Entry, Found, Row, account
from storm.clients import Answer, Insert
from storm.kinds import KINDS, REPEATED, Kind
from storm.scenarios import Strike
from tests.fixtures.processes import processes, title
from tests.fixtures.server import binaries
from tests.fixtures.wait import eventually

ROOT = Path(__file__).resolve().parent.parent.parent
KIND = {kind.name: kind for kind in KINDS}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the program makes its directories; a short path, since sockets lie in it."""
    directory = Path(tempfile.gettempdir(), f"chaos-{os.getpid()}")
    directory.mkdir()
    directory.chmod(0o777)
    yield directory
    left = sorted(str(path) for path in directory.rglob("*"))
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    assert not left, "files were left behind"


@contextmanager
def started(temporary: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, ROOT / "bench/chaos.py", "--pg", str(binaries().version), *arguments]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd="/", env=environment, text=True, start_new_session=True, **streams) as chaos:
        try:
            yield chaos
        finally:
            if chaos.poll() is None:
                chaos.send_signal(signal.SIGINT)


def left_of(temporary: Path) -> list[str]:
    """The processes that have anything to do with the program's directory."""
    return [found for one in processes() if str(temporary) in (found := title(one.pid))]


def test_a_short_run_loses_nothing_and_says_so_in_a_table_and_as_json(temporary: Path, tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    scenarios = ("workers", "backends")
    chosen = [word for name in scenarios for word in ("--scenario", name)]
    with started(temporary, "--minutes", "0.08", "--rate", "30", "--seed", "7", *chosen, "--json", str(file)) as chaos:
        text = chaos.communicate(timeout=150)[0]
    assert chaos.returncode == 0, text
    assert "\x1b" not in text, "colours in a pipe"
    assert "all well" in text
    told = json.loads(file.read_text())
    assert (told["seed"], told["server"], told["trouble"]) == ("7", binaries().version, "")
    assert [one["scenario"] for one in told["scenarios"]] == list(scenarios)
    for one in told["scenarios"]:
        assert re.search(rf"^{one['scenario']} +{one['faults']} +{one['tasks']} +{one['done']} ", text, re.MULTILINE)
        assert one["faults"] > 0
        assert one["done"] > 0
        assert one["tasks"] == one["done"] + sum(one["failed_as_meant"].values())
        assert (one["lost"], one["twice"]["atomic"], one["failed_wrongly"], one["wrong"]) == (0, 0, {}, [])
        assert one["recovery_median_s"] <= one["recovery_longest_s"]
    eventually(lambda: not left_of(temporary))


def test_interrupted_it_prints_what_there_is_and_leaves_nothing_running(temporary: Path) -> None:
    with started(temporary, "--scenario", "postmaster") as chaos:
        logs = temporary.glob
        eventually(lambda: any(" worker_forked " in log.read_text() for log in logs("*/chaos_postmaster-1.log")))
        chaos.send_signal(signal.SIGINT)
        text = chaos.communicate(timeout=60)[0]
    assert chaos.returncode == 130, text
    assert re.search(r"interrupted.*postmaster: \d+ tasks", text)
    assert "Traceback" not in text
    eventually(lambda: not left_of(temporary))


def test_help_explains_every_scenario(temporary: Path) -> None:
    with started(temporary, "--help") as chaos:
        text = chaos.communicate(timeout=60)[0]
    for name in ("workers", "master", "standby", "backends", "backend_crash", "server", "postmaster", "mixed"):
        assert re.search(rf"^ +{name}: \w+", text, re.MULTILINE)


ROW = Row(id=1, parent=None, key="a", state="DONE", attempt=1, code=None, error=None, start=10.0, stop=11.0)
ENTRY = Entry(key="a", id=1, pid=100, at=10.5)


def judged(kind: Kind, *rows: Row, entries: int = 0, answer: Answer = Answer.COMMITTED) -> Account:
    """The account of one insert."""
    insert = Insert(key="a", kind=kind, answer=answer, id=1)
    found = Found(inserts=[insert], rows=rows, entries=[ENTRY] * entries, strikes=[Strike(at=9.0, what="")])
    return account("one", found)


def test_account_of_what_is_as_it_must_be_finds_nothing_wrong() -> None:
    failed = replace(ROW, state="FAIL", code="22012")
    good = [
        judged(KIND["kept"], ROW, entries=1),
        judged(KIND["silent"], entries=1),
        judged(KIND["failing"], failed),
        judged(KIND["kept"], ROW, entries=1, answer=Answer.UNKNOWN),
        judged(KIND["loose"], ROW, entries=2),
        judged(KIND["remote"], replace(failed, code="08006"), entries=1),
        judged(REPEATED, ROW, replace(ROW, id=2, parent=1, state="STOP"), entries=1),
    ]
    assert [(made.tasks, made.lost, made.wrong) for made in good] == [(1, 0, [])] * len(good)
    assert judged(KIND["loose"], ROW, entries=2).twice == {"not atomic": 1}
    assert judged(KIND["kept"], answer=Answer.UNKNOWN).tasks == 0
    assert judged(KIND["kept"], ROW, entries=1).recoveries == [2.0]


@pytest.mark.parametrize(
    ("kind", "rows", "entries", "answer"),
    [
        ("kept", [], 0, Answer.COMMITTED),
        ("kept", [], 1, Answer.COMMITTED),
        ("silent", [], 0, Answer.COMMITTED),
        ("kept", [ROW], 0, Answer.COMMITTED),
        ("kept", [replace(ROW, state="PLAN")], 0, Answer.COMMITTED),
        ("loose", [replace(ROW, state="WORK")], 1, Answer.COMMITTED),
        ("remote", [ROW], 0, Answer.COMMITTED),
        ("failing", [], 0, Answer.COMMITTED),
        ("kept", [replace(ROW, state="GONE")], 0, Answer.UNKNOWN),
        ("repeated", [ROW], 1, Answer.COMMITTED),
    ],
)
def test_account_counts_what_is_lost(kind: str, rows: list[Row], entries: int, answer: Answer) -> None:
    made = judged({**KIND, "repeated": REPEATED}[kind], *rows, entries=entries, answer=answer)
    assert made.lost == 1
    assert made.wrong


@pytest.mark.parametrize("kind", ["kept", "silent", "told"])
def test_account_counts_what_ran_twice(kind: str) -> None:
    made = judged(KIND[kind], *[ROW] * (kind != "silent"), entries=2)
    assert (made.done, made.twice, len(made.wrong)) == (1, {"atomic": 1}, 1)


@pytest.mark.parametrize(
    ("kind", "row", "entries", "answer"),
    [
        ("kept", replace(ROW, state="FAIL", code="22012"), 0, Answer.COMMITTED),
        ("failing", ROW, 1, Answer.COMMITTED),
        ("failing", replace(ROW, state="FAIL", code="22012"), 1, Answer.COMMITTED),
        ("kept", ROW, 1, Answer.NEVER),
        ("kept", replace(ROW, key="b"), 0, Answer.UNKNOWN),
    ],
)
def test_account_says_what_else_is_wrong(kind: str, row: Row, entries: int, answer: Answer) -> None:
    assert len(judged(KIND[kind], row, entries=entries, answer=answer).wrong) == 1
