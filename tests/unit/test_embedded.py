"""The throw-away server that all other tests stand on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from pgtask import embedded
from pgtask.errors import UserError
from tests.fixtures.processes import processes
from tests.fixtures.server import FAST
from tests.fixtures.wait import eventually

OWNER = """
import sys
from pgtask.embedded import Server
server = Server.start()
print(server.pid, server.directory, flush=True)
sys.stdin.read()
"""


def answer(conninfo: str, query: str = "SELECT 1") -> object:
    with psycopg.connect(conninfo, autocommit=True) as session:
        row = session.execute(query.encode()).fetchone()
        return row and row[0]


def alive(pid: int) -> bool:
    return any(one.pid == pid and one.state not in "ZX" for one in processes())


@pytest.mark.parametrize("binaries", embedded.available(), ids=str)
def test_every_server_at_hand_starts_and_answers_on_socket_and_tcp(binaries: embedded.Binaries) -> None:
    with embedded.Server.start(binaries, settings=FAST) as server:
        assert answer(server.conninfo()) == 1
        assert answer(server.tcp()) == 1
        assert int(str(answer(server.conninfo(), "SHOW server_version_num"))) // 10000 == binaries.version
        assert answer(server.conninfo(), "SHOW server_encoding") == "UTF8"
        assert answer(server.conninfo(), "SHOW fsync") == "off"


def test_restart_keeps_port_and_data(own_server: embedded.Server) -> None:
    with psycopg.connect(own_server.conninfo()) as session:
        session.execute("CREATE TABLE kept (id int)")
    port, pid = own_server.port, own_server.pid
    own_server.restart()
    assert own_server.port == port
    assert own_server.pid != pid
    assert answer(own_server.conninfo(), "SELECT count(*) FROM kept") == 0


def test_server_killed_with_sessions_at_work_starts_again(own_server: embedded.Server) -> None:
    with closing(psycopg.connect(own_server.conninfo(), autocommit=True)) as session:
        session.execute("CREATE TABLE kept (id int)")
        session.pgconn.send_query(b"SELECT pg_sleep(60)")
        own_server.kill()
        assert own_server.pid is None
        own_server.start_again()
        assert answer(own_server.conninfo(), "SELECT count(*) FROM kept") == 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_stopped_server_leaves_no_process(own_server: embedded.Server, mode: str) -> None:
    pid = own_server.pid
    assert pid
    family = [pid, *(one.pid for one in processes() if one.parent == pid)]
    own_server.stop(mode)  # type: ignore[arg-type]
    assert own_server.pid is None
    eventually(lambda: not any(map(alive, family)))
    own_server.stop()
    own_server.start_again()
    assert answer(own_server.conninfo()) == 1


def test_leaving_the_context_removes_the_directory() -> None:
    with embedded.Server.start(settings=FAST, listen=False) as server:
        assert server.directory.is_dir()
    assert not server.directory.exists()


def test_password_is_asked_for_by_tcp_only(own_server: embedded.Server) -> None:
    assert answer(own_server.conninfo()) == 1
    assert answer(own_server.tcp()) == 1
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        answer(own_server.tcp(password="wrong"))


def test_settings_may_hold_quotes(new_server: Callable[..., embedded.Server]) -> None:
    server = new_server(cluster_name="it's")
    assert answer(server.conninfo(), "SHOW cluster_name") == "it's"


def test_wrong_setting_fails_with_the_servers_own_words(new_server: Callable[..., embedded.Server]) -> None:
    with pytest.raises(embedded.ServerError, match='unrecognized configuration parameter "no_such_setting"'):
        new_server(no_such_setting="1")


def test_unknown_version_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        embedded.find(8)
    assert str(caught.value).startswith("no PostgreSQL 8 server on this machine; there is ")
    assert "\n" not in str(caught.value)
    assert str(embedded.available()[0].version) in str(caught.value)


def test_given_directory_must_be_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        embedded.Server.start(directory=tmp_path)
    assert (tmp_path / "file").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_server_does_not_outlive_its_killed_owner(sig: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        pid, directory = owner.stdout.readline().split()
        assert alive(int(pid))
        owner.send_signal(sig)
    eventually(lambda: not alive(int(pid)))
    eventually(lambda: not Path(directory).exists())


def test_versions_are_listed_oldest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedded.main(["versions"]) == 0
    versions = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert versions == sorted({one.version for one in embedded.available()})


def test_standby_follows_its_primary_and_serves_when_it_is_promoted(own_server: embedded.Server) -> None:
    with own_server.standby() as standby:
        with psycopg.connect(own_server.conninfo()) as session:
            session.execute("CREATE TABLE kept AS SELECT 7 AS id")
        eventually(lambda: answer(standby.conninfo(), "SELECT to_regclass('kept') IS NOT NULL"))
        assert answer(standby.tcp(), "SELECT pg_is_in_recovery()") is True
        own_server.kill()
        answer(standby.conninfo(), "SELECT pg_promote()")
        assert answer(standby.tcp(), "INSERT INTO kept VALUES (8) RETURNING id") == 8
