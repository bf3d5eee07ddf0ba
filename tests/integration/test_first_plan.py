"""A row with a calendar from its INSERT on: the master finds its first plan, or says at once why there is none."""

from datetime import datetime, timedelta

import psycopg
import pytest

from pgtask import cron
from tests.fixtures.database import Database
from tests.fixtures.wait import eventually


def plan_of(database: Database, id: int) -> datetime:
    return database.wait(id, "PLAN")["plan"]


def test_first_plan_is_the_first_match_at_or_after_the_plan(served: Database) -> None:
    at = datetime.fromisoformat("2090-03-26T01:00:00Z")  # 02:00 in Berlin, when the clock leaps to 03:00
    for expression, plan in (
        ("30 2 * * *", at),
        ("0 3 * * *", at),
        ("0 3 * * *", at + timedelta(microseconds=1)),
        ("@monthly", at),
        ("*/7 * * * * *", at + timedelta(microseconds=1)),
    ):
        id = served.insert("SELECT 1", plan=plan, cron=expression, zone="Europe/Berlin")
        assert plan_of(served, id) == cron.first(expression, "Europe/Berlin", plan), expression
        served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])


def test_calendar_runs_from_its_insert_on(served: Database) -> None:
    id = served.insert("SELECT 1", cron="* * * * * *", group="from insert", delete=False)
    query = "\"group\" = 'from insert' AND state = 'DONE'"
    rows = eventually(lambda: (rows := served.tasks(query)) and len(rows) > 2 and rows)
    eventually(lambda: unfinished(served, "from insert"))
    assert rows[0]["id"] == id
    assert all(row["plan"].microsecond == 0 and row["start"] >= row["plan"] for row in rows)


def unfinished(database: Database, group: str) -> bool:
    """Is nothing left of it? What is planned is removed."""
    database.execute("DELETE FROM task WHERE state = 'PLAN' AND \"group\" = %s", [group])
    query = "SELECT id FROM task WHERE state IN ('PLAN', 'TAKE', 'WORK', 'WAIT') AND \"group\" = %s"
    return not database.execute(query, [group])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"cron": "61 * * * *"}, 'cron "61 * * * *": bad minute "61"'),
        ({"cron": "0 0 * FEBRUARY *"}, 'bad month "FEBRUARY"'),
        ({"cron": "every day"}, "has 2 fields, and must have five or six"),
        ({"cron": "0 0 30 2 *"}, "never matches"),
        ({"cron": "@daily", "zone": "Europe/Berlyn"}, 'zone "Europe/Berlyn" is not known'),
    ],
)
def test_calendar_that_is_none_fails_at_once(served: Database, columns: dict[str, str], message: str) -> None:
    row = served.wait(served.insert("SELECT 1", plan="2090-01-01", **columns))
    assert (row["state"], row["code"], row["start"], row["attempt"]) == ("FAIL", "22023", None, 0)
    assert message in row["error"]


@pytest.mark.parametrize(
    "columns",
    [
        {"until": "2090-01-01 12:00Z", "plan": "2090-01-01 11:00Z"},
        {"plan": "-infinity"},
        {"plan": "infinity"},
        {"plan": "294276-01-01"},
        {"plan": "4713-01-01 BC"},
        {"cron": "* " * 400},
        {"cron": "@daily", "zone": "z" * 5000},
    ],
    ids=str,
)
def test_row_without_a_first_plan_stops_nobody_else(served: Database, columns: dict[str, str]) -> None:
    id = served.insert("SELECT 1", **{"cron": "0 0 1 6 *", "zone": "UTC", "group": "odd", "delete": False} | columns)
    assert served.wait(served.insert("SELECT 2", delete=False))["output"] == "2"
    query = "SELECT state::text FROM task WHERE id = %s"
    state = eventually(lambda: (found := served.execute(query, [id])[0][0]) != "WAIT" and found)
    if "until" in columns:
        assert (state, (served.task(id) or {})["code"]) == ("FAIL", "22023")
    eventually(lambda: unfinished(served, "odd"))


def test_another_calendar_plans_a_row_anew(served: Database) -> None:
    id = served.insert("SELECT 1", plan="2090-01-01", cron="@yearly", zone="UTC")
    assert plan_of(served, id).year == 2090
    served.execute("UPDATE task SET cron = '@hourly' WHERE id = %s", [id])
    now = served.execute("SELECT clock_timestamp()")[0][0]
    eventually(lambda: (row := served.task(id) or {})["state"] == "PLAN" and row["plan"] <= now + timedelta(hours=1))
    served.execute("UPDATE task SET cron = '@never' WHERE id = %s", [id])
    assert "is none of" in served.wait(id, "FAIL")["error"]


def test_calendar_that_was_none_can_be_mended_and_put_back(served: Database) -> None:
    name = f"{served.name}_user"
    served.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    served.execute(f'GRANT SELECT, INSERT, UPDATE ON task TO "{name}"')
    with psycopg.connect(served.server.conninfo(served.name, name), autocommit=True) as user:
        id = served.insert("SELECT 1", cron="0 0 30 2 *", zone="UTC", until="2090-01-01")
        assert "never matches" in served.wait(id, "FAIL")["error"]
        user.execute("UPDATE task SET cron = '0 0 29 2 *' WHERE id = %s", [id])
        assert user.execute("SELECT task_retry(%s)", [id]).fetchall() == [(True,)]
        plan = plan_of(served, id)
        assert (plan.month, plan.day, plan.hour) == (2, 29, 0)
        assert user.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id]).rowcount == 1
    served.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')
