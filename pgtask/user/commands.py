"""The command `pgtask`: its subcommands. Apart from the master's, which needs none of what they import."""

import click

from pgtask import __version__
from pgtask.command import HELP, Group
from pgtask.user import agenda, completion, control, doctor, ends, import_cron, listing, purge, script, submit, why
from pgtask.user.top import main as top


@click.group("pgtask", cls=Group, context_settings=HELP)
@click.version_option(__version__, prog_name="pgtask", message="%(prog)s %(version)s")
def user() -> None:
    """Look after task tables."""


for module in (agenda, completion, doctor, import_cron, script, top, why):
    user.add_command(module.command)
for command in (
    *(submit.submit, listing.list_, listing.show_, ends.wait, control.cancel, control.retry),
    *(control.hold, control.release, purge.purge),
):
    user.add_command(command)
