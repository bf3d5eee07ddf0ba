"""What ps shows of the master and its workers, at every moment and whatever names are like."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM

import pytest

from pgtask import embedded
from tests.fixtures.database import Database
from tests.fixtures.locks import KEY, WAIT, held, wait_runs, waiting
from tests.fixtures.master import Master
from tests.fixtures.processes import frozen
from tests.fixtures.wait import eventually

Start = Callable[..., Master]
pytestmark = pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps (Debian: procps)")

DEAF = f"""DO $$BEGIN
    PERFORM pg_advisory_xact_lock_shared(8000);
    LOOP
        BEGIN
            PERFORM pg_sleep(0.05);
            EXIT WHEN pg_try_advisory_xact_lock_shared({KEY});
        EXCEPTION WHEN query_canceled THEN NULL;
        END;
    END LOOP;
END$$"""
"""A run that no cancel request ends, but the end of the test's lock."""


def ps(*pids: int, width: int | None = None) -> list[str]:
    """The command lines as ps shows them, in the order of pids; with `width` as in a terminal of so many columns."""
    command = ["ps", *(["-ww"] if width is None else []), "-o", "args=", "-p", ",".join(map(str, pids))]
    env = os.environ | {"LC_ALL": "C.UTF-8", "COLUMNS": str(width or 0)}
    return subprocess.run(command, capture_output=True, env=env, check=False).stdout.decode().splitlines()


def shows(pid: int, title: str) -> None:
    """Wait until ps does."""
    seen: list[str] = []

    def there() -> bool:
        nonlocal seen
        seen = ps(pid)
        return seen == [f"pgtask: {title}"]

    try:
        eventually(there)
    except AssertionError:
        raise AssertionError(f"ps was to show {title!r}, but shows {seen}") from None


def place(database: Database) -> str:
    return f"worker {database.user}@{database.name} public.task"


def only_worker(one: Master) -> int:
    """The worker, once there is one and no other."""
    return eventually(lambda: one.workers()[0] if len(one.workers()) == 1 else 0)


def entry(database: Database, more: str = "") -> str:
    return f"[[database]]\nconninfo = {json.dumps(database.conninfo)}\n{more}\n"


# The master


def named(file: Path) -> str:
    """The configuration file in a title."""
    path = str(file)
    return path if len(path) <= 100 else f"...{path[-100:]}"


def test_master_says_what_it_leads_stands_by_and_connects_to_and_its_file(
    database: Database, new_database: Callable[..., Database], master: Start, tmp_path: Path
) -> None:
    second = new_database()
    first = master(second.conninfo)
    shows(first.pid, "master (1 table leading, 0 workers)")
    absent = re.sub(r"port=\d+", "port=1", database.tcp)
    config = entry(database) + entry(second)
    one = master(config=f"{config}[[database]]\nconninfo = {json.dumps(absent)}\n", tables=1)
    file = tmp_path / "master1.toml"
    shows(one.pid, f"master {named(file)} (1 table leading, 1 standing by, 1 connecting, 0 workers)")
    file.write_text(config, "utf-8")
    one.signal(SIGHUP)
    shows(one.pid, f"master {named(file)} (1 table leading, 1 standing by, 0 workers)")
    first.stop()
    shows(one.pid, f"master {named(file)} (2 tables leading, 0 workers)")


def test_master_that_stands_by_alone_or_serves_nothing_says_so(database: Database, master: Start) -> None:
    master(database.conninfo)
    two = master(database.conninfo, wait=False)
    shows(two.pid, "master (1 table standing by, 0 workers)")
    three = master("host=/none dbname=a user=b", wait=False)
    shows(three.pid, "master (1 table connecting, 0 workers)")


def test_table_that_ends_after_a_reload_is_told(
    database: Database, new_database: Callable[..., Database], master: Start, tmp_path: Path
) -> None:
    other = new_database()
    one = master(config=entry(database) + entry(other))
    file = tmp_path / "master0.toml"
    with held(database):
        id = database.insert(WAIT)
        wait_runs(database)
        file.write_text(entry(other), "utf-8")
        one.signal(SIGHUP)
        shows(one.pid, f"master {named(file)} (1 table leading, 1 ending, 1 worker)")
    database.wait(id)
    shows(one.pid, f"master {named(file)} (1 table leading, 0 workers)")


def test_master_that_stops_says_for_how_many_runs_it_waits(database: Database, master: Start) -> None:
    one = master("--stop-timeout", "1 min", database.conninfo, tables=1)
    with held(database):
        for n in range(2):
            database.insert(WAIT, group=f"g{n}", delete=False)
        wait_runs(database, 2)
        one.signal(SIGTERM)
        shows(one.pid, "master (stopping, waiting for 2 runs, 2 workers)")
        with frozen(*one.workers()):  # who cannot end; they are killed in the end
            one.signal(SIGINT)
            shows(one.pid, "master (stopping, cancelling 2 runs, 2 workers)")
            one.may_log_errors = True
            one.process.wait(60)


# A worker


def test_worker_says_what_it_runs_of_which_group_and_that_it_is_idle(database: Database, master: Start) -> None:
    one = master("--linger", "1 min", database.conninfo, tables=1)
    with held(database):
        id = database.insert(WAIT, group="mail")
        wait_runs(database)
        worker = only_worker(one)
        shows(worker, f"{place(database)} running {id} in group mail")
        shows(one.pid, "master (1 table leading, 1 worker)")
    database.wait(id)
    shows(worker, f"{place(database)} idle")


def test_worker_that_runs_several_together_says_so(database: Database, master: Start) -> None:
    one = master("--batch-time", "20 s", database.conninfo, tables=1)
    with held(database):
        # The first is what the master assigns, and runs by itself; the others come with its end.
        ids = [
            id
            for (id,) in database.execute(
                f"INSERT INTO task (input, batch, delete) SELECT CASE i WHEN 0 THEN 'SELECT 1' ELSE '{WAIT}' END, 50,"
                " false FROM generate_series(0, 3) AS i RETURNING id"
            )
        ]
        wait_runs(database)
        shows(only_worker(one), f"{place(database)} running {ids[1]} and 2 more in group group")
    for id in ids:
        assert database.wait(id)["state"] == "DONE"


def test_worker_says_that_it_runs_remotely(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    with held(database):
        id = database.insert(WAIT, remote=database.tcp, group="far")
        eventually(lambda: waiting(database))
        shows(only_worker(one), f"{place(database)} running remotely {id} in group far")
    database.wait(id)


def test_worker_says_that_it_cancels_as_long_as_that_takes(database: Database, master: Start) -> None:
    one = master(database.conninfo)
    for how in ("user", "timeout"):
        with held(database):
            id = database.insert(DEAF, group=how, timeout="2 s" if how == "timeout" else "0", delete=False)
            eventually(lambda: database.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 8000"))
            if how == "user":
                database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [id])
            shows(only_worker(one), f"{place(database)} cancelling {id} in group {how}")
        eventually(lambda id=id: database.task(id)["stop"])


def test_worker_says_that_it_opens_a_session(own_database: Database, master: Start) -> None:
    assert isinstance(own_database.server, embedded.Server)
    one = master("--warm", "0", own_database.conninfo, tables=1)
    own_database.execute("SELECT 1")  # opens our session
    postmaster = own_database.server.pid
    assert postmaster is not None
    with frozen(postmaster):
        id = own_database.insert("SELECT 1", delete=False)
        shows(only_worker(one), f"{place(own_database)} opening a session")
    own_database.wait(id)


@pytest.fixture
def gate_at(database: Database) -> Callable[[str, str], None]:
    """`gate_at(state, body)`: a trigger of the user's on writing this state."""

    def make(state: str, body: str) -> None:
        database.execute(
            f"CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $${body}$$;"
            f"CREATE TRIGGER gate BEFORE UPDATE ON task FOR EACH ROW WHEN (NEW.state = '{state}')"
            " EXECUTE FUNCTION gate()"
        )

    return make


def test_worker_says_that_it_begins_and_that_the_end_of_a_run_cannot_be_recorded(
    database: Database, master: Start, gate_at: Callable[[str, str], None]
) -> None:
    one = master(database.conninfo)
    gate_at("WORK", f"BEGIN PERFORM pg_advisory_xact_lock_shared({KEY}); RETURN NEW; END")
    with held(database):
        id = database.insert("SELECT 1", delete=False)
        shows(only_worker(one), f"{place(database)} beginning {id}")
    database.wait(id)
    database.execute("DROP FUNCTION gate CASCADE")
    gate_at("DONE", "BEGIN RAISE 'no' USING ERRCODE = '55P03'; END")
    id = database.insert("SELECT 1", group="mail", delete=False)
    found = rf"pgtask: {re.escape(place(database))} recording \(try [2-9]\) {id} in group mail"
    eventually(lambda: any(re.fullmatch(found, title) for title in ps(*one.workers())))
    one.may_log_errors = True
    database.execute("DROP FUNCTION gate CASCADE")
    assert database.wait(id)["state"] == "DONE"


def test_state_and_task_are_seen_in_a_narrow_terminal(new_database: Callable[..., Database], master: Start) -> None:
    billing = new_database(name="billing", user="app")
    one = master(billing.conninfo)
    with held(billing):
        id = billing.insert(WAIT, group="x" * 10_000)
        wait_runs(billing)
        [title] = ps(only_worker(one), width=80)
        assert len(title) <= 80
        assert title.startswith(f'pgtask: worker app@billing public.task running {id} in group "xxx')
    billing.wait(id)


GROUPS = {
    "two words": '"two words"',
    "": '""',
    " ": '" "',
    "idle": "idle",
    "mail 7 idle": '"mail 7 idle"',
    "x in group y": '"x in group y"',
    'say "x"': r'"say \"x\""',
    "line\nbreak\ttab": r'"line\nbreak\ttab"',
    "\x1b[2J\x9b31m\x7f": r'"\u001b[2J\u009b31m\u007f"',
    "\u202ereversed\u2066": r'"\u202ereversed\u2066"',
    "zero\u200bwidth\ufeff": r'"zero\u200bwidth\ufeff"',
    "Пётр東京": "Пётр東京",
    "\N{ELEPHANT}" * 5000: '"' + "\N{ELEPHANT}" * 100 + '"...',
    "ü" * 101: '"' + "ü" * 100 + '"...',
    "ü" * 100: "ü" * 100,
    "a" * 97 + "...": '"' + "a" * 97 + '..."',
    "%s%n$(id)`id`\\": r'"%s%n$(id)`id`\\"',
}
"""Groups, and how a title names each."""


def test_groups_are_named_so_that_none_is_taken_for_something_else(database: Database, master: Start) -> None:
    one = master("--workers", str(len(GROUPS)), database.conninfo, tables=1)
    with held(database):
        ids = {database.insert(WAIT, group=group, delete=False): shown for group, shown in GROUPS.items()}
        wanted = {f"pgtask: {place(database)} running {id} in group {shown}" for id, shown in ids.items()}
        wait_runs(database, len(ids))
        eventually(lambda: len(one.workers()) == len(ids))
        seen = ps(*one.workers())
    assert set(seen) == wanted
    for id in ids:
        assert database.wait(id)["state"] == "DONE"


@pytest.fixture
def long_names(new_database: Callable[..., Database]) -> Iterator[Database]:
    """Every name is as long as it can be, and odd."""
    tail = secrets.token_hex(6)
    database = new_database(name=f"data@base {'d' * 40}{tail}", user=f"us er {'u' * 40}{tail}")
    database.schema, database.table = "s.x" + "y" * 60, "t'" + "ü" * 30
    yield database


@pytest.mark.parametrize("environment", ["usual", "small"])
def test_long_names_are_cut_and_what_comes_after_them_is_seen(
    long_names: Database, master: Start, environment: str
) -> None:
    """ps shows no more than the command line and environment had room for when the master was started."""
    through = ["env", "-i", f"PATH={os.environ['PATH']}"] if environment == "small" else []
    names = (f"--schema={long_names.schema}", f"--table={long_names.table}")
    one = master(*names, "--linger", "1 min", long_names.conninfo, tables=1, through=through)
    with held(long_names):
        id = long_names.insert(WAIT, group="mail")
        wait_runs(long_names)
        user, name = f'"us er {"u" * 26}"...', f'"data@base {"d" * 22}"...'
        schema, table = f'"s.x{"y" * 29}"...', f'"t\'{"ü" * 30}"'
        shows(only_worker(one), f"worker {user}@{name} {schema}.{table} running {id} in group mail")
    long_names.wait(id)
    shows(only_worker(one), f"worker {user}@{name} {schema}.{table} idle")


# The resolver


def test_resolver_names_the_hosts_that_it_looks_up() -> None:
    """Its answer finds no room in the pipe, so it stays."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 65536)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    program = (
        "import os, sys\n"
        "from pgtask import resolve\n"
        "from pgtask.process import Children\n"
        f"names = ['localhost', 'no such\\nhost.invalid']\n"
        f"children = Children()\n"
        f"print(children.fork(lambda: resolve._child(names, {writer}), keep=[{writer}], on_end=print), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[writer], text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            shows(child, r'resolver localhost "no such\nhost.invalid"')
        finally:
            os.kill(child, SIGKILL)
            parent.communicate("")
    for descriptor in (reader, writer):
        os.close(descriptor)
