"""The units of etc/systemd, by a real systemd where one can be booted, and what the master tells whoever started it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGSTOP, SIGTERM

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, passes, wait_runs
from tests.fixtures.machine import CannotBoot, Machine, machine
from tests.fixtures.master import Master
from tests.fixtures.monitor import Monitor
from tests.fixtures.processes import descriptors, frozen, processes, title
from tests.fixtures.service import ETC
from tests.fixtures.wait import eventually

UNITS = ETC / "systemd"
NOWHERE = "host=127.0.0.1 port=1 dbname=nowhere"


class Listener:
    """A service manager's socket, in the directory or in the abstract namespace."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(30)

    def next(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self.socket.recv(65536).decode().split("\n"))

    def wait(self, name: str, value: str | None = None) -> dict[str, str]:
        """The next message with this variable."""
        while name not in (found := self.next()) or found[name] != (value or found[name]):
            pass
        return found

    def env(self, **more: object) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address} | {name: str(value) for name, value in more.items()}


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    one = Listener(str(tmp_path / "notify"))
    yield one
    one.socket.close()


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_ready_is_said_once_tables_have_their_pollers_whatever_the_servers_do(
    master: Callable[..., Master], tmp_path: Path, kind: str
) -> None:
    listener = Listener(str(tmp_path / "notify") if kind == "path" else f"@pgtask-test-{os.getpid()}")
    one = master(NOWHERE, env=listener.env(), wait=False)
    ready = listener.wait("READY")
    assert ready["READY"] == "1"
    assert "1 table" in ready["STATUS"]
    one.wait_log("table_down")
    listener.socket.close()


def test_status_is_what_ps_shows(database: Database, master: Callable[..., Master], listener: Listener) -> None:
    # The first variable of an environment lies where the title goes, so to take it away must not lose the title.
    first = ("env", "-i", f"NOTIFY_SOCKET={listener.address}", *(f"{name}={os.environ[name]}" for name in os.environ))
    one = master(database.conninfo, through=first)
    with held(database):
        database.insert(WAIT)
        wait_runs(database)
        eventually(lambda: "1 worker" in title(one.pid))  # which comes after the fork, be the worker ever so quick
        while title(one.pid) != f"pgtask: master ({listener.wait('STATUS')['STATUS']})":
            pass


def test_many_changes_in_a_short_time_are_told_as_one(
    database: Database, master: Callable[..., Master], listener: Listener
) -> None:
    one = master("--linger", "0", database.conninfo, env=listener.env(), tables=1)
    since = time.monotonic()
    for number in range(20):
        database.wait(database.insert("SELECT 1", delete=False, group=str(number)))
    assert one.stop() == 0
    took = time.monotonic() - since
    listener.socket.setblocking(False)
    told = 0
    while True:
        try:
            told += "STATUS" in listener.next()
        except BlockingIOError:
            break
    assert told <= took + 5  # one a second, and with what else there is to say


def test_reload_is_said_from_its_begin_to_its_end_also_of_a_refused_one(
    master: Callable[..., Master], listener: Listener, tmp_path: Path
) -> None:
    one = master(config=f'[[database]]\nconninfo = "{NOWHERE}"\n', env=listener.env(), wait=False)
    one.may_log_errors = True
    listener.wait("READY")
    for text in ("", "wrong"):
        with (tmp_path / "master0.toml").open("a", encoding="utf-8") as file:
            file.write(text)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        one.signal(SIGHUP)
        reloading = listener.wait("RELOADING", "1")
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        listener.wait("READY", "1")
    assert one.logged("reload_refused")


def test_stop_asks_for_the_time_that_its_configuration_gives_it(
    master: Callable[..., Master], listener: Listener
) -> None:
    one = master("--stop-timeout", "1 hour", NOWHERE, env=listener.env(), wait=False)
    listener.wait("READY")
    one.signal(SIGTERM)
    stopping = listener.wait("STOPPING", "1")
    assert 3600 < int(stopping["EXTEND_TIMEOUT_USEC"]) / 1e6 < 3700
    assert "stopping" in stopping["STATUS"]


def test_loop_that_hangs_gives_no_sign_of_life(master: Callable[..., Master], listener: Listener) -> None:
    one = master(NOWHERE, env=listener.env(WATCHDOG_USEC=400_000), wait=False)
    listener.wait("READY")
    assert any(waited(listener) >= 0.05 for _ in range(20))  # some may have gathered while we were not at work
    with frozen(one.pid):
        listener.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                listener.next()
        passes(0.6)
        with pytest.raises(BlockingIOError):
            listener.next()
    listener.socket.settimeout(30)
    listener.wait("WATCHDOG", "1")


def waited(listener: Listener) -> float:
    """Seconds until the next sign of life has come."""
    since = time.monotonic()
    listener.wait("WATCHDOG", "1")
    return time.monotonic() - since


def test_watchdog_of_another_process_is_not_fed(master: Callable[..., Master], listener: Listener) -> None:
    one = master(NOWHERE, env=listener.env(WATCHDOG_USEC=20_000, WATCHDOG_PID=os.getpid()), wait=False)
    listener.wait("READY")
    passes(0.3)
    assert one.stop() == 0
    while "STOPPING" not in (found := listener.next()):
        assert "WATCHDOG" not in found


def test_manager_that_does_not_read_holds_nothing_up_and_hears_all_in_the_end(
    database: Database, master: Callable[..., Master], listener: Listener
) -> None:
    one = master(database.conninfo, env=listener.env(WATCHDOG_USEC=2_000))
    full = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    passes(min(full * 0.001 * 2, 3))
    for times in (1, 2):
        one.signal(SIGHUP)
        one.wait_log(r" reloaded ", times)
    assert database.wait(database.insert("SELECT 1", delete=False))["output"] == "1"
    told = [listener.wait(name) for name in ("READY", "RELOADING", "READY", "RELOADING", "READY")]
    assert len(told) == 5


def test_sign_of_life_that_finds_the_queue_full_is_given_as_soon_as_there_is_room(
    master: Callable[..., Master], listener: Listener
) -> None:
    """By the time the next one is due, the manager has lost its patience."""
    one = master(NOWHERE, env=listener.env(WATCHDOG_USEC=2_000_000), wait=False)
    listener.wait("WATCHDOG")
    fill(listener)
    for times in (1, 2):
        one.signal(SIGHUP)
        one.wait_log(r" reloaded ", times)
        passes(3)
    told = [listener.next()]
    while sum("RELOADING" in found for found in told) < 2:
        told.append(listener.next())
    assert any("WATCHDOG" in found for found in told)


def fill(listener: Listener) -> None:
    """Its queue; each sender may have so much there."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.sendto(b"OTHER=1", listener.address)
                    sent += 1
            if not sent:
                return


def test_workers_have_neither_the_socket_nor_the_variables(
    database: Database, master: Callable[..., Master], listener: Listener
) -> None:
    one = master(database.conninfo, env=listener.env(WATCHDOG_USEC=10**9))
    with held(database):
        database.insert(WAIT)
        wait_runs(database)
        datagram = {f"socket:[{line.split()[6]}]" for line in unix_sockets() if line.split()[4] == "0002"}
        assert datagram & set(descriptors(one.pid))
        [worker] = one.workers()
        assert not datagram & set(descriptors(worker))


def unix_sockets() -> list[str]:
    return Path("/proc/net/unix").read_text("utf-8").splitlines()[1:]


def test_manager_that_is_gone_is_missed_once(
    database: Database, master: Callable[..., Master], listener: Listener
) -> None:
    one = master(database.conninfo, env=listener.env(WATCHDOG_USEC=20_000))
    listener.socket.close()
    one.wait_log("notify_failed")
    assert database.wait(database.insert("SELECT 1", delete=False))["output"] == "1"
    assert len(one.logged("notify_failed")) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NOTIFY_SOCKET", "notify", "must be an absolute path or @ and a name"),
        ("WATCHDOG_USEC", "soon", "must be a number"),
        ("WATCHDOG_PID", "-1", "must be a number"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    master: Callable[..., Master], name: str, value: str, said: str
) -> None:
    one = master(NOWHERE, env={name: value}, wait=False)
    one.expect_exit = 2
    assert one.process.wait(30) == 2
    assert one.logged(f"^pgtask-master: {name}: {said}, not '{value}'$")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted once for the module; each test starts and stops units."""
    try:
        with machine(tmp_path_factory.mktemp("systemd"), systemd=True) as one:
            for command in (
                "systemd-sysusers /opt/pgtask/share/pgtask/sysusers.d/pgtask.conf",
                "install -d -m 750 -g pgtask /etc/pgtask",
                "cp -r /opt/pgtask/share/pgtask/systemd/. /etc/systemd/system",
                "systemctl daemon-reload",
            ):
                done = one.run(*command.split())
                assert done.returncode == 0, done
            yield one
    except CannotBoot as error:
        pytest.skip(str(error))


@pytest.fixture
def unit(system: Machine, database: Database) -> Iterator[Callable[..., None]]:
    """`unit(name, more)` configures what pgtask.service or the instance serves."""
    names = set()

    def configure(name: str = "pgtask", more: str = "") -> None:
        names.add(name)
        text = f'[master]\nlog = "/var/log/pgtask/{name}.log"\n{more}\n[[database]]\nconninfo = "{database.tcp}"\n'
        system.path(f"/etc/pgtask/{name}.toml").write_text(text, "utf-8")

    yield configure
    for name in names:
        one = "pgtask" if name == "pgtask" else f"pgtask@{name}"
        system.systemctl("stop", one)
        system.run("systemctl", "reset-failed", one)  # what has not failed may be forgotten already
        assert not system.pids(f"{one}.service")
        system.path(f"/var/log/pgtask/{name}.log").unlink()


def start(system: Machine, *names: str) -> None:
    """Start units, until they serve their tables; READY is said before."""
    system.systemctl("start", *names)
    for name in names:
        eventually(lambda name=name: " leading " in log(system, name.partition("@")[2] or name))  # type: ignore[misc]


def log(system: Machine, name: str = "pgtask") -> str:
    return system.path(f"/var/log/pgtask/{name}.log").read_text("utf-8")


def test_service_serves_reloads_and_stops_under_systemd(
    system: Machine, database: Database, unit: Callable[..., None]
) -> None:
    monitor = Monitor()
    unit(more=f'listen = "{monitor.listen}"')
    start(system, "pgtask")
    assert database.wait(database.insert("SELECT 1", delete=False))["output"] == "1"
    [main, *_] = system.pids("pgtask.service")
    eventually(lambda: monitor.answers() and monitor.get("/readyz").status == 200)
    status = eventually(lambda: (text := system.show("pgtask", "StatusText")) and "1 table leading" in text and text)
    assert title(main).startswith(f"pgtask: master /etc/pgtask/pgtask.toml ({status[:15]}")
    assert "running_as_root" not in log(system)
    assert system.path("/run/pgtask/pgtask.pid").read_text().strip() == system.show("pgtask", "MainPID")
    system.systemctl("reload", "pgtask")
    eventually(lambda: " reloaded " in log(system))
    unit(more="wrokers = 3")
    system.systemctl("reload", "pgtask", status=1)
    eventually(lambda: system.show("pgtask", "ActiveState") == "active")
    assert system.pids("pgtask.service")[0] == main
    unit()
    system.systemctl("stop", "pgtask")
    assert system.show("pgtask", "Result") == "success"
    assert " ERROR " not in log(system)


def test_stop_under_systemd_waits_for_a_run_as_long_as_the_configuration_says(
    system: Machine, database: Database, unit: Callable[..., None]
) -> None:
    """Longer than TimeoutStopSec, which is made short here, to see that it does not count."""
    unit(more='stop_timeout = "10 min"')
    with shorter(system, "TimeoutStopSec=1"):
        start(system, "pgtask")
        with held(database):
            id = database.insert(WAIT, delete=False)
            wait_runs(database)
            system.systemctl("stop", "--no-block", "pgtask")
            eventually(lambda: " stopping " in log(system))
            passes(2)
            assert database.task(id)["state"] == "WORK"  # type: ignore[index]
        assert database.wait(id)["state"] == "DONE"
        eventually(lambda: system.show("pgtask", "ActiveState") == "inactive")
        assert system.show("pgtask", "Result") == "success"


def test_hung_master_is_ended_by_the_watchdog_and_started_again(
    system: Machine, database: Database, unit: Callable[..., None]
) -> None:
    unit()
    errors = "StandardError=append:/var/log/pgtask/errors"
    with shorter(system, f"WatchdogSec=4\nTimeoutStopSec=5\nRestartSec=100ms\nLimitCORE=0\n{errors}"):
        start(system, "pgtask")
        [main, *_] = system.pids("pgtask.service")
        passes(6)
        assert system.pids("pgtask.service")[0] == main
        os.kill(main, SIGSTOP)
        eventually(lambda: main not in [one.pid for one in processes() if one.state != "Z"])
        assert database.wait(database.insert("SELECT 1", delete=False))["output"] == "1"
        assert system.show("pgtask", "NRestarts") == "1"
        said = system.path("/var/log/pgtask/errors").read_text("utf-8")
        assert "Fatal Python error: Aborted" in said
        assert "in run_forever" in said


def test_killed_master_is_started_again_and_a_wrong_configuration_is_not(
    system: Machine, database: Database, unit: Callable[..., None]
) -> None:
    unit()
    with shorter(system, "RestartSec=100ms"):
        start(system, "pgtask")
        os.kill(system.pids("pgtask.service")[0], SIGKILL)
        assert database.wait(database.insert("SELECT 1", delete=False))["output"] == "1"
        assert system.show("pgtask", "NRestarts") == "1"
        system.systemctl("stop", "pgtask")
        unit(more="wrokers = 3")
        system.systemctl("start", "pgtask", status=1)
        assert system.show("pgtask", "ActiveState") == "failed"
        assert system.show("pgtask", "ExecMainStatus") == "2"


def test_two_instances_run_side_by_side_and_one_stops_alone(
    system: Machine, database: Database, unit: Callable[..., None]
) -> None:
    unit("first")
    unit("second")
    start(system, "pgtask@first")
    system.systemctl("start", "pgtask@second")
    assert re.fullmatch(r"\d+\n", system.path("/run/pgtask/first.pid").read_text())
    system.systemctl("stop", "pgtask@first")
    assert not system.path("/run/pgtask/first.pid").exists()
    assert system.path("/run/pgtask/second.pid").read_text().strip() == system.show("pgtask@second", "MainPID")
    eventually(lambda: " leading " in log(system, "second"))


class shorter:  # noqa: N801 (a context)
    """The unit with other settings."""

    def __init__(self, system: Machine, settings: str) -> None:
        self._system = system
        self._file = system.path("/etc/systemd/system/pgtask.service.d/test.conf")
        self._settings = settings

    def __enter__(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        self._file.write_text(f"[Service]\n{self._settings}\n", "utf-8")
        self._system.systemctl("daemon-reload")

    def __exit__(self, *_: object) -> None:
        self._file.unlink()
        self._system.systemctl("daemon-reload")


def test_units_differ_in_names_only() -> None:
    """An instance's files are called by its name instead of pgtask."""
    single, template = ((UNITS / name).read_text("utf-8") for name in ("pgtask.service", "pgtask@.service"))
    named = template.replace(" (%i)", "").replace("/pgtask/%i", "/pgtask/pgtask").replace("/pgtask-%i", "/pgtask")
    assert named == single


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    """The units, with a program that is there."""
    for unit in UNITS.iterdir():
        text = unit.read_text("utf-8").replace("/opt/pgtask/bin/pgtask-master", "/bin/true")
        (tmp_path / unit.name).write_text(text, "utf-8")
    (tmp_path / "pgtask@crm.service").symlink_to("pgtask@.service")
    return tmp_path


@pytest.mark.parametrize("name", ["pgtask.service", "pgtask@crm.service"])
def test_unit_is_verified_and_little_exposed(placed: Path, name: str) -> None:
    verified = analyze("verify", placed / name)
    assert (verified.returncode, verified.stderr) == (0, "")
    exposure = analyze("security", "--offline=true", "--threshold=15", placed / name)
    assert exposure.returncode == 0, exposure.stdout


def test_system_user_is_made(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", ETC / "sysusers.d/pgtask.conf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passwd = (tmp_path / "etc/passwd").read_text("utf-8")
    assert re.fullmatch(r"pgtask:x:\d+:\d+:pgtask task scheduler:/var/lib/pgtask:.*/nologin\n", passwd)
