"""A line of the log: an event and its fields as text, as JSON, or field by field. No password gets past here.

Every text passes `redact`, and is cut where it is too long to be read. Whatever does not show as itself is escaped, so
that no name or error can forge a line, or turn one around.
"""

import datetime
import json
import logging
import math
import re
import traceback
from collections.abc import Iterator
from typing import Any

LONGEST = 2000
"""Characters of a field that are kept."""

_SECRET = re.compile(
    r"""(?<![a-z])((?:ssl)?password|oauth_client_secret|scram_(?:client|server)_key)
        (\s*=\s*|\s+(?=E?'))                            # conninfo and URI parameters; PASSWORD '...' of SQL
        (?:E?'(?:[^'\\]|\\.|'')*'?|(?:\\.|\S)+)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_URI_SECRET = re.compile(r"(postgres(?:ql)?://[^\s:@/?]*:)\S*@")
_NAME = re.compile(r"[\w$+:/-]+")
_QUOTED = re.compile(r'[\s"=]|^$')


def record(level: int, name: str, fields: dict[str, object], exc_info: Any = None) -> logging.LogRecord:
    """An event for the log's handlers."""
    made = logging.LogRecord("pgtask", level, "", 0, name, None, exc_info)
    made.fields = fields
    return made


def redact(text: str) -> str:
    """The text without passwords of conninfo strings, URIs and SQL; takes too much rather than too little."""
    text = _SECRET.sub(r"\1\2***", text)
    return _URI_SECRET.sub(r"\1***@", text)


def quoted(text: str) -> str:
    """The text as one word, in JSON's quotes where it could be misread."""
    plain = text.isprintable() and not _QUOTED.search(text)
    return text if plain else _escaped(json.dumps(text, ensure_ascii=False))


def shown(name: str, most: int = 32) -> str:
    """A name as one word of a title: in quotes unless it is plain, and cut, after a closing quote, if it is longer."""
    if len(name) > most:
        return _escaped(json.dumps(name[:most], ensure_ascii=False)) + "..."
    return name if _NAME.fullmatch(name) else _escaped(json.dumps(name, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """Text; without what the destination adds by itself."""

    def __init__(self, *, instant: bool = True, level: bool = True, pid: bool = True):
        super().__init__()
        self._instant, self._level, self._pid = instant, level, pid

    def format(self, record: logging.LogRecord) -> str:
        name, fields = content(record)
        parts = [_instant(record)] if self._instant else []
        parts += [record.levelname] if self._level else []
        parts += [f"[{record.process}]"] if self._pid else []
        parts += [name, *(f"{key}={quoted(text(value))}" for key, value in fields)]
        # A traceback is for people: lines of its own, indented, so that no other line begins like an event.
        return "\n\t".join([" ".join(parts), *map(_escaped, _traceback(record).splitlines())])


class JsonFormatter(logging.Formatter):
    """One JSON object, whole everywhere."""

    def format(self, record: logging.LogRecord) -> str:
        name, fields = content(record)
        line = {"time": _instant(record), "level": record.levelname, "pid": record.process, "event": name}
        for key, value in fields:
            line[f"{key}_" if key in line else key] = value
        if trace := _traceback(record):
            line["traceback"] = trace
        return _escaped(json.dumps(line, ensure_ascii=False))


def content(record: logging.LogRecord) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The event's name and its fields: numbers and truth values as they are, the rest as text without passwords."""
    fields: dict[str, object] | None = getattr(record, "fields", None)
    name = record.msg
    if fields is None:
        name, fields = "library_message", {"logger": record.name, "text": record.getMessage()}
    return name, ((key, _plain(value)) for key, value in fields.items() if value is not None)


def text(value: Any) -> str:
    """A field's value as text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: object) -> object:
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    whole = redact(value.decode(errors="replace") if isinstance(value, bytes) else str(value))
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}... ({len(whole) - LONGEST} more)"


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
