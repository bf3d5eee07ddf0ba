"""Slots that nobody counts: what is held when a term begins, and rows that a quick look cannot see."""

from collections.abc import Callable

from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import passes
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

FOREIGN_RUN = (
    "INSERT INTO task (\"group\", input, state, pid, start) VALUES ('g', 'SELECT 1', 'TAKE', 0, now()) RETURNING id"
)
WENT_BY = """INSERT INTO task (plan, "group", input, state)
    SELECT now() - interval '1 h' + n * interval '1 ms', 'g', 'SELECT 1', 'PLAN' FROM generate_series(1, 30000) AS n"""


def test_row_that_an_old_worker_is_beginning_as_a_term_begins_holds_its_slot(
    database: Database, master: Callable[..., Master]
) -> None:
    """Its poller is gone, and a rescue passes over the row, which is locked until the beginning is committed."""
    install(database)
    [(id,)] = database.execute(FOREIGN_RUN)
    worker = database.connect(autocommit=False)
    begin = "UPDATE task SET state = 'WORK', pid = pg_backend_pid(), start = clock_timestamp() WHERE id = %s"
    worker.execute(begin, [id])
    following, other = database.insert("SELECT 1", group="g"), database.insert("SELECT 1", group="other")
    master(database.conninfo)
    database.wait(other, "DONE")
    worker.commit()
    passes(1)
    database.wait(following, "PLAN")
    worker.close()
    assert [database.wait(row)["state"] for row in (id, following)] == ["DONE", "DONE"]


def test_rows_that_a_quick_look_cannot_see_are_found_by_a_full_one(
    database: Database, master: Callable[..., Master]
) -> None:
    """Full looks are dear, since an old snapshot keeps the index entries of all that went by."""
    served = master(database.conninfo)
    served.wait_log("leading")
    old = database.connect(autocommit=False)
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT FROM task")
    with database.connect(database.admin, autocommit=False) as session:
        session.execute("SET LOCAL session_replication_role = replica")
        session.execute(WENT_BY)
        session.execute("UPDATE task SET state = 'DONE'")
    count = "INSERT INTO task (\"group\", input) SELECT 'g', 'SELECT pg_sleep(0.002)' FROM generate_series(1, 300)"
    database.execute(count)
    early = database.insert("SELECT 1", group="early", plan="1999-01-01", active="100 years")
    urgent = database.insert("SELECT 1", group="g", max=1, plan="1999-01-01", active="100 years")
    assert [database.wait(id)["state"] for id in (early, urgent)] == ["DONE", "DONE"]
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)])
    assert database.wait(database.insert("SELECT 1", group="g"))["state"] == "DONE"
    old.close()
