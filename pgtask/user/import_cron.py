"""`pgtask import-cron`: the jobs of pg_cron become schedules of a task table.

Each job that can be carried over is put in place by its name, in a group of its own, so that a second import changes
nothing. Whatever would not be the same is not carried over but said. pg_cron's own tables are only read.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click
from psycopg import Connection, Error, RawCursor, connect

from pgtask import cron
from pgtask.config import TableConfig
from pgtask.errors import OK, UserError
from pgtask.objects import Names
from pgtask.store import statements
from pgtask.user.shown import print_json
from pgtask.user.where import Where, as_json, of_tables, one_line, open_session

SECONDS = re.compile(r"\s*\d+\s+seconds?\s*", re.IGNORECASE)
"""A schedule of pg_cron's that is an interval."""

HERE = ("", "localhost", "127.0.0.1", "::1")


class Job(NamedTuple):
    """A row of cron.job."""

    id: int
    jobname: str | None
    schedule: str
    command: str
    node: str
    database: str
    user: str
    active: bool

    @property
    def key(self) -> str:
        return self.jobname or f"cron job {self.id}"


class Place(NamedTuple):
    """Where tasks would run: the database, and as whom."""

    database: str
    user: str


@click.command("import-cron")
@click.option("--from", "source", metavar="CONNINFO", help="The database that has pg_cron, if it is another one.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--anyone", is_flag=True, help="Also jobs of other roles, which then run as the master's.")
@of_tables
@as_json
def command(where: Where, source: str | None, dry_run: bool, anyone: bool, as_json: bool) -> int:
    """Schedule the jobs of pg_cron in a task table.

    Those that run in its database, as the role that connects, are put in place by name; the others are listed with the
    reason. The jobs of pg_cron stay as they are.
    """
    lines = import_jobs(where.one(), source, dry=dry_run, anyone=anyone)
    if as_json:
        print_json(list(lines))
        return OK
    for line in lines:
        click.echo(line)
    return OK


def import_jobs(table: TableConfig, source: str | None, *, dry: bool, anyone: bool) -> Iterator[str]:
    """Carry them over, and say what is done with each. `source`: a conninfo to pg_cron's database, if it is another.

    `anyone`: also jobs that belong to other roles than the one that connects. Raises UserError.
    """
    try:
        with open_session(table, "pgtask import-cron") as session:
            zone, jobs = _read(session) if source is None else _read_at(source)
            place = Place(session.info.dbname, session.info.user)
            carried: list[Job] = []
            for job in jobs:
                doubt = _doubt(job, place, zone, anyone=anyone) or _collides(job, carried)
                if doubt is not None:
                    yield f"left out: {job.key} (job {job.id}): {doubt}"
                    continue
                id = None if dry else _schedule(session, table, job, zone)
                carried.append(job)
                how = "would be scheduled" if dry else f"scheduled as task {id}"
                yield f"{how}: {job.key} (job {job.id}): {_told(job, zone)}"
    except Error as error:
        raise UserError(one_line(error)) from error
    if carried and not dry:
        yield "pg_cron runs them too until it is told not to:"
        yield from (f"SELECT cron.unschedule({job.id});" for job in carried)


def expression(schedule: str) -> str:
    """A schedule of pg_cron's as ours: there `$` is the month's last day."""
    fields = schedule.split()
    if len(fields) == 5:
        fields[2] = fields[2].replace("$", "L")
    return " ".join(fields)


def _read_at(conninfo: str) -> tuple[str, list[Job]]:
    with connect(conninfo, autocommit=True) as session:
        return _read(session)


def _read(session: Connection[Any]) -> tuple[str, list[Job]]:
    there, zone, name = session.execute(statements("import")["where"].encode()).fetchall()[0]
    if not there:
        raise UserError(f"database {name} has no pg_cron; name the one that has with --from CONNINFO")
    return zone, [Job(*row) for row in session.execute(statements("import")["jobs"].encode()).fetchall()]


def _doubt(job: Job, place: Place, zone: str, *, anyone: bool) -> str | None:
    """Why it cannot be carried over."""
    if not job.active:
        return "it is not active"
    if job.node not in HERE:
        return f"it runs on {job.node}: insert a task with that as remote"
    if job.database != place.database:
        return f"it runs in database {job.database}: import it there"
    if job.user != place.user and not anyone:
        return f"it runs as {job.user}, here it would as {place.user}: import it as that role, or with --anyone"
    if SECONDS.fullmatch(job.schedule):
        return None
    try:
        cron.first(expression(job.schedule), zone, datetime.now(UTC))
    except cron.Wrong as wrong:
        return str(wrong)
    return None


def _collides(job: Job, carried: list[Job]) -> str | None:
    """Two roles may have jobs of the same name."""
    return next((f"job {other.id} has that name too" for other in carried if other.key == job.key), None)


def _told(job: Job, zone: str) -> str:
    return expression(job.schedule) + ("" if SECONDS.fullmatch(job.schedule) else f" in {zone}")


def _schedule(session: Connection[Any], table: TableConfig, job: Job, zone: str) -> int:
    names = Names(schema=table.schema, table=table.table)
    call = names.quoted(names.derived("schedule"))
    text = f'SELECT {call}($1::text, $2::text, $3::text, "group" => $1::text, zone => $4::text)'
    seconds = SECONDS.fullmatch(job.schedule) is not None
    values = (job.key, expression(job.schedule), job.command, None if seconds else zone)
    rows = RawCursor(session).execute(text.encode(), values).fetchall()
    return int(rows[0][0])
