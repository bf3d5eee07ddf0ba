"""The monitor: a child of the master that answers HTTP requests for metrics and health.

It is apart from the master so that nothing that a client, a network or a database does can touch the scheduling: it has
threads, its own sessions, and may be killed at any moment. Requests are answered by waitress: one thread reads and
writes for all clients, so that a slow one holds nobody up, and a few threads make the pages, each in bounded time.

What it says comes from three sources: the files in which master and workers count (metrics.py), the databases
(gauges.py), and the master's answer to a question (keeper.py). The end of that conversation is the end of the monitor.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import waitress.server
from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pgtask import __version__, log, metrics
from pgtask.config import Config
from pgtask.errors import OK
from pgtask.metrics import BY_NAME
from pgtask.monitor.gauges import Databases, Reading, Shares
from pgtask.process import set_title

SOON = 1.0
"""Seconds that a page waits for the master's answer."""

HUNG = 5.0
"""Seconds without an answer after which the master is taken to be hung."""

FRESH = 0.2
"""Seconds for which an answer of the master's serves several pages."""

AGAIN = 1.0
"""Seconds for which what was read serves several scrapes."""

SCRAPES = 3
"""Pages of metrics that are made, or waited for, at a time: the other threads are there for questions of health."""

THREADS = 8
CLIENTS = 100
"""Connections at a time; one that says nothing for QUIET seconds is closed."""

QUIET = 10

LISTEN_PAUSES = (1.0, 2.0, 5.0, 10.0)
"""Seconds between tries to listen; the last one again and again."""

FOREIGN = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""Errors of an address that a name also means, of a family that this machine does not speak."""

Environ = Mapping[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]
Answer = tuple[str, list[str]]
"""A status and lines."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The master as it was seen last: its `status`, for how long it has been `silent`, how long it `took` to answer."""

    status: Mapping[str, Any] | None
    silent: float
    took: float

    @property
    def hung(self) -> bool:
        return self.silent > HUNG


class Master:
    """The master as the monitor knows it. Safe for threads: those who ask together share an answer."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._changed = threading.Condition()
        self._asked: float | None = None  # when the question was asked that is not answered yet (time.monotonic())
        self._view = View(status=None, silent=0.0, took=0.0)
        self._answered_at = -FRESH
        threading.Thread(target=self._listen, name="master", daemon=True).start()

    def view(self) -> View:
        deadline = time.monotonic() + SOON
        with self._changed:
            if self._asked is None and time.monotonic() - self._answered_at >= FRESH:
                self._asked = time.monotonic()
                self._sock.send(b"\n")
            while self._asked is not None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            silent = 0.0 if self._asked is None else time.monotonic() - self._asked
            return View(status=self._view.status, silent=silent, took=self._view.took)

    def _listen(self) -> None:
        with closing(self._sock.makefile("rb")) as lines:
            for line in lines:
                with self._changed:
                    now = time.monotonic()
                    self._view = View(status=json.loads(line), silent=0.0, took=now - (self._asked or now))
                    self._asked, self._answered_at = None, now
                    self._changed.notify_all()
        os._exit(OK)  # the master is gone: at once, whatever the threads do


class Page(Collector):
    """The metrics, gathered for whoever asks; those who ask at nearly the same time get the same."""

    def __init__(self, config: Config, master: Master):
        self._labels = [table.label for table in config.tables]
        self._master = master
        self._databases = Databases(config.tables)
        self._process = ProcessCollector(namespace="pgtask_master", pid=os.getppid, registry=None)
        self._errors = dict.fromkeys(self._labels, 0)
        self._unread: set[str] = set()  # tables that could not be read for the last page
        self._lock = threading.Lock()
        self._at = -AGAIN
        self._families: list[Family] = []

    def describe(self) -> Iterable[Family]:
        """Nothing: to ask for the names is no reason to read the databases."""
        return []

    def collect(self) -> Iterable[Family]:
        with self._lock:
            if time.monotonic() - self._at >= AGAIN:
                self._families = [*self._counted(), *self._read(), *self._process.collect()]
                for family in self._families:
                    family.documentation = _metric(family).help
                self._at = time.monotonic()
            return self._families

    def _counted(self) -> Iterable[Family]:
        """What master and workers have counted, without tables that are configured no more."""
        if (path := metrics.directory()) is None or not path.is_dir():
            return
        # The library has no types here.
        for family in MultiProcessCollector(None, path=str(path)).collect():  # type: ignore[no-untyped-call]
            family.samples = [sample for sample in family.samples if sample.labels["table"] in self._labels]
            yield family

    def _read(self) -> Iterable[Family]:
        view = self._master.view()
        readings = self._databases.read()
        for label, reading in readings.items():
            self._tell(label, reading.error)
        yield from _of_the_master(view, self._labels)
        yield from _of_the_tables(readings)
        yield _family("pgtask_scrape_errors_total", {(label,): count for label, count in self._errors.items()})

    def _tell(self, label: str, error: str) -> None:
        """Count it, and say it when it begins and when it ends."""
        self._errors[label] += bool(error)
        if error and label not in self._unread:
            log.warning("monitor_cannot_read", table=label, error=error)
            self._unread.add(label)
        elif not error and label in self._unread:
            log.info("monitor_reads_again", table=label)
            self._unread.remove(label)


def _of_the_master(view: View, labels: Iterable[str]) -> Iterable[Family]:
    up = view.status is not None and not view.silent
    yield _family("pgtask_master_up", {(): up})
    yield _family("pgtask_master_answer_seconds", {(): view.silent or view.took})
    yield _family("pgtask_build_info", {(__version__,): 1})
    if view.status is None or not up:
        return
    yield _family("pgtask_master_start_time_seconds", {(): view.status["started"]})
    tables = view.status["tables"]
    roles = {label: tables.get(label, {}).get("role") for label in labels}
    yield _family("pgtask_workers_limit", {(): view.status["workers"]})
    yield _family("pgtask_leader", {(label,): role == "leading" for label, role in roles.items()})
    yield _family("pgtask_standby", {(label,): role == "standing by" for label, role in roles.items()})
    looks = {(label,): found["looked_at"] for label, found in tables.items() if found["looked_at"]}
    yield _family("pgtask_last_take_timestamp_seconds", looks)
    workers = {(label, state): found[state] for label, found in tables.items() for state in ("busy", "idle")}
    yield _family("pgtask_workers", workers)


def _of_the_tables(readings: Mapping[str, Reading]) -> Iterable[Family]:
    good = {label: reading for label, reading in readings.items() if not reading.error}
    yield _family("pgtask_up", {(label,): label in good for label in readings})
    yield _family("pgtask_scrape_seconds", {(label,): reading.seconds for label, reading in good.items()})
    yield _family("pgtask_term", {(label,): reading.term for label, reading in good.items()})
    yield _family("pgtask_planned_tasks", {(label,): reading.planned for label, reading in good.items()})
    yield _family("pgtask_waiting_tasks", {(label,): reading.waiting for label, reading in good.items()})
    for shares, tasks, seconds in (
        ("backlog", "backlog_tasks", "backlog_age_seconds"),
        ("in_use", "slots_in_use", "longest_run_seconds"),
    ):
        found: dict[str, Shares] = {label: getattr(reading, shares) for label, reading in good.items()}
        sums = {(label,): sum(count for count, _ in by.values()) for label, by in found.items()}
        ages = {(label,): max((age for _, age in by.values()), default=0.0) for label, by in found.items()}
        yield _family(f"pgtask_{tasks}", sums)
        yield _family(f"pgtask_{seconds}", ages)
        groups = {(label, group): share for label, by in found.items() for group, share in by.items()}
        yield _family(f"pgtask_group_{tasks}", {key: count for key, (count, _) in groups.items()})
        if shares == "backlog":
            yield _family(f"pgtask_group_{seconds}", {key: age for key, (_, age) in groups.items()})


def _family(name: str, values: Mapping[Any, float]) -> Family:
    """`values` by the tuple of labels."""
    metric = BY_NAME[name]
    cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = cls(name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family


def _metric(family: Family) -> metrics.Metric:
    return BY_NAME[f"{family.name}_total" if family.type == "counter" else family.name]


class App:
    """The pages, as a WSGI application."""

    def __init__(self, config: Config, master: Master):
        self._tables = [table.label for table in config.tables]
        self._master = master
        registry = CollectorRegistry()
        registry.register(Page(config, master))
        self._metrics = make_wsgi_app(registry)
        self._scrapes = threading.Semaphore(SCRAPES)
        self._pages: dict[str, Callable[[], Answer]] = {"/healthz": self._healthz, "/readyz": self._readyz}

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            body = _say(start, "405 Method Not Allowed", ["GET and HEAD only"], ("Allow", "GET, HEAD"))
        elif path == "/metrics":
            body = self._scrape(environ, start)
        elif path in self._pages:
            body = _say(start, *self._pages[path]())
        else:
            body = _say(start, "404 Not Found", ["there is: /metrics /healthz /readyz"])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else body

    def _scrape(self, environ: Environ, start: Start) -> Iterable[bytes]:
        if not self._scrapes.acquire(blocking=False):
            return _say(start, "503 Service Unavailable", ["too many scrapes at a time"])
        try:
            return self._metrics({**environ, "REQUEST_METHOD": "GET"}, start)  # type: ignore[no-any-return]
        finally:
            self._scrapes.release()

    def _healthz(self) -> Answer:
        """Is the master's loop alive?"""
        view = self._master.view()
        if view.hung:
            return "503 Service Unavailable", [f"the master has not answered for {view.silent:.0f} s"]
        return "200 OK", ["ok"]

    def _readyz(self) -> Answer:
        """Is every table served, by this master or by the one that it stands by for?"""
        view = self._master.view()
        if view.hung or view.status is None:
            return "503 Service Unavailable", [f"the master has not answered for {view.silent:.0f} s"]
        if view.status["stopping"]:
            return "503 Service Unavailable", ["the master is stopping"]
        reasons = {label: _unserved(view.status["tables"].get(label)) for label in self._tables}
        wrong = [f"{label}: {reason}" for label, reason in reasons.items() if reason]
        return ("503 Service Unavailable", wrong) if wrong else ("200 OK", ["ok"])


def _unserved(found: Mapping[str, Any] | None) -> str:
    """Why nobody serves the table, or nothing."""
    if found is None:
        return "not served"
    if found["accused"] is not None:
        return f"its lock is held by backend {found['accused']}, which is no master"
    if found["role"] in ("leading", "standing by"):
        return ""
    return f"{found['role']}: {found['why']}" if found["why"] else str(found["role"])


def _say(start: Start, status: str, lines: Iterable[str], *headers: tuple[str, str]) -> Iterable[bytes]:
    body = "".join(f"{line}\n" for line in lines).encode()
    plain = ("Content-Type", "text/plain; charset=utf-8")
    start(status, [plain, ("Content-Length", str(len(body))), ("Cache-Control", "no-store"), *headers])
    return [body]


def main(config: Config, sock: socket.socket) -> int:
    """The child's life. It ends with the master."""
    set_title("monitor")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that many ask at a time is nobody's business
    master = Master(sock)
    app = App(config, master)
    assert config.master.listen is not None
    sockets = _listen(config.master.listen)
    server = waitress.server.create_server(
        app,
        sockets=sockets,
        threads=THREADS,
        connection_limit=CLIENTS,
        channel_timeout=QUIET,
        cleanup_interval=QUIET // 2,
        max_request_header_size=1 << 14,
        max_request_body_size=1 << 14,
        asyncore_use_poll=True,
        ident="pgtask",
    )
    server.run()
    return OK


def _listen(address: str) -> list[socket.socket]:
    """The sockets to be served, as soon as they can be had."""
    pauses = iter(LISTEN_PAUSES)
    pause = 0.0
    while True:
        try:
            sockets = _bound(address)
        except OSError as error:
            if not pause:
                log.warning("monitor_cannot_listen", listen=address, error=error.strerror or str(error))
            pause = next(pauses, pause)
            time.sleep(pause)
            continue
        log.info("monitor_listening", listen=address)
        return sockets


def _bound(address: str) -> list[socket.socket]:
    """All that the address means here. Raises OSError."""
    host, _, port = address.rpartition(":")
    if not host and socket.has_dualstack_ipv6():
        return [socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)]
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, *_, where in found:
            try:
                sockets.append(opened.enter_context(socket.create_server(where[:2], family=family)))
            except OSError as error:
                if error.errno not in FOREIGN or (where is found[-1][-1] and not sockets):
                    raise
        opened.pop_all()
    return sockets
