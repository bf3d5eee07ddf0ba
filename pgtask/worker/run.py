"""One input, run over libpq: what it said, what went wrong, and what state it left the session in.

`execute` sends the input as `psql -c` would, within a time limit, and answers with an `Outcome`. A failing task is a
value here, never an exception; only the loss of the session is one. The rules of text are in output.py; what happens
to the row afterwards is worker.py's.
"""

import codecs
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from psycopg import NotSupportedError, pq
from psycopg._encodings import pg2pyenc

from pgtask.output import Error, Format, Output
from pgtask.worker.session import Session, StatementFailed

PREFIX = b"BEGIN;"
"""Sent in the same query before an atomic input; error positions are reduced by its length."""

CANCEL_AGAIN = 1.0
"""Seconds after which a cancel request that had no effect is sent again."""

NOTICES = 1 << 20
"""The most bytes of notices that a run keeps."""

Heed = Callable[[pq.abc.PGresult, str], bool]
"""Is told each notice, in that encoding; whether it was a word to us, and is none of the run's notices."""

Diagnostic = pq.DiagnosticField


@dataclass(kw_only=True)
class Limits:
    """What may end a run early. `deadline` is a time.monotonic() value or None; the rest is said by the worker.

    `cancelled` is why the run is being cancelled ("" while it is not), `tries` how many requests were sent. At
    `look_at` (also of time.monotonic()) `tick` is called although nothing has happened.
    """

    deadline: float | None = None
    cancelled: str = ""
    tries: int = 0
    buried: bool = False  # no cancel request helped: the backend was terminated
    next_try: float = 0.0
    look_at: float = math.inf

    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


class Outcome(NamedTuple):
    """What a run came to. Texts are bytes in `encoding`, PostgreSQL's name of the session's client encoding."""

    output: bytes | None
    errors: tuple[Error, ...]
    notice: bytes | None
    encoding: str
    committed: bool = False  # the input has ended a transaction itself: it must not be run a second time

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def code(self) -> str:
        """SQLSTATE of the first error, or ""."""
        return (self.errors[0].code or b"").decode(errors="replace") if self.errors else ""


@dataclass(kw_only=True)
class Transcript:
    """Gathers a run's results, errors and notices as they come."""

    session: Session
    format: Format
    skip: int = 0  # results of the prefix that are still to come
    shift: int = 0  # characters of the prefix
    heed: Heed = lambda *_: False
    output: Output = field(init=False)
    errors: list[Error] = field(default_factory=list)
    notices: list[bytes] = field(default_factory=list)
    copied: list[bytes] = field(default_factory=list)
    copying: bool = False
    committed: bool = False
    size: int = 0

    def __post_init__(self) -> None:
        self.output = Output(self.format)
        self.encoding = self.session.parameter("client_encoding")

    def add(self, result: pq.abc.PGresult) -> None:
        match result.status:
            case pq.ExecStatus.TUPLES_OK if not self.skip:
                self.output.add_rows(result)
            case pq.ExecStatus.FATAL_ERROR:
                self.errors.append(read_error(result, self.shift))
                self._end_copy()
            case _ if self.skip:
                self.skip -= 1
            case pq.ExecStatus.COMMAND_OK:
                tag = result.command_status or b""
                self.committed = self.committed or tag in (b"COMMIT", b"PREPARE TRANSACTION")
                if not self._end_copy():
                    self.output.add_tag(tag)
            case pq.ExecStatus.COPY_OUT:
                self.copying = True
                if result.binary_tuples:
                    self.errors.append(
                        Error(
                            message=b"COPY to stdout in binary format cannot be stored as text",
                            hint=b"Use the text or csv format.",
                            code=b"0A000",
                        )
                    )

    def copy(self, data: bytes) -> None:
        if not self.errors:
            self.copied.append(data)

    def _end_copy(self) -> bool:
        """The command after COPY data is COPY's own tag, which psql does not print either."""
        if not self.copying:
            return False
        self.output.add_copy(self.copied)
        self.copied, self.copying = [], False
        return True

    def notice(self, result: pq.abc.PGresult) -> None:
        if self.heed(result, self.encoding):
            return
        error = read_error(result, self.shift)
        if self.shift and error.code == b"25001":
            return  # "there is already a transaction in progress": because of our BEGIN
        text = error.text()
        if self.size + len(text) <= NOTICES:
            self.notices.append(text)
        self.size += len(text)

    def outcome(self, last: str = "") -> Outcome:
        """What was said; `last`: the encoding at the end, if the session does not know it."""
        if self.size > NOTICES:
            self.notices.append(b"NOTICE:  more notices were left out")
        self._recode(last or self.session.parameter("client_encoding"))
        return Outcome(
            output=self.output.text,
            errors=tuple(self.errors),
            notice=b"\n".join(self.notices) or None,
            encoding=self.encoding,
            committed=self.committed,
        )

    def _recode(self, last: str) -> None:
        """The server says only at the end that the client encoding was changed: what came before is in either."""
        if last == self.encoding:
            return

        def convert(text: bytes) -> bytes:
            return transcode(text, either(text, self.encoding, last), self.encoding)

        self.output.recode(convert)
        self.notices = [convert(notice) for notice in self.notices]
        self.errors = [error.recoded(convert) for error in self.errors]


def execute(
    session: Session,
    sql: bytes,
    format: Format,
    *,
    prefix: bytes,
    limits: Limits,
    tick: Callable[[], None],
    heed: Heed = lambda *_: False,
) -> Outcome:
    """Run `sql` after `prefix` on `session`, until it ends or `limits` cancel it.

    `tick` is called whenever something may have happened (a message, a signal): it may set `limits.cancelled`.
    Raises SessionLost when the session ends first.
    """
    transcript = Transcript(session=session, format=format, skip=1 if prefix else 0, shift=len(prefix), heed=heed)
    session.on_notice = transcript.notice
    try:
        session.query(prefix + sql, transcript.add, transcript.copy, watcher(session, limits, tick))
        if limits.tries:
            session.settle()
    finally:
        session.on_notice = None
    return transcript.outcome()


def receive(
    session: Session, format: Format, *, limits: Limits, tick: Callable[[], None], heed: Heed = lambda *_: False
) -> Outcome:
    """The same of an input that stands in the next part of a stream, before a step that asks for its encoding.

    The stream has ended when the outcome is an error.
    """
    transcript = Transcript(session=session, format=format, heed=heed)
    session.on_notice = transcript.notice
    try:
        *_, result, encoding = session.answer(tick=watcher(session, limits, tick))
        transcript.add(result)
        return transcript.outcome((encoding.get_value(0, 0) or b"").decode())
    except StatementFailed as failure:
        session.end_stream(timeout=None)
        transcript.add(failure.result)
        return transcript.outcome()
    finally:
        session.on_notice = None


def watcher(session: Session, limits: Limits, tick: Callable[[], None]) -> Callable[[], float | None]:
    """What is to be done before each wait of a run: cancels it when its limits say so. Answers with seconds to wait."""

    def watch() -> float | None:
        tick()
        if limits.expired() and not limits.cancelled:
            limits.cancelled = "timeout"
        if limits.cancelled and time.monotonic() >= limits.next_try:
            limits.tries += 1
            session.cancel(timeout=CANCEL_AGAIN)
            limits.next_try = time.monotonic() + CANCEL_AGAIN
        moments = [limits.next_try] if limits.cancelled else [limits.deadline] if limits.deadline else []
        moments += [limits.look_at] if limits.look_at < math.inf else []
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    return watch


def read_error(result: pq.abc.PGresult, shift: int = 0) -> Error:
    """The fields of a server's error or notice; `shift` characters stood before the input."""
    get = result.error_field
    position = _number(get(Diagnostic.STATEMENT_POSITION))
    internal = _number(get(Diagnostic.INTERNAL_POSITION))
    return Error(
        severity=get(Diagnostic.SEVERITY) or b"ERROR",
        message=get(Diagnostic.MESSAGE_PRIMARY) or result.error_message.strip(),
        code=get(Diagnostic.SQLSTATE),
        position=position - shift if position else internal,
        detail=get(Diagnostic.MESSAGE_DETAIL),
        hint=get(Diagnostic.MESSAGE_HINT),
        query=get(Diagnostic.INTERNAL_QUERY),
        context=get(Diagnostic.CONTEXT),
    )


def _number(text: bytes | None) -> int | None:
    """A position; what a remote server says there may be anything."""
    return int(text) if text and len(text) < 20 and text.isdigit() else None


def transcode(text: bytes, source: str, target: str) -> bytes:
    """Bring a text that came in one client encoding into another; what cannot be brought over becomes "?"."""
    if source == target or "SQL_ASCII" in (source, target):
        return text
    return text.decode(python_codec(source), "replace").encode(python_codec(target), "replace")


def readable(text: bytes, encoding: str) -> str:
    """A text in a server's encoding, for people."""
    return transcode(text, encoding, "UTF8").decode(errors="replace")


def either(text: bytes, first: str, last: str) -> str:
    """Which of two encodings a text is in: UTF8 if it is one of them and the text is valid in it, else the last."""
    if "UTF8" in (first, last):
        try:
            text.decode()
            return "UTF8"
        except UnicodeDecodeError:
            return first if last == "UTF8" else last
    return last


def python_codec(encoding: str) -> str:
    """Python's codec for PostgreSQL's encoding name; those it lacks are taken byte by byte."""
    try:
        return codecs.lookup(pg2pyenc(encoding.encode())).name
    except (NotSupportedError, LookupError):
        return "latin-1"
