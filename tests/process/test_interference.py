"""What others do while a task runs: locks, triggers, constraints, a restart by hand, another user's master."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from signal import SIGHUP, SIGKILL, SIGQUIT, SIGUSR1
from typing import Any

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import KEY, WAIT, held, passes, transactions, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.processes import frozen
from tests.fixtures.wait import eventually

Start = Callable[..., Master]
SILENT = "WITH slow AS MATERIALIZED (SELECT pg_sleep(0.5)) SELECT FROM slow WHERE pg_sleep IS NULL"
RUNNING = """SELECT count(*) FROM pg_stat_activity
WHERE query LIKE '%pg_sleep(60)%' AND state = 'active' AND pid <> pg_backend_pid() AND datname = current_database()"""
STUBBORN = f"""DO $$BEGIN
    LOOP
        BEGIN
            PERFORM pg_sleep(0.05);
            EXIT WHEN pg_try_advisory_xact_lock_shared({KEY});
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
    END LOOP;
    FOR i IN 1 .. 20 LOOP
        BEGIN PERFORM pg_sleep(0.05); EXCEPTION WHEN query_canceled THEN NULL; END;
    END LOOP;
END$$"""
"""A run that no cancel request ends: it goes on for as long as the test's lock is held, and a second more."""


def unfinished(database: Database) -> list[dict[str, Any]]:
    return database.tasks("state IN ('PLAN', 'TAKE', 'WORK')")


def test_whatever_the_server_writes_dates_like_the_table_is_served(database: Database, master: Start) -> None:
    database.admin_execute(f"ALTER DATABASE \"{database.name}\" SET datestyle = 'SQL, DMY'")
    database.admin_execute(f"ALTER DATABASE \"{database.name}\" SET intervalstyle = 'sql_standard'")
    master()
    id = database.insert("SELECT '2030-12-31'::date", delete=False)
    output = "SELECT output FROM task WHERE id = %s AND state = 'DONE'"
    assert eventually(lambda: database.execute(output, [id])) == [("31/12/2030",)]


def test_lock_on_the_table_delays_a_finish_and_neither_splits_it_nor_ends_a_repetition(
    database: Database, master: Start
) -> None:
    """For as long as three statements of ours wait for it."""
    database.execute("CREATE TABLE effect (x int)")
    master()
    with held(database, 7):
        wait = "SELECT pg_advisory_xact_lock(7)"
        id = database.insert(f"INSERT INTO effect VALUES (1); {wait}", group="atomic", delete=False)
        silent = f"WITH slow AS MATERIALIZED ({wait} AS l) SELECT FROM slow WHERE l IS NULL"
        repeated = database.insert(silent, group="repeated", repeat="1 hour", data="chain")
        wait_runs(database, 2)
        locking = database.connect(autocommit=False)
        locking.execute("LOCK TABLE task IN SHARE MODE")  # what CREATE INDEX takes
    passes(17)
    assert database.execute("SELECT count(*) FROM effect") == [(0,)], "committed apart from its row"
    locking.rollback()
    assert database.wait(id, timeout=30)["state"] == "DONE"
    assert database.execute("SELECT count(*) FROM effect") == [(1,)]
    database.wait(repeated, gone=True, timeout=30)
    [following] = unfinished(database)
    assert (following["parent"], following["data"]) == (repeated, "chain")


def test_deferred_constraint_on_the_table_refuses_the_next_row_and_not_the_finish(
    database: Database, master: Start
) -> None:
    master()
    database.execute("ALTER TABLE task ADD UNIQUE (data) DEFERRABLE INITIALLY DEFERRED")
    id = database.insert("SELECT 1/0", repeat="1 hour", data="x")
    row = database.wait(id)
    assert row["state"] == "FAIL"
    assert "the next row was refused" in row["error"]


def test_trigger_that_swallows_the_finish_costs_no_processor(database: Database, master: Start) -> None:
    one = master()
    one.may_log_errors = True
    database.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN IF NEW.state IN ('DONE', 'FAIL') THEN RETURN NULL; END IF; RETURN NEW; END$$;"
        "CREATE TRIGGER swallow BEFORE UPDATE ON task FOR EACH ROW EXECUTE FUNCTION swallow()"
    )
    id = database.insert("SELECT 1", delete=False)
    one.wait_log("finish_failed")
    before = transactions(database)
    passes(1.2)  # the server counts up to a second late
    assert transactions(database) - before < 200
    database.execute("DROP TRIGGER swallow ON task")
    assert database.wait(id, timeout=30)["state"] in ("DONE", "FAIL")


def test_task_restarted_by_hand_while_it_runs_is_never_stuck(database: Database, master: Start) -> None:
    one = master()
    for number in range(3):
        database.insert(SILENT.replace("0.5", "0.002"), repeat="1 millisecond", group=f"busy{number}")
    id = database.insert("SELECT pg_sleep(60)", group="restarted")
    session = database.connect(autocommit=False)
    for _ in range(60):
        database.wait(id, "WORK")
        session.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        session.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
        session.commit()
        eventually(lambda: database.admin_execute(RUNNING) == [(1,)])
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    database.execute("UPDATE task SET repeat = '0' WHERE state = 'PLAN'")
    eventually(lambda: not database.tasks("state IN ('TAKE', 'WORK') AND \"group\" = 'restarted'"))
    assert one.process.poll() is None


def test_stopped_run_holds_its_slot_until_it_has_really_ended(database: Database, master: Start) -> None:
    master()
    with held(database):
        first = database.insert(STUBBORN)
        database.wait(first, "WORK")
        second = database.insert("SELECT 1", delete=False)
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [first])
    row = database.wait(second)
    stopped = eventually(lambda: (found := database.task(first)) and found["stop"] and found)
    assert row["start"] >= stopped["stop"]


@pytest.mark.parametrize("killed", ["worker", "master"])
def test_run_whose_row_is_no_longer_running_holds_its_slot_whoever_died(
    database: Database, master: Start, killed: str
) -> None:
    """The backends are frozen, so that nothing can end them: what they did not let go of is seen by the locks."""
    one = master()
    one.may_log_errors = True
    changes = {7: "UPDATE task SET state = 'STOP'", 8: "DELETE FROM task"}
    with ExitStack() as until_then:
        with held(database):
            ids = {
                key: database.insert(f"SELECT pg_advisory_lock({key}); {STUBBORN}", group=str(key)) for key in changes
            }
            backends = [database.wait(id, "WORK")["pid"] for id in ids.values()]
            locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid IN (7, 8) AND pid = ANY (%s)"
            eventually(lambda: database.admin_execute(locked, [backends]) == [(2,)])
            until_then.enter_context(frozen(*backends))
        if killed == "worker":
            for worker in one.workers():
                os.kill(worker, SIGKILL)
            one.wait_log("worker_ended", 2)
        else:
            one.expect_exit = None
            one.signal(SIGKILL)
            master()
        for key, change in changes.items():
            database.execute(f"{change} WHERE id = {ids[key]}")
        after = [database.insert(f"SELECT pg_try_advisory_lock({key})", group=str(key), delete=False) for key in ids]
        beside = database.insert("SELECT 1", group="beside", delete=False)
        assert database.wait(beside)["state"] == "DONE"
        assert [(database.task(id) or {})["state"] for id in after] == ["PLAN", "PLAN"]
    assert [database.wait(id)["output"] for id in after] == ["t", "t"]


def test_stopped_run_holds_its_slot_also_against_the_worker_beside_it(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    with held(database):
        first = database.insert(WAIT, max=1, delete=False)
        stubborn = database.insert(STUBBORN, max=1)
        for id in (first, stubborn):
            database.wait(id, "WORK")
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [stubborn])
        following = database.insert("SELECT 1", delete=False)
        # By then the master has told both workers.
        eventually(lambda: any(" cancelling " in one.title(pid) for pid in one.workers()))
    row = database.wait(following)
    stopped = eventually(lambda: (found := database.task(stubborn)) and found["stop"] and found)
    assert row["start"] >= stopped["stop"]


def test_run_of_a_killed_master_that_is_stopped_is_cancelled_by_the_next_one(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    one.expect_exit = -SIGKILL
    ids = [database.insert("SELECT pg_sleep(60)", group=f"g{n}", delete=False) for n in range(2)]
    for id in ids:
        database.wait_running(id)
    one.stop(SIGKILL)
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [ids[0]])
    master(database.conninfo)
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [ids[1]])
    for id in ids:
        row = eventually(lambda id=id: (found := database.task(id)) and found["stop"] and found)
        assert (row["state"], row["attempt"]) == ("STOP", 1)


def test_stopped_run_whose_worker_dies_has_an_end_too(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    with held(database):
        id = database.insert(STUBBORN)
        database.wait(id, "WORK")
        worker = one.worker("running")
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        os.kill(worker, SIGKILL)
    eventually(lambda: (found := database.task(id)) and found["stop"])


def test_row_stopped_while_the_master_has_no_session_is_cancelled_by_the_next_one(
    database: Database, master: Start
) -> None:
    one = master()
    id = database.insert("SELECT pg_sleep(60)")
    database.wait(id, "WORK")
    database.admin_execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgtask master'"
        f" AND datname = '{database.name}'"
    )
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    one.wait_log(r"\bleading\b", count=2)
    eventually(lambda: (found := database.task(id)) and found["stop"])


def test_master_of_another_user_leaves_running_tasks_alone(database: Database, master: Start) -> None:
    other = f"{database.name}_other"
    database.admin_execute(f'CREATE ROLE "{other}" LOGIN')
    try:
        killed = master()
        killed.expect_exit = None
        database.execute("CREATE TABLE effect (x int)")
        with held(database, 7):
            input = "SELECT pg_advisory_lock(7); INSERT INTO effect VALUES (1)"
            id = database.insert(input, delete=False, atomic=False)
            database.wait_running(id)
            database.execute(f'GRANT ALL ON task, task_master, task_held, task_report, effect TO "{other}"')
            os.kill(killed.pid, SIGKILL)
            master("--no-create", database.server.conninfo(database.name, other))
            passes(1)
        row = database.wait(id)
        assert (row["state"], row["attempt"]) == ("DONE", 1)
        assert database.execute("SELECT count(*) FROM effect") == [(1,)]
    finally:
        eventually(lambda: not [m for m in [killed] if m.left()])
        database.admin_execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{other}'")


def test_row_in_take_of_a_session_that_ends_later_is_soon_put_back(database: Database, master: Start) -> None:
    master().stop()
    owner = database.connect()
    id = database.insert("SELECT 1", delete=False)
    owner.execute("UPDATE task SET state = 'TAKE', pid = pg_backend_pid(), start = clock_timestamp()")
    master()
    passes(1)
    assert (database.task(id) or {})["state"] == "TAKE"
    owner.close()
    database.wait(id, "DONE")


def test_signals_of_the_masters_cost_a_worker_nothing(database: Database, master: Start) -> None:
    one = master()
    with held(database, 7):
        id = database.insert("SELECT pg_advisory_xact_lock(7), pg_sleep(0.2)", delete=False)
        database.wait(id, "WORK")
        worker = one.worker("running")
        for number in (SIGHUP, SIGQUIT, SIGUSR1):
            os.kill(worker, number)
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 1)


def test_negative_length_of_a_legal_timeout_is_the_shortest_one(database: Database, master: Start) -> None:
    master()
    id = database.insert("SELECT pg_sleep(60)", timeout="-1 year 361 days")
    row = database.wait(id)
    assert (row["state"], row["code"]) == ("FAIL", "57014")


def test_tables_that_become_due_at_once_share_the_last_worker(
    new_database: Callable[..., Database], master: Start
) -> None:
    first, second = new_database(), new_database()
    count = 500
    entries = "".join(f"[[database]]\nconninfo = {json.dumps(one.conninfo)}\n" for one in (first, second))
    master(config=f"[master]\nworkers = 1\n{entries}", tables=2)
    for one in (first, second):
        one.execute(
            "INSERT INTO task (input, \"group\", plan) SELECT 'SELECT pg_sleep(0.02)', 'g', clock_timestamp() + '1 s'"
            f" FROM generate_series(1, {count})"
        )

    def done(one: Database) -> int:
        return len(one.tasks("state = 'DONE'"))

    eventually(lambda: done(first) and done(second))
    assert max(done(first), done(second)) < count, "one of them had to wait for the other's whole backlog"
    for one in (first, second):
        one.execute("DELETE FROM task WHERE state = 'PLAN'")
        eventually(lambda one=one: not unfinished(one))
