"""Tasks with `remote` run on another database, by the same rules, with nothing of the daemon's own credentials."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT

import pytest
from psycopg import conninfo

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held
from tests.fixtures.processes import processes, title
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SECRET = "wonder{}land"
SWALLOW = """DO $$BEGIN
    LOOP
        BEGIN PERFORM pg_sleep(0.05); EXCEPTION WHEN query_canceled THEN NULL; END;
    END LOOP;
END$$"""


class Remote:
    """The other database: `conninfo` reaches it by TCP with the password that the server asks for."""

    def __init__(self, base: Served, encoding: str = "UTF8") -> None:
        near = base.database
        self.database = Database(near.server, f"{near.name}_{encoding.lower()}", near.user)
        near.admin_execute(
            f'CREATE DATABASE "{self.database.name}" OWNER "{near.user}"'
            f" ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
        )
        self.database.execute("CREATE TABLE effect (what text)")
        self.conninfo = self.database.tcp

    def with_(self, **parameters: str | None) -> str:
        return conninfo.make_conninfo(self.conninfo, **parameters)

    def without(self, *names: str) -> str:
        left = {name: value for name, value in conninfo.conninfo_to_dict(self.conninfo).items() if name not in names}
        return conninfo.make_conninfo("", **left)

    def effects(self, what: str) -> int:
        return int(self.database.execute("SELECT count(*) FROM effect WHERE what = %s", [what])[0][0])

    def sessions(self) -> list[int]:
        """The backends of tasks."""
        query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND client_addr IS NOT NULL"
        return [pid for (pid,) in self.database.execute(f"{query} AND pid <> pg_backend_pid()")]

    def active(self, text: str) -> bool:
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
        return bool(self.database.execute(f"{query} AND pid <> pg_backend_pid() AND strpos(query, %s) > 0", [text]))


@contextlib.contextmanager
def remote_of(base: Served, encoding: str = "UTF8") -> Iterator[Remote]:
    one = Remote(base, encoding)
    try:
        yield one
    finally:
        one.database.close()
        base.database.admin_execute(f'DROP DATABASE "{one.database.name}" WITH (FORCE)')


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("remote")) as one:
        one.database.execute(f"ALTER ROLE \"{one.database.user}\" PASSWORD '{SECRET}'")
        one.database.password = SECRET
        yield one


@pytest.fixture(scope="module")
def remote(base: Served) -> Iterator[Remote]:
    with remote_of(base) as one:
        one.database.password = SECRET
        one.conninfo = one.database.tcp
        yield one


def first_line(row: dict[str, str]) -> str:
    return row["error"].splitlines()[0]


def detail(row: dict[str, str]) -> str:
    [line] = [line for line in row["error"].splitlines() if line.startswith("DETAIL:  ")]
    return line


# The same rules


def test_task_runs_on_the_other_database(base: Served, remote: Remote) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('there'); SELECT current_database() AS a, NULL AS b; SELECT 1 AS c",
        remote=remote.conninfo,
        quote='"',
    )
    assert (row["state"], row["error"]) == ("DONE", None)
    assert row["output"] == f'INSERT 0 1\n"a"\t"b"\n"{remote.database.name}"\t\\N\n1'
    assert remote.effects("there") == 1


def test_uri_is_a_conninfo_too(base: Served, remote: Remote) -> None:
    given = conninfo.conninfo_to_dict(remote.conninfo)
    uri = "postgresql://{user}:{secret}@{host}:{port}/{dbname}".format(secret="wonder%7B%7Dland", **given)
    assert base.then_next("SELECT 1", remote=uri)["output"] == "1"


def test_error_on_the_remote_is_the_tasks_error(base: Served, remote: Remote) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('undone');\nSELECT missing", remote=remote.conninfo)
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "42703", 1)
    assert row["error"] == (
        'ERROR:  column "missing" does not exist at character 46\n'
        "STATEMENT:  INSERT INTO effect VALUES ('undone');\n\tSELECT missing"
    )
    assert remote.effects("undone") == 0


def test_copy_and_notices_come_from_the_remote(base: Served, remote: Remote) -> None:
    row = base.then_next(
        "COPY (SELECT generate_series(1, 3)) TO STDOUT; DO $$BEGIN RAISE NOTICE 'far'; END$$", remote=remote.conninfo
    )
    assert row["output"] == "1\n2\n3\nDO"
    assert row["notice"].startswith("NOTICE:  far")
    row = base.then_next("COPY effect FROM STDIN", remote=remote.conninfo)
    assert first_line(row) == "ERROR:  COPY from stdin failed: COPY FROM STDIN is not supported"


def test_vacuum_runs_on_the_remote(base: Served, remote: Remote) -> None:
    assert base.then_next("VACUUM effect", remote=remote.conninfo)["output"] == "VACUUM"


@pytest.mark.parametrize("input", ["", "-- nothing"])
def test_input_without_a_statement_is_done(base: Served, remote: Remote, input: str) -> None:
    row = base.then_next(input, remote=remote.conninfo, group=f"nothing {input}")
    assert (row["state"], row["output"], row["error"]) == ("DONE", None, None)


def test_task_without_output_is_removed(base: Served, remote: Remote) -> None:
    base.database.wait(base.database.insert("SELECT 1 WHERE false", remote=remote.conninfo), gone=True)


def test_open_transaction_is_committed_and_an_aborted_one_undone(base: Served, remote: Remote) -> None:
    assert base.then_next("BEGIN; INSERT INTO effect VALUES ('open')", remote=remote.conninfo)["state"] == "DONE"
    assert remote.effects("open") == 1
    row = base.then_next("BEGIN; INSERT INTO effect VALUES ('failed'); SELECT 1/0", remote=remote.conninfo)
    assert (row["state"], row["code"], remote.effects("failed")) == ("FAIL", "22012", 0)


def test_remote_run_sees_its_task(base: Served, remote: Remote) -> None:
    row = base.then_next(
        "SELECT current_setting('pg_task.id'), current_setting('pg_task.group')",
        remote=remote.conninfo,
        group="seen",
        header=False,
    )
    assert row["output"] == f"{row['id']}\tseen"


def test_repeated_remote_task_plans_its_next_row(base: Served, remote: Remote) -> None:
    row = base.then_next("SELECT 1", remote=remote.conninfo, repeat="1 year")
    assert base.database.execute("DELETE FROM task WHERE parent = %s RETURNING remote", [row["id"]]) == [
        (remote.conninfo,)
    ]


# The session


def test_session_is_reused_and_clean_for_the_next_task(base: Served, remote: Remote) -> None:
    left = (
        "SELECT pg_backend_pid(); PREPARE mine AS SELECT 1; DECLARE mine CURSOR WITH HOLD FOR SELECT 1; LISTEN mine;"
        " CREATE TEMPORARY TABLE mine (id int); SELECT pg_advisory_lock(4711); SET work_mem = '1MB';"
        " SET client_encoding = 'LATIN1'; SET default_transaction_read_only = on; SET statement_timeout = 100"
    )
    with held(remote.database):  # until all are there: a worker that had none left might not be the one to go on
        base.database.insert(WAIT, remote=remote.conninfo, group="reused")
        pairs = [base.insert_pair(left, remote=remote.conninfo, group="reused") for _ in range(2)]
    rows = [base.database.wait(id) for id, _ in pairs]
    for row, (_, following) in zip(rows, pairs, strict=True):
        base.found_clean(row, following)
    assert [row["state"] for row in rows] == ["DONE", "DONE"]
    assert rows[0]["output"].splitlines()[0] == rows[1]["output"].splitlines()[0]


def test_session_is_left_as_it_is_with_save(base: Served, remote: Remote) -> None:
    inputs = [("SET my.own = 'x'; PREPARE mine AS SELECT 2", True), ("SHOW my.own; EXECUTE mine", False)]
    with held(remote.database):  # until both are there, for one worker
        base.database.insert(WAIT, remote=remote.conninfo, group="saved")
        ids = [
            base.database.insert(input, remote=remote.conninfo, group="saved", save=save, delete=False)
            for input, save in inputs
        ]
    assert [base.database.wait(id)["output"] for id in ids] == ["SET\nPREPARE", "x\n2"]


@pytest.mark.parametrize("input", ["DISCARD ALL", "DEALLOCATE ALL", "SET client_encoding = 'LATIN1'"])
@pytest.mark.parametrize("save", [False, True])
def test_remote_task_that_changes_its_session_costs_the_next_nothing(
    base: Served, remote: Remote, input: str, save: bool
) -> None:
    group = f"{input} {save}"
    ids = [
        base.database.insert(input, remote=remote.conninfo, group=group, save=save, delete=False),
        base.database.insert("SELECT 'é'", remote=remote.conninfo, group=group, delete=False),
    ]
    rows = [base.database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE", "DONE"], rows
    assert rows[1]["output"] == "é"


def test_remote_session_ends_with_its_worker(base: Served, remote: Remote) -> None:
    base.then_next("SELECT 1", remote=remote.conninfo)
    eventually(lambda: not base.master.workers())
    eventually(lambda: not remote.sessions())


def test_session_that_ends_during_the_run_is_the_tasks_error(base: Served, remote: Remote) -> None:
    row = base.then_next("SELECT pg_terminate_backend(pg_backend_pid())", remote=remote.conninfo)
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "08006", 1)
    assert first_line(row) == "ERROR:  the remote session was lost"
    assert "terminating connection due to administrator command" in detail(row)


def test_session_that_ended_between_two_tasks_is_opened_again(base: Served, remote: Remote) -> None:
    base.run("SELECT 1", remote=remote.conninfo, group="between")
    for pid in remote.sessions():
        remote.database.execute("SELECT pg_terminate_backend(%s, 20000)", [pid])  # until it is gone
    row = base.run("SELECT 2", remote=remote.conninfo, group="between")
    assert (row["state"], row["output"]) == ("DONE", "2")


# Time and stop


@pytest.mark.parametrize("input", ["SELECT pg_sleep(30)", "SELECT pg_sleep(0.1); " * 300, SWALLOW])
def test_timeout_bounds_a_remote_run(base: Served, remote: Remote, input: str) -> None:
    row = base.then_next(input, remote=remote.conninfo, timeout="200 ms", group=f"timeout {input[:20]}")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "57014", 1)
    assert first_line(row) == "ERROR:  canceling statement due to statement timeout"
    assert 0.2 <= (row["stop"] - row["start"]).total_seconds() < 20
    eventually(lambda: not remote.active("pg_sleep"))


def test_timeout_of_a_saved_session_is_that_tasks_only(base: Served, remote: Remote) -> None:
    ids = [
        base.database.insert("SELECT 1", remote=remote.conninfo, group="limit", save=True, timeout="3 s", delete=False),
        base.database.insert(
            "SELECT pg_sleep(3.1), 2", remote=remote.conninfo, group="limit", header=False, delete=False
        ),
    ]
    assert [base.database.wait(id)["output"] for id in ids] == ["1", "\t2"]


def test_smaller_limit_of_the_remote_wins(base: Served, remote: Remote) -> None:
    limited = remote.with_(options="-c statement_timeout=1s")
    row = base.run("SELECT pg_sleep(30)", remote=limited, timeout="20 s")
    assert (row["state"], row["code"]) == ("FAIL", "57014")


def test_stop_cancels_a_remote_run_at_once(base: Served, remote: Remote) -> None:
    id, following = base.insert_pair(
        "INSERT INTO effect VALUES ('stopped'); SELECT pg_sleep(61)", remote=remote.conninfo, group="remote stop"
    )
    eventually(lambda: remote.active("pg_sleep(61)"))
    started = time.monotonic()
    base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
    assert base.database.wait(following)["state"] == "DONE"
    assert time.monotonic() - started < 20
    row = base.database.task(id)
    assert row is not None
    assert (row["state"], remote.effects("stopped")) == ("STOP", 0)


# What cannot be used


def test_malformed_conninfo_fails_with_libpqs_words(base: Served) -> None:
    row = base.then_next("SELECT 1", remote="not a conninfo", next_remote=None)
    assert (row["state"], row["attempt"]) == ("FAIL", 1)
    assert row["error"].splitlines() == [
        "ERROR:  PQconninfoParse failed",
        'DETAIL:  missing "=" after "not" in connection info string',
        "STATEMENT:  SELECT 1",
    ]


def test_unknown_option_fails_with_libpqs_words(base: Served) -> None:
    row = base.then_next("SELECT 1", remote="nothing=1", next_remote=None)
    assert row["error"].splitlines()[:2] == [
        "ERROR:  PQconninfoParse failed",
        'DETAIL:  invalid connection option "nothing"',
    ]


@pytest.mark.parametrize(
    "change", [{"port": "99999999"}, {"connect_timeout": "soon"}, {"sslmode": "nothing"}, {"keepalives": "x"}]
)
def test_impossible_value_in_a_conninfo_is_the_tasks_error(
    base: Served, remote: Remote, change: dict[str, str]
) -> None:
    row = base.then_next(
        "SELECT 1", remote=remote.conninfo + " " + " ".join(f"{k}={v}" for k, v in change.items()), next_remote=None
    )
    assert (row["state"], row["attempt"]) == ("FAIL", 1)
    assert next(iter(change.values())) in detail(row)


def test_remote_without_a_password_is_refused(base: Served, remote: Remote) -> None:
    row = base.then_next("SELECT 1", remote=remote.without("password"), next_remote=None)
    assert (row["state"], row["code"]) == ("FAIL", "2F003")
    assert row["error"].splitlines() == [
        "ERROR:  password is required",
        "DETAIL:  Non-superusers must provide a password in the connection string.",
        "STATEMENT:  SELECT 1",
    ]


@pytest.mark.parametrize("text", ["", " ", "dbname=postgres", "password="])
def test_conninfo_that_leaves_all_to_the_daemon_is_refused(base: Served, text: str) -> None:
    row = base.then_next("SELECT 1", remote=text, group=f"left {text}", next_remote=None)
    assert (row["state"], first_line(row)) == ("FAIL", "ERROR:  password is required")


@pytest.mark.parametrize(
    "option",
    [
        "passfile",
        "service",
        "sslkey",
        "sslcert",
        "sslrootcert",
        "sslcrl",
        "sslcrldir",
        "sslpassword",
        "krbsrvname",
        "gsslib",
    ],
)
def test_option_that_reaches_for_the_daemons_credentials_is_refused(
    base: Served, remote: Remote, tmp_path: Path, option: str
) -> None:
    row = base.then_next("SELECT 1", remote=f"{remote.conninfo} {option}={tmp_path}", next_remote=None, group=option)
    assert (row["state"], row["code"]) == ("FAIL", "42501")
    assert first_line(row) == f'ERROR:  remote may not set "{option}"'


def test_server_that_asks_for_no_password_is_refused(base: Served, remote: Remote) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('trusted')", remote=remote.database.conninfo, next_remote=None)
    assert (row["state"], row["code"]) == ("FAIL", "2F003")
    assert detail(row) == "DETAIL:  Non-superusers cannot connect if the server does not request a password."
    assert remote.effects("trusted") == 0
    eventually(lambda: not remote.active("trusted"))


def test_wrong_password_is_the_tasks_error(base: Served, remote: Remote) -> None:
    row = base.then_next("SELECT 1", remote=remote.with_(password="opensesame"), next_remote=None)
    assert (row["state"], row["code"], first_line(row)) == ("FAIL", "08001", "ERROR:  connection to remote failed")
    assert "password authentication failed" in detail(row)
    assert "opensesame" not in row["error"]


def test_configuration_may_allow_what_is_refused(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("allowed")
    with served(server, directory, config="remote_password = false") as one, remote_of(one) as far:
        row = one.then_next("SELECT 1", remote=far.database.conninfo)
        assert (row["state"], row["output"]) == ("DONE", "1")
        trusted = conninfo.make_conninfo(far.database.conninfo, password="", passfile="/dev/null")
        assert one.run("SELECT 2", remote=trusted)["output"] == "2"


# What cannot be reached


def test_closed_port_is_the_tasks_error(base: Served, remote: Remote) -> None:
    with socket.socket() as closed:  # nobody listens there, and nobody else gets it
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])
        row = base.then_next("SELECT 1", remote=remote.with_(port=port), next_remote=None)
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "08001", 1)
    assert first_line(row) == "ERROR:  connection to remote failed"
    assert "Connection refused" in detail(row)
    assert row["error"].splitlines()[-1] == "STATEMENT:  SELECT 1"


def test_unknown_database_is_the_tasks_error(base: Served, remote: Remote) -> None:
    row = base.then_next("SELECT 1", remote=remote.with_(dbname="nowhere at all"), next_remote=None)
    assert (row["state"], first_line(row)) == ("FAIL", "ERROR:  connection to remote failed")
    assert 'database "nowhere at all" does not exist' in detail(row)


@contextlib.contextmanager
def silent(*, full: bool) -> Iterator[str]:
    """The port of somebody who never says a word; with `full`, who does not even take the connection."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0 if full else 16)
        if full:
            for _ in range(4):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(server.getsockname())
        yield str(server.getsockname()[1])


@pytest.mark.parametrize("full", [False, True], ids=["silent", "full backlog"])
def test_address_that_never_answers_is_bounded_by_the_timeout(base: Served, remote: Remote, full: bool) -> None:
    with silent(full=full) as port:
        row = base.then_next(
            "SELECT 1", remote=remote.with_(port=port), timeout="300 ms", next_remote=None, group=f"silent {full}"
        )
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "57014", 1)
    assert first_line(row) == "ERROR:  canceling statement due to statement timeout"
    assert detail(row) == "DETAIL:  The task's timeout is 300 ms."
    assert 0.3 <= (row["stop"] - row["start"]).total_seconds() < 20


def test_address_that_never_answers_is_bounded_by_connect_timeout(base: Served, remote: Remote) -> None:
    with silent(full=False) as port:
        row = base.then_next("SELECT 1", remote=remote.with_(port=port, connect_timeout="1"), next_remote=None)
    assert (row["state"], row["code"]) == ("FAIL", "08001")
    assert 1 <= (row["stop"] - row["start"]).total_seconds() < 20


def test_stop_ends_a_run_that_is_still_connecting(base: Served, remote: Remote) -> None:
    with silent(full=False) as port:
        id, following = base.insert_pair(
            "SELECT 1", remote=remote.with_(port=port), next_remote=None, group="connecting"
        )
        base.database.wait(id, "WORK")
        started = time.monotonic()
        base.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        eventually(lambda: (base.database.task(id) or {})["stop"])
        assert time.monotonic() - started < 20
    assert base.database.wait(following)["state"] == "DONE"
    assert (base.database.task(id) or {})["state"] == "STOP"


def test_stop_of_the_master_puts_a_connecting_run_back(
    server: AnyServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served(server, tmp_path_factory.mktemp("back")) as one, silent(full=False) as port:
        far = conninfo.make_conninfo(one.database.tcp, port=port)
        id = one.database.insert("SELECT 1", remote=far)
        one.database.wait(id, "WORK")
        assert one.master.stop(SIGINT) == 0
        row = one.database.task(id)
        assert row is not None
        assert (row["state"], row["attempt"], row["error"]) == ("PLAN", 0, None)


# Encodings and secrets


def test_remote_in_another_encoding_says_the_same(base: Served) -> None:
    with remote_of(base, "LATIN1") as latin:
        latin.database.password = SECRET
        far = latin.database.tcp
        row = base.then_next("SELECT 'naïve é'; DO $$BEGIN RAISE 'früh'; END$$", remote=far, next_remote=None)
        assert (row["state"], row["output"], first_line(row)) == ("FAIL", "naïve é", "ERROR:  früh")
        chosen = conninfo.make_conninfo(far, client_encoding="LATIN1")
        row = base.then_next("SELECT 'naïve é'; DO $$BEGIN RAISE 'früh'; END$$", remote=chosen, next_remote=None)
        assert (row["output"], first_line(row)) == ("naïve é", "ERROR:  früh")
        row = base.then_next("INSERT INTO effect VALUES ('日本')", remote=chosen, next_remote=None)
        assert (row["state"], row["code"], latin.effects("??")) == ("FAIL", "22P05", 0)


def test_password_is_nowhere_to_be_seen(base: Served, remote: Remote) -> None:
    with held(remote.database):
        input = f"{WAIT}, 'watched'"
        id = base.database.insert(input, remote=remote.conninfo, group="secret", delete=False)
        eventually(lambda: remote.active("watched"))
        titles = [title(one.pid) for one in processes() if one.session == base.master.pid]
    assert any("secret" in one for one in titles), titles
    assert not [one for one in titles if SECRET in one]
    base.database.wait(id)
    for text in (
        remote.with_(port="1"),
        remote.with_(sslmode="nothing"),
        f"{remote.conninfo} {SECRET}",
        f"{remote.conninfo} x=1",
    ):
        row = base.run("SELECT 1", remote=text)
        assert row["state"] == "FAIL"
        assert SECRET not in row["error"]
    assert SECRET not in base.master.log()


def test_groups_with_the_same_name_on_two_remotes_are_two_groups(base: Served, remote: Remote) -> None:
    near = base.database.insert("SELECT pg_sleep(30)", group="two")
    base.database.wait(near, "WORK")
    assert base.run("SELECT 1", remote=remote.conninfo, group="two")["state"] == "DONE"
    base.database.execute("DELETE FROM task WHERE id = %s", [near])
    base.then_next("SELECT 1", group="two")


def test_replication_stream_is_refused_with_a_clear_error(base: Served, remote: Remote) -> None:
    id = base.database.insert("START_REPLICATION 0/0", remote=remote.with_(replication="database"))
    row = base.database.wait(id)
    assert (row["state"], row["code"]) == ("FAIL", "0A000")
    assert row["error"].startswith("ERROR:  a replication connection cannot run tasks\n")
