"""A group that is full, with more due rows than a look sees: nobody else waits for it, whatever becomes due and how."""

import re
import time
from collections.abc import Callable, Iterator

import pytest
from psycopg import sql

from tests.fixtures.database import Database
from tests.fixtures.locks import WAIT as WAITS
from tests.fixtures.locks import asleep, falls_asleep, held, passes, runs_waiting
from tests.fixtures.master import Master
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

HOUR = sql.SQL("clock_timestamp() - interval '1 hour'")
BLOCKER = "SELECT pg_sleep(86400)"
BACKLOG = """INSERT INTO task (input, "group", plan, active, delete)
SELECT 'SELECT 1', 'full', statement_timestamp() - interval '2 hours' + n * interval '1 ms', '1 year', false
FROM generate_series(1, %s) AS n"""
LATER = """INSERT INTO task (input, "group", plan)
SELECT 'SELECT 1', 'later ' || n, statement_timestamp() + interval '1 day' FROM generate_series(1, %s) AS n"""
DISABLED = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'task'::regclass AND tgenabled = 'D'"
MORE = 1000
"""Rows, and groups: more than a look sees."""


@pytest.fixture(scope="module", params=[0, MORE], ids=["few groups", "many groups"])
def base(
    server: AnyServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Served]:
    """A master whom nothing wakes in time but what is meant to, and a group that is full for ever."""
    with served(server, tmp_path_factory.mktemp("full"), config='safety = "1h"\nsleep = "1h"\nactive = "1d"') as one:
        one.database.execute(LATER, [request.param])
        yield one
        one.database.execute("DELETE FROM task")


@pytest.fixture
def full(base: Served) -> Iterator[Database]:
    """Asleep, with what is due in the full group behind it."""
    database = base.database
    if database.execute(DISABLED) != [(0,)]:  # else a take might wait for this, and this for autovacuum
        database.execute("ALTER TABLE task ENABLE TRIGGER USER")
    database.execute("DELETE FROM task WHERE \"group\" NOT LIKE 'later %'")
    fill(database)
    yield database
    database.close()


@pytest.fixture
def emptied(request: pytest.FixtureRequest) -> Iterator[Callable[[Database], None]]:
    """Has such a table emptied before its master is told to stop."""
    databases: list[Database] = []
    yield databases.append
    for database in databases:
        database.execute("ALTER TABLE task ENABLE TRIGGER USER; DELETE FROM task")


def fill(database: Database) -> int:
    """The id of the run that has the group's slot."""
    blocker = database.insert(BLOCKER, group="full", delete=False)
    database.wait(blocker, "WORK")
    database.execute(BACKLOG, [MORE])
    falls_asleep(database, timeout=60)  # it walks through all groups first, in a twentieth of the time
    return blocker


def starts(database: Database, id: int) -> None:
    assert database.wait(id)["state"] == "DONE"


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_others_start(full: Database, pause: float) -> None:
    for number in range(4):
        starts(full, full.insert("SELECT 1", group=f"other {number}", delete=False))
        passes(pause)


def test_many_others_start_at_once(full: Database) -> None:
    full.execute(
        """INSERT INTO task (input, "group")
        SELECT 'SELECT 1', 'other ' || mod(n, 40) FROM generate_series(1, 400) AS n"""
    )
    eventually(lambda: {row["state"] for row in full.tasks("\"group\" LIKE 'other %'")} == {"DONE"})


def test_row_that_its_group_had_no_slot_for_starts_when_there_is_one(full: Database) -> None:
    """By the master: a worker that has run one task takes no other like it."""
    with held(full):
        first = full.insert(WAITS, group="other", delete=False)
        eventually(lambda: runs_waiting(full) == 1)
        second = full.insert("SELECT 1", group="other", plan=HOUR, count=1, delete=False)
        third = full.insert("SELECT 1", group="other", count=1, delete=False)
        passes(1.5)
        falls_asleep(full)
    for id in (first, second, third):
        starts(full, id)


def test_full_group_goes_on_when_its_run_is_lost(full: Database) -> None:
    [(pid,)] = full.execute("SELECT pid FROM task WHERE input = %s AND state = 'WORK'", [BLOCKER])
    full.execute("UPDATE task SET plan = plan + interval '1 year' WHERE input = %s", [BLOCKER])
    full.execute("SELECT pg_terminate_backend(%s)", [pid])
    eventually(lambda: full.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(MORE,)])


def test_row_of_a_greater_max_starts_beside_the_run_of_the_full_group(full: Database) -> None:
    starts(full, full.insert("SELECT 1", group="full", max=1, delete=False))
    [(old,)] = full.execute("SELECT min(id) FROM task WHERE state = 'PLAN' AND \"group\" = 'full'")
    full.execute("UPDATE task SET max = 1 WHERE id = %s", [old])
    starts(full, old)


@pytest.mark.parametrize("sleeping", [True, False])
def test_row_that_is_set_back_to_an_old_plan_starts(full: Database, sleeping: bool) -> None:
    id = full.insert("SELECT 1", group="other", delete=False)
    starts(full, id)
    full.execute("UPDATE task SET plan = plan - interval '1 hour' WHERE id = %s", [id])
    if sleeping:
        falls_asleep(full)
    full.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
    eventually(lambda: full.execute("SELECT attempt, state FROM task WHERE id = %s", [id]) == [(2, "DONE")])


def test_row_that_is_moved_out_of_the_full_group_starts(full: Database) -> None:
    [(id,)] = full.execute("SELECT max(id) FROM task WHERE state = 'PLAN' AND \"group\" = 'full'")
    full.execute("UPDATE task SET \"group\" = 'other' WHERE id = %s", [id])
    starts(full, id)


def test_row_that_is_inserted_with_an_old_plan_starts(full: Database) -> None:
    for _ in range(3):
        starts(full, full.insert("SELECT 1", group="other", plan=HOUR, delete=False))


def test_row_that_was_long_uncommitted_starts(full: Database) -> None:
    writer = full.connect(autocommit=False)
    for sleeping in (True, False):
        if not sleeping:
            full.insert("SELECT pg_sleep(0.5)", group="busy")
        [(id,)] = writer.execute(
            "INSERT INTO task (input, \"group\", delete) VALUES ('SELECT 1', 'slow', false) RETURNING id"
        ).fetchall()
        passes(1.5)
        falls_asleep(full) if sleeping else None
        writer.commit()
        starts(full, id)
    writer.close()


def test_row_that_many_new_ones_of_the_full_group_hide_starts(full: Database) -> None:
    full.execute(
        """INSERT INTO task (input, "group", delete, plan)
        SELECT 'SELECT 1', CASE n WHEN 500 THEN 'other' ELSE 'full' END, false, clock_timestamp()
        FROM generate_series(1, 1000) AS n"""
    )
    eventually(lambda: [row["state"] for row in full.tasks("\"group\" = 'other'")] == ["DONE"])


@pytest.mark.parametrize("plan", [sql.SQL("now()"), HOUR], ids=["new", "old"])
def test_group_that_was_held_goes_on(full: Database, plan: sql.SQL) -> None:
    full.execute("SELECT task_hold('other')")
    id = full.insert("SELECT 1", group="other", plan=plan, delete=False)
    passes(1.5)
    falls_asleep(full)
    full.execute("SELECT task_release('other')")
    starts(full, id)


def test_group_that_pauses_between_its_runs_goes_on(full: Database) -> None:
    ids = [full.insert("SELECT 1", group="pauses", max=-700, delete=False) for _ in range(4)]
    for id in ids:
        starts(full, id)


def test_planned_task_starts_in_time(full: Database) -> None:
    plan = sql.SQL("clock_timestamp() + interval '1.5 s'")
    row = full.wait(full.insert("SELECT 1", group="planned", plan=plan, delete=False))
    assert 0 <= (row["start"] - row["plan"]).total_seconds() < 1.0


def test_row_of_a_disabled_trigger_is_found_by_the_safety_look(
    database: Database, master: Callable[..., Master], emptied: Callable[[Database], None]
) -> None:
    emptied(database)
    master("--safety", "2s", database.conninfo, tables=1)
    fill(database)
    passes(0.5)
    database.execute("ALTER TABLE task DISABLE TRIGGER USER")
    starts(database, database.insert("SELECT 1", group="other", plan=HOUR, active="1d", delete=False))


def said(database: Database) -> list[tuple[str, str]]:
    """Each look of the master: which statement, and the plan from which on it looks."""
    text = database.server.log_text()  # type: ignore[union-attr]
    looks = re.findall(
        rf"^pgtask master\|{database.name}\|LOG:  execute [^:]*: (WITH .*?)DETAIL:  [Pp]arameters: (.*?)$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    found = []
    for query, parameters in looks:
        given = dict(re.findall(r"\$(\d+) = ('[^']*'|NULL)", parameters))
        if "looked AS (" in query and "gone AS" not in query:
            found.append(("take", given.get("8", "")))
        elif "one AS MATERIALIZED" in query:
            found.append(("take_one", given["4"]))
    return found


def test_what_is_due_in_the_full_group_is_not_read_for_others(
    talkative: Database, master: Callable[..., Master], emptied: Callable[[Database], None]
) -> None:
    """What a sleeping master looks at first is what is new; all that is due it reads some time later, once."""
    emptied(talkative)
    master("--safety", "1h", "--linger", "1ms", talkative.conninfo, tables=1)  # no worker looks by itself
    fill(talkative)

    def found_at_once() -> bool:
        passes(1.1)
        falls_asleep(talkative)
        before = len(said(talkative))
        starts(talkative, talkative.insert("SELECT 1", group="other", delete=False))
        falls_asleep(talkative)
        looks = said(talkative)[before:]
        everywhere = [look for look in looks if look == ("take", "'-infinity'")]
        return looks[0][0] == "take_one" and looks[0][1] != "'-infinity'" and len(everywhere) == 1

    for _ in range(3):
        eventually(found_at_once)
    passes(1.5)  # until the last worker has ended
    before = said(talkative)
    passes(1.5)
    assert asleep(talkative)
    assert said(talkative)[len(before) :] == [], "nothing has happened"


def test_it_is_read_once_a_second_while_something_is_found_for_every_call(
    talkative: Database, master: Callable[..., Master], emptied: Callable[[Database], None]
) -> None:
    emptied(talkative)
    master("--safety", "1h", "--linger", "1ms", talkative.conninfo, tables=1)
    fill(talkative)

    def seldom() -> bool:
        passes(1.1)
        falls_asleep(talkative)
        since, before = time.monotonic(), len(said(talkative))
        for number in range(12):
            starts(talkative, talkative.insert("SELECT 1", group=f"other {number}", delete=False))
            passes(0.1)
        dear = [place for name, place in said(talkative)[before:] if name == "take"]
        everywhere = dear.count("'-infinity'")
        # Nor has it to look by name for more in the groups whose runs have ended.
        return 0 < everywhere <= 1 + time.monotonic() - since and len(dear) - everywhere < 6

    eventually(seldom)


def test_row_that_is_set_back_to_an_old_plan_has_all_looked_at_at_once(
    talkative: Database, master: Callable[..., Master], emptied: Callable[[Database], None]
) -> None:
    """It tells so itself; the walk through all groups would find it, later."""
    emptied(talkative)
    master("--safety", "1h", "--linger", "1ms", talkative.conninfo, tables=1)
    id = talkative.insert("SELECT 1", group="other", active="1 day", delete=False)
    starts(talkative, id)
    talkative.execute("UPDATE task SET plan = plan - interval '1 hour' WHERE id = %s", [id])
    fill(talkative)

    def looked_everywhere_at_once() -> bool:
        passes(1.1)
        starts(talkative, talkative.insert("SELECT 1", group="more", delete=False))
        passes(1.1)
        falls_asleep(talkative)
        before = len(said(talkative))
        talkative.execute("UPDATE task SET state = 'PLAN' WHERE id = %s", [id])
        starts(talkative, id)
        return said(talkative)[before][1] == "'-infinity'"

    eventually(looked_everywhere_at_once)
