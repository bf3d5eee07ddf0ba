"""Finished rows are removed when they have been kept long enough, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP

import psycopg
from psycopg.conninfo import make_conninfo

from pgtask.async_session import SETTINGS, with_options
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.locks import asleep
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

ENDED = """INSERT INTO task (plan, start, stop, state, pid, attempt, input, output, error)
SELECT now() - {age}, now() - {age}, now() - {age}, '{state}', 1, 1, 'SELECT 1', '1', nullif('{error}', '')
FROM generate_series(1, {count})"""


def ended(database: Database, state: str, age: str, count: int = 1) -> None:
    """Rows that ended so long ago."""
    error = "ERROR:  no" if state == "FAIL" else ""
    database.execute(ENDED.format(state=state, age=f"interval '{age}'", error=error, count=count))


def counts(database: Database) -> dict[str, int]:
    return dict(database.execute("SELECT state::text, count(*) FROM task GROUP BY 1 ORDER BY 1"))  # type: ignore[arg-type]


def test_rows_that_were_kept_long_enough_go_and_failed_ones_stay_longer(
    database: Database, master: Callable[..., Master]
) -> None:
    install(database)
    for state in ("DONE", "GONE", "STOP", "FAIL"):
        ended(database, state, "3 hours", 1000)
        ended(database, state, "30 min", 3)
    ended(database, "FAIL", "3 days", 5)
    for stop in ("infinity", "-infinity"):
        query = "INSERT INTO task (stop, state, pid, attempt, input) VALUES (%s, 'DONE', 1, 1, 'SELECT 1')"
        database.execute(query, [stop])
    for plan in ("2000-01-01", "now", "infinity"):  # as a user stops who may write nothing but state
        database.execute("INSERT INTO task (plan, state, input) VALUES (%s, 'STOP', 'SELECT 1')", [plan])
    one = master("--keep", "1 hour", "--keep-failed", "2 days", database.conninfo)
    [line] = one.wait_log("history_removed")
    assert "count=3007" in line
    assert counts(database) == {"DONE": 3 + 1, "FAIL": 1000 + 3, "GONE": 3, "STOP": 3 + 2}


def test_nothing_is_removed_unless_it_was_asked_for(database: Database, master: Callable[..., Master]) -> None:
    install(database)
    ended(database, "DONE", "100 years", 10)
    ended(database, "FAIL", "100 years", 10)
    one = master("--keep-failed", "1 year", database.conninfo)
    one.wait_log("history_removed.*count=10")
    assert counts(database) == {"DONE": 10}


def test_what_has_not_ended_stays_however_old_it_is(database: Database, master: Callable[..., Master]) -> None:
    install(database)
    database.insert("SELECT 1", plan="2000-01-01", active="1 year", group="full", delete=False, max=-1)
    running = database.insert("SELECT pg_sleep(3600)", group="long")
    stopped = database.insert("SELECT 1", plan="2100-01-01")
    ended(database, "DONE", "1 day", 5)
    one = master("--keep", "0", database.conninfo)
    database.wait(running, "WORK")
    one.wait_log("history_removed")
    eventually(lambda: not counts(database).get("DONE"))
    eventually(lambda: [row["id"] for row in database.tasks()] == [running, stopped], 40)
    database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [running])


def test_sleeping_master_wakes_for_the_history_and_sleeps_again(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--keep", "1 s", database.conninfo)
    for _ in range(3):
        database.wait(database.insert("SELECT 1", delete=False))
    eventually(lambda: counts(database) == {}, 40)
    eventually(lambda: not one.workers() and asleep(database))


def test_row_that_cannot_be_removed_is_told_once_and_holds_up_nobody(
    database: Database, master: Callable[..., Master]
) -> None:
    install(database)
    ended(database, "DONE", "1 day", 2500)
    database.execute("CREATE TABLE bill (task bigint REFERENCES task)")
    [(first,)] = database.execute("SELECT min(id) FROM task")
    kept = [first + 150, first + 1200]
    database.execute("INSERT INTO bill SELECT unnest(%s::bigint[])", [kept])
    one = master("--keep", "1 hour", database.conninfo)
    one.wait_log("history_removed.*count=2498")
    [line] = one.logged("history_refused")
    assert f"id={kept[0]}" in line and "bill" in line
    assert [row["id"] for row in database.tasks()] == kept
    assert database.wait(database.insert("SELECT 7", delete=False))["output"] == "7"
    assert not one.logged("table_down")


def test_row_that_somebody_has_locked_is_left_for_the_next_pass(
    database: Database, master: Callable[..., Master]
) -> None:
    install(database)
    ended(database, "DONE", "1 day", 100)
    with psycopg.connect(database.conninfo) as session:
        [(locked,)] = session.execute(
            "SELECT id FROM task WHERE id % 50 = 25 ORDER BY id LIMIT 1 FOR KEY SHARE"
        ).fetchall()
        one = master("--keep", "1 s", database.conninfo)
        one.wait_log("history_removed.*count=99")
        assert [row["id"] for row in database.tasks()] == [locked]
    database.wait(locked, gone=True, timeout=40)


def test_later_passes_find_rows_that_were_planned_anew_and_those_with_ids_of_their_own(
    database: Database, master: Callable[..., Master]
) -> None:
    master("--keep", "11 s", database.conninfo)
    early = database.insert("SELECT 1", delete=False)
    database.wait(early)
    database.execute("INSERT INTO task (id, input, \"delete\") VALUES (1000000, 'SELECT 2', false)")
    again = database.insert("SELECT 1", delete=False)
    database.wait(again)
    database.execute("UPDATE task SET state = 'PLAN', plan = now() + interval '25 s' WHERE id = %s", [again])
    for id in (early, 1000000):
        database.wait(id, gone=True, timeout=50)
    assert database.task(again) is not None
    database.wait(again, gone=True, timeout=50)


def test_other_settings_hold_as_soon_as_the_configuration_is_read(
    database: Database, master: Callable[..., Master], tmp_path: Path
) -> None:
    install(database)
    ended(database, "DONE", "1 day", 10)
    config = f'[[database]]\nconninfo = "{database.conninfo}"\n'
    one = master(config=config)
    (tmp_path / "master0.toml").write_text(config + 'keep = "1 hour"\n', "utf-8")
    one.signal(SIGHUP)
    one.wait_log("history_removed.*count=10")


def test_failed_rows_are_removed_without_a_look_at_all_that_wait(database: Database) -> None:
    install(database)
    awaited = database.insert("SELECT 1", plan="2100-01-01")
    database.execute(
        "INSERT INTO task (input, depend) SELECT 'SELECT 1', ARRAY[%s::bigint] FROM generate_series(1, 3000)", [awaited]
    )
    ended(database, "FAIL", "1 day", 20)
    store = Names(schema="public", table="task").store()
    ours = make_conninfo(**with_options(database.conninfo, SETTINGS))
    with psycopg.connect(ours, cursor_factory=psycopg.RawCursor) as session:
        values = [str(value) for value in (awaited + 3000, 2**63 - 1, 1000, 3600, 3600)]
        [(seen, removed, *_)] = session.execute(store.text("sweep").encode(), values).fetchall()
        [(read,)] = session.execute(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'task'"
        ).fetchall()
    assert (seen, removed) == (20, 20)
    assert read < 1000
