"""etc/logrotate.d/pgtask, by the real logrotate, while a master and its workers write."""

import grp
import gzip
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from signal import SIGKILL

import pytest

from tests.fixtures.database import Database
from tests.fixtures.processes import descriptors, processes
from tests.fixtures.service import ETC, NEEDED, Script, as_user, service
from tests.fixtures.wait import eventually

LOGROTATE = shutil.which("logrotate") or shutil.which("logrotate", path="/usr/sbin:/sbin")

pytestmark = [
    pytest.mark.skipif(LOGROTATE is None, reason="logrotate is not installed"),
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"the init script needs {', '.join(NEEDED)}"),
]


@pytest.fixture
def script(database: Database) -> Iterator[Script]:
    with service() as one:
        script = Script(one, database)
        script.default(PGTASK_LOG_LEVEL="debug")
        yield script


def rotate(script: Script) -> None:
    """As cron's daily run does once the time has come."""
    one = script.service
    group = grp.getgrgid(pwd.getpwnam(one.user).pw_gid).gr_name
    places = {
        "/var/log/pgtask": one.log.parent,
        "/run/pgtask": one.pidfile.parent,
        "su pgtask pgtask": f"su {one.user} {group}",
        "--euid pgtask": f"--euid {one.user}",
    }
    text = (ETC / "logrotate.d/pgtask").read_text("utf-8")
    for name, place in places.items():
        assert name in text
        text = text.replace(name, str(place))
    (one.top / "logrotate.conf").write_text(text, "utf-8")
    command = [str(LOGROTATE), "--force", "--state", str(one.top / "logrotate.state"), str(one.top / "logrotate.conf")]
    done = one.run(*command)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def run_tasks(script: Script, count: int) -> list[int]:
    """Their ids; each of them is in the log when it has ended."""
    ids = [script.database.insert("SELECT 1", delete=False, group=str(number)) for number in range(count)]
    for id in ids:
        script.database.wait(id)
    return ids


def test_rotated_log_is_left_at_once_and_no_line_is_lost(script: Script) -> None:
    pid = script.started()
    log = script.service.log
    ids = []
    for times in (1, 2, 3):
        ids.append(run_tasks(script, 3))
        rotate(script)
        eventually(lambda: str(log) in descriptors(pid) and f"{log}.1" not in descriptors(pid))
        assert log.stat().st_mode & 0o777 == 0o640
        assert log.with_name("pgtask.log.2.gz").exists() == (times > 1)
    ids.append(run_tasks(script, 3))
    script("stop")
    texts = [
        gzip.decompress(log.with_name("pgtask.log.3.gz").read_bytes()).decode(),
        gzip.decompress(log.with_name("pgtask.log.2.gz").read_bytes()).decode(),
        log.with_name("pgtask.log.1").read_text("utf-8"),
        log.read_text("utf-8"),
    ]
    for these, text in zip(ids, texts, strict=True):
        for id in these:
            assert re.search(rf"\bid={id}\b", text), f"task {id} is not in\n{text}"
    assert "master_started" in texts[0]
    assert "master_stopped" in texts[-1]


def test_pidfile_that_a_crash_has_left_leads_to_no_signal(script: Script) -> None:
    script.started()
    script("stop")
    with subprocess.Popen([*as_user(script.service.user), "sleep", "600"]) as other:
        try:
            script.service.pidfile.write_text(f"{other.pid}\n", "utf-8")
            os.chmod(script.service.pidfile, 0o644)
            rotate(script)
            assert script.service.log.with_name("pgtask.log.1").exists()
            assert other.poll() is None
        finally:
            for one in [*(one.pid for one in processes() if one.parent == other.pid), other.pid]:  # runuser's child too
                os.kill(one, SIGKILL)


def test_process_of_another_user_gets_no_signal_whatever_the_locked_pidfile_says(script: Script) -> None:
    if os.geteuid() != 0 or script.service.user == "root":
        pytest.skip("only root may signal other users' processes")
    script.started()
    script("stop")
    pidfile = script.service.pidfile
    with subprocess.Popen(["sleep", "600"]) as other:
        pidfile.write_text(f"{other.pid}\n", "utf-8")
        with subprocess.Popen([*as_user(script.service.user), "flock", "--no-fork", pidfile, "sleep", "600"]) as holder:
            try:
                eventually(lambda: subprocess.run(["flock", "--nonblock", pidfile, "true"]).returncode)
                rotate(script)
                assert other.poll() is None
            finally:
                for one in processes():
                    if one.parent == holder.pid:
                        os.kill(one.pid, SIGKILL)
                holder.kill()
                other.kill()
