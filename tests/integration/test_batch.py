"""`batch`: short tasks of a group that share one transaction, and what cannot share."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

PLAIN = "SELECT txid_current()"


class Group:
    """Tasks that are due together. The first is what the master assigns, and so runs by itself."""

    def __init__(self, database: Database, one: Master) -> None:
        self.database = database
        self.master = one

    def insert(self, *inputs: str, **columns: Any) -> list[int]:
        """The ids of all but the first, in order."""
        values = {"delete": False, "batch": 50, "header": False} | columns
        names = ", ".join(f'"{name}"' for name in values)
        query = (
            f"INSERT INTO task (input, {names}) SELECT i, {', '.join(['%s'] * len(values))}"
            " FROM unnest(%s::text[]) WITH ORDINALITY AS u (i, n) ORDER BY n RETURNING id"
        )
        return [id for (id,) in self.database.execute(query, [*values.values(), ["SELECT 1", *inputs]])][1:]

    def run(self, *inputs: str, **columns: Any) -> list[dict[str, Any]]:
        return [self.database.wait(id) for id in self.insert(*inputs, **columns)]

    def shared(self) -> list[int]:
        """How many transactions were shared, by each task that did."""
        return [int(line.split("together=")[1].split()[0]) for line in self.master.logged(r"run_ended .*together=")]

    def have_shared(self, *sizes: int) -> None:
        """These transactions were shared and no others; a worker commits first, and writes its line afterwards."""
        expected = [size for size in sizes for _ in range(size)]
        eventually(lambda: len(self.shared()) >= len(expected))
        assert self.shared() == expected

    def have_not_shared(self) -> None:
        """None was, before two that do."""
        self.run(PLAIN, PLAIN, group="at last")
        self.have_shared(2)


@pytest.fixture
def group(database: Database, master: Callable[..., Master]) -> Group:
    """Its time is long enough for all that are there, also where something stands still for a while."""
    return Group(database, master("--batch-time", "30s", database.conninfo, tables=1))


def test_tasks_share_transactions_and_each_has_its_own_result_and_times(group: Group) -> None:
    found = group.run(*["SELECT txid_current(), current_setting('pg_task.id')"] * 200)
    assert Counter(row["state"] for row in found) == {"DONE": 200}
    assert [row["output"].split("\t")[1] for row in found] == [str(row["id"]) for row in found]
    sizes = Counter(row["output"].split("\t")[0] for row in found)
    assert max(sizes.values()) <= 50
    assert len(sizes) < 100
    assert all(row["start"] <= row["stop"] for row in found)
    assert all(before["stop"] <= after["start"] for before, after in pairwise(found))
    assert {(row["attempt"], row["error"], row["code"], row["notice"]) for row in found} == {(1, None, None, None)}


@pytest.mark.parametrize("count", [1, 2])
def test_task_has_its_own_settings_whether_others_came_with_it_or_not(group: Group, count: int) -> None:
    names = ("pg_task.id", "pg_task.group", "pg_task.schema", "pg_task.table", "application_name")
    query = "SELECT " + " || ' ' || ".join(f"current_setting('{name}')" for name in names)
    found = [*group.run(*[query] * count, group="one"), *group.run(*[query] * count, group="another")]
    for row in found:
        id, name = row["id"], row["group"]
        assert row["output"] == f"{id} {name} public task pgtask public task {name} {id}"


def test_without_batch_nothing_is_shared(group: Group) -> None:
    found = group.run(*[PLAIN] * 20, batch=1)
    assert len({row["output"] for row in found}) == 20
    group.have_not_shared()


def test_failing_task_is_rolled_back_alone(group: Group) -> None:
    group.database.execute("CREATE TABLE did (what text)")
    inputs = ["INSERT INTO did VALUES ('a')", "INSERT INTO did SELECT 1 / 0", "INSERT INTO did VALUES ('c')"]
    a, b, c = group.run(*inputs)
    assert (a["state"], b["state"], c["state"]) == ("DONE", "FAIL", "DONE")
    assert (b["code"], b["output"]) == ("22012", None)
    assert b["error"] == "ERROR:  division by zero\nSTATEMENT:  INSERT INTO did SELECT 1 / 0"
    assert group.database.execute("SELECT what FROM did ORDER BY 1") == [("a",), ("c",)]
    group.have_shared(3)


def test_several_statements_and_their_output_share_as_well(group: Group) -> None:
    found = group.run(
        "SELECT 1; SELECT 2", "COPY (SELECT 3) TO STDOUT", "SELECT 4; SELECT 1/0", "", "TABLE task_master; "
    )
    assert [row["output"] for row in found[:3]] == ["1\n2", "3\n", "4"]
    assert [row["state"] for row in found] == ["DONE", "DONE", "FAIL", "DONE", "DONE"]
    assert found[2]["error"].endswith("STATEMENT:  SELECT 4; SELECT 1/0")
    group.have_shared(5)


def test_notices_belong_to_the_task_that_raised_them(group: Group) -> None:
    raising = "DO $$ BEGIN RAISE NOTICE 'of %', current_setting('pg_task.id'); END $$"
    found = group.run(*[raising, "SELECT 1"] * 5)
    assert [row["notice"].splitlines()[0] for row in found[::2]] == [f"NOTICE:  of {row['id']}" for row in found[::2]]
    assert {row["notice"] for row in found[1::2]} == {None}
    group.have_shared(10)


@pytest.mark.parametrize(
    ("input", "state", "output"),
    [
        ("INSERT INTO did VALUES ('x'); COMMIT; INSERT INTO did VALUES ('y')", "DONE", None),
        ("COMMIT", "DONE", None),
        ("COMMIT; BEGIN", "DONE", None),
        ("/* SELECT */ ROLLBACK", "DONE", None),
        ("/* /* */ SELECT */ COMMIT", "DONE", None),
        ("VACUUM did", "DONE", "VACUUM"),
        ("CALL committing()", "DONE", "CALL"),
        ("DO $$ BEGIN COMMIT; END $$", "DONE", "DO"),
        ("SELECT 1; END", "DONE", None),
        ("SELECT $1", "FAIL", None),
        ("SELEKT", "FAIL", None),
        ("SELECT 1 SELECT 2", "FAIL", None),
        ("SAVEPOINT pgtask; RELEASE SAVEPOINT pgtask; SELECT 1", "DONE", None),
        ("SELECT pg_terminate_backend(pg_backend_pid())", None, None),
    ],
)
def test_what_cannot_share_runs_by_itself_and_as_it_would_without(
    group: Group, input: str, state: str | None, output: str | None
) -> None:
    if state is None:
        group.master.may_log_errors = True
    group.database.execute("CREATE TABLE did (what text)")
    group.database.execute("CREATE PROCEDURE committing() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'")
    write = "INSERT INTO did VALUES ('{}')"
    ids = group.insert(write.format("a"), write.format("b"), input, write.format("c"), write.format("d"))
    [alone] = group.run("SELECT 1", group="alone") and [group.database.insert(input, group="alone", delete=False)]
    found = [group.database.wait(id, timeout=40) for id in ids]
    assert [row["state"] for row in found if row["id"] != ids[2]] == ["DONE"] * 4
    reference = group.database.wait(alone, timeout=40)
    same = ("state", "output", "error", "code", "notice")
    if state is not None:
        assert {name: found[2][name] for name in same} == {name: reference[name] for name in same}
        assert found[2]["state"] == state
        assert output is None or found[2]["output"] == output
    else:
        assert found[2]["state"] == reference["state"] == "FAIL"
        assert found[2]["error"].startswith("ERROR:  run lost 4 times")
    did = Counter(what for (what,) in group.database.execute("SELECT what FROM did"))
    assert {name: did[name] for name in "abcd"} == dict.fromkeys("abcd", 1)


def test_deferred_constraint_that_fails_at_the_commit_fails_its_own_task_only(group: Group) -> None:
    group.database.execute("CREATE TABLE once (what int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    a, b, c = group.run(*["INSERT INTO once VALUES (1)"] * 2, "INSERT INTO once VALUES (2)")
    assert [row["state"] for row in (a, b, c)] == ["DONE", "FAIL", "DONE"]
    assert b["code"] == "23505"
    assert group.database.execute("SELECT what FROM once ORDER BY 1") == [(1,), (2,)]


def test_settings_role_and_session_are_like_new_for_each(group: Group) -> None:
    found = group.run(
        "SET search_path = nowhere; SET pg_task.id = 'x'; SET work_mem = '1MB'",
        "SELECT current_setting('search_path'), current_setting('pg_task.id'), current_setting('work_mem')",
        f'SET ROLE "{group.database.user}"; SET SESSION AUTHORIZATION "{group.database.user}"',
        "SELECT current_setting('role')",
        "DECLARE kept CURSOR WITH HOLD FOR SELECT 1; LISTEN it; PREPARE mine AS SELECT 1; CREATE TEMP TABLE t ()",
        "SELECT 1",
    )
    assert [(row["state"], row["error"]) for row in found] == [("DONE", None)] * 6
    work_mem = group.database.execute("SHOW work_mem")[0][0]
    assert found[1]["output"] == f'"$user", public\t{found[1]["id"]}\t{work_mem}'
    assert found[3]["output"] == "none"
    left = (
        "SELECT (SELECT count(*) FROM pg_cursors WHERE is_holdable), (SELECT count(*) FROM pg_listening_channels()),"
        " (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), to_regclass('pg_temp.t')"
    )
    [row] = group.run(left)
    assert row["output"] == "0\t0\t0\t\\N"


def test_changed_setting_of_the_role_reaches_those_that_share_without_a_pause_between_them(group: Group) -> None:
    input = "SELECT current_setting('work_mem') FROM pg_sleep(0.001), pg_advisory_xact_lock_shared(7000)"
    with held(group.database):
        tasks = group.insert(*[input] * 1500)
        wait_runs(group.database)
        group.database.execute(f"ALTER ROLE \"{group.database.user}\" SET work_mem = '12345kB'")
    found = [group.database.wait(id, timeout=60) for id in tasks]
    assert [row["output"] for row in (found[0], found[-1])] == [
        group.database.execute("SHOW work_mem")[0][0],
        "12345kB",
    ]
    assert len({row["pid"] for row in found}) == 2


@pytest.mark.parametrize(
    "input",
    [
        "CREATE TEMP TABLE IF NOT EXISTS t (a int); INSERT INTO t VALUES (1); SELECT count(*) FROM t",
        "SELECT temporary()",
        "SELECT 1 / (temporary() - 2)",
        "DECLARE c CURSOR FOR SELECT 1; FETCH c",
        "DO $$ BEGIN EXECUTE 'PREPARE mine AS SELECT 1'; END $$",
    ],
)
def test_what_a_task_leaves_in_its_session_is_not_found_by_the_next(group: Group, input: str) -> None:
    group.database.execute(
        "CREATE FUNCTION temporary() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN"
        " CREATE TEMP TABLE IF NOT EXISTS t (a int) ON COMMIT DROP; INSERT INTO t VALUES (1);"
        " RETURN (SELECT count(*) FROM t); END $$"
    )
    found = group.run(*["SELECT 1", input, input, "SELECT 1"] * 5)
    assert {(row["state"], row["output"], row["error"]) for row in found[1::4] + found[2::4]} == {
        ("DONE", found[1]["output"], None)
    }
    assert found[1]["output"].splitlines()[-1] in ("1", "-1", "DO")
    assert [row["output"] for row in found[::4] + found[3::4]] == ["1"] * 10


def test_when_constraints_are_checked_is_no_business_of_another(group: Group) -> None:
    group.database.execute(
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )
    found = group.run("SET CONSTRAINTS ALL IMMEDIATE", "INSERT INTO child VALUES (1); INSERT INTO parent VALUES (1)")
    assert [(row["state"], row["error"]) for row in found] == [("DONE", None)] * 2


def test_silent_tasks_are_removed(group: Group) -> None:
    inputs = ["SELECT 1 WHERE false", "SELECT 2", "SELECT 1 / 0", "SELECT FROM task LIMIT 0"]
    ids = group.insert(*inputs, delete=True)
    for id in (ids[0], ids[3]):
        group.database.wait(id, gone=True)
    assert [group.database.wait(id)["state"] for id in ids[1:3]] == ["DONE", "FAIL"]


def test_long_one_is_put_aside_and_those_before_it_are_committed(
    database: Database, master: Callable[..., Master]
) -> None:
    group = Group(database, master("--batch-time", "1s", database.conninfo, tables=1))
    with held(database):
        ids = group.insert(PLAIN, PLAIN, WAIT, PLAIN)
        row = database.wait(ids[2], "WORK")
        before = [database.wait(id) for id in ids[:2]]
    assert before[0]["output"] == before[1]["output"]
    after = [database.wait(id) for id in ids[2:]]
    assert [row["state"] for row in before + after] == ["DONE"] * 4
    assert (row["attempt"], after[0]["attempt"]) == (1, 1)
    assert all(row["stop"] <= after[0]["start"] for row in before)


def test_timeout_ends_its_own_task_only(database: Database, master: Callable[..., Master]) -> None:
    group = Group(database, master("--batch-time", "500ms", database.conninfo, tables=1))
    [a, b] = group.insert(PLAIN, "SELECT pg_sleep(60)", timeout="2 s")
    assert database.wait(a)["state"] == "DONE"
    row = database.wait(b)
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert "timeout" in row["error"]


STOP = "UPDATE task SET state = 'STOP' WHERE id = {}"
DELETE = "DELETE FROM task WHERE id = {}"


@pytest.mark.parametrize("how", [STOP, DELETE])
@pytest.mark.parametrize("before", [WAIT, f"COMMIT; {WAIT}"], ids=["shares", "alone"])
def test_one_in_hand_that_is_stopped_or_deleted_never_was_and_the_others_go_on(
    database: Database, master: Callable[..., Master], how: str, before: str
) -> None:
    group = Group(database, master("--batch-time", "5s", database.conninfo, tables=1))
    database.execute("CREATE TABLE did (what text)")
    with held(database):
        ids = group.insert(PLAIN, before, "INSERT INTO did VALUES ('stopped')", "INSERT INTO did VALUES ('kept')")
        database.wait(ids[2], "WORK")
        wait_runs(database)
        database.execute(how.format(ids[2]))
    assert [database.wait(id)["state"] for id in (ids[0], ids[1], ids[3])] == ["DONE"] * 3
    assert database.execute("SELECT what FROM did") == [("kept",)]
    if how == STOP:
        row = eventually(lambda: database.tasks(f"id = {ids[2]} AND stop IS NOT NULL"))[0]
        assert (row["state"], row["output"]) == ("STOP", None)


def test_order_within_the_group_is_kept_also_around_what_cannot_share(group: Group) -> None:
    inputs = ["SELECT 1", "SELECT 1; SELECT 2", "VACUUM task_master", "SELECT 1 / 0"]
    found = group.run(*[inputs[n % 4] for n in range(60)])
    assert all(before["stop"] <= after["start"] for before, after in pairwise(found))
    assert Counter(row["state"] for row in found) == {"DONE": 45, "FAIL": 15}


def test_row_with_a_limit_or_repetition_of_its_own_runs_by_itself(group: Group) -> None:
    for columns in ({"count": 100}, {"live": "1 hour"}, {"save": True}, {"atomic": False}, {"repeat": "1 hour"}):
        found = group.run(*[PLAIN] * 5, **columns, group=str(columns))
        assert len({row["output"] for row in found}) == 5
    group.have_not_shared()


def test_no_more_run_at_once_than_max_admits(database: Database, master: Callable[..., Master]) -> None:
    group = Group(database, master(database.conninfo))
    database.execute("CREATE TABLE running (pid int)")
    busy = "SELECT count(*) FROM (SELECT pg_sleep(0.0005)) AS s, pg_locks WHERE locktype = 'advisory' AND objid = 7"
    with held(database):
        ids = group.insert(*[f"{WAIT}; SELECT pg_advisory_xact_lock_shared(7); {busy}"] * 600, max=2)
        wait_runs(database, 3)
    found = [database.wait(id, timeout=60) for id in ids]
    pids = {row["pid"] for row in found}
    assert len(pids) == 3
    assert max(int(row["output"].splitlines()[-1]) for row in found) <= 3
    eventually(group.shared)


def test_users_trigger_that_refuses_the_end_fails_only_what_it_refuses(group: Group) -> None:
    group.master.may_log_errors = True
    group.database.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no end for %', NEW.data; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON task FOR EACH ROW"
        " WHEN (NEW.state = 'DONE' AND NEW.data = 'refused') EXECUTE FUNCTION refuse()"
    )
    query = (
        "INSERT INTO task (input, delete, batch, data) SELECT 'SELECT 1', false, 50, CASE WHEN n = 5 THEN 'refused' END"
        " FROM generate_series(1, 10) AS n RETURNING id"
    )
    found = [group.database.wait(id) for (id,) in group.database.execute(query)]
    assert [row["state"] for row in found] == ["DONE"] * 4 + ["FAIL"] + ["DONE"] * 5


def test_any_id_may_run_beside_those_that_share(group: Group) -> None:
    least = -(2**63)
    with held(group.database):
        group.database.insert(WAIT, id=least, max=3, batch=1)
        group.database.wait(least, "WORK")
        group.run(*[PLAIN] * 40, max=3)
        eventually(group.shared)
