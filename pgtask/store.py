"""Every statement on the task table, by name, and the values that come out of them. Nobody else writes SQL on it.

The texts stand in sql/*.sql, where each can be read, run and explained by itself. A `Store` is those texts for one
table: names quoted, types qualified. Our sessions run them with the search_path set to the server's own schema, so
that no operator or function of a user's can take the place of ours.
"""

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from itertools import repeat
from math import ceil
from typing import NamedTuple

from psycopg import pq, sql

from pgtask.coming import Calendar
from pgtask.output import Format

NAME = 63
"""Bytes of an application_name that the server keeps."""

RECENT = "1 second"
"""What becomes due with a plan that is older may be overlooked for a while where full groups have a backlog, unless its
trigger tells of it (backlog.py)."""


@cache
def statements(subject: str) -> Mapping[str, str]:
    """The statements of sql/SUBJECT.sql by name, as written there, without their final semicolon."""
    text = files("pgtask").joinpath(f"sql/{subject}.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+).*\n", text, flags=re.MULTILINE)[1:]
    bodies = (re.sub(r"^--.*\n", "", body, flags=re.MULTILINE) for body in parts[1::2])
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], bodies, strict=True)}


class Task(NamedTuple):
    """A row as a worker runs it. Texts are bytes in the server's encoding.

    `waited`: how many seconds after its plan the row's first run began, as text; null where it waited for others.
    `repeated`: it may have a next row, for which `copied` must be known. `batch`: how many may share its
    transaction, 1 where it must run by itself. `aging`: no worker older than its `live` may run it. `name`: what
    its session is called meanwhile, if it was taken to share a transaction, or begun by its own statement.
    `calendar`: what its next plan depends on, if it has one.
    """

    id: int
    attempt: int
    group: bytes
    remote: bytes | None
    input: bytes
    timeout_ms: int
    max: int
    plan: bytes  # as text that every DateStyle reads
    delete: bool
    save: bool
    atomic: bool
    repeated: bool
    format: Format
    batch: int
    aging: bool
    name: bytes
    waited: bytes | None = None
    copied: bytes | None = None
    calendar: Calendar | None = None

    @classmethod
    def read(cls, result: pq.abc.PGresult, row: int = 0) -> "Task":
        """A row that `begin`, or one of the statements that take the next, returned."""
        get = result.get_value
        id, attempt, group, remote, input, timeout, max, plan, *rest = map(get, repeat(row, 24), range(24))
        assert id and attempt and timeout and max and plan and group is not None and input is not None
        delete, save, atomic, repeated = [value == b"t" for value in rest[:4]]
        batch, count, aging, _, name, waited = rest[10:]
        alone = not atomic or save or repeated or remote is not None or max < b"0" or count != b"0" or aging == b"t"
        return cls(
            id=int(id),
            attempt=int(attempt),
            group=group,
            remote=remote,
            input=input,
            timeout_ms=_milliseconds(float(timeout)),
            max=int(max),
            plan=plan,
            delete=delete,
            save=save,
            atomic=atomic,
            repeated=repeated,
            format=_format(*rest[4:10]),
            # As `shares` in sql/words.sql; a row that was begun before runs by itself.
            batch=1 if alone or attempt != b"1" else int(batch or 1),
            aging=aging == b"t",
            name=name or b"",
            waited=waited,
        )


def _milliseconds(seconds: float) -> int:
    """A timeout as the server takes it: rounded up, 0 for none."""
    return max(1, ceil(max(0.0, min(seconds * 1000, 2147483647)))) if seconds else 0


@lru_cache(maxsize=64)
def _format(*values: bytes) -> Format:
    header, string, delimiter, escape, quote, null = values
    return Format(
        header=header == b"t",
        string=string == b"t",
        delimiter=_char(delimiter),
        escape=_char(escape),
        quote=_char(quote),
        null=null,
    )


def _char(value: bytes) -> bytes:
    """A "char": one byte or none; newer servers write one beyond ASCII as a backslash and three octal digits."""
    return bytes([int(value[1:], 8)]) if len(value) == 4 else value


class Store:
    """The statements for one table."""

    def __init__(self, *, schema: str, table: str, beside: Mapping[str, str], type_schema: str):
        """`beside`: the names of tables and functions beside it, by what stands for them in the statements."""
        self.schema, self.table = schema, table
        self._words = {
            **{word: _quoted(schema, name) for word, name in beside.items()},
            "task": _quoted(schema, table),
            "state": _quoted(type_schema, "state"),
            "regclass": _literal(_quoted(schema, table)),
            "schema_text": _literal(schema) + "::text",
            "table_text": _literal(table) + "::text",
            "report_text": _literal(_quoted(schema, beside["report"])),
            "recent": _literal(RECENT),
            "room": str(NAME - len("pgtask    ") - len(schema) - len(table)),
        }
        for name, text in statements("words").items():
            self._words[name] = self._fill(text)
        self._texts: dict[str, str] = {}  # the statements that were asked for, by name

    def text(self, name: str, **words: str) -> str:
        """A statement of ours for this table. Raises KeyError if there is none of that name."""
        known = None if words else self._texts.get(name)
        if known is None:
            known = self._fill(self._template(name), **words)
            if not words:
                self._texts[name] = known
        return known

    def _template(self, name: str) -> str:
        for subject in ("poll", "run", "calendar", "wait", "history", "monitor", "top", "user", "why", "doctor"):
            if name in statements(subject):
                return statements(subject)[name]
        raise KeyError(name)

    def repeat(self, copied: str, name: str = "repeat") -> str:
        """`repeat` or `repeat_cron`, which plans the next row of a repeated task; `copied` is `Task.copied`."""
        values = re.sub(r'("(?:[^"]|"")+"|[^, ]+)(?=, |$)', r"t.\1", copied)
        return self.text(name, columns=copied, values=values)

    def _fill(self, text: str, **more: str) -> str:
        words = {**self._words, **more}
        return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), text)


def _quoted(*names: str) -> str:
    return sql.Identifier(*names).as_string(None)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None).removeprefix(" ")
