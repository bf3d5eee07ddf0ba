"""`atomic` changes what a crash may leave behind, and nothing that a user sees."""

from collections.abc import Iterator

import pytest

from tests.fixtures.locks import held, wait_runs
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer

SETUP = """
CREATE TABLE effect (what text);
CREATE TABLE one (id int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE);
INSERT INTO one VALUES (1);
CREATE TABLE late (code text);
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
    IF NEW.code = 'wait' THEN PERFORM pg_advisory_xact_lock(600); RETURN NULL; END IF;
    RAISE 'too late for %', NEW.code USING ERRCODE = NEW.code, DETAIL = 'said at the end';
END$$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION late();
CREATE FUNCTION fails() RETURNS int LANGUAGE plpgsql AS $$BEGIN RETURN 1 / 0; END$$;
CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$BEGIN INSERT INTO effect VALUES ('commits'); COMMIT; END$$;
"""

INPUTS = [
    "",
    "SELECT 1",
    "SELECT 1; SELECT 2; SELECT 3 WHERE false",
    "SELECT 1 AS a, 'x' AS b, NULL AS c UNION ALL SELECT 2, E'y\\n\\tz', 'q\"q'",
    "SELECT",
    "VALUES (1, 2), (3, 4)",
    "TABLE one",
    "INSERT INTO effect VALUES ('parity') RETURNING what",
    "UPDATE effect SET what = what WHERE false; DELETE FROM effect WHERE false; SELECT 1",
    "WITH x AS (SELECT 1 AS n) SELECT n FROM x",
    "CREATE TEMP TABLE parity (x int); INSERT INTO parity SELECT generate_series(1, 3); TABLE parity",
    "CREATE TABLE IF NOT EXISTS one (id int)",
    "COPY (SELECT 1, 'two', NULL) TO STDOUT",
    "SELECT 0; COPY (SELECT 'a,b', 2) TO STDOUT (FORMAT csv, HEADER); SELECT 3",
    "COPY (SELECT 1 / 0) TO STDOUT",
    "COPY effect FROM STDIN",
    "EXPLAIN (COSTS off) SELECT 1",
    "SHOW search_path",
    "SET application_name = 'mine'; SHOW application_name",
    "PREPARE p AS SELECT $1::int + 1; EXECUTE p (41); DEALLOCATE p",
    "DO $$BEGIN RAISE NOTICE 'first'; RAISE WARNING 'second' USING HINT = 'h', DETAIL = 'd'; RAISE INFO 'third'; END$$",
    "DO $$BEGIN RAISE NOTICE 'before'; PERFORM 1 / 0; END$$",
    "DO $$BEGIN BEGIN COMMIT; EXCEPTION WHEN invalid_transaction_termination THEN RAISE NOTICE 'caught'; END; END$$",
    "DROP TABLE IF EXISTS nowhere; SELECT 1",
    "SELEC 1",
    "SELECT 1;\n\nSELECT nothing FROM one",
    "SELECT 'ё', 'жж', 'щ', nothing",
    "/* ёж: 𝄞 */ SELECT '𝄞𝄞' || nothing",
    "SELECT 'ё'; SELECT 'я', $1",
    "SELECT fails()",
    "SELECT 1; SELECT fails(); SELECT 2",
    "DO $$BEGIN EXECUTE 'SELECT ''ё'', nothing'; END$$",
    "SELECT * FROM one WHERE id = 'x'",
    "INSERT INTO one VALUES (1)",
    "SELECT '2030-12-31'::date, '1 day'::interval, 1.5::float4, '\\x00ff'::bytea, 'Infinity'::float8",
    "SELECT pg_sleep(0)",
    "SELECT repeat('x', 3000)",
    "RESET ALL; SELECT 1",
    "BEGIN; SELECT 1; COMMIT",
    "BEGIN; INSERT INTO effect VALUES ('own'); ROLLBACK; SELECT 2",
    "BEGIN; SELECT 1; COMMIT; BEGIN; SELECT 2; COMMIT; SELECT 3",
    "BEGIN; SAVEPOINT a; SELECT 1; ROLLBACK TO a; RELEASE a; COMMIT",
    "BEGIN ISOLATION LEVEL SERIALIZABLE; SHOW transaction_isolation; COMMIT",
    "BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO one VALUES (1); COMMIT",
    "BEGIN; INSERT INTO late VALUES ('23505'); COMMIT",
    "BEGIN; INSERT INTO late VALUES ('23505'); SET CONSTRAINTS ALL IMMEDIATE; COMMIT",
    "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1 / (x - 3) FROM generate_series(1, 9) AS x; COMMIT",
    "CALL commits()",
    "VACUUM effect",
    "VACUUM nowhere",
    "SELECT 1; VACUUM effect",
    "SELECT 'a' AS \"ё\", 'b' AS b",
]


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("parity"), setup=SETUP) as one:
        yield one


def effects(base: Served, what: str) -> int:
    return int(base.database.execute("SELECT count(*) FROM effect WHERE what = %s", [what])[0][0])


def test_output_error_code_and_notice_are_the_same_with_and_without_atomic(base: Served) -> None:
    """All at once, in three lanes; those that are not atomic come first, the order within a lane is that of the ids."""
    database = base.database
    runs = {
        (n, atomic): database.insert(input, group=f"parity {n % 3}", atomic=atomic, header=n % 2 == 0, delete=False)
        for atomic in (False, True)
        for n, input in enumerate(INPUTS)
    }
    seen = ("state", "output", "error", "code", "notice")
    rows = {key: database.wait(id) for key, id in runs.items()}
    differ = [
        (INPUTS[n], {name: (rows[n, False][name], rows[n, True][name]) for name in seen})
        for n in range(len(INPUTS))
        if any(rows[n, False][name] != rows[n, True][name] for name in seen)
    ]
    assert differ == []
    states = [rows[n, True]["state"] for n in range(len(INPUTS))]
    assert 10 < states.count("FAIL") < 30, list(zip(states, INPUTS, strict=True))
    assert {row["attempt"] for row in rows.values()} == {1}


@pytest.mark.parametrize("input", ["INSERT INTO late VALUES ('P0001')", "SELECT 1; INSERT INTO late VALUES ('23514')"])
def test_error_at_the_end_of_the_transaction_is_the_same_with_and_without_atomic(base: Served, input: str) -> None:
    """The output is not: without atomic the last statement's tag does not come, since its transaction ends with it."""
    apart, within = (base.run(input, atomic=atomic, group=f"end {atomic}") for atomic in (False, True))
    seen = ("state", "error", "code", "notice")
    assert [apart[name] for name in seen] == [within[name] for name in seen]


def test_commit_that_fails_is_the_tasks_error_and_undoes_its_work(base: Served) -> None:
    """A cursor that is held is computed at the commit itself, after everything that we can have checked before."""
    row = base.then_next(
        "INSERT INTO effect VALUES ('held');"
        " DECLARE c CURSOR WITH HOLD FOR SELECT 1 / (x - 3) FROM generate_series(1, 9) AS x",
        group="held",
    )
    assert (row["state"], row["code"], effects(base, "held")) == ("FAIL", "22012", 0)
    assert row["error"].splitlines()[0] == "ERROR:  division by zero"
    assert row["output"] == "INSERT 0 1\nDECLARE CURSOR"


@pytest.mark.parametrize("code", ["P0001", "23514", "55000", "42501", "0A000", "53100", "25006", "22012", "26000"])
def test_deferred_trigger_of_any_class_of_error_is_the_tasks_error(base: Served, code: str) -> None:
    """Nothing that the task's own work says at its end is taken for a failure of ours, whatever its SQLSTATE."""
    mark = f"deferred {code}"
    row = base.then_next(f"INSERT INTO effect VALUES ('{mark}'); INSERT INTO late VALUES ('{code}')", group=mark)
    assert (row["state"], row["code"], row["attempt"], effects(base, mark)) == ("FAIL", code, 1, 0)
    assert f"too late for {code}" in row["error"]
    assert "DETAIL:  said at the end" in row["error"]


@pytest.mark.parametrize(
    "input",
    [
        "SET CONSTRAINTS ALL DEFERRED; INSERT INTO one VALUES (1)",
        "SET CONSTRAINTS one_pkey DEFERRED; INSERT INTO one VALUES (1); SELECT 1",
        "COMMIT; BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO one VALUES (1)",
    ],
)
def test_constraint_that_the_task_has_deferred_is_checked_at_its_end(base: Served, input: str) -> None:
    row = base.then_next(f"{input}; INSERT INTO effect VALUES ('deferred by the task')", group=input)
    assert (row["state"], row["code"], effects(base, "deferred by the task")) == ("FAIL", "23505", 0)


def test_deferred_constraint_that_the_task_has_mended_is_no_error(base: Served) -> None:
    row = base.then_next(
        "SET CONSTRAINTS ALL DEFERRED; INSERT INTO one VALUES (1); DELETE FROM one; INSERT INTO one VALUES (1)"
    )
    assert (row["state"], row["output"]) == ("DONE", "SET CONSTRAINTS\nINSERT 0 1\nDELETE 2\nINSERT 0 1")


def test_task_that_ends_its_transaction_and_begins_another_finishes_in_that_one(base: Served) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('first'); COMMIT; BEGIN; INSERT INTO effect VALUES ('second');"
        " SELECT pg_current_xact_id()::text",
        group="two",
        header=False,
    )
    [(second,)] = base.database.execute("SELECT xmin::text FROM effect WHERE what = 'second'")
    assert (row["state"], row["output"].splitlines()[-1], effects(base, "first")) == ("DONE", second, 1)


def test_task_whose_second_transaction_fails_at_its_end_keeps_the_first(base: Served) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('kept'); COMMIT; BEGIN; INSERT INTO effect VALUES ('undone');"
        " INSERT INTO late VALUES ('P0001')",
        group="second fails",
    )
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "P0001", 1)
    assert (effects(base, "kept"), effects(base, "undone")) == (1, 0)


def test_block_that_commits_does_what_it_says_once(base: Served) -> None:
    input = "DO $$BEGIN INSERT INTO effect VALUES ('block'); COMMIT; INSERT INTO effect VALUES ('block'); END$$"
    for n in range(2):
        row = base.then_next(input, group=f"block {n}")
        assert (row["state"], row["output"], row["notice"], row["attempt"]) == ("DONE", "DO", None, 1)
    assert effects(base, "block") == 4


def test_block_that_commits_and_then_fails_keeps_what_it_committed(base: Served) -> None:
    row = base.then_next(
        "DO $$BEGIN INSERT INTO effect VALUES ('half'); COMMIT; INSERT INTO effect VALUES ('other half');"
        " PERFORM 1 / 0; END$$"
    )
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "22012", 1)
    assert (effects(base, "half"), effects(base, "other half")) == (1, 0)


@pytest.mark.parametrize("drop", ["DEALLOCATE ALL", "DISCARD PLANS; DEALLOCATE ALL; DISCARD TEMP"])
def test_commit_that_fails_after_our_statements_were_dropped_is_the_tasks_error(base: Served, drop: str) -> None:
    row = base.then_next(
        f"{drop}; INSERT INTO effect VALUES ('dropped'); INSERT INTO late VALUES ('P0001')", group=drop
    )
    assert (row["state"], row["code"], effects(base, "dropped")) == ("FAIL", "P0001", 0)


def test_task_that_waits_in_its_deferred_work_may_be_stopped(base: Served) -> None:
    database = base.database
    with held(database, 600):
        id, following = base.insert_pair(
            "INSERT INTO effect VALUES ('waits'); INSERT INTO late VALUES ('wait')", group="waits"
        )
        wait_runs(database)
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert database.wait(following)["state"] == "DONE"
    row = database.task(id)
    assert row is not None
    assert (row["state"], effects(base, "waits")) == ("STOP", 0)
