"""A run whose row is not its own any more ends without a trace, and a deposed term begins nothing."""

from collections.abc import Callable, Iterator

import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.locks import held, wait_runs
from tests.fixtures.master import Master
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer
from tests.fixtures.wait import eventually

GATE = 700


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(server, tmp_path_factory.mktemp("fencing"), setup="CREATE TABLE effect (what text)") as one:
        yield one


def effects(database: Database, what: str) -> int:
    return int(database.execute("SELECT count(*) FROM effect WHERE what = %s", [what])[0][0])


def behind_its_back(database: Database, *statements: str) -> None:
    """Change the table without a trigger, so that nobody is told and nothing is refused; all at once."""
    with database.connect(database.admin, autocommit=False) as session:
        session.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            session.execute(statement.encode())


TAKEN_AWAY: dict[str, list[str]] = {
    "stopped": ["UPDATE task SET state = 'STOP' WHERE id = {id}"],
    "deleted": ["DELETE FROM task WHERE id = {id}"],
    "set back to plan": ["UPDATE task SET state = 'PLAN', plan = '9999-01-01', pid = NULL WHERE id = {id}"],
    "said to be done": ["UPDATE task SET state = 'DONE', output = 'forged' WHERE id = {id}"],
    "taken by another master": [
        "UPDATE task SET state = 'TAKE', pid = {other}, start = clock_timestamp() WHERE id = {id}"
    ],
    "begun by another worker": [
        "UPDATE task SET state = 'WORK', pid = {other}, start = now(), attempt = attempt + 1 WHERE id = {id}"
    ],
    "begun again by the same backend": ["UPDATE task SET attempt = attempt + 1 WHERE id = {id}"],
    "given to another backend": ["UPDATE task SET pid = {other} WHERE id = {id}"],
    "another task with its id": [
        "DELETE FROM task WHERE id = {id}",
        "INSERT INTO task (id, input, \"group\", plan) VALUES ({id}, 'SELECT 7', 'somebody else', '9999-01-01')",
    ],
    "moved to another id": ["UPDATE task SET id = -id WHERE id = {id}"],
}


@pytest.mark.parametrize("delete", [False, True], ids=["kept", "silent"])
@pytest.mark.parametrize("statements", TAKEN_AWAY.values(), ids=TAKEN_AWAY)
def test_run_whose_row_was_taken_away_is_undone_and_leaves_the_row_alone(
    base: Served, statements: list[str], delete: bool
) -> None:
    database = base.database
    mark = f"{statements[0][:60]} {len(statements)} {delete}"
    other = database.connect()  # a living backend, so that nobody rescues what it has
    silent = (
        f"WITH e AS (INSERT INTO effect VALUES ($m${mark}$m$)), w AS MATERIALIZED"
        f" (SELECT pg_advisory_xact_lock({GATE}) AS l) SELECT FROM w WHERE l IS NULL"
    )
    with held(database, GATE):
        id, following = base.insert_pair(silent, group=mark, delete=delete)
        wait_runs(database)
        words = {"id": id, "other": other.info.backend_pid}
        behind_its_back(database, *(statement.format(**words) for statement in statements))
        before = database.tasks(f"id IN ({id}, -{id})")
    base.master.wait_log(rf"run_disowned id={id}\b")
    after = database.tasks(f"id IN ({id}, -{id})")
    for row in (*before, *after):
        row.pop("stop")  # of a stopped row: when its run ended
        row.pop("error")
    assert (after, effects(database, mark)) == (before, 0)
    database.execute(f"DELETE FROM task WHERE id IN ({id}, -{id})")  # which may hold the group's slot
    assert database.wait(following)["state"] == "DONE"
    assert effects(database, mark) == 0  # and by now it has ended


def test_run_that_is_not_atomic_and_lost_its_row_says_nothing_in_it(base: Served) -> None:
    """Its work is committed, as everywhere without `atomic`; the row is another's by now."""
    database = base.database
    other = database.connect()
    with held(database, GATE):
        id, following = base.insert_pair(f"SELECT pg_advisory_xact_lock({GATE})", group="apart", atomic=False)
        wait_runs(database)
        behind_its_back(
            database,
            "UPDATE task SET state = 'WORK', attempt = 2, start = now(),"
            f" pid = {other.info.backend_pid} WHERE id = {id}",
        )
        before = database.task(id)
    base.master.wait_log(rf"run_disowned id={id}\b")
    assert database.task(id) == before
    database.execute("DELETE FROM task WHERE id = %s", [id])
    assert database.wait(following)["state"] == "DONE"


def test_row_that_was_rescued_and_taken_again_is_finished_by_its_new_run_only(base: Served) -> None:
    """The same id is run twice at once: only the run that the row names may finish it."""
    database = base.database
    input = f"INSERT INTO effect VALUES ('rescued'); SELECT pg_advisory_xact_lock_shared({GATE}), 'of 1'"
    with held(database, GATE):
        id = database.insert(input, group="rescued", delete=False)
        wait_runs(database)
        [old] = [row["pid"] for row in database.tasks(f"id = {id}")]
        # As a rescue would, and as a group's rename would let it be taken at once.
        behind_its_back(
            database,
            f"UPDATE task SET state = 'PLAN', pid = NULL, start = NULL, \"group\" = 'rescued again',"
            f" input = replace(input, 'of 1', 'of 2') WHERE id = {id}",
        )
        database.insert("SELECT 1", group="wakes the master")
        wait_runs(database, 2)
        assert database.wait(id, "WORK")["pid"] != old
    row = database.wait(id)
    assert (row["state"], row["attempt"]) == ("DONE", 2)
    assert row["output"].splitlines()[-1].endswith("of 2")
    base.master.wait_log(f"run_disowned id={id}")
    assert effects(database, "rescued") == 1


# A deposed term


def deposed(database: Database) -> None:
    database.execute("UPDATE task_master SET term = term + 1")


def test_deposed_master_begins_nothing_notices_and_leads_anew(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master()
    ledger.fill(40, groups=4, ms=5)
    eventually(lambda: ledger.finished() > 4)
    deposed(database)
    ledger.fill(4)  # there is something left to begin
    ledger.settled()
    assert len(one.logged(r"\bleading\b")) >= 2, "it went on under a term that is not its own"
    assert len(one.logged(r"table_down.*term")) == 1
    terms = [line.split("term=")[1].split()[0] for line in one.logged(r"\bleading\b")]
    assert terms[-1] == str(database.execute("SELECT term FROM task_master")[0][0])


def test_run_that_began_in_an_older_term_ends_and_begins_no_other(
    database: Database, master: Callable[..., Master]
) -> None:
    """The worker takes no next task in its finish: that would be a begin without a master."""
    one = master()
    with held(database, GATE):
        id = database.insert(f"SELECT pg_advisory_xact_lock({GATE})", group="g", delete=False)
        wait_runs(database)
        deposed(database)
        following = database.insert("SELECT 1", group="g", delete=False)
    assert database.wait(id)["state"] == "DONE"
    row = database.wait(following)
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    assert len(one.logged(r"\bleading\b")) == 2


def test_master_whose_table_of_terms_was_emptied_leads_anew(database: Database, master: Callable[..., Master]) -> None:
    one = master()
    database.execute("DELETE FROM task_master")
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert len(one.logged(r"\bleading\b")) == 2
