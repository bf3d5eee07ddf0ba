"""Where values come from, which source goes first, pg_task's list form, and every way to get it wrong."""

import dataclasses
import json
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from pgtask import settings
from pgtask.config import Config, ConfigError, MasterConfig, TableConfig, load, print_lines

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PG* variables that libpq takes its defaults from."""
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGUSER", "somebody")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("pgtask.toml").write_text(text, "utf-8")
        return Path("pgtask.toml")

    return write


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def built_in() -> Config:
    return load(None, [], {}, {})


def refused(file: Path | None = None, conninfos: tuple[str, ...] = (), environ: dict[str, str] | None = None, **given):
    with pytest.raises(ConfigError) as error:
        load(file, conninfos, given, environ or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_have_a_field_for_each_setting() -> None:
    assert fields(MasterConfig) == list(settings.by_name("master"))
    assert fields(TableConfig) == ["conninfo", *settings.by_name("database"), "defaults", "told_apart"]
    assert list(built_in().tables[0].defaults) == list(settings.by_name("task"))


def test_without_any_source_everything_is_built_in() -> None:
    config = built_in()
    assert config.master.workers == 16
    assert config.master.stop_timeout == timedelta(seconds=30)
    [table] = config.tables
    assert (table.conninfo, table.schema, table.table) == ("", "public", "task")
    assert table.defaults["active"] == "1 hour"
    assert table.defaults["delete"] == "true"
    assert set(config.origins.values()) == {"built-in"}


def test_sample_file_says_what_is_built_in(write: Write) -> None:
    config = load(write(settings.toml_sample()), [], {}, {})
    assert (config.master, config.tables) == (built_in().master, built_in().tables)


def test_sample_file_says_what_is_built_in_when_every_key_is_uncommented(write: Write) -> None:
    lines = settings.toml_sample().splitlines()
    text = "\n".join(line[1:] if line.startswith("#") and line[1:2].isalpha() else line for line in lines)
    config = load(write(text), [], {}, {})
    assert (config.master, config.tables) == (built_in().master, built_in().tables)
    assert "built-in" not in config.origins.values()


FILE = """
[master]
workers = 2
[defaults]
sleep = 2
timeout = "2 s"
[[database]]
sleep = 3
"""


@pytest.mark.parametrize(
    ("text", "environ", "given", "sleep", "origin"),
    [
        ("", {}, {}, 1000, "built-in"),
        ("[defaults]\nsleep = 2", {}, {}, 2, "pgtask.toml:[defaults]"),
        (FILE, {}, {}, 3, "pgtask.toml:[[database]]"),
        (FILE, {"PGTASK_SLEEP": "4"}, {}, 4, "environment PGTASK_SLEEP"),
        (FILE, {"PGTASK_SLEEP": ""}, {}, 3, "pgtask.toml:[[database]]"),
        (FILE, {"PGTASK_SLEEP": "4"}, {"sleep": "5"}, 5, "command line --sleep"),
        (FILE, {"PGTASK_SLEEP": "4"}, {"sleep": None}, 4, "environment PGTASK_SLEEP"),
    ],
)
def test_nearer_source_goes_first(write: Write, text, environ, given, sleep, origin) -> None:
    config = load(write(text), [], given, environ)
    assert config.tables[0].sleep == timedelta(milliseconds=sleep)
    assert config.origins["database[0].sleep"] == origin


@pytest.mark.parametrize(
    ("environ", "given", "workers", "origin"),
    [
        ({}, {}, 2, "pgtask.toml:[master]"),
        ({"PGTASK_WORKERS": "3"}, {}, 3, "environment PGTASK_WORKERS"),
        ({"PGTASK_WORKERS": "3"}, {"workers": "4"}, 4, "command line --workers"),
    ],
)
def test_nearer_source_goes_first_for_the_master(write: Write, environ, given, workers, origin) -> None:
    config = load(write(FILE), [], given, environ)
    assert config.master.workers == workers
    assert config.origins["master.workers"] == origin


def test_task_default_is_common_and_of_one_table(write: Write) -> None:
    config = load(
        write(
            '[defaults]\ntimeout = "2 s"\ncount = 7\n[[database]]\n[[database]]\ntable = "b"\ntimeout = 0\ndrift = true'
        ),
        ["dbname=c"],
        {},
        {},
    )
    assert [table.defaults["timeout"] for table in config.tables] == ["2 s", "0", "2 s"]
    assert [table.defaults["count"] for table in config.tables] == ["7", "7", "7"]
    assert [table.defaults["drift"] for table in config.tables] == ["false", "true", "false"]
    assert config.origins["database[1].defaults.timeout"] == "pgtask.toml:[[database]] 2"
    assert config.origins["database[2].defaults.timeout"] == "pgtask.toml:[defaults]"
    assert config.origins["database[2].conninfo"] == "command line CONNINFO"


def test_switch_of_the_command_line_is_a_truth_value() -> None:
    assert load(None, [], {"wake": False}, {}).tables[0].wake is False


def test_conninfos_are_served_beside_the_file(write: Write) -> None:
    config = load(write('[[database]]\nconninfo = "dbname=a"'), ["dbname=b", "postgresql://u@h/c"], {}, {})
    assert [table.dbname for table in config.tables] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("conninfo", "label"),
    [
        ("", "somebody@somebody public.task"),
        ("dbname=a", "somebody@a public.task"),
        ("user=u", "u@u public.task"),
        ("postgresql://u:hunter2@h:1/d", "u@d public.task"),
    ],
)
def test_label_is_completed_as_libpq_does(conninfo: str, label: str) -> None:
    assert load(None, [conninfo], {}, {}).tables[0].label == label


def test_labels_of_tables_that_would_be_called_the_same_name_the_server() -> None:
    conninfos = ["host=a dbname=d user=u", "host=b port=5433 dbname=d user=u", "host=a dbname=e user=u"]
    labels = [table.label for table in load(None, conninfos, {}, {}).tables]
    assert labels == ["u@d public.task on a:5432", "u@d public.task on b:5433", "u@e public.task"]


def test_label_follows_the_variables_of_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGDATABASE", "app")
    assert built_in().tables[0].label == "somebody@app public.task"


def test_target_tells_tables_apart() -> None:
    same = ["dbname=a user=somebody", "postgresql:///a", "dbname=a password=x", "dbname=a application_name=x"]
    assert len({load(None, [text], {}, {}).tables[0].target for text in same}) == 1
    others = ["dbname=a", "dbname=b", "dbname=a user=u", "dbname=a host=h", "dbname=a port=1"]
    assert len({load(None, [text], {}, {}).tables[0].target for text in others}) == len(others)


def test_changed_setting_makes_a_table_unequal_with_the_same_target() -> None:
    one, other = load(None, [], {}, {}).tables[0], load(None, [], {"sleep": "1"}, {}).tables[0]
    assert one != other
    assert one.target == other.target


@pytest.mark.parametrize("where", ["json = '{}'", "[master]\njson = '{}'"])
@pytest.mark.parametrize(
    ("item", "label"),
    [
        ({}, "postgres@postgres public.task"),
        ({"data": "d"}, "d@d public.task"),
        ({"user": "u"}, "u@u public.task"),
        ({"data": "d", "user": "u"}, "u@d public.task"),
        ({"data": None, "user": "u"}, "u@u public.task"),
        ({"data": "a b", "user": "it's"}, "it's@a b public.task"),
        ({"data": "d", "schema": "s", "table": "t"}, "d@d s.t"),
    ],
)
def test_list_form_of_pg_task_names_user_and_database_after_each_other(write: Write, where, item, label) -> None:
    text = json.dumps([item]).replace("'", "\\u0027")
    [table] = load(write(where.format(text)), [], {}, {}).tables
    assert table.label == label


def test_list_form_of_pg_task_has_settings_of_the_table(write: Write) -> None:
    text = 'json = \'[{"data":"d","sleep":1,"reset":"1 hour","run":5},{"data":"e","sleep":"2","run":"6"}]\'\n'
    config = load(write(text + "[defaults]\ncount = 3"), [], {}, {})
    assert [table.sleep for table in config.tables] == [timedelta(milliseconds=1), timedelta(milliseconds=2)]
    assert [table.run for table in config.tables] == [5, 6]
    assert config.tables[0].reset == timedelta(hours=1)
    assert config.tables[0].defaults["count"] == "3"
    assert config.origins["database[1].sleep"] == "pgtask.toml:json[1]"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[master]\nwokers = 1", '[master] wokers: unknown key, did you mean "workers"?'),
        ("[master]\nsleep = 1", "[master] sleep: unknown key, it belongs in [defaults] or [[database]]"),
        ("[defaults]\nworkers = 1", "[defaults] workers: unknown key, it belongs in [master]"),
        ('[defaults]\nconninfo = ""', "[defaults] conninfo: unknown key, it belongs in [[database]]"),
        ("[[database]]\nslep = 1", '[[database]] slep: unknown key, did you mean "sleep"?'),
        ("[[database]]\n[[database]]\nslep = 1", '[[database]] 2 slep: unknown key, did you mean "sleep"?'),
        ("[mater]\nworkers = 1", 'mater: unknown key or section, did you mean "master"?'),
        ("workers = 1", "workers: unknown key or section; known are master, defaults, database, json"),
        ('[master]\nworkers = "many"', '[master] workers: must be a whole number from 1 to 10000, not "many"'),
        ("[master]\nworkers = 0", "[master] workers: must be a whole number from 1 to 10000, not 0"),
        ("[master]\nworkers = [1]", "[master] workers: must be a whole number from 1 to 10000, not a list"),
        ("[defaults]\ndelete = 1", "[defaults] delete: must be true or false, not 1"),
        (
            "[defaults]\nactive = 2020-01-01",
            '[defaults] active: must be an interval such as "1 hour", more than 0, not 2020-01-01',
        ),
        ('[[database]]\ntable = ""', '[[database]] table: must be a text of 1 to 63 bytes, not ""'),
        ('[[database]]\nschema = "a\\u0000b"', "[[database]] schema: must not contain a NUL byte"),
        (
            '[[database]]\nconninfo = "usr=a"',
            '[[database]] conninfo: unknown connection option "usr", did you mean "user"?',
        ),
        ("[[database]]\nconninfo = 1", "[[database]] conninfo: must be a conninfo string or URI"),
        (
            "[[database]]\n[[database]]",
            ":[[database]] 2: somebody@somebody public.task is already served by pgtask.toml:[[database]] 1",
        ),
        ("[database]\nsleep = 1", "database: must be a list of sections, each written [[database]]"),
        ("database = [1]", "database: must be a list of sections, each written [[database]]"),
        ("master = 1", "master: must be a section, written [master]"),
        ("defaults = []", "defaults: must be a section, written [defaults]"),
        ("[master\n", 'Expected "]" at the end of a table declaration (at line 1, column 8)'),
        ("json = 1", "json: must be a text that holds a JSON list of objects"),
        ("json = '['", "json: Expecting value: line 1 column 2 (char 1)"),
        ("json = '{}'", "json: must be a list of objects"),
        ("json = '[1]'", "json: must be a list of objects"),
        ("json = '[{\"dta\":\"d\"}]'", 'json[0] dta: unknown key, did you mean "data"?'),
        (
            "json = '[{\"timeout\":1}]'",
            "json[0] timeout: unknown key; known are data, user, schema, table, sleep, reset, run",
        ),
        ("json = '[{\"data\":1}]'", "json[0] data: must be a name of 1 to 63 bytes"),
        ("json = '[{},{\"user\":\"\"}]'", "json[1] user: must be a name of 1 to 63 bytes"),
        ("json = '[{\"run\":0}]'", "json[0] run: must be a whole number from 1 to 2147483647, not 0"),
        ("json = '[]'\n[master]\njson = '[]'", "[master] json: is given twice"),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_with_file_key_and_what_would_be_right(write: Write, text: str, line: str) -> None:
    said = refused(write(text)).replace("Expected ']'", 'Expected "]"')
    assert said == ("pgtask.toml" + line if line.startswith(":") else f"pgtask.toml: {line}")


def test_wrong_value_is_refused_even_where_another_source_goes_first(write: Write) -> None:
    assert "workers" in refused(write('[master]\nworkers = "many"'), workers="4")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml") == f"{tmp_path}/none.toml: No such file or directory"
    assert refused(tmp_path) == f"{tmp_path}: Is a directory"


def test_file_that_is_not_utf8_is_refused(write: Write) -> None:
    file = write("")
    file.write_bytes(b"# \xff")
    assert refused(file) == "pgtask.toml: is not UTF-8 at byte 2"


def test_wrong_environment_is_refused() -> None:
    said = refused(environ={"PGTASK_WORKERS": "many"})
    assert said == 'environment PGTASK_WORKERS: must be a whole number from 1 to 10000, not "many"'


def test_wrong_option_is_refused() -> None:
    assert refused(log_level="loud").startswith("command line --log-level: must be one of debug, info")


def test_wrong_conninfo_is_refused() -> None:
    assert refused(conninfos=("dbname=a", "b")).startswith('command line CONNINFO 2: missing = after "b"')


def test_same_table_twice_is_refused() -> None:
    said = refused(conninfos=("dbname=a", "postgresql:///a"))
    assert said == "command line CONNINFO 2: somebody@a public.task is already served by command line CONNINFO 1"


@pytest.mark.parametrize(
    "text",
    [
        '[[database]]\nconninfo = "password=hun hunter2"',
        '[[database]]\nconninfo = "postgresql://u:hunter 2@h"',
        '[[database]]\nmaintenance = "password=\'hunter2"',
        '[[database]]\nsleep = "password=hunter2"',
        '[master]\nlog_level = "postgresql://u:hunter2@h"',
    ],
)
def test_no_password_gets_into_an_error(write: Write, text: str) -> None:
    assert "hunter" not in refused(write(text))


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u@h/d?pass%77ord=hunter2",
        "postgresql://u:hun%74er2@h/d",
        "password='hun\\'ter2' user=u",
        "postgresql://u@h/d?sslp%61ssword=hunter2&password=hunter2",
    ],
)
def test_printed_conninfo_has_no_password_however_it_is_written(text: str) -> None:
    printed = "\n".join(print_lines(load(None, [text], {}, {})))
    assert "hun" not in printed
    assert tomllib.loads(printed)["database"][0]["conninfo"].count("***")


def test_printed_configuration_loads_to_the_same_values(write: Write) -> None:
    text = (
        '[master]\nlinger = "1500 ms"\npidfile = "/a b"\n'
        '[[database]]\nconninfo = "dbname=\'a\\"b\'"\nnull = "\\\\"\nquote = "\\""'
    )
    config = load(write(text), ["dbname=c"], {"sleep": "7"}, {"PGTASK_WAKE": "off"})
    again = load(write("\n".join(print_lines(config))), [], {}, {})
    assert again.master == config.master
    assert again.tables == config.tables


def test_printed_configuration_says_where_values_come_from_and_no_password(write: Write) -> None:
    config = load(
        write("[master]\nworkers = 3"), ["password=hunter2 dbname=a"], {}, {"PGTASK_MAINTENANCE": "password=hunter2"}
    )
    text = "\n".join(print_lines(config))
    assert "hunter2" not in text
    tomllib.loads(text)
    said = dict(line.split("#", 1) for line in text.splitlines() if "#" in line)
    origins = {key.split(" = ")[0]: origin.strip() for key, origin in said.items()}
    assert origins["workers"] == "pgtask.toml:[master]"
    assert origins["conninfo"] == "command line CONNINFO"
    assert origins["maintenance"] == "environment PGTASK_MAINTENANCE"
    assert origins["table"] == "built-in"
