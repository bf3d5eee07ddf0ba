"""The sessions that a table keeps ready for its workers: opening one takes longer than forking the worker.

The master opens them ahead of need, in its loop and without a thread, as bare libpq connections: nothing of the loop's
is tied to them that a fork would double. What a worker must know of its session is asked here too, so that its first
statement is the one that begins its task. A forked worker inherits one and is its only owner from then on: the pool
closes the master's copy without a word to the server, and nobody here ever uses it again.

They are a luxury. Where one cannot be opened nothing is lost and little is said; a worker for which none is ready
opens its own.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import OperationalError, pq

from pgtask import log
from pgtask.async_session import event_or_timeout, until_ready
from pgtask.worker.begin import Ready
from pgtask.worker.ours import Fresh, Ours, Steps, explain, own_text
from pgtask.worker.session import Session, Step
from pgtask.worker.worker import OPEN_TIMEOUT, Spec

OLDEST = 3600.0
"""Seconds after which an idle session is replaced: what the server does at a login may have changed unseen."""

REST = 0.05
"""Seconds after a handover before the next session is opened, so that a burst of forks does not wait for it."""

REHEARSED = ("find", "begin", "finish", "next")

LONGEST = 60.0
"""Seconds between two tries where the server refuses, at most."""


class Warm:
    """Of one table. Nothing but the task that opens sessions waits for the server."""

    def __init__(self) -> None:
        self._ready: dict[Ready, _Place] = {}  # the oldest first
        self._mark: bytes | None = None  # of the settings that the last session was opened with
        self._lacking = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def keep(self, spec: Spec, wanted: int) -> None:
        """Have so many ready from now on, and none that was opened otherwise."""
        self.drop()
        if wanted:
            self._keeper = asyncio.get_running_loop().create_task(self._attend(spec, wanted))

    def drop(self) -> None:
        """Close them all and open no more."""
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None
        self.renew()

    def renew(self) -> None:
        """Replace them all: they are not what a new session would be."""
        for ready in list(self._ready):
            self._discard(ready)

    def take(self) -> Ready | None:
        """The oldest, for a worker that is about to be forked; None where there is none."""
        if not self._ready:
            return None
        ready = next(iter(self._ready))
        self._remove(ready)
        asyncio.get_running_loop().call_later(REST, self._lacking.set)
        return ready

    async def _attend(self, spec: Spec, wanted: int) -> None:
        """Nobody waits for what keeps them: a bug of ours must be seen all the same."""
        try:
            await self._keep(spec, wanted)
        except Exception:
            log.exception("warm_crashed", table=spec.label)

    async def _keep(self, spec: Spec, wanted: int) -> None:
        failures = 0
        while True:
            self._lacking.clear()
            if len(self._ready) >= wanted:
                await self._wait_for_need()
                continue
            try:
                ready = await _opened(spec, self._mark)
                failures = 0
            except (psycopg.Error, OSError, TimeoutError) as error:
                failures += 1
                log.debug("warm_session_refused", table=spec.label, error=" ".join(str(error).split()))
                await asyncio.sleep(min(LONGEST, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))
                continue
            if ready.fresh.mark == self._mark:
                self._add(ready)
            else:  # changed while it was opened, for all that we know: it may have the settings of before
                self._mark = ready.fresh.mark
                ready.session.close()

    async def _wait_for_need(self) -> None:
        """Until one was taken or lost, or the oldest has become too old."""
        oldest, place = next(iter(self._ready.items()))
        if not await event_or_timeout(self._lacking, place.since + OLDEST - time.monotonic()):
            self._discard(oldest)

    def _add(self, ready: Ready) -> None:
        place = self._ready[ready] = _Place(since=time.monotonic(), descriptor=ready.session.pgconn.socket)
        asyncio.get_running_loop().add_reader(place.descriptor, self._readable, ready)

    def _remove(self, ready: Ready) -> None:
        asyncio.get_running_loop().remove_reader(self._ready.pop(ready).descriptor)

    def _discard(self, ready: Ready) -> None:
        if ready in self._ready:
            self._remove(ready)
            ready.session.close()
            self._lacking.set()

    def _readable(self, ready: Ready) -> None:
        """A notice, a changed parameter, or the end."""
        try:
            ready.session.pgconn.consume_input()
        except OperationalError:
            self._discard(ready)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Since when it has been ready (time.monotonic()), and its socket, which a lost session does not know any more."""

    since: float
    descriptor: int


class _Loop:
    """The waiter of a session that is still the master's."""

    doubted = False

    def wait(self, fd: int | None, *, write: bool = False, timeout: float | None = None, listen: bool = False) -> bool:
        raise AssertionError("the master's loop does not stop for one session")


async def _opened(spec: Spec, mark: bytes | None) -> Ready:
    """Ready for use if its mark is this one."""
    async with asyncio.timeout(OPEN_TIMEOUT):
        session = Session(await _connected(spec.conninfo), _Loop())
        try:
            return await _asked(session, spec, mark)
        except BaseException:
            session.close()
            raise


async def _connected(conninfo: str) -> pq.abc.PGconn:
    """`conninfo` has the address of each host, or connecting would resolve the name and stop the loop."""
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    try:
        # Asked before the socket is ready, libpq takes it for connected.
        status: int = pq.PollingStatus.WRITING
        while pgconn.status != pq.ConnStatus.BAD and status not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            await until_ready(pgconn.socket, write=status == pq.PollingStatus.WRITING)
            status = pgconn.connect_poll()
        if pgconn.status != pq.ConnStatus.OK:
            raise OperationalError(pgconn.get_error_message())
        pgconn.nonblocking = 1
    except BaseException:
        pgconn.finish()
        raise
    return pgconn


async def _asked(session: Session, spec: Spec, mark: bytes | None) -> Ready:
    ours = Ours(session, spec.store, spec.encoding)
    steps = ours.questions()
    fresh = ours.fresh = Fresh.read(steps, await _pipeline(session, steps.steps), spec.encoding)
    if fresh.mark == mark:
        await _rehearse(session, ours, spec)
        await _pipeline(session, [Step(own_text("warm"))])
    return Ready(session=session, fresh=fresh)


async def _rehearse(session: Session, ours: Ours, spec: Spec) -> None:
    """Have the server plan what the worker will say: to learn of a table takes a session longer than to write it."""
    texts = [ours.encode(spec.store.text(name)) for name in REHEARSED]
    await _pipeline(session, _in_ours(ours, [Step(text, only_prepare=True) for text in texts]))
    await _pipeline(session, _in_ours(ours, [explain(session, text) for text in texts]))


def _in_ours(ours: Ours, inner: Sequence[Step]) -> Sequence[Step]:
    """In a transaction like the worker's."""
    steps = Steps()
    steps.own("open")
    ours.add(steps, clean=False, sure=False)
    steps.steps += inner
    steps.own("commit")
    return steps.steps


async def _pipeline(session: Session, steps: Sequence[Step]) -> list[pq.abc.PGresult]:
    """As Session.pipeline, for the loop. A statement that fails is as good as a lost session."""
    pgconn = session.pgconn
    waiting = session.send_pipeline(steps)
    while pgconn.flush():
        await until_ready(pgconn.socket, write=True)
    results = []
    for sql in waiting:
        result = await _result(pgconn)
        if result is None or result.status == pq.ExecStatus.FATAL_ERROR:
            raise OperationalError(session.last_words())
        if sql is not None and await _result(pgconn) is not None:
            raise OperationalError(session.last_words())
        if not sql and sql is not None:
            results.append(result)
    pgconn.exit_pipeline_mode()
    return results


async def _result(pgconn: pq.abc.PGconn) -> pq.abc.PGresult | None:
    while pgconn.is_busy():
        await until_ready(pgconn.socket)
        pgconn.consume_input()
    return pgconn.get_result()
