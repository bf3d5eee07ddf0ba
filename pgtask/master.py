"""The master: one process, one thread, one loop. It starts a poller for each table, reaps workers, obeys signals.

Signal handlers only set something and wake the loop (asyncio does that part). The process must stay single-threaded
for ever, since it forks. What a stop means: TERM stops taking and lets runs end, cancels what is left after
`stop_timeout` and puts it back; INT does so at once; QUIT leaves at once, and the workers end their runs and record
them by themselves. HUP reloads, USR1 reopens the log.
"""

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

from pgtask import log, maintenance, objects, process, schema, timers
from pgtask.async_session import AsyncSession
from pgtask.config import Config, TableConfig
from pgtask.errors import OK, USER, PgtaskError, UserError
from pgtask.poller import Poller, Role
from pgtask.pool import Pool
from pgtask.process import Children, set_title

GRACE = 1.5
"""Seconds that cancelled workers get to put their rows back before they are killed."""


class Master:
    """The whole state of the master process."""

    def __init__(self, config: Config, reload: Callable[[], Config]):
        self.config = config
        self._reload = reload
        self._children = Children()
        self._pool = Pool(
            self._children,
            workers=config.master.workers,
            spare=config.master.spare,
            linger=config.master.linger,
            changed=self._show,
        )
        self._pollers: dict[Poller, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._how = ""  # TERM, INT or QUIT: how to stop
        self._crashed = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number, handler in {
            signal.SIGCHLD: self._children.reap,
            signal.SIGTERM: lambda: self._stop_by("TERM"),
            signal.SIGINT: lambda: self._stop_by("INT"),
            signal.SIGQUIT: lambda: self._stop_by("QUIT"),
            signal.SIGHUP: self._on_reload,
            signal.SIGUSR1: log.reopen,
        }.items():
            loop.add_signal_handler(number, handler)
        log.info("master_started", tables=len(self.config.tables), workers=self.config.master.workers)
        if os.geteuid() == 0:
            log.warning("running_as_root", hint="run the master as a system user of its own")
        for table in self.config.tables:
            self._serve(table)
        self._show()
        await self._stop.wait()
        await self._end()
        log.info("master_stopped", how=self._how)
        return process.CRASHED if self._crashed else OK

    def _serve(self, table: TableConfig) -> None:
        poller = Poller(table, self._pool, self._children, self._show)
        task = asyncio.get_running_loop().create_task(self._attend(poller), name=table.label)
        self._pollers[poller] = task

    async def _attend(self, poller: Poller) -> None:
        """A poller's life; a bug in one is said loudly and ends the master, never the table silently."""
        try:
            await poller.run()
        except Exception:
            log.exception("poller_crashed", table=poller.label)
            self._crashed = True
            self._stop_by("TERM")
        finally:
            self._pollers.pop(poller, None)
            self._show()

    def _stop_by(self, how: str) -> None:
        """A second signal may only be harsher than the first."""
        order = ["", "TERM", "INT", "QUIT"]
        if order.index(how) <= order.index(self._how):
            return
        log.info("stopping", signal=how)
        self._how = how
        if how == "INT":
            self._cancel()
        self._stop.set()
        self._show()

    def _cancel(self) -> None:
        for poller in self._pollers:
            poller.stop()
        self._pool.cancel_all()

    async def _end(self) -> None:
        """Bounded: let runs end, then cancel them, then kill what does not listen."""
        if self._how == "QUIT":
            return
        if self._how != "INT":
            for poller in list(self._pollers):
                poller.stop()
            self._pool.finish_all()
            await self._ended(
                self.config.master.stop_timeout.total_seconds(), until=lambda: self._how in ("INT", "QUIT")
            )
        if self._how == "QUIT":
            return
        if self._pollers:
            self._cancel()
            await self._ended(GRACE, until=lambda: self._how == "QUIT")
        if self._pollers:
            self._pool.kill_all()
            await self._ended(GRACE, until=lambda: self._how == "QUIT")

    async def _ended(self, timeout: float, *, until: Callable[[], bool]) -> None:
        """Wait until every poller has ended; they do when their last worker has."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._pollers and loop.time() < deadline and not until():
            await asyncio.wait(self._pollers.values(), timeout=min(0.05, deadline - loop.time()))

    def _on_reload(self) -> None:
        """HUP: tables added, removed, changed, without touching running tasks. A bad file changes nothing."""
        if self._how:
            return
        try:
            config = self._reload()
            log.setup(config.master.log_level, config.master.log, config.master.log_format)
        except UserError as error:
            log.error("reload_refused", error=str(error))
            return
        old = {poller.config.target: poller for poller in self._pollers if not poller.stopping}
        new = {table.target: table for table in config.tables}
        for target, poller in old.items():
            if target not in new:
                log.info("table_removed", table=poller.label)
                poller.stop()
                self._pool.finish_all(poller)
        for target, table in new.items():
            if target not in old:
                log.info("table_added", table=table.label)
                self._serve(table)
            else:
                if table != old[target].config:
                    log.info("table_changed", table=table.label)
                old[target].reconfigure(table)
        self.config = config
        master = config.master
        self._pool.reconfigure(workers=master.workers, spare=master.spare, linger=master.linger)
        log.info("reloaded", tables=len(config.tables))
        self._show()

    def _show(self) -> None:
        """The master's line in ps."""
        tables, workers = len(self._pollers), len(self._pool.handles)
        doing = "stopping, " if self._how else ""
        standby = sum(poller.role is Role.STANDBY for poller in self._pollers)
        standing = f", {standby} standing by" if standby else ""
        source = f"{self.config.file} " if self.config.file else ""
        counts = f"{tables} table{'s' * (tables != 1)}{standing}, {workers} worker{'s' * (workers != 1)}"
        set_title(f"master {source}({doing}{counts})")


def main(config: Config, reload: Callable[[], Config]) -> int:
    """Run in the foreground until a signal. Returns the exit status. Raises UserError for what cannot start."""
    log.setup(config.master.log_level, config.master.log, config.master.log_format)
    with _pidfile(config.master.pidfile):
        assert process.threads() == 1, "the master must be single-threaded to fork"
        gc.freeze()  # what was imported is never garbage, and to look at it would stop the loop for 5 ms
        return timers.run(Master(config, reload).run())


@contextlib.contextmanager
def _pidfile(path: Path | None) -> Iterator[None]:
    """Hold the locked pidfile; one left by a crash is taken over, a living master's is refused."""
    if path is None:
        yield
        return
    try:
        # Whoever may write to its directory could have made it a link to a file of ours, which we would empty.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"pidfile {path}: {reason}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise UserError(f"pidfile {path}: is not a file of its own")
    with os.fdopen(descriptor, "r+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = re.sub("[^0-9]", "", stream.read(20))
            raise UserError(f"pidfile {path}: master {pid} is running") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check(config: Config) -> int:
    """Connect to every table and print what would be done and changed. Returns 0, or 2 when something is wrong."""
    return asyncio.run(_check(config))


async def _check(config: Config) -> int:
    status = _check_files(config)
    children = Children()
    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, children.reap)
    for table in config.tables:
        try:
            print(f"{table.label}:")
            wanted = await maintenance.missing(table, children)
            for line in [f"would {one}" for one in wanted] or await _check_table(table, children):
                print(f"  {line}")
        except (psycopg.Error, PgtaskError, OSError, TimeoutError) as error:
            print(f"  wrong: {log.redact(' '.join(str(error).split()))}")
            status = USER
    return status


def _check_files(config: Config) -> int:
    """Can the log and the pidfile be written? Nothing is left behind, and a running master is not disturbed."""
    files = [config.master.pidfile, None if config.master.log == "stderr" else Path(config.master.log)]
    wrong = [path for path in files if path and not os.access(path if path.exists() else path.parent, os.W_OK)]
    for path in wrong:
        print(f"wrong: {path} cannot be written")
    return USER if wrong else OK


async def _check_table(table: TableConfig, children: Children) -> list[str]:
    async with await AsyncSession.open(table, children, name="pgtask check") as session:
        conn = session.conn
        names = objects.Names(schema=table.schema, table=table.table)
        missing = await schema.missing(conn, names, table.defaults, wake=table.wake, create=table.create)
        lines = [f"would {change.what}" for change in missing if not change.minor]
        if minor := sum(change.minor for change in missing):
            lines.append(f"would write {minor} comment{'s' * (minor != 1)}")
        return [f"server {conn.info.server_version // 10000}, user {conn.info.user}", *(lines or ["nothing to change"])]
