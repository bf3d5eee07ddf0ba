"""Calendars: what an expression means, on days when clocks are set too, and what is said of those that mean nothing."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgtask import cron
from pgtask.cron import Wrong

MINUTE = timedelta(minutes=1)
SWITCHES = {
    "Europe/Berlin": ("2026-03-29T01:00Z", "2026-10-25T01:00Z"),
    "America/New_York": ("2026-03-08T07:00Z", "2026-11-01T06:00Z"),
    "Australia/Lord_Howe": ("2026-10-03T15:30Z", "2026-04-04T15:00Z"),
    "Africa/Casablanca": ("2026-03-22T02:00Z", "2026-02-15T02:00Z"),
    "Pacific/Apia": ("2011-12-30T10:00Z",),
}
"""When clocks are set forward and back there."""


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def coming(expression: str, zone: str, after: str, number: int) -> list[str]:
    """The next matches, as clocks in that zone show them."""
    found, moment = [], utc(after)
    for _ in range(number):
        moment = cron.following(expression, zone, moment)
        assert moment.tzinfo is UTC
        found.append(moment.astimezone(ZoneInfo(zone)).strftime("%m-%d %H:%M:%S %z"))
    return found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("*/20 9-10 * * *", ["01-01 09:00", "01-01 09:20", "01-01 09:40", "01-01 10:00"]),
        ("0 0 * * MON-FRI", ["01-01 00:00", "01-02 00:00", "01-05 00:00", "01-06 00:00"]),
        ("0 0 1 jan,Jul *", ["01-01 00:00", "07-01 00:00", "01-01 00:00", "07-01 00:00"]),
        ("30 6 L * *", ["01-31 06:30", "02-28 06:30", "03-31 06:30", "04-30 06:30"]),
        ("0 0 LW * *", ["01-30 00:00", "02-27 00:00", "03-31 00:00", "04-30 00:00"]),
        ("0 0 * * 5L", ["01-30 00:00", "02-27 00:00", "03-27 00:00", "04-24 00:00"]),
        ("0 0 * * 1#2", ["01-12 00:00", "02-09 00:00", "03-09 00:00", "04-13 00:00"]),
        ("0 0 13 * 5", ["01-02 00:00", "01-09 00:00", "01-13 00:00", "01-16 00:00"]),
        ("0 0 * * 7", ["01-04 00:00", "01-11 00:00", "01-18 00:00", "01-25 00:00"]),
        ("@yearly", ["01-01 00:00", "01-01 00:00"]),
        ("@monthly", ["01-01 00:00", "02-01 00:00"]),
        ("@weekly", ["01-04 00:00", "01-11 00:00"]),
        ("@Daily", ["01-01 00:00", "01-02 00:00"]),
        ("@hourly", ["01-01 00:00", "01-01 01:00"]),
        ("  0   12 * *\t1 ", ["01-05 12:00", "01-12 12:00"]),
    ],
)
def test_what_an_expression_means(expression: str, expected: list[str]) -> None:
    shown = coming(expression, "UTC", "2025-12-31T23:59:59.999999Z", len(expected))
    assert shown == [f"{moment}:00 +0000" for moment in expected]


def test_a_sixth_field_in_front_is_seconds() -> None:
    assert coming("*/25 59 23 31 12 *", "UTC", "2025-12-31T23:59:00Z", 3) == [
        "12-31 23:59:25 +0000",
        "12-31 23:59:50 +0000",
        "12-31 23:59:00 +0000",
    ]


def test_first_may_be_the_moment_itself_and_following_is_after_it() -> None:
    at = utc("2026-05-04T03:02:00Z")
    assert cron.first("2 3 4 5 *", "UTC", at) == at
    assert cron.following("2 3 4 5 *", "UTC", at) == utc("2027-05-04T03:02Z")
    assert cron.first("2 3 4 5 *", "UTC", at + cron.MOMENT) == utc("2027-05-04T03:02Z")


@pytest.mark.parametrize(
    ("zone", "expression", "after", "expected"),
    [
        # A time of day that the clock leaps over comes at the leap, several once; what it shows twice comes once.
        ("Europe/Berlin", "30 2 * * *", "2026-03-28T12:00Z", ["03-29 03:00:00 +0200", "03-30 02:30:00 +0200"]),
        ("Europe/Berlin", "0-59 2 * * *", "2026-03-29T00:59:30Z", ["03-29 03:00:00 +0200", "03-30 02:00:00 +0200"]),
        ("Europe/Berlin", "15 30 2 * * *", "2026-03-28T12:00Z", ["03-29 03:00:00 +0200", "03-30 02:30:15 +0200"]),
        ("Europe/Berlin", "30 2 * * *", "2026-10-24T12:00Z", ["10-25 02:30:00 +0200", "10-26 02:30:00 +0100"]),
        ("Europe/Berlin", "30 2 * * *", "2026-10-25T01:15Z", ["10-26 02:30:00 +0100"]),
        ("America/New_York", "30 2 * * *", "2026-03-07T12:00Z", ["03-08 03:00:00 -0400", "03-09 02:30:00 -0400"]),
        ("America/New_York", "30 1 * * *", "2026-10-31T12:00Z", ["11-01 01:30:00 -0400", "11-02 01:30:00 -0500"]),
        ("Australia/Lord_Howe", "15 2 * * *", "2026-10-03T00:00Z", ["10-04 02:30:00 +1100", "10-05 02:15:00 +1100"]),
        ("Australia/Lord_Howe", "45 1 * * *", "2026-04-04T00:00Z", ["04-05 01:45:00 +1100", "04-06 01:45:00 +1030"]),
        ("Pacific/Apia", "0 9 * * *", "2011-12-29T12:00Z", ["12-29 09:00:00 -1000", "12-31 00:00:00 +1400"]),
        # With a star the clock is followed as it goes.
        ("Europe/Berlin", "@hourly", "2026-03-29T00:00Z", ["03-29 03:00:00 +0200", "03-29 04:00:00 +0200"]),
        ("Europe/Berlin", "*/30 2 * * *", "2026-03-28T12:00Z", ["03-30 02:00:00 +0200", "03-30 02:30:00 +0200"]),
        ("Europe/Berlin", "30 * * * *", "2026-10-25T00:00Z", ["10-25 02:30:00 +0200", "10-25 02:30:00 +0100"]),
        ("Australia/Lord_Howe", "0 */2 * * *", "2026-04-04T14:00Z", ["04-05 02:00:00 +1030", "04-05 04:00:00 +1030"]),
        ("Australia/Lord_Howe", "*/15 * * * *", "2026-10-03T15:15Z", ["10-04 02:30:00 +1100", "10-04 02:45:00 +1100"]),
    ],
)
def test_on_days_when_clocks_are_set(zone: str, expression: str, after: str, expected: list[str]) -> None:
    assert coming(expression, zone, after, len(expected)) == expected


@st.composite
def calendars(draw: st.DrawFn) -> tuple[str, str, datetime]:
    def field(lowest: int, highest: int) -> str:
        number = st.integers(lowest, highest)
        several = st.lists(number, min_size=1, max_size=3).map(lambda some: ",".join(map(str, some)))
        steps = st.sampled_from((2, 5, 7, 20, 40)).map("*/{}".format)
        return draw(st.one_of(st.just("*"), several, steps, st.just(f"{lowest}-{highest}")))

    zone = draw(st.sampled_from(sorted(SWITCHES)))
    switch = utc(draw(st.sampled_from(SWITCHES[zone])))
    at = switch + timedelta(microseconds=draw(st.integers(-30 * 3600 * 10**6, 4 * 3600 * 10**6)))
    at = draw(st.sampled_from((at, switch, switch - cron.MOMENT, at.replace(second=0, microsecond=0))))
    return f"{field(0, 59)} {field(0, 4)} * * *", zone, at


@settings(max_examples=150, deadline=None)
@given(calendars())
def test_matches_are_those_that_a_look_at_each_minute_finds(given_: tuple[str, str, datetime]) -> None:
    expression, zone, at = given_
    until = at + timedelta(hours=40)
    calendar = cron._calendar(expression, zone)
    expected = by_looking(expression, zone, at, until)
    assert list(calendar.span(at - cron.MOMENT, until)) == expected
    if expected:
        assert cron.first(expression, zone, at) == expected[0]
    assert cron.between(expression, zone, at - cron.MOMENT, until, 7) == expected[-7:]
    assert cron.count(expression, zone, at - cron.MOMENT, until, 9) == min(9, len(expected))


def by_looking(expression: str, zone: str, at: datetime, until: datetime) -> list[datetime]:
    """The rule as it is written down, in the simplest way; the expression names minutes and hours only."""
    minute, hour = expression.split()[:2]
    minutes, hours = numbers(minute, 60), numbers(hour, 24)
    start = at.replace(second=0, microsecond=0) - timedelta(days=2)
    moments = [start + number * MINUTE for number in range(7 * 24 * 60)]
    shown = [moment.astimezone(ZoneInfo(zone)).replace(tzinfo=None, fold=0) for moment in moments]
    found: set[datetime] = set()
    if "*" in minute or "*" in hour:
        found = {m for m, local in zip(moments, shown, strict=True) if local.minute in minutes and local.hour in hours}
    else:
        seen: datetime = shown[0]
        for moment, local in zip(moments, shown, strict=True):
            while seen < local:  # what the clock shows for the first time now, or has leapt over
                seen += MINUTE
                if seen.minute in minutes and seen.hour in hours:
                    found.add(moment)
    return sorted(moment for moment in found if at <= moment < until)


def numbers(field: str, end: int) -> set[int]:
    if field.startswith("*"):
        return set(range(0, end, int(field[2:] or 1)))
    if "-" in field:
        low, high = field.split("-")
        return set(range(int(low), int(high) + 1))
    return set(map(int, field.split(",")))


def test_the_last_of_many_matches_are_found_without_a_walk_through_all() -> None:
    after, before = utc("2000-01-01T00:00Z"), utc("2026-11-26T13:00:00Z")
    last = cron.between("* * * 1-30 1-6 *", "Europe/Berlin", after, before, 1000)
    assert len(last) == 1000
    assert last[-1] == utc("2026-06-30T21:59:59Z")
    assert all(later - earlier == cron.SECOND for earlier, later in pairwise(last))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("60 * * * *", 'cron "60 * * * *": bad minute "60"'),
        ("* 9-25 * * *", 'bad hour "9-25"'),
        ("0 0 0 * *", 'bad day-of-month "0"'),
        ("0 0 * FEBRUARY *", 'bad month "FEBRUARY"'),
        ("0 0 * * MON#6", 'bad day-of-week "MON#6"'),
        ("61 0 0 * * *", 'bad second "61"'),
        ("*/0 * * * *", 'bad minute "*/0"'),
        ("٣ * * * *", "bad minute"),
        ("0 0 * * ٣L", "bad day-of-week"),
        ("9" * 900 + " * * * *", "bad minute"),
        ("", "has 0 fields, and must have five or six"),
        ("daily", "has 1 field, and must have five or six"),
        ("0 0 * * * * *", "has 7 fields"),
        ("@dayly", 'cron "@dayly" is none of @yearly'),
        ("@reboot", "is none of"),
        ("0 " * 5000, "may have 1000"),
        ("0 0 30 2 *", 'cron "0 0 30 2 *" never matches: no such month has day 30'),
        ("0 0 31 4,6 *", "never matches"),
        ("0 0 */31 * MON#2", 'cron "0 0 */31 * MON#2" never matches after 2026-01-01'),
    ],
)
def test_what_is_wrong_is_named(expression: str, message: str) -> None:
    with pytest.raises(Wrong) as raised:
        cron.first(expression, "Europe/Berlin", utc("2026-01-01T00:00Z"))
    assert message in str(raised.value)


@pytest.mark.parametrize("zone", ["Europe/Berlyn", "", "Europe", "../passwd", "/etc/localtime", "a\0b", "+02"])
def test_zone_that_does_not_exist_is_named(zone: str) -> None:
    with pytest.raises(Wrong, match=r"zone .* is not known"):
        cron.first("@daily", zone, utc("2026-01-01T00:00Z"))


def test_zone_is_found_in_whatever_letters_as_the_server_does() -> None:
    assert coming("@daily", "Europe/Berlin", "2026-01-01T00:00Z", 1) == ["01-02 00:00:00 +0100"]
    assert cron.following("@daily", "europe/BERLIN", utc("2026-01-01T00:00Z")) == utc("2026-01-01T23:00Z")


@given(st.text(alphabet="0123456789*/,-#LWlw@?$ MONJAN", max_size=30), st.datetimes(timezones=st.just(UTC)))
@settings(deadline=None)
def test_any_text_has_a_next_match_or_is_wrong(expression: str, after: datetime) -> None:
    try:
        assert cron.following(expression, "America/New_York", after) > after
    except Wrong as wrong:
        assert str(wrong).startswith("cron ")


def test_a_rare_day_is_found_decades_ahead() -> None:
    found = list(islice(cron._calendar("0 0 29 2 *", "Europe/Berlin").since(utc("2095-01-01T00:00Z")), 2))
    assert [moment.astimezone(ZoneInfo("Europe/Berlin")).date().isoformat() for moment in found] == [
        "2096-02-29",
        "2104-02-29",
    ]
