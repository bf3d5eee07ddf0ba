"""What the command lines have in common: how they end, which tables they mean, and how they show what they found.

What the user got wrong is one line on standard error and exit status 2; a bug keeps its traceback. With `--json` a
command's whole answer is one JSON document on standard output.

What comes from the database is shown as the server writes it, and what would move a terminal's cursor never gets there.
Statements run with pg_catalog as the search_path, so that nobody's operators take the place of those that are meant.
"""

import datetime
import decimal
import errno
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
from click.core import ParameterSource
from psycopg import (
    AsyncConnection,
    AsyncRawCursor,
    Connection,
    Cursor,
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
from rich.cells import cell_len, set_cell_size

from pgtask import config
from pgtask.errors import INTERRUPTED, NO, OK, USER, UserError
from pgtask.objects import CALLED, COLUMNS, Names
from pgtask.settings import by_name

HELP = {"help_option_names": ["-h", "--help"]}
FILE = click.Path(path_type=Path)


class Command(click.Command):
    """A command whose errors are one line, and whose result is the exit status."""

    def main(self, *arguments: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        _exit_with(lambda: super(Command, self).main(*arguments, **extra), extra.get("prog_name"))


class Group(click.Group):
    """A group of such commands."""

    def main(self, *arguments: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        _exit_with(lambda: super(Group, self).main(*arguments, **extra), extra.get("prog_name"))


def _exit_with(run: Callable[[], object], program: str | None) -> NoReturn:
    program = program or Path(sys.argv[0]).name
    try:
        _check_encoding()
        status = run()
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USER)
    except (click.ClickException, UserError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"{program}: {printable(' '.join(text.split()))}", err=True)
        sys.exit(USER)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        sys.stdout = None  # what could not be written cannot be flushed either
        if error.errno != errno.EPIPE:  # who reads no further wants to hear no more
            click.echo(f"{program}: cannot write: {error.strerror}", err=True)
        sys.exit(NO)
    sys.exit(status if isinstance(status, int) else OK)


def _check_encoding() -> None:
    """What a terminal cannot write is shown as its number; what nobody can send to the server is refused."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for number, argument in enumerate(sys.argv[1:], 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"argument {number} is not {sys.getfilesystemencoding().upper()}") from None


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
    name = " ".join(click.get_current_context().command_path.split()[:2])
    try:
        session = open_session(table, name)
    except Error as error:
        raise UserError(f"{table.label}: {one_line(error)}") from error
    with session:
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


def rows(cursor: Cursor[Any]) -> list[dict[str, object]]:
    """What a statement returned, by the columns' names, as the server writes it; whole numbers are numbers."""
    result = cursor.pgresult
    assert result is not None
    names = [(result.fname(column) or b"").decode(errors="replace") for column in range(result.nfields)]
    numbers = [result.ftype(column) in NUMBERS for column in range(result.nfields)]

    def value(row: int, column: int) -> object:
        data = result.get_value(row, column)
        return None if data is None else int(data) if numbers[column] else data.decode(errors="replace")

    return [{name: value(row, column) for column, name in enumerate(names)} for row in range(result.ntuples)]


NUMBERS = (20, 21, 23)
"""The type oids of int8, int2 and int4."""


def show(found: Sequence[Mapping[str, object]], *, as_json: bool, columns: Sequence[str] | None = None) -> None:
    """Print rows as a table, or whole as JSON. `columns`: those of the table, in their order; by default all."""
    if as_json:
        print_json(found)
        return
    names = columns or list(found[0] if found else ())
    cells = [[_cell(name) for name in names], *([_cell(row[name]) for name in names] for row in found)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():  # what goes into a pipe is not cut
        widths = _fitting(cells, widths, shutil.get_terminal_size().columns - len(GAP) * (len(widths) - 1))
    numbers = [all(isinstance(row[name], int | float | None) for row in found) for name in names]
    for number, row in enumerate(cells):
        click.echo(GAP.join(map(_sized, row, widths, numbers)).rstrip())
        if number == 0:
            click.echo(GAP.join("-" * width for width in widths))


GAP = "  "

LEAST, FEWEST = 16, 8
"""Cells that the last column keeps, and any text: numbers and times are cut only where nothing else helps."""

FIRM = re.compile(r"[-+0-9:., %]*")


def _fitting(cells: Sequence[Sequence[str]], widths: Sequence[int], room: int) -> list[int]:
    """Less wide columns, until they fit."""
    widths, last = list(widths), len(widths) - 1
    soft = [n for n in range(last) if not all(FIRM.fullmatch(row[n]) for row in cells[1:])]
    while sum(widths) > room and max(widths) > 1:
        widest = max(soft, key=widths.__getitem__, default=last)
        if widths[last] > LEAST or widths[last] > FEWEST >= widths[widest]:
            widest = last
        elif widths[widest] <= FEWEST:
            widest = widths.index(max(widths))
        widths[widest] -= 1
    return widths


def _sized(cell: str, width: int, right: bool) -> str:
    """As many cells of the terminal."""
    length = cell_len(cell)
    if length > width:
        return set_cell_size(cell, width - 1) + "…"
    return " " * (width - length) + cell if right else cell + " " * (width - length)


def show_whole(title: str, row: Mapping[str, object]) -> None:
    """Print a row as psql's expanded display has it: a line for each column, more where the value has more."""
    row = {printable(name): value for name, value in row.items()}
    width = max([cell_len(name) for name in row] or [0])
    click.echo(f"-[ {title} ]".ljust(width + 40, "-"))
    for name, value in row.items():
        first, *more = printable(str(value), but=LAYOUT).expandtabs().split("\n")
        click.echo(f"{name}{' ' * (width - cell_len(name))} | {first}")
        for line in more:
            click.echo(f"{' ' * width} + {line}")


def note(text: str) -> None:
    """A remark for who sits before the terminal."""
    if sys.stdout.isatty():
        click.echo(text, err=True)


def echo_text(text: str, *, err: bool = False) -> None:
    """Print a text as it is, but a terminal gets nothing that is not to be seen there."""
    stream = sys.stderr if err else sys.stdout
    stream.write((printable(text, but=LAYOUT) if stream.isatty() else text) + "\n")


LAYOUT = "\n\t"
"""Of texts that have several lines."""


def printable(text: str, *, but: str = "") -> str:
    """The text without what would move a terminal's cursor, colour it, or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)


def print_json(value: object) -> None:
    """One JSON document: times as ISO 8601 with their zone, intervals in seconds."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=_json))


def _json(value: object) -> object:
    match value:
        case datetime.datetime() | datetime.date():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal():
            return float(value)
        case Path():
            return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _cell(value: object) -> str:
    """One line, without what would move the terminal's cursor."""
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
