"""What `pgtask doctor` looks at: one function for each check, in their order, and what they find.

A check is a function with the decorator `check`: its name is the check's, its docstring says what is looked at, and it
yields a `Finding` for each thing that is not as it should be. Each finding carries the command that mends it, so that
nobody has to look for it. Nothing is changed: the session is read-only, and what takes too long is given up. The page
docs/reference/checks.md is made from this list.
"""

import asyncio
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import psycopg
from psycopg import Connection, RawCursor, conninfo
from psycopg.rows import namedtuple_row

from pgtask import schema
from pgtask.config import TableConfig
from pgtask.errors import UserError
from pgtask.objects import INDEXES, SIDES, Names, identifier, literal
from pgtask.settings import toml_text
from pgtask.user import spoken
from pgtask.user.spoken import several, size, span
from pgtask.user.where import one_line, open_async, settled

SEVERITIES = ("ok", "note", "warning", "error")

SETTINGS = {
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "read committed",
    "statement_timeout": "10s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "60s",
    "enable_seqscan": "off",
    "jit": "off",
}
"""Of the session that looks."""

OLDEST, NEWEST = 14, 18
"""Versions of PostgreSQL that are tested with."""

READ = 10_000
"""Rows that one check reads at most."""

COUNTED = 50_000
"""Due rows that are counted at most."""

LONGEST_MEND = 600
"""Characters of a statement that is printed; longer ones are in the script."""

EMPTY = 1000
"""Bytes for each entry of an index from which on it is said to be too large."""


def _limit(default: float, about: str, told: Callable[[float], str]) -> Any:
    return field(default=default, metadata={"about": about, "told": told})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on something is found. Ages are in seconds, sizes in bytes."""

    skew: float = _limit(1, "Between this machine's clock and the server's.", span)
    partition: float = _limit(7 * 86400, "Before the end of the last partition.", span)
    sequence: float = _limit(0.8, "The part of its numbers that a sequence has given.", "{:.0%}".format)
    lost: float = _limit(60, "How long a run has had no owner.", span)
    late: float = _limit(60, "How long the first task has been due.", span)
    long: float = _limit(3600, "How long a run goes on.", span)
    held: float = _limit(86400, "How long a group has been held.", span)
    transaction: float = _limit(900, "How long a transaction is open, or prepared.", span)
    slot: float = _limit(1_000_000, "How many transactions a replication slot holds back.", "{:,}".format)
    dead: float = _limit(100_000, "How many dead rows there are, and more of them than living ones.", "{:,}".format)
    index: float = _limit(64 << 20, f"Size of an index that has {EMPTY:,} bytes or more for each row.", size)
    history: float = _limit(1 << 30, "Size of a table whose rows are kept for ever.", size)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found: in one line what, in one why it matters, and what mends it.

    `mend` is SQL, a shell's command or lines of the configuration, as `how` says ("sql", "shell", "config").
    """

    severity: str
    what: str
    why: str = ""
    mend: str = ""
    how: str = ""
    check: str = ""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a check has to look with. `file`: the configuration, where it is known."""

    session: Connection[Any]
    table: TableConfig
    named: str  # the arguments that name the table to another command of ours, in a shell
    workers: int = 16
    tables: int = 1  # that the master serves
    file: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def names(self) -> Names:
        return Names(schema=self.table.schema, table=self.table.table)

    @property
    def beside(self) -> list[str]:
        """The task table and those beside it, quoted."""
        return [self.names.task, *(self.function(side.suffix) for side in SIDES)]

    @property
    def place(self) -> str:
        """The table's conninfo without its password, as a shell's argument."""
        return shlex.quote(self.table.open_conninfo)

    @property
    def upgrade(self) -> str:
        """The shell's command that brings the table up to date, as its owner where this role may not."""
        owner = self.one("check_relation").owner
        place = conninfo.make_conninfo(self.table.open_conninfo, **({"user": owner} if owner else {}))
        return f"pgtask sql --upgrade {self.named} | psql -d {shlex.quote(place)}"

    @property
    def start(self) -> str:
        """The command that starts a master."""
        return f"pgtask-master --config {shlex.quote(self.file)}" if self.file else f"pgtask-master {self.place}"

    def rows(self, name: str, *parameters: object) -> list[Any]:
        """The rows of a statement of ours."""
        cursor = RawCursor(self.session, row_factory=namedtuple_row)
        return cursor.execute(self.names.store().text(name).encode(), parameters).fetchall()

    def one(self, name: str, *parameters: object) -> Any:
        return self.rows(name, *parameters)[0]

    def function(self, suffix: str) -> str:
        """What stands beside the table, as SQL names it."""
        return self.names.quoted(self.names.derived(suffix))

    def mend(self, name: str, **words: str) -> str:
        """A statement of ours that mends something, for people."""
        return self.names.store().text(name, **words)


Found = Iterator[Finding]


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    about: str
    look: Callable[[Look], Found]
    always: bool  # also where there is no table


CHECKS: list[Check] = []


def check(*, always: bool = False) -> Callable[[Callable[[Look], Found]], Callable[[Look], Found]]:
    """Put a function into the list."""

    def register(look: Callable[[Look], Found]) -> Callable[[Look], Found]:
        CHECKS.append(Check(name=look.__name__, about=" ".join((look.__doc__ or "").split()), look=look, always=always))
        return look

    return register


def examine(look: Look, only: Collection[str] = ()) -> list[Finding]:
    """All that is found (by these checks), the worst first; of a check that finds nothing, that it is ok."""
    there = bool(look.rows("check_relation"))
    findings: list[Finding] = []
    for one in CHECKS:
        if (there or one.always) and (not only or one.name in only):
            found = list(_found(one, look)) or [Finding(severity="ok", what=one.about)]
            findings += [replace(finding, check=one.name) for finding in found]
    return sorted(findings, key=lambda one: -SEVERITIES.index(one.severity))


def _found(one: Check, look: Look) -> Found:
    """What the check finds; that it could not look is found as well."""
    try:
        with look.session.transaction():
            look.session.execute(settled(SETTINGS))
            yield from one.look(look)
    except psycopg.errors.InsufficientPrivilege as error:
        grant = f"GRANT pg_monitor TO {identifier(look.session.info.user)}"
        grant = "; ".join(found.mend for found in rights(look)) or grant
        yield note(f"cannot be looked at: {one_line(error)}", "What is wrong there stays hidden.", sql=grant)
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedFunction) as error:
        yield note(f"cannot be looked at: {one_line(error)}", "What is wrong there stays hidden.", shell=look.upgrade)
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
        yield _in_the_way(look, error)


def _in_the_way(look: Look, failed: psycopg.Error) -> Finding:
    what = f"cannot be looked at: {one_line(failed)}"
    for row in look.rows("lockers_of_table"):
        end = f"SELECT pg_terminate_backend({row.pid})"
        return error(what, f"The whole table is locked by {spoken.session(row._asdict())}.", sql=end)
    return warning(what, "The server is very busy, or somebody had the table locked.", shell="pgtask doctor")


def markdown() -> str:
    """The reference page."""
    lines = [
        "# Checks of pgtask doctor",
        "",
        "`pgtask doctor` looks at these one after another, and tells what it finds, the worst first, each with the",
        "command that mends it; how to read it is in [troubleshooting](../how-to/troubleshooting.md). It changes",
        "nothing. With `--check NAME` it looks at one only.",
        "",
        "This page is made by `bin/generate` from `pgtask/user/checks.py`.",
        "",
        "| check | what it looks at |",
        "| --- | --- |",
        *(f"| `{one.name}` | {one.about} |" for one in CHECKS),
        "",
        "## From where on",
        "",
        "| limit | of what |",
        "| --- | --- |",
        *(f"| {one.metadata['told'](one.default)} | {one.metadata['about']} |" for one in fields(Limits)),
    ]
    return "\n".join(lines) + "\n"


def error(what: str, why: str, **mend: str) -> Finding:
    return _finding("error", what, why, **mend)


def warning(what: str, why: str, **mend: str) -> Finding:
    return _finding("warning", what, why, **mend)


def note(what: str, why: str, **mend: str) -> Finding:
    return _finding("note", what, why, **mend)


def _finding(severity: str, what: str, why: str, **mend: str) -> Finding:
    """`mend` is one of sql, shell and config."""
    [(how, text)] = mend.items()
    return Finding(severity=severity, what=what, why=why, mend=text, how=how)


# The way to the server


@check(always=True)
def pooler(look: Look) -> Found:
    """Whether the connection goes to the server itself, and not through a pooler."""
    row = look.one("check_pooler")
    if row.pid != look.session.info.backend_pid:
        # A pooler that reaches it by a socket is on its machine.
        host = row.host or look.session.info.host
        place = conninfo.make_conninfo(host=host, port=row.port, dbname=look.table.dbname, user=look.table.user)
        yield error(
            f"the connection goes through a pooler, such as PgBouncer: backend {row.pid} answers",
            "A master holds locks, listens and sends startup options, which a pooler shares out or leaves out.",
            config=f"conninfo = {toml_text(place)}",
        )


@check(always=True)
def server(look: Look) -> Found:
    """The server's version, and whether it takes writes."""
    row = look.one("check_server")
    if not OLDEST <= row.version <= NEWEST:
        upgrade = "pip install --upgrade pgtask" if row.version > NEWEST else f"pg_upgradecluster {row.version} main"
        why = f"pgtask is tested with PostgreSQL {OLDEST} to {NEWEST}."
        yield warning(f"PostgreSQL {row.version} is not tested with", why, shell=upgrade)
    if row.standby:
        writes = f"{look.table.open_conninfo} target_session_attrs=read-write"
        yield error(
            "this server is a standby: it takes no writes",
            "Tasks run where writes are taken; a master finds that server where its conninfo names them all.",
            config=f"conninfo = {toml_text(writes)}",
        )


@check(always=True)
def clock(look: Look) -> Found:
    """This machine's clock against the server's, by which tasks are planned."""
    before = time.time()
    now = look.one("check_server").now
    after = time.time()
    off = now - (before + after) / 2
    if abs(off) - (after - before) / 2 > look.limits.skew:
        yield warning(
            f"this machine's clock is {span(off)} {'behind' if off > 0 else 'ahead of'} the server's",
            "Tasks are planned by the server's clock: a plan that is made of another one comes early or late.",
            shell="chronyc makestep",
        )


# The objects


@check(always=True)
def layout(look: Look) -> Found:
    """The table's columns, indexes, triggers and functions, against those that this version makes."""
    script = f"pgtask sql {look.named} | psql -d {look.place}"
    if not look.rows("check_relation"):
        what = f"there is no table {look.names.label}"
        yield error(what, "A master makes it when it starts, if its `create` is true.", shell=script)
        return
    script = look.upgrade
    try:
        lacking = [change for change in asyncio.run(_missing(look)) if not change.minor]
    except schema.Denied as denied:
        grant = "; ".join(found.mend for found in rights(look))
        yield error(one_line(denied), "A master refuses to serve the table as it is.", sql=grant)
        return
    except UserError as refused:
        yield error(one_line(refused), "A master refuses to serve the table as it is.", shell=script)
        return
    why = "Tasks may not be woken, found or guarded as they should be. A master that starts, or gets HUP, mends it."
    invalid = {_index(change.sql) for change in lacking if change.sql.startswith("DROP INDEX")}
    long: list[str] = []
    for change in lacking:
        index = _index(change.sql)
        if change.sql.startswith(("CREATE OR REPLACE", "REVOKE")) or len(change.sql) > LONGEST_MEND:
            long.append(change.what)
        elif index in invalid and not change.sql.startswith("DROP INDEX"):
            continue
        elif index in invalid:
            mend = f"REINDEX INDEX CONCURRENTLY {look.names.quoted(index)}"
            yield error(f"index {index} is invalid: nothing uses it", why, sql=mend)
        else:
            mend = change.sql
            if index and look.one("check_relation").kind == "r":
                mend = mend.replace("INDEX", "INDEX CONCURRENTLY", 1)
            yield error(f"the table is not as it should be, to do: {change.what}", why, sql=mend)
    if long:
        more = f", and {len(long) - 1} more" if len(long) > 1 else ""
        yield error(f"the table is not as it should be, to do: {long[0]}{more}", why, shell=script)


def _index(text: str) -> str:
    """The name of the index that the statement makes or drops, or nothing."""
    found = re.match(r'(?:CREATE (?:UNIQUE )?INDEX|DROP INDEX (?:"(?:[^"]|"")+"\.)?) ?"((?:[^"]|"")+)"', text)
    return found[1].replace('""', '"') if found else ""


async def _missing(look: Look) -> list[schema.Change]:
    """What a master would change; in a session of its own, since schema.py has asynchronous ones."""
    conn = await open_async(look.table, "pgtask doctor")
    async with conn, conn.transaction():
        await conn.execute(settled({"search_path": "pg_catalog, pg_temp", **SETTINGS}))
        defaults, wake = look.table.defaults, look.table.wake
        if look.file is None:  # what a master is configured to, nobody has told us
            defaults, wake = schema.configured(await schema.look(conn, look.names), look.names)
        return await schema.missing(conn, look.names, defaults, wake=wake)


@check()
def triggers(look: Look) -> Found:
    """Triggers of ours that somebody has disabled."""
    for row in look.rows("check_triggers"):
        yield error(
            f"trigger {row.name} of {row.table} is disabled",
            "Tasks are not woken, or anybody may write what only the scheduler should.",
            sql=f"ALTER TABLE {row.table} ENABLE TRIGGER {identifier(row.name)}",
        )


@check()
def indexes(look: Look) -> Found:
    """Other indexes of the table that are invalid: each write keeps them up to date, and they serve nobody."""
    for row in look.rows("check_indexes", [look.names.derived(suffix) for suffix in INDEXES]):
        yield warning(
            f"index {row.index} is invalid",
            "Every write of a task keeps it up to date, and no query uses it.",
            sql=f"DROP INDEX CONCURRENTLY {row.index}",
        )


@check()
def partitions(look: Look) -> Found:
    """Of a table that is parted by time: is there a partition for what comes soon?"""
    for row in look.rows("check_partitions"):
        left = row.until - row.now
        if left <= look.limits.partition:
            part = look.names.quoted(look.names.derived(row.name))
            bounds = f"FROM ({literal(row.begins)}) TO ({literal(row.ends)})"
            severity = warning if left > 0 else error
            yield severity(
                f"the last partition {'ends in' if left > 0 else 'has ended, ago:'} {span(left)}",
                "No task can be planned for a time that has no partition.",
                sql=f"CREATE TABLE {part} PARTITION OF {look.names.task} FOR VALUES {bounds}",
            )


@check()
def sequence(look: Look) -> Found:
    """Where ids come from: is it near its end, or behind the greatest id?"""
    for row in look.rows("check_sequence"):
        last = row.last or 0
        if last / row.most > look.limits.sequence:
            yield error(
                f"sequence {row.name} has given {last:,} of {row.most:,.0f} numbers",
                "After the last one no task can be inserted.",
                sql=f"ALTER SEQUENCE {row.name} AS bigint NO MAXVALUE",
            )
        if row.greatest is not None and row.greatest > last:
            yield error(
                f"sequence {row.name} is at {last:,}, behind the greatest id, {row.greatest:,}",
                "An insert fails where its id is there already.",
                sql=f"SELECT setval({literal(row.name)}, {row.greatest})",
            )


# The master


@check()
def master(look: Look) -> Found:
    """Who serves the table, and whether it is at work."""
    row = look.one("served")
    if row.holder is None:
        last = f"; the last one was pid {row.pid} on {row.host}, term {row.term}" if row.host is not None else ""
        yield error(
            f"no master serves the table{last}",
            "No task is started until one does. One that hangs is deposed by the server after 10 seconds.",
            shell=look.start,
        )
    elif not row.leads:
        yield error(
            f'session {row.holder} of {row.role} "{row.name}" holds the lock by which a master serves the table',
            "Any session may take an advisory lock; no master can serve the table meanwhile.",
            sql=f"SELECT pg_terminate_backend({row.holder})",
        )
    elif row.wait_event_type == "Lock" and row.blockers:
        yield error(
            f"the master waits for a lock ({row.wait_event}) that session {row.blockers[0]} has",
            "No task is started until that session's transaction ends.",
            sql=f"SELECT pg_terminate_backend({row.blockers[0]})",
        )
    else:
        standing = look.one("check_standing_by").sessions
        others = f"; {several(standing, 'other session')} of masters in this database" if standing else ""
        what = f"pid {row.pid} on {row.host} serves the table, term {row.term}{others}"
        yield Finding(severity="ok", what=what)


@check()
def lost(look: Look) -> Found:
    """Runs whose owner is gone, and that nobody has put back."""
    ids = [row.id for row in look.rows("check_lost", look.limits.lost)]
    if ids:
        text = literal("{" + ",".join(map(str, ids)) + "}")
        listed = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        yield error(
            f"{several(len(ids), 'run')} without an owner: {listed}",
            "They hold slots of their groups until a master puts them back, at its start or every `reset`.",
            sql=look.mend("mend_lost", ids=text),
        )


# The tasks


@check()
def backlog(look: Look) -> Found:
    """Due tasks that nobody starts: do they become more, and what keeps them, holds, full groups or too few workers?"""
    first = look.one("check_due", COUNTED)
    if not first.rows or first.oldest <= look.limits.late:
        return
    groups = look.rows("check_backlog", READ)
    time.sleep(1)
    now = look.one("check_due", COUNTED)
    grows = f", {now.rows - first.rows:+,} in a second" if max(now.rows, first.rows) < COUNTED else ""
    due = f"{several(first.rows, 'task', COUNTED)} due, the first for {span(first.oldest)}{grows}"
    held = [one for one in groups if one.held]
    full = [one for one in groups if not one.held and one.runs > max(one.max, 0)]
    free = [one for one in groups if not one.held and one not in full]
    if held:
        yield warning(
            f'{due}; {sum(one.rows for one in held):,} are of groups that are held, such as "{held[0].group}"',
            "Nothing of a held group is started, and its tasks come too late.",
            sql=f"SELECT {look.function('release')}({literal(held[0].group)})",
        )
    if full:
        most = max(full[0].max, 0)
        of = f'{full[0].rows:,} are of group "{full[0].group}", which has {several(most + 1, "slot")}'
        yield warning(
            f"{due}; {of}" + (f"; {several(len(full), 'group')} are full" if len(full) > 1 else ""),
            "A group runs no more tasks at a time than the max of its rows allows.",
            sql=look.mend("mend_slots", max=str(2 * most + 1), group=literal(full[0].group)),
        )
    if free and not look.one("served").leads:
        yield warning(due, "No master serves the table.", shell=look.start)
    elif free:
        yield warning(
            f"{due}; {sum(one.rows for one in free):,} are of groups with free slots",
            f"There are too few workers ({look.workers}), or somebody has these rows locked: pgtask why ID tells.",
            config=f"workers = {2 * look.workers}",
        )


@check()
def runs(look: Look) -> Found:
    """Runs that go on for long, and who blocks them."""
    for row in look.rows("check_runs", look.limits.long):
        what = f'task {row.id} of group "{row.group}" runs for {span(row.age)}'
        if row.blockers:
            yield warning(
                f"{what}, and waits for a lock that session {row.blockers[0]} has",
                "It keeps its slot and a worker for as long as it waits.",
                sql=f"SELECT pg_terminate_backend({row.blockers[0]})",
            )
        else:
            cancel = f"SELECT {look.function('cancel')}({row.id})"
            yield note(what, "It keeps its slot and a worker, and its transaction holds back vacuum.", sql=cancel)


@check()
def waits(look: Look) -> Found:
    """Tasks that wait for one that never comes."""
    for row in look.rows("check_waits", READ):
        what = f"task {row.id} waits for task {row.on}, which is planned for infinity"
        yield warning(what, "Neither ever runs.", sql=look.mend("mend_plan", id=str(row.on)))


@check()
def held(look: Look) -> Found:
    """Groups that have been held for long."""
    for row in look.rows("check_held", look.limits.held):
        yield note(
            f'group "{row.group}" is held by {row.by} for {span(row.age)}',
            "Nothing of it is started, and its tasks come too late.",
            sql=f"SELECT {look.function('release')}({literal(row.group)})",
        )


@check()
def failed(look: Look) -> Found:
    """Tasks that failed, of the last ones."""
    row = look.one("check_failed", READ)
    if row.rows:
        condition = literal(f"state = 'FAIL' AND id >= {row.first}")
        yield note(
            f"{row.rows:,} of the last {READ:,} tasks failed, the last is {row.last}: {row.error}",
            "Nobody runs them again without a word; mend the reason first.",
            sql=f"SELECT {look.function('retry')}({condition})",
        )


# Space


@check()
def xmin(look: Look) -> Found:
    """What keeps vacuum from removing dead rows: old transactions, prepared ones, replication slots."""
    why = "Dead rows stay until it ends, and every take reads past them."
    for row in look.rows("check_sessions", look.limits.transaction):
        what = f"a transaction is open for {span(row.age)}: {spoken.session(row._asdict())}"
        yield warning(what, why, sql=f"SELECT pg_terminate_backend({row.pid})")
    for row in look.rows("check_prepared", look.limits.transaction):
        what = f'transaction "{row.gid}" was prepared {span(row.age)} ago, and neither committed nor rolled back'
        yield warning(what, why, sql=f"ROLLBACK PREPARED {literal(row.gid)}")
    for row in look.rows("check_slots", look.limits.slot):
        behind = several(max(row.rows or 0, row.catalogs or 0), "transaction")
        what = f'replication slot "{row.name}" holds back {behind}{"" if row.active else ", and nobody uses it"}'
        yield warning(what, why, sql=f"SELECT pg_drop_replication_slot({literal(row.name)})")


@check()
def space(look: Look) -> Found:
    """Dead rows, the size of the indexes that every take reads, and whether autovacuum looks after them."""
    why = "Every take reads past the dead entries of the indexes, and becomes slower and slower."
    if look.one("check_autovacuum").off:
        on = "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()"
        yield warning("autovacuum is off on this server", why, sql=on)
    for row in look.rows("check_space"):
        if row.neglected:
            on = f"ALTER TABLE {row.table} RESET (autovacuum_enabled)"
            yield warning(f"autovacuum is off for {row.table}", why, sql=on)
        if row.dead > max(look.limits.dead, row.live):
            last = f"was last vacuumed {span(row.vacuumed)} ago" if row.vacuumed is not None else "was never vacuumed"
            what = f"{row.table} has {row.dead:,} dead rows and {row.live:,} living ones, and {last}"
            yield warning(what, why, sql=f"VACUUM (ANALYZE) {row.table}")
    read = [look.names.derived(suffix) for suffix in ("due", "lane", "slot", "wait")]
    for row in look.rows("check_index_sizes", read, look.limits.index):
        if row.size > EMPTY * max(row.entries, 1):
            yield note(
                f"index {row.index} has {size(row.size)} for {row.entries:,.0f} rows",
                "Every take reads it; it was made large by a backlog that is gone.",
                sql=f"REINDEX INDEX CONCURRENTLY {row.index}",
            )


@check()
def history(look: Look) -> Found:
    """The size of a table whose finished rows nobody removes."""
    total = sum(row.size for row in look.rows("check_space"))
    if total > look.limits.history and look.table.keep == "forever":
        yield note(
            f"the table has {size(total)}, and finished rows are kept for ever",
            "It grows with every task whose row stays, and so does what a backup and a vacuum cost.",
            config='keep = "30 days"',
        )


# Rights and settings


@check(always=True)
def rights(look: Look) -> Found:
    """What the role that connects lacks to serve the table."""
    user = identifier(look.session.info.user)
    why = "A master that connects as this role cannot serve the table."
    if not look.rows("check_relation"):
        return
    if not look.one("check_schema_rights", look.table.schema).may:
        grant = f"GRANT USAGE ON SCHEMA {identifier(look.table.schema)} TO {user}"
        yield error(f"role {user} may not use schema {look.table.schema}", why, sql=grant)
        return
    lacking: dict[tuple[str, str], list[str]] = {}
    for row in look.rows("check_rights", look.beside):
        kind, _, name = row.on.partition(" ")
        lacking.setdefault((row.lacks, kind), []).append(name)
    for (lacks, kind), names in lacking.items():
        on = f"{kind} {', '.join(names)}"
        yield error(f"role {user} lacks {lacks} on {on}", why, sql=f"GRANT {lacks} ON {on} TO {user}")


@check()
def public(look: Look) -> Found:
    """What everybody may do: whoever may insert a task runs SQL with the rights of the daemon."""
    for row in look.rows("check_public", look.beside, look.table.schema):
        revoke = f"REVOKE {row.may} ON {row.on} FROM PUBLIC"
        if row.task is None:
            why = "A task that names something without its schema may get what another has put in its place."
            yield warning(f"everybody may create objects in schema {look.table.schema}", why, sql=revoke)
        elif row.task:
            why = "Whoever may insert or change a task runs SQL with the rights of the daemon."
            yield error(f"everybody has {row.may} on {row.on}", why, sql=revoke)
        else:
            why = "Whoever may write there is taken for the scheduler."
            yield error(f"everybody has {row.may} on {row.on}", why, sql=revoke)


@check()
def role(look: Look) -> Found:
    """The role that connects: is it a superuser, does it see others' sessions, and every row of the table?"""
    row = look.one("check_role")
    task = look.names.task
    if row.superuser:
        why = "Whoever may insert a task may do anything on this server."
        less = f"ALTER ROLE {row.role} NOSUPERUSER"
        if row.first:
            less = "CREATE ROLE pgtask LOGIN; REASSIGN OWNED BY CURRENT_USER TO pgtask"
        yield warning(f"role {row.role} is a superuser", why, sql=less)
    elif not row.sees:
        why = "pgtask why and pgtask doctor cannot tell what those do, or for how long."
        grant = f"GRANT pg_read_all_stats TO {row.role}"
        yield note(f"role {row.role} does not see what other roles' sessions do", why, sql=grant)
    if row.filtered:
        off = f"ALTER TABLE {task} NO FORCE ROW LEVEL SECURITY; ALTER TABLE {task} DISABLE ROW LEVEL SECURITY"
        yield error(f"row security hides rows of the table from role {row.role}", "They are never started.", sql=off)


HARM = {
    "default_transaction_read_only": (error, "A task cannot write anything."),
    "session_replication_role": (error, "Triggers do not fire: inserts wake nobody, and anybody may write anything."),
    "statement_timeout": (note, "It cuts off every task that has no timeout of its own."),
    "transaction_timeout": (note, "It cuts off every task that takes longer, whatever its own timeout is."),
    "idle_in_transaction_session_timeout": (note, "It ends a task whose input waits inside of a transaction."),
    "lock_timeout": (note, "It fails every task that waits longer for a lock."),
    "default_transaction_isolation": (
        note,
        "A worker cannot take a next task with the end of one: it asks the master.",
    ),
    "synchronous_commit": (note, "A task just inserted may be lost in a crash; ends are durable all the same."),
}
"""Settings that tasks inherit from the role, the database or the server, and what they do."""

ASYNCHRONOUS = ("off", "local")


@check()
def settings(look: Look) -> Found:
    """Settings of the role, the database or the server that harm tasks."""
    for row in look.rows("check_settings", list(HARM)):
        if row.value == row.usual or (row.name == "synchronous_commit" and row.value not in ASYNCHRONOUS):
            continue
        severity, why = HARM[row.name]
        what = f"{row.name} is {row.value}{' ' + row.unit if row.unit else ''}"
        if row.entry is not None:
            writable = (
                "SET default_transaction_read_only = off; " if row.name == "default_transaction_read_only" else ""
            )
            yield severity(f"{what} for {row.entry}", why, sql=f"{writable}ALTER {row.entry} RESET {row.name}")
        else:
            user = identifier(look.session.info.user)
            yield severity(what, why, sql=f"ALTER ROLE {user} SET {row.name} = {literal(row.usual)}")


@check()
def connections(look: Look) -> Found:
    """Whether the server, the role and the database allow as many sessions as a master may open."""
    row = look.one("check_connections")
    here = min(look.workers, look.table.run) + 1 + look.table.warm
    total = look.workers + look.tables * (1 + look.table.warm)
    why = f"A master needs up to {{}} (workers = {look.workers}, warm = {look.table.warm}); without, tasks wait."
    allowed = row.most - (0 if row.superuser else row.reserved)
    others = row.sessions - row.ours
    if allowed - others < total:
        more = f"ALTER SYSTEM SET max_connections = {total + others + row.reserved}"
        what = f"of {row.most} connections {row.reserved} are reserved, and others have {others}"
        yield warning(what, why.format(total) + " Restart the server after it.", sql=more)
    if not row.superuser and 0 <= row.role_limit < here + row.of_role - row.ours:
        what = f"role {row.role} may have {several(row.role_limit, 'connection')}"
        yield warning(what, why.format(here), sql=f"ALTER ROLE {row.role} CONNECTION LIMIT -1")
    if not row.superuser and 0 <= row.database_limit < here + row.in_database - row.ours:
        what = f"database {row.database} may have {several(row.database_limit, 'connection')}"
        yield warning(what, why.format(here), sql=f"ALTER DATABASE {row.database} CONNECTION LIMIT -1")


@check()
def two_phase(look: Look) -> Found:
    """Transactions that may be prepared, where inserts may have to notify."""
    row = look.one("check_two_phase")
    if row.possible and row.wake and look.table.wake:
        yield note(
            "transactions may be prepared on this server, and inserts may notify the master",
            "A transaction that has notified cannot be prepared: where such ones insert tasks, turn that off.",
            config="wake = false",
        )
