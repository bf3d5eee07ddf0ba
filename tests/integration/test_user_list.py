"""`pgtask list` and `pgtask show`."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from pgtask import config
from pgtask.user import commands
from pgtask.user.search import Search
from tests.fixtures.catalog import install
from tests.fixtures.command import Answer, at_terminal
from tests.fixtures.database import Database, create, drop
from tests.fixtures.server import AnyServer

Command = Callable[..., Answer]


@pytest.fixture(scope="module")
def filled(server: AnyServer) -> Iterator[Database]:
    """Rows in every state, without a master."""
    database = Database(server, "user_list", "user_list")
    create(database)
    install(database)
    database.execute(
        """
        INSERT INTO task (id, "group", state, plan, start, stop, input, output, error, code, data, key)
        SELECT id, "group", state::state, (day || ' 10:00+00')::timestamptz, (day || start)::timestamptz,
            (day || stop)::timestamptz, input, output, error, code, data, key
        FROM (VALUES
            (1, 'a', 'DONE', '2026-01-01', ' 10:00:01+00', ' 10:00:03.5+00', 'SELECT 1', '1', null, null, 'x', null),
            (2, 'a', 'FAIL', '2026-01-02', ' 10:00:01+00', ' 10:00:02+00', E'SELECT\n  boom', null,
                E'ERROR:  no boom\nSTATEMENT:  SELECT boom', '42703', 'y', 'k'),
            (3, 'b', 'GONE', '2026-01-03', null, ' 11:00+00', 'SELECT 3', null, 'ERROR:  not active', null, null, null),
            (4, 'b', 'STOP', '2026-01-04', null, ' 10:00+00', 'SELECT 4', null, 'ERROR:  stopped', '57014', null, null),
            (6, 'b', 'PLAN', '2026-01-05', null, null, 'SELECT 6', null, null, null, null, 'k'),
            (7, 'b', 'WORK', '2026-01-06', ' 10:00+00', null, 'SELECT 7', null, null, null, null, null)
        ) AS r (id, "group", state, day, start, stop, input, output, error, code, data, key);
        INSERT INTO task (id, "group", plan, input) VALUES (5, 'it''s %s', 'infinity', 'SELECT 5');
        INSERT INTO task (id, "group", plan, input, depend) VALUES (8, 'b', '294276-01-01', 'SELECT 8', '{6,2}');
        """
    )
    yield database
    database.close()
    drop(database)


def ids(answer: Answer) -> list[int]:
    assert (answer.status, answer.err) == (0, "")
    return [row["id"] for row in answer.json]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [8, 7, 6, 5, 4, 3, 2, 1]),
        (("--limit", 2), [8, 7]),
        (("--state", "DONE", "--state", "fail"), [2, 1]),
        (("--state", "PLAN"), [6, 5]),
        (("--state", "WAIT"), [8]),
        (("--due",), [6]),
        (("--running",), [7]),
        (("--failed",), [2]),
        (("--group", "a"), [2, 1]),
        (("-g", "a", "-g", "it's %s"), [5, 2, 1]),
        (("--key", "k"), [6, 2]),
        (("--id", "3"), [3]),
        (("--id", "3-5"), [5, 4, 3]),
        (("--id", "6-"), [8, 7, 6]),
        (("--since", "2026-01-05 00:00+00", "--until", "2027-01-01"), [7, 6]),
        (("--since", "1 hour"), [8, 5]),
        (("--data", "x"), [1]),
        (("--code", "42"), [2]),
        (("--grep", "select.*BOOM"), [2]),
        (("--where", "id > 2 AND \"group\" = 'b' -- no more"), [8, 7, 6, 4, 3]),
        (("--failed", "--group", "b"), []),
    ],
)
def test_filters_choose_and_order(
    filled: Database, pgtask: Command, options: tuple[object, ...], expected: list[int]
) -> None:
    assert ids(pgtask("list", filled.conninfo, *options, "--json")) == expected


def test_list_is_a_line_for_each_row(filled: Database, pgtask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")
    said = pgtask("list", filled.conninfo, "--id", "1-2")
    assert (said.status, said.err) == (0, "")
    assert said.lines == [
        ["2", "FAIL", "a", "2026-01-02 19:00:00+09", "00:00:01", "42703", "SELECT boom"],
        ["1", "DONE", "a", "2026-01-01 19:00:00+09", "00:00:02.5", "SELECT 1"],
    ]
    failed = pgtask("list", filled.conninfo, "--failed")
    assert failed.lines == [["2", "a", "2026-01-02 19:00:01+09", "0", "42703", "ERROR: no boom STATEMENT: SELECT boom"]]
    none = pgtask("list", filled.conninfo, "--group", "none").out.splitlines()
    assert (none[0].split(), len(none)) == (["id", "state", "group", "plan", "took", "code", "input"], 2)
    assert pgtask("list", filled.conninfo, "--columns", "id, state,plan", "--id", 5).lines == [
        ["5", "PLAN", "infinity"]
    ]


def test_json_has_every_value_as_it_is(filled: Database, pgtask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "UTC")
    [row] = pgtask("list", filled.conninfo, "--id", 2, "--json").json
    assert (row["input"], row["plan"], row["timeout"]) == ("SELECT\n  boom", "2026-01-02T10:00:00+00:00", "PT0S")
    assert list(row)[:4] == ["id", "parent", "plan", "start"]
    assert pgtask("list", filled.conninfo, "--id", 5, "--json", "-c", "id,plan").json == [{"id": 5, "plan": "infinity"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "nope"), "column t.nope does not exist"),
        (("--where", "nope = 1"), 'column "nope" does not exist'),
        (("--where", "true; DELETE FROM public.task"), 'syntax error at or near ";"'),
        (("--where", "nextval('public.task_id_seq') > 0"), "cannot execute nextval() in a read-only transaction"),
        (("--where", "pg_sleep(60) IS NULL"), "ask for less, with --id say"),
        (("--grep", "("), "parentheses () not balanced"),
        (("--since", "Tuesday noon"), "invalid input syntax"),
        (("--due", "--state", "PLAN"), "--state and --due cannot both be given"),
        (("--state", "LOST"), "'LOST' is not one of"),
    ],
)
def test_what_is_wrong_is_one_line(filled: Database, pgtask: Command, options: tuple[str, ...], message: str) -> None:
    limit = " options='-c statement_timeout=1000'" if "pg_sleep" in options[-1] else ""
    said = pgtask("list", filled.conninfo + limit, *options)
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


def test_at_a_terminal_a_row_is_a_line_and_nothing_moves_its_cursor(filled: Database) -> None:
    filled.execute(
        """
        INSERT INTO task (id, "group", plan, input)
        VALUES (100, E'\x1b[2J漢字', '2026-01-01', repeat(E'漢字\x07 ', 100))
        """
    )
    seen = at_terminal("list", "-d", filled.conninfo, "--id", "100-", width=80, NO_COLOR="1")
    filled.execute("DELETE FROM task WHERE id = 100")
    assert seen.status == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen.out)
    assert "\x1b" not in plain
    assert "\x07" not in plain
    assert len(plain.splitlines()) == 3
    assert "2026-01-01 00:00:00+00" in plain
    assert "…" in plain.splitlines()[2]
    assert plain.splitlines()[2].startswith("100  PLAN ")
    more = at_terminal("list", "-d", filled.conninfo, "--limit", "7").out.splitlines()
    assert (len(more), more[0]) == (
        10,
        f"there are more in {filled.user}@{filled.name} public.task: --limit 0 shows all",
    )
    whole = at_terminal("list", "-d", filled.conninfo, "--id", "1", COLUMNS="40")
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in whole.out.splitlines()) <= 40


def test_show_has_everything_of_a_row(filled: Database, pgtask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTZ", "UTC")
    said = pgtask("show", filled.conninfo, 2)
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith("-[ task 2 ]--")
    cells = dict(re.split(r" *\| ", line, maxsplit=1) for line in lines[1:] if " | " in line)
    assert (cells["id"], cells["state"], cells["key"], cells["dependents"]) == ("2", "FAIL", "k", "8")
    assert cells["stop"] == "2026-01-02 10:00:02+00"
    assert lines[-4:-2] == ["input      | SELECT", "           +   boom"]
    assert lines[-2:] == ["error      | ERROR:  no boom", "           + STATEMENT:  SELECT boom"]
    assert "output" not in cells
    waiting = pgtask("show", filled.conninfo, 8, "--json").json[0]
    assert waiting["depend"] == [6, 2]
    assert re.search(r"^depend +\| 6 PLAN, 2 FAIL$", pgtask("show", filled.conninfo, 8).out, re.MULTILINE)


def test_show_tells_which_are_not_there(filled: Database, pgtask: Command) -> None:
    said = pgtask("show", filled.conninfo, 1, 999, "--json")
    assert (said.status, [row["id"] for row in said.json]) == (1, [1])
    assert said.err == "there is no task 999: it was removed, or never was\n"


def test_passwords_of_a_remote_are_not_shown(filled: Database, pgtask: Command) -> None:
    filled.insert("SELECT 1", id=101, plan="2027-01-01", remote="host=h password=hunter2")
    shown = [
        pgtask("show", filled.conninfo, 101), pgtask("show", filled.conninfo, 101, "--json"),
        pgtask("list", filled.conninfo, "--id", 101, "--json"), pgtask("list", filled.conninfo, "-c", "id,remote"),
    ]  # fmt: skip
    filled.execute("DELETE FROM task WHERE id = 101")
    assert all("host=h" in said.out and "hunter2" not in said.out for said in shown)


def test_show_has_progress_attempts_and_children(served: Database, pgtask: Command) -> None:
    with served.connect() as locks:
        locks.execute("SELECT pg_advisory_lock(13, 1)")
        id = served.insert(
            "SELECT task_progress(40, 'half'), pg_advisory_lock_shared(13, 1);"
            " INSERT INTO task (input) VALUES ('SELECT 1')",
            group="progress",
        )
        served.wait(id, "WORK")
        while not re.search(r"^progress +\| 40.*% half$", pgtask("show", served.conninfo, id).out, re.MULTILINE):
            assert served.wait(id, "WORK")
    served.wait(id)
    served.execute("SELECT task_retry(%s)", [id])
    served.wait(id, "DONE")
    said = pgtask("show", served.conninfo, id)
    assert re.search(r"^children +\| \d+, \d+$", said.out, re.MULTILINE)
    assert re.search(r"^attempts +\| .*\bDONE\b", said.out, re.MULTILINE)
    assert len(pgtask("show", served.conninfo, id, "--json").json[0]["children"]) == 2


def test_tables_of_a_configuration_are_listed_together(filled: Database, capsys, tmp_path: Path) -> None:
    filled.execute('CREATE SCHEMA "my schema"')
    install(filled, "my schema", 'ta"sk %s')
    filled.execute(
        'INSERT INTO "my schema"."ta""sk %s" (plan, input) VALUES (\'2026-05-05\', \'SELECT 99\')'.replace("%", "%%"),
        [],
    )
    file = tmp_path / "pgtask.toml"
    conninfo = json.dumps(filled.conninfo)
    file.write_text(
        f"[[database]]\nconninfo = {conninfo}\n"
        f'[[database]]\nconninfo = {conninfo}\nschema = "my schema"\ntable = \'ta"sk %s\'\n'
    )

    with pytest.raises(SystemExit):
        commands.user.main(["list", "--config", str(file), "--limit", "1", "--json"], prog_name="pgtask")
    rows = json.loads(capsys.readouterr().out)
    who = f"{filled.user}@{filled.name}"
    assert [(row["table"], row["input"]) for row in rows] == [
        (f"{who} public.task", "SELECT 8"), (f'{who} my schema.ta"sk %s', "SELECT 99"),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_other_encodings(server: AnyServer, pgtask: Command, encoding: str) -> None:
    name = f"user_{encoding.lower()}"
    database = Database(server, name, name)
    create(database)
    try:
        with psycopg.connect(server.conninfo(), autocommit=True) as session:
            session.execute(f"DROP DATABASE {name}")
            session.execute(
                f"CREATE DATABASE {name} OWNER {name} TEMPLATE template0"
                f" ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
            )
        install(database)
        with psycopg.connect(database.conninfo, client_encoding=encoding) as session:
            session.execute(
                b"INSERT INTO task (\"group\", plan, input) VALUES ('caf\xe9', '2026-01-01', 'SELECT ''\xfc''')"
            )
        row = pgtask("list", database.conninfo, "--json").json[0]
        expected = ("caf\ufffd", "SELECT '\ufffd'") if encoding == "SQL_ASCII" else ("café", "SELECT 'ü'")
        assert (row["group"], row["input"]) == expected
        assert pgtask("list", database.conninfo).lines[0][2] == expected[0]
        assert expected[1] in pgtask("show", database.conninfo, row["id"]).out
        said = pgtask("submit", database.conninfo, "SELECT '漢'", "--plan", "2027-01-01")
        if encoding == "LATIN1":
            assert (said.status, said.err.count("\n")) == (2, 1)
            assert 'has no equivalent in encoding "LATIN1"' in said.err
        else:
            assert (
                pgtask("list", database.conninfo, "--json", "--id", said.out.strip()).json[0]["input"] == "SELECT '漢'"
            )
    finally:
        database.close()
        drop(database)


def test_usual_questions_are_answered_by_an_index(database: Database) -> None:
    """As many rows that have ended as make a walk over them show."""
    install(database)
    database.execute(
        """
        INSERT INTO task (state, plan, start, stop, "group", input)
        SELECT 'DONE', moment, moment, moment, 'g' || i % 100, 'SELECT 1'
        FROM generate_series(1, 20000) AS i, LATERAL (SELECT now() - interval '1 day' AS moment) AS m;
        INSERT INTO task (plan, input) SELECT now() + interval '1 day', 'SELECT 1' FROM generate_series(1, 100);
        """
    )
    database.execute("ANALYZE task")
    table = config.load(None, [database.conninfo], {}, {}).tables[0]
    indexes = {"due": "due", "plan": "due", "running": "slot", "wait": "wait", "any": "pkey"}
    for kind, suffix in indexes.items():
        search, index = Search(kind=kind), f"task_{suffix}"
        plan = explained(database, table, search)
        assert f"using {index} " in plan or f"on {index} " in plan, plan
        assert "Seq Scan" not in plan


def explained(database: Database, table: config.TableConfig, search: Search) -> str:
    with psycopg.connect(database.conninfo, cursor_factory=psycopg.RawCursor) as session:
        text = b"EXPLAIN " + search._text(table, ("id",))
        return "\n".join(row[0] for row in session.execute(text, search._values(50)).fetchall())
