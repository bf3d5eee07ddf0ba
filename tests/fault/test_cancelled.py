"""Somebody cancels the clean-up of a worker's session, which has begun the next task already."""

from collections.abc import Callable

from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import held, wait_runs
from tests.fixtures.master import Master

LITTER = "CREATE TEMP TABLE litter (id int); COMMIT; SELECT pg_advisory_lock_shared(7), pg_advisory_unlock_shared(7)"


def test_cancel_that_hits_the_clean_up_loses_no_run(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    with database.connect(database.admin, autocommit=False) as locking:
        with held(database, 7):
            ids = [database.insert(input, delete=False) for input in (LITTER, "SELECT to_regclass('litter') IS NULL")]
            wait_runs(database)
            [(schema,)] = database.execute(
                "SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname = 'litter'"
            )
            locking.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.Identifier(schema, "litter")))
        database.wait(ids[1], "WORK")
        wait_runs(database)
        database.execute("SELECT pg_cancel_backend(pid) FROM task WHERE id = %s", [ids[1]])
        one.wait_log("cleanup_failed")
    row = database.wait(ids[1])
    assert (row["state"], row["attempt"], row["output"]) == ("DONE", 1, "t")
    assert one.logged("run_lost") == []
