"""Which tables a command means, and sessions to them.

Statements run with pg_catalog as the search_path, so that nobody's operators take the place of those that are meant.
"""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource
from psycopg import (
    AsyncConnection,
    AsyncRawCursor,
    Connection,
    Error,
    ProgrammingError,
    RawCursor,
    connect,
    conninfo,
    errors,
    sql,
)
from psycopg.abc import Buffer
from psycopg.types.string import TextLoader

from pgtask import config
from pgtask.command import FILE
from pgtask.errors import UserError
from pgtask.objects import CALLED, COLUMNS, Names
from pgtask.settings import by_name


class Where(NamedTuple):
    """Which tables the options mean."""

    conninfo: str | None
    file: Path | None
    schema: str | None
    table: str | None

    def one(self) -> config.TableConfig:
        """The only table that is meant. Raises UserError if there are several."""
        found = self.all()
        if len(found) > 1:
            raise UserError(f"several tables fit, say which with -d, --schema and --table: {_listed(found)}")
        return found[0]

    def all(self) -> list[config.TableConfig]:
        """At least one. Raises UserError."""
        names = {"schema": self.schema, "table": self.table}
        if self.file is None:
            return list(config.load(None, [self._given], names, os.environ).tables)
        loaded = config.load(self.file, [], {}, os.environ)
        origins = [loaded.origins[f"database[0].{name}"] for name in ("conninfo", "schema", "table")]
        if len(loaded.tables) == 1 and set(origins) == {config.BUILT_IN}:
            # The file names no table of its own: its defaults are still meant.
            return list(config.load(self.file, [self._given] if self._given else [], names, os.environ).tables)
        wanted = {name: value for name, value in names.items() if value is not None}
        if self.conninfo is not None:
            wanted["dbname"] = _dbname(self.conninfo, self.file)
        fitting = [t for t in loaded.tables if all(getattr(t, name) == value for name, value in wanted.items())]
        if not fitting:
            raise UserError(f"{self.file}: no table has these names; it has {_listed(loaded.tables)}")
        return fitting

    def arguments(self, table: config.TableConfig) -> str:
        """What names this table to another command of ours, in a shell."""
        of_file = self.file is not None and self._given != table.conninfo
        words = ["--config", str(self.file)] if self.file is not None else []
        words += ["-d", table.dbname if of_file else table.open_conninfo]
        return shlex.join([*words, "--schema", table.schema, "--table", table.table])

    def master(self) -> config.MasterConfig | None:
        """What FILE says of the whole program, where it is given."""
        return config.load(self.file, [], {}, os.environ).master if self.file is not None else None

    @property
    def _given(self) -> str:
        """The conninfo; a bare name is a database's, as psql has it."""
        text = self.conninfo or ""
        return conninfo.make_conninfo(dbname=text) if text and not _is_conninfo(text) else text


def _is_conninfo(text: str) -> bool:
    """A string or a URI, not a database's name."""
    return bool({"=", ":"} & set(text))


def _dbname(text: str, file: Path) -> str:
    if _is_conninfo(text):
        raise UserError(f"-d {text.split('=')[0]}...: with --config {file} it is the name of one of its databases")
    return text


def _listed(tables: Iterable[config.TableConfig]) -> str:
    return ", ".join(table.label for table in tables)


def of_tables(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which tables are meant; the command gets them as `where`."""

    def with_where(
        conninfo: str | None, file: Path | None, schema: str | None, table: str | None, **rest: object
    ) -> object:
        named = click.get_current_context().get_parameter_source("file") is not ParameterSource.ENVIRONMENT
        if conninfo is not None and not named and _is_conninfo(conninfo):
            file = None  # the variable is for those who say nothing
        return command(where=Where(conninfo, file, schema, table), **rest)

    with_where.__name__, with_where.__doc__ = command.__name__, command.__doc__
    with_where.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(_TABLES):
        with_where = option(with_where)
    return with_where


_TABLES = (
    click.option(
        "-d",
        "--conninfo",
        metavar="CONNINFO",
        help="The database: a conninfo string, a URI, or a name; of those in FILE by its name. "
        "By default what libpq and the PG* variables say.",
    ),
    click.option(
        "--config", "file", type=FILE, metavar="FILE", envvar="PGTASK_CONFIG", show_envvar=True,
        help="The configuration of pgtask-master, which names the tables.",
    ),
    click.option("--schema", metavar="NAME", help=by_name("database")["schema"].doc),
    click.option("--table", metavar="NAME", help=by_name("database")["table"].doc),
)  # fmt: skip

as_json = click.option("--json", "as_json", is_flag=True, help="Answer with one JSON document.")


class _Lenient(TextLoader):
    """A database in SQL_ASCII holds what its clients have sent, in whatever encoding."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode(errors="replace")


_TEXTS = (0, "text", "varchar", "bpchar", "name", '"char"')  # 0: all types that psycopg does not know


def program() -> str:
    """What others see of a session of the command that runs: its own name and the next word."""
    return " ".join(click.get_current_context().command_path.split()[:2])


def open_session(table: config.TableConfig, name: str = "pgtask") -> Connection[Any]:
    """To the table's database, for statements that name what they mean. Raises psycopg.Error."""
    session = connect(
        table.conninfo,
        autocommit=True,
        fallback_application_name=name,
        client_encoding="utf8",
        prepare_threshold=None,
        cursor_factory=RawCursor,
    )
    if session.info.parameter_status("server_encoding") == "SQL_ASCII":
        session.execute("SET client_encoding TO sql_ascii")  # any other is checked, and what does not hold refused
    for type in _TEXTS:
        session.adapters.register_loader(type, _Lenient)
    session.execute("SET search_path TO pg_catalog, pg_temp")
    return session


async def open_async(table: config.TableConfig, name: str) -> AsyncConnection[Any]:
    """As schema.py reads a table: it has asynchronous sessions. Raises psycopg.Error."""
    return await AsyncConnection.connect(
        table.conninfo,
        autocommit=True,
        cursor_factory=AsyncRawCursor,
        client_encoding="utf8",
        application_name=name,
        prepare_threshold=None,
    )


class Id(click.IntRange):
    """A task's id on the command line."""

    def __init__(self, least: int = 1) -> None:
        super().__init__(least, 2**63 - 1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is no id of a task, which is a number such as 7", param, ctx)


@contextmanager
def asking(table: config.TableConfig, needs: str = "SELECT", *, of: str | None = None) -> Iterator[Connection[Any]]:
    """A session with the table's database. What the server refuses is a UserError that says what mends it.

    `needs`: the rights that the command takes on the table, as GRANT has them; `of`: on the one with that suffix.
    """
    try:
        session = open_session(table, program())
    except Error as error:
        raise UserError(f"{table.label}: {one_line(error)}") from error
    # Nothing is left to commit, and an interrupt may have come in the middle of a statement.
    with closing(session):
        try:
            yield session
        except Error as error:
            mend = "" if session.closed else _mend(session, table, error, needs, of)
            raise UserError(f"{table.label}: {told(error)}{mend}") from error


def _mend(session: Connection[Any], table: config.TableConfig, error: Error, needs: str, of: str | None) -> str:
    """What the user may do about it, as the end of the message."""
    if isinstance(error, errors.QueryCanceled):
        return "; ask for less, with --id say, or give the role a longer statement_timeout"
    names = Names(schema=table.schema, table=table.table)
    if not isinstance(error, ProgrammingError):
        return ""
    beside = names.derived(of) if of else table.table
    asked = [table.schema, table.table, beside, needs.split(", ")]
    asked += [[column.name for column in COLUMNS], [names.derived(suffix) for suffix in CALLED]]
    there, whole, lacking = session.execute(names.store().text("standing").encode(), asked).fetchall()[0]
    named = shlex.join(["--schema", table.schema, "--table", table.table])
    if not there:
        return (
            f"; there is no task table {table.schema}.{table.table}: name another one with --schema and --table,"
            f" or make it by starting pgtask-master, or with the script that this prints: pgtask sql {named}"
        )
    if isinstance(error, errors.InsufficientPrivilege) and lacking:
        return f"; who owns it can mend that: {'; '.join(lacking)}"
    if not whole:
        script = f"pgtask sql --upgrade -d {shlex.quote(table.open_conninfo)} {named}"
        return f"; a start of pgtask-master brings the table up to date, or the script that this prints: {script}"
    return ""


def told(error: Error) -> str:
    """What the server says, with its hint; not where in a function of ours it says so."""
    said = error.diag
    if said.message_primary is None:
        return one_line(error)
    parts = (said.message_primary, said.message_detail, said.message_hint)
    return " ".join(". ".join(part.rstrip(".") for part in parts if part).split())


def settled(settings: Mapping[str, str]) -> sql.Composed:
    """The statement that makes these settings hold for the rest of a transaction: no more is ours behind a pooler."""
    parts = [sql.SQL("pg_catalog.set_config({}, {}, true)").format(name, value) for name, value in settings.items()]
    return sql.SQL("SELECT {}").format(sql.SQL(", ").join(parts))


def one_line(error: BaseException) -> str:
    """An error's text for a message."""
    return " ".join(str(error).split())
