"""When a calendar comes round: cron expressions in a time zone.

The library cronsim reads the five or six fields and walks through them, on a clock without a zone; what that means in a
zone whose clocks are set forward and back is decided here, since it holds for seconds too, and for shifts of half an
hour. The rule is Debian cron's:

- Where neither minute nor hour begins with `*`, the times of day are meant. One that the clock leaps over comes at the
  moment of the leap, several such once; one that it shows twice comes the first time only.
- Elsewhere the clock is followed as it goes: what it does not show does not come, what it shows twice comes twice.

Everything is pure, and every datetime aware; those that come out are in UTC.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import islice, takewhile
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from pgtask.errors import UserError

WORDS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
FIELDS = ("second", "minute", "hour", "day-of-month", "month", "day-of-week")
LONGEST = 1000
"""Characters of an expression: all sixty seconds, minutes and the rest written out are fewer."""

SECOND = timedelta(seconds=1)
MOMENT = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
"""No zone's clock was ever set by more."""


class Wrong(UserError):
    """A calendar or a zone that cannot be used; the text names the part that is wrong."""


def first(cron: str, zone: str, at: datetime) -> datetime:
    """The first match at `at` or after. Raises Wrong if the expression or the zone is, or if there never is one."""
    calendar = _calendar(cron, zone)
    match = next(calendar.since(at), None)
    if match is None:
        raise Wrong(f'cron "{cron}" never matches after {at:%Y-%m-%d}')
    return match


def following(cron: str, zone: str, after: datetime) -> datetime:
    """The first match after `after`. Raises Wrong as `first` does."""
    return first(cron, zone, after + MOMENT)


def between(cron: str, zone: str, after: datetime, before: datetime, limit: int) -> list[datetime]:
    """The matches after `after` and before `before`, in order: the last `limit` (from 1) of them. Raises Wrong."""
    calendar = _calendar(cron, zone)
    found = list(islice(calendar.span(after, before), limit + 1))
    if len(found) <= limit:
        return found
    # Too many to walk through: the later half, and what it lacks from the earlier one.
    middle = after + (before - after) / 2
    later = between(cron, zone, middle - MOMENT, before, limit)
    if len(later) == limit:
        return later
    return between(cron, zone, after, middle, limit - len(later)) + later


def count(cron: str, zone: str, after: datetime, before: datetime, limit: int) -> int:
    """How many matches there are after `after` and before `before`; `limit` if there are more. Raises Wrong."""
    return sum(1 for _ in islice(_calendar(cron, zone).span(after, before), limit))


def clock(name: str) -> tzinfo:
    """The zone of that name, in whatever letters, as PostgreSQL reads it. Raises Wrong."""
    for known in (name, _zones().get(name.lower())):
        try:
            if known:
                return ZoneInfo(known)
        except (KeyError, ValueError, OSError):  # not there, no name at all, or a directory of zones
            continue
    raise Wrong(f'zone "{name}" is not known; use a name such as Europe/Berlin')


@dataclass(frozen=True, kw_only=True)
class _Calendar:
    """An expression of five or six fields, known to be one, in a zone."""

    fields: str
    zone: tzinfo

    def span(self, after: datetime, before: datetime) -> Iterator[datetime]:
        return takewhile(lambda match: match < before, self.since(after + MOMENT))

    def since(self, at: datetime) -> Iterator[datetime]:
        """The matches at `at` and after, until there is none for fifty years, or no such year."""
        minute, hour = self.fields.split()[-5:-3]
        matches = self._followed if "*" in (minute[0], hour[0]) else self._meant
        try:
            yield from matches(at.astimezone(UTC))
        except (OverflowError, ValueError):  # beyond the year 9999
            return

    def _meant(self, at: datetime) -> Iterator[datetime]:
        """Times of day, each once."""
        last = at - MOMENT
        for local in self._shown(self._clock(last) + MOMENT):
            moment = self._moment(local)
            if moment > last:
                yield moment
                last = moment

    def _moment(self, local: datetime) -> datetime:
        """When the clock shows that for the first time, or leaps over it."""
        moment = local.replace(tzinfo=self.zone).astimezone(UTC)
        if self._clock(moment) == local:
            return moment
        # Read as before the leap, it lies after the leap, by less than a leap.
        change = self._change(moment - DAY, moment)
        assert change is not None
        return change

    def _followed(self, at: datetime) -> Iterator[datetime]:
        """Whatever the clock shows, as often as it does."""
        while True:
            offset = self._offset(at)
            local = next(self._shown(self._clock(at)), None)
            if local is None:
                return
            moment = (local - offset).replace(tzinfo=UTC)
            near = min(moment, at + DAY)
            change = self._change(at, near)
            if change is not None:
                at = change
            elif near == moment:
                yield moment
                at = moment + MOMENT
            else:
                # Between the clock of now and the match there is none, whatever the clock is set by meanwhile.
                at = max(near, moment - 2 * DAY)

    def _shown(self, local: datetime) -> Iterator[datetime]:
        """The times that match, from `local` on, on a clock that is never set."""
        return CronSim(self.fields, (local - MOMENT).replace(microsecond=0))

    def _change(self, after: datetime, until: datetime) -> datetime | None:
        """When the clock is set for the first time after `after`, up to `until`: at most a day and some later."""
        offset, low = self._offset(after), after
        while low < until:
            high = min(low + HOUR, until)
            if self._offset(high) != offset:
                return self._narrowed(low, high)
            low = high
        return None

    def _narrowed(self, low: datetime, high: datetime) -> datetime:
        """Clocks are set at whole seconds."""
        offset = self._offset(low)
        low = low.replace(microsecond=0)
        while high - low > SECOND:
            middle = (low + (high - low) / 2).replace(microsecond=0)
            if middle == low:
                middle += SECOND
            if self._offset(middle) == offset:
                low = middle
            else:
                high = middle
        return high.replace(microsecond=0)

    def _clock(self, moment: datetime) -> datetime:
        return (moment + self._offset(moment)).replace(tzinfo=None)

    def _offset(self, moment: datetime) -> timedelta:
        offset = moment.astimezone(self.zone).utcoffset()
        assert offset is not None
        return offset


@lru_cache(maxsize=256)
def _calendar(cron: str, zone: str) -> _Calendar:
    fields = _fields(cron)
    _check(cron, fields)
    return _Calendar(fields=fields, zone=clock(zone))


def _fields(cron: str) -> str:
    """The expression in fields, one blank between them."""
    if len(cron) > LONGEST:
        raise Wrong(f'cron "{cron[:40]}..." has {len(cron)} characters, and may have {LONGEST}')
    text = " ".join(cron.split())
    if text.startswith("@"):
        if text.lower() not in WORDS:
            raise Wrong(f'cron "{text}" is none of {", ".join(WORDS)}')
        return WORDS[text.lower()]
    number = len(text.split())
    if number not in (5, 6):
        said = f"{number} field{'' if number == 1 else 's'}"
        raise Wrong(f'cron "{text}" has {said}, and must have five or six: [second] {" ".join(FIELDS[1:])}')
    return text


def _check(cron: str, fields: str) -> None:
    """Each field alone, so that the one that is wrong can be named."""
    parts = fields.split()
    for name, part in zip(FIELDS[-len(parts) :], parts, strict=True):
        alone = ["*"] * 6
        alone[FIELDS.index(name)] = part
        try:
            CronSim(" ".join(alone), datetime(2000, 1, 1))
        except CronSimError:
            raise Wrong(f'cron "{cron}": bad {name} "{part}"') from None
    try:
        CronSim(fields, datetime(2000, 1, 1))
    except CronSimError:  # which months have days like that, it has seen
        raise Wrong(f'cron "{cron}" never matches: no such month has day {parts[-3]}') from None


@lru_cache(maxsize=1)
def _zones() -> dict[str, str]:
    return {name.lower(): name for name in available_timezones()}
