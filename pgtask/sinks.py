"""Where the lines of the log go: standard error, a file, syslog, the journal.

Every process writes for itself. A line is one `write` to a descriptor opened for appending, or one datagram, so that
the lines of master and workers never mix; forked children share the descriptor. A rotated file is noticed by each of
them, and a datagram finds its way anew each time, so that a log daemon may be stopped and started.

A log that cannot be written (a full disk, a closed pipe, no daemon or one that hangs) must never disturb the program:
lost lines are counted, and said once when writing works again.

syslog and the journal are spoken to in their own datagrams: what the libraries for them send, they send for as long
as it takes, and the master would stand still with a log daemon that does. For the same reason nobody who reads our
standard error, or a pipe that `log` names, is waited for.
"""

import array
import contextlib
import errno
import fcntl
import logging
import logging.handlers
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgtask.lines import JsonFormatter, TextFormatter, content, record, text

NAME = "pgtask"
"""What syslog and the journal call us."""

SOCKETS = {"syslog": "/dev/log", "journal": "/run/systemd/journal/socket"}

FACILITIES = {"user": 1, "daemon": 3, "cron": 9, **{f"local{number}": 16 + number for number in range(8)}}

LONGEST_PATH = 107
"""Bytes of a socket's path, as the kernel has it."""

PIECE = 7900
"""Bytes of a line that one datagram to syslog holds: with its head it is what rsyslog takes (8 kB)."""

PATIENCE = 0.02
"""Seconds that lines may wait for somebody who does not read as fast as we write, in a second."""

LEAST = 0.001
"""Seconds that are worth a wait."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the setting `log` says: `kind` is stderr, file, syslog or journal; `path` the file or socket."""

    kind: str
    path: str = ""
    facility: str = "daemon"

    @classmethod
    def parse(cls, value: str) -> "Target":
        """Raises ValueError with one line that says what is wrong."""
        kind, *options = value.split(":")
        if value == "stderr":
            return cls(kind="stderr")
        if kind not in SOCKETS:
            return cls(kind="file", path=value)
        found = {"path": SOCKETS[kind]}
        for option in options:
            if option.startswith("/") and len(option.encode()) > LONGEST_PATH:
                raise ValueError(f"the path of a socket has at most {LONGEST_PATH} bytes")
            if option.startswith("/"):
                found["path"] = option
            elif kind == "syslog" and option in FACILITIES:
                found["facility"] = option
            elif kind == "syslog":
                raise ValueError(f'no facility "{option}"; those for programs are {", ".join(FACILITIES)}')
            else:
                raise ValueError(f'after "journal:" comes the path of a socket, not "{option}"')
        return cls(kind=kind, **found)

    def trouble(self) -> str | None:
        """Why lines could not be written there, as far as can be seen without writing one."""
        if self.kind in SOCKETS:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                try:
                    sock.connect(self.path)
                except OSError as error:
                    return f"{self.path}: {error.strerror or error}"
            return None
        path = Path(self.path)
        writable = self.kind == "stderr" or os.access(path if path.exists() else path.parent, os.W_OK)
        return None if writable else f"{path} cannot be written"


def open_sink(target: Target, format: str) -> "Sink":
    """Raises OSError if the file cannot be opened. A log daemon may come later."""
    as_text = TextFormatter()
    sink: Sink
    match target.kind:
        case "stderr":
            sink = StderrSink()
        case "file":
            sink = FileSink(target.path)
        case "syslog":
            sink = SyslogSink(target.path, target.facility)
            as_text = TextFormatter(instant=False, pid=False)
        case _:
            sink = JournalSink(target.path)
            as_text = TextFormatter(instant=False, pid=False, level=False)
    sink.setFormatter(JsonFormatter() if format == "json" else as_text)
    return sink


class Sink(logging.Handler):
    """Counts the lines that could not be written, and says so when one can be again."""

    lost = 0

    def descriptor(self) -> int | None:
        """What a forked child must keep open."""
        raise NotImplementedError

    def reopen(self) -> None:
        """Only a file has to be."""

    def write(self, record: logging.LogRecord) -> None:
        """Raises OSError, or calls `handleError`, if it cannot be written."""
        raise NotImplementedError

    def emit(self, line: logging.LogRecord) -> None:
        before = self.lost
        self._try(line)
        if before and self.lost == before:
            self.tell_lost()

    def tell_lost(self) -> None:
        """Say how many lines were lost; if that cannot be written either, they are told later."""
        lost, self.lost = self.lost, 0
        self._try(record(logging.WARNING, "log_writable_again", {"lost": lost}))
        if self.lost:
            self.lost = lost

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        self.lost += 1

    def _try(self, record: logging.LogRecord) -> None:
        try:
            self.write(record)
        except OSError:
            self.handleError(record)


class _Patience:
    """How long lines may wait: PATIENCE at once, and not more in any second."""

    def __init__(self) -> None:
        self._left, self._at = PATIENCE, time.monotonic()

    @contextlib.contextmanager
    def spend(self) -> Iterator[float]:
        """Seconds that may be waited now; what the block takes is spent. Raises BlockingIOError if there are none."""
        now = time.monotonic()
        self._left, self._at = min(PATIENCE, self._left + (now - self._at) * PATIENCE), now
        if self._left < LEAST:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            yield self._left
        finally:
            self._left -= time.monotonic() - now


class _Lines:
    """A descriptor as a stream that holds nothing back: what could not be written is lost, not retried."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._torn = False  # the disk was full, maybe in the middle of a line, be it another process's

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data  # on a line of its own
        self._torn = True
        while data:
            data = data[self._put(data) :]
        self._torn = False

    def _put(self, data: bytes) -> int:
        """Write some of it; how many bytes."""
        return os.write(self._descriptor, data)

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


class _Stream(_Lines):
    """A pipe or a socket, whose reader may hang."""

    def __init__(self, descriptor: int, *, blocks: bool):
        """`blocks`: it is a pipe that is not ours to be changed."""
        super().__init__(descriptor)
        self._patience = _Patience()
        self._blocks = blocks
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        self._socket = socket.socket(fileno=descriptor) if is_socket else None

    def _put(self, data: bytes) -> int:
        try:
            return self._try(data)
        except BlockingIOError:
            with self._patience.spend() as seconds:
                self._has_room(seconds)
        return self._try(data)

    def _try(self, data: bytes) -> int:
        """Raises BlockingIOError if there is no room."""
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        if not self._blocks:
            return os.write(self._descriptor, data)
        if not self._has_room():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, data[: select.PIPE_BUF])

    def _has_room(self, within: float = 0.0) -> bool:
        """For as much as is written to a pipe at once."""
        queue = select.poll()
        queue.register(self._descriptor, select.POLLOUT)
        return bool(queue.poll(within * 1000))

    def close(self) -> None:
        if self._socket is None:
            super().close()
        else:
            self._socket.close()


def _standard_error() -> _Lines:
    """Others write there as well: so a pipe is not made one that does not block, but opened as one once more."""
    try:
        mode = os.fstat(2).st_mode
    except OSError:  # it is closed
        return _Lines(2)
    if stat.S_ISFIFO(mode):
        with contextlib.suppress(OSError):  # another user's, say
            return _Stream(os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), blocks=False)
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return _Stream(os.dup(2), blocks=True)
    return _Lines(2)


class StderrSink(Sink, logging.StreamHandler[Any]):
    """Standard error. If that leads to the journal, each line says how grave it is, in the way which that reads."""

    def __init__(self) -> None:
        super().__init__(_standard_error())
        self._journal = _leads_to_journal(2)

    def descriptor(self) -> int:
        return int(self.stream.fileno())

    def close(self) -> None:
        if self.descriptor() != 2:
            self.stream.close()
        super().close()

    def write(self, record: logging.LogRecord) -> None:
        logging.StreamHandler.emit(self, record)

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record)
        if not self._journal:
            return lines
        return "\n".join(f"<{_severity(record)}>{line}" for line in lines.split("\n"))


class FileSink(Sink, logging.handlers.WatchedFileHandler):
    """A file, which may be moved away."""

    def __init__(self, path: str):
        super().__init__(path)

    def descriptor(self) -> int | None:
        return self.stream.fileno() if isinstance(self.stream, _Lines) else None

    def write(self, record: logging.LogRecord) -> None:
        logging.handlers.WatchedFileHandler.emit(self, record)

    def reopen(self) -> None:
        """Open first, then close: if it cannot be opened, the old one is still there."""
        self.acquire()
        try:
            old, self.stream = self.stream, self._open()
            self._statstream()
            if old is not None:
                old.close()
        except OSError:
            self.lost += 1
        finally:
            self.release()

    def _open(self) -> Any:
        # It may be a pipe, whose reader is not waited for either.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        if _foreign_link(self.baseFilename):
            raise OSError(errno.EPERM, "is a symbolic link that another user has made")
        descriptor = os.open(self.baseFilename, flags, 0o640)
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        return _Stream(descriptor, blocks=False) if is_pipe else _Lines(descriptor)


class _DatagramSink(Sink):
    """A log daemon at a socket, which need not be there yet, or still."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        # Not bound to any: each datagram finds the daemon that listens then.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._patience = _Patience()

    def descriptor(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _send(self, data: bytes, ancillary: tuple[Any, ...] = ()) -> None:
        try:
            self._socket.sendmsg([data], ancillary, socket.MSG_DONTWAIT, self._path)
        except BlockingIOError:
            with self._patience.spend() as seconds:
                patience = struct.pack("ll", 0, int(seconds * 1e6))
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
                self._socket.sendmsg([data], ancillary, 0, self._path)


class SyslogSink(_DatagramSink):
    """As RFC 3164 has it, and every syslog daemon reads it at its local socket."""

    def __init__(self, path: str, facility: str):
        super().__init__(path)
        self._facility = FACILITIES[facility]

    def write(self, record: logging.LogRecord) -> None:
        at = time.strftime("%b %e %H:%M:%S", time.localtime(record.created))  # the daemon knows the milliseconds
        head = f"<{8 * self._facility + _severity(record)}>{at} {NAME}[{record.process}]: ".encode()
        for line in self.format(record).split("\n"):
            for piece in _pieces(line.encode("utf-8", "backslashreplace")):
                self._send(head + piece)


def _pieces(line: bytes) -> list[bytes]:
    """What is too long goes on, indented, in another datagram: none but the first begins like an event."""
    pieces = []
    while len(line) > PIECE:
        end = PIECE
        while line[end] & 0xC0 == 0x80:  # in the middle of a character
            end -= 1
        pieces.append(line[:end])
        line = b"\t" + line[end:]
    return [*pieces, line]


class JournalSink(_DatagramSink):
    """systemd's journal in its native protocol: the event and its fields can be asked for one by one."""

    def write(self, record: logging.LogRecord) -> None:
        name, fields = content(record)
        entry = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_severity(record)),
            "SYSLOG_IDENTIFIER": NAME,
            "PGTASK_EVENT": name,
            **{f"PGTASK_{key.upper()}": text(value) for key, value in fields},
        }
        data = b"".join(_journal_field(key, value) for key, value in entry.items())
        try:
            self._send(data)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """More than a datagram holds travels as a sealed file in memory."""
        file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(file, data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
            self._send(b"", ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file])),))
        finally:
            os.close(file)


def _journal_field(key: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return key.encode() + b"=" + data + b"\n"
    return key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _severity(record: logging.LogRecord) -> int:
    """The level as syslog counts."""
    levels = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}
    return next((number for level, number in levels.items() if record.levelno >= level), 7)


def _leads_to_journal(descriptor: int) -> bool:
    """systemd says what it has connected to the journal; what was redirected since is not that any more."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _foreign_link(path: str) -> bool:
    """Is it a link that somebody else may have laid out for us? Ours, root's and the directory's owner's are meant."""
    try:
        link, directory = os.lstat(path), os.stat(os.path.dirname(path))
    except OSError:
        return False  # opening it says what is wrong
    return stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid(), directory.st_uid)
