"""The groups of a table that somebody holds: nothing of theirs is begun until they are released.

Who holds or releases a group writes it down in a table of its own; it stays held whoever leads, until it is released.
Every statement that takes or begins a row reads that table itself: a take leaves the group's rows alone as if all of
its slots were in use, and a worker that is in the group finds no next row there. Runs that go on are not touched. A
notification tells the master, who looks for what may start now; and the log.
"""

import time

from pgtask import log
from pgtask.config import TableConfig
from pgtask.master.mender import Term
from pgtask.store import Store


class Holds:
    """Of one table; what it knows outlives a session, what it does needs a term."""

    def __init__(self, store: Store, config: TableConfig):
        self.config = config
        self.changes = 0
        """How often something may have been held or released: what the takes remember of full groups is old then."""
        self._groups: set[str] = set()
        self._store = store
        self._look_at = 0.0  # when the table is read again (time.monotonic()): a notification may not have come

    def heard(self) -> None:
        """Somebody says that a group was held or released."""
        self._look_at = 0.0
        self.changes += 1

    async def begin(self, term: Term) -> None:
        """What was held while we had no session."""
        self.heard()
        await self.look(term)

    async def look(self, term: Term) -> None:
        """Read which groups are held, if it is time to."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + self.config.safety.total_seconds()
        before, self._groups = self._groups, {group for (group,) in await term.session.rows(self._store.text("holds"))}
        if self._groups != before:
            log.info("holds_changed", table=self.config.label, held=len(self._groups))
            self.changes += 1
