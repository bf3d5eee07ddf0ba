"""`timeout` bounds a run to the millisecond, whatever the run does, and nothing but that run."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = "CREATE TABLE effect (what text)"
SWALLOW = """DO $$BEGIN
    LOOP
        BEGIN PERFORM pg_sleep(0.05); EXCEPTION WHEN query_canceled THEN NULL; END;
    END LOOP;
END$$"""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("timeout"), setup=SETUP) as one:
        yield one


def seconds(row: dict[str, Any]) -> float:
    return float((row["stop"] - row["start"]).total_seconds())


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("ms", [1, 37, 250])
def test_timeout_ends_a_statement_after_that_many_milliseconds(base: Served, ms: int, atomic: bool) -> None:
    row = base.then_next("SELECT pg_sleep(30)", timeout=f"{ms} ms", atomic=atomic, group=f"{ms} {atomic}")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "57014", 1)
    lines = row["error"].splitlines()
    assert lines[0] == "ERROR:  canceling statement due to statement timeout"
    assert lines[-1] == "STATEMENT:  SELECT pg_sleep(30)"
    assert ms / 1000 <= seconds(row) < 20


def test_timeout_below_a_millisecond_is_a_millisecond(base: Served) -> None:
    row = base.then_next("SELECT pg_sleep(30)", timeout="1 microsecond")
    assert (row["state"], row["code"]) == ("FAIL", "57014")


def test_timeout_bounds_several_statements_together(base: Served) -> None:
    row = base.then_next("SELECT pg_sleep(0.2); " * 150 + "SELECT 1", timeout="500 ms")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert "The task's timeout is 500 ms." in row["error"]
    assert 0.5 <= seconds(row) < 20


def test_timeout_bounds_the_first_and_the_second_try_together(base: Served) -> None:
    """A procedure that commits is run a second time without our transaction: within the same time."""
    row = base.then_next("DO $$BEGIN PERFORM pg_sleep(0.3); COMMIT; PERFORM pg_sleep(30); END$$", timeout="600 ms")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert 0.6 <= seconds(row) < 20


def test_run_within_its_timeout_is_done(base: Served) -> None:
    row = base.then_next("SELECT pg_sleep(0.05)", timeout="10 s", header=False)
    assert (row["state"], row["output"]) == ("DONE", "")


def test_work_of_a_run_that_timed_out_is_undone(base: Served) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('undone'); SELECT pg_sleep(30)", timeout="3 s")
    assert (row["state"], row["output"]) == ("FAIL", "INSERT 0 1")
    assert base.database.execute("SELECT count(*) FROM effect") == [(0,)]


@pytest.mark.parametrize("save", [False, True])
def test_timeout_is_that_tasks_only(base: Served, save: bool) -> None:
    group = f"only {save}"
    ids = [
        base.database.insert("SELECT 1", group=group, timeout="3 s", save=save, delete=False),
        base.database.insert("SHOW statement_timeout; SELECT pg_sleep(3.1)", group=group, save=save, delete=False),
        base.database.insert("SELECT pg_sleep(30)", group=group, timeout="100 ms", save=save, delete=False),
        base.database.insert("SHOW statement_timeout; SELECT pg_sleep(0.3)", group=group, delete=False),
    ]
    rows = [base.database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE", "DONE", "FAIL", "DONE"]
    assert [rows[n]["output"] for n in (1, 3)] == ["0\n", "0\n"]


def test_timeout_beyond_what_a_setting_holds_is_no_limit(base: Served) -> None:
    row = base.then_next("SELECT 1", timeout="178000000 years")
    assert (row["state"], row["output"]) == ("DONE", "1")


def test_smaller_limit_of_the_role_wins(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(server, tmp_path_factory.mktemp("role"), setup=SETUP) as one:
        database = one.database
        database.execute(f"ALTER ROLE \"{database.user}\" SET statement_timeout = '1500ms'")
        one.clean = one.probe()
        for columns in ({}, {"timeout": "10 s"}, {"timeout": "10 s", "save": True}):
            row = one.run("SELECT pg_sleep(30)", group=f"role {columns}", **columns)
            assert (row["state"], row["code"]) == ("FAIL", "57014"), columns
            assert 1.5 <= seconds(row) < 20
        row = one.run("SHOW statement_timeout", group="role timeout")
        assert row["output"] == "1500ms"
        database.execute(f"ALTER ROLE \"{database.user}\" SET statement_timeout = '5min'")
        one.clean = one.probe()
        row = one.then_next("SELECT pg_sleep(30)", timeout="20 ms")
        assert 0.02 <= seconds(row) < 20


def test_limit_that_a_task_sets_itself_does_not_lift_its_timeout(base: Served) -> None:
    row = base.then_next("SET statement_timeout = 0; SELECT pg_sleep(30)", timeout="100 ms")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert seconds(row) < 20


def test_run_that_swallows_cancel_requests_is_ended_and_fails(base: Served) -> None:
    row = base.then_next(SWALLOW, timeout="100 ms")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "57014", 1)
    assert row["error"].splitlines()[0].endswith("canceling statement due to statement timeout")
    assert seconds(row) < 20
    eventually(lambda: not running(base, "query_canceled"))


def test_run_that_swallows_cancel_requests_is_stopped_by_its_user(base: Served) -> None:
    id, following = base.insert_pair(SWALLOW, group="stubborn stop")
    base.database.wait(id, "WORK")
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert base.database.wait(following)["state"] == "DONE"
    assert base.database.task(id)["state"] == "STOP"
    eventually(lambda: not running(base, "query_canceled"))


def test_deferred_work_at_the_end_is_bounded_too(base: Served) -> None:
    base.database.execute(
        "CREATE TABLE slow (id int);"
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(30); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    row = base.then_next("INSERT INTO slow VALUES (1)", timeout="300 ms")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert seconds(row) < 20


def running(base: Served, text: str) -> bool:
    query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
    return bool(base.database.execute(f"{query} AND pid <> pg_backend_pid() AND strpos(query, %s) > 0", [text]))


def test_timeout_is_whole_whatever_a_saved_session_has_set(base: Served) -> None:
    common = {"group": "digits", "save": True, "delete": False}
    base.database.wait(base.database.insert("SET extra_float_digits = -15", **common))
    row = base.database.wait(base.database.insert("SHOW statement_timeout", timeout="14999 ms", **common))
    assert row["output"] == "14999ms"
