"""Rows that wait, for their dependencies or for the first match of their calendar: who goes on, and when.

Only the poller decides, each time in a new statement, which sees whatever was committed before. So nobody holds locks
for it, and a row that waits is looked at after each of two commits: of its own insert, which notifies, and of its
dependency's end, which is told by whoever has ended it. Of a worker's end we hear only while there is something to wait
for: the workers are asked to report before the rows are looked at, and a worker that reads so reports what it has
committed since it read nothing. What nobody could tell (a worker that died, a master that was away) is found by a look
at all rows that wait: when a term begins, when a worker crashes, and with each safety poll.
"""

import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from pgtask import cron, log
from pgtask.config import TableConfig
from pgtask.master.handles import Client
from pgtask.master.mender import Term, lost
from pgtask.master.outage import line
from pgtask.master.pool import Pool
from pgtask.store import Store
from pgtask.telling import Telling

MOST = 500
"""Rows that one statement looks at."""

LOCKED_GAP = 0.5
"""Seconds until a row that somebody had locked is looked at again."""

SHARE = 4
"""A look at all that wait costs at most one part in this many and one of the time."""

PIECE = 0.02
"""Seconds after which a look is interrupted, and goes on after the next take."""

FIRST_ID = -(1 << 63)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = -62_000_000_000
"""Seconds since 1970, when Python's calendar has just begun."""


class Waiting:
    """For one table; what it knows outlives a session, what it does needs a term."""

    def __init__(self, client: Client, pool: Pool, store: Store, telling: Telling, config: TableConfig):
        self.config = config
        self._client = client
        self._pool = pool
        self._store = store
        self._telling = telling
        self._new = True  # there may be rows that were not looked at
        self._ended: set[int] = set()  # rows of whose end we were told
        self._due: list[int] = []  # rows that wait for these
        self._places: dict[int | None, int] = {}  # where looks at many go on
        self._any_ended = True  # any row may have ended
        self._all_at = 0.0  # before when not all are looked at again (time.monotonic())
        self._again_at = 0.0  # when they are, whatever we are told

    def begin(self) -> None:
        """A term begins: nothing is known of what happened before."""
        self._new = self._any_ended = True
        self._all_at = 0.0
        self._places.clear()
        self._due.clear()

    def inserted(self) -> None:
        """Somebody says that there are rows that wait."""
        self._new = True
        self._places.pop(None, None)

    def ended(self, ids: Collection[int] = ()) -> None:
        """These rows have ended; without ids any may have."""
        if self._pool.reports(self._client):
            self._ended.update(ids)
            self._any_ended = self._any_ended or not ids

    def next_look(self) -> float:
        """When something must be looked at again (time.monotonic())."""
        if self._places or self._due or self._ended:
            return 0.0
        return min(self._again_at, self._all_at if self._any_ended else self._again_at)

    async def look(self, term: Term) -> None:
        """Let everybody go on who may."""
        if time.monotonic() >= self._again_at:
            self._again_at = time.monotonic() + self.config.safety.total_seconds()
            self._new = self._any_ended = True
        if self._new or not self.config.wake:
            self._new = False
            await self._pages(term, None)
            self._new = self._new or None in self._places
        if 0 in self._places or (self._any_ended and time.monotonic() >= self._all_at):
            self._any_ended = self._any_ended and 0 in self._places  # what ended during a walk asks for another one
            started = time.monotonic()
            await self._pages(term, 0)
            self._all_at = time.monotonic() + SHARE * (time.monotonic() - started)
        if not self.config.wake:
            self.ended()  # whoever stops a row does not say so
        if self._ended and not self._due:
            ids, self._ended = list(self._ended), set()
            async with _searching(term, self._store):
                rows = await term.session.rows(self._store.text("dependents"), ids)
            self._due = [id for (id,) in rows]
            if not rows and not (await term.session.one(self._store.text("waits")))[0]:
                self._pool.report(self._client, False)
        if self._due:
            self._due, ids = self._due[MOST:], self._due[:MOST]
            await self._decide(term, ids)

    async def _pages(self, term: Term, looked_at: int | None) -> None:
        """All that were not looked at yet (None), or that were (0)."""
        last, until = self._places.pop(looked_at, FIRST_ID), time.monotonic() + PIECE
        while rows := await term.session.rows(self._store.text("waiting"), MOST, last, looked_at):
            last = rows[-1][0]
            if any(depends for _, depends, *_ in rows):
                self._pool.report(self._client, True)
            if unplanned := [row for row in rows if row[2]]:
                await self._align(term, unplanned)
            await self._decide(term, [id for id, depends, *_ in rows if depends])
            if time.monotonic() > until:
                self._places[looked_at] = last
                return

    async def _align(self, term: Term, rows: Sequence[tuple[Any, ...]]) -> None:
        """Give rows of a calendar their first plan; one that the table refuses, for want of a partition, has failed."""
        found = [_first(*row[3:]) for row in rows]
        try:
            async with term.session.transaction():
                await self._write(term, rows, found)
        except psycopg.Error as error:
            if lost(term, error):
                raise
            if len(rows) == 1:
                await self._write(term, rows, [(None, line(error))])
            else:
                for row in rows:
                    await self._align(term, [row])

    async def _write(
        self, term: Term, rows: Sequence[tuple[Any, ...]], found: list[tuple[float | None, str | None]]
    ) -> None:
        columns = [[row[column] for row in rows] for column in (0, 3, 4)]
        matches, wrong = [match for match, _ in found], [why for _, why in found]
        failed, locked = await term.session.one(self._store.text("align"), *columns, matches, wrong)
        if failed:
            reasons = dict(zip(columns[0], wrong, strict=True))
            for id in failed:
                self._telling.failed(id, reasons[id] or "")
            self.ended(failed)
        self._later(locked)

    async def _decide(self, term: Term, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), MOST):
            await self._decide_on(term, ids[start : start + MOST])

    async def _decide_on(self, term: Term, ids: Sequence[int]) -> None:
        """At once; but a row that cannot be written, since a trigger of the user's refuses it, holds up no other."""
        try:
            async with _searching(term, self._store):
                gone, locked = await term.session.one(self._store.text("decide"), list(ids))
        except psycopg.Error as error:
            if lost(term, error):
                raise
            if len(ids) == 1:
                log.warning("waiting_row_refused", table=self.config.label, id=ids[0], error=line(error))
                return  # until the next look at all
            for id in ids:
                await self._decide_on(term, [id])
            return
        if gone:
            log.info("tasks_gone", table=self.config.label, count=len(gone))
            self.ended(gone)
        self._later(locked)

    def _later(self, locked: int) -> None:
        if locked:
            self._again_at = min(self._again_at, time.monotonic() + LOCKED_GAP)


@asynccontextmanager
async def _searching(term: Term, store: Store) -> AsyncIterator[None]:
    """Who depends on a row is found by an index that only a bitmap scan can read."""
    async with term.session.transaction():
        await term.session.do(store.text("searching"))
        yield


def _first(
    expression: str, zone: str, plan: float, never: bool, until: float | None
) -> tuple[float | None, str | None]:
    """The first match of a calendar at or after `plan`, both in seconds since 1970; or what is wrong with it."""
    try:
        at = EPOCH if never else EPOCH + timedelta(seconds=max(plan, EARLIEST))
        match = cron.first(expression, zone, at)
    except OverflowError:
        return None, f'cron "{expression}" never matches that late'
    except cron.Wrong as wrong:
        return None, str(wrong)
    seconds = (match - EPOCH).total_seconds()
    if until is not None and seconds > until:
        return None, f'cron "{expression}" does not match in the time from plan to until'
    return None if never else seconds, None
