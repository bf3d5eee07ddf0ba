"""The commands as a user calls them: what they print, and their exit status."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pgtask import __version__
from pgtask.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
MASTER = ["-m", "pgtask"]
USER = ["-c", "from pgtask.user import commands; commands.user(prog_name='pgtask')"]


def call(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGTASK_", "PG"))}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environ},
    )


def refused(*command: str, **environ: str) -> str:
    done = call(*command, **environ)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr.removesuffix("\n")


def test_help_explains_every_option() -> None:
    done = call(*MASTER, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: pgtask-master [OPTIONS] [CONNINFO]...")
    for option in ("--config", "--check", "--print-config", "--version"):
        assert option in done.stdout
    for setting in SETTINGS:
        assert (f"  {setting.option} " in done.stdout) == (setting.level != "task")


def test_version_is_the_packages() -> None:
    assert call(*MASTER, "--version").stdout == f"pgtask-master {__version__}\n"
    assert call(*USER, "--version").stdout == f"pgtask {__version__}\n"


def test_print_config_shows_every_value_with_its_origin(tmp_path: Path) -> None:
    file = tmp_path / "pgtask.toml"
    file.write_text("[master]\nspare = 2\n")
    done = call(
        *MASTER, "--print-config", "--config", str(file), "--workers", "4", "--no-wake", "user=u password=hunter2",
        PGTASK_SLEEP="5",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "hunter2" not in done.stdout
    assert tomllib.loads(done.stdout)["database"][0]["wake"] is False
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines()}
    assert lines["workers"].endswith("# command line --workers")
    assert lines["wake"].endswith("# command line --wake")
    assert lines["spare"].endswith(f"# {file}:[master]")
    assert lines["sleep"].startswith('sleep = "5 ms"')
    assert lines["sleep"].endswith("# environment PGTASK_SLEEP")
    assert lines["run"].endswith("# built-in")
    assert set(lines) >= {setting.name for setting in SETTINGS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wokers", "3"], "No such option '--wokers'"),
        (["--workers"], "Option '--workers' requires an argument"),
        (["--workers", "many"], 'command line --workers: must be a whole number from 1 to 10000, not "many"'),
        (["--config", "/none.toml"], "/none.toml: No such file or directory"),
        (["dbname=a", "dbname=a"], "command line CONNINFO 2: "),
        (["app"], 'command line CONNINFO: missing = after "app"'),
        (["--table", ""], "command line --table: must be a text of 1 to 63 bytes"),
        (["--log-level", "warn"], 'did you mean "warning"?'),
        (["--log", "sysloq"], 'command line --log: did you mean "syslog"? A file of this name is "./sysloq"'),
        (["--log", "syslog:lokal3"], 'command line --log: no facility "lokal3"; those for programs are user, '),
    ],
)
@pytest.mark.parametrize("mode", ["--print-config", "--check"])
def test_what_the_user_got_wrong_is_one_line_and_status_2(mode: str, arguments: list[str], message: str) -> None:
    said = refused(*MASTER, mode, *arguments)
    assert said.startswith("pgtask-master: ")
    assert message in said


def test_unknown_option_names_the_nearest_one() -> None:
    assert "--workers" in refused(*MASTER, "--wokers", "3")


def test_wrong_environment_is_one_line_and_status_2() -> None:
    said = refused(*MASTER, "--print-config", PGTASK_IDLE="0")
    assert said == "pgtask-master: environment PGTASK_IDLE: must be a whole number from 1 to 2147483647, not 0"


def test_unknown_command_names_the_nearest_one() -> None:
    said = refused(*USER, "sqll")
    assert said.startswith("pgtask: No such command 'sqll'")
    assert said.endswith("'sql'?")


def test_without_a_command_help_is_printed_with_status_2() -> None:
    done = call(*USER)
    assert done.returncode == 2
    assert "Usage: pgtask [OPTIONS] COMMAND" in done.stderr


def test_sql_prints_the_script_of_the_named_table() -> None:
    done = call(*USER, "sql", "--schema", "s", "--table", "my table", "--owner", "o", "--grant", "g")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'CREATE TABLE IF NOT EXISTS "s"."my table"' in done.stdout
    assert 'OWNER TO "o"' in done.stdout
    assert 'TO "g"' in done.stdout


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ('[defaults]\nactive = "2 days"', [], ['"public"."task"', "'2 days'"]),
        ('[defaults]\nactive = "2 days"', ["--table", "t"], ['"public"."t"', "'2 days'"]),
        ('[[database]]\nschema = "s"\nactive = "3 days"', [], ['"s"."task"', "'3 days'"]),
        ('[[database]]\n[[database]]\ntable = "t"\nactive = "4 days"', ["--table", "t"], ['"public"."t"', "'4 days'"]),
        ('[[database]]\nconninfo="dbname=a"\n[[database]]\nconninfo="dbname=b"', [], ['"public"."task"']),
    ],
)
def test_sql_takes_names_and_defaults_from_the_file(tmp_path: Path, text, arguments, expected) -> None:
    file = tmp_path / "pgtask.toml"
    file.write_text(text)
    done = call(*USER, "sql", "--config", str(file), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for part in expected:
        assert part in done.stdout


def test_sql_refuses_a_file_that_fits_not_at_all_or_too_well(tmp_path: Path) -> None:
    file = tmp_path / "pgtask.toml"
    file.write_text('[[database]]\nconninfo = "user=u"\n[[database]]\nconninfo = "user=u"\ntable = "b"')
    assert "several tables fit" in refused(*USER, "sql", "--config", str(file))
    said = refused(*USER, "sql", "--config", str(file), "--table", "c")
    assert said.endswith("no table has these names; it has u@u public.task, u@u public.b")


@pytest.mark.parametrize("option", ["--owner", "--grant"])
def test_sql_refuses_an_impossible_role(option: str) -> None:
    assert refused(*USER, "sql", option, "") == f"pgtask: {option}: must be a name of 1 to 63 bytes"


def test_misspelt_variable_is_said_and_a_strangers_is_not() -> None:
    done = call(*MASTER, "--print-config", PGTASK_WORKER="3", PGTASK_SERVICE_HOST="10.0.0.1", PGTASK_TEST_PG="15")
    assert done.returncode == 0
    assert done.stderr == 'pgtask-master: environment PGTASK_WORKER: unknown variable, did you mean "PGTASK_WORKERS"?\n'


def test_full_disk_behind_stdout_is_one_line() -> None:
    done = call(
        "-c", "import sys; sys.stdout = open('/dev/full', 'w'); from pgtask import cli; cli.master(['--print-config'])"
    )
    assert done.returncode == 1
    assert done.stderr.endswith(": cannot write: No space left on device\n")
    assert done.stderr.count("\n") == 1
