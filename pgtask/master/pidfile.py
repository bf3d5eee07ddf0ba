"""The pidfile: who holds the lock on it is the master whose pid stands in it; unlocked, it means nothing.

So it is right after a crash too, when the pid may be another process's by now. A script asks the same question by
`flock --nonblock --shared FILE true`, and has the lock itself for a moment; so a master tries for a while.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pgtask.errors import UserError

PATIENCE = 0.5
"""Seconds for which a lock may be somebody's who only asks."""


@contextlib.contextmanager
def held(path: Path | None) -> Iterator[None]:
    """Hold the locked pidfile; one left by a crash is taken over, a living master's is refused with a UserError."""
    if path is None:
        yield
        return
    with os.fdopen(_locked(path), "r+") as stream:
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        try:
            yield
        finally:
            if _is_at(path, stream.fileno()):
                path.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    """A descriptor of the file with the lock on it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                pid = re.sub("[^0-9]", "", os.read(descriptor, 20).decode(errors="replace"))
                os.close(descriptor)
                raise UserError(f"pidfile {path}: master {pid} is running") from None
        # A script asks, or the master that has just ended has removed it, and there may be a new one.
        time.sleep(0.01)
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        # Whoever may write to its directory could have made it a link to a file of ours, which we would empty.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"pidfile {path}: {reason}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"pidfile {path}: is not a file of its own")
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
