"""What belongs to a task table: its columns, and the statements that make each object, one by one.

This says how things should be; `schema.py` finds out how they are and runs what is missing.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from psycopg import sql

from pgtask import settings
from pgtask.store import RECENT, Store, statements

STATES = ("PLAN", "GONE", "TAKE", "WORK", "DONE", "FAIL", "STOP", "WAIT")
LONGEST_NAME = 63

STORAGE = {"autovacuum_vacuum_scale_factor": "0.01", "vacuum_index_cleanup": "on"}
"""How the table is vacuumed: a task leaves two dead rows, whose index entries every look reads. So vacuum comes soon,
however many finished rows are kept, and never passes over the indexes because few of all pages have dead rows."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of ours. `default` is SQL, or the name of the setting whose value it takes (`setting`).

    `check` is what its value {} must hold to, maybe beside that of another column {name}.
    """

    name: str
    type: str
    doc: str
    null: bool = False
    default: str | None = None
    setting: bool = False
    check: str | None = None


def _setting(name: str, type: str, doc: str, check: str | None = None) -> Column:
    return Column(name=name, type=type, doc=doc, setting=True, check=check)


def _null(name: str, type: str, doc: str, default: str | None = None, check: str | None = None) -> Column:
    return Column(name=name, type=type, doc=doc, null=True, default=default, check=check)


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
        "{} > interval '0'",
    ),
    _setting(
        "live",
        "interval",
        "A worker older than this takes no further task like this one; 0: no limit.",
        "{} >= interval '0'",
    ),
    _setting(
        "repeat", "interval", "After the run a new row is planned this much later; 0: never.", "{} >= interval '0'"
    ),
    _setting("timeout", "interval", "Time allowed for the run, to the millisecond; 0: no limit.", "{} >= interval '0'"),
    _setting(
        "count",
        "integer",
        "A worker that has run this many takes no further task like this one; 0: no limit.",
        "{} >= 0",
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
        "{} BETWEEN 1 AND 50",
    ),
    Column(name="attempt", type="integer", default="0", doc="Runs begun so far.", check="{} >= 0"),
    _setting("retry", "integer", "How many further runs after failed ones.", "{} >= 0"),
    _setting(
        "backoff",
        "interval",
        "Pause before the first of them; doubles each time, with jitter, up to an hour.",
        "{} >= interval '0'",
    ),
    _setting(
        "retry_on",
        "text",
        "After which errors: SQLSTATEs and classes, * for all, ! before those that are not meant.",
    ),
    _null("attempts", "jsonb", "The earlier runs of the row: when, with which end."),
    _null(
        "cron",
        "text",
        "Calendar of a repeated task; the first run is the first match at or after plan.",
        check="({} IS NULL OR {repeat} = interval '0')",
    ),
    _null("zone", "text", "Time zone of cron; the server's TimeZone if null."),
    _null(
        "until",
        TIME,
        "Nothing is repeated to a plan after this.",
        check="({} IS NULL OR {} >= {plan})",
    ),
    _setting(
        "missed",
        "text",
        "What becomes of missed runs of the calendar: once, skip or all.",
        "{} IN ('once', 'skip', 'all')",
    ),
    _null(
        "key",
        "text",
        "Unique among the unfinished tasks of the table.",
        check="({} IS NULL OR octet_length({}) BETWEEN 1 AND 1000)",
    ),
    _null("depend", "bigint[]", "Tasks that must be DONE first."),
    Column(
        name="anyway",
        type="boolean",
        default="false",
        doc="Run also when those ended otherwise.",
    ),
    _null(
        "notify",
        "text",
        "Channel that is notified of the task's end.",
        check="({} IS NULL OR octet_length({}) BETWEEN 1 AND 63)",
    ),
    _null("code", "text", "SQLSTATE of the error."),
    _null("notice", "text", "Notices and warnings that the run raised."),
    _null("first", TIME, "The first plan of a repeated task: repetitions stay on its grid."),
)


@dataclass(frozen=True, kw_only=True)
class Routine:
    """A function or procedure beside the table, `name`d in sql/`subject`.sql.

    In the database it is called TABLE_`suffix`, and `types` are those of its arguments as the server lists them.
    `private`: nobody may call it but who is granted to.
    """

    name: str
    suffix: str
    types: str = ""
    subject: str = "schema"
    private: bool = False


_SCHEDULE = (
    "text, {}, text, text, integer, interval, text, timestamp with time zone, text, integer, text, text"  # key first
)
ROUTINES: tuple[Routine, ...] = (
    *(
        Routine(name=f"{suffix}_function", suffix=suffix)
        for suffix in ("wake", "change", "guard", "check", "fixed", "moved")
    ),
    *(Routine(name=f"{suffix}_function", suffix=suffix, private=True) for suffix in ("enter", "stop")),
    Routine(name="orphan_function", suffix="orphan", types="bigint", private=True),
    Routine(name="align_function", suffix="align", subject="schedule"),
    Routine(name="cron_error_function", suffix="cron_error", types="text", subject="schedule"),
    Routine(name="schedule_function", suffix="schedule", types=_SCHEDULE.format("text"), subject="schedule"),
    Routine(name="every_function", suffix="schedule", types=_SCHEDULE.format("interval"), subject="schedule"),
    Routine(name="unschedule_function", suffix="unschedule", types="text", subject="schedule"),
    Routine(name="cancel", suffix="cancel", types="bigint", subject="control"),
    Routine(name="cancel_filter", suffix="cancel", types="text", subject="control"),
    Routine(
        name="run",
        suffix="run",
        types=f"text, {TIME}, interval, text, integer, interval, text, integer, bigint[], text, text, text",
        subject="control",
    ),
    Routine(name="wait_for", suffix="wait_for", types="bigint[], interval, boolean", subject="control"),
    Routine(name="wait", suffix="wait", types="bigint, interval", subject="control"),
    Routine(name="wait_all", suffix="wait_all", types="bigint[], interval", subject="control"),
    Routine(name="wait_any", suffix="wait_any", types="bigint[], interval", subject="control"),
    Routine(name="hold", suffix="hold", types="text", subject="control"),
    Routine(name="release", suffix="release", types="text", subject="control"),
    Routine(name="progress", suffix="progress", types="numeric, text", subject="control"),
    Routine(name="await", suffix="await", types="bigint, interval, text, text, text, text, text", subject="control"),
    Routine(
        name="noted_function",
        suffix="noted",
        types=f"jsonb, integer, {', '.join([TIME] * 3)}, text, text, text, integer",
    ),
    Routine(name="again_function", suffix="again", types="interval", subject="retry"),
    Routine(name="put_back_function", suffix="put_back", types="bigint[]", subject="retry"),
    Routine(name="retry_function", suffix="retry", types="bigint", subject="retry"),
    Routine(name="retry_filter_function", suffix="retry", types="text", subject="retry"),
    *(
        Routine(name=f"{suffix}_function", suffix=suffix, types=types, subject="async", private=suffix == "async")
        for suffix, types in {
            "async": "",
            "async_plan": "name, regclass, boolean, text, text, text[]",
            "async_lacking": "text, text[]",
            "async_settings": "name, regclass, text[], boolean, text[], boolean[]",
            "async_list": "regclass, text, boolean",
            "async_input": "text, text, text[], text, text",
        }.items()
    ),
)
CALLED = ("noted", "cancel", "retry", "hold", "release")
"""The routines that statements of ours call."""

INDEXES = ("due", "lane", "slot", "key", "wait", "depend")
UNIQUE = ("key",)
"""Of those the ones that a partitioned table cannot have: no column of the user's partitioning is in them."""
TRIGGERS = ("wake", "change", "drop", "guard", "check", "align", "enter", "fixed", "moved")
FORMER_TRIGGERS = ("move", "stop", "birth")
ASYNC = (
    *("group", "max", "timeout", "active", "retry", "backoff", "retry_on", "key"),
    *("remote", "batch", "atomic", "delete", "data", "notify"),
)
"""The columns that an asynchronous trigger may set."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A small table beside the task table, called TABLE_`suffix`."""

    suffix: str
    doc: str
    columns: tuple[str, ...]


MASTER = Side(
    suffix="master",
    doc="Who serves the task table.",
    columns=("one", "term", "host", "pid", "backend", "backend_start", "since", "layout"),
)
HELD = Side(suffix="held", doc="Groups of which nothing more is started.", columns=("group", "since", "by"))
REPORT = Side(
    suffix="report",
    doc="How far runs are that go on, as they say.",
    columns=("id", "attempt", "percent", "message", "at"),
)
SIDES: tuple[Side, ...] = (MASTER, HELD, REPORT)


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
        suffixes = (*(side.suffix for side in SIDES), *CALLED)
        beside = {suffix: self.derived(suffix) for suffix in suffixes}
        return Store(schema=self.schema, table=self.table, beside=beside, type_schema=self.schema)


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
    return re.sub(r"^CREATE (SCHEMA|TABLE|INDEX|UNIQUE INDEX) ", r"CREATE \1 IF NOT EXISTS ", text)


def table(names: Names, defaults: Mapping[str, str]) -> str:
    lines = ["    id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"]
    lines += ["    " + definition(column, names, defaults) for column in COLUMNS if column.name != "id"]
    return f"CREATE TABLE {names.task} (\n" + ",\n".join(lines) + f"\n) WITH ({storage(STORAGE)})"


def storage(names: Iterable[str]) -> str:
    """These of STORAGE with their values, in parentheses of a WITH or SET."""
    return ", ".join(f"{name} = {STORAGE[name]}" for name in names)


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


def set_defaults(columns: tuple[Column, ...], names: Names, defaults: Mapping[str, str]) -> str:
    """One statement for all of them: the table is locked once."""
    parts = [
        f"    ALTER COLUMN {identifier(column.name)} SET DEFAULT {value}"
        for column in columns
        if (value := default(column, names, defaults)) is not None
    ]
    return f"ALTER TABLE {names.task}\n" + ",\n".join(parts)


def index(suffix: str, names: Names) -> str:
    return _object(f"{suffix}_index", names, index=identifier(names.derived(suffix)))


def routine(one: Routine, names: Names, defaults: Mapping[str, str]) -> str:
    """The statement that makes it. A name in its body may hold what would end it: then it is quoted by another word."""
    before, body, after = statements(one.subject)[one.name].split("$pgtask$")
    words = _async_words(names, defaults) if one.subject == "async" else {}
    body, quote = _fill(body, names, **words), "$pgtask$"
    while quote in body:
        quote = f"${quote[1:-1]}_$"
    before, after = _fill(before, names), _fill(after, names)
    return f"{before}{quote} -- {mark(before + body + after)}{body}{quote}{after}"


def _async_words(names: Names, defaults: Mapping[str, str]) -> dict[str, str]:
    """What an asynchronous trigger inserts: what was given, or else the default, which VALUES cannot ask for there."""
    columns = [column for column in COLUMNS if column.name in ("plan", *ASYNC)]
    values = {
        identifier(
            column.name
        ): f"coalesce(given.{identifier(column.name)}, {default(column, names, defaults) or 'NULL'})"
        for column in columns
    } | {"input": "given.input"}
    return {
        "async_columns": ", ".join(values),
        "async_values": ", ".join(values.values()),
        "async_holds": " AND ".join(rule for name, rule in rules("given.").items() if name in ASYNC),
        "async_rules": ", ".join(
            f"({rule}, {literal(rules()[name])})" for name, rule in rules("given.").items() if name in ASYNC
        ),
        "async_settable": literal("{" + ",".join((*ASYNC, "delay", "debounce")) + "}"),
    }


def body(text: str) -> str:
    """Of the statement that makes a routine what the server keeps: it begins with a mark of the whole statement."""
    match = re.search(r"(\$pgtask_*\$)( -- pgtask .*)\1", text, re.DOTALL)
    assert match is not None
    return match[2]


def signature(suffix: str, types: str, names: Names) -> str:
    """As SQL names a routine."""
    return f"{names.quoted(names.derived(suffix))}({types})"


def trigger(suffix: str, names: Names, *, partitioned: bool, wake: bool) -> str:
    """An insert into a partition fires no statement-level trigger of the table above it."""
    words = {"each": "ROW", "guards": "BEFORE"} if partitioned else {"each": "STATEMENT", "guards": "AFTER"}
    arguments = [literal(names.quoted(names.master)), *(["'wake'"] if wake else [])]
    checks = rules()
    return _object(
        f"{suffix}_trigger",
        names,
        arguments=", ".join(arguments),
        checked=", ".join(identifier(name) for name in checks if name != "attempt"),
        checks=" AND ".join(rules("NEW.").values()),
        rules=", ".join(literal(text) for check in checks.items() for text in check),
        **words,
    )


def rules(row: str = "") -> dict[str, str]:
    """What the columns that have a check must hold to, of the values in that row."""

    def rule(name: str, check: str) -> str:
        return re.sub(r"\{(\w*)\}", lambda match: row + (match[1] or name), check)

    return {column.name: rule(column.name, column.check) for column in COLUMNS if column.check}


def mark(text: str) -> str:
    """The words by which an object is known to be made by this text."""
    return "pgtask " + hashlib.sha256(text.encode()).hexdigest()[:12]


def side(one: Side, names: Names) -> str:
    return _object(f"{one.suffix}_table", names)


def note_layout(names: Names, defaults: Mapping[str, str]) -> str:
    return _object("layout", names, layout=literal(layout(defaults)))


def layout(defaults: Mapping[str, str]) -> str:
    """A fingerprint of the defaults that a table was given."""
    text = "\n".join(f"{column.name}={defaults.get(column.name, column.default)}" for column in COLUMNS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def comment(target: str, text: str) -> str:
    return f"COMMENT ON {target} IS {literal(text)}"


def column_comment(column: Column, names: Names) -> str:
    return comment(f"COLUMN {names.task}.{identifier(column.name)}", column.doc)


def _object(name: str, names: Names, **words: str) -> str:
    """The statement of that name in sql/schema.sql."""
    return _fill(statements("schema")[name], names, **words)


def _fill(text: str, names: Names, **words: str) -> str:
    """In one pass: a name may look like a word. Braces around anything else stand for themselves."""
    suffixes = {one.suffix for one in ROUTINES} | {one.suffix for one in SIDES}
    known = {
        "task": names.task,
        "state": names.state,
        "task_regclass": literal(names.task),
        "master_regclass": literal(names.quoted(names.master)),
        "recent": literal(RECENT),
        **{suffix: names.quoted(names.derived(suffix)) for suffix in suffixes},
        **words,
    }
    return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), text)


def columns_table() -> str:
    """The columns as a Markdown table, for docs/."""
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
