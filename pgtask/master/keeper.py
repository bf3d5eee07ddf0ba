"""The master's side of the monitor: forks it, answers it, starts it again when it has died, ends it.

The monitor (monitor.py) lives beside the workers as a child that the master could do without at any moment. It asks,
by a line on a socket pair, and the master's loop answers with what it knows: so an answer is also the proof that the
loop is alive. The master never waits for it: what it does not read stays in a buffer, and it asks one thing at a time.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping

from pgtask import log, metrics
from pgtask.async_session import event_or_timeout
from pgtask.config import Config
from pgtask.process import HANDLED, Children, Ended, unblock

SHORTEST, LONGEST = 1.0, 60.0
"""Seconds before a monitor that has died is started again: doubled each time, unless it has lived for LONGEST."""

GRACE = 2.0
"""Seconds that the end of a killed monitor is waited for."""


IGNORED = tuple(number for number in HANDLED if number != signal.SIGCHLD)
"""Signals that a terminal or a service manager sends to every process: the monitor goes on until the master ends."""


class Keeper:
    """Keeps one monitor while the configuration has `listen`."""

    def __init__(self, children: Children, status: Callable[[], Mapping[str, object]]):
        self._children = children
        self._status = status
        self._config: Config | None = None  # None: no monitor is wanted
        self._known: object = None  # what the monitor was started with
        self._pid = 0
        self._ending = False
        self._gone = asyncio.Event()
        self._started_at = 0.0
        self._pause = SHORTEST
        self._again: asyncio.TimerHandle | None = None
        self._talk: asyncio.Task[None] | None = None

    def configure(self, config: Config) -> None:
        """Begin, change or end, as it is configured now."""
        before, self._known, self._config = self._known, None, None
        if config.master.listen:
            metrics.start(table.label for table in config.tables)
            its_log = (config.master.log, config.master.log_level, config.master.log_format)
            self._known = (config.master.listen, config.tables, its_log, metrics.directory())
            self._config = config
        else:
            metrics.stop()
        if self._known == before:
            return
        self._pause = SHORTEST
        if self._pid:
            self._kill()  # and another one is started when it has gone, which frees its port
        else:
            self._start()

    async def end(self) -> None:
        """No monitor any more, and nothing left of what was counted."""
        self._config = None
        if self._again is not None:
            self._again.cancel()
        if self._pid:
            self._kill()
            await event_or_timeout(self._gone, GRACE)
        metrics.stop()

    def _kill(self) -> None:
        """It has nothing to save, and may hang."""
        self._ending = True
        os.kill(self._pid, signal.SIGKILL)

    def _start(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if (config := self._config) is None:
            return
        try:
            ours = self._forked(config)
        except OSError as error:
            self._retry(f"fork: {error}")
            return
        self._ending, self._started_at = False, time.monotonic()
        self._gone.clear()
        self._talk = asyncio.get_running_loop().create_task(self._answer(ours))
        log.info("monitor_started", monitor=self._pid, listen=config.master.listen)

    def _forked(self, config: Config) -> socket.socket:
        """Our end of a new monitor's socket pair. Raises OSError when the system refuses."""
        ours, theirs = socket.socketpair()

        def main() -> int:
            for number in IGNORED:
                signal.signal(number, signal.SIG_IGN)
            unblock(*IGNORED)
            from pgtask.monitor import monitor  # what it needs is not for the master

            return monitor.main(config, theirs)

        try:
            self._pid = self._children.fork(main, keep=[theirs.fileno()], on_end=self._ended, held=IGNORED)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _ended(self, ended: Ended) -> None:
        self._pid = 0
        self._gone.set()
        if self._talk is not None:
            self._talk.cancel()
        if self._ending:
            self._start()
            return
        if time.monotonic() - self._started_at > LONGEST:
            self._pause = SHORTEST
        self._retry(str(ended))

    def _retry(self, why: str) -> None:
        log.warning("monitor_ended", why=why, pause=self._pause)
        self._again = asyncio.get_running_loop().call_later(self._pause, self._start)
        self._pause = min(LONGEST, 2 * self._pause)

    async def _answer(self, ours: socket.socket) -> None:
        """A line for each line. Of the monitor's end we hear by its signal."""
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            with contextlib.suppress(ConnectionError):
                while await reader.readline():
                    writer.write(json.dumps(self._status()).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()
