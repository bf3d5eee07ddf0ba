"""The states of DESIGN section 3 as a property: whatever users do and whatever dies, nothing leaves the map.

Hypothesis makes up sequences of what users do to a table (all that they may, and what must be refused) and of what
happens to processes and sessions. One server and one master serve them all. A trigger of the test's own keeps a
journal of every change of a row, the tasks themselves look who else of their group runs, and a ledger has a line for
every run. When all is quiet again, these must agree with each other and with what the states allow.

PGTASK_TEST_EXAMPLES=N looks for N new sequences (--hypothesis-seed=S for the same ones again) instead of the few that
are always the same. A sequence that fails is made as short as it gets and printed so that it can be made an @example.
"""

import contextlib
import json
import os
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.rows import dict_row

from tests.fixtures.database import Database, create, drop
from tests.fixtures.master import Master, end, launch, rows_left
from tests.fixtures.processes import processes, title
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

EXAMPLES = int(os.environ.get("PGTASK_TEST_EXAMPLES", "0"))
PATIENCE = 45.0
"""Less than the poller's `safety`: a wake-up that was lost shows."""

OBJECTS = """
CREATE TABLE ledger (run bigint NOT NULL);
CREATE TABLE twin (one integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE SEQUENCE exceeded;
CREATE TABLE journal (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id bigint, parent bigint, old text, new text,
    attempt_before integer, attempt integer, pid integer, "group" text, max integer, atomic boolean, input text,
    repeat float8, since_plan float8, active float8,
    backend integer DEFAULT pg_backend_pid(), actor text DEFAULT session_user,
    tx text DEFAULT pg_current_xact_id()::text, at timestamptz DEFAULT clock_timestamp()
);
CREATE FUNCTION keep_journal() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
DECLARE
    r task := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO journal (id, parent, old, new, attempt_before, attempt, pid,
        "group", max, atomic, input, repeat, since_plan, active)
    VALUES (r.id, r.parent,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.state END, CASE WHEN TG_OP <> 'DELETE' THEN NEW.state END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.attempt END, r.attempt, r.pid, r."group", r.max, r.atomic, r.input,
        date_part('epoch', r.repeat), date_part('epoch', clock_timestamp()) - date_part('epoch', r.plan),
        date_part('epoch', r.active));
    RETURN NULL;
END $$;
CREATE TRIGGER keep_journal AFTER INSERT OR UPDATE OR DELETE ON task FOR EACH ROW EXECUTE FUNCTION keep_journal();
-- A run says by a lock which slot it is in, and lets go of it before its transaction ends, however it ends: only then
-- is a slot that cannot be had one that is really in use.
CREATE FUNCTION work(ms float8, fails boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql SET search_path = public AS $$
DECLARE
    me journal;
    slot integer := 0;
BEGIN
    SELECT * INTO STRICT me FROM journal
    WHERE id = current_setting('pg_task.id')::bigint AND pid = pg_backend_pid() AND new = 'WORK' AND old <> 'WORK'
    ORDER BY n DESC LIMIT 1;
    BEGIN
        WHILE NOT pg_try_advisory_lock(hashtext(me."group"), slot) LOOP
            slot := slot + 1;
            IF slot > greatest(me.max, 0) THEN
                PERFORM nextval('exceeded');
                RAISE EXCEPTION 'slots of % exceeded by run % with max %; held by %', me."group", me.n, me.max, (
                    SELECT string_agg(format('slot %s: backend %s', objid, pid), ', ') FROM pg_locks
                    WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = hashtext(me."group")::oid);
            END IF;
        END LOOP;
        PERFORM pg_sleep(ms / 1000);
        INSERT INTO ledger VALUES (me.n);
        IF fails THEN
            RAISE EXCEPTION 'as told';
        END IF;
    EXCEPTION WHEN OTHERS OR query_canceled THEN
        IF slot <= greatest(me.max, 0) THEN
            PERFORM pg_advisory_unlock(hashtext(me."group"), slot);
        END IF;
        RAISE;
    END;
    PERFORM pg_advisory_unlock(hashtext(me."group"), slot);
    RETURN NULL;
END $$;
CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$
BEGIN
    PERFORM work(5);
    COMMIT;
    PERFORM pg_sleep(0.01);
END $$;
"""

ONCE = {
    "quick": "SELECT work(0)",
    "silent": "SELECT 1 WHERE work(3) IS NOT NULL",
    "slow": "SELECT work(40)",
    "long": "SELECT work(300)",
    "longer": "SELECT work(1500)",
    "longest": "SELECT work(4000)",
    "fails": "SELECT work(3, true)",
    "fails later": "SELECT work(3); SELECT 1 / 0",
    "fails at its end": "SELECT work(3); INSERT INTO twin VALUES (1), (1)",
    "child": "SELECT work(1)",
    "has a child": """SELECT work(3); INSERT INTO task (input, "group") VALUES ('SELECT work(1)', 'children')""",
    "repeatable read": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT work(20)",
    "dies": "SELECT work(3); SELECT pg_terminate_backend(pg_backend_pid())",
    "sets": "SET search_path TO nowhere; SET statement_timeout TO 500; SELECT public.work(3)",
}
"""Inputs whose effect is there exactly when the run ended well."""

LEAST_ONCE = {"commits": "SELECT work(3); COMMIT; SELECT pg_sleep(0.01)", "calls": "CALL commits()"}
INPUTS = ONCE | LEAST_ONCE

ENDED = ("DONE", "FAIL", "GONE", "STOP")
RUNNING = ("TAKE", "WORK")
SCHEDULER = {
    (None, "PLAN"),
    ("PLAN", "TAKE"),
    ("PLAN", "WORK"),  # taken and begun by the worker that finishes the one before
    ("PLAN", "GONE"),
    ("TAKE", "WORK"),
    ("TAKE", "PLAN"),
    ("WORK", "DONE"),
    ("WORK", "FAIL"),
    ("WORK", "PLAN"),
    ("WORK", None),  # it ended well and said nothing
    ("STOP", "STOP"),  # when it really ended
}
USER = {
    (None, "PLAN"),
    *((state, state) for state in ("PLAN", *RUNNING, *ENDED)),
    *((state, "STOP") for state in ("PLAN", *RUNNING)),
    *((state, "PLAN") for state in ENDED),
    *((state, None) for state in ("PLAN", *RUNNING, *ENDED)),
}
REFUSED = (psycopg.errors.InsufficientPrivilege, psycopg.errors.CheckViolation)

COLUMNS = (
    "id = -9223372036854775808",
    "id = 9223372036854775807",
    "parent = -9223372036854775808",
    "plan = '-infinity'",
    "plan = '4714-11-24 00:00:00+00 BC'",
    "plan = 'infinity'",
    "plan = '294276-12-31 23:59:59.999999+00'",
    "plan = clock_timestamp() + interval '50 ms'",
    "plan = clock_timestamp() - interval '2 hours'",
    "active = '1 us'",
    "active = '20 ms'",
    "active = '178000000 years'",
    "active = '-12 months 361 days'",
    "live = '1 us'",
    "live = '178000000 years'",
    "repeat = '20 ms'",
    "repeat = '1 day'",
    "repeat = '178000000 years'",
    "repeat = '1 month -30 days'",
    "timeout = '1 us'",
    "timeout = '15 ms'",
    "timeout = '178000000 years'",
    "count = 1",
    "count = 2147483647",
    "max = 0",
    "max = 1",
    "max = 2",
    "max = 2147483647",
    "max = -1",
    "max = -30",
    "max = -2147483648",
    '"delete" = false',
    "drift = true",
    "header = false",
    "save = true",
    "string = false",
    """delimiter = (-1)::"char\"""",
    """quote = (0)::"char\"""",
    "\"null\" = ''",
    "data = repeat('x', 100000)",
    "remote = 'nowhere'",
    "atomic = false",
    '"group" = DEFAULT',
    "own = 'x'",
)
"""What may stand in a new row; but for id and parent it may also be changed while it is in PLAN."""

INSERTED_ONLY = ("id ", "parent ")
CHANGES = tuple(column for column in COLUMNS if not column.startswith(INSERTED_ONLY))
FORGED_ROWS = (
    "state = 'WORK', pid = pg_backend_pid(), start = now()",
    "state = 'TAKE'",
    "state = 'DONE'",
    "pid = 1",
    "attempt = 2147483647",
    "start = '-infinity'",
    "error = 'of the user'",
    "output = 'of the user'",
    "attempts = '[]'",
    "active = '0'",
    "live = '-1 s'",
    "repeat = '-1 s'",
    "timeout = '-1 s'",
    "count = -1",
)
ANY = ("PLAN", *RUNNING, *ENDED)
FORGERIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((f"{column} = {column} + 1", ANY) for column in ("id", "attempt")),
    ("pid = coalesce(pid, 0) + 1", ANY),
    ("parent = coalesce(parent, 0) + 1", ANY),
    *((f"{column} = '2000-01-01'", ANY) for column in ("start", "stop", "first")),
    *((f"{column} = 'forged'", ANY) for column in ("output", "error", "code", "notice")),
    *((f"state = '{state}'", tuple(s for s in ANY if s != state)) for state in ("TAKE", "WORK", "DONE", "FAIL")),
    ("state = 'GONE'", ("PLAN", *RUNNING, "DONE", "FAIL", "STOP")),
    ("state = 'WAIT'", ANY),
    ("state = 'PLAN'", RUNNING),
    ("state = 'STOP'", ("DONE", "FAIL", "GONE")),
    ("max = 2147483647 - (max = 2147483647)::integer", RUNNING),
    *((f"{column} = {column} || 'x'", RUNNING) for column in ('"group"', "input")),
    ("remote = coalesce(remote, '') || 'x'", RUNNING),
    ("plan = '2000-01-01'", RUNNING),
    ("repeat = '3 s'", RUNNING),
    ('"delete" = NOT "delete"', RUNNING),
    ("drift = NOT drift", RUNNING),
    ("count = -1", ANY),
    ("active = '0'", ANY),
)


class World:
    """The table, who uses it, its master, and those that were killed before it."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database = database
        self.number = 0
        self.seen: Counter[str] = Counter()
        self.frozen: list[int] = []
        self.masters: list[Master] = []
        self.started = 0
        self._directory = directory
        self._config = directory / "master.toml"
        self.configure()
        self.start_master().wait_log(r"\bleading\b")
        database.execute(OBJECTS)
        database.execute("ALTER TABLE task ADD COLUMN own text")
        self.admin = database.connect(database.admin, row_factory=dict_row)
        self.user_name = f"{database.user}_user"
        self.admin.execute(f'CREATE ROLE "{self.user_name}" LOGIN'.encode())
        database.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON task TO "{self.user_name}"')
        self.user = database.connect(
            database.server.conninfo(database.name, self.user_name), options="-c statement_timeout=10s"
        )

    def configure(self, *, workers: int = 6, linger: str = "1 s") -> None:
        text = f"[master]\nworkers = {workers}\nlinger = {json.dumps(linger)}\n"
        text += f"[[database]]\nconninfo = {json.dumps(self.database.conninfo)}\n"
        self._config.write_text(text, "utf-8")

    def start_master(self) -> Master:
        log = self._directory / f"master{self.started}.log"
        self.started += 1
        self.masters.append(launch(("--config", str(self._config)), {}, log))
        self.masters[-1].may_log_errors = True  # of a worker that was killed
        return self.master

    @property
    def master(self) -> Master:
        return self.masters[-1]

    def kill_master(self) -> None:
        self.master.process.kill()
        self.master.process.wait()
        self.start_master()

    def group(self, letter: str) -> str:
        """Of this sequence only: a pause of 24 days is nothing for the next one."""
        return f"{letter} {self.number}"

    def workers(self) -> list[int]:
        sessions = {one.pid for one in self.masters}
        pids = [one.pid for one in processes() if one.session in sessions and one.pid not in sessions]
        return [pid for pid in pids if title(pid).startswith("pgtask: worker")]

    def one_of(self, states: Sequence[str], which: int) -> int | None:
        rows = self.user.execute(
            "SELECT id FROM task WHERE state::text = ANY (%s) ORDER BY id", [list(states)]
        ).fetchall()
        return rows[which % len(rows)][0] if rows else None

    def update(self, change: str, states: Sequence[str], which: int) -> None:
        """As the user. The row may leave the states meanwhile: then it is not changed."""
        if (id := self.one_of(states, which)) is not None:
            query = f"UPDATE task SET {change} WHERE id = %s AND state::text = ANY (%s)"
            self.as_user(query, [id, list(states)])

    def as_user(self, query: str, values: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        """A worker that is frozen while it has the next row locked keeps users waiting until it goes on."""
        try:
            return self.user.execute(query.encode(), values)
        except psycopg.errors.QueryCanceled:
            if not self.frozen:
                raise
            self.thaw()
            self.seen["waited for the frozen"] += 1
            return self.user.execute(query.encode(), values)

    def insert(self, columns: Sequence[str]) -> None:
        pairs = dict(column.split(" = ", 1) for column in columns)
        query = f"INSERT INTO task ({', '.join(pairs)}) VALUES ({', '.join(pairs.values())})"
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            self.user.execute(query.encode())

    def signal(self, pid: int, sig: Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)

    def freeze(self, pid: int) -> None:
        self.signal(pid, SIGSTOP)
        self.frozen.append(pid)

    def thaw(self) -> None:
        while self.frozen:
            self.signal(self.frozen.pop(), SIGCONT)

    def reset(self) -> None:
        """Nothing is left of the last sequence, whatever became of it."""
        self.number += 1
        self.thaw()
        self.configure()
        if self.master.process.poll() is not None:
            self.start_master()
        self.user.execute("DELETE FROM task")
        eventually(lambda: not self.holders(), PATIENCE)
        for table in ("journal", "ledger"):
            self.admin.execute(f"DELETE FROM {table}".encode())
        self.admin.execute("SELECT setval('exceeded', 1, false)")

    def settle(self) -> list[dict[str, Any]]:
        """Wait until whatever is due has ended and nobody runs; what has not."""
        self.thaw()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.user.execute("UPDATE task SET repeat = '0' WHERE state = 'PLAN' AND repeat > '0' AND repeat < '1 h'")
            if not (left := self.unfinished()) and not self.holders():
                return []
            time.sleep(0.01)
        return left or self.holders()

    def unfinished(self) -> list[dict[str, Any]]:
        """Rows that should have come further; not those that wait out a pause of days."""
        return self.admin.execute(
            """SELECT id, state::text, plan::text, max, "group", attempt, pid, error FROM task
               WHERE state IN ('TAKE', 'WORK', 'WAIT') OR state = 'PLAN' AND plan <= clock_timestamp()
                   AND NOT (max < 0 AND "group" IN (SELECT "group" FROM journal WHERE max < -60000 AND new = 'WORK'))"""
        ).fetchall()

    def holders(self) -> list[dict[str, Any]]:
        return self.admin.execute(
            """SELECT pid, objid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND objid::bigint < 1 << 30
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
        ).fetchall()

    def journal(self) -> list[dict[str, Any]]:
        return self.admin.execute("SELECT * FROM journal ORDER BY n").fetchall()

    def ledger(self) -> Counter[int]:
        return Counter(row["run"] for row in self.admin.execute("SELECT run FROM ledger"))


@dataclass(frozen=True)
class Insert:
    """So many tasks of one kind into a group."""

    kind: str
    group: str
    columns: tuple[str, ...] = ()
    times: int = 1

    def do(self, world: World) -> None:
        own = (f"input = {_text(INPUTS[self.kind])}", f'"group" = {_text(world.group(self.group))}')
        for _ in range(self.times):
            world.insert((*own, *self.columns))


@dataclass(frozen=True)
class Change:
    """A user changes a row that is in PLAN."""

    change: str
    which: int = 0

    def do(self, world: World) -> None:
        world.update(self.change, ("PLAN",), self.which)


@dataclass(frozen=True)
class Move:
    """A row in PLAN goes to another group."""

    group: str
    which: int = 0

    def do(self, world: World) -> None:
        world.update(f'"group" = {_text(world.group(self.group))}', ("PLAN",), self.which)


@dataclass(frozen=True)
class Own:
    """What users keep in a row is theirs in every state."""

    which: int = 0

    def do(self, world: World) -> None:
        world.update("data = concat(data, 'x'), own = 'y'", ANY, self.which)


@dataclass(frozen=True)
class Stop:
    states: tuple[str, ...]
    which: int = 0

    def do(self, world: World) -> None:
        world.update("state = 'STOP'", self.states, self.which)


@dataclass(frozen=True)
class Again:
    """A row that has ended is set back to PLAN, perhaps with a new plan; not while its stopped run goes on."""

    change: str = ""
    which: int = 0

    def do(self, world: World) -> None:
        if (id := world.one_of(ENDED, self.which)) is None:
            return
        query = f"UPDATE task SET state = 'PLAN'{self.change} WHERE id = %s AND state::text = ANY (%s)"
        try:
            world.as_user(query, [id, list(ENDED)])
        except psycopg.errors.InsufficientPrivilege:
            assert world.user.execute("SELECT state::text FROM task WHERE id = %s", [id]).fetchone() == ("STOP",)
            world.seen["stop goes on"] += 1


@dataclass(frozen=True)
class Delete:
    states: tuple[str, ...]
    which: int = 0

    def do(self, world: World) -> None:
        if (id := world.one_of(self.states, self.which)) is not None:
            world.as_user("DELETE FROM task WHERE id = %s", [id])


@dataclass(frozen=True)
class Forge:
    """An edit that must be refused."""

    change: str
    states: tuple[str, ...]
    which: int = 0

    def do(self, world: World) -> None:
        if (id := world.one_of(self.states, self.which)) is None:
            return
        query = f"UPDATE task SET {self.change} WHERE id = %s AND state::text = ANY (%s) RETURNING id"
        try:
            changed = world.as_user(query, [id, list(self.states)]).fetchall()
        except REFUSED:
            world.seen["refused"] += 1
        else:
            assert not changed, f"not refused: {self}"


@dataclass(frozen=True)
class InsertForged:
    """A new row that must be refused."""

    columns: str

    def do(self, world: World) -> None:
        own = (f"input = {_text(INPUTS['quick'])}", f'"group" = {_text(world.group("a"))}')
        with pytest.raises(REFUSED):
            world.insert((*own, *self.columns.split(", ")))
        world.seen["refused"] += 1


@dataclass(frozen=True)
class Rest:
    ms: int

    def do(self, world: World) -> None:
        time.sleep(self.ms / 1000)


@dataclass(frozen=True)
class SignalWorker:
    sig: Signals
    which: int = 0

    def do(self, world: World) -> None:
        if workers := world.workers():
            world.signal(workers[self.which % len(workers)], self.sig)


@dataclass(frozen=True)
class KillMaster:
    """And a new one is started at once, which may serve before the next action."""

    wait: bool = False

    def do(self, world: World) -> None:
        world.kill_master()
        if self.wait:
            world.master.wait_log(r"\bleading\b")


@dataclass(frozen=True)
class Reload:
    workers: int
    linger: str

    def do(self, world: World) -> None:
        world.configure(workers=self.workers, linger=self.linger)
        if world.master.logged(r"\bleading\b"):  # before, it does not know the signal yet
            world.master.signal(SIGHUP)


@dataclass(frozen=True)
class EndSession:
    """pg_terminate_backend of a session of the master (by its name) or of a worker."""

    of_master: bool
    which: int = 0

    def do(self, world: World) -> None:
        pids = world.admin.execute(
            """SELECT pid FROM pg_stat_activity
               WHERE usename = %s AND (application_name = 'pgtask master') = %s ORDER BY backend_start""",
            [world.database.user, self.of_master],
        ).fetchall()
        ours = world.database._kept and world.database._kept.info.backend_pid
        pids = [row["pid"] for row in pids if row["pid"] != ours]
        if pids:
            world.admin.execute("SELECT pg_terminate_backend(%s)", [pids[self.which % len(pids)]])


@dataclass(frozen=True)
class Freeze:
    """SIGSTOP, until the next Thaw or the end of the sequence."""

    master: bool
    which: int = 0

    def do(self, world: World) -> None:
        workers = [world.master.pid] if self.master else world.workers()
        if workers:
            world.freeze(workers[self.which % len(workers)])


@dataclass(frozen=True)
class Thaw:
    def do(self, world: World) -> None:
        world.thaw()


def _text(value: str) -> str:
    return sql.Literal(value).as_string(None)


Action = Any
which = st.integers(0, 5)
letters = st.sampled_from("ab")
inserts = st.builds(
    Insert,
    kind=st.sampled_from(sorted(INPUTS.keys() - {"longest"})),
    group=letters,
    columns=st.lists(st.sampled_from(COLUMNS), max_size=2, unique_by=lambda one: one.split(" = ")[0]).map(tuple),
    times=st.integers(1, 3),
)
crowds = st.builds(
    Insert,
    kind=st.sampled_from(["slow", "quick", "silent", "long"]),
    group=letters,
    columns=st.sampled_from([("max = 1",), ("max = 2",), (), ('"delete" = false',), ("max = -10",)]),
    times=st.integers(1, 4),
)
running_first = st.sampled_from([RUNNING, RUNNING, ("PLAN", *RUNNING)])
edits = st.one_of(
    st.builds(Change, st.sampled_from(CHANGES), which),
    st.builds(Move, letters, which),
    st.builds(Own, which),
    st.builds(Stop, running_first, which),
    st.builds(Stop, running_first, which),
    st.builds(
        Again, st.sampled_from(["", ", plan = clock_timestamp()", ", plan = clock_timestamp(), active = '1 h'"]), which
    ),
    st.builds(Delete, st.sampled_from([RUNNING, ("PLAN",), ANY]), which),
)
forgeries = st.one_of(
    st.builds(lambda forged, which: Forge(*forged, which), st.sampled_from(FORGERIES), which),
    st.builds(InsertForged, st.sampled_from(FORGED_ROWS)),
)
rests = st.builds(Rest, st.sampled_from([1, 5, 20, 60]))
faults = st.one_of(
    st.builds(SignalWorker, st.sampled_from([SIGKILL, SIGTERM, SIGINT]), which),
    st.builds(SignalWorker, st.sampled_from([SIGKILL, SIGTERM, SIGINT]), which),
    st.builds(EndSession, st.booleans(), which),
    st.builds(Freeze, st.booleans(), which),
    st.builds(Thaw),
    st.builds(Reload, st.sampled_from([1, 2, 6]), st.sampled_from(["0 s", "1 s"])),
    st.builds(Reload, st.sampled_from([1, 2, 6]), st.sampled_from(["0 s", "1 s"])),
    st.builds(EndSession, st.booleans(), which),
    st.builds(KillMaster, st.booleans()),
)
sequences = st.lists(
    # The first is what a sequence that fails is made simpler with.
    st.one_of(rests, crowds, crowds, inserts, inserts, edits, edits, edits, forgeries, rests, faults),
    min_size=20,
    max_size=40,
)


@pytest.fixture(scope="module")
def world(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name = f"test_{secrets.token_hex(6)}"
    database = Database(server, name, name)
    create(database)
    one = World(database, tmp_path_factory.mktemp("states"))
    yield one
    one.reset()
    one.user.close()
    one.master.wait_log(r"\bleading\b")
    for old in one.masters[:-1]:
        eventually(lambda old=old: not old.left())
    problems = end(one.master) + rows_left(database)
    one.admin.execute(f'DROP OWNED BY "{one.user_name}"; DROP ROLE "{one.user_name}"'.encode())
    database.close()
    drop(database)
    assert not problems, "\n".join(problems)
    idle = {"PLAN to TAKE", "TAKE to WORK", "WORK to DONE", "WORK to STOP", "refused"} - one.seen.keys()
    assert not idle, "the sequences are too tame"
    print("seen:", ", ".join(f"{what} {times}" for what, times in sorted(one.seen.items())))


@example([Insert("longest", "a"), Rest(200), KillMaster(wait=True), Stop(RUNNING), Insert("slow", "a")])
@example([Insert("long", "a", times=3), Rest(20), Freeze(master=False), Stop(RUNNING), Insert("slow", "a"), Rest(60)])
@settings(
    max_examples=EXAMPLES or 5,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(actions=sequences)
def test_whatever_users_do_and_whatever_dies_no_row_leaves_the_map(world: World, actions: list[Action]) -> None:
    play(world, actions)


def play(world: World, actions: list[Action]) -> None:
    """Do all of it, wait for quiet, and see whether everything adds up."""
    world.reset()
    for action in actions:
        action.do(world)
    left = world.settle()
    journal = world.journal()
    problems = [f"did not end: {row}" for row in left]
    problems += [*wrong_changes(journal, world.user_name), *wrong_effects(journal, world.ledger(), world.user_name)]
    problems += [
        f"{row['error']}" for row in world.admin.execute("SELECT error FROM task WHERE error LIKE 'ERROR:  slots of %'")
    ]
    exceeded = world.admin.execute("SELECT is_called FROM exceeded").fetchone()
    if exceeded and exceeded["is_called"]:
        problems.append("more runs than slots")
    problems += broken(world)
    world.seen.update(f"{row['old']} to {row['new']}" for row in journal)
    assert not problems, report(world, actions, problems, journal)


def wrong_changes(journal: list[dict[str, Any]], user: str) -> Iterator[str]:
    """Changes that no one may make, or none without what came before."""
    states: dict[int, str | None] = {}
    for row in journal:
        change, users = (row["old"], row["new"]), row["actor"] == user
        if states.get(row["id"]) != row["old"]:
            yield f"a change of row {row['id']} before {row['n']} is not in the journal"
        states[row["id"]] = row["new"]
        if change not in (USER if users else SCHEDULER):
            yield f"{'a user' if users else 'the scheduler'} may not make of {row['id']} {change}, entry {row['n']}"
        if row["old"] and row["new"] and row["attempt"] - row["attempt_before"] not in steps(change):
            yield f"attempt of {row['id']} went from {row['attempt_before']} to {row['attempt']}, entry {row['n']}"
        if users or row["old"] != "PLAN" or row["new"] is None:
            continue
        if row["since_plan"] < 0:
            yield f"{row['id']} was {row['new']} before its plan, entry {row['n']}"
        late = row["since_plan"] - row["active"]
        bound = row["max"] >= 0 and row["repeat"] == 0
        if row["new"] == "GONE" and not (bound and late > 0):
            yield f"{row['id']} is GONE although it was not late, entry {row['n']}"
        if row["new"] != "GONE" and bound and late > 60:
            yield f"{row['id']} was begun too late, entry {row['n']}"


def steps(change: tuple[str, str]) -> tuple[int, ...]:
    """By how much `attempt` may grow."""
    if change[1] == "WORK" and change[0] != "WORK":
        return (1,)
    return (0, -1) if change == ("WORK", "PLAN") else (0,)


def wrong_effects(journal: list[dict[str, Any]], ledger: Counter[int], user: str) -> Iterator[str]:
    """Runs that are in the ledger and should not be, or should be and are not; repetitions too many or too few."""
    begun: dict[int, dict[str, Any]] = {}
    born = Counter((row["parent"], row["tx"]) for row in journal if row["old"] is None and row["repeat"] > 0)
    for row in journal:
        if row["new"] == "WORK" and row["old"] != "WORK":
            begun[row["id"]] = row
        if row["old"] != "WORK" or row["new"] == "WORK" or (run := begun.get(row["id"])) is None:
            continue
        well = row["actor"] != user and row["new"] in ("DONE", None)
        entries = ledger.pop(run["n"], 0)
        strict = run["atomic"] and run["input"] in ONCE.values()
        if entries > 1 or (strict and entries != well) or (well and not entries):
            yield f"run {run['n']} of {row['id']} became {row['new']} and is {entries} times in the ledger"
        if row["actor"] != user and row["new"] in ("DONE", "FAIL", None) and run["repeat"] < 1e9:
            wanted = 1 if run["repeat"] > 0 else 0
            if (children := born[row["id"], row["tx"]]) != wanted:
                yield f"run {run['n']} of {row['id']} planned {children} repetitions, not {wanted}"
    if ledger:
        yield f"in the ledger without a run that ended: {dict(ledger)}"


def broken(world: World) -> Iterator[str]:
    if (status := world.master.process.poll()) is not None:
        yield f"the master ended with {status}"
    for master in world.masters:
        yield from master.logged(r"^Traceback|^\w*Error:")
    for old in world.masters[:-1]:
        if not old.left():
            world.masters.remove(old)


def report(world: World, actions: list[Action], problems: list[str], journal: list[dict[str, Any]]) -> str:
    """Everything that it takes to understand it, and the sequence as it can be played again."""
    rows = defaultdict(list)
    for row in journal:
        who = "user" if row["actor"] == world.user_name else "pgtask"
        rows[row["id"]].append(
            f"    {row['n']} {row['at']:%M:%S.%f} {row['old']} -> {row['new']} by {who} ({row['backend']}),"
            f" group {row['group']}, max {row['max']}, attempt {row['attempt']}, pid {row['pid']}"
        )
    lines = [
        "it does not hold:",
        *problems,
        "after:",
        "[",
        *(f"    {action!r}," for action in actions if action != Rest(1)),
        "]",
    ]
    for id, changes in rows.items():
        lines += [f"row {id}:", *changes]
    return "\n".join([*lines, "the master's log ends:", *world.master.log().splitlines()[-60:]])
