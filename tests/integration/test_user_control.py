"""`pgtask cancel`, `retry`, `hold` and `release`; and what a role with few rights is told."""

from collections.abc import Callable, Iterator

import pytest

from tests.fixtures.catalog import install
from tests.fixtures.command import Answer, at_terminal
from tests.fixtures.database import Database

Command = Callable[..., Answer]


def states(database: Database, group: str) -> list[str]:
    return [row["state"] for row in database.tasks(f"\"group\" = '{group}'")]


def later(database: Database, group: str, count: int = 1) -> list[int]:
    return [database.insert("SELECT 1", group=group, plan="2030-01-01") for _ in range(count)]


def test_cancel_tells_of_each_what_was_done(served: Database, pgtask: Command) -> None:
    [waiting] = later(served, "cancel")
    done = served.wait(served.insert("SELECT 1", group="cancelled", delete=False))["id"]
    assert pgtask("cancel", served.conninfo, waiting) == (0, f"task {waiting}: stopped\n", "")
    said = pgtask("cancel", served.conninfo, waiting, done, 999999999)
    assert (said.status, said.out) == (1, "")
    assert said.err.splitlines()[:2] == [f"task {n}: not stopped: it has ended before" for n in (waiting, done)]
    assert said.err.splitlines()[2].startswith("task 999999999: not stopped: there is no task 999999999. A task with")
    answers = pgtask("cancel", served.conninfo, done, "--json").json
    assert answers == [{"id": done, "done": False, "why": "it has ended before"}]


def test_running_task_is_cancelled(served: Database, pgtask: Command) -> None:
    with served.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(14, 1)")
        id = served.insert("SELECT pg_advisory_lock_shared(14, 1)", group="running")
        served.wait(id, "WORK")
        assert pgtask("cancel", served.conninfo, id).status == 0
        assert pgtask("wait", served.conninfo, id, "--json").json[0]["code"] == "57014"


def test_many_are_stopped_only_with_a_yes(served: Database, pgtask: Command) -> None:
    later(served, "many", 3)
    said = pgtask("cancel", served.conninfo, "--group", "many")
    assert (said.status, said.out) == (2, "")
    assert said.err == "pgtask: 3 tasks fit; to cancel them without a question say --yes\n"
    asked = at_terminal("cancel", "-d", served.conninfo, "--group", "many", answer=b"n\n")
    assert (asked.status, states(served, "many")) == (1, ["PLAN"] * 3)
    assert "cancel 3 tasks? [y/N]" in asked.out
    first = served.tasks("\"group\" = 'many'")[0]["id"]
    asked = at_terminal("cancel", "-d", served.conninfo, "--group", "many", "--where", f"id > {first}", answer=b"y\n")
    assert (asked.status, states(served, "many")) == (0, ["PLAN", "STOP", "STOP"])
    assert "2 of 2 tasks that fit: stopped" in asked.out
    assert pgtask("cancel", served.conninfo, "-g", "many", "--yes", "--json").json == {"fit": 1, "done": 1}
    none = pgtask("cancel", served.conninfo, "--group", "many", "--yes")
    assert (none.status, none.out) == (1, "0 of 0 tasks that fit: stopped\n")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("cancel", ()), ("cancel", (1, "--group", "x")), ("retry", ()), ("retry", (1, "--failed"))],
)
def test_it_must_be_said_which(served: Database, pgtask: Command, command: str, arguments: tuple[object, ...]) -> None:
    said = pgtask(command, served.conninfo, *arguments)
    assert (said.status, said.out) == (2, "")
    assert "say which tasks: their ids, or options that they fit, not both" in said.err


def test_retry_runs_what_has_ended(served: Database, pgtask: Command) -> None:
    failed = [served.wait(served.insert("SELECT 1/0", group="retry"))["id"] for _ in range(2)]
    [waiting] = later(served, "retry")
    assert pgtask("retry", served.conninfo, failed[0]) == (0, f"task {failed[0]}: put back\n", "")
    assert len(served.wait(failed[0], "FAIL")["attempts"]) == 1
    said = pgtask("retry", served.conninfo, waiting, 999999999)
    assert said.status == 1
    assert said.err.splitlines()[0] == f"task {waiting}: not put back: it is about to run anyway"
    assert "there is no task 999999999" in said.err
    said = pgtask("retry", served.conninfo, failed[0], waiting, "--json")
    why = "it is about to run anyway"
    answers = [{"id": failed[0], "done": True, "why": None}, {"id": waiting, "done": False, "why": why}]
    assert (said.status, said.json) == (1, answers)
    served.wait(failed[0], "FAIL")
    said = pgtask("retry", served.conninfo, "--failed", "--group", "retry", "--yes")
    assert (said.status, said.out) == (0, "2 of 2 tasks that fit: put back\n")
    assert [len(served.wait(id, "FAIL")["attempts"]) for id in failed] == [3, 1]
    assert states(served, "retry")[2] == "PLAN"


def test_retry_leaves_those_whose_key_is_taken_and_says_so(served: Database, pgtask: Command) -> None:
    failed = served.wait(served.insert("SELECT 1/0", group="key", key="one"))["id"]
    other = served.insert("SELECT 1", group="key", key="one", plan="2030-01-01")
    said = pgtask("retry", served.conninfo, failed)
    assert said.status == 1
    assert f'cannot run again: task {other} with the same key "one" has not ended' in said.err
    said = pgtask("retry", served.conninfo, "--group", "key", "--yes")
    assert (said.status, said.out) == (1, "0 of 1 tasks that fit: put back\n")
    assert "1 tasks are left as they are: another with the same key" in said.err


def test_groups_are_held_listed_and_released(served: Database, pgtask: Command) -> None:
    assert pgtask("hold", served.conninfo, "held one", "it's") == (0, "held one: held\nit's: held\n", "")
    id = served.insert("SELECT 1", group="held one", delete=False)
    assert pgtask("hold", served.conninfo, "it's") == (1, "", "it's: held already\n")
    listed = pgtask("hold", served.conninfo, "--json").json
    assert {row["group"] for row in listed} >= {"held one", "it's"}
    assert {row["by"] for row in listed} == {served.user}
    assert [row[0] for row in pgtask("hold", served.conninfo).lines if row[0] == "held one"] == ["held one"]
    assert served.task(id)["state"] == "PLAN"  # type: ignore[index]
    said = pgtask("release", served.conninfo, "held one", "nobody", "--json")
    assert (said.status, said.json) == (1, [{"group": "held one", "done": True}, {"group": "nobody", "done": False}])
    served.wait(id, "DONE")
    assert pgtask("release", served.conninfo, "it's", "nobody") == (1, "it's: released\n", "nobody: was not held\n")


@pytest.fixture
def guest(database: Database) -> Iterator[Callable[[str], str]]:
    """`guest(rights)` is the conninfo of a role that has these; the table is "my schema"."ta""sk %s"."""
    install(database, "my schema", 'ta"sk %s')
    role = f"{database.name}_guest"
    database.admin_execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")

    def guest(grants: str) -> str:
        for grant in filter(None, grants.split(";")):
            database.admin_execute(f"GRANT {grant} TO {role}")
        return database.server.conninfo(database.name, role, password="secret")

    yield guest
    database.admin_execute(f"DROP OWNED BY {role}")
    database.admin_execute(f"DROP ROLE {role}")


ODD = ("--schema", "my schema", "--table", 'ta"sk %s')
ON = 'ON "my schema"."ta""sk %s"'
HELD = 'ON "my schema"."ta""sk %s_held"'
USAGE = 'USAGE ON SCHEMA "my schema"'


@pytest.mark.parametrize(
    ("grants", "call", "hint"),
    [
        ("", ("list",), f"GRANT {USAGE} TO who; GRANT SELECT {ON} TO who"),
        (USAGE, ("show", 1), f"GRANT SELECT {ON} TO who"),
        (f"{USAGE};INSERT {ON}", ("wait", 1, "--timeout", "1 ms"), f"GRANT SELECT {ON} TO who"),
        (f"{USAGE};SELECT {ON}", ("submit", "SELECT 1"), f"GRANT INSERT {ON} TO who"),
        (f"{USAGE};SELECT {ON}", ("cancel", 1), f"GRANT UPDATE {ON} TO who"),
        (f"{USAGE};SELECT {ON}", ("retry", 1), f"GRANT UPDATE {ON} TO who"),
        (f"{USAGE};SELECT {ON}", ("purge", "--older-than", "0"), f"GRANT UPDATE, DELETE {ON} TO who"),
        (USAGE, ("hold", "x"), f"GRANT SELECT, INSERT, DELETE {HELD} TO who"),
        (f"{USAGE};SELECT {HELD}", ("release", "x"), f"GRANT INSERT, DELETE {HELD} TO who"),
    ],
)
def test_lacking_rights_are_named_with_the_grants_that_mend_it(
    database: Database, guest: Callable[[str], str], pgtask: Command, grants: str, call: tuple[str, object], hint: str
) -> None:
    database.schema, database.table = "my schema", 'ta"sk %s'
    assert database.insert("SELECT 1", plan="2030-01-01") == 1
    conninfo = guest(grants)
    said = pgtask(call[0], conninfo, *call[1:], *ODD)
    who = f"{database.name}_guest"
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert "permission denied for" in said.err
    told = said.err.rstrip("\n").split("; who owns it can mend that: ")[1]
    assert told == hint.replace("who", who)
    for grant in told.split("; "):
        database.execute(grant)
    assert pgtask(call[0], conninfo, *call[1:], *ODD).status in (0, 1, 124)


def test_role_that_may_only_insert_is_told_that_it_cannot_know_the_id(
    database: Database, guest: Callable[[str], str], pgtask: Command
) -> None:
    conninfo = guest(f'{USAGE};INSERT (input, "group") {ON}')
    said = pgtask("submit", conninfo, "SELECT 1", "--group", "g", "--wait", *ODD)
    assert (said.status, said.out) == (0, "")
    assert said.err.startswith("queued; this role may not read its id, nor wait for it: GRANT SELECT ON")
    database.schema, database.table = "my schema", 'ta"sk %s'
    assert [(row["group"], row["delete"]) for row in database.tasks()] == [("g", True)]


def test_where_there_is_no_table_it_is_said_how_to_make_it(database: Database, pgtask: Command) -> None:
    said = pgtask("list", database.conninfo, "--table", "my jobs")
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert "there is no task table public.my jobs: " in said.err
    assert said.err.endswith("pgtask sql --schema public --table 'my jobs'\n")
    database.execute('CREATE TABLE "my jobs" (id bigint PRIMARY KEY, input text)')
    assert "brings the table up to date" in pgtask("list", database.conninfo, "--table", "my jobs").err


def test_where_there_is_no_server_it_is_one_line_without_the_password(pgtask: Command) -> None:
    said = pgtask("list", "host=127.0.0.1 port=1 user=u dbname=d password=hunter2")
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert said.err.startswith("pgtask: u@d public.task: ")
    assert "hunter2" not in said.err
