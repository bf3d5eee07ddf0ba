"""The figures as lines of a table: bench/RESULTS.md has them all, docs/ and README.md some. Needs only Python."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results.json"
ORDER = ("throughput", "pickup", "plans", "idle", "flat", "history", "inserts", "triggers", "many", "held", "peers")
SHORT = (
    "one group, max 0",
    "one group, max 0, batch 50",
    "a worker lingers: start, p50",
    "no worker, warm 1: start, p50",
    "one group: late, p50",
    "master: CPU",
    "statements a minute (server log)",
    "8 clients: time of a row",
)
"""The headlines that README.md shows."""

HEADS = ("what", "ours", "reference", "ratio", "mark", "against")


def merged(file: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has of other subjects stays: a subject can be measured again by itself."""
    old = json.loads(file.read_text("utf-8")) if file.exists() else {}
    subjects = {**old.get("subjects", {}), **told["subjects"]}
    return {**told, "subjects": {name: subjects[name] for name in ORDER if name in subjects}}


def lines(subject: Mapping[str, Any], headlines: bool = False) -> Iterator[tuple[str, ...]]:
    """The table of a subject, a line for each figure."""
    for figure in subject["figures"]:
        if headlines and not figure["headline"]:
            continue
        yield (
            figure["name"],
            value(figure, "ours"),
            value(figure, "reference"),
            "" if figure["ratio"] is None else f"{figure['ratio']:.2f}",
            mark(figure),
            figure["against"],
        )


def value(figure: Mapping[str, Any], side: str) -> str:
    return "" if figure[side] is None else f"{number(figure[side])} {figure['unit']}".strip()


def mark(figure: Mapping[str, Any]) -> str:
    if figure["limit"] is not None:
        wanted = f"{figure['limit']:g} {figure['unit']}".strip()
    elif figure["mark"] is not None:
        wanted = f"{figure['mark']:.2g}"
    else:
        return ""
    sign = "≥" if figure["better"] == "more" else "≤"
    return f"{sign} {wanted}" + {True: ", reached", False: ", missed", None: ""}[figure["reached"]]


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def headlines(word: str = "", file: Path = RESULTS) -> str:
    """The table of a page: the headlines, or only those in SHORT; nothing where nothing was measured yet."""
    told = _read(file)
    rows = []
    for name, subject in told["subjects"].items():
        chosen = [line for line in lines(subject, headlines=True) if word != "short" or line[0] in SHORT]
        rows += [(f"**{name}**" if number == 0 else "", *line) for number, line in enumerate(chosen)]
    return "\n".join([_measured(told), "", *_table(("subject", *HEADS), rows)]) if rows else ""


def everything(file: Path = RESULTS) -> str:
    """bench/RESULTS.md."""
    told = _read(file)
    parts = ["# What `bin/bench` measured", _measured(told)]
    for name, subject in told["subjects"].items():
        parts += [f"## {name}", subject["about"], "\n".join(_table(HEADS, list(lines(subject))))]
        parts += ["\n".join(f"- {note}" for note in subject["notes"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _read(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"subjects": {}}
    return json.loads(file.read_text("utf-8")) if file.exists() else empty


def _measured(told: Mapping[str, Any]) -> str:
    if not told["subjects"]:
        return "Nothing yet: run `bin/bench --publish`."
    runs = " or ".join(map(str, sorted({subject["runs"] for subject in told["subjects"].values()})))
    counted = "one run each" if runs == "1" else f"medians of {runs} runs"
    return f"PostgreSQL {told['server']}, {told['cores']} cores, Python {told['python']}; {counted}."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
