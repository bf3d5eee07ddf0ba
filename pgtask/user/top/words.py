"""Figures as short words: what `pgtask top` shows has the width of a terminal, and nothing in it moves the cursor."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size

from pgtask.log import redact
from pgtask.user.top.look import COUNTED

NONE = "-"
BARS = "▁▂▃▄▅▆▇█"


def age(seconds: float | None) -> str:
    """A length of time."""
    if seconds is None:
        return NONE
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
    days = whole // 86400
    return f"{days}d {whole // 3600 % 24:02}h" if days < 100 else f"{days:,}d"


def number(count: int | None, more: bool = False) -> str:
    """A count; `more`: it is known to be at least this."""
    if count is None:
        return NONE
    return f"{min(count, COUNTED):,}+" if count > COUNTED else f"{count:,}{'+' * more}"


def rate(per_second: float | None) -> str:
    if per_second is None:
        return NONE
    return f"{per_second:.1f}" if per_second < 99.95 else f"{per_second:,.0f}"


def clean(text: str | None) -> str:
    """One line without passwords and control characters, which could be anybody's."""
    words = " ".join(redact(text or "").split())
    return words if words.isprintable() else "".join(c if c.isprintable() else "·" for c in words)


def fit(text: str, width: int, right: bool = False) -> str:
    """So many cells of a terminal, in which some characters take two."""
    length = cell_len(text)
    if length > width:
        return set_cell_size(text, max(0, width - 1)) + "…" if width else ""
    return " " * (width - length) + text if right else text + " " * (width - length)


def spark(values: Sequence[float], width: int) -> str:
    """The last values as bars."""
    shown = values[-width:] if width > 0 else ()
    top = max(shown, default=0.0)
    return "".join(BARS[round((len(BARS) - 1) * value / top)] if top else BARS[0] for value in shown)
