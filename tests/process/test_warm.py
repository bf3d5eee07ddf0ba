"""Sessions that wait for workers: taken over with nothing lost and no copy left, replaced in silence."""

import asyncio
import contextlib
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGHUP, SIGKILL

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask.config import load
from pgtask.master import warm
from pgtask.objects import Names
from pgtask.telling import Telling
from pgtask.worker.worker import Spec
from tests.fixtures.database import Database
from tests.fixtures.hostile import PEM
from tests.fixtures.locks import passes
from tests.fixtures.master import Master
from tests.fixtures.processes import descriptors, frozen
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

ASK = "SELECT pg_backend_pid()"
WAIT = "SELECT pg_advisory_xact_lock_shared(727)"
"""Runs until the test lets go of the lock."""


def waiting(database: Database) -> set[int]:
    """The backends of the sessions that wait for a worker."""
    query = (
        "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgtask warm' AND state = 'idle'"
    )
    return {row[0] for row in database.admin_execute(query, [database.name])}


def ready(database: Database, count: int = 1, *, but: Collection[int] = ()) -> set[int]:
    """Them, once there are so many, and none of those."""

    def there() -> set[int]:
        found = waiting(database)
        return found if len(found) == count and not found.intersection(but) else set()

    return eventually(there)


def calm(one: Master) -> None:
    """Nothing to worry about was logged; that tasks fail which are to fail is none."""
    assert one.logged("( WARNING | ERROR )(?!.*(running_as_root|connected_as_superuser|task_failed|take_slow))") == []


@contextlib.contextmanager
def encrypted(port: int) -> Iterator[int]:
    """A port that passes on what comes encrypted, for a server that may have been built without."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=encrypt, args=[listener, port])
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def encrypt(listener: socket.socket, port: int) -> None:
    """Until the listener is shut down and all clients have gone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    with ThreadPoolExecutor() as clients, contextlib.suppress(OSError):
        while True:
            clients.submit(relay, context, listener.accept()[0], port)


def relay(context: ssl.SSLContext, plain: socket.socket, port: int) -> None:
    """Until one of the two ends."""
    with plain, contextlib.suppress(OSError):
        if not plain.recv(8):  # the request to encrypt
            return
        plain.sendall(b"S")
        with (
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(("127.0.0.1", port)) as server,
        ):
            while True:
                for one in [client] if client.pending() else select.select([client, server], [], [])[0]:
                    if not (data := one.recv(65536)):
                        return
                    (server if one is client else client).sendall(data)


def takes_over(database: Database, one: Master, input: str = ASK) -> str:
    """What the task says, which a new worker runs in a session that was ready."""
    before = ready(database)
    row = database.wait(database.insert(input, delete=False))
    assert {row["pid"]} == before, one.log()
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    one.wait_log(rf"worker_forked .*backend={row['pid']}\b")
    return str(row["output"])


@pytest.mark.parametrize("way", ["conninfo", "tcp"])
def test_worker_takes_over_a_session_that_is_ready(database: Database, master: Start, way: str) -> None:
    one = master("--linger", "0", getattr(database, way), tables=1)
    for _ in range(3):
        takes_over(database, one)
    calm(one)


def test_encrypted_session_is_taken_over(database: Database, master: Start) -> None:
    port = int(conninfo_to_dict(database.tcp)["port"] or 0)
    with encrypted(port) as place:
        there = {"host": "127.0.0.1", "port": place, "sslmode": "require"}
        one = master("--linger", "0", make_conninfo(database.tcp, **there), tables=1)
        for _ in range(2):
            assert takes_over(database, one, "SELECT repeat('x', 100000)") == "x" * 100000
        calm(one)
        one.stop()


def test_session_that_was_taken_over_is_as_good_as_any(database: Database, master: Start) -> None:
    one = master("--linger", "20s", database.conninfo, tables=1)
    [backend] = ready(database)
    ours = "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"
    inputs = ["PREPARE p AS SELECT 1", ours, "SELECT 1/0", "VACUUM task", "SHOW application_name", *[ASK] * 20]
    database.execute("INSERT INTO task (input, delete) SELECT unnest(%s::text[]), false", [inputs])
    eventually(lambda: len(database.tasks("state IN ('DONE', 'FAIL')")) == 25)
    rows = database.tasks()
    assert {row["pid"] for row in rows} == {backend}
    assert [row["state"] for row in rows] == ["DONE", "DONE", "FAIL", *["DONE"] * 22]
    assert rows[1]["output"] == "0"
    assert re.fullmatch(r"pgtask public task group \d+", rows[4]["output"])
    calm(one)


def test_master_and_worker_have_no_socket_in_common(database: Database, master: Start) -> None:
    one = master("--warm", "2", "--linger", "20s", database.conninfo, tables=1)
    ready(database, 2)
    hold = database.connect()
    hold.execute("SELECT pg_advisory_lock(727)")
    ids = [database.insert(WAIT, group=f"g{n}", delete=False) for n in range(3)]
    backends = {database.wait(id, "WORK")["pid"] for id in ids}
    ready(database, 2, but=backends)
    processes = [one.pid, *one.workers()]
    sockets = [{name for name in descriptors(pid) if name.startswith("socket:")} for pid in processes]
    assert len(processes) == 4
    assert len(set.union(*sockets)) == sum(map(len, sockets))
    hold.execute("SELECT pg_advisory_unlock(727)")
    for id in ids:
        database.wait(id)


def test_sessions_end_with_a_master_that_is_killed(database: Database, master: Start) -> None:
    one = master("--warm", "3", database.conninfo, tables=1)
    ready(database, 3)
    one.expect_exit = -SIGKILL
    one.stop(SIGKILL)
    eventually(lambda: not waiting(database))


def test_session_that_the_server_ended_is_replaced_without_a_word(database: Database, master: Start) -> None:
    one = master("--linger", "0", database.conninfo, tables=1)
    before = ready(database)
    database.admin_execute("SELECT pg_terminate_backend(%s)", [*before])
    ready(database, but=before)
    takes_over(database, one)
    calm(one)


def test_task_runs_although_the_session_ends_when_it_is_handed_over(database: Database, master: Start) -> None:
    one = master("--linger", "0", database.conninfo, tables=1)
    for _ in range(3):
        [backend] = ready(database)
        with frozen(one.pid):
            id = database.insert(ASK, delete=False)
            database.admin_execute("SELECT pg_terminate_backend(%s, 10000)", [backend])
        row = database.wait(id)
        assert (row["state"], row["attempt"]) == ("DONE", 1)
    calm(one)


def test_changed_setting_of_the_role_holds_at_once_and_for_the_sessions_that_wait(
    database: Database, master: Start
) -> None:
    one = master("--linger", "0", "--warm", "2", database.conninfo, tables=1)
    before = ready(database, 2)
    database.execute(f"ALTER ROLE \"{database.user}\" SET work_mem = '5MB'")
    ask = "SHOW work_mem"
    row = database.wait(database.insert(ask, delete=False))
    assert (row["output"], row["attempt"]) == ("5MB", 1)
    assert row["pid"] not in before
    after = ready(database, 2, but=before)
    row = database.wait(database.insert(ask, delete=False))
    assert row["output"] == "5MB"
    assert row["pid"] in after
    calm(one)


def test_role_without_a_connection_left_has_its_tasks_run_all_the_same(database: Database, master: Start) -> None:
    one = master("--linger", "300ms", database.conninfo, tables=1)
    ready(database)
    database.admin_execute(f'ALTER ROLE "{database.user}" CONNECTION LIMIT 3')  # the test, the master, one more
    for _ in range(2):
        id = database.insert(ASK, delete=False)
        assert database.wait(id)["attempt"] == 1
        one.wait_log("warm_session_refused")
        one.wait_log("worker_ended")
    calm(one)


def test_master_that_stands_by_keeps_none(database: Database, master: Start) -> None:
    first = master(database.conninfo)
    before = ready(database)
    master(database.conninfo, wait=False).wait_log("standing_by")
    assert waiting(database) == before
    first.stop()
    ready(database, but=before)


def test_reload_changes_how_many_there_are(database: Database, master: Start, tmp_path: Path) -> None:
    def config(count: int) -> str:
        return f"[[database]]\nwarm = {count}\nconninfo = '''{database.conninfo}'''\n"

    one = master(config=config(1))
    ready(database)
    for count in (3, 0, 1):
        (tmp_path / "master0.toml").write_text(config(count))
        one.signal(SIGHUP)
        eventually(lambda: len(waiting(database)) == count)  # noqa: B023
    one.stop()
    eventually(lambda: not waiting(database))


def test_session_that_waits_says_nothing(database: Database, master: Start) -> None:
    master("--warm", "2", database.conninfo, tables=1)
    ready(database, 2)
    query = "SELECT pid, state_change FROM pg_stat_activity WHERE application_name = 'pgtask warm' AND datname = %s"
    before = database.admin_execute(query, [database.name])
    passes(1)
    assert database.admin_execute(query, [database.name]) == before


def test_sessions_are_there_again_after_the_server_was(own_database: Database, master: Start) -> None:
    one = master("--linger", "0", own_database.conninfo, tables=1)
    before = ready(own_database)
    own_database.server.restart()  # type: ignore[union-attr]
    ready(own_database, but=before)
    takes_over(own_database, one)


def test_old_session_is_replaced(database: Database, master: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    master(database.conninfo).stop()
    monkeypatch.setattr(warm, "OLDEST", 0.3)
    store = Names(schema="public", table="task").store()
    spec = Spec(
        conninfo=database.conninfo,
        label="it",
        title="it",
        encoding="UTF8",
        store=store,
        telling=Telling(load(None, [database.conninfo], {}, {}).tables[0]),
        remote_password=True,
        batch_time=0.01,
    )

    async def look() -> None:
        keeper = warm.Warm()
        keeper.keep(spec, 2)
        seen: set[int] = set()
        while len(seen) < 5:
            await asyncio.sleep(0.01)
            seen |= waiting(database)
            eventually(lambda: len(waiting(database)) <= 2)  # of one that is closed the backend may still be ending
        keeper.drop()

    asyncio.run(asyncio.wait_for(look(), 20))
    eventually(lambda: not waiting(database))
