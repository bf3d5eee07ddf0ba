"""An idle worker begins by itself the single task that is due: what becomes of it when the worker hangs or dies."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from signal import SIGKILL, SIGQUIT

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, falls_asleep, held, passes, runs_waiting, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.processes import frozen, idle
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

PAUSES = """CREATE OR REPLACE FUNCTION pauses() RETURNS trigger LANGUAGE plpgsql AS
$$BEGIN
    PERFORM set_config('lock_timeout', '0', true), pg_advisory_xact_lock_shared(7000); RETURN NEW;
END$$;
CREATE OR REPLACE TRIGGER pauses BEFORE UPDATE ON task FOR EACH ROW
WHEN (NEW.state = 'WORK' AND OLD.state <> 'WORK' AND NEW.data = 'pauses') EXECUTE FUNCTION pauses()"""
"""The beginning of such a row waits for a lock."""

BEGINNING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


def lingering(database: Database, one: Master, workers: int = 1) -> int:
    """Under a master that sleeps so many idle workers, all it has; the pid of the first, who is asked to look."""
    with held(database):
        for number in range(workers):
            database.insert(WAIT, group=f"first {number}")
            wait_runs(database, number + 1)  # one look that sees more than one, and the next ones are the master's
    eventually(lambda: [idle(worker) for worker in one.workers()] == [True] * workers)
    falls_asleep(database)
    return int(re.findall(r" worker=(\d+)", one.wait_log("worker_forked", workers)[0])[0])


@contextmanager
def begun_alone(
    database: Database, master: Start, *arguments: str, input: str = "SELECT 1", workers: int = 1
) -> Iterator[tuple[Master, int, int, ExitStack]]:
    """A master with so many idle workers, the one that is beginning what it has found, until the block or the stack
    ends, and the row's id.

    Where the worker was so slow that the master has taken the row, tried again by another master.
    """
    for _ in range(10):
        one = master("--linger", "1h", *arguments, database.conninfo)
        one.may_log_errors = True
        worker = lingering(database, one, workers)
        database.execute(PAUSES)
        with ExitStack() as waits:
            waits.enter_context(held(database))
            id = database.insert(input, group="g", data="pauses", delete=False)
            eventually(lambda: database.execute(BEGINNING) == [(1,)])
            if database.task(id)["state"] == "PLAN":  # type: ignore[index]
                yield one, worker, id, waits
                return
        database.wait(id)
        one.stop()
    raise AssertionError("no worker has found a row by itself")


def said(database: Database, who: str) -> list[str]:
    text = database.server.log_text()  # type: ignore[union-attr]
    return re.findall(rf"^{who}[^|]*\|{database.name}\|LOG:  .*", text, re.MULTILINE)


def test_worker_begins_it_and_the_master_takes_nothing(talkative: Database, master: Start) -> None:
    one = master("--linger", "1h", "--safety", "1h", talkative.conninfo, tables=1)

    def begun_by_worker() -> bool:
        lingering(talkative, one)
        return begins_untaken(talkative)

    eventually(begun_by_worker)


def begins_untaken(database: Database) -> bool:
    """Is a task begun that the master, who sleeps, has not taken?"""
    before = len(said(database, "pgtask master"))
    row = database.wait(database.insert("SELECT 1", delete=False, group="other", max=3))
    falls_asleep(database)
    taken = [text for text in said(database, "pgtask master")[before:] if "'TAKE'" in text]
    return not taken and row["attempt"] == 1


def warm(database: Database) -> bool:
    """Is a session ready for a worker, under a master that sleeps?"""
    falls_asleep(database)
    query = (
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgtask warm' AND state = 'idle'"
    )
    return bool(database.admin_execute(query, [database.name]))


def test_new_worker_begins_it_and_the_master_takes_nothing(talkative: Database, master: Start) -> None:
    """His session, which was ready, does so while he is forked."""
    one = master("--linger", "0", "--safety", "1h", talkative.conninfo, tables=1)

    def begun_by_worker() -> bool:
        eventually(lambda: not one.workers() and warm(talkative))
        return begins_untaken(talkative)

    eventually(begun_by_worker)


def test_inserts_that_mean_nothing_now_fork_no_worker_each(database: Database, master: Start) -> None:
    one = master("--linger", "0", database.conninfo, tables=1)
    for _ in range(10):
        eventually(lambda: not one.workers() and warm(database))
        database.insert("SELECT 1", plan="2090-01-01")
    eventually(lambda: not one.workers() and warm(database))
    assert len(one.logged(" worker_forked ")) <= 1
    row = database.wait(database.insert("SELECT 1", delete=False))
    assert row["attempt"] == 1


def test_full_group_stays_full(database: Database, master: Start) -> None:
    """The worker knows of the slots in use what the master knows."""
    one = master("--linger", "1h", database.conninfo)
    with held(database):
        first = database.insert(WAIT, group="g", delete=False)
        wait_runs(database)
        other = database.insert("SELECT 1", group="other", delete=False)
        database.wait(other)
        for _ in range(5):
            database.insert(WAIT, group="g", delete=False)
            passes(0.15)
        third = database.insert(WAIT, group="g", max=1, delete=False)
        wait_runs(database, 2)
        passes(0.3)
        assert runs_waiting(database) == 2
        assert {row["id"] for row in database.tasks("state = 'WORK'")} == {first, third}
    eventually(lambda: all(row["state"] == "DONE" for row in database.tasks()))
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert one.logged("( WARNING | ERROR )(?!.*running_as_root)") == []


def test_worker_that_dies_before_it_looks_costs_nothing(database: Database, master: Start) -> None:
    one = master("--linger", "1h", database.conninfo)
    one.may_log_errors = True
    worker = lingering(database, one)
    with frozen(worker):
        id = database.insert("SELECT 1", group="other", delete=False)
        os.kill(worker, SIGKILL)
        assert database.wait(id)["attempt"] == 1


def test_worker_that_hangs_looks_no_more_when_others_have(database: Database, master: Start) -> None:
    """The slots that it was told of are those of another time."""
    one = master("--linger", "1h", database.conninfo)
    worker = lingering(database, one)
    with held(database):
        with frozen(worker):
            ids = [database.insert(WAIT, group="g", delete=False) for _ in range(2)]
            wait_runs(database)
        eventually(lambda: idle(worker))
        passes(0.3)
        assert runs_waiting(database) == 1
    assert [database.wait(id)["attempt"] for id in ids] == [1, 1]


def test_nobody_else_is_asked_before_a_worker_has_answered(database: Database, master: Start) -> None:
    """A notification that comes meanwhile does not have another worker look, who would find the slot free."""
    with begun_alone(database, master, "--crashes", "0", workers=2) as (_, worker, first, waits), frozen(worker):
        waits.close()
        database.wait(first, "WORK")
        second = database.insert("SELECT 1", group="g", delete=False)
        passes(1.0)
        assert database.task(second)["state"] == "PLAN"  # type: ignore[index]
        rows = [database.wait(id) for id in (first, second)]
    assert [(row["state"], row["attempt"]) for row in rows] == [("DONE", 1), ("DONE", 1)]


def test_slot_of_a_run_that_another_master_has_left_is_known(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    one.expect_exit = None
    with held(database):
        first = database.insert(WAIT, group="g", delete=False)
        wait_runs(database)
        os.kill(one.pid, SIGKILL)
        two = master("--linger", "1h", "--safety", "1h", database.conninfo)
        database.wait(database.insert("SELECT 1", group="other", delete=False))
        eventually(lambda: [idle(worker) for worker in two.workers()] == [True])
        falls_asleep(database)
        second = database.insert("SELECT 1", group="g", delete=False)
        passes(0.5)
        assert database.task(second)["state"] == "PLAN"  # type: ignore[index]
    assert [database.wait(id)["attempt"] for id in (first, second)] == [1, 1]


def test_worker_that_was_told_in_another_term_begins_nothing(database: Database, master: Start) -> None:
    """The master loses its session while it waits for the answer."""
    one = master("--linger", "1h", database.conninfo)
    one.may_log_errors = True
    worker = lingering(database, one)
    [(backend,)] = database.execute("SELECT backend FROM task_master")
    with held(database):
        with frozen(worker):
            ids = [database.insert(WAIT, group="g", delete=False) for _ in range(2)]
            database.admin_execute("SELECT pg_terminate_backend(%s)", [backend])
            one.wait_log(r"\bleading\b", 2)
            wait_runs(database)
        passes(0.5)
        assert runs_waiting(database) == 1
    assert [database.wait(id)["attempt"] for id in ids] == [1, 1]


def test_worker_whose_begin_takes_too_long_is_ended(database: Database, master: Start) -> None:
    """A trigger of the user's makes it wait; that was no run of the row."""
    with begun_alone(database, master, "--crashes", "0") as (one, worker, id, _):
        eventually(lambda: worker not in one.workers())
        eventually(lambda: database.execute(BEGINNING) == [(1,)])
        other = database.insert("SELECT 1", group="other", delete=False)
        assert database.wait(other)["state"] == "DONE"
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 1)


def test_worker_that_dies_while_it_begins_holds_the_slot_until_its_session_is_gone(
    database: Database, master: Start
) -> None:
    """Nobody knows which row it was: nothing is taken before that."""
    with begun_alone(database, master) as (_, worker, id, _):
        other = database.insert("SELECT 1", group="other", delete=False)
        passes(0.3)
        assert database.task(other)["state"] == "PLAN"  # type: ignore[index]
        os.kill(worker, SIGKILL)
        assert database.wait(other)["attempt"] == 1
    assert database.wait(id)["attempt"] in (1, 2)
    assert {row["state"] for row in database.tasks()} == {"DONE"}


def test_nothing_is_taken_before_the_session_of_a_worker_that_died_is_gone(database: Database, master: Start) -> None:
    """It may still begin the row of a group that has no other slot."""
    with begun_alone(database, master) as (_, worker, _, _):
        [(backend,)] = database.execute("SELECT pid FROM pg_locks WHERE NOT granted")
        second = database.insert("SELECT 1", group="g", delete=False)
        with frozen(backend):
            os.kill(worker, SIGKILL)
            passes(1.0)
            assert database.task(second)["state"] == "PLAN"  # type: ignore[index]
    eventually(lambda: {row["state"] for row in database.tasks()} == {"DONE"})


def test_worker_that_hangs_when_it_has_begun_keeps_the_slot_until_it_is_ended(
    database: Database, master: Start
) -> None:
    """Its session does nothing any more, but has committed; nobody has heard of it, and that was no run."""
    with begun_alone(database, master, "--crashes", "0") as (_, worker, first, waits):
        second = database.insert("SELECT 1", group="g", delete=False)
        with frozen(worker):
            waits.close()
            database.wait(first, "WORK")
            passes(1.0)
            assert database.task(second)["state"] == "PLAN"  # type: ignore[index]
            rows = [database.wait(id) for id in (first, second)]
    assert [(row["state"], row["attempt"]) for row in rows] == [("DONE", 1), ("DONE", 1)]


def test_worker_ends_what_it_was_beginning_when_the_master_left_at_once(database: Database, master: Start) -> None:
    with begun_alone(database, master) as (one, worker, id, _):
        assert one.stop(SIGQUIT) == 0
        assert one.logged("worker_killed") == []
        assert worker in [process.pid for process in one.left()]
    assert database.wait(id)["attempt"] == 1
    eventually(lambda: one.left() == [])


def test_row_that_is_stopped_while_its_worker_begins_it(database: Database, master: Start) -> None:
    one = master("--linger", "1h", database.conninfo)
    lingering(database, one)
    with held(database):
        id = database.insert(WAIT, group="g", delete=False)
        wait_runs(database)
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        row = eventually(lambda: database.tasks("stop IS NOT NULL AND state = 'STOP'"))
    assert row[0]["id"] == id
    assert one.logged("worker_ended") == [] or not one.logged(" WARNING .*worker_ended")


def test_master_that_dies_while_its_worker_begins(database: Database, master: Start) -> None:
    """The worker ends the run that it has begun, of which the next master knows; if nobody began it, that one does."""
    alone = """SELECT count(*) FROM task WHERE state = 'WORK' AND id <> current_setting('pg_task.id')::bigint
        AND pg_sleep(0.5) IS NOT NULL"""
    with begun_alone(database, master, input=alone) as (one, _, id, _):
        second = database.insert(alone, group="g", delete=False)
        one.expect_exit = None
        os.kill(one.pid, SIGKILL)
        two = master(database.conninfo, wait=False)
        passes(1.0)
        assert {row["state"] for row in database.tasks(f"id IN ({id}, {second})")} == {"PLAN"}
    rows = [database.wait(id) for id in (id, second)]
    assert [row["attempt"] for row in rows] == [1, 1]
    two.wait_log(r"\bleading\b")
    assert [row["output"] for row in rows] == ["0", "0"], "two of them ran at once"


def test_worker_of_an_old_session_gives_way_to_a_new_one(database: Database, master: Start) -> None:
    one = master("--linger", "1h", database.conninfo)
    lingering(database, one)
    database.admin_execute(f"ALTER ROLE \"{database.user}\" SET pg_task.probe = 'new'")
    row = database.wait(database.insert("SELECT current_setting('pg_task.probe', true)", group="other", delete=False))
    assert (row["output"], row["attempt"]) == ("new", 1)
    assert one.logged(" WARNING .*worker_ended") == []


def test_trigger_that_refuses_a_begin_holds_up_nobody(database: Database, master: Start) -> None:
    one = master("--linger", "1h", database.conninfo)
    lingering(database, one)
    database.execute(
        """CREATE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$;
        CREATE TRIGGER refuses BEFORE UPDATE ON task FOR EACH ROW
        WHEN (NEW.state = 'WORK' AND NEW.data = 'bad') EXECUTE FUNCTION refuses()"""
    )
    bad = database.insert("SELECT 1", group="bad", data="bad", delete=False)
    for number in range(3):
        assert database.wait(database.insert("SELECT 1", group=f"g{number}", delete=False))["attempt"] == 1
    assert database.task(bad)["attempt"] == 0  # type: ignore[index]
    database.execute("DROP TRIGGER refuses ON task")
    assert database.wait(bad)["attempt"] == 1
