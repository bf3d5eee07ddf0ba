"""Workers as ps and the server see them: forked on demand, draining, lingering, reused, ended without a trace."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import KEY, WAIT, falls_asleep
from tests.fixtures.master import Master
from tests.fixtures.processes import descriptors, idle, processes
from tests.fixtures.proxy import Proxy
from tests.fixtures.wait import eventually


class Gate:
    """Tasks whose input is WAIT run until it is opened."""

    def __init__(self, database: Database) -> None:
        self._session = database.connect()
        self._session.execute("SELECT pg_advisory_lock(%s)", [KEY])

    def open(self) -> None:
        self._session.execute("SELECT pg_advisory_unlock_all()")


@pytest.fixture
def gate(database: Database) -> Iterator[Gate]:
    made = Gate(database)
    yield made
    made.open()


def sessions(database: Database) -> list[int]:
    """The backends of our workers, and that of one which is opened ahead of need until it is called warm."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name ~ '^pgtask(?! master$| warm$)'"
    return [row[0] for row in database.admin_execute(query, [database.name])]


def forked(one: Master, count: int = 1) -> list[int]:
    """The workers that the master has forked, once there are so many."""
    return [int(line.split("worker=")[1].split()[0]) for line in one.wait_log("worker_forked", count)]


def running(one: Master, *ids: int) -> list[int]:
    """The worker of each of these tasks, by its title."""

    def found() -> list[int]:
        doing = {pid: re.search(r" running (\d+) in group ", one.title(pid)) for pid in one.workers()}
        by_id = {int(match[1]): pid for pid, match in doing.items() if match}
        return [by_id[id] for id in ids] if set(ids) <= by_id.keys() else []

    return eventually(found)


def warm(database: Database) -> bool:
    """Does a session wait for a worker?"""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND application_name = 'pgtask warm'"
    return bool(database.admin_execute(query, [database.name]))


def test_no_worker_stays_where_nothing_is_due(database: Database, master: Callable[..., Master]) -> None:
    """If the insert woke the master, one may have been forked to look."""
    one = master(database.conninfo)
    database.insert("SELECT 1", plan="infinity")
    one.wait_log("leading")
    eventually(lambda: one.workers() == [] and not sessions(database))
    assert len(one.logged("worker_forked")) <= 1


def test_each_slot_of_a_group_gets_a_worker_of_its_own(
    database: Database, master: Callable[..., Master], gate: Gate
) -> None:
    one = master(database.conninfo)
    ids = [database.insert(WAIT, group="g", max=2) for _ in range(3)]
    ids.append(database.insert(WAIT, group="other"))
    backends = {database.wait(id, "WORK")["pid"] for id in ids}
    assert len(backends) == len(set(running(one, *ids))) == len(one.workers()) == 4
    gate.open()
    for id in ids:
        assert database.wait(id)["state"] == "DONE"


def test_worker_drains_its_group_with_one_session(
    database: Database, master: Callable[..., Master], gate: Gate
) -> None:
    one = master(database.conninfo)
    first = database.insert(WAIT, delete=False)
    database.wait(first, "WORK")
    ids = [database.insert("SELECT pg_backend_pid()", delete=False) for _ in range(50)]
    gate.open()
    rows = [database.wait(id) for id in [first, *ids]]
    assert len({row["pid"] for row in rows}) == 1
    assert {row["output"] for row in rows[1:]} == {str(rows[0]["pid"])}
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)
    assert len(one.wait_log("worker_forked")) == 1


def test_idle_worker_is_ended_after_linger(database: Database, master: Callable[..., Master]) -> None:
    one = master("--linger", "300ms", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    [worker] = forked(one)
    one.wait_log(rf"worker_ended worker={worker} .*exit status 0")
    eventually(lambda: not one.children())
    eventually(lambda: not sessions(database))


def test_lingering_worker_is_reused_for_another_group_without_a_fork(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--linger", "20s", database.conninfo, tables=1)
    pids = set()
    for n in range(5):
        pids.add(database.wait(database.insert("SELECT 1", group=f"group {n}", delete=False))["pid"])
        eventually(lambda: idle(one.workers()[0]))  # it says so after its commit
    assert len(pids) == 1
    assert len(one.logged("worker_forked")) == 1


def test_spare_workers_wait_ahead_and_are_replaced(
    database: Database, master: Callable[..., Master], gate: Gate
) -> None:
    one = master("--spare", "2", "--linger", "100ms", database.conninfo, tables=1)
    eventually(lambda: sum(one.title(pid).endswith(" idle") for pid in one.workers()) == 2)
    spare = one.workers()
    id = database.insert(WAIT, delete=False)
    database.wait(id, "WORK")
    assert running(one, id)[0] in spare
    eventually(lambda: sum(one.title(pid).endswith(" idle") for pid in one.workers()) == 2)
    gate.open()
    database.wait(id)
    eventually(lambda: len(one.workers()) == 2)


def test_spare_workers_give_way_where_others_need_their_places(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    other = new_database()
    one = master("--spare", "1", "--workers", "1", database.conninfo, other.conninfo, tables=2)
    for _ in range(3):
        for place in (database, other):
            assert place.wait(place.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert len(one.logged("worker_forked")) < 30


def test_500_workers_leave_no_zombie_no_descriptor_and_no_session(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--linger", "0", "--workers", "8", database.conninfo, tables=1)
    database.wait(database.insert("SELECT 1", delete=False))
    one.wait_log("worker_ended")
    eventually(lambda: warm(database))
    before = descriptors(one.pid)
    database.execute(
        "INSERT INTO task (input, \"group\", count, delete) SELECT 'SELECT 1', 'g' || n % 40, 1, false"
        " FROM generate_series(1, 500) AS n"
    )
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(501,)], timeout=90)
    forked = one.wait_log("worker_forked", 501)
    one.wait_log("worker_ended .*exit status 0", len(forked))
    eventually(lambda: not one.children())
    assert [p for p in processes() if p.session == one.pid and p.state == "Z"] == []
    eventually(lambda: not sessions(database))
    eventually(lambda: warm(database))
    eventually(lambda: len(descriptors(one.pid)) <= len(before))


def test_worker_with_too_old_or_too_many_runs_takes_no_more(database: Database, master: Callable[..., Master]) -> None:
    master(database.conninfo)
    ids = [database.insert("SELECT 1", count=2, delete=False) for _ in range(6)]
    pids = [database.wait(id)["pid"] for id in ids]
    assert all(pids.count(pid) <= 2 for pid in pids)


def test_copy_of_much_data_needs_memory_in_proportion_to_its_output(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--linger", "60 s", database.conninfo)
    id = database.insert("COPY (SELECT repeat('x', 99) FROM generate_series(1, 200000)) TO STDOUT", delete=False)
    [(size,)] = database.execute("SELECT octet_length(output) FROM task WHERE id = %s", [database.wait(id)["id"]])
    assert size == 20_000_000
    worker = one.worker("idle")
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text())
    assert int(peak) * 1024 < 60_000_000 + 8 * size
    one.stop(SIGINT)


def test_no_spare_worker_is_forked_when_the_table_is_removed_during_a_look(
    database: Database,
    new_database: Callable[..., Database],
    new_proxy: Callable[..., Proxy],
    master: Callable[..., Master],
    tmp_path: Path,
) -> None:
    """Nobody would end it, and the table would be served for ever."""
    proxy, other = new_proxy(database.tcp), new_database()
    stays = f'[[database]]\nconninfo = "{other.conninfo}"\n'
    file = tmp_path / "pgtask.toml"
    file.write_text(f'[master]\nspare = 1\n[[database]]\nconninfo = "{proxy.conninfo}"\n{stays}')
    one = master("--config", str(file), tables=2)
    eventually(lambda: len(one.workers()) == 2)
    falls_asleep(database)
    trap = proxy.trap(b"-infinity", name="pgtask master", deaf=True)
    database.execute("INSERT INTO task (input, \"group\") VALUES ('SELECT 1', 'a'), ('SELECT 1', 'a')")
    eventually(trap.sprung.is_set)
    file.write_text(f"[master]\nspare = 1\n{stays}")
    one.signal(SIGHUP)
    one.wait_log("table_removed")
    eventually(lambda: len(one.workers()) == 1)
    proxy.hear()
    eventually(lambda: one.title().startswith("pgtask: master") and "(1 table leading," in one.title())
