"""The scenarios: each has a name, an explanation that --help prints, and one fault that strikes again and again."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import psycopg

from storm.clients import NAME
from storm.stand import Master, Stand

SESSIONS = f"""SELECT pid FROM pg_stat_activity
    WHERE usename IN ('app', 'other') AND application_name <> '{NAME}' ORDER BY pid"""
"""The sessions of masters and workers, those of remote tasks too."""

BACKENDS = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() ORDER BY pid"
"""Every process of the server that works for somebody, or in the background."""

TICK = 0.05
LEADING = 10.0
"""Seconds that a master may need to lead before it is killed again; half of them get less than half of it."""

STILL = (11.0, 16.0)
"""Seconds that a leader is stopped for: the server ends its session after ten, and the other one takes over."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What was broken, and when it surely was (time.time())."""

    at: float
    what: str

    @classmethod
    def now(cls, what: str) -> "Strike":
        return cls(at=time.time(), what=what)


Fault = Callable[[Stand, Random], Strike | None]
"""Breaks something, and returns when that is mended; None if there was nothing to break."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`pause` is the shortest and longest time between two faults, in seconds."""

    name: str
    doc: str
    fault: Fault
    masters: int
    pause: tuple[float, float]


SCENARIOS: dict[str, Scenario] = {}


def scenario(*, pause: tuple[float, float], masters: int = 1) -> Callable[[Fault], Fault]:
    """Make a scenario of a fault; its name and explanation are the function's."""

    def register(fault: Fault) -> Fault:
        doc = " ".join((fault.__doc__ or "").split())
        SCENARIOS[fault.__name__] = Scenario(name=fault.__name__, doc=doc, fault=fault, masters=masters, pause=pause)
        return fault

    return register


@scenario(pause=(0.1, 0.6))
def workers(stand: Stand, chance: Random) -> Strike | None:
    """kill -9 of one to three workers."""
    there = [pid for master in stand.masters for pid in master.workers()]
    victims = chance.sample(there, min(len(there), chance.randint(1, 3)))
    for pid in victims:
        _kill(pid)
    return _named("killed worker", victims)


@scenario(pause=(1.0, 4.0))
def master(stand: Stand, chance: Random) -> Strike | None:
    """kill -9 of the master, and the next one started at once."""
    victim = chance.choice(stand.masters)
    stand.kill_master(victim)
    strike = Strike.now(f"killed master {victim.pid}")
    _wait_for_leader(stand, chance)
    return strike


@scenario(pause=(1.5, 5.0), masters=2)
def standby(stand: Stand, chance: Random) -> Strike | None:
    """Two masters. The one that leads is killed, or stopped (SIGSTOP) until the other one leads, and later woken."""
    if any(one.sleeps_until is not None for one in stand.masters):
        return None  # killing it now would spare the other one the wait
    leader = chance.choice(stand.leaders() or stand.masters)
    if chance.random() < 0.6:
        return _stop(leader, chance)
    stand.kill_master(leader)
    strike = Strike.now(f"killed leading master {leader.pid}")
    _wait_for_leader(stand, chance)
    return strike


@scenario(pause=(0.3, 0.7))
def backends(stand: Stand, chance: Random) -> Strike | None:
    """pg_terminate_backend of sessions of workers and the master, twice a second; sometimes of all of them."""
    there = [pid for (pid,) in stand.ask(SESSIONS)]
    wanted = len(there) if chance.random() < 0.1 else chance.randint(1, 3)
    victims = chance.sample(there, min(len(there), wanted))
    stand.ask("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [victims])
    return _named("terminated backend", victims)


@scenario(pause=(1.5, 6.0))
def backend_crash(stand: Stand, chance: Random) -> Strike | None:
    """SIGKILL of one process of the server, which then ends all sessions and recovers."""
    victim = chance.choice([pid for (pid,) in stand.ask(BACKENDS)])
    with stand.session() as witness:
        _kill(victim)
        try:
            witness.execute("SELECT pg_sleep(5)")
        except psycopg.OperationalError:
            strike = Strike.now(f"killed server process {victim}")
            stand.ask("SELECT")
            return strike
    return None  # it had ended by itself


@scenario(pause=(1.5, 6.0))
def server(stand: Stand, chance: Random) -> Strike | None:
    """Immediate stop of the server, which is started again after at most two seconds."""
    stand.server.stop("immediate")
    strike = Strike.now("restarted the server")
    time.sleep(chance.uniform(0.0, 2.0))
    stand.server.start_again()
    return strike


@scenario(pause=(1.5, 6.0))
def postmaster(stand: Stand, chance: Random) -> Strike | None:
    """SIGKILL of the postmaster, which is started again after at most two seconds."""
    stand.server.kill()
    strike = Strike.now("killed the postmaster")
    time.sleep(chance.uniform(0.0, 2.0))
    stand.server.start_again()
    return strike


@scenario(pause=(0.5, 4.0), masters=2)
def mixed(stand: Stand, chance: Random) -> Strike | None:
    """All of these in turn, with two masters."""
    faults = [one.fault for name, one in SCENARIOS.items() if name != "mixed"]
    return chance.choice(faults)(stand, chance)


def _wait_for_leader(stand: Stand, chance: Random) -> None:
    """Or not quite: on a slow machine a master is sometimes killed while it starts."""
    deadline = time.monotonic() + chance.uniform(0.0, LEADING)
    while time.monotonic() < deadline and not stand.leaders():
        time.sleep(TICK)


def _stop(leader: Master, chance: Random) -> Strike:
    seconds = chance.uniform(*STILL)
    leader.sleeps_until = time.monotonic() + seconds
    leader.stop()
    return Strike.now(f"stopped leading master {leader.pid} for {seconds:.1f} s")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _named(what: str, pids: list[int]) -> Strike | None:
    return Strike.now(f"{what}{'s' * (len(pids) > 1)} {', '.join(map(str, pids))}") if pids else None
