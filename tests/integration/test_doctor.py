"""`pgtask doctor`: each finding, where things are as it tells; the command that it prints is run, and it is gone."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask import config, embedded
from pgtask.settings import toml_text
from pgtask.user import checks
from pgtask.user.checks import Finding, Limits, Look
from pgtask.user.where import Where, open_session
from tests.fault.test_clock import make_clock, set_clock
from tests.fixtures import locks
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.master import ROOT, Master
from tests.fixtures.server import start_server
from tests.fixtures.wait import eventually
from tests.unit.test_cli import USER, call, refused

NONE = Limits(transaction=0, slot=0, dead=10, index=0, late=0, lost=0, long=0, held=0, sequence=0.5, history=0)
"""Everything is found at once."""


class Patient:
    """A database and what the doctor says of it. What it prints is done by `mend`."""

    def __init__(self, database: Database, conninfo: str | None = None, settings: str = "") -> None:
        self.database = database
        self.conninfo = conninfo or database.conninfo
        self.settings = settings
        self.limits = Limits()
        self.more: dict[str, Any] = {}

    def findings(self, *only: str) -> list[Finding]:
        names = {"schema": self.database.schema, "table": self.database.table}
        keys: dict[str, object] = dict(line.split(" = ", 1) for line in self.settings.splitlines())
        given = {name: str(value).strip('"') for name, value in keys.items() if name not in ("workers", "conninfo")}
        conninfo = str(keys.get("conninfo", "")).strip('"') or self.conninfo
        conninfo = make_conninfo(conninfo, password=self.database.password)
        table = config.load(None, [conninfo], names | given, {}).tables[0]
        more = {"workers": int(str(keys["workers"]))} if "workers" in keys else {}
        with open_session(table) as session:
            named = Where(conninfo, None, None, None).arguments(table)
            look = Look(session=session, table=table, named=named, limits=self.limits, **{**self.more, **more})
            return checks.examine(look, only)

    def worse(self, check: str | None = None) -> list[Finding]:
        """What is not ok."""
        return [one for one in self.findings(*([check] if check else [])) if one.severity != "ok"]

    def find(self, check: str, pattern: str, severity: str) -> Finding:
        found = [one for one in self.worse(check) if re.search(pattern, one.what)]
        assert len(found) == 1, self.worse(check)
        assert (found[0].severity, bool(found[0].why)) == (severity, True)
        return found[0]

    def mend(self, finding: Finding) -> None:
        """Do what it says, as somebody who may."""
        match finding.how:
            case "sql":
                with psycopg.connect(self.database.admin, autocommit=True) as session:
                    for statement in finding.mend.split("; "):
                        session.execute(statement.encode())
            case "shell":
                shell(finding.mend)
            case "config":
                self.settings += finding.mend + "\n"
            case _:
                raise AssertionError(finding)

    def cure(self, check: str, pattern: str, severity: str, timeout: float = 20) -> Finding:
        """Find it, mend it, and see that it is gone."""
        finding = self.find(check, pattern, severity)
        self.mend(finding)
        eventually(lambda: not [one for one in self.worse(check) if re.search(pattern, one.what)], timeout)
        return finding


def shell(command: str) -> None:
    """As in a terminal where pgtask is installed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bash = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(bash, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done


@pytest.fixture
def patient(database: Database) -> Patient:
    """A table that nobody serves."""
    install(database)
    database.admin_execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    return Patient(database)


@pytest.fixture(scope="module")
def odd_server() -> Iterator[embedded.Server]:
    """A server with the settings that a doctor finds."""
    started = start_server(wal_level="logical", max_replication_slots="4", max_connections="25", autovacuum="off")
    yield started
    started.remove()


@pytest.fixture
def odd(odd_server: embedded.Server, new_database: Callable[..., Database]) -> Patient:
    database = new_database(on=odd_server)
    install(database)
    return Patient(database)


# The command itself


def test_command_lists_the_worst_first_and_changes_nothing(patient: Patient) -> None:
    database = patient.database
    before = database.admin_execute("SELECT sum(xmin::text::bigint) FROM pg_class")
    done = call(*USER, "doctor", "-d", database.conninfo)
    assert (done.returncode, done.stderr) == (1, "")
    first, _, second, *_ = done.stdout.splitlines()
    assert re.fullmatch(rf"{database.user}@{database.name} public.task: 1 error, \d notes?", first), done.stdout
    assert second == "error  master: no master serves the table"
    assert "  run: pgtask-master '" in done.stdout
    assert "\nok  pooler, server, clock, layout, " in done.stdout
    assert database.admin_execute("SELECT sum(xmin::text::bigint) FROM pg_class") == before
    done = call(*USER, "doctor", "-d", database.conninfo, "--json")
    [table] = json.loads(done.stdout)
    severities = [checks.SEVERITIES.index(one["severity"]) for one in table["findings"]]
    assert severities == sorted(severities, reverse=True)
    assert {one["check"] for one in table["findings"]} == {one.name for one in checks.CHECKS}


def test_served_table_is_well(database: Database, master: Callable[..., Master], tmp_path: Path) -> None:
    quoted = database.conninfo.replace("'", "''")
    one = master(config=f"[[database]]\nconninfo = '{quoted}'\n")
    database.admin_execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    done = call(*USER, "doctor", "--config", str(tmp_path / "master0.toml"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert re.search(rf"ok  master: pid {one.pid} on .* serves the table, term 1", done.stdout)
    other = master(wait=False)
    other.wait_log("standing_by")
    assert "1 other session of masters" in call(*USER, "doctor", "-d", database.conninfo).stdout


def test_server_that_is_not_there_is_status_2(database: Database) -> None:
    assert "does not exist" in refused(*USER, "doctor", "-d", f"{database.conninfo} dbname=nowhere")


def test_one_of_several_databases_is_not_there(patient: Patient, tmp_path: Path) -> None:
    file = tmp_path / "pgtask.toml"
    places = [patient.database.conninfo, f"{patient.database.conninfo} dbname=nowhere"]
    file.write_text("".join(f"[[database]]\nconninfo = {toml_text(place)}\n" for place in places), "utf-8")
    done = call(*USER, "doctor", "--config", str(file), "--check", "clock")
    assert done.returncode == 2
    assert f"{patient.database.name} public.task: all is well" in done.stdout
    assert re.fullmatch("pgtask doctor: .*@nowhere public.task: .* does not exist\n", done.stderr), done.stderr


def test_one_check_alone(patient: Patient) -> None:
    done = call(*USER, "doctor", "-d", patient.database.conninfo, "--check", "public", "--check", "clock", "--json")
    assert done.returncode == 0
    assert [one["check"] for one in json.loads(done.stdout)[0]["findings"]] == ["clock", "public"]
    assert 'no such check, did you mean "public"?' in refused(*USER, "doctor", "--check", "pubic")


def test_secrets_are_not_shown(patient: Patient) -> None:
    patient.database.password = "geheim"
    assert "geheim" not in str(patient.findings())


# The objects


def test_table_that_is_not_there(database: Database) -> None:
    finding = Patient(database).cure("layout", "there is no table public.task", "error")
    assert finding.how == "shell"


def test_missing_objects(patient: Patient) -> None:
    patient.database.execute("DROP INDEX task_due; DROP TRIGGER pgtask_drop ON task; ALTER TABLE task DROP notice")
    assert "CONCURRENTLY" in patient.cure("layout", "to do: create index task_due", "error").mend
    patient.cure("layout", "to do: add column notice", "error")
    patient.cure("layout", "to do: create trigger pgtask_drop", "error")
    assert patient.worse("layout") == []


def test_table_beside_it_that_is_missing_hides_nothing_else(patient: Patient) -> None:
    patient.database.execute("DROP TABLE task_report, task_held; DROP FUNCTION task_hold(text)")
    hidden = patient.find("held", 'cannot be looked at: relation "public.task_held" does not exist', "note")
    patient.mend(hidden)
    assert patient.worse("layout") == patient.worse("held") == []


def test_right_to_a_table_beside_it_that_is_missing(patient: Patient) -> None:
    user = patient.database.user
    patient.database.admin_execute(
        sql.SQL("REVOKE UPDATE ON task_held, task_report FROM {}").format(sql.Identifier(user))
    )
    patient.cure("layout", "permission denied for table task_(held|report)", "error")


def test_function_of_an_older_layout(patient: Patient) -> None:
    patient.database.execute("DROP FUNCTION task_cancel(bigint)")
    patient.database.execute("DROP FUNCTION task_wait(bigint, interval)")
    patient.cure("layout", "to do: create function .*, and 1 more", "error")


def test_what_the_master_is_configured_to_is_no_finding(
    database: Database, master: Callable[..., Master], tmp_path: Path
) -> None:
    quoted = database.conninfo.replace("'", "''")
    defaults = "timeout = '1 h'\ngroup = \"it's\"\nnull = 'a\\b'\ndelimiter = ','\nmax = -3\ndelete = false"
    text = f"[[database]]\nconninfo = '{quoted}'\nwake = false\n{defaults}\n"
    one = master(config=text)
    one.wait_log("leading")
    patient = Patient(database)
    assert patient.worse("layout") == []
    database.execute("ALTER TABLE task ALTER max DROP DEFAULT")
    command = [*USER, "doctor", "--config", str(tmp_path / "master0.toml"), "--check", "layout", "--json"]
    [finding] = json.loads(call(*command).stdout)[0]["findings"]
    assert finding["what"].endswith("to do: set the default of max")
    database.execute(finding["mend"])
    assert call(*command).returncode == 0
    assert patient.worse("layout") == []


def test_table_that_a_master_refuses(patient: Patient) -> None:
    patient.database.execute("ALTER TABLE task RENAME output TO said; ALTER TABLE task ADD output integer")
    finding = patient.find("layout", "column output of public.task has type integer, not text", "error")
    assert "refuses" in finding.why


def test_invalid_index_of_ours_and_of_others(patient: Patient) -> None:
    database = patient.database
    database.execute("DROP INDEX task_due")
    waits = "SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted"
    with database.connect(autocommit=False) as writer:
        writer.execute("INSERT INTO task (input) VALUES ('SELECT 1')")
        for name, rest in {"task_due": "(plan, id) WHERE state = 'PLAN'", "theirs": "(id)"}.items():
            session = database.connect()
            create = f"CREATE INDEX CONCURRENTLY {name} ON task {rest}".encode()
            with ThreadPoolExecutor() as pool:
                creating = pool.submit(session.execute, create)
                pid = session.info.backend_pid
                try:
                    eventually(lambda pid=pid: database.execute(waits, [pid]))  # for the writer
                finally:
                    session.cancel()
                with pytest.raises(psycopg.errors.QueryCanceled):
                    creating.result(timeout=20)
    patient.cure("layout", "index task_due is invalid", "error")
    patient.cure("indexes", "index public.theirs is invalid", "warning")


def test_disabled_trigger(patient: Patient) -> None:
    patient.database.execute("ALTER TABLE task DISABLE TRIGGER pgtask_wake")
    patient.cure("triggers", "trigger pgtask_wake of public.task is disabled", "error")


PARTED = """CREATE TABLE task (id bigint GENERATED BY DEFAULT AS IDENTITY, plan timestamptz NOT NULL DEFAULT now(),
    input text NOT NULL, PRIMARY KEY (id, plan)) PARTITION BY RANGE (plan)"""


def test_partition_for_the_near_future(database: Database) -> None:
    database.execute(PARTED)
    database.execute(
        "DO $$BEGIN EXECUTE format('CREATE TABLE task_now PARTITION OF task FOR VALUES FROM (%L) TO (%L)',"
        " now() - interval '27 days', now() - interval '1 s'); END$$"
    )
    install(database)
    patient = Patient(database)
    patient.cure("partitions", "the last partition has ended", "error")
    patient.limits = Limits(partition=40 * 86400)
    patient.cure("partitions", "the last partition ends in 26 days", "warning")
    assert database.insert("SELECT 1")


def test_sequence_near_its_end_and_behind(patient: Patient) -> None:
    database = patient.database
    database.execute("ALTER TABLE task ALTER id SET MAXVALUE 1000; SELECT setval('task_id_seq', 900)")
    patient.cure("sequence", "has given 900 of 1,000 numbers", "error")
    database.insert("SELECT 1", id=5000)
    patient.cure("sequence", "is at 900, behind the greatest id, 5,000", "error")
    assert database.insert("SELECT 1") == 5001


# The master


def test_nobody_serves_the_table(patient: Patient, master: Callable[..., Master]) -> None:
    finding = patient.find("master", "no master serves the table$", "error")
    program, *arguments = shlex.split(finding.mend)
    assert program == "pgtask-master"
    one = master(*arguments, tables=1)
    assert patient.worse("master") == []
    one.stop()
    eventually(lambda: [one for one in patient.worse("master") if "the last one was" in one.what])
    patient.find("master", f"the last one was pid {one.pid} on .*, term 1", "error")


def test_masters_lock_in_strange_hands(patient: Patient) -> None:
    session = patient.database.connect(application_name="stranger")
    session.execute("SELECT pg_advisory_lock('task'::regclass::oid::int, -2)")
    patient.cure("master", f'session {session.info.backend_pid} of .* "stranger" holds the lock', "error")


def test_master_that_waits_for_a_lock(patient: Patient, master: Callable[..., Master]) -> None:
    database = patient.database
    master(database.conninfo).may_log_errors = True
    session = database.connect(autocommit=False)
    while True:  # until the lock is there before the master wants the row
        id = database.insert("SELECT 1", plan=sql.SQL("clock_timestamp() + interval '500 ms'"), delete=False)
        session.execute("LOCK TABLE task IN EXCLUSIVE MODE")
        if (database.task(id) or {})["state"] == "PLAN":
            break
        session.rollback()
    pattern = rf"the master waits for a lock \(relation\) that session {session.info.backend_pid} has"
    finding = eventually(lambda: next((one for one in patient.worse("master") if re.match(pattern, one.what)), None))
    assert finding is not None
    patient.mend(finding)
    database.wait(id, "DONE")
    assert patient.worse("master") == []


def test_locked_table_is_what_the_checks_say(patient: Patient) -> None:
    session = patient.database.connect(autocommit=False)
    session.execute("LOCK TABLE task IN ACCESS EXCLUSIVE MODE")
    finding = patient.find("failed", "cannot be looked at", "error")
    assert f"The whole table is locked by session {session.info.backend_pid}" in finding.why
    patient.mend(finding)
    eventually(lambda: not patient.worse("failed"))  # that session ends a moment later


def test_runs_without_an_owner(patient: Patient, master: Callable[..., Master]) -> None:
    database = patient.database
    one = master(database.conninfo)
    one.expect_exit, one.may_leave_rows = None, True
    with locks.held(database):
        id = database.insert(locks.WAIT)
        pid = database.wait_running(id)["pid"]
        for process in [one.pid, *one.workers()]:
            with suppress(ProcessLookupError):  # an idle one ends by itself without its master
                os.kill(process, signal.SIGKILL)
        database.admin_execute("SELECT pg_terminate_backend(%s)", [pid])
        patient.limits = NONE
        eventually(lambda: patient.worse("lost"))
    finding = patient.cure("lost", f"1 run without an owner: {id}", "error")
    assert "pg_stat_activity" in finding.mend
    assert database.wait(id, "PLAN")["pid"] is None


# The tasks


def test_backlog_and_what_keeps_it(patient: Patient, master: Callable[..., Master]) -> None:
    database = patient.database
    quoted = database.conninfo.replace("'", "''")
    master(config=f"[master]\nworkers = 2\n[[database]]\nconninfo = '{quoted}'\n")
    patient.limits = NONE
    with locks.held(database):
        running = [database.insert(locks.WAIT, group="full", delete=False)]
        database.wait(running[-1], "WORK")
        database.execute("SELECT task_hold('held')")
        held = database.insert("SELECT 1", group="held")
        running.append(database.insert(locks.WAIT, group="full", delete=False))
        patient.cure("backlog", '2 tasks due, .*; 1 are of groups that are held, such as "held"', "warning")
        patient.cure("backlog", '1 are of group "full", which has 1 slot', "warning")
        database.wait(running[-1], "WORK")
        database.wait(held)
        running.append(database.insert(locks.WAIT, group="more", delete=False))
        patient.more["workers"] = 2
        finding = patient.find("backlog", "1 are of groups with free slots", "warning")
        assert (finding.how, finding.mend) == ("config", "workers = 4")
    for id in running:
        database.wait(id, "DONE")
    assert patient.worse("backlog") == []


def test_more_workers_are_what_helps(patient: Patient, master: Callable[..., Master], tmp_path: Path) -> None:
    database = patient.database
    quoted = database.conninfo.replace("'", "''")
    text = f"[master]\nworkers = 1\n[[database]]\nconninfo = '{quoted}'\n"
    one = master(config=text)
    patient.limits, patient.more = NONE, {"workers": 1}
    with locks.held(database):
        ids = [database.insert(locks.WAIT, group=f"g{n}", delete=False) for n in range(2)]
        eventually(lambda: [database.task(id)["state"] for id in ids].count("WORK") == 1)  # type: ignore[index]
        finding = patient.find("backlog", "1 are of groups with free slots", "warning")
        (tmp_path / "master0.toml").write_text(text.replace("workers = 1", finding.mend), "utf-8")
        one.signal(signal.SIGHUP)
        for id in ids:
            database.wait(id, "WORK")
        assert patient.worse("backlog") == []
    for id in ids:
        database.wait(id, "DONE")


def test_runs_that_go_on_for_long_or_are_blocked(patient: Patient, master: Callable[..., Master]) -> None:
    database = patient.database
    master(database.conninfo)
    patient.limits = NONE
    blocker = database.connect()
    blocker.execute("SELECT pg_advisory_lock(77)")
    id = database.insert("SELECT pg_advisory_xact_lock(77)", group="blocked", delete=False)
    database.wait(id, "WORK")
    eventually(lambda: [one for one in patient.worse("runs") if one.severity == "warning"])
    pattern = f'task {id} of group "blocked" runs for .*, and waits for a lock that session {blocker.info.backend_pid}'
    patient.cure("runs", pattern, "warning")
    database.wait(id, "DONE")
    id = database.insert("SELECT pg_sleep(3600)", group="long")
    database.wait(id, "WORK")
    patient.cure("runs", f'task {id} of group "long" runs for', "note")
    database.wait(id, "STOP")


def test_task_that_waits_for_one_that_never_comes(patient: Patient) -> None:
    never = patient.database.insert("SELECT 1", plan="infinity")
    id = patient.database.insert("SELECT 1", depend=[never])
    patient.cure("waits", f"task {id} waits for task {never}, which is planned for infinity", "warning")


def test_group_that_is_held_for_long(patient: Patient) -> None:
    patient.database.execute("SELECT task_hold('it''s')")
    assert patient.worse("held") == []
    patient.limits = NONE
    patient.cure("held", f'group "it\'s" is held by {patient.database.user} for', "note")


def test_tasks_that_failed(patient: Patient, master: Callable[..., Master]) -> None:
    database = patient.database
    master(database.conninfo)
    id = database.insert("SELECT * FROM missing")
    database.wait(id, "FAIL")
    finding = patient.find("failed", f"1 of the last 10,000 tasks failed, the last is {id}: ERROR: .*missing", "note")
    database.execute("CREATE TABLE missing ()")
    patient.mend(finding)
    database.wait(id, "DONE")
    assert patient.worse("failed") == []


# Space


def test_transactions_that_hold_back_vacuum(patient: Patient) -> None:
    database = patient.database
    open_one = database.connect(autocommit=False, application_name="forgotten")
    open_one.execute("SELECT count(*) FROM task")
    open_one.execute("INSERT INTO task (input) VALUES ('SELECT 1')")
    with database.connect(autocommit=False) as session:
        session.execute("CREATE TABLE prepared ()")
        session.execute("PREPARE TRANSACTION 'it''s old'")
    assert patient.worse("xmin") == []
    patient.limits = NONE
    patient.conninfo = database.admin
    text = f'session {open_one.info.backend_pid} of {database.user} "forgotten", idle in transaction'
    patient.cure("xmin", f"a transaction is open for .*: {text}", "warning")
    patient.cure("xmin", 'transaction "it\'s old" was prepared .* ago', "warning")


def test_slot_that_holds_back_vacuum(odd: Patient) -> None:
    database = odd.database
    database.admin_execute("SELECT pg_create_logical_replication_slot('left behind', 'pgoutput')".replace(" b", "_b"))
    for _ in range(3):
        database.execute("CREATE TABLE one (); DROP TABLE one")
    odd.limits = NONE
    odd.cure("xmin", r'replication slot "left_behind" holds back \d+ transactions, and nobody uses it', "warning")


def test_dead_rows_and_autovacuum(patient: Patient) -> None:
    database = patient.database
    database.execute("ALTER TABLE task SET (autovacuum_enabled = false)")
    with database.connect() as session:  # which tells the statistics when it ends
        session.execute("INSERT INTO task (input, plan) SELECT 'SELECT 1', 'infinity' FROM generate_series(1, 100)")
        session.execute("DELETE FROM task")
    patient.limits = NONE
    eventually(lambda: [one for one in patient.worse("space") if "dead rows" in one.what])
    patient.cure("space", "public.task has .* dead rows and 0 living ones, and was never vacuumed", "warning")
    patient.cure("space", "autovacuum is off for public.task", "warning")


def test_autovacuum_that_is_off(odd: Patient) -> None:
    odd.cure("space", "autovacuum is off on this server", "warning")


def test_index_that_a_backlog_has_made_large(patient: Patient) -> None:
    database = patient.database
    database.execute("ALTER TABLE task SET (autovacuum_enabled = false)")
    database.execute(
        "INSERT INTO task (input, plan)"
        " SELECT 'SELECT 1', now() + interval '1 d' * random() FROM generate_series(1, 5000)"
    )
    database.execute("DELETE FROM task")
    database.execute("VACUUM task")
    patient.limits = Limits(index=50_000)
    patient.cure("space", "index public.task_due has .* kB for 0 rows", "note")


def test_history_without_an_end(patient: Patient) -> None:
    patient.limits = NONE
    patient.cure("history", "the table has .* kB, and finished rows are kept for ever", "note")


# Rights and settings


@pytest.fixture
def plain(patient: Patient) -> Iterator[str]:
    """A role that owns nothing."""
    database = patient.database
    name = f"plain {database.name}"
    database.admin_execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    patient.conninfo = database.server.conninfo(database.name, name)
    yield name
    for text in ("DROP OWNED BY {} CASCADE", "DROP ROLE {}"):
        database.admin_execute(sql.SQL(text).format(sql.Identifier(name)))


def test_role_that_lacks_rights(patient: Patient, plain: str) -> None:
    database = patient.database
    database.admin_execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    finding = patient.cure("rights", f'role "{plain}" may not use schema public', "error")
    assert finding.mend == f'GRANT USAGE ON SCHEMA "public" TO "{plain}"'
    patient.cure("rights", 'lacks DELETE, INSERT, SELECT, UPDATE on TABLE "public"."task", .*"task_report"$', "error")
    assert patient.worse("rights") == []
    assert {one.check for one in patient.worse()} <= {"role", "master", "two_phase"}


def test_role_that_serves_a_table_of_somebody_elses(patient: Patient, plain: str) -> None:
    everything = sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(plain))
    patient.database.admin_execute(everything)
    assert patient.worse("layout") == []
    patient.database.execute("DROP TRIGGER pgtask_wake ON task")
    patient.cure("layout", "may not alter public.task, which is not its own", "error")


def test_rights_of_everybody(patient: Patient) -> None:
    database = patient.database
    database.execute("GRANT INSERT, SELECT ON task TO PUBLIC; GRANT UPDATE (input) ON task TO PUBLIC")
    database.execute("GRANT ALL ON task_master TO PUBLIC")
    database.admin_execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    patient.cure("public", 'everybody has INSERT, UPDATE on TABLE "public"."task"', "error")
    patient.cure("public", 'everybody has .*UPDATE on TABLE "public"."task_master"', "error")
    patient.cure("public", "everybody may create objects in schema public", "warning")
    assert patient.worse("public") == []


def test_superuser_and_one_who_sees_little(patient: Patient) -> None:
    database = patient.database
    patient.cure("role", "does not see what other roles' sessions do", "note")
    database.admin_execute(f'ALTER ROLE "{database.user}" SUPERUSER')
    patient.cure("role", f"role {database.user} is a superuser", "warning")
    patient.conninfo = database.admin
    finding = patient.find("role", "role postgres is a superuser", "warning")
    assert finding.mend.startswith("CREATE ROLE pgtask LOGIN")


def test_row_security(patient: Patient) -> None:
    patient.database.execute("ALTER TABLE task ENABLE ROW LEVEL SECURITY; ALTER TABLE task FORCE ROW LEVEL SECURITY")
    patient.cure("role", "row security hides rows of the table", "error")


@pytest.mark.parametrize(
    ("name", "value", "severity"),
    [
        ("default_transaction_read_only", "on", "error"),
        ("statement_timeout", "30s", "note"),
        ("idle_in_transaction_session_timeout", "30s", "note"),
        ("lock_timeout", "1s", "note"),
        ("default_transaction_isolation", "serializable", "note"),
        ("synchronous_commit", "off", "note"),
        ("session_replication_role", "replica", "error"),
    ],
)
def test_settings_that_harm(patient: Patient, name: str, value: str, severity: str) -> None:
    database = patient.database
    targets = [f'ROLE "{database.user}"', f'DATABASE "{database.name}"']
    targets.append(f"{targets[0]} IN {targets[1]}")
    for target in targets:
        database.admin_execute(f"ALTER {target} SET {name} = '{value}'")
        finding = patient.cure("settings", f"^{name} is .* for ", severity)
        assert f"ALTER {target} RESET {name}".replace('"', "") in finding.mend
    assert patient.worse("settings") == []


def test_setting_of_the_whole_server(odd: Patient) -> None:
    odd.database.admin_execute("ALTER SYSTEM SET lock_timeout = '1min'")
    odd.database.admin_execute("SELECT pg_reload_conf()")
    try:
        eventually(lambda: odd.worse("settings"))
        finding = odd.cure("settings", "lock_timeout is 60000 ms$", "note")
        assert finding.mend == f"ALTER ROLE \"{odd.database.user}\" SET lock_timeout = '0'"
    finally:
        odd.database.admin_execute("ALTER SYSTEM RESET lock_timeout")
        odd.database.admin_execute("SELECT pg_reload_conf()")


def test_connections_of_the_role_and_the_database(patient: Patient) -> None:
    database = patient.database
    database.admin_execute(f'ALTER ROLE "{database.user}" CONNECTION LIMIT 10')
    database.admin_execute(f'ALTER DATABASE "{database.name}" CONNECTION LIMIT 10')
    patient.cure("connections", "role .* may have 10 connections", "warning")
    patient.cure("connections", "database .* may have 10 connections", "warning")


def test_connections_of_the_server(odd: Patient, odd_server: embedded.Server) -> None:
    odd.more["workers"] = 40
    finding = odd.find("connections", r"of 25 connections 3 are reserved, and others have \d+", "warning")
    odd.mend(finding)
    odd.database.close()
    odd_server.restart()
    assert odd.worse("connections") == []


def test_prepared_transactions_where_inserts_notify(patient: Patient) -> None:
    patient.cure("two_phase", "transactions may be prepared", "note")


# The way to the server


def test_clock_that_is_wrong(patient: Patient) -> None:
    make_clock(patient.database)
    set_clock(patient.database, "5 min")
    five = r"(5 min( \d s)?|4 min 5\d s)"  # some time may pass between the two looks
    patient.find("clock", f"this machine's clock is {five} behind the server's", "warning")
    set_clock(patient.database, "-5 min")
    patient.find("clock", f"this machine's clock is {five} ahead of the server's", "warning")
    set_clock(patient.database, "0")
    assert patient.worse("clock") == []


def test_standby(own_database: Database, own_server: embedded.Server) -> None:
    install(own_database)
    with own_server.standby() as copy:
        patient = Patient(own_database, copy.conninfo(own_database.name, own_database.user))
        assert eventually(lambda: [one for one in patient.worse("server") if "is a standby" in one.what])
        both = f"{own_server.conninfo()} {copy.conninfo()}"
        hosts, ports = [",".join(re.findall(rf"\b{name}=(\S+)", both)) for name in ("host", "port")]
        patient.conninfo = f"host={hosts} port={ports} dbname={own_database.name} user={own_database.user}"
        backwards = [",".join(reversed(names.split(","))) for names in (hosts, ports)]
        patient.conninfo = (
            f"host={backwards[0]} port={backwards[1]} dbname={own_database.name} user={own_database.user}"
        )
        patient.cure("server", "this server is a standby", "error")


@pytest.fixture
def pooler(database: Database) -> Iterator[str]:
    """A conninfo that leads through a PgBouncer in transaction mode."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("there is no pgbouncer; apt-get install pgbouncer")
    directory = socket_directory()
    place = conninfo_to_dict(database.tcp)
    (directory / "users").write_text(f'"{database.user}" "secret"\n', "utf-8")
    (directory / "pgbouncer.ini").write_text(
        f"""[databases]
* = host={place["host"]} port={place["port"]}
[pgbouncer]
unix_socket_dir = {directory}
listen_port = 6432
auth_type = plain
auth_file = {directory}/users
pool_mode = transaction
""",
        "utf-8",
    )
    command = [program, str(directory / "pgbouncer.ini")]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        shutil.chown(directory, "postgres")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: (directory / ".s.PGSQL.6432").exists() or process.poll() is not None)
        yield f"host={directory} port=6432 dbname={database.name} user={database.user} password=secret"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)


def socket_directory() -> Path:
    """Short enough for a socket, and open to another user."""
    directory = Path("/tmp") / f"pgb_{secrets.token_hex(4)}"
    directory.mkdir(mode=0o755)
    return directory


def test_connection_through_a_pooler(patient: Patient, pooler: str) -> None:
    patient.conninfo = pooler
    finding = patient.cure("pooler", r"through a pooler, such as PgBouncer: backend \d+ answers", "error")
    assert "secret" not in finding.mend


# Odd tables, and what it costs


@pytest.mark.parametrize("parted", [False, True])
def test_odd_names_and_values(database: Database, parted: bool) -> None:
    database.schema, database.table = 'sch "e%s" {task}', "t a'b%s"
    names = sql.Identifier(database.schema, database.table)
    database.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(database.schema)))
    if parted:
        database.execute(PARTED.replace("TABLE task", f"TABLE {names.as_string(None)}", 1))
        default = sql.Identifier(database.schema, "a part")
        database.execute(sql.SQL("CREATE TABLE {} PARTITION OF {} DEFAULT").format(default, names))
    install(database, database.schema, database.table)
    for plan in ("-infinity", "infinity", "4713-01-01 BC", "294276-01-01"):
        for max in (2147483647, -2147483648):
            database.insert("SELECT 1", plan=plan, max=max, group="g'r%s {id}", active="178000000 years")
    patient = Patient(database)
    patient.limits = NONE
    checked = {one.check for one in patient.findings()}
    assert checked == {one.name for one in checks.CHECKS}
    assert not [one for one in patient.worse() if "cannot be looked at" in one.what]
    database.execute(sql.SQL("ALTER TABLE {} DISABLE TRIGGER pgtask_wake").format(names))
    patient.cure("triggers", "trigger pgtask_wake of .*t a'b%s\" is disabled", "error")


def test_all_checks_read_little_of_a_large_table(patient: Patient) -> None:
    database = patient.database
    database.execute(
        """INSERT INTO task (input, "group", plan, state, max)
        SELECT 'SELECT 1', 'g' || n % 7, now() - interval '1 min' * (n % 50),
            CASE WHEN n % 2 = 0 THEN 'PLAN' ELSE 'DONE' END::state, n % 3
        FROM generate_series(1, 100000) AS n"""
    )
    scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'task'"
    # A session tells what it has scanned when it ends.
    others = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'"""
    eventually(lambda: not database.execute(others))
    database.execute("SELECT pg_stat_clear_snapshot()")
    before = database.execute(scans)
    finding = next(one for one in patient.worse() if one.check == "backlog")
    assert re.match(r"50,000 or more tasks due, the first for 4[89] min", finding.what)
    assert finding.mend.startswith("pgtask-master ")
    eventually(lambda: not database.execute(others))
    database.execute("SELECT pg_stat_clear_snapshot()")
    assert database.execute(scans) == before
