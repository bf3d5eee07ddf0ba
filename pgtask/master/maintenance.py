"""Creates the role and the database of a table, when the configuration names a conninfo with the right to do so.

As pg_task does: a role with LOGIN, and a database that it owns. Only what does not exist is made; a password travels
as its SCRAM verifier, never in clear text, into the server's log.
"""

import asyncio
import os

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, conninfo, sql

from pgtask import log
from pgtask.config import TableConfig
from pgtask.process import Children
from pgtask.resolve import resolved

TIMEOUT = 30.0
MEMBER = "SELECT pg_catalog.pg_has_role(oid, 'MEMBER') FROM pg_catalog.pg_roles WHERE rolname = $1"
SUPERUSER = "SELECT FROM pg_catalog.pg_roles WHERE rolname = current_user AND rolsuper"


async def ensure(table: TableConfig, children: Children, *, quiet: bool = False) -> bool:
    """Create what is missing; True if something was. A failure is logged, unless `quiet`."""
    if not table.maintenance:
        return False
    made = False
    try:
        async with await _connect(table.maintenance, children) as conn:
            for what, text in await _wanted(conn, table):
                try:
                    await conn.execute(text)
                    made = True
                    log.info("created", table=table.label, what=what)
                except (
                    psycopg.errors.DuplicateObject,
                    psycopg.errors.DuplicateDatabase,
                    psycopg.errors.UniqueViolation,
                ):
                    log.debug("created_by_another", what=what)
    except (psycopg.Error, OSError, TimeoutError) as error:
        if not quiet:
            log.warning("maintenance_failed", table=table.label, error=" ".join(str(error).split()))
    return made


async def missing(table: TableConfig, children: Children) -> list[str]:
    """What `ensure` would do, in words."""
    if not table.maintenance:
        return []
    async with await _connect(table.maintenance, children) as conn:
        return [what for what, _ in await _wanted(conn, table)]


async def _connect(text: str, children: Children) -> AsyncConnection[tuple[str, ...]]:
    text = await resolved(text, children, dict(os.environ))
    async with asyncio.timeout(TIMEOUT):
        conn = await AsyncConnection.connect(text, autocommit=True, cursor_factory=AsyncRawCursor)
        await conn.execute("SET search_path TO pg_catalog, pg_temp")  # whoever made what there
        return conn


async def _wanted(conn: AsyncConnection[tuple[str, ...]], table: TableConfig) -> list[tuple[str, sql.Composed]]:
    params = {name: str(value) for name, value in conninfo.conninfo_to_dict(table.conninfo).items()}
    user = table.user
    database = table.dbname
    wanted: list[tuple[str, sql.Composed]] = []
    roles = await (await conn.execute(MEMBER, (user,))).fetchall()
    if not roles:
        text = sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(user))
        if params.get("password"):
            secret = conn.pgconn.encrypt_password(params["password"].encode(), user.encode(), b"scram-sha-256").decode()
            text += sql.SQL(" PASSWORD {}").format(sql.Literal(secret))
        wanted.append((f"create role {user}", text))
    query = "SELECT FROM pg_catalog.pg_database WHERE datname = $1"
    if not await (await conn.execute(query, (database,))).fetchall():
        names = sql.Identifier(database), sql.Identifier(user)
        create = (f"create database {database}", sql.SQL("CREATE DATABASE {} OWNER {}").format(*names))
        member = (await (await conn.execute(SUPERUSER)).fetchall()) or any(row[0] for row in roles)
        wanted += [create] if member else _as_member(user, create)
    return wanted


def _as_member(user: str, create: tuple[str, sql.Composed]) -> list[tuple[str, sql.Composed]]:
    """Who is no superuser must for that moment be a member of the role that shall own the database."""
    role = sql.Identifier(user)
    return [
        (f"join role {user}", sql.SQL("GRANT {} TO CURRENT_USER").format(role)),
        create,
        (f"leave role {user}", sql.SQL("REVOKE {} FROM CURRENT_USER").format(role)),
    ]
