"""`pgtask submit`: a new task, by one INSERT of what was given.

The rights are those of an INSERT: no function is called. Values go to the server as parameters of unknown type, so that
it reads each as it reads a literal of that column.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from psycopg import Connection

from pgtask import cron
from pgtask.command import FILE
from pgtask.config import TableConfig
from pgtask.errors import INTERRUPTED, OK, UserError
from pgtask.objects import COLUMNS, Names, identifier
from pgtask.user import ends
from pgtask.user.shown import print_json
from pgtask.user.where import Id, Where, as_json, asking, of_tables

GIVEN = (
    *("plan", "group", "max", "timeout", "active", "key", "data", "depend", "anyway", "retry", "backoff", "retry_on"),
    *("repeat", "drift", "cron", "zone", "until", "missed", "remote", "notify", "delete", "atomic", "batch"),
)
"""Columns that have an option of their own, in the order of the help."""

SCHEDULERS = (
    "id",
    "parent",
    "start",
    "stop",
    "pid",
    "state",
    "error",
    "output",
    "attempt",
    "attempts",
    "code",
    "notice",
    "first",
)
"""Columns that nobody sets but the scheduler."""


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    known = {column.name: column for column in COLUMNS}
    for name in reversed(GIVEN):
        column, option = known[name], "--" + name.replace("_", "-")
        if column.type == "boolean":
            flags = f"{option}/--no-{option[2:]}"
            command = click.option(flags, name, default=None, help=column.doc)(command)
        else:
            several = column.type.endswith("[]")
            metavar = "ID" if several else {"integer": "NUMBER", "interval": "INTERVAL"}.get(column.type, "TEXT")
            metavar = "TIME" if column.type.startswith("timestamp") else metavar
            doc = column.doc + " May be repeated." * several
            kind = Id() if several else None
            command = click.option(option, name, metavar=metavar, multiple=several, type=kind, help=doc)(command)
    return command


@click.command("submit")
@click.argument("sql", required=False)
@click.option("-f", "--file", "source", type=FILE, metavar="FILE", help="Read the SQL from here; - is standard input.")
@click.option("--delay", metavar="INTERVAL", help="Start so much later than plan, or than now.")
@_options
@click.option("--set", "more", multiple=True, metavar="COLUMN=VALUE",
              help="Set another column, of yours for example; may be repeated.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait until it has ended; then as `pgtask wait`.")
@click.option("--output", is_flag=True, help="With --wait: print its output, and nothing else.")
@of_tables
@as_json
def submit(
    where: Where,
    sql: str | None,
    source: Path | None,
    delay: str | None,
    more: Sequence[str],
    wait: bool,
    output: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Queue a task that runs SQL, and print its id.

    With - as SQL it is read from standard input. The row stays when it is done, so that `pgtask show` has it, unless
    you say --delete or may not set that column. What is left out is as the table's defaults say.

    Exit status: 0 if it is queued; with --wait as `pgtask wait`.
    """
    if output and not wait:
        raise UserError("--output goes with --wait")
    table = where.one()
    values = _values(given, more)
    values["input"] = _read(sql, source)
    if "cron" in values:  # the server does not know calendars, and the master would let the task fail
        cron.first(str(values["cron"]), str(values.get("zone", "UTC")), datetime.now(UTC))
    with asking(table, "INSERT") as session:
        id = insert(session, table, values, delay)
        if id is None:
            _say_unknown(table, wait=wait, as_json=as_json)
            return OK
        if not wait:
            print_json({"id": id}) if as_json else click.echo(id)
            return OK
        with ends.Look(session, table) as look:
            try:
                ended, _ = ends.until_ended(look, [id])
            except KeyboardInterrupt:
                click.echo(f"task {id} goes on; to stop it: pgtask cancel {id}", err=True)
                return INTERRUPTED
            return ends.tell(look, ended, over=False, output=output, as_json=as_json)


def insert(session: Connection[Any], table: TableConfig, values: Mapping[str, object], delay: str | None) -> int | None:
    """The id of the new task, None for a role that may not read it. Raises psycopg.Error."""
    store = Names(schema=table.schema, table=table.table).store()
    [[told, kept]] = session.execute(store.text("rights_to_submit").encode()).fetchall()
    given = ({"delete": "false"} if kept else {}) | dict(values)
    parameters = list(given.values())
    places = {name: f"${number}" for number, name in enumerate(given, 1)}
    if delay is not None:
        parameters += [delay] if "plan" in given else [None, delay]
        plan = places.get("plan", f"${len(given) + 1}")
        places["plan"] = store.text("delayed", plan=plan, delay=f"${len(parameters)}")
    query = store.text(
        "submit",
        columns=", ".join(map(identifier, places)),
        values=", ".join(places.values()),
        returning=" " + store.text("told") if told else "",
    )
    cursor = session.execute(query.encode(), parameters)
    return int(cursor.fetchall()[0][0]) if told else None


def _values(given: Mapping[str, Any], more: Sequence[str]) -> dict[str, object]:
    """What was given, by column, as texts. Raises UserError."""
    values: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, bool):
            values[name] = str(value).lower()
        elif isinstance(value, tuple):
            values |= {name: "{" + ",".join(map(str, value)) + "}"} if value else {}
        elif value is not None:
            values[name] = value
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--set {text}: write it as COLUMN=VALUE")
        if name in SCHEDULERS:
            raise UserError(f"--set {name}: the scheduler writes that column, nobody else")
        if name in values or name == "input":
            raise UserError(f"--set {name}: that is given already")
        values[name] = value
    return values


def _read(sql: str | None, source: Path | None) -> str:
    """The SQL. Raises UserError."""
    if sql is not None and source is not None:
        raise UserError("SQL and --file cannot both be given")
    if sql is None and source is None:
        raise UserError("there is no SQL to run: give it in quotes, or - for standard input, or --file FILE")
    if source is None and sql != "-":
        text = sql or ""
    else:
        where = "standard input" if source is None or str(source) == "-" else str(source)
        try:
            text = (sys.stdin.buffer.read() if where == "standard input" else Path(where).read_bytes()).decode()
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 at byte {error.start}; iconv can convert it") from error
    if not text.strip():
        raise UserError("the SQL is empty")
    return text


def _say_unknown(table: TableConfig, *, wait: bool, as_json: bool) -> None:
    """It is queued, and no more can be done with it."""
    if as_json:
        print_json({"id": None})
    grant = f"GRANT SELECT ON {Names(schema=table.schema, table=table.table).task}"
    click.echo(f"queued; this role may not read its id{', nor wait for it' * wait}: {grant} lets it", err=True)
