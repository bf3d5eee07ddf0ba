"""What every test may rely on: the fixtures, no PG* variables, and an end that cleans up."""

import os
import signal
import tempfile

import pytest

from pgtask import embedded
from pgtask.errors import UserError

pytest_plugins = [
    "tests.fixtures.server",
    "tests.fixtures.database",
    "tests.fixtures.master",
    "tests.fixtures.ledger",
    "tests.fixtures.proxy",
    "tests.fixtures.command",
    "tests.fixtures.daemons",
]


MEMORY = "/dev/shm"
"""Where a server's files are made several times as fast as on a disk, and every test makes a database."""

ROOM = 4 << 30
"""Bytes that must be free there; a part of the suite needs up to half a GiB at a time."""


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith("PG") and not name.startswith("PGTASK_TEST_")]:
        del os.environ[name]
    if "PGTASK_TEST_DSN" not in os.environ:
        check_version(os.environ.get("PGTASK_TEST_PG"))
    if "TMPDIR" not in os.environ and usable(MEMORY):
        os.environ["TMPDIR"] = tempfile.tempdir = MEMORY
    # `timeout bin/test` and the like: leave by the door, so that servers and masters are stopped. A shell that starts
    # us in the background has INT ignored, and what we start would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def check_version(wanted: str | None) -> None:
    """A version that is not there is one line at the start, not an error of every test."""
    if wanted and not wanted.isdecimal():
        raise pytest.UsageError(f"PGTASK_TEST_PG is a major version such as 16, not {wanted!r}")
    try:
        embedded.find(int(wanted) if wanted else None)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def usable(directory: str) -> bool:
    """Is there room in it, also for programs?"""
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    open_to_us = os.access(directory, os.W_OK) and not found.f_flag & os.ST_NOEXEC
    return open_to_us and found.f_bavail * found.f_frsize >= ROOM
