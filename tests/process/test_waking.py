"""Asleep and awake: no wake-up is lost, nothing is polled in vain, and odd situations do not make the master spin."""

import re
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import ASLEEP, asleep, falls_asleep, held, passes
from tests.fixtures.master import Master
from tests.fixtures.processes import cpu_seconds
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually


def statements(database: Database) -> list[str]:
    """What the master has said so far."""
    text = database.server.log_text()  # type: ignore[union-attr]
    return re.findall(rf"^pgtask master\|{database.name}\|LOG:  .*", text, re.MULTILINE)


def said_in(database: Database, seconds: float) -> int:
    """How many statements the master sends in this time."""
    before = len(statements(database))
    passes(seconds)
    return len(statements(database)) - before


def said_per_second(database: Database, seconds: float) -> float:
    """How many statements the master sends in a second, for as long as this."""
    since = time.monotonic()
    said = said_in(database, seconds)
    return said / (time.monotonic() - since)


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("slow"), config='safety = "1h"\nsleep = "1h"') as one:
        yield one


@pytest.fixture
def slow(base: Served) -> Iterator[Served]:
    """A master that is of no use unless it is woken, asleep, and an empty table; whatever the last test left of it."""
    base.database.execute("DELETE FROM task; ALTER TABLE task ENABLE TRIGGER USER")
    falls_asleep(base.database)
    yield base
    base.database.close()


def is_done(database: Database, id: int) -> None:
    """Nothing but a wake-up would find it in time."""
    assert database.wait(id)["state"] == "DONE"


def test_insert_wakes_a_sleeping_master(slow: Served) -> None:
    database = slow.database
    for n in range(3):
        falls_asleep(database)
        is_done(database, database.insert("SELECT 1", group=f"g{n}", delete=False))


def test_task_that_comes_alone_is_handed_out_without_letting_go_of_the_lock(
    talkative: Database, master: Callable[..., Master]
) -> None:
    """Where a look is dear, as on a machine that is busy, the master rises all the same: so not each time."""
    master("--safety", "1h", talkative.conninfo, tables=1)

    def stays_asleep() -> bool:
        falls_asleep(talkative)
        before = len(statements(talkative))
        talkative.wait(talkative.insert("SELECT 1", delete=False))
        falls_asleep(talkative)
        return not any("pg_advisory_unlock" in statement for statement in statements(talkative)[before:])

    eventually(stays_asleep)


def test_insert_by_another_role_wakes_it_too(slow: Served) -> None:
    database = slow.database
    database.admin_execute("CREATE ROLE inserter")
    try:
        database.execute("GRANT INSERT ON task TO inserter")
        session = database.connect(database.admin)
        session.execute("SET ROLE inserter")
        session.execute("INSERT INTO task (input, delete) VALUES ('SELECT 1', false)")
        eventually(lambda: [row["state"] for row in database.tasks()] == ["DONE"])
        session.execute("RESET ROLE")
    finally:
        database.admin_execute("DROP OWNED BY inserter; DROP ROLE inserter")


def test_insert_in_flight_when_the_master_falls_asleep_is_not_lost(slow: Served) -> None:
    database = slow.database
    holder = database.connect(autocommit=False)
    keep = database.insert("SELECT 1", group="held", plan="2100-01-01", delete=False)
    holder.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [keep])
    database.execute("ALTER TABLE task DISABLE TRIGGER pgtask_change")
    writer = database.connect(autocommit=False)
    mine = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'ShareLock' AND objid = 4294967295"

    def in_flight() -> bool:
        """An insert that found the master awake: it has the lock and will not notify."""
        writer.rollback()
        database.execute("INSERT INTO task (input, \"group\") SELECT 'SELECT 1', 'busy' FROM generate_series(1, 2)")
        writer.execute("INSERT INTO task (input, delete, data) VALUES ('SELECT 1', false, 'in flight')")
        return writer.execute(mine).fetchone() == (1,)

    eventually(in_flight)
    passes(0.3)
    assert not asleep(database)
    writer.commit()
    eventually(lambda: [r["state"] for r in database.tasks("data = 'in flight'")] == ["DONE"])
    holder.rollback()


def test_many_inserters_at_once_lose_no_task(slow: Served) -> None:
    database = slow.database
    sessions = [database.connect() for _ in range(4)]
    for n in range(100):
        sessions[n % 4].execute(
            "INSERT INTO task (input, \"group\", delete) VALUES ('SELECT 1', %s, false)", [str(n % 7)]
        )
        if n % 10 == 0:
            passes(0.02)
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(100,)])


def test_due_row_that_somebody_holds_locked_keeps_nobody_else_and_runs_after_release(slow: Served) -> None:
    database = slow.database
    id = database.insert("SELECT 1", group="g", plan="2100-01-01", delete=False)
    holder = database.connect(autocommit=False)
    holder.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [id])
    holder.execute("UPDATE task SET plan = statement_timestamp() WHERE id = %s", [id])
    holder.commit()
    is_done(database, id)
    locked = database.connect(autocommit=False)

    def locked_in_time() -> int:
        plan = psycopg.sql.SQL("clock_timestamp() + interval '400 ms'")
        id = database.insert("SELECT 1", group="g", plan=plan, delete=False)
        if locked.execute("SELECT state::text FROM task WHERE id = %s FOR UPDATE", [id]).fetchone() == ("PLAN",):
            return id
        locked.rollback()
        return 0

    late = eventually(locked_in_time)
    passes(0.5)
    is_done(database, database.insert("SELECT 1", group="g", delete=False))
    is_done(database, database.insert("SELECT 1", group="other", delete=False))
    assert database.task(late)["state"] == "PLAN"  # type: ignore[index]
    eventually(lambda: not slow.master.workers())  # the end of a worker wakes too
    passes(0.2)
    locked.rollback()
    is_done(database, late)


def test_planned_task_starts_when_it_is_due(slow: Served) -> None:
    database = slow.database
    delays = [0.9, 0.3, 0.6]
    ids = [
        database.insert("SELECT 1", plan=psycopg.sql.SQL(f"clock_timestamp() + interval '{s} s'"), delete=False)  # type: ignore[arg-type]
        for s in delays
    ]
    for id in ids:
        row = database.wait(id)
        assert row["start"] >= row["plan"]


def test_plan_that_is_moved_earlier_wakes(slow: Served) -> None:
    database = slow.database
    id = database.insert("SELECT 1", plan="2100-01-01", delete=False)
    falls_asleep(database)
    database.execute("UPDATE task SET plan = now() WHERE id = %s", [id])
    is_done(database, id)


def test_finished_task_set_back_to_plan_runs_again(slow: Served) -> None:
    database = slow.database
    id = database.insert("SELECT 1", delete=False)
    first = database.wait(id)
    falls_asleep(database)
    database.execute("UPDATE task SET state = 'PLAN', plan = now() WHERE id = %s", [id])
    row = eventually(lambda: (r := database.task(id)) and r["state"] == "DONE" and r["attempt"] == 2 and r)
    assert row["start"] > first["start"]


def test_stopped_task_never_runs_and_may_be_planned_again(slow: Served) -> None:
    database = slow.database
    id = database.insert("SELECT 1", plan=psycopg.sql.SQL("now() + interval '4 s'"), delete=False)
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    passes(4.2)
    row = database.task(id)
    assert row is not None
    assert (row["state"], row["attempt"]) == ("STOP", 0)
    database.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    is_done(database, id)


def test_running_task_that_is_stopped_or_deleted_is_cancelled(slow: Served) -> None:
    database = slow.database
    stopped, deleted = (database.insert("SELECT pg_sleep(60)", group=g, delete=False) for g in "ab")
    pids = [database.wait(id, "WORK")["pid"] for id in (stopped, deleted)]
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [stopped])
    database.execute("DELETE FROM task WHERE id = %s", [deleted])
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY (%s) AND state = 'active'"
    eventually(lambda: database.admin_execute(query, [pids]) == [(0,)])
    row = eventually(lambda: (r := database.task(stopped)) and r["stop"] and r)
    assert row["state"] == "STOP"
    is_done(database, database.insert("SELECT 1", group="a", delete=False))


def test_direct_insert_into_a_partition_wakes(database: Database, master: Callable[..., Master]) -> None:
    first = master(database.conninfo)
    first.stop()
    database.execute("CREATE TABLE parted (LIKE task INCLUDING DEFAULTS) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (1000)")
    master("--table", "parted", "--safety", "1h", "--sleep", "1h", database.conninfo, tables=1)
    database.table = "parted"
    falls_asleep(database)
    database.execute("INSERT INTO parted_1 (id, input, delete) VALUES (7, 'SELECT 1', false)")
    is_done(database, 7)


@pytest.mark.parametrize("sleep", ["200ms", "1ms"])
def test_table_without_wake_is_polled_every_sleep(
    database: Database, master: Callable[..., Master], sleep: str
) -> None:
    master("--no-wake", "--safety", "1h", "--sleep", sleep, database.conninfo, tables=1)
    assert database.execute("SELECT tgname FROM pg_trigger WHERE tgname = 'pgtask_wake'") == []
    for _ in range(3):
        is_done(database, database.insert("SELECT 1", delete=False))
    assert database.execute(ASLEEP) == []


def test_sleeping_master_sends_no_statement_and_its_session_outlives_the_idle_timeout(
    talkative: Database, master: Callable[..., Master]
) -> None:
    one = master("--safety", "1h", "--sleep", "1ms", talkative.conninfo, tables=1)
    falls_asleep(talkative)
    [(pid,)] = talkative.execute(ASLEEP)
    assert said_in(talkative, 11) == 0
    assert talkative.execute(ASLEEP) == [(pid,)]
    is_done(talkative, talkative.insert("SELECT 1", delete=False))
    assert one.logged("table_down") == []


def test_safety_poll_finds_what_nobody_told(database: Database, master: Callable[..., Master]) -> None:
    master("--safety", "500ms", database.conninfo, tables=1)
    falls_asleep(database)
    database.execute("ALTER TABLE task DISABLE TRIGGER pgtask_wake")
    is_done(database, database.insert("SELECT 1", delete=False))


def test_notify_is_sent_only_to_a_sleeping_master(database: Database, master: Callable[..., Master]) -> None:
    first = master(database.conninfo)
    first.stop()
    session = database.connect()
    [(oid,)] = database.execute("SELECT 'task'::regclass::oid::bigint")
    session.execute(f"LISTEN pgtask_{oid}".encode())
    database.insert("SELECT 1", plan="infinity")
    assert list(session.notifies(timeout=0.3)) == [], "nobody sleeps"
    session.execute("SELECT pg_advisory_lock(%s::oid::int, -1)", [oid])
    database.insert("SELECT 1", plan="infinity")
    assert len(list(session.notifies(timeout=2, stop_after=1))) == 1


def test_worker_that_finishes_its_runs_notifies_nobody(slow: Served) -> None:
    database = slow.database
    session = database.connect()
    [(oid,)] = database.execute("SELECT 'task'::regclass::oid::bigint")
    session.execute(f"LISTEN pgtask_{oid}".encode())
    database.execute("INSERT INTO task (input, delete) SELECT 'SELECT 1', n % 2 = 0 FROM generate_series(1, 20) AS n")
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(20,)])
    assert len(list(session.notifies(timeout=0.3))) <= 1


SPIN = 60
"""Statements a second at most: polls 50 ms apart say a few each."""


def test_due_row_that_is_locked_does_not_make_the_master_spin(
    talkative: Database, master: Callable[..., Master]
) -> None:
    master(talkative.conninfo)
    id = talkative.insert("SELECT 1", plan=psycopg.sql.SQL("now() + interval '400 ms'"), delete=False)
    session = talkative.connect(autocommit=False)
    session.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [id])
    passes(0.8)
    assert said_per_second(talkative, 1) < 2 * SPIN
    session.rollback()
    is_done(talkative, id)


def test_insert_in_flight_does_not_make_the_master_spin(talkative: Database, master: Callable[..., Master]) -> None:
    master(talkative.conninfo)
    falls_asleep(talkative)
    session = talkative.connect(autocommit=False)
    lock = "SELECT pg_try_advisory_xact_lock_shared('task'::regclass::oid::int, -1)"

    def finds_it_awake() -> bool:
        """By two tasks, of different `max`: one alone may be handed out without letting go of the lock."""
        talkative.execute("INSERT INTO task (input, max) SELECT 'SELECT 1', n FROM generate_series(0, 1) AS n")
        since = time.monotonic()
        while time.monotonic() - since < 0.5:
            if session.execute(lock).fetchone() == (True,):
                return True
            session.rollback()
        return False

    eventually(finds_it_awake)
    passes(0.3)
    assert said_per_second(talkative, 1) < SPIN
    session.rollback()
    falls_asleep(talkative)


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        ((), {"group": "full"}),
        (("--workers", "1"), {"group": "other"}),
        (("--run", "1"), {"group": "other"}),
        ((), {"group": "full", "max": -1}),
    ],
    ids=["full group", "all workers busy", "table at its limit", "resting"],
)
def test_due_rows_that_have_no_place_do_not_make_the_master_spin(
    talkative: Database, master: Callable[..., Master], arguments: tuple[str, ...], columns: dict[str, object]
) -> None:
    one = master(*arguments, talkative.conninfo, tables=1)
    long = talkative.insert("SELECT pg_sleep(60)", group="full", delete=False)
    talkative.wait(long, "WORK")
    waiting = [talkative.insert("SELECT 1", delete=False, **columns) for _ in range(3)]
    eventually(lambda: said_in(talkative, 0.7) <= 2)
    talkative.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [long])
    for id in waiting:
        is_done(talkative, id)
    assert len(one.logged("worker_forked")) <= 6


def test_what_came_too_late_is_told_and_a_row_that_runs_again_is_not(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo, tables=1)
    gone = database.insert("SELECT 1", plan="2020-01-01", delete=False)
    assert database.wait(gone, "GONE")["error"] == "ERROR:  task not active"
    one.wait_log("tasks_gone .*count=1")
    again = database.insert("SELECT 1", delete=False)
    database.wait(again)
    database.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [again])
    eventually(lambda: database.tasks("attempt = 2 AND state = 'DONE'"))
    assert len(one.logged("tasks_gone")) == 1


def test_pause_after_a_negative_max_does_not_make_the_master_spin(
    talkative: Database, master: Callable[..., Master]
) -> None:
    master("--safety", "1h", talkative.conninfo, tables=1)
    first, second = (talkative.insert("SELECT 1", max=-1500, delete=False) for _ in range(2))
    row = talkative.wait(first)
    before = len(statements(talkative))
    following = talkative.wait(second)
    assert (following["start"] - row["stop"]).total_seconds() >= 1.49
    assert len(statements(talkative)) - before < 40, "thirty polls 50 ms apart would say more"


def test_stop_that_waits_for_a_run_does_not_make_the_master_spin(
    talkative: Database, master: Callable[..., Master]
) -> None:
    one = master(talkative.conninfo)
    with held(talkative, 7):
        talkative.wait(talkative.insert("SELECT pg_advisory_xact_lock(7)", delete=False), "WORK")
        talkative.insert("SELECT 1", group="other", plan=psycopg.sql.SQL("now() + interval '100 ms'"))
        one.process.terminate()
        one.wait_log("stopping")
        eventually(lambda: said_in(talkative, 0.6) == 0)
    assert one.process.wait(20) == 0


def test_master_that_waits_uses_no_cpu(slow: Served) -> None:
    """Nothing but the tick of a clock may be counted, and what it does once after its start."""

    def used() -> float:
        before = cpu_seconds(slow.master.pid)
        passes(0.5)
        return cpu_seconds(slow.master.pid) - before

    eventually(lambda: used() < 0.015 and used() < 0.015)
