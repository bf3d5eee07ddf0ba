"""Results and errors as text, by pg_task's rules to the letter.

Everything here works on bytes in the encoding of the session: the server's text representation goes to the row
untouched, never through Python types. All server encodings are ASCII-safe, so a newline or a quote byte is one.
Nothing here talks to a server.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

NOT_STRINGS = frozenset({16, 20, 21, 23, 26, 27, 28, 29, 700, 701, 1560, 1700})
"""Type oids that are not strings for `string`: bool int8 int2 int4 oid tid xid cid float4 float8 bit numeric."""

ROWS_WITH_TAG = (b"INSERT", b"UPDATE", b"DELETE", b"MERGE")
"""Commands that write their tag after the rows of RETURNING."""


class Rows(Protocol):
    """The part of a libpq result (psycopg.pq.PGresult) that is written."""

    @property
    def ntuples(self) -> int: ...
    @property
    def nfields(self) -> int: ...
    @property
    def command_status(self) -> bytes | None: ...
    def fname(self, column_number: int) -> bytes | None: ...
    def ftype(self, column_number: int) -> int: ...
    def get_value(self, row_number: int, column_number: int) -> bytes | None: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a task wants its results written: the row's columns of the same names."""

    header: bool = True
    string: bool = True
    delimiter: bytes = b"\t"
    escape: bytes = b""
    quote: bytes = b""
    null: bytes = b"\\N"


class Output:
    """Gathers what a run says, result by result.

    `text` is None while nothing was said: the row is then removed if its `delete` is set.
    """

    def __init__(self, format: Format):
        self._format = format
        self._parts: list[bytes] = []
        self._ended = True  # nothing, or a newline of its own, stands before the next part

    @property
    def text(self) -> bytes | None:
        return b"".join(self._parts) if self._parts else None

    def add_rows(self, rows: Rows) -> None:
        """Write a result that may have rows, and the tag of a command with RETURNING."""
        lines = list(_lines(rows, self._format))
        tag = rows.command_status or b""
        if tag.startswith(ROWS_WITH_TAG):
            lines.append(tag)
        if lines:
            self._add(b"\n".join(lines))

    def add_tag(self, tag: bytes) -> None:
        """Write the command tag of a statement that returns no rows."""
        self._add(tag)

    def add_copy(self, chunks: Sequence[bytes]) -> None:
        """Write what COPY TO STDOUT sent, as it came."""
        if chunks:
            self._add(b"".join(chunks))
            self._ended = True

    def recode(self, convert: Callable[[bytes], bytes]) -> None:
        """Bring every part that was written into another encoding."""
        self._parts = [convert(part) for part in self._parts]

    def _add(self, text: bytes) -> None:
        if not self._ended:
            self._parts.append(b"\n")
        self._parts.append(text)
        self._ended = False


def _lines(rows: Rows, format: Format) -> Iterable[bytes]:
    columns = range(rows.nfields)
    if format.header and rows.nfields > 1 and rows.ntuples:
        yield format.delimiter.join(_quoted(rows.fname(column) or b"", format) for column in columns)
    if not format.quote:
        yield from _plain_lines(rows, format)
        return
    quoted = [not format.string or rows.ftype(column) not in NOT_STRINGS for column in columns]
    for row in range(rows.ntuples):
        yield format.delimiter.join(
            format.null if value is None else _quoted(value, format) if quoted[column] else value
            for column, value in ((column, rows.get_value(row, column)) for column in columns)
        )


def _plain_lines(rows: Rows, format: Format) -> Iterable[bytes]:
    """The usual case, written for speed: nothing is quoted."""
    get, null, delimiter = rows.get_value, format.null, format.delimiter
    columns = range(rows.nfields)
    for row in range(rows.ntuples):
        yield delimiter.join([null if (value := get(row, column)) is None else value for column in columns])


def _quoted(value: bytes, format: Format) -> bytes:
    quote, escape = format.quote, format.escape
    if not quote:
        return value
    if escape:
        if escape != quote:
            value = value.replace(escape, escape + escape)
        value = value.replace(quote, escape + quote)
    return quote + value + quote


@dataclass(frozen=True, kw_only=True)
class Error:
    """An error as the server (or we) reported it; texts in the session's encoding.

    `position` counts characters from 1 in the input, None where the server gives none.
    """

    severity: bytes = b"ERROR"
    message: bytes
    code: bytes | None = None
    position: int | None = None
    detail: bytes | None = None
    hint: bytes | None = None
    query: bytes | None = None
    context: bytes | None = None

    def recoded(self, convert: Callable[[bytes], bytes]) -> "Error":
        """The same with every text in another encoding."""

        def converted(text: bytes | None) -> bytes | None:
            return None if text is None else convert(text)

        return replace(
            self,
            severity=convert(self.severity),
            message=convert(self.message),
            detail=converted(self.detail),
            hint=converted(self.hint),
            query=converted(self.query),
            context=converted(self.context),
        )

    def text(self) -> bytes:
        """The lines for the row's `error`, but the statement."""
        head = self.severity + b":  " + self.message
        if self.position:
            head += b" at character %d" % self.position
        lines = [head]
        for name, value in (
            (b"DETAIL", self.detail),
            (b"HINT", self.hint),
            (b"QUERY", self.query),
            (b"CONTEXT", self.context),
        ):
            if value:
                lines.append(name + b":  " + value)
        return b"\n".join(map(_indented, lines))


def statement_line(statement: bytes) -> bytes:
    """The last line of an error: the whole input."""
    return b"STATEMENT:  " + _indented(statement)


def _indented(text: bytes) -> bytes:
    return text.replace(b"\n", b"\n\t")
