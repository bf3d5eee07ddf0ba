"""Tasks that share a transaction when their worker, its session or the master goes."""

import os
from collections.abc import Callable
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

HOLD = 726
WAIT = f"SELECT pg_advisory_xact_lock_shared({HOLD})"


class Held:
    """Four tasks, taken together, whose second waits in their transaction until it is let go."""

    def __init__(self, database: Database, one: Master) -> None:
        self.database = database
        self.master = one
        self._gate = database.connect()
        self._gate.execute("SELECT pg_advisory_lock(%s)", [HOLD])
        database.execute("CREATE TABLE did (id text)")
        did = "INSERT INTO did VALUES (current_setting('pg_task.id'))"
        inputs = ["SELECT 1", did, f"{did} RETURNING pg_advisory_xact_lock_shared({HOLD})", did, did]
        query = (
            "INSERT INTO task (input, delete, batch) SELECT i, false, 10"
            " FROM unnest(%s::text[]) WITH ORDINALITY AS u (i, n) ORDER BY n RETURNING id"
        )
        self.ids = [id for (id,) in database.execute(query, [inputs])][1:]
        database.wait(self.ids[-1], "WORK")
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
        [(self.backend,)] = eventually(lambda: database.admin_execute(waiting, [database.name]))

    def let_go(self) -> None:
        self._gate.execute("SELECT pg_advisory_unlock_all()")

    def states(self) -> list[tuple[str, int]]:
        query = "SELECT state::text, attempt FROM task WHERE id = ANY (%s) ORDER BY id"
        return self.database.execute(query, [self.ids])

    def did(self) -> list[str]:
        return [id for (id,) in self.database.execute("SELECT id FROM did ORDER BY id::int")]


@pytest.fixture
def held(database: Database, master: Callable[..., Master]) -> Held:
    return Held(database, master("--batch-time", "30s", "--crashes", "0", database.conninfo, tables=1))


@pytest.mark.parametrize("who", ["worker", "backend"])
def test_run_lost_with_others_counts_for_none_and_each_runs_by_itself_the_next_time(held: Held, who: str) -> None:
    held.master.may_log_errors = True
    if who == "worker":
        os.kill(held.master.workers()[0], SIGKILL)
    else:
        held.database.admin_execute("SELECT pg_terminate_backend(%s)", [held.backend])
    eventually(lambda: held.states()[0] == ("DONE", 2))
    held.let_go()
    assert [held.database.wait(id)["error"] for id in held.ids] == [None] * 4
    assert held.states() == [("DONE", 2)] * 4
    assert held.did() == [str(id) for id in held.ids]
    assert len(held.master.logged(r"run_ended .*together=")) == 0


def test_row_that_is_locked_when_its_worker_dies_goes_back_when_the_lock_is_gone(held: Held) -> None:
    held.master.may_log_errors = True
    locker = held.database.connect(autocommit=False)
    locker.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [held.ids[-1]])
    os.kill(held.master.workers()[0], SIGKILL)
    held.let_go()
    eventually(lambda: [state for state, _ in held.states()] == ["PLAN", "PLAN", "PLAN", "WORK"])
    locker.rollback()
    assert {held.database.wait(id)["state"] for id in held.ids} == {"DONE"}
    assert held.did() == [str(id) for id in held.ids]


def test_those_in_hand_go_back_when_one_that_no_cancel_ends_has_lost_the_session(
    database: Database, master: Callable[..., Master]
) -> None:
    master("--batch-time", "2s", database.conninfo, tables=1)
    deaf = (
        "DO $$ BEGIN LOOP BEGIN PERFORM pg_sleep(100); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END $$;"
        " SELECT 'COMMIT'"
    )
    query = (
        "INSERT INTO task (input, delete, batch, timeout) SELECT i, false, 10, '3 s'"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS u (i, n) ORDER BY n RETURNING id"
    )
    ids = [id for (id,) in database.execute(query, [["SELECT 1", deaf, "SELECT 2", "SELECT 3"]])]
    database.wait(ids[3], "WORK")
    rows = [database.wait(id) for id in ids]
    assert [(row["state"], row["attempt"]) for row in rows] == [("DONE", 1), ("FAIL", 1), ("DONE", 1), ("DONE", 1)]


@pytest.mark.parametrize("sig", [SIGTERM, SIGINT])
def test_stop_of_the_master_lets_all_end_or_puts_back_what_has_not(held: Held, sig: Signals) -> None:
    held.master.signal(sig)
    held.master.wait_log("stopping")
    if sig == SIGTERM:
        held.let_go()
    assert held.master.process.wait(20) == 0
    if sig == SIGTERM:
        assert held.states() == [("DONE", 1)] * 4
        assert held.did() == [str(id) for id in held.ids]
    else:
        assert held.states() == [("DONE", 1)] + [("PLAN", 0)] * 3
        assert held.did() == [str(held.ids[0])]


def test_master_that_is_killed_costs_nothing(held: Held, master: Callable[..., Master]) -> None:
    held.master.expect_exit = -SIGKILL
    held.master.stop(SIGKILL)
    master("--batch-time", "30s", held.database.conninfo, tables=1)
    held.let_go()
    for id in held.ids:
        assert held.database.wait(id)["state"] == "DONE"
    assert held.did() == [str(id) for id in held.ids]


def test_every_task_runs_once_while_workers_are_killed(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master("--crashes", "1000", "--workers", "4", "--batch-time", "30s", database.conninfo, tables=1)
    one.may_log_errors = True
    database.execute("ALTER TABLE task ALTER batch SET DEFAULT 20")
    kills = 0
    while kills < 12:
        if (left := ledger.unfinished()) < 200:
            ledger.fill(400, groups=4, ms=1)
            continue
        eventually(lambda: ledger.unfinished() < left)
        for worker in one.workers()[:1]:
            os.kill(worker, SIGKILL)
            kills += 1
    ledger.fill(40, groups=1, ms=1)
    ledger.settled()
    one.wait_log(r"run_ended .*together=")
