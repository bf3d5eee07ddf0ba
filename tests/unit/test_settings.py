"""What each kind of setting takes and refuses, and what is made from the list of settings."""

from datetime import timedelta
from pathlib import Path

import pytest

from pgtask.durations import duration_text, interval_seconds
from pgtask.settings import (
    SETTINGS,
    by_name,
    conninfo_problem,
    markdown_table,
    toml_sample,
)

ROOT = Path(__file__).resolve().parents[2]
ALL = {setting.name: setting for setting in SETTINGS}


def test_every_setting_has_a_name_of_its_own() -> None:
    assert len(ALL) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_doc_ends_with_the_default(setting) -> None:
    assert setting.doc.endswith(".")
    assert ". Defaults to " in setting.doc


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_default_is_a_value_that_the_setting_takes(setting) -> None:
    text = duration_text(setting.default) if isinstance(setting.default, timedelta) else setting.sql_default
    assert setting.parse_text(text) == setting.default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("workers", "1", 1),
        ("workers", " 10000 ", 10000),
        ("max", "-2147483648", -2147483648),
        ("run", "2147483647", 2147483647),
        ("wake", "off", False),
        ("wake", "YES", True),
        ("sleep", "1", timedelta(milliseconds=1)),
        ("sleep", "250 ms", timedelta(milliseconds=250)),
        ("linger", "2", timedelta(seconds=2)),
        ("linger", "0.5", timedelta(seconds=0.5)),
        ("reset", "1 hour", timedelta(hours=1)),
        ("reset", "1 hour 30 min", timedelta(minutes=90)),
        ("reset", "00:00:10", timedelta(seconds=10)),
        ("active", "2 days", "2 days"),
        ("timeout", "PT0.5S", "PT0.5S"),
        ("timeout", "0", "0"),
        ("delimiter", ",", ","),
        ("quote", "", ""),
        ("null", "", ""),
        ("log_format", "json", "json"),
        ("pidfile", "/run/pgtask.pid", Path("/run/pgtask.pid")),
        ("pidfile", "", None),
        ("listen", "", None),
        ("listen", "127.0.0.1:9187", "127.0.0.1:9187"),
        ("listen", "[::1]:9187", "[::1]:9187"),
        ("listen", "db-1.example.com:1", "db-1.example.com:1"),
        ("listen", ":65535", ":65535"),
        ("maintenance", "", None),
        ("maintenance", "dbname=postgres", "dbname=postgres"),
        ("table", "ü" * 31, "ü" * 31),
    ],
)
def test_right_text_is_read(name: str, text: str, value: object) -> None:
    assert ALL[name].parse_text(text) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("workers", "many", 'must be a whole number from 1 to 10000, not "many"'),
        ("workers", "0", "must be a whole number from 1 to 10000, not 0"),
        *(
            ("listen", text, f'must be {ALL["listen"].expects}, not "{text}"')
            for text in ("9187", "localhost", "localhost:", "a b:1", ":0", ":65536", "::1:9187", "[::1]", "http://a:1")
        ),
        ("workers", "10001", "must be a whole number from 1 to 10000, not 10001"),
        ("workers", "1e3", 'must be a whole number from 1 to 10000, not "1e3"'),
        ("max", "2147483648", "must be a whole number from -2147483648 to 2147483647, not 2147483648"),
        ("wake", "maybe", 'must be true or false, not "maybe"'),
        ("log_level", "Warn", 'must be one of debug, info, warning, error, not "Warn", did you mean "warning"?'),
        ("delimiter", "ab", 'must be one byte, or nothing, not "ab"'),
        ("delimiter", "é", 'must be one byte, or nothing, not "é"'),
        ("table", "", 'must be a text of 1 to 63 bytes, not ""'),
        ("table", "x" * 64, f'must be a text of 1 to 63 bytes, not "{"x" * 60}..."'),
        ("schema", "a\0b", "must not contain a NUL byte"),
        ("schema", "a\udcff", "must be valid UTF-8"),
        ("group", "a\0", "must not contain a NUL byte"),
        ("log", "", 'must be stderr, syslog, journal, or a path, not ""'),
        ("active", "0", 'must be an interval such as "1 hour", more than 0, not "0"'),
        ("timeout", "-1 s", 'must be an interval such as "1 hour", 0 or more, not "-1 s"'),
        ("timeout", "soon", 'must be an interval such as "1 hour", 0 or more, not "soon"'),
        ("maintenance", "usr=x", 'unknown connection option "usr", did you mean "user"?'),
    ],
)
def test_wrong_text_is_refused_with_what_would_be_right(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ALL[name].parse_text(value)
    assert str(error.value) == message


@pytest.mark.parametrize("value", ["0", "0.5 ms", "-1 s", "nan", "inf", "1e400", "1001 days", "9" * 400, "", "x"])
def test_impossible_duration_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        ALL["sleep"].parse_text(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", "16"),
        ("workers", True),
        ("workers", 1.0),
        ("wake", "true"),
        ("wake", 1),
        ("sleep", True),
        ("sleep", [1]),
        ("sleep", float("nan")),
        ("table", 5),
        ("active", False),
        ("pidfile", 1),
        ("maintenance", 1),
        ("delimiter", {}),
    ],
)
def test_value_of_another_toml_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        ALL[name].parse(value)


def test_interval_may_be_a_number_of_seconds() -> None:
    assert ALL["timeout"].parse(5) == "5"
    assert ALL["timeout"].parse(1.5) == "1.5"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1 hour", 3600),
        ("@ 1 minute 2 secs", 62),
        ("1h30m", 5400),
        ("1 day -1 hour", 82800),
        ("1 day ago", -86400),
        ("01:02:03.5", 3723.5),
        ("-00:00:01", -1),
        ("1 2:00", 93600),
        ("1 year 2 mons", 420 * 86400),
        ("P1DT2H", 93600),
        ("PT0S", 0),
        ("178000000 years", 178e6 * 360 * 86400),
    ],
)
def test_interval_is_as_long_as_the_server_says(text: str, seconds: float) -> None:
    assert interval_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "abc", "1 foo", "1 2", "P", "ago", "1:2:3:4", "1e3", "999999999999 years", "'1'"])
def test_nonsense_is_no_interval(text: str) -> None:
    assert interval_seconds(text) is None


@pytest.mark.parametrize(
    ("setting", "text"),
    [("active", "1 hour"), ("live", "0"), ("delete", "true"), ("drift", "false"), ("delimiter", "\t"), ("null", "\\N")],
)
def test_sql_default_is_text_as_sql_takes_it(setting: str, text: str) -> None:
    assert by_name("task")[setting].sql_default == text


@pytest.mark.parametrize(
    "text",
    [
        "password=hun ter2x",
        "password='hunter2x",
        "postgresql://u:hun ter2x@h/d",
        "postgresql://u:hun%zzter2x@h/d",
        "password=a hunter2x=c",
        "postgresql:/u:hunter2x@h/d",
        "u:hunter2x@h/d",
        "postgresql://h/d?password=hun%zzter2x",
        "postgresql://h/d?password=a&hunter2x=b",
        "postgresql://u:p@[hunter2x/d",
        "sslpassword=hun ter2x",
    ],
)
def test_wrong_conninfo_is_explained_without_a_piece_of_its_password(text: str) -> None:
    problem = conninfo_problem(text)
    assert problem
    assert "ter2x" not in problem
    assert "hun" not in problem


@pytest.mark.parametrize("text", ["", "dbname=a", "postgresql:///a", "host=a,b port=1,2", "dbname='a b'"])
def test_right_conninfo_has_no_problem(text: str) -> None:
    assert conninfo_problem(text) is None


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(0), "0 s"),
        (timedelta(microseconds=1500), "1500 us"),
        (timedelta(seconds=90), "90 s"),
        (timedelta(hours=1), "1 hour"),
        (timedelta(hours=36), "36 hours"),
        (timedelta(days=2), "2 days"),
    ],
)
def test_duration_is_written_in_its_largest_whole_unit(duration: timedelta, text: str) -> None:
    assert duration_text(duration) == text


def test_sample_file_in_etc_is_up_to_date() -> None:
    assert (ROOT / "etc/pgtask.toml").read_text("utf-8") == toml_sample()


@pytest.mark.parametrize("level", ["master", "database", "task"])
def test_table_for_the_readme_has_a_row_for_each_setting(level) -> None:
    rows = markdown_table(level).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(by_name(level))
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dbname=x port=abc", 'port must be from 1 to 65535, not "abc"'),
        ("dbname=x port=5432,0", 'port must be from 1 to 65535, not "5432,0"'),
        (
            "dbname=x sslmode=foo",
            'sslmode must be one of disable, allow, prefer, require, verify-ca, verify-full, not "foo"',
        ),
        ("dbname=x target_session_attrs=master", "target_session_attrs must be one of"),
        ("dbname=x connect_timeout=soon", 'connect_timeout must be a whole number, not "soon"'),
        ("mydb", 'did you mean "dbname=mydb"?'),
    ],
)
def test_conninfo_that_can_never_connect_is_refused(text: str, problem: str) -> None:
    assert problem in (conninfo_problem(text) or "")


def test_part_of_an_uri_that_may_be_a_password_is_not_shown() -> None:
    said = conninfo_problem("postgresql://user:pa/ss@host/db") or ""
    assert "port must be from 1 to 65535" in said
    assert "pa" not in said.replace("from", "")


@pytest.mark.parametrize(
    "text", ["port=5432", "port=5432,5433 host=a,b", "port='' sslmode=''", "sslmode=require port=1,,2"]
)
def test_conninfo_that_could_connect_is_taken(text: str) -> None:
    assert conninfo_problem(text) is None
