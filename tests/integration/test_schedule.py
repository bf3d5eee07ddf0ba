"""Schedules by name: put in place, changed and taken away in SQL, by a role that may only use the task table."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import errors
from psycopg.rows import dict_row

from pgtask import cron
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

HOUR = timedelta(hours=1)


class User:
    """A role with the rights that docs/how-to/calendars.md says."""

    def __init__(self, database: Database) -> None:
        self.name = f"{database.name}_user"
        database.admin_execute(f'CREATE ROLE "{self.name}" LOGIN')
        database.execute(f'GRANT SELECT, INSERT, UPDATE ON task TO "{self.name}"')
        self.conninfo = database.server.conninfo(database.name, self.name)
        self.session = database.connect(self.conninfo)

    def call(self, call: str, *parameters: Any) -> Any:
        return self.session.execute(f"SELECT {call}".encode(), parameters).fetchall()[0][0]


@pytest.fixture
def user(database: Database) -> Iterator[User]:
    install(database)
    user = User(database)
    yield user
    user.session.close()
    database.admin_execute(f'DROP OWNED BY "{user.name}"; DROP ROLE "{user.name}"')


def keyed(database: Database, key: str) -> list[dict[str, Any]]:
    return database.tasks(f"key = '{key}'")


def test_schedule_is_a_row_with_a_key(user: User, database: Database) -> None:
    id = user.call(
        "task_schedule('nightly', '0 3 * * *', 'CALL night()', zone => 'Europe/Berlin', \"group\" => 'night', max => 2,"
        " timeout => '1 h', until => '2100-01-01', missed => 'skip', retry => 3, remote => 'r', data => 'd')"
    )
    row = database.task(id) or {}
    names = ("key", "cron", "zone", "input", "group", "max", "timeout", "missed", "retry", "remote", "data")
    assert [row[name] for name in names] == [
        "nightly", "0 3 * * *", "Europe/Berlin", "CALL night()", "night", 2, HOUR, "skip", 3, "r", "d",
    ]  # fmt: skip
    assert (row["repeat"], row["until"].year) == (timedelta(0), 2100)


def test_schedule_of_an_interval_comes_first_after_it(user: User, database: Database) -> None:
    for call in ("'90 minutes'", "interval '90 minutes'", "'PT90M'", "'@ 90 mins'", "'01:30:00'"):
        id = user.call(f"task_schedule('often', {call}, 'SELECT 1')")
        row = database.task(id) or {}
        assert (row["repeat"], row["cron"], row["state"]) == (1.5 * HOUR, None, "PLAN")
        assert HOUR < row["plan"] - database.execute("SELECT now()")[0][0] <= 1.5 * HOUR
    assert len(database.tasks()) == 1


def test_same_schedule_again_changes_its_row_and_only_another_time_its_plan(user: User, database: Database) -> None:
    id = user.call("task_schedule('one', '1 hour', 'SELECT 1', max => 3, data => 'mine')")
    before = database.task(id) or {}
    assert user.call("task_schedule('one', '60 minutes', 'SELECT 2', max => 4)") == id
    row = database.task(id) or {}
    assert row == before | {"input": "SELECT 2", "max": 4, "data": None}
    assert user.call("task_schedule('one', '2 hours', 'SELECT 2')") == id
    row = database.task(id) or {}
    assert (row["repeat"], row["max"], row["plan"] > before["plan"] + HOUR / 2) == (2 * HOUR, 0, True)
    assert user.call("task_schedule('one', '@daily', 'SELECT 2')") == id
    row = database.task(id) or {}
    assert (row["cron"], row["repeat"], row["state"], row["pid"]) == ("@daily", timedelta(0), "WAIT", None)
    assert user.call("task_schedule('one', '1 hour', 'SELECT 2')") == id
    assert ((database.task(id) or {})["cron"], len(database.tasks())) == (None, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("task_schedule(NULL, '@daily', 'SELECT 1')", errors.NullValueNotAllowed, "needs a key"),
        ("task_schedule('', '@daily', 'SELECT 1')", errors.NullValueNotAllowed, "needs a key"),
        ("task_schedule('k', NULL::text, 'SELECT 1')", errors.NullValueNotAllowed, "needs a key"),
        ("task_schedule('k', NULL::interval, 'SELECT 1')", errors.NullValueNotAllowed, "needs a key"),
        ("task_schedule('k', '@daily', NULL)", errors.NullValueNotAllowed, "needs a key"),
        ("task_schedule('k', 'daily', 'SELECT 1')", errors.InvalidParameterValue, '"daily" is neither a calendar'),
        ("task_schedule('k', '* * * *', 'SELECT 1')", errors.InvalidParameterValue, "neither a calendar nor an"),
        ("task_schedule('k', '0 3 * * * * *', 'SELECT 1')", errors.InvalidParameterValue, "neither a calendar nor an"),
        ("task_schedule('k', '-1 hour', 'SELECT 1')", errors.InvalidParameterValue, "never comes round"),
        ("task_schedule('k', interval '0', 'SELECT 1')", errors.InvalidParameterValue, "never comes round"),
        (
            "task_schedule('k', '@daily', 'SELECT 1', zone => 'Mars')",
            errors.InvalidParameterValue,
            'time zone "Mars" does not exist',
        ),
        ("task_schedule('k', '@daily', 'SELECT 1', until => '2020-01-01')", errors.InvalidParameterValue, "is over"),
        ("task_schedule('k', '1 day', 'SELECT 1', until => now() + '1 h')", errors.CheckViolation, "until cannot be"),
        ("task_schedule('k', '@daily', 'SELECT 1', missed => 'never')", errors.CheckViolation, "missed cannot be"),
        ("task_schedule('k', '@daily', 'SELECT 1', timeout => '-1 s')", errors.CheckViolation, "timeout cannot be"),
        ("task_schedule('k', '61 * * * *', 'SELECT 1')", errors.InvalidParameterValue, 'bad minute "61"'),
        ("task_schedule('k', '@dayly', 'SELECT 1')", errors.InvalidParameterValue, 'cron "@dayly" is none of'),
        ("task_unschedule('k')", errors.UndefinedObject, 'there is no schedule "k"'),
        ("task_unschedule(NULL)", errors.UndefinedObject, "there is no schedule"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(
    user: User, database: Database, call: str, error: type[psycopg.Error], message: str
) -> None:
    user.call("task_schedule('other', '@daily', 'SELECT 1')")
    before = database.tasks()
    with pytest.raises(error) as raised:
        user.call(call)
    diagnostic = raised.value.diag
    assert message in (diagnostic.message_primary or "")
    assert diagnostic.message_hint
    assert database.tasks() == before


def test_schedule_that_waits_is_taken_away(user: User, database: Database) -> None:
    for schedule in ("1 hour", "@daily"):
        id = user.call("task_schedule('gone', %s, 'SELECT 1')", schedule)
        assert user.call("task_unschedule('gone')") is True
        assert (database.task(id) or {})["state"] == "STOP"
        with pytest.raises(errors.UndefinedObject):
            user.call("task_unschedule('gone')")


@pytest.mark.parametrize("schedule", ["1 hour", "@daily"])
@pytest.mark.parametrize("last", ["task_unschedule('running')", "task_schedule('running', '2 hours', 'SELECT 2')"])
def test_run_that_goes_on_ends_well_and_is_not_repeated(
    user: User, database: Database, master: Callable[..., Master], schedule: str, last: str
) -> None:
    master()
    id = user.call("task_schedule('running', %s, %s)", schedule, "SELECT pg_advisory_lock(7), 'ran to its end'")
    lock = database.connect()
    lock.execute("SELECT pg_advisory_lock(7)")
    run = "UPDATE task SET plan = clock_timestamp() WHERE state = 'PLAN' RETURNING id"
    eventually(lambda: database.execute(run) or (database.task(id) or {})["state"] == "WORK")
    database.wait(id, "WORK")
    answer = user.call(last)
    lock.execute("SELECT pg_advisory_unlock(7)")
    row = database.wait(id)
    assert (row["state"], row["key"], "ran to its end" in row["output"]) == ("DONE", None, True)
    assert database.tasks(f"parent = {id}") == []
    following = [row["id"] for row in keyed(database, "running")]
    assert following == ([answer] if "_schedule" in last else []) or (following, answer) == ([], False)


def test_schedules_of_one_key_at_the_same_time_are_one_row(user: User, database: Database) -> None:
    first = database.connect(user.conninfo, autocommit=False)
    first.execute("SELECT task_schedule('same', '@daily', 'SELECT 1')")
    second = database.connect(user.conninfo)
    thread = Thread(target=lambda: second.execute("SELECT task_schedule('same', '1 hour', 'SELECT 2')"))
    thread.start()
    query = "SELECT pid FROM pg_stat_activity WHERE pid = %s AND wait_event = 'advisory'"
    eventually(lambda: database.admin_execute(query, [second.info.backend_pid]))
    first.commit()
    thread.join(20)
    [row] = keyed(database, "same")
    assert (row["input"], row["repeat"], row["cron"]) == ("SELECT 2", HOUR, None)


def test_another_calendar_or_zone_sends_a_planned_row_back_to_be_planned(user: User, database: Database) -> None:
    listening = database.connect()
    [(oid,)] = listening.execute("SELECT 'task'::regclass::oid").fetchall()
    listening.execute(f"LISTEN pgtask_{oid}".encode())
    plan = database.execute("SELECT now() + '3 days'::interval")[0][0]
    later = plan + timedelta(days=9)
    for change, expected in (
        ("cron = '@hourly'", None),
        ("zone = 'Asia/Tokyo'", None),
        (f"cron = '@hourly', plan = '{later}'", later),
        ("cron = '@daily', zone = NULL", plan),
        ("cron = NULL", plan),
        ("data = 'x'", plan),
    ):
        id = database.insert("SELECT 1", plan=plan, first=plan, cron="@daily")
        user.session.execute(f"UPDATE task SET {change} WHERE id = {id}".encode())
        row = database.task(id) or {}
        user.session.execute(f"NOTIFY pgtask_{oid}, 'that was all'".encode())
        told = heard(listening)
        if expected == plan:
            assert (row["state"], row["plan"], row["first"], "wait" in told) == ("PLAN", plan, plan, False), change
        else:
            assert (row["state"], row["pid"], row["first"], "wait" in told) == ("WAIT", None, None, True), change
            assert row["plan"] == expected or (expected is None and row["plan"] < plan)
    plain = database.insert("SELECT 1", plan=plan)
    user.session.execute(f"UPDATE task SET cron = '@daily' WHERE id = {plain}".encode())
    row = database.task(plain) or {}
    assert (row["state"], row["plan"]) == ("WAIT", plan)


def heard(session: psycopg.Connection[Any]) -> list[str]:
    """The payloads that came before the last one."""
    payloads: list[str] = []
    while "that was all" not in payloads:
        payloads += [one.payload for one in session.notifies(timeout=20, stop_after=1)]
    return payloads


def test_user_may_not_forge_what_realigning_writes(user: User, database: Database) -> None:
    id = user.session.execute(
        "INSERT INTO task (input, plan) VALUES ('SELECT 1', '2100-01-01') RETURNING id"
    ).fetchall()
    for change in ("state = 'WAIT', first = now()", "state = 'WAIT', pid = 7", "first = now()", "state = 'WAIT'"):
        with pytest.raises(errors.InsufficientPrivilege):
            user.session.execute(f"UPDATE task SET {change} WHERE id = {id[0][0]}".encode())


def test_server_finds_wrong_in_an_expression_what_the_master_does(user: User) -> None:
    field = st.text(alphabet="0123456789,*/-#LW", min_size=1, max_size=4)
    names = st.sampled_from(["MON", "sun-sat", "JAN", "fri#2", "5L", "LW", "L", "*/15", "1-5", "5-1", "*", "0", "*,7"])
    word = st.one_of(field, names, names)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(word, min_size=4, max_size=7).map(" ".join) | st.sampled_from(["@daily", "@Hourly", "@x", "", " "]))
    def agree(expression: str) -> None:
        try:
            cron.first(expression, "UTC", datetime(2026, 1, 1, tzinfo=UTC))
            wrong = False
        except cron.Wrong as error:
            wrong = "never matches" not in str(error)
        assert (user.call("task_cron_error(%s)", expression) is not None) == wrong, expression

    agree()


def test_schedules_work_in_a_partitioned_table(database: Database) -> None:
    database.execute(
        "CREATE TABLE task (id bigint GENERATED BY DEFAULT AS IDENTITY, plan timestamptz NOT NULL)"
        " PARTITION BY RANGE (plan);"
        "CREATE TABLE task_far PARTITION OF task FOR VALUES FROM ('2090-01-01') TO (MAXVALUE);"
        "CREATE TABLE task_near PARTITION OF task DEFAULT"
    )
    install(database)
    user = User(database)
    id = user.call("task_schedule('one', '100 years', 'SELECT 1')")
    assert user.call("task_schedule('one', '@daily', 'SELECT 2')") == id
    [row] = keyed(database, "one")
    assert (row["state"], row["first"], row["input"], row["cron"]) == ("WAIT", None, "SELECT 2", "@daily")
    assert user.call("task_unschedule('one')") is True
    user.session.close()
    database.admin_execute(f'DROP OWNED BY "{user.name}"; DROP ROLE "{user.name}"')


def test_schedules_work_in_a_table_of_any_name(database: Database) -> None:
    schema, table = 'odd "schema', 'key {task} $pgtask$ "'
    database.execute('CREATE SCHEMA "odd ""schema"')
    install(database, schema, table)
    session = database.connect(row_factory=dict_row)
    name = '"odd ""schema"."key {task} $pgtask$ ""_%s"'
    for call in (name % "schedule" + "('k', '@daily', 'SELECT 1')", name % "schedule" + "('k', '1 h', 'SELECT 1')"):
        session.execute(f"SELECT {call}".encode())
    assert session.execute(f"SELECT {name % 'unschedule'}('k') AS ended".encode()).fetchall() == [{"ended": True}]
