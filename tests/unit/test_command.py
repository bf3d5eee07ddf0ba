"""What the commands have in common: which tables are meant, and what a terminal gets to see."""

import os
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pgtask.command import printable
from pgtask.errors import STATUSES, UserError
from pgtask.user import commands
from pgtask.user.search import INTERVAL
from pgtask.user.shown import show, show_whole
from pgtask.user.where import Where, of_tables
from tests.fixtures.command import PROGRAM, ROOT, start
from tests.unit.test_cli import USER, call, refused

TWO = """
[[database]]
conninfo = "dbname=a user=u"
[[database]]
conninfo = "dbname=b user=u"
schema = "s"
table = "t"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "pgtask.toml"
    file.write_text(TWO)
    return file


def where(
    conninfo: str | None = None, file: Path | None = None, schema: str | None = None, table: str | None = None
) -> Where:
    return Where(conninfo, file, schema, table)


def test_id_that_is_none_is_refused_in_plain_words() -> None:
    for command in ("show", "why", "wait", "cancel"):
        for wrong in ("x", "1.5", "9" * 19):
            said = refused(*USER, command, wrong)
            assert f"'{wrong}' is no id of a task, which is a number such as 7" in said


def test_table_is_named_to_another_command_as_it_was_named_to_this_one(file: Path, tmp_path: Path) -> None:
    given = where("dbname=a host=db password=secret", table="it's")
    assert given.arguments(given.one()) == """-d 'dbname=a host=db' --schema public --table 'it'"'"'s'"""
    given = where(file=file)
    assert [given.arguments(table) for table in given.all()] == [
        f"--config {file} -d a --schema public --table task",
        f"--config {file} -d b --schema s --table t",
    ]
    (tmp_path / "bare.toml").write_text("[defaults]\nmax = 1\n")
    given = where("dbname=a host=db", tmp_path / "bare.toml")
    words = given.arguments(given.one())
    assert words == f"--config {tmp_path}/bare.toml -d 'dbname=a host=db' --schema public --table task"


def test_without_anything_it_is_what_libpq_and_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGDATABASE", "d")
    monkeypatch.setenv("PGUSER", "u")
    assert where().one().label == "u@d public.task"


@pytest.mark.parametrize("text", ["d", "dbname=d", "postgresql:///d", "postgresql://u@/d", "dbname=d user=u"])
def test_a_database_is_a_name_a_conninfo_or_a_uri(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PGUSER", "u")
    assert where(text, schema="s").one().label == "u@d s.task"


def test_all_tables_of_a_file_are_meant(file: Path) -> None:
    assert [table.label for table in where(file=file).all()] == ["u@a public.task", "u@b s.t"]
    with pytest.raises(UserError, match=r"several tables fit, say which .*: u@a public\.task, u@b s\.t"):
        where(file=file).one()


@pytest.mark.parametrize(
    "chosen", [{"conninfo": "b"}, {"schema": "s"}, {"table": "t"}, {"conninfo": "b", "table": "t"}]
)
def test_names_choose_among_those_of_a_file(file: Path, chosen: dict[str, str]) -> None:
    assert where(file=file, **chosen).one().label == "u@b s.t"


@pytest.mark.parametrize("chosen", [{"conninfo": "c"}, {"conninfo": "a", "table": "t"}, {"schema": "S"}])
def test_names_that_no_table_of_a_file_has_are_refused(file: Path, chosen: dict[str, str]) -> None:
    with pytest.raises(UserError, match="no table has these names; it has u@a"):
        where(file=file, **chosen).all()


def test_with_a_file_a_whole_conninfo_is_refused_without_its_password(file: Path) -> None:
    with pytest.raises(UserError, match="it is the name of one of its databases") as refusal:
        where("password=hunter2", file).all()
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "label"),
    [
        ("user=me dbname=own", "me@own public.task"),
        ("postgresql://me@/own", "me@own public.task"),
        ("crm", "b@crm s.u"),
    ],
)
def test_a_whole_conninfo_goes_before_the_variable_that_names_a_file(tmp_path: Path, option: str, label: str) -> None:
    config = tmp_path / "pgtask.toml"
    config.write_text('[[database]]\nconninfo = "user=b dbname=crm"\nschema = "s"\ntable = "u"\n', "utf-8")

    @click.command()
    @of_tables
    def ask(where: Where) -> None:
        click.echo(where.one().label)

    done = CliRunner().invoke(ask, ["-d", option], env={"PGTASK_CONFIG": str(config)})
    assert (done.exit_code, done.output) == (0, f"{label}\n")


def test_a_file_without_tables_gives_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "pgtask.toml"
    file.write_text('[defaults]\ntimeout = "3 s"\n')
    table = where("dbname=d user=u", file, table="x").one()
    assert (table.label, table.defaults["timeout"]) == ("u@d public.x", "3 s")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — ü 漢", "plain — ü 漢"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\u202eb", r"a\u202eb"),
        ("a\x9bb\0", r"a\x9bb\x00"),
    ],
)
def test_what_moves_a_cursor_is_shown_as_its_number(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_table_in_a_pipe_is_not_cut_and_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"n": 1, "text": "x" * 20000}, {"n": 22, "text": "a\nb\x1b[1m"}, {"n": None, "text": "漢字"}], as_json=False)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == ["n", "text"]
    assert lines[2:] == [" 1  " + "x" * 20000, "22  a b [1m", "    漢字"]


def test_whole_row_has_a_line_for_each_line_of_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    show_whole("task 7", {"漢": "a\n\tb", "long name": 5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("-[ task 7 ]---")
    assert lines[1:] == ["漢        | a", "          +         b", "long name | 5"]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1 hour", True),
        ("90min", True),
        ("1 day 2 hours", True),
        ("today", False),
        ("2026-01-02", False),
        ("12:30", False),
    ],
)
def test_an_interval_is_told_from_a_time(text: str, interval: bool) -> None:
    assert bool(INTERVAL.fullmatch(text)) is interval


@pytest.mark.parametrize("text", ["x", "-7", "7-8-9", "9" * 30])
def test_what_is_no_range_of_ids_is_refused(text: str) -> None:
    assert "is no range of ids" in refused(*USER, "list", f"--id={text}")


def test_argument_that_is_no_text_is_refused() -> None:
    done = subprocess.run([*PROGRAM, "submit", b"SELECT '\xff'"], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"pgtask: argument 2 is not UTF-8\n")


def test_reader_that_goes_away_hears_no_complaint() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    one = start("completion", "bash", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, said = one.communicate(timeout=60)
    assert (one.returncode, said) == (1, b"")


def test_full_disk_is_said() -> None:
    with open("/dev/full", "wb") as full:
        one = start("completion", "bash", stdout=full, stderr=subprocess.PIPE)
        _, said = one.communicate(timeout=60)
    assert (one.returncode, said) == (1, b"pgtask: cannot write: No space left on device\n")


def test_every_command_answers_in_json_and_says_how_it_ends() -> None:
    for name, command in commands.user.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, name
    assert set(STATUSES) == {0, 1, 2, 124, 130}


def test_bash_completes_commands_options_and_states(tmp_path: Path) -> None:
    program = tmp_path / "pgtask"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)

    def completed(*words: str) -> set[str]:
        """What a real bash makes of TAB after the last one."""
        press = (
            'eval "$(pgtask completion bash)"; COMP_WORDS=(pgtask "$@"); COMP_CWORD=$#;'
            " _pgtask_completion pgtask; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        command = ["bash", "-c", press, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        assert (done.returncode, done.stderr) == (0, "")
        return set(done.stdout.split())

    assert {"submit", "show", "sql"} <= completed("s")
    assert {"--state", "--since", "--schema"} <= completed("list", "--s")
    assert completed("list", "--state", "D") == {"done"}


def test_zsh_and_fish_have_a_script_too() -> None:
    assert "#compdef pgtask" in call(*USER, "completion", "zsh").stdout
    assert "complete --no-files --command pgtask" in call(*USER, "completion", "fish").stdout
