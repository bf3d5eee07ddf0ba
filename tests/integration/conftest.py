"""A master that serves a whole file of tests, for those that need no configuration of their own."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fixtures.database import Database, create, drop
from tests.fixtures.master import Master, end, launch, rows_left
from tests.fixtures.server import AnyServer


@pytest.fixture(scope="module")
def serving(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Master]]:
    """A database and the master that serves it until the file's last test; it must end as any master must."""
    name = f"test_{secrets.token_hex(6)}"
    database = Database(server, name, name)
    create(database)
    one = launch((database.conninfo,), {}, tmp_path_factory.mktemp("served") / "master.log")
    one.wait_log(r"\bleading\b.*\btable=")
    yield database, one
    problems = end(one) + rows_left(database)
    database.close()
    drop(database)
    assert not problems, "\n".join(problems)


@pytest.fixture
def served(serving: tuple[Database, Master]) -> Database:
    """The database of `serving`: its rows stay from one test to the next, so each uses groups of its own."""
    return serving[0]


@pytest.fixture
def run(served: Database) -> Callable[..., dict[str, Any]]:
    """`run(input, **columns)` is the row of a new task once it has ended; the row is kept."""

    def run(input: str, **columns: Any) -> dict[str, Any]:
        return served.wait(served.insert(input, **{"delete": False} | columns))

    return run
