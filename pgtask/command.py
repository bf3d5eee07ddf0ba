"""What the command lines have in common: how they end.

What the user got wrong is one line on standard error and exit status 2; a bug keeps its traceback.
"""

import errno
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from pgtask.errors import INTERRUPTED, NO, OK, USER, UserError

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


LAYOUT = "\n\t"
"""Of texts that have several lines."""


def printable(text: str, *, but: str = "") -> str:
    """The text without what would move a terminal's cursor, colour it, or turn the direction of writing."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else ascii(c)[1:-1] for c in text)
