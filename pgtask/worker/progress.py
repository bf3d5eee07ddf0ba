"""How far a run is, as it says itself: task_progress() in its input.

The function raises an INFO with a SQLSTATE of ours, which the server sends at once whatever the client's settings are,
and which is none of the run's notices. What it says goes to the master, who writes it down in a session of his own: so
others see it while the run's transaction is open. Anybody can raise the like: what is not well formed stays a notice.
"""

import json
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

from psycopg import pq

from pgtask.worker.run import Limits, transcode

CODE = b"PT002"

GAP = 0.05
"""Seconds between two words of one run to the master."""

LONGEST = 1000
"""Characters of a message that are kept."""

PERCENT = re.compile(r"(100(\.0{1,9})?|[0-9]{1,2}(\.[0-9]{1,9})?)")


class Report(NamedTuple):
    percent: str
    message: str | None


class Reporter:
    """Of one run. `tell` is given what it says last, not more often than GAP; `limits` has it called in time."""

    def __init__(self, limits: Limits, encoding: str, tell: Callable[[str, str | None], None]):
        self._limits = limits
        self._encoding = encoding
        self._tell = tell
        self._told_at = -math.inf
        self._last: Report | None = None  # what was not told yet

    def heed(self, notice: pq.abc.PGresult, encoding: str) -> bool:
        """Whether the notice says how far the run is."""
        report = _read(notice, encoding, self._encoding)
        if report is None:
            return False
        self._last = report
        self._limits.look_at = self._told_at + GAP
        self.tick()
        return True

    def tick(self) -> None:
        """Tell what is to be told, if it is time to."""
        if time.monotonic() >= self._limits.look_at:
            self.flush()

    def flush(self) -> None:
        """Tell what is to be told."""
        self._limits.look_at = math.inf
        if self._last is not None:
            self._tell(*self._last)
            self._last, self._told_at = None, time.monotonic()


def swallow(notice: pq.abc.PGresult, encoding: str) -> bool:
    """Of a run that is over in a moment nobody asks how far it is."""
    return _read(notice, encoding, encoding) is not None


def _read(notice: pq.abc.PGresult, encoding: str, ours: str) -> Report | None:
    if notice.error_field(pq.DiagnosticField.SQLSTATE) != CODE:
        return None
    detail = notice.error_field(pq.DiagnosticField.MESSAGE_DETAIL) or b""
    try:
        said = json.loads(transcode(detail, encoding, "UTF8").decode(errors="replace"), parse_float=str)
    except (ValueError, RecursionError):
        return None
    match said:
        case {"percent": str() | int() as percent, "message": str() | None as message} if PERCENT.fullmatch(
            str(percent)
        ):
            return Report(str(percent), None if message is None else _storable(message, ours))
    return None


def _storable(message: str, encoding: str) -> str:
    """As a server with that encoding can have it."""
    text = message[:LONGEST].replace("\0", "").encode(errors="replace")
    return transcode(transcode(text, "UTF8", encoding), encoding, "UTF8").decode(errors="replace")
