"""The log: an event with a constant name, then its fields, one line each, as text or as JSON.

INFO is the life cycle, WARNING what mended itself, ERROR what a person must act on, DEBUG every task. Every
process writes for itself: a line is one `write` to a descriptor opened for appending, so that the lines of
master and workers never mix, and a rotated file is noticed by each of them.

A log that cannot be written (a full disk, a closed pipe) must never disturb the program: lost lines are
counted, and said once when writing works again. No password may get out here: every text passes `redact`.
"""

import datetime
import errno
import json
import logging
import logging.handlers
import math
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from pgtask.errors import UserError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FOREIGN = ("asyncio", "psycopg")
"""Loggers of libraries whose warnings belong into the same log."""

_logger = logging.getLogger("pgtask")
_handler: "_FileHandler | _StderrHandler | None" = None

_SECRET = re.compile(
    r"""(?<![a-z])((?:ssl)?password|oauth_client_secret|scram_(?:client|server)_key)
        (\s*=\s*|\s+(?='))                              # conninfo and URI parameters; PASSWORD '...' of SQL
        (?:'(?:[^'\\]|\\.|'')*'?|(?:\\.|\S)+)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_URI_SECRET = re.compile(r"(postgres(?:ql)?://[^\s:@/?]*:)\S*@")
_QUOTED = re.compile(r'[\s"=]|^$')


def setup(level: str, target: str, format: str = "text") -> None:
    """Log to "stderr" or to a file from now on. If the file cannot be opened, everything stays as it is."""
    global _handler
    formatter = _JsonFormatter() if format == "json" else _TextFormatter()
    try:
        handler = _StderrHandler() if target == "stderr" else _FileHandler(target)
    except OSError as error:
        raise UserError(f"log {target}: {error.strerror}") from error
    handler.setFormatter(formatter)
    old, _handler = _handler, handler
    for logger in (_logger, *map(logging.getLogger, FOREIGN)):
        if old is not None:
            logger.removeHandler(old)
        logger.addHandler(handler)
    if old is not None:
        old.close()
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of what it raises as well
    _logger.setLevel(LEVELS[level])
    _logger.propagate = False


def reopen() -> None:
    """Open the log file anew: after it was moved away, or after the disk had room again."""
    if isinstance(_handler, _FileHandler):
        _handler.reopen()


def descriptors() -> set[int]:
    """The open descriptors of the log, which a forked child must keep."""
    stream = _handler.stream if _handler is not None else None
    return {stream.fileno()} if isinstance(stream, _Lines) else set()


def event(level: str, name: str, /, **fields: object) -> None:
    _emit(LEVELS[level], name, fields)


def debug(name: str, /, **fields: object) -> None:
    _emit(logging.DEBUG, name, fields)


def info(name: str, /, **fields: object) -> None:
    _emit(logging.INFO, name, fields)


def warning(name: str, /, **fields: object) -> None:
    _emit(logging.WARNING, name, fields)


def error(name: str, /, **fields: object) -> None:
    _emit(logging.ERROR, name, fields)


def exception(name: str, /, **fields: object) -> None:
    """An error with the traceback of the exception in hand: for bugs only."""
    _emit(logging.ERROR, name, fields, sys.exc_info())


def redact(text: str) -> str:
    """The text without passwords of conninfo strings, URIs and SQL; takes too much rather than too little."""
    text = _SECRET.sub(r"\1\2***", text)
    return _URI_SECRET.sub(r"\1***@", text)


def _emit(level: int, name: str, fields: dict[str, object], exc_info: Any = None) -> None:
    if _logger.isEnabledFor(level):
        _logger.handle(_record(level, name, fields, exc_info))


def _record(level: int, name: str, fields: dict[str, object], exc_info: Any = None) -> logging.LogRecord:
    record = logging.LogRecord(_logger.name, level, "", 0, name, None, exc_info)
    record.fields = fields
    return record


class _Lines:
    """A descriptor as a stream that holds nothing back: what could not be written is lost, not retried."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._torn = False  # the disk was full in the middle of a line: the next one begins on a line of its own

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        while data:
            data = data[os.write(self._descriptor, data) :]
            self._torn = bool(data)

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


class _Patient(logging.Handler):
    """Counts the lines that could not be written, and says so when one can be again."""

    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        before = self.lost
        self._try(record)
        if before and self.lost == before:
            self.lost = 0
            self._try(_record(logging.WARNING, "log_writable_again", {"lost": before}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        self.lost += 1

    def _try(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # reopening a moved file happens outside of logging's own care for errors
            self.handleError(record)


class _StderrHandler(_Patient, logging.StreamHandler[Any]):
    def __init__(self) -> None:
        super().__init__(_Lines(2))


class _FileHandler(_Patient, logging.handlers.WatchedFileHandler):
    def __init__(self, path: str):
        super().__init__(path)

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        if _foreign_link(self.baseFilename):
            raise OSError(errno.EPERM, "is a symbolic link that another user has made")
        return _Lines(os.open(self.baseFilename, flags, 0o640))

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


def _foreign_link(path: str) -> bool:
    """Is it a link that somebody else may have laid out for us? Ours, root's and the directory's owner's are meant."""
    try:
        link, directory = os.lstat(path), os.stat(os.path.dirname(path))
    except OSError:
        return False  # opening it says what is wrong
    return stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.geteuid(), directory.st_uid)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = [_instant(record), record.levelname, f"[{record.process}]"]
        name, fields = _content(record)
        parts += [name, *(f"{key}={_quoted(value)}" for key, value in fields)]
        # A traceback is for people: lines of its own, indented, so that no other line begins like an event.
        return "\n\t".join([" ".join(parts), *map(_escaped, _traceback(record).splitlines())])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name, fields = _content(record)
        line = {"time": _instant(record), "level": record.levelname, "pid": record.process, "event": name}
        for key, value in fields:
            line[f"{key}_" if key in line else key] = value
        if trace := _traceback(record):
            line["traceback"] = trace
        return _escaped(json.dumps(line, ensure_ascii=False))


def _content(record: logging.LogRecord) -> tuple[str, Iterator[tuple[str, Any]]]:
    fields: dict[str, object] | None = getattr(record, "fields", None)
    name = record.msg
    if fields is None:
        name, fields = "library_message", {"logger": record.name, "text": record.getMessage()}
    return name, ((key, _plain(value)) for key, value in fields.items() if value is not None)


def _plain(value: object) -> object:
    """Numbers and truth values as they are, everything else as text without passwords."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return redact(value.decode(errors="replace") if isinstance(value, bytes) else str(value))


def _quoted(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    plain = text.isprintable() and not _QUOTED.search(text)
    return text if plain else _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    """In JSON's words whatever does not show as itself: controls, what turns the line around, what has no width."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _instant(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return redact("".join(traceback.format_exception(*record.exc_info)))
