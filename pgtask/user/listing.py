"""`pgtask list` and `pgtask show`: the rows of task tables, many in a line each, or some of them whole.

Values are the server's own text, as psql has it; passwords in `remote` are not shown.
"""

import json
from collections.abc import Sequence
from typing import Any

import click
from psycopg import Connection

from pgtask.config import TableConfig
from pgtask.errors import NO, OK, UserError
from pgtask.log import redact
from pgtask.objects import STATES, Names
from pgtask.user.search import Search, documents, filters, reading
from pgtask.user.shown import note, print_json, rows, show, show_whole
from pgtask.user.where import Id, Where, as_json, of_tables

USUAL = ("id", "state", "group", "plan", "took", "code", "input")
OF_FAILED = ("id", "group", "start", "attempt", "code", "error")
LAST = ("input", "output", "notice", "error")
"""Columns that stand at the end of a whole row."""


@click.command("list", short_help="List tasks, the newest first.")
@click.option("-s", "--state", "states", type=click.Choice(STATES, case_sensitive=False), multiple=True,
              help="In this state; may be repeated.")  # fmt: skip
@click.option("--due", "kind", flag_value="due", help="Planned ones whose time has come, the first ones first.")
@click.option("--running", "kind", flag_value="running", help="Those that run, the longest-running ones first.")
@click.option("--failed", "kind", flag_value="failed", help="Those in FAIL, with their errors.")
@filters
@click.option("-c", "--columns", metavar="NAME,...", help="Show these; 'took' is how long the run took.")
@click.option("-n", "--limit", type=click.IntRange(0), default=50, show_default=True,
              help="So many of each table at most; 0: all.")  # fmt: skip
@of_tables
@as_json
def list_(
    where: Where, states: Sequence[str], kind: str | None, columns: str | None, limit: int, as_json: bool, **chosen: Any
) -> int:
    """List tasks, the newest first; with --state PLAN, those that come next first.

    Of all tables that the options name. With --json every column, or those that are asked for, and whole.

    Exit status: 0, whether there are any or not.
    """
    if states and kind:
        raise UserError(f"--state and --{kind} cannot both be given")
    # What one index finds is looked for by it.
    kind = kind or {"PLAN": "plan", "WAIT": "wait", "FAIL": "failed"}.get(",".join(states), "any")
    search = Search(kind=kind, states=states, **chosen)
    usual = OF_FAILED if kind == "failed" else USUAL
    names = [name.strip() for name in columns.split(",")] if columns else [] if as_json else list(usual)
    tables = where.all()
    found: list[dict[str, object]] = []
    for table in tables:
        with reading(table) as session:
            ask = search.documents if as_json else search.lines
            some = ask(session, table, names, limit and limit + 1)
        if 0 < limit < len(some):
            some.pop()
            note(f"there are more in {table.label}: --limit 0 shows all")
        found += [{"table": table.label} | row for row in some] if len(tables) > 1 else some
    show(found, as_json=as_json, columns=[*["table"] * (len(tables) > 1), *names])
    return OK


@click.command("show", short_help="Show everything of some tasks.")
@click.argument("ids", metavar="ID...", type=Id(), nargs=-1, required=True)
@of_tables
@as_json
def show_(where: Where, ids: Sequence[int], as_json: bool) -> int:
    """Show everything of some tasks: a line for each column that is not null, texts whole.

    With the earlier runs, how far a run is that says so, what it depends on, and which tasks depend on it or were made
    by it (of the next 100,000).

    Exit status: 1 if one of them is not there.
    """
    table = where.one()
    found: list[dict[str, object]] = []
    missing = []
    with reading(table) as session:
        for id in ids:
            row = _document(session, table, id) if as_json else _whole(session, table, id)
            if row is None:
                missing.append(id)
            elif as_json:
                found.append(row)
            else:
                show_whole(f"task {id}", row)
    if as_json:
        print_json(found)
    for id in missing:
        click.echo(f"there is no task {id}: it was removed, or never was", err=True)
    return NO if missing else OK


def _document(session: Connection[Any], table: TableConfig, id: int) -> dict[str, object] | None:
    store = Names(schema=table.schema, table=table.table).store()
    found = documents(session, table, store.text("whole"), [id])
    if not found:
        return None
    related = _around(session, table, id)
    return related | found[0]  # the row's own columns go before


def _whole(session: Connection[Any], table: TableConfig, id: int) -> dict[str, object] | None:
    """What is not null, short values first."""
    store = Names(schema=table.schema, table=table.table).store()
    found = rows(session.execute(store.text("whole").encode(), [id]))
    if not found:
        return None
    row = {name: value for name, value in found[0].items() if value is not None}
    if "remote" in row:
        row["remote"] = redact(str(row["remote"]))
    related = {name: _listed(value) for name, value in _around(session, table, id).items() if value}
    attempts = {"attempts": _runs(str(row.pop("attempts")))} if "attempts" in row else {}
    last = {name: row.pop(name) for name in LAST if name in row}
    return row | related | attempts | last


def _around(session: Connection[Any], table: TableConfig, id: int) -> dict[str, object]:
    """How far it is, and the tasks that have to do with it."""
    store = Names(schema=table.schema, table=table.table).store()
    [depend, dependents, children] = session.execute(store.text("relatives").encode(), [id]).fetchall()[0]
    around: dict[str, object] = {"depend": depend, "dependents": dependents, "children": children, "progress": None}
    [[may]] = session.execute(store.text("reads_progress").encode()).fetchall()
    if may:
        around["progress"] = next((row[0] for row in session.execute(store.text("progress").encode(), [id])), None)
    return around


def _listed(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _runs(attempts: str) -> str:
    """Each earlier run in a line, its error in more."""
    runs = json.loads(attempts)
    if not isinstance(runs, list):
        return attempts
    return "\n".join(
        " ".join(str(value) for value in run.values()) if isinstance(run, dict) else str(run) for run in runs
    )
