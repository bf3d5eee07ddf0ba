"""Who runs beside whom, and who goes first. The tasks themselves say when there are too many of them.

`alone(key, slots)` fails a task that finds more of its kind running than there are slots: it tries one advisory lock
for each slot, holds the one it gets for a moment, and gives it back before the run ends.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import pairwise
from threading import Thread
from typing import Any

import pytest
from psycopg import RawCursor, sql

from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, falls_asleep, held, waiting
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

ALONE = """
    CREATE FUNCTION alone(key text, slots int, pause float8 DEFAULT 0.002) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        FOR slot IN 1..slots LOOP
            IF pg_try_advisory_lock(hashtextextended(key, slot)) THEN
                PERFORM pg_sleep(pause);
                PERFORM pg_advisory_unlock(hashtextextended(key, slot));
                RETURN;
            END IF;
        END LOOP;
        RAISE EXCEPTION 'more than % of % at once', slots, key;
    END
    $$
"""
ENOUGH = 60
"""Seconds for a test's tasks to end; they take a few."""


@pytest.fixture
def serve(database: Database, master: Callable[..., Master]) -> Callable[..., Database]:
    """`serve(workers=2)` starts a master with these settings."""

    def serve(**settings: object) -> Database:
        options = [f"--{name}={value}" for name, value in settings.items()]
        master(*options, database.conninfo)
        database.execute(ALONE)
        return database

    return serve


def insert(database: Database, rows: int, input: str, /, **columns: Any) -> list[int]:
    """So many equal tasks, in one statement."""
    values = {"input": input, "delete": False} | columns
    query = sql.SQL("INSERT INTO task ({}) SELECT {} FROM generate_series(1, {}) RETURNING id").format(
        sql.SQL(", ").join(map(sql.Identifier, values)),
        sql.SQL(", ").join(v if isinstance(v, sql.Composable) else sql.Placeholder() for v in values.values()),
        rows,
    )
    parameters = [value for value in values.values() if not isinstance(value, sql.Composable)]
    return [id for (id,) in database.execute(query, parameters)]


def done(database: Database, ids: Iterable[int]) -> list[dict[str, Any]]:
    """The rows once all have ended; every one must have ended well, in its first run."""
    rows = [database.wait(id, timeout=ENOUGH) for id in ids]
    assert {(row["state"], row["error"], row["attempt"]) for row in rows} == {("DONE", None, 1)}
    return rows


def ago(count: int, unit: str) -> sql.SQL:
    return sql.SQL(f"now() - interval '{count} {unit}'")  # type: ignore[arg-type]


def overlap(rows: list[dict[str, Any]]) -> int:
    """How many of the runs were under way at the same moment, at most."""
    return max(sum(a["start"] <= b["start"] < a["stop"] for a in rows) for b in rows)


@contextmanager
def at_once(runs: int, *databases: Database) -> Iterator[None]:
    """What begins with WAIT goes on together, once so many of the block's tasks are under way."""
    with ExitStack() as stack:
        for one in databases:
            stack.enter_context(held(one))
        yield
        eventually(lambda: sum(map(waiting, databases)) >= runs)


def order(rows: Iterable[dict[str, Any]]) -> list[int]:
    return [row["id"] for row in sorted(rows, key=lambda row: row["start"])]


@pytest.mark.parametrize("max", [0, 1, 3])
def test_no_more_than_max_and_one_run_at_once_however_fast_they_come(serve: Callable[..., Database], max: int) -> None:
    database = serve(sleep="1 ms")
    ids: list[int] = []
    for burst in range(8):
        ids += insert(database, 25, f"SELECT alone('g', {max + 1})", group="g", max=max)
        database.wait(ids[-1 - burst], timeout=ENOUGH)
    rows = done(database, ids)
    assert overlap(rows) <= max + 1


def test_all_slots_of_a_group_are_used(serve: Callable[..., Database]) -> None:
    database = serve()
    with at_once(4, database):
        ids = insert(database, 12, f"{WAIT}, alone('g', 4, 0.02)", group="g", max=3)
    assert overlap(done(database, ids)) == 4


def test_many_groups_each_keep_to_themselves(serve: Callable[..., Database]) -> None:
    database = serve(workers=8)
    ids = []
    for _ in range(10):
        for group in range(20):
            ids += insert(database, 2, f"SELECT alone('{group}', 1)", group=f"g{group}")
    rows = done(database, ids)
    assert overlap(rows) <= 8


def test_each_task_starts_only_beside_as_many_as_its_own_max_admits(serve: Callable[..., Database]) -> None:
    """Tasks of every `max` come at once, so that one poll sees them all."""
    database = serve()
    query = (
        'INSERT INTO task (input, "group", max, delete)'
        " SELECT 'SELECT pg_sleep(0.02)', 'g' || n / 10, 4 - (n % 10) / 2, false FROM generate_series(0, 39) AS n"
        " RETURNING id"
    )
    rows = done(database, [id for (id,) in database.execute(query)])
    for row in rows:
        others = [other for other in rows if other["group"] == row["group"] and other["id"] != row["id"]]
        assert sum(other["start"] <= row["start"] < other["stop"] for other in others) <= row["max"]


def test_task_with_a_smaller_max_waits_for_the_others_of_its_group(serve: Callable[..., Database]) -> None:
    database = serve()
    with at_once(3, database):
        wide = insert(database, 3, f"{WAIT}, pg_sleep(0.1)", group="g", max=2)
        for id in wide:
            database.wait(id, "WORK")
        narrow = insert(database, 1, "SELECT 1", group="g", max=0)
    [row] = done(database, narrow)
    assert all(row["start"] >= other["stop"] for other in done(database, wide))


def test_task_with_a_greater_max_need_not_wait(serve: Callable[..., Database]) -> None:
    database = serve()
    with held(database):
        [narrow] = insert(database, 1, WAIT, group="g", max=0)
        database.wait(narrow, "WORK")
        [wide] = done(database, insert(database, 1, "SELECT 1", group="g", max=1))
    [row] = done(database, [narrow])
    assert row["start"] < wide["start"] < wide["stop"] < row["stop"]


def test_greater_max_then_earlier_plan_then_smaller_id_goes_first(serve: Callable[..., Database]) -> None:
    database = serve(workers=1)
    with held(database):
        [blocker] = insert(database, 1, WAIT, group="g", max=9)
        database.wait(blocker, "WORK")
        ids = {
            (max, age): insert(database, 2, "SELECT 1", group="g", max=max, plan=ago(age, "min"))
            for max in (0, 2, 7, 1)
            for age in (1, 5, 3)
        }
        falls_asleep(database)  # awake, it sees what was planned for long ago a little later
    expected = [id for key in sorted(ids, reverse=True) for id in ids[key]]
    assert order(done(database, expected)) == expected


def test_max_is_no_priority_between_groups(serve: Callable[..., Database]) -> None:
    database = serve(workers=1)
    with held(database):
        [blocker] = insert(database, 1, WAIT, group="blocker")
        database.wait(blocker, "WORK")
        # Both were planned for long ago, which it sees a little later while a look is dear: then it sees both.
        [old] = insert(database, 1, "SELECT 1", group="old", plan=ago(2, "min"))
        [new] = insert(database, 1, "SELECT 1", group="new", max=100, plan=ago(1, "min"))
    assert order(done(database, [old, new])) == [old, new]


def test_negative_max_keeps_a_pause_between_tasks(serve: Callable[..., Database]) -> None:
    database = serve(sleep="1 ms")
    rows = done(database, insert(database, 5, "SELECT alone('g', 1, 0.05)", group="g", max=-150))
    rows.sort(key=lambda row: row["start"])
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    for before, after in pairwise(rows):
        assert timedelta(milliseconds=148) <= after["start"] - before["stop"] < timedelta(seconds=20)


def test_pause_is_kept_even_while_the_master_is_busy_with_other_groups(serve: Callable[..., Database]) -> None:
    """A run's end can be seen in the table before its worker says so: nothing may slip in between."""
    database = serve(sleep="1 ms", workers=12)
    paused = {n: insert(database, 6, "SELECT 1", group=f"p{n}", max=-60) for n in range(6)}
    busy = [insert(database, 60, "SELECT 1", group=f"b{n}") for n in range(5)]
    for ids in paused.values():
        rows = sorted(done(database, ids), key=lambda row: row["start"])
        for before, after in pairwise(rows):
            assert after["start"] - before["stop"] >= timedelta(milliseconds=58)
    for ids in busy:
        done(database, ids)


def test_pause_of_one_group_holds_up_no_other(serve: Callable[..., Database]) -> None:
    database = serve()
    slow = insert(database, 2, "SELECT 1", group="slow", max=-86400000)
    database.wait(slow[0])
    rows = done(database, insert(database, 20, "SELECT alone('g', 1)", group="g"))
    assert rows
    assert (database.task(slow[1]) or {})["state"] == "PLAN"


def test_failing_task_keeps_its_pause_too(serve: Callable[..., Database]) -> None:
    database = serve()
    ids = insert(database, 2, "SELECT 1/0", group="g", max=-200)
    first, second = (database.wait(id) for id in ids)
    assert second["start"] - first["stop"] >= timedelta(milliseconds=198)


def test_remote_tasks_of_a_group_are_counted_apart(serve: Callable[..., Database]) -> None:
    database = serve()
    with at_once(3, database):
        local = insert(database, 3, f"{WAIT}, alone('local', 1, 0.05)", group="g")
        remote = insert(database, 3, f"{WAIT}, alone('remote', 1, 0.05)", group="g", remote=database.tcp)
        other_place = database.tcp + " connect_timeout=9"
        other = insert(database, 3, f"{WAIT}, alone('other', 1, 0.05)", group="g", remote=other_place)
    for ids in (local, remote, other):
        assert overlap(done(database, ids)) == 1
    assert overlap(done(database, local + remote + other)) == 3


def test_groups_are_told_apart_by_their_text_and_not_by_a_hash(serve: Callable[..., Database]) -> None:
    database = serve()
    [(one, other)] = database.execute(
        "SELECT min(g::text), max(g::text) FROM generate_series(1, 300000) AS g"
        " GROUP BY hashtext(g::text) HAVING count(*) > 1 LIMIT 1"
    )
    names = [one, other, "a", "A", "a ", "", " ", "ä", "a\u0308", "a'b", 'a"b', "a\\b", "a\nb", "$1", "%s", "{task}"]
    with at_once(len(names), database):
        ids = [insert(database, 1, WAIT, group=name)[0] for name in names]
    rows = done(database, ids)
    assert overlap(rows) == len(names)
    assert [row["group"] for row in rows] == names


def test_worker_ends_after_count_tasks_and_another_goes_on(serve: Callable[..., Database]) -> None:
    database = serve()
    rows = done(database, insert(database, 10, "SELECT pg_backend_pid()", group="g", count=3))
    backends = [row["pid"] for row in rows]
    assert max(map(backends.count, backends)) <= 3
    assert overlap(rows) == 1


def test_worker_older_than_live_is_replaced(serve: Callable[..., Database]) -> None:
    database = serve()
    rows = done(database, insert(database, 6, "SELECT pg_sleep(0.15)", group="g", live="0.2 s"))
    backends = [row["pid"] for row in rows]
    # A third run would begin when the first two have taken 0.3 s.
    assert max(map(backends.count, backends)) <= 2


def test_run_bounds_the_runs_of_a_table(serve: Callable[..., Database]) -> None:
    database = serve(run=2)
    with at_once(2, database):
        ids = [id for n in range(6) for id in insert(database, 3, f"{WAIT}, alone('all', 2, 0.02)", group=f"g{n}")]
    assert overlap(done(database, ids)) == 2


def test_workers_bound_the_runs_of_a_table(serve: Callable[..., Database]) -> None:
    database = serve(workers=3)
    with at_once(3, database):
        ids = [id for n in range(6) for id in insert(database, 3, f"{WAIT}, alone('all', 3, 0.02)", group=f"g{n}")]
        ids += insert(database, 10, f"{WAIT}, alone('all', 3, 0.02)", group="wide", max=9)
    assert overlap(done(database, ids)) == 3


def test_workers_bound_the_runs_of_all_tables_together(
    database: Database, master: Callable[..., Master], new_database: Callable[..., Database]
) -> None:
    second = new_database()
    both = [database, second]
    one = master("--workers=2", *(d.conninfo for d in both))
    with at_once(2, *both):
        ids = [(d, insert(d, 4, f"{WAIT}, pg_sleep(0.02)", group=group)) for group in ("a", "b", "c") for d in both]
    rows = [row for d, some in ids for row in done(d, some)]
    assert overlap(rows) == 2
    one.stop()


def test_group_with_a_backlog_does_not_keep_its_worker_from_those_who_wait_longer(
    serve: Callable[..., Database],
) -> None:
    database = serve(workers=1)
    with held(database):
        before = insert(database, 20, f"{WAIT}, pg_sleep(0.02)", group="backlog")
        database.wait(before[0], "WORK")
        late = [insert(database, 1, "SELECT 1", group=f"late{n}")[0] for n in range(3)]
        after = insert(database, 100, "SELECT pg_sleep(0.02)", group="backlog")
    assert order(done(database, late)) == late
    last = max(row["start"] for row in done(database, late))
    assert sum(row["start"] > last for row in done(database, after)) > 50


def test_no_group_is_left_out_while_workers_are_few(serve: Callable[..., Database]) -> None:
    database = serve(workers=2)
    groups: dict[int, list[int]] = {n: [] for n in range(6)}
    for _ in range(15):
        for n, ids in groups.items():
            ids += insert(database, 1, "SELECT pg_sleep(0.02)", group=f"g{n}")
    rows = {n: done(database, ids) for n, ids in groups.items()}
    middle = sorted(row["stop"] for some in rows.values() for row in some)[45]
    assert all(min(row["start"] for row in some) < middle for some in rows.values())


def test_many_due_groups_are_served_in_the_order_of_their_waiting(serve: Callable[..., Database]) -> None:
    database = serve(workers=1)
    with held(database):
        [blocker] = insert(database, 1, WAIT, group="blocker")
        database.wait(blocker, "WORK")
        # All of them longer ago than where a quick look starts, which would find the last of them first.
        ids = [insert(database, 1, "SELECT 1", group=f"g{n}", plan=ago(100 - n, "s"))[0] for n in range(50)]
    assert order(done(database, ids)) == ids


def test_glance_at_the_earliest_rows_takes_the_greatest_max_of_their_groups(database: Database) -> None:
    install(database)
    insert(database, 20, "SELECT 1", group="g", plan=ago(1, "h"))
    [greatest] = insert(database, 1, "SELECT 1", group="g", max=1)
    glance = Names(schema="public", table="task").store().text("glance").encode()
    [row] = RawCursor(database.connect()).execute(glance, [1, [], 10, None, [], "2000-01-01"]).fetchall()
    assert row[8] == greatest


@pytest.mark.parametrize(
    "change",
    ["plan = '2100-01-01'", "\"group\" = 'other'", "max = -5", "remote = 'dbname=other'"],
    ids=["plan", "group", "max", "remote"],
)
def test_row_that_changes_while_it_is_seen_is_not_taken_as_it_was(database: Database, change: str) -> None:
    """The statement has its snapshot when the change commits: what it then locks is not what it saw."""
    install(database)
    [id] = insert(database, 1, "SELECT 1", group="g")
    database.execute(
        """CREATE FUNCTION pauses() RETURNS timestamptz LANGUAGE sql AS
        'SELECT clock_timestamp() FROM (SELECT pg_advisory_xact_lock(42)) AS paused'"""
    )
    text = Names(schema="public", table="task").store().text("take_one")
    # It waits after it has seen the due row, and before it locks it.
    seen = "SELECT count(*) AS due FROM due"
    assert seen in text
    paused = text.replace(seen, "SELECT count(*) + 0 * count((SELECT public.pauses())) AS due FROM due")
    answer: list[Any] = []
    with database.connect() as holder, database.connect() as taker:
        holder.execute("SELECT pg_advisory_lock(42)")
        parameters = [None, [], "2000-01-01", "-infinity", -(2**63)]
        thread = Thread(target=lambda: answer.extend(RawCursor(taker).execute(paused.encode(), parameters).fetchall()))
        thread.start()
        eventually(lambda: waiting(database))
        database.execute(f"UPDATE task SET {change} WHERE id = %s", [id])
        holder.execute("SELECT pg_advisory_unlock(42)")
        thread.join()
    assert [row[8] for row in answer] == [None]
    assert database.tasks()[0]["state"] == "PLAN"


def test_plan_order_holds_within_a_backlog(serve: Callable[..., Database]) -> None:
    database = serve()
    ids = insert(database, 300, "SELECT 1", group="g", plan=sql.SQL("clock_timestamp()"))
    assert order(done(database, ids)) == ids


def test_moved_task_runs_in_its_new_group(serve: Callable[..., Database]) -> None:
    database = serve()
    with held(database):
        [blocker] = insert(database, 1, WAIT, group="full")
        database.wait(blocker, "WORK")
        [moved] = insert(database, 1, "SELECT current_setting('pg_task.group')", group="full")
        database.execute("UPDATE task SET \"group\" = 'free' WHERE id = %s", [moved])
        [row] = done(database, [moved])
        assert row["output"] == "free"
    done(database, [blocker])


def test_raised_max_lets_a_waiting_task_start(serve: Callable[..., Database]) -> None:
    database = serve()
    with held(database):
        [blocker] = insert(database, 1, WAIT, group="g")
        database.wait(blocker, "WORK")
        [behind] = insert(database, 1, "SELECT 1", group="g")
        database.execute("UPDATE task SET max = 1 WHERE id = %s", [behind])
        done(database, [behind])
    done(database, [blocker])
