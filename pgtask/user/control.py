"""`pgtask cancel`, `retry`, `hold` and `release`: what the table's own functions do, from the command line.

Before rows are touched that were not named one by one, their number is said and asked about.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from psycopg import Connection, errors
from psycopg.errors import Diagnostic

from pgtask.command import printable
from pgtask.config import TableConfig
from pgtask.errors import NO, OK, UserError
from pgtask.objects import Names
from pgtask.user.search import Search, filters
from pgtask.user.shown import print_json, rows, show
from pgtask.user.where import Id, Where, as_json, asking, of_tables, told

REFUSED = (errors.NoDataFound, errors.UndefinedObject, errors.ObjectNotInPrerequisiteState, errors.UniqueViolation)
"""What the functions say of one task that cannot be cancelled or retried; others may be."""


def _touching(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        as_json,
        of_tables,
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        filters,
        click.argument("named", metavar="[ID]...", type=Id(), nargs=-1),
    ):
        command = option(command)
    return command


@click.command("cancel", short_help="Stop tasks, running or not.")
@_touching
def cancel(where: Where, named: Sequence[int], yes: bool, as_json: bool, **chosen: Any) -> int:
    """Stop tasks, running or not: these, or all unfinished ones that fit the options.

    Exit status: 1 if one of these was not stopped, none fits, or the answer to the question was no.
    """
    return _touch(where.one(), "cancel", named, Search(kind="unfinished", **chosen), yes=yes, as_json=as_json)


@click.command("retry", short_help="Run tasks again, or all that failed.")
@_touching
@click.option("--failed", is_flag=True, help="All that are in FAIL, or those of them that fit the other options.")
def retry(where: Where, named: Sequence[int], yes: bool, failed: bool, as_json: bool, **chosen: Any) -> int:
    """Run tasks again: these, whatever became of them, or all in FAIL that fit the options.

    Exit status: 1 if one of these is not put back, none fits, or the answer to the question was no.
    """
    search = Search(kind="failed", **chosen)
    return _touch(where.one(), "retry", named, search, yes=yes, as_json=as_json, every=failed)


def _touch(
    table: TableConfig,
    verb: str,
    named: Sequence[int],
    search: Search,
    *,
    yes: bool,
    as_json: bool,
    every: bool = False,
) -> int:
    if bool(named) == (search.narrow or every):
        raise UserError("say which tasks: their ids, or options that they fit, not both")
    with asking(table, "SELECT, UPDATE") as session:
        if named:
            return _touch_named(session, table, verb, named, as_json=as_json)
        ids = search.ids_of(session, table)
        if ids and not yes and not _agreed(verb, len(ids)):
            return NO
        session.add_notice_handler(_echo_notice)
        done = _call(session, table, f"{verb}_many", ids) if ids else 0
    if as_json:
        print_json({"fit": len(ids), "done": done})
    else:
        click.echo(f"{done} of {len(ids)} tasks that fit: {DONE[verb]}")
    return OK if done else NO


DONE = {"cancel": "stopped", "retry": "put back"}


def _touch_named(session: Connection[Any], table: TableConfig, verb: str, ids: Sequence[int], *, as_json: bool) -> int:
    answers = []
    for id in ids:
        try:
            done = _call(session, table, f"{verb}_one", id)
            why = None if done else "it has ended before" if verb == "cancel" else "it is about to run anyway"
        except REFUSED as error:
            done, why = False, told(error)
        answers.append({"id": id, "done": done, "why": why})
        if not as_json:
            click.echo(f"task {id}: {DONE[verb] if done else f'not {DONE[verb]}: {printable(str(why))}'}", err=not done)
    if as_json:
        print_json(answers)
    return OK if all(answer["done"] for answer in answers) else NO


def _call(session: Connection[Any], table: TableConfig, statement: str, value: object) -> Any:
    store = Names(schema=table.schema, table=table.table).store()
    return session.execute(store.text(statement).encode(), [value]).fetchall()[0][0]


def _agreed(verb: str, count: int) -> bool:
    """Does who sits before the terminal want that? Raises UserError where nobody does."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        fits = "1 task fits; to {} it" if count == 1 else f"{count} tasks fit; to {{}} them"
        raise UserError(f"{fits.format(verb)} without a question say --yes")
    return click.confirm(f"{verb} {count} {'task' if count == 1 else 'tasks'}?", err=True)


def _echo_notice(notice: Diagnostic) -> None:
    click.echo(printable(notice.message_primary or ""), err=True)


@click.command("hold", short_help="Begin nothing more of some groups, or list them.")
@click.argument("groups", metavar="[GROUP]...", nargs=-1)
@of_tables
@as_json
def hold(where: Where, groups: Sequence[str], as_json: bool) -> int:
    """Begin nothing more of these groups, or list those that are held. What runs goes on.

    Exit status: 1 if one of them was held already.
    """
    if groups:
        return _each_group(where.one(), "hold", groups, "held", "held already", as_json=as_json)
    table = where.one()
    with asking(table, "SELECT", of="held") as session:
        found = session.execute(Names(schema=table.schema, table=table.table).store().text("held_groups").encode())
        show(rows(found), as_json=as_json, columns=("group", "since", "by"))
    return OK


@click.command("release")
@click.argument("groups", metavar="GROUP...", nargs=-1, required=True)
@of_tables
@as_json
def release(where: Where, groups: Sequence[str], as_json: bool) -> int:
    """Let groups that are held begin again.

    Exit status: 1 if one of them was not held.
    """
    return _each_group(where.one(), "release", groups, "released", "was not held", as_json=as_json)


def _each_group(
    table: TableConfig, verb: str, groups: Sequence[str], done: str, not_done: str, *, as_json: bool
) -> int:
    with asking(table, "SELECT, INSERT, DELETE", of="held") as session:
        answers = [(group, bool(_call(session, table, f"{verb}_group", group))) for group in groups]
    if as_json:
        print_json([{"group": group, "done": answer} for group, answer in answers])
    for group, answer in [] if as_json else answers:
        click.echo(f"{printable(group)}: {done if answer else not_done}", err=not answer)
    return OK if all(answer for _, answer in answers) else NO
