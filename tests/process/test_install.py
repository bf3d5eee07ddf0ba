"""docs/how-to/install.md, command by command: from nothing to a database that is served, and back to nothing."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgtask import embedded
from tests.fixtures.docs import ROOT, Block, page
from tests.fixtures.machine import CannotBoot, Machine, machine
from tests.fixtures.wait import eventually

PAGE = page(ROOT / "docs/how-to/install.md")
NEEDED = ("adduser", "deluser", "runuser", "service", "update-rc.d", "start-stop-daemon", "createuser", "psql")
OWN = {"systemd": "systemctl", "init": "update-rc.d"}
"""What the commands of one have, and those of the other have not."""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)), reason=f"the page is for Debian, with {', '.join(NEEDED)}"
)


@pytest.fixture(params=OWN)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def debian(kind: str, own_server: embedded.Server, tmp_path: Path) -> Iterator[Machine]:
    [socket] = Path(own_server.directory).glob(".s.PGSQL.*[0-9]")
    try:
        with machine(tmp_path, systemd=kind == "systemd", server=socket) as one:
            yield one
    except CannotBoot as error:
        pytest.skip(str(error))


def commands(kind: str) -> list[str]:
    """The page's commands for a machine of this kind, in their order."""
    others = [word for name, word in OWN.items() if name != kind]
    chosen = [one for one in PAGE.blocks if one.language == "console" and one.kind != "not run"]
    chosen = [one for one in chosen if not any(word in one.text for word in others)]
    return [command for one in chosen for command in typed(one)]


def typed(block: Block) -> list[str]:
    found = re.findall(r"^# (.+)$", block.text, re.MULTILINE)
    assert len(found) == len(block.text.splitlines())
    return found


def rows(server: embedded.Server, query: str) -> list[Any]:
    with psycopg.connect(server.conninfo("app"), autocommit=True) as session:
        return session.execute(query.encode()).fetchall()


def test_every_command_of_the_page_does_what_it_says(kind: str, debian: Machine, own_server: embedded.Server) -> None:
    said = {}
    for command in commands(kind):
        if "INSERT INTO task" in command:  # a reader comes here some seconds after the start
            eventually(lambda: rows(own_server, "SELECT to_regclass('public.task')") != [(None,)])
        if "DROP OWNED" in command:
            assert rows(
                own_server, "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'task'"
            ) == [("pgtask",)]
        if command == "service pgtask status":  # somebody who types sees no more that it starts
            eventually(lambda: "1 table" in debian.run("sh", "-c", command).stdout)  # noqa: B023
        done = debian.run("sh", "-c", command)
        said[command] = done.stdout + done.stderr
        assert done.returncode == 0, f"{command}: {said[command]}"
        if "INSERT INTO task" in command:
            eventually(lambda: rows(own_server, "SELECT state::text FROM task") == [("DONE",)])
    [check] = [text for command, text in said.items() if "--check" in command]
    assert "would create table public.task" in check
    [status] = [
        text for command, text in said.items() if command.endswith(("systemctl status pgtask", "service pgtask status"))
    ]
    assert "1 table" in status
    [selected] = [text for command, text in said.items() if "SELECT state" in command]
    assert " DONE  | 42" in selected
    assert rows(own_server, "SELECT relname FROM pg_class WHERE relname ~ '^task'") == []
    assert left(debian) == []
    assert debian.run("getent", "passwd", "pgtask").returncode == 2


def left(debian: Machine) -> list[str]:
    """Files with the name, and processes."""
    places = ["/etc", "/opt/pgtask", "/run/pgtask", "/usr/local/bin", "/var/log", "/var/lib"]
    found = debian.run("find", *places, "-name", "pgtask*", "-not", "-path", "/run/pgtask*").stdout.splitlines()
    return found + debian.run("pgrep", "-f", "^pgtask:").stdout.splitlines()
