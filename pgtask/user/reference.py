"""docs/reference/commands.md, made from the commands themselves, so that it says what --help says."""

import inspect
from collections.abc import Iterable, Mapping

import click

HEAD = """# Commands

As `--help` shows them. `pgtask-master` serves tables; `pgtask` looks after them, as a session like any other with the
rights of the role that connects. [The command line](../how-to/command-line.md) shows its usual uses.
"""

STATUSES = """## Exit statuses

Those of `pgtask`; each command says where its own differ. [Those of pgtask-master](signals.md) are with its signals.

| status | meaning |
| --- | --- |
"""

COMMON = """## Options of every `pgtask` command

Given after the command's name.

"""


def markdown(master: click.Command, user: click.Group, statuses: Mapping[int, str]) -> str:
    """The page."""
    shared = _shared(user)
    rows = "".join(f"| {status} | {meaning} |\n" for status, meaning in statuses.items())
    parts = [HEAD, STATUSES + rows, COMMON + _table(shared.values())]
    parts += [_section(f"pgtask {name}", command, shared) for name, command in sorted(user.commands.items())]
    return "\n".join([*parts, _section("pgtask-master", master, {})])


def _shared(user: click.Group) -> dict[str, click.Option]:
    """Options that most commands have."""
    found: dict[str, list[click.Option]] = {}
    for command in user.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                found.setdefault(" ".join(parameter.opts), []).append(parameter)
    return {name: options[0] for name, options in found.items() if len(options) > len(user.commands) / 2}


def _section(title: str, command: click.Command, shared: Mapping[str, click.Option]) -> str:
    context = click.Context(command, info_name=title)
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    options = [one for one in command.params if isinstance(one, click.Option) and " ".join(one.opts) not in shared]
    text = inspect.cleandoc(command.help or "")
    return f"## {title}\n\n```text\n{usage}\n```\n\n{text}\n" + (f"\n{_table(options)}" if options else "")


def _table(options: Iterable[click.Option]) -> str:
    context = click.Context(click.Command("pgtask"))
    records = [option.get_help_record(context) for option in options]
    lines = [f"| `{_cell(record[0])}` | {_cell(record[1])} |" for record in records if record]
    return "\n".join(["| option | meaning |", "| --- | --- |", *lines]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
