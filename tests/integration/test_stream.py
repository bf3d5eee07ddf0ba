"""Runs in one stream, each sent before it is known what became of the one before: what a run must not see of that, and
what it must say as a run that began by itself does."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import ENTRY, Ledger
from tests.fixtures.locks import held, runs_waiting
from tests.fixtures.master import Master
from tests.fixtures.proxy import Proxy
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SAME = ("state", "output", "error", "code", "notice")

GO = "SELECT 1"
"""What the master assigns begins by itself; with the next one of its group a stream begins, in which others follow."""


class Group:
    """Tasks that are due together, in their order."""

    def __init__(self, database: Database, one: Master) -> None:
        self.database = database
        self.master = one

    def insert(self, *inputs: str, **columns: Any) -> list[int]:
        """The ids of all but the first two, which come before them."""
        values = {"delete": False, "header": False} | columns
        names = ", ".join(f'"{name}"' for name in values)
        query = (
            f"INSERT INTO task (input, {names}) SELECT i, {', '.join(['%s'] * len(values))}"
            " FROM unnest(%s::text[]) WITH ORDINALITY AS u (i, n) ORDER BY n RETURNING id"
        )
        return [id for (id,) in self.database.execute(query, [*values.values(), [GO, GO, *inputs]])][2:]

    def run(self, *inputs: str, **columns: Any) -> list[dict[str, Any]]:
        return [self.database.wait(id) for id in self.insert(*inputs, **columns)]

    def alone(self, input: str, **columns: Any) -> dict[str, Any]:
        """The same input where nothing came before it: the simple protocol."""
        columns = {"delete": False, "header": False} | columns
        return self.database.wait(self.database.insert(input, group="alone " + input[:40], **columns))

    def function(self, name: str, body: str, returns: str = "int", takes: str = "") -> None:
        """In place of one of this name that another test has made."""
        self.database.execute(
            f"DROP FUNCTION IF EXISTS {name}; "
            f"CREATE FUNCTION {name}({takes}) RETURNS {returns} LANGUAGE plpgsql AS $f$ BEGIN {body} END $f$"
        )

    def ledger(self) -> None:
        """An empty table `did`, into which `SELECT does(2)` writes: a query, which may follow."""
        self.database.execute("DROP TABLE IF EXISTS did; CREATE TABLE did (what int)")
        self.function("does", "INSERT INTO did VALUES ($1); RETURN $1;", takes="what int")

    def did(self) -> list[int]:
        return [what for (what,) in self.database.execute("SELECT what FROM did ORDER BY 1")]


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One master for most of the module; a worker for each run of a group, so that none lets nothing follow for what
    another test has left in its session."""
    with served(server, tmp_path_factory.mktemp("stream"), more="[master]\nlinger = 0") as one:
        yield one


@pytest.fixture
def group(base: Served) -> Group:
    return Group(base.database, base.master)


@pytest.fixture
def own(database: Database, master: Callable[..., Master]) -> Group:
    """With a database and a master of its own."""
    return Group(database, master(database.conninfo, tables=1))


def text(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in SAME}


def test_run_begins_behind_the_one_before_in_one_go(group: Group) -> None:
    """Else nothing in this file tests what it says."""
    a, b, c = group.run(*["SELECT now() = statement_timestamp(), current_query()"] * 3)
    assert [row["output"] for row in (a, b, c)] == [f"f\t{a['input']}"] * 3
    assert {row["pid"] for row in (a, b, c)} == {a["pid"]}


def test_run_begins_when_the_one_before_has_ended(group: Group) -> None:
    """Both are written by one statement, and still are one after another."""
    rows = group.run(*[GO, "SELECT 1 FROM pg_sleep(0.002)"] * 20)
    assert all(before["stop"] <= after["start"] for before, after in pairwise(rows))
    assert all(row["start"] <= row["stop"] for row in rows)
    assert {row["attempt"] for row in rows} == {1}


def test_run_that_says_nothing_is_removed_and_the_next_go_on(group: Group) -> None:
    group.ledger()
    nothing = "SELECT does(1) WHERE false"
    inputs = [nothing, "SELECT does(2)", nothing, nothing, "SELECT does(5)"]
    rows = [
        group.database.wait(id, gone=input == nothing)
        for id, input in zip(group.insert(*inputs, delete=True), inputs, strict=True)
    ]
    assert [row.get("output") for row in rows] == [None, "2", None, None, "5"]
    assert group.did() == [2, 5]


# What is the same as in a run that began by itself


INPUTS = [
    "SELECT 1 AS a, 'b' AS b, NULL",
    "SELECT 1; ;",
    "TABLE kept",
    "VALUES (1, 2), (3, 4)",
    "WITH x AS (SELECT 7 AS n) INSERT INTO kept SELECT n FROM x RETURNING n",
    "INSERT INTO kept VALUES (1)",
    "UPDATE kept SET n = n",
    "DELETE FROM kept WHERE n = -1",
    "SELECT 1 AS n INTO TEMP made",
    "SELECT",
    "SELECT 1/0",
    "SELECT missing",
    "SELECT 'й', missing",
    "SELECT FROM WHERE",
    "SELECT 'unterminated",
    "SELECT 1 SELECT 2",
    "SELECT $1",
    "SELECT $1::int",
    "SELECT 1 + $1",
    "INSERT INTO kept VALUES ($1)",
    "SELECT n FROM kept WHERE n = $2",
    "INSERT INTO ruled VALUES (1)",
    "UPDATE ruled SET n = 2",
    "DELETE FROM ruled",
    "INSERT INTO child VALUES (7)",
    "SELECT raises()",
    "SELECT noisy()",
    "SELECT commits()",
    "SELECT isolates()",
    "SELECT reads_only()",
    "SELECT set_config('transaction_isolation', 'serializable', true)",
    "SELECT badly()",
    "SELECT latin()",
    "SELECT orphans()",
    "SELECT late()",
    "INSERT INTO kept SELECT 1 WHERE 'x' = E'\\'' RETURNING 'a;b'",
    "SELECT pg_notify('it', 'x')",
    "SELECT lo_create(0) > 0",
    "SELECT '\\d'",
    "SELECT count(*) FROM pg_prepared_statements WHERE from_sql",
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')",
]


def test_result_is_that_of_the_simple_protocol(group: Group) -> None:
    group.database.execute(
        "CREATE TABLE kept (n int); CREATE TABLE ruled (n int);"
        "CREATE RULE i AS ON INSERT TO ruled DO ALSO SELECT 41 AS rule;"
        "CREATE RULE u AS ON UPDATE TO ruled DO INSTEAD SELECT 42 AS rule;"
        "CREATE RULE d AS ON DELETE TO ruled DO INSTEAD NOTHING;"
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )
    group.function("raises", "RAISE EXCEPTION 'no' USING DETAIL = 'd', HINT = 'h', ERRCODE = '22012';")
    group.function("noisy", "RAISE NOTICE 'one'; RAISE WARNING 'two'; RETURN 3;")
    group.function("commits", "COMMIT; RETURN 3;")
    group.function("isolates", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; RETURN 3;")
    group.function("reads_only", "SET TRANSACTION READ ONLY; RETURN 3;")
    group.function("badly", "EXECUTE 'SELEC'; RETURN 3;")
    group.function("latin", "PERFORM set_config('client_encoding', 'LATIN1', false); RETURN 'й\xe9';", "text")
    group.function("orphans", "INSERT INTO child VALUES (7); RETURN 3;")
    group.function("late", "SET CONSTRAINTS ALL DEFERRED; INSERT INTO child VALUES (8); RETURN 3;")
    for input in INPUTS:
        group.database.execute("TRUNCATE kept, ruled")
        [followed] = group.run(input)
        group.database.execute("TRUNCATE kept, ruled")
        assert text(followed) == text(group.alone(input)), input


def test_failing_run_says_the_same_each_time(group: Group) -> None:
    """Of an input that is tried in two ways, the first is not what is written."""
    rows = group.run(*["SELECT $1::int", "SELECT $1", "SELEC", "SELECT 1 SELECT"] * 2)
    assert [text(row) for row in rows[:4]] == [text(row) for row in rows[4:]]


def test_functions_own_syntax_error_does_not_run_it_twice(group: Group) -> None:
    """What leaves the transaction, as a sequence does, would be done twice; so would an hour's work."""
    group.database.execute("CREATE SEQUENCE tries")
    group.function("badly", "PERFORM nextval('tries'); EXECUTE 'SELEC'; RETURN 3;")
    [row] = group.run("SELECT badly()")
    assert (row["state"], row["code"]) == ("FAIL", "42601")
    assert group.database.execute("SELECT last_value FROM tries") == [(1,)]


def test_functions_own_syntax_error_is_not_turned_into_a_timeout(group: Group) -> None:
    group.function("badly", "PERFORM pg_sleep(1.2); EXECUTE 'SELEC'; RETURN 3;")
    [row] = group.run("SELECT badly()", timeout="2s")
    assert (row["state"], row["code"]) == ("FAIL", "42601")


# What a run leaves, the next does not find

LEFT = """SELECT (SELECT count(*) FROM pg_listening_channels()), (SELECT count(*) FROM pg_cursors WHERE is_holdable),
    (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), to_regclass('pg_temp.t'),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
    current_setting('role'), session_user = current_user, current_setting('search_path'),
    current_setting('statement_timeout'), current_setting('client' || '_encoding'), current_setting('work_mem'),
    current_setting('transaction_isolation'), current_setting('transaction_read_only'),
    current_setting('transaction_deferrable'), current_setting('session_replication_role'),
    current_setting('my.own', true), current_setting('constraint_exclusion')"""


BODIES = [
    "EXECUTE 'LISTEN it';",
    "EXECUTE 'DECLARE c CURSOR WITH HOLD FOR SELECT 1';",
    "EXECUTE 'PREPARE mine AS SELECT 1';",
    "EXECUTE 'CREATE TEMP TABLE t (a int)';",
    "PERFORM pg_advisory_lock(99);",
    "EXECUTE format('SET ROLE %I', session_user);",
    "EXECUTE format('SET SESSION AUTHORIZATION %I', session_user);",
    "EXECUTE 'SET search_path = nowhere';",
    "EXECUTE 'SET statement_timeout = 4321';",
    "PERFORM set_config('client_encoding', 'LATIN1', false);",
    "EXECUTE 'SET work_mem = 77';",
    "EXECUTE 'SET default_transaction_isolation = ''serializable''';",
    "EXECUTE 'SET default_transaction_read_only = on';",
    "EXECUTE 'SET default_transaction_deferrable = on';",
    "EXECUTE 'SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE';",
    "EXECUTE 'SET my.own = 1';",
    "EXECUTE 'DEALLOCATE ALL';",
    "EXECUTE 'SET CONSTRAINTS ALL IMMEDIATE';",
    "EXECUTE 'LISTEN it'; EXECUTE 'PREPARE mine AS SELECT 1';",
]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_run_leaves_the_next_does_not_find(group: Group, fails: bool) -> None:
    for body in BODIES:
        group.function("leaves", f"{body} {'PERFORM 1/0;' if fails else ''} RETURN 3;")
        clean, left, *after = group.run(LEFT, "SELECT leaves()", LEFT, LEFT, "SELECT leaves()", "SELECT 1/0", LEFT)
        assert left["state"] == ("FAIL" if fails else "DONE"), body
        found = [row["output"].replace("\\N", "") for row in (after[0], after[1], after[4])]
        assert found == [clean["output"].replace("\\N", "")] * 3, body
        assert {row["attempt"] for row in (left, *after)} == {1}, body


def test_channel_that_a_run_listened_to_is_left_when_the_next_fails(group: Group) -> None:
    """What the clean-up does in the next run's transaction goes with it."""
    group.function("listens", "EXECUTE 'LISTEN it'; RETURN 3;")
    *_, last = group.run("SELECT listens()", "SELECT 1/0", "SELECT count(*) FROM pg_listening_channels()")
    assert last["output"] == "0"


def test_channel_is_left_when_the_look_at_the_rest_fails(group: Group) -> None:
    """Of our own statements only the one that sees whether anything is left is gone."""
    group.function(
        "listens",
        "EXECUTE 'LISTEN it'; EXECUTE coalesce((SELECT 'DEALLOCATE ' || quote_ident(name) FROM pg_prepared_statements"
        " WHERE statement LIKE '%pg_advisory_unlock_all(),%AND NOT EXISTS%'), 'SELECT 1'); RETURN 3;",
    )
    seen = "SELECT count(*) FROM pg_listening_channels()"
    row, *after = group.run("SELECT listens()", seen, seen)
    assert row["state"] == "DONE", row
    assert [one["output"] for one in after] == ["0", "0"]


@pytest.mark.parametrize("statement", ["BEGIN%", "%''statement_timeout'', $1, false%"])
def test_statement_of_ours_that_a_run_has_dropped_is_not_the_next_ones_error(group: Group, statement: str) -> None:
    group.function(
        "drops",
        "EXECUTE coalesce((SELECT 'DEALLOCATE ' || quote_ident(name) FROM pg_prepared_statements"
        f" WHERE statement LIKE '{statement}' AND statement NOT LIKE '%ISOLATION%'), 'SELECT 1'); RETURN 3;",
    )
    rows = group.run("SELECT drops()", *[GO] * 3, timeout="10s")
    assert [(row["state"], row["error"]) for row in rows] == [("DONE", None)] * 4


def test_text_after_a_run_that_changed_the_encoding_is_whole(group: Group) -> None:
    group.function("latin", "PERFORM set_config('client_encoding', 'LATIN1', false); RETURN 3;")
    group.function("says", "RAISE NOTICE 'ж'; RETURN 3;")
    rows = group.run(
        "SELECT latin()", "SELECT 'й€'", "SELECT latin()", "SELECT says()", "SELECT latin()", "SELECT 'й'::int"
    )
    assert rows[1]["output"] == "й€"
    assert rows[3]["notice"].splitlines()[0] == "NOTICE:  ж"
    assert "й" in rows[5]["error"].splitlines()[0]


# Each run has its own


def test_notices_and_progress_belong_to_the_run_that_said_them(group: Group) -> None:
    group.function("says", "RAISE NOTICE 'of %', current_setting('pg_task.id'); RETURN 3;")
    rows = group.run(*["SELECT says()", GO, "SELECT says() / 0"] * 5)
    said = [f"NOTICE:  of {row['id']}" for row in rows]
    assert [row["notice"] and row["notice"].splitlines()[0] for row in rows] == [
        None if at % 3 == 1 else said[at] for at in range(15)
    ]


def test_limits_of_one_are_not_those_of_the_next(group: Group) -> None:
    shown = "SELECT current_setting('statement_timeout')"
    ids = group.insert(shown)
    with group.database.connect(autocommit=False) as session:
        query = 'INSERT INTO task (input, "group", timeout, delete) VALUES (%s, %s, %s, false) RETURNING id'
        for timeout in ("10s", "0", "20s", "0"):
            for input in (shown, f"{shown} WHERE 1/0 = 1"):
                found = session.execute(query.encode(), [input, "limits", timeout]).fetchone()
                assert found is not None
                ids.append(found[0])
    rows = [group.database.wait(id) for id in ids]
    assert [row["output"] for row in rows[1::2]] == ["10s", "0", "20s", "0"]
    assert {row["state"] for row in rows[2::2]} == {"FAIL"}


def test_timeout_ends_the_run_that_it_is_of_and_the_next_goes_on(group: Group) -> None:
    """The first is still waiting for the lock when its time is over."""
    with held(group.database):
        wait = "SELECT pg_advisory_xact_lock_shared(7000)"
        before, late, after = group.run(GO, wait, GO, timeout="300ms")
    assert [row["state"] for row in (before, late, after)] == ["DONE", "FAIL", "DONE"]
    assert late["code"] == "57014"
    assert "timeout" in late["error"]


WAITS = "SELECT does(2) FROM pg_advisory_xact_lock_shared(7000)"


@pytest.mark.parametrize("how", ["UPDATE task SET state = 'STOP' WHERE id = %s", "DELETE FROM task WHERE id = %s"])
def test_stop_hits_the_run_that_it_is_of(group: Group, how: str) -> None:
    group.ledger()
    with held(group.database):
        a, b, c = group.insert("SELECT does(1)", WAITS, "SELECT does(3)")
        eventually(lambda: runs_waiting(group.database))
        group.database.execute(how, [b])
        last = group.database.wait(c)
    assert (group.database.wait(a)["state"], last["state"], last["attempt"]) == ("DONE", "DONE", 1)
    assert group.did() == [1, 3]


def test_stop_of_a_run_that_ends_well_all_the_same_is_not_the_next_ones_business(own: Group) -> None:
    own.ledger()
    own.function(
        "swallows",
        "BEGIN PERFORM pg_advisory_xact_lock_shared(7000); EXCEPTION WHEN query_canceled THEN NULL; END;"
        " RETURN does(2);",
    )
    with held(own.database):
        a, b, c = own.insert("SELECT does(1)", "SELECT swallows()", "SELECT does(3)")
        eventually(lambda: runs_waiting(own.database))
        own.database.execute("UPDATE task SET state = 'STOP' WHERE id = %s", [b])
        rows = [own.database.wait(id) for id in (a, b, c)]
    assert [row["state"] for row in rows] == ["DONE", "STOP", "DONE"]
    assert own.did() == [1, 3]


def test_whoever_changes_the_row_that_runs_and_then_the_next_meets_no_deadlock(group: Group) -> None:
    with group.database.connect(autocommit=False) as session:
        with held(group.database):
            a, b, c = group.insert(GO, "SELECT 1 FROM pg_advisory_xact_lock_shared(7000)", GO)
            eventually(lambda: runs_waiting(group.database))
            session.execute("UPDATE task SET data = 'b' WHERE id = %s", [b])
        eventually(lambda: group.database.execute("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)])
        session.execute("UPDATE task SET data = 'c' WHERE id = %s", [c])
    rows = [group.database.wait(id) for id in (a, b, c)]
    assert [(row["state"], row["attempt"], row["data"]) for row in rows] == [
        ("DONE", 1, None),
        ("DONE", 1, "b"),
        ("DONE", 1, "c"),
    ]


def test_run_whose_commit_fails_is_alone_in_that(own: Group) -> None:
    """The next was sent behind a commit that never was; it is taken again."""
    own.ledger()
    own.database.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF current_setting('search_path') = 'pg_catalog, pg_temp' THEN RAISE 'at the commit'; END IF; RETURN NULL;"
        " END $$;"
        "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON task DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " WHEN (NEW.input LIKE '%refused%' AND NEW.state = 'DONE') EXECUTE FUNCTION refuse()"
    )
    bad, good = own.run("SELECT does(1) WHERE 'refused' > ''", "SELECT does(2)")
    assert (bad["state"], good["state"], good["attempt"]) == ("FAIL", "DONE", 1)
    assert own.did() == [2]


def test_conflict_at_the_commit_repeats_that_run_only(database: Database, master: Callable[..., Master]) -> None:
    """Two serializable runs, each of which reads what the other writes."""
    database.execute(f"ALTER ROLE \"{database.user}\" SET default_transaction_isolation = 'serializable'")
    database.execute("CREATE TABLE did (what int, n bigint)")
    one = Group(database, master(database.conninfo))
    input = "INSERT INTO did SELECT {0}, count(*) FROM did"
    ids = [
        id
        for which in (1, 2)
        for id in one.insert(*[input.format(which)] * 30, group=f"group {which}", retry=1000, backoff="1ms")
    ]
    rows = [database.wait(id, timeout=60) for id in ids]
    assert {row["state"] for row in rows} == {"DONE"}
    assert database.execute("SELECT what, count(*) FROM did GROUP BY 1 ORDER BY 1") == [(1, 30), (2, 30)]
    # There is an order in which each saw all before it.
    assert [n for (n,) in database.execute("SELECT n FROM did ORDER BY n")] == list(range(60))


@pytest.mark.parametrize(
    "settings",
    [
        {"default_transaction_read_only": "on"},
        {"default_transaction_isolation": "repeatable read"},
        {"default_transaction_isolation": "serializable"},
        {
            "default_transaction_isolation": "serializable",
            "default_transaction_read_only": "on",
            "default_transaction_deferrable": "on",
        },
        {"statement_timeout": "5s"},
        {"idle_in_transaction_session_timeout": "5s"},
    ],
)
def test_defaults_of_the_role_hold_for_a_run_that_follows(
    database: Database, master: Callable[..., Master], settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        database.admin_execute(f"ALTER ROLE \"{database.user}\" SET {name} = '{value}'")
    # The table is there already, and whoever inserts is no subject of these.
    one = master(database.conninfo, wait=True)
    database._kept = database.connect(database.admin)
    names = list(settings)
    shown = "SELECT " + ", ".join(f"current_setting('{n}')" for n in names)
    rows = Group(database, one).run(shown, shown)
    assert [row["output"] for row in rows] == ["\t".join(settings.values())] * 2
    assert {row["attempt"] for row in rows} == {1}


def test_save_and_count_and_other_kinds_between_those_that_follow(group: Group) -> None:
    with group.database.connect(autocommit=False) as session:
        others: list[dict[str, Any]] = [
            {"save": True},
            {"atomic": False},
            {"count": 3},
            {"live": "1 hour"},
            {"batch": 5},
        ]
        ids = []
        for at, other in enumerate(kind for one in others for kind in ({}, one, {})):
            columns = {"delete": False, "group": "kinds", "input": f"SELECT {at}"} | other
            names = ", ".join(f'"{name}"' for name in columns)
            query = f"INSERT INTO task ({names}) VALUES ({', '.join(['%s'] * len(columns))}) RETURNING id"
            found = session.execute(query.encode(), list(columns.values())).fetchone()
            assert found is not None
            ids.append(found[0])
    rows = [group.database.wait(id) for id in ids]
    assert [(row["output"], row["state"], row["attempt"]) for row in rows] == [
        (str(at), "DONE", 1) for at in range(len(ids))
    ]


def test_saved_settings_reach_the_next_run_only(group: Group) -> None:
    shown = "SELECT current_setting('work_mem')"
    with group.database.connect(autocommit=False) as session:
        ids = []
        for input, save in [
            (GO, False),
            ("SELECT set_config('work_mem', '77kB', false)", True),
            (shown, False),
            (shown, False),
        ]:
            query = 'INSERT INTO task (input, "group", save, delete) VALUES (%s, %s, %s, false) RETURNING id'
            found = session.execute(query.encode(), [input, "saved", save]).fetchone()
            assert found is not None
            ids.append(found[0])
    rows = [group.database.wait(id) for id in ids]
    assert rows[2]["output"] == "77kB"
    assert rows[3]["output"] == group.database.execute("SHOW work_mem")[0][0]


# The session ends


def test_run_that_ends_the_session_is_lost_and_the_one_before_is_done_once(own: Group) -> None:
    own.master.may_log_errors = True
    own.ledger()
    killing = "SELECT pg_terminate_backend(pg_backend_pid())"
    rows = own.run("SELECT does(1)", killing, "SELECT does(3)")
    assert [row["state"] for row in rows] == ["DONE", "FAIL", "DONE"]
    assert rows[1]["error"].startswith("ERROR:  run lost 4 times")
    assert (rows[0]["attempt"], rows[2]["attempt"]) == (1, 1)
    assert own.did() == [1, 3]


def test_backend_that_is_killed_while_the_next_runs_costs_that_run_only(own: Group) -> None:
    own.ledger()
    with held(own.database):
        ids = own.insert("SELECT does(1)", WAITS, "SELECT does(3)")
        eventually(lambda: runs_waiting(own.database))
        [(backend,)] = own.database.execute("SELECT pid FROM task WHERE id = %s", [ids[1]])
        own.database.admin_execute("SELECT pg_terminate_backend(%s)", [backend])
        eventually(lambda: (own.database.task(ids[1]) or {})["pid"] != backend)
    rows = [own.database.wait(id) for id in ids]
    assert [(row["state"], row["attempt"]) for row in rows] == [("DONE", 1), ("DONE", 2), ("DONE", 1)]
    assert own.did() == [1, 2, 3]


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [(b"SET CONSTRAINTS ALL IMMEDIATE", b"COMMIT\0"), (b"pgtask_streamed", b"\1pgtask_streamed\0")],
    ids=["of the end", "of the next"],
)
def test_answers_that_do_not_arrive_cost_the_worker_and_not_its_group(
    database: Database, master: Callable[..., Master], new_proxy: Callable[..., Proxy], pattern: bytes, answer: bytes
) -> None:
    """What the server has said is lost while the sockets stay open; only the master can know that it waits."""
    proxy = new_proxy(database.tcp)
    ledger = Ledger(database)
    one = master("--warm", "0", "--safety", "1s", proxy.conninfo, tables=1)
    Group(database, one).function("enters", f"{ENTRY}; RETURN 1;")
    with held(database):
        ledger.fill(1, groups=1, input="SELECT enters() FROM pg_advisory_xact_lock_shared(7000)")
        eventually(lambda: runs_waiting(database))
        ledger.fill(3, groups=1, input="SELECT enters() AS pgtask_streamed")
        trap = proxy.trap(pattern, answer=answer, name="pgtask worker", deaf=True)
    assert trap.sprung.wait(20)
    ledger.settled(60)


# What is large


def test_large_results_and_large_inputs_follow_whole(group: Group) -> None:
    large = "SELECT repeat('x', 20000000)"
    long = f"SELECT length('{'y' * 99000}')"
    rows = group.run(large, long, large, long)
    assert [len(row["output"]) for row in rows] == [20_000_000, 5, 20_000_000, 5]


def test_many_runs_leave_nothing_open_in_libpq(group: Group) -> None:
    rows = group.run(*["SELECT 1 / 0 AS wrong" if at % 7 == 0 else f"SELECT {at}" for at in range(300)])
    assert [row["output"] for row in rows if row["state"] == "DONE"] == [str(at) for at in range(300) if at % 7]
    assert len({row["pid"] for row in rows}) <= 3
