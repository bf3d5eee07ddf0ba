"""What each column of a task means. This file is the conformance of pgtask with pg_task, in our own words.

One part for each of the 28 columns that pg_task has, in its order, and then those that came on top. `LIKE` says how
they are declared, the tests what they do. What they do to each other has files of its own: test_output.py,
test_groups.py, test_repeat.py and test_extremes.py.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, passes, wait_runs
from tests.fixtures.wait import eventually

Run = Callable[..., dict[str, Any]]

TIME = "timestamp with time zone"
LIKE: dict[str, tuple[str, bool, str | None]] = {
    # name: type, may be null, what an INSERT that does not name it gets
    "id": ("bigint", False, "a number of its own"),
    "parent": ("bigint", True, None),
    "plan": (TIME, False, "the statement's time"),
    "start": (TIME, True, None),
    "stop": (TIME, True, None),
    "active": ("interval", False, "01:00:00"),
    "live": ("interval", False, "00:00:00"),
    "repeat": ("interval", False, "00:00:00"),
    "timeout": ("interval", False, "00:00:00"),
    "count": ("integer", False, "0"),
    "max": ("integer", False, "0"),
    "pid": ("integer", True, None),
    "state": ("state", False, "PLAN"),
    "delete": ("boolean", False, "true"),
    "drift": ("boolean", False, "false"),
    "header": ("boolean", False, "true"),
    "save": ("boolean", False, "false"),
    "string": ("boolean", False, "true"),
    "delimiter": ('"char"', False, "\t"),
    "escape": ('"char"', False, ""),
    "quote": ('"char"', False, ""),
    "data": ("text", True, None),
    "error": ("text", True, None),
    "group": ("text", False, "group"),
    "input": ("text", False, "SELECT"),
    "null": ("text", False, "\\N"),
    "output": ("text", True, None),
    "remote": ("text", True, None),
    # what pg_task does not have
    "atomic": ("boolean", False, "true"),
    "batch": ("integer", False, "1"),
    "attempt": ("integer", False, "0"),
    "retry": ("integer", False, "0"),
    "backoff": ("interval", False, "00:00:01"),
    "retry_on": ("text", False, "* !0A !42"),
    "attempts": ("jsonb", True, None),
    "cron": ("text", True, None),
    "zone": ("text", True, None),
    "until": (TIME, True, None),
    "missed": ("text", False, "once"),
    "key": ("text", True, None),
    "depend": ("bigint[]", True, None),
    "anyway": ("boolean", False, "false"),
    "notify": ("text", True, None),
    "code": ("text", True, None),
    "notice": ("text", True, None),
    "first": (TIME, True, None),
}
SETTINGS = {
    "active": "02:00:00",
    "live": "00:00:05",
    "repeat": "00:00:07",
    "timeout": "00:00:09",
    "count": "11",
    "max": "-13",
    "delete": "false",
    "drift": "true",
    "header": "false",
    "save": "true",
    "string": "false",
    "delimiter": ",",
    "escape": "!",
    "quote": "'",
    "group": "my group",
    "null": "nothing",
    "atomic": "false",
    "batch": "12",
    "retry": "3",
    "backoff": "00:00:07",
    "retry_on": "P0001",
    "missed": "all",
}
"""The columns whose defaults are settings, each with a value that is not the built-in one."""

NEVER = "infinity"
"""A plan for rows that are only looked at."""


def second(database: Database) -> datetime:
    [(now,)] = database.execute("SELECT clock_timestamp()")
    return now


def columns_text(database: Database, session: psycopg.Connection[Any], id: int) -> dict[str, str | None]:
    """The row as text, column by column."""
    names = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in LIKE]
    query = sql.SQL("SELECT {} FROM task WHERE id = %s").format(sql.SQL(", ").join(names))
    return dict(zip(LIKE, session.execute(query, [id]).fetchall()[0], strict=True))


# How they are declared


def test_table_has_these_columns_of_these_types(served: Database) -> None:
    found = served.execute(
        "SELECT attname::text, format_type(atttypid, atttypmod), NOT attnotnull FROM pg_attribute"
        " WHERE attrelid = 'task'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    assert found == [(name, type, null) for name, (type, null, _) in LIKE.items()]


def test_column_that_an_insert_does_not_name_has_its_built_in_default(served: Database) -> None:
    before = second(served)
    id = served.insert("SELECT", plan=NEVER)
    found = columns_text(served, served.connect(), id)
    assert {n: found[n] for n in found if n not in ("id", "plan")} == {
        name: default for name, (_, _, default) in LIKE.items() if name not in ("id", "plan")
    }
    task = served.task(served.insert("SELECT 1", delete=False))
    assert task is not None
    assert before <= task["plan"] <= second(served)


def test_setting_of_the_session_is_the_default(served: Database) -> None:
    session = served.connect()
    for name, value in SETTINGS.items():
        session.execute("SELECT set_config(%s, %s, false)", [f"pg_task.{name}", value])
    query = "INSERT INTO task (input, plan) VALUES ('SELECT', 'infinity') RETURNING id"
    found = columns_text(served, session, session.execute(query).fetchall()[0][0])
    assert {name: found[name] for name in SETTINGS} == SETTINGS


def test_setting_that_is_gone_again_makes_no_insert_fail(served: Database) -> None:
    session = served.connect()
    with session.transaction():
        for name, value in SETTINGS.items():
            session.execute("SELECT set_config(%s, %s, true)", [f"pg_task.{name}", value])
    query = "INSERT INTO task (input, plan) VALUES ('SELECT', 'infinity') RETURNING id"
    found = columns_text(served, session, session.execute(query).fetchall()[0][0])
    assert {name: found[name] for name in SETTINGS} == {name: LIKE[name][2] for name in SETTINGS}


@pytest.mark.parametrize("name", [name for name, (_, null, _) in LIKE.items() if not null])
def test_column_that_must_have_a_value_refuses_null(served: Database, name: str) -> None:
    values = {"plan": NEVER, name: None}
    with pytest.raises(psycopg.errors.NotNullViolation, match=f'column "{name}"'):
        served.insert(**{"input": "SELECT 1", **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("active", "0"),
        ("active", "-1 s"),
        ("live", "-1 us"),
        ("repeat", "-1 day"),
        ("repeat", "1 month -31 days"),
        ("timeout", "-1 s"),
        ("count", -1),
        ("attempt", -1),
    ],
)
def test_value_without_a_meaning_is_refused(served: Database, name: str, value: Any) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        served.insert("SELECT 1", plan=NEVER, **{name: value})


# id


def test_id_is_the_primary_key(served: Database) -> None:
    id = served.insert("SELECT 1", plan=NEVER)
    with pytest.raises(psycopg.errors.UniqueViolation):
        served.insert("SELECT 1", plan=NEVER, id=id)


def test_id_may_be_chosen(run: Run) -> None:
    for id in (-(2**63), -1, 0, 2**63 - 1):
        assert run("SELECT current_setting('pg_task.id')", id=id)["output"] == str(id)


# parent


def test_parent_is_the_task_that_inserted_this_one(run: Run, served: Database) -> None:
    row = run("INSERT INTO task (input, delete) VALUES ('SELECT 2', false) RETURNING id, parent")
    header, line, tag = row["output"].split("\n")
    child, parent = map(int, line.split("\t"))
    assert (header, tag, parent) == ("id\tparent", "INSERT 0 1", row["id"])
    assert served.wait(child)["parent"] == row["id"]


def test_parent_need_not_exist(run: Run) -> None:
    row = run("SELECT 1", parent=987654321)
    assert (row["state"], row["parent"]) == ("DONE", 987654321)


@pytest.mark.parametrize("value", ["", "0"])
def test_parent_is_null_outside_of_a_task(served: Database, value: str) -> None:
    session = served.connect()
    session.execute("SELECT set_config('pg_task.id', %s, false)", [value])
    query = "INSERT INTO task (input, plan) VALUES ('SELECT', 'infinity') RETURNING parent"
    assert session.execute(query).fetchall() == [(None,)]


# plan


def test_task_does_not_start_before_its_plan(run: Run) -> None:
    row = run("SELECT 1", plan=sql.SQL("clock_timestamp() + interval '300 ms'"))
    assert row["plan"] <= row["start"] <= row["plan"] + timedelta(seconds=20)


def test_plan_in_the_past_starts_at_once(run: Run) -> None:
    assert run("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '59 min'"))["state"] == "DONE"


def test_plan_may_be_changed_until_it_starts(run: Run, served: Database) -> None:
    id = served.insert("SELECT 1", plan=NEVER, delete=False)
    served.execute("UPDATE task SET plan = clock_timestamp() WHERE id = %s", [id])
    assert served.wait(id)["state"] == "DONE"


# start and stop


def test_start_and_stop_enclose_the_run(run: Run, served: Database) -> None:
    row = run("SELECT clock_timestamp(), pg_sleep(0.1), clock_timestamp()", header=False)
    assert row["plan"] <= row["start"] < row["stop"] <= second(served)
    begun, _, ended = row["output"].split("\t")
    assert row["start"] <= datetime.fromisoformat(begun + ":00") < datetime.fromisoformat(ended + ":00") <= row["stop"]


def test_stop_is_null_while_it_runs(served: Database) -> None:
    with held(served):
        id = served.insert(WAIT, delete=False)
        row = served.wait(id, "WORK")
        assert row["start"] is not None
        assert row["stop"] is None
    assert served.wait(id)["stop"] is not None


# active


def test_task_that_comes_too_late_is_gone(run: Run) -> None:
    row = run("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '2 s'"), active="1 s")
    assert (row["state"], row["error"]) == ("GONE", "ERROR:  task not active")
    assert (row["output"], row["start"], row["pid"], row["attempt"]) == (None, None, None, 0)
    assert row["stop"] is not None


def test_task_that_comes_in_time_is_run(run: Run) -> None:
    assert run("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '2 s'"), active="1 min")["state"] == "DONE"


def test_active_is_one_hour_by_default(run: Run) -> None:
    assert run("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '61 min'"))["state"] == "GONE"


@pytest.mark.parametrize("columns", [{"repeat": "1 year"}, {"max": -1}])
def test_repeated_task_and_one_with_a_pause_are_never_too_late(run: Run, columns: dict[str, Any]) -> None:
    row = run("SELECT 1", plan=sql.SQL("clock_timestamp() - interval '2 days'"), active="1 s", **columns)
    assert row["state"] == "DONE"


def test_task_whose_group_was_full_for_too_long_is_gone(served: Database) -> None:
    with held(served):
        first = served.insert(WAIT, group="narrow", delete=False)
        served.wait(first, "WORK")
        late = served.insert("SELECT 1", group="narrow", active="100 ms", delete=False)
        passes(0.15)
    assert served.wait(late)["state"] == "GONE"
    assert served.wait(first)["state"] == "DONE"


# live


def backends(served: Database, ids: list[int]) -> list[str]:
    return [served.wait(id)["output"] for id in ids]


def test_worker_older_than_live_takes_no_such_task(served: Database) -> None:
    old = served.insert("SELECT pg_backend_pid() FROM pg_sleep(0.5)", group="live", delete=False)
    served.wait(old, "WORK")  # where looks are dear, what was planned for an earlier moment may be found later
    young = served.insert("SELECT pg_backend_pid()", group="live", live="100 ms", delete=False)
    first, second = backends(served, [old, young])
    assert first != second


def test_worker_younger_than_live_takes_it(served: Database) -> None:
    query = (
        'INSERT INTO task (input, "group", live, delete)'
        " SELECT 'SELECT pg_backend_pid()', 'long live', '1 day', false FROM generate_series(1, 5) RETURNING id"
    )
    assert len(set(backends(served, [id for (id,) in served.execute(query)]))) == 1


# repeat


def test_repeated_task_is_followed_by_a_row_with_the_next_plan(run: Run, served: Database) -> None:
    row = run("SELECT 1", repeat="1 hour", data="mine")
    [following] = served.tasks(f"parent = {row['id']}")
    assert following["plan"] == row["plan"] + timedelta(hours=1)
    assert (following["state"], following["data"], following["attempt"]) == ("PLAN", "mine", 0)
    same = [name for name in LIKE if name not in ("id", "parent", "plan", "start", "stop", "pid", "state", "attempt")]
    same = [name for name in same if name not in ("error", "output", "code", "notice", "first")]
    assert {name: following[name] for name in same} == {name: row[name] for name in same}


def test_task_without_repeat_is_followed_by_nothing(run: Run, served: Database) -> None:
    assert served.tasks(f"parent = {run('SELECT 1')['id']}") == []


# timeout


def test_run_that_exceeds_its_timeout_fails(run: Run) -> None:
    row = run("SELECT 1; SELECT pg_sleep(60)", timeout="2 s")
    assert (row["state"], row["code"], row["output"]) == ("FAIL", "57014", "1")
    assert row["error"].startswith("ERROR:  canceling statement due to statement timeout\n")
    assert timedelta(milliseconds=1900) <= row["stop"] - row["start"] < timedelta(seconds=20)


def test_timeout_bounds_the_whole_run_and_not_each_statement(run: Run) -> None:
    row = run("SELECT pg_sleep(0.15); SELECT pg_sleep(0.15); SELECT pg_sleep(60)", timeout="400 ms")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert row["stop"] - row["start"] < timedelta(seconds=20)


def test_run_within_its_timeout_is_not_disturbed(run: Run) -> None:
    assert run("SELECT pg_sleep(0.05)", timeout="20 s")["state"] == "DONE"
    assert run("SELECT pg_sleep(0.05)", timeout="0")["state"] == "DONE"
    assert run("SHOW statement_timeout")["output"] == "0"


# count


def test_worker_that_has_run_count_tasks_takes_no_further_one(served: Database) -> None:
    query = (
        'INSERT INTO task (input, "group", count, delete)'
        " SELECT 'SELECT pg_backend_pid()', 'count', 2, false FROM generate_series(1, 6) RETURNING id"
    )
    found = backends(served, [id for (id,) in served.execute(query)])
    assert all(found.count(backend) <= 2 for backend in found)


def test_worker_takes_any_number_of_tasks_without_count(served: Database) -> None:
    query = (
        'INSERT INTO task (input, "group", delete)'
        " SELECT 'SELECT pg_backend_pid()', 'countless', false FROM generate_series(1, 50) RETURNING id"
    )
    assert len(set(backends(served, [id for (id,) in served.execute(query)]))) == 1


# max


def overlap(rows: list[dict[str, Any]]) -> int:
    """How many of the runs were under way at the same moment, at most."""
    return max(sum(a["start"] <= b["start"] < a["stop"] for a in rows) for b in rows)


def test_max_others_of_the_group_may_run_beside_it(served: Database) -> None:
    with held(served):
        ids = [served.insert(WAIT, group="three", max=2, delete=False) for _ in range(6)]
        wait_runs(served, 3)
    assert overlap([served.wait(id) for id in ids]) == 3


def test_one_at_a_time_by_default(served: Database) -> None:
    ids = [served.insert("SELECT pg_sleep(0.02)", group="one", delete=False) for _ in range(5)]
    rows = [served.wait(id) for id in ids]
    assert overlap(rows) == 1
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)


def test_greater_max_goes_first(served: Database) -> None:
    with held(served):
        served.wait(served.insert(WAIT, group="rank", delete=False), "WORK")
        low, high = (served.insert("SELECT 1", group="rank", delete=False) for _ in range(2))
        served.execute("UPDATE task SET max = 5 WHERE id = %s", [high])
        first = served.wait(high)  # beside the one that is held, which the other may not be
    assert first["start"] <= served.wait(low)["start"]


def test_negative_max_is_a_pause_between_the_tasks_of_the_group(served: Database) -> None:
    ids = [served.insert("SELECT 1", group="pause", max=-200, delete=False) for _ in range(3)]
    rows = sorted((served.wait(id) for id in ids), key=lambda row: row["start"])
    for before, after in pairwise(rows):
        assert after["start"] - before["stop"] >= timedelta(milliseconds=195)


# pid


def test_pid_is_the_backend_that_runs_it(run: Run) -> None:
    row = run("SELECT pg_backend_pid()")
    assert row["output"] == str(row["pid"])


# state


def test_states_have_this_order(served: Database) -> None:
    assert served.execute("SELECT enum_range(NULL::state)::text[]") == [
        (["PLAN", "GONE", "TAKE", "WORK", "DONE", "FAIL", "STOP", "WAIT"],)
    ]


def test_state_is_plan_then_work_then_done(served: Database) -> None:
    id = served.insert("SELECT state FROM task WHERE id = current_setting('pg_task.id')::bigint", delete=False)
    row = served.wait(id)
    assert (row["state"], row["output"]) == ("DONE", "WORK")


def test_state_is_fail_after_an_error(run: Run) -> None:
    assert run("SELECT 1/0")["state"] == "FAIL"


@pytest.mark.parametrize("state", ["GONE", "DONE", "FAIL", "STOP"])
def test_only_plan_is_run(served: Database, state: str) -> None:
    id = served.insert("SELECT 1", state=state, delete=False)
    served.wait(served.insert("SELECT 1", delete=False))
    row = served.task(id)
    assert row is not None
    assert (row["state"], row["output"], row["attempt"]) == (state, None, 0)


def test_stopped_task_is_not_run_until_it_is_set_back(served: Database) -> None:
    id = served.insert("SELECT 1", plan=NEVER, delete=False)
    change = "UPDATE task SET state = 'STOP', plan = clock_timestamp() + interval '1 s' WHERE id = %s"
    served.execute(change, [id])
    passes(1.1)
    row = served.task(id)
    assert row is not None
    assert (row["state"], row["start"]) == ("STOP", None)
    served.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    assert served.wait(id)["output"] == "1"


def test_finished_task_set_back_to_plan_runs_again(run: Run, served: Database) -> None:
    row = run("SELECT 1/0")
    served.execute("UPDATE task SET state = 'PLAN', input = 'SELECT 5' WHERE id = %s", [row["id"]])
    again = served.wait(row["id"], "DONE")
    assert (again["output"], again["error"], again["code"], again["attempt"]) == ("5", None, None, 2)


# delete


@pytest.mark.parametrize(
    ("input", "delete", "kept"),
    [
        ("SELECT 1 WHERE false", True, False),
        ("SELECT 1 WHERE false", False, True),
        ("SELECT 1", True, True),
        ("SELECT ''", True, True),
        ("SELECT 1/0", True, True),
    ],
)
def test_row_is_removed_when_nothing_was_said(served: Database, input: str, delete: bool, kept: bool) -> None:
    id = served.insert(input, delete=delete)
    if kept:
        assert served.wait(id)["state"] in ("DONE", "FAIL")
        served.wait(served.insert("SELECT 1", delete=False))
        assert served.task(id) is not None
    else:
        served.wait(id, gone=True)


def test_row_that_only_raised_a_notice_is_removed(served: Database) -> None:
    # `notice` came after pg_task: it keeps no row.
    served.execute("CREATE FUNCTION says() RETURNS SETOF int LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''hi''; END'")
    served.wait(served.insert("SELECT says()"), gone=True)


# drift


@pytest.mark.parametrize("drift", [False, True])
def test_drift_counts_the_repetition_from_the_end_of_the_run(run: Run, served: Database, drift: bool) -> None:
    row = run("SELECT pg_sleep(0.1)", repeat="1 hour", drift=drift)
    [following] = served.tasks(f"parent = {row['id']}")
    later = following["plan"] - timedelta(hours=1)
    if drift:
        assert timedelta(0) <= later - row["stop"] < timedelta(minutes=1)
    else:
        assert later == row["plan"]


# header, string, delimiter, escape, quote, null


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "n\tt\tx\n1\ta'b\t\\N"),
        ({"header": False}, "1\ta'b\t\\N"),
        ({"delimiter": "|"}, "n|t|x\n1|a'b|\\N"),
        ({"quote": "'"}, "'n'\t't'\t'x'\n1\t'a'b'\t\\N"),
        ({"quote": "'", "escape": "'"}, "'n'\t't'\t'x'\n1\t'a''b'\t\\N"),
        ({"quote": "'", "escape": "\\", "string": False}, "'n'\t't'\t'x'\n'1'\t'a\\'b'\t\\N"),
        ({"escape": "\\"}, "n\tt\tx\n1\ta'b\t\\N"),
        ({"null": "NULL"}, "n\tt\tx\n1\ta'b\tNULL"),
    ],
)
def test_output_is_written_as_the_row_says(run: Run, columns: dict[str, Any], expected: str) -> None:
    assert run("SELECT 1 AS n, 'a''b' AS t, NULL AS x", **columns)["output"] == expected


# save


SOIL = (
    "SET work_mem = '1MB'; PREPARE left_over AS SELECT 1; CREATE TEMP TABLE left_over (a int);"
    " LISTEN left_over; SELECT pg_advisory_lock(42); SET my.own = 'left'"
)
LOOK = (
    "SELECT current_setting('work_mem') = '1MB' AS setting,"
    " EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'left_over') AS prepared,"
    " to_regclass('pg_temp.left_over') IS NOT NULL AS temporary,"
    " 'left_over' IN (SELECT pg_listening_channels()) AS listening,"
    " EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND pid = pg_backend_pid()) AS locked,"
    " coalesce(current_setting('my.own', true), '') = 'left' AS placeholder"
)


@pytest.mark.parametrize(("save", "expected"), [(False, "f\tf\tf\tf\tf\tf"), (True, "t\tt\tt\tt\tt\tt")])
def test_session_is_clean_for_the_next_task_unless_saved(served: Database, save: bool, expected: str) -> None:
    group = f"save {save}"
    query = (
        'INSERT INTO task (input, "group", save, header, delete)'
        " SELECT unnest(%s::text[]), %s, %s, false, false RETURNING id"
    )
    [[soil], [look], [clean]] = served.execute(query, [[SOIL, LOOK, "SELECT pg_advisory_unlock_all()"], group, save])
    assert served.wait(soil)["state"] == "DONE"
    assert served.wait(look)["output"] == expected
    assert served.wait(clean)["pid"] == served.wait(soil)["pid"]


# data


def test_data_is_left_alone(run: Run, served: Database) -> None:
    row = run("SELECT 1", data='{"any": "text"}\n')
    assert row["data"] == '{"any": "text"}\n'
    served.execute("UPDATE task SET data = 'changed' WHERE id = %s", [row["id"]])


# error and code


def test_error_and_code_say_what_went_wrong(run: Run) -> None:
    row = run("SELECT 1/0 AS a")
    assert row["error"] == "ERROR:  division by zero\nSTATEMENT:  SELECT 1/0 AS a"
    assert row["code"] == "22012"
    fine = run("SELECT 1")
    assert (fine["error"], fine["code"]) == (None, None)


# group


def test_groups_run_beside_each_other(served: Database) -> None:
    with held(served):
        ids = [served.insert(WAIT, group=group, delete=False) for group in ("a", "b", "c", "A", "")]
        wait_runs(served, 5)
    assert overlap([served.wait(id) for id in ids]) == 5


# input


def test_input_sees_which_task_it_is(run: Run) -> None:
    names = ("pg_task.id", "pg_task.group", "pg_task.schema", "pg_task.table", "application_name")
    query = "SELECT " + ", ".join(f"current_setting('{name}')" for name in names)
    row = run(query, group="it's me", header=False, delimiter="|")
    assert row["output"] == f"{row['id']}|it's me|public|task|pgtask public task it's me {row['id']}"


# output


def test_output_is_what_the_statements_said(run: Run) -> None:
    assert run("SELECT 1 AS a, 2 AS b; SELECT 3 AS c")["output"] == "a\tb\n1\t2\n3"


# remote


def test_remote_runs_on_that_database(run: Run, served: Database) -> None:
    row = run("SELECT current_database(), current_user", remote=served.tcp, group="remote", header=False)
    assert row["output"] == f"{served.name}\t{served.user}"
    backend = run("SELECT pg_backend_pid()", remote=served.tcp, group="remote")
    assert backend["output"] != str(backend["pid"])


def test_malformed_remote_fails(run: Run) -> None:
    row = run("SELECT 1", remote="nonsense")
    assert (row["state"], row["output"]) == ("FAIL", None)
    assert row["error"].startswith('ERROR:  PQconninfoParse failed\nDETAIL:  missing "=" after "nonsense"')
    assert row["error"].endswith("\nSTATEMENT:  SELECT 1")


def test_remote_must_carry_a_password(run: Run, served: Database) -> None:
    row = run("SELECT 1", remote=f"dbname={served.name}")
    assert row["error"] == (
        "ERROR:  password is required\nDETAIL:  Non-superusers must provide a password in the connection string."
        "\nSTATEMENT:  SELECT 1"
    )


# atomic


def test_atomic_runs_and_finishes_in_one_transaction(run: Run, served: Database) -> None:
    served.execute(
        """
        CREATE TABLE stamped (task bigint, state text, xid text DEFAULT pg_current_xact_id()::text);
        CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO public.stamped VALUES (NEW.id, NEW.state::text); RETURN NULL; END';
        CREATE TRIGGER stamp AFTER UPDATE OF state ON task FOR EACH ROW
            WHEN (NEW."group" = 'stamped' AND NEW.state = 'DONE') EXECUTE FUNCTION stamp()
        """
    )
    insert = "INSERT INTO stamped VALUES (current_setting('pg_task.id')::bigint, 'work')"
    together, apart = (run(f"{insert}; SELECT 1; {insert}", group="stamped", atomic=atomic) for atomic in (True, False))
    query = "SELECT array_agg(state ORDER BY state) FROM stamped WHERE task = %s GROUP BY xid ORDER BY 1"
    assert served.execute(query, [together["id"]]) == [(["DONE", "work", "work"],)]
    assert served.execute(query, [apart["id"]]) == [(["DONE"],), (["work", "work"],)]


def test_failed_run_leaves_nothing_of_its_work(run: Run, served: Database) -> None:
    served.execute("CREATE TABLE undone (a bool)")
    for atomic in (True, False):
        assert run(f"INSERT INTO undone VALUES ({atomic}); SELECT 1/0", atomic=atomic)["state"] == "FAIL"
    assert served.execute("SELECT * FROM undone") == []


# attempt


def test_attempt_counts_the_runs(run: Run, served: Database) -> None:
    row = run("SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint")
    assert (row["attempt"], row["output"]) == (1, "1")
    served.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [row["id"]])
    assert eventually(lambda: (task := served.task(row["id"])) and task["state"] == "DONE" and task["attempt"]) == 2


# notice


def test_notice_keeps_what_the_run_raised(run: Run) -> None:
    assert run("DROP TABLE IF EXISTS nowhere")["notice"] == 'NOTICE:  table "nowhere" does not exist, skipping'


# first


def test_first_is_the_plan_from_which_repetitions_are_counted(run: Run, served: Database) -> None:
    plan = datetime(2020, 1, 31, 12, tzinfo=UTC)
    row = run("SELECT 1", plan=plan, repeat="1 month")
    assert row["first"] is None
    [following] = served.tasks(f"parent = {row['id']}")
    assert following["first"] == plan
