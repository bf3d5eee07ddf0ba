"""Triggers and constraints of the user's own on the task table: they may refuse, swallow or change what we write.

Whatever they do, other groups are served, nothing spins, and an atomic task's effect and its being done never come
apart.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import cpu_seconds, passes, transactions
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer

EFFECT = "INSERT INTO effect VALUES (current_setting('pg_task.id')::bigint)"
SILENT = f"WITH e AS ({EFFECT} RETURNING id) SELECT FROM e WHERE id IS NULL"


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("triggers"), setup="CREATE TABLE effect (id bigint)") as one:
        one.master.may_log_errors = True
        yield one


def effects(database: Database, id: int) -> int:
    return int(database.execute("SELECT count(*) FROM effect WHERE id = %s", [id])[0][0])


@contextmanager
def trigger(database: Database, events: str, body: str, *, timing: str = "BEFORE") -> Iterator[None]:
    """A row trigger with this body, on rows whose data is 'odd'."""
    database.execute(
        f"""CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $odd$BEGIN
                IF (coalesce(NEW, OLD)).data = 'odd' THEN {body} END IF;
                RETURN coalesce(NEW, OLD);
            END$odd$;
            CREATE TRIGGER odd {timing} {events} ON task FOR EACH ROW EXECUTE FUNCTION odd()"""
    )
    try:
        yield
    finally:
        database.execute("DROP TRIGGER odd ON task; DROP FUNCTION odd()")


def raises(state: str) -> str:
    return f"IF NEW.state = '{state}' THEN RAISE 'no {state} today' USING ERRCODE = 'P0042'; END IF;"


def swallows(state: str) -> str:
    return f"IF NEW.state = '{state}' THEN RETURN NULL; END IF;"


def others_run(base: Served) -> None:
    """Tasks of other groups, usual ones, are served."""
    ids = [base.database.insert("SELECT 1", group=f"usual {n % 2}", delete=False) for n in range(4)]
    for id in ids:
        assert base.database.wait(id)["state"] == "DONE"


def is_calm(base: Served, seconds: float = 0.5) -> None:
    """Neither the master nor its workers spin, and the log does not grow by much."""
    pids = [base.master.pid, *base.master.workers()]
    lines, ended, used = len(base.master.logged("INFO|WARNING|ERROR")), transactions(base.database), cpu_seconds(pids)
    since = time.monotonic()
    passes(seconds)
    assert cpu_seconds(pids) - used < (time.monotonic() - since) / 3, "somebody spins"
    # The server counts up to a second late: what was done before may be in it.
    assert transactions(base.database) - ended < 1000
    assert len(base.master.logged("INFO|WARNING|ERROR")) - lines < 10


# What keeps a task from starting


def test_insert_that_a_trigger_refuses_is_the_applications_error(base: Served) -> None:
    with trigger(base.database, "INSERT", "RAISE 'no inserts today';"):
        with pytest.raises(psycopg.errors.RaiseException):
            base.database.insert("SELECT 1", data="odd")
        others_run(base)


def test_next_row_that_a_trigger_refuses_or_swallows_leaves_the_run_done(base: Served) -> None:
    database = base.database
    for body, said in (
        ("IF NEW.parent > 0 THEN RAISE 'no more'; END IF;", True),
        ("IF NEW.parent > 0 THEN RETURN NULL; END IF;", False),
    ):
        with trigger(database, "INSERT", body):
            row = base.run(EFFECT, repeat="1 year", data="odd")
            assert (row["state"], effects(database, row["id"])) == ("DONE", 1)
            assert ("the next row was refused" in (row["error"] or "")) is said
            assert database.tasks(f"parent = {row['id']}") == []


@pytest.mark.parametrize(("how", "states"), [(swallows, ("TAKE", "WORK")), (swallows, ("WORK",)), (raises, ("WORK",))])
def test_task_that_a_trigger_keeps_from_starting_keeps_nobody_else(
    base: Served, how: Any, states: Sequence[str]
) -> None:
    """A task that comes alone is begun without being taken first."""
    database = base.database
    with trigger(database, "UPDATE", " ".join(map(how, states))):
        id = database.insert(EFFECT, group="odd", data="odd", delete=False)
        passes(0.3)
        others_run(base)
        is_calm(base)
        row = database.task(id)
        assert row is not None
        assert row["state"] in ("PLAN", "TAKE")
        assert (row["attempt"], effects(database, id)) == (0, 0)
    row = database.wait(id)
    assert (row["state"], row["attempt"], effects(database, id)) == ("DONE", 1, 1)


def test_trigger_that_refuses_the_taking_is_said_once_and_stops_nothing_for_good(base: Served) -> None:
    """All groups are taken by one statement: while it is refused the table is down, and says why."""
    database = base.database
    with trigger(database, "UPDATE", raises("TAKE") + raises("WORK")):
        id = database.insert(EFFECT, group="odd", data="odd", delete=False)
        base.master.wait_log("table_(down|unstable).*no TAKE today")
        is_calm(base)
        assert (database.task(id) or {})["state"] == "PLAN"
        assert len(base.master.logged("table_(down|unstable).*no TAKE today")) <= 2
    row = database.wait(id)
    assert (row["state"], row["attempt"], effects(database, id)) == ("DONE", 1, 1)
    others_run(base)


# What refuses the end


def refused(base: Served, id: int) -> None:
    """The run was undone, and its row says why."""
    row = base.database.wait(id)
    assert (row["state"], row["code"], effects(base.database, id)) == ("FAIL", "P0042", 0)
    assert re.search(r"no [\w ]+ today", row["error"])
    assert row["error"].splitlines()[-1].startswith("STATEMENT:  ")


@pytest.mark.parametrize("timing", ["BEFORE", "AFTER"])
def test_trigger_that_refuses_done_makes_it_fail_with_that_error(base: Served, timing: str) -> None:
    with trigger(base.database, "UPDATE", raises("DONE"), timing=timing):
        refused(base, base.database.insert(EFFECT, data="odd", delete=False))
        others_run(base)


def test_trigger_that_refuses_now_and_then_never_splits_effect_and_state(base: Served) -> None:
    body = "IF NEW.state = 'DONE' AND NEW.id % 3 = 0 THEN RAISE 'no such ids today' USING ERRCODE = 'P0042'; END IF;"
    with trigger(base.database, "UPDATE", body):
        ids = [base.database.insert(EFFECT, data="odd", group="now and then", delete=False) for _ in range(12)]
        for id in ids:
            if id % 3 == 0:
                refused(base, id)
            else:
                row = base.database.wait(id)
                assert (row["state"], effects(base.database, id)) == ("DONE", 1)


def test_trigger_that_swallows_done_undoes_the_work(base: Served) -> None:
    with trigger(base.database, "UPDATE", swallows("DONE")):
        id = base.database.insert(EFFECT, data="odd", delete=False)
        row = base.database.wait(id)
        assert (row["state"], effects(base.database, id)) == ("FAIL", 0)
        assert row["error"]


@pytest.mark.parametrize("how", [raises, swallows])
def test_row_that_can_neither_be_done_nor_fail_keeps_its_slot_and_nobody_else(base: Served, how: Any) -> None:
    """It is never run again; when the trigger is gone it ends, its work undone or done with it."""
    database = base.database
    with trigger(database, "UPDATE", how("DONE") + how("FAIL")):
        id = database.insert(EFFECT, data="odd", group="odd", delete=False)
        behind = database.insert("SELECT 1", group="odd", delete=False)
        base.master.wait_log(f"finish_failed.* id={id}\\b")
        others_run(base)
        is_calm(base)
        assert effects(database, id) == 0
        assert database.task(behind)["state"] == "PLAN"  # type: ignore[index]
    row = database.wait(id)
    assert (row["state"], row["attempt"]) in (("DONE", 1), ("FAIL", 1))
    assert effects(database, id) == (row["state"] == "DONE")
    assert database.wait(behind)["state"] == "DONE"


def test_trigger_that_refuses_the_removal_makes_it_fail_with_that_error(base: Served) -> None:
    with trigger(base.database, "DELETE", "RAISE 'no DELETE today' USING ERRCODE = 'P0042';"):
        refused(base, base.database.insert(SILENT, data="odd"))
        others_run(base)


def test_trigger_that_swallows_the_removal_leaves_the_row_done(base: Served) -> None:
    with trigger(base.database, "DELETE", "IF TG_OP = 'DELETE' THEN RETURN NULL; END IF;"):
        id = base.database.insert(SILENT, data="odd")
        row = base.database.wait(id)
        assert (row["state"], row["attempt"], effects(base.database, id)) == ("DONE", 1, 1)
        others_run(base)


CONSTRAINTS = {
    "output": ("ADD CONSTRAINT odd CHECK (data IS DISTINCT FROM 'odd' OR output IS NULL)", "23514"),
    "state": ("ADD CONSTRAINT odd CHECK (data IS DISTINCT FROM 'odd' OR state <> 'DONE')", "23514"),
    "both": ("ADD CONSTRAINT odd CHECK (data IS DISTINCT FROM 'odd' OR state <> 'DONE' OR stop < start)", "23514"),
    "unique output": ("ADD CONSTRAINT odd UNIQUE (output) DEFERRABLE INITIALLY DEFERRED", "23505"),
}


@pytest.mark.parametrize(("constraint", "code"), CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_constraint_that_refuses_done_makes_it_fail_with_that_error(base: Served, constraint: str, code: str) -> None:
    database = base.database
    database.execute("DELETE FROM task; DELETE FROM effect")
    if "UNIQUE" in constraint:
        base.run(f"{EFFECT}; SELECT 'same'", data="odd")
    database.execute(f"ALTER TABLE task {constraint}")
    try:
        id = database.insert(f"{EFFECT}; SELECT 'same'", data="odd", delete=False)
        row = database.wait(id)
        assert (row["state"], row["code"], effects(database, id)) == ("FAIL", code, 0)
        assert "odd" in row["error"]
    finally:
        database.execute("ALTER TABLE task DROP CONSTRAINT odd")
    others_run(base)


def test_row_that_others_refer_to_is_not_removed_and_its_effect_is_not_split(base: Served) -> None:
    database = base.database
    database.execute("CREATE TABLE child (task bigint REFERENCES task)")
    child = "INSERT INTO child VALUES (current_setting('pg_task.id')::bigint)"
    try:
        id = database.insert(f"WITH c AS ({child}), {SILENT.removeprefix('WITH ')}")
        row = database.wait(id)
        assert effects(database, id) == (row["state"] == "DONE")
        assert row["state"] == "DONE" or row["code"] == "23503"
        others_run(base)
    finally:
        database.execute("DROP TABLE child")


# What costs nothing


def test_foreign_key_and_unique_column_of_the_users_cost_nothing(base: Served) -> None:
    database = base.database
    database.execute(
        "CREATE TABLE customer (id int PRIMARY KEY); INSERT INTO customer VALUES (1);"
        "ALTER TABLE task ADD COLUMN customer int REFERENCES customer DEFERRABLE INITIALLY DEFERRED,"
        " ADD COLUMN ticket text UNIQUE"
    )
    try:
        row = base.run(EFFECT, customer=1, ticket="a")
        assert (row["state"], effects(database, row["id"])) == ("DONE", 1)
        row = base.run(EFFECT, customer=1, ticket="b", repeat="1 year")  # the next row has the same ticket
        assert (row["state"], effects(database, row["id"])) == ("DONE", 1)
        assert "the next row was refused" in row["error"]
    finally:
        database.execute("ALTER TABLE task DROP COLUMN customer, DROP COLUMN ticket; DROP TABLE customer")


# What changes the row on the way


@pytest.mark.parametrize(
    ("when", "change", "end"),
    [
        ("NEW.state = 'DONE'", "NEW.output := 'changed'", ("DONE", "changed", 1)),
        ("NEW.state = 'DONE'", "NEW.state := 'FAIL'; NEW.error := 'on second thoughts'", ("FAIL", "INSERT 0 1", 1)),
        ("NEW.state = 'DONE'", "NEW.state := 'STOP'", ("STOP", "INSERT 0 1", 1)),
        ("NEW.state = 'DONE'", "NEW.pid := NULL", ("DONE", "INSERT 0 1", 1)),
        ("NEW.state = 'DONE'", "NEW.attempt := 77", ("DONE", "INSERT 0 1", 1)),
        ("NEW.state IN ('TAKE', 'WORK')", "NEW.plan := NEW.plan - interval '1 day'", ("DONE", "INSERT 0 1", 1)),
        ("NEW.state IN ('TAKE', 'WORK')", "NEW.\"group\" := 'renamed'", ("DONE", "INSERT 0 1", 1)),
        ("NEW.state = 'TAKE'", "NEW.input := replace(NEW.input, 'VALUES', ' VALUES')", ("DONE", "INSERT 0 1", 1)),
    ],
)
def test_trigger_that_changes_the_row_has_its_way_and_splits_nothing(
    base: Served, when: str, change: str, end: tuple[str, str, int]
) -> None:
    with trigger(base.database, "UPDATE", f"IF {when} THEN {change}; END IF;"):
        row = base.run(EFFECT, data="odd", group=f"changed {change}")
        assert (row["state"], row["output"], effects(base.database, row["id"])) == end
        others_run(base)


@pytest.mark.parametrize(
    ("when", "change"),
    [
        ("NEW.state = 'TAKE'", "NEW.pid := 1"),
        ("NEW.state = 'TAKE'", "NEW.state := 'PLAN'"),
        ("NEW.state = 'TAKE'", "NEW.attempt := NEW.attempt + 1"),
        ("NEW.state = 'WORK'", "NEW.state := 'PLAN'"),
        ("NEW.state = 'WORK'", "NEW.pid := 1"),
        ("NEW.state = 'WORK'", "NEW.attempt := 0"),
    ],
)
def test_trigger_that_takes_the_row_out_of_our_hands_costs_only_its_own_task(
    base: Served, when: str, change: str
) -> None:
    """Such a task cannot be finished as itself; it may never run, but nothing it did is kept without its being done."""
    database = base.database
    with trigger(database, "UPDATE", f"IF {when} THEN {change}; END IF;"):
        id = database.insert(EFFECT, data="odd", group="odd", delete=False)
        passes(0.3)
        others_run(base)
        is_calm(base)
    row = database.task(id)
    assert row is not None
    assert effects(database, id) <= (row["state"] != "FAIL")
    database.execute("DELETE FROM task WHERE id = %s", [id])
    assert base.run("SELECT 1", group="odd")["state"] == "DONE"


def test_trigger_that_plans_a_failed_task_again_is_a_retry(base: Served) -> None:
    body = "IF NEW.state = 'FAIL' AND NEW.attempt < 3 THEN NEW.state := 'PLAN'; END IF;"
    with trigger(base.database, "UPDATE", body):
        id = base.database.insert(f"{EFFECT}; SELECT 1 / 0", data="odd", delete=False)
        row = base.database.wait(id)
    assert (row["state"], row["attempt"], effects(base.database, id)) == ("FAIL", 3, 0)
