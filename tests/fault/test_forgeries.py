"""What any role that may connect to the database can say and lock: notifications and advisory locks are nobody's own.

Nothing that is said on our channel may stop the master or end a run that nobody stopped; a lock of ours that is held
by another is told with the name of who holds it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.processes import frozen
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

LONG = "SELECT pg_sleep(600)"
MASTER, ASLEEP = -2, -1


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("forged"), config='safety = "1h"\nsleep = "1h"') as one:
        yield one


@pytest.fixture(scope="module")
def stranger(base: Served) -> Iterator[psycopg.Connection[Any]]:
    """A session of a role that has no right at all but to connect."""
    yield from a_stranger(base.database)


def a_stranger(database: Database) -> Iterator[psycopg.Connection[Any]]:
    name = f"{database.name}_stranger"
    database.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    session = psycopg.connect(database.server.conninfo(database.name, name), autocommit=True)
    yield session
    session.close()
    database.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def oid(database: Database) -> int:
    return int(database.execute("SELECT 'task'::regclass::oid::bigint")[0][0])


def say(session: psycopg.Connection[Any], database: Database, payload: str) -> None:
    session.execute("SELECT pg_notify(%s, %s)", [f"pgtask_{oid(database)}", payload])


def heard_all(base: Served) -> None:
    """The master has read what was said so far: it takes and runs a task that came later."""
    assert base.run("SELECT 1", group="afterwards")["state"] == "DONE"


PAYLOADS = [
    *(
        "",
        "x",
        "-",
        "--1",
        "1 ",
        "+1",
        "1e3",
        "0x10",
        "\N{SUPERSCRIPT TWO}",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "\n",
        "'; DROP",
    ),
    *("9" * 19, "9" * 20, "9" * 5000, "-" + "9" * 7000, "9223372036854775807", "-9223372036854775808"),
    *("\N{ESCAPE}[2J", "é" * 3000),
]


def test_nothing_said_on_the_channel_stops_the_master_or_a_run(base: Served, stranger: psycopg.Connection[Any]) -> None:
    id = base.database.insert(LONG, group="kept")
    before = base.database.wait(id, "WORK")
    for payload in PAYLOADS:
        say(stranger, base.database, payload)
        heard_all(base)
    assert base.database.task(id) == before
    base.database.execute("DELETE FROM task WHERE id = %s", [id])
    assert base.then_next("SELECT 1", group="kept")["state"] == "DONE"


def test_row_that_nobody_stopped_is_not_cancelled_by_who_says_its_id(
    base: Served, stranger: psycopg.Connection[Any]
) -> None:
    runs = [base.database.insert(LONG, group=f"said {n}") for n in range(3)]
    before = [base.database.wait(id, "WORK") for id in runs]
    for id in [*runs, 0]:
        say(stranger, base.database, str(id))
        heard_all(base)
    assert [base.database.task(id) for id in runs] == before
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [runs[1]])
    eventually(lambda: (base.database.task(runs[1]) or {})["stop"])
    assert [base.database.task(id) for id in runs[::2]] == before[::2]
    base.database.execute("DELETE FROM task WHERE id = ANY (%s)", [runs])


def test_stop_of_the_row_with_id_zero_stops_no_other(base: Served) -> None:
    other = base.database.insert(LONG, group="other than zero")
    zero = base.database.insert(LONG, group="zero", id=0)
    before = base.database.wait(other, "WORK")
    base.database.wait(zero, "WORK")
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = 0")
    eventually(lambda: (base.database.task(zero) or {})["stop"])
    heard_all(base)
    assert base.database.task(other) == before
    base.database.execute("DELETE FROM task WHERE id IN (%s, 0)", [other])


def test_id_said_while_the_row_is_about_to_begin_costs_it_nothing(
    base: Served, stranger: psycopg.Connection[Any]
) -> None:
    """Each row is named from before it is there until it has run: at every moment of its life."""
    [(last,)] = base.database.execute("SELECT max(id) FROM task")
    names = [str(last + n) for n in range(1, 41)]
    ids = []
    for n in range(20):
        ids.append(base.database.insert("SELECT pg_sleep(0.01)", group=f"named {n}", delete=False))
        for _ in range(3):
            stranger.execute("SELECT pg_notify(%s, id) FROM unnest(%s::text[]) AS id", [channel(base), names])
    rows = [base.database.wait(id) for id in ids]
    assert {(row["state"], row["attempt"]) for row in rows} == {("DONE", 1)}


def channel(base: Served) -> str:
    return f"pgtask_{oid(base.database)}"


def test_flood_of_notifications_keeps_no_task_waiting(base: Served, stranger: psycopg.Connection[Any]) -> None:
    flood = """DO $$BEGIN FOR i IN 1 .. 20000 LOOP
        PERFORM pg_notify('CHANNEL', i::text || repeat(' ', i % 2)); END LOOP; END$$"""
    running = base.database.insert(LONG, group="flooded run")
    before = base.database.wait(running, "WORK")
    for _ in range(3):
        stranger.execute(flood.replace("CHANNEL", channel(base)).encode())
        assert base.run("SELECT 1", group="flooded")["state"] == "DONE"
    assert base.database.task(running) == before
    base.database.execute("DELETE FROM task WHERE id = %s", [running])


def test_stop_reaches_a_worker_that_hung_while_others_were_told(
    base: Served, stranger: psycopg.Connection[Any]
) -> None:
    running = base.database.insert(LONG, group="hung run")
    row = base.database.wait(running, "WORK")
    [begun] = base.master.wait_log(rf"run_begun id={running} ")
    with frozen(int(begun.split("[")[1].split("]")[0])):
        for _ in range(3):
            stranger.execute("SELECT pg_notify(%s, n::text) FROM generate_series(100001, 120000) AS n", [channel(base)])
            assert base.run("SELECT 1", group="hung")["state"] == "DONE"
        base.database.execute("DELETE FROM task WHERE id = %s", [running])
        assert base.run("SELECT 1", group="hung")["state"] == "DONE"
    query = "SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
    eventually(lambda: not base.database.admin_execute(query, [row["pid"]]))
    base.master.wait_log(rf"run_ended id={running} ")


def test_whoever_listens_hears_no_more_than_an_id(base: Served, stranger: psycopg.Connection[Any]) -> None:
    stranger.execute(f"LISTEN {channel(base)}".encode())
    id = base.database.insert("SELECT 'secret', pg_sleep(60)", group="secret", data="secret")
    base.database.wait(id, "WORK")
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    say(stranger, base.database, "end")
    heard = []
    for notify in stranger.notifies(timeout=20):
        heard.append(notify.payload)
        if notify.payload == "end":
            break
    stranger.execute("UNLISTEN *")
    assert heard.pop() == "end"
    assert str(id) in heard
    assert set(heard) <= {"", "ended", str(id)}


# Locks


@pytest.fixture
def locker(database: Database) -> Iterator[psycopg.Connection[Any]]:
    yield from a_stranger(database)


def test_lock_of_the_leader_in_other_hands_is_told_with_its_holder(
    database: Database, master: Callable[..., Master], locker: psycopg.Connection[Any]
) -> None:
    first = master()
    id = database.insert("SELECT 1", delete=False)
    database.wait(id, "DONE")
    first.stop()
    assert locker.execute("SELECT pg_try_advisory_lock(%s, %s)", [oid(database), MASTER]).fetchone() == (True,)
    second = master(wait=False)
    [line] = second.wait_log("lock_held_by_another")
    assert " WARNING " in line
    for part in (f"backend={locker.info.backend_pid}", f"user={locker.info.user}", "pg_terminate_backend"):
        assert part in line
    later = database.insert("SELECT 2", delete=False)
    database.admin_execute("SELECT pg_terminate_backend(%s)", [locker.info.backend_pid])
    assert database.wait(later)["state"] == "DONE"
    assert len(second.logged("lock_held_by_another")) == 1


def test_leader_that_keeps_another_master_waiting_is_not_accused(
    database: Database, master: Callable[..., Master]
) -> None:
    master()
    second = master(wait=False)
    second.wait_log("standing_by")
    statements = (
        "SELECT state_change FROM pg_stat_activity WHERE application_name = 'pgtask master' AND query ~ 'pg_locks'"
        " AND datname = current_database()"
    )
    looks: set[Any] = set()

    def looked_twice() -> bool:
        looks.update(database.admin_execute(statements))
        return len(looks) > 1

    eventually(looked_twice)
    assert not second.logged("lock_held_by_another")


@pytest.mark.parametrize("how", ["pg_try_advisory_lock", "pg_try_advisory_lock_shared"])
def test_lock_of_the_sleeper_in_other_hands_loses_no_task(
    database: Database, master: Callable[..., Master], locker: psycopg.Connection[Any], how: str, tmp_path: Path
) -> None:
    master("--safety", "1h", "--sleep", "1h", database.conninfo, tables=1)

    def taken() -> bool:
        """A sleeping master holds it; it is free for a moment whenever that wakes."""
        database.insert("SELECT 1")
        return locker.execute(f"SELECT {how}(%s, %s)".encode(), [oid(database), ASLEEP]).fetchone() == (True,)

    eventually(taken)
    for _ in range(5):
        assert database.wait(database.insert("SELECT 2", delete=False))["state"] == "DONE"
