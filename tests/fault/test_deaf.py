"""A network that goes deaf for ever: the sockets stay open, and nothing passes.

Each case has a table of its own under one master, and all go deaf together, since what helps is waiting.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from pgtask import config
from pgtask.async_session import AsyncSession
from pgtask.process import Children
from tests.fixtures.database import Database, drop
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.locks import falls_asleep
from tests.fixtures.master import Master, end, launch, rows_left
from tests.fixtures.proxy import Proxy
from tests.fixtures.served import create_fresh
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

FINISH = b"SET CONSTRAINTS ALL IMMEDIATE"
COMMITTED = b"COMMIT\0"
ONCE = f"""{ENTRY}; SELECT pg_sleep(CASE WHEN attempt = 1 THEN 5 ELSE 0 END)
    FROM task WHERE id = current_setting('pg_task.id')::bigint"""

CASES = ("waiting", "running", "before the commit", "after the commit")


class Case:
    """A table, the proxy before its server, and when nothing passed any more."""

    def __init__(self, server: AnyServer) -> None:
        self.database: Database = create_fresh(server)
        self.proxy = Proxy(self.database.tcp)
        self.ledger = Ledger(self.database)
        self.deaf_at = 0.0

    def since(self) -> float:
        return time.monotonic() - self.deaf_at

    def masters(self, where: str = "true") -> int:
        """How many sessions of the master the server has, of those that fit."""
        query = f"""SELECT count(*) FROM pg_stat_activity
            WHERE application_name = 'pgtask master' AND datname = '{self.database.name}' AND {where}"""
        return int(self.database.admin_execute(query)[0][0])


class Scene:
    """All cases under one master, a moment after each went deaf."""

    def __init__(self, cases: dict[str, Case], master: Master) -> None:
        self.cases, self.master = cases, master

    def settled(self, name: str, seconds: float) -> Case:
        """The case, once its tasks have run within so many seconds of going deaf."""
        case = self.cases[name]
        case.ledger.settled(max(0.1, seconds - case.since()))
        return case

    def logged(self, name: str, event: str) -> list[str]:
        return self.master.logged(rf"{event} .*{self.cases[name].database.name}")


@pytest.fixture(scope="module")
def scene(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    cases = {name: Case(server) for name in CASES}
    entries = [entry(name, case) for name, case in cases.items()]
    directory = tmp_path_factory.mktemp("deaf")
    file = directory / "master.toml"
    file.write_text("\n".join(entries), "utf-8")
    master = launch(("--config", str(file)), {}, directory / "master.log")
    try:
        master.wait_log("leading", len(cases))
        for name, case in cases.items():
            go_deaf(name, case)
        yield Scene(cases, master)
    finally:
        for case in cases.values():
            case.proxy.hear()
        problems = end(master)
        for case in cases.values():
            problems += rows_left(case.database)
            case.proxy.close()
            case.database.close()
            drop(case.database)
    assert not problems, "\n".join(problems)


def entry(name: str, case: Case) -> str:
    """The master looks after its workers every second, but says nothing to the server where it is to wait."""
    safety = "60s" if name == "waiting" else "1s"
    return f'[[database]]\nconninfo = {json.dumps(case.proxy.conninfo)}\nsafety = "{safety}"\nwarm = 0\n'


def go_deaf(name: str, case: Case) -> None:
    """Each in its own way; there is a task to run in every case."""
    if name == "waiting":
        falls_asleep(case.database)
        assert case.proxy.deafen("pgtask master") == 1
        case.ledger.fill(1)
    elif name == "running":
        case.ledger.fill(1, input=ONCE)
        eventually(lambda: case.database.tasks("state = 'WORK'"))
        assert case.proxy.deafen("pgtask worker") == 1
    else:
        answer = COMMITTED if name == "after the commit" else None
        trap = case.proxy.trap(FINISH, answer=answer, name="pgtask worker", deaf=True)
        case.ledger.fill(1, groups=1)
        assert trap.sprung.wait(20)
        case.ledger.fill(1, groups=1)  # waits for the slot
    case.deaf_at = time.monotonic()


def test_master_that_waits_notices_within_seconds_and_the_server_ends_its_session(scene: Scene) -> None:
    case = scene.settled("waiting", 90)
    assert len(scene.logged("waiting", "table_down")) == 1
    assert len(scene.logged("waiting", "table_up")) == 1
    assert case.masters() == 1


def test_run_of_a_deaf_worker_is_undone_and_repeated(scene: Scene) -> None:
    case = scene.settled("running", 90)
    assert case.database.tasks()[0]["attempt"] == 2
    assert len(scene.logged("running", "run_lost")) == 1
    assert scene.logged("running", "table_down") == []


def test_worker_that_is_deaf_before_its_commit_has_done_nothing(scene: Scene) -> None:
    case = scene.settled("before the commit", 90)
    assert [row["attempt"] for row in case.database.tasks()] == [2, 1]


def test_worker_that_is_deaf_after_its_commit_gives_its_slot_back(scene: Scene) -> None:
    case = scene.settled("after the commit", 90)
    assert case.database.tasks()[0]["attempt"] == 1


def test_statement_that_is_not_answered_in_time_ends_the_session(
    database: Database, new_proxy: Callable[..., Proxy]
) -> None:
    proxy = new_proxy(database.tcp)
    [table] = config.load(None, [proxy.conninfo], {}, {}).tables

    async def ask() -> str:
        async with await AsyncSession.open(table, Children(), name="pgtask test") as session:
            assert proxy.deafen("pgtask test") == 1
            with pytest.raises(psycopg.OperationalError) as lost, session.bounded(1.2):
                await session.conn.execute("SELECT 1")
            return str(lost.value)

    assert asyncio.run(ask()) == "the server gave no answer for 1 s"
