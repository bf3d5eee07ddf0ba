"""A log that cannot be written, because the disk is full or a limit is reached, disturbs no task."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually


@contextmanager
def disk_full(master: Master, log: Path) -> Iterator[None]:
    """The log is on a device that has no room, and then again on one that has."""
    room = log.with_name("room.log")
    log.rename(room)
    log.symlink_to("/dev/full")
    yield
    room.rename(log)  # in one step: a line that came in between would be lost with a file of its own


@contextmanager
def file_size_limit(master: Master, log: Path) -> Iterator[None]:
    """The log may not grow by more than part of a line; this tears a line apart, as a full disk does."""
    _, hard = resource.prlimit(master.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(master.pid, resource.RLIMIT_FSIZE, (log.stat().st_size + 20, hard))
    yield
    resource.prlimit(master.pid, resource.RLIMIT_FSIZE, (hard, hard))


def events(log: Path, name: str) -> list[dict[str, Any]]:
    """The whole lines of the log that say so."""
    lines = [line for line in log.read_text("utf-8").splitlines() if line.startswith("{") and line.endswith("}")]
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize("fault", [disk_full, file_size_limit])
def test_tasks_go_on_while_the_log_cannot_be_written_and_lost_lines_are_counted(
    database: Database, ledger: Ledger, master: Callable[..., Master], tmp_path: Path, fault: Callable[..., Any]
) -> None:
    log = tmp_path / "pgtask.log"
    one = master("--log", str(log), "--log-format", "json", "--linger", "0", database.conninfo, wait=False)
    eventually(lambda: log.exists() and events(log, "leading"))
    ledger.fill(20)
    ledger.settled()
    eventually(lambda: not one.workers())
    forked = len(events(log, "worker_forked"))
    with fault(one, log):
        ledger.fill(40, groups=8)
        ledger.settled()
        eventually(lambda: not one.workers())
    assert len(events(log, "worker_forked")) == forked
    ledger.fill(10)
    ledger.settled()
    [again] = eventually(lambda: [event for event in events(log, "log_writable_again") if event["pid"] == one.pid])
    assert again["lost"] >= 8, "several workers were forked and have ended"
    assert len(events(log, "worker_forked")) > forked
    assert one.log() == "", "what cannot be written goes nowhere else"
