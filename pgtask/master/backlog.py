"""Due rows of full groups: what is known of them, so that they need not be read again for everybody else's sake.

A group that is full may have a million due rows, and they hide those of others. Once a walk through all groups has
found nothing that may start, what is due from before a place in the order of due rows cannot start until a slot of its
group becomes free, which we see. So the looks that follow start at that place, a second to a minute before the walk,
and look at the groups where a slot has become free by name. (While the first walk goes on, a single row is looked for
from there already: what is due from before it is the walk's.) A row that is planned anew for a moment before it tells
so itself. One that is inserted so is found by walking on, piece by piece, in a twentieth of the time: at once after a
call for which nothing else was found, else once a second after something has happened.
"""

import time
from collections.abc import Iterable, Mapping, Sized

MOST = 100
"""Lanes that are worth looking at by name."""

CALM = 1.0
"""Seconds from one walk to the next while something was found for every call, or nobody need call."""

Place = tuple[str, int]
"""In the order of due rows: plan and id."""


class Backlog:
    """Of one table: what a walk through all its groups has shown, and what has happened since."""

    def __init__(self) -> None:
        self.place: Place | None = None
        """Before it nothing is due but in full groups; None: that is not known."""
        self.since: Place | None = None
        """Where looks will start when the walk that goes on has shown the same."""
        self._freed: set[int] = set()  # lanes with a free slot that were not found empty since it is
        self._used: dict[int, int] = {}  # slots in use after the last look, by lane
        self._stirred = False  # something may have become due since the walk began
        self.calls = 0
        """Those since the walk began for which nothing was found."""
        self._walked_at = 0.0  # when it began (time.monotonic())

    @property
    def known(self) -> bool:
        """Is there a place to look from, be it while the walk goes on that is to show that it is one?"""
        return self.place is not None or self.since is not None

    @property
    def lanes(self) -> list[int]:
        """Those that are to be looked at by name."""
        return list(self._freed)

    def forget(self) -> None:
        """Anything may be due anywhere."""
        self.place = self.since = None
        self._freed.clear()

    def stir(self) -> None:
        """There may be more that is due, of which nobody need have told us."""
        self._stirred = True

    def call(self) -> None:
        """Somebody says that there is more that is due."""
        self.calls += 1

    def answer(self, calls: int, found: int) -> None:
        """A look has found so many rows; so many calls had come before it."""
        answered = min(calls, found)
        self.calls -= answered
        self._stirred = self._stirred or answered > 0

    def free(self, lane: int) -> None:
        """A row of the lane may start that could not."""
        if self.known:
            self._freed.add(lane)
            if len(self._freed) > MOST:
                self.forget()

    def count(self, held: Mapping[int, Sized]) -> None:
        """These slots are in use before a look: which have become free since the last one?"""
        for lane, used in self._used.items():
            if len(held.get(lane, ())) < used:
                self.free(lane)

    def looked(self, held: Mapping[int, Sized], taken: set[int], lanes: Iterable[int], *, left: bool) -> None:
        """These slots are in use after it, those of some lanes by what it took; of the `lanes` it had the names,
        or nothing was due in them.

        `left`: more may start than it took.
        """
        self._used = {lane: len(numbers) for lane, numbers in held.items()}
        if not left:
            self._freed -= set(lanes) - taken

    def walk_at(self, safety: float) -> float:
        """When it is time to walk again, or to go on with it (time.monotonic()).

        At least every so many seconds, whatever was heard.
        """
        if self.calls or self.since is not None:
            return 0.0
        return self._walked_at + (min(CALM, safety) if self._stirred else safety)

    def set_out(self) -> None:
        """A walk begins."""
        self._stirred = False
        self.calls = 0
        self._walked_at = time.monotonic()

    def walked(self, recent: Place | None, *, first: bool, last: bool, hidden: bool) -> None:
        """A piece of it, maybe the first or the last one, has shown nothing that may start and was not taken.

        `hidden` is whether more rows are due than a look sees; only some of them are due from `recent` on, if any place
        is like that.
        """
        if first:
            self.since = recent
        if not hidden or self.since is None:
            self.forget()
        elif last:
            self.place, self.since = self.since, None
