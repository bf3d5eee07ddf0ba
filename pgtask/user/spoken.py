"""What people read: spans of time, numbers, and sessions of the server in words."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from pgtask.coming import moment

UNITS = (("day", 86400), ("h", 3600), ("min", 60))


def span(length: float | timedelta) -> str:
    """A length of time (a number is in seconds), by its two greatest units: 3 days 4 h, 5 min 12 s, 0.25 s."""
    seconds = abs(length.total_seconds() if isinstance(length, timedelta) else float(length))
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole, parts = round(seconds), []
    for unit, size in (*UNITS, ("s", 1)):
        number, whole = divmod(whole, size)
        if number:
            parts.append(f"{number} {unit}{'s' if unit == 'day' and number > 1 else ''}")
        elif parts:
            break
    return " ".join(parts[:2])


def clock(moment: datetime) -> str:
    """A moment as this machine's clocks show it, to the second."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S%z}"


def size(number: float) -> str:
    """Bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.0f} TB"


def several(number: int, one: str, most: int | None = None) -> str:
    """A number of things; `most`: how many were counted at most."""
    more = most is not None and number >= most
    return f"{number:,}{' or more' if more else ''} {one}{'' if number == 1 else 's'}"


def session(row: Mapping[str, Any]) -> str:
    """A session that is in the way: pid, role, name, and what it does; `since` is of its transaction."""
    if row["gid"] is not None:
        return f'the prepared transaction "{row["gid"]}"'
    name = f' "{row["name"]}"' if row["name"] else ""
    doing = f", {row['state']}" if row["state"] else ""
    since = f", in a transaction since {clock(moment(row['since']))}" if row["since"] is not None else ""
    return f"session {row['pid']} of {row['role'] or 'another role'}{name}{doing}{since}"
