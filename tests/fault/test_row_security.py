"""Row-level security on the task table: who may see a row decides who serves it; nothing is lost or run twice."""

import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.locks import cpu_seconds, passes
from tests.fixtures.master import Master

Start = Callable[..., Master]

ENTRY = "INSERT INTO ledger (id) VALUES (current_setting('pg_task.id')::bigint)"

ROWS = """ALTER TABLE task ADD COLUMN who text NOT NULL DEFAULT session_user;
ALTER TABLE task ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON task USING (who = session_user) WITH CHECK (who = session_user);"""


@pytest.fixture
def other(database: Database) -> Iterator[str]:
    """Another role that may log in."""
    name = f"{database.name}_other"
    database.admin_execute(f'CREATE ROLE "{name}" LOGIN')
    yield name
    database.admin_execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{name}';"
        f' DROP OWNED BY "{name}"; DROP ROLE "{name}"'
    )


def fill_as(database: Database, role: str, count: int) -> None:
    """Rows of an inserter, who sees none but its own."""
    with psycopg.connect(database.server.conninfo(database.name, role)) as session:
        session.execute(
            f"""INSERT INTO task ("group", input, delete)
                SELECT 'ledger ' || n %% 3, %s, false FROM generate_series(1, {count}) AS n""".encode(),
            [ENTRY],
        )
        assert session.execute("SELECT count(*) FROM task WHERE who <> session_user").fetchone() == (0,)


def test_owner_serves_all_rows_of_inserters_who_see_only_their_own(
    database: Database, ledger: Ledger, master: Start, other: str
) -> None:
    one = master()
    database.execute(ROWS)
    database.execute(f'GRANT SELECT, INSERT ON task TO "{other}"')
    for _ in range(3):
        fill_as(database, other, 5)
        ledger.wanted += 5
        ledger.fill(5, input=ENTRY)
    ledger.settled()
    assert one.logged("table_down|begin_failed|finish_failed") == []


def test_owner_on_whom_the_policies_are_forced_serves_the_rows_that_he_sees(
    database: Database, ledger: Ledger, master: Start, other: str
) -> None:
    one = master()
    database.execute(ROWS + "ALTER TABLE task FORCE ROW LEVEL SECURITY")
    database.execute(f'GRANT SELECT, INSERT ON task TO "{other}"')
    fill_as(database, other, 5)
    ledger.fill(10, groups=3, input=ENTRY)
    ledger.settled()
    pids = [one.pid, *one.workers()]
    before, since = cpu_seconds(pids), time.monotonic()
    passes(1)
    assert cpu_seconds(pids) - before < 0.4 * (time.monotonic() - since), "it spins on rows that it does not see"
    hidden = f"SELECT DISTINCT state::text, attempt, pid FROM task WHERE who = '{other}'"
    assert database.admin_execute(hidden) == [("PLAN", 0, None)]
    database.execute("DROP POLICY own_rows ON task; CREATE POLICY all_rows ON task USING (true)")
    database.admin_execute("UPDATE task SET plan = clock_timestamp() WHERE state = 'PLAN'")
    ledger.wanted += 5
    ledger.settled()
    assert one.logged("table_down|begin_failed|finish_failed") == []


def test_role_that_does_not_own_the_table_serves_the_rows_that_it_sees(
    database: Database, ledger: Ledger, master: Start, other: str
) -> None:
    master().stop()
    database.execute(ROWS)
    database.execute(f'GRANT SELECT, INSERT, UPDATE, DELETE ON task, task_master, task_held, task_report TO "{other}"')
    database.execute(f'GRANT SELECT, INSERT ON ledger TO "{other}"')
    one = master("--no-create", database.server.conninfo(database.name, other), tables=1)
    database.execute("INSERT INTO task (input, delete) VALUES ('SELECT 1', false)")
    fill_as(database, other, 10)
    ledger.wanted += 10
    ledger.settled()
    rows = database.tasks("who <> session_user")
    assert len(rows) == 10
    assert [(row["state"], row["attempt"]) for row in database.tasks("who = session_user")] == [("PLAN", 0)]
    assert one.logged("table_down|begin_failed|finish_failed") == []


def test_policy_that_refuses_the_end_undoes_the_work(database: Database, ledger: Ledger, master: Start) -> None:
    """The row may be written as anything but DONE."""
    one = master()
    database.execute(
        "ALTER TABLE task ENABLE ROW LEVEL SECURITY; ALTER TABLE task FORCE ROW LEVEL SECURITY;"
        "CREATE POLICY unfinished ON task USING (true) WITH CHECK (state <> 'DONE' OR \"group\" <> 'odd')"
    )
    id = database.insert(ENTRY, group="odd", delete=False)
    row = database.wait(id)
    assert (row["state"], row["code"], row["attempt"], ledger.finished()) == ("FAIL", "42501", 1, 0)
    assert "row-level security" in row["error"]
    assert database.wait(database.insert("SELECT 1", delete=False))["state"] == "DONE"
    assert one.process.poll() is None


def test_role_for_whom_row_security_is_off_is_told_so_in_one_line(
    database: Database, ledger: Ledger, master: Start
) -> None:
    """It has asked for an error where rows would be left out: that is what it gets, and nothing else is lost."""
    one = master()
    database.execute(ROWS + "ALTER TABLE task FORCE ROW LEVEL SECURITY")
    database.admin_execute(f'ALTER ROLE "{database.user}" SET row_security = off')
    database.admin_execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgtask master'"
        f" AND datname = '{database.name}'"
    )
    one.wait_log(r"table_(down|unstable).*row-level security policy")
    passes(2)
    assert len(one.logged(r"\bleading\b")) < 9, "it starts again and again without a pause that grows"
    database.admin_execute(f'ALTER ROLE "{database.user}" RESET row_security')
    database.close()
    ledger.fill(3, input=ENTRY)
    ledger.settled()
    assert len(one.logged(r"table_(down|unstable).*row-level security policy")) == 1
