"""`pgtask sql`: the script of a task table's objects, for a DBA who creates or upgrades them himself."""

import asyncio
from collections.abc import Mapping

import click
from psycopg import Error

from pgtask.config import TableConfig
from pgtask.errors import OK, UserError
from pgtask.objects import Names
from pgtask.settings import LONGEST_NAME
from pgtask.user.shown import print_json
from pgtask.user.where import Where, as_json, of_tables, one_line, open_async, settled


@click.command("sql", short_help="Print the script that makes or upgrades a task table.")
@click.option("--owner", metavar="ROLE", help="The role that shall own the objects.")
@click.option("--grant", metavar="ROLE", help="The role that pgtask-master runs as, if it is not the owner.")
@click.option("--upgrade", is_flag=True, help="Connect, and print only what the table that is there lacks.")
@of_tables
@as_json
def command(where: Where, owner: str | None, grant: str | None, upgrade: bool, as_json: bool) -> int:
    """Print the script that makes a task table, or that upgrades one.

    A DBA runs it in place of pgtask-master, which then needs no right to create anything. Names and defaults come
    from FILE, if there is one. Without --upgrade nothing is connected to. With it the table is read, and nothing
    changed; without FILE it keeps its defaults. The table's owner or a superuser runs the script, and what that
    creates is given to the owner.
    """
    _check_role("--owner", owner)
    _check_role("--grant", grant)
    if upgrade:
        found = where.one()
        text = asyncio.run(_upgrade(found, found.defaults if where.file else None, owner, grant))
    else:
        from pgtask.schema import script

        found = _only_script(where)
        names = {"schema": found.schema, "table": found.table}
        text = script(**names, defaults=found.defaults, wake=found.wake, owner=owner, grant=grant)
    if as_json:
        print_json({"schema": found.schema, "table": found.table, "sql": text})
    else:
        click.echo(text, nl=False)
    return OK


def _only_script(where: Where) -> TableConfig:
    """Tables of several databases may have the same script."""
    scripts = {(t.schema, t.table, t.wake, tuple(t.defaults.items())): t for t in where.all()}
    return next(iter(scripts.values())) if len(scripts) == 1 else where.one()


async def _upgrade(table: TableConfig, defaults: Mapping[str, str] | None, owner: str | None, grant: str | None) -> str:
    from pgtask.schema import upgrade

    names = Names(schema=table.schema, table=table.table)
    try:
        conn = await open_async(table, "pgtask sql")
        async with conn, conn.transaction():
            await conn.execute(settled({"search_path": "pg_catalog, pg_temp", "transaction_read_only": "on"}))
            return await upgrade(conn, names, defaults, wake=table.wake, owner=owner, grant=grant)
    except Error as error:
        raise UserError(f"{table.label}: {one_line(error)}") from error


def _check_role(option: str, name: str | None) -> None:
    if name is not None and not (0 < len(name.encode(errors="replace")) <= LONGEST_NAME and "\0" not in name):
        raise UserError(f"{option}: must be a name of 1 to {LONGEST_NAME} bytes")
