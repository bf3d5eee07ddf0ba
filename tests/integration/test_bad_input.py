"""Whatever a task's input does, its row ends in the right state with an error that helps, and the next task runs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.locks import held, runs_waiting
from tests.fixtures.served import PROBE, Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

SETUP = """
CREATE TABLE effect (what text);
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
"""


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One master for the whole module, with tasks of a plain role."""
    with served(server, tmp_path_factory.mktemp("plain"), setup=SETUP) as one:
        yield one


@pytest.fixture(scope="module")
def super_base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same with tasks of a superuser."""
    with served(server, tmp_path_factory.mktemp("super"), setup=SETUP, superuser=True) as one:
        one.database.execute(f"CREATE ROLE {one.database.name}_other NOLOGIN")
        try:
            yield one
        finally:
            one.database.execute(f"DROP ROLE {one.database.name}_other")


def effects(base: Served, what: str) -> int:
    return int(base.database.execute("SELECT count(*) FROM effect WHERE what = %s", [what])[0][0])


# What fails


@pytest.mark.parametrize(
    ("input", "code", "error"),
    [
        ("SELECT 1/0 AS a", "22012", "ERROR:  division by zero\nSTATEMENT:  SELECT 1/0 AS a"),
        (
            "SELEC 1",
            "42601",
            'ERROR:  syntax error at or near "SELEC" at character 1\nSTATEMENT:  SELEC 1',
        ),
        (
            "SELECT 1;\nSELEC 2",
            "42601",
            'ERROR:  syntax error at or near "SELEC" at character 11\nSTATEMENT:  SELECT 1;\n\tSELEC 2',
        ),
        (
            "SELECT 'й', missing",
            "42703",
            "ERROR:  column \"missing\" does not exist at character 13\nSTATEMENT:  SELECT 'й', missing",
        ),
        (
            "SELECT 'unterminated",
            "42601",
            (
                'ERROR:  unterminated quoted string at or near "\'unterminated" at character 8\n'
                "STATEMENT:  SELECT 'unterminated"
            ),
        ),
        (
            "SELECT 1 /* unterminated",
            "42601",
            (
                'ERROR:  unterminated /* comment at or near "/* unterminated" at character 10\n'
                "STATEMENT:  SELECT 1 /* unterminated"
            ),
        ),
        ("\\d", "42601", 'ERROR:  syntax error at or near "\\" at character 1\nSTATEMENT:  \\d'),
    ],
    ids=["division", "syntax", "second statement", "after non-ASCII", "quote", "comment", "psql command"],
)
def test_sql_that_fails_is_fail_with_the_servers_words(base: Served, input: str, code: str, error: str) -> None:
    row = base.then_next(input)
    assert (row["state"], row["code"], row["error"], row["attempt"]) == ("FAIL", code, error, 1)
    assert row["stop"] >= row["start"]


def test_error_in_a_function_shows_query_and_context(base: Served) -> None:
    row = base.then_next("DO $$BEGIN EXECUTE 'SELECT nothing.there()'; END$$")
    assert row["state"] == "FAIL"
    assert row["error"].splitlines() == [
        'ERROR:  schema "nothing" does not exist at character 8',
        "QUERY:  SELECT nothing.there()",
        "CONTEXT:  PL/pgSQL function inline_code_block line 1 at EXECUTE",
        "STATEMENT:  DO $$BEGIN EXECUTE 'SELECT nothing.there()'; END$$",
    ]


@pytest.mark.parametrize("input", ["", " \n\t", ";", ";;;", "-- only a comment", "/* only a comment */", "--\n"])
def test_input_without_a_statement_is_done_and_says_nothing(base: Served, input: str) -> None:
    row = base.then_next(input, group=f"nothing {input}")
    assert (row["state"], row["output"], row["error"], row["notice"]) == ("DONE", None, None, None)


@pytest.mark.parametrize("atomic", [True, False])
def test_input_without_a_statement_is_removed_if_delete(base: Served, atomic: bool) -> None:
    id = base.database.insert("-- nothing", delete=True, atomic=atomic)
    base.database.wait(id, gone=True)


def test_copy_from_stdin_is_refused(base: Served) -> None:
    row = base.then_next("COPY effect FROM STDIN")
    assert row["state"] == "FAIL"
    assert row["error"].startswith("ERROR:  COPY from stdin failed: COPY FROM STDIN is not supported\nCONTEXT:  ")


def test_statements_after_a_refused_copy_do_not_run(base: Served) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('copy'); COPY effect FROM STDIN; INSERT INTO effect VALUES ('copy')"
    )
    assert (row["state"], effects(base, "copy")) == ("FAIL", 0)


def test_copy_to_stdout_in_binary_format_is_refused(base: Served) -> None:
    row = base.then_next("COPY (SELECT 1) TO STDOUT (FORMAT binary)")
    assert (row["state"], row["code"]) == ("FAIL", "0A000")
    assert "binary format" in row["error"]


def test_deferred_constraint_that_fails_at_the_end_is_the_tasks_error(base: Served) -> None:
    row = base.then_next("INSERT INTO child VALUES (7)")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "23503", 1)
    assert row["error"].splitlines()[0].startswith('ERROR:  insert or update on table "child" violates foreign key')
    assert row["error"].splitlines()[-1] == "STATEMENT:  INSERT INTO child VALUES (7)"
    assert base.database.execute("SELECT count(*) FROM child") == [(0,)]


def test_deferred_constraint_that_fails_without_our_transaction_is_the_tasks_error(base: Served) -> None:
    row = base.then_next("INSERT INTO child VALUES (8)", atomic=False)
    assert (row["state"], row["code"]) == ("FAIL", "23503")


def test_deferred_constraint_that_holds_at_the_end_is_no_error(base: Served) -> None:
    row = base.then_next("INSERT INTO child VALUES (9); INSERT INTO parent VALUES (9)")
    assert (row["state"], row["output"]) == ("DONE", "INSERT 0 1\nINSERT 0 1")


def test_deferred_work_runs_with_the_tasks_own_settings(base: Served) -> None:
    base.database.execute(
        "CREATE TABLE deferred (id int);"
        "CREATE FUNCTION deferred() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN INSERT INTO effect VALUES (current_setting('my.own')); RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER deferred AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION deferred()"
    )
    row = base.then_next("SET my.own = 'deferred'; INSERT INTO deferred VALUES (1)")
    assert (row["state"], row["error"], effects(base, "deferred")) == ("DONE", None, 1)


# The session's end


def test_task_that_ends_its_own_session_fails_when_it_was_lost_too_often(base: Served) -> None:
    row = base.then_next("SELECT pg_terminate_backend(pg_backend_pid())", lost=True)
    assert (row["state"], row["attempt"]) == ("FAIL", 4)
    lines = row["error"].splitlines()
    assert lines[0] == "ERROR:  run lost 4 times"
    assert [line[:12] for line in lines if not line.startswith("\t")][1:-1] == [f"LOST:  run {n}" for n in range(1, 5)]
    assert "terminating connection due to administrator command" in row["error"]
    assert lines[-1] == "STATEMENT:  SELECT pg_terminate_backend(pg_backend_pid())"


def test_work_of_a_session_that_ended_is_undone(base: Served) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('ended'); SELECT pg_terminate_backend(pg_backend_pid())", lost=True
    )
    assert (row["state"], effects(base, "ended")) == ("FAIL", 0)


# Transactions


@pytest.mark.parametrize(
    ("input", "output", "count"),
    [
        ("INSERT INTO effect VALUES ('{}'); ROLLBACK", "INSERT 0 1\nROLLBACK", 0),
        ("ROLLBACK; INSERT INTO effect VALUES ('{}')", "ROLLBACK\nINSERT 0 1", 1),
        ("INSERT INTO effect VALUES ('{}'); COMMIT", "INSERT 0 1\nCOMMIT", 1),
        (
            "INSERT INTO effect VALUES ('{}'); COMMIT; INSERT INTO effect VALUES ('{}')",
            "INSERT 0 1\nCOMMIT\nINSERT 0 1",
            2,
        ),
        ("BEGIN; INSERT INTO effect VALUES ('{}')", "BEGIN\nINSERT 0 1", 1),
        ("BEGIN; INSERT INTO effect VALUES ('{}'); COMMIT", "BEGIN\nINSERT 0 1\nCOMMIT", 1),
        ("BEGIN; INSERT INTO effect VALUES ('{}'); ROLLBACK", "BEGIN\nINSERT 0 1\nROLLBACK", 0),
        ("COMMIT; BEGIN; INSERT INTO effect VALUES ('{}')", "COMMIT\nBEGIN\nINSERT 0 1", 1),
        ("COMMIT AND CHAIN; INSERT INTO effect VALUES ('{}')", "COMMIT\nINSERT 0 1", 1),
        ("SAVEPOINT pgtask; INSERT INTO effect VALUES ('{}')", "SAVEPOINT\nINSERT 0 1", 1),
        (
            "SAVEPOINT a; INSERT INTO effect VALUES ('{}'); ROLLBACK TO a; INSERT INTO effect VALUES ('{}')",
            "SAVEPOINT\nINSERT 0 1\nROLLBACK\nINSERT 0 1",
            1,
        ),
    ],
)
@pytest.mark.parametrize("delete", [False, True])
def test_transaction_commands_do_what_they_say(base: Served, input: str, output: str, count: int, delete: bool) -> None:
    mark = f"{hash(input)} {delete}"
    row = base.then_next(input.format(mark, mark), delete=delete, group=f"transaction {mark}")
    assert (row["state"], row["output"], row["error"], row["attempt"]) == ("DONE", output, None, 1)
    assert effects(base, mark) == count


def test_rollback_alone_is_done(base: Served) -> None:
    assert base.then_next("ROLLBACK")["state"] == "DONE"


def test_commit_alone_is_done(base: Served) -> None:
    assert base.then_next("COMMIT")["state"] == "DONE"


def test_error_after_a_commit_of_the_tasks_own_keeps_what_was_committed(base: Served) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('kept'); COMMIT; INSERT INTO effect VALUES ('lost'); SELECT 1/0")
    assert (row["state"], row["output"]) == ("FAIL", "INSERT 0 1\nCOMMIT\nINSERT 0 1")
    assert (effects(base, "kept"), effects(base, "lost")) == (1, 0)


def test_open_transaction_of_a_task_that_is_not_atomic_is_committed(base: Served) -> None:
    row = base.then_next("BEGIN; INSERT INTO effect VALUES ('left open')", atomic=False)
    assert (row["state"], effects(base, "left open")) == ("DONE", 1)


def test_transaction_that_is_left_aborted_is_fail_and_undone(base: Served) -> None:
    row = base.then_next("BEGIN; INSERT INTO effect VALUES ('aborted'); SELECT 1/0", atomic=False)
    assert (row["state"], row["code"], effects(base, "aborted")) == ("FAIL", "22012", 0)


def test_prepared_transaction_is_done(base: Served) -> None:
    name = base.database.name
    row = base.then_next(f"INSERT INTO effect VALUES ('two phases'); PREPARE TRANSACTION '{name}'")
    assert (row["state"], row["output"]) == ("DONE", "INSERT 0 1\nPREPARE TRANSACTION")
    base.database.execute(f"COMMIT PREPARED '{name}'")
    assert effects(base, "two phases") == 1


@pytest.mark.parametrize(
    "input",
    [
        "SET TRANSACTION READ ONLY",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ],
)
def test_kind_of_transaction_is_the_tasks_own(base: Served, input: str) -> None:
    row = base.then_next(f"{input}; SELECT 1")
    assert (row["state"], row["output"], row["attempt"]) == ("DONE", "SET\n1", 1)


def test_isolation_that_the_task_chose_holds_and_its_work_is_kept(base: Served) -> None:
    row = base.then_next(
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; INSERT INTO effect VALUES ('serializable');"
        " SELECT current_setting('transaction_isolation')"
    )
    assert (row["state"], row["output"]) == ("DONE", "SET\nINSERT 0 1\nserializable")
    assert effects(base, "serializable") == 1


def test_write_in_a_transaction_that_the_task_made_read_only_fails(base: Served) -> None:
    row = base.then_next("SET TRANSACTION READ ONLY; INSERT INTO effect VALUES ('read only')")
    assert (row["state"], row["code"]) == ("FAIL", "25006")


def test_row_changed_by_another_does_not_lose_a_serializable_run(base: Served) -> None:
    database = base.database
    with held(base.database, 77):
        id, following = base.insert_pair(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; INSERT INTO effect VALUES ('snapshot');"
            " SELECT pg_advisory_xact_lock(77)",
            group="snapshot",
        )
        database.wait(id, "WORK")
        eventually(lambda: runs_waiting(base.database))
        database.execute("UPDATE task SET data = 'changed' WHERE id = %s", [id])
    row, after = database.wait(id), database.wait(following)
    assert (row["state"], row["data"], effects(base, "snapshot")) == ("DONE", "changed", 1)
    assert json.loads(after["output"]) == base.clean


def test_row_stopped_without_a_word_undoes_a_run_whose_snapshot_is_older(base: Served) -> None:
    """Without triggers nobody is told: only the finish finds out, and by a serialization failure at that."""
    database = base.database
    with held(base.database, 76):
        id, following = base.insert_pair(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; INSERT INTO effect VALUES ('stopped');"
            " SELECT pg_advisory_xact_lock(76)",
            group="stopped snapshot",
        )
        eventually(lambda: runs_waiting(base.database))
        stop = "SET session_replication_role = replica; UPDATE public.task SET state = 'STOP' WHERE id = "
        database.admin_execute(f"{stop}{id}")
    assert database.wait(following)["state"] == "DONE"
    row = database.task(id)
    assert row is not None
    assert (row["state"], effects(base, "stopped")) == ("STOP", 0)


# Settings


@pytest.mark.parametrize(
    "setting",
    [
        "default_transaction_read_only = on",
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "statement_timeout = 20000",
        "lock_timeout = 1",
        "search_path = nowhere",
        "search_path = ''",
        "client_min_messages = error",
        "datestyle = 'sql, dmy'",
        "timezone = 'Asia/Tokyo'",
        "standard_conforming_strings = off",
        "backslash_quote = off",
        "bytea_output = 'escape'",
        "intervalstyle = 'iso_8601'",
        "extra_float_digits = -15",
        "row_security = off",
        "synchronous_commit = off",
        "work_mem = '64kB'",
        "enable_indexscan = off",
        "jit_above_cost = 0",
        "plan_cache_mode = 'force_custom_plan'",
        "check_function_bodies = off",
        "transform_null_equals = on",
        "array_nulls = off",
        "application_name = 'somebody else'",
        "pg_task.id = 'not a number'",
        "pg_task.delete = 'not a boolean'",
        "default_tablespace = ''",
        "default_table_access_method = 'heap'",
        "constraint_exclusion = on",
    ],
)
@pytest.mark.parametrize("repeat", [False, True], ids=["once", "repeated"])
def test_setting_of_a_task_costs_it_nothing_and_ends_with_it(base: Served, setting: str, repeat: bool) -> None:
    columns: dict[str, Any] = {"repeat": "1 year"} if repeat else {}
    row = base.then_next(f"SET {setting}", group=f"{setting} {repeat}", **columns)
    assert (row["state"], row["output"], row["error"], row["attempt"]) == ("DONE", "SET", None, 1)
    if repeat:
        [(state, delete)] = base.database.execute(
            'SELECT state::text, "delete" FROM task WHERE parent = %s', [row["id"]]
        )
        assert (state, delete) == ("PLAN", False)
        base.database.execute("DELETE FROM task WHERE parent = %s", [row["id"]])


@pytest.mark.parametrize(
    "setting",
    ["default_transaction_read_only = on", "default_transaction_isolation = 'serializable'", "search_path = nowhere"],
)
def test_setting_that_is_saved_holds_for_the_next_task_only(base: Served, setting: str) -> None:
    group = f"saved {setting}"
    name = setting.partition(" ")[0]
    ids = [
        base.database.insert(f"SET {setting}", group=group, save=True, delete=False),
        base.database.insert(f"SHOW {name}", group=group, delete=False),
        base.database.insert(f"SHOW {name}", group=group, delete=False),
    ]
    rows = [base.database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE"] * 3
    assert rows[1]["output"] == setting.rpartition(" ")[2].strip("'")
    assert rows[2]["output"] != rows[1]["output"]


def test_statement_timeout_that_the_task_sets_is_its_own_error(base: Served) -> None:
    row = base.then_next("SET statement_timeout = 1; SELECT pg_sleep(10)")
    assert (row["state"], row["code"]) == ("FAIL", "57014")
    assert row["error"].startswith("ERROR:  canceling statement due to statement timeout\nSTATEMENT:  ")


def test_short_statement_timeout_does_not_cost_a_large_result(base: Served) -> None:
    for _ in range(5):
        row = base.then_next("SELECT repeat('x', 10000000); SET statement_timeout = 100", group="large")
        assert (row["state"], len(row["output"])) == ("DONE", 10000004)


def test_local_settings_cost_nothing_either(base: Served) -> None:
    row = base.then_next(
        "SET LOCAL statement_timeout = 20000; SET LOCAL search_path = nowhere; SET LOCAL lock_timeout = 1"
    )
    assert (row["state"], row["output"]) == ("DONE", "SET\nSET\nSET")


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "SJIS", "GB18030", "SQL_ASCII", "UTF8"])
def test_client_encoding_of_a_task_does_not_change_what_it_said(base: Served, encoding: str) -> None:
    text = {"EUC_JP": "日本語", "SJIS": "日本語", "GB18030": "中文 é"}.get(encoding, "é ÿ £")
    row = base.then_next(f"SET client_encoding = '{encoding}'; SELECT '{text}' AS a", group=encoding)
    assert (row["state"], row["output"]) == ("DONE", f"SET\n{text}")


def test_client_encoding_changed_between_results_changes_none_of_them(base: Served) -> None:
    row = base.then_next("SELECT 'é1'; SET client_encoding = 'LATIN1'; SELECT 'é2'")
    assert (row["state"], row["output"]) == ("DONE", "é1\nSET\né2")


def test_text_in_an_encoding_that_nobody_can_know_costs_the_task_nothing_else(base: Served) -> None:
    row = base.then_next(
        "INSERT INTO effect VALUES ('encodings'); SELECT 'é1'; SET client_encoding = 'LATIN1'; SELECT 'é2';"
        " RESET client_encoding; SELECT 'é3'"
    )
    assert (row["state"], row["output"]) == ("DONE", "INSERT 0 1\né1\nSET\n\ufffd2\nRESET\né3")
    assert effects(base, "encodings") == 1


def test_client_encoding_of_a_task_does_not_change_its_error(base: Served) -> None:
    row = base.then_next("SET client_encoding = 'LATIN1'; DO $$BEGIN RAISE NOTICE 'né'; RAISE 'naïve é'; END$$")
    # The server does not say which encoding this is in: the setting was undone together with the transaction.
    assert (row["state"], row["code"]) == ("FAIL", "P0001")
    assert row["error"].splitlines()[0] == "ERROR:  na\ufffdve \ufffd"
    assert row["error"].splitlines()[-1].endswith("RAISE 'naïve é'; END$$")
    assert row["notice"].splitlines()[0] == "NOTICE:  n\ufffd"


def test_saved_client_encoding_reads_the_next_input_rightly(base: Served) -> None:
    ids = [
        base.database.insert("SET client_encoding = 'LATIN1'", group="latin", save=True, delete=False),
        base.database.insert("SELECT 'é'", group="latin", delete=False),
    ]
    assert [base.database.wait(id)["output"] for id in ids] == ["SET", "é"]


# Names that shadow ours

FUNCTIONS = (
    "bad_text(text, text) RETURNS text",
    "bad_number(bigint, bigint) RETURNS bigint",
    "bad_sum(double precision, double precision) RETURNS double precision",
    "bad_division(integer, bigint) RETURNS bigint",
    "set_config(text, text, boolean) RETURNS text",
    "current_setting(text) RETURNS text",
    "current_setting(text, boolean) RETURNS text",
    "clock_timestamp() RETURNS timestamptz",
    "statement_timestamp() RETURNS timestamptz",
    "hashtextextended(text, bigint) RETURNS bigint",
    "date_part(text, interval) RETURNS double precision",
    "date_part(text, timestamptz) RETURNS double precision",
    "pg_backend_pid() RETURNS integer",
    "pg_notify(text, text) RETURNS void",
    "pg_try_advisory_xact_lock_shared(integer, integer) RETURNS boolean",
    "pg_advisory_unlock_all() RETURNS void",
    "quote_ident(text) RETURNS text",
    "concat_ws(text, text, text, text, text, bigint) RETURNS text",
    "length(text) RETURNS integer",
    "has_table_privilege(oid, text) RETURNS boolean",
)
BODY = "LANGUAGE plpgsql AS $$BEGIN RAISE 'shadowed function'; END$$"
SHADOW = """
CREATE SCHEMA shadow;
FUNCTIONS;
DO $do$
DECLARE
    operator text;
    type text;
BEGIN
    FOREACH type IN ARRAY ARRAY['bigint', 'integer', 'text', 'oid', 'name', 'timestamptz', 'interval',
            'double precision', 'boolean', 'public.state', '"char"'] LOOP
        EXECUTE format('CREATE FUNCTION shadow.bad(%s, %1$s) RETURNS boolean LANGUAGE plpgsql'
            ' AS $$BEGIN RAISE ''shadowed operator''; END$$', type);
        FOREACH operator IN ARRAY ARRAY['=', '<>', '<', '<=', '>', '>='] LOOP
            EXECUTE format('CREATE OPERATOR shadow.%s (LEFTARG = %s, RIGHTARG = %2$s, FUNCTION = shadow.bad)',
                operator, type);
        END LOOP;
    END LOOP;
END
$do$;
CREATE OPERATOR shadow.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = shadow.bad_text);
CREATE OPERATOR shadow.- (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = shadow.bad_number);
CREATE OPERATOR shadow.+ (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = shadow.bad_number);
CREATE OPERATOR shadow.- (LEFTARG = double precision, RIGHTARG = double precision, FUNCTION = shadow.bad_sum);
CREATE OPERATOR shadow./ (LEFTARG = integer, RIGHTARG = bigint, FUNCTION = shadow.bad_division);
CREATE AGGREGATE shadow.count(*) (SFUNC = int8inc, STYPE = bigint, INITCOND = '0');
CREATE DOMAIN shadow.text AS integer;
CREATE DOMAIN shadow.oid AS boolean;
CREATE DOMAIN shadow.state AS integer;
CREATE TABLE shadow.pg_settings (name bigint);
CREATE TABLE shadow.pg_class (name bigint);
CREATE TABLE shadow.pg_prepared_statements (name bigint);
CREATE TABLE shadow.task (id bigint);
CREATE TABLE shadow.task_master (term bigint);
""".replace("FUNCTIONS", ";\n".join(f"CREATE FUNCTION shadow.{one} {BODY}" for one in FUNCTIONS))


@pytest.fixture(scope="module")
def shadowed(base: Served) -> Served:
    base.database.execute(SHADOW)
    return base


PATHS = ["shadow, pg_catalog, public", "shadow, public", "shadow, pg_catalog, public, pg_temp"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "columns", [{}, {"repeat": "1 year"}, {"atomic": False}], ids=["plain", "repeat", "not atomic"]
)
def test_search_path_that_shadows_our_names_redirects_nothing(
    shadowed: Served, path: str, columns: dict[str, Any]
) -> None:
    mark = f"{path} {columns}"
    row = shadowed.then_next(
        f"SET search_path = {path}; INSERT INTO public.effect VALUES ('{mark.replace(chr(39), '')}')",
        group=mark,
        **columns,
    )
    assert (row["state"], row["error"], row["output"]) == ("DONE", None, "SET\nINSERT 0 1")
    assert effects(shadowed, mark.replace("'", "")) == 1
    if "repeat" in columns:
        assert shadowed.database.execute("DELETE FROM task WHERE parent = %s RETURNING state::text", [row["id"]]) == [
            ("PLAN",)
        ]


@pytest.mark.parametrize("path", PATHS)
def test_task_inserted_under_a_shadowing_search_path_is_planned_and_runs(shadowed: Served, path: str) -> None:
    """The inserter's own triggers and defaults are ours too: they must not be redirected either."""
    session = shadowed.database.connect()
    session.execute(f"SET search_path = {path}".encode())
    [(id,)] = session.execute(
        "INSERT INTO public.task (input, \"delete\") VALUES ('SELECT 1', false) RETURNING id"
    ).fetchall()
    assert shadowed.database.wait(id)["state"] == "DONE"


@pytest.mark.parametrize("path", PATHS)
def test_task_that_inserts_under_a_shadowing_search_path_and_repeats(shadowed: Served, path: str) -> None:
    """The trigger function is first called, and so compiled, under the task's search_path; ours is used after it."""
    row = shadowed.then_next(
        f"SET search_path = {path}; INSERT INTO public.task (input, plan) VALUES ('SELECT', 'infinity')",
        group=f"compile {path}",
        repeat="1 year",
    )
    assert (row["state"], row["error"]) == ("DONE", None)
    assert len(shadowed.database.execute("DELETE FROM task WHERE parent = %s RETURNING id", [row["id"]])) == 2


def test_search_path_of_the_role_that_shadows_our_names_redirects_nothing(
    server: AnyServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By ALTER ROLE it holds in every new session, the master's and the workers', from before the table is there."""
    setup = "CREATE TYPE public.state AS ENUM ('PLAN'); " + SHADOW + "DROP TYPE public.state CASCADE;" + SETUP
    with served(server, tmp_path_factory.mktemp("role"), setup=setup) as one:
        database = one.database
        for path in PATHS:
            database.execute(f'ALTER ROLE "{database.user}" SET search_path = {path}')
            one.clean = one.probe()
            assert one.clean["search_path"] == path
            eventually(lambda: not one.master.workers())
            row = one.then_next("INSERT INTO public.effect VALUES ('role')", group=f"role {path}", repeat="1 year")
            assert (row["state"], row["error"]) == ("DONE", None)
            row = one.then_next("SELECT 1 OPERATOR(pg_catalog./) 0", group=f"role error {path}")
            assert row["code"] == "22012"
        assert effects(one, "role") == 3


# Rights


def test_set_role_of_a_task_ends_with_it(super_base: Served) -> None:
    other = f"{super_base.database.name}_other"
    row = super_base.then_next(f"SET ROLE {other}; SELECT current_user")
    assert (row["state"], row["output"]) == ("DONE", f"SET\n{other}")


def test_set_session_authorization_of_a_task_ends_with_it(super_base: Served) -> None:
    other = f"{super_base.database.name}_other"
    row = super_base.then_next(f"SET SESSION AUTHORIZATION {other}; SELECT session_user")
    assert (row["state"], row["output"]) == ("DONE", f"SET\n{other}")


@pytest.mark.parametrize("kind", ["ROLE", "SESSION AUTHORIZATION"])
def test_saved_role_holds_for_the_next_task_and_costs_nothing(super_base: Served, kind: str) -> None:
    other = f"{super_base.database.name}_other"
    group = f"saved {kind}"
    ids = [
        super_base.database.insert(f"SET {kind} {other}", group=group, save=True, delete=False),
        super_base.database.insert("SELECT current_user", group=group, delete=False, save=True),
        super_base.database.insert("SELECT current_user", group=group, delete=False),
        super_base.database.insert(PROBE, group=group, delete=False),
    ]
    rows = [super_base.database.wait(id) for id in ids]
    assert [row["state"] for row in rows] == ["DONE"] * 4
    assert [row["output"] for row in rows[1:3]] == [other, other]
    assert json.loads(rows[3]["output"]) == super_base.clean


def test_session_replication_role_of_a_task_ends_with_it(super_base: Served) -> None:
    row = super_base.then_next("SET session_replication_role = replica", repeat="1 year")
    assert (row["state"], row["output"]) == ("DONE", "SET")
    super_base.database.execute("DELETE FROM task WHERE parent = %s", [row["id"]])


def test_saved_session_replication_role_loses_no_wake_up(super_base: Served) -> None:
    """The next row's insert must wake a sleeping master though the task has turned triggers off."""
    database = super_base.database
    id = database.insert(
        "SET session_replication_role = replica", save=True, delete=False, repeat="2 seconds", group="replica"
    )
    database.wait(id)
    [(following,)] = database.execute("SELECT id FROM task WHERE parent = %s", [id])
    database.wait(following)
    database.execute("DELETE FROM task WHERE \"group\" = 'replica' AND state = 'PLAN'")
    eventually(lambda: database.execute("DELETE FROM task WHERE \"group\" = 'replica' RETURNING id"))


def test_set_role_without_the_right_fails(base: Served) -> None:
    row = base.then_next("SET ROLE postgres")
    assert (row["state"], row["code"]) == ("FAIL", "42501")


# What our statements need


@pytest.mark.parametrize(
    "input",
    [
        "DISCARD ALL",
        "discard  all;",
        "/* comment */ DISCARD ALL",
        "DEALLOCATE ALL",
        "DO $$BEGIN EXECUTE 'DEALLOCATE ALL'; END$$",
        "DISCARD PLANS",
        "DISCARD TEMP",
        "DISCARD SEQUENCES",
        "RESET ALL",
        "CLOSE ALL",
        "UNLISTEN *",
        "SELECT pg_advisory_unlock_all()",
        "DEALLOCATE ALL; ROLLBACK",
        "DEALLOCATE ALL; COMMIT",
    ],
)
@pytest.mark.parametrize("save", [False, True])
def test_task_that_throws_away_what_a_session_holds_is_done(base: Served, input: str, save: bool) -> None:
    row = base.then_next(input, group=f"{input} {save}", save=save)
    assert (row["state"], row["error"], row["attempt"]) == ("DONE", None, 1)


def test_statements_dropped_before_an_error_cost_nothing(base: Served) -> None:
    row = base.then_next("DEALLOCATE ALL; SELECT 1/0")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "22012", 1)


def test_statements_dropped_before_a_vacuum_cost_nothing(base: Served) -> None:
    row = base.then_next("DEALLOCATE ALL; VACUUM effect", group="dropped before a vacuum")
    assert (row["state"], row["code"], row["attempt"]) == ("FAIL", "25001", 1)


def test_input_that_committed_before_an_error_is_not_run_again(base: Served) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('once'); COMMIT; VACUUM effect")
    assert (row["state"], row["code"], effects(base, "once")) == ("FAIL", "25001", 1)


def test_statements_dropped_by_a_procedure_that_commits_cost_nothing(base: Served) -> None:
    row = base.then_next("DO $$BEGIN EXECUTE 'DEALLOCATE ALL'; INSERT INTO effect VALUES ('dropped'); COMMIT; END$$")
    assert (row["state"], row["output"], effects(base, "dropped")) == ("DONE", "DO", 1)


def test_effect_of_a_task_that_dropped_our_statements_is_kept(base: Served) -> None:
    row = base.then_next("INSERT INTO effect VALUES ('deallocated'); DEALLOCATE ALL")
    assert (row["state"], effects(base, "deallocated")) == ("DONE", 1)


LEFTOVERS = """
PREPARE mine AS SELECT 1;
DECLARE mine CURSOR WITH HOLD FOR SELECT 1;
LISTEN mine;
CREATE TEMPORARY TABLE mine (id int);
CREATE TEMPORARY SEQUENCE counter;
SELECT nextval('counter');
SELECT pg_advisory_lock(4711);
SET my.own = 'value';
SET work_mem = '1MB'
"""


def test_leftovers_of_a_task_are_not_seen_by_the_next(base: Served) -> None:
    assert base.then_next(LEFTOVERS)["state"] == "DONE"
    row = base.then_next(LEFTOVERS)
    assert row["state"] == "DONE", "nothing may be left that collides"


def test_leftovers_of_a_task_that_failed_are_not_seen_by_the_next(base: Served) -> None:
    assert base.then_next(f"{LEFTOVERS}; COMMIT; SELECT 1/0", group="failed leftovers")["state"] == "FAIL"


def test_leftovers_of_a_task_that_is_not_atomic_are_not_seen_by_the_next(base: Served) -> None:
    assert base.then_next(LEFTOVERS, atomic=False, group="leftovers not atomic")["state"] == "DONE"


@pytest.mark.parametrize("atomic", [True, False])
def test_leftovers_are_seen_by_the_next_task_with_save(base: Served, atomic: bool) -> None:
    database, group = base.database, f"leftovers saved {atomic}"
    ids = [
        database.insert(LEFTOVERS, group=group, save=True, delete=False, atomic=atomic),
        database.insert(
            "EXECUTE mine; FETCH ALL FROM mine; SELECT pg_listening_channels(); SELECT count(*) FROM mine;"
            " SELECT currval('counter'); SELECT pg_advisory_unlock(4711); SHOW my.own; SHOW work_mem",
            group=group,
            delete=False,
            atomic=atomic,
        ),
        database.insert(PROBE, group=group, delete=False),
    ]
    rows = [database.wait(id) for id in ids]
    assert rows[1]["output"] == "1\n1\nmine\n0\n1\nt\nvalue\n1MB", rows[1]["error"]
    assert json.loads(rows[2]["output"]) == base.clean


def test_task_sees_a_clean_session_after_one_that_listened_and_notified(base: Served) -> None:
    row = base.then_next("LISTEN x; NOTIFY x, 'payload'; NOTIFY x, 'again'")
    assert (row["state"], row["output"]) == ("DONE", "LISTEN\nNOTIFY\nNOTIFY")


def test_temporary_objects_that_shadow_ours_redirect_nothing(base: Served) -> None:
    row = base.then_next(
        "CREATE TEMP TABLE task (id bigint); CREATE TEMP TABLE task_master (term bigint);"
        " CREATE TEMP TABLE pg_settings (name text); CREATE DOMAIN pg_temp.state AS int;"
        " CREATE DOMAIN pg_temp.text AS int",
        repeat="1 year",
    )
    assert (row["state"], row["error"]) == ("DONE", None)
    base.database.execute("DELETE FROM task WHERE parent = %s", [row["id"]])


# The task's own row and table


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM task WHERE id = current_setting('pg_task.id')::bigint",
        "UPDATE task SET state = 'STOP' WHERE id = current_setting('pg_task.id')::bigint",
        "UPDATE task SET state = 'PLAN' WHERE id = current_setting('pg_task.id')::bigint",
        "UPDATE task SET pid = 1 WHERE id = current_setting('pg_task.id')::bigint",
        "UPDATE task SET id = -id WHERE id = current_setting('pg_task.id')::bigint",
        "UPDATE task SET attempt = 100 WHERE id = current_setting('pg_task.id')::bigint",
    ],
)
def test_task_that_takes_its_own_row_away_is_undone_and_fails(base: Served, change: str) -> None:
    row = base.then_next(f"INSERT INTO effect VALUES ('own row'); {change}")
    assert (row["state"], row["attempt"], effects(base, "own row")) == ("FAIL", 1, 0)
    assert "its row is kept from the scheduler" in row["error"]
    assert row["error"].splitlines()[-1].startswith("STATEMENT:  ")


def test_task_that_sets_its_own_data_keeps_it(base: Served) -> None:
    row = base.then_next("UPDATE task SET data = 'mine' WHERE id = current_setting('pg_task.id')::bigint")
    assert (row["state"], row["data"]) == ("DONE", "mine")


def test_task_that_deletes_its_own_row_and_commits_leaves_nothing(base: Served) -> None:
    id = base.database.insert(
        "INSERT INTO effect VALUES ('deleted');"
        " DELETE FROM task WHERE id = current_setting('pg_task.id')::bigint; COMMIT"
    )
    base.database.wait(id, gone=True)
    assert effects(base, "deleted") == 1
    base.then_next("SELECT 1", group="after a deleted one")


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE task",
        "DROP TABLE task; CREATE TABLE task (id bigint)",
        "ALTER TABLE task RENAME TO elsewhere",
        "ALTER TABLE task DROP COLUMN output",
        "ALTER TABLE task DISABLE ROW LEVEL SECURITY; ALTER TABLE task ALTER COLUMN state TYPE text",
        "DROP TABLE task_master",
        "ALTER SCHEMA public RENAME TO elsewhere",
        "REVOKE ALL ON task FROM CURRENT_USER",
    ],
)
def test_task_that_breaks_its_own_table_is_undone_and_fails(base: Served, change: str) -> None:
    if "SCHEMA" in change:
        base.database.admin_execute(f'ALTER SCHEMA public OWNER TO "{base.database.user}"')
    row = base.then_next(change)
    assert (row["state"], row["attempt"]) == ("FAIL", 1)
    assert "STATEMENT:  " in row["error"]


def test_columns_that_a_task_adds_are_kept(base: Served) -> None:
    row = base.then_next("ALTER TABLE task ADD COLUMN mine text DEFAULT 'x'", repeat="1 year")
    assert (row["state"], row["error"]) == ("DONE", None)
    assert base.database.execute("DELETE FROM task WHERE parent = %s RETURNING mine", [row["id"]]) == [("x",)]
    row = base.then_next("ALTER TABLE task DROP COLUMN mine", repeat="1 year")
    assert (row["state"], row["error"]) == ("DONE", None)
    base.database.execute("DELETE FROM task WHERE parent = %s", [row["id"]])


def test_table_that_is_dropped_for_good_is_made_again_and_serves(
    server: AnyServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served(server, tmp_path_factory.mktemp("dropped"), setup=SETUP) as one:
        database = one.database
        database.insert("DROP TABLE task; DROP TABLE task_master; COMMIT")
        one.master.wait_log(r"schema_changed.*create table public\.task\"", 2)
        one.master.wait_log(r"\bleading\b.*table=", 2)
        one.master.wait_log(r"run_disowned|worker_ended")  # the run that did it is over
        one.then_next("SELECT 1")
        one.master.may_log_errors = True


def test_truncated_table_serves_on(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(server, tmp_path_factory.mktemp("truncated"), setup=SETUP) as one:
        one.database.insert("TRUNCATE task; INSERT INTO effect VALUES ('truncated'); COMMIT")
        eventually(lambda: effects(one, "truncated"))
        one.then_next("SELECT 1")


def test_row_changed_while_it_runs_keeps_the_change(base: Served) -> None:
    database = base.database
    with held(base.database, 78):
        id, following = base.insert_pair("SELECT pg_advisory_xact_lock(78)", group="changed")
        database.wait(id, "WORK")
        database.execute("UPDATE task SET data = 'changed', header = false, quote = 'x' WHERE id = %s", [id])
    row, after = database.wait(id), database.wait(following)
    assert (row["state"], row["data"], row["quote"]) == ("DONE", "changed", "x")
    assert json.loads(after["output"]) == base.clean


def test_row_moved_to_another_group_while_it_runs_ends_as_it_began(base: Served) -> None:
    database = base.database
    with held(base.database, 79):
        id, following = base.insert_pair("SELECT pg_advisory_xact_lock(79)", group="moved")
        database.wait(id, "WORK")
        database.execute("UPDATE task SET \"group\" = 'moved away' WHERE id = %s", [id])
    row, after = database.wait(id), database.wait(following)
    assert (row["state"], row["group"], after["state"]) == ("DONE", "moved away", "DONE")


def test_row_locked_by_somebody_while_it_ends_is_finished_when_he_lets_go(base: Served) -> None:
    database = base.database
    input = "INSERT INTO effect VALUES ('locked'); SELECT pg_advisory_xact_lock(80)"
    with held(base.database, 80):
        id, following = base.insert_pair(input, group="locked")
        database.wait(id, "WORK")
        other = database.connect(autocommit=False)
        other.execute("UPDATE task SET data = 'locked' WHERE id = %s", [id])
    row_lock = "SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
    eventually(lambda: database.execute(row_lock))
    other.commit()
    row, after = database.wait(id), database.wait(following)
    assert (row["state"], row["data"], effects(base, "locked")) == ("DONE", "locked", 1)
    assert after["state"] == "DONE"
