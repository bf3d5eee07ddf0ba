"""The command `pgtask-master`; `pgtask` is user/commands.py.

Here the command line becomes a configuration, and nothing else happens: the options are made from `settings.py`, and
what is heavy is imported only by the command that needs it, so that `--help` answers at once. What the user got wrong
is one line on standard error and exit status 2; a bug keeps its traceback.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pgtask import __version__, config
from pgtask.command import FILE, HELP, Command
from pgtask.errors import OK
from pgtask.settings import Setting, by_name


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


@click.command("pgtask-master", cls=Command, context_settings=HELP)
@click.argument("conninfo", nargs=-1)
@click.option("--config", "file", type=FILE, metavar="FILE", help="Read this TOML file; HUP reads it again.")
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
    from pgtask.master import master as program

    return program.check(loaded) if check else program.main(loaded, load)
