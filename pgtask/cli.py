"""The commands `pgtask-master` and `pgtask`.

Here the command line becomes a configuration, and nothing else happens: the options are made from `settings.py`, and
what is heavy is imported only by the command that needs it, so that `--help` answers at once. What the user got wrong
is one line on standard error and exit status 2; a bug keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from pgtask import __version__, config
from pgtask.errors import OK, USER, UserError
from pgtask.settings import LONGEST_NAME, Setting, by_name

INTERRUPTED = 130  # as a shell reports a process that SIGINT ended

_FILE = click.Path(path_type=Path)
_ROLE = "ROLE"


class _Command(click.Command):
    """A command whose errors are one line, and whose result is the exit status."""

    def main(self, *arguments: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        _exit_with(lambda: super(_Command, self).main(*arguments, **extra), extra.get("prog_name"))


class _Group(click.Group):
    """A group of such commands."""

    def main(self, *arguments: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        _exit_with(lambda: super(_Group, self).main(*arguments, **extra), extra.get("prog_name"))


def _exit_with(run: Callable[[], object], program: str | None) -> NoReturn:
    program = program or Path(sys.argv[0]).name
    try:
        status = run()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(USER)
    except (click.ClickException, UserError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"{program}: {' '.join(text.split())}", err=True)
        sys.exit(USER)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise
        sys.stdout = None  # what could not be written cannot be flushed either
        click.echo(f"{program}: cannot write: {error.strerror}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else OK)


def _with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each setting of the master and of a table, in their order."""
    for setting in reversed([*by_name("master").values(), *by_name("database").values()]):
        command = _option(setting)(command)
    return command


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if setting.kind == "bool":
        switch = f"{setting.option}/--no-{setting.option.removeprefix('--')}"
        return click.option(switch, setting.name, default=None, help=setting.doc)
    metavar = "|".join(setting.choices) or setting.kind.upper()
    return click.option(setting.option, setting.name, metavar=metavar, help=setting.doc)


@click.command("pgtask-master", cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("conninfo", nargs=-1)
@click.option("--config", "file", type=_FILE, metavar="FILE", help="Read this TOML file; HUP reads it again.")
@click.option("--check", is_flag=True, help="Connect, print what would be done and changed, and exit with 0 or 2.")
@click.option("--print-config", is_flag=True, help="Print every value with where it came from, and exit.")
@click.version_option(__version__, prog_name="pgtask-master", message="%(prog)s %(version)s")
@_with_settings
def master(conninfo: Sequence[str], file: Path | None, check: bool, print_config: bool, **overrides: object) -> int:
    """Run the tasks of one or more tables, in the foreground.

    Each CONNINFO is a conninfo string or a URI of a database with a task table, and comes on top of what FILE names.
    Without either, libpq's own defaults and the PG* variables say which database it is.

    Every option below may also be an environment variable: --log-level is PGTASK_LOG_LEVEL. Options go before
    variables, and both before FILE; those of a table hold for every table.
    """

    def load() -> config.Config:
        return config.load(file, conninfo, overrides, os.environ)

    loaded = load()
    for doubt in loaded.doubts:
        click.echo(f"pgtask-master: {doubt}", err=True)
    if print_config:
        click.echo("\n".join(config.print_lines(loaded)))
        return OK
    from pgtask import master as program

    return program.check(loaded) if check else program.main(loaded, load)


@click.group("pgtask", cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgtask", message="%(prog)s %(version)s")
def user() -> None:
    """Look after task tables."""


@user.command("sql")
@click.option("--schema", metavar="NAME", help=by_name("database")["schema"].doc)
@click.option("--table", metavar="NAME", help=by_name("database")["table"].doc)
@click.option("--config", "file", type=_FILE, metavar="FILE", help="Take names and defaults from this file.")
@click.option("--owner", metavar=_ROLE, help="The role that shall own the objects.")
@click.option("--grant", metavar=_ROLE, help="The role that pgtask-master runs as, if it is not the owner.")
def print_sql(schema: str | None, table: str | None, file: Path | None, owner: str | None, grant: str | None) -> int:
    """Print the script that makes a task table.

    A DBA runs it in place of pgtask-master, which then needs no right to create anything.
    """
    found = _named_table(file, {"schema": schema, "table": table})
    _check_role("--owner", owner)
    _check_role("--grant", grant)
    from pgtask.schema import script

    text = script(schema=found.schema, table=found.table, defaults=found.defaults, owner=owner, grant=grant)
    click.echo(text, nl=False)
    return OK


def _named_table(file: Path | None, names: Mapping[str, str | None]) -> config.TableConfig:
    """The table that the options name, with the defaults that the file has for it."""
    asked = config.load(None, [], names, os.environ).tables[0]
    if file is None:
        return asked
    loaded = config.load(file, [], {}, os.environ)
    origins = [loaded.origins[f"database[0].{name}"] for name in ("conninfo", "schema", "table")]
    if len(loaded.tables) == 1 and set(origins) == {config.BUILT_IN}:
        # The file names no table of its own: its defaults are still meant.
        loaded = config.load(file, [], names, os.environ)
    wanted = {name: getattr(asked, name) for name, given in names.items() if given is not None}
    fitting = [t for t in loaded.tables if all(getattr(t, name) == value for name, value in wanted.items())]
    scripts = {(t.schema, t.table, tuple(t.defaults.items())): t for t in fitting}
    if len(scripts) == 1:
        return next(iter(scripts.values()))
    among = ", ".join(t.label for t in (fitting or loaded.tables))
    if scripts:
        raise UserError(f"{file}: several tables fit, say which with --schema and --table: {among}")
    raise UserError(f"{file}: no table has these names; it has {among}")


def _check_role(option: str, name: str | None) -> None:
    if name is not None and not (0 < len(name.encode(errors="replace")) <= LONGEST_NAME and "\0" not in name):
        raise UserError(f"{option}: must be a name of 1 to {LONGEST_NAME} bytes")
