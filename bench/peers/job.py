"""The work that every peer is given, and what each of their programs does: install, fill, trickle, work.

A job runs one SQL statement, which stores its text result. Where jobs come from and when they are begun is the peer's
own business. The server is found by libpq's PG* variables. This runs in the peers' own environment, not in ours.
"""

import asyncio
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

RESULT = """CREATE TABLE result (job bigint PRIMARY KEY, output text, at timestamptz NOT NULL)"""
STATEMENT = "INSERT INTO result (job, output, at) SELECT {}, (SELECT 1)::text, clock_timestamp()"


class Peer(ABC):
    """A queue, as its own documentation would have it used."""

    @abstractmethod
    async def install(self) -> None:
        """Make its tables."""

    @abstractmethod
    async def fill(self, jobs: Iterable[int]) -> None:
        """Put in many jobs at once."""

    @abstractmethod
    async def put(self, job: int) -> None:
        """Put in one, and return when that is committed."""

    @abstractmethod
    async def work(self) -> None:
        """Run jobs until killed."""

    @abstractmethod
    async def open(self) -> None:
        """What `fill` and `put` need."""


def run(peer: Peer) -> None:
    """PROGRAM install | fill COUNT | trickle COUNT GAP | work"""
    mode, *values = sys.argv[1:]
    asyncio.run(_run(peer, mode, values))


async def _run(peer: Peer, mode: str, values: list[str]) -> None:
    if mode == "install":
        await peer.install()
    elif mode == "fill":
        await peer.open()
        await peer.fill(range(1, int(values[0]) + 1))
    elif mode == "trickle":
        await peer.open()
        print(json.dumps(await _trickle(peer, int(values[0]), float(values[1]))))
    else:
        await peer.work()
    sys.stdout.flush()
    os._exit(0)  # chancy's pool has been seen to wait for ever for its own end


async def _trickle(peer: Peer, count: int, gap: float) -> dict[int, float]:
    """One job every `gap` seconds; when each was in, which is a moment after its commit."""
    moments = {}
    begun = time.monotonic()
    for job in range(1, count + 1):
        await asyncio.sleep(max(0.0, begun + job * gap - time.monotonic()))
        await peer.put(job)
        moments[job] = time.time()
    return moments
