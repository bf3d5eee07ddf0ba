"""The pidfile at its edges: the lock is what counts, and signals may come from the moment it can be read."""

import fcntl
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP, SIGTERM, SIGUSR1

import pytest

from tests.fixtures.locks import passes
from tests.fixtures.master import Master
from tests.fixtures.processes import descriptors
from tests.fixtures.wait import eventually

NOWHERE = "host=127.0.0.1 port=1 dbname=nowhere"

PATIENTLY = """
import runpy, sys
from pgtask.master import pidfile
pidfile.PATIENCE = 60.0
sys.argv = ["pgtask-master", *sys.argv[4:]]
runpy.run_module("pgtask", run_name="__main__")
"""
"""A master that waits for a lock for as long as we may be slow to let go of it."""


@pytest.fixture
def pidfile(tmp_path: Path) -> Path:
    return tmp_path / "it.pid"


def is_of(pidfile: Path, one: Master) -> bool:
    return pidfile.exists() and pidfile.read_text("utf-8") == f"{one.pid}\n"


def test_lock_of_somebody_who_only_asks_does_not_refuse_a_master(master: Callable[..., Master], pidfile: Path) -> None:
    pidfile.write_text("1\n", "utf-8")
    with pidfile.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        one = master("--pidfile", str(pidfile), NOWHERE, wait=False, through=[sys.executable, "-c", PATIENTLY])
        eventually(lambda: str(pidfile) in descriptors(one.pid) or is_of(pidfile, one))
        fcntl.flock(asking, fcntl.LOCK_UN)
    eventually(lambda: is_of(pidfile, one))


def test_master_that_waits_for_a_pidfile_which_is_removed_has_one_of_its_own(
    master: Callable[..., Master], pidfile: Path
) -> None:
    """As the end of another master removes it."""
    with pidfile.open("w") as ending:
        fcntl.flock(ending, fcntl.LOCK_EX)
        one = master("--pidfile", str(pidfile), NOWHERE, wait=False, through=[sys.executable, "-c", PATIENTLY])
        eventually(lambda: str(pidfile) in descriptors(one.pid))
        pidfile.unlink()
    eventually(lambda: is_of(pidfile, one))
    assert one.stop() == 0
    assert not pidfile.exists()


def test_second_master_is_refused(master: Callable[..., Master], pidfile: Path) -> None:
    one = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    eventually(lambda: is_of(pidfile, one))
    second = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    second.expect_exit = 2
    assert second.process.wait(30) == 2
    assert second.logged(f"^pgtask-master: pidfile {pidfile}: master {one.pid} is running$")
    assert is_of(pidfile, one)


def test_pidfile_of_another_master_is_not_removed(master: Callable[..., Master], pidfile: Path) -> None:
    one = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    eventually(lambda: is_of(pidfile, one))
    pidfile.unlink()
    second = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    eventually(lambda: is_of(pidfile, second))
    assert one.stop() == 0
    assert is_of(pidfile, second)


@pytest.mark.parametrize("sig", [SIGHUP, SIGUSR1])
def test_signal_as_soon_as_the_pidfile_can_be_read_ends_nothing(
    master: Callable[..., Master], pidfile: Path, sig: int
) -> None:
    one = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    eventually(lambda: is_of(pidfile, one), every=0.0005)
    one.process.send_signal(sig)
    one.wait_log("table_down")
    if sig == SIGHUP:
        one.wait_log("reloaded")
    passes(0.1)
    assert one.process.poll() is None
    assert bool(one.logged("reloaded")) is (sig == SIGHUP)


def test_signals_up_to_the_very_end_leave_no_pidfile(master: Callable[..., Master], pidfile: Path) -> None:
    one = master("--pidfile", str(pidfile), NOWHERE, wait=False)
    one.wait_log("table_down")

    def ended() -> bool:
        one.signal(SIGTERM)
        return one.process.poll() is not None

    eventually(ended, every=0.0005)
    assert one.process.returncode == 0
    assert not pidfile.exists()
