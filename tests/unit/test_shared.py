"""Which way an input goes down that shares its transaction: none may end it."""

import pytest

from pgtask.worker.ours import array
from pgtask.worker.shared import Way, way


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


def test_array_keeps_every_byte() -> None:
    assert array([]) == b"{}"
    assert array([None, b"", b"NULL", b'a"b\\c', b"{,}\n\xe9"]) == b'{NULL,"","NULL","a\\"b\\\\c","{,}\n\xe9"}'
