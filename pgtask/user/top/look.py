"""What `pgtask top` reads from the database, and what it lets a table's user do there.

Each table is watched by a thread with a session of its own, so that one that hangs holds up nobody: neither the other
tables nor the screen. It keeps its last figures, and says since when it has no newer ones and why. The threads are
daemons, since one that waits for a dead network cannot be ended.

A look is one read-only transaction, sent at once. It costs no more where more rows lie in the table, and the pause
after it is several times as long as it took, so that it is not the watching which makes a server busy.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import Connection, RawCursor, conninfo

from pgtask.config import TableConfig
from pgtask.errors import UserError
from pgtask.log import redact
from pgtask.objects import Names, literal
from pgtask.user.where import one_line

NAME = "pgtask top"
"""What pg_stat_activity calls our sessions."""

COUNTED = 10_000
"""Rows that are counted; a count of one more means that there are more."""

RUNNING, LISTED = 1000, 500
"""Running rows, and groups and failed rows, that are read at most."""

PLACE = 2000
"""Rows looked at for how they ended, before each of three places: the newest, the newest running, the first due row."""

SPAN = 10.0
"""Seconds that rates are of."""

HISTORY = 3600.0
"""Seconds that failures are counted for."""

REST = 4
"""A look is followed by a pause of at least so many times what it took."""

PATIENCE = 5.0
"""Seconds without an answer after which a table counts as down."""

LONGEST = 5.0
"""Seconds between two attempts to open a session, at most."""

SETTINGS = {
    "search_path": "pg_catalog, pg_temp",
    "statement_timeout": "10s",
    "lock_timeout": "5s",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}
"""Of each transaction of ours, and not of the session, which may be a pooler's. The statements walk indexes in order
and stop early, whatever the statistics of a young table say."""

CONNECT = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "12000",
}


@dataclass(frozen=True, kw_only=True)
class Leader:
    """Who serves the table, or did so last. All but `leads` may be unknown."""

    term: int | None
    host: str | None
    pid: int | None
    since: str | None
    serving: float | None  # seconds
    leads: bool


@dataclass(frozen=True, kw_only=True)
class Running:
    """A row that has a slot. Times are seconds."""

    id: int
    state: str
    group: str
    remote: str
    pid: int | None
    attempt: int
    elapsed: float | None
    timeout: float
    session: str | None
    wait_event_type: str | None
    wait_event: str | None
    percent: float | None
    message: str | None
    input: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group that has a row which runs, is due, or has ended a short while ago, or that is held."""

    group: str
    remote: str
    running: int
    slots: int | None  # unknown where nothing runs or is due
    due: int
    oldest: float | None
    done: float  # a second, of rows that stayed
    failed: int
    held: bool
    held_for: float | None
    held_by: str | None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A row in FAIL, `ago` seconds after its end."""

    id: int
    group: str
    remote: str
    ago: float
    ran: float | None
    attempt: int
    code: str | None
    error: str
    input: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One look at one table. A count of COUNTED + 1 means more than COUNTED; a rate is null until there is one."""

    at: str
    server: str
    leader: Leader | None
    standing_by: int
    workers: int
    slots: int
    due: int
    oldest: float | None
    planned: int
    next: float | None
    waiting: int
    done_per_second: float | None
    removed_per_second: float | None
    failed_per_second: float
    inserted_per_second: float | None
    failed: int
    group_count: int
    lacks: tuple[str, ...]  # what there is no right to read
    running: tuple[Running, ...]
    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What is known of a table: the last figures, and what stands against newer ones. Times are of time.monotonic()."""

    label: str
    figures: Figures | None = None
    seen: float | None = None
    error: str | None = None
    asked: float | None = None  # since when an answer is awaited

    def trouble(self, now: float) -> str | None:
        """Why the figures are old."""
        if self.error is not None:
            return self.error
        if self.asked is not None and now - self.asked > PATIENCE:
            return f"no answer for {now - self.asked:.0f} s"
        return None

    def age(self, now: float) -> float | None:
        """Seconds since the figures were read."""
        return None if self.seen is None else now - self.seen


@dataclass
class Rates:
    """Growth of the server's counters, which are of no use but as differences."""

    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, epoch: float, inserted: int, removed: int) -> tuple[float | None, float | None]:
        """Rows a second, inserted and removed, since up to SPAN seconds; null at first, and after a reset."""
        samples = self._samples
        if samples and (epoch <= samples[-1][0] or inserted < samples[-1][1] or removed < samples[-1][2]):
            samples.clear()
        samples.append((epoch, inserted, removed))
        while len(samples) > 2 and epoch - samples[1][0] >= SPAN:
            samples.popleft()
        first = samples[0]
        if (passed := epoch - first[0]) <= 0:
            return None, None
        return (inserted - first[1]) / passed, (removed - first[2]) / passed


class Reader:
    """Looks at one table, in one session after another."""

    def __init__(self, table: TableConfig):
        self._table = table
        self._names = Names(schema=table.schema, table=table.table)
        self._store = self._names.store()
        self._rates = Rates()
        self._session: Connection[Any] | None = None
        self._statement = ""
        self._server = ""
        self._lacks: tuple[str, ...] = ()

    def look(self) -> Figures:
        """One look. After an error the session is closed, and the next look opens another.

        Raises psycopg.Error; UserError if the table is not there, or not to be read.
        """
        try:
            session = self._open() if self._session is None else self._session
            limits = [RUNNING, COUNTED + 1, PLACE, SPAN, HISTORY, LISTED]
            return self._figures(_document(_read(session, self._statement, limits)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _open(self) -> Connection[Any]:
        self._session = session = connect(self._table)
        words = {
            f"{suffix}_text": literal(self._names.quoted(self._names.derived(suffix)))
            for suffix in ("master", "held", "report")
        }
        readable, master, held, report, self._server, encoding, role = _read(session, self._text("top_rights", **words))
        if readable is None:
            raise UserError("there is no such table yet: pgtask-master makes it, or the script that pgtask sql prints")
        if not readable:
            table = self._names.label
            raise UserError(f"{role} may not read {table}: GRANT SELECT ON {self._names.task} TO {role}")
        if encoding == "SQL_ASCII":  # its texts may be in any encoding
            session.execute("SET client_encoding TO SQL_ASCII")
        self._lacks = tuple(
            self._names.derived(suffix)
            for suffix, there in (("master", master), ("held", held), ("report", report))
            if not there
        )
        self._statement = self._text(
            "top",
            leader_row=self._text("top_leader" if master else "top_lock"),
            held_rows=self._text("top_held" if held else "top_no_held"),
            report_rows=self._text("top_report" if report else "top_no_report"),
        )
        return session

    def _text(self, name: str, **words: str) -> str:
        return self._store.text(name, **words)

    def _figures(self, read: Mapping[str, Any]) -> Figures:
        inserted, removed = self._rates.add(read["epoch"], int(read["inserted"] or 0), int(read["removed"] or 0))
        span = read["span"]
        return Figures(
            **{name: read[name] for name in _AS_READ},
            server=self._server,
            leader=Leader(**read["leader"]) if read["leader"] else None,
            done_per_second=None if removed is None else read["done"] / span + removed,
            removed_per_second=removed,
            failed_per_second=read["failing"] / span,
            inserted_per_second=inserted,
            lacks=self._lacks,
            running=tuple(Running(**_shown(row)) for row in read["running"]),
            groups=tuple(Group(**_shown(row | {"done": row["done"] / span})) for row in read["groups"]),
            failures=tuple(Failure(**_shown(row)) for row in read["failures"]),
        )


_AS_READ = (
    *("at", "standing_by", "workers", "slots", "due", "oldest", "planned", "next", "waiting"),
    *("failed", "group_count"),
)


class Watch(threading.Thread):
    """Looks at one table again and again. `sight` is the newest; `changed` is called, in this thread, with each."""

    def __init__(self, table: TableConfig, interval: float, changed: Callable[[], None] = lambda: None):
        super().__init__(name=f"watch {table.label}", daemon=True)
        self.table = table
        self.sight = Sight(label=table.label)
        self.looks = 0
        self._interval = interval
        self._changed = changed
        self._reader = Reader(table)
        self._nudge = threading.Event()
        self._going = threading.Event()
        self._going.set()
        self._over = False

    def run(self) -> None:
        pause = 0.0
        while not self._over:
            began = time.monotonic()
            self._show(asked=began)
            if self._look():
                pause = max(self._interval, REST * (time.monotonic() - began))
            else:
                pause = min(LONGEST, max(self._interval, 2 * pause))
            self._changed()
            self._nudge.wait(pause)
            self._nudge.clear()
            self._going.wait()
        self._reader.close()

    def look_now(self) -> None:
        """Something has just been done to the table."""
        self._nudge.set()

    def pause(self, paused: bool) -> None:
        """Look no more, or again."""
        if paused:
            self._going.clear()
        else:
            self._going.set()
            self._nudge.set()

    def stop(self) -> None:
        """Soon: a look that goes on is not waited for."""
        self._over = True
        self.pause(False)

    def _look(self) -> bool:
        try:
            figures = self._reader.look()
        except (psycopg.Error, OSError, UserError) as error:
            self._show(asked=None, error=redact(one_line(error)))
            return False
        self._show(asked=None, error=None, figures=figures, seen=time.monotonic())
        self.looks += 1
        return True

    def _show(self, **changed: Any) -> None:
        self.sight = Sight(**(self.sight.__dict__ | changed))


def connect(table: TableConfig) -> Connection[Any]:
    """A session that gives up in time. Raises psycopg.Error."""
    given = conninfo.conninfo_to_dict(table.conninfo)
    parameters: dict[str, Any] = {**CONNECT, **given}
    return Connection.connect(
        conninfo.make_conninfo("", **parameters),
        autocommit=True,
        prepare_threshold=None,
        cursor_factory=RawCursor,
        client_encoding="utf8",
        fallback_application_name=NAME,
    )


def task(table: TableConfig, id: int) -> dict[str, Any]:
    """A row, without passwords. Raises psycopg.Error, UserError if it is gone."""
    with connect(table) as session:
        row = _read(session, _store(table).text("top_task"), [id])
    if not row:
        raise UserError(f"task {id} is gone: it is done, and had nothing to say")
    return _shown(_document(row))


def cancel(table: TableConfig, id: int) -> str:
    """Stop a task, with the rights of whoever connects; what became of it. Raises psycopg.Error."""
    return f"task {id} is stopped" if _call(table, "cancel_one", id) else f"task {id} has ended before"


def retry(table: TableConfig, id: int) -> str:
    """Put a task that has ended back; what became of it. Raises psycopg.Error."""
    done = _call(table, "retry_one", id)
    return f"task {id} runs again" if done else f"task {id} cannot run again as it is"


def hold(table: TableConfig, group: str) -> str:
    """Begin nothing more of the group; what became of it. Raises psycopg.Error."""
    done = _call(table, "hold_group", group)
    return f"group {group} is held" if done else f"group {group} was held already"


def release(table: TableConfig, group: str) -> str:
    """Let the group's tasks begin again; what became of it. Raises psycopg.Error."""
    done = _call(table, "release_group", group)
    return f"group {group} is released" if done else f"group {group} was not held"


def place(remote: str) -> str:
    """Where a remote task runs, without how to get in there."""
    if not remote:
        return ""
    try:
        found = conninfo.conninfo_to_dict(remote)
    except psycopg.ProgrammingError:
        return "remote"
    return "@".join(str(found[name]) for name in ("dbname", "host") if found.get(name)) or "remote"


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a list, without passwords."""
    return {name: redact(value) if isinstance(value, str) else value for name, value in row.items()} | {
        "remote": place(row["remote"] or "")
    }


def _call(table: TableConfig, statement: str, argument: object) -> bool:
    """Say something in a session of its own: those that look only read."""
    with connect(table) as session:
        return bool(_read(session, _store(table).text(statement), [argument], access="READ WRITE")[0])


def _store(table: TableConfig) -> Any:
    return Names(schema=table.schema, table=table.table).store()


def _read(session: Connection[Any], text: str, parameters: list[Any] | None = None, access: str = "READ ONLY") -> Any:
    """The statement's first row, or () if there is none; a transaction in one round trip."""
    chosen = ", ".join(f"set_config({literal(name)}, {literal(value)}, true)" for name, value in SETTINGS.items())
    with session.pipeline():
        session.execute(f"BEGIN {access}".encode())
        session.execute(f"SELECT {chosen}".encode())
        found = session.execute(text.encode(), parameters)
        session.execute(b"COMMIT")
        return found.fetchone() or ()


def _document(row: tuple[str | bytes]) -> dict[str, Any]:
    text = row[0]
    read: dict[str, Any] = json.loads(text.decode(errors="replace") if isinstance(text, bytes) else text)
    return read
