"""The log: an event with a constant name, then its fields, one line each. events.py has all of them.

INFO is the life cycle, WARNING what mended itself or went wrong for one task, ERROR what a person must act on, DEBUG
every task. How a line is written is lines.py's, and where it goes sinks.py's; every process writes for itself.

What is logged must never disturb the program, and no password may get out here: every text passes `redact`.
"""

import logging
import sys
from typing import Any

from pgtask.errors import UserError
from pgtask.lines import record
from pgtask.lines import redact as redact
from pgtask.sinks import Sink, Target, open_sink

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FOREIGN = ("asyncio", "psycopg", "waitress")
"""Loggers of libraries whose warnings belong into the same log."""

_logger = logging.getLogger("pgtask")
_sink: Sink | None = None
_bound: dict[str, object] = {}


def setup(level: str, target: str, format: str = "text") -> None:
    """Log there from now on. If the file cannot be opened, everything stays as it is, and it raises UserError."""
    global _sink
    try:
        sink = open_sink(Target.parse(target), format)
    except OSError as error:
        raise UserError(f"log {target}: {error.strerror}") from error
    old, _sink = _sink, sink
    for logger in (_logger, *map(logging.getLogger, FOREIGN)):
        if old is not None:
            logger.removeHandler(old)
        logger.addHandler(sink)
    if old is not None:
        sink.lost = old.lost
        old.close()
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of what it raises as well
    _logger.setLevel(LEVELS[level])
    _logger.propagate = False


def reopen() -> None:
    """Open the log file anew: after it was moved away, or after the disk had room again."""
    if _sink is not None:
        _sink.reopen()


def descriptors() -> set[int]:
    """The open descriptors of the log, which a forked child must keep."""
    descriptor = _sink.descriptor() if _sink is not None else None
    return set() if descriptor is None else {descriptor}


def forked() -> None:
    """In a new child: the lines that its parent has lost are told by that one."""
    if _sink is not None:
        _sink.lost = 0


def end() -> None:
    """At the end of the process: say what was lost, if that can be."""
    if _sink is not None and _sink.lost:
        _sink.tell_lost()


def bind(**fields: object) -> None:
    """Every further line of this process ends with these fields."""
    _bound.update(fields)


def enabled(level: str) -> bool:
    """Is anything of this level written?"""
    return _logger.isEnabledFor(LEVELS[level])


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


def _emit(level: int, name: str, fields: dict[str, object], exc_info: Any = None) -> None:
    if _logger.isEnabledFor(level):
        _logger.handle(record(level, name, fields | _bound, exc_info))
