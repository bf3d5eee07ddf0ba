"""Runs once more: after errors that are worth it, when a task asks for it, and by hand."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import RawCursor

from pgtask.objects import Names
from tests.fixtures.database import Database, create, drop
from tests.fixtures.locks import held, wait_runs
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually
from tests.integration.test_repeat import install

Run = Callable[..., dict[str, Any]]

FAILS = """CREATE FUNCTION fails(times int, code text DEFAULT '22012') RETURNS text LANGUAGE plpgsql AS $$ BEGIN
    IF (SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint) <= times THEN
        RAISE EXCEPTION USING MESSAGE = 'not yet', ERRCODE = code;
    END IF;
    RETURN 'at last';
END $$"""


@pytest.fixture(autouse=True, scope="module")
def functions(serving: tuple[Database, Any]) -> None:
    serving[0].execute(FAILS)


# A master's


def test_failed_task_runs_again_after_pauses_that_double_until_it_is_done(run: Run) -> None:
    row = run("SELECT fails(3)", retry=5, backoff="100 ms", group="doubles", delete=True)
    assert (row["state"], row["attempt"], row["output"], row["error"]) == ("DONE", 4, "at last", None)
    notes = row["attempts"]
    assert [(note["attempt"], note["state"], note["code"], note["retry"]) for note in notes] == [
        (number, "FAIL", "22012", number) for number in (1, 2, 3)
    ]
    assert all("not yet" in note["error"] for note in notes)
    plans = [datetime.fromisoformat(note["plan"]) for note in notes] + [row["plan"]]
    stops = [datetime.fromisoformat(note["stop"]) for note in notes]
    for number, (stop, plan) in enumerate(zip(stops, plans[1:], strict=True)):
        pause = timedelta(seconds=0.1 * 2**number)
        assert 0.8 * pause <= plan - stop <= 1.2 * pause + timedelta(seconds=20)
    starts = [datetime.fromisoformat(note["start"]) for note in notes] + [row["start"]]
    assert all(start >= plan for start, plan in zip(starts, plans, strict=True))


def test_task_that_fails_to_the_end_has_the_error_of_its_last_run(run: Run) -> None:
    row = run("SELECT 'try ' || fails(9)", retry=2, backoff="1 ms", group="hopeless")
    assert (row["state"], row["attempt"], row["code"]) == ("FAIL", 3, "22012")
    assert [note["attempt"] for note in row["attempts"]] == [1, 2]
    assert "not yet" in row["error"]


def test_error_that_is_not_worth_it_ends_the_task(run: Run) -> None:
    row = run("SELECT nothing_like_it()", retry=5, backoff="1 ms", group="hopeless")
    assert (row["state"], row["attempt"], row["attempts"]) == ("FAIL", 1, None)


def test_error_stays_to_be_seen_while_the_task_waits_for_its_retry(served: Database) -> None:
    id = served.insert("SELECT fails(1)", retry=1, backoff="1 hour", group="seen")
    row = eventually(lambda: (found := served.task(id)) and found["attempts"] and found)
    assert (row["state"], row["code"], row["pid"], row["start"], row["stop"]) == ("PLAN", "22012", None, None, None)
    assert "not yet" in row["error"]
    served.execute("UPDATE task SET plan = now() WHERE id = %s", [id])
    assert served.wait(id)["state"] == "DONE"


def test_lost_connection_of_a_remote_task_is_worth_it_whatever_retry_on_says(served: Database, run: Run) -> None:
    remote = f"{served.tcp} port=1"
    row = run("SELECT 1", retry=1, backoff="1 ms", retry_on="!*", remote=remote, group="far")
    assert (row["state"], row["attempt"], row["code"]) == ("FAIL", 2, "08001")


def test_one_of_those_that_share_a_transaction_fails_and_runs_again_alone(served: Database) -> None:
    columns: dict[str, Any] = {"group": "together", "batch": 10, "delete": False, "retry": 1, "backoff": "1 ms"}
    with held(served):
        first = served.insert("SELECT pg_advisory_xact_lock_shared(7000)", **columns | {"batch": 1})
        wait_runs(served)
        ids = [served.insert(f"SELECT fails({int(number == 2)})", **columns) for number in range(5)]
    rows = [served.wait(id) for id in (first, *ids)]
    assert [(row["state"], row["attempt"]) for row in rows] == [("DONE", 1 + (n == 3)) for n in range(6)]
    assert [bool(row["attempts"]) for row in rows] == [n == 3 for n in range(6)]


def test_repeated_task_is_planned_on_when_its_retries_have_ended(served: Database) -> None:
    id = served.insert("SELECT fails(2)", repeat="1 hour", retry=2, backoff="10 ms", group="grid", delete=False)
    row = served.wait(id)
    assert row["state"] == "DONE"
    [following] = served.tasks(f"parent = {id}")
    first = datetime.fromisoformat(row["attempts"][0]["plan"])
    assert (following["plan"], following["attempts"], following["attempt"]) == (first + timedelta(hours=1), None, 0)


@pytest.mark.parametrize("retry_on", ["* !0A !42", "", "40, 08P01", "!*", "*,!22012", " 0a , !0aXYZ "])
def test_words_of_retry_on_are_taken(served: Database, retry_on: str) -> None:
    served.insert("SELECT 1", retry_on=retry_on, plan="9999-01-01")


@pytest.mark.parametrize(
    "retry_on", ["nonsense", "4", "40 0", "!", "* !", "**", "40;42", "4000", "!!40", "40!42", "40*"]
)
def test_nonsense_in_retry_on_is_refused(served: Database, retry_on: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="retry_on") as refused:
        served.insert("SELECT 1", retry_on=retry_on, plan="9999-01-01")
    assert refused.value.diag.message_hint
    id = served.insert("SELECT 1", plan="9999-01-01")
    with pytest.raises(psycopg.errors.CheckViolation, match="retry_on"):
        served.execute("UPDATE task SET retry_on = %s WHERE id = %s", [retry_on, id])


def test_nonsense_that_comes_into_a_running_row_holds_up_nothing(served: Database) -> None:
    with held(served):
        id = served.insert(
            "SELECT pg_advisory_xact_lock_shared(7000); SELECT fails(1)",
            retry=1,
            backoff="1 ms",
            group="sly",
            key="sly",
        )
        wait_runs(served)
        served.execute("UPDATE task SET retry_on = '*, 22012 or so', plan = now() WHERE id = %s", [id])
    assert served.wait(id, "DONE")["attempt"] == 2


# Which errors, and when: one statement, on a table that nobody serves


class Table:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.session = database.connect()
        self.session.execute("SET search_path TO pg_catalog, pg_temp")
        self.settle = Names(schema="public", table="task").store().text("settle").encode()

    def fail(self, id: int, code: str | None = "22012") -> dict[str, Any]:
        """The row after a run that has just ended so."""
        begin = "UPDATE task SET state = 'WORK', pid = 1, start = greatest(now(), plan), attempt = attempt + 1"
        self.database.execute(f"{begin} WHERE id = %s", [id])
        row = self.database.task(id)
        assert row
        values = (
            [id],
            [row["attempt"]],
            ["FAIL"],
            [None],
            [None],
            [None],
            ["ERROR:  no"],
            [code],
            [None],
            [row["plan"]],
        )
        RawCursor(self.session).execute(self.settle, [1, 1, *values])
        row = self.database.task(id)
        assert row
        return row


@pytest.fixture(scope="module")
def table(server: AnyServer) -> Iterator[Table]:
    name = f"test_{secrets.token_hex(6)}"
    database = Database(server, name, name)
    create(database)
    asyncio.run(install(database.conninfo))
    one = Table(database)
    yield one
    database.close()
    drop(database)


@pytest.mark.parametrize(
    ("retry_on", "code", "again"),
    [
        *[("!*", code, True) for code in ("08006", "40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03")],
        *[("", code, True) for code in ("08000", "40001")],
        *[("* !0A !42", code, code[:2] not in ("0A", "42")) for code in ("22012", "0A000", "42601", "57014", "P0001")],
        ("* !0A !42", None, True),
        ("22", None, False),
        ("", "22012", False),
        ("22", "22012", True),
        ("22", "23505", False),
        ("* !22 22012", "22012", True),
        ("* !22 22012", "22003", False),
        ("22,!22012", "22012", False),
        ("!22012 22", "22003", True),
        ("22 !22", "22012", False),
        ("p0001", "P0001", True),
    ],
)
def test_longest_word_that_fits_decides(table: Table, retry_on: str, code: str | None, again: bool) -> None:
    id = table.database.insert("SELECT 1", retry=1, retry_on=retry_on)
    assert table.fail(id, code)["state"] == ("PLAN" if again else "FAIL")


@pytest.mark.parametrize("retry", [0, 1, 3])
def test_there_are_as_many_retries_as_the_row_says(table: Table, retry: int) -> None:
    id = table.database.insert("SELECT 1", retry=retry)
    states = [table.fail(id)["state"] for _ in range(retry + 1)]
    assert states == ["PLAN"] * retry + ["FAIL"]


def test_first_and_last_attempts_are_kept_and_retries_counted_on(table: Table) -> None:
    id = table.database.insert("SELECT 1", retry=105, backoff="0")
    rows = [table.fail(id) for _ in range(106)]
    assert [row["state"] for row in rows] == ["PLAN"] * 105 + ["FAIL"]
    assert [note["attempt"] for note in rows[-1]["attempts"]] == [1, *range(7, 106)]


def test_pauses_double(table: Table) -> None:
    id = table.database.insert("SELECT 1", retry=3, backoff="5 min")
    for number in range(3):
        row = table.fail(id)
        pause = timedelta(minutes=5 * 2**number)
        waits = row["plan"] - datetime.fromisoformat(row["attempts"][-1]["stop"])
        assert 0.8 * pause <= waits <= 1.2 * pause + timedelta(seconds=20)


@pytest.mark.parametrize("backoff", ["1 hour", "2 years", "178000000 years"])
@pytest.mark.parametrize(
    "attempts", ['[{"retry": 5}]', '[{"retry": 1e300}]', "{}", "[]", '"x"', '[{"retry": "x"}]', None]
)
def test_pause_is_an_hour_at_most_whatever_the_row_says(table: Table, backoff: str, attempts: str | None) -> None:
    id = table.database.insert("SELECT 1", retry=2147483647, backoff=backoff, attempts=attempts)
    row = table.fail(id)
    pause = row["plan"] - datetime.fromisoformat(row["attempts"][-1]["stop"])
    assert timedelta(minutes=47) < pause <= timedelta(minutes=60, seconds=20)


# task_again


def test_task_that_asks_for_it_runs_again(served: Database, run: Run) -> None:
    row = run(
        """SELECT task_again('50 ms') FROM task
        WHERE id = current_setting('pg_task.id')::bigint AND attempt < 3""",
        group="again",
    )
    row = served.wait(row["id"])
    assert (row["state"], row["attempt"]) == ("DONE", 3)
    assert [note["state"] for note in row["attempts"]] == ["DONE", "DONE"]
    start, stop = (datetime.fromisoformat(row["attempts"][1][name]) for name in ("start", "stop"))
    assert start <= row["plan"] - timedelta(milliseconds=50) <= stop


def test_task_that_asks_and_then_fails_has_asked_for_nothing(run: Run) -> None:
    row = run("SELECT task_again(); SELECT 1/0", group="again")
    assert (row["state"], row["attempt"], row["attempts"]) == ("FAIL", 1, None)


def test_task_that_may_only_update_the_table_can_ask(served: Database, run: Run) -> None:
    role = f"{served.name}_asks"
    served.admin_execute(f'CREATE ROLE "{role}"; GRANT "{role}" TO "{served.user}"')
    served.execute(f'GRANT SELECT, UPDATE ON task TO "{role}"')
    try:
        again = "SELECT task_again() FROM task WHERE id = current_setting('pg_task.id')::bigint AND attempt < 2"
        row = run(f'SET ROLE "{role}"; {again}', group="again")
        assert (row["state"], row["attempt"]) == ("DONE", 2), row
    finally:
        served.execute(f'REVOKE ALL ON task FROM "{role}"')
        served.admin_execute(f'DROP ROLE "{role}"')


@pytest.mark.parametrize(
    ("call", "code"), [("task_again()", "55000"), ("task_again('-1 s')", "22023"), ("task_again(NULL)", "22023")]
)
def test_task_again_is_refused_outside_of_a_task_and_for_a_wrong_delay(served: Database, call: str, code: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        served.execute(f"SELECT {call}")
    assert (refused.value.sqlstate, bool(refused.value.diag.message_hint)) == (code, True)
    served.execute("SET pg_task.id = 'x'")
    with pytest.raises(psycopg.Error) as refused:
        served.execute(f"SELECT {call}")
    assert refused.value.sqlstate == code
    served.execute("RESET pg_task.id")


# task_retry


def test_finished_task_runs_once_more_and_its_earlier_end_is_noted(served: Database, run: Run) -> None:
    row = run("SELECT fails(1, '42P01')", group="by hand")
    assert row["state"] == "FAIL"
    assert served.execute("SELECT task_retry(%s)", [row["id"]]) == [(True,)]
    after = served.wait(row["id"], "DONE")
    assert (after["attempt"], after["error"]) == (2, None)
    [note] = after["attempts"]
    assert (note["state"], note["code"], note["error"]) == ("FAIL", "42P01", row["error"])
    assert served.execute("SELECT task_retry(%s)", [row["id"]]) == [(True,)]
    eventually(lambda: (found := served.task(row["id"])) and found["attempt"] == 3 and found["state"] == "DONE")


def test_task_that_depends_on_others_waits_for_them_again(served: Database, run: Run) -> None:
    first = run("SELECT fails(1)", group="first")["id"]
    id = served.insert("SELECT 1", depend=[first], group="second", delete=False)
    assert served.wait(id)["state"] == "GONE"
    with held(served):
        running = served.insert("SELECT pg_advisory_xact_lock_shared(7000)", group="first")
        wait_runs(served)
        assert served.execute("SELECT task_retry(%s)", [first]) == [(True,)]
        assert served.execute("SELECT task_retry(%s)", [id]) == [(True,)]
        assert served.task(id)["state"] == "WAIT"  # type: ignore[index]
    served.wait(running)
    assert served.wait(id, "DONE")["attempt"] == 1
    assert served.wait(first)["state"] == "DONE"


def test_repeated_task_that_runs_once_more_has_one_next_row(served: Database) -> None:
    id = served.insert("SELECT 1", repeat="1 hour", group="once more", delete=False)
    served.wait(id)
    served.execute("SELECT task_retry(%s)", [id])
    eventually(lambda: (found := served.task(id)) and found["attempt"] == 2 and found["state"] == "DONE")
    assert len(served.tasks(f"parent = {id}")) == 1
    [following] = served.tasks(f"parent = {id}")
    served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [following["id"]])
    served.execute("SELECT task_retry(%s)", [following["id"]])
    served.wait(following["id"], "DONE")
    assert len(served.tasks(f"parent = {following['id']}")) == 1


def test_task_that_is_not_there_or_has_not_ended_is_an_error_and_a_planned_one_is_not(served: Database) -> None:
    with held(served):
        running = served.insert("SELECT pg_advisory_xact_lock_shared(7000)", group="by hand", delete=False)
        wait_runs(served)
        for id, code in ((running, "55000"), (-5, "42704"), (None, "42704")):
            with pytest.raises(psycopg.Error) as refused:
                served.execute("SELECT task_retry(%s::bigint)", [id])
            assert (refused.value.sqlstate, bool(refused.value.diag.message_hint)) == (code, True)
    planned = served.insert("SELECT 1", plan="9999-01-01")
    assert served.execute("SELECT task_retry(%s)", [planned]) == [(False,)]
    assert served.task(planned)["plan"].year == 9999  # type: ignore[index]


def test_task_with_a_key_is_not_retried_while_another_with_it_is_unfinished(served: Database, run: Run) -> None:
    old = run("SELECT 1/0", key="again", group="keys")["id"]
    new = served.insert("SELECT 1", key="again", plan="9999-01-01")
    with pytest.raises(psycopg.errors.UniqueViolation, match=f"task {old} cannot run again: task {new} ") as refused:
        served.execute("SELECT task_retry(%s)", [old])
    assert refused.value.diag.message_hint
    assert served.task(old)["state"] == "FAIL"  # type: ignore[index]


def test_failed_tasks_that_a_condition_chooses_run_once_more(served: Database, run: Run) -> None:
    served.execute("CREATE FUNCTION chosen(text) RETURNS boolean LANGUAGE sql AS $$ SELECT $1 = 'many' $$")
    failed = [run("SELECT fails(1)", group="many", key=key)["id"] for key in (None, None, "a", "a", "b")]
    done = run("SELECT 1", group="many")["id"]
    busy = served.insert("SELECT 1", key="b", plan="9999-01-01")
    session, told = served.connect(), []
    session.add_notice_handler(lambda notice: told.append(notice.message_primary))
    query = "SELECT task_retry('chosen(task.\"group\") -- mine')"
    assert session.execute(query).fetchall() == [(3,)]
    assert told == ["2 tasks are left as they are: another with the same key has not ended, or is later"]
    assert [served.wait(id, "DONE")["attempt"] for id in (*failed[:2], failed[3])] == [2, 2, 2]
    assert [served.task(id)["state"] for id in (failed[2], failed[4])] == ["FAIL", "FAIL"]  # type: ignore[index]
    assert served.task(done)["attempt"] == 1  # type: ignore[index]
    served.execute("DELETE FROM task WHERE id = %s", [busy])
    assert served.execute("SELECT task_retry('\"group\" = ''none''')") == [(0,)]


@pytest.mark.parametrize(
    ("filter", "code"), [("NULL::text", "22004"), ("'no such'", "42601"), ("'nothing > 1'", "42703")]
)
def test_condition_that_is_none_is_refused(served: Database, filter: str, code: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        served.execute(f"SELECT task_retry({filter})")
    assert refused.value.sqlstate == code
