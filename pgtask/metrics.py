"""What is counted, and how: every metric once, and the functions by which master and workers count.

Off, which is the default, each function is one look at a variable, and prometheus_client is not even imported. On, it
is prometheus_client in its multiprocess mode: every process that counts writes into files of its own in a private
directory, which the monitor (monitor.py) adds up. Its files are usually named by process ids, and workers come and go;
so here they are named by the worker's place: the master gives each worker the lowest number that no living one has.
Thus there are no more files than workers, their counts go on from worker to worker, and each has one writer at a time.

What must hold: a child never writes to a file that its parent has open (`_leave`), and no page of a file is first
written when there is no room for it left, which would be a signal and not an error: so the master lays out the room
before it forks (`claim`). Where there is none, or the directory is gone with its master, a process counts nothing.
"""

import contextlib
import fcntl
import math
import os
import shutil
import stat
import struct
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pgtask import log

Kind = Literal["counter", "gauge", "histogram"]

MOST = 10_000
"""Rows of a table that one scrape counts at most, of each sort."""

GROUPS = 20
"""Groups of a table that have metrics of their own."""

OTHER = "other"
"""What the other groups are called together, and unusual classes of errors."""

ROOM = 1 << 15
"""Bytes that a worker may need in each of its files: it counts for one table."""

TYPES = ("counter", "histogram")
PREFIX = "pgtask-metrics-"
MASTER = "master"

_CLASSES = """00 01 02 03 08 09 0A 0B 0F 0L 0P 0Z 20 21 22 23 24 25 26 27 28 2B 2D 2F 34 38 39 3B 3D 3F 40 42 44
    53 54 55 57 58 72 F0 HV P0 XX"""
CLASSES = frozenset(_CLASSES.split())
"""PostgreSQL's classes of SQLSTATEs. A task may raise any other, and nobody may make labels without end."""

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG = (*SHORT, 10.0, 60.0, 300.0, 1800.0, 7200.0)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric, as the page and the reference have it. `name` is that of a counter with its _total."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("table",)
    buckets: tuple[float, ...] = ()
    counted: bool = False  # by master and workers; the others are read when the page is made


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=f"pgtask_{name}_total", kind="counter", help=help, labels=("table", *labels), counted=True)


def _histogram(name: str, buckets: tuple[float, ...], help: str) -> Metric:
    return Metric(name=f"pgtask_{name}_seconds", kind="histogram", help=help, buckets=buckets, counted=True)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=f"pgtask_{name}", kind="gauge", help=help, labels=labels)


def _of_process(name: str, kind: Kind, help: str) -> Metric:
    return Metric(name=f"pgtask_master_process_{name}", kind=kind, help=help, labels=())


_T = "table"
METRICS: tuple[Metric, ...] = (
    _counter("tasks_taken", "Tasks given to workers to be run, by the master or with the end of the run before."),
    _counter("tasks_done", "Runs that ended well, and that is committed."),
    _counter(
        "tasks_failed",
        "Runs that ended with an error, and that is committed; also those that are tried again. class is that of the "
        f'SQLSTATE, "{OTHER}" for one that PostgreSQL does not have.',
        "class",
    ),
    _counter("tasks_retried", "Of those that ended with an error, how many will be tried again."),
    _counter("tasks_gone", "Tasks that came too late, or whose run was missed."),
    _counter("tasks_stopped", "Runs that were cancelled because somebody stopped or deleted their task."),
    _counter("runs_interrupted", "Runs that their worker cancelled or did not begin, and put back at no cost."),
    _counter("runs_lost", "Runs whose worker, session or server went away, and that were put back to be run again."),
    _counter("runs_given_up", "Tasks that failed because their runs were lost too often."),
    _counter("workers_forked", "Workers forked."),
    _counter("workers_crashed", "Workers that ended with anything but exit status 0: a lost session, or a crash."),
    _counter("notifications", "Notifications that reached the master: it slept, and something was inserted or moved."),
    _histogram("take", SHORT, "How long the master took to look for due tasks and take them."),
    _histogram(
        "pickup",
        LONG,
        "From a task's plan to the start of its first run, by the server's clock; not of tasks that depend on others.",
    ),
    _histogram("run", LONG, "How long runs lasted; of runs that shared a transaction their mean."),
    _gauge("up", "1 if the monitor could read the table in time for this page.", _T),
    _gauge("leader", "1 if this master serves the table, 0 if it stands by or cannot.", _T),
    _gauge("standby", "1 if this master stands by while another serves the table.", _T),
    _gauge("term", "The number of the table's current term: it grows when another master takes over.", _T),
    _gauge("last_take_timestamp_seconds", "When this master last looked for due tasks, since the epoch.", _T),
    _gauge("workers", "Workers of this master for the table, by what they do: busy or idle.", _T, "state"),
    _gauge("workers_limit", "How many workers this master may have, of all tables together."),
    _gauge("backlog_tasks", f"Tasks that are due and not taken. Counted up to {MOST}.", _T),
    _gauge("backlog_age_seconds", "How long ago the longest-waiting due task was due; 0 if there is none.", _T),
    _gauge("slots_in_use", f"Tasks that are taken or run. Counted up to {MOST}.", _T),
    _gauge("longest_run_seconds", "How long ago the longest of these began.", _T),
    _gauge("planned_tasks", f"Tasks planned for later. Counted up to {MOST}.", _T),
    _gauge("waiting_tasks", f"Tasks that wait for others. Counted up to {MOST}.", _T),
    _gauge(
        "group_backlog_tasks",
        f"Due tasks of a group, among the {MOST} that have waited longest: of the {GROUPS} groups that have most, the "
        f'others together are "{OTHER}". A group\'s name is cut after 60 characters.',
        *(_T, "group"),
    ),
    _gauge("group_backlog_age_seconds", "How long ago the first of these was due.", _T, "group"),
    _gauge("group_slots_in_use", f"The same of a group, of the {GROUPS} that have most.", _T, "group"),
    Metric(
        name="pgtask_scrape_errors_total",
        kind="counter",
        help="Pages for which the table could not be read, since the monitor started.",
    ),
    _gauge("scrape_seconds", "How long it took to read the table for this page.", _T),
    _gauge("master_up", "1 if the master's loop answers."),
    _gauge("master_answer_seconds", "How long the master's loop took to answer for this page."),
    _gauge("master_start_time_seconds", "When this master started, since the epoch."),
    _gauge("build_info", "Always 1; version is that of pgtask.", "version"),
    _of_process("cpu_seconds_total", "counter", "Processor time of the master itself."),
    _of_process("open_fds", "gauge", "Its open descriptors."),
    _of_process("max_fds", "gauge", "How many it may have."),
    _of_process("resident_memory_bytes", "gauge", "Its memory."),
    _of_process("virtual_memory_bytes", "gauge", "Its address space."),
    _of_process(
        "start_time_seconds",
        "gauge",
        "When the process started, since the epoch. None of these where /proc shows nothing but processes.",
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def markdown() -> str:
    """The page of the documentation with all of them."""
    lines = [
        "# Metrics",
        "",
        "What `/metrics` shows when `listen` is set (see [monitoring](../how-to/monitoring.md)). The label `table` is",
        "`USER@DATABASE SCHEMA.TABLE`, followed by `on HOST:PORT` where two tables would be called the same. What is",
        "counted begins with 0 when the master starts.",
        "",
    ]
    lines += ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        help = metric.help.replace("|", "\\|")
        if metric.buckets:
            help += f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}."
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {help} |")
    return "\n".join(lines) + "\n"


# What the master counts


def looked(table: str, seconds: float) -> None:
    """A take has lasted so long."""
    if _counting is not None:
        _observe((seconds,), "pgtask_take_seconds", table)


def taken(table: str, count: int) -> None:
    if _counting is not None and count:
        _add(count, "pgtask_tasks_taken_total", table)


def gone(table: str, count: int) -> None:
    """These came too late."""
    if _counting is not None and count:
        _add(count, "pgtask_tasks_gone_total", table)


def lost(table: str, *, failed: bool) -> None:
    """A run was lost; `failed`: once too often."""
    if _counting is not None:
        _add(1, "pgtask_runs_given_up_total" if failed else "pgtask_runs_lost_total", table)


def forked(table: str) -> None:
    if _counting is not None:
        _add(1, "pgtask_workers_forked_total", table)


def crashed(table: str) -> None:
    if _counting is not None:
        _add(1, "pgtask_workers_crashed_total", table)


def notified(table: str) -> None:
    if _counting is not None:
        _add(1, "pgtask_notifications_total", table)


# What a worker counts, for its own table


class Begun(Protocol):
    """A task of which a run begins: how many seconds after its plan (a number as text), or None."""

    @property
    def waited(self) -> bytes | None: ...


def begun(*tasks: Begun, also_taken: bool = False) -> None:
    """Runs begin; `also_taken`: of tasks that the worker took itself."""
    if _counting is None or not tasks:
        return
    if also_taken:
        _add(len(tasks), "pgtask_tasks_taken_total", _table)
    waited = [float(task.waited) for task in tasks if task.waited is not None]
    _observe([max(0.0, seconds) for seconds in waited if math.isfinite(seconds)], "pgtask_pickup_seconds", _table)


def ran(seconds: float, count: int = 1) -> None:
    """So many runs lasted so long each."""
    if _counting is not None:
        _observe([seconds] * count, "pgtask_run_seconds", _table)


def ended(*ends: tuple[str, bytes | None]) -> None:
    """Ends of runs are committed: of each, DONE, FAIL or GONE, and the SQLSTATE."""
    if _counting is None:
        return
    for state, code in set(ends):
        count = ends.count((state, code))
        if state == "FAIL":
            found = (code or b"")[:2].decode(errors="replace")
            _add(count, "pgtask_tasks_failed_total", _table, found if found in CLASSES else OTHER)
        else:
            _add(count, "pgtask_tasks_done_total" if state == "DONE" else "pgtask_tasks_gone_total", _table)


def retried(count: int) -> None:
    if _counting is not None and count:
        _add(count, "pgtask_tasks_retried_total", _table)


def stopped() -> None:
    if _counting is not None:
        _add(1, "pgtask_tasks_stopped_total", _table)


def interrupted(count: int) -> None:
    if _counting is not None:
        _add(count, "pgtask_runs_interrupted_total", _table)


# Who counts where


class _Counting:
    """This process's metrics, in its own files."""

    def __init__(self, place: str):
        from prometheus_client.values import MultiProcessValue

        self._value: Any = MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]
        self._counters: dict[tuple[str, ...], Any] = {}
        self._histograms: dict[tuple[str, ...], _Histogram] = {}

    def add(self, amount: float, *key: str) -> None:
        """`key`: the counter's name and the values of its labels."""
        if (counter := self._counters.get(key)) is None:
            counter = self._counters[key] = self._made(key[0].removesuffix("_total"), *key)
        counter.inc(amount)

    def observe(self, seconds: Sequence[float], *key: str) -> None:
        if (histogram := self._histograms.get(key)) is None:
            histogram = self._histograms[key] = _Histogram(self._made, *key)
        histogram.observe(seconds)

    def show(self, table: str) -> None:
        """With 0 from the beginning: the first of something is an increase."""
        for metric in METRICS:
            if metric.counted and metric.labels == ("table",):
                if metric.buckets:
                    self.observe((), metric.name, table)
                else:
                    self.add(0, metric.name, table)

    def _made(self, family: str, name: str, *labels: str, le: str | None = None) -> Any:
        """A value; without the text of the help, which would stand in each file with each value."""
        metric = BY_NAME.get(name) or BY_NAME[family]
        names = metric.labels if le is None else (*metric.labels, "le")
        return self._value(metric.kind, family, name, names, labels if le is None else (*labels, le), "")

    def close(self) -> None:
        self._value.close_all_files()


class _Histogram:
    """As the library lays out one, but for several observations at a time."""

    def __init__(self, made: Callable[..., Any], name: str, *labels: str):
        from prometheus_client.utils import floatToGoString

        self._bounds = BY_NAME[name].buckets
        les = [floatToGoString(bound) for bound in (*self._bounds, math.inf)]  # type: ignore[no-untyped-call]
        self._buckets = [made(name, f"{name}_bucket", *labels, le=le) for le in les]
        self._sum = made(name, f"{name}_sum", *labels)

    def observe(self, seconds: Sequence[float]) -> None:
        buckets = [bisect_left(self._bounds, one) for one in seconds]
        for bucket in set(buckets):
            self._buckets[bucket].inc(buckets.count(bucket))
        if seconds:
            self._sum.inc(sum(seconds))


_counting: _Counting | None = None
_table = ""  # that a worker counts for
_home: "_Home | None" = None


def _add(amount: float, *key: str) -> None:
    assert _counting is not None
    try:
        _counting.add(amount, *key)
    except OSError as error:
        _give_up(error)


def _observe(seconds: Sequence[float], *key: str) -> None:
    assert _counting is not None
    try:
        _counting.observe(seconds, *key)
    except OSError as error:
        _give_up(error)


def _give_up(error: OSError) -> None:
    """The directory has gone with its master, say."""
    global _counting
    _counting = None
    log.event("debug" if isinstance(error, FileNotFoundError) else "warning", "metrics_off", error=str(error))


class _Home:
    """The directory, and who has which place in it. It belongs to the master that holds its lock."""

    def __init__(self) -> None:
        self._parent = _parent()
        _remove_left(self._parent)
        self.path, self._lock = _own_directory(self._parent)
        self.places: set[int] = set()
        self.full = False  # there was no room for the last worker, which was said

    def lay_out(self, place: str, need: int) -> None:
        """Make sure that the place's files have so many bytes left. Raises OSError: there is no room."""
        for type in TYPES:
            path = self.path / f"{type}_{place}.db"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                head = os.pread(file, 4, 0)
                wanted = (struct.unpack("i", head)[0] if head else 0) + need
                if os.fstat(file).st_size < wanted:
                    os.posix_fallocate(file, 0, -(-wanted // ROOM) * ROOM)
            finally:
                os.close(file)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _parent() -> Path:
    """Where the directory is made: what the service manager made for us, or memory, or where temporary files are."""
    for name in (os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0], "/dev/shm"):
        if name and os.path.isdir(name) and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return Path(tempfile.gettempdir())


def _own_directory(parent: Path) -> tuple[Path, int]:
    """A new one, and the descriptor by which it is locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)  # another master has taken it for left, before we had the lock


def _remove_left(parent: Path) -> None:
    """What masters that were killed have left: directories of ours that nobody has locked."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, somebody else's, or gone meanwhile
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def start(tables: Iterable[str]) -> None:
    """The master begins to count, or goes on with other tables. Without room for it, it says so and does not."""
    global _counting, _home
    labels = list(tables)
    if _home is not None and not _home.path.is_dir():  # somebody has tidied up
        stop()
    try:
        if _home is None:
            _home = _Home()
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_home.path)
        _home.lay_out(MASTER, ROOM * (len(labels) + 1))
        if _counting is None:
            _counting = _Counting(MASTER)
        for label in labels:
            _counting.show(label)
    except OSError as error:
        log.warning("metrics_off", error=str(error))
        stop()


def stop() -> None:
    """The master counts no more, and nothing is left."""
    global _counting, _home
    if _counting is not None:
        _counting.close()
    if _home is not None:
        _home.remove()
    _counting = _home = None


def directory() -> Path | None:
    """Where the files are, if anybody counts."""
    return None if _home is None else _home.path


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a worker has from its fork until it was reaped."""

    number: int
    home: _Home


def claim() -> Place | None:
    """The place of a worker that is about to be forked; None where nothing is counted."""
    if _counting is None or _home is None:
        return None
    number = next(number for number in range(len(_home.places) + 1) if number not in _home.places)
    try:
        _home.lay_out(str(number), ROOM)
    except OSError as error:
        if not _home.full:
            log.warning("metrics_off", error=str(error))
        _home.full = True
        return None
    _home.full = False
    _home.places.add(number)
    return Place(number=number, home=_home)


def release(place: Place | None) -> None:
    if place is not None:
        place.home.places.discard(place.number)


def enter(place: Place | None, table: str) -> None:
    """A worker begins to count."""
    global _counting, _table
    if place is not None:
        _counting, _table = _Counting(str(place.number)), table


def _leave() -> None:
    """In a child: the files that the parent has open are not ours; and their descriptors are about to be closed."""
    global _counting
    if _counting is not None:
        _counting.close()
        _counting = None


os.register_at_fork(after_in_child=_leave)
