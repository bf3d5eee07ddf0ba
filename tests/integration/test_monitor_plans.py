"""What the monitor's statements cost is bounded, whatever lies in the table: counted in buffers, not in time."""

from collections.abc import Iterator
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgtask.async_session import with_options
from pgtask.monitor.gauges import READING
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database, drop
from tests.fixtures.served import create_fresh
from tests.fixtures.server import AnyServer

FEW, MANY = 2_000, 16_000
BOUND = 500
"""Rows that are counted at most, here."""

STATEMENTS = {"backlog": (BOUND, 20), "in_use": (BOUND, 20), "at_rest": (BOUND,)}
BALLAST = {
    "finished": "now() - interval '1 min', 'DONE', NULL",
    "failed": "now() - interval '1 min', 'FAIL', NULL",
    "planned": "now() + interval '1 h' + n * interval '1 s', 'PLAN', NULL",
    "due": "now() - n * interval '1 ms', 'PLAN', NULL",
    "running": "now(), 'WORK', NULL",
    "waiting": "now(), 'WAIT', '{0}'",
}


def fill(database: Database, ballast: str, count: int) -> None:
    insert = "INSERT INTO task (input, \"group\", plan, state, depend) SELECT 'SELECT 1', 'g' || mod(n, 100), "
    database.execute(f"{insert} {BALLAST[ballast]} FROM generate_series(1, {count}) AS n")
    database.execute("VACUUM ANALYZE task")


def buffers(database: Database, name: str) -> int:
    """Hit or read by the statement as the monitor runs it."""
    text = Names(schema="public", table="task").store().text(name)
    with psycopg.RawCursor(database.connect(make_conninfo(**with_options(database.conninfo, READING)))) as cursor:
        for _ in range(2):
            row = cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}", STATEMENTS[name]).fetchone()
    plan = cast(tuple[Any], row)[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


@pytest.fixture(scope="module", params=BALLAST)
def costs(request: pytest.FixtureRequest, server: AnyServer) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    database = create_fresh(server)
    try:
        install(database)
        database.execute("ALTER TABLE task DISABLE TRIGGER USER")
        fill(database, request.param, FEW)
        few = {name: buffers(database, name) for name in STATEMENTS}
        fill(database, request.param, MANY - FEW)
        yield few, {name: buffers(database, name) for name in STATEMENTS}
    finally:
        database.close()
        drop(database)


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_costs_the_same_whatever_lies_in_the_table(
    costs: tuple[dict[str, int], dict[str, int]], name: str
) -> None:
    few, many = (cost[name] for cost in costs)
    assert many <= 1.5 * few + 20
