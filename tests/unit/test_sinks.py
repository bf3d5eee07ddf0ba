"""Where the log goes: syslog and the journal over real sockets, standard error that leads to the journal."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgtask import log
from pgtask.settings import by_name
from pgtask.sinks import PIECE, Target
from tests.fixtures.daemons import Daemon


@pytest.fixture(autouse=True)
def back_to_stderr() -> Iterator[None]:
    yield
    log.setup("error", "stderr")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("stderr", Target(kind="stderr")),
        ("/var/log/pgtask.log", Target(kind="file", path="/var/log/pgtask.log")),
        ("a:b", Target(kind="file", path="a:b")),
        ("./syslog", Target(kind="file", path="./syslog")),
        ("syslog", Target(kind="syslog", path="/dev/log")),
        ("syslog:local3", Target(kind="syslog", path="/dev/log", facility="local3")),
        ("syslog:local3:/run/log", Target(kind="syslog", path="/run/log", facility="local3")),
        ("syslog:/run/log", Target(kind="syslog", path="/run/log")),
        ("journal", Target(kind="journal", path="/run/systemd/journal/socket")),
        ("journal:/run/systemd/journal.x/socket", Target(kind="journal", path="/run/systemd/journal.x/socket")),
    ],
)
def test_setting_names_a_target(text: str, target: Target) -> None:
    assert by_name("master")["log"].parse(text) == text
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("syslog:lokal3", 'no facility "lokal3"; those for programs are user, daemon, cron, local0, local1, '),
        ("syslog:", 'no facility ""; '),
        ("journal:local3", 'after "journal:" comes the path of a socket, not "local3"'),
        ("journal:/" + "x" * 107, "the path of a socket has at most 107 bytes"),
        ("sysloq", 'did you mean "syslog"? A file of this name is "./sysloq"'),
        ("jornal", 'did you mean "journal"? A file of this name is "./jornal"'),
    ],
)
def test_target_that_makes_no_sense_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        by_name("master")["log"].parse(text)


def test_what_cannot_be_written_is_found_without_writing(daemon: Daemon, tmp_path: Path) -> None:
    def trouble(text: str) -> str | None:
        return Target.parse(text).trouble()

    assert trouble("stderr") is trouble(f"syslog:{daemon.path}") is trouble(str(tmp_path / "new")) is None
    assert trouble(f"journal:{tmp_path}/none") == f"{tmp_path}/none: No such file or directory"
    assert trouble(f"{tmp_path}/none/log") == f"{tmp_path}/none/log cannot be written"
    assert daemon.datagrams() == []
    assert not (tmp_path / "new").exists()


# syslog


def test_syslog_gets_facility_severity_pid_level_event_and_fields(daemon: Daemon) -> None:
    log.setup("debug", f"syslog:local3:{daemon.path}")
    for level in ("debug", "info", "warning", "error"):
        log.event(level, "table_down", table="a@b public.task", tries=3)
    assert daemon.syslog() == [
        (19, severity, os.getpid(), f'{level} table_down table="a@b public.task" tries=3')
        for severity, level in ((7, "DEBUG"), (6, "INFO"), (4, "WARNING"), (3, "ERROR"))
    ]


def test_syslog_gets_json_whole(daemon: Daemon) -> None:
    log.setup("info", f"syslog:{daemon.path}", "json")
    log.warning("table_down", error='a "b"\nc')
    [entry] = daemon.syslog()
    line = json.loads(entry.text)
    assert (line["event"], line["error"], line["pid"]) == ("table_down", 'a "b"\nc', os.getpid())


def test_traceback_is_one_message_a_line_that_looks_like_no_event(daemon: Daemon) -> None:
    log.setup("info", f"syslog:{daemon.path}")
    try:
        raise RuntimeError("one\nERROR forged password=hunter2")
    except RuntimeError:
        log.exception("poller_crashed", table="x")
    first, *rest = daemon.syslog()
    assert first.text == "ERROR poller_crashed table=x"
    assert rest[-1].text == "\tERROR forged password=***"
    assert all(entry.text.startswith("\t") and entry.severity == 3 for entry in rest)


def test_long_message_goes_on_indented_in_another_datagram_and_no_character_is_torn(daemon: Daemon) -> None:
    log.setup("info", f"syslog:{daemon.path}")
    fields = {f"field{number}": "a" * number + "€" * 1900 for number in range(4)}
    log.info("long", **fields)
    pieces = [entry.text for entry in daemon.syslog()]
    assert len(pieces) == 3
    assert max(len(piece.encode()) for piece in pieces) <= PIECE
    assert all(piece.startswith("\t") for piece in pieces[1:])
    whole = pieces[0] + "".join(piece[1:] for piece in pieces[1:])
    assert whole == "INFO long " + " ".join(f"{name}={value}" for name, value in fields.items())


# The journal


def test_journal_gets_event_and_fields_one_by_one(daemon: Daemon) -> None:
    log.setup("debug", f"journal:{daemon.path}")
    for level in ("debug", "info", "warning", "error"):
        log.event(level, "task_failed", id=7, table="a@b public.task", ok=False, error="one\ntwo password=hunter2")
    assert daemon.journal() == [
        {
            "MESSAGE": r'task_failed id=7 table="a@b public.task" ok=false error="one\ntwo password=***"',
            "PRIORITY": priority,
            "SYSLOG_IDENTIFIER": "pgtask",
            "PGTASK_EVENT": "task_failed",
            "PGTASK_ID": "7",
            "PGTASK_TABLE": "a@b public.task",
            "PGTASK_OK": "false",
            "PGTASK_ERROR": "one\ntwo password=***",
        }
        for priority in "7643"
    ]


def test_field_cannot_forge_another_one_of_the_journal(daemon: Daemon) -> None:
    log.setup("info", f"journal:{daemon.path}")
    log.info("odd", group="x\nPRIORITY=0\nMESSAGE=forged\0\udcff")
    [entry] = daemon.journal()
    assert entry["PRIORITY"] == "6"
    assert entry["PGTASK_GROUP"] == "x\nPRIORITY=0\nMESSAGE=forged\0\\udcff"


def test_traceback_is_in_the_message_of_the_journal(daemon: Daemon) -> None:
    log.setup("info", f"journal:{daemon.path}")
    try:
        raise RuntimeError("password=hunter2")
    except RuntimeError:
        log.exception("poller_crashed")
    [entry] = daemon.journal()
    assert entry["MESSAGE"].startswith("poller_crashed\n\tTraceback")
    assert entry["MESSAGE"].endswith("\n\tRuntimeError: password=***")


def test_entry_larger_than_a_datagram_comes_whole(daemon: Daemon) -> None:
    log.setup("info", f"journal:{daemon.path}")
    fields = {f"field{number}": "\N{ELEPHANT}" * 2000 for number in range(60)}
    log.info("large", **fields)
    log.info("small")
    large, small = daemon.journal()
    assert {name: large[f"PGTASK_{name.upper()}"] for name in fields} == fields
    assert small["MESSAGE"] == "small"


# A log daemon that is not there, or does not read


@pytest.mark.parametrize("kind", ["syslog", "journal"])
def test_daemon_may_come_later_go_and_come_again_and_lost_lines_are_counted(daemon: Daemon, kind: str) -> None:
    daemon.stop()
    log.setup("info", f"{kind}:{daemon.path}")
    log.info("lost")
    log.info("lost")
    daemon.start()
    log.info("one")
    daemon.stop()
    log.info("lost")
    daemon.start()
    log.info("two")
    said = [data.decode() for data in daemon.datagrams()]
    events = ["one", "log_writable_again lost=2", "two", "log_writable_again lost=1"]
    assert [next(event for event in events if event in text) for text in said] == events


def test_daemon_that_does_not_read_is_waited_for_once(daemon: Daemon) -> None:
    log.setup("info", f"syslog:{daemon.path}")
    written = 0
    while log._sink is not None and not log._sink.lost:  # its queue is full then
        log.info("queued", number=written)
        written += 1
    for _ in range(10_000):  # had each of them to wait, this would take minutes
        log.info("lost")
    assert len(daemon.syslog()) == written - 1
    log.info("read")
    assert [entry.text for entry in daemon.syslog()[-2:]] == ["INFO read", "WARNING log_writable_again lost=10001"]


def test_daemon_that_is_slower_than_we_gets_every_line_or_how_many_were_lost(daemon: Daemon) -> None:
    """Its queue is short: the kernel's net.unix.max_dgram_qlen is 10 on some machines."""
    program = (
        "from pgtask import log\n"
        f"log.setup('info', 'syslog:{daemon.path}')\n"
        "written = 0\n"
        "while written < 2000 or log._sink.lost:\n"
        "    log.info('event')\n"
        "    written += 1\n"
        "print(written)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None:
            daemon.wait()
            daemon.datagrams()
        written = int(writer.communicate()[0])
    said = [entry.text for entry in daemon.syslog()]
    counts = [int(text.split("lost=")[1]) for text in said if "log_writable_again" in text]
    assert said.count("INFO event") + sum(counts) == written


@pytest.mark.parametrize("kind", ["pipe", "somebody's pipe", "socket", "named pipe"])
def test_who_does_not_read_what_we_write_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    if kind == "somebody's pipe" and os.geteuid() != 0:
        pytest.skip("only root can have a pipe that it may not open")
    target, become = "stderr", "import os; os.setuid(65534)\n" if kind == "somebody's pipe" else ""
    if kind == "socket":
        ours, theirs = (one.detach() for one in socket.socketpair())
    elif kind == "named pipe":
        os.mkfifo(tmp_path / "log")
        target = str(tmp_path / "log")
        ours, theirs = os.open(target, os.O_RDONLY | os.O_NONBLOCK), os.open(os.devnull, os.O_WRONLY)
    else:
        ours, theirs = os.pipe()
    program = (
        f"from pgtask import log\n{become}log.setup('info', {target!r})\n"
        "for number in range(5000): log.info('event', number=number, text='x' * 100)\n"
        "print(flush=True)\n"
        "input()\n"
        "log.info('last', text='x' * 1000)\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, stderr=theirs) as writer,
        os.fdopen(ours, "rb") as stream,
    ):
        os.close(theirs)
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdout.readline()  # the lines are written, and nobody has read one
        os.set_blocking(ours, False)
        said = stream.read() or b""
        writer.stdin.write(b"\n")
        writer.stdin.flush()
        writer.wait()
        said += stream.read() or b""
    lines = said.decode().split("\n")
    numbers = [int(line.split("number=")[1].split()[0]) for line in lines if " event " in line and line.endswith("x")]
    assert 0 < len(numbers) < 5000
    assert numbers == list(range(len(numbers)))
    [last, again] = [line for line in lines if " last " in line or "log_writable_again" in line]
    assert last.endswith("x" * 1000)
    assert again.endswith(f"lost={5000 - len(numbers)}")


def test_daemon_that_is_slower_than_we_holds_us_up_for_a_small_part_of_the_time(daemon: Daemon) -> None:
    """Each place that became free in its queue was worth another wait."""
    log.setup("info", f"syslog:{daemon.path}")
    while log._sink is not None and not log._sink.lost:
        log.info("queued")
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    for _ in range(100):
        daemon.read_one()
        log.info("event")
    waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert waits < 50
    daemon.datagrams()
    log.info("read")
    assert "log_writable_again" in daemon.syslog()[-1].text


# Standard error that leads to the journal


@pytest.mark.parametrize("leads", [True, False])
def test_standard_error_that_leads_to_the_journal_says_how_grave_each_line_is(tmp_path: Path, leads: bool) -> None:
    program = (
        "from pgtask import log\n"
        "log.setup('info', 'stderr')\n"
        "log.warning('one')\n"
        "try: raise RuntimeError\n"
        "except RuntimeError: log.exception('two')\n"
    )
    with (tmp_path / "stream").open("wb") as stream:
        found = os.fstat(stream.fileno())
        env = os.environ | {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino if leads else 1}"}
        subprocess.run([sys.executable, "-c", program], stderr=stream, env=env, check=True)
    lines = (tmp_path / "stream").read_text("utf-8").splitlines()
    assert all(line.startswith("<") for line in lines) is leads
    if leads:
        assert [line[:3] for line in lines] == ["<4>"] + ["<3>"] * (len(lines) - 1)
        assert lines[-1] == "<3>\tRuntimeError"
