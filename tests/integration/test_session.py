"""The session's two ways to talk, where a server answers in an unusual order."""

import select
from collections.abc import Callable, Iterator

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgtask.worker.session import SYNC, Session, SessionLost, StatementFailed, Step
from tests.fixtures.database import Database
from tests.fixtures.proxy import Proxy


class Waiter:
    """Waits for the socket alone."""

    doubted = False

    def wait(self, fd: int | None, *, write: bool = False, timeout: float | None = None, listen: bool = False) -> bool:
        descriptors = [] if fd is None else [fd]
        readable, writable, _ = select.select(descriptors, descriptors if write else [], [], timeout)
        return bool(readable or writable)


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    database.execute(
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )
    one = Session.open(database.conninfo, Waiter(), timeout=20, stop=lambda: False)
    yield one
    one.close()


def values(session: Session, *texts: str) -> list[bytes | None]:
    return [one.get_value(0, 0) for one in session.pipeline([Step(text.encode()) for text in texts], timeout=20)]


@pytest.mark.parametrize("plain", [True, False])
def test_error_as_late_as_the_end_of_a_pipeline_is_that_of_its_last_statement(session: Session, plain: bool) -> None:
    steps = [Step(b"SELECT 1"), Step(b"INSERT INTO child VALUES (1)", plain=plain), SYNC, Step(b"SELECT 2")]
    for _ in range(2):
        with pytest.raises(StatementFailed) as failed:
            session.pipeline(steps, timeout=20)
        assert (failed.value.step, failed.value.code) == (1, "23503")
        assert session.idle
        assert values(session, "SELECT 3", "SELECT 4") == [b"3", b"4"]


def test_statements_prepared_after_a_failed_part_keep_names_of_their_own(session: Session) -> None:
    steps = [Step(b"SELECT 1/0"), Step(b"SELECT 1"), SYNC, Step(b"SELECT 2")]
    with pytest.raises(StatementFailed) as failed:
        session.pipeline(steps, timeout=20)
    assert (failed.value.step, failed.value.code) == (0, "22012")
    texts = [f"SELECT {number}" for number in range(1, 20)]
    for _ in range(2):
        assert values(session, *texts) == [text.split()[1].encode() for text in texts]


def test_session_that_ends_in_a_pipeline_is_lost(session: Session) -> None:
    with pytest.raises(SessionLost, match="terminating connection"):
        values(session, "SELECT pg_terminate_backend(pg_backend_pid())", "SELECT 1")


def test_server_that_does_not_answer_in_time_is_lost(session: Session) -> None:
    with pytest.raises(SessionLost, match="did not answer in time"):
        session.pipeline([Step(b"SELECT pg_sleep(30)")], timeout=0.2)


def test_session_opens_on_the_next_host_when_the_first_is_silent(
    database: Database, new_proxy: Callable[..., Proxy]
) -> None:
    nowhere = conninfo_to_dict(new_proxy(database.tcp, reachable=False).conninfo)
    there = conninfo_to_dict(database.tcp)
    places = {name: f"{nowhere[name]},{there[name]}" for name in ("host", "port")}
    both = make_conninfo(database.tcp, **places, tcp_user_timeout=2000)
    one = Session.open(both, Waiter(), timeout=20, stop=lambda: False)
    assert values(one, "SELECT 1") == [b"1"]
    one.close()
