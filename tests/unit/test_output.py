"""Results and errors as text, without a server: every rule on its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pgtask.output import NOT_STRINGS, Error, Format, Output, statement_line

TEXT, INT4 = 25, 23
PLAIN = Format()
CSV = Format(delimiter=b",", quote=b'"', escape=b'"')


@dataclass(kw_only=True)
class Result:
    """What the server answered: names and types of the columns, the rows, and the tag."""

    names: Sequence[bytes] = (b"a",)
    types: Sequence[int] = ()
    rows: Sequence[Sequence[bytes | None]] = ()
    command_status: bytes | None = b"SELECT 1"
    ntuples: int = field(init=False)
    nfields: int = field(init=False)

    def __post_init__(self) -> None:
        self.ntuples, self.nfields = len(self.rows), len(self.names)

    def fname(self, column_number: int) -> bytes:
        return self.names[column_number]

    def ftype(self, column_number: int) -> int:
        return self.types[column_number] if self.types else TEXT

    def get_value(self, row_number: int, column_number: int) -> bytes | None:
        return self.rows[row_number][column_number]


def written(*results: Result, format: Format = PLAIN) -> bytes | None:
    output = Output(format)
    for result in results:
        output.add_rows(result)
    return output.text


def pair(*rows: Sequence[bytes | None], names: Sequence[bytes] = (b"a", b"b"), types: Sequence[int] = ()) -> Result:
    return Result(names=names, types=types, rows=rows)


def test_one_column_is_written_without_header() -> None:
    assert written(Result(rows=[[b"1"], [b"2"]])) == b"1\n2"


def test_several_columns_have_a_header_and_the_delimiter_between() -> None:
    assert written(pair([b"1", b"2"], [b"3", b"4"])) == b"a\tb\n1\t2\n3\t4"


def test_header_can_be_left_out() -> None:
    assert written(pair([b"1", b"2"]), format=Format(header=False)) == b"1\t2"


def test_result_without_rows_has_no_header_and_says_nothing() -> None:
    assert written(Result()) is None
    assert written(pair()) is None


def test_results_follow_each_other_each_with_its_own_header() -> None:
    results = pair([b"1", b"2"]), Result(rows=[[b"3"]]), pair([b"4", b"5"], names=(b"c", b"d"))
    assert written(*results) == b"a\tb\n1\t2\n3\nc\td\n4\t5"


def test_result_without_rows_between_others_leaves_no_blank_line() -> None:
    assert written(Result(rows=[[b"1"]]), Result(), Result(rows=[[b"2"]])) == b"1\n2"


def test_empty_value_is_a_line_of_its_own_and_not_nothing() -> None:
    assert written(Result(rows=[[b""]])) == b""
    assert written(Result(rows=[[b""], [b""]])) == b"\n"
    assert written(Result(rows=[[b""]]), Result(rows=[[b"1"]])) == b"\n1"


def test_row_without_columns_is_an_empty_line() -> None:
    assert written(Result(names=(), rows=[[], []])) == b"\n"


def test_value_that_ends_in_a_newline_keeps_it() -> None:
    assert written(Result(rows=[[b"a\n"]]), Result(rows=[[b"b"]])) == b"a\n\nb"


def test_null_is_written_as_configured_and_never_quoted() -> None:
    assert written(pair([None, b"x"])) == b"a\tb\n\\N\tx"
    assert written(Result(rows=[[None]]), format=Format(null=b"")) == b""
    assert written(pair([None, b"x"]), format=Format(null=b"NULL", quote=b'"')) == b'"a"\t"b"\nNULL\t"x"'


@pytest.mark.parametrize(
    ("format", "value", "text"),
    [
        (Format(), b'a"b', b'a"b'),
        (Format(escape=b"\\"), b'a"b\\c', b'a"b\\c'),
        (Format(quote=b'"'), b'a"b\\c', b'"a"b\\c"'),
        (Format(quote=b'"', escape=b"\\"), b'a"b\\c', b'"a\\"b\\\\c"'),
        (Format(quote=b'"', escape=b'"'), b'a"b', b'"a""b"'),
        (Format(quote=b"'", escape=b"'"), b"''", b"''''''"),
        (Format(quote=b'"', escape=b"\\"), b"", b'""'),
        (Format(quote=b'"', escape=b"\\"), b"a\nb", b'"a\nb"'),
        (Format(quote=b'"', escape=b"\\"), b'\\"', b'"\\\\\\""'),
    ],
)
def test_quote_and_escape(format: Format, value: bytes, text: bytes) -> None:
    assert written(Result(rows=[[value]]), format=format) == text


def test_only_strings_are_quoted_by_default() -> None:
    format = Format(quote=b'"', delimiter=b",")
    assert written(pair([b"1", b"x"], types=(INT4, TEXT)), format=format) == b'"a","b"\n1,"x"'


def test_every_value_is_quoted_without_string() -> None:
    format = Format(quote=b'"', delimiter=b",", string=False)
    assert written(pair([b"1", b"x"], types=(INT4, TEXT)), format=format) == b'"a","b"\n"1","x"'


@pytest.mark.parametrize("type", sorted(NOT_STRINGS))
def test_numbers_bits_and_booleans_are_no_strings(type: int) -> None:
    assert written(Result(types=[type], rows=[[b"1"]]), format=Format(quote=b'"')) == b"1"


@pytest.mark.parametrize("type", [25, 1043, 17, 114, 1082, 1114, 1184, 2950, 1562, 790, 1186, 1007, 0])
def test_everything_else_is_a_string(type: int) -> None:
    assert written(Result(types=[type], rows=[[b"1"]]), format=Format(quote=b'"')) == b'"1"'


def test_names_are_quoted_and_escaped_like_strings() -> None:
    result = pair([b"1", b"2"], names=(b'say "a"', b"b,c"), types=(INT4, INT4))
    assert written(result, format=CSV) == b'"say ""a""","b,c"\n1,2'


def test_no_delimiter_joins_the_columns() -> None:
    assert written(pair([b"1", b"2"]), format=Format(delimiter=b"")) == b"ab\n12"


@pytest.mark.parametrize("tag", [b"INSERT 0 2", b"UPDATE 2", b"DELETE 2", b"MERGE 2"])
def test_rows_of_returning_are_followed_by_the_tag(tag: bytes) -> None:
    assert written(Result(rows=[[b"1"], [b"2"]], command_status=tag)) == b"1\n2\n" + tag
    assert written(Result(command_status=tag)) == tag


@pytest.mark.parametrize("tag", [b"SELECT 2", b"FETCH 2", b"SHOW", b"EXPLAIN", b"CALL", b"", None])
def test_rows_of_other_commands_are_not(tag: bytes | None) -> None:
    assert written(Result(rows=[[b"1"]], command_status=tag)) == b"1"
    assert written(Result(command_status=tag)) is None


def test_tags_are_lines() -> None:
    output = Output(Format())
    output.add_tag(b"CREATE TABLE")
    output.add_rows(Result(rows=[[b"1"]]))
    output.add_tag(b"SET")
    assert output.text == b"CREATE TABLE\n1\nSET"


def test_copied_data_stays_as_it_came() -> None:
    output = Output(Format(quote=b'"', delimiter=b","))
    output.add_tag(b"SET")
    output.add_copy([b"1\ta\n", b"2\tb\n"])
    output.add_rows(Result(types=[INT4], rows=[[b"3"]]))
    output.add_copy([b"4\n"])
    assert output.text == b"SET\n1\ta\n2\tb\n3\n4\n"


def test_copy_of_nothing_says_nothing() -> None:
    output = Output(Format())
    output.add_copy([])
    assert output.text is None


def test_nothing_was_said() -> None:
    assert Output(Format()).text is None


def test_bytes_of_any_encoding_pass_untouched() -> None:
    value = bytes(range(1, 256))
    assert written(Result(rows=[[value]])) == value


def test_error_has_severity_and_message() -> None:
    assert Error(message=b"division by zero").text() == b"ERROR:  division by zero"


def test_error_has_every_field_on_a_line_of_its_own() -> None:
    error = Error(
        severity=b"FATAL",
        message=b"m",
        code=b"XX000",
        position=8,
        detail=b"d",
        hint=b"h",
        query=b"q",
        context=b"c",
    )
    assert error.text() == b"FATAL:  m at character 8\nDETAIL:  d\nHINT:  h\nQUERY:  q\nCONTEXT:  c"


def test_empty_fields_are_left_out() -> None:
    assert Error(message=b"m", position=0, detail=b"", hint=None).text() == b"ERROR:  m"


def test_further_lines_of_a_text_begin_with_a_tab() -> None:
    error = Error(message=b"one\ntwo", position=3, detail=b"three\n\nfour", context=b"five\nsix")
    assert error.text() == (b"ERROR:  one\n\ttwo at character 3\nDETAIL:  three\n\t\n\tfour\nCONTEXT:  five\n\tsix")
    assert statement_line(b"SELECT\n1\n") == b"STATEMENT:  SELECT\n\t1\n\t"
