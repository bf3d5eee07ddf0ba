"""Processes: the only user of fork, waitpid and the process title, and the words that master and workers exchange.

A master that forks must stay single-threaded, and a child must not inherit what would keep the parent's
sessions, locks or timers alive. All of that hygiene stands in `Children.fork`; nothing else forks. A child never
returns into the parent's stack: it ends in `os._exit`, so no `finally` of the master, no atexit hook and no
destructor of an inherited session (which would say goodbye to the server in the parent's name) ever runs in it.

Master and worker talk over one SEQPACKET socket pair: a message is a packet, and the other side's death is the
end of file.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import setproctitle

from pgtask import log

CRASHED = 70
"""Exit status of a child that ended by a bug of ours (BSD's EX_SOFTWARE)."""

PACKET = 65536
"""The longest packet, in bytes; texts that could be longer are cut by `Channel.send`'s callers."""


HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
"""Signals that the master has handlers for, which must never run in a child. Only these are blocked across a fork: to
name them all takes Python a tenth of what the fork takes."""

DOUBT = signal.SIGUSR2
"""Master to worker: the server says that it has answered; if you are still waiting for it, nothing passes any more."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Master to worker: begin this row, which session `taker` took in `term`, when it had had `attempt` runs.

    It, and what follows it, runs in slot number `slot` of the group whose key is `lane`.
    """

    id: int
    attempt: int
    taker: int
    term: int
    lane: int
    slot: int
    kind: ClassVar[str] = "run"


@dataclass(frozen=True, kw_only=True)
class Look:
    """Master to worker: begin the one row that is due from a place (plan, id) on, in whatever group it is.

    `used`: each lane with slots in use, and their numbers. Nothing may be begun later than `until`, by the server's
    clock, or than `by` (time.monotonic(), the same for all processes).
    """

    term: int
    used: list[tuple[int, list[int]]]
    now: str | None
    place: tuple[str, int]
    until: str
    by: float
    kind: ClassVar[str] = "look"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Worker to master: the answer to Look, as the statement `take_one` has it; None if there is none."""

    row: list[Any] | None
    kind: ClassVar[str] = "found"


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Master to worker: cancel the run of any of the rows `ids` (None: whatever runs); `back` returns it to PLAN."""

    ids: list[int] | None = None
    back: bool = False
    kind: ClassVar[str] = "cancel"


@dataclass(frozen=True, kw_only=True)
class Room:
    """Master to worker: others wait; go on with your group a moment at most (`now`: not even that) after this run."""

    now: bool = False
    kind: ClassVar[str] = "room"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Master to worker: from now on say what has ended, for rows wait for it; or (`on` false) no more."""

    on: bool = True
    kind: ClassVar[str] = "report"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Worker to master, who asked for it: the runs of these rows have ended, and that is committed."""

    ids: list[int]
    kind: ClassVar[str] = "finished"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Worker to master: my session is backend `pid`, which started at `since` (a timestamptz as text)."""

    pid: int
    since: str
    kind: ClassVar[str] = "opened"


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Worker to master: I have nothing to run, after `runs` runs. `begun`: did I begin what I was given last?"""

    runs: int
    begun: bool = True
    kind: ClassVar[str] = "idle"


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Worker to master, before exit status 1: my session could not be opened, or ended in the middle of a run.

    `felled`: because of a crash that was not its own.
    """

    why: str
    opened: bool
    felled: bool = False
    kind: ClassVar[str] = "lost"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Worker to master: how far the run of row `id` is, of 100 (a number as text), and in which words."""

    id: int
    attempt: int
    percent: str
    message: str | None
    kind: ClassVar[str] = "progress"


Message = Run | Look | Found | Cancel | Room | Report | Finished | Opened | Idle | Lost | Progress
KINDS: dict[str, type[Message]] = {
    cls.kind: cls for cls in (Run, Look, Found, Cancel, Room, Report, Finished, Opened, Idle, Lost, Progress)
}


def lowest_free(numbers: Container[int]) -> int:
    """The lowest number of a slot that is not in use. Not greater than how many there are."""
    return next(number for number in count() if number not in numbers)


class Channel:
    """One end of the socket pair between the master and a worker.

    `closed` becomes true when the other side is gone; sending to it is then silently useless, as the reader of
    `receive` learns of the end anyway.
    """

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._sock.setblocking(False)
        self.closed = False

    @classmethod
    def pair(cls) -> tuple["Channel", "Channel"]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(left), cls(right)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message, *, patience: float = 0.0) -> bool:
        """Send one message; False if the other side is gone or has not read for so long that its queue is full.

        In that case we wait for so many seconds, `patience`, that it reads.
        """
        if self.closed:
            return False
        packet = json.dumps({"kind": message.kind, **vars(message)}).encode()
        deadline = time.monotonic() + patience
        while True:
            try:
                self._sock.send(packet)
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False  # not `closed` yet: its last words may be there to be read
            except BlockingIOError:
                if (left := deadline - time.monotonic()) <= 0:
                    return False
                queue = select.poll()
                queue.register(self._sock, select.POLLOUT)
                queue.poll(left * 1000)

    def receive(self) -> list[Message]:
        """Every message that has arrived; sets `closed` at the end of file."""
        messages: list[Message] = []
        while not self.closed:
            try:
                packet = self._sock.recv(PACKET)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it ended with something of ours unread, which is said once; its last words come after it
            if not packet:
                self.closed = True
                break
            values: dict[str, Any] = json.loads(packet)
            messages.append(KINDS[values.pop("kind")](**values))
        return messages

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class Watch:
    """What a child waits on: a session's socket, the master's channel, its own signals and a deadline, together.

    `wait` returns when any of them has something; the caller looks at its own condition again.
    """

    def __init__(self, channel: Channel | None = None):
        self._channel = channel
        self.heard = channel is not None  # has the master said something that nobody has read yet?
        self._waiting = self.doubted = False
        self._polls: dict[tuple[int | None, bool, bool], select.poll] = {}
        signal.signal(DOUBT, self._doubt)
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait(self, fd: int | None, *, write: bool = False, timeout: float | None = None, listen: bool = False) -> bool:
        """Wait for `fd` (to be read, or written), a signal, `timeout` seconds, and a message if we `listen`.

        Returns whether `fd` is ready. A message that nobody reads would end every wait at once: listen only where
        what comes is read. Afterwards `doubted` tells whether the master doubts that what we wait for will come.
        """
        listens = listen and self._channel is not None and not self._channel.closed
        poll = self._polls.get((fd, write, listens)) or self._poll(fd, write, listens)
        self._waiting, self.doubted = True, False
        ready = dict(poll.poll(None if timeout is None else max(0.0, timeout * 1000)))
        self._waiting = False
        if self._reader in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 4096)
        if len(ready) > (self._reader in ready) + (fd in ready):
            self.heard = True
        return fd in ready

    def _poll(self, fd: int | None, write: bool, listens: bool) -> select.poll:
        """Made once: it knows descriptors by their numbers alone, whatever those are by now."""
        poll = self._polls[fd, write, listens] = select.poll()
        poll.register(self._reader, select.POLLIN)
        if fd is not None:
            poll.register(fd, select.POLLIN | (select.POLLOUT if write else 0))
        if listens and self._channel is not None:
            poll.register(self._channel.fileno(), select.POLLIN)
        return poll

    def _doubt(self, *_: object) -> None:
        """Of the wait that goes on; if there is none, the master's doubt came too late to mean anything."""
        self.doubted = self._waiting


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: its exit status, or the signal that killed it."""

    pid: int
    status: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exit status {self.status}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


class Children:
    """The master's children. `reap` is called on SIGCHLD and tells each one's end to who forked it."""

    def __init__(self) -> None:
        self._on_end: dict[int, Callable[[Ended], None]] = {}

    def fork(
        self,
        main: Callable[[], int],
        *,
        keep: Iterable[int],
        on_end: Callable[[Ended], None],
        held: Iterable[signal.Signals] = (),
    ) -> int:
        """Fork a child that runs `main` with only the descriptors `keep`, standard streams and logs open.

        The signals `held` stay blocked until `main` has its handlers and calls `unblock`: none may come too early.
        Returns the child's pid. Raises OSError when the system refuses (too many processes, no memory).
        """
        assert threads() == 1, "the master must be single-threaded to fork"
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*HANDLED, *held})
        try:
            pid = os.fork()
            if pid == 0:
                _child(main, set(keep), {*mask, *held})
            self._on_end[pid] = on_end
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def reap(self) -> None:
        """Collect every child that has ended. Called in the loop, never in a signal handler."""
        while self._on_end:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            ended = Ended(pid=pid, status=code if code >= 0 else None, signal=-code if code < 0 else None)
            on_end = self._on_end.pop(pid, None)
            if on_end is not None:
                on_end(ended)

    def pids(self) -> list[int]:
        return list(self._on_end)


def _child(main: Callable[[], int], keep: set[int], mask: set[signal.Signals | int]) -> None:
    """The child's whole life; never returns."""
    status = CRASHED
    try:
        gc.freeze()
        _close_descriptors(keep | {0, 1, 2} | log.descriptors())
        signal.set_wakeup_fd(-1)
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        log.forked()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else CRASHED
    except BaseException:
        log.exception("child_crashed")
    finally:
        log.end()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _close_descriptors(keep: set[int]) -> None:
    """Close every descriptor but these: a copy of the master's socket would keep its session and locks alive."""
    try:
        # Also those that were open before the limit was lowered, and lie above it.
        opened = [int(name) for name in os.listdir("/proc/self/fd")]
    except FileNotFoundError:
        opened = list(range(os.sysconf("SC_OPEN_MAX")))
    for number in opened:
        if number not in keep:
            with contextlib.suppress(OSError):  # the listing's own, closed by now
                os.close(number)


def block(*numbers: signal.Signals) -> None:
    """Let signals wait: until there are handlers for them, or for good."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def unblock(*numbers: signal.Signals) -> None:
    """Let signals in that were blocked, or that the child was forked with as `held`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def threads() -> int:
    """How many threads this process has, foreign ones of C libraries included where the system tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        import threading

        return threading.active_count()


def set_title(text: str) -> None:
    """Show `text` in ps. Control characters become blanks: a group's name must not break a line."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    setproctitle.setproctitle(f"pgtask: {text}")
