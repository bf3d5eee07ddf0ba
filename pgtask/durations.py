"""Spans of time as people write them: intervals as PostgreSQL reads them, and durations in their largest unit."""

import re
from datetime import timedelta

_UNITS = {
    1e-6: "us usec usecs usecond useconds microsecond microseconds microsecon",
    1e-3: "ms msec msecs msecond mseconds millisecond milliseconds millisecon",
    1.0: "s sec secs second seconds",
    60.0: "m min mins minute minutes",
    3600.0: "h hr hrs hour hours",
    86400.0: "d day days",
    86400.0 * 7: "w week weeks",
    86400.0 * 30: "mon mons month months",
    86400.0 * 360: "y yr yrs year years",
    86400.0 * 3600: "dec decs decade decades",
    86400.0 * 36000: "c cent century centuries",
    86400.0 * 360000: "mil mils millennium millennia",
}
_SECONDS = {word: seconds for seconds, words in _UNITS.items() for word in words.split()}
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_FIELD = re.compile(
    rf"\s*(?:([+-]?)([0-9]+):([0-9]{{1,2}})(?::([0-9]{{1,2}}(?:\.[0-9]*)?))?|({_NUMBER})\s*([a-z]*))", re.I
)
_ISO = re.compile(rf"P(?:{_NUMBER}[YMWD])*(?:T(?:{_NUMBER}[HMS])+)?")
_MOST_SECONDS = 178e6 * 360 * 86400
"""What an interval of PostgreSQL holds, nearly."""


def interval_seconds(text: str) -> float | None:
    """How long an interval is, as the server compares them (a month is 30 days); None for nonsense."""
    if re.fullmatch(r"-?\s*P.*", text.strip()):
        seconds = _iso_seconds(text.strip())
    else:
        seconds = _verbose_seconds(text.strip().lower())
    return seconds if seconds is not None and abs(seconds) <= _MOST_SECONDS else None


def _iso_seconds(text: str) -> float | None:
    if not _ISO.fullmatch(text) or text == "P":
        return None
    date, _, time = text[1:].partition("T")
    units = {"Y": "year", "M": "month", "W": "week", "D": "day"}, {"H": "hour", "M": "minute", "S": "second"}
    return sum(
        float(number) * _SECONDS[words[unit]]
        for part, words in zip((date, time), units, strict=True)
        for number, unit in re.findall(rf"({_NUMBER})([A-Z])", part)
    )


def _verbose_seconds(text: str) -> float | None:
    body = text.removeprefix("@").strip()
    past = body.endswith("ago")
    body = body.removesuffix("ago").rstrip()
    total, position = 0.0, 0
    while position < len(body):
        field = _FIELD.match(body, position)
        if field is None:
            return None
        position = field.end()
        seconds = _field_seconds(field, rest=body[position:].strip())
        if seconds is None:
            return None
        total += seconds
    if not body:
        return None
    return -total if past else total


def _field_seconds(field: re.Match[str], rest: str) -> float | None:
    sign, hours, minutes, second, number, unit = field.groups()
    if hours is not None:
        total = int(hours) * 3600 + int(minutes) * 60 + float(second or 0)
        return -total if sign == "-" else float(total)
    if unit:
        return float(number) * _SECONDS[unit] if unit in _SECONDS else None
    # A bare number is seconds at the end, and days before a time of day.
    return float(number) * (86400 if ":" in rest else 1) if not rest or ":" in rest else None


def duration_text(duration: timedelta) -> str:
    """A duration in its largest whole unit."""
    units = {"day": 86400 * 10**6, "hour": 3600 * 10**6, "min": 60 * 10**6, "s": 10**6, "ms": 1000, "us": 1}
    total = duration // timedelta(microseconds=1)
    for unit, size in units.items():
        if total and total % size == 0:
            plural = "s" if unit in ("day", "hour") and total != size else ""
            return f"{total // size} {unit}{plural}"
    return "0 s"
