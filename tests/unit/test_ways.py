"""Which way an input goes down: none may end a transaction that is not its own alone, or notice what it follows."""

from typing import Any

import pytest

from pgtask.output import Format
from pgtask.store import Task
from pgtask.worker.ours import array
from pgtask.worker.ways import Way, Ways, way


@pytest.mark.parametrize(
    "input",
    [
        b"SELECT 1",
        b"select 1 ;\n",
        b"\n  INSERT INTO log VALUES (1)",
        b"WITH a AS (SELECT CASE WHEN true THEN 1 END) SELECT * FROM a",
        b"DO $$ BEGIN PERFORM 1; COMMIT; END $$",  # which the server refuses in a block
        b"CALL commits()",
        b"SELECT 1; COMMIT; SELECT 2",  # which it refuses as two statements in one
        b"SELECT 1 -- ; COMMIT",
    ],
)
def test_single_statements_go_down_together(input: bytes) -> None:
    assert way(input) is Way.PIPELINE


@pytest.mark.parametrize(
    "input",
    [
        b"SELECT 1; SELECT 2",
        b"SELECT set_config('client_encoding', 'LATIN1', false)",
        b"-- a comment\nSELECT 1",
        b"/* a /* nested */ one */ SELECT 1",
        b"ANALYZE t",
        b"SET work_mem = '1MB'; SELECT 1",
        b"COPY t TO STDOUT",
        b"EXECUTE something",
        b"selected",
        b"",
    ],
)
def test_what_has_no_word_that_ends_a_transaction_goes_down_as_it_is(input: bytes) -> None:
    assert way(input) is Way.QUERY


@pytest.mark.parametrize(
    "input",
    [
        b"COMMIT",
        b"commit and chain",
        b"END",
        b"ABORT",
        b"rollback to savepoint pgtask",
        b"RELEASE pgtask",
        b"SAVEPOINT pgtask",
        b"PREPARE TRANSACTION 'x'",
        b"BEGIN; SELECT 1",
        b"START TRANSACTION",
        b"/* SELECT 1 */ COMMIT",
        b"SET CONSTRAINTS ALL IMMEDIATE",
        b"DO $$ BEGIN SET CONSTRAINTS ALL IMMEDIATE; END $$",
        b"/* /* */ SELECT */ COMMIT",
        b"-- SELECT\nCOMMIT",
        b"ANALYZE t;COMMIT;",
        b"TRUNCATE t;\tEnD",
        b"SET client_encoding = 'UTF8'; COMMIT",
        b"SELECT set_config('client_encoding', 'UTF8', true); COMMIT",
        "SET a.b = 'é'; COMMIT".encode("latin-1"),
    ],
)
def test_what_could_end_a_transaction_shares_none(input: bytes) -> None:
    assert way(input) is Way.ALONE


def task(input: bytes, **columns: Any) -> Task:
    """A row as most are."""
    format = Format(header=False, string=True, delimiter=b"\t", escape=b"", quote=b"", null=b"\\N")
    plain = {"group": b"g", "remote": None, "timeout_ms": 0, "max": 0, "plan": b"", "delete": False, "save": False}
    more = {"atomic": True, "repeated": False, "batch": 1, "aging": False, "name": b""}
    return Task(**({"id": 1, "attempt": 1, "input": input, "format": format} | plain | more | columns))


@pytest.mark.parametrize("input", [b"SELECT 1", b" values (1) ;\n", b"TABLE t", b"WITH a AS (TABLE t) SELECT * FROM a"])
def test_single_queries_follow_right_behind_another(input: bytes) -> None:
    assert Ways().follows(task(input))


@pytest.mark.parametrize(
    ("input", "columns"),
    [
        (b"SELECT 1; SELECT 2", {}),
        (b"SELECT 1; COMMIT", {}),
        (b"SELECT 1 -- ; nothing", {}),
        (b"SELECT $1", {}),
        (b"SELECT f('SET CONSTRAINTS ALL IMMEDIATE')", {}),
        (b"INSERT INTO t VALUES (1)", {}),  # a rule may add a query, whose rows belong into the output
        (b"WITH a AS (SELECT 1)\nINSERT INTO t TABLE a", {}),
        (b"CALL p()", {}),  # it may set the isolation level of a transaction that has not read anything
        (b"DO 'BEGIN END'", {}),
        (b"SET work_mem = '1MB'", {}),
        (b"COPY t TO STDOUT", {}),
        (b"VACUUM t", {}),
        (b"SELECT set_config('client_encoding', 'LATIN1', false)", {}),
        (b"SELECT '" + b"x" * 100_000 + b"'", {}),
        (b"SELECT 1", {"atomic": False}),
        (b"SELECT 1", {"save": True}),
        (b"SELECT 1", {"repeated": True}),
        (b"SELECT 1", {"remote": b"dbname=other"}),
        (b"SELECT 1", {"batch": 5}),
        (b"SELECT 1", {"aging": True}),
    ],
)
def test_what_takes_more_or_would_notice_does_not_follow(input: bytes, columns: dict[str, Any]) -> None:
    assert not Ways().follows(task(input, **columns))


def test_what_was_refused_once_is_remembered_and_all_is_forgotten_at_some_time() -> None:
    ways, one, two = Ways(), task(b"SELECT a"), task(b"SELECT b", batch=9)
    ways.run_bare(one)
    ways.run_alone(two)
    assert (ways.bare(one), ways.follows(one), ways.shares(one, most_ms=1)) == (True, False, False)
    assert (ways.bare(two), ways.follows(two._replace(batch=1)), ways.shares(two, most_ms=1)) == (False, True, False)
    for number in range(1000):
        ways.run_alone(task(b"SELECT %d" % number))
    assert ways.shares(two, most_ms=1)
    assert not ways.follows(one)


def test_a_timeout_that_the_others_would_not_leave_it_keeps_a_task_apart() -> None:
    assert [Ways().shares(task(b"SELECT 1", batch=9, timeout_ms=ms), most_ms=20) for ms in (0, 20, 21)] == [
        True,
        False,
        True,
    ]


def test_array_keeps_every_byte() -> None:
    assert array([]) == b"{}"
    assert array([None, b"", b"NULL", b'a"b\\c', b"{,}\n\xe9"]) == b'{NULL,"","NULL","a\\"b\\\\c","{,}\n\xe9"}'
