"""The next row of a repeated task: when it is planned, what it copies, and what may refuse it.

Most of this is one statement (`repeat` of sql/run.sql), run here on a table without a master, where every moment of
the calendar can be tried. A plan in the future stands for a task that has just run: the next one comes after it.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, AsyncRawCursor, RawCursor, sql

from pgtask import schema, settings
from tests.fixtures.database import Database, create, drop
from tests.fixtures.master import Master
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

NAMES = schema.Names(schema="public", table="task")
Run = Callable[..., dict[str, Any]]


async def install(conninfo: str) -> None:
    defaults = {setting.name: setting.sql_default for setting in settings.by_name("task").values()}
    connected = await AsyncConnection.connect(conninfo, autocommit=True, cursor_factory=AsyncRawCursor)
    async with connected as session:
        await session.execute("SET search_path TO pg_catalog, pg_temp")
        await schema.install(session, NAMES, defaults)


class Table:
    """A task table that nobody serves, and a session that plans as a worker's does."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.store = NAMES.store()
        self.session = database.connect()

    def now(self) -> datetime:
        return self.session.execute("SELECT clock_timestamp()").fetchall()[0][0]

    def next_id(self, id: int | None, zone: str = "UTC") -> int | None:
        """The id of the row that follows this one, None if there is none."""
        cursor = RawCursor(self.session)
        cursor.execute(f"SET TimeZone = '{zone}'".encode())
        cursor.execute(b"SET search_path TO pg_catalog, pg_temp")
        copied = cursor.execute(self.store.text("copied").encode()).fetchall()[0][0]
        cursor.execute(b"UPDATE public.task SET state = 'DONE' WHERE id = $1", [id])
        cursor.execute(self.store.repeat(copied).encode(), [id])
        rows = self.database.execute("SELECT id FROM task WHERE parent = %s", [id])
        assert len(rows) == cursor.rowcount <= 1
        return rows[0][0] if rows else None

    def repeat(self, id: int, zone: str = "UTC") -> dict[str, Any] | None:
        """The row that follows this one."""
        following = self.next_id(id, zone)
        return None if following is None else self.database.task(following)

    def plans(self, count: int, zone: str = "UTC", **columns: Any) -> list[str]:
        """The plans of so many rows, each the repetition of the one before, as the zone's clock shows them."""
        id = self.database.insert("SELECT 1", **columns)
        for _ in range(count):
            following = self.repeat(id, zone)
            assert following is not None
            id = following["id"]
        query = "SELECT to_char(plan AT TIME ZONE %s, 'YYYY-MM-DD HH24:MI:SS') FROM task WHERE parent > 0 ORDER BY id"
        found = [text for (text,) in self.database.execute(query, [zone])]
        self.database.execute("DELETE FROM task")
        return found


@pytest.fixture(scope="module")
def shared(server: AnyServer) -> Iterator[Table]:
    name = f"test_{secrets.token_hex(6)}"
    database = Database(server, name, name)
    create(database)
    asyncio.run(install(database.conninfo))
    yield Table(database)
    database.close()
    drop(database)


@pytest.fixture
def table(shared: Table) -> Table:
    """An empty task table without a master."""
    shared.database.execute("DELETE FROM task")
    return shared


@pytest.fixture
def own_table(database: Database) -> Table:
    """Another, which the test may alter."""
    asyncio.run(install(database.conninfo))
    return Table(database)


# When: without drift


def test_next_plan_is_one_repeat_after_this_one(table: Table) -> None:
    plans = table.plans(3, plan="2090-01-01 12:00:00Z", repeat="90 min")
    assert plans == ["2090-01-01 13:30:00", "2090-01-01 15:00:00", "2090-01-01 16:30:00"]


@pytest.mark.parametrize("late", ["1 s", "59 s", "61 s", "1 hour", "1 day", "400 days"])
@pytest.mark.parametrize("repeat", ["1 ms", "7 s", "1 min", "1 day", "1 month", "1 year"])
def test_missed_plans_are_skipped_and_the_grid_is_kept(table: Table, late: str, repeat: str) -> None:
    before = datetime.now(UTC)
    id = table.database.insert("SELECT 1", plan=sql.SQL(f"clock_timestamp() - interval '{late}'"), repeat=repeat)
    row, following = table.database.task(id), table.repeat(id)
    assert row
    assert following
    after = datetime.now(UTC)
    assert following["plan"] > before
    assert following["first"] == row["plan"]
    query = """
        SELECT min(at) FILTER (WHERE at > %(before)s), min(at) FILTER (WHERE at > %(after)s)
        FROM (SELECT %(plan)s::timestamptz + %(repeat)s::interval * n AS at
            FROM generate_series(%(start)s::int8, %(start)s::int8 + 20000) AS n) AS grid
    """
    calendar = repeat in ("1 month", "1 year")
    start = 1 if calendar else max(1, int((before - row["plan"]) / following["repeat"]) - 10)
    values = {"plan": row["plan"], "repeat": repeat, "before": before, "after": after, "start": start}
    [(soonest, latest)] = table.session.execute(query, values).fetchall()
    assert soonest <= following["plan"] <= latest


def test_repeat_of_a_millisecond_after_a_year_costs_nothing(table: Table) -> None:
    ids = [
        table.database.insert("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '1 year'"), repeat="1 ms")
        for _ in range(20)
    ]
    started = time.monotonic()
    for id in ids:
        assert table.repeat(id)
    assert time.monotonic() - started < 20


def test_clock_that_was_set_back_does_not_end_the_repetition(table: Table) -> None:
    plans = table.plans(1, first="2090-01-01 00:00:00Z", plan="2090-01-01 00:16:40Z", repeat="1 s")
    assert plans == ["2090-01-01 00:16:41"]


def test_last_day_of_the_month_stays_the_last(table: Table) -> None:
    plans = table.plans(14, plan="2091-01-31 08:00:00Z", repeat="1 month")
    assert [plan[5:10] for plan in plans] == [
        *("02-28", "03-31", "04-30", "05-31", "06-30", "07-31", "08-31"),
        *("09-30", "10-31", "11-30", "12-31", "01-31", "02-29", "03-31"),
    ]
    assert {plan[11:] for plan in plans} == {"08:00:00"}


def test_leap_day_comes_back_every_four_years(table: Table) -> None:
    plans = table.plans(5, plan="2092-02-29 00:00:00Z", repeat="1 year")
    assert [plan[:10] for plan in plans] == ["2093-02-28", "2094-02-28", "2095-02-28", "2096-02-29", "2097-02-28"]


def test_quarter_that_begins_on_the_31st_keeps_it(table: Table) -> None:
    plans = table.plans(4, plan="2091-10-31 00:00:00Z", repeat="3 months")
    assert [plan[:10] for plan in plans] == ["2092-01-31", "2092-04-30", "2092-07-31", "2092-10-31"]


def test_day_keeps_its_hour_when_the_clocks_change(table: Table) -> None:
    spring = table.plans(3, "Europe/Berlin", plan="2035-03-23 09:00:00 Europe/Berlin", repeat="1 day")
    assert spring == ["2035-03-24 09:00:00", "2035-03-25 09:00:00", "2035-03-26 09:00:00"]
    autumn = table.plans(3, "Europe/Berlin", plan="2035-10-26 09:00:00 Europe/Berlin", repeat="1 day")
    assert autumn == ["2035-10-27 09:00:00", "2035-10-28 09:00:00", "2035-10-29 09:00:00"]


def test_twenty_four_hours_do_not(table: Table) -> None:
    plans = table.plans(3, "Europe/Berlin", plan="2035-03-23 09:00:00 Europe/Berlin", repeat="24 hours")
    assert plans == ["2035-03-24 09:00:00", "2035-03-25 10:00:00", "2035-03-26 10:00:00"]


def test_hour_that_does_not_exist_is_only_missed_on_that_day(table: Table) -> None:
    plans = table.plans(3, "Europe/Berlin", plan="2035-03-23 02:30:00 Europe/Berlin", repeat="1 day")
    assert plans == ["2035-03-24 02:30:00", "2035-03-25 03:30:00", "2035-03-26 02:30:00"]


def test_hour_that_comes_twice_is_run_once_by_the_day_and_twice_by_the_hour(table: Table) -> None:
    days = table.plans(3, "Europe/Berlin", plan="2035-10-26 02:30:00 Europe/Berlin", repeat="1 day")
    assert days == ["2035-10-27 02:30:00", "2035-10-28 02:30:00", "2035-10-29 02:30:00"]
    hours = table.plans(4, "Europe/Berlin", plan="2035-10-28 00:30:00 Europe/Berlin", repeat="1 hour")
    assert [plan[11:] for plan in hours] == ["01:30:00", "02:30:00", "02:30:00", "03:30:00"]


def test_month_over_the_change_keeps_its_hour(table: Table) -> None:
    plans = table.plans(3, "America/New_York", plan="2035-01-31 23:59:59 America/New_York", repeat="1 month")
    assert plans == ["2035-02-28 23:59:59", "2035-03-31 23:59:59", "2035-04-30 23:59:59"]


def test_mixed_interval_is_added_as_the_server_adds_it(table: Table) -> None:
    plans = table.plans(2, plan="2091-01-31 00:00:00Z", repeat="1 month 1 day 1 hour")
    assert plans == ["2091-03-01 01:00:00", "2091-04-02 02:00:00"]


def test_moved_plan_begins_a_new_grid(table: Table) -> None:
    plans = table.plans(2, first="2090-01-01 00:00:00Z", plan="2090-01-01 10:20:30Z", repeat="1 hour")
    assert plans == ["2090-01-01 11:20:30", "2090-01-01 12:20:30"]


def test_changed_repeat_begins_a_new_grid(table: Table) -> None:
    id = table.database.insert("SELECT 1", plan="2090-01-01 00:00:00Z", repeat="1 hour")
    following = table.repeat(id)
    assert following
    table.database.execute("UPDATE task SET repeat = '7 min' WHERE id = %s", [following["id"]])
    again = table.repeat(following["id"])
    assert again
    assert again["plan"] == datetime(2090, 1, 1, 1, 7, tzinfo=UTC)


# When: with drift


@pytest.mark.parametrize("repeat", ["1 ms", "1 hour", "1 month"])
def test_drift_counts_from_now(table: Table, repeat: str) -> None:
    id = table.database.insert("SELECT 1", plan="2020-01-31 12:00:00Z", repeat=repeat, drift=True)
    before = table.now()
    following = table.repeat(id)
    assert following
    query = "SELECT %s + %s::interval, %s + %s::interval"
    [(soonest, latest)] = table.session.execute(query, [before, repeat, table.now(), repeat]).fetchall()
    assert soonest <= following["plan"] <= latest
    assert following["first"] is None


# When: extremes


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize(
    ("plan", "repeat"),
    [
        ("-infinity", "1 s"),
        ("-infinity", "1 us"),
        ("4714-11-24 00:00:00 BC", "1 s"),
        ("4714-11-24 00:00:00 BC", "1 ms"),
        ("4714-11-24 00:00:00 BC", "1 us"),
        ("4714-11-24 00:00:00 BC", "1 month"),
        ("4714-11-24 00:00:00 BC", "1000 years"),
        ("4714-11-24 00:00:00 BC", "8000 years"),
        ("1970-01-01", "1 us"),
        ("2000-01-01", "1000 years 1 us"),
        ("2000-01-01", "30000 years"),
        ("2000-01-01", "1 month -29 days"),
        ("2000-01-01", "-1 month 40 days"),
    ],
)
def test_extreme_repetition_is_planned_in_the_future(table: Table, plan: str, repeat: str, drift: bool) -> None:
    id: int | None = table.database.insert("SELECT 1", plan=plan, repeat=repeat, drift=drift)
    for _ in range(3):
        before = table.now()
        id = table.next_id(id)
        assert id is not None
        query = "SELECT plan > %s AND isfinite(plan) FROM task WHERE id = %s"
        assert table.database.execute(query, [before, id]) == [(True,)]


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("plan", ["-infinity", "4714-11-24 BC", "2020-01-01"])
def test_repetition_beyond_all_time_is_none(table: Table, plan: str, drift: bool) -> None:
    for repeat in ("178000000 years", "300000 years", "2147483647 months", "2147483647 days"):
        id = table.database.insert("SELECT 1", plan=plan, repeat=repeat, drift=drift)
        assert table.next_id(id) is None


@pytest.mark.parametrize("drift", [False, True])
def test_repetition_that_never_comes_is_none(table: Table, drift: bool) -> None:
    if table.session.info.server_version < 170000:
        with pytest.raises(psycopg.errors.InvalidDatetimeFormat):
            table.database.insert("SELECT 1", repeat="infinity")
        return
    for plan in ("-infinity", "2020-01-01"):
        assert table.next_id(table.database.insert("SELECT 1", plan=plan, repeat="infinity", drift=drift)) is None


@pytest.mark.parametrize("repeat", ["0", "1 month -30 days", "-12 months 361 days"])
def test_repeat_of_nothing_is_none(table: Table, repeat: str) -> None:
    assert table.repeat(table.database.insert("SELECT 1", plan="2020-01-01", repeat=repeat)) is None


@pytest.mark.parametrize("first", ["-infinity", "infinity", "4714-11-24 BC", "294276-12-31"])
@pytest.mark.parametrize("repeat", ["1 s", "7000 years"])
def test_nonsense_in_first_is_not_believed(table: Table, first: str, repeat: str) -> None:
    id = table.next_id(table.database.insert("SELECT 1", plan="2090-01-01 00:00:00Z", first=first, repeat=repeat))
    query = (
        "SELECT plan > '2090-01-01 00:00:00Z' AND plan <= '2090-01-01 00:00:00Z'::timestamptz + repeat"
        " FROM task WHERE id = %s"
    )
    assert table.database.execute(query, [id]) == [(True,)]


# What is copied


def test_columns_of_the_users_own_are_copied_whatever_they_are_called(own_table: Table) -> None:
    own_table.database.execute(
        """
        ALTER TABLE task ADD plain int, ADD "Upper Case" text, ADD "comma, quote""s {task} %%s $1" text,
            ADD "größe" numeric, ADD "user" jsonb, ADD "select" int[], ADD gone int,
            ADD doubled int GENERATED ALWAYS AS (plain * 2) STORED, ADD filled text DEFAULT 'default'
        """.replace("%%", "%")
    )
    own_table.database.execute("ALTER TABLE task DROP gone")
    id = own_table.database.execute(
        """
        INSERT INTO task (input, plan, repeat, plain, "Upper Case", "comma, quote""s {task} %s $1", "größe", "user",
            "select", filled)
        VALUES ('SELECT 1', '2090-01-01', '1 day', 21, 'u', 'c', 1.50, '{"a": 1}', '{1,2}', NULL)
        RETURNING id
        """
    )[0][0]
    row, following = own_table.database.task(id), own_table.repeat(id)
    assert row
    assert following
    changed = {"id", "parent", "plan", "first"}
    assert {k: v for k, v in following.items() if k not in changed} == {
        k: v for k, v in row.items() if k not in changed
    }
    assert (following["doubled"], following["filled"]) == (42, None)


def test_identity_column_of_the_users_own_goes_on_counting(database: Database) -> None:
    database.execute(
        "CREATE TABLE task (id bigserial PRIMARY KEY, number int GENERATED ALWAYS AS IDENTITY (START 100))"
    )
    asyncio.run(install(database.conninfo))
    table = Table(database)
    id = database.insert("SELECT 1", plan="2090-01-01", repeat="1 day")
    following = table.repeat(id)
    assert following
    assert (database.task(id) or {})["number"] == 100
    assert following["number"] == 101
    assert following["id"] == id + 1


def test_what_belongs_to_one_run_is_not_copied(table: Table) -> None:
    values = {"start": "2090-01-01", "stop": "2090-01-01", "pid": 1, "state": "FAIL", "attempt": 3, "error": "e"}
    values |= {"output": "o", "code": "22012", "notice": "n", "parent": 5}
    id = table.database.insert("SELECT 1", plan="2090-01-01", repeat="1 day", data="mine", **values)
    following = table.repeat(id)
    assert following
    assert {name: following[name] for name in values} == dict.fromkeys(values) | {
        "state": "PLAN",
        "attempt": 0,
        "parent": id,
    }
    assert following["data"] == "mine"


def test_every_setting_of_the_task_is_copied(table: Table) -> None:
    values: dict[str, Any] = {
        "active": timedelta(days=3),
        "live": timedelta(seconds=4),
        "timeout": timedelta(milliseconds=5),
        "count": 6,
        "max": -7,
        "delete": False,
        "drift": True,
        "header": False,
        "save": True,
        "string": False,
        "delimiter": ";",
        "escape": "!",
        "quote": "'",
        "data": "d",
        "group": "g",
        "input": "SELECT 8",
        "null": "n",
        "remote": "dbname=x",
        "atomic": False,
    }
    id = table.database.insert(plan="2020-01-01", repeat="1 day", **values)
    following = table.repeat(id)
    assert following
    assert {name: following[name] for name in values} == values


# With a master


def test_repeated_task_goes_on_and_on(served: Database) -> None:
    id = served.insert("SELECT 1", repeat="50 ms", group="on and on", delete=False)
    first = served.wait(id)
    query = "\"group\" = 'on and on' AND state = 'DONE'"
    rows = eventually(lambda: (rows := served.tasks(query)) and len(rows) >= 6 and rows)
    served.execute("UPDATE task SET state = 'STOP' WHERE \"group\" = 'on and on' AND state = 'PLAN'")
    for before, after in pairwise(rows):
        assert after["parent"] == before["id"]
        assert after["start"] >= after["plan"] > before["stop"]
        assert (after["plan"] - first["plan"]) % timedelta(milliseconds=50) == timedelta(0)
    ended(served, "on and on")


def ended(database: Database, group: str) -> None:
    """End a repetition: a run that was just under way plans one more."""

    def stopped() -> bool:
        query = "DELETE FROM task WHERE \"group\" = %s AND state = 'PLAN'"
        database.execute(query, [group])
        states = database.execute('SELECT state FROM task WHERE "group" = %s', [group])
        return not {("PLAN",), ("TAKE",), ("WORK",)} & set(states)

    eventually(stopped)


def test_repeated_task_with_drift_pauses_after_each_run(served: Database) -> None:
    served.insert("SELECT pg_sleep(0.05)", repeat="100 ms", drift=True, group="drifting", delete=False)
    query = "\"group\" = 'drifting' AND state = 'DONE'"
    rows = eventually(lambda: (rows := served.tasks(query)) and len(rows) >= 4 and rows)
    ended(served, "drifting")
    for before, after in pairwise(rows):
        assert timedelta(milliseconds=100) <= after["plan"] - before["stop"] < timedelta(seconds=20)


@pytest.mark.parametrize(
    ("input", "columns", "state"),
    [
        ("SELECT 1/0", {}, "FAIL"),
        ("SELEC", {}, "FAIL"),
        ("SELECT pg_sleep(10)", {"timeout": "50 ms"}, "FAIL"),
        ("COMMIT; SELECT 1", {}, "DONE"),
        ("ROLLBACK", {}, "DONE"),
        ("SELECT 1", {"atomic": False}, "DONE"),
        ("SELECT 1/0", {"atomic": False}, "FAIL"),
        ("SELECT 1", {"remote": "nonsense"}, "FAIL"),
        ("SET default_transaction_read_only = on", {}, "DONE"),
        ("VACUUM pg_class", {}, "DONE"),
    ],
)
def test_task_is_repeated_whatever_came_of_it(
    run: Run, served: Database, input: str, columns: dict[str, Any], state: str
) -> None:
    row = run(input, repeat="1 day", **columns)
    assert row["state"] == state
    [following] = served.tasks(f"parent = {row['id']}")
    assert following["plan"] == row["plan"] + timedelta(days=1)


def test_silent_repeated_task_leaves_only_its_next_row(served: Database) -> None:
    id = served.insert("SELECT 1 WHERE false", repeat="1 day")
    served.wait(id, gone=True)
    [following] = served.tasks(f"parent = {id}")
    assert (following["state"], following["delete"]) == ("PLAN", True)


def test_failed_run_undoes_its_work_and_not_its_repetition(run: Run, served: Database) -> None:
    served.execute("CREATE TABLE worked (a int)")
    row = run("INSERT INTO worked VALUES (1); SELECT 1/0", repeat="1 day")
    assert served.execute("SELECT * FROM worked") == []
    assert len(served.tasks(f"parent = {row['id']}")) == 1


def test_stopped_run_is_not_repeated(served: Database) -> None:
    id = served.insert("SELECT pg_sleep(10)", repeat="1 s", group="to be stopped", delete=False)
    served.wait(id, "WORK")
    served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    eventually(lambda: (row := served.task(id)) and row["stop"])
    assert served.tasks(f"parent = {id}") == []


def test_run_that_removes_its_own_repeat_is_the_last(run: Run, served: Database) -> None:
    row = run("UPDATE task SET repeat = '0' WHERE id = current_setting('pg_task.id')::bigint", repeat="1 s")
    assert (row["state"], row["output"]) == ("DONE", "UPDATE 1")
    assert served.tasks(f"parent = {row['id']}") == []


@pytest.fixture
def refusing(database: Database, master: Callable[..., Master]) -> Database:
    """A served table with a constraint of the user's own that refuses the second row with the same `data`."""
    master()
    database.execute("CREATE UNIQUE INDEX mine ON task (data)")
    database.execute("CREATE TABLE effect (a int)")
    return database


@pytest.mark.parametrize("columns", [{}, {"atomic": False}, {"delete": False}], ids=str)
def test_refused_repetition_leaves_the_run_done_and_says_so(refusing: Database, columns: dict[str, Any]) -> None:
    id = refusing.insert("INSERT INTO effect VALUES (1)", data="one", repeat="1 s", **columns)
    row = refusing.wait(id)
    assert (row["state"], row["output"], row["code"]) == ("DONE", "INSERT 0 1", None)
    assert row["error"] == (
        "ERROR:  the next row was refused\n"
        'ERROR:  duplicate key value violates unique constraint "mine"\n'
        "DETAIL:  Key (data)=(one) already exists."
    )
    assert refusing.execute("SELECT * FROM effect") == [(1,)]
    assert refusing.wait(refusing.insert("SELECT 2", delete=False))["output"] == "2"


def test_silent_run_whose_repetition_is_refused_is_kept_to_say_so(refusing: Database) -> None:
    refusing.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no more of %'', NEW.data; END'"
    )
    refusing.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON task FOR EACH ROW WHEN (NEW.first IS NOT NULL)"
        " EXECUTE FUNCTION refuse()"
    )
    row = refusing.wait(refusing.insert("SELECT 1 WHERE false", data="this", repeat="1 s"))
    assert (row["state"], row["output"]) == ("DONE", None)
    assert row["error"] == (
        "ERROR:  the next row was refused\nERROR:  no more of this\n"
        "CONTEXT:  PL/pgSQL function public.refuse() line 1 at RAISE"
    )


def test_failed_run_whose_repetition_is_refused_says_both(refusing: Database) -> None:
    row = refusing.wait(refusing.insert("SELECT 1/0", data="one", repeat="1 s"))
    assert (row["state"], row["code"]) == ("FAIL", "22012")
    assert row["error"].startswith(
        "ERROR:  division by zero\nSTATEMENT:  SELECT 1/0\nERROR:  the next row was refused\n"
    )


def test_column_that_was_added_or_dropped_while_it_ran_does_not_end_the_repetition(
    database: Database, master: Callable[..., Master]
) -> None:
    master()
    database.execute("ALTER TABLE task ADD old int DEFAULT 1")
    for change in ("ALTER TABLE task DROP old, ADD new int DEFAULT 2", "ALTER TABLE task ADD newer int DEFAULT 3"):
        row = database.wait(database.insert(change, repeat="1 day", delete=False))
        assert (row["state"], row["error"]) == ("DONE", None)
        assert len(database.tasks(f"parent = {row['id']}")) == 1


def test_year_long_outage_is_skipped_by_the_master_in_no_time(served: Database) -> None:
    plan = sql.SQL("clock_timestamp() - interval '1 year'")
    id = served.insert("SELECT 1", plan=plan, repeat="1 ms", group="outage", delete=False)
    row = served.wait(id)
    assert row["stop"] - row["start"] < timedelta(seconds=20)
    [following] = eventually(lambda: served.tasks(f"parent = {id}"))
    ended(served, "outage")
    assert following["plan"] >= row["start"]
    assert following["first"] == row["plan"]


def test_calendar_of_a_role_with_its_own_time_zone_is_kept(database: Database, master: Callable[..., Master]) -> None:
    database.admin_execute(f"ALTER DATABASE {database.name} SET TimeZone = 'Europe/Berlin'")
    master()
    # A year has a changed clock in it: by the day it must be noon in Berlin whatever the task sets.
    id = database.insert(
        "SET TimeZone = 'America/New_York'", plan="2025-01-01 12:00:00 Europe/Berlin", repeat="1 day", delete=False
    )
    database.wait(id)
    query = "SELECT to_char(plan AT TIME ZONE 'Europe/Berlin', 'HH24:MI:SS') FROM task WHERE parent = %s"
    assert database.execute(query, [id]) == [("12:00:00",)]
