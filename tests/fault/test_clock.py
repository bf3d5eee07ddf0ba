"""The machine's clock is set back and forward while tasks run: the server's, and that of the master alone.

No test may set the machine's clock. The server's is set by functions that take the place of its own and add what a
table says; the master's by a module that Python imports at its start.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from psycopg import RawCursor, sql
from psycopg.conninfo import make_conninfo

from pgtask.async_session import SETTINGS, with_options
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

Start = Callable[..., Master]

SHIFTED = """
    ALTER FUNCTION pg_catalog.{name}() RENAME TO true_{name};
    CREATE FUNCTION pg_catalog.{name}() RETURNS timestamptz LANGUAGE plpgsql {kind} AS $$BEGIN
        RETURN pg_catalog.true_{name}() OPERATOR(pg_catalog.+) (SELECT s.by FROM clock.shift AS s);
    END$$"""

IN_TIME = """SELECT clock_timestamp() >= plan AND clock_timestamp() < plan + interval '1 minute'
    FROM task WHERE id = current_setting('pg_task.id')::bigint"""

CLOCKS = {
    "clock_timestamp": "VOLATILE",
    "statement_timestamp": "STABLE",
    "transaction_timestamp": "STABLE",
    "now": "STABLE",
}

SITECUSTOMIZE = """
import datetime, os, time

real, file = time.time, os.environ["SHIFT"]


def shift():
    with open(file) as stream:
        return float(stream.read())


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


time.time = lambda: real() + shift()
time.time_ns = lambda: int(time.time() * 10**9)
datetime.datetime = Shifted
"""


def make_clock(database: Database) -> None:
    database.admin_execute("CREATE SCHEMA clock; GRANT USAGE ON SCHEMA clock TO PUBLIC")
    database.admin_execute("CREATE TABLE clock.shift AS SELECT interval '0' AS by; GRANT ALL ON clock.shift TO PUBLIC")
    for name, kind in CLOCKS.items():
        database.admin_execute(SHIFTED.format(name=name, kind=kind))


def set_clock(database: Database, shift: str) -> None:
    """From the next reading on, whoever reads it."""
    database.execute("UPDATE clock.shift SET by = %s", [shift])


def test_servers_clock_that_is_set_back_and_forward_loses_and_repeats_nothing(
    own_database: Database, own_ledger: Ledger, master: Start
) -> None:
    database, ledger = own_database, own_ledger
    make_clock(database)
    one = master("--reset", "200ms", database.conninfo, tables=1)
    base = database.execute("SELECT date_trunc('second', clock_timestamp())")[0][0]
    grid = database.insert("SELECT 1", plan=base, repeat="1 second", group="grid", active="1 day", delete=False)
    for shift in ("0", "-1 hour", "0", "1 hour", "-1 hour"):
        long = database.insert(
            f"{ENTRY}; SELECT pg_sleep(1.2)", group=f"ledger long {shift}", active="1 day", delete=False
        )
        database.wait(long, "WORK", "DONE")
        ledger.fill(30, groups=5, ms=20, active="1 day")
        set_clock(database, shift)
        # By the new clock, due at once and soon.
        now = database.insert(ENTRY, group=f"ledger now {shift}", active="1 day", delete=False)
        plan = sql.SQL("clock_timestamp() + '1 second'")
        soon = database.insert(
            f"{ENTRY}; {IN_TIME}", group=f"ledger soon {shift}", active="1 day", delete=False, plan=plan
        )
        ledger.wanted += 3
        assert database.wait(long)["state"] == "DONE"
        assert database.wait(now)["state"] == "DONE"
        assert database.wait(soon)["output"] == "INSERT 0 1\nt"
    set_clock(database, "1 hour")
    database.insert("SELECT 1", group="waking")  # a sleeping master sees a new clock when it wakes, or after `safety`
    ledger.settled()
    assert {row["attempt"] for row in database.tasks("\"group\" LIKE 'ledger %'")} == {1}
    assert one.logged("run_lost") == []
    eventually(lambda: len(database.tasks("\"group\" = 'grid' AND state = 'DONE'")) > 3)
    plans = [row["plan"] for row in database.tasks("\"group\" = 'grid'")]
    assert len(set(plans)) == len(plans), "a moment of its grid came twice"
    assert {plan.microsecond for plan in plans} == {0}
    assert {row["attempt"] for row in database.tasks("\"group\" = 'grid'")} <= {0, 1}
    database.execute("UPDATE task SET state = 'STOP' WHERE \"group\" = 'grid' AND state = 'PLAN'")
    assert database.task(grid)["state"] == "DONE"  # type: ignore[index]


def test_second_look_before_the_sleep_takes_nothing_early_where_the_clock_was_set_back(own_database: Database) -> None:
    """It asks for the instant of the first look, which the server's clock may have left behind it."""
    database = own_database
    install(database)
    due = database.insert("SELECT 1", group="due")
    database.insert("SELECT 1", group="early", plan=sql.SQL("clock_timestamp() + '30 minutes'"))
    cursor = RawCursor(database.connect(make_conninfo(**with_options(database.conninfo, SETTINGS))))
    hour = timedelta(hours=1)
    [[before]] = cursor.execute(b"SELECT clock_timestamp()").fetchall()
    take = Names(schema="public", table="task").store().text("take").encode()
    everywhere = (None, "-infinity", -(2**63), None, [])
    rows = cursor.execute(take, [10, [], 10, before + hour, [], before, *everywhere]).fetchall()
    assert [(row[2] < before + hour, row[8]) for row in rows] == [(True, due)], "the instant, and the id"


def test_masters_own_clock_changes_nothing(database: Database, ledger: Ledger, master: Start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    shift = tmp_path / "shift"
    shift.write_text("0")
    one = master(database.conninfo, env={"PYTHONPATH": str(tmp_path), "SHIFT": str(shift)})
    long = database.insert(f"{ENTRY}; SELECT pg_sleep(1)", group="ledger long", delete=False, timeout="1 minute")
    ledger.wanted += 1
    database.wait(long, "WORK", "DONE")
    years = []
    for days in (-1000, 1000, 0):
        shift.with_suffix(".new").write_text(str(days * 86400))
        shift.with_suffix(".new").rename(shift)
        ledger.fill(40, groups=8)
        soon = database.insert("SELECT 1", group="soon", delete=False, plan=sql.SQL("clock_timestamp() + '300 ms'"))
        row = database.wait(soon)
        assert row["plan"] <= row["start"] < row["plan"] + timedelta(seconds=20)
        years.append(str((datetime.now(UTC) + timedelta(days=days)).year))
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    for year in years:
        assert one.logged(f"^{year}-"), "the master's clock was not what it should have been"
