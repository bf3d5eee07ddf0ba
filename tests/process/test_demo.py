"""The demonstration as a newcomer runs it: a process of its own, piped or on a terminal, to its end or interrupted."""

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.fixtures.processes import processes, title
from tests.fixtures.wait import eventually

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = (sys.executable, "-m", "pgtask.demo")


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """Where the demonstration makes its directories; a short path, since sockets lie in it."""
    directory = Path(tempfile.gettempdir(), f"demo-{os.getpid()}")
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    yield directory
    left = sorted(str(path) for path in directory.rglob("*"))
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    assert not left, "the demonstration left files behind"


@contextmanager
def start(temporary: Path, *arguments: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [*DEMO, *arguments], cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
    ) as demo:
        try:
            yield demo
        finally:
            demo.kill()


def left_of(temporary: Path) -> list[str]:
    """The processes that have anything to do with the demonstration's directory."""
    return [found for one in processes() if str(temporary) in (found := title(one.pid))]


def test_it_tells_its_story_and_ends_well(temporary: Path) -> None:
    with start(temporary) as demo:
        text = demo.communicate(timeout=120)[0].decode()  # of its half a minute on a machine that does much else
    assert demo.returncode == 0, text
    told = ("DONE   mail", "DONE   statement", "FAIL   mistake", "FAIL   slow", "DONE   crm", "DONE   heartbeat")
    for line in (*told, "DONE   report", "DONE   gateway", "DONE   after", "STOP   export"):
        assert line in text
    assert "What ran where" in text
    assert re.search(r"pgtask: master .*\(2 tables leading, \d+ workers\)", text)
    assert re.search(r"pgtask: worker billing@billing public\.task running \d+ in group mail", text)
    assert "\x1b" not in text, "colours in a pipe"
    eventually(lambda: not left_of(temporary))


def test_kept_up_on_a_terminal_it_says_how_to_connect_and_ends_with_ctrl_c(temporary: Path) -> None:
    terminal, theirs = pty.openpty()
    with start(temporary, "--keep", stdout=theirs) as demo:
        os.close(theirs)
        text = b""
        while b"Ctrl-C ends everything" not in text:
            text += os.read(terminal, 65536)
        [conninfo] = re.findall(rb"psql '([^']+)'", text)

        with psycopg.connect(conninfo.decode(), autocommit=True) as session:
            session.execute("INSERT INTO task (data, input) VALUES ('mine', 'SELECT 42')")
            query = "SELECT output FROM task WHERE data = 'mine' AND state = 'DONE'"
            assert eventually(lambda: session.execute(query.encode()).fetchone()) == ("42",)
        demo.send_signal(signal.SIGINT)
        demo.wait(60)
    os.close(terminal)
    assert demo.returncode == 0
    eventually(lambda: not left_of(temporary))


def test_interrupted_it_leaves_nothing_running(temporary: Path) -> None:
    with start(temporary) as demo:
        assert demo.stdout is not None
        while b"DONE" not in demo.stdout.readline():
            assert demo.poll() is None
        demo.send_signal(signal.SIGINT)
        text = demo.communicate(timeout=60)[0].decode()
    assert demo.returncode == 130
    assert "nothing is left running" in text
    eventually(lambda: not left_of(temporary))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_it_leaves_nothing_running(temporary: Path, number: signal.Signals) -> None:
    with start(temporary) as demo:
        assert demo.stdout is not None
        while b"DONE" not in demo.stdout.readline():
            assert demo.poll() is None
        demo.send_signal(number)
        demo.communicate(timeout=60)
    assert demo.returncode == (-number if number == signal.SIGKILL else 128 + number)
    eventually(lambda: not left_of(temporary))
