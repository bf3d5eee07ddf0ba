"""What any session can do about tasks: cancel them, and hear of their ends."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from signal import SIGKILL
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, falls_asleep, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = "CREATE TABLE effect (what text)"

PARTITIONED = """
    CREATE TABLE task (id bigserial, input text NOT NULL, plan timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (id, plan))
        PARTITION BY RANGE (plan);
    CREATE TABLE task_now PARTITION OF task FOR VALUES FROM (MINVALUE) TO ('3000-01-01');
    CREATE TABLE task_late PARTITION OF task DEFAULT"""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("control"), setup=SETUP) as one:
        yield one


@pytest.fixture(scope="module")
def user(base: Served) -> Iterator[psycopg.Connection[Any]]:
    """A session of a role that has nothing but rights on the task table."""
    name = f"{base.database.name}_user"
    base.database.admin_execute(f'CREATE ROLE "{name}" LOGIN; GRANT "{name}" TO "{base.database.user}"')
    base.database.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON task TO "{name}"')
    session = psycopg.connect(base.database.server.conninfo(base.database.name, name), autocommit=True)
    yield session
    session.close()
    base.database.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def call(session: psycopg.Connection[Any], what: str, *parameters: Any) -> Any:
    """What a function answers."""
    row = session.execute(f"SELECT {what}".encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def planned(database: Database, **columns: Any) -> int:
    return database.insert("SELECT 1", **{"plan": "9999-01-01", "delete": False} | columns)


def row(base: Served, id: int) -> dict[str, Any]:
    found = base.database.task(id)
    assert found is not None
    return found


def heard(session: psycopg.Connection[Any], channel: str) -> Callable[[], list[Any]]:
    """What the session, which may do other things too, has been told on the channel until now."""
    told: list[Any] = []
    session.add_notify_handler(lambda notify: told.append(json.loads(notify.payload)))
    session.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def hear() -> list[Any]:
        session.execute("SELECT 1")
        return told

    return hear


def name_of(session: psycopg.Connection[Any]) -> str:
    return str(call(session, "session_user::text"))


# Cancel


def test_waiting_task_is_cancelled_once_and_says_by_whom(base: Served, user: psycopg.Connection[Any]) -> None:
    id = planned(base.database)
    assert call(user, "task_cancel(%s::bigint)", id) is True
    found = row(base, id)
    assert (found["state"], found["error"], found["code"]) == (
        "STOP",
        f"ERROR:  task stopped by {name_of(user)}",
        "57014",
    )
    assert (found["start"], found["pid"]) == (None, None)
    assert found["stop"] is not None
    assert call(user, "task_cancel(%s::bigint)", id) is False
    assert row(base, id) == found


def test_running_task_is_cancelled_its_work_undone_and_both_errors_kept(
    base: Served, user: psycopg.Connection[Any]
) -> None:
    with held(base.database):
        id = base.database.insert(f"INSERT INTO effect VALUES ('cancelled'); {WAIT}", group="cancelled")
        wait_runs(base.database)
        assert call(user, "task_cancel(%s::bigint)", id) is True
        eventually(lambda: row(base, id)["stop"])
    base.then_next("SELECT 1", group="cancelled")
    found = row(base, id)
    who, *rest = found["error"].split("\n")
    assert (found["state"], found["code"], who) == ("STOP", "57014", f"ERROR:  task stopped by {name_of(user)}")
    assert rest[0] == "ERROR:  canceling statement due to user request"
    assert base.database.execute("SELECT 1 FROM effect WHERE what = 'cancelled'") == []


def test_whoever_stops_a_task_by_whatever_update_is_noted(base: Served, user: psycopg.Connection[Any]) -> None:
    ids = [planned(base.database, data="noted") for _ in range(3)]
    owner = base.database.connect()
    owner.execute(f'SET ROLE "{name_of(user)}"')
    owner.execute("UPDATE task SET state = 'STOP', data = 'x' WHERE data = 'noted'")
    assert {row(base, id)["error"] for id in ids} == {f"ERROR:  task stopped by {name_of(owner)} as {name_of(user)}"}
    user.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [ids[0]])
    user.execute("INSERT INTO task (id, input) VALUES (%s, '') ON CONFLICT (id) DO UPDATE SET state = 'STOP'", [ids[0]])
    assert row(base, ids[0])["error"] == f"ERROR:  task stopped by {name_of(user)}"


def test_who_may_do_no_more_than_set_the_state_still_stops_a_task(base: Served) -> None:
    name = f"{base.database.name}_operator"
    base.database.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    base.database.execute(f'GRANT SELECT (id), UPDATE (state) ON task TO "{name}"')
    id = planned(base.database)
    operator = base.database.connect(base.database.server.conninfo(base.database.name, name))
    operator.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert row(base, id)["state"] == "STOP"
    operator.close()
    base.database.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


def test_cancel_of_a_task_that_is_not_there_says_so(base: Served, user: psycopg.Connection[Any]) -> None:
    for id in (-7, None):
        with pytest.raises(psycopg.errors.NoDataFound, match=f"no task {'null' if id is None else id}") as refused:
            user.execute("SELECT task_cancel(%s::bigint)", [id])
        assert refused.value.diag.message_hint


def test_cancel_by_a_condition_stops_what_fits_and_nothing_else(base: Served, user: psycopg.Connection[Any]) -> None:
    database = base.database
    with held(database):
        running = database.insert(f"{WAIT}, 'filter'", group="filter", delete=False)
        wait_runs(database)
        fitting = [running, *(planned(database, group="filter") for _ in range(3))]
        done = database.wait(database.insert("SELECT 1", group="filtered", data="filter", delete=False))
        other = planned(database, group="others")
        filter = "\"group\" = 'filter' OR data = 'filter' -- and so on"
        assert call(user, "task_cancel(%s::text)", filter) == 4
        assert {row(base, id)["state"] for id in fitting} == {"STOP"}
        assert (row(base, other)["state"], row(base, done["id"])) == ("PLAN", done)
        eventually(lambda: row(base, running)["stop"])
    assert call(user, "task_cancel(%s)", filter) == 0


def test_no_condition_reaches_a_task_that_has_ended(base: Served) -> None:
    database = base.database
    done = database.wait(database.insert("SELECT 1", group="reached", delete=False))
    id = planned(database, group="reached")
    assert database.execute("SELECT task_cancel($$true) OR (true$$)")[0][0] >= 1
    assert (row(base, id)["state"], row(base, done["id"])) == ("STOP", done)


def test_condition_means_what_it_would_mean_to_the_caller(base: Served) -> None:
    database = base.database
    session = database.connect()
    session.execute("CREATE SCHEMA own; CREATE FUNCTION own.mine(task) RETURNS bool RETURN $1.data = 'mine'")
    session.execute("SET search_path TO own, public")
    ids = [planned(database, data=data) for data in ("mine", "yours")]
    assert call(session, "task_cancel('mine(task)')") == 1
    assert [row(base, id)["state"] for id in ids] == ["STOP", "PLAN"]
    session.execute("DROP FUNCTION own.mine; DROP SCHEMA own")


@pytest.mark.parametrize(
    "filter", [None, "", " \n", "id", "nonsense = 1", "id = 'x'::nothing", "state = ", "count(*) > 1"]
)
def test_condition_that_is_none_is_refused_with_a_hint(
    base: Served, user: psycopg.Connection[Any], filter: str | None
) -> None:
    id = planned(base.database)
    with pytest.raises(psycopg.DatabaseError, match="filter") as refused:
        user.execute("SELECT task_cancel(%s::text)", [filter])
    assert refused.value.diag.message_hint
    assert row(base, id)["state"] == "PLAN"


def test_task_of_a_partitioned_table_is_cancelled_and_told_the_same_way(
    database: Database, master: Callable[..., Master]
) -> None:
    database.execute(PARTITIONED)
    master()
    name = f"{database.name}_user"
    database.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    database.execute(f'GRANT SELECT, INSERT, UPDATE ON task TO "{name}"')
    user = database.connect(database.server.conninfo(database.name, name))
    hear = heard(user, "ended")
    with held(database):
        ids = [database.insert(WAIT, notify="ended"), planned(database, notify="ended")]
        wait_runs(database)
        assert call(user, "task_cancel(%s)", "notify = 'ended'") == 2
    assert hear() == [{"id": id, "state": "STOP", "code": "57014"} for id in ids]
    for found in database.tasks():
        assert found["error"].split("\n")[0] == f"ERROR:  task stopped by {name}"
    user.close()
    database.admin_execute(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"')


# Notify


def test_end_of_a_task_is_told_to_its_channel(base: Served, user: psycopg.Connection[Any]) -> None:
    database, group = base.database, "told"
    hear = heard(database.connect(), "of my own")
    columns = {"group": group, "notify": "of my own"}
    done = database.insert("SELECT 1", **columns, delete=False)
    removed = database.insert("SELECT 1 WHERE false", **columns)
    together = [database.insert("SELECT 1 WHERE false", **columns, batch=10) for _ in range(3)]
    failed = database.insert("SELECT 1/0", **columns)
    gone = database.insert("SELECT 1", **columns, plan="2000-01-01")
    with held(database):
        running = database.insert(f"{WAIT}, 'told'", **columns | {"group": "told running"})
        wait_runs(database)
        waiting = planned(database, **columns)
        call(user, "task_cancel(%s)", f"id IN ({running}, {waiting})")
    expected = [
        (done, "DONE", None),
        (removed, "DONE", None),
        *((id, "DONE", None) for id in together),
        (failed, "FAIL", "22012"),
        (gone, "GONE", None),
        (running, "STOP", "57014"),
        (waiting, "STOP", "57014"),
    ]
    eventually(lambda: len(hear()) >= len(expected))
    assert sorted((told["id"], told["state"], told["code"]) for told in hear()) == sorted(expected)
    database.execute("UPDATE task SET data = 'x' WHERE notify IS NOT NULL")
    database.execute("DELETE FROM task WHERE notify IS NOT NULL")
    assert len(hear()) == len(expected)


# Run and wait

ROWS = "SELECT id, state, output, error, code, notice FROM"


def rows(session: psycopg.Connection[Any], what: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """What a function answers that answers with rows."""
    return session.execute(f"{ROWS} {what}".encode(), parameters).fetchall()


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def backend_xmin(base: Served, session: psycopg.Connection[Any]) -> int | None:
    query = "SELECT backend_xmin::text::bigint FROM pg_stat_activity WHERE pid = %s"
    return base.database.admin_execute(query, [session.info.backend_pid])[0][0]


def looks(base: Served, session: psycopg.Connection[Any]) -> None:
    """Until it has looked at its tasks at least once: it sleeps between two looks."""
    query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    eventually(lambda: base.database.admin_execute(query, [session.info.backend_pid]))


def test_task_is_run_and_its_end_waited_for(base: Served, user: psycopg.Connection[Any]) -> None:
    done = call(user, "task_run('SELECT 6 * 7')")
    assert rows(user, "task_wait(%s::bigint)", done) == [(done, "DONE", "42", None, None, None)]
    failed = call(user, "task_run($$DO 'BEGIN RAISE NOTICE ''so''; RAISE EXCEPTION ''no''; END'$$)")
    [(_, state, output, error, code, notice)] = rows(user, "task_wait(%s::bigint, '1 min')", failed)
    assert (state, output, error.split("\n")[0], code) == ("FAIL", None, "ERROR:  no", "P0001")
    assert notice.startswith("NOTICE:  so")
    assert row(base, done)["delete"] is False


def test_task_is_run_with_what_is_given_and_the_columns_defaults(base: Served, user: psycopg.Connection[Any]) -> None:
    user.execute("SET pg_task.max = 3")
    given = {"group": "given", "max": 7, "timeout": timedelta(seconds=9), "key": "given", "retry": 2, "data": "mine"}
    named = ", ".join(f'"{name}" => %({name})s' for name in given)
    query = f"SELECT task_run('SELECT 1', delay => '1 day', remote => 'host=x', notify => 'n', {named})"
    [(id,)] = user.execute(query.encode(), given).fetchall()
    found = row(base, id)
    assert {name: found[name] for name in given} == given
    assert (found["remote"], found["notify"]) == ("host=x", "n")
    assert timedelta(hours=23, minutes=59) < found["plan"] - datetime.now(UTC) <= timedelta(days=1)
    id = call(user, "task_run('SELECT 1', '9999-01-01', '1 day')")
    found = row(base, id)
    assert (found["plan"].isoformat()[:10], found["max"], found["group"]) == ("9999-01-02", 3, "group")
    user.execute("RESET pg_task.max")
    base.database.execute("DELETE FROM task WHERE state = 'PLAN'")


@pytest.mark.parametrize("arguments", ["NULL", "'SELECT 1', delay => '-1 s'"])
def test_task_without_sense_is_not_queued(base: Served, user: psycopg.Connection[Any], arguments: str) -> None:
    before = base.database.execute("SELECT max(id) FROM task")
    with pytest.raises(psycopg.DataError) as refused:
        user.execute(f"SELECT task_run({arguments})".encode())
    assert refused.value.diag.message_hint
    assert base.database.execute("SELECT max(id) FROM task") == before


def test_wait_for_all_of_several_tasks_gives_them_in_their_order(base: Served, user: psycopg.Connection[Any]) -> None:
    ids = [call(user, 'task_run(%s, "group" => %s)', f"SELECT pg_sleep(0.0{n}), {n}", f"all {n}") for n in (3, 1, 2)]
    found = rows(user, "task_wait_all(%s)", [*ids, ids[0]])
    assert [(id, state) for id, state, *_ in found] == [(id, "DONE") for id in [*ids, ids[0]]]


def test_wait_for_any_of_several_tasks_ends_with_the_first(
    base: Served, user: psycopg.Connection[Any], background: ThreadPoolExecutor
) -> None:
    with held(base.database):
        slow = call(user, "task_run(%s, \"group\" => 'slow')", WAIT)
        wait_runs(base.database)
        late = planned(base.database, group="any")
        waiting = background.submit(rows, user, "task_wait_any(%s)", [slow, late])
        base.database.execute("UPDATE task SET plan = now() WHERE id = %s", [late])
        found = waiting.result(timeout=20)
        assert [found[0][:3], found[1][:2]] == [(late, "DONE", "1"), (slow, "WORK")]
    assert rows(user, "task_wait(%s::bigint)", slow)[0][1] == "DONE"


def test_wait_ends_when_its_timeout_is_over_with_the_rows_as_they_are(
    base: Served, user: psycopg.Connection[Any]
) -> None:
    id = planned(base.database)
    as_it_is = [(id, "PLAN", None, None, None, None)]
    assert rows(user, "task_wait(%s::bigint, '0')", id) == as_it_is
    assert rows(user, "task_wait_all(%s, '20 ms')", [id]) == as_it_is
    assert rows(user, "task_wait_any(%s, '20 ms')", [id]) == as_it_is
    assert user.execute("CALL task_await(%s, '20 ms')", [id]).fetchall() == as_it_is


def test_task_that_is_removed_while_it_is_waited_for_is_done(
    base: Served, user: psycopg.Connection[Any], background: ThreadPoolExecutor
) -> None:
    removed = (f"WITH w AS MATERIALIZED ({WAIT} AS l) SELECT FROM w WHERE l IS NULL", "removed")
    other = base.database.connect()
    with held(base.database):
        id = base.database.insert(removed[0], group=removed[1])
        wait_runs(base.database)
        waiting = background.submit(rows, user, "task_wait(%s::bigint)", id)
        awaiting = background.submit(lambda: other.execute("CALL task_await(%s)", [id]).fetchall())
        for session in (user, other):
            looks(base, session)
    expected = [(id, "DONE", None, None, None, None)]
    assert (waiting.result(timeout=20), awaiting.result(timeout=20)) == (expected, expected)


def test_stopped_task_is_waited_for_until_it_is_really_over(base: Served, user: psycopg.Connection[Any]) -> None:
    stubborn = "DO $$ BEGIN PERFORM pg_sleep(60); EXCEPTION WHEN query_canceled THEN PERFORM pg_sleep(0.3); END $$"
    id = call(user, "task_run(%s, \"group\" => 'stubborn')", stubborn)
    base.database.wait(id, "WORK")
    eventually(lambda: base.database.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
    call(user, "task_cancel(%s::bigint)", id)
    assert rows(user, "task_wait(%s::bigint)", id)[0][1] == "STOP"
    assert row(base, id)["stop"] is not None


REFUSED = {
    "task_wait(-7)": psycopg.errors.NoDataFound,
    "task_wait(NULL::bigint)": psycopg.errors.NullValueNotAllowed,
    "task_wait_all('{}')": psycopg.errors.NullValueNotAllowed,
    "task_wait_any('{1,NULL}')": psycopg.errors.NullValueNotAllowed,
    "task_wait_all('{-7}', '1 s')": psycopg.errors.NoDataFound,
    "task_wait(1, '-1 s')": psycopg.errors.InvalidParameterValue,
}


@pytest.mark.parametrize("what", REFUSED)
def test_wait_for_what_cannot_end_is_refused(user: psycopg.Connection[Any], what: str) -> None:
    with pytest.raises(REFUSED[what]) as refused:
        rows(user, what)
    assert refused.value.diag.message_hint


@pytest.mark.parametrize("call", ["CALL task_await(-7)", "CALL task_await(NULL)", "CALL task_await(1, '-1 s')"])
def test_await_of_what_cannot_end_is_refused(user: psycopg.Connection[Any], call: str) -> None:
    with pytest.raises((psycopg.errors.NoDataFound, psycopg.errors.InvalidParameterValue)) as refused:
        user.execute(call.encode())
    assert refused.value.diag.message_hint


@pytest.mark.parametrize("behind", ["", "SAVEPOINT a", "SAVEPOINT a; SAVEPOINT b"])
def test_task_of_the_very_transaction_is_not_waited_for(base: Served, behind: str) -> None:
    session = base.database.connect(autocommit=False)
    session.execute("SELECT 1")
    session.execute(behind.encode())
    id = call(session, "task_run('SELECT 1')")
    if behind:
        session.execute("RELEASE SAVEPOINT a; SAVEPOINT c")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=str(id)) as refused:
        rows(session, "task_wait(%s::bigint, '1 s')", id)
    assert refused.value.diag.message_hint
    if behind:
        session.execute("ROLLBACK TO c")
        with pytest.raises(psycopg.errors.ActiveSqlTransaction):
            session.execute("CALL task_await(%s, '1 s')", [id])
    session.rollback()


def test_wait_goes_on_in_a_transaction_that_has_written_something_else(base: Served) -> None:
    session = base.database.connect(autocommit=False)
    session.execute("INSERT INTO effect VALUES ('else')")
    id = base.database.insert("SELECT 1", group="else", delete=False)
    assert rows(session, "task_wait(%s::bigint)", id)[0][1] == "DONE"
    session.rollback()


def test_wait_in_a_transaction_that_sees_no_end_is_refused(base: Served) -> None:
    id = planned(base.database)
    session = base.database.connect(options="-c default_transaction_isolation=repeatable\\ read")
    with pytest.raises(psycopg.errors.InvalidTransactionState) as refused:
        rows(session, "task_wait(%s::bigint)", id)
    assert refused.value.diag.message_hint
    assert session.execute("CALL task_await(%s, '1 ms')", [id]).fetchall()[0][:2] == (id, "PLAN")


def test_await_does_not_hold_back_vacuum_as_wait_does(base: Served, background: ThreadPoolExecutor) -> None:
    database = base.database
    waits, awaits = database.connect(), database.connect()
    with held(database):
        id = database.insert(WAIT, group="xmin", delete=False)
        wait_runs(database)
        ends = [
            background.submit(lambda: waits.execute("SELECT state FROM task_wait(%s)", [id]).fetchall()),
            background.submit(lambda: awaits.execute("CALL task_await(%s)", [id]).fetchall()),
        ]
        for session in (waits, awaits):
            looks(base, session)
        since = eventually(lambda: backend_xmin(base, waits))
        for _ in range(10):
            database.execute("INSERT INTO effect VALUES ('xmin')")
        eventually(lambda: (backend_xmin(base, awaits) or 0) >= since + 10)
        assert backend_xmin(base, waits) == since
    assert [end.result(timeout=20)[0] for end in ends] == [("DONE",), (id, "DONE", "", None, None, None)]


# Hold and release


@pytest.fixture
def heeded(base: Served) -> Callable[..., None]:
    """`heeded(*calls)` makes calls of which each changes what is held, and waits until the master has heard of it."""

    def heeded(*calls: str) -> None:
        for one in calls:
            before = len(base.master.logged("holds_changed"))
            assert call(base.database.connect(), one) is True
            base.master.wait_log("holds_changed", before + 1)

    return heeded


def runs(database: Database, **columns: Any) -> dict[str, Any]:
    """The end of a task that is inserted now: whatever was to be begun before it, would have been begun."""
    return database.wait(database.insert("SELECT 1", **{"delete": False} | columns))


def test_held_group_ends_its_runs_and_begins_nothing_until_it_is_released(
    base: Served, heeded: Callable[..., None]
) -> None:
    database = base.database
    with held(database):
        running = [database.insert(WAIT, group="held", max=1, delete=False) for _ in range(2)]
        wait_runs(database, 2)
        waiting = [database.insert("SELECT 1", group="held", max=1, delete=False, remote=None) for _ in range(3)]
        heeded("task_hold('held')")
    assert [database.wait(id)["state"] for id in running] == ["DONE", "DONE"]
    alone = database.insert("SELECT 1", group="held", delete=False)
    for group in ("held too", "beside"):
        assert runs(database, group=group)["state"] == "DONE"
    assert {row(base, id)["state"] for id in (*waiting, alone)} == {"PLAN"}
    heeded("task_release('held')")
    assert {database.wait(id)["state"] for id in (*waiting, alone)} == {"DONE"}


@pytest.mark.parametrize("lingering", [True, False], ids=["lingering", "none"])
def test_what_is_inserted_after_its_group_was_held_waits_even_if_the_master_has_not_heard_of_it(
    database: Database, master: Callable[..., Master], lingering: bool
) -> None:
    """Taken by the master, or found by an idle worker: the hold is seen by whoever sees the row."""
    master("--safety", "1h", "--linger", "1h" if lingering else "1ms", database.conninfo)
    runs(database)
    for number in range(5):
        falls_asleep(database)
        with database.connect(autocommit=False) as session:  # not by the function, which tells
            session.execute('INSERT INTO task_held ("group") VALUES (%s)', [f"held {number}"])
            session.execute("INSERT INTO task (\"group\", input) VALUES (%s, 'SELECT 1')", [f"held {number}"])
        runs(database, group="beside")
    assert len(database.tasks("state = 'PLAN'")) == 5
    for number in range(5):
        assert call(database.connect(), "task_release(%s)", f"held {number}") is True
    eventually(lambda: not database.tasks("state IN ('PLAN', 'TAKE', 'WORK')"))


@pytest.mark.parametrize("batch", [1, 5])
def test_worker_takes_no_next_row_of_a_held_group_even_if_the_master_has_not_heard_of_it(
    database: Database, master: Callable[..., Master], batch: int
) -> None:
    """Those that share the transaction of the one that holds it have begun."""
    master("--safety", "1h", database.conninfo)
    database.execute(
        f"""INSERT INTO task (batch, input, "delete")
        SELECT {batch},
            CASE n WHEN 20 THEN 'INSERT INTO task_held ("group") VALUES (''group'')' ELSE 'SELECT 1' END, false
        FROM generate_series(1, 50) AS n"""
    )
    eventually(lambda: database.execute("SELECT count(*) FROM task_held") == [(1,)])
    runs(database, group="beside")
    states = [task["state"] for task in database.tasks("\"group\" = 'group'")]
    done = states.index("PLAN")
    assert 20 <= done < 20 + batch
    assert states == ["DONE"] * done + ["PLAN"] * (50 - done)
    assert call(database.connect(), "task_release('group')") is True
    eventually(lambda: not database.tasks("state <> 'DONE'"))


def test_held_backlog_hides_no_other_group_and_lets_the_master_sleep(base: Served, heeded: Callable[..., None]) -> None:
    database = base.database
    heeded("task_hold('backlog')")
    database.execute(
        "INSERT INTO task (\"group\", input, max) SELECT 'backlog', 'SELECT 1', 50 FROM generate_series(1, 1000)"
    )
    falls_asleep(database)
    for number in range(3):
        assert runs(database, group=f"behind {number}", plan=datetime.now(UTC))["state"] == "DONE"
    falls_asleep(database)
    assert database.execute("SELECT count(*) FROM task WHERE \"group\" = 'backlog' AND state = 'PLAN'") == [(1000,)]
    heeded("task_release('backlog')")
    left = "\"group\" = 'backlog' AND state IN ('PLAN', 'TAKE', 'WORK')"
    eventually(lambda: not database.tasks(left), timeout=60)
    database.execute("DELETE FROM task WHERE \"group\" = 'backlog'")


def test_single_held_task_wakes_nobody_and_starts_when_it_is_released(
    base: Served, heeded: Callable[..., None]
) -> None:
    heeded("task_hold('single')")
    id = base.database.insert("SELECT 1", group="single", delete=False)
    falls_asleep(base.database)
    assert row(base, id)["state"] == "PLAN"
    heeded("task_release('single')")
    assert base.database.wait(id)["state"] == "DONE"


@pytest.mark.parametrize("settings", ["", "wake = false"])
def test_group_stays_held_whoever_leads(database: Database, master: Callable[..., Master], settings: str) -> None:
    config = f'[[database]]\nconninfo = "{database.conninfo}"\n{settings}\n'
    one = master(config=config)
    name = f"a \"group\" of 'mine' \\ {'ä' * 300}"
    session = database.connect()
    assert [call(session, "task_hold(%s)", name) for _ in range(2)] == [True, False]
    one.wait_log("holds_changed .*held=1")
    id = database.insert("SELECT 1", group=name, delete=False)
    runs(database, group="other")
    one.stop()
    two = master(config=config)
    two.wait_log("holds_changed .*held=1")
    runs(database, group="other")
    found = database.task(id)
    assert found is not None
    assert found["state"] == "PLAN"
    assert [call(session, "task_release(%s)", name) for _ in range(2)] == [True, False]
    assert database.wait(id)["state"] == "DONE"


def test_hold_takes_rights_on_its_own_table(base: Served, user: psycopg.Connection[Any]) -> None:
    for one in ("task_hold('rights')", "task_release('rights')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            user.execute(f"SELECT {one}".encode())
    base.database.execute(f'GRANT SELECT, INSERT, DELETE ON task_held TO "{name_of(user)}"')
    assert call(user, "task_hold('rights')") is True
    assert user.execute('SELECT "group", by FROM task_held').fetchall() == [("rights", name_of(user))]
    assert call(user, "task_release('rights')") is True
    with pytest.raises(psycopg.errors.NullValueNotAllowed) as refused:
        call(user, "task_hold(NULL)")
    assert refused.value.diag.message_hint


# Progress


def reported(base: Served, id: int) -> list[tuple[Any, ...]]:
    return base.database.execute("SELECT attempt, percent, message FROM task_report WHERE id = %s", [id])


@pytest.mark.parametrize("how", ["atomic", "not atomic", "remote"])
def test_progress_is_seen_while_the_run_goes_on_and_forgotten_after_it(base: Served, how: str) -> None:
    database = base.database
    columns = {"atomic": how == "atomic", "remote": database.tcp if how == "remote" else None}
    with held(database):
        id = database.insert(f"SELECT task_progress(12.5, 'an Ä'); {WAIT}", group=how, delete=False, **columns)
        eventually(lambda: reported(base, id) == [(1, Decimal("12.50"), "an Ä")])
        assert row(base, id)["state"] == "WORK"
    assert (database.wait(id)["state"], row(base, id)["notice"]) == ("DONE", None)
    eventually(lambda: not reported(base, id))


def test_last_of_many_reports_is_told_and_no_notice_is_lost(base: Served) -> None:
    database = base.database
    loop = "FOR i IN 1..2000 LOOP PERFORM task_progress(i / 20.0, 'at ' || i); END LOOP"
    burst = f"DO $$ BEGIN {loop}; RAISE NOTICE 'so'; END $$"
    with held(database):
        id = database.insert(f"{burst}; SELECT task_progress(99.9); {WAIT}", delete=False, group="burst")
        eventually(lambda: reported(base, id) == [(1, Decimal("99.90"), None)])
    assert database.wait(id)["notice"].splitlines()[0] == "NOTICE:  so"
    together = [database.insert("SELECT task_progress(5)", delete=False, group="burst", batch=9) for _ in range(3)]
    assert {(database.wait(id)["state"], row(base, id)["notice"]) for id in together} == {("DONE", None)}


@pytest.mark.parametrize(
    "detail",
    [
        "nonsense",
        '{"percent": 101, "message": null}',
        '{"percent": "NaN", "message": null}',
        '{"percent": 1, "message": 1}',
        '{"percent": 1e1, "message": "x"}',
        '["percent"]',
        "[" * 20000,
    ],
)
def test_what_only_looks_like_progress_stays_a_notice(base: Served, detail: str) -> None:
    input = f"DO $$ BEGIN RAISE INFO USING MESSAGE = 'forged', ERRCODE = 'PT002', DETAIL = '{detail}'; END $$"
    found = base.database.wait(base.database.insert(input, group="forged", delete=False))
    assert (found["state"], found["notice"].splitlines()[0]) == ("DONE", "INFO:  forged")


def test_message_that_no_server_could_store_does_no_harm(base: Served) -> None:
    detail = r'{"percent": 1, "message": "a\u0000b\ud800c"}'
    input = f"DO $$ BEGIN RAISE INFO USING MESSAGE = 'forged', ERRCODE = 'PT002', DETAIL = '{detail}'; END $$"
    with held(base.database):
        id = base.database.insert(f"{input}; {WAIT}", group="unstorable", delete=False)
        eventually(lambda: reported(base, id) == [(1, Decimal(1), "ab?c")])
    assert base.database.wait(id)["state"] == "DONE"


@pytest.mark.parametrize("percent", ["-0.1", "100.1", "'NaN'", "NULL"])
def test_progress_that_is_none_is_an_error_of_the_task(base: Served, percent: str) -> None:
    found = base.database.wait(base.database.insert(f"SELECT task_progress({percent})", group="none", delete=False))
    assert (found["state"], found["code"]) == ("FAIL", "22023")
    assert "HINT:  " in found["error"]


def test_progress_outside_of_a_task_is_refused(user: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
        user.execute("SELECT task_progress(50)")
    assert refused.value.diag.message_hint


def test_reports_that_a_killed_master_left_are_forgotten_by_the_next(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master()
    one.expect_exit = None
    with held(database):
        id = database.insert(f"SELECT task_progress(50); {WAIT}", delete=False)
        eventually(lambda: database.execute("SELECT id FROM task_report") == [(id,)])
        one.signal(SIGKILL)
        one.process.wait()
    database.wait(id)
    assert database.execute("SELECT id FROM task_report") == [(id,)]
    master()
    eventually(lambda: not database.execute("SELECT id FROM task_report"))
