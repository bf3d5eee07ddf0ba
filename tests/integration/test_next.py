"""`pgtask next`: what it says of a calendar, and of a row in each state."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pgtask import cron
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.unit.test_cli import USER, call, refused

DAY = timedelta(days=1)


def told(*arguments: str) -> list[str]:
    done = call(*USER, "next", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def far_hour(zone: str) -> int:
    """Half a day from now: it does not come round between two looks."""
    return (datetime.now(ZoneInfo(zone)) + DAY / 2).hour


@pytest.fixture
def table(database: Database) -> Database:
    install(database)
    return database


def of(table: Database, id: int, *arguments: str) -> list[str]:
    return told(str(id), "-d", table.conninfo, *arguments)


def test_calendar_is_shown_in_its_zone() -> None:
    hour = far_hour("Asia/Tokyo")
    daily = f"0 {hour} * * *"
    lines = told(daily, "--zone", "Asia/Tokyo", "-n", "3")
    first = cron.following(daily, "Asia/Tokyo", datetime.now(UTC)) + 9 * timedelta(hours=1)
    days = [first + number * DAY for number in range(3)]
    assert lines == [f"{day:%Y-%m-%d} {hour:02}:00:00+0900 {day:%a}" for day in days]
    assert len(told("@hourly")) == 5
    times = json.loads("".join(told(daily, "--zone", "Asia/Tokyo", "-n", "3", "--json")))
    assert times == [f"{day:%Y-%m-%d}T{hour:02}:00:00+09:00" for day in days]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"cron": "0 0 * * *", "zone": "Europe/Berlin", "plan": "2090-03-24 23:00Z", "first": "2090-03-24 23:00Z"},
            ["2090-03-25 00:00:00+0100 Sat", "2090-03-26 00:00:00+0100 Sun", "2090-03-27 00:00:00+0200 Mon"],
        ),
        (
            {"cron": "0 0 * * *", "zone": "UTC", "plan": "2090-03-24 23:00Z"},
            ["2090-03-25 00:00:00+0000 Sat", "2090-03-26 00:00:00+0000 Sun", "2090-03-27 00:00:00+0000 Mon"],
        ),
        (
            {"cron": "@daily", "zone": "UTC", "plan": "2090-01-01", "first": "2090-01-01", "until": "2090-01-02"},
            ["2090-01-01 00:00:00+0000 Sun", "2090-01-02 00:00:00+0000 Mon"],
        ),
        (
            {"repeat": "1 month", "plan": "2090-02-28 00:00Z", "first": "2090-01-31 00:00Z", "zone": "UTC"},
            ["2090-02-28 00:00:00+0000 Tue", "2090-03-31 00:00:00+0000 Fri", "2090-04-30 00:00:00+0000 Sun"],
        ),
        (
            {"repeat": "90 min", "plan": "2090-02-28 00:00Z", "first": "2089-01-31 00:00:01Z", "zone": "UTC"},
            ["2090-02-28 00:00:00+0000 Tue", "2090-02-28 01:30:00+0000 Tue", "2090-02-28 03:00:00+0000 Tue"],
        ),
        (
            {"repeat": "1 day", "drift": True, "plan": "2090-02-28 00:00Z", "zone": "UTC"},
            ["2090-02-28 00:00:00+0000 Tue", "then 1 day after the end of each run"],
        ),
        ({"plan": "2090-02-28 00:00Z", "zone": "Asia/Tokyo"}, ["2090-02-28 09:00:00+0900 Tue"]),
    ],
)  # fmt: skip
def test_row_that_waits_is_told_with_its_repetition(
    table: Database, columns: dict[str, Any], expected: list[str]
) -> None:
    table.admin_execute(f"ALTER DATABASE {table.name} SET TimeZone = 'UTC'")
    assert of(table, table.insert("SELECT 1", **columns), "-n", "3") == expected


def test_row_that_runs_is_told_from_now_on(table: Database) -> None:
    hour = far_hour("UTC")
    daily, plan = f"0 {hour} * * *", f"2020-01-01 {hour:02}:00Z"
    for columns in ({"repeat": "1 day"}, {"cron": daily}):
        id = table.insert("SELECT 1", plan=plan, first=plan, zone="UTC", **columns)
        table.execute("UPDATE task SET state = 'WORK' WHERE id = %s", [id])
        first = cron.following(daily, "UTC", datetime.now(UTC))
        assert of(table, id, "-n", "2") == [f"{first:%Y-%m-%d %H:%M:%S%z %a}", f"{first + DAY:%Y-%m-%d %H:%M:%S%z %a}"]
    id = table.insert("SELECT 1", plan="2020-01-01 12:00Z")
    table.execute("UPDATE task SET state = 'WORK' WHERE id = %s", [id])
    assert of(table, id) == ["never"]


def test_other_zone_is_for_showing_only(table: Database) -> None:
    plan = "2090-03-24 23:00Z"
    id = table.insert("SELECT 1", cron="0 0 * * *", zone="Europe/Berlin", plan=plan, first=plan)
    assert of(table, id, "--zone", "UTC", "-n", "1") == ["2090-03-24 23:00:00+0000 Fri"]


def test_what_cannot_be_told_is_one_line(table: Database) -> None:
    done = table.insert("SELECT 1")
    table.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [done])
    assert f"task {done} is STOP" in refused(*USER, "next", str(done), "-d", table.conninfo)
    assert "has no task 77" in refused(*USER, "next", "77", "-d", table.conninfo)
    assert "does not exist" in refused(*USER, "next", "1", "-d", table.conninfo, "--table", "other")
    assert "out of range" in refused(*USER, "next", "9" * 30, "-d", table.conninfo)
    assert 'zone "Mars" is not known' in refused(*USER, "next", "@daily", "--zone", "Mars")
    assert 'bad minute "61"' in refused(*USER, "next", "61 * * * *")
