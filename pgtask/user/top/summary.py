"""The figures above the lists: of one table, or the sums of several."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pgtask.user.top.look import COUNTED, Figures, Sight
from pgtask.user.top.views import led
from pgtask.user.top.words import age, clean, number, rate

Part = tuple[str, str, str]
"""A word before the figure, the figure, and its mark: bad, doubt, quiet or none."""

LATE = 60.0
"""Seconds that a due task may wait before that is marked."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    leader: list[Part]
    load: list[Part]
    ends: list[Part]
    troubles: list[str]
    done: float | None  # a second


def summary(sights: Sequence[Sight], names: Sequence[str]) -> Summary:
    """Of these tables. A table that is down counts with its last figures."""
    now = time.monotonic()
    known = [sight.figures for sight in sights if sight.figures is not None]
    troubles = [_trouble(sight, name, now, several=len(sights) > 1) for sight, name in zip(sights, names, strict=True)]
    done = _sum(known, lambda one: one.done_per_second)
    return Summary(
        leader=_leader(sights) if len(sights) == 1 else _leaders(sights, now),
        load=_load(known),
        ends=_ends(known, done),
        troubles=[trouble for trouble in troubles if trouble],
        done=done,
    )


def _trouble(sight: Sight, name: str, now: float, *, several: bool) -> str:
    what = f"{clean(name)}: " if several else ""
    trouble, old = sight.trouble(now), sight.age(now)
    if trouble:
        figures = "" if old is None else f", figures {age(old)} old"
        return f"{what}down{figures}: {clean(trouble)}"
    if sight.figures and sight.figures.lacks:
        return f"{what}no right to read {', '.join(map(clean, sight.figures.lacks))}"
    return ""


def _leader(sights: Sequence[Sight]) -> list[Part]:
    figures = sights[0].figures
    if figures is None:
        return [("", "connecting" if sights[0].error is None else "no figures yet", "quiet")]
    one = figures.leader
    if one is None:
        return [("", "no master serves this table", "bad")]
    rest = [("workers", number(figures.workers), ""), ("standby", number(figures.standing_by), "")]
    if one.host is None:
        return [("", "a master leads", ""), *rest]
    who = f"{clean(one.host)} pid {one.pid}"
    if not one.leads:
        return [("", "no master serves this table", "bad"), ("the last was", who, ""), ("term", str(one.term), "")]
    return [("leader", who, ""), ("for", age(one.serving), ""), *rest, ("term", str(one.term), "")]


def _leaders(sights: Sequence[Sight], now: float) -> list[Part]:
    words = [led(sight) for sight in sights]
    down = sum(sight.trouble(now) is not None for sight in sights)
    alone = words.count("no master")
    leading = len(sights) - down - alone - words.count("connecting")
    leaders = [sight.figures.leader for sight in sights if sight.figures and sight.figures.leader]
    hosts = sorted({clean(one.host) for one in leaders if one.leads and one.host})
    parts = [("tables led", f"{leading} of {len(sights)}", "")]
    if hosts:
        parts.append(("by", " ".join(hosts), ""))
    if alone:
        parts.append(("without a master", str(alone), "bad"))
    if down:
        parts.append(("down", str(down), "bad"))
    return parts


def _load(known: Sequence[Figures]) -> list[Part]:
    oldest = max((one.oldest for one in known if one.oldest is not None), default=None)
    late = oldest is not None and oldest > LATE
    return [
        ("running", _count(known, lambda one: one.slots), ""),
        ("backlog", _count(known, lambda one: one.due), ""),
        ("oldest", age(oldest), "doubt" if late else ""),
        ("planned", _count(known, lambda one: one.planned), ""),
        ("waiting", _count(known, lambda one: one.waiting), ""),
    ]


def _ends(known: Sequence[Figures], done: float | None) -> list[Part]:
    failing = _sum(known, lambda one: one.failed_per_second)
    failed = sum(one.failed for one in known)
    return [
        ("new/s", rate(_sum(known, lambda one: one.inserted_per_second)), ""),
        ("done/s", rate(done), "good" if done else ""),
        ("failed/s", rate(failing), "bad" if failing else ""),
        ("failed 1h", number(failed) if known else number(None), "bad" if failed else ""),
    ]


def _sum(known: Iterable[Figures], of: Callable[[Figures], float | None]) -> float | None:
    values = [value for value in map(of, known) if value is not None]
    return sum(values) if values else None


def _count(known: Sequence[Figures], of: Callable[[Figures], int]) -> str:
    """The sum, which is a lower bound where one of them is."""
    values = [of(one) for one in known]
    total = sum(min(value, COUNTED) for value in values)
    return f"{total:,}{'+' * any(value > COUNTED for value in values)}" if values else number(None)
