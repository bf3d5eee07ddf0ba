"""What is broken and mended: a server, a fresh database for each scenario, and the masters that serve it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pgtask.embedded import Server
from storm.kinds import LEDGER, OWN

WATCH = 'read -r line && exit; kill -KILL "$1" 2>/dev/null'
"""A line on its input means that the master was ended; the end of the input, that we died."""

OWNER, OTHER = "app", "other"
PASSWORD = "secret"
PATIENCE = 40.0
"""Seconds that anything may take that must happen: a server that comes up, a master that leads or ends."""


class Broken(Exception):
    """Something that must happen did not; the run cannot go on."""


@dataclass(kw_only=True, eq=False)
class Master:
    """A `pgtask-master`, with a shell that ends it should we be killed."""

    process: subprocess.Popen[bytes]
    watch: subprocess.Popen[bytes]
    log: Path
    sleeps_until: float | None = None  # stopped by SIGSTOP until then (time.monotonic())

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def workers(self) -> list[int]:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(pid) for pid in children if _title(pid).startswith("pgtask: worker")]
        return []

    def stop(self) -> None:
        """As if the machine had no time for it: it is woken later, and does not know."""
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        self.sleeps_until = None
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.release()

    def release(self) -> None:
        self.process.wait()
        if self.watch.poll() is None:
            self.watch.communicate(b"ended\n")


def launch(command: Sequence[str], log: Path) -> Master:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    shell = ["sh", "-c", WATCH, "sh", str(process.pid)]
    watch = subprocess.Popen(shell, stdin=subprocess.PIPE, start_new_session=True)
    return Master(process=process, watch=watch, log=log)


class Stand:
    """The server with one scenario's database, its masters, and all that was ever started for it."""

    def __init__(self, server: Server, name: str, directory: Path) -> None:
        self.server = server
        self.name = name
        self.directory = directory
        self.masters: list[Master] = []
        self.complaints: list[str] = []
        self._started: list[Master] = []

    @property
    def conninfo(self) -> str:
        return self.server.conninfo(self.name, OWNER, password=PASSWORD)

    @property
    def other(self) -> str:
        """Of the database that remote tasks run on; by TCP, where the server asks for the password."""
        return self.server.tcp(f"{self.name}_other", OTHER, password=PASSWORD)

    def session(self, dbname: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        """A superuser's."""
        return psycopg.connect(self.server.conninfo(dbname or self.name), autocommit=True)

    def ask(self, query: str, parameters: Sequence[Any] = (), dbname: str | None = None) -> list[tuple[Any, ...]]:
        """A superuser's statement; waits for a server that is recovering."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with self.session(dbname) as session:
                    cursor = session.execute(query.encode(), parameters)
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise Broken(f"the server does not answer: {error}") from error
                time.sleep(0.02)

    # Masters

    def start_master(self) -> Master:
        log = self.directory / f"{self.name}-{len(self._started) + 1}.log"
        command = [sys.executable, "-m", "pgtask", "--crashes", "1000000", "--log-level", "debug", self.conninfo]
        master = launch(command, log)
        self.masters.append(master)
        self._started.append(master)
        return master

    def kill_master(self, master: Master) -> None:
        """kill -9, and the next one at once."""
        self.masters.remove(master)
        master.kill()
        self.start_master()

    def leaders(self) -> list[Master]:
        """Who serves the table: one of the masters, or nobody."""
        rows = self.ask("SELECT pid FROM task_master")
        return [master for master in self.masters if rows == [(master.pid,)]]

    def tend(self) -> None:
        """Wake who has slept long enough; a master that ended by itself is a complaint, and replaced."""
        for master in list(self.masters):
            if master.sleeps_until is not None and time.monotonic() >= master.sleeps_until:
                master.wake()
            if not master.alive():
                self.complaints.append(f"master {master.pid} ended by itself with status {master.process.returncode}")
                self.masters.remove(master)
                master.release()
                self.start_master()

    def calm(self) -> None:
        """The end of all faults: everybody awake, the server up."""
        self.server.start_again()
        for master in self.masters:
            if master.sleeps_until is not None:
                master.wake()
        self.ask("SELECT 1")

    def end_masters(self) -> None:
        """Stop them as an administrator would. None may fail, or leave a process behind, or say that it has a bug."""
        for master in self.masters:
            master.process.terminate()
        for master in self.masters:
            try:
                status = master.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.complaints.append(f"master {master.pid} did not stop")
                continue
            if status != 0:
                self.complaints.append(f"master {master.pid} stopped with status {status}")
            master.release()
        deadline = time.monotonic() + PATIENCE
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.complaints += [f"left behind: process {pid}: {_title(pid)}" for pid in left]
        self.destroy()
        for master in self._started:
            if "\nTraceback" in master.log.read_text("utf-8", "replace"):
                self.complaints.append(f"a traceback in {master.log}")

    def destroy(self) -> None:
        """Whatever still runs of them ends now."""
        for master in self.masters:
            master.kill()
        self.masters.clear()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes of the sessions that our masters began: they and their workers, orphans too."""
        began = {master.pid for master in self._started}
        return [pid for pid, session in _sessions() if session in began]


@contextlib.contextmanager
def stand(server: Server, name: str, directory: Path) -> Iterator[Stand]:
    """A fresh database for a scenario; its masters are gone afterwards, however the scenario ends."""
    made = Stand(server, name, directory)
    _create(made)
    try:
        yield made
    finally:
        made.destroy()


def _create(made: Stand) -> None:
    for role, database in ((OWNER, made.name), (OTHER, f"{made.name}_other")):
        if not made.ask("SELECT 1 FROM pg_roles WHERE rolname = %s", [role], "postgres"):
            login = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(PASSWORD))
            made.ask(login.as_string(None), dbname="postgres")
        made.ask(f"CREATE DATABASE {database} OWNER {role}", dbname="postgres")
        made.ask(f"SET ROLE {role}; {LEDGER} {OWN if role == OWNER else ''}", dbname=database)


def _sessions() -> Iterator[tuple[int, int]]:
    """Every process that is no zombie, and the session it belongs to."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:4]
            if state not in "ZX":
                yield int(entry.name), int(session)


def _title(pid: int | str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").strip().decode("utf-8", "replace")
    return ""
