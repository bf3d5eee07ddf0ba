"""One unfinished task for each key, whoever inserts it how often, and a task that is moved while it runs runs again."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from signal import SIGKILL
from typing import Any, LiteralString

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import falls_asleep, held, passes, wait_runs, waiting
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Run = Callable[..., dict[str, Any]]

MOVE: LiteralString = """INSERT INTO task (key, plan, "group", input, delete, batch)
    VALUES (%(key)s, %(plan)s, %(key)s, %(input)s, %(delete)s, %(batch)s)
    ON CONFLICT (key) WHERE key IS NOT NULL AND state IN ('PLAN', 'TAKE', 'WORK', 'WAIT')
    DO UPDATE SET plan = excluded.plan RETURNING id"""
IGNORE: LiteralString = """INSERT INTO task (key, "group", input) VALUES (%(key)s, %(key)s, %(input)s)
    ON CONFLICT DO NOTHING RETURNING id"""
WAIT = "SELECT pg_advisory_xact_lock_shared(7000)"


def move(database: Database, key: str, plan: Any = "now", **more: Any) -> int:
    values = {"key": key, "plan": plan, "input": WAIT, "delete": False, "batch": 1} | more
    return int(database.execute(MOVE, values)[0][0])


# Unique


def test_second_unfinished_task_with_a_key_is_refused_ignored_or_moves_the_first(served: Database) -> None:
    first = served.insert("SELECT 1", key="one", plan="9999-01-01")
    with pytest.raises(psycopg.errors.UniqueViolation):
        served.insert("SELECT 1", key="one")
    assert served.execute(IGNORE, {"key": "one", "input": "SELECT 2"}) == []
    assert move(served, "one", "9998-01-01") == first
    row = served.task(first)
    assert row
    assert (row["plan"].year, row["input"], row["state"]) == (9998, "SELECT 1", "PLAN")
    served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [first])
    assert served.wait(served.insert("SELECT 1", key="one", delete=False))["state"] == "DONE"
    assert served.wait(served.insert("SELECT 1", key="one", delete=False))["state"] == "DONE"


def test_key_of_a_running_task_is_taken_until_its_end(served: Database) -> None:
    with held(served):
        id = served.insert(WAIT, key="busy", delete=False)
        wait_runs(served)
        assert served.execute(IGNORE, {"key": "busy", "input": "SELECT 2"}) == []
    served.wait(id)
    assert served.execute(IGNORE, {"key": "busy", "input": "SELECT 2"}) != []


@pytest.mark.parametrize("key", ["", "x" * 1001])
def test_key_that_is_empty_or_endless_is_refused(served: Database, key: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        served.insert("SELECT 1", key=key)


def test_partitioned_table_has_keys_that_are_not_unique(database: Database, master: Callable[..., Master]) -> None:
    master().stop()
    create = database.execute("SELECT 'CREATE TABLE moved (LIKE task INCLUDING DEFAULTS) PARTITION BY RANGE (plan)'")
    database.execute(create[0][0])
    database.execute("DROP TABLE task; ALTER TABLE moved RENAME TO task")
    database.execute("CREATE TABLE task_all PARTITION OF task DEFAULT")
    database.execute("CREATE SEQUENCE ids; ALTER TABLE task ALTER id SET DEFAULT nextval('ids')")
    master()
    ids = [database.insert("SELECT 1", key="same", delete=False, group=group) for group in "ab"]
    assert [database.wait(id)["state"] for id in ids] == ["DONE", "DONE"]


# Moved


def test_task_that_is_moved_while_it_runs_runs_again_at_the_new_time(
    served: Database, serving: tuple[Database, Master]
) -> None:
    with held(served):
        id = move(served, "moved")
        wait_runs(served)
        plan = datetime.now(UTC) + timedelta(seconds=4)
        assert move(served, "moved", plan) == id
    row = served.wait(id, "PLAN")
    assert (row["plan"], row["pid"], row["start"], row["stop"]) == (plan, None, None, None)
    [note] = row["attempts"]
    assert (note["state"], note["attempt"]) == ("DONE", 1)
    falls_asleep(served)
    row = served.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 2)
    assert plan <= row["start"] < plan + timedelta(seconds=20)
    assert len(row["attempts"]) == 1


def test_event_of_a_transaction_that_is_older_than_the_run_is_not_lost(served: Database) -> None:
    served.execute("CREATE TABLE IF NOT EXISTS event (key text)")
    older = served.connect(autocommit=False)
    older.execute("SELECT now()")
    input = f"SELECT count(*) FROM event; {WAIT}"
    with held(served):
        id = move(served, "old", input=input)
        wait_runs(served)
        older.execute("INSERT INTO event VALUES ('old')")
        values = {"key": "old", "input": input, "delete": False, "batch": 1}
        assert older.execute(MOVE.replace("%(plan)s", "now()"), values).fetchall() == [(id,)]
    passes(0.1)  # its end waits for the older transaction
    older.commit()
    row = served.wait(id)
    assert (row["attempt"], row["output"][0]) == (2, "1")


def test_run_that_failed_and_was_moved_runs_again(served: Database) -> None:
    with held(served):
        id = move(served, "failed", input=f"{WAIT}; SELECT 1 / (count(*) - 1) FROM task WHERE data = 'failed ready'")
        wait_runs(served)
        served.execute("UPDATE task SET data = 'failed ready' WHERE id = %s", [id])
        move(served, "failed")
        served.execute("UPDATE task SET input = 'SELECT 1' WHERE id = %s", [id])
    row = served.wait(id, "DONE", "FAIL")
    assert (row["state"], row["attempt"]) == ("DONE", 2)
    assert [run["state"] for run in row["attempts"]] == ["FAIL"]


def test_run_that_was_moved_and_then_lost_once_too_often_runs_again(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(config=f"[[database]]\nconninfo = {json.dumps(database.conninfo)}\ncrashes = 0\n")
    one.may_log_errors = True
    with held(database):
        id = move(database, "lost")
        wait_runs(database)
        [worker] = one.workers()
        move(database, "lost")
        os.kill(worker, SIGKILL)
        eventually(lambda: (row := database.task(id)) and row["attempt"] == 2)
    assert database.wait(id)["state"] == "DONE"


def test_silent_task_that_was_moved_is_removed_after_its_last_run(served: Database) -> None:
    served.execute("CREATE TABLE IF NOT EXISTS ran (id bigint)")
    served.execute("""CREATE OR REPLACE FUNCTION silent() RETURNS SETOF int LANGUAGE sql AS $$
        INSERT INTO ran VALUES (current_setting('pg_task.id')::bigint);
        SELECT 1 FROM pg_advisory_xact_lock_shared(7000) WHERE false $$""")
    served.execute("""CREATE OR REPLACE FUNCTION waits() RETURNS SETOF int LANGUAGE plpgsql AS $$ BEGIN
        PERFORM silent(); PERFORM pg_advisory_xact_lock_shared(7000); END $$""")
    with held(served):
        id = move(served, "silent", input="SELECT waits()", delete=True)
        wait_runs(served)
        move(served, "silent")
        assert served.execute("SELECT count(*) FROM task WHERE key = 'silent'") == [(1,)]
    served.wait(id, gone=True)
    assert served.execute("SELECT count(*) FROM ran WHERE id = %s", [id]) == [(2,)]


@pytest.mark.parametrize("delete", [False, True])
def test_event_for_one_of_those_that_share_a_transaction_is_not_lost(
    database: Database, master: Callable[..., Master], delete: bool
) -> None:
    """It comes when that one has run, before the commit: nothing of the transaction stays, and each runs by itself."""
    one = master(config=f"[[database]]\nconninfo = {json.dumps(database.conninfo)}\nbatch_time = '20 s'\n")
    database.execute("CREATE TABLE event (handled bigint); CREATE TABLE ran (id bigint)")
    database.execute("""CREATE FUNCTION handle() RETURNS SETOF int LANGUAGE sql AS $$
        INSERT INTO ran VALUES (current_setting('pg_task.id')::bigint);
        UPDATE event SET handled = current_setting('pg_task.id')::bigint RETURNING 1;
        SELECT 1 WHERE false $$""")
    database.execute("""CREATE FUNCTION waits() RETURNS SETOF int LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared(7001); END $$""")
    columns: dict[str, Any] = {"group": "shared", "batch": 10, "delete": delete}
    with held(database, 7001):
        with held(database):
            database.insert(WAIT, **columns)
            wait_runs(database)
            ids = [database.insert("SELECT handle()", key=f"key {number}", **columns) for number in range(3)]
            ids.append(database.insert("SELECT waits()", **columns))
        query = "SELECT count(*), count(DISTINCT pid) FROM task WHERE state = 'WORK' AND id >= %s"
        eventually(lambda: database.execute(query, ids[:1]) == [(4, 1)] and waiting(database))
        with database.connect(autocommit=False) as session:
            session.execute("INSERT INTO event VALUES (NULL)")
            values = {"key": "key 1", "input": "", "delete": delete, "batch": 10}
            session.execute(MOVE.replace("%(plan)s", "now()"), values)
    eventually(lambda: not database.tasks("state NOT IN ('DONE')"))
    [(handled,)] = database.execute("SELECT handled FROM event")
    assert handled in ids
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM ran") in ([(3, 3)], [(4, 3)])
    assert len(database.tasks(f"id >= {ids[0]}")) == (0 if delete else 4)
    assert one.logged("batch_undone")


# Repeated


@pytest.mark.parametrize("delete", [False, True])
def test_next_row_of_a_repeated_task_has_the_key(served: Database, delete: bool) -> None:
    key = f"repeated {delete}"
    served.execute("CREATE OR REPLACE FUNCTION nothing() RETURNS SETOF int LANGUAGE sql AS 'SELECT 1 WHERE false'")
    input = "SELECT nothing()"
    id = served.insert(input, key=key, repeat="1 hour", delete=delete, group=key)
    served.wait(id, gone=True) if delete else served.wait(id)
    [following] = served.tasks(f"key = '{key}' AND state = 'PLAN'")
    assert (following["parent"], following["error"]) == (id, None)
    assert following["plan"] > datetime.now(UTC) + timedelta(minutes=50)


def test_repeated_task_that_was_moved_is_planned_on_its_first_grid(served: Database) -> None:
    with held(served):
        id = served.insert(WAIT, key="grid", repeat="1 hour", delete=False, group="grid")
        wait_runs(served)
        served.execute("UPDATE task SET plan = now() + interval '20 ms' WHERE id = %s", [id])
    eventually(lambda: (row := served.task(id)) and row["attempt"] == 2 and row["state"] == "DONE")
    row = served.task(id)
    assert row
    [following] = served.tasks("key = 'grid' AND state = 'PLAN'")
    first = datetime.fromisoformat(row["attempts"][0]["plan"])
    assert row["plan"] > first
    assert (following["first"], following["plan"]) == (first, first + timedelta(hours=1))


def test_nothing_is_repeated_to_a_plan_after_until(served: Database) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2.2)
    served.insert("SELECT 1", repeat="500 ms", until=soon, group="until", delete=False)
    eventually(lambda: not served.tasks("\"group\" = 'until' AND state <> 'DONE'"))
    rows = served.tasks("\"group\" = 'until'")
    assert 1 < len(rows) <= 5
    assert all(row["plan"] <= soon for row in rows)


# At full concurrency


def test_storm_of_both_clauses_loses_no_event_and_never_runs_two_with_a_key(
    database: Database, master: Callable[..., Master]
) -> None:
    """Each event is written with the task that handles it; a run handles all that it sees and says if it is alone."""
    one = master()
    database.execute("CREATE TABLE event (key text, at timestamptz DEFAULT clock_timestamp(), handled bigint)")
    database.execute("CREATE TABLE double (key text, id bigint); CREATE TABLE run (attempt int)")
    database.execute("""CREATE FUNCTION handle(which text) RETURNS SETOF int LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO double SELECT which, id FROM task WHERE key = which AND state IN ('PLAN', 'TAKE', 'WORK', 'WAIT')
            AND id <> current_setting('pg_task.id')::bigint;
        UPDATE event SET handled = current_setting('pg_task.id')::bigint WHERE key = which AND handled IS NULL;
        INSERT INTO run SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint;
        PERFORM pg_sleep(0.005);
    END $$""")
    keys = [f"key {number}" for number in range(4)]
    for number, key in enumerate(keys[:2]):
        database.insert(f"SELECT handle('{key}')", key=key, group=key, repeat="30 ms", delete=number == 0)

    def events(session: psycopg.Connection[Any], number: int) -> None:
        for turn in range(60):
            key = keys[(number + turn) % len(keys)]
            values = {"key": key, "input": f"SELECT handle('{key}')", "delete": turn % 2 == 0, "batch": 1 + turn % 3}
            with session.transaction():
                if turn % 3 == 0:
                    session.execute(IGNORE, values)
                else:
                    session.execute("INSERT INTO event (key) VALUES (%s)", [key])
                    session.execute(MOVE.replace("%(plan)s", ("now()", "clock_timestamp()")[turn % 2]), values)
            session.execute("SELECT pg_sleep(0.02 * random())")

    sessions = [database.connect() for _ in range(8)]
    with ThreadPoolExecutor(len(sessions)) as pool:
        list(pool.map(events, sessions, range(len(sessions))))
    eventually(lambda: database.execute("SELECT count(*) FROM event WHERE handled IS NULL") == [(0,)], timeout=60)
    assert database.execute("SELECT count(*) FROM event") == [(8 * 40,)]
    assert database.execute("SELECT * FROM double") == []
    database.execute("UPDATE task SET state = 'STOP' WHERE state IN ('PLAN', 'TAKE', 'WORK')")
    assert database.tasks("state = 'FAIL' OR error LIKE '%%next row%%'") == []
    assert database.execute("SELECT count(*) FROM run WHERE attempt > 1") > [(10,)], "hardly any was moved while it ran"
    assert not one.logged("repeat_refused|run_undone|run_disowned.*key")
