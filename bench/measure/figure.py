"""Figures: what was measured of ours and of its reference, run by run, and what that makes.

Both are measured in turns (reference, ours, reference, ours ...), so that whatever else the machine does meets
both. The ratio is the median of the ratios of the runs, not a ratio of the medians.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from typing import Any, Literal

from measure.ground import Site


@dataclass(kw_only=True)
class Figure:
    """One line of the report, a value of each for every run. `mark` is the ratio to reach, `limit` the value."""

    name: str
    unit: str
    against: str = ""  # what the reference is
    better: Literal["more", "less"] = "more"
    mark: float | None = None
    limit: float | None = None
    headline: bool = False  # whether docs/explanation/speed.md shows it
    ours: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    def add(self, ours: float, reference: float | None = None) -> None:
        self.ours.append(ours)
        if reference is not None:
            self.reference.append(reference)

    @property
    def ratio(self) -> float | None:
        pairs = zip(self.ours, self.reference, strict=False)
        ratios = [ours / reference for ours, reference in pairs if reference]
        return median(ratios) if ratios else None

    @property
    def reached(self) -> bool | None:
        value, wanted = (median(self.ours), self.limit) if self.limit is not None else (self.ratio, self.mark)
        if value is None or wanted is None:
            return None
        return value >= wanted if self.better == "more" else value <= wanted

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": median(self.ours) if self.ours else None,
            "reference": median(self.reference) if self.reference else None,
            "against": self.against,
            "ratio": self.ratio,
            "better": self.better,
            "mark": self.mark,
            "limit": self.limit,
            "headline": self.headline,
            "reached": self.reached,
            "runs": {"ours": self.ours, "reference": self.reference},
        }


@dataclass(kw_only=True)
class Outcome:
    """What a subject found. `notes` say what was left out and how to read it; `curves` are what is plotted."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)

    def figure(self, name: str, unit: str, **more: Any) -> Figure:
        made = Figure(name=name, unit=unit, **more)
        self.figures.append(made)
        return made

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def forget_marks(self) -> None:
        """Nothing is reached or missed by a run that only tries the program out."""
        for figure in self.figures:
            figure.mark = figure.limit = None

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": [figure.as_json() for figure in self.figures if figure.ours],
            "notes": self.notes,
            "curves": self.curves,
        }


@dataclass(frozen=True, kw_only=True)
class Course:
    """How to measure: where, how often, whether only to try the program out, and whom to tell what goes on."""

    site: Site
    runs: int
    quick: bool
    say: Callable[[str], None]

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def rounds(self) -> Iterable[int]:
        for number in range(self.runs):
            self.say(f"run {number + 1} of {self.runs}")
            yield number


Subject = Callable[[Course], Outcome]
SUBJECTS: dict[str, Subject] = {}


def subject(measure: Subject) -> Subject:
    """Its name and explanation are the function's."""
    SUBJECTS[measure.__name__] = measure
    return measure


def explained(names: Iterable[str]) -> Mapping[str, str]:
    return {name: " ".join((SUBJECTS[name].__doc__ or "").split()) for name in names if name in SUBJECTS}


def quantile(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed."""
    return sorted(values)[max(0, ceil(part * len(values)) - 1)]
