"""What belongs to a task table: its columns, and the statements that make each object, one by one.

This says how things should be; `schema.py` finds out how they are and runs what is missing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from psycopg import sql

from pgtask import settings
from pgtask.store import Store, statements

STATES = ("PLAN", "GONE", "TAKE", "WORK", "DONE", "FAIL", "STOP", "WAIT")
LONGEST_NAME = 63


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of ours. `default` is SQL, or the name of the setting whose value it takes (`setting`)."""

    name: str
    type: str
    doc: str
    null: bool = False
    default: str | None = None
    setting: bool = False
    check: str | None = None


def _setting(name: str, type: str, doc: str, check: str | None = None) -> Column:
    return Column(name=name, type=type, doc=doc, setting=True, check=check)


def _null(name: str, type: str, doc: str, default: str | None = None) -> Column:
    return Column(name=name, type=type, doc=doc, null=True, default=default)


TIME = "timestamp with time zone"
PARENT = "nullif(nullif(current_setting('pg_task.id', true), '')::bigint, 0)"

COLUMNS: tuple[Column, ...] = (
    Column(name="id", type="bigint", doc="The task's number."),
    _null("parent", "bigint", "The task that made this one: its repetition, or a task that inserted it.", PARENT),
    Column(name="plan", type=TIME, default="statement_timestamp()", doc="When to start."),
    _null("start", TIME, "When the run really began."),
    _null("stop", TIME, "When the run really ended."),
    _setting(
        "active",
        "interval",
        "How long after plan it may still start; later it is GONE. Not applied to repeated tasks and negative max.",
        "active > interval '0'",
    ),
    _setting(
        "live",
        "interval",
        "A worker older than this takes no further task like this one; 0: no limit.",
        "live >= interval '0'",
    ),
    _setting(
        "repeat", "interval", "After the run a new row is planned this much later; 0: never.", "repeat >= interval '0'"
    ),
    _setting(
        "timeout", "interval", "Time allowed for the run, to the millisecond; 0: no limit.", "timeout >= interval '0'"
    ),
    _setting(
        "count",
        "integer",
        "A worker that has run this many takes no further task like this one; 0: no limit.",
        "count >= 0",
    ),
    _setting(
        "max",
        "integer",
        "How many others of the group may run beside it, and its priority;"
        " negative: one at a time, this many milliseconds apart.",
    ),
    _null("pid", "integer", "The backend that runs it or ran it."),
    Column(
        name="state",
        type="state",
        default="'PLAN'",
        doc="Where it stands: PLAN, GONE, TAKE, WORK, DONE, FAIL, STOP, WAIT.",
    ),
    _setting("delete", "boolean", "Remove the row when both output and error are null."),
    _setting("drift", "boolean", "Repetition counts from the end of the run instead of from plan."),
    _setting("header", "boolean", "First line with column names, for results of more than one column."),
    _setting("save", "boolean", "Leave the session as it is for the worker's next task."),
    _setting("string", "boolean", "Quote only strings."),
    _setting("delimiter", '"char"', "Between columns."),
    _setting("escape", '"char"', "Before each quote and escape character inside a quoted value."),
    _setting("quote", '"char"', "Around values."),
    _null("data", "text", "The user's own."),
    _null("error", "text", "What went wrong."),
    _setting("group", "text", "Tasks with the same group and remote share slots."),
    Column(name="input", type="text", doc="The SQL to run."),
    _setting("null", "text", "How a null is written."),
    _null("output", "text", "What the run said."),
    _null("remote", "text", "Conninfo of another database to run on."),
    _setting("atomic", "boolean", "Run and finish in one transaction wherever the input allows it."),
    _setting(
        "batch",
        "integer",
        "How many short tasks of the group may share one transaction and its commit; 1: none.",
        "batch BETWEEN 1 AND 50",
    ),
    Column(name="attempt", type="integer", default="0", doc="Runs begun so far.", check="attempt >= 0"),
    _null("code", "text", "SQLSTATE of the error."),
    _null("notice", "text", "Notices and warnings that the run raised."),
    _null("first", TIME, "The first plan of a repeated task: repetitions stay on its grid."),
)
FUNCTIONS = ("wake", "change", "stop", "guard")
INDEXES = ("due", "lane", "slot")
TRIGGERS = ("wake", "change", "drop", "guard")
FORMER_TRIGGERS = ("move", "stop", "birth")
MASTER_COLUMNS = ("one", "term", "host", "pid", "backend", "backend_start", "since", "layout")


@dataclass(frozen=True, kw_only=True)
class Names:
    """The objects of one task table. Names that would be too long are cut and made unique by a hash."""

    schema: str
    table: str

    def derived(self, suffix: str) -> str:
        name = f"{self.table}_{suffix}"
        if len(name.encode()) <= LONGEST_NAME:
            return name
        mark = hashlib.sha256(self.table.encode()).hexdigest()[:8]
        room = LONGEST_NAME - len(f"_{mark}_{suffix}")
        return f"{self.table.encode()[:room].decode(errors='ignore')}_{mark}_{suffix}"

    def quoted(self, name: str) -> str:
        return sql.Identifier(self.schema, name).as_string(None)

    @property
    def label(self) -> str:
        return f"{self.schema}.{self.table}"

    @property
    def task(self) -> str:
        """The table as SQL names it."""
        return self.quoted(self.table)

    @property
    def state(self) -> str:
        """The type of the column state as SQL names it."""
        return self.quoted("state")

    @property
    def master(self) -> str:
        return self.derived("master")

    def store(self) -> Store:
        return Store(schema=self.schema, table=self.table, master=self.master, type_schema=self.schema)


def identifier(name: str) -> str:
    return sql.Identifier(name).as_string(None)


def literal(text: str) -> str:
    return sql.Literal(text).as_string(None).removeprefix(" ")


def type_(names: Names) -> str:
    labels = ", ".join(f"'{label}'" for label in STATES)
    return f"CREATE TYPE {names.state} AS ENUM ({labels})"


def repeatable(text: str) -> str:
    """The same statement for a script that may be run again."""
    if text.startswith("CREATE TYPE"):
        return f"DO {literal(f'BEGIN {text}; EXCEPTION WHEN duplicate_object THEN NULL; END')}"
    return re.sub(r"^CREATE (SCHEMA|TABLE|INDEX) ", r"CREATE \1 IF NOT EXISTS ", text)


def table(names: Names, defaults: Mapping[str, str]) -> str:
    lines = ["    id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"]
    lines += ["    " + definition(column, names, defaults) for column in COLUMNS if column.name != "id"]
    lines += ["    " + check(column, names) for column in COLUMNS if column.check]
    return f"CREATE TABLE {names.task} (\n" + ",\n".join(lines) + "\n)"


def definition(column: Column, names: Names, defaults: Mapping[str, str]) -> str:
    type = names.state if column.type == "state" else column.type
    value = default(column, names, defaults)
    return (
        f"{identifier(column.name)} {type}"
        + ("" if column.null else " NOT NULL")
        + (f" DEFAULT {value}" if value else "")
    )


def default(column: Column, names: Names, defaults: Mapping[str, str]) -> str | None:
    """The column's default; a placeholder that was never set is null, and '' after a SET LOCAL."""
    if column.setting:
        value = literal(defaults[column.name])
        return f"coalesce(nullif(current_setting('pg_task.{column.name}', true), ''), {value})::{column.type}"
    if column.type == "state":
        return f"{column.default}::{names.state}"
    return column.default


def check_name(column: Column, names: Names) -> str:
    return names.derived(f"{column.name}_check")


def check(column: Column, names: Names) -> str:
    return f"CONSTRAINT {identifier(check_name(column, names))} CHECK ({column.check})"


def set_defaults(columns: tuple[Column, ...], names: Names, defaults: Mapping[str, str]) -> str:
    """One statement for all of them: the table is locked once."""
    parts = [
        f"    ALTER COLUMN {identifier(column.name)} SET DEFAULT {value}"
        for column in columns
        if (value := default(column, names, defaults)) is not None
    ]
    return f"ALTER TABLE {names.task}\n" + ",\n".join(parts)


def index(suffix: str, names: Names) -> str:
    return _fill(f"{suffix}_index", names, index=identifier(names.derived(suffix)))


def function(suffix: str, names: Names) -> str:
    return _fill(f"{suffix}_function", names)


def body(suffix: str) -> str:
    """What the server keeps of a function's text."""
    return statements("schema")[f"{suffix}_function"].split("$pgtask$")[1]


def trigger(suffix: str, names: Names, *, partitioned: bool, wake: bool) -> str:
    """An insert into a partition fires no statement-level trigger of the table above it."""
    words = {"each": "ROW", "guards": "BEFORE"} if partitioned else {"each": "STATEMENT", "guards": "AFTER"}
    arguments = [literal(names.quoted(names.master)), *(["'wake'"] if wake else [])]
    return _fill(f"{suffix}_trigger", names, arguments=", ".join(arguments), **words)


def mark(text: str) -> str:
    """The comment by which a trigger is known to be made by this text."""
    return "pgtask " + hashlib.sha256(text.encode()).hexdigest()[:12]


def master_table(names: Names) -> str:
    return _fill("master_table", names)


def note_layout(names: Names, defaults: Mapping[str, str]) -> str:
    return _fill("layout", names, layout=literal(layout(defaults)))


def layout(defaults: Mapping[str, str]) -> str:
    """A fingerprint of the defaults that a table was given."""
    text = "\n".join(f"{column.name}={defaults.get(column.name, column.default)}" for column in COLUMNS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def comment(target: str, text: str) -> str:
    return f"COMMENT ON {target} IS {literal(text)}"


def column_comment(column: Column, names: Names) -> str:
    return comment(f"COLUMN {names.task}.{identifier(column.name)}", column.doc)


def _fill(name: str, names: Names, **words: str) -> str:
    """In one pass: a name may look like a word."""
    known = {
        "task": names.task,
        "master": names.quoted(names.master),
        "master_regclass": literal(names.quoted(names.master)),
        **{suffix: names.quoted(names.derived(suffix)) for suffix in FUNCTIONS},
        **words,
    }
    return re.sub(r"\{(\w+)\}", lambda match: known[match[1]], statements("schema")[name])


def columns_table() -> str:
    """The columns as a Markdown table, for the README."""
    lines = ["| column | type | null | default | meaning |", "| --- | --- | --- | --- | --- |"]
    known = settings.by_name("task")
    for column in COLUMNS:
        default = column.default or ""
        if column.name == "parent":
            default = "`pg_task.id` of the session"
        elif column.name == "id":
            default = "sequence"
        elif column.setting:
            default = f"`pg_task.{column.name}`, {_shown(known[column.name].sql_default)}"
        meaning = column.doc.replace("|", "\\|")
        lines.append(f"| {column.name} | {column.type} | {'yes' if column.null else 'no'} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shown(value: str) -> str:
    return {"\t": "tab", "": "none"}.get(value, f"`{value}`")
