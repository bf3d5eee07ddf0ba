"""The master: one process, one thread, one loop. It starts a poller for each table, reaps workers, obeys signals.

Signal handlers only set something and wake the loop (asyncio does that part). The process must stay single-threaded
for ever, since it forks. What a stop means: TERM stops taking and lets runs end, cancels what is left after
`stop_timeout` and puts it back; INT does so at once; QUIT leaves at once, and the workers end their runs and record
them by themselves. HUP reloads, USR1 reopens the log.
"""

import asyncio
import faulthandler
import gc
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import psycopg

from pgtask import log, metrics, objects, process, schema
from pgtask.async_session import AsyncSession
from pgtask.config import Config, TableConfig
from pgtask.errors import OK, USER, PgtaskError, UserError
from pgtask.lines import quoted
from pgtask.master import maintenance, notify, pidfile, timers
from pgtask.master.keeper import Keeper
from pgtask.master.poller import Poller, Role
from pgtask.master.pool import Pool
from pgtask.process import Children, set_title
from pgtask.sinks import Target

GRACE = 1.5
"""Seconds that cancelled workers get to put their rows back before they are killed."""

LONGEST_PATH = 100
"""Characters of the configuration file's path that ps shows, its last ones."""


class Master:
    """The whole state of the master process."""

    def __init__(self, config: Config, reload: Callable[[], Config], manager: notify.Manager):
        self.config = config
        self._reload = reload
        self._manager = manager
        self._children = Children()
        self._pool = Pool(
            self._children,
            workers=config.master.workers,
            spare=config.master.spare,
            linger=config.master.linger,
            changed=self._show,
        )
        self._pollers: dict[Poller, asyncio.Task[None]] = {}
        self._keeper = Keeper(self._children, self._status)
        self._started = time.time()
        self._stop = asyncio.Event()
        self._how = ""  # TERM, INT or QUIT: how to stop
        self._cancelling = False
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
        process.unblock(*process.HANDLED)
        log.info("master_started", tables=len(self.config.tables), workers=self.config.master.workers)
        if os.geteuid() == 0:
            log.warning("running_as_root", hint="run the master as a system user of its own")
        for table in self.config.tables:
            self._serve(table)
        self._keeper.configure(self.config)
        self._show()
        self._manager.ready()
        await self._stop.wait()
        await self._end()
        await self._keeper.end()
        log.info("master_stopped", how=self._how)
        process.block(
            *process.HANDLED
        )  # one more, now that there will be no handlers, must not leave the pidfile behind
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
        self._manager.stopping(self._longest_stop())

    def _longest_stop(self) -> timedelta:
        """What `_end` allows, and what it takes to close the sessions and leave."""
        runs = self.config.master.stop_timeout if self._how == "TERM" else timedelta(0)
        return runs + timedelta(seconds=2 * GRACE + 10)

    def _cancel(self) -> None:
        self._cancelling = True
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
            self._show()
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
        self._manager.reloading()
        self._reconfigure()
        self._manager.ready()

    def _reconfigure(self) -> None:
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
        self._keeper.configure(config)
        log.info("reloaded", tables=len(config.tables))
        self._show()

    def _status(self) -> dict[str, object]:
        """What the monitor tells of us."""
        return {
            "started": self._started,
            "stopping": bool(self._how),
            "workers": self._pool.workers,
            "tables": {poller.label: poller.status() for poller in self._pollers},
        }

    def _show(self) -> None:
        """The master's line in ps."""
        path = str(self.config.file or "")
        path = path if len(path) <= LONGEST_PATH else f"...{path[-LONGEST_PATH:]}"
        source = f"{quoted(path)} " if path else ""
        words = self.words()
        set_title(f"master {source}({words})")
        self._manager.status(words)

    def words(self) -> str:
        """What the master does at the moment, in a few words."""
        workers = _number(len(self._pool.handles), "worker")
        if self._how:
            runs = self._pool.busy()
            doing = "cancelling" if self._cancelling else "waiting for"
            return f"stopping, {doing} {_number(runs, 'run')}, {workers}" if runs else f"stopping, {workers}"
        roles = Counter("ending" if poller.stopping else poller.role.value for poller in self._pollers)
        order = (Role.LEADING.value, Role.STANDBY.value, Role.CONNECTING.value, "ending")
        parts = [(roles[role], role) for role in order if roles[role]]
        tables = [f"{_number(parts[0][0], 'table')} {parts[0][1]}"] if parts else ["no table"]
        return ", ".join([*tables, *(f"{count} {role}" for count, role in parts[1:]), workers])


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def main(config: Config, reload: Callable[[], Config]) -> int:
    """Run in the foreground until a signal. Returns the exit status. Raises UserError for what cannot start."""
    log.setup(config.master.log_level, config.master.log, config.master.log_format)
    faulthandler.enable()  # a master that the service manager's watchdog aborts says where it hung
    set_title("master (starting)")  # before variables go: it finds the command line by the first of them
    manager = notify.Manager(os.environ)
    # Whoever reads the pidfile may send a signal at once: it waits until there is a handler for it.
    process.block(*process.HANDLED)
    with pidfile.held(config.master.pidfile):
        assert process.threads() == 1, "the master must be single-threaded to fork"
        if config.master.listen:
            metrics.start(table.label for table in config.tables)
        gc.freeze()  # what was imported is never garbage, and to look at it would stop the loop for 5 ms
        return timers.run(Master(config, reload, manager).run())


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
    targets = [Target.parse(config.master.log)]
    if config.master.pidfile is not None:
        targets.append(Target(kind="file", path=str(config.master.pidfile)))
    troubles = [trouble for target in targets if (trouble := target.trouble()) is not None]
    for trouble in troubles:
        print(f"wrong: {trouble}")
    return USER if troubles else OK


async def _check_table(table: TableConfig, children: Children) -> list[str]:
    async with await AsyncSession.open(table, children, name="pgtask check") as session:
        conn = session.conn
        names = objects.Names(schema=table.schema, table=table.table)
        missing = await schema.missing(conn, names, table.defaults, wake=table.wake, create=table.create)
        lines = [f"would {change.what}" for change in missing if not change.minor]
        if minor := sum(change.minor for change in missing):
            lines.append(f"would write {minor} comment{'s' * (minor != 1)}")
        return [f"server {conn.info.server_version // 10000}, user {conn.info.user}", *(lines or ["nothing to change"])]
