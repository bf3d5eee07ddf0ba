"""The effect of a task and its being done are one transaction, wherever the input allows it."""

from collections.abc import Iterator

import pytest

from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = """
CREATE TABLE effect (what text);
CREATE PROCEDURE commits(what text) LANGUAGE plpgsql AS
    $$BEGIN INSERT INTO effect VALUES (what || ' before'); COMMIT; INSERT INTO effect VALUES (what || ' after'); END$$;
"""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("atomic"), setup=SETUP) as one:
        one.database.admin_execute(f'ALTER ROLE "{one.database.user}" CREATEDB')
        yield one


def effects(base: Served, what: str) -> list[tuple[str, str]]:
    return base.database.execute(
        "SELECT what, xmin::text FROM effect WHERE starts_with(what, %s) ORDER BY what", [what]
    )


def writer(base: Served, id: int) -> str:
    """The transaction that wrote the row as it is now."""
    return str(base.database.execute("SELECT xmin::text FROM task WHERE id = %s", [id])[0][0])


def test_effect_and_done_are_written_by_one_transaction(base: Served) -> None:
    row = base.run("INSERT INTO effect VALUES ('one'); SELECT pg_current_xact_id()::text")
    [(_, effect)] = effects(base, "one")
    assert effect == row["output"].splitlines()[1]
    # The next task is taken by the same transaction: its begin is written with the finish.
    id, following = base.insert_pair("INSERT INTO effect VALUES ('pair'); SELECT pg_current_xact_id()::text")
    row = base.database.wait(id)
    base.database.wait(following)
    assert effects(base, "pair") == [("pair", row["output"].splitlines()[1])]


def test_row_of_an_effect_becomes_done_in_its_transaction(base: Served) -> None:
    """The finish runs behind a savepoint: its xmin is a subtransaction's, which became visible with its parent."""
    id = base.database.insert("INSERT INTO effect VALUES ('seen'); SELECT pg_sleep(0.2)", group="seen")
    seen = set()

    def both() -> bool:
        query = "SELECT (SELECT state::text FROM task WHERE id = %s), (SELECT count(*) FROM effect WHERE what = 'seen')"
        seen.add(base.database.execute(query, [id])[0])
        return ("DONE", 1) in seen

    eventually(both, every=0.0005)
    assert seen <= {("PLAN", 0), ("TAKE", 0), ("WORK", 0), ("DONE", 1)}


def test_task_that_is_not_atomic_is_done_in_a_transaction_of_its_own(base: Served) -> None:
    row = base.run("INSERT INTO effect VALUES ('apart'); SELECT pg_current_xact_id()::text", atomic=False)
    [(_, effect)] = effects(base, "apart")
    assert row["state"] == "DONE"
    assert effect == row["output"].splitlines()[1]
    assert int(writer(base, row["id"])) > int(effect)


def test_removed_row_and_its_effect_are_seen_together(base: Served) -> None:
    id = base.database.insert("DO $$BEGIN INSERT INTO effect VALUES ('removed'); END$$", header=False)
    assert base.database.wait(id)["output"] == "DO"
    id = base.database.insert("SELECT commits FROM (SELECT 1 AS commits) AS a WHERE false")
    base.database.wait(id, gone=True)


@pytest.mark.parametrize("atomic", [True, False])
def test_error_leaves_nothing_of_the_statements_before_it(base: Served, atomic: bool) -> None:
    mark = f"error {atomic}"
    row = base.then_next(
        f"INSERT INTO effect VALUES ('{mark}'); SELECT 1/0; INSERT INTO effect VALUES ('{mark}')", atomic=atomic
    )
    assert (row["state"], row["output"], effects(base, mark)) == ("FAIL", "INSERT 0 1", [])


def test_error_that_a_savepoint_catches_is_no_error(base: Served) -> None:
    row = base.then_next(
        "DO $$BEGIN INSERT INTO effect VALUES ('inner'); PERFORM 1/0;"
        " EXCEPTION WHEN division_by_zero THEN INSERT INTO effect VALUES ('caught'); END$$"
    )
    assert (row["state"], len(effects(base, "inner")), len(effects(base, "caught"))) == ("DONE", 0, 1)


def test_begin_of_the_inputs_own_leaves_no_warning(base: Served) -> None:
    row = base.then_next("BEGIN; INSERT INTO effect VALUES ('begin'); COMMIT")
    assert (row["state"], row["notice"], len(effects(base, "begin"))) == ("DONE", None, 1)


def test_warnings_and_notices_of_the_task_are_kept(base: Served) -> None:
    row = base.then_next("DO $$BEGIN RAISE WARNING 'careful' USING HINT = 'look'; RAISE NOTICE 'said'; END$$")
    assert row["state"] == "DONE"
    assert row["notice"].splitlines()[:2] == ["WARNING:  careful", "HINT:  look"]
    assert "NOTICE:  said" in row["notice"].splitlines()


def test_position_of_an_error_counts_from_the_inputs_start(base: Served) -> None:
    for atomic in (True, False):
        row = base.run("SELECT 1;\nSELECT nothing", atomic=atomic)
        assert row["error"].splitlines()[0] == 'ERROR:  column "nothing" does not exist at character 18'


# What no transaction block admits


@pytest.mark.parametrize(
    "input",
    [
        "VACUUM effect",
        "vacuum (analyze) effect",
        "  VACUUM effect;",
        "/* a comment first */ VACUUM effect",
        "-- x\nVACUUM effect",
    ],
)
@pytest.mark.parametrize("atomic", [True, False])
def test_vacuum_runs(base: Served, input: str, atomic: bool) -> None:
    row = base.then_next(input, group=f"{input} {atomic}", atomic=atomic)
    assert (row["state"], row["output"], row["error"], row["attempt"]) == ("DONE", "VACUUM", None, 1)


def test_index_is_made_and_dropped_concurrently(base: Served) -> None:
    for input, tag in [
        ("CREATE INDEX CONCURRENTLY effect_what ON effect (what)", "CREATE INDEX"),
        ("REINDEX INDEX CONCURRENTLY effect_what", "REINDEX"),
        ("DROP INDEX CONCURRENTLY effect_what", "DROP INDEX"),
    ]:
        row = base.then_next(input)
        assert (row["state"], row["output"], row["attempt"]) == ("DONE", tag, 1), row


def test_database_is_created_and_dropped(base: Served) -> None:
    name = f"{base.database.name}_more"
    for input, tag in [(f'CREATE DATABASE "{name}"', "CREATE DATABASE"), (f'DROP DATABASE "{name}"', "DROP DATABASE")]:
        row = base.then_next(input, group=tag)
        assert (row["state"], row["output"]) == ("DONE", tag), row


@pytest.mark.parametrize("atomic", [True, False])
def test_procedure_that_commits_runs_once(base: Served, atomic: bool) -> None:
    for time in range(2):
        mark = f"procedure {atomic} {time}"
        row = base.then_next(f"CALL commits('{mark}')", group=mark, atomic=atomic)
        assert (row["state"], row["output"], row["attempt"]) == ("DONE", "CALL", 1)
        assert [what for what, _ in effects(base, mark)] == [f"{mark} after", f"{mark} before"]


def test_same_input_takes_the_detour_once(base: Served) -> None:
    """A sequence is not rolled back: it counts how often the input was really run."""
    base.database.execute("CREATE SEQUENCE tries")
    input = "DO $$BEGIN PERFORM nextval('tries'); COMMIT; END$$"
    ids = [base.database.insert(input, group="detour", delete=False) for _ in range(5)]
    pids = {base.database.wait(id)["pid"] for id in ids}
    assert base.database.execute("SELECT last_value FROM tries") == [(5 + len(pids),)]


@pytest.mark.parametrize(
    "input",
    [
        "SELECT 1; VACUUM effect",
        "VACUUM effect; SELECT 1",
        "BEGIN; VACUUM effect",
        "INSERT INTO effect VALUES ('several'); CREATE INDEX CONCURRENTLY never ON effect (what)",
        "INSERT INTO effect VALUES ('several'); DISCARD ALL",
    ],
)
@pytest.mark.parametrize("atomic", [True, False])
def test_several_statements_with_one_that_no_block_admits_fail_as_in_psql(
    base: Served, input: str, atomic: bool
) -> None:
    row = base.then_next(input, group=f"{input} {atomic}", atomic=atomic)
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "25001", 1)
    assert "cannot" in row["error"].splitlines()[0]
    assert effects(base, "several") == []


def test_settings_of_the_first_try_do_not_hold_in_the_second(base: Served) -> None:
    row = base.then_next("SET search_path = nowhere, public; CALL commits('second try')")
    assert row["state"] == "FAIL", "several statements with a COMMIT in a procedure fail in psql too"
    assert effects(base, "second try") == []


def test_repeated_task_plans_its_next_row_with_its_effect(base: Served) -> None:
    row = base.run("INSERT INTO effect VALUES ('repeated'); SELECT 1", repeat="1 year")
    assert base.database.execute("SELECT state::text FROM task WHERE parent = %s", [row["id"]]) == [("PLAN",)]
    base.database.execute("DELETE FROM task WHERE parent = %s", [row["id"]])
    assert len(effects(base, "repeated")) == 1


def test_failed_effect_of_a_repeated_task_plans_its_next_row(base: Served) -> None:
    row = base.run("INSERT INTO effect VALUES ('failed'); SELECT 1/0", repeat="1 year")
    assert row["state"] == "FAIL"
    assert len(base.database.execute("DELETE FROM task WHERE parent = %s RETURNING id", [row["id"]])) == 1
    assert effects(base, "failed") == []
