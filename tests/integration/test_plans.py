"""What the hot statements cost does not depend on what lies in the table: counted in buffers, not in time.

Each kind of ballast is measured twice, the second time with eight times as much: a cost that grows with it shows.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgtask.async_session import SETTINGS, with_options
from pgtask.objects import Names
from tests.fixtures.catalog import install
from tests.fixtures.database import Database, drop
from tests.fixtures.served import create_fresh
from tests.fixtures.server import AnyServer

FEW, MANY = 2_000, 16_000
INSERT = 'INSERT INTO task (plan, "group", max, input, state) '
BALLAST = {
    "finished": (
        "SELECT now() - interval '2 min', 'g' || mod(n, 10), 0, 'SELECT 1', 'DONE' FROM generate_series(1, %s) AS n"
    ),
    "planned for the future in one group": (
        "SELECT now() + interval '1 h' + n * interval '1 s', 'g1', mod(n, 3), 'SELECT 1', 'PLAN'"
        " FROM generate_series(1, %s) AS n"
    ),
    "planned for the future, a group each": (
        "SELECT now() + interval '1 h' + n * interval '1 s', 'f' || n, 0, 'SELECT 1', 'PLAN'"
        " FROM generate_series(1, %s) AS n"
    ),
    "due in a full group": (
        "SELECT now() - interval '1 s' - n * interval '1 ms', 'full', 0, 'SELECT 1', 'PLAN'"
        " FROM generate_series(1, %s) AS n"
    ),
    "stopped": "SELECT now(), 'g' || mod(n, 10), 0, 'SELECT 1', 'STOP' FROM generate_series(1, %s) AS n",
}
BEGINNING = ("-infinity", -(2**63))
STATEMENTS = (
    "take",
    "take_one",
    "due_in",
    "find",
    "glance",
    "next",
    "next_below",
    "look",
    "look_below",
    "next_batch",
    "expire",
    "foreign",
    "rescue",
    "rescue_stopped",
    "unheard",
    "owned",
    "owners",
    "resume",
    "back",
    "finish",
    "switch",
    "finish_all",
    "settle",
    "remove_all",
)
QUICK = ("take", "next_after", "look_after", "next_batch_after", "expire", "owned", "owners", "finish_all", "back")


TRIGGERED = {
    "insert": "INSERT INTO task (input, \"group\") VALUES ('SELECT 1', 'users')",
    "plan again": "UPDATE task SET plan = now(), state = 'PLAN' WHERE id = 1",
    "stop": "UPDATE task SET state = 'STOP' WHERE id = 2",
    "delete": "DELETE FROM task WHERE id = 3",
}
"""What users do; the triggers run with it. Row 1 has ended, the others run."""


Costs = tuple[dict[str, int], dict[str, int]]


class Table:
    """A task table without a master, and what statements on it cost, planned as the master's and workers' are."""

    def __init__(self, database: Database, *, planned_empty: bool = False) -> None:
        self.database = database
        self.store = Names(schema="public", table="task").store()
        self.analyzed = not planned_empty
        install(database)
        database.execute("ALTER TABLE task DISABLE TRIGGER USER, SET (autovacuum_enabled = off)")
        session = database.connect(make_conninfo(**with_options(database.conninfo, SETTINGS)))
        [(self.mark,)] = session.execute(self.store.text("mark").encode()).fetchall()
        self._cursor = psycopg.ClientCursor(session)
        for name in {*STATEMENTS, *QUICK}:
            session.execute(f"PREPARE hot_{name} AS {self.store.text(name)}".encode())
        if planned_empty:
            database.execute("VACUUM ANALYZE task")
            for name in {*STATEMENTS, *QUICK}:
                count = max(map(int, re.findall(r"\$(\d+)", self.store.text(name))), default=0)
                values = f"({', '.join(['NULL'] * count)})" if count else ""
                session.execute(f"EXPLAIN EXECUTE hot_{name}{values}".encode())
        database.execute("UPDATE task_master SET term = 1")
        database.execute(INSERT + "VALUES (now(), 'full', 0, 'SELECT 1', 'WORK')")
        database.execute(INSERT + "SELECT now(), 'run', 0, 'SELECT 1', 'WORK' FROM generate_series(1, 50)")
        database.execute("UPDATE task SET start = now(), pid = 1, attempt = 1, batch = 50")
        self.runs = database.execute("SELECT array_agg(id), array_agg(attempt) FROM task WHERE \"group\" = 'run'")[0]
        own = INSERT + "VALUES (now(), 'own', 0, 'SELECT 1', 'WORK') RETURNING id"
        [(self.own,)] = database.execute(own)
        database.execute("UPDATE task SET pid = %s WHERE id = %s", [session.info.backend_pid, self.own])
        database.execute(
            INSERT + "SELECT now() - n * interval '1 us', 'g' || mod(n, 10), 0, 'SELECT 1', 'PLAN'"
            " FROM generate_series(1, 50) AS n"
        )
        [(found,)] = database.execute("SELECT id FROM task WHERE \"group\" = 'g1' AND state = 'PLAN' LIMIT 1")
        session.execute("SELECT set_config('pgtask.looked', %s, false)", [str(found)])
        for number, query in enumerate(TRIGGERED.values()):
            body = f"UPDATE task SET state = 'DONE' WHERE id = 1; {query}; SELECT 1"
            database.execute(
                f"CREATE FUNCTION users_{number}() RETURNS int SET search_path = public LANGUAGE sql AS $$ {body} $$"
            )

    def parameters(self, name: str, *, quick: bool, count: int = 10) -> tuple[Any, ...]:
        """As the master and a worker of group g1 give them, with the slot of group `full` in use.

        `count` rows for those that may have several, if there are as many.
        """
        query = "SELECT hashtextextended(g, hashtextextended('', 0)) FROM unnest('{full,g1}'::text[]) AS g"
        [(full,), (g1,)] = self.database.execute(query)
        query = "SELECT max, plan, id FROM task WHERE state = 'PLAN' AND plan <= now() ORDER BY plan, id LIMIT 1"
        [(max, *place)] = self.database.execute(query)
        since = (*place, "now") if quick else (*BEGINNING, None)
        who = ("-infinity", "g1", "", 0, 0.0, 1, g1, 0)
        runs = [column[:count] for column in self.runs]
        ended = (self.runs[0][0], 1, "DONE", "1", None, None, None, 1)

        def several(*values: str) -> tuple[Any, ...]:
            return (1, count, *runs, *([value] * count for value in values))

        known: dict[str, tuple[Any, ...]] = {
            "take": (count, [], 200, None, [full], "-infinity", None, *since, []),
            "due_in": ([full, g1], None),
            "glance": (1, [], 20, None, [full], "-infinity"),
            # the moment when the first was due, and no other
            "take_one": (place[0], [full], "-infinity", *BEGINNING),
            "find": (place[0], [full], "-infinity", *BEGINNING, 1, self.mark, "infinity"),
            "next": who,
            "next_below": who,
            "look": (*who, self.own),
            "look_below": (*who, self.own),
            "next_batch": (*who, count),
            "next_batch_after": (*who, count, max, *place),
            "next_after": (*who, place[1], max, place[0]),
            "look_after": (*who, self.own, max, place[0]),
            "expire": (1000, *(place if quick else BEGINNING)),
            "foreign": ([1], [], [], []),
            "rescue": (3, [], [], [], []),
            "rescue_stopped": (),
            "unheard": ([1],),
            "owned": (1, 0, 1),
            "resume": ("-infinity", 1, 0),
            "back": (1, *runs),
            "finish": ended,
            "switch": (*ended, "-infinity", True),
            "finish_all": several("DONE", "now", "now", "1", "", "", ""),
            "settle": several("FAIL", "now", "now", "1", "", "40001", "", "now"),
            "remove_all": several(),
            "owners": ([1],),
        }
        return known[name]

    def fill(self, ballast: str, count: int) -> None:
        self.database.execute(INSERT + ballast, [count])
        if self.analyzed:
            self.database.execute("ANALYZE task")

    def pass_by(self, count: int) -> None:
        """So many tasks run to their end, all of them planned before what is left."""
        self.fill(BALLAST["due in a full group"].replace("'full'", "'g1'").replace("1 s'", "1 h'"), count)
        for state in ("WORK", "DONE"):
            query = "UPDATE task SET state = %s WHERE state IN ('PLAN', 'WORK') AND plan < now() - interval '30 min'"
            self.database.execute(query, [state])

    def buffers(self, name: str, *, quick: bool = False) -> int:
        """Hit or read by the statement, once what it finds for the first time is behind it."""
        return _buffers(self.plan(name, self.parameters(name, quick=quick)))

    def rows(self, name: str, *, count: int) -> int:
        """Those that the parts of the statement have read, for so many that it writes."""
        plan = self.plan(name, self.parameters(name, quick=False, count=count))
        written = [node for node in _nodes(plan) if node["Node Type"] == "ModifyTable"]
        assert max(int(node["Actual Rows"]) for node in written) == count
        return sum(_rows(node) for node in _nodes(plan))

    def users_buffers(self, name: str) -> int:
        """The same for what a user does; in a function, so that its triggers are counted as well."""
        self.database.execute("ALTER TABLE task ENABLE TRIGGER USER")
        try:
            return _buffers(self._plan(f"SELECT public.users_{list(TRIGGERED).index(name)}()", ()))
        finally:
            self.database.execute("ALTER TABLE task DISABLE TRIGGER USER")

    def all_buffers(self) -> dict[str, int]:
        """Those of what users do only where plans may be made anew: it turns triggers on and off."""
        users = TRIGGERED if self.analyzed else {}
        return {name: self.buffers(name) for name in STATEMENTS} | {name: self.users_buffers(name) for name in users}

    def plan(self, name: str, parameters: tuple[Any, ...]) -> dict[str, Any]:
        """With what it has cost."""
        places = ", ".join(["%s"] * len(parameters))
        return self._plan(f"EXECUTE hot_{name}" + (f"({places})" if places else ""), parameters)

    def _plan(self, statement: str, parameters: tuple[Any, ...]) -> dict[str, Any]:
        text = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
        for _ in range(2):
            with self._cursor.connection.transaction(force_rollback=True):
                row = self._cursor.execute(text.encode(), parameters).fetchone()
        return cast(dict[str, Any], cast(tuple[Any], row)[0][0]["Plan"])


def _buffers(plan: Mapping[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"]) + _pages(plan)


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for one in node.get("Plans", ()):
        yield from _nodes(one)


def _rows(node: Mapping[str, Any]) -> int:
    """What it has answered with, or thrown away."""
    removed = sum(value for name, value in node.items() if name.startswith("Rows Removed by"))
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])


def _pages(node: Mapping[str, Any]) -> int:
    """What its hash tables take of memory, in pages: they are as large as the planner thinks that they must be."""
    return int(node.get("Peak Memory Usage", 0)) // 8 + sum(map(_pages, node.get("Plans", ())))


def measured(server: AnyServer, ballast: str, *, planned_empty: bool = False) -> Iterator[Costs]:
    """The buffers of each statement with few rows of ballast and with many."""
    database = create_fresh(server)
    try:
        table = Table(database, planned_empty=planned_empty)
        table.fill(BALLAST[ballast], FEW)
        few = table.all_buffers()
        table.fill(BALLAST[ballast], MANY - FEW)
        yield few, table.all_buffers()
    finally:
        database.close()
        drop(database)


@pytest.fixture(scope="module", params=BALLAST)
def costs(request: pytest.FixtureRequest, server: AnyServer) -> Iterator[Costs]:
    yield from measured(server, request.param)


@pytest.mark.parametrize("name", [*STATEMENTS, *TRIGGERED])
def test_statement_costs_the_same_whatever_lies_in_the_table(costs: Costs, name: str) -> None:
    few, many = (cost[name] for cost in costs)
    assert many <= 1.5 * few + 20


@pytest.fixture(scope="module", params=["finished", "planned for the future, a group each", "due in a full group"])
def costs_planned_empty(request: pytest.FixtureRequest, server: AnyServer) -> Iterator[Costs]:
    """With plans that were made while the table was empty, and had been vacuumed, and that nothing changes."""
    yield from measured(server, request.param, planned_empty=True)


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_that_was_planned_for_an_empty_table_costs_the_same(costs_planned_empty: Costs, name: str) -> None:
    few, many = (cost[name] for cost in costs_planned_empty)
    assert many <= 1.5 * few + 20


@pytest.fixture(scope="module", params=[False, True], ids=["", "planned empty"])
def shared(request: pytest.FixtureRequest, server: AnyServer) -> Iterator[Table]:
    """Fifty rows that may share a transaction, in a group of their own."""
    database = create_fresh(server)
    try:
        table = Table(database, planned_empty=request.param)
        database.execute("DELETE FROM task WHERE state = 'PLAN' AND \"group\" = 'g1'")
        table.fill("SELECT now() - interval '1 s', 'g1', 0, 'SELECT 1', 'PLAN' FROM generate_series(1, %s)", 50)
        database.execute("UPDATE task SET batch = 50 WHERE \"group\" = 'g1'")
        yield table
    finally:
        database.close()
        drop(database)


@pytest.mark.parametrize("name", ["next_batch", "finish_all", "remove_all"])
def test_statement_for_several_rows_does_not_compare_each_with_each(shared: Table, name: str) -> None:
    assert shared.rows(name, count=50) <= 5 * shared.rows(name, count=10) + 50


@pytest.fixture(scope="module")
def held_back(server: AnyServer) -> Iterator[Costs]:
    """The buffers of quick looks, with few and with many dead entries at the head of the indexes."""
    database = create_fresh(server)
    try:
        table = Table(database)
        with database.connect() as old:
            old.autocommit = False
            old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            old.execute("SELECT FROM task")
            table.pass_by(FEW)
            few = {name: table.buffers(name, quick=True) for name in QUICK}
            assert table.buffers("take") > few["take"] + FEW / 100, "nothing is held back"
            table.pass_by(MANY - FEW)
            yield few, {name: table.buffers(name, quick=True) for name in QUICK}
    finally:
        database.close()
        drop(database)


@pytest.mark.parametrize("name", QUICK)
def test_quick_look_costs_the_same_however_many_tasks_went_by_since_the_oldest_snapshot(
    held_back: Costs, name: str
) -> None:
    few, many = (cost[name] for cost in held_back)
    assert many <= 1.2 * few + 5
