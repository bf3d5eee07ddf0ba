"""The monitor: what it says is true, it is never in the way, and nothing of it is left."""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGHUP, SIGKILL

import pytest

from pgtask.embedded import Server
from pgtask.metrics import METRICS
from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import ROOT, Master
from tests.fixtures.monitor import Monitor, child
from tests.fixtures.processes import frozen
from tests.fixtures.proxy import Proxy
from tests.fixtures.wait import eventually


@pytest.fixture
def monitor() -> Monitor:
    return Monitor()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the files of metrics are."""
    (path := tmp_path / "run").mkdir()
    return path


@pytest.fixture
def watched(database: Database, master: Callable[..., Master], monitor: Monitor, home: Path) -> Callable[..., Master]:
    """`watched(*options)`: a master with a monitor that answers."""

    def start(*options: str, **arguments: object) -> Master:
        env = {"RUNTIME_DIRECTORY": str(home)}
        if "config" not in arguments:
            options = (*options, "--listen", monitor.listen, database.conninfo)
        one = master(*options, env=env, **arguments)
        one.wait_log("monitor_listening")
        return one

    return start


def run(database: Database, input: str = "SELECT 1", **columns: object) -> str:
    """The state in which a new task has ended."""
    return str(database.wait(database.insert(input, **{"delete": False, **columns}))["state"])


def left(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_page_counts_what_became_of_tasks(watched: Callable[..., Master], database: Database, monitor: Monitor) -> None:
    watched()
    assert [run(database) for _ in range(3)] == ["DONE"] * 3
    assert run(database, "SELECT 1/0") == "FAIL"
    assert run(database, "DO $$BEGIN RAISE 'no' USING ERRCODE = 'Q7777'; END$$", retry=1, backoff="0") == "FAIL"
    database.execute("INSERT INTO task (input, plan, active) VALUES ('SELECT 1', now() - interval '1 min', '1 s')")
    with held(database):
        id = database.insert(WAIT)
        wait_runs(database)
        database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
        monitor.wait_value("pgtask_tasks_stopped_total", 1)
    page = monitor.wait_value("pgtask_tasks_gone_total", 1)
    assert page.value("pgtask_tasks_done_total") == 3
    assert page.samples("pgtask_tasks_failed_total") == {("22",): 1, ("other",): 2}
    assert page.value("pgtask_tasks_retried_total") == 1
    assert page.value("pgtask_tasks_taken_total") == 7
    assert page.value("pgtask_run_seconds_count") == 7
    assert page.value("pgtask_pickup_seconds_count") == 6, "the second run of a task is no pickup"
    assert page.value("pgtask_take_seconds_count") > 0
    assert page.value("pgtask_notifications_total") > 0
    assert page.value("pgtask_workers_forked_total") > 0


def test_page_counts_tasks_that_share_a_transaction(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    with held(database):
        watched()
        database.insert(WAIT)
        wait_runs(database)
        database.execute("INSERT INTO task (input, batch) SELECT 'SELECT 1', 50 FROM generate_series(1, 40)")
        database.execute("INSERT INTO task (input, batch) VALUES ('SELECT 1/0', 50)")
    monitor.wait_value("pgtask_tasks_done_total", 41)
    page = monitor.wait_value("pgtask_tasks_failed_total", 1, "22")
    assert page.value("pgtask_tasks_taken_total") == 42
    assert page.value("pgtask_pickup_seconds_count") == 42


def test_page_counts_lost_runs_and_crashed_workers(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    one = watched("--crashes", "1")
    one.may_log_errors = True
    with held(database):
        id = database.insert(WAIT, delete=False)
        for attempt in (1, 2):
            eventually(lambda wanted=attempt: database.wait(id, "WORK")["attempt"] == wanted)
            worker = one.worker("running")
            os.kill(worker, SIGKILL)
        assert database.wait(id)["state"] == "FAIL"
    page = monitor.wait_value("pgtask_runs_given_up_total", 1)
    assert page.value("pgtask_runs_lost_total") == 1
    assert page.value("pgtask_workers_crashed_total") == 2


def test_page_shows_the_table(watched: Callable[..., Master], database: Database, monitor: Monitor) -> None:
    watched("--workers", "1")
    with held(database):
        database.insert(WAIT, group="running")
        wait_runs(database)
        insert = "INSERT INTO task (input, \"group\", plan) SELECT 'SELECT 1', "
        for number in range(25):
            database.execute(f"{insert} 'g{number}', now() - interval '30 min' FROM generate_series(1, {number + 1})")
        database.execute(f"{insert} 'other', now() FROM generate_series(1, 30)")
        database.execute(f"{insert} 'password=hunter2 ' || repeat('x', 100000), now() FROM generate_series(1, 40)")
        database.execute(f"{insert} 'later', now() + interval '1 h' FROM generate_series(1, 7)")
        database.execute("INSERT INTO task (input, depend) SELECT 'SELECT 1', ARRAY[min(id)] FROM task")
        monitor.wait_value("pgtask_waiting_tasks", 1)
        page = monitor.wait_value("pgtask_master_up", 1)  # of a master that answers late nothing is on the page
        groups = page.samples("pgtask_group_backlog_tasks")
        # Of 27 groups the largest 20: the two last and g7 to g24; and the rest is counted with one of that name.
        assert len(groups) == 20
        assert groups["other",] == 30 + sum(range(1, 8))
        assert groups["g24",] == 25
        assert [groups[group] for group in groups if "***" in group[0]] == [40]
        assert page.value("pgtask_backlog_tasks") == sum(groups.values()) == sum(range(1, 26)) + 70
        assert 1800 <= page.value("pgtask_backlog_age_seconds") < 3600
        assert 1800 <= page.value("pgtask_group_backlog_age_seconds", "g24") < 3600
        assert page.value("pgtask_planned_tasks") == 7
        assert page.value("pgtask_slots_in_use") == 1
        assert page.samples("pgtask_group_slots_in_use") == {("running",): 1}
        assert page.value("pgtask_longest_run_seconds") > 0
        assert page.samples("pgtask_workers") == {("busy",): 1, ("idle",): 0}
        assert page.value("pgtask_workers_limit") == 1
        assert (page.value("pgtask_leader"), page.value("pgtask_standby")) == (1, 0)
        assert page.value("pgtask_term") == 1
        assert page.value("pgtask_last_take_timestamp_seconds") > 1.7e9
        assert "hunter2" not in page.text
        assert database.password not in page.text
        database.execute("DELETE FROM task WHERE state <> 'WORK'")


def test_every_metric_on_the_page_is_documented_and_the_other_way_round(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    watched()
    assert run(database, "SELECT 1/0") == "FAIL"
    page = monitor.wait_value("pgtask_tasks_failed_total", 1, "22")
    shown = {f"{one.name}_total" if one.type == "counter" else one.name: one for one in page.families}
    assert set(shown) == {metric.name for metric in METRICS}
    reference = (ROOT / "docs/reference/metrics.md").read_text("utf-8")
    for metric in METRICS:
        assert (shown[metric.name].type, shown[metric.name].documentation) == (metric.kind, metric.help)
        assert f"| `{metric.name}` |" in reference
        for sample in shown[metric.name].samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    if shutil.which("promtool") is not None:
        told = subprocess.run(["promtool", "check", "metrics"], input=page.text, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, "")


def test_counts_go_on_from_worker_to_worker_in_no_more_files_than_workers(
    watched: Callable[..., Master], database: Database, monitor: Monitor, home: Path
) -> None:
    one = watched("--linger", "0", "--workers", "2")
    for number in range(20):
        assert run(database, group=f"group {number}") == "DONE"
    one.wait_log("worker_forked", 6)
    monitor.wait_value("pgtask_tasks_done_total", 20)
    [directory] = home.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    places = {path.stem.split("_")[1] for path in directory.iterdir()}
    assert "master" in places
    assert places <= {"master", "0", "1"}


def test_each_process_has_only_its_own_files(
    watched: Callable[..., Master], database: Database, monitor: Monitor, home: Path
) -> None:
    one = watched("--workers", "2")
    with held(database):
        for group in ("a", "b"):
            database.insert("SELECT 1", group=group)
            database.insert(WAIT, group=group)
        wait_runs(database, 2)
        first, second = one.workers()
        eventually(lambda: len(mapped(first, home)) == len(mapped(second, home)) == 2)
        files = [mapped(pid, home) for pid in (one.pid, child(one), first, second)]
    everyone = [name for names in files for name in names]
    assert files[:2] == [["counter_master.db", "histogram_master.db"], []]
    assert len(set(everyone)) == len(everyone) == 6


def mapped(pid: int, home: Path) -> list[str]:
    """The files there that are in the memory of the process."""
    lines = Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines()
    return sorted({Path(line.split()[-1]).name for line in lines if str(home) in line})


def test_health_pages(watched: Callable[..., Master], monitor: Monitor) -> None:
    watched()
    assert monitor.get("/healthz")[:2] == (200, "ok\n")
    eventually(lambda: monitor.get("/readyz")[:2] == (200, "ok\n"))  # once the master has answered for the first time
    assert monitor.get("/")[:2] == (404, "there is: /metrics /healthz /readyz\n")
    refused = monitor.get("/metrics", "POST")
    assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")
    for path in ("/metrics", "/healthz", "/nothing"):
        head, body = monitor.get(path, "HEAD"), monitor.get(path)
        assert (head.status, head.text) == (body.status, "")
        assert head.headers["Content-Type"] == body.headers["Content-Type"]


def test_hung_master_is_not_healthy(watched: Callable[..., Master], monitor: Monitor) -> None:
    one = watched()
    with frozen(one.pid):
        sick = eventually(lambda: answer if (answer := monitor.get("/healthz")).status != 200 else None, 60)
        assert sick.status == 503
        assert "the master has not answered for " in sick.text
        assert monitor.get("/readyz").status == 503
        page = monitor.wait_value("pgtask_up", 1)  # the table is still there to be read
        assert page.value("pgtask_master_up") == 0
        assert page.samples("pgtask_leader") == {}, "nobody knows"
    eventually(lambda: monitor.get("/healthz").status == 200)
    monitor.wait_value("pgtask_master_up", 1)


def test_monitor_that_dies_is_started_again_and_the_counts_are_kept(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    one = watched()
    assert run(database) == "DONE"
    monitor.wait_value("pgtask_tasks_done_total", 1)
    os.kill(child(one), SIGKILL)
    assert "SIGKILL" in one.wait_log("WARNING .* monitor_ended")[0]
    assert run(database) == "DONE"
    one.wait_log("monitor_listening", 2)
    monitor.wait_value("pgtask_tasks_done_total", 2)
    assert len(one.logged("leading")) == 1


def test_monitor_that_hangs_is_not_waited_for(
    watched: Callable[..., Master], database: Database, monitor: Monitor, home: Path
) -> None:
    one = watched()
    with frozen(child(one)):
        connections = [socket.create_connection(("127.0.0.1", monitor.port)) for _ in range(10)]
        assert run(database) == "DONE"
        assert one.stop() == 0
        for connection in connections:
            connection.close()
    assert left(home) == []


def test_monitor_ends_with_a_killed_master_whose_files_the_next_one_removes(
    watched: Callable[..., Master], database: Database, monitor: Monitor, home: Path
) -> None:
    one = watched()
    one.expect_exit = -SIGKILL
    child(one)
    one.stop(SIGKILL)
    eventually(lambda: not one.left())
    before = left(home)
    assert len(before) == 1
    two = watched()
    assert len(left(home)) == 1
    assert left(home) != before
    assert run(database) == "DONE"
    monitor.wait_value("pgtask_tasks_done_total", 1)
    two.stop()
    assert left(home) == []


def test_master_goes_on_while_its_port_is_in_use(
    master: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    with socket.create_server(("127.0.0.1", monitor.port)):
        one = master("--listen", monitor.listen, database.conninfo)
        [line] = one.wait_log("WARNING .* monitor_cannot_listen")
        assert "Address already in use" in line
        assert run(database) == "DONE"
    one.wait_log("monitor_listening", timeout=60)  # it pauses for up to 10 s
    monitor.wait_value("pgtask_tasks_done_total", 1)
    assert len(one.logged("monitor_cannot_listen")) == 1
    assert not one.logged("monitor_ended")


def test_name_of_several_addresses_is_listened_at_when_all_can_be_had(
    master: Callable[..., Master], database: Database, monitor: Monitor, tmp_path: Path
) -> None:
    """Else who asks there may be answered by another program."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a hosts file of its own needs root")
    (hosts := tmp_path / "hosts").write_text("127.0.0.1 both\n127.0.0.2 both\n", "utf-8")
    mounted = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    with socket.create_server(("127.0.0.1", monitor.port)):
        one = master(
            *("--listen", f"both:{monitor.port}", database.conninfo),
            through=("unshare", "--mount", "sh", "-c", mounted, "sh"),
        )
        assert "Address already in use" in one.wait_log("WARNING .* monitor_cannot_listen")[0]
    one.wait_log("monitor_listening", timeout=60)
    for address in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((address, monitor.port)).close()


def test_monitor_is_started_again_after_a_time_without_descriptors(
    watched: Callable[..., Master], database: Database
) -> None:
    one = watched()
    pid = child(one)
    limits = resource.prlimit(one.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(pid, SIGKILL)
    one.wait_log("WARNING .* monitor_ended .*Too many open files")
    resource.prlimit(one.pid, resource.RLIMIT_NOFILE, limits)
    one.wait_log("monitor_listening", 2, timeout=60)
    assert run(database) == "DONE"


def test_page_shows_the_rest_when_its_files_are_removed_and_a_reload_makes_new_ones(
    watched: Callable[..., Master], database: Database, monitor: Monitor, home: Path
) -> None:
    one = watched("--linger", "1 ms")
    assert run(database) == "DONE"
    monitor.wait_value("pgtask_tasks_done_total", 1)
    [directory] = home.iterdir()
    shutil.rmtree(directory)
    assert run(database) == "DONE"
    eventually(lambda: monitor.page().samples("pgtask_tasks_done_total") == {})
    monitor.wait_value("pgtask_up", 1)
    eventually(lambda: not one.workers())  # one from before would go on in the old files
    one.signal(SIGHUP)
    one.wait_log("monitor_listening", 2)
    assert run(database) == "DONE"
    monitor.wait_value("pgtask_tasks_done_total", 1)


def test_slow_and_silent_clients_hold_nobody_up(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    watched()
    with contextlib.ExitStack() as clients:
        for number in range(60):
            sock = clients.enter_context(socket.create_connection(("127.0.0.1", monitor.port)))
            # One says nothing, one stops in the middle, one never reads what it asked for.
            sock.sendall([b"", b"GET /metrics HTT", b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 3][number % 3])
        assert run(database) == "DONE"
        assert eventually(lambda: monitor.get("/healthz").status) == 200
        monitor.wait_value("pgtask_tasks_done_total", 1)


def test_page_serves_the_rest_when_a_database_is_silent(
    watched: Callable[..., Master],
    database: Database,
    new_database: Callable[..., Database],
    new_proxy: Callable[..., Proxy],
    monitor: Monitor,
) -> None:
    other = new_database()
    proxy = new_proxy(other.tcp)
    entries = "".join(f"[[database]]\nconninfo = {json.dumps(text)}\n" for text in (database.conninfo, proxy.conninfo))
    one = watched(config=f"[master]\nlisten = '{monitor.listen}'\n{entries}")
    here, there = (f"{d.name}@{d.name} public.task" for d in (database, other))
    monitor.wait_samples("pgtask_up", {(here,): 1, (there,): 1})
    eventually(lambda: monitor.get("/readyz").status == 200)
    proxy.deafen("pgtask monitor", future=True)
    page = monitor.wait_samples("pgtask_up", {(here,): 1, (there,): 0}, timeout=60)
    assert page.samples("pgtask_backlog_tasks") == {(): 0}, "of the one that answers"
    assert page.value("pgtask_scrape_errors_total", there) > 0
    assert monitor.get("/healthz").status == 200
    assert len(one.logged("leading")) == 2, "the master has not noticed anything"
    proxy.hear()
    monitor.wait_samples("pgtask_up", {(here,): 1, (there,): 1}, timeout=60)


def test_database_that_was_down_is_read_again(
    watched: Callable[..., Master], own_database: Database, monitor: Monitor
) -> None:
    server = own_database.server
    assert isinstance(server, Server)
    text = f"[master]\nlisten = '{monitor.listen}'\n[[database]]\nconninfo = {json.dumps(own_database.conninfo)}\n"
    one = watched(config=text)
    monitor.wait_value("pgtask_up", 1)
    server.stop("immediate")
    page = monitor.wait_value("pgtask_up", 0)
    assert page.samples("pgtask_backlog_tasks") == {}, "nobody knows"
    assert eventually(lambda: monitor.get("/readyz").status == 503)
    server.start_again()
    monitor.wait_value("pgtask_up", 1, timeout=60)
    eventually(lambda: monitor.get("/readyz").status == 200, 60)
    assert len(one.logged("WARNING .* monitor_cannot_read")) == len(one.wait_log("monitor_reads_again")) == 1


def test_table_that_is_not_served_is_named_by_readyz(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    text = database.server.conninfo("nowhere", database.user, password=database.password)
    entries = "".join(f"[[database]]\nconninfo = {json.dumps(one)}\n" for one in (database.conninfo, text))
    watched(config=f"[master]\nlisten = '{monitor.listen}'\n{entries}", tables=1)
    answer = eventually(lambda: found if "does not exist" in (found := monitor.get("/readyz")).text else None)
    assert answer.status == 503
    assert answer.text.count("\n") == 1
    assert answer.text.startswith(f"{database.user}@nowhere public.task: connecting: ")
    assert database.password not in answer.text
    assert monitor.get("/healthz").status == 200


def test_master_that_stands_by_is_ready_unless_nobody_leads(
    watched: Callable[..., Master], master: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    one = master(database.conninfo)
    two = watched(wait=False)
    two.wait_log("standing_by")
    assert eventually(lambda: monitor.get("/readyz").status == 200)
    assert monitor.wait_value("pgtask_standby", 1).value("pgtask_leader") == 0
    one.stop()
    two.wait_log("leading")
    monitor.wait_value("pgtask_leader", 1)


def test_lock_that_no_master_holds_is_not_ready(
    watched: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    one = watched()
    one.stop()
    session = database.connect()
    session.execute("SELECT pg_advisory_lock('task'::regclass::oid::int, -2)")
    watched(wait=False)
    answer = eventually(
        lambda: found if (found := monitor.get("/readyz")).status == 503 and "lock" in found.text else None
    )
    assert f"its lock is held by backend {session.info.backend_pid}, which is no master" in answer.text
    session.close()
    eventually(lambda: monitor.get("/readyz").status == 200)


def test_reload_moves_starts_and_ends_the_monitor(
    master: Callable[..., Master], database: Database, monitor: Monitor, home: Path, tmp_path: Path
) -> None:
    entry = f"[[database]]\nconninfo = {json.dumps(database.conninfo)}\n"
    one = master(config=entry, env={"RUNTIME_DIRECTORY": str(home)})
    file = tmp_path / "master0.toml"

    def reload(listen: str, count: int) -> None:
        file.write_text(f"[master]\nlisten = '{listen}'\n{entry}", "utf-8")
        one.signal(SIGHUP)
        one.wait_log("reloaded", count)

    assert left(home) == []
    reload(monitor.listen, 1)
    one.wait_log("monitor_listening")
    assert run(database) == "DONE"
    monitor.wait_value("pgtask_tasks_done_total", 1)
    pid = child(one)
    reload(monitor.listen, 2)
    assert child(one) == pid, "nothing has changed"
    moved = Monitor()
    reload(moved.listen, 3)
    one.wait_log("monitor_listening", 2)
    moved.wait_value("pgtask_tasks_done_total", 1)
    assert not monitor.answers()
    file.write_text(f"[master]\nlisten = '{moved.listen}'\nlog = '{tmp_path}/other'\n{entry}", "utf-8")
    one.signal(SIGHUP)
    eventually(lambda: (tmp_path / "other").exists() and "monitor_listening" in (tmp_path / "other").read_text("utf-8"))
    reload("", 4)
    eventually(lambda: not moved.answers())
    assert left(home) == []
    assert run(database) == "DONE"
    assert not one.logged("monitor_ended")


def test_without_room_for_its_files_a_master_counts_nothing_and_works(
    master: Callable[..., Master], database: Database, monitor: Monitor
) -> None:
    one = master("--listen", monitor.listen, database.conninfo, through=("prlimit", "--fsize=50000"))
    one.wait_log("WARNING .* metrics_off")
    one.wait_log("monitor_listening")
    assert run(database) == "DONE"
    assert monitor.get("/healthz").status == 200
    assert monitor.wait_value("pgtask_up", 1).samples("pgtask_tasks_done_total") == {}


def test_without_listen_nothing_of_it_is_there(master: Callable[..., Master], database: Database, home: Path) -> None:
    one = master(database.conninfo, env={"RUNTIME_DIRECTORY": str(home)})
    assert run(database) == "DONE"
    assert left(home) == []
    assert set(one.children()) == set(one.workers())
    code = "import sys, pgtask.master; sys.exit(bool({'prometheus_client', 'waitress'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
