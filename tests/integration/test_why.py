"""`pgtask why`: each answer, in the situation that it tells of; what it says mends it does."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest
from psycopg import sql

from pgtask import config
from pgtask.errors import UserError
from pgtask.user import why
from pgtask.user.why import Answer, Caps
from tests.fixtures import locks
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.fixtures.processes import processes, title
from tests.fixtures.wait import eventually
from tests.unit.test_cli import USER, call, refused

CAPS = Caps(workers=100, run=100, safety=timedelta(minutes=1), sleep=timedelta(seconds=1))


def asked(database: Database, id: int, caps: Caps | None = CAPS) -> Answer:
    table = config.load(None, [database.conninfo], {"schema": database.schema, "table": database.table}, {}).tables[0]
    return why.ask(table, id, caps)


def reasons(answer: Answer) -> list[str]:
    return [one.reason for one in answer.reasons]


def mend(database: Database, answer: Answer, reason: str) -> None:
    """Run what the answer says mends it."""
    [command] = [one.mend for one in answer.reasons if one.reason == reason]
    assert command
    database.admin_execute(command)


def without(database: Database, id: int, reason: str, timeout: float = 20) -> Answer:
    """The answer, once that reason is gone."""
    answer: Answer | None = None

    def gone() -> bool:
        nonlocal answer
        answer = asked(database, id)
        return reason not in reasons(answer)

    eventually(gone, timeout)
    assert answer is not None
    return answer


def with_reason(database: Database, id: int, reason: str, caps: Caps | None = CAPS) -> Answer:
    """The answer, once that reason is there."""
    answer: Answer | None = None

    def there() -> bool:
        nonlocal answer
        answer = asked(database, id, caps)
        return reason in reasons(answer)

    eventually(there)
    assert answer is not None
    return answer


def test_group_cannot_move_the_cursor_of_who_asks(database: Database) -> None:
    install(database)
    database.execute("SELECT task_hold(E'a\\n\\x1b[31mb')")
    id = database.insert("SELECT 1", group="a\n\x1b[31mb")
    lines = list(why.lines(asked(database, id)))
    assert any(line.strip() == r"group  a\n\x1b[31mb" for line in lines), lines
    assert "\x1b" not in "".join(lines) and "\n" not in lines[0]


@pytest.fixture
def busy(served: Database) -> Iterator[Callable[..., int]]:
    """`busy(**columns)` is the id of a run that goes on until the test's end."""
    ids: list[int] = []
    with locks.held(served):

        def start(**columns: Any) -> int:
            ids.append(served.insert(locks.WAIT, **{"delete": False} | columns))
            served.wait(ids[-1], "WORK")
            locks.wait_runs(served, len(ids))
            return ids[-1]

        yield start
    for id in ids:
        served.wait(id)


# The command itself


def test_command_says_it_in_a_sentence_and_by_its_status(served: Database) -> None:
    id = served.insert("SELECT 1", plan=sql.SQL("now() + interval '2 hours'"), group="command")
    done = call(*USER, "why", str(id), "-d", served.conninfo)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"Task {id} is planned for .*, in (2 h|1 h \d+ min)\.\n", done.stdout), done.stdout
    served.execute("SELECT task_hold('command')")
    done = call(*USER, "why", str(id), "-d", served.conninfo, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["id"], told["state"], told["in_the_way"]) == (id, "PLAN", True)
    assert told["reasons"][0]["reason"] == "held"
    assert f'group "command" is held by {served.user} since' in told["sentence"]
    done = call(*USER, "why", str(id), "-d", served.conninfo)
    assert 'SELECT "public"."task_release"(\'command\')' in done.stdout


def test_wrong_usage_is_status_2(database: Database) -> None:
    install(database)
    assert "is no id of a task" in refused(*USER, "why", "x", "-d", database.conninfo)
    assert "has no task 999999999: none was ever made" in refused(*USER, "why", "999999999", "-d", database.conninfo)
    last = database.insert("SELECT 1")
    assert f"has no task 999999999: the last one that was ever made is {last}" in refused(
        *USER, "why", "999999999", "-d", database.conninfo
    )
    assert "does not exist" in refused(*USER, "why", "1", "-d", database.conninfo, "--table", "other")


# Tasks that wait for their time, their group, or somebody


def test_calendar_is_waited_for(served: Database) -> None:
    id = served.insert("SELECT 1", cron="0 0 29 2 *", zone="UTC", group="calendar")
    served.wait(id, "PLAN")
    answer = asked(served, id)
    assert "when its calendar comes round" in answer.sentence
    assert not answer.in_the_way
    assert ("calendar", "0 0 29 2 * in UTC") in answer.facts


def test_infinity_never_comes(served: Database) -> None:
    answer = asked(served, served.insert("SELECT 1", plan="infinity", group="infinity"))
    assert "infinity, which never comes" in answer.sentence
    assert answer.in_the_way


def test_held_group_is_named_with_who_holds_it(served: Database) -> None:
    served.execute("SELECT task_hold('held''s')")
    id = served.insert("SELECT 1", group="held's", delete=False)
    answer = asked(served, id)
    assert reasons(answer) == ["held"]
    assert f'is due, but its group "held\'s" is held by {served.user} since' in answer.sentence
    mend(served, answer, "held")
    served.wait(id, "DONE")


def test_full_group_is_named_with_who_has_its_slots(served: Database, busy: Callable[..., int]) -> None:
    running = [busy(group="full", max=1), busy(group="full", max=1)]
    id = served.insert("SELECT 1", group="full", max=1)
    other = served.insert("SELECT 1", group="full", max=0)
    answer = asked(served, id)
    assert reasons(answer) == ["group full"]
    assert f'its group "full" is full: tasks {running[0]}, {running[1]} have all of its 2 slots' in answer.sentence
    assert ("slots", "2 of 2 in use") in answer.facts
    facts = dict(answer.facts)
    assert re.fullmatch(r"WORK for .* in session \d+, waits for Lock: advisory", facts[f"task {running[0]}"]), facts
    answer = asked(served, other)
    assert "1 other due task of its group goes first" in answer.reasons[1].text


def test_group_rests_after_a_run_with_a_negative_max(served: Database, run: Callable[..., dict[str, Any]]) -> None:
    run("SELECT 1", group="rests", max=-3_600_000)
    answer = asked(served, served.insert("SELECT 1", group="rests", max=-3_600_000))
    assert reasons(answer) == ["resting"]
    assert re.search(r'"rests" rests for another (1 h|\d+ min \d+ s) after its last run', answer.sentence), (
        answer.sentence
    )


def test_locked_row_is_named_with_who_has_it(served: Database) -> None:
    served.execute("SELECT task_hold('locked')")
    id = served.insert("SELECT 1", group="locked", delete=False)
    session = served.connect(autocommit=False, application_name="locker")
    session.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [id])
    served.execute("SELECT task_release('locked')")
    answer = asked(served, id)
    assert reasons(answer) == ["locked"]
    pid = session.info.backend_pid
    assert f'its row is locked by session {pid} of {served.user} "locker", idle in transaction' in answer.sentence
    mend(served, answer, "locked")
    served.wait(id, "DONE")


def test_row_that_others_refer_to_is_not_in_the_way(served: Database) -> None:
    served.execute("SELECT task_hold('referred')")
    id = served.insert("SELECT 1", group="referred")
    with served.connect(autocommit=False) as session:
        session.execute("SELECT FROM task WHERE id = %s FOR KEY SHARE", [id])
        assert reasons(asked(served, id)) == ["held"]
        assert served.execute("SELECT xmax::text <> '0' FROM task WHERE id = %s", [id]) == [(True,)]


def test_row_locked_by_a_prepared_transaction(served: Database) -> None:
    served.execute("SELECT task_hold('prepared')")
    id = served.insert("SELECT 1", group="prepared")
    with served.connect(autocommit=False) as session:
        session.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [id])
        session.execute("PREPARE TRANSACTION 'it''s'")
    answer = asked(served, id)
    assert 'its row is locked by the prepared transaction "it\'s"' in answer.reasons[1].text
    mend(served, answer, "locked")
    assert reasons(asked(served, id)) == ["held"]


def test_row_locked_by_several_at_once(served: Database) -> None:
    served.execute("SELECT task_hold('shared')")
    id = served.insert("SELECT 1", group="shared")
    sessions = [served.connect(autocommit=False) for _ in range(2)]
    for session in sessions:
        session.execute("SELECT FROM task WHERE id = %s FOR SHARE", [id])
    answer = asked(served, id)
    assert reasons(answer) == ["held", "locked", "locked"]
    for session in sessions:
        assert f"session {session.info.backend_pid} of" in answer.reasons[1].text + answer.reasons[2].text
        session.rollback()
    assert reasons(asked(served, id)) == ["held"]


def test_locked_table_cannot_be_read(served: Database) -> None:
    id = served.insert("SELECT 1", plan=sql.SQL("now() + interval '1 h'"))
    session = served.connect(autocommit=False)
    session.execute("LOCK TABLE task IN ACCESS EXCLUSIVE MODE")
    answer = asked(served, id)
    assert f"the whole table is locked by session {session.info.backend_pid}" in answer.sentence
    assert answer.in_the_way
    mend(served, answer, "locked")
    without(served, id, "locked")


# Tasks that wait for others


def test_chain_is_followed_down_to_what_holds_it_up(served: Database, busy: Callable[..., int]) -> None:
    first = busy(group="chain")
    second = served.insert("SELECT 1", depend=[first], group="chain", delete=False)
    third = served.insert("SELECT 1", depend=[second], group="chain")
    answer = eventually(lambda: a if "WORK" in (a := asked(served, third)).sentence or "runs" in a.sentence else None)
    assert answer is not None
    assert f"Task {third} waits for task {second} (WAIT). Task {first} runs for" in answer.sentence
    assert reasons(answer) == ["blocked"]  # by the lock that the test holds
    assert (f"task {second}", "WAIT") in answer.facts


def test_dependency_that_is_held_or_never_comes_is_the_answer(served: Database) -> None:
    served.execute("SELECT task_hold('root')")
    root = served.insert("SELECT 1", group="root", delete=False)
    id = served.insert("SELECT 1", depend=[root])
    answer = asked(served, id)
    assert reasons(answer) == ["held"]
    assert f"waits for task {root} (PLAN). Task {root} is due, but its group" in answer.sentence
    served.execute("SELECT task_release('root')")
    served.wait(root, "DONE")
    never = served.insert("SELECT 1", plan="infinity")
    answer = asked(served, served.insert("SELECT 1", depend=[never]))
    assert answer.in_the_way
    assert "which never comes" in answer.sentence


def test_planned_dependency_is_nothing_wrong(served: Database) -> None:
    root = served.insert("SELECT 1", plan=sql.SQL("now() + interval '3 h'"))
    answer = asked(served, served.insert("SELECT 1", depend=[root]))
    assert not answer.in_the_way
    assert re.search(
        rf"waits for task {root} \(PLAN\)\. Task {root} is planned for .* in (3 h|2 h \d+ min)", answer.sentence
    )


# Tasks that run


def test_running_task_tells_its_session_and_progress(served: Database) -> None:
    with locks.held(served):
        id = served.insert(f"SELECT task_progress(40, 'half way'); {locks.WAIT}", timeout="1 h", group="running")
        eventually(lambda: "progress" in dict(asked(served, id).facts))
        locks.wait_runs(served)
        answer = asked(served, id)
        facts = dict(answer.facts)
        assert re.fullmatch("40 %: half way, .* ago", facts["progress"])
        assert re.fullmatch(r"1 h, (1 h|\d+ min( \d+ s)?) left", facts["timeout"])
        assert re.fullmatch(r"\d+, active, waits for Lock: advisory", facts["session"])
    served.wait(id)


def test_blocked_run_names_who_blocks_it(served: Database) -> None:
    session = served.connect(autocommit=False, application_name="blocker")
    session.execute("SELECT pg_advisory_xact_lock(%s)", [locks.KEY + 1])
    id = served.insert(f"SELECT pg_advisory_xact_lock({locks.KEY + 1})", group="blocked", delete=False)
    answer = with_reason(served, id, "blocked")
    pid = session.info.backend_pid
    assert f'it waits for a lock of session {pid} of {served.user} "blocker"' in answer.sentence
    mend(served, answer, "blocked")
    served.wait(id, "DONE")


# Tasks that have ended


def test_ends_are_told_with_their_error(served: Database, run: Callable[..., dict[str, Any]]) -> None:
    done = asked(served, run("SELECT 1", group="ends")["id"])
    assert re.fullmatch(r"Task \d+ is DONE at .*\.", done.sentence)
    assert not done.in_the_way
    failed = asked(served, run("SELECT 1/0", group="ends")["id"])
    assert re.search(r"failed at .* \(22012\): division by zero\.", failed.sentence)
    assert failed.in_the_way
    mend(served, failed, "ended")
    gone = asked(served, run("SELECT 1", plan=sql.SQL("now() - interval '2 h'"), group="ends")["id"])
    assert re.search("is GONE at .*: task not active", gone.sentence)
    id = served.insert("SELECT 1", plan=sql.SQL("now() + interval '1 h'"))
    served.execute("SELECT task_cancel(%s)", [id])
    assert re.search(rf"was stopped by {served.user} at ", asked(served, id).sentence)


def test_removed_task_is_told_from_one_that_never_was(served: Database) -> None:
    id = served.insert("", group="removed")
    served.wait(id, gone=True)
    answer = asked(served, id)
    assert answer.sentence == f"There is no task {id} any more: it was removed."
    assert not answer.in_the_way
    with pytest.raises(UserError, match="has no task"):
        asked(served, id + 1000)


def test_failed_dependency_is_named(database: Database) -> None:
    install(database)
    other = database.insert("SELECT 1")
    id = database.insert("SELECT 1", depend=[other])
    database.execute("SELECT task_cancel(%s)", [other])
    answer = asked(database, id)
    assert reasons(answer) == ["depend", "no master"]
    assert f"depends on task {other}, which is STOP, and will be GONE" in answer.sentence


def test_failed_run_waits_for_its_next_attempt(served: Database) -> None:
    id = served.insert("SELECT 1/0", retry=3, backoff="1 h", group="retry")
    eventually(lambda: (row := served.task(id)) and row["state"] == "PLAN" and row["attempt"] == 1)
    answer = asked(served, id)
    assert re.search(r"is to run again at .*, in (1 h|\d+ min).*: run 1 failed \(22012\)", answer.sentence), (
        answer.sentence
    )
    assert not answer.in_the_way
    assert ("runs", "1 run so far, 3 more allowed after failures") in answer.facts


# Masters


def test_no_master_and_what_it_has_left_behind(database: Database, master: Callable[..., Master]) -> None:
    install(database)
    id = database.insert("SELECT 1", delete=False)
    late = database.insert("SELECT 1", plan=sql.SQL("now() - interval '2 h'"))
    waits = database.insert("SELECT 1", cron="@yearly")
    assert reasons(asked(database, id)) == ["no master"]
    assert reasons(asked(database, late)) == ["late", "no master"]
    answer = asked(database, waits)
    assert "first match of its calendar, but no master serves the table" in answer.sentence
    mend(database, asked(database, late), "late")
    assert reasons(asked(database, late)) == ["no master"]
    one = master(database.conninfo)
    database.wait(id, "DONE")
    with locks.held(database):
        running = database.insert(locks.WAIT)
        database.wait_running(running)
        one.expect_exit, one.may_leave_rows = None, True
        [backend] = database.execute("SELECT backend FROM task_master")[0]
        for pid in [one.pid, *one.workers()]:
            os.kill(pid, SIGKILL)
        database.admin_execute(  # until they are gone
            "SELECT pg_terminate_backend(pid, 20000) FROM pg_stat_activity WHERE pid IN (%s, %s)",
            [backend, (database.task(running) or {})["pid"]],
        )
        answer = with_reason(database, running, "lost")
    assert reasons(answer) == ["lost", "no master"]
    assert "was being run, but its session" in answer.sentence
    assert f"pid {one.pid} on" in dict(answer.facts)["last master"]


def test_masters_lock_in_strange_hands(database: Database) -> None:
    install(database)
    id = database.insert("SELECT 1")
    session = database.connect(application_name="stranger")
    session.execute("SELECT pg_advisory_lock('task'::regclass::oid::int, -2)")
    answer = asked(database, id)
    text = f'its lock is held by session {session.info.backend_pid} of {database.user} "stranger"'
    assert text in answer.sentence
    mend(database, answer, "no master")
    eventually(lambda: "no master serves the table." in asked(database, id).sentence)


def test_master_that_waits_itself(database: Database, master: Callable[..., Master]) -> None:
    one = master(database.conninfo)
    one.may_log_errors = True
    session = database.connect(autocommit=False)
    database.execute("SELECT task_hold('late')")  # until the table is locked
    id = database.insert("SELECT 1", group="late", delete=False)
    session.execute("LOCK TABLE task IN EXCLUSIVE MODE")
    database.execute("SELECT task_release('late')")
    answer = with_reason(database, id, "master waits")
    assert f"a lock (relation) that session {session.info.backend_pid} has" in answer.sentence
    mend(database, answer, "master waits")
    database.wait(id, "DONE")


def test_limits_of_the_configuration(database: Database, master: Callable[..., Master], tmp_path: Path) -> None:
    text = "[master]\nworkers = 1\n[[database]]\nconninfo = '{}'\n"
    master(config=text.format(database.conninfo.replace("'", "''")))
    with locks.held(database):
        running = database.insert(locks.WAIT, group="one")
        database.wait(running, "WORK")
        id = database.insert("SELECT 1", group="two")
        caps = Caps(workers=1, run=100, safety=CAPS.safety, sleep=CAPS.sleep)
        # Others may have workers on this server too: of ours there is at least one.
        answer = with_reason(database, id, "workers", caps)
        assert "all 1 workers are busy (workers)" in answer.sentence
        caps = Caps(workers=1000, run=1, safety=CAPS.safety, sleep=CAPS.sleep)
        assert "its table has 1 run, and may have 1 (run)" in asked(database, id, caps).sentence
        # Until it has looked and found no worker, the master still sleeps.
        answer = eventually(lambda: a if not (a := asked(database, id, None)).in_the_way else None)
        assert answer is not None
        assert "nothing that the database knows of is in its way" in answer.sentence
        file = tmp_path / "master0.toml"
        done = call(*USER, "why", str(id), "--config", str(file), "--json")
        assert [one["reason"] for one in json.loads(done.stdout)["reasons"]] == ["workers"], done.stdout
    database.wait(id)


def test_master_that_sleeps_and_was_not_told(database: Database, master: Callable[..., Master]) -> None:
    # A worker that ends wakes it as well.
    text = "[master]\nlinger = '1 h'\n[[database]]\nsafety = '1 h'\nconninfo = '{}'\n"
    master(config=text.format(database.conninfo.replace("'", "''")))
    database.execute("ALTER TABLE task DISABLE TRIGGER pgtask_wake")
    ids = [database.insert("SELECT 1", delete=False)]

    def overslept() -> Answer | None:
        """Of the last task; another, if it woke for a reason of its own and found it."""
        answer = asked(database, ids[-1])
        if answer.state == "DONE":
            ids.append(database.insert("SELECT 1", delete=False))
        return answer if "asleep" in reasons(answer) else None

    answer = eventually(overslept, 60)
    assert answer is not None
    assert "the master sleeps, and nobody told it of this task (trigger pgtask_wake is disabled)" in answer.sentence
    mend(database, answer, "asleep")
    database.insert("SELECT 1")
    database.wait(ids[-1], "DONE")


def test_master_that_nobody_wakes(database: Database, master: Callable[..., Master]) -> None:
    text = "[[database]]\nwake = false\nsleep = '1 h'\nconninfo = '{}'\n"
    master(config=text.format(database.conninfo.replace("'", "''"))).wait_log("leading")
    eventually(lambda: database.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgtask master'"))
    eventually(lambda: not asked(database, database.insert("SELECT 1", plan="infinity")).reasons)
    ids = [database.insert("SELECT 1", delete=False)]

    def overslept() -> Answer | None:
        """Of the last task; another, if its first look, or one after a run, was late and found it."""
        answer = asked(database, ids[-1])
        if answer.state == "DONE":
            ids.append(database.insert("SELECT 1", delete=False))
        return answer if "not woken" in reasons(answer) else None

    answer = eventually(overslept, 60)
    assert answer is not None
    assert "no insert wakes the master (trigger pgtask_wake is not there)" in answer.sentence


def waits(worker: int) -> bool:
    """Has the worker told its master that it is idle? It shows so before, and then sleeps for the first time."""
    return title(worker).endswith(" idle") and any(one.pid == worker and one.state == "S" for one in processes())


def test_task_that_is_taken_and_not_begun(database: Database, master: Callable[..., Master]) -> None:
    text = "[master]\nlinger = '10 min'\n[[database]]\nconninfo = '{}'\n"
    one = master(config=text.format(database.conninfo.replace("'", "''")))
    # While a group pauses between its runs the master takes what is due: no worker looks for it.
    database.wait(database.insert("SELECT 1", max=-600_000, group="pauses", delete=False))
    worker = eventually(lambda: next((pid for pid in one.workers() if waits(pid)), 0))
    os.kill(worker, SIGSTOP)
    try:
        id = database.insert("SELECT 1", delete=False)
        database.wait(id, "TAKE")
        answer = asked(database, id)
        assert "was taken" in answer.sentence
        assert not answer.in_the_way
    finally:
        os.kill(worker, SIGCONT)
    database.wait(id, "DONE")


def test_standby_serves_nothing(own_database: Database, standby: Any) -> None:
    install(own_database)
    id = own_database.insert("SELECT 1")
    copy = Database(standby, own_database.name, own_database.user)
    try:
        eventually(lambda: copy.execute("SELECT to_regclass('task_master') IS NOT NULL")[0][0] and copy.task(id))
        assert reasons(asked(copy, id)) == ["standby"]
    finally:
        copy.close()


# Odd tables, and what it costs


@pytest.mark.parametrize("zone", ["UTC-14", "UTC+12"])
def test_odd_names_and_values(database: Database, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    database.schema, database.table = 'sch "e%s" {task}', "t a'b%s"
    database.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(database.schema)))
    install(database, database.schema, database.table)
    for plan in ("-infinity", "infinity", "4713-01-01 BC", "294276-01-01"):
        for max in (2147483647, -2147483648):
            id = database.insert("SELECT 1", plan=plan, max=max, group="g'r%s {id}", live="178000000 years")
            answer = asked(database, id)
            assert "no master" in reasons(answer)
            assert list(why.lines(answer))
    monkeypatch.undo()
    time.tzset()


def test_question_reads_little_of_a_large_table(database: Database) -> None:
    install(database)
    database.execute(
        """INSERT INTO task (input, "group", plan, state, max)
        SELECT 'SELECT 1', 'g' || n % 7, now() - interval '1 min' * (n % 50),
            CASE WHEN n % 2 = 0 THEN 'PLAN' ELSE 'DONE' END::state, n % 3
        FROM generate_series(1, 100000) AS n"""
    )
    id = database.insert("SELECT 1", group="g0")
    locks.wait_alone(database)
    before = database.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'task'")
    answer = asked(database, id)
    assert "no master" in reasons(answer)
    locks.wait_alone(database)
    database.execute("SELECT pg_stat_clear_snapshot()")
    assert database.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'task'") == before
