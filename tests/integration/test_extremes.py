"""No value that a row may hold stops the table: beside each one a usual task still runs.

The extreme rows stay where they are while the next ones come, and at the end they all come at once.
"""

from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Serving = tuple[Database, Master]
BIG = 2**31 - 1
LONG = "ä" * 500_000
ODD = "'\"\\;\n\r\t\x01\x7f{task} %s $1 $$ -- /* \U0001f600 \u202e"
RUN = ("DONE",)
FAILED = ("FAIL",)
GONE = ("GONE",)
PLANNED = ("PLAN",)
ANY = ("DONE", "FAIL")


def char(code: int) -> sql.Composable:
    return sql.SQL('({})::int::"char"').format(code)


EXTREMES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"id": -(2**63)}, RUN),
    ({"id": 2**63 - 1}, RUN),
    ({"id": 0}, RUN),
    ({"parent": -(2**63)}, RUN),
    ({"parent": 2**63 - 1}, RUN),
    ({"plan": "-infinity"}, GONE),
    ({"plan": "-infinity", "active": "178000000 years"}, GONE),
    ({"plan": "-infinity", "max": -1}, RUN),
    ({"plan": "-infinity", "repeat": "178000000 years"}, RUN),
    ({"plan": "infinity"}, PLANNED),
    ({"plan": "4714-11-24 00:00:00+00 BC"}, GONE),
    ({"plan": "4714-11-24 00:00:00+00 BC", "active": "178000000 years"}, RUN),
    ({"plan": "294276-12-31 23:59:59.999999+00"}, PLANNED),
    ({"plan": "294276-12-31 23:59:59.999999+00", "active": "178000000 years", "repeat": "178000000 years"}, PLANNED),
    ({"start": "-infinity", "stop": "infinity"}, RUN),
    ({"start": "infinity", "stop": "-infinity"}, RUN),
    ({"active": "1 us", "plan": sql.SQL("clock_timestamp() - interval '1 s'")}, GONE),
    ({"active": "1 us", "max": -1}, RUN),
    ({"active": "178000000 years"}, RUN),
    ({"active": "2147483647 months"}, RUN),
    ({"active": "2147483647 months 2147483647 days"}, RUN),
    ({"active": "-12 months 361 days"}, ("DONE", "GONE")),
    ({"live": "1 us"}, RUN),
    ({"live": "178000000 years"}, RUN),
    ({"live": "1 month -30 days"}, RUN),
    ({"repeat": "178000000 years"}, RUN),
    ({"repeat": "178000000 years", "drift": True}, RUN),
    ({"repeat": "2147483647 days"}, RUN),
    ({"repeat": "-12 months 361 days"}, RUN),
    ({"repeat": "1 month -30 days"}, RUN),
    ({"repeat": "2562047788 hours"}, RUN),
    ({"repeat": "200000 years", "plan": "4714-11-24 00:00:00+00 BC"}, RUN),
    ({"timeout": "1 us"}, ANY),
    ({"timeout": "0.9 ms"}, ANY),
    ({"timeout": "178000000 years"}, RUN),
    ({"timeout": "2147483647 months"}, RUN),
    ({"timeout": "2147483.648 s"}, RUN),
    ({"timeout": "1 month -30 days"}, RUN),
    ({"count": BIG}, RUN),
    ({"count": 1}, RUN),
    ({"max": BIG}, RUN),
    ({"max": BIG - 1}, RUN),
    ({"max": -BIG - 1}, RUN),
    ({"max": -1}, RUN),
    ({"pid": BIG}, RUN),
    ({"pid": -BIG - 1}, RUN),
    ({"pid": 0}, RUN),
    ({"state": "WAIT"}, ("WAIT",)),
    ({"state": "STOP"}, ("STOP",)),
    ({"state": "GONE"}, GONE),
    *(
        ({name: char(code), "header": False}, ANY)
        for name in ("delimiter", "escape", "quote")
        for code in (0, 10, -1, -128)
    ),
    ({"delimiter": "\\", "escape": "\\", "quote": "\\"}, RUN),
    *(({name: value}, RUN) for name in ("data", "null") for value in ("", LONG, ODD)),
    *(({name: value}, RUN) for name in ("error", "output", "code", "notice") for value in ("", LONG, ODD)),
    ({"error": "LOST:  " * 1000}, RUN),
    *(({"group": value}, RUN) for value in ("", " ", LONG, ODD, "x" * 63, "日" * 64, "(1 tables, 3 workers)")),
    ({"input": ""}, RUN),
    ({"input": ODD}, FAILED),
    ({"input": "SELECT '" + LONG + "'"}, RUN),
    ({"input": "(" * 100_000}, FAILED),
    ({"input": "SELECT " + "+".join(["1"] * 200_000)}, FAILED),
    ({"remote": ""}, FAILED),
    ({"remote": ODD}, FAILED),
    ({"remote": LONG}, FAILED),
    ({"remote": "password=x host=/nowhere", "timeout": "5 s"}, FAILED),
    ({"remote": "postgresql://x:y@[::1]:1/z", "timeout": "5 s"}, FAILED),
    ({"attempt": BIG}, RUN),
    ({"attempt": BIG - 1}, RUN),
    ({"first": "infinity", "repeat": "1 year"}, RUN),
    ({"first": "-infinity", "repeat": "1 year"}, RUN),
    ({"first": "4714-11-24 00:00:00+00 BC", "repeat": "7000 years"}, RUN),
    ({"first": "294276-12-31 00:00:00+00", "repeat": "1 us", "max": -1000}, RUN),
]
INFINITE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"active": "infinity"}, RUN),
    ({"active": "infinity", "plan": "-infinity"}, ("DONE", "GONE")),
    ({"live": "infinity"}, RUN),
    ({"repeat": "infinity"}, RUN),
    ({"repeat": "infinity", "drift": True}, RUN),
    ({"repeat": "infinity", "plan": "-infinity"}, RUN),
    ({"timeout": "infinity"}, RUN),
]
"""Intervals that PostgreSQL has from version 17 on."""

MISHAPS = r"table_down|begin_failed|finish_failed|worker_ended.* ERROR |run_lost|repeat_refused|session_lost"
"""What the log must not have: a mishap that mended itself is one too."""


def label(value: object) -> str:
    return repr(value)[:60] if isinstance(value, dict) else ""


def state(database: Database, id: int) -> str:
    return database.execute("SELECT state::text FROM task WHERE id = %s", [id])[0][0]


def check(serving: Serving, columns: dict[str, Any], expected: tuple[str, ...], group: str) -> None:
    """The row comes to what it should, and the usual task of its own group and of another one are run."""
    database, master = serving
    values = {"input": "SELECT 'a\"b' AS x, 1 AS y, NULL AS z", "group": group, "delete": False} | columns
    input = values.pop("input")
    id = database.insert(input, **values)
    usual = [database.insert("SELECT 1", delete=False, group=name) for name in ("usual", f"{group} too")]
    for one in usual:
        assert database.wait(one)["output"] == "1"
    eventually(lambda: state(database, id) in expected)
    if expected != PLANNED and values["group"] == group and not columns.get("max", 0) < 0:
        beside = database.insert("SELECT 2", delete=False, group=group)
        assert database.wait(beside)["output"] == "2"
    assert master.logged(MISHAPS) == []
    database.execute("DELETE FROM task WHERE state = 'PLAN' AND isfinite(plan) AND repeat > '0'")


@pytest.mark.parametrize(("columns", "expected"), EXTREMES, ids=label)
def test_extreme_value_stops_nothing(
    serving: Serving, request: pytest.FixtureRequest, columns: dict[str, Any], expected: tuple[str, ...]
) -> None:
    check(serving, columns, expected, request.node.name[:100])


@pytest.mark.parametrize(("columns", "expected"), INFINITE, ids=label)
def test_infinite_interval_stops_nothing(
    serving: Serving, request: pytest.FixtureRequest, columns: dict[str, Any], expected: tuple[str, ...]
) -> None:
    database, _ = serving
    if database.connect().info.server_version < 170000:
        with pytest.raises(psycopg.errors.InvalidDatetimeFormat):
            database.insert("SELECT 1", **columns)
        return
    check(serving, columns, expected, request.node.name[:100])


def test_extreme_row_is_taken_after_a_usual_one_of_its_group(serving: Serving) -> None:
    """Then it is the worker that takes it, together with its finish of the other."""
    database, master = serving
    for number, (columns, expected) in enumerate(EXTREMES):
        if "group" in columns or "id" in columns or expected == PLANNED:
            continue
        group = f"after {number}"
        values = {"input": "SELECT 'a\"b' AS x, 1 AS y", "group": group, "delete": False} | columns
        query = sql.SQL(
            'WITH usual AS (INSERT INTO task (input, "group", delete, max, plan)'
            " VALUES ('SELECT 1', {}, false, {}, '-infinity')),"
            " odd AS (INSERT INTO task ({}) VALUES ({}) RETURNING id) SELECT id FROM odd"
        ).format(
            group,
            1 if columns.get("max", 0) == BIG else 0,
            sql.SQL(", ").join(map(sql.Identifier, values)),
            sql.SQL(", ").join(v if isinstance(v, sql.Composable) else sql.Literal(v) for v in values.values()),
        )
        [(id,)] = database.execute(query)
        eventually(lambda id=id, expected=expected: state(database, id) in expected)
        last = database.insert("SELECT 2", delete=False, group=group + " last")
        assert database.wait(last)["output"] == "2"
    assert master.logged(MISHAPS) == []
    database.execute("DELETE FROM task WHERE state = 'PLAN' AND isfinite(plan) AND repeat > '0'")


def test_all_at_once_stop_nothing(serving: Serving) -> None:
    database, master = serving
    ids = {}
    with database.connect() as session, session.transaction():
        for number, (columns, expected) in enumerate(EXTREMES):
            if "id" in columns:
                continue
            values = {"input": "SELECT 1 AS x, 2 AS y", "group": f"at once {number % 7}", "delete": False} | columns
            query = sql.SQL("INSERT INTO task ({}) VALUES ({}) RETURNING id").format(
                sql.SQL(", ").join(map(sql.Identifier, values)),
                sql.SQL(", ").join(v if isinstance(v, sql.Composable) else sql.Literal(v) for v in values.values()),
            )
            if values.get("max", 0) < -1:
                continue
            ids[session.execute(query).fetchall()[0][0]] = expected
    for id, expected in ids.items():
        eventually(lambda id=id, expected=expected: state(database, id) in expected)
    assert database.wait(database.insert("SELECT 3", delete=False))["output"] == "3"
    assert master.logged(MISHAPS) == []
    database.execute("DELETE FROM task WHERE state = 'PLAN' AND isfinite(plan) AND repeat > '0'")


def test_row_that_nobody_can_begin_does_not_keep_the_one_before_it(serving: Serving) -> None:
    """A trigger of the user's refuses it. Neither the finish that would take it next nor other groups may suffer."""
    database, _ = serving
    database.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not this one''; END';
        CREATE TRIGGER refuse BEFORE UPDATE ON task FOR EACH ROW
            WHEN (NEW.data = 'poison' AND NEW.state = 'WORK') EXECUTE FUNCTION refuse()
        """
    )
    with held(database):
        before = database.insert(WAIT, group="refused", delete=False)
        database.wait(before, "WORK")
        poison = database.insert("SELECT 2", group="refused", data="poison", delete=False)
    assert database.wait(before)["state"] == "DONE"
    assert database.wait(database.insert("SELECT 1", group="usual", delete=False))["output"] == "1"
    database.execute("DROP TRIGGER refuse ON task")
    assert database.wait(poison)["output"] == "2"


@pytest.mark.parametrize("id", [-5, -(2**63) + 1, 2**63 - 2])
def test_running_task_with_an_extreme_id_can_be_stopped_and_deleted(serving: Serving, id: int) -> None:
    database, _ = serving
    for end in ("UPDATE task SET state = 'STOP' WHERE id = %s", "DELETE FROM task WHERE id = %s"):
        database.execute("DELETE FROM task WHERE id = %s", [id])
        database.insert("SELECT pg_sleep(30)", id=id, group="stop", delete=False)
        database.wait(id, "WORK")
        database.execute(end, [id])
        running = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pgtask public task stop %'"
        eventually(lambda running=running: not database.execute(running))
        assert database.wait(database.insert("SELECT 1", group="stop", delete=False))["output"] == "1"


def test_many_far_plans_do_not_keep_the_next_one_waiting(serving: Serving) -> None:
    database, _ = serving
    database.execute("INSERT INTO task (input, plan) SELECT 'SELECT 1', 'infinity' FROM generate_series(1, 1000)")
    database.execute("INSERT INTO task (input, plan) SELECT 'SELECT 1', '294276-01-01' FROM generate_series(1, 1000)")
    id = database.insert("SELECT 1", plan=sql.SQL("clock_timestamp() + interval '200 ms'"), delete=False)
    row = database.wait(id)
    assert (row["start"] - row["plan"]).total_seconds() < 20
