"""The groups of a table that somebody holds: nothing of theirs is begun until they are released.

Who holds or releases a group writes it down in a table of its own, and says so by a notification; it stays held whoever
leads, until it is released. A take leaves its rows alone as if all of its slots were in use, and workers that are in
the group end the run in hand and take no next one. Runs that go on are not touched.
"""

import time

from pgtask import log
from pgtask.config import TableConfig
from pgtask.master.mender import Term
from pgtask.master.pool import Client, Pool
from pgtask.store import Store


class Holds:
    """Of one table; what it knows outlives a session, what it does needs a term."""

    def __init__(self, client: Client, pool: Pool, store: Store, config: TableConfig):
        self.config = config
        self.keys: list[int] = []
        """Of the groups that are held: a hash of each one's name."""
        self._client = client
        self._pool = pool
        self._store = store
        self._look_at = 0.0  # when the table is read again (time.monotonic()): a notification may not have come

    def heard(self) -> None:
        """Somebody says that a group was held or released."""
        self._look_at = 0.0

    async def begin(self, term: Term) -> None:
        """What was held while we had no session."""
        self.heard()
        await self.look(term)

    async def look(self, term: Term) -> None:
        """Read which groups are held, if it is time to."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self.config.safety.total_seconds()
        rows = await term.session.rows(self._store.text("holds"))
        before, self.keys = self.keys, sorted(key for key, _ in rows)
        self._pool.hold(self._client, frozenset(lane for _, lanes in rows for lane in lanes))
        if self.keys != before:
            log.info("holds_changed", table=self.config.label, held=len(self.keys))
