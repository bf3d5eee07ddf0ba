"""A running task that its user stops or deletes ends at once, its work undone, and it alone."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = "CREATE TABLE effect (what text)"
SHORT = "SELECT pg_sleep(0.01); INSERT INTO effect VALUES (current_setting('pg_task.id'))"


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("stop"), setup=SETUP) as one:
        yield one


def effects(base: Served, what: str) -> int:
    return int(base.database.execute("SELECT count(*) FROM effect WHERE what = %s", [what])[0][0])


def active(base: Served, mark: str) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
    return bool(base.database.execute(f"{query} AND pid <> pg_backend_pid() AND strpos(query, %s) > 0", [mark]))


@pytest.mark.parametrize("atomic", [True, False])
def test_stop_cancels_the_running_statement_at_once_and_undoes_the_work(base: Served, atomic: bool) -> None:
    mark = f"stop {atomic}"
    id, following = base.insert_pair(
        f"INSERT INTO effect VALUES ('{mark}'); SELECT pg_sleep(60)", group=mark, atomic=atomic
    )
    eventually(lambda: active(base, mark))
    started = time.monotonic()
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    after = base.database.wait(following)
    assert time.monotonic() - started < 20
    assert after["state"] == "DONE"
    assert json.loads(after["output"]) == base.clean
    row = base.database.task(id)
    assert row is not None
    assert (row["state"], row["attempt"], row["output"], effects(base, mark)) == ("STOP", 1, None, 0)
    assert row["stop"] > row["start"]
    first, rest = row["error"].split("\n", 1)
    assert first == f"ERROR:  task stopped by {base.database.user}"
    assert rest.startswith("ERROR:  canceling statement due to user request\n")


@pytest.mark.parametrize("atomic", [True, False])
def test_delete_cancels_the_running_statement_at_once_and_undoes_the_work(base: Served, atomic: bool) -> None:
    mark = f"delete {atomic}"
    id, following = base.insert_pair(
        f"INSERT INTO effect VALUES ('{mark}'); SELECT pg_sleep(60)", group=mark, atomic=atomic
    )
    eventually(lambda: active(base, mark))
    started = time.monotonic()
    base.database.execute("DELETE FROM task WHERE id = %s", [id])
    after = base.database.wait(following)
    assert time.monotonic() - started < 20
    assert (after["state"], json.loads(after["output"])) == ("DONE", base.clean)
    assert (base.database.task(id), effects(base, mark)) == (None, 0)


def test_stop_of_a_planned_task_keeps_it_from_running(base: Served) -> None:
    id = base.database.insert("INSERT INTO effect VALUES ('planned')", plan="infinity")
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    base.database.execute("UPDATE task SET plan = now() WHERE id = %s", [id])
    base.then_next("SELECT 1")
    row = base.database.task(id)
    assert row is not None
    assert (row["state"], effects(base, "planned")) == ("STOP", 0)


def test_stopped_task_set_back_to_plan_runs_again(base: Served) -> None:
    input = "SELECT pg_sleep(60 * (attempt = 1)::int), attempt FROM task WHERE \"group\" = 'again'"
    id = base.database.insert(input, group="again", header=False)
    eventually(lambda: active(base, "60 * (attempt"))
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    eventually(lambda: not active(base, "60 * (attempt"))
    base.database.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    row = base.database.wait(id, "DONE")
    assert (row["attempt"], row["output"], row["error"]) == (2, "\t2", None)


def test_stops_never_hit_the_next_task(base: Served) -> None:
    """Short tasks are stopped while they run, begin and end; all of the others must run to their end."""
    database = base.database

    def some_stopped() -> bool:
        ids = [database.insert(SHORT, group="never", delete=False) for _ in range(60)]
        for id in ids[::2]:
            database.wait(id, "WORK", "DONE")
            database.execute("UPDATE task SET state = 'STOP' WHERE id = %s AND state IN ('TAKE', 'WORK')", [id])
        rows = [database.wait(id) for id in ids]
        assert {row["state"] for row in rows[1::2]} == {"DONE"}
        for row in rows:
            assert effects(base, str(row["id"])) == (row["state"] == "DONE"), row
        return any(row["state"] == "STOP" for row in rows[::2])

    eventually(some_stopped, 60)  # on a slow machine we may find each of them done already


def test_deletes_never_hit_the_next_task(base: Served) -> None:
    database = base.database

    def some_deleted() -> bool:
        ids = [database.insert(SHORT, group="never deleted", delete=False) for _ in range(40)]
        deleted = set()
        for id in ids[::2]:
            database.wait(id, "WORK", "DONE")
            query = "DELETE FROM task WHERE id = %s AND state IN ('TAKE', 'WORK') RETURNING id"
            deleted |= {id for (id,) in database.execute(query, [id])}
        assert {database.wait(id)["state"] for id in ids if id not in deleted} == {"DONE"}
        for id in ids:  # when the last of the group has ended, so have the runs of those that were deleted
            assert effects(base, str(id)) == (id not in deleted)
        return bool(deleted)

    eventually(some_deleted, 60)


def test_task_stopped_while_it_waits_for_a_lock_ends(base: Served) -> None:
    holder = base.database.connect()
    holder.execute("SELECT pg_advisory_lock(91)")
    id, following = base.insert_pair("SELECT pg_advisory_lock(91)", group="lock")
    eventually(lambda: active(base, "lock(91)"))
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert base.database.wait(following)["state"] == "DONE"


def test_stop_that_is_not_committed_yet_is_waited_for(base: Served) -> None:
    database = base.database
    with held(database):
        id = database.insert(f"INSERT INTO effect VALUES ('uncommitted'); {WAIT}", group="uncommitted")
        wait_runs(database)
        other = database.connect(autocommit=False)
        other.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    eventually(lambda: database.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"))
    other.commit()
    base.then_next("SELECT 1", group="uncommitted")
    row = database.task(id)
    assert row is not None
    assert (row["state"], effects(base, "uncommitted")) == ("STOP", 0)
    eventually(lambda: (database.task(id) or {})["stop"])


def test_stop_of_a_repeated_task_ends_its_chain(base: Served) -> None:
    id = base.database.insert("SELECT pg_sleep(60), 'chain'", repeat="1 ms", group="chain")
    eventually(lambda: active(base, "'chain'"))
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    base.then_next("SELECT 1", group="chain")
    assert base.database.execute("SELECT count(*) FROM task WHERE parent = %s", [id]) == [(0,)]


def test_row_set_back_to_plan_while_it_runs_is_run_again_and_the_first_run_undone(base: Served) -> None:
    database = base.database
    with held(database):
        id = database.insert(f"INSERT INTO effect VALUES ('twice'); {WAIT}", group="twice", delete=False)
        wait_runs(database)
        database.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 2)
    base.then_next("SELECT 1", group="after twice")
    assert effects(base, "twice") == 1
