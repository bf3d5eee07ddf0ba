"""Every statement on the task table, by name, and the values that come out of them. Nobody else writes SQL on it.

The texts stand in sql/*.sql, where each can be read, run and explained by itself. A `Store` is those texts for one
table: names quoted, types qualified. Our sessions run them with the search_path set to the server's own schema, so
that no operator or function of a user's can take the place of ours.
"""

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

from psycopg import pq, sql

from pgtask.output import Format


@cache
def statements(subject: str) -> Mapping[str, str]:
    """The statements of sql/SUBJECT.sql by name, as written there, without their final semicolon."""
    text = files("pgtask").joinpath(f"sql/{subject}.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+).*\n", text, flags=re.MULTILINE)[1:]
    bodies = (re.sub(r"^--.*\n", "", body, flags=re.MULTILINE) for body in parts[1::2])
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], bodies, strict=True)}


class Task(NamedTuple):
    """A row as a worker runs it. Texts are bytes in the server's encoding.

    `repeated`: it may have a next row, for which `copied` must be known. `batch`: how many may share its transaction,
    1 where it must run by itself. `name`: what its session is called meanwhile.
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
    name: bytes
    copied: bytes | None = None

    @classmethod
    def read(cls, result: pq.abc.PGresult, row: int = 0) -> "Task":
        """A row that `begin`, or one of the statements that take the next, returned."""
        get = result.get_value
        id, attempt, group, remote, input, timeout, max, plan, *rest = [get(row, column) for column in range(25)]
        assert id and attempt and timeout and max and plan and group is not None and input is not None
        delete, save, atomic, repeated = [value == b"t" for value in rest[:4]]
        return cls(
            id=int(id),
            attempt=int(attempt),
            group=group,
            remote=remote,
            input=input,
            timeout_ms=int(timeout),
            max=int(max),
            plan=plan,
            delete=delete,
            save=save,
            atomic=atomic,
            repeated=repeated,
            format=_format(*rest[4:10]),
            batch=int(rest[10] or 1),
            name=rest[16] or b"",
        )


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

    def __init__(self, *, schema: str, table: str, master: str, type_schema: str):
        self.schema, self.table, self.master = schema, table, master
        self._words = {
            "task": _quoted(schema, table),
            "master": _quoted(schema, master),
            "state": _quoted(type_schema, "state"),
            "regclass": _literal(_quoted(schema, table)),
            "schema_text": _literal(schema) + "::text",
            "table_text": _literal(table) + "::text",
        }
        for name, text in statements("words").items():
            self._words[name] = self._fill(text)

    def text(self, name: str, **words: str) -> str:
        """A statement of sql/poll.sql or sql/run.sql for this table."""
        for subject in ("poll", "run"):
            if name in statements(subject):
                return self._fill(statements(subject)[name], **words)
        raise KeyError(name)

    def repeat(self, copied: str) -> str:
        """The statement that plans the next row of a repeated task; `copied` is `Task.copied`."""
        values = re.sub(r'("(?:[^"]|"")+"|[^, ]+)(?=, |$)', r"t.\1", copied)
        return self.text("repeat", columns=copied, values=values)

    def _fill(self, text: str, **more: str) -> str:
        words = {**self._words, **more}
        return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), text)


def _quoted(*names: str) -> str:
    return sql.Identifier(*names).as_string(None)


def _literal(text: str) -> str:
    return sql.Literal(text).as_string(None).removeprefix(" ")
