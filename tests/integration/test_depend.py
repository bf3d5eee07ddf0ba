"""Tasks that wait for others: never stuck, never early."""

from collections.abc import Callable
from signal import SIGKILL
from typing import Any

import psycopg
import pytest
from psycopg import errors

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

FAILING = "SELECT 1 / 0"


@pytest.fixture
def base(served: Database) -> Database:
    served.execute("CREATE TABLE IF NOT EXISTS ran (id bigint, at timestamptz DEFAULT clock_timestamp())")
    return served


def note(base: Database, **columns: Any) -> int:
    """A task that notes that it ran, in a group of its own."""
    input = "INSERT INTO ran SELECT current_setting('pg_task.id')::bigint"
    group = f"own {base.execute('SELECT gen_random_uuid()')[0][0]}"
    return base.insert(input, **({"delete": False, "group": group} | columns))


def times(base: Database, id: int) -> int:
    return int(base.execute("SELECT count(*) FROM ran WHERE id = %s", [id])[0][0])


def test_it_runs_when_all_that_it_depends_on_are_done(base: Database) -> None:
    with held(base):
        first, second = note(base), base.insert(WAIT, group="slow", delete=False)
        third = note(base, depend=[first, second, first])
        assert base.wait(first)["state"] == "DONE"
        wait_runs(base)
        row = base.wait(third, "WAIT")
        assert (row["start"], row["depend"]) == (None, [first, second, first])
    assert base.wait(third)["state"] == "DONE"
    assert times(base, third) == 1
    query = "SELECT max(stop) <= (SELECT start FROM task WHERE id = %s) FROM task WHERE id = ANY (%s)"
    assert base.execute(query, [third, [first, second]]) == [(True,)]


def test_what_is_done_already_holds_up_nobody(base: Database) -> None:
    first = note(base)
    base.wait(first)
    second = note(base, depend=[first])
    assert base.wait(second)["state"] == "DONE"
    assert base.wait(note(base, depend=[]))["state"] == "DONE"


@pytest.mark.parametrize("batch", [1, 20])
def test_chain_of_a_thousand_runs_in_its_order(base: Database, batch: int) -> None:
    group = f"chain {batch}"
    base.execute(
        """WITH made AS (SELECT nextval(pg_get_serial_sequence('task', 'id')) AS id FROM generate_series(1, 1000)),
            numbered AS (SELECT id, lag(id) OVER (ORDER BY id) AS before FROM made)
        INSERT INTO task (id, depend, "group", batch, delete, input)
        SELECT id, array_remove(ARRAY[before], NULL), %s, %s, false,
            'INSERT INTO ran SELECT current_setting(''pg_task.id'')::bigint'
        FROM numbered ORDER BY id""",
        [group, batch],
    )
    left = "SELECT count(*) FROM task WHERE \"group\" = %s AND state <> 'DONE'"
    eventually(lambda: base.execute(left, [group]) == [(0,)], 120)
    order = """SELECT count(*), bool_and(at >= before) FROM (
        SELECT r.at, lag(r.at) OVER (ORDER BY r.id) AS before
        FROM ran AS r JOIN task AS t USING (id) WHERE t."group" = %s) AS x"""
    assert base.execute(order, [group]) == [(1000, True)]


def test_fan_out_and_fan_in_of_a_thousand(base: Database) -> None:
    first = note(base, plan="infinity")
    fan = """INSERT INTO task (depend, "group", max, delete, input)
        SELECT ARRAY[%s]::bigint[], 'fan', 3, false, 'SELECT 1' FROM generate_series(1, 1000) RETURNING id"""
    ids = [id for (id,) in base.execute(fan, [first])]
    last = note(base, depend=ids)
    base.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    assert base.wait(last, timeout=120)["state"] == "DONE"
    assert base.execute("SELECT state::text, count(*) FROM task WHERE \"group\" = 'fan' GROUP BY 1") == [("DONE", 1000)]
    [(early,)] = base.execute(
        "SELECT (SELECT at FROM ran WHERE id = %s) < (SELECT max(stop) FROM task WHERE \"group\" = 'fan')", [last]
    )
    assert not early


def test_failure_is_passed_on_to_all_that_depend_on_it_but_those_that_run_anyway(base: Database) -> None:
    first = base.insert(FAILING, group="failing", plan="infinity")
    second = note(base, depend=[first])
    third = note(base, depend=[second])
    anyway = note(base, depend=[third, first], anyway=True)
    base.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    assert base.wait(anyway)["state"] == "DONE"
    rows = [base.wait(id) for id in (second, third)]
    assert [(row["state"], row["code"], row["error"]) for row in rows] == [
        ("GONE", "PT001", f"ERROR:  task {first}, on which this one depends, is FAIL"),
        ("GONE", "PT001", f"ERROR:  task {second}, on which this one depends, is GONE"),
    ]
    assert all(row["stop"] and row["start"] is None for row in rows)
    assert [times(base, id) for id in (second, third)] == [0, 0]


def test_failure_at_the_head_of_a_chain_of_a_thousand_ends_it(base: Database) -> None:
    head = note(base, plan="infinity")
    base.execute(
        """WITH made AS (SELECT nextval(pg_get_serial_sequence('task', 'id')) AS id FROM generate_series(1, 1000))
        INSERT INTO task (id, depend, "group", input)
        SELECT id, ARRAY[coalesce(lag(id) OVER (ORDER BY id), %s)], 'doomed', 'SELECT 1' FROM made ORDER BY id""",
        [head],
    )
    base.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [head])
    gone = "SELECT count(*) FROM task WHERE \"group\" = 'doomed' AND state = 'GONE'"
    eventually(lambda: base.execute(gone) == [(1000,)], 60)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("UPDATE task SET state = 'STOP' WHERE id = {}", "task {}, on which this one depends, is STOP"),
        ("DELETE FROM task WHERE id = {}", "task {}, on which this one depends, was deleted"),
    ],
)
@pytest.mark.parametrize("running", [False, True])
def test_what_somebody_stops_or_deletes_is_not_done(base: Database, end: str, why: str, running: bool) -> None:
    with held(base):
        first = base.insert(WAIT, group=f"ended {end} {running}", plan="now" if running else "infinity")
        second = note(base, depend=[first])
        base.wait(second, "WAIT")
        if running:
            base.wait(first, "WORK")
        base.execute(end.format(first))
        row = base.wait(second)
    assert (row["state"], row["error"]) == ("GONE", f"ERROR:  {why.format(first)}")


def test_whoever_runs_anyway_is_told_of_a_deletion_too(base: Database) -> None:
    first = note(base, plan="infinity")
    second = note(base, depend=[first], anyway=True)
    eventually(lambda: base.wait(second, "WAIT")["pid"] == 0)  # it was looked at
    base.execute("DELETE FROM task WHERE id = %s", [first])
    assert base.wait(second)["state"] == "DONE"


def test_a_run_that_its_calendar_skips_is_told_to_those_who_wait_for_it(base: Database) -> None:
    with held(base):
        base.insert(WAIT, group="skipped", delete=False)
        first = base.insert("SELECT 1", group="skipped", cron="0 0 1 1 *", zone="UTC", missed="skip", plan="2090-01-01")
        eventually(lambda: base.wait(first, "PLAN"))
        second = note(base, depend=[first], anyway=True)
        eventually(lambda: base.wait(second, "WAIT")["pid"] == 0)
        base.execute("UPDATE task SET plan = now() - interval '2 days' WHERE id = %s", [first])
    assert base.wait(first)["state"] == "GONE"
    assert base.wait(second)["state"] == "DONE"
    base.execute("UPDATE task SET state = 'STOP' WHERE parent = %s", [first])


def test_what_came_too_late_is_not_done(base: Database) -> None:
    first = note(base, plan="infinity")
    second = note(base, depend=[first])
    base.wait(second, "WAIT")
    base.execute("UPDATE task SET plan = now() - interval '1 day' WHERE id = %s", [first])
    assert base.wait(second)["error"] == f"ERROR:  task {first}, on which this one depends, is GONE"


def test_what_was_removed_after_it_was_done_is_done(base: Database) -> None:
    with held(base):
        first = base.insert(
            "DO $$ BEGIN PERFORM pg_advisory_xact_lock_shared(7000); END $$", group="silent", string=False
        )
        second = note(base, depend=[first])
        base.wait(first, "WORK")
    assert base.wait(second)["state"] == "DONE"


def test_it_is_late_by_no_fault_of_its_own(base: Database) -> None:
    with held(base):
        first = base.insert(WAIT, group="long", delete=False)
        second = note(base, depend=[first], active="1 s", plan="now")
        base.wait(second, "WAIT")
        base.execute("UPDATE task SET plan = plan - interval '1 hour' WHERE id = %s", [second])
    assert base.wait(second)["state"] == "DONE"


def test_it_is_planned_for_later_and_waits_for_that_too(base: Database) -> None:
    first = note(base)
    second = note(base, depend=[first], plan="2100-01-01")
    assert base.wait(second, "PLAN")["plan"].year == 2100
    third = note(base, depend=[second])
    base.wait(third, "WAIT")
    base.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [third])
    assert base.wait(third)["state"] == "DONE", "somebody has said that it shall wait no more"


@pytest.mark.parametrize(
    ("depend", "error", "words"),
    [
        ("{987654321}", errors.ForeignKeyViolation, "task 987654321, on which this one shall depend, does not exist"),
        ("{1,NULL}", errors.NullValueNotAllowed, "depend cannot be"),
        ("{{1},{2}}", errors.NullValueNotAllowed, "it is a list of ids"),
        (f"{{{','.join(map(str, range(10_001)))}}}", errors.ProgramLimitExceeded, "10001"),
    ],
)
def test_nonsense_is_refused(base: Database, depend: str, error: type[psycopg.Error], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        base.insert("SELECT 1", depend=depend)
    assert raised.value.diag.message_hint


def test_nobody_depends_on_himself_or_in_a_ring(base: Database) -> None:
    with pytest.raises(errors.ForeignKeyViolation) as raised:
        base.insert("SELECT 1", id=-5, depend=[-5])
    assert raised.value.diag.message_hint == "A task cannot depend on itself."
    with pytest.raises(errors.ForeignKeyViolation):
        base.execute("INSERT INTO task (id, depend, input) VALUES (-6, '{-7}', 'x'), (-7, '{-6}', 'x')")
    first = note(base, plan="infinity")
    second = note(base, depend=[first])
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        base.execute("UPDATE task SET depend = %s WHERE id = %s", [[second], first])


def test_whoever_may_only_insert_may_depend(base: Database) -> None:
    base.admin_execute("DROP ROLE IF EXISTS clerk")
    base.admin_execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'")
    base.execute("GRANT INSERT ON task TO clerk")
    first = note(base, plan="infinity")
    with psycopg.connect(base.server.conninfo(base.name, "clerk", password="clerk"), autocommit=True) as clerk:
        clerk.execute("INSERT INTO task (depend, data, input) VALUES (%s, 'clerk', 'SELECT 1')", [[first]])
        with pytest.raises(errors.InsufficientPrivilege):
            clerk.execute("INSERT INTO task (state, input) VALUES ('WAIT', 'SELECT 1')")
    [row] = base.tasks("data = 'clerk'")
    base.wait(row["id"], "WAIT")
    base.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    assert base.wait(row["id"])["state"] == "DONE"
    base.execute("REVOKE ALL ON task FROM clerk")
    base.admin_execute("DROP ROLE clerk")


# Each of two transactions held at each moment


def test_dependency_ends_while_the_insert_is_not_committed(base: Database) -> None:
    holder = base.connect()
    holder.execute("SELECT pg_advisory_lock(7000)")
    first = base.insert(WAIT, group="ends meanwhile", delete=False)
    wait_runs(base)
    with base.connect(autocommit=False) as inserting:
        query = (
            "INSERT INTO task (depend, \"group\", delete, input) VALUES (%s, 'after', false, 'SELECT 2') RETURNING id"
        )
        [(second,)] = inserting.execute(query, [[first]]).fetchall()
        holder.close()
        assert base.wait(first)["state"] == "DONE", "an insert that is open holds up nobody's end"
    assert base.wait(second)["state"] == "DONE"


def test_insert_commits_while_the_end_of_the_dependency_is_not(base: Database) -> None:
    """The end waits for the lock of a constraint trigger, after the row was written."""
    base.execute(
        """CREATE TABLE IF NOT EXISTS brake (x int);
        CREATE OR REPLACE FUNCTION brake() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_advisory_xact_lock_shared(7000); RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER brake AFTER UPDATE ON task DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
            WHEN (NEW.state = 'DONE' AND NEW.data = 'brake') EXECUTE FUNCTION brake()"""
    )
    try:
        with held(base):
            first = base.insert("SELECT 1", group="braked", delete=False, data="brake")
            wait_runs(base)
            second = note(base, depend=[first])
            eventually(lambda: base.wait(second, "WAIT")["pid"] == 0)  # it was looked at
            assert base.wait(first, "WORK")
        assert base.wait(second)["state"] == "DONE"
    finally:
        base.execute("DROP TRIGGER brake ON task")


def test_delete_waits_for_the_insert_of_a_dependent(base: Database) -> None:
    first = note(base, plan="infinity")
    with base.connect(autocommit=False) as inserting:
        inserting.execute("INSERT INTO task (depend, data, input) VALUES (%s, 'orphan', 'SELECT 1')", [[first]])
        with base.connect() as deleting, pytest.raises(errors.LockNotAvailable):
            deleting.execute("SET lock_timeout = '100 ms'")
            deleting.execute("DELETE FROM task WHERE id = %s", [first])
    base.execute("DELETE FROM task WHERE id = %s", [first])
    [row] = base.tasks("data = 'orphan'")
    assert base.wait(row["id"])["error"] == f"ERROR:  task {first}, on which this one depends, was deleted"


# Masters and workers that die


def test_chain_goes_on_under_the_next_master(database: Database, master: Callable[..., Master]) -> None:
    one = master()
    database.execute(
        """WITH made AS (SELECT nextval(pg_get_serial_sequence('task', 'id')) AS id FROM generate_series(1, 200))
        INSERT INTO task (id, depend, delete, input)
        SELECT id, array_remove(ARRAY[lag(id) OVER (ORDER BY id)], NULL), false, 'SELECT pg_sleep(0.002)'
        FROM made ORDER BY id"""
    )
    eventually(lambda: len(database.tasks("state = 'DONE'")) >= 20)
    one.expect_exit = -SIGKILL
    one.stop(SIGKILL)
    master()
    eventually(lambda: len(database.tasks("state = 'DONE'")) == 200, 60)


def test_what_ended_while_no_master_was_there_is_seen_by_the_next(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master()
    first, deleted = (database.insert("SELECT 1", plan="infinity") for _ in range(2))
    second = database.insert("SELECT 2", depend=[first], delete=False)
    third = database.insert("SELECT 3", depend=[deleted])
    fourth = database.insert("SELECT 4", depend=[third])
    fifth = database.insert("SELECT 5", depend=[fourth], anyway=True, delete=False)
    database.wait(second, "WAIT")
    one.stop()
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [deleted])
    database.execute("DELETE FROM task WHERE id = %s", [deleted])
    database.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    master()
    assert [database.wait(id)["state"] for id in (second, third, fourth, fifth)] == ["DONE", "GONE", "GONE", "DONE"]
    assert database.wait(third)["error"] == f"ERROR:  task {deleted}, on which this one depends, was deleted"


def test_workers_report_only_while_rows_wait(database: Database, master: Callable[..., Master]) -> None:
    one = master("--log-level", "debug", database.conninfo)
    first = database.insert("SELECT 1", plan="infinity", delete=False)
    second = database.insert("SELECT 2", depend=[first], delete=False)
    database.wait(second, "WAIT")
    one.wait_log(r"workers_report .*on=true")
    database.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    assert database.wait(second)["state"] == "DONE"
    one.wait_log(r"workers_report .*on=false")


def test_many_that_wait_are_looked_at_in_pieces_and_hold_up_nobody_else(base: Database) -> None:
    with held(base):
        first = base.insert(WAIT, delete=False, group="first of many")
        wait_runs(base)
        base.execute(
            """INSERT INTO task (input, depend, "group", "delete", data)
            SELECT 'SELECT 1', ARRAY[%s::bigint], 'many', false, 'many' FROM generate_series(1, 5000)""",
            [first],
        )
        other = note(base)
        assert base.wait(other)["state"] == "DONE"
        looked_at = "SELECT count(*) FROM task WHERE data = 'many' AND state = 'WAIT' AND pid = 0"
        eventually(lambda: base.execute(looked_at) == [(5000,)], 60)
    left = "SELECT count(*) FROM task WHERE data = 'many' AND state = 'WAIT'"
    eventually(lambda: base.execute(left) == [(0,)], 60)
    base.execute("UPDATE task SET state = 'STOP' WHERE data = 'many' AND state IN ('PLAN', 'TAKE', 'WORK')")


def test_waiting_row_that_a_users_trigger_refuses_holds_up_no_other(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master()
    database.execute("""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE 'not this one'; END $$""")
    database.execute("""CREATE TRIGGER refuse BEFORE UPDATE ON task FOR EACH ROW
        WHEN (OLD.state = 'WAIT' AND OLD.data = 'refused') EXECUTE FUNCTION refuse()""")
    first = database.insert("SELECT 1", plan="infinity", delete=False)
    refused, other = (database.insert("SELECT 2", depend=[first], data=data, delete=False) for data in ("refused", "x"))
    database.execute("UPDATE task SET plan = now() WHERE id = %s", [first])
    assert database.wait(other)["state"] == "DONE"
    one.wait_log(f"waiting_row_refused .*id={refused} .*not this one")
    assert (database.task(refused) or {})["state"] == "WAIT"
    database.execute("DROP TRIGGER refuse ON task")
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [refused])
