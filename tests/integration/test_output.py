"""Results and errors of real tasks, character for character."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from signal import SIGKILL
from typing import Any

import psycopg
import pytest

from tests.fixtures.database import Database, create, drop
from tests.fixtures.locks import WAIT, held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.monitor import Monitor
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

Run = Callable[..., dict[str, Any]]
CSV = {"delimiter": ",", "quote": '"', "escape": '"'}
PERSON = "('it''s', 1, 1.5, NULL, true)"


def output(row: dict[str, Any]) -> str | None:
    assert row["state"] == "DONE", row["error"]
    assert row["error"] is None
    return row["output"]


def error(row: dict[str, Any]) -> list[str]:
    assert row["state"] == "FAIL", row
    assert row["error"].endswith("STATEMENT:  " + row["input"].replace("\n", "\n\t"))
    return row["error"][: -len("\nSTATEMENT:  " + row["input"].replace("\n", "\n\t"))].split("\n")


@pytest.mark.parametrize(
    ("input", "columns", "expected"),
    [
        ("SELECT 1 AS a", {}, "1"),
        ("SELECT 1 AS a, 2 AS b", {}, "a\tb\n1\t2"),
        ("SELECT 1 AS a, 2 AS b; SELECT 3 AS c", {}, "a\tb\n1\t2\n3"),
        ("SELECT 3 AS c; SELECT 1 AS a, 2 AS b", {}, "3\na\tb\n1\t2"),
        ("SELECT g, g * 2 AS h FROM generate_series(1, 3) AS g", {}, "g\th\n1\t2\n2\t4\n3\t6"),
        ("SELECT g, g * 2 AS h FROM generate_series(1, 3) AS g", {"header": False}, "1\t2\n2\t4\n3\t6"),
        ("SELECT 1, 2", {}, "?column?\t?column?\n1\t2"),
        ("SELECT 1, 2 WHERE false", {}, None),
        ("SELECT 1 WHERE false", {}, None),
        ("SELECT 1 WHERE false; SELECT 2", {}, "2"),
        ("SELECT", {}, ""),
        ("SELECT FROM generate_series(1, 3)", {}, "\n\n"),
        ("SELECT ''", {}, ""),
        ("SELECT ''; SELECT ''", {}, "\n"),
        ("SELECT E'a\\n'; SELECT 'b'", {}, "a\n\nb"),
        ("SELECT E'a\\n'", {}, "a\n"),
        ("SELECT NULL", {}, "\\N"),
        ("SELECT NULL", {"null": ""}, ""),
        ("SELECT NULL, 1", {"null": "none", **CSV}, '"?column?","?column?"\nnone,1'),
        ("SELECT 1 AS a, 2 AS b", {"delimiter": ","}, "a,b\n1,2"),
        ("SELECT 1 AS a, 2 AS b", {"delimiter": ""}, "ab\n12"),
        ("SELECT 1 AS a, 2 AS b", {"delimiter": "\n"}, "a\nb\n1\n2"),
        ("SELECT 'a\"b\\c' AS t", {"quote": '"', "escape": "\\"}, '"a\\"b\\\\c"'),
        ("SELECT 'a\"b\\c' AS t", {"quote": '"'}, '"a"b\\c"'),
        ("SELECT 'a\"b\\c' AS t", {"escape": "\\"}, 'a"b\\c'),
        ('SELECT \'a"b\' AS "x""y", 1 AS z', CSV, '"x""y","z"\n"a""b",1'),
        (f"SELECT * FROM (VALUES {PERSON}) AS v (a, b, c, d, e)", CSV, '"a","b","c","d","e"\n"it\'s",1,1.5,\\N,t'),
        (
            f"SELECT * FROM (VALUES {PERSON}) AS v (a, b, c, d, e)",
            {**CSV, "string": False},
            '"a","b","c","d","e"\n"it\'s","1","1.5",\\N,"t"',
        ),
        (
            "SELECT B'1'::bit, 'x'::char(1), 1::oid, '(0,1)'::tid, 1::int2, 1::int8, 1::float4, 1::float8, '7'::xid",
            {"quote": "'", "header": False},
            "1\t'x'\t1\t(0,1)\t1\t1\t1\t1\t7",
        ),
        (
            "SELECT B'1'::varbit, '{1}'::int[], '2001-02-03'::date, 1::money, '1 s'::interval, '\\x00'::bytea",
            {"quote": "'", "header": False, "delimiter": " "},
            "'1' '{1}' '2001-02-03' '$1.00' '00:00:01' '\\x00'",
        ),
        ("SELECT 1.0::float8 / 3, 1e300::float8, 'NaN'::float8", {"header": False}, "0.3333333333333333\t1e+300\tNaN"),
        ("VALUES (1), (2)", {}, "1\n2"),
        ("SHOW transaction_isolation", {}, "read committed"),
        ("EXPLAIN (COSTS off) SELECT 1", {}, "Result"),
        ("", {}, None),
        (";;", {}, None),
        ("-- only a comment", {}, None),
        ("/* only a comment */", {}, None),
        ("SELECT 'grün 日本語 \U0001f600'", {}, "grün 日本語 \U0001f600"),
        ("SELECT 1 AS größe, 2 AS 名前", {}, "größe\t名前\n1\t2"),
    ],
)
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "apart"])
def test_result_is_written(run: Run, input: str, columns: dict[str, Any], expected: str | None, atomic: bool) -> None:
    assert output(run(input, atomic=atomic, **columns)) == expected


@pytest.mark.parametrize(
    ("input", "expected"),
    [
        ("CREATE TABLE {t} (a int)", "CREATE TABLE"),
        ("CREATE TABLE {t} (a int); INSERT INTO {t} VALUES (1), (2), (3)", "CREATE TABLE\nINSERT 0 3"),
        ("CREATE TABLE {t} AS SELECT 1 AS a UNION SELECT 2; UPDATE {t} SET a = a", "SELECT 2\nUPDATE 2"),
        ("CREATE TABLE {t} (a int); DELETE FROM {t}", "CREATE TABLE\nDELETE 0"),
        ("CREATE TABLE {t} (a int); INSERT INTO {t} VALUES (1), (2) RETURNING a", "CREATE TABLE\n1\n2\nINSERT 0 2"),
        (
            "CREATE TABLE {t} (a int, b text); INSERT INTO {t} VALUES (1, 'x') RETURNING *",
            "CREATE TABLE\na\tb\n1\tx\nINSERT 0 1",
        ),
        ("CREATE TABLE {t} (a int, b int); DELETE FROM {t} RETURNING *", "CREATE TABLE\nDELETE 0"),
        ("CREATE TABLE {t} (a int); WITH x AS (DELETE FROM {t} RETURNING a) SELECT a FROM x", "CREATE TABLE"),
        ("SET work_mem = '1MB'", "SET"),
        ("SELECT 1; SET work_mem = '1MB'; SELECT 2", "1\nSET\n2"),
        ("DO 'BEGIN END'", "DO"),
        (
            "DECLARE c CURSOR FOR SELECT generate_series(1, 5); MOVE 2 FROM c; FETCH 2 FROM c",
            "DECLARE CURSOR\nMOVE 2\n3\n4",
        ),
        ("PREPARE p AS SELECT 1; EXECUTE p; DEALLOCATE p", "PREPARE\n1\nDEALLOCATE"),
        ("BEGIN; SELECT 1; COMMIT", "BEGIN\n1\nCOMMIT"),
        ("SELECT 1; COMMIT; SELECT 2; BEGIN; SELECT 3", "1\nCOMMIT\n2\nBEGIN\n3"),
        ("SAVEPOINT a; SELECT 1; ROLLBACK TO a", "SAVEPOINT\n1\nROLLBACK"),
    ],
)
def test_statement_without_rows_writes_its_tag(run: Run, input: str, expected: str) -> None:
    assert output(run(input.format(t=f"t_{secrets.token_hex(6)}"))) == expected


def test_vacuum_writes_its_tag(run: Run, served: Database) -> None:
    served.execute("CREATE TABLE vacuumed (a int)")
    assert output(run("VACUUM vacuumed")) == "VACUUM"
    assert output(run("/* not seen at once */ VACUUM vacuumed")) == "VACUUM"


def test_silent_task_is_removed_and_a_talking_one_is_kept(served: Database) -> None:
    silent = [served.insert(input) for input in ("SELECT 1 WHERE false", "", "-- nothing", "COPY (SELECT) TO STDOUT")]
    kept = [served.insert(input) for input in ("SELECT ''", "SET work_mem = '1MB'", "SELECT 1/0")]
    for id in kept:
        served.wait(id)
    for id in silent[:3]:
        assert served.wait(id, gone=True) == {}


def test_copy_to_stdout_is_kept_as_it_comes(run: Run) -> None:
    assert output(run("COPY (SELECT 1, E'a\\tb' UNION ALL SELECT 2, NULL) TO STDOUT")) == "1\ta\\tb\n2\t\\N\n"
    assert output(run("COPY (SELECT 1 AS a, 'x,y' AS b) TO STDOUT (FORMAT csv, HEADER)")) == 'a,b\n1,"x,y"\n'
    assert output(run("COPY (SELECT 1) TO STDOUT", **CSV)) == "1\n"
    assert output(run("COPY (SELECT 1 WHERE false) TO STDOUT")) is None
    assert output(run("SELECT 0; COPY (SELECT 1) TO STDOUT; COPY (SELECT 2) TO STDOUT; SELECT 3")) == "0\n1\n2\n3"
    assert output(run("COPY (SELECT '') TO STDOUT (FORMAT csv); SET work_mem = '1MB'")) == '""\nSET'


@pytest.mark.parametrize("format", ["text", "csv"])
def test_copy_of_many_rows_is_kept_to_the_last(run: Run, format: str) -> None:
    row = run(f"COPY (SELECT g, repeat('x', 50) FROM generate_series(1, 100000) AS g) TO STDOUT (FORMAT {format})")
    between = "\t" if format == "text" else ","
    assert output(row) == "".join(f"{n}{between}{'x' * 50}\n" for n in range(1, 100001))
    assert (row["stop"] - row["start"]).total_seconds() < 20


def test_many_rows_are_kept_to_the_last(run: Run) -> None:
    row = run("SELECT g, -g AS h FROM generate_series(1, 100000) AS g")
    assert output(row) == "g\th\n" + "\n".join(f"{n}\t{-n}" for n in range(1, 100001))


def test_binary_copy_is_refused_and_its_work_undone(run: Run, served: Database) -> None:
    served.execute("CREATE TABLE copied (a int)")
    row = run("INSERT INTO copied VALUES (1); COPY (SELECT 1) TO STDOUT (FORMAT binary)")
    assert error(row) == [
        "ERROR:  COPY to stdout in binary format cannot be stored as text",
        "HINT:  Use the text or csv format.",
    ]
    assert row["code"] == "0A000"
    assert served.execute("SELECT * FROM copied") == []


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "apart"])
def test_copy_from_stdin_is_refused(run: Run, served: Database, atomic: bool) -> None:
    served.execute("CREATE TABLE IF NOT EXISTS filled (a int)")
    row = run("SELECT 1; COPY filled FROM STDIN; SELECT 2", atomic=atomic)
    assert error(row) == [
        "ERROR:  COPY from stdin failed: COPY FROM STDIN is not supported",
        "CONTEXT:  COPY filled, line 1",
    ]
    assert (row["code"], row["output"]) == ("57014", "1")
    assert output(run("SELECT 3")) == "3"


@pytest.mark.parametrize(
    ("input", "code", "lines"),
    [
        ("SELECT 1/0 AS a", "22012", ["ERROR:  division by zero"]),
        ("SELECT nope", "42703", ['ERROR:  column "nope" does not exist at character 8']),
        ("SELEC 1", "42601", ['ERROR:  syntax error at or near "SELEC" at character 1']),
        ("SELECT 1 +", "42601", ["ERROR:  syntax error at end of input at character 11"]),
        ("SELECT 1; SELECT 2; SELEC 3", "42601", ['ERROR:  syntax error at or near "SELEC" at character 21']),
        ("SELECT 1;\n\nSELECT nope", "42703", ['ERROR:  column "nope" does not exist at character 19']),
        ("SELECT 'äöü日本', nope", "42703", ['ERROR:  column "nope" does not exist at character 17']),
        ("SELECT 'x'::int", "22P02", ['ERROR:  invalid input syntax for type integer: "x" at character 8']),
        ("SELECT größe", "42703", ['ERROR:  column "größe" does not exist at character 8']),
        (
            "SELECT nope()",
            "42883",
            [
                "ERROR:  function nope() does not exist at character 8",
                ...,
            ],
        ),
        (
            "CREATE TEMP TABLE u (a int PRIMARY KEY) ON COMMIT DROP; INSERT INTO u VALUES (1), (1)",
            "23505",
            [
                'ERROR:  duplicate key value violates unique constraint "u_pkey"',
                "DETAIL:  Key (a)=(1) already exists.",
            ],
        ),
        (
            "DO 'BEGIN RAISE EXCEPTION E''one\\ntwo'' USING DETAIL = E''three\\nfour'', HINT = ''five''; END'",
            "P0001",
            [
                "ERROR:  one",
                "\ttwo",
                "DETAIL:  three",
                "\tfour",
                "HINT:  five",
                "CONTEXT:  PL/pgSQL function inline_code_block line 1 at RAISE",
            ],
        ),
        (
            "DO 'BEGIN EXECUTE ''SELECT 1 +''; END'",
            "42601",
            [
                "ERROR:  syntax error at end of input at character 11",
                "QUERY:  SELECT 1 +",
                "CONTEXT:  PL/pgSQL function inline_code_block line 1 at EXECUTE",
            ],
        ),
        (
            "DO $$\nBEGIN\n\tPERFORM 1/0;\nEND\n$$",
            "22012",
            [
                "ERROR:  division by zero",
                'CONTEXT:  SQL statement "SELECT 1/0"',
                "\tPL/pgSQL function inline_code_block line 3 at PERFORM",
            ],
        ),
        ("DO $$ BEGIN RAISE SQLSTATE 'ZZ123' USING MESSAGE = 'mine'; END $$", "ZZ123", ["ERROR:  mine", ...]),
    ],
)
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "apart"])
def test_error_is_written(run: Run, input: str, code: str, lines: list[Any], atomic: bool) -> None:
    row = run(input, atomic=atomic)
    said = error(row)
    if lines[-1] is ...:  # what follows is not the same in every version
        said[len(lines) - 1 :] = [...]
    assert said == lines
    assert row["code"] == code


def test_statement_line_is_the_whole_input(run: Run) -> None:
    row = run("SELECT 1;\nSELECT 1/0;\n\n-- end\n")
    assert row["error"] == "ERROR:  division by zero\nSTATEMENT:  SELECT 1;\n\tSELECT 1/0;\n\t\n\t-- end\n\t"


def test_results_before_the_error_are_kept(run: Run) -> None:
    row = run("SELECT 1 AS a, 2 AS b; SELECT 3; SELECT 1/0; SELECT 4")
    assert error(row) == ["ERROR:  division by zero"]
    assert row["output"] == "a\tb\n1\t2\n3"


def test_error_in_the_middle_of_a_result_keeps_no_part_of_it(run: Run) -> None:
    row = run("SELECT 1; SELECT 1 / (3 - g) FROM generate_series(1, 5) AS g")
    assert (row["state"], row["output"]) == ("FAIL", "1")


def test_error_in_the_middle_of_a_copy_keeps_what_came(run: Run) -> None:
    row = run("COPY (SELECT 10 / (3 - g) FROM generate_series(1, 5) AS g) TO STDOUT")
    assert error(row) == ["ERROR:  division by zero"]
    assert row["output"] == "5\n10\n"


def test_deferred_constraint_fails_the_task_when_it_is_committed(run: Run, served: Database) -> None:
    served.execute("CREATE TABLE late (a int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    row = run("INSERT INTO late VALUES (1), (1)")
    assert error(row) == [
        'ERROR:  duplicate key value violates unique constraint "late_a_key"',
        "DETAIL:  Key (a)=(1) already exists.",
    ]
    assert row["code"] == "23505"
    assert served.execute("SELECT * FROM late") == []


def test_notices_are_kept_and_do_not_count_as_errors(run: Run) -> None:
    row = run("DO $$ BEGIN RAISE NOTICE 'one'; RAISE WARNING E'two\\nthree' USING HINT = 'four'; END $$")
    context = "CONTEXT:  PL/pgSQL function inline_code_block line 1 at RAISE"
    assert output(row) == "DO"
    assert row["notice"] == f"NOTICE:  one\n{context}\nWARNING:  two\n\tthree\nHINT:  four\n{context}"
    assert row["code"] is None


def test_notices_of_the_server_are_kept(run: Run) -> None:
    assert run("DROP TABLE IF EXISTS never_there")["notice"] == 'NOTICE:  table "never_there" does not exist, skipping'
    assert run("SELECT 1")["notice"] is None


def test_task_s_own_begin_is_not_warned_of(run: Run) -> None:
    assert run("BEGIN; SELECT 1; COMMIT")["notice"] is None


def test_notice_that_the_task_silenced_is_not_kept(run: Run) -> None:
    assert run("SET client_min_messages = error; DROP TABLE IF EXISTS never_there")["notice"] is None


def test_notices_of_a_failed_run_are_kept(run: Run) -> None:
    row = run("DROP TABLE IF EXISTS never_there; SELECT 1/0")
    assert (row["state"], row["notice"]) == ("FAIL", 'NOTICE:  table "never_there" does not exist, skipping')


def test_flood_of_notices_is_cut(run: Run) -> None:
    row = run("DO $$ BEGIN FOR i IN 1..300 LOOP RAISE NOTICE '%', repeat('x', 10000); END LOOP; END $$")
    assert row["state"] == "DONE"
    assert 900_000 < len(row["notice"]) < 1_100_000
    assert row["notice"].endswith("\nNOTICE:  more notices were left out")


def test_ten_megabytes_of_input_are_run(run: Run) -> None:
    row = run("SELECT length('" + "x" * 10_000_000 + "')")
    assert output(row) == "10000000"


def test_ten_megabytes_of_output_and_of_a_failing_input_are_kept(run: Run) -> None:
    assert output(run("SELECT repeat('äb', 5000000)")) == "äb" * 5_000_000
    row = run("SELECT length('" + "x" * 10_000_000 + "'); SELECT 1/0")
    assert error(row) == ["ERROR:  division by zero"]
    assert row["output"] == "10000000"


def test_delimiter_that_is_no_character_is_replaced(run: Run) -> None:
    delimiter = psycopg.sql.SQL('(-1)::"char"')
    assert output(run("SELECT 1 AS a, 2 AS b", delimiter=delimiter)) == "a\ufffdb\n1\ufffd2"
    assert output(run("SELECT 1 AS a", delimiter=delimiter)) == "1"


def test_task_that_changes_its_client_encoding_is_written_in_the_server_s(run: Run) -> None:
    assert output(run("SET client_encoding = latin1; SELECT chr(228) || 'x'")) == "SET\näx"
    assert output(run("SELECT chr(228)")) == "ä"


def test_error_in_an_encoding_that_was_rolled_back_with_it_is_kept_as_far_as_it_can_be_read(run: Run) -> None:
    # The server tells of a changed client_encoding after the query, and of this one never.
    row = run("SET client_encoding = latin1; DO $$ BEGIN RAISE EXCEPTION '%', chr(228); END $$")
    assert (row["code"], error(row)[0]) == ("P0001", "ERROR:  \ufffd")
    assert output(run("SELECT chr(228)")) == "ä"


@contextlib.contextmanager
def encoded_database(server: AnyServer, encoding: str) -> Iterator[Database]:
    """A database in another encoding than the server's usual one."""
    name = f"test_{secrets.token_hex(6)}"
    database = Database(server, name, name)
    create(database)
    with psycopg.connect(server.conninfo(), autocommit=True) as session:
        session.execute(f"DROP DATABASE {name}".encode())
        text = f"CREATE DATABASE {name} OWNER {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
        session.execute(text.encode())
    try:
        yield database
    finally:
        database.close()
        drop(database)


def test_latin1_database_keeps_every_text(server: AnyServer, master: Callable[..., Master]) -> None:
    with encoded_database(server, "LATIN1") as database:
        one = master(database.conninfo)
        session = database.connect(client_encoding="utf8")
        cases = {
            "SELECT 'äöü', 'é' AS größe": ("DONE", "?column?\tgröße\näöü\té", None),
            "SELECT größe": ("FAIL", None, 'ERROR:  column "größe" does not exist at character 8'),
            "SELECT 'äöü', nope": ("FAIL", None, 'ERROR:  column "nope" does not exist at character 15'),
            "SET client_encoding = utf8; SELECT 'x' || chr(228)": ("DONE", "SET\nxä", None),
        }
        query = "INSERT INTO task (input, \"group\", delete) VALUES (%s, 'müll', false) RETURNING id"
        ids = {session.execute(query, [input]).fetchall()[0][0]: input for input in cases}
        for id, input in ids.items():
            database.wait(id)
            [(state, said, why)] = session.execute("SELECT state::text, output, error FROM task WHERE id = %s", [id])
            expected = cases[input]
            told = None if expected[2] is None else f"{expected[2]}\nSTATEMENT:  {input}"
            assert (state, said, why) == (*expected[:2], told)
        one.stop()


def test_sql_ascii_database_keeps_every_byte(server: AnyServer, master: Callable[..., Master]) -> None:
    with encoded_database(server, "SQL_ASCII") as database:
        one = master(database.conninfo)
        session = database.connect(client_encoding="sql_ascii")

        def insert(input: bytes) -> int:
            query = b"INSERT INTO task (input, \"group\", delete) VALUES ($$%s$$, '\xfc', false) RETURNING id" % input
            return session.execute(query).fetchall()[0][0]

        def text(id: int, column: str) -> bytes:
            query = f"SELECT state::text, convert_to({column}, 'SQL_ASCII') FROM task WHERE id = {id}"
            return session.execute(query.encode()).fetchall()[0][1]

        good, bad = insert(b"SELECT '\xff\xe4', '\xc3\xa4'"), insert(b"SELECT '\xff', nope")
        query = f"SELECT count(stop) FROM task WHERE id IN ({good}, {bad})".encode()
        eventually(lambda: session.execute(query).fetchall() == [(2,)])
        assert text(good, "output") == b"?column?\t?column?\n\xff\xe4\t\xc3\xa4"
        assert text(bad, "error") == (
            b"ERROR:  column \"nope\" does not exist at character 13\nSTATEMENT:  SELECT '\xff', nope"
        )
        one.stop()


@pytest.mark.parametrize(("encoding", "group"), [("SQL_ASCII", r"\xff"), ("WIN1252", r"\x81")])
def test_group_that_is_no_text_in_utf8_is_rescued_and_counted_like_any_other(
    server: AnyServer, master: Callable[..., Master], encoding: str, group: str
) -> None:
    monitor = Monitor()
    with encoded_database(server, encoding) as database:
        one = master("--listen", monitor.listen, "--crashes", "0", database.conninfo)
        one.may_log_errors = True  # of the worker that is killed
        one.wait_log("monitor_listening")
        session = database.connect(client_encoding=encoding)
        with held(database):
            session.execute(f"INSERT INTO task (input, \"group\") VALUES ('{WAIT}', E'{group}')".encode())
            wait_runs(database)
            monitor.wait_value("pgtask_group_slots_in_use", 1, "\ufffd")
            [worker] = one.workers()
            os.kill(worker, SIGKILL)
            [line] = one.wait_log(" task_failed ")
            assert "group=\ufffd " in line
        # The master says it before it commits.
        eventually(lambda: session.execute("SELECT state::text FROM task").fetchall() in ([("FAIL",)], [(b"FAIL",)]))
        assert not one.logged("table_down")
        one.stop()
