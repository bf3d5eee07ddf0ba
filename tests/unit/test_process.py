"""Fork hygiene, the ends of children, the messages between master and worker, and titles: with real processes."""

import contextlib
import faulthandler
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgtask import process
from pgtask.process import Cancel, Channel, Children, Ended, Idle, Lost, Message, Opened, Room, Run, Watch
from tests.fixtures.processes import descriptors
from tests.fixtures.wait import eventually

ROOT = Path(__file__).resolve().parent.parent.parent

EVERY = [
    Run(id=2**63 - 1, attempt=3, taker=4711, term=7, lane=-(2**63), slot=2),
    Cancel(ids=[5, 6], back=True),
    Cancel(),
    Room(),
    Opened(pid=4711, since="2030-01-02 03:04:05.000006+00"),
    Idle(runs=9, begun=False),
    Lost(why='FATAL:  "ü"\nsecond line', opened=True),
]


@dataclass
class Family:
    """Forks children and collects their ends."""

    children: Children
    ended: list[Ended]

    def fork(self, main: Callable[[], int], keep: tuple[int, ...] = (), held: tuple[signal.Signals, ...] = ()) -> int:
        return self.children.fork(main, keep=keep, on_end=self.ended.append, held=held)

    def end(self) -> Ended:
        """How the next child ended."""

        def reaped() -> bool:
            self.children.reap()
            return bool(self.ended)

        eventually(reaped)
        return self.ended.pop(0)


@pytest.fixture
def family() -> Iterator[Family]:
    faulthandler.cancel_dump_traceback_later()  # pytest's own watchdog is a thread, and with one nobody forks
    eventually(lambda: process.threads() == 1)
    made = Family(Children(), [])
    yield made
    for pid in made.children.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        made.end()


@pytest.fixture
def answer() -> Iterator[tuple[int, Callable[[], object]]]:
    """A descriptor for a child to write JSON to, and what reads it."""
    reader, writer = os.pipe()

    def read() -> object:
        assert select.select([reader], [], [], 20)[0], "the child said nothing"
        return json.loads(os.read(reader, 65536))

    yield writer, read
    os.close(reader)
    os.close(writer)


def tell(writer: int, value: object) -> int:
    os.write(writer, json.dumps(value).encode())
    return 0


def pause() -> int:
    while True:
        signal.pause()


def test_child_has_only_the_descriptors_it_was_given(
    family: Family, answer: tuple[int, Callable[[], object]], tmp_path: Path
) -> None:
    writer, read = answer
    with (tmp_path / "open").open("w") as one, (tmp_path / "kept").open("w") as kept:
        high = os.dup2(one.fileno(), 900)
        keep = (writer, kept.fileno())
        family.fork(lambda: tell(writer, [open_descriptors(), descriptors(os.getpid())]), keep=keep)
        os.close(high)
        numbers, targets = read()  # type: ignore[misc]
    assert numbers == sorted({0, 1, 2, *keep})
    assert str(tmp_path / "open") not in targets
    assert str(tmp_path / "kept") in targets
    assert family.end().status == 0


def open_descriptors() -> list[int]:
    found = []
    for number in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.append(number)
    return found


def test_child_of_a_process_whose_limit_was_lowered_has_no_descriptor_above_it(family: Family) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = fcntl.fcntl(0, fcntl.F_DUPFD, 200)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
        family.fork(lambda: int(os.path.exists(f"/proc/self/fd/{high}")))
        assert family.end().status == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(high)


def test_child_has_default_signal_handlers_and_none_blocked(
    family: Family, answer: tuple[int, Callable[[], object]]
) -> None:
    writer, read = answer
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = os.pipe()
    os.set_blocking(wakeup[1], False)
    signal.set_wakeup_fd(wakeup[1])
    try:
        family.fork(
            lambda: tell(
                writer,
                [
                    [int(signal.getsignal(number)) for number in numbers],  # type: ignore[arg-type]
                    signal.set_wakeup_fd(-1),
                    [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
                ],
            ),
            keep=(writer,),
        )
        assert read() == [[signal.SIG_DFL] * len(numbers), -1, []]
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wakeup[0])
        os.close(wakeup[1])
    assert family.end().status == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the parent's signals are let in again"


def test_held_signal_that_comes_too_early_is_delivered_when_the_child_is_ready(
    family: Family, answer: tuple[int, Callable[[], object]]
) -> None:
    writer, read = answer
    go, going = os.pipe()

    def main() -> int:
        os.read(go, 1)
        came = []
        signal.signal(signal.SIGTERM, lambda *_: came.append("TERM"))
        process.unblock(signal.SIGTERM)
        return tell(writer, came)

    pid = family.fork(main, keep=(writer, go), held=(signal.SIGTERM,))
    os.kill(pid, signal.SIGTERM)
    os.write(going, b"x")
    assert read() == ["TERM"]
    assert family.end().status == 0
    os.close(go)
    os.close(going)


@pytest.mark.parametrize("status", [0, 1, 2, 70])
def test_exit_status_is_what_main_returned(family: Family, status: int) -> None:
    family.fork(lambda: status)
    ended = family.end()
    assert (ended.status, ended.signal, str(ended)) == (status, None, f"exit status {status}")


def test_system_exit_of_a_child_is_its_status(family: Family) -> None:
    family.fork(lambda: sys.exit(3))
    assert family.end().status == 3


def test_bug_in_a_child_is_a_crash_and_leaves_no_finally_of_the_parent_run(family: Family, tmp_path: Path) -> None:
    try:
        family.fork(lambda: 1 // 0)
        assert family.end().status == process.CRASHED
    finally:
        with (tmp_path / "finally").open("a") as file:
            file.write(f"{os.getpid()}\n")
    assert (tmp_path / "finally").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (15, "SIGTERM"), (40, "signal 40")])
def test_killed_child_is_told_by_its_signal(family: Family, number: int, name: str) -> None:
    pid = family.fork(pause)
    os.kill(pid, number)
    ended = family.end()
    assert (ended.pid, ended.status, ended.signal, str(ended)) == (pid, None, number, f"killed by {name}")


def test_every_child_that_ended_meanwhile_is_reaped_at_once(family: Family) -> None:
    pids = {family.fork(lambda: 0) for _ in range(20)}
    os.waitid(os.P_PID, max(pids), os.WEXITED | os.WNOWAIT)

    def all_reaped() -> bool:
        family.children.reap()
        return len(family.ended) == 20

    eventually(all_reaped)
    assert {ended.pid for ended in family.ended} == pids
    assert family.children.pids() == []


def test_process_with_a_thread_does_not_fork(family: Family) -> None:
    code = (
        "import threading; from pgtask.process import Children; e = threading.Event()\n"
        "threading.Thread(target=e.wait, daemon=True).start()\n"
        "try: Children().fork(lambda: 0, keep=[], on_end=print)\n"
        "except AssertionError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "the master must be single-threaded to fork\n"


def test_output_that_the_parent_had_not_flushed_is_written_once() -> None:
    code = (
        "import os; from pgtask.process import Children; print('before', end=' '); c = Children(); e = []\n"
        "c.fork(lambda: print('child', end=' ') or 0, keep=[], on_end=e.append)\n"
        "while not e: c.reap()\n"
        "print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "before child after\n"


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_message_arrives_as_it_was_sent(message: Message) -> None:
    left, right = Channel.pair()
    assert left.send(message)
    assert right.receive() == [message]
    assert right.send(message)
    assert left.receive() == [message]
    left.close()
    right.close()


def test_messages_keep_their_order_and_nothing_is_received_twice() -> None:
    left, right = Channel.pair()
    for message in EVERY:
        left.send(message)
    assert right.receive() == EVERY
    assert right.receive() == []
    assert not right.closed
    left.close()
    right.close()


def test_end_of_the_other_side_is_seen_after_its_last_message() -> None:
    left, right = Channel.pair()
    left.send(Room())
    left.close()
    assert right.receive() == [Room()]
    assert right.closed
    assert not right.send(Room())
    right.close()


@pytest.mark.parametrize("sent_to_the_dead", [False, True])
def test_last_words_of_a_side_that_left_something_unread_are_received(sent_to_the_dead: bool) -> None:
    ours, theirs = Channel.pair()
    ours.send(Room())
    for last in (Opened(pid=5, since="now"), Lost(why="no room", opened=True)):
        theirs.send(last)
    theirs.close()
    if sent_to_the_dead:
        assert not ours.send(Room())
        assert not ours.send(Room())
    assert ours.receive() == [Opened(pid=5, since="now"), Lost(why="no room", opened=True)]
    assert ours.closed
    ours.close()


def test_unread_messages_of_a_side_that_ended_do_no_harm() -> None:
    left, right = Channel.pair()
    left.send(Room())
    right.close()
    assert left.receive() == []
    assert left.closed
    left.close()


def test_sending_into_a_channel_of_our_own_that_is_closed_is_useless_but_harmless() -> None:
    left, right = Channel.pair()
    left.close()
    assert not left.send(Room())
    assert left.receive() == []
    right.close()


def test_sender_never_blocks_on_a_side_that_does_not_read() -> None:
    left, right = Channel.pair()
    sent = 0
    while left.send(Room()):
        sent += 1
        assert sent < 100_000
    assert not left.closed
    assert len(right.receive()) == sent
    assert left.send(Room())
    left.close()
    right.close()


def test_master_sees_the_death_of_a_worker_as_end_of_file(family: Family) -> None:
    ours, theirs = Channel.pair()
    pid = family.fork(pause, keep=(theirs.fileno(),))
    theirs.close()
    os.kill(pid, signal.SIGKILL)
    family.end()
    assert ours.receive() == []
    assert ours.closed
    ours.close()


def test_worker_sees_the_end_of_the_master_while_it_waits(
    family: Family, answer: tuple[int, Callable[[], object]]
) -> None:
    writer, read = answer
    ours, theirs = Channel.pair()

    def main() -> int:
        watch = Watch(theirs)
        while not theirs.closed:
            watch.wait(None, timeout=10, listen=True)
            theirs.receive()
        return tell(writer, "the master is gone")

    family.fork(main, keep=(writer, theirs.fileno()))
    theirs.close()
    ours.close()
    assert read() == "the master is gone"
    assert family.end().status == 0


def test_wait_of_a_worker_is_ended_by_its_own_signal(family: Family, answer: tuple[int, Callable[[], object]]) -> None:
    writer, read = answer

    def main() -> int:
        came: list[str] = []
        signal.signal(signal.SIGTERM, lambda *_: came.append("TERM"))
        watch = Watch()
        os.kill(os.getpid(), signal.SIGTERM)
        watch.wait(None, timeout=10)
        return tell(writer, came)

    family.fork(main, keep=(writer,))
    assert read() == ["TERM"]
    assert family.end().status == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("worker app@billing public.task mail 7", "pgtask: worker app@billing public.task mail 7"),
        ("worker a\nb\tc\x1b[31m\x7f", "pgtask: worker a b c [31m "),
        ("worker Zürich 東京", "pgtask: worker Zürich 東京"),
        ("worker " + "x" * 300, "pgtask: worker " + "x" * 300),
    ],
)
def test_title_is_one_printable_line(family: Family, text: str, shown: str) -> None:
    def main() -> int:
        process.set_title(text)
        return pause()

    pid = family.fork(main)
    eventually(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode() == shown)
