"""`pgtask submit` and `pgtask wait` with a real master."""

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.fixtures.command import LONGEST, Answer, at_terminal, start
from tests.fixtures.database import Database
from tests.fixtures.wait import eventually

Command = Callable[..., Answer]


def looks(database: Database, program: str) -> bool:
    """Has a session of that name looked whether tasks have ended, and looks again after a pause?"""
    query = """SELECT query ~ 'ORDINALITY' AND state = 'idle' FROM pg_stat_activity
        WHERE application_name = %s AND datname = %s"""
    return (True,) in database.admin_execute(query, [program, database.name])


def test_prints_the_id_and_the_row_stays(served: Database, pgtask: Command) -> None:
    said = pgtask("submit", served.conninfo, "SELECT set_config('x.y', '1', false) WHERE false")
    row = served.wait(int(said.out))
    assert (said.status, said.err) == (0, "")
    assert (row["state"], row["delete"], row["group"], row["output"]) == ("DONE", False, "group", None)


def test_every_column_that_a_user_may_set_is_set(served: Database, pgtask: Command) -> None:
    served.execute('ALTER TABLE task ADD COLUMN IF NOT EXISTS "my ""own" int')
    other = served.insert("SELECT 1", group="submit", delete=False)
    options = {
        "--plan": "2031-01-02 03:04:05+00", "--group": "it's \"odd\" ü", "--max": "-3", "--timeout": "90 s",
        "--active": "1 day",
        "--key": "k %s $1", "--data": "d", "--retry": "4", "--backoff": "2 s", "--retry-on": "40 53300",
        "--repeat": "1 h",
        "--until": "2032-01-01 00:00:00+00", "--missed": "skip", "--remote": "host=x password=y", "--notify": "chan",
        "--depend": str(other), "--batch": "7",
    }  # fmt: skip
    flags = ["--drift", "--no-atomic", "--delete", "--anyway", "--set", "delimiter=;", "--set", 'my "own=5']
    said = pgtask("submit", served.conninfo, "SELECT 1", *[part for pair in options.items() for part in pair], *flags)
    assert (said.status, said.err) == (0, "")
    row = served.task(int(said.out))
    assert row is not None
    names = {option: option[2:].replace("-", "_") for option in options}
    shown = served.execute(
        "SELECT to_jsonb(t) FROM (SELECT *, set_config('TimeZone', 'UTC', false) FROM task) AS t WHERE id = %s",
        [row["id"]],
    )[0][0]
    expected = options | {
        "--plan": "2031-01-02T03:04:05+00:00", "--until": "2032-01-01T00:00:00+00:00",
        "--max": -3, "--retry": 4, "--batch": 7,
        "--timeout": "00:01:30", "--backoff": "00:00:02", "--repeat": "01:00:00", "--depend": [other],
    }  # fmt: skip
    assert {option: shown[name] for option, name in names.items()} == expected
    assert [shown[name] for name in ("drift", "atomic", "delete", "anyway")] == [True, False, True, True]
    assert (shown["delimiter"], shown['my "own']) == (";", 5)
    served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [row["id"]])


def test_calendar_and_delay(served: Database, pgtask: Command) -> None:
    said = pgtask("submit", served.conninfo, "SELECT 1", "--cron", "0 3 * * *", "--zone", "Europe/Berlin", "--json")
    row = served.wait(said.json["id"], "PLAN")
    assert (row["cron"], row["zone"]) == ("0 3 * * *", "Europe/Berlin")
    late = pgtask("submit", served.conninfo, "SELECT 1", "--delay", "1 hour", "--plan", "2031-01-01 00:00+00")
    soon = pgtask("submit", served.conninfo, "SELECT 1", "--delay", "1 hour")
    found = served.execute(
        "SELECT id, plan = '2031-01-01 01:00+00', plan - clock_timestamp() BETWEEN '50 min' AND '1 hour' FROM task"
        " WHERE id = ANY (%s) ORDER BY id",
        [[int(late.out), int(soon.out)]],
    )
    assert [row[1:] for row in found] == [(True, False), (False, True)]
    served.execute("UPDATE task SET state = 'STOP' WHERE id = ANY (%s)", [[row["id"], int(late.out), int(soon.out)]])


def test_sql_comes_from_standard_input_or_a_file(served: Database, pgtask: Command, tmp_path) -> None:
    text = "SELECT length('" + "ü" * 10_000_000 + "')"
    said = pgtask("submit", served.conninfo, "-", "--wait", "--output", input=text.encode())
    assert (said.status, said.out, said.err) == (0, "10000000\n", "")
    assert len(pgtask("list", served.conninfo, "--limit", 1).out) < 2000
    [row] = pgtask("list", served.conninfo, "--limit", 1, "--json").json
    assert row["input"] == text
    assert text in pgtask("show", served.conninfo, row["id"]).out
    file = tmp_path / "a file.sql"
    file.write_text("SELECT 1;\nSELECT 'zwei'\n")
    said = pgtask("submit", served.conninfo, "-f", file, "--wait", "--json")
    assert said.json[0]["output"] == "1\nzwei"
    assert pgtask("submit", served.conninfo, "-f", "-", "--wait", "--output", input=b"SELECT 3").out == "3\n"


@pytest.mark.parametrize(
    ("arguments", "input", "message"),
    [
        ((), b"", "there is no SQL to run"),
        (("",), b"", "the SQL is empty"),
        (("-",), b" \n", "the SQL is empty"),
        (("-",), b"SELECT '\xff'", "standard input is not UTF-8 at byte 8"),
        (("SELECT 1", "-f", "x"), b"", "cannot both be given"),
        (("-f", "/none/x.sql"), b"", "/none/x.sql: No such file or directory"),
        (("SELECT 1", "--set", "max"), b"", "write it as COLUMN=VALUE"),
        (("SELECT 1", "--set", "max=1", "--max", "2"), b"", "is given already"),
        (("SELECT 1", "--set", "state=DONE"), b"", "the scheduler writes that column"),
        (("SELECT 1", "--set", "nope=1"), b"", 'column "nope" of relation "task" does not exist'),
        (("SELECT 1", "--max", "x"), b"", 'invalid input syntax for type integer: "x"'),
        (("SELECT 1", "--depend", "999999999"), b"", "task 999999999, on which this one shall depend, does not exist"),
        (("SELECT 1", "--cron", "x"), b"", "cron"),
        (("SELECT 1", "--cron", "@daily", "--zone", "Mars/Port"), b"", "Mars/Port"),
        (("SELECT 1", "--output"), b"", "--output goes with --wait"),
    ],
)
def test_what_is_wrong_is_one_line(
    served: Database, pgtask: Command, arguments: tuple[str, ...], input: bytes, message: str
) -> None:
    said = pgtask("submit", served.conninfo, *arguments, input=input)
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


def test_wait_tells_how_tasks_have_ended(served: Database, pgtask: Command) -> None:
    good = served.insert("SELECT 1 AS a, 2 AS b", group="wait", delete=False)
    bad = served.insert("SELECT 1/0", group="wait")
    assert pgtask("wait", served.conninfo, good) == (0, f"{good} DONE\n", "")
    assert pgtask("wait", served.conninfo, good, "--output") == (0, "a\tb\n1\t2\n", "")
    said = pgtask("wait", served.conninfo, good, bad, good)
    assert (said.status, said.out) == (1, f"{good} DONE\n{bad} FAIL\n")
    assert said.err == "ERROR:  division by zero\nSTATEMENT:  SELECT 1/0\n"
    [first, second] = pgtask("wait", served.conninfo, good, bad, "--json").json
    assert (first["state"], first["output"], second["code"]) == ("DONE", "a\tb\n1\t2", "22012")


def test_wait_ends_when_the_time_is_over(served: Database, pgtask: Command) -> None:
    id = served.insert("SELECT 1", plan="infinity")
    done = served.insert("SELECT 1", group="over", delete=False)
    assert pgtask("wait", served.conninfo, id, "--timeout", "20 ms") == (124, "", "the time is over\n")
    assert pgtask("wait", served.conninfo, id, done, "--any") == (0, f"{done} DONE\n", "")
    served.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    said = pgtask("wait", served.conninfo, id)
    assert (said.status, said.out) == (1, f"{id} STOP\n")
    assert "task stopped by" in said.err


def test_task_that_is_removed_in_silence_was_done(served: Database) -> None:
    with served.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(12, 1)")
        sql = "SELECT FROM (SELECT pg_advisory_lock_shared(12, 1) OFFSET 0) AS t OFFSET 1"
        id = served.insert(sql, group="silent")
        served.wait(id, "WORK")
        waiting = start("wait", "-d", served.conninfo, str(id), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: looks(served, "pgtask wait"))
    out, err = waiting.communicate(timeout=LONGEST)
    assert (waiting.returncode, out, err) == (0, f"{id} DONE\n".encode(), b"")
    served.wait(id, gone=True)


def test_wait_goes_on_in_a_new_session_when_its_own_is_ended(served: Database) -> None:
    with served.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(12, 3)")
        id = served.insert("SELECT pg_advisory_lock_shared(12, 3)::text", group="ended", delete=False)
        served.wait(id, "WORK")
        waiting = start("wait", "-d", served.conninfo, str(id), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: looks(served, "pgtask wait"))
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgtask wait'"
        assert served.admin_execute(f"{end} AND datname = %s", [served.name]) == [(True,)]
        eventually(lambda: looks(served, "pgtask wait"))
    out, err = waiting.communicate(timeout=LONGEST)
    assert (waiting.returncode, out) == (0, f"{id} DONE\n".encode())
    [line] = err.decode().splitlines()
    assert line.endswith("; trying again")


@pytest.mark.parametrize("timeout", ["soon", "-1 s"])
def test_a_timeout_that_is_none_is_refused(served: Database, pgtask: Command, timeout: str) -> None:
    said = pgtask("wait", served.conninfo, 1, f"--timeout={timeout}")
    assert (said.status, "is no duration" in said.err) == (2, True)


def test_there_is_nothing_to_wait_for(served: Database, pgtask: Command) -> None:
    said = pgtask("wait", served.conninfo, 999999999)
    assert (said.status, said.out) == (2, "")
    assert "has no task 999999999: it was removed, or never was" in said.err


def test_interrupt_leaves_the_task_alone_and_says_how_to_stop_it(served: Database) -> None:
    with served.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(12, 2)")
        one = start(
            *("submit", "-d", served.conninfo, "--group", "interrupt", "--wait"),
            "SELECT pg_advisory_lock_shared(12, 2)::text",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        [row] = eventually(lambda: served.tasks("\"group\" = 'interrupt' AND state = 'WORK'"))
        eventually(lambda: looks(served, "pgtask submit"))
        os.kill(one.pid, signal.SIGINT)
        out, err = one.communicate(timeout=LONGEST)
    told = f"task {row['id']} goes on; to stop it: pgtask cancel {row['id']}\n".encode()
    assert (one.returncode, out, err) == (130, b"", told)
    assert served.wait(row["id"])["state"] == "DONE"


def test_output_goes_as_it_is_into_a_pipe_and_harmless_to_a_terminal(served: Database, pgtask: Command) -> None:
    sql = "SELECT E'\\x1b[2Jclear' AS a"
    assert pgtask("submit", served.conninfo, "--wait", "--output", sql).out == "\x1b[2Jclear\n"
    seen = at_terminal("submit", "-d", served.conninfo, "--wait", "--output", sql)
    assert (seen.status, seen.out) == (0, "\\x1b[2Jclear\n")
