"""The references: what PostgreSQL and Python can do at best, with nothing around it. Run as `python -m measure.bare`.

Every reference is plain synchronous libpq (`psycopg.pq`) with prepared statements on a bare table: the columns that the
loop needs, a primary key, and an index on (plan, id) of what waits. It does what every queue with these promises must:
the input in a transaction, result and state written in it, the next row taken in it, one durable commit. It has no
groups, no settings of a run, no clean-up between runs, no cancel, no errors, no repetition, no rescue. Each program
says `ready`, waits for a line, does its work, and prints what it found as JSON.
"""

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from psycopg import pq

from measure.ground import BENCH, Ground, Usage
from storm.stand import Broken

TABLE = """CREATE TABLE {0} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, plan timestamptz NOT NULL DEFAULT statement_timestamp(),
    start timestamptz, stop timestamptz, pid integer, attempt integer NOT NULL DEFAULT 0,
    state text NOT NULL DEFAULT 'PLAN', input text NOT NULL, output text)"""
INDEX = "CREATE INDEX ON {0} (plan, id) WHERE state = 'PLAN'"
TAKE = """WITH next AS (
    SELECT id FROM {0} WHERE state = 'PLAN' AND plan <= clock_timestamp()
    ORDER BY plan, id LIMIT 1 FOR UPDATE SKIP LOCKED)
UPDATE {0} AS t SET state = 'WORK', start = clock_timestamp(), pid = pg_backend_pid(), attempt = t.attempt + 1
FROM next WHERE t.id = next.id
RETURNING t.id, t.input, extract(epoch FROM t.start)::float8, extract(epoch FROM t.plan)::float8"""
TURN = """WITH done AS (
    UPDATE {0} SET state = 'DONE', stop = clock_timestamp(), output = $2 WHERE id = $1 AND state = 'WORK')
""" + TAKE.replace("WITH next", ", next")
NEXT = """SELECT extract(epoch FROM plan - clock_timestamp())::float8 FROM {0}
WHERE state = 'PLAN' ORDER BY plan, id LIMIT 1"""
CLOCK = b"SELECT extract(epoch FROM clock_timestamp())::float8"

Row = tuple[bytes, ...]


def create(ground: Ground, table: str = "bare") -> None:
    ground.own(TABLE.format(table), INDEX.format(table))


@contextlib.contextmanager
def running(mode: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """One of the programs below, ready."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    command = [sys.executable, "-m", "measure.bare", mode, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise Broken(f"the reference {mode} did not start")
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    """A line: begin, or end."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def found(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def together(mode: str, count: int, *arguments: object) -> list[Any]:
    """As many of them at once, and what they found."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(mode, *arguments)) for _ in range(count)]
        for process in processes:
            go(process)
        return [found(process) for process in processes]


class Deadlock(Exception):
    """The server has ended the transaction: it, or another, would have waited for ever."""


class Session:
    """A connection that raises on every error."""

    def __init__(self, conninfo: str) -> None:
        self.pgconn = pq.PGconn.connect(conninfo.encode())
        if self.pgconn.status != pq.ConnStatus.OK:
            raise RuntimeError(self.pgconn.get_error_message())

    def prepare(self, name: bytes, query: str) -> None:
        self._well(self.pgconn.prepare(name, query.encode()))

    def run(self, query: bytes) -> Any:
        return self._well(self.pgconn.exec_(query))

    def prepared(self, name: bytes, *values: bytes) -> Row | None:
        return self._row(self._well(self.pgconn.exec_prepared(name, list(values))))

    def pipeline(self, name: bytes, *values: bytes) -> Row | None:
        """This statement and COMMIT, in one round trip. Raises Deadlock when it met another session's."""
        self.pgconn.enter_pipeline_mode()
        self.pgconn.send_query_prepared(name, list(values))
        self.pgconn.send_query_prepared(b"commit", [])
        self.pgconn.pipeline_sync()
        result, commit = self._next(), self._next()
        self._well(self.pgconn.get_result())  # the sync has no None behind it
        self.pgconn.exit_pipeline_mode()
        if result.error_field(pq.DiagnosticField.SQLSTATE) == b"40P01":
            self.run(b"ROLLBACK")
            raise Deadlock
        self._well(commit)
        return self._row(self._well(result))

    def _next(self) -> Any:
        result = self.pgconn.get_result()
        self.pgconn.get_result()
        return result

    def _well(self, result: Any) -> Any:
        if result is None or result.status in (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.PIPELINE_ABORTED):
            raise RuntimeError(result.get_error_message() if result else self.pgconn.get_error_message())
        return result

    @staticmethod
    def _row(result: Any) -> Row | None:
        return tuple(result.get_value(0, at) for at in range(result.nfields)) if result.ntuples else None


def ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def told() -> bool:
    """Whether the line that ends us has come."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


# The programs


def loop(conninfo: str, table: str) -> Any:
    """Two round trips a task until there is none: the input, and finish, next take and COMMIT."""
    session = Session(conninfo)
    session.prepare(b"take", TAKE.format(table))
    session.prepare(b"turn", TURN.format(table))
    session.prepare(b"commit", "COMMIT")
    ready()
    row = session.prepared(b"take")
    count = 0
    while row is not None:
        result = session.run(b"BEGIN;" + row[1])
        output = result.get_value(0, 0) if result.ntuples else result.command_status
        try:
            row = session.pipeline(b"turn", row[0], output)
        except Deadlock:  # two of them that each look at the other's finished row: once more
            continue
        count += 1
    return count


def listen(conninfo: str, table: str, fork: str) -> Any:
    """For each notification a take, a fork if asked for, and a statement; the moments of each, by the server."""
    session = Session(conninfo)
    session.prepare(b"take", TAKE.format(table))
    session.run(b"LISTEN " + table.encode())
    moments = {}
    ready_once()
    while not _waited(session, None):
        while session.pgconn.notifies():
            while (row := session.prepared(b"take")) is not None:
                forked = _fork() if fork == "fork" else 0.0
                seen = float(session.run(CLOCK).get_value(0, 0))
                moments[int(row[0])] = (float(row[2]) + forked, seen)
    return moments


def timer(conninfo: str, table: str) -> Any:
    """Sleeps until the next plan and takes; how late each was."""
    session = Session(conninfo)
    session.prepare(b"take", TAKE.format(table))
    session.prepare(b"next", NEXT.format(table))
    session.prepare(b"turn", TURN.format(table))
    session.prepare(b"commit", "COMMIT")
    late = []
    ready()
    while (following := session.prepared(b"next")) is not None:
        time.sleep(max(0.0, float(following[0])))
        row = session.prepared(b"take")
        while row is not None:
            late.append(float(row[2]) - float(row[3]))
            result = session.run(b"BEGIN;" + row[1])
            row = session.pipeline(b"turn", row[0], result.get_value(0, 0))
    return late


def idle(conninfo: str) -> Any:
    """Waits for notifications that do not come."""
    session = Session(conninfo)
    session.run(b"LISTEN nothing")
    ready_once()
    _waited(session, None)
    return Usage.of(os.getpid()).cpu


def insert(conninfo: str, statement: str, count: str) -> Any:
    """The statement so many times, each in a transaction of its own; the seconds that took."""
    session = Session(conninfo)
    session.prepare(b"insert", statement)
    ready()
    begun = time.monotonic()
    for _ in range(int(count)):
        session.prepared(b"insert")
    return [begun, time.monotonic()]


def load(conninfo: str, rate: str) -> Any:
    """Tasks at a steady rate into groups of their own, until told to end; how many."""
    session = Session(conninfo)
    session.prepare(
        b"insert",
        """INSERT INTO task ("group", input)
        SELECT 'load ' || n % 4, 'SELECT 1' FROM generate_series(1, $1::int) AS n""",
    )
    ready_once()
    begun, sent = time.monotonic(), 0
    while not told():
        owed = int((time.monotonic() - begun) * float(rate)) - sent
        if owed:
            session.prepared(b"insert", str(owed).encode())
            sent += owed
        time.sleep(0.01)
    return sent


def forks(conninfo: str, count: str) -> Any:
    """So many children of one Python process, each with a session; their pids are said, and they end with us."""
    reading, writing = os.pipe()
    there = os.pipe()
    pids = []
    for _ in range(int(count)):
        if not (pid := os.fork()):
            os.close(writing)
            session = Session(conninfo)
            session.run(b"SELECT 1")
            os.write(there[1], b"!")
            os.read(reading, 1)
            os._exit(0)
        pids.append(pid)
        os.read(there[0], 1)
    ready()
    print(json.dumps(pids), flush=True)
    sys.stdin.readline()
    os.close(writing)
    for pid in pids:
        os.waitpid(pid, 0)
    return None


def ticks(_: str) -> Any:
    """An event loop with nothing to do but to be on time: how late its timers are, until told to end."""
    import asyncio

    from measure.lag import Lag

    async def measure() -> list[float]:
        lag = Lag()
        lag.begin(asyncio.get_running_loop())
        while not told():
            await asyncio.sleep(0.1)
        return [late for _, late in lag.ticks]

    ready_once()
    return asyncio.run(measure())


def ready_once() -> None:
    """Begin at once; the line ends us."""
    print("ready", flush=True)


def _waited(session: Session, seconds: float | None) -> bool:
    """Wait for the session; True if the line came that ends us."""
    there = select.select([session.pgconn.socket, sys.stdin], [], [], seconds)[0]
    if session.pgconn.socket in there:
        session.pgconn.consume_input()
    return sys.stdin in there


def _fork() -> float:
    """Seconds until a child runs."""
    reading, writing = os.pipe()
    begun = time.monotonic()
    if not (pid := os.fork()):
        os.write(writing, b"!")
        os._exit(0)
    os.read(reading, 1)
    taken = time.monotonic() - begun
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    return taken


def planned(count: int, seconds: float, seed: int) -> list[float]:
    """Moments, in seconds from now."""
    chance = random.Random(seed)
    return sorted(chance.uniform(1.0, 1.0 + seconds) for _ in range(count))


MODES: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (loop, listen, timer, idle, insert, load, forks, ticks)
}

if __name__ == "__main__":
    print(json.dumps(MODES[sys.argv[1]](*sys.argv[2:])), flush=True)
