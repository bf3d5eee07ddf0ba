"""Rows with a calendar: what follows a run, what becomes of those that nobody ran, and what ends it.

When a calendar comes round is tests/unit/test_cron.py's. Here a row is mostly given its `first`: it is planned already.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from pgtask import cron
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Run = Callable[..., dict[str, Any]]
SECOND = timedelta(seconds=1)


def now(database: Database) -> datetime:
    return database.execute("SELECT clock_timestamp()")[0][0]


def planned(database: Database, input: str, plan: datetime | str, **columns: Any) -> int:
    """A row as the scheduler leaves it, to be run at that moment."""
    return database.insert(input, plan=plan, first=plan, **{"delete": False, "max": 9} | columns)


def plans(rows: list[dict[str, Any]]) -> list[datetime]:
    return [row["plan"] for row in rows]


def chain(database: Database, id: int) -> list[dict[str, Any]]:
    """The row and those that came of it, missed ones too, by their plans."""
    query = """
        WITH RECURSIVE line AS (
            SELECT id FROM task WHERE id = %s UNION SELECT t.id FROM task t JOIN line l ON t.parent = l.id
        )
        SELECT * FROM task WHERE id IN (SELECT id FROM line) ORDER BY plan, id
    """
    return database.dicts(query, [id])


def stop(database: Database, id: int) -> None:
    """End it, whatever runs just now."""

    def ended() -> bool:
        states = {row["state"] for row in chain(database, id)}
        for row in chain(database, id):
            if row["state"] == "PLAN":
                database.execute("UPDATE task SET state = 'STOP' WHERE id = %s AND state = 'PLAN'", [row["id"]])
        return not states & {"PLAN", "TAKE", "WORK", "WAIT"}

    eventually(ended)


def test_calendar_of_every_second_runs_at_whole_seconds(served: Database) -> None:
    start = now(served).replace(microsecond=0) + SECOND
    id = planned(served, "SELECT 1", start, cron="* * * * * *", zone="Europe/Berlin")
    rows = eventually(
        lambda: (rows := [r for r in chain(served, id) if r["state"] == "DONE"]) and len(rows) > 2 and rows
    )
    stop(served, id)
    assert all(row["start"] >= row["plan"] for row in rows)
    noted = [row for row in chain(served, id) if row["plan"] <= rows[-1]["plan"]]
    assert plans(noted) == [start + number * SECOND for number in range(len(noted))]
    assert {row["first"] for row in noted} == {start}
    assert {(row["cron"], row["zone"]) for row in noted} == {("* * * * * *", "Europe/Berlin")}


def test_what_was_missed_becomes_one_late_run_and_each_is_noted(served: Database) -> None:
    plan = (now(served) - timedelta(days=2)).replace(minute=0, second=0, microsecond=0)
    id = planned(served, "SELECT 1", plan, cron="@hourly", zone="UTC", active="1 s")
    row = served.wait(id)
    assert (row["state"], row["output"]) == ("DONE", "1")
    *missed, following = eventually(lambda: len(rows := chain(served, id)[1:]) > 1 and rows)
    stop(served, id)
    assert plans(missed) == cron.between("@hourly", "UTC", plan, following["plan"], 100)
    assert len(missed) in (48, 49)
    said = {(r["state"], r["error"], r["parent"], r["start"], r["pid"], r["attempt"], r["first"]) for r in missed}
    assert said == {("GONE", "ERROR:  run missed", id, None, None, 0, plan)}
    assert all(r["stop"] >= row["start"] for r in missed)
    assert (following["plan"], following["first"]) == (cron.following("@hourly", "UTC", row["stop"]), plan)


@pytest.mark.parametrize(
    ("columns", "late"),
    [({"cron": "@hourly"}, timedelta(hours=5)), ({"cron": "0 0 29 2 *", "active": "1 s"}, timedelta(seconds=90))],
    ids=["another is due", "later than active"],
)
def test_missed_run_is_skipped_if_that_is_wanted(served: Database, columns: dict[str, Any], late: timedelta) -> None:
    served.execute("CREATE TABLE IF NOT EXISTS skipped (id int)")
    plan = now(served) - late
    id = planned(served, "INSERT INTO skipped VALUES (1)", plan, zone="UTC", missed="skip", group="skip", **columns)
    row = served.wait(id)
    rows = chain(served, id)
    stop(served, id)
    assert (row["state"], row["error"]) == ("GONE", "ERROR:  run missed")
    assert (row["start"], row["pid"], row["attempt"], row["code"]) == (None, None, 0, None)
    assert {r["state"] for r in rows[:-1]} == {"GONE"}
    assert plans(rows[1:-1]) == cron.between(columns["cron"], "UTC", plan, row["stop"], 100)
    assert (rows[-1]["plan"], rows[-1]["missed"]) == (cron.following(columns["cron"], "UTC", row["stop"]), "skip")
    assert served.execute("SELECT * FROM skipped") == []


def test_run_in_time_is_not_skipped_and_frees_its_group(served: Database) -> None:
    for _ in range(2):
        id = planned(served, "SELECT 1", now(served), cron="@yearly", missed="skip", group="in time", max=0)
        assert served.wait(id)["state"] == "DONE"
        stop(served, id)


def test_all_missed_runs_are_made_up_for_in_their_order(served: Database) -> None:
    plan = (now(served) - timedelta(hours=5)).replace(minute=0, second=0, microsecond=0)
    id = planned(served, "SELECT 1", plan, cron="@hourly", zone="UTC", missed="all", group="make up")
    *rows, following = eventually(lambda: (r := chain(served, id))[-1]["plan"] > now(served) and r)
    stop(served, id)
    assert {row["state"] for row in rows} == {"DONE"}
    assert plans(rows) == [plan, *cron.between("@hourly", "UTC", plan, following["plan"], 100)]
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)


def test_nothing_is_planned_or_missed_after_until(served: Database) -> None:
    plan = (now(served) - timedelta(hours=5)).replace(minute=0, second=0, microsecond=0)
    until = plan + timedelta(hours=2)
    for missed, states in (("once", ["DONE", "GONE", "GONE"]), ("skip", ["GONE"] * 3), ("all", ["DONE"] * 3)):
        id = planned(served, "SELECT 1", plan, cron="@hourly", zone="UTC", missed=missed, until=until)
        last = eventually(lambda id=id: len(rows := chain(served, id)) == 3 and rows[-1])
        served.wait(last["id"])
        assert [row["state"] for row in chain(served, id)] == states
        assert plans(chain(served, id)) == [plan, plan + timedelta(hours=1), until]


def test_of_very_many_missed_runs_the_last_are_noted_and_the_others_counted(served: Database) -> None:
    plan = now(served).replace(microsecond=0) - timedelta(days=400)
    for expression, said in (("* * * * * *", "10000 or more"), ("0 */12 * * *", None), ("0 */2 * * *", "3800")):
        id = planned(served, "SELECT 1", plan, cron=expression, zone="UTC", data=expression)
        row = served.wait(id)
        missed = eventually(lambda id=id: served.tasks(f"parent = {id} AND state = 'GONE'"))
        stop(served, id)
        assert len(missed) == 1000 or not said
        following = min(row["plan"] for row in served.tasks(f"parent = {id} AND state <> 'GONE'"))
        assert plans(missed) == cron.between(expression, "UTC", plan, following, len(missed))
        more = cron.count(expression, "UTC", plan, missed[0]["plan"], 10_000)
        number = f"{more} or more" if more == 10_000 else str(more)
        assert row["notice"] == (f"NOTICE:  {number} earlier runs were missed too" if more else None)
        assert bool(more) == bool(said)


@pytest.mark.parametrize(
    ("input", "columns", "state"),
    [
        ("SELECT 1/0", {}, "FAIL"),
        ("SELECT pg_sleep(60)", {"timeout": "50 ms"}, "FAIL"),
        ("COMMIT; SELECT 1", {}, "DONE"),
        ("SET search_path = nowhere; SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'", {"save": True}, "DONE"),
        ("SELECT 1", {"atomic": False, "batch": 9}, "DONE"),
        ("SELECT 1", {"remote": "nonsense"}, "FAIL"),
        ("VACUUM pg_class", {}, "DONE"),
        ("DEALLOCATE ALL", {}, "DONE"),
    ],
)
def test_calendar_goes_on_whatever_came_of_a_run(
    served: Database, input: str, columns: dict[str, Any], state: str
) -> None:
    id = planned(served, input, now(served), cron="@yearly", zone="America/New_York", **columns)
    row = served.wait(id)
    [following] = served.tasks(f"parent = {id}")
    stop(served, id)
    assert row["state"] == state
    assert following["plan"] == cron.following("@yearly", "America/New_York", row["stop"])


def test_silent_run_leaves_only_its_next_row(served: Database) -> None:
    id = planned(served, "SELECT 1 WHERE false", now(served), cron="@yearly", zone="UTC", delete=True)
    served.wait(id, gone=True)
    [following] = served.tasks(f"parent = {id}")
    stop(served, following["id"])


def test_run_that_was_lost_for_good_is_followed_too(database: Database, master: Callable[..., Master]) -> None:
    master("--crashes", "0", database.conninfo)
    plan = (now(database) - timedelta(hours=2)).replace(minute=0, second=0, microsecond=0)
    id = planned(database, "SELECT pg_terminate_backend(pg_backend_pid())", plan, cron="@hourly", zone="UTC")
    assert database.wait(id)["state"] == "FAIL"
    rows = eventually(lambda: len(rows := chain(database, id)) > 3 and rows)
    assert [row["state"] for row in rows[1:3]] == ["GONE", "GONE"]
    assert rows[-1]["plan"] > now(database)


def test_calendar_without_a_zone_is_in_that_of_the_server_whatever_a_task_sets(
    database: Database, master: Callable[..., Master]
) -> None:
    database.admin_execute(f"ALTER DATABASE {database.name} SET TimeZone = 'Australia/Lord_Howe'")
    master()
    database.wait(database.insert("SET TimeZone = 'America/New_York'", save=True, delete=False))
    id = planned(database, "SELECT 1", now(database), cron="30 12 * * *", save=True)
    database.wait(id)
    query = "SELECT to_char(plan AT TIME ZONE 'Australia/Lord_Howe', 'HH24:MI:SS') FROM task WHERE parent = %s"
    assert database.execute(query, [id]) == [("12:30:00",)]


def test_calendar_that_is_wrong_by_now_is_said_at_the_end_of_the_run(served: Database) -> None:
    for columns, message in (
        ({"cron": "0 25 * * *", "zone": "UTC"}, 'cron "0 25 * * *": bad hour "25"'),
        ({"cron": "@daily", "zone": "Mars/Phobos", "missed": "skip"}, 'zone "Mars/Phobos" is not known'),
    ):
        id = planned(served, "SELECT 1", now(served), **columns)
        row = served.wait(id)
        assert (row["state"], row["output"]) == ("DONE", "1")
        assert row["error"].startswith(f"ERROR:  the next row was refused\nERROR:  {message}")
        assert chain(served, id) == [row]


def test_refused_next_row_is_said_and_undoes_nothing(database: Database, master: Callable[..., Master]) -> None:
    master()
    database.execute("CREATE UNIQUE INDEX mine ON task (data); CREATE TABLE effect (a int)")
    plan = now(database) - timedelta(hours=3)
    id = planned(database, "INSERT INTO effect VALUES (1)", plan, cron="@hourly", zone="UTC", data="one")
    row = database.wait(id)
    assert row["state"] == "DONE"
    assert row["error"].startswith("ERROR:  the next row was refused\nERROR:  duplicate key value")
    assert (database.tasks(), database.execute("SELECT * FROM effect")) == ([row], [(1,)])


def test_calendar_that_is_taken_away_or_changed_during_the_run_is_not_followed(served: Database) -> None:
    for change, expected in (("cron = NULL", []), ("cron = '@weekly'", ["@weekly"])):
        with held(served):
            id = planned(served, WAIT, now(served), cron="@daily", zone="UTC")
            wait_runs(served)  # it has read its calendar by then
            served.execute(f"UPDATE task SET {change} WHERE id = %s", [id])
        assert served.wait(id)["state"] == "DONE"
        following = served.tasks(f"parent = {id}")
        assert [row["cron"] for row in following] == expected
        for row in following:
            assert row["first"] is None or row["first"] > (served.task(id) or {})["plan"]
        stop(served, id)


@pytest.mark.parametrize("missed", ["once", "skip", "all"])
@pytest.mark.parametrize(("plan", "until"), [("-infinity", None), ("4000-01-01 BC", "infinity")])
def test_plan_that_no_calendar_has_is_followed_as_well_as_can_be(
    served: Database, plan: str, until: str | None, missed: str
) -> None:
    group = f"{missed} {plan}"
    id = planned(served, "SELECT 1", plan, cron="@yearly", zone="UTC", missed=missed, until=until, group=group)
    query = """
        SELECT (SELECT state::text FROM task WHERE id = %(id)s), count(*) FILTER (WHERE state = 'GONE'),
            count(*) FILTER (WHERE state <> 'GONE')
        FROM task WHERE parent = %(id)s
    """
    expected = ("GONE" if missed == "skip" else "DONE", 0 if missed == "all" else 1000, 1)
    eventually(lambda: served.execute(query, {"id": id}) == [expected])
    eventually(lambda: not unfinished(served, group))
    assert served.wait(served.insert("SELECT 2", delete=False))["output"] == "2"


def unfinished(database: Database, group: str) -> list[Any]:
    """What runs just now; what is planned is removed, in a moment between two runs that follow at once."""
    database.execute(
        f"""
        BEGIN;
        LOCK TABLE task IN SHARE ROW EXCLUSIVE MODE;
        DELETE FROM task WHERE state = 'PLAN' AND "group" = '{group}';
        UPDATE task SET cron = NULL WHERE state IN ('TAKE', 'WORK') AND "group" = '{group}';
        COMMIT
        """
    )
    query = "SELECT id FROM task WHERE state IN ('PLAN', 'TAKE', 'WORK') AND \"group\" = %s"
    return database.execute(query, [group])


# With a key, and retried


def test_next_row_has_the_key_also_where_the_last_one_is_removed(served: Database) -> None:
    plan = (now(served) - timedelta(hours=2)).replace(minute=0, second=0, microsecond=0)
    for input, delete in (("SELECT 1 WHERE false", True), ("SELECT 1", False), ("SELECT 1/0", False)):
        key = f"{input} {delete}"
        id = planned(served, input, plan, cron="@hourly", zone="UTC", key=key, delete=delete)
        following = eventually(lambda id=id: served.tasks(f"parent = {id} AND state = 'PLAN'"))
        assert [(row["key"], row["error"]) for row in following] == [(key, None)]
        assert (served.task(id) is None) == delete
        missed = served.tasks(f"parent = {id} AND state = 'GONE'")
        assert plans(missed) == cron.between("@hourly", "UTC", plan, following[0]["plan"], 9)
        stop(served, following[0]["id"])


@pytest.mark.parametrize("missed", ["once", "skip"])
def test_run_that_is_retried_is_followed_once_and_from_its_first_plan(served: Database, missed: str) -> None:
    plan = now(served)
    id = planned(
        served, "SELECT 1/0", plan, cron="0 0 1 1 *", zone="UTC", missed=missed, retry=2, retry_on="*", backoff="10 ms"
    )
    row = eventually(lambda: (row := served.task(id) or {})["state"] == "FAIL" and row)
    assert [run["state"] for run in row["attempts"]] == ["FAIL", "FAIL"]
    [following] = served.tasks(f"parent = {id}")
    stop(served, following["id"])
    assert (following["plan"], following["first"]) == (cron.following("0 0 1 1 *", "UTC", plan), plan)
    assert (following["attempts"], following["retry"]) == (None, 2)


def test_runs_of_a_former_calendar_count_for_nothing(served: Database) -> None:
    plan = now(served) - timedelta(days=1)
    earlier = [{"attempt": 1, "plan": plan.isoformat(), "state": "FAIL", "retry": 1}]
    first = now(served) + timedelta(hours=1)
    id = served.insert(
        "SELECT 1", plan=first, first=first, attempts=Jsonb(earlier), cron="0 0 1 1 *", zone="UTC", delete=False
    )
    served.execute("UPDATE task SET cron = '0 */6 * * *' WHERE id = %s", [id])
    eventually(lambda: (served.task(id) or {})["first"] not in (None, first))
    served.execute("UPDATE task SET plan = clock_timestamp() WHERE id = %s", [id])
    served.wait(id, "DONE")
    rows = served.tasks(f"parent = {id}")
    stop(served, id)
    assert [row["state"] for row in rows] == ["PLAN"]
