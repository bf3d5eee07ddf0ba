"""A task that crashes its own backend, and with it the whole server, is stopped before it does so for ever."""

import re
from collections.abc import Callable

import psycopg

from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

POISON = "CREATE TEMP TABLE said (line text);\nCOPY said FROM PROGRAM 'kill -SEGV $PPID'"
CRASHES = 2


def ended(database: Database, ids: list[int]) -> bool:
    """Have they all? While the server recovers, nobody knows."""
    try:
        rows = database.execute("SELECT state FROM task WHERE id = ANY (%s)", [ids])
    except psycopg.OperationalError:
        database.close()
        return False
    return all(state in ("DONE", "FAIL") for (state,) in rows)


def test_task_that_crashes_the_server_fails_with_the_whole_story_and_the_others_end_well(
    own_database: Database, master: Callable[..., Master]
) -> None:
    database = own_database
    database.admin_execute(f'ALTER ROLE "{database.user}" SUPERUSER')
    one = master("--crashes", str(CRASHES), database.conninfo, tables=1)
    with database.connect(autocommit=False) as session:
        poison = session.execute(
            "INSERT INTO task (input, \"group\", delete) VALUES (%s, 'poison', false) RETURNING id", [POISON]
        ).fetchone()[0]  # type: ignore[index]
        others = session.execute(
            'INSERT INTO task (input, "group", delete)'
            " SELECT 'SELECT pg_sleep(0.02)', 'other ' || n %% 2, false FROM generate_series(1, 60) AS n RETURNING id",
            [],
        ).fetchall()
        same = session.execute(
            "INSERT INTO task (input, \"group\", delete) VALUES ('SELECT 1', 'poison', false) RETURNING id"
        ).fetchone()[0]  # type: ignore[index]
    eventually(lambda: ended(database, [poison, same, *[id for (id,) in others]]), timeout=60, every=0.05)
    row = database.task(poison)
    assert row is not None
    assert (row["state"], row["attempt"], row["output"]) == ("FAIL", CRASHES + 1, None)
    lines = row["error"].splitlines()
    assert lines[0] == f"ERROR:  run lost {CRASHES + 1} times"
    told = [line for line in lines if line.startswith("LOST:  ")]
    assert len(told) == CRASHES + 1
    for number, line in enumerate(told, 1):
        assert re.match(rf"LOST:  run {number} of 20\d\d-\S+ \S+: worker \d+: server closed the connection", line), line
    assert lines[-2].startswith("STATEMENT:  CREATE TEMP TABLE")
    assert one.process.poll() is None
    assert database.task(same)["state"] == "DONE"  # type: ignore[index]
    assert database.execute("SELECT DISTINCT state::text FROM task WHERE id <> %s", [poison]) == [("DONE",)]
    crashed = re.findall(r"was terminated by signal 11", database.server.log_text())  # type: ignore[union-attr]
    assert len(crashed) == CRASHES + 1
    assert len(one.logged(rf"run_lost .*id={poison} ")) == CRASHES + 1
