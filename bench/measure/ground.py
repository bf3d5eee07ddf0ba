"""Where it is measured: a server, a database for each subject, masters, and what the kernel knows of processes.

Ours and the reference share the database, and so the server's memory, disk and settings. Commits are durable.
"""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask.embedded import Binaries, Server
from storm.stand import Broken, Master, launch

SERVER = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "log_line_prefix": "%m %p %d ",
}
"""Durable. A checkpoint in the middle of one run and not of the next would be noise."""

OWNER = "app"
BENCH = Path(__file__).resolve().parent.parent
PATIENCE = 120.0
TICK = 0.1

ASLEEP = """SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock' AND objid = 4294967295 AND objsubid = 2
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
UNFINISHED = """SELECT id FROM {} WHERE id >= %s AND state::text IN ('PLAN', 'TAKE', 'WORK') ORDER BY id LIMIT 1"""


class Site:
    """The server: one of our own, or one that somebody named (as a superuser)."""

    def __init__(self, binaries: Binaries | None, dsn: str | None) -> None:
        self._binaries = binaries
        self._dsn = dsn
        self.server: Server | None = None
        self.directory = Path()

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pgtask-bench-")))
        if self._dsn is None:
            self.server = self._stack.enter_context(Server.start(self._binaries, settings=SERVER))
            with self.session("postgres") as session:
                session.execute(f"CREATE ROLE {OWNER} LOGIN")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def conninfo(self, dbname: str, owner: bool = True) -> str:
        """The owner's of a subject's database, or the superuser's."""
        if self.server is None:
            return make_conninfo(self._dsn or "", dbname=dbname)
        return self.server.conninfo(dbname, OWNER if owner else "postgres")

    def session(self, dbname: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.conninfo(dbname, owner=False), autocommit=True)

    @property
    def described(self) -> str:
        with self.session(self.maintenance) as session:
            return session.execute("SHOW server_version").fetchall()[0][0]

    @property
    def maintenance(self) -> str:
        return "postgres" if self._dsn is None else str(conninfo_to_dict(self._dsn).get("dbname") or "postgres")

    def execute(self, *statements: str) -> None:
        with self.session(self.maintenance) as session:
            for statement in statements:
                session.execute(statement.encode())

    @contextlib.contextmanager
    def ground(self, name: str) -> Iterator["Ground"]:
        """A fresh database, gone afterwards."""
        database = f"bench_{name}"
        owned = f" OWNER {OWNER}" if self.server else ""
        self.execute(f"DROP DATABASE IF EXISTS {database}", f"CREATE DATABASE {database}{owned}")
        made = Ground(self, database)
        try:
            yield made
        finally:
            made.close()
            self.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


class Ground:
    """One database, and the masters that serve tables of it."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.name = name
        self.conninfo = site.conninfo(name)
        self._session = site.session(name)
        self._masters = 0

    def close(self) -> None:
        self._session.close()

    def ask(self, query: str, parameters: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
        """A superuser's statement."""
        cursor = self._session.execute(query.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def value(self, query: str, parameters: Sequence[Any] | None = None) -> Any:
        return self.ask(query, parameters)[0][0]

    def own(self, *statements: str) -> None:
        """Statements of the owner's."""
        with psycopg.connect(self.conninfo, autocommit=True) as session:
            for statement in statements:
                session.execute(statement.encode())

    # Masters

    @contextlib.contextmanager
    def master(
        self, *arguments: str, table: str = "task", program: Sequence[str] = ("-m", "pgtask"), sleeps: bool = True
    ) -> Iterator[Master]:
        """A real one that leads, and sleeps where it can; it must stop as it should."""
        conninfo = [] if "--config" in arguments else ["--table", table, self.conninfo]
        master = self._launch([sys.executable, *program, *arguments, *conninfo])
        try:
            until(lambda: self._leads(master, table), "no master leads", master)
            if sleeps:
                self.settle()
            yield master
            master.process.terminate()
            if master.process.wait(PATIENCE):
                raise Broken(f"the master ended with status {master.process.returncode}{said(master)}")
            if "Traceback" in (text := said(master)):
                raise Broken(f"the master has a bug{text}")
        finally:
            # With its socket closed, every worker ends.
            master.kill()

    def install(self, *tables: str) -> None:
        """Let masters make their tables."""
        for table in tables or ["task"]:
            with self.master(table=table):
                pass

    def settle(self, tables: int = 1) -> None:
        """Wait until the master sleeps, be it between the pieces of a walk through all groups."""
        until(lambda: self.value(ASLEEP) >= tables, "the master does not fall asleep")

    def drained(self, table: str = "task", after: int = 0) -> None:
        """Wait until no row with a greater id is unfinished; each look begins where the last one found one."""
        first = after + 1

        def done() -> bool:
            nonlocal first
            rows = self.ask(UNFINISHED.format(table), [first])
            first = rows[0][0] if rows else first
            return not rows

        until(done, f"tasks of {table} do not end", patience=1800)

    def _launch(self, command: list[str]) -> Master:
        self._masters += 1
        path = os.pathsep.join([str(BENCH), str(BENCH.parent)])
        with changed_environment(PYTHONPATH=path):
            return launch(command, self.site.directory / f"{self.name}-{self._masters}.log")

    def _leads(self, master: Master, table: str) -> bool:
        if self.value("SELECT to_regclass(%s) IS NULL", [f"{table}_master"]):
            return False
        return self.ask(f"SELECT pid FROM {table}_master WHERE term > 0") == [(master.pid,)]

    # The server's log, of this database

    @contextlib.contextmanager
    def logged(self, setting: str, value: str) -> Iterator[Callable[[], list[str]]]:
        """Sessions that begin in here log more; what they said in here can be asked for."""
        self.ask(f"ALTER DATABASE {self.name} SET {setting} = '{value}'")
        start = len(self._log())
        try:
            yield lambda: records(self._log()[start:], self.name)
        finally:
            self.ask(f"ALTER DATABASE {self.name} RESET {setting}")

    def _log(self) -> str:
        return self.site.server.log_text() if self.site.server else ""


def records(text: str, database: str) -> list[str]:
    """The log's records of one database, without prefix, each in one piece."""
    head = re.compile(rf"^\S+ \S+ \S+ \d+ {re.escape(database)} (?=[A-Z]+:)")
    found: list[str] = []
    mine = False
    for line in text.splitlines():
        if not line.startswith("\t"):
            mine = head.match(line) is not None
            found += [head.sub("", line)] if mine else []
        elif mine:
            found[-1] += "\n" + line.removeprefix("\t")
    return found


def until(true: Callable[[], bool], otherwise: str, master: Master | None = None, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not true():
        if master is not None and not master.alive():
            raise Broken(f"{otherwise}: it ended{said(master)}")
        if time.monotonic() > deadline:
            raise Broken(otherwise + (said(master) if master else ""))
        time.sleep(TICK)


def said(master: Master) -> str:
    text = master.log.read_text("utf-8", "replace").strip()
    return f":\n{text[-2000:]}" if text else ""


@contextlib.contextmanager
def changed_environment(**values: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# What the kernel knows


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of one process since it began: seconds on a processor, and how often it went to sleep."""

    cpu: float
    sleeps: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        nanoseconds = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
        status = Path(f"/proc/{pid}/status").read_text()
        return cls(cpu=nanoseconds / 1e9, sleeps=int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[0]))

    def since(self, earlier: "Usage") -> "Usage":
        return Usage(cpu=self.cpu - earlier.cpu, sleeps=self.sleeps - earlier.sleeps)


def pss(pid: int) -> float:
    """The process's share of memory, in MB: what it has alone, and its part of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s*(\d+)", text, re.M)[0]) / 1024
