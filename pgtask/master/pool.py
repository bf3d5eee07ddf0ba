"""The master's workers: forks them, hands rows to them, lets them linger, makes room, sees them end.

One pool serves all tables, so that `workers` bounds them all. A poller asks how many rows it may take (`capacity`),
takes no more than that, and hands each to `assign`, or has an idle worker, or a new one, `have_look`; it hears of
everything that happens to its workers through `Client`. A worker that has nothing to do is kept for `linger` and then
ended by closing its channel: only here, so that an ending can never cross an assignment.
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from pgtask import log, metrics
from pgtask.errors import LOST
from pgtask.master.handles import Client, Fate, Handle, Looking, State, Taken
from pgtask.process import (
    DOUBT,
    Cancel,
    Channel,
    Children,
    Ended,
    Finished,
    Found,
    Idle,
    Look,
    Lost,
    Opened,
    Progress,
    Report,
    Room,
)
from pgtask.worker.begin import Asked, Ready
from pgtask.worker.session import SessionLost
from pgtask.worker.worker import HELD, Worker

MANY = 2000
"""Ids in one message: with them it is shorter than a packet may be."""

QUIET = 10.0
"""Seconds without a refused session after which a table's workers are no longer forked one at a time."""


ID = 8
"""The column of the id in what a worker has found, as in what a take answers."""


class Pool:
    """All workers of a master. Lives in its loop; nothing here waits."""

    def __init__(self, children: Children, *, workers: int, spare: int, linger: timedelta, changed: Callable[[], None]):
        self.children = children
        self.workers, self.spare, self.linger = workers, spare, linger
        self.handles: dict[int, Handle] = {}
        self._changed = changed
        self._nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # now, since later no descriptor may be left
        self._pending: deque[tuple[Client, Taken]] = deque()  # rows that wait for a worker's end
        self._next: deque[tuple[Client, Taken]] = deque()  # rows for which there is a place, but no worker yet
        self._forking = False  # a worker was forked in this turn of the loop
        self._waiting: dict[Client, float] = {}  # clients with due rows and no place for them, since when
        self._pauses: dict[Client, _Pause] = {}  # clients whose workers could not open a session
        self._reported: set[Client] = set()  # clients who hear what their workers have finished

    def of(self, client: Client) -> list[Handle]:
        return [h for h in self.handles.values() if h.client is client]

    def assigned(self, client: Client) -> list[Taken]:
        """What holds the slots of the client's groups: rows that were given to workers, and those that wait for one.

        A worker goes from row to row in the slot of what it was given, and holds it until we have read that it is
        idle: also while the run of a row that was stopped or deleted goes on.
        """
        busy = [h.assigned for h in self.of(client) if h.assigned is not None]
        return busy + [taken for owner, taken in (*self._next, *self._pending) if owner is client]

    def backends(self, client: Client, *, busy: bool = False) -> list[int]:
        """The sessions of the client's workers, or only of those that have something to do, be it to end."""
        fitting = [h for h in self.of(client) if not busy or h.state is not State.IDLE]
        return [handle.backend for handle in fitting if handle.backend is not None]

    def busy(self) -> int:
        """How many workers have something to run."""
        return sum(handle.state is State.BUSY for handle in self.handles.values())

    def capacity(self, client: Client) -> int:
        """How many rows the client may take now."""
        own = self.of(client)
        idle = sum(h.state is State.IDLE for h in own)
        busy = sum(h.state is State.BUSY for h in own) + sum(c is client for c, _ in (*self._next, *self._pending))
        places = self._places() - len(self._before(client))
        if (pause := self._pauses.get(client)) is not None:
            opening = sum(h.state is State.BUSY and h.backend is None for h in own)
            places = min(places, 0 if pause.until > time.monotonic() else 1 - opening)
        return max(0, min(client.run_limit - busy, idle + max(0, places)))

    def assign(self, client: Client, taken: Taken) -> None:
        """Give a row to an idle worker that admits it, or to a new one, for which an idle one may have to end first."""
        for handle in self.of(client):
            if handle.state is State.IDLE and handle.admits(taken) and self._give(handle, taken):
                return
        full = self._unused() <= 0
        refused = self.retry_at(client) is not None  # no session to be had but that of a worker that ends
        replaces = (full or refused) and self._end_one_idle(of=client)
        if full and not replaces:
            self._end_one_idle()
        if full or replaces:
            self._pending.append((client, taken))
            ending = sum(h.state is State.ENDING for h in self.handles.values())
            if len(self._pending) > max(0, self._unused()) + ending:
                self._ask_for_room(h for h in self.handles.values() if h.state is State.BUSY)
        else:
            self._next.append((client, taken))
            self._fork_next()

    def idle(self, client: Client) -> Handle | None:
        """A worker of the client that has nothing to do."""
        return next((h for h in self.of(client) if h.state is State.IDLE), None)

    def have_look(
        self, client: Client, look: Look, made: Callable[[Sequence[Any]], Taken], *, fork: bool
    ) -> Looking | None:
        """Have an idle worker look for the single row that is due, and begin it; `made` tells what it then has.

        With `fork`, or else, where none is busy (with a group that may be full), a new one, for whom a session must be
        ready: it looks while he is forked. None if there is nobody who can. Whoever asks must hear it.
        """
        handle = self.idle(client)
        if handle is None:
            busy = any(h.state is State.BUSY for h in self.of(client))
            may = fork and not (busy or self._next) and self._places() > 0 and client not in self._pauses
            return self._fork_to_look(client, look, made) if may else None
        if not handle.channel.send(look):
            return None
        os.sched_yield()  # the kernel puts whom we wake on our processor, and what we do next is less urgent
        until = None if handle.linger is None else handle.linger.when()
        self._engage(handle)
        return self._looks(handle, look, made, lingers_until=until)

    def _fork_to_look(self, client: Client, look: Look, made: Callable[[Sequence[Any]], Taken]) -> Looking | None:
        ready = client.ready()
        if ready is None:
            return None
        try:
            ready = replace(ready, asked=Asked.by(look, ready, client.spec.store, client.spec.encoding))
        except SessionLost:
            ready.session.close()
            return None
        handle = self._fork(client, None, ready=ready, look=look)
        return None if handle is None else self._looks(handle, look, made, lingers_until=None, forked=True)

    def _looks(self, handle: Handle, look: Look, made: Callable[[Sequence[Any]], Taken], **more: Any) -> Looking:
        answer = asyncio.get_running_loop().create_future()
        handle.looking = Looking(handle=handle, answer=answer, made=made, by=look.by, **more)
        return handle.looking

    def looking(self, client: Client) -> bool:
        """Is there a worker of the client that may have begun what we know nothing of?"""
        return any(handle.looking is not None and not handle.looking.over for handle in self.of(client))

    def _found(self, handle: Handle, row: list[Any] | None) -> None:
        looking, handle.looking = handle.looking, None
        assert looking is not None, "nobody has asked"
        looking.answer.set_result(row)
        if row is not None and row[ID] is not None:
            handle.assigned = looking.made(row)
            return
        self._idle(handle)
        if handle.linger is not None and looking.lingers_until is not None:  # that was no work
            handle.linger.cancel()
            handle.linger = asyncio.get_running_loop().call_at(looking.lingers_until, self._end, handle)

    def want(self, client: Client, *, room: bool) -> None:
        """The client has due rows and no place for them: tell it when there is one.

        With `room`, when these are of groups of which nothing runs, busy workers are asked to make room after their
        run: all of them, since nobody knows whose run ends first. A client at its own limit asks only its own.
        """
        busy = [h for h in self.handles.values() if h.state is State.BUSY]
        own = [h for h in busy if h.client is client]
        if len(own) >= client.run_limit or client in self._pauses:
            busy = own
        else:
            self._waiting.setdefault(client, time.monotonic())
            if self._end_one_idle(beside=client):
                return
        if room:
            self._ask_for_room(busy)

    def _ask_for_room(self, busy: Iterable[Handle], *, now: bool = False) -> None:
        """All of them, since nobody knows whose run ends first."""
        for handle in busy:
            if now or not handle.asked:
                handle.asked = handle.channel.send(Room(now=now))

    def served(self, client: Client) -> None:
        """The client waits for no place any more: those behind it may look again."""
        if self._waiting.pop(client, None) is not None:
            for other in list(self._waiting):
                other.wake()

    def fork_ahead(self, client: Client) -> None:
        """Keep `spare` idle workers forked ahead, where nobody waits for their places."""
        while sum(h.state is not State.ENDING and h.assigned is None for h in self.of(client)) < self.spare:
            blocked = self._waiting or self._places() <= 0 or self.retry_at(client) is not None
            if blocked or self._fork(client, None) is None:
                return

    def cancel(self, client: Client, stopped: Mapping[int, Collection[tuple[int, int]]]) -> bool:
        """Running rows were stopped or deleted: whoever runs them, cancel it; but not the runs that they have now.

        `stopped` has these for each id: backend (the poller's for a row that is about to begin) and attempt. A stopped
        run is one of the others to its end, of which only the poller knows: so nobody beside it in its group takes the
        next by himself. False if there is a worker that does not read what it is told.
        """
        busy = [handle for handle in self.of(client) if handle.state is State.BUSY]
        told = True
        for handle in busy:
            ids = [id for id, owners in stopped.items() if not (owners and handle.owns(id, owners))]
            for some in range(0, len(ids), MANY):
                told = handle.channel.send(Cancel(ids=ids[some : some + MANY])) and told
        if not all(stopped.values()):
            lanes = Counter(taken.lane for taken in self.assigned(client))
            self._ask_for_room((h for h in busy if h.assigned is not None and lanes[h.assigned.lane] > 1), now=True)
        return told

    def reports(self, client: Client) -> bool:
        """Is the client told of every row whose run has ended?"""
        return client in self._reported

    def report(self, client: Client, on: bool) -> None:
        """Have the client told so from now on, or no more."""
        if on is not self.reports(client):
            log.debug("workers_report", table=client.spec.label, on=on)
            (self._reported.add if on else self._reported.remove)(client)
            for handle in self.of(client):
                handle.channel.send(Report(on=on))

    def doubt(self, client: Client, backend: int) -> None:
        """The server has been waiting for a worker that waits for it: whose session that is, shall look again."""
        for handle in self._with(client, backend):
            os.kill(handle.pid, DOUBT)

    def given(self, client: Client, backend: int) -> Taken | None:
        """The row that the worker with that session was given, with which it went from row to row."""
        return next((handle.assigned for handle in self._with(client, backend)), None)

    def kill(self, client: Client, backend: int) -> None:
        """The worker with that session has not begun what it was told to: somebody else shall."""
        for handle in self._with(client, backend):
            handle.kill()

    def _with(self, client: Client, backend: int) -> list[Handle]:
        return [handle for handle in self.of(client) if handle.backend == backend]

    def finish_all(self, client: Client | None = None) -> None:
        """Let every run end, and every worker after it."""
        self._give_up_pending(client)
        for handle in list(self.handles.values()):
            if client is None or handle.client is client:
                if handle.state is State.IDLE:
                    self._end(handle)
                elif handle.state is State.BUSY:
                    os.kill(handle.pid, signal.SIGTERM)

    def cancel_all(self, client: Client | None = None) -> None:
        """Cancel every run, put its row back, end every worker."""
        self._give_up_pending(client)
        for handle in list(self.handles.values()):
            if client is None or handle.client is client:
                handle.channel.send(Cancel(back=True))
                os.kill(handle.pid, signal.SIGINT)

    def kill_all(self) -> None:
        """The last resort of a bounded stop: workers that did not end although they were told to."""
        for handle in self.handles.values():
            handle.kill()

    def killed(self, client: Client) -> list[int]:
        """The backends of the workers that we have killed and not yet seen end."""
        return [h.backend for h in self.of(client) if h.killed and h.backend is not None]

    def retry_at(self, client: Client) -> float | None:
        """When a client whose workers could not open a session may fork again (time.monotonic())."""
        pause = self._pauses.get(client)
        return pause.until if pause is not None and pause.until > time.monotonic() else None

    def forget(self, client: Client) -> None:
        self.served(client)
        self._pauses.pop(client, None)
        self._reported.discard(client)

    def reconfigure(self, *, workers: int, spare: int, linger: timedelta) -> None:
        """Other bounds; busy workers are not touched, idle ones linger anew."""
        self.workers, self.spare, self.linger = workers, spare, linger
        for handle in list(self.handles.values()):
            if handle.state is State.IDLE and handle.linger is None:
                self._linger(handle)
        for client in {handle.client for handle in self.handles.values()} | set(self._waiting):
            client.wake()

    def _places(self) -> int:
        """How many workers more there may be."""
        return self._unused() - len(self._pending)

    def _unused(self) -> int:
        """The same, when those that wait for a worker's end have none yet."""
        return self.workers - len(self.handles) - len(self._next)

    def _before(self, client: Client) -> list[Client]:
        """Who has waited longer for a place than this one: what becomes free is theirs."""
        since = self._waiting.get(client, float("inf"))
        return [other for other, moment in self._waiting.items() if other is not client and moment < since]

    def _give_up_pending(self, client: Client | None) -> None:
        """Rows that wait for a worker's end will get no worker any more."""
        why = "the table is stopped"
        for queue in (self._next, self._pending):
            for _ in range(len(queue)):
                owner, taken = queue.popleft()
                if client is None or owner is client:
                    owner.on_end(Fate(backend=None, since=None, assigned=taken, why=why, opened=False, clean=True))
                else:
                    queue.append((owner, taken))

    def _give(self, handle: Handle, taken: Taken) -> bool:
        """False if the worker does not read what it is told."""
        if not handle.channel.send(taken.run()):
            return False
        self._engage(handle)
        handle.assigned = taken
        return True

    def _engage(self, handle: Handle) -> None:
        if handle.linger is not None:
            handle.linger.cancel()
            handle.linger = None
        handle.state, handle.asked = State.BUSY, False

    def _fork_next(self) -> None:
        """One in a turn of the loop: it stands still while the kernel copies our pages."""
        if self._next and not self._forking:
            self._forking = True
            asyncio.get_running_loop().call_soon(self._fork_another)
            client, taken = self._next.popleft()
            self._fork(client, taken, ready=client.ready())

    def _fork_another(self) -> None:
        self._forking = False
        self._fork_next()

    def _fork(
        self, client: Client, taken: Taken | None, *, ready: Ready | None = None, look: Look | None = None
    ) -> Handle | None:
        backend = None if ready is None else ready.session.pid
        try:
            handle = self._forked(client, taken, ready, look)
        except OSError as error:  # no process, no descriptor or no memory to be had
            self._back_off(client, f"fork: {error}")
            looking = False
            if ready is not None:
                ready.session.close()
                looking = ready.asked is not None  # it may have begun something
            if taken is not None or looking:
                fate = Fate(
                    backend=backend if looking else None,
                    since=ready.since if ready is not None and looking else None,
                    assigned=taken,
                    why=str(error),
                    opened=looking,
                    clean=not looking,
                    looking=looking,
                )
                client.on_end(fate)
            return None
        self.handles[handle.pid] = handle
        asyncio.get_running_loop().add_reader(handle.channel.fileno(), self._heard, handle)
        metrics.forked(client.spec.label)
        log.debug("worker_forked", worker=handle.pid, table=client.spec.label, backend=handle.backend)
        if handle.backend is not None:
            self._opened(handle)
        self._changed()
        return handle

    def _forked(self, client: Client, taken: Taken | None, ready: Ready | None, look: Look | None) -> Handle:
        """A new worker process. Raises OSError, and leaves nothing behind, when the system refuses.

        Of one that takes over a session that is `ready` the backend is known from the start.
        """
        ours, theirs = Channel.pair()
        handle = Handle(client=client, channel=ours, assigned=taken)
        if self.reports(client):
            ours.send(Report())
        spec, word = client.spec, look if taken is None else taken.run()
        keep = [theirs.fileno()]
        if ready is not None:
            handle.backend, handle.since = ready.session.pid, ready.since
            keep.append(ready.session.pgconn.socket)
        place = handle.place = metrics.claim()

        def main() -> int:
            metrics.enter(place, spec.label)
            return Worker(spec, theirs, word, ready).main()

        try:
            handle.pid = self.children.fork(
                main,
                keep=keep,
                on_end=lambda ended: self._ended(handle, ended),
                held=HELD,
            )
        except OSError:
            ours.close()
            metrics.release(place)
            raise
        finally:
            theirs.close()
            if ready is not None:
                ready.session.let_go(self._nowhere)
        return handle

    def _heard(self, handle: Handle) -> None:
        for message in handle.channel.receive():
            match message:
                case Opened(pid=backend, since=since):
                    if handle.backend is not None:
                        handle.client.on_reopened()
                    handle.backend, handle.since = backend, since
                    self._opened(handle)
                    if handle.assigned is None:
                        self._idle(handle)
                case Idle(runs=runs, begun=begun):
                    taken, handle.assigned, handle.runs = handle.assigned, None, runs
                    self._idle(handle)
                    handle.client.on_idle(taken, begun)
                case Found(row=row):
                    self._found(handle, row)
                case Finished(ids=ids):
                    handle.client.on_finished(ids)
                case Lost():
                    handle.lost = message
                case Progress():
                    handle.client.on_progress(message)
        if handle.channel.closed and handle.state is not State.ENDING:
            asyncio.get_running_loop().remove_reader(handle.channel.fileno())

    def _opened(self, handle: Handle) -> None:
        """A session after refused ones: the next may be tried at once; all at once when that lasts."""
        pause = self._pauses.get(handle.client)
        if pause is None:
            return
        if time.monotonic() - pause.last >= QUIET:
            del self._pauses[handle.client]
            log.info("workers_open_again", table=handle.client.spec.label)
        pause.tries, pause.until = 0, 0.0
        handle.client.wake()

    def _idle(self, handle: Handle) -> None:
        if handle.state is State.ENDING:
            return
        handle.state, handle.asked = State.IDLE, False
        for item in self._next:
            if item[0] is handle.client and handle.admits(item[1]) and self._give(handle, item[1]):
                self._next.remove(item)
                self._place_free()
                return
        ending = sum(h.state is State.ENDING for h in self.handles.values())
        if len(self._pending) + len(self._before(handle.client)) > max(0, self._unused()) + ending:
            self._end(handle)
            return
        for client in list(self._waiting):
            client.wake()
        self._linger(handle)

    def _linger(self, handle: Handle) -> None:
        """Keep an idle worker for a while; for ever if it is a spare one."""
        if sum(h.state is State.IDLE for h in self.of(handle.client)) > self.spare:
            loop = asyncio.get_running_loop()
            handle.linger = loop.call_later(self.linger.total_seconds(), self._end, handle)

    def _end_one_idle(self, *, of: Client | None = None, beside: Client | None = None) -> bool:
        """End an idle worker of this table, or of another than that, the longest-lived first."""
        idle = [h for h in self.handles.values() if h.state is State.IDLE and h.client is not beside]
        idle = [h for h in idle if of is None or h.client is of]
        if idle:
            self._end(min(idle, key=lambda h: h.born))
        return bool(idle)

    def _end(self, handle: Handle) -> None:
        if handle.state is State.ENDING:
            return
        if handle.linger is not None:
            handle.linger.cancel()
        handle.state = State.ENDING
        loop = asyncio.get_running_loop()
        loop.remove_reader(handle.channel.fileno())
        handle.channel.close()

    def _ended(self, handle: Handle, ended: Ended) -> None:
        """SIGCHLD: the one place that logs every worker's end."""
        if handle.state is not State.ENDING:
            self._heard(handle)
            self._end(handle)
        del self.handles[handle.pid]
        metrics.release(handle.place)
        clean = ended.status == 0
        if handle.looking is not None and not handle.looking.answer.done():
            handle.looking.answer.set_result(None)
        if not clean:
            metrics.crashed(handle.client.spec.label)
        # One that took a session over may have found it dead, and none to be had in its place.
        opened = handle.lost.opened if handle.lost is not None else handle.backend is not None
        why = " ".join(f"worker {handle.pid}: {handle.lost.why if handle.lost else ended}".split())
        if clean or opened or ended.status != LOST:
            log.event(
                "debug" if clean else "warning" if ended.status == LOST else "error",
                "worker_ended",
                worker=handle.pid,
                table=handle.client.spec.label,
                how=str(ended),
                why=None if clean else why,
            )
        if not clean and not opened:
            self._back_off(handle.client, why)
        handle.client.on_end(
            Fate(
                backend=handle.backend,
                since=handle.since,
                assigned=handle.assigned,
                why=why,
                opened=opened,
                clean=clean,
                interrupted=handle.killed,
                felled=handle.lost is not None and handle.lost.felled,
                looking=handle.looking is not None and not handle.looking.over,
            )
        )
        self._place_free()
        self._changed()

    def _place_free(self) -> None:
        while self._pending and self._unused() > 0:
            self._next.append(self._pending.popleft())
        self._fork_next()
        for client in list(self._waiting):
            client.wake()

    def _back_off(self, client: Client, why: str) -> None:
        """No session to be had (too many connections, server down): a pause that grows, said once.

        It does not grow for those that were refused together.
        """
        if client not in self._pauses:
            log.warning("workers_cannot_open", table=client.spec.label, why=why)
        self.served(client)
        pause = self._pauses.setdefault(client, _Pause())
        pause.last = time.monotonic()
        if pause.until > pause.last:
            return
        pause.tries += 1
        pause.until = time.monotonic() + min(10.0, 0.1 * 2 ** min(pause.tries, 10)) * random.uniform(0.5, 1.0)


@dataclass(kw_only=True)
class _Pause:
    """How long a client forks no worker; `last` is when a session was refused last (time.monotonic())."""

    tries: int = 0
    until: float = 0.0
    last: float = 0.0
