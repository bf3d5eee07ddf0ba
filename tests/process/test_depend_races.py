"""Rows that wait for others: never early, never stuck.

Each is held at the point where it could go wrong, and the masters look at everything by themselves only once an hour.
"""

import os
import secrets
from collections.abc import Callable
from signal import SIGKILL
from typing import Any

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs, waiting
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

FAR = "9999-01-01"

HOLD_ENDS = """
    CREATE FUNCTION hold_end() RETURNS trigger LANGUAGE plpgsql AS
        $$BEGIN PERFORM pg_advisory_xact_lock_shared(7000); RETURN NULL; END$$;
    CREATE TRIGGER hold_end AFTER UPDATE OF state ON task FOR EACH ROW
        WHEN (NEW.state = 'DONE' AND NEW.data = 'held') EXECUTE FUNCTION hold_end();
    CREATE TRIGGER hold_removal AFTER DELETE ON task FOR EACH ROW
        WHEN (OLD.state = 'WORK' AND OLD.data = 'held') EXECUTE FUNCTION hold_end();
"""
"""The end of a run with these data is written, and not committed before the lock is free."""


@pytest.fixture
def one(database: Database, master: Callable[..., Master]) -> Master:
    started = master("--safety", "1h", database.conninfo)
    database.execute(HOLD_ENDS)
    return started


def first(database: Database, input: str = "SELECT 1", **columns: Any) -> int:
    return database.insert(input, **{"delete": False, "group": secrets.token_hex(4)} | columns)


def after(database: Database, *ids: int, **columns: Any) -> int:
    """A task that depends on these."""
    return first(database, **{"depend": list(ids)} | columns)


def depending(session: psycopg.Connection[Any], id: int) -> int:
    """The same, inserted in that session."""
    query = "INSERT INTO task (input, depend, \"delete\") VALUES ('SELECT 1', ARRAY[%s], false) RETURNING id"
    [(made,)] = session.execute(query, [id]).fetchall()
    return int(made)


def looked_at(database: Database, id: int) -> None:
    """Until the master knows that it waits."""
    query = "SELECT 1 FROM task WHERE id = %s AND state = 'WAIT' AND pid IS NOT NULL"
    eventually(lambda: database.execute(query, [id]))


def test_who_runs_anyway_waits_for_the_real_end_of_a_stopped_run(database: Database, one: Master) -> None:
    stubborn = "DO $$BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(0.5); END$$"
    id = first(database, stubborn)
    other = after(database, id, anyway=True)
    looked_at(database, other)
    sleeps = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    eventually(lambda: database.execute(sleeps))
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert database.wait(other)["start"] >= database.wait(id)["stop"]


def test_removal_that_is_not_committed_holds_up_who_would_depend(database: Database, one: Master) -> None:
    session = database.connect()
    session.execute("SET lock_timeout = '100 ms'")
    with held(database):
        id = first(database, "SELECT WHERE false", data="held", delete=True)
        eventually(lambda: waiting(database))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            depending(session, id)
    database.wait(id, gone=True)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        depending(session, id)


def test_row_that_is_to_be_removed_stays_where_somebody_inserts_who_depends_on_it(
    database: Database, one: Master
) -> None:
    with database.connect(autocommit=False) as session:
        with held(database):
            id = first(database, f"{WAIT} OFFSET 1", delete=True)
            database.wait(id, "WORK")
            other = depending(session, id)
        assert database.wait(id)["state"] == "DONE"  # nobody waits for long for the other's commit
    assert database.wait(other)["state"] == "DONE"


def test_failed_task_that_is_deleted_before_the_master_has_seen_who_depends_on_it_was_not_done(
    database: Database, one: Master
) -> None:
    id = first(database, "SELECT 1/0")
    database.wait(id)
    with database.connect(autocommit=False) as session:
        other = depending(session, id)
        session.execute("DELETE FROM task WHERE id = %s", [id])
    assert database.wait(other)["state"] == "GONE"


def test_waiting_row_that_somebody_has_locked_is_not_forgotten(database: Database, one: Master) -> None:
    with held(database):
        id = first(database, WAIT)
        other = after(database, id)
        looked_at(database, other)
        locking = database.connect(autocommit=False)
        locking.execute("SELECT 1 FROM task WHERE id = %s FOR UPDATE", [other])
    database.wait(id)
    database.wait(after(database, first(database)))  # by now the master has looked
    locking.rollback()
    assert database.wait(other)["state"] == "DONE"


def test_failure_is_not_passed_on_by_a_row_that_is_being_told_to_wait_no_more(database: Database, one: Master) -> None:
    id = first(database, plan=FAR)
    middle = after(database, id)
    last = after(database, middle)
    looked_at(database, last)
    with database.connect(autocommit=False) as freeing:
        freeing.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [middle])
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        database.wait(after(database, first(database, "SELECT 1/0")))  # by now the master has looked
    assert [database.wait(one)["state"] for one in (middle, last)] == ["DONE", "DONE"]


def test_run_of_a_killed_masters_worker_that_ends_later_is_seen_by_the_next(
    database: Database, master: Callable[..., Master], one: Master
) -> None:
    with held(database):
        id = first(database, WAIT)
        other = after(database, id)
        looked_at(database, other)
        one.expect_exit = -SIGKILL
        one.stop(SIGKILL)
        master("--safety", "1h", database.conninfo)
        database.wait(after(database, first(database)))  # by now it has looked
        wait_runs(database)
    assert database.wait(other)["state"] == "DONE"


def test_end_that_is_committed_after_its_workers_death_is_seen(database: Database, one: Master) -> None:
    """The backend of a dead worker is ended; where that comes too late its commit is still a commit."""
    one.may_log_errors = True
    with held(database):
        id = first(database, data="held")
        eventually(lambda: waiting(database))
        other = after(database, id)
        looked_at(database, other)
        for pid in one.workers():
            os.kill(pid, SIGKILL)
        one.wait_log("worker_ended")
    assert database.wait(other)["state"] == "DONE"


def test_other_groups_are_served_while_workers_report_all_the_time(database: Database, one: Master) -> None:
    far = after(database, first(database, plan=FAR))
    looked_at(database, far)
    # All in one commit: we may be slow to insert the other, and slow to look.
    query = """WITH busy AS (INSERT INTO task ("group", input)
            SELECT concat('busy ', n % 2), 'SELECT 1' FROM generate_series(1, 6000) AS n)
        INSERT INTO task ("group", input) VALUES ('other', 'SELECT 1') RETURNING id"""
    [(other,)] = database.execute(query)
    began = database.wait(other)["start"]
    left = "SELECT 1 FROM task WHERE \"group\" LIKE 'busy%' AND state = 'PLAN' LIMIT 1"
    eventually(lambda: not database.execute(left), timeout=120)
    assert database.execute("SELECT 1 FROM task WHERE \"group\" LIKE 'busy%%' AND start > %s LIMIT 1", [began])
