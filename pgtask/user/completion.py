"""`pgtask completion`: the script by which a shell completes commands, options and their values."""

import click
from click.shell_completion import get_completion_class

from pgtask.errors import OK
from pgtask.user.shown import print_json
from pgtask.user.where import as_json

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@as_json
@click.pass_context
def command(context: click.Context, shell: str, as_json: bool) -> int:
    """Print the script that completes `pgtask` in a shell.

    bash: eval "$(pgtask completion bash)" in ~/.bashrc; or write it to
    /usr/share/bash-completion/completions/pgtask. zsh: eval it in ~/.zshrc, after compinit. fish: write it to
    ~/.config/fish/completions/pgtask.fish. Nothing is connected to.
    """
    made = get_completion_class(shell)
    assert made is not None
    script = made(context.find_root().command, {}, "pgtask", "_PGTASK_COMPLETE").source()
    print_json({"shell": shell, "script": script}) if as_json else click.echo(script)
    return OK
