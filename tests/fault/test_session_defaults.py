"""Settings that the role or the database gives to every session: nothing is lost, and results are what psql shows."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import pytest

from tests.fixtures.database import Database, drop
from tests.fixtures.locks import WAITING, held
from tests.fixtures.master import Master, end, launch, rows_left
from tests.fixtures.served import create_fresh
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETTINGS: dict[str, list[str]] = {
    "serializable": ["default_transaction_isolation = 'serializable'"],
    "repeatable read": ["default_transaction_isolation = 'repeatable read'"],
    "read only": ["default_transaction_read_only = on"],
    "deferrable": [
        "default_transaction_deferrable = on",
        "default_transaction_isolation = 'serializable'",
    ],
    "asynchronous": ["synchronous_commit = off"],
    "impatient": [
        "statement_timeout = '5s'",
        "lock_timeout = '10ms'",
        "idle_session_timeout = '300ms'",
        "idle_in_transaction_session_timeout = '2s'",
    ],
    "poor": ["work_mem = '64kB'", "temp_file_limit = 0", "temp_buffers = 100", "maintenance_work_mem = '1MB'"],
    "elsewhere": ["search_path = nowhere", "row_security = off", "default_tablespace = ''"],
    "replica": ["session_replication_role = replica"],
    "formats": [
        "TimeZone = 'Asia/Kathmandu'",
        "DateStyle = 'German, DMY'",
        "IntervalStyle = 'iso_8601'",
        "lc_messages = 'C'",
        "bytea_output = 'escape'",
        "extra_float_digits = 0",
    ],
    "old strings": ["standard_conforming_strings = off", "escape_string_warning = off", "backslash_quote = on"],
    "latin": ["client_encoding = 'LATIN1'"],
    "planner": ["enable_indexscan = off", "enable_indexonlyscan = off", "jit = on", "jit_above_cost = 0"],
}


PATIENT = "-c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0"
"""For a session of the test's own, which may have to wait for the processor."""


@dataclass
class Fleet:
    databases: dict[str, Database]
    master: Master


@pytest.fixture(scope="module")
def fleet(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A database for each kind of settings, all served by one master."""
    databases = {name: create_fresh(server) for name in SETTINGS}
    try:
        for name, database in databases.items():
            for n, setting in enumerate(SETTINGS[name]):
                whom = ("ROLE", "DATABASE")[n % 2]
                database.admin_execute(f'ALTER {whom} "{database.name}" SET {setting}')
            database.admin_execute(
                "CREATE TABLE public.effect (id bigint, what text);"
                "CREATE TABLE public.durable (id bigint, value text);"
                f'GRANT ALL ON public.effect, public.durable TO "{database.name}";'
                f'GRANT CREATE ON SCHEMA public TO "{database.name}"'
            )
        text = "\n".join(
            f"[[database]]\nconninfo = {json.dumps(one.conninfo)}\nsafety = '500ms'\n" for one in databases.values()
        )
        directory = tmp_path_factory.mktemp("defaults")
        (directory / "master.toml").write_text(text, "utf-8")
        master = launch(("--config", str(directory / "master.toml")), {}, directory / "master.log")
        try:
            master.wait_log(r"\bleading\b.*\btable=", len(databases))
            yield Fleet(databases, master)
        finally:
            problems = end(master) + [line for one in databases.values() for line in rows_left(one)]
        assert not problems, "\n".join(problems)
    finally:
        for database in databases.values():
            database.close()
            drop(database)


def rows(database: Database, query: str) -> list[tuple[object, ...]]:
    """As the superuser, and not in a transaction that a serializable one may meet."""
    session = database.connect(database.admin, options="-c default_transaction_isolation=read\\ committed")
    with session:
        return session.execute(query.encode()).fetchall()


ENTRY = "INSERT INTO public.effect VALUES (current_setting('pg_task.id')::bigint, 'é')"


@pytest.fixture(params=SETTINGS)
def odd(request: pytest.FixtureRequest, fleet: Fleet) -> Database:
    return fleet.databases[request.param]


def queue(database: Database, input: str, count: int, columns: str = "", values: str = "") -> list[int]:
    """Rows as the tasks' own role inserts them, with the settings that it has."""
    with psycopg.connect(database.conninfo, client_encoding="utf8", options=PATIENT) as session:
        session.execute("SET TRANSACTION READ WRITE")
        found = session.execute(
            f"""INSERT INTO public.task (input, "group", delete{columns})
                SELECT %s, 'g ' || n %% 3, false{values} FROM generate_series(1, {count}) AS n RETURNING id""".encode(),
            [input],
        )
        return [id for (id,) in found.fetchall()]


def ended(database: Database, ids: list[int]) -> list[tuple[object, ...]]:
    where = f"FROM public.task WHERE id = ANY ('{{{','.join(map(str, ids))}}}')"
    eventually(lambda: rows(database, f"SELECT count(*) {where} AND state::text IN ('DONE', 'FAIL')") == [(len(ids),)])
    return rows(database, f"SELECT id, state::text, output, error, attempt {where} ORDER BY id")


def test_every_task_of_a_role_with_odd_settings_runs_once(odd: Database) -> None:
    ids = queue(odd, f"SET TRANSACTION READ WRITE; {ENTRY}", 8)
    ids += queue(odd, f"BEGIN READ WRITE; {ENTRY}; COMMIT", 4, ", atomic", ", false")
    for _, state, _, error, attempt in ended(odd, ids):
        assert (state, error, attempt) == ("DONE", None, 1)
    assert rows(odd, "SELECT id FROM public.effect WHERE what = 'é' ORDER BY id") == [(id,) for id in sorted(ids)]
    odd.admin_execute("SET lock_timeout = 0; TRUNCATE public.effect")


def test_results_and_errors_are_those_of_the_roles_own_session(odd: Database) -> None:
    asked = (
        "SELECT pg_catalog.concat_ws('|', 'é', '2030-12-31 12:00+00'::timestamptz, '1 day 2 hours'::interval,"
        " '\\\\x00ff'::bytea, (1/3.0)::float8, current_setting('search_path'),"
        " current_setting('transaction_isolation'),"
        " current_setting('transaction_read_only'), current_setting('synchronous_commit'),"
        " current_setting('statement_timeout'), current_setting('lock_timeout'), current_setting('TimeZone'))"
    )
    [(_, state, output, error, _)] = ended(odd, queue(odd, asked, 1))
    with psycopg.connect(odd.conninfo, options=PATIENT) as session:
        session.execute("SET client_encoding = 'utf8'")
        expected = session.execute(asked.encode()).fetchone()
    assert (state, error, (output,)) == ("DONE", None, expected)
    [(_, state, _, error, _)] = ended(odd, queue(odd, "SELECT 'é', 1/0", 1))
    assert (state, error) == ("FAIL", "ERROR:  division by zero\nSTATEMENT:  SELECT 'é', 1/0")


def test_repeated_task_of_a_role_with_odd_settings_goes_on(odd: Database) -> None:
    ids = queue(odd, "SELECT 1", 1, ", repeat", ", '1 year'::interval")
    [(_, state, _, error, _)] = ended(odd, ids)
    assert (state, error) == ("DONE", None)
    assert rows(odd, f"SELECT count(*) FROM public.task WHERE parent = {ids[0]} AND state = 'PLAN'") == [(1,)]
    odd.admin_execute(f"DELETE FROM public.task WHERE parent = {ids[0]}")


@pytest.mark.parametrize(
    "input", ["SELECT 1", "SET synchronous_commit = off", "SET LOCAL synchronous_commit = 'local'"]
)
@pytest.mark.parametrize("save", [False, True])
def test_finish_is_durable_whatever_the_role_or_the_task_says(fleet: Fleet, input: str, save: bool) -> None:
    """What holds at the commit is what the last statement before it sees: a trigger on the finish."""
    database = fleet.databases["asynchronous"]
    database.admin_execute(
        "CREATE OR REPLACE FUNCTION public.durable() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " INSERT INTO public.durable VALUES (NEW.id, current_setting('synchronous_commit')); RETURN NULL; END$$;"
        "CREATE OR REPLACE TRIGGER durable AFTER UPDATE ON public.task FOR EACH ROW"
        " WHEN (NEW.state IN ('WORK', 'DONE')) EXECUTE FUNCTION public.durable()"
    )
    ids = queue(database, input, 2, ", save", f", {save}")
    ended(database, ids)
    seen = rows(database, f"SELECT DISTINCT value FROM public.durable WHERE id IN ({ids[0]}, {ids[1]})")
    assert seen == [("on",)]


def test_finish_waits_for_a_lock_longer_than_the_role_would(fleet: Fleet) -> None:
    """A run may wait for locks as long as its role lets it; ours wait for as long as we choose."""
    database = fleet.databases["impatient"]
    gate = database.connect(database.admin, options=PATIENT)
    gate.execute("SELECT pg_advisory_lock(42)")
    [id] = queue(database, "SET lock_timeout = 0; SELECT pg_advisory_xact_lock(42)", 1)
    eventually(lambda: rows(database, WAITING) == [(1,)])
    with database.connect(database.admin, autocommit=False, options=PATIENT) as other:
        other.execute("UPDATE public.task SET data = 'held' WHERE id = %s", [id])
        gate.close()
        eventually(lambda: rows(database, f"{WAITING} AND wait_event = 'transactionid'") == [(1,)])
    [(_, state, _, error, attempt)] = ended(database, [id])
    assert (state, error, attempt) == ("DONE", None, 1)


def test_servers_configuration_that_is_read_anew_does_not_reach_our_statements(
    own_database: Database, master: Callable[..., Master]
) -> None:
    """RESET ALL goes back to it, in sessions that were opened before."""
    database = own_database
    master(database.conninfo, tables=1)
    database.execute("CREATE TABLE seen (id bigint, settings text)")
    database.execute("""
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
            INSERT INTO public.seen VALUES (NEW.id, concat_ws(' ', current_setting('synchronous_commit'),
                current_setting('statement_timeout'), current_setting('lock_timeout')));
            RETURN NULL;
        END$$""")
    database.execute(
        "CREATE TRIGGER see AFTER UPDATE ON task FOR EACH ROW"
        " WHEN (NEW.state IN ('WORK', 'DONE')) EXECUTE FUNCTION see()"
    )
    first = "SELECT pg_advisory_lock(7)"
    with held(database, 7):
        ids = [database.insert(input, delete=False) for input in (first, "SELECT 1", "SHOW lock_timeout")]
        database.wait(ids[0], "WORK")
        for change in ("synchronous_commit = off", "statement_timeout = '7s'", "lock_timeout = '11s'"):
            database.admin_execute(f"ALTER SYSTEM SET {change}")
        database.admin_execute("SELECT pg_reload_conf()")
        eventually(lambda: database.connect().execute("SHOW lock_timeout").fetchone() == ("11s",))
    rows = [database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE"] * 3
    assert rows[2]["output"] == "11s"
    assert set(database.execute("SELECT settings FROM seen")) == {("on 0 5s",)}


def test_role_that_every_session_of_ours_begins_with_may_be_a_stranger_to_us(
    database: Database, master: Callable[..., Master]
) -> None:
    other = f"{database.user}_other"
    one = master("--linger", "0", database.conninfo, tables=1)
    database.execute("SELECT")  # a session that began as the owner
    database.admin_execute(
        f'CREATE ROLE "{other}"; GRANT "{other}" TO "{database.user}";'
        f' ALTER ROLE "{database.user}" SET role = "{other}"'
    )
    try:
        eventually(lambda: not one.workers())
        row = database.wait(database.insert("SELECT current_user", delete=False))
        assert (row["state"], row["output"], row["attempt"]) == ("DONE", other, 1)
    finally:
        database.close()
        one.stop()
        database.admin_execute(f'ALTER ROLE "{database.user}" RESET role; DROP ROLE "{other}"')
