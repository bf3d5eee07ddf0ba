"""Chaos: kill everything that pgtask stands on, under load, and count what was lost or ran twice.

It starts a PostgreSQL server of its own, with fsync on, real masters, and clients that insert tasks at a steady rate.
For each scenario in turn it breaks something at random moments, waits until all is settled, and compares what the
clients were told with the rows and with a ledger that every run writes itself into.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from pgtask.embedded import Binaries, Server, ServerError, find
from pgtask.errors import UserError
from storm import report
from storm.account import Account
from storm.play import Plan, Play
from storm.scenarios import SCENARIOS
from storm.stand import Broken

SETTINGS = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
"""What is to be shown is durability: nothing here is for speed."""

SCENARIO_HELP = "\n\n".join(
    ["Scenarios, each until its share of the time is over:", *(f"{one.name}: {one.doc}" for one in SCENARIOS.values())]
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=SCENARIO_HELP)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=4,
    show_default=True,
    help="How long to break things, all scenarios together; what they need to settle comes on top.",
)
@click.option(
    "--seed",
    default="1",
    show_default=True,
    help="Decides what is broken and after which pause. How processes then meet differs from run to run.",
)
@click.option("--pg", type=int, metavar="VERSION", help="Major version of the server; by default the wheel's newest.")
@click.option(
    "--scenario",
    "names",
    multiple=True,
    type=click.Choice(list(SCENARIOS)),
    help="Only this one; may be repeated. By default all of them, one after another.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Tasks that the clients insert in a second.",
)
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to this file, too."
)
def main(minutes: float, seed: str, pg: int | None, names: Sequence[str], rate: float, file: Path | None) -> None:
    """Kill workers, masters, sessions and servers under load; count what was lost and what ran twice.

    The exit status is 0 if nothing was lost, and every atomic task that was committed is done, or failed as it was
    meant to, exactly once; else 1.
    """
    _leave_by_the_door()
    try:
        binaries = find(pg)
    except UserError as error:
        raise click.UsageError(str(error)) from None
    scenarios = [SCENARIOS[name] for name in dict.fromkeys(names) or SCENARIOS]
    plan = Plan(seconds=minutes * 60 / len(scenarios), seed=seed, rate=rate)
    click.echo(f"PostgreSQL {binaries}: {plan.seconds:.0f} s a scenario, {rate:g} tasks a second, seed {seed}\n")
    show = Show(plays=[Play(scenario=scenario, plan=plan) for scenario in scenarios])
    show.run(binaries)
    click.echo(f"\n{report.LEGEND}\n\n{show.verdict()}")
    if file is not None:
        asked = {"seed": seed, "server": binaries.version, "minutes": minutes, "rate": rate}
        file.write_text(json.dumps(asked | show.as_json(), indent=2) + "\n", "utf-8")
    sys.exit(show.status)


@dataclass(kw_only=True)
class Show:
    """The scenarios one after another; `trouble` is what ended the show before its end."""

    plays: Sequence[Play]
    status: int = 0
    trouble: str = ""

    @property
    def accounts(self) -> list[Account]:
        return [play.account for play in self.plays if play.account is not None]

    def run(self, binaries: Binaries) -> None:
        """Print the table line by line. Logs are kept only where something is wrong."""
        logs = Path(tempfile.mkdtemp(prefix="pgtask-chaos-"))
        click.echo(report.head())
        try:
            self._play(binaries, logs)
        except KeyboardInterrupt:
            self.status, self.trouble = 130, "interrupted, nothing is left running"
        except (Broken, ServerError) as error:
            self.status, self.trouble = 1, f"cannot go on: {error}"
        finally:
            if self.status != 1:
                shutil.rmtree(logs)
        if self.status == 1:
            click.echo(f"\nlogs are in {logs}")

    def _play(self, binaries: Binaries, logs: Path) -> None:
        console = Console(stderr=True)
        with Server.start(binaries, settings=SETTINGS, auth_host="scram-sha-256") as server:
            for play in self.plays:
                try:
                    with console.status(f"{play.scenario.name}: {play.scenario.doc}"):
                        account = play.run(server, logs)
                finally:
                    (logs / "server.log").write_text(server.log_text(), "utf-8")
                click.echo(report.line(account))
                if account.wrong:
                    self.status = 1

    def verdict(self) -> str:
        """The last line: what is wrong, or what was shown."""
        unfinished = next((f" ({play})" for play in self.plays if play.account is None and play.clients), "")
        return f"{self.trouble}{unfinished}" if self.trouble else report.verdict(self.accounts)

    def as_json(self) -> dict[str, object]:
        scenarios = [report.as_json(play.account, play.strikes) for play in self.plays if play.account is not None]
        return {"trouble": self.trouble, "scenarios": scenarios}


def _leave_by_the_door() -> None:
    """Signals raise, so that everything that was started ends; what comes while that happens changes nothing."""

    def leave(number: int, _: FrameType | None) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


if __name__ == "__main__":
    main()
