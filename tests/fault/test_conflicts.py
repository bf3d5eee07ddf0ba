"""Serialization failures and deadlocks: at the finish they cost a run and no attempt, in the input they are its own."""

from collections.abc import Iterator

import pytest

from tests.fixtures.ledger import Ledger
from tests.fixtures.locks import held, wait_runs
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = """
CREATE TABLE sums (id int PRIMARY KEY, total bigint NOT NULL);
INSERT INTO sums SELECT n, 0 FROM generate_series(1, 8) AS n;
CREATE TABLE late (first bigint, second bigint);
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
    PERFORM pg_advisory_xact_lock(NEW.first);
    PERFORM pg_advisory_xact_lock_shared(400);
    PERFORM pg_advisory_xact_lock(NEW.second);
    RETURN NULL;
END$$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION late();
"""

SKEW = """SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;
INSERT INTO ledger (id, attempt) SELECT id, sum FROM (SELECT sum(total) FROM sums) AS s,
    (SELECT current_setting('pg_task.id')::bigint AS id) AS t;
SELECT pg_sleep(0.005);
UPDATE sums SET total = total + 1 WHERE id = 1 + current_setting('pg_task.id')::bigint % 8"""
"""Reads what all others write: of two at once, the one that commits last must be run again."""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("conflicts"), setup=SETUP) as one:
        yield one


def test_serialization_failure_at_the_finish_is_repeated_at_no_attempts_cost(base: Served) -> None:
    """Two that have both read and written before either commits: the second cannot commit."""
    database = base.database
    book = Ledger(database)
    input = SKEW.replace("SELECT pg_sleep(0.005);\n", "") + "; SELECT pg_advisory_xact_lock_shared(401)"
    with held(database, 401):
        book.fill(2, groups=2, input=input)
        wait_runs(database, 2)
    book.settled()
    rows = database.tasks("\"group\" LIKE 'ledger %'")
    assert [(row["state"], row["attempt"], row["error"]) for row in rows] == [("DONE", 1, None)] * 2
    # Each saw another sum: they ran one after the other, as far as their results go.
    assert sorted(database.execute("SELECT attempt FROM ledger")) == [(0,), (1,)]
    runs = [len(base.master.logged(rf"DEBUG.* run_begun id={row['id']} attempt=1\b")) for row in rows]
    assert sum(runs) >= 3, "there was no conflict at all"


def test_deadlock_at_the_end_is_repeated_at_no_attempts_cost(base: Served) -> None:
    database = base.database
    with held(database, 400):
        ids = [
            database.insert(f"INSERT INTO late VALUES ({a}, {b})", group=f"late {a}", delete=False)
            for a, b in ((402, 403), (403, 402))
        ]
        wait_runs(database, 2)
    for id in ids:
        row = database.wait(id)
        assert (row["state"], row["attempt"], row["error"]) == ("DONE", 1, None)
    runs = [len(base.master.logged(rf"DEBUG.* run_begun id={id} attempt=1\b")) for id in ids]
    assert sum(runs) >= 3, "there was no deadlock at all"
    assert database.execute("SELECT count(*) FROM late") == [(2,)]


def test_deadlock_in_the_input_is_the_error_of_one_task_and_the_other_goes_on(base: Served) -> None:
    database = base.database
    input = (
        "UPDATE sums SET total = total WHERE id = {}; SELECT pg_advisory_xact_lock_shared(404);"
        " UPDATE sums SET total = total WHERE id = {}"
    )
    with held(database, 404):
        ids = [database.insert(input.format(a, b), group=f"input {a}", delete=False) for a, b in ((1, 2), (2, 1))]
        wait_runs(database, 2)
    rows = [database.wait(id) for id in ids]
    assert sorted((row["state"], row["code"], row["attempt"]) for row in rows) == [
        ("DONE", None, 1),
        ("FAIL", "40P01", 1),
    ]
    [failed] = [row for row in rows if row["state"] == "FAIL"]
    assert failed["error"].startswith("ERROR:  deadlock detected")


def test_serialization_failure_in_the_input_is_the_tasks_error(base: Served) -> None:
    database = base.database
    input = (
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT total FROM sums WHERE id = 3;"
        " SELECT pg_advisory_xact_lock_shared(405); UPDATE sums SET total = total + 1 WHERE id = 3"
    )
    with held(database, 405):
        id = database.insert(input, delete=False)
        wait_runs(database)
        database.execute("UPDATE sums SET total = total + 1 WHERE id = 3")
    row = database.wait(id)
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "40001", 1)


def test_many_serializable_tasks_all_end_and_their_sums_agree(base: Served) -> None:
    """Tasks that conflict at random: those whose input fails may fail, the others run exactly once."""
    database = base.database
    database.execute("DELETE FROM task; DELETE FROM ledger; UPDATE sums SET total = 0")
    book = Ledger(database)
    book.fill(80, groups=5, input=SKEW)
    eventually(lambda: book.unfinished() == 0, timeout=40)
    rows = database.tasks("\"group\" LIKE 'ledger %'")
    done = [row for row in rows if row["state"] == "DONE"]
    assert {(row["state"], row["code"], row["attempt"]) for row in rows} <= {("DONE", None, 1), ("FAIL", "40001", 1)}
    assert done
    assert sorted(database.execute("SELECT id FROM ledger")) == [(row["id"],) for row in done]
    assert database.execute("SELECT sum(total)::int FROM sums") == [(len(done),)]
    seen = database.execute("SELECT count(DISTINCT attempt) FROM ledger")
    assert seen == [(len(done),)], "two tasks saw the same sum"
