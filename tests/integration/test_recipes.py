"""The recipes of docs/ do what they say, with a master that runs them."""

import re
from collections.abc import Iterator
from datetime import datetime, time, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.fixtures.database import Database
from tests.fixtures.docs import ROOT
from tests.fixtures.wait import eventually

RECIPES = ROOT / "docs/how-to/recipes.md"
BERLIN = ZoneInfo("Europe/Berlin")
SECOND = timedelta(seconds=1)

NOTE = "LANGUAGE sql AS $$ INSERT INTO effect VALUES ({}) $$;"
SETUP = "\n".join(
    [
        "CREATE TABLE effect (what text, id bigint GENERATED ALWAYS AS IDENTITY);",
        "CREATE TABLE payment (account int);",
        "CREATE TABLE outbox (account int);",
        *(
            f"CREATE FUNCTION {name}(int) RETURNS void " + NOTE.format(f"'{name} ' || $1")
            for name in ("recalculate", "index_document", "call_api")
        ),
        *(
            f"CREATE PROCEDURE {name}() " + NOTE.format(f"'{name}'")
            for name in ("close_day", "load", "transform", "publish", "total")
        ),
        "CREATE PROCEDURE part(int) " + NOTE.format("'part ' || $1"),
    ]
)


@pytest.fixture
def base(served: Database) -> Iterator[Database]:
    """Without a trace of what another recipe has left."""
    if not served.execute("SELECT to_regclass('effect')")[0][0]:
        served.execute(SETUP)
    yield served

    def quiet() -> bool:
        served.execute("UPDATE task SET state = 'STOP' WHERE state IN ('PLAN', 'WAIT')")
        return not served.tasks("state IN ('PLAN', 'WAIT', 'TAKE', 'WORK')")

    eventually(quiet)
    served.execute("DROP TRIGGER IF EXISTS payment_balance ON payment; DROP TRIGGER IF EXISTS payment_mail ON payment")
    served.execute("TRUNCATE effect, payment, outbox; DELETE FROM task")


def recipe(title: str) -> str:
    """Its SQL."""
    pattern = rf"^## {title}$.*?^```sql\n(.*?)^```"
    [text] = re.findall(pattern, RECIPES.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return str(text)


def effects(database: Database) -> list[str]:
    return [what for (what,) in database.execute("SELECT what FROM effect ORDER BY id")]


def only(database: Database, where: str) -> dict[str, Any]:
    [row] = database.tasks(where)
    return row


def waiting(database: Database, key: str) -> dict[str, Any]:
    """The row of a schedule, once it has its plan."""
    return eventually(lambda: next(iter(database.tasks(f"key = '{key}' AND state = 'PLAN' AND first IS NOT NULL")), {}))


def run_now(database: Database, key: str) -> dict[str, Any]:
    """The row of a schedule that was brought forward, when it has ended."""
    id = int(waiting(database, key)["id"])
    database.execute("UPDATE task SET plan = clock_timestamp() WHERE id = %s", [id])
    return database.wait(id)


def in_berlin(row: dict[str, Any]) -> datetime:
    plan: datetime = row["plan"]
    return plan.astimezone(BERLIN)


def test_each_subscriber_of_a_change_has_tasks_of_its_own(base: Database) -> None:
    base.execute(recipe("One change, several subscribers"))
    base.execute("INSERT INTO payment VALUES (7), (8), (7)")
    eventually(lambda: len(effects(base)) == 3 and len(base.execute("SELECT account FROM outbox")) == 3)
    assert sorted(effects(base)) == ["recalculate 7", "recalculate 7", "recalculate 8"]
    [mail] = base.tasks("\"group\" = 'mail'")
    assert base.wait(mail["id"])["output"] == "INSERT 0 3"


def test_debounce_moves_the_plan_with_each_change(base: Database) -> None:
    base.execute(recipe("Debounce"))
    before = only(base, "key = 'document 7'")
    base.execute(recipe("Debounce"))
    after = only(base, "key = 'document 7'")
    assert (after["id"], after["state"]) == (before["id"], "PLAN")
    assert after["plan"] > before["plan"]


def test_task_at_most_every_ten_seconds_stays_where_it_was_planned(base: Database) -> None:
    base.execute(recipe("At most every ten seconds"))
    before = only(base, "key = 'document 8'")
    base.execute(recipe("At most every ten seconds"))
    assert only(base, "key = 'document 8'")["plan"] == before["plan"]


def test_change_while_the_task_of_at_most_every_ten_seconds_runs_is_not_lost(base: Database) -> None:
    with base.connect(autocommit=False) as session:
        session.execute("LOCK TABLE effect")
        id = base.insert("SELECT index_document(8)", key="document 8")
        base.wait(id, "WORK")
        base.execute(recipe("At most every ten seconds"))
        session.rollback()
    row = base.wait(id, "PLAN")
    assert row["plan"] > base.execute("SELECT clock_timestamp()")[0][0]
    assert effects(base) == ["index_document 8"]


def test_nightly_batch_is_planned_by_the_clock_of_its_zone(base: Database) -> None:
    base.execute(recipe("A nightly batch in a time zone"))
    row = waiting(base, "close day")
    assert in_berlin(row).time() in (time(2, 30), time(3))
    assert row["plan"] > base.execute("SELECT clock_timestamp()")[0][0]
    assert run_now(base, "close day")["state"] == "DONE"
    assert effects(base) == ["close_day"]
    assert in_berlin(waiting(base, "close day")).time() in (time(2, 30), time(3))


def test_queue_with_a_rate_limit_rests_between_two_calls(base: Database) -> None:
    base.execute("SET pg_task.delete = false")
    base.execute(recipe("A queue with a rate limit"))
    base.execute("RESET pg_task.delete")
    rows = [base.wait(row["id"]) for row in base.tasks("\"group\" = 'api'")]
    assert effects(base) == ["call_api 1", "call_api 2", "call_api 3"]
    rests = [after["start"] - before["stop"] for before, after in pairwise(rows)]
    assert min(rests) >= SECOND / 5


def test_chain_runs_in_its_order(base: Database) -> None:
    [(last,)] = base.execute(recipe("A chain"))
    assert base.wait(last)["state"] == "DONE"
    assert effects(base) == ["load", "transform", "publish"]


def test_chain_ends_at_the_first_that_fails(base: Database) -> None:
    base.execute("ALTER PROCEDURE transform() RENAME TO transform_")
    [(last,)] = base.execute(recipe("A chain"))
    row = base.wait(last)
    base.execute("ALTER PROCEDURE transform_() RENAME TO transform")
    failed = only(base, "state = 'FAIL'")
    assert row["state"] == "GONE"
    assert str(failed["id"]) in row["error"]
    assert effects(base) == ["load"]


def test_total_comes_after_all_its_parts(base: Database) -> None:
    [(total,)] = base.execute(recipe("Fan-in"))
    assert base.wait(total)["state"] == "DONE"
    assert sorted(effects(base)) == [*(f"part {n}" for n in range(1, 9)), "total"]
    assert effects(base)[-1] == "total"


def test_vacuum_at_night_really_vacuums(base: Database) -> None:
    base.execute(recipe("VACUUM at night"))
    for table in ("payment", "outbox"):
        assert in_berlin(waiting(base, f"vacuum {table}")).time() == time(3)
        row = run_now(base, f"vacuum {table}")
        assert (row["state"], row["output"]) == ("DONE", "VACUUM")
    vacuumed = "SELECT FROM pg_stat_user_tables WHERE vacuum_count > 0 AND relname IN ('payment', 'outbox')"
    eventually(lambda: base.execute(f"SELECT count(*) FROM ({vacuumed}) AS v")[0][0] == 2)


def test_report_comes_on_weekdays_and_stays_to_be_read(base: Database) -> None:
    base.execute("INSERT INTO payment VALUES (7), (8), (7)")
    script = recipe("A report every weekday")
    base.execute(script)
    planned = in_berlin(waiting(base, "daily report"))
    assert (planned.time(), planned.weekday() < 5) == (time(8), True)
    run_now(base, "daily report")
    [(_, output, error)] = base.execute(script[script.index("-- the last five") :])
    assert (output, error) == ("account\tcount\n7\t2\n8\t1", None)
    following = in_berlin(waiting(base, "daily report"))
    assert (following.time(), following.weekday() < 5) == (time(8), True)
