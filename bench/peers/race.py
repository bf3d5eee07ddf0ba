"""Other queues at the same work on the same server, each in a database of its own, with settings they recommend.

They are installed into directories beside this file, so that their dependencies do not meet ours. A job runs one SQL
statement and stores its text result, as ours do. Where a choice had to be made it was made in their favour: the
statement does both at once, the last finish is not in their time, their latency begins when the insert has returned.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from measure import pickup, tasks
from measure.figure import Course, Outcome, quantile, subject
from measure.ground import Ground, changed_environment, until
from measure.tasks import Work
from storm.stand import Broken, launch

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
MODULES = HERE / "node_modules"
GAP = 0.1
PATIENCE = 300.0
"""Seconds for one of a peer's programs that should end by itself."""

RATE = "SELECT count(*) / extract(epoch FROM max(at) - min(at))::float8 FROM result"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another queue: how its program is run, and what it was set to."""

    name: str
    command: Sequence[str]
    settings: str
    package: str


PYTHON = str(VENV / "bin/python")
PEERS = (
    Peer(
        name="procrastinate",
        command=[PYTHON, str(HERE / "run_procrastinate.py")],
        settings="concurrency 4",
        package="procrastinate",
    ),
    Peer(
        name="pgqueuer",
        command=[PYTHON, str(HERE / "run_pgqueuer.py")],
        settings="asyncpg, batch_size 100",
        package="pgqueuer",
    ),
    Peer(
        name="chancy",
        command=[PYTHON, str(HERE / "run_chancy.py")],
        settings="asyncio executor, concurrency 100, eager_polling",
        package="chancy",
    ),
    Peer(
        name="graphile-worker",
        command=["node", str(HERE / "run_graphile.mjs")],
        settings="24 at once, 500 fetched at a time, finishes batched",
        package="graphile-worker",
    ),
)
VARIABLES = {"host": "PGHOST", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER", "password": "PGPASSWORD"}


@subject
def peers(course: Course) -> Outcome:
    """10,000 jobs of one SQL statement given to other queues, and how soon each starts one job every 100 ms."""
    outcome = Outcome()
    count, drops = course.size(10_000, 200), course.size(300, 10)
    racers = list(_installed(course, outcome))
    rates, starts, tails = {}, {}, {}
    for racer in racers:
        marks = {"mark": 2.0} if racer.name == "graphile-worker" else {}
        against = f"{racer.name} ({racer.settings})"
        rates[racer.name] = {
            case: outcome.figure(name, "tasks/s", against=against, headline=True, **(marks if case == "batch" else {}))
            for case, name in (("plain", "pgtask, 4 workers"), ("batch", "pgtask, 4 workers, batch 50"))
        }
        starts[racer.name] = outcome.figure("start, p50", "ms", against=racer.name, better="less", headline=True)
        tails[racer.name] = outcome.figure("start, p99", "ms", against=racer.name, better="less")
    pooled: dict[str, list[float]] = {}
    with course.site.ground("peers") as ground:
        ground.install()
        for _ in course.rounds():
            theirs = {}
            for racer in list(racers):
                try:
                    theirs[racer.name] = _race(course, racer, count, drops)
                except Broken as error:
                    racers.remove(racer)
                    outcome.note(f"{racer.name}: left out from here on: {error}")
            course.say("pgtask")
            ours = _rates(ground, count)
            late = _latencies(ground, drops)
            pooled.setdefault("pgtask", []).extend(late)
            for name, (rate, latencies) in theirs.items():
                for case, value in ours.items():
                    rates[name][case].add(value, rate)
                starts[name].add(quantile(late, 0.5), quantile(latencies, 0.5))
                tails[name].add(quantile(late, 0.99), quantile(latencies, 0.99))
                pooled.setdefault(name, []).extend(latencies)
    outcome.curves["latency"] = {name: pickup.thinned(values) for name, values in pooled.items()}
    outcome.note(
        "Latency: from when the insert had returned to the job's statement. All but "
        "pgtask run a job at least once: its work and the note that it is done commit apart."
    )
    return outcome


def _rates(ground: Ground, count: int) -> Mapping[str, float]:
    found = {}
    for name, columns, values in (("plain", "max", "3"), ("batch", "max, batch", "3, 50")):
        work = Work(count=count, columns=columns, values=values)
        with ground.master():
            found[name] = tasks.ours(ground, work)
    return found


def _latencies(ground: Ground, count: int) -> list[float]:
    """Milliseconds from when the insert had returned to the input's first statement, with a worker that lingers."""
    ground.own("TRUNCATE task")
    with ground.master(), psycopg.connect(ground.conninfo, autocommit=True) as client:
        pickup.insert(client, "task")
        time.sleep(0.5)
        commits: dict[int, float] = {}
        begun = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, begun + (number + 1) * GAP - time.monotonic()))
            commits.update({key: after for key, (_, after) in pickup.commit(client, "task").items()})
        ground.drained()
        moments = {key: first for key, _, first in ground.ask(pickup.STARTS)}
    return [(moments[key] - commit) * 1000 for key, commit in commits.items()]


# A peer's turn


def _race(course: Course, racer: Peer, count: int, drops: int) -> tuple[float, list[float]]:
    """Jobs a second, and milliseconds until a start."""
    course.say(racer.name)
    with course.site.ground(f"peer_{racer.name.replace('-', '_')}") as ground:
        _program(ground, racer, "install")
        with _working(ground, racer):
            _program(ground, racer, "fill", "1")
            until(lambda: ground.value("SELECT count(*) FROM result") == 1, f"{racer.name} does not work")
            ground.own("TRUNCATE result")
            ground.ask("CHECKPOINT")
            _program(ground, racer, "fill", str(count))
            until(
                lambda: ground.value("SELECT count(*) FROM result") == count, f"{racer.name} does not end", patience=600
            )
            rate = ground.value(RATE)
            time.sleep(1.0)
            ground.own("TRUNCATE result")
            moments = json.loads(_program(ground, racer, "trickle", str(drops), str(GAP)))
            until(lambda: ground.value("SELECT count(*) FROM result") == drops, f"{racer.name} does not end")
            at = dict(ground.ask("SELECT job, extract(epoch FROM at)::float8 FROM result"))
    return float(rate), [(at[int(number)] - moment) * 1000 for number, moment in moments.items()]


def _server(ground: Ground) -> dict[str, str]:
    """The database, in the variables that every peer's library reads."""
    parts = conninfo_to_dict(ground.conninfo)
    return {VARIABLES[name]: str(value) for name, value in parts.items() if name in VARIABLES and value is not None}


def _program(ground: Ground, racer: Peer, *arguments: str) -> str:
    environment = {**os.environ, **_server(ground)}
    command = [*racer.command, *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Broken(f"{racer.name} {arguments[0]} does not end") from None
    if done.returncode:
        raise Broken(f"{racer.name} {arguments[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


@contextlib.contextmanager
def _working(ground: Ground, racer: Peer) -> Iterator[None]:
    log = ground.site.directory / f"{racer.name}.log"
    with changed_environment(**_server(ground)):
        process = launch([*racer.command, "work"], log)
    try:
        yield
        if not process.alive():
            raise Broken(f"{racer.name} ended by itself:\n{log.read_text()[-3000:]}")
    finally:
        process.kill()


# How they come here


def _installed(course: Course, outcome: Outcome) -> Iterator[Peer]:
    """Those that could be installed; of the others the report says so."""
    for racer in PEERS:
        course.say(f"installing {racer.name}")
        node = racer.command[0] == "node"
        trouble = _install_node() if node else _install_python(racer)
        if trouble:
            outcome.note(f"{racer.name}: left out, it could not be installed: {trouble}")
            continue
        version = _node_version(racer) if node else _python_version(racer)
        outcome.note(f"{racer.name} {version}: {racer.settings}")
        yield racer


def _install_python(racer: Peer) -> str:
    """Each by itself: one that is not to be had leaves the others."""
    if not Path(PYTHON).exists() and (trouble := _failed([sys.executable, "-m", "venv", str(VENV)])):
        return trouble
    if _python_version(racer):
        return ""
    lines = (HERE / "requirements.txt").read_text("utf-8").split()
    wanted = [line for line in lines if line.startswith((racer.package, "psycopg["))]
    return _failed([PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted])


def _install_node() -> str:
    if (MODULES / "graphile-worker").exists():
        return ""
    return _failed(["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"])


def _failed(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return str(error)
    return (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1] if done.returncode else ""


def _python_version(racer: Peer) -> str:
    query = f"from importlib.metadata import version; print(version({racer.package!r}))"
    done = subprocess.run([PYTHON, "-c", query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip()


def _node_version(racer: Peer) -> str:
    told: Any = json.loads((MODULES / racer.package / "package.json").read_text("utf-8"))
    return str(told["version"])
