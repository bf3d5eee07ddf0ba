"""What the master knows of a worker, of the row that it was given, of what it was asked, and of its end."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from pgtask import log, metrics
from pgtask.process import Channel, Lost, Progress, Run
from pgtask.worker.begin import Ready
from pgtask.worker.worker import Spec

LOOK_GAP = 0.05
"""Seconds between looks at the session of a worker that does not answer."""

DEAF = 6.0
"""Seconds after which a worker that does not say what it has found, and whose session is busy, is killed: longer than
that waits for locks."""


class State(Enum):
    """BUSY: has an assignment, is looking for one, or opening its session. ENDING: its channel is closed."""

    BUSY = "busy"
    IDLE = "idle"
    ENDING = "ending"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A row that a poller took for a worker, and the number of the group's slot that it runs in.

    `live` in seconds; 0 is no limit, as for `count`.
    """

    id: int
    attempt: int
    taker: int
    term: int
    lane: int
    slot: int
    max: int
    count: int
    live: float

    def run(self) -> Run:
        return Run(id=self.id, attempt=self.attempt, taker=self.taker, term=self.term, lane=self.lane, slot=self.slot)


@dataclass(eq=False, kw_only=True)
class Handle:
    """A worker as the master knows it."""

    client: "Client"
    channel: Channel
    pid: int = 0
    state: State = State.BUSY
    born: float = field(default_factory=time.monotonic)
    runs: int = 0
    assigned: Taken | None = None
    backend: int | None = None
    since: str | None = None  # when its backend started, as the server wrote it
    lost: Lost | None = None
    asked: bool = False  # told to make room
    killed: bool = False  # by us
    linger: asyncio.TimerHandle | None = None
    looking: "Looking | None" = None  # it was told to look for itself, and has not answered
    place: metrics.Place | None = None

    def admits(self, taken: Taken) -> bool:
        """May this worker run it, by the row's `count` and `live`?"""
        age = time.monotonic() - self.born
        return (not taken.count or self.runs < taken.count) and (not taken.live or age < taken.live)

    def kill(self) -> None:
        """It does not do what it was told to."""
        self.killed = True
        log.error("worker_killed", worker=self.pid, table=self.client.spec.label)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def owns(self, id: int, owners: Collection[tuple[int, int]]) -> bool:
        """Is one of the runs that the row has now this worker's, or about to be?"""
        if any(backend == self.backend for backend, _ in owners):
            return True
        mine = self.assigned
        if mine is None or mine.id != id:
            return False
        return self.backend is None or (mine.taker, mine.attempt) in owners


@dataclass(frozen=True, kw_only=True)
class Fate:
    """How a worker of a client ended: its backend if it had one, since when, its unfinished assignment, and why.

    `interrupted`: by us, which must cost its run nothing. `felled`: by a crash of the server that another's
    task may have caused. `looking`: it may have begun a row that nobody knows of.
    """

    backend: int | None
    since: str | None
    assigned: Taken | None
    why: str
    opened: bool
    clean: bool
    interrupted: bool = False
    felled: bool = False
    looking: bool = False


@dataclass(kw_only=True)
class Looking:
    """A worker was asked to look: where its answer goes, what it then has, and how long it is kept if nothing.

    It begins nothing later than `by` (time.monotonic()). `forked`: for this. `over`: nobody waits for it, since it was
    too late.
    """

    handle: Handle
    answer: "asyncio.Future[list[Any] | None]"
    made: Callable[[Sequence[Any]], Taken]
    by: float
    lingers_until: float | None
    forked: bool = False
    over: bool = False

    async def hear(self, at_rest: Callable[[int | None], Awaitable[bool]]) -> list[Any] | None:
        """What the worker has found.

        None if it does not answer and its session is `at_rest`, since it is too late for what it was told; one whose
        session is not, and who still does not, is killed.
        """
        answer, loop = self.answer, asyncio.get_running_loop()
        deaf_at = loop.time() + DEAF
        try:
            await asyncio.wait((answer,), timeout=max(0.0, self.by - time.monotonic()))
            while not answer.done() and loop.time() < deaf_at:
                if await at_rest(self.handle.backend):
                    self.over = True
                    return None
                await asyncio.wait((answer,), timeout=LOOK_GAP)
        except Exception:  # not when the master leaves at once: then the worker ends what it has begun
            if not answer.done():
                self.handle.kill()
            raise
        if not answer.done():
            self.handle.kill()
            return None
        return answer.result()


class Client(Protocol):
    """A poller, as the pool sees it."""

    @property
    def spec(self) -> Spec: ...
    @property
    def run_limit(self) -> int: ...
    def ready(self) -> Ready | None: ...
    def on_reopened(self) -> None: ...
    def on_idle(self, taken: Taken | None, begun: bool) -> None: ...
    def on_finished(self, ids: list[int]) -> None: ...
    def on_end(self, fate: Fate) -> None: ...
    def on_progress(self, progress: Progress) -> None: ...
    def wake(self) -> None: ...
