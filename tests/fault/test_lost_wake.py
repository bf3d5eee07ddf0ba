"""A wake-up that never comes, and applications that use two-phase commit: what was committed is found and runs."""

from collections.abc import Callable
from contextlib import closing

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import ASLEEP, falls_asleep, held, passes, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

WAKE = "SELECT tgenabled::text FROM pg_trigger WHERE tgrelid = 'task'::regclass AND tgname = 'pgtask_wake'"


def test_row_is_found_by_the_safety_poll_when_the_trigger_is_dropped_in_its_sleep(
    database: Database, master: Start
) -> None:
    one = master("--safety", "500ms", database.conninfo, tables=1)
    backend = falls_asleep(database)
    database.execute("DROP TRIGGER pgtask_wake ON task; DROP TRIGGER pgtask_change ON task")
    for n in range(2):
        falls_asleep(database)
        assert database.wait(database.insert("SELECT 1", group=f"g{n}", delete=False))["state"] == "DONE"
    database.admin_execute("SELECT pg_terminate_backend(%s)", [backend])
    one.wait_log(r"\bleading\b", count=2)
    assert database.execute(WAKE) == [("O",)]
    one.wait_log('schema_changed.*"create trigger pgtask_wake"', count=2)


def test_master_that_lost_its_session_in_its_sleep_hears_what_came_meanwhile(database: Database, master: Start) -> None:
    """Who inserts while nobody listens and nobody sleeps notifies nobody: the next session looks before it sleeps."""
    one = master("--safety", "1h", database.conninfo, tables=1)
    for n in range(2):
        backend = falls_asleep(database)
        with database.connect(database.admin) as session:
            session.execute("SELECT pg_terminate_backend(%s)", [backend])
        id = database.insert("SELECT 1", group=f"g{n}", delete=False)
        assert database.wait(id)["state"] == "DONE"
    assert one.process.poll() is None


def prepare(database: Database, name: str) -> int:
    """An application's transaction with a task in it, left prepared."""
    with closing(database.connect(autocommit=False)) as session:
        row = session.execute(
            "INSERT INTO task (input, \"group\", delete) VALUES ('SELECT 1', %s, false) RETURNING id", [name]
        ).fetchone()
        session.execute(f"PREPARE TRANSACTION '{database.name} {name}'".encode())
    assert row is not None
    return int(row[0])


def test_prepared_insert_fails_in_the_client_while_the_master_sleeps(database: Database, master: Start) -> None:
    """It would have to notify, which the server does not allow there; nothing is left of it."""
    master("--safety", "1h", database.conninfo, tables=1)
    falls_asleep(database)
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cannot PREPARE a transaction that has executed"):
        prepare(database, "asleep")
    assert database.tasks() == []
    assert database.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()") == []
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"


def test_prepared_insert_keeps_a_master_awake_that_was_awake(database: Database, master: Start) -> None:
    """The lock that says "in flight" lasts as long as the prepared transaction: it needs no notification."""
    master("--safety", "1h", database.conninfo, tables=1)
    locked = database.insert("SELECT 1", group="locked", plan="2100-01-01", delete=False)
    holder = database.connect(autocommit=False)
    holder.execute("UPDATE task SET plan = now() WHERE id = %s", [locked])
    holder.commit()
    database.wait(locked)
    id = eventually(lambda: prepared_while_awake(database))
    passes(0.3)
    assert database.execute(ASLEEP) == []
    assert database.wait(database.insert("SELECT 1", group="another", delete=False))["state"] == "DONE"
    database.execute(f"COMMIT PREPARED '{database.name} awake'")
    assert database.wait(id)["state"] == "DONE"


def prepared_while_awake(database: Database) -> int:
    """A wake-up first, by two, since one alone leaves it asleep; 0 if it slept again too soon."""
    database.execute("INSERT INTO task (input, \"group\") SELECT 'SELECT 1', 'busy' FROM generate_series(1, 2)")
    try:
        return prepare(database, "awake")
    except psycopg.errors.FeatureNotSupported:
        return 0


def test_prepared_inserts_work_without_wake_and_start_when_they_are_committed(
    database: Database, master: Start
) -> None:
    master("--no-wake", "--sleep", "50ms", database.conninfo, tables=1)
    first, second, third = (prepare(database, name) for name in ("first", "second", "third"))
    database.execute(f"COMMIT PREPARED '{database.name} first'")
    assert database.wait(first)["state"] == "DONE"
    passes(0.5)
    assert database.task(second) is None
    assert database.wait(database.insert("SELECT 1", group="another", delete=False))["state"] == "DONE"
    database.execute(f"COMMIT PREPARED '{database.name} second'")
    database.execute(f"ROLLBACK PREPARED '{database.name} third'")
    row = database.wait(second)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    assert database.task(third) is None


def test_prepared_stop_of_a_running_task_takes_effect_at_its_commit(database: Database, master: Start) -> None:
    """A STOP must be told to the worker: two-phase commit cannot, whether the table wakes its master or not."""
    master("--no-wake", database.conninfo, tables=1)
    with held(database, 500):
        id = database.insert("SELECT pg_advisory_lock(500)", delete=False)
        wait_runs(database)
        session = database.connect(autocommit=False)
        session.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            session.execute(f"PREPARE TRANSACTION '{database.name} stop'".encode())
    assert database.wait(id)["state"] == "DONE"
