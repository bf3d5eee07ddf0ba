"""The table, one line for each scenario as it ends, and the same as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from storm.account import Account
from storm.kinds import Promise
from storm.scenarios import Strike

SHOWN = 20
"""As many violations of a scenario are printed; the JSON file has all."""

REASON = 90
"""Characters of a failure's reason."""

COLUMNS = {
    "scenario": 14,
    "faults": 7,
    "tasks": 8,
    "done": 8,
    "failed": 7,
    "wrongly": 8,
    "lost": 6,
    "twice": 6,
    "(not atomic)": 13,
    "(remote)": 9,
    "unknown": 12,
    "recovery": 12,
    "longest": 10,
}

LEGEND = """\
failed: as they were meant to; wrongly: in any other way. twice: atomic tasks that ran twice; and others, for which
only at least once is promised. unknown: commits that got no answer, and how many of them were in.
recovery: from a fault to the first finish of a run that began after it, median and longest."""


def head() -> str:
    return click.style(_line({name: name for name in COLUMNS}), bold=True)


def line(made: Account) -> str:
    """One scenario's numbers, and its reasons below."""
    values = {
        "scenario": made.scenario,
        "faults": made.faults,
        "tasks": made.tasks,
        "done": made.done,
        "failed": made.meant.total(),
        "wrongly": made.unmeant.total(),
        "lost": made.lost,
        "twice": made.twice[Promise.ATOMIC.value],
        "(not atomic)": made.twice[Promise.LOOSE.value],
        "(remote)": made.twice[Promise.REMOTE.value],
        "unknown": f"{made.unknown} ({made.unknown_in} in)",
        "recovery": _seconds(made.median),
        "longest": _seconds(made.longest),
    }
    lines = [_line(values)]
    for how, reasons in (("as meant", made.meant), ("wrongly", made.unmeant)):
        lines += [click.style(f"  failed {how}: {n} x {reason[:REASON]}", dim=True) for reason, n in reasons.items()]
    lines += [click.style(f"  wrong: {what}", fg="red") for what in made.wrong[:SHOWN]]
    if len(made.wrong) > SHOWN:
        lines.append(click.style(f"  wrong: and {len(made.wrong) - SHOWN} more", fg="red"))
    return "\n".join(lines)


def as_json(made: Account, strikes: Sequence[Strike]) -> dict[str, Any]:
    return {
        "scenario": made.scenario,
        "faults": made.faults,
        "tasks": made.tasks,
        "done": made.done,
        "failed_as_meant": dict(made.meant),
        "failed_wrongly": dict(made.unmeant),
        "lost": made.lost,
        "twice": {promise.value: made.twice[promise.value] for promise in Promise},
        "unknown": made.unknown,
        "unknown_in": made.unknown_in,
        "recovery_median_s": made.median,
        "recovery_longest_s": made.longest,
        "wrong": made.wrong,
        "what": [f"{strike.at - strikes[0].at:.2f} s: {strike.what}" for strike in strikes],
    }


def verdict(accounts: Sequence[Account]) -> str:
    bad = [made.scenario for made in accounts if made.wrong]
    if bad:
        return click.style(f"wrong in {', '.join(bad)}", fg="red")
    tasks = sum(made.tasks for made in accounts)
    return click.style(f"all well: of {tasks} tasks none was lost, and no atomic one ran twice", fg="green")


def _line(values: Mapping[str, object]) -> str:
    cells = [f"{values[name]!s:{'<' if name == 'scenario' else '>'}{width}}" for name, width in COLUMNS.items()]
    return "".join(cells)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
