"""`pgtask purge`: what goes, what stays, and what it looks like."""

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.fixtures.catalog import install
from tests.fixtures.command import LONGEST, Answer, at_terminal, start
from tests.fixtures.database import Database
from tests.fixtures.wait import eventually

Command = Callable[..., Answer]

FILL = """
    INSERT INTO task (id, state, plan, start, stop, pid, input)
    SELECT 1000 + i, (ARRAY['DONE', 'FAIL', 'GONE', 'STOP'])[1 + i % 4]::state, m, m, m, 1, 'SELECT 1'
    FROM generate_series(0, 399) AS i, LATERAL (SELECT now() - make_interval(days => i / 4) AS m) AS moment
"""
"""One in each state for each of the last hundred days."""


@pytest.fixture
def filled(database: Database) -> Database:
    install(database)
    database.execute(FILL)
    return database


def test_old_rows_go_and_the_rest_stays(filled: Database, pgtask: Command) -> None:
    dry = pgtask("purge", filled.conninfo, "--older-than", "90 days", "--dry-run")
    assert (dry.status, dry.out) == (0, "40 rows would be removed\n")
    assert len(filled.tasks()) == 400
    assert pgtask("purge", filled.conninfo, "--older-than", "90 days") == (0, "40 rows removed\n", "")
    assert {row["id"] for row in filled.tasks()} == set(range(1000, 1360))
    said = pgtask("purge", filled.conninfo, "--older-than", "1 day", "--state", "FAIL", "--state", "gone", "--json")
    assert said.json["removed"] == 178
    assert {row["state"] for row in filled.tasks("plan < now() - interval '26 h'")} == {"DONE", "STOP"}
    assert pgtask("purge", filled.conninfo, "--older-than", "0").status == 0
    assert filled.tasks() == []
    assert pgtask("purge", filled.conninfo, "--older-than", "0") == (0, "0 rows removed\n", "")


def test_what_has_not_ended_and_what_others_wait_for_stays(filled: Database, pgtask: Command) -> None:
    filled.execute(
        """
        INSERT INTO task (id, plan, input) VALUES (1, '2020-01-01', 'SELECT 1');
        INSERT INTO task (id, plan, start, state, pid, input) VALUES
            (2, '2020-01-01', '2020-01-01', 'WORK', 1, 'SELECT 1'),
            (3, '2020-01-01', '2020-01-01', 'STOP', 1, 'SELECT 1');
        INSERT INTO task (id, input, depend) VALUES (4, 'SELECT 1', '{1000,1}');
        """
    )
    assert pgtask("purge", filled.conninfo, "--older-than", "0").out == "399 rows removed\n"
    assert [row["id"] for row in filled.tasks()] == [1, 2, 3, 4, 1000]


def test_what_a_foreign_key_keeps_stays_and_is_said(filled: Database, pgtask: Command) -> None:
    filled.execute("CREATE TABLE mine (task bigint REFERENCES task); INSERT INTO mine VALUES (1001), (1300)")
    said = pgtask("purge", filled.conninfo, "--older-than", "0")
    assert (said.status, said.out) == (1, "398 rows removed\n")
    assert said.err.startswith('2 rows stay: update or delete on table "task" violates foreign key constraint')
    assert [row["id"] for row in filled.tasks()] == [1001, 1300]


def test_what_somebody_has_locked_stays(filled: Database, pgtask: Command) -> None:
    with filled.connect(autocommit=False) as other:
        other.execute("SELECT FROM task WHERE id = 1007 FOR UPDATE")
        assert pgtask("purge", filled.conninfo, "--older-than", "0").out == "399 rows removed\n"
    assert [row["id"] for row in filled.tasks()] == [1007]


@pytest.mark.parametrize("age", ["-1 day", "soon"])
def test_an_age_that_is_none_is_refused(filled: Database, pgtask: Command, age: str) -> None:
    said = pgtask("purge", filled.conninfo, f"--older-than={age}")
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert len(filled.tasks()) == 400


def test_partitions_lose_rows_too(database: Database, pgtask: Command) -> None:
    install(database)
    database.execute(
        """
        ALTER TABLE task RENAME TO whole;
        CREATE TABLE task (LIKE whole INCLUDING DEFAULTS, PRIMARY KEY (id, plan)) PARTITION BY RANGE (plan);
        DROP TABLE whole;
        CREATE TABLE old PARTITION OF task FOR VALUES FROM ('-infinity') TO (now() - interval '50 days');
        CREATE TABLE young PARTITION OF task DEFAULT;
        """
    )
    install(database)
    database.execute(FILL)
    assert pgtask("list", database.conninfo, "--failed", "--limit", 2, "-c", "id").lines == [["1397"], ["1393"]]
    assert pgtask("purge", database.conninfo, "--older-than", "25 days").out == "300 rows removed\n"
    assert database.execute("SELECT count(*) FROM task") == [(100,)]


def test_bar_is_for_a_terminal_only(filled: Database) -> None:
    seen = at_terminal("purge", "-d", filled.conninfo, "--older-than", "50 days")
    assert (seen.status, "100%" in seen.out) == (0, True)
    assert seen.out.endswith("200 rows removed\n")


def test_interrupt_ends_between_steps_and_says_how_far_it_came(filled: Database) -> None:
    """A step that waits for a lock is given up as a whole."""
    filled.execute(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF OLD.id >= 1300 THEN PERFORM pg_advisory_xact_lock(15, 1); END IF; RETURN OLD;
        END $$;
        CREATE TRIGGER slow BEFORE DELETE ON task FOR EACH ROW EXECUTE FUNCTION slow();
        """
    )
    with filled.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(15, 1)")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        one = start("purge", "-d", filled.conninfo, "--older-than", "0", **pipes)
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = 15"
        eventually(lambda: filled.admin_execute(query) == [(1,)])
        os.kill(one.pid, signal.SIGINT)
        out, err = one.communicate(timeout=LONGEST)
    removed = 400 - len(filled.tasks())
    assert (one.returncode, out, err) == (130, f"{removed} rows removed\n".encode(), b"")
    assert 0 < removed < 301
