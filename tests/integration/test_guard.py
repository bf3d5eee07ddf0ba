"""What a role that may only use the task table can write to it: its own columns, STOP and PLAN; the rest is refused."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("guard")) as one:
        yield one


@pytest.fixture(scope="module")
def user(base: Served) -> Iterator[psycopg.Connection[Any]]:
    """A session of a role that may use the task table, but not its task_master."""
    name = f"{base.database.name}_user"
    base.database.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    base.database.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON task TO "{name}"')
    base.database.execute("ALTER TABLE task ADD COLUMN own text")
    session = psycopg.connect(base.database.server.conninfo(base.database.name, name), autocommit=True)
    yield session
    session.close()
    base.database.execute("ALTER TABLE task DROP COLUMN own")
    base.database.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def a_task(base: Served, state: str) -> int:
    """A row in that state, and not to be run; a running one really runs."""
    if state == "WORK":
        id = base.database.insert("SELECT pg_sleep(60)", group="guarded")
        base.database.wait(id, "WORK")
        return id
    plan = "now" if state in ("DONE", "FAIL") else "9999-01-01"
    input = {"FAIL": "SELECT 1/0"}.get(state, "SELECT 1")
    id = base.database.insert(input, plan=plan, delete=False)
    if state in ("STOP", "GONE", "WAIT"):
        base.database.execute("UPDATE task SET state = %s WHERE id = %s", [state, id])
    return base.database.wait(id, state)["id"]


@pytest.mark.parametrize("state", ["PLAN", "DONE", "FAIL", "STOP", "GONE", "WORK"])
@pytest.mark.parametrize(
    "change",
    [
        "id = -id",
        "parent = 1",
        "pid = 1",
        "attempt = 7",
        "state = 'TAKE'",
        "state = 'WORK', data = 'x'",
        "state = 'DONE'",
        "state = 'FAIL'",
        "state = 'GONE'",
        "start = now()",
        "stop = now()",
        "output = 'forged'",
        "error = 'forged'",
        "code = 'forge'",
        "notice = 'forged'",
        "error = 'ERROR:  task stopped by ' || session_user, code = '57014'",
    ],
)
def test_what_only_the_scheduler_writes_is_refused(
    base: Served, user: psycopg.Connection[Any], state: str, change: str
) -> None:
    if change == f"state = '{state}'" or (state == "WORK" and "'WORK'" in change):
        return  # no change at all
    id = a_task(base, state)
    before = base.database.task(id)
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
        user.execute(f"UPDATE task SET {change} WHERE id = %s".encode(), [id])
    assert str(id) in str(refused.value)
    assert refused.value.diag.message_hint
    assert base.database.task(id) == before
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


@pytest.mark.parametrize(
    ("state", "change"),
    [
        (
            "PLAN",
            "plan = now() + interval '1 year', \"group\" = 'x', input = 'SELECT 2', max = 3, remote = 'x'",
        ),
        (
            "PLAN",
            "active = '2 hours', live = '1 s', timeout = '1 s', repeat = '1 s', count = 3, drift = true",
        ),
        (
            "PLAN",
            "delimiter = ',', escape = 'x', quote = 'y', string = false, \"null\" = '', save = true, atomic = false",
        ),
        ("PLAN", "state = 'STOP'"),
        ("WORK", "state = 'STOP'"),
        ("WAIT", "state = 'STOP'"),
        ("DONE", "state = 'PLAN', plan = '9999-01-01'"),
        ("FAIL", "state = 'PLAN', plan = '9999-01-01'"),
        ("GONE", "state = 'PLAN', plan = '9999-01-01'"),
        ("STOP", "state = 'PLAN', plan = '9999-01-01'"),
        *[(state, "data = 'mine', own = 'mine'") for state in ("PLAN", "DONE", "FAIL", "STOP", "GONE", "WORK")],
    ],
)
def test_what_a_user_may_change_is_changed(
    base: Served, user: psycopg.Connection[Any], state: str, change: str
) -> None:
    id = a_task(base, state)
    assert user.execute(f"UPDATE task SET {change} WHERE id = %s".encode(), [id]).rowcount == 1
    user.execute("DELETE FROM task WHERE id = %s", [id])
    assert base.database.task(id) is None


@pytest.mark.parametrize(
    "change", ["input = 'SELECT 2'", "\"group\" = 'other'", "max = 9", "remote = 'x'", "plan = now()"]
)
def test_running_row_cannot_be_turned_into_another_task(
    base: Served, user: psycopg.Connection[Any], change: str
) -> None:
    id = a_task(base, "WORK")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        user.execute(f"UPDATE task SET {change} WHERE id = %s".encode(), [id])
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


def test_plan_of_a_running_row_that_has_a_key_may_be_set_and_nothing_else(
    base: Served, user: psycopg.Connection[Any]
) -> None:
    id = a_task(base, "WORK")
    base.database.execute("UPDATE task SET key = 'guarded' WHERE id = %s", [id])
    assert user.execute("UPDATE task SET plan = '9999-01-01' WHERE id = %s", [id]).rowcount == 1
    user.execute("UPDATE task SET plan = '1999-01-01' WHERE id = %s", [id])
    row = base.database.task(id)
    assert row is not None
    assert row["plan"] > row["start"]
    for change in ("plan = now(), input = 'SELECT 2'", "plan = now(), pid = NULL", "attempts = '[]'"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            user.execute(f"UPDATE task SET {change} WHERE id = %s".encode(), [id])
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


@pytest.mark.parametrize("state", ["DONE", "FAIL", "STOP", "GONE"])
def test_user_puts_an_ended_task_back_with_a_note_and_no_other(
    base: Served, user: psycopg.Connection[Any], state: str
) -> None:
    id = a_task(base, state)
    before = base.database.task(id)
    for change in (
        "attempts = '[]'",
        "attempts = '[]', state = 'PLAN'",
        "attempts = NULL, state = 'PLAN', pid = NULL, start = NULL",
        "attempts = '[{\"state\": \"DONE\"}]', state = 'PLAN', pid = NULL, start = NULL, stop = NULL",
    ):
        if state in ("STOP", "GONE") and "NULL" in change and "{" not in change:
            continue  # they are null already
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            user.execute(f"UPDATE task SET {change} WHERE id = %s".encode(), [id])
    assert base.database.task(id) == before
    with user.transaction(force_rollback=True):
        assert user.execute("SELECT task_retry(%s)", [id]).fetchone() == (True,)
        [(attempts, *rest)] = user.execute("SELECT attempts, pid, start, stop FROM task WHERE id = %s", [id]).fetchall()
        assert ([note["state"] for note in attempts], rest) == ([state], [None, None, None])
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


def test_running_row_cannot_be_set_back_to_plan(base: Served, user: psycopg.Connection[Any]) -> None:
    id = a_task(base, "WORK")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        user.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


def test_task_of_a_user_without_rights_on_the_masters_table_runs(base: Served, user: psycopg.Connection[Any]) -> None:
    [(id,)] = user.execute("INSERT INTO task (input) VALUES ('SELECT 1') RETURNING id").fetchall()
    assert base.database.wait(id)["state"] == "DONE"


def test_stop_by_a_user_cancels_the_run(base: Served, user: psycopg.Connection[Any]) -> None:
    id = a_task(base, "WORK")
    user.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert base.then_next("SELECT 1", group="guarded")["state"] == "DONE"
    row = base.database.task(id)
    assert row is not None
    stopped = f"ERROR:  task stopped by {base.database.name}_user\nERROR:  canceling statement due to user request\n"
    assert row["error"].startswith(stopped)


@pytest.mark.parametrize(
    "columns",
    [
        "state, pid, start|'WORK', pg_backend_pid(), now()",
        "state|'TAKE'",
        "state|'DONE'",
        "pid|1",
        "stop|now()",
        "attempt|5",
    ],
)
def test_row_that_is_no_plan_is_not_inserted_by_a_user(
    base: Served, user: psycopg.Connection[Any], columns: str
) -> None:
    names, values = columns.split("|")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
        user.execute(f"INSERT INTO task (input, {names}) VALUES ('SELECT 1', {values})".encode())
    assert refused.value.diag.message_hint
    base.database.execute(f"INSERT INTO task (input, plan, {names}) VALUES ('SELECT 1', 'infinity', {values})")
    base.database.execute("DELETE FROM task WHERE plan = 'infinity'")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO task (id, input) VALUES ({id}, 'SELECT 1') ON CONFLICT (id) DO UPDATE SET state = 'DONE'",
        "INSERT INTO task (id, input) VALUES ({id}, 'SELECT 1') ON CONFLICT (id) DO UPDATE SET attempt = 9",
        "MERGE INTO task USING (VALUES (1)) AS v ON task.id = {id} WHEN MATCHED THEN UPDATE SET pid = 1",
        "WITH forged AS (UPDATE task SET id = -id WHERE id = {id} RETURNING id) SELECT id FROM forged",
    ],
)
def test_forgery_by_another_statement_is_refused_too(
    base: Served, user: psycopg.Connection[Any], statement: str
) -> None:
    id = a_task(base, "WORK")
    before = base.database.task(id)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        user.execute(statement.format(id=id).encode())
    assert base.database.task(id) == before
    base.database.execute("DELETE FROM task WHERE id = %s", [id])


@pytest.mark.parametrize("statement", ["TRUNCATE task", "ALTER TABLE task DISABLE TRIGGER ALL"])
def test_user_cannot_go_around_the_triggers(base: Served, user: psycopg.Connection[Any], statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        user.execute(statement.encode())
