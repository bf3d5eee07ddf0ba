"""Several tables, databases and servers under one master: apart from each other, and fair."""

import itertools
import socket
from collections.abc import Callable

import psycopg
import pytest

from pgtask import embedded
from tests.fixtures.database import Database
from tests.fixtures.locks import ASLEEP, WAIT, falls_asleep, held, passes
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

CROWD = f"""INSERT INTO task (input, "group", delete)
    SELECT '{WAIT}, pg_sleep(0.01)', n::text, false
    FROM generate_series(1, 20) AS n"""


def entry(database: Database, more: str = "") -> str:
    return f'[[database]]\nconninfo = "{database.conninfo}"\n{more}\n'


def runs(database: Database, **columns: object) -> dict[str, object]:
    row = database.wait(database.insert("SELECT 1", **{"delete": False, **columns}))
    assert row["state"] == "DONE"
    return row


def test_several_tables_of_one_database_are_served_apart(database: Database, master: Callable[..., Master]) -> None:
    one = master(
        config=entry(database) + entry(database, 'table = "second"') + entry(database, 'schema = "s"\ntable = "third"')
    )
    for schema, table in (("public", "task"), ("public", "second"), ("s", "third")):
        database.schema, database.table = schema, table
        row = runs(database)
        assert row["output"] == "1"
    eventually(lambda: one.title().endswith("(3 tables leading, 0 workers)"))
    assert database.execute("SELECT count(*) FROM task_master, second_master, s.third_master") == [(1,)]


def test_several_databases_are_served_apart(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    others = [new_database() for _ in range(3)]
    master(database.conninfo, *(other.conninfo for other in others))
    for place in (database, *others):
        id = place.insert("SELECT current_database()", delete=False)
        assert place.wait(id)["output"] == place.name


def test_tables_of_two_servers_are_served(
    database: Database, own_database: Database, master: Callable[..., Master]
) -> None:
    master(database.conninfo, own_database.conninfo)
    runs(database)
    runs(own_database)


def test_server_that_is_down_is_said_once_tried_again_and_disturbs_nobody(
    database: Database, own_database: Database, own_server: embedded.Server, master: Callable[..., Master]
) -> None:
    one = master(database.conninfo, own_database.conninfo)
    own_database.close()
    own_server.stop("immediate")
    one.wait_log(f"table_down .*{own_database.name}")
    for _ in range(3):
        runs(database)
    eventually(lambda: one.title().startswith("pgtask: master (1 table leading, 1 connecting, "))
    own_server.start_again()
    one.wait_log(f"table_up .*{own_database.name}")
    reasons = [line.partition("error=")[2] for line in one.logged("table_down")]
    assert len(reasons) <= 6
    assert all(one != next for one, next in itertools.pairwise(reasons)), "said again only for another reason"
    one.wait_log(f"leading .*{own_database.name}", 2)
    runs(own_database)


def test_server_that_is_down_at_the_start_is_served_when_it_comes(
    database: Database, own_database: Database, own_server: embedded.Server, master: Callable[..., Master]
) -> None:
    own_database.close()
    own_server.stop()
    one = master(database.conninfo, own_database.conninfo, tables=1)
    one.wait_log("table_down")
    runs(database)
    own_server.start_again()
    one.wait_log(f"leading .*{own_database.name}")
    runs(own_database)


def test_address_where_nobody_answers_disturbs_nobody(database: Database, master: Callable[..., Master]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        one = master(database.conninfo, f"host=127.0.0.1 port={port} dbname=a user=b sslmode=disable", tables=1)
        runs(database)
        assert one.stop() == 0


def test_restart_of_the_server_costs_a_run_and_no_task(
    own_database: Database, own_server: embedded.Server, master: Callable[..., Master]
) -> None:
    database = own_database
    one = master(database.conninfo)
    once = "SELECT CASE WHEN (SELECT attempt FROM task WHERE id = current_setting('pg_task.id')::bigint) = 1"
    id = database.insert(f"{once} THEN pg_sleep(60) END", delete=False)
    database.wait(id, "WORK")
    waiting = database.insert("SELECT 1", delete=False)
    database.close()
    own_server.restart()
    one.wait_log("leading", 2)
    rows = [database.wait(id), database.wait(waiting)]
    assert [row["state"] for row in rows] == ["DONE", "DONE"]
    assert rows[0]["attempt"] == 2


def test_workers_bounds_all_tables_together(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    places = [database, new_database(), new_database()]
    one = master("--workers", "4", *(place.conninfo for place in places), tables=3)
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, len(one.children()))
        return all(place.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)] for place in places)

    with held(places[0]), held(places[1]), held(places[2]):
        for place in places:
            place.execute(CROWD)
        eventually(lambda: not all_done() and most >= 4)
    eventually(all_done)
    assert most == 4


def test_run_bounds_a_table(database: Database, master: Callable[..., Master]) -> None:
    one = master("--run", "2", database.conninfo, tables=1)
    most = 0

    def all_done() -> bool:
        nonlocal most
        [(working,)] = database.execute("SELECT count(*) FROM task WHERE state IN ('TAKE', 'WORK')")
        most = max(most, working)
        return database.execute("SELECT count(*) FROM task WHERE state <> 'DONE'") == [(0,)]

    with held(database):
        database.execute(CROWD)
        eventually(lambda: not all_done() and most >= 2)
    eventually(all_done)
    assert most == 2
    assert len(one.logged("worker_forked")) <= 4


QUIET = """SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgtask master' AND datname = current_database()
    AND state = 'idle' AND state_change < clock_timestamp() - interval '1 s'"""
"""Has the master said nothing for a while?"""

LEFT = "SELECT count(*) > 50 FROM task WHERE state = 'PLAN'"


def hog(database: Database, groups: int) -> None:
    """More work than there is room for, which takes half a minute: 900 runs of 50 ms, in so many groups."""
    database.execute(
        "INSERT INTO task (input, \"group\") SELECT 'SELECT pg_sleep(0.05)', n %% %s FROM generate_series(1, 900) AS n",
        [groups],
    )
    eventually(lambda: database.execute("SELECT count(*) > 0 FROM task WHERE state = 'WORK'") == [(True,)])


@pytest.mark.parametrize("groups", [2, 50])
def test_table_that_has_all_workers_makes_room_for_another(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master], groups: int
) -> None:
    other = new_database()
    one = master("--workers", "2", database.conninfo, other.conninfo, tables=2)
    hog(database, groups)
    for _ in range(3):
        runs(other)
    assert database.execute(LEFT) == [(True,)], "it waited for all of the hog's"
    database.execute("DELETE FROM task WHERE state = 'PLAN'")
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state IN ('TAKE', 'WORK')") == [(0,)])
    assert len(one.logged("worker_forked")) < 40


def test_group_that_drains_newer_rows_makes_room_for_an_older_one_of_another(
    database: Database, master: Callable[..., Master]
) -> None:
    master("--workers", "1", database.conninfo, tables=1)
    with held(database):
        first = database.insert(WAIT, group="hog", delete=False)
        database.wait(first, "WORK")
        falls_asleep(database)
        other = database.insert("SELECT 1", group="other", delete=False)
        eventually(lambda: not database.execute(ASLEEP))
        eventually(lambda: database.execute(QUIET))  # it has seen who waits, and told the worker
        ids = [database.insert("SELECT 1", group="hog", delete=False) for _ in range(20)]
    row = database.wait(other)
    assert all(row["start"] <= database.wait(id)["start"] for id in ids)


def test_long_run_does_not_keep_the_others_from_making_room(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    other = new_database()
    master("--workers", "2", database.conninfo, other.conninfo, tables=2)
    long = database.insert("SELECT pg_sleep(600)", group="long", delete=False)
    database.wait(long, "WORK")
    hog(database, 1)
    runs(other)
    assert database.execute(LEFT) == [(True,)], "it waited for all of the hog's"
    database.execute("DELETE FROM task")


def test_too_many_connections_is_backpressure(
    new_server: Callable[..., embedded.Server],
    new_database: Callable[..., Database],
    master: Callable[..., Master],
) -> None:
    server = new_server(max_connections="9", superuser_reserved_connections="3")
    database = new_database(on=server)
    one = master("--workers", "16", database.conninfo, tables=1)
    database.execute(
        'INSERT INTO task (input, "group", delete)'
        " SELECT 'SELECT pg_sleep(0.02)', (n % 30)::text, false FROM generate_series(1, 200) AS n"
    )
    eventually(lambda: database.execute("SELECT count(*) FROM task WHERE state = 'DONE'") == [(200,)], timeout=60)
    assert database.execute("SELECT DISTINCT attempt FROM task") == [(1,)]
    one.wait_log("workers_cannot_open")
    assert len(one.logged(" (INFO|WARNING) .*worker")) <= 4
    assert len(one.logged("worker_forked")) < 120


def test_server_that_refuses_workers_does_not_make_the_master_spin(
    database: Database, master: Callable[..., Master]
) -> None:
    one = master("--spare", "1", "--linger", "0", database.conninfo, tables=1)
    role = psycopg.sql.Identifier(database.user)
    eventually(lambda: len(one.workers()) == 1)
    database.execute("SELECT 1")  # this session stays
    database.admin_execute(psycopg.sql.SQL("ALTER ROLE {} CONNECTION LIMIT 1").format(role))
    before = len(one.logged("worker_forked"))
    ids = [database.insert("SELECT 1", group=f"g{n}", delete=False, count=1) for n in range(5)]
    passes(2)
    assert len(one.logged("worker_forked")) - before < 30
    assert len(one.wait_log("workers_cannot_open")) == 1
    database.admin_execute(psycopg.sql.SQL("ALTER ROLE {} CONNECTION LIMIT -1").format(role))
    for id in ids:
        assert database.wait(id)["state"] == "DONE"


def test_table_that_is_refused_says_why_and_disturbs_nobody(
    database: Database, new_database: Callable[..., Database], master: Callable[..., Master]
) -> None:
    other = new_database()
    other.execute("CREATE TABLE task (id text)")
    one = master(database.conninfo, other.conninfo, tables=1)
    one.may_log_errors = True
    [line] = one.wait_log("table_down")
    assert "column id of public.task has type text, not bigint" in line
    runs(database)
