"""etc/init.d/pgtask, as it stands but for the place of its settings: every verb, whatever has become of the master."""

import getpass
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, passes
from tests.fixtures.processes import frozen, processes
from tests.fixtures.service import ETC, NEEDED, Script, as_user, service
from tests.fixtures.wait import eventually

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)), reason=f"the init script needs {', '.join(NEEDED)} (dpkg, util-linux, procps)"
)

OK, FAILED, BAD, UNKNOWN_VERB, DENIED, NOT_INSTALLED, NOT_CONFIGURED, NOT_RUNNING = range(8)
RUNNING, DEAD, STOPPED, UNKNOWN = 0, 1, 3, 4


@pytest.fixture
def script(database: Database) -> Iterator[Script]:
    with service() as one:
        yield Script(one, database)


def alive(pid: int) -> bool:
    return any(one.pid == pid and one.state not in "ZX" for one in processes())


def test_master_is_started_runs_tasks_and_is_stopped(script: Script) -> None:
    assert "not running" in script("status", status=STOPPED)
    pid = script.started()
    assert script.database.wait(script.database.insert("SELECT 1", delete=False))["output"] == "1"
    said = script("status", status=RUNNING)
    assert f"pid {pid}" in said
    assert f"pgtask: master {script.service.config} (1 table" in said
    assert script.service.log.stat().st_mode & 0o777 == 0o640
    assert "stopped" in script("stop")
    assert not alive(pid)
    assert not script.service.pidfile.exists()
    assert "not running" in script("status", status=STOPPED)


def test_start_of_a_running_and_stop_of_a_stopped_one_are_no_errors(script: Script) -> None:
    assert "not running" in script("stop")
    assert "not running" in script("force-stop")
    script("try-restart")
    assert script.service.masters() == []
    pid = script.started()
    assert f"already running, pid {pid}" in script("start")
    assert script.service.masters() == [pid]
    script("stop")


def test_restart_is_another_master_and_starts_one_where_none_is(script: Script) -> None:
    masters = []
    for verb in ("restart", "restart", "try-restart"):
        script(verb)
        masters.append(script.service.pid)
    assert len(set(masters)) == 3
    assert script.service.masters() == masters[-1:]
    script("stop")


def test_reload_reads_the_configuration_without_another_master(script: Script) -> None:
    pid = script.started()
    for times, verb in enumerate(("reload", "force-reload"), 1):
        script.configure(f"workers = {times}")
        script(verb)
        eventually(lambda times=times: script.service.logged().count(" reloaded ") == times)
    assert script.service.pid == pid
    script("stop")
    for verb in ("reload", "force-reload"):
        script(verb, status=NOT_RUNNING)


def test_wrong_configuration_is_said_and_a_running_master_left_alone(script: Script) -> None:
    pid = script.started()
    script.configure("wrokers = 3")
    for verb in ("reload", "force-reload", "restart", "try-restart"):
        assert 'did you mean "workers"' in script(verb, status=NOT_CONFIGURED)
    assert "running" in script("status")
    assert script.service.masters() == [pid]
    script("stop")  # for which the file need not be right
    assert "reload" not in script.service.logged()
    assert 'did you mean "workers"' in script("start", status=NOT_CONFIGURED)
    assert not script.service.pidfile.exists()


def test_master_that_cannot_start_says_why(script: Script) -> None:
    script.default(LOG="/proc/version/x.log")
    script.configure(f'log = "{script.service.top}/nowhere/it.log"')
    assert "nowhere/it.log: No such file or directory" in script("start", status=NOT_CONFIGURED)
    script("status", status=STOPPED)


def test_variables_of_a_shell_do_not_get_to_the_master_and_those_of_the_service_do(script: Script) -> None:
    done = script.service.run("env", "PGTASK_WORKERS=wrong", script.path, "start")
    assert done.returncode == OK, done
    script.default(PGTASK_WORKERS="wrong")
    assert "PGTASK_WORKERS: must be a whole number" in script("restart", status=NOT_CONFIGURED)
    script("stop")


def test_what_is_missing_is_said(script: Script) -> None:
    script.default(DAEMON="/nowhere/pgtask-master")
    assert "/nowhere/pgtask-master is not there" in script("start", status=NOT_INSTALLED)
    script.default(CONFIG="/nowhere/it.toml")
    assert "/nowhere/it.toml is not there" in script("start", status=NOT_CONFIGURED)
    script.default(DAEMON_USER="nobody-of-that-name")
    assert "there is no user nobody-of-that-name" in script("start", status=NOT_CONFIGURED)


def test_bad_arguments_have_statuses_of_their_own(script: Script) -> None:
    for arguments in ((), ("start", "now")):
        assert "usage:" in script(*arguments, status=BAD)
    assert "try-restart" in script("fly", status=UNKNOWN_VERB)


def test_only_root_may_start_and_stop_and_anybody_look(script: Script) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user's rights can only be tried as root")
    pid = script.started()
    for verb in ("start", "stop", "restart", "reload", "force-stop"):
        done = script.service.run(*as_user("daemon"), script.path, verb)
        assert (done.returncode, "only root" in done.stderr) == (DENIED, True), done
    done = script.service.run(*as_user("daemon"), script.path, "status")
    assert (done.returncode, f"pid {pid}" in done.stdout) == (RUNNING, True), done
    script("stop")


def test_crash_is_seen_and_started_after(script: Script) -> None:
    pid = script.started()
    os.kill(pid, SIGKILL)
    eventually(lambda: not alive(pid))
    assert "dead" in script("status", status=DEAD)
    script("reload", status=NOT_RUNNING)
    assert script.started() != pid
    os.kill(script.service.pid, SIGKILL)
    eventually(lambda: script.service.masters() == [])
    assert "not running" in script("stop")
    script("status", status=STOPPED)


def test_pid_of_another_process_in_the_pidfile_is_not_taken_for_the_master(script: Script) -> None:
    """Of another user's process, and of one of the daemon's own user."""
    pidfile, user = script.service.pidfile, script.service.user
    script.started()
    script("stop")
    for owner in (getpass.getuser(), user):
        with subprocess.Popen([*as_user(owner), "sleep", "600"]) as other:
            try:
                pidfile.write_text(f"{other.pid}\n", "utf-8")
                script("status", status=DEAD)
                script("reload", status=NOT_RUNNING)
                script("stop")
                script("force-stop")
                script("status", status=STOPPED)
                pidfile.write_text(f"{other.pid}\n", "utf-8")
                shutil.chown(pidfile, user)
                if owner == user:
                    assert script.started() != other.pid
                    script("stop")
                assert other.poll() is None
            finally:
                other.kill()


def test_root_makes_nothing_where_the_daemons_user_has_laid_a_link(script: Script, tmp_path: Path) -> None:
    """The link may change at any moment, also between two looks of the script's."""
    (there := tmp_path / "there").touch()
    nothing, pidfile = tmp_path / "nothing", script.service.pidfile
    script.started()  # so that there is a directory
    script("stop")
    over = threading.Event()

    def change() -> None:
        for target in itertools.cycle((there, nothing)):
            if over.is_set():
                return
            (new := pidfile.with_name("new")).symlink_to(target)
            new.rename(pidfile)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(20):
            script("stop")
            assert not nothing.exists()
    finally:
        over.set()
        changing.join()
        pidfile.unlink(missing_ok=True)
    pidfile.write_text("12\033[2J\n", "utf-8")
    assert "\033" not in script("stop")


def test_suspended_master_is_told_and_killed_by_a_stop(script: Script) -> None:
    script.configure('stop_timeout = "1 s"')
    script.default(KILL_AFTER=1)
    pid = script.started()
    with frozen(pid):
        assert f"suspended, pid {pid}" in script("status", status=UNKNOWN)
        assert "already running" in script("start")
        script("reload")
        assert "stopped" in script("stop")
        assert not alive(pid)
    script("status", status=STOPPED)


def test_stop_lets_a_run_end(script: Script) -> None:
    script.configure('stop_timeout = "10 min"')
    pid = script.started()
    with held(script.database):
        id = script.database.insert(WAIT, delete=False)
        script.database.wait(id, "WORK")
        stop = subprocess.Popen([script.path, "stop"])
        eventually(lambda: " stopping " in script.service.logged())
        passes(0.5)
        assert stop.poll() is None
    assert stop.wait(60) == 0
    assert not alive(pid)
    assert script.database.wait(id)["state"] == "DONE"


def test_force_stop_puts_a_run_back_at_once(script: Script) -> None:
    script.configure('stop_timeout = "10 min"')
    script.default(KILL_AFTER=60)
    script.started()
    id = script.database.insert("SELECT pg_sleep(600)", delete=False)
    script.database.wait(id, "WORK")
    script("force-stop")
    row = script.database.task(id)
    assert row is not None
    assert (row["state"], row["attempt"]) == ("PLAN", 0)


def test_force_stop_leaves_no_worker_of_a_master_that_was_killed(script: Script) -> None:
    script.default(KILL_AFTER=1)
    pid = script.started()
    id = script.database.insert("SELECT pg_sleep(600)", delete=False)
    script.database.wait_running(id)
    assert script.service.workers()
    with frozen(pid):
        script("force-stop")
    eventually(lambda: script.service.left() == [])
    pid = script.started()
    script.database.wait_running(script.database.insert("SELECT pg_sleep(600)", group="second"))
    os.kill(pid, SIGKILL)
    eventually(lambda: not alive(pid))
    assert script.service.workers()
    script("force-stop")
    eventually(lambda: script.service.left() == [])


def test_copy_is_an_instance_of_its_own_also_by_the_link_of_a_runlevel(script: Script) -> None:
    one = script.service
    defaults = script.defaults.with_name("pgtask-no-such-instance")
    defaults.write_text(f"DAEMON={one.daemon}\nDAEMON_USER={one.user}\n", "utf-8")
    for name in ("pgtask-no-such-instance", "S01pgtask-no-such-instance", "K09pgtask-no-such-instance"):
        link = one.top / name
        link.symlink_to(script.path)
        done = one.run(link, "start")
        said = "pgtask-no-such-instance: /etc/pgtask/no-such-instance.toml is not there\n"
        assert (done.returncode, done.stderr) == (NOT_CONFIGURED, said)


def test_script_is_plain_and_without_fault() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "--shell=sh", ETC / "init.d/pgtask"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_header_is_read_by_those_who_order_the_boot() -> None:
    """insserv and systemd-sysv-generator take these lines from it."""
    text = (ETC / "init.d/pgtask").read_text("utf-8")
    block = text.partition("### BEGIN INIT INFO\n")[2].partition("### END INIT INFO\n")[0]
    keys = [line[2:].partition(":")[0] for line in block.splitlines() if not line.startswith("#   ")]
    assert keys[0] == "Provides"
    assert {"Required-Start", "Required-Stop", "Default-Start", "Default-Stop", "Short-Description"} <= set(keys)
