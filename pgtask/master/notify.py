"""What the master tells the service manager that started it: sd_notify(3), in as much as a daemon needs it.

A message is one datagram of VARIABLE=value lines to the socket that NOTIFY_SOCKET names. Who listens is systemd
(Type=notify) or anybody else who speaks the protocol. Nothing here may hold up the loop: the socket does not block,
and what finds the manager's queue full is sent a moment later. The variables are taken out of the environment, so
that no worker, and nothing that it may start, can speak for the master.

The watchdog's sign of life comes from the loop itself. So a loop that hangs gives none, and the manager ends it.
"""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping
from datetime import timedelta

from pgtask import log
from pgtask.errors import UserError

STATUS_GAP = 1.0
"""Seconds between two messages that only tell a new status: the manager has more to do than to hear of every worker."""

FULL_GAP = 0.05
"""Seconds until the next try when the manager's queue is full."""

ALIVE = b"WATCHDOG=1"


class Manager:
    """The service manager; nobody, if the environment names none. All but the constructor wants a running loop."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take the variables out of the environment. Raises UserError if they make no sense."""
        self._address = _address(environment.pop("NOTIFY_SOCKET", ""))
        self._pulse = _pulse(environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", ""))
        self._socket = _socket() if self._address else None
        self._unsent: deque[bytes] = deque()
        self._beating = False
        self._deaf = False  # the manager could not be reached, which is said once
        self._status = self._told = ""
        self._pause: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """The configuration is read and every table has its poller; also the end of `reloading`."""
        self._tell("READY=1")
        if self._pulse and not self._beating:
            self._beat()

    def reloading(self) -> None:
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, within: timedelta) -> None:
        """The end has begun, and takes no longer than this, be it more than the manager would allow."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={within // timedelta(microseconds=1)}")

    def status(self, text: str) -> None:
        """One line for people. Of many in a short time only the last is told."""
        self._status = " ".join(text.split())
        if self._pause is None and self._socket is not None:
            self._tell_status()

    def _tell_status(self) -> None:
        self._pause = None
        if self._status != self._told:
            if not self._unsent:  # a manager that hears nothing is not told more and more
                self._tell()
            self._pause = asyncio.get_running_loop().call_later(STATUS_GAP, self._tell_status)

    def _beat(self) -> None:
        self._beating = True
        if ALIVE not in self._unsent:
            self._send(ALIVE)
        asyncio.get_running_loop().call_later(self._pulse, self._beat)

    def _tell(self, *lines: str) -> None:
        self._told = self._status
        self._send("\n".join([*lines, f"STATUS={self._status}"]).encode("utf-8", "backslashreplace"))

    def _send(self, message: bytes) -> None:
        if self._socket is not None:
            self._unsent.append(message)
            if len(self._unsent) == 1:
                self._flush(self._socket)

    def _flush(self, to: socket.socket) -> None:
        """Send what waits, in its order; what the manager has no room for a moment later."""
        while self._unsent:
            try:
                to.sendto(self._unsent[0], self._address)
                self._deaf = False
            except BlockingIOError:
                asyncio.get_running_loop().call_later(FULL_GAP, self._flush, to)
                return
            except OSError as error:
                if not self._deaf:
                    log.warning("notify_failed", error=str(error))
                self._deaf = True
            self._unsent.popleft()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _address(text: str) -> str:
    """As Python's sockets take it: a path, or a name in the abstract namespace after a NUL."""
    if text and text[0] not in "/@":
        raise UserError(f"NOTIFY_SOCKET: must be an absolute path or @ and a name, not {text!r}")
    return "\0" + text[1:] if text.startswith("@") else text


def _pulse(microseconds: str, pid: str) -> float:
    """Seconds between two signs of life, half of what the manager waits; 0 if it waits for none of ours."""
    for name, text in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        if text and not (text.isascii() and text.isdecimal()):
            raise UserError(f"{name}: must be a number, not {text!r}")
    meant = not pid or int(pid) == os.getpid()
    return int(microseconds or 0) / 2e6 if meant else 0.0
