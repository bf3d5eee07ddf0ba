"""Asynchronous triggers: what the task sees of the rows, what it is set to, and who may make and fire one."""

from collections.abc import Callable, Iterator
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import errors, sql

from tests.fixtures.catalog import install
from tests.fixtures.database import Database
from tests.fixtures.wait import eventually

TYPES = {
    # type: values, as SQL
    "boolean": ["true", "NULL"],
    "smallint": ["-32768"],
    "bigint": ["9223372036854775807"],
    "numeric": ["'NaN'", "1e-30", "12345678901234567890.123456789"],
    "numeric(6,2)": ["1234.50"],
    "real": ["0.1", "'-Infinity'"],
    "double precision": ["0.1 + 0.2", "'-0'", "5e-324"],
    "money": ["-1234.56::numeric"],
    '"char"': ["'a'"],
    "char(5)": ["'a'"],
    "varchar(9)": ["'it''s \\'"],
    "text": ["''", "'NULL'", r"""E'a "b" ''c'' \\ {d} (e),\n\t$task$ %L'""", "'π'", "NULL"],
    "name": ["'a name'"],
    "bytea": [r"'\x00ff5c27'"],
    "date": ["'infinity'", "'0044-03-15 BC'"],
    "time(3) with time zone": ["'12:34:56.789+05:30'"],
    "timestamp": ["'2024-02-03 04:05:06.000007'"],
    "timestamp with time zone": ["'1890-01-01 00:00:00+00'", "'-infinity'"],
    "interval": ["'-1 year -2 mons +3 days -04:05:06.7'", "'1 day -1 hour'"],
    "interval day to second(3)": ["'3 days 04:05:06.789'"],
    "uuid": ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"],
    "inet": ["'192.168.0.1/24'"],
    "bit varying(5)": ["B'101'"],
    "json": ["""' {"b": 1, "b": [null, "\\u00e9"]}'""", "'\"a\"'"],
    "jsonb": ["""'{"a": null}'""", "'null'", "NULL"],
    "xml": ["'<a b=\"c\">d</a>'"],
    "tsvector": ["'a:1A ''b c'':2'"],
    "point": ["'(0.1,1e300)'"],
    "box": ["'(1,1),(0,0)'"],
    "int4range": ["'[1,5)'", "'empty'"],
    "int[]": ["'[2:3]={7,NULL}'", "'{}'", "'{{1,2},{3,4}}'"],
    "text[]": [r"""ARRAY['NULL', '', NULL, 'a"b\', '{,}']"""],
    "box[]": ["ARRAY['(1,1),(0,0)'::box]"],
    "int2vector": ["'1 2'"],
    "regclass": ["'payment'", "'-'"],
    '"My Mood"': ["'it''s %s fine'"],
    '"two %s, words"': ["""ROW(1, 'a "b", c\\', ARRAY[1,NULL], NULL)"""],
    '"two %s, words"[]': ["ARRAY[ROW(1, '', '{}', now())::\"two %s, words\", NULL]"],
    "positive": ["7", "NULL"],
    "positives": ["'{7,8}'"],
    "cost": ["ROW(2, 'b', NULL, NULL)"],
}
"""Every way in which a type writes and reads its values."""

MADE = """
    CREATE TYPE "My Mood" AS ENUM ('it''s %s fine', 'bad');
    CREATE TYPE "two %s, words" AS (gone int, "a" int, "b, c" text, d int[], e timestamptz);
    ALTER TYPE "two %s, words" DROP ATTRIBUTE gone;
    CREATE DOMAIN positive AS numeric(5,1) CHECK (VALUE > 0);
    CREATE DOMAIN positives AS int[] CHECK (VALUE[1] > 0);
    CREATE DOMAIN cost AS "two %s, words";
    CREATE TABLE payment (id bigint GENERATED ALWAYS AS IDENTITY, account int, amount numeric(10,2));
    CREATE TABLE seen (what text, value text);
    CREATE FUNCTION binary_of(anyelement) RETURNS text LANGUAGE plpgsql AS $$
    DECLARE
        sent bytea;
    BEGIN
        EXECUTE format('SELECT %s($1)', (SELECT typsend FROM pg_type WHERE oid = pg_typeof($1))) INTO sent USING $1;
        RETURN coalesce(encode(sent, 'hex'), 'null');
    END $$;
    CREATE PROCEDURE note(what text, value int) LANGUAGE sql AS 'INSERT INTO seen VALUES ($1, $2)';
    CREATE PROCEDURE was(a int, b int) LANGUAGE sql AS $$INSERT INTO seen VALUES ('call', concat(a, ' was ', b))$$"""

ODD_SESSION = {
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kolkata",
    "extra_float_digits": "-3",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "quote_all_identifiers": "on",
}


@pytest.fixture(scope="module", autouse=True)
def schema(serving: tuple[Database, Any]) -> None:
    serving[0].execute(MADE)


@pytest.fixture
def table(served: Database) -> Iterator[Callable[..., str]]:
    """`table(columns)` makes a table of the test's own, gone at its end; its name is `fired`."""

    def make(columns: str, name: str = "fired") -> str:
        served.execute(f"CREATE TABLE {name} ({columns})")
        return name

    yield make
    served.execute("DROP TABLE IF EXISTS fired, staged")
    served.execute("DELETE FROM task")
    served.execute("TRUNCATE payment, seen")


def fires(
    database: Database, statement: str, *settings: str, on: str = "fired", when: str = "INSERT", **how: str
) -> None:
    """Make an asynchronous trigger; `each` is "ROW" or "STATEMENT", `name` the trigger's, `tables` its REFERENCING."""
    each = how.get("each", f"{how['tables']} FOR EACH STATEMENT" if "tables" in how else "FOR EACH ROW")
    arguments = sql.SQL(", ").join(map(sql.Literal, [statement, *settings]))
    text = f"CREATE TRIGGER {how.get('name', 'asynchronous')} AFTER {when} ON {on} {each} EXECUTE FUNCTION task_async"
    database.execute(sql.SQL(cast(LiteralString, text + "({})")).format(arguments))


def seen(database: Database) -> list[tuple[Any, ...]]:
    """What the tasks have noted, when all have ended well."""
    eventually(lambda: not database.tasks("state IN ('PLAN', 'TAKE', 'WORK')"))
    assert not (bad := database.tasks("state NOT IN ('DONE')")), bad
    return database.execute("SELECT what, value FROM seen ORDER BY what, value")


# Values


@pytest.mark.parametrize("way", ["ROW", "STATEMENT"])
def test_values_of_every_type_arrive_as_they_were_whatever_the_session_is_set_to(
    served: Database, table: Callable[..., str], way: str
) -> None:
    xml = served.admin_execute("SELECT count(*) FROM pg_config WHERE setting ~ 'with-libxml'") != [(0,)]
    types = {type: values for type, values in TYPES.items() if xml or type != "xml"}
    names = [f"c{number}" for number in range(len(types))]
    table("n int, dropped int, " + ", ".join(f"{name} {type}" for name, type in zip(names, types, strict=True)))
    served.execute("ALTER TABLE fired DROP COLUMN dropped")
    for n in range(max(map(len, types.values()))):
        values = (some[n] if n < len(some) else "NULL" for some in types.values())
        served.execute(f"INSERT INTO fired VALUES ({n}, {', '.join(values)})")
    served.execute("CREATE TABLE staged AS SELECT * FROM fired; TRUNCATE fired")
    # By their binary form, which has what text and equality leave out.
    told = ", ".join(f"('{name}', concat(pg_typeof({name}), ' ', binary_of({name})))" for name in names)
    query = f"SELECT concat(n, ' ', what), value FROM {{}} CROSS JOIN LATERAL (VALUES {told}) AS v (what, value)"
    fires(
        served,
        f"INSERT INTO seen {query.format('new')}",
        **({"tables": "REFERENCING NEW TABLE AS new"} if way == "STATEMENT" else {}),
    )
    with served.connect(autocommit=False) as session:
        for name, value in ODD_SESSION.items():
            session.execute("SELECT set_config(%s, %s, false)", [name, value])
        session.execute("INSERT INTO fired SELECT * FROM staged")
        session.execute("RESET quote_all_identifiers")
        expected = session.execute(f"{query.format('fired')} ORDER BY 1, 2".encode()).fetchall()
        # What is carried needs the table no more.
        session.execute("DROP TABLE fired, staged")
    assert len(expected) > 100
    assert seen(served) == expected


def test_columns_of_every_kind_are_carried_in_their_order(served: Database, table: Callable[..., str]) -> None:
    table(
        """id bigint GENERATED ALWAYS AS IDENTITY, gone int, "a ""b"" {c} %s" int, "group" text, "NEW" text,
        twice int GENERATED ALWAYS AS ("a ""b"" {c} %s" * 2) STORED"""
    )
    served.execute("""ALTER TABLE fired DROP COLUMN gone, ADD COLUMN "select" int DEFAULT 5""")
    columns = 'id, "a ""b"" {c} %s", "group", "NEW", twice, "select"'
    if served.connect().info.server_version >= 180000:
        served.execute('ALTER TABLE fired ADD COLUMN virtual int GENERATED ALWAYS AS ("select" * 3 % 7) VIRTUAL')
        columns += ", virtual"
    note = "INSERT INTO seen SELECT '{}', to_json(new)::text FROM new"
    fires(served, note.format("row"))
    fires(served, note.format("statement"), tables="REFERENCING NEW TABLE AS new", name="too")
    served.execute("""INSERT INTO fired ("a ""b"" {c} %s", "group", "NEW") VALUES (4, 'g', 'n')""")
    [(whole,)] = served.execute(f"SELECT to_json(f)::text FROM (SELECT {columns} FROM fired) AS f")
    assert seen(served) == [("row", whole), ("statement", whole)]


def test_a_row_may_have_as_many_columns_as_a_table(served: Database, table: Callable[..., str]) -> None:
    table(", ".join(f"c{number} int DEFAULT {number}" for number in range(1200)))
    note = "INSERT INTO seen SELECT '{}', md5(to_json(new)::text) FROM new"
    fires(served, note.format("row"))
    fires(served, note.format("statement"), tables="REFERENCING NEW TABLE AS new", name="too")
    served.execute("INSERT INTO fired DEFAULT VALUES")
    [(whole,)] = served.execute("SELECT md5(to_json(f)::text) FROM fired AS f")
    assert seen(served) == [("row", whole), ("statement", whole)]


def test_rows_without_columns_are_counted(served: Database, table: Callable[..., str]) -> None:
    table("")
    note = "INSERT INTO seen SELECT '{}', count(*) FROM new"
    fires(served, note.format("row"))
    fires(served, note.format("statement"), tables="REFERENCING NEW TABLE AS new", name="too")
    served.execute("INSERT INTO fired SELECT FROM generate_series(1, 3)")
    assert seen(served) == [("row", "1")] * 3 + [("statement", "3")]


def test_rows_of_partitions_are_seen_as_these_and_as_their_table_have_them(
    served: Database, table: Callable[..., str]
) -> None:
    table("a int, b text) PARTITION BY LIST (a")
    served.execute("CREATE TABLE fired_1 (gone int, b text, a int); ALTER TABLE fired_1 DROP COLUMN gone")
    served.execute("ALTER TABLE fired ATTACH PARTITION fired_1 FOR VALUES IN (1)")
    served.execute("CREATE TABLE fired_2 PARTITION OF fired FOR VALUES IN (2)")
    note = "INSERT INTO seen SELECT '{} ' || a, b FROM new"
    fires(served, note.format("row"))
    fires(served, note.format("statement"), tables="REFERENCING NEW TABLE AS new", name="too")
    served.execute("INSERT INTO fired VALUES (1, 'one'), (2, 'two')")
    assert seen(served) == [("row 1", "one"), ("row 2", "two"), ("statement 1", "one"), ("statement 2", "two")]


# Statements


def test_every_statement_that_can_read_rows_reads_them(served: Database, table: Callable[..., str]) -> None:
    table("account int, amount int")
    served.execute("INSERT INTO seen SELECT 'account ' || n, 0 FROM generate_series(1, 4) AS n")
    statements = [
        "UPDATE seen SET value = new.amount FROM new WHERE what = 'account ' || new.account",
        "DELETE FROM seen USING new WHERE what = 'account ' || new.account + 1",
        "-- a comment\n /* and /another */ INSERT INTO seen SELECT 'insert', amount FROM new",
        "WITH x AS (SELECT amount FROM new) INSERT INTO seen SELECT 'with', amount FROM x;",
        """with /* and */ recursive x (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x, new WHERE n < amount)
           INSERT INTO seen SELECT 'recursive', count(*) FROM x""",
        "(SELECT amount FROM new) UNION ALL VALUES (4)",
        "TABLE new",
        "CALL note('call $task$', new.amount);",
        "DO $$ BEGIN INSERT INTO seen VALUES ('no rows are new to DO', 0); END $$",
    ]
    if served.connect().info.server_version >= 150000:
        statements += [
            "MERGE INTO seen USING new ON what = 'merge' WHEN NOT MATCHED THEN INSERT VALUES ('merge', new.amount)"
        ]
    for number, statement in enumerate(statements):
        fires(served, statement, "delete = false", name=f"t{number}")
    served.execute("INSERT INTO fired VALUES (3, 8)")
    expected = [("account 1", "0"), ("account 2", "0"), ("account 3", "8"), ("call $task$", "8"), ("insert", "8")]
    expected += [("merge", "8")] * (len(statements) == 10)
    expected += [("no rows are new to DO", "0"), ("recursive", "8"), ("with", "8")]
    assert seen(served) == expected
    outputs = {task["input"].split("\n")[-1]: task["output"] for task in served.tasks()}
    assert outputs["(SELECT amount FROM new) UNION ALL VALUES (4)"] == "8\n4"
    assert outputs["TABLE new"] == "account\tamount\n3\t8"


def test_one_trigger_serves_inserts_updates_and_deletes(served: Database, table: Callable[..., str]) -> None:
    table("a int")
    query = "concat(new.a, ' was ', old.a) FROM new FULL JOIN old ON true"
    fires(served, f"INSERT INTO seen SELECT 'row', {query}", when="INSERT OR UPDATE OR DELETE")
    fires(served, "CALL was(new.a, old.a)", when="INSERT OR UPDATE OR DELETE", name="too")
    for statement in ("INSERT INTO fired VALUES (1)", "UPDATE fired SET a = 2", "DELETE FROM fired"):
        served.execute(statement)
    assert seen(served) == [(what, value) for what in ("call", "row") for value in (" was 2", "1 was ", "2 was 1")]


def test_a_statement_makes_one_task_of_all_its_rows_and_none_of_none(
    served: Database, table: Callable[..., str]
) -> None:
    table("id int, amount int")
    fires(served, "INSERT INTO seen SELECT 'in', sum(amount) FROM added", tables="REFERENCING NEW TABLE AS added")
    moved = 'REFERENCING NEW TABLE AS new OLD TABLE AS "the Old"'
    fires(served, 'CALL was(new.amount, "the Old".amount)', when="UPDATE", tables=moved, name="called")
    joined = "INSERT INTO seen SELECT 'join', sum(new.amount - o.amount) FROM new JOIN \"the Old\" AS o USING (id)"
    fires(served, joined, when="UPDATE", tables=moved, name="joined")
    fires(served, "INSERT INTO seen VALUES ('none', 0)", when="UPDATE", tables=moved, name="blind")
    served.execute("INSERT INTO fired SELECT n, n FROM generate_series(1, 5000) AS n")
    served.execute("UPDATE fired SET amount = amount + id WHERE id < 4")
    served.execute("UPDATE fired SET amount = 0 WHERE false")
    assert seen(served) == [
        *[("call", f"{2 * n} was {n}") for n in (1, 2, 3)],
        ("in", str(5000 * 5001 // 2)),
        ("join", "6"),
        ("none", "0"),
    ]
    assert len(served.tasks()) == 4


def test_statement_that_needs_no_rows_is_run_as_it_is(served: Database, table: Callable[..., str]) -> None:
    table("a int")
    for number, when in enumerate(["INSERT OR UPDATE", "TRUNCATE"]):
        fires(served, "ANALYZE fired", when=when, each="FOR EACH STATEMENT", name=f"t{number}")
    served.execute("INSERT INTO fired VALUES (1)")
    served.execute("TRUNCATE fired")
    assert [task["input"] for task in served.tasks()] == ["ANALYZE fired"] * 2


def test_several_triggers_are_several_subscribers_and_go_back_with_their_transaction(
    served: Database, table: Callable[..., str]
) -> None:
    table("a int")
    for name in ("one", "two"):
        fires(served, f"INSERT INTO seen SELECT '{name}', a FROM new", name=name)
    with served.connect(autocommit=False) as session:
        session.execute("INSERT INTO fired VALUES (1)")
        session.rollback()
        session.execute("INSERT INTO fired VALUES (2)")
    assert seen(served) == [("one", "2"), ("two", "2")]
    assert len(served.tasks()) == 2


# Settings


def test_settings_take_values_of_the_row(served: Database, table: Callable[..., str]) -> None:
    table('account int, "is it" bool, note text')
    settings = [
        "group = account {account} of {{{{x}}",
        '"delete"=false',
        " max = {new.account}",
        "timeout = {account}.5 s",
        "data = {old.note}: {note}, {is it}",
        "retry = 2",
        "delay = 1 day",
    ]
    fires(served, "SELECT 1", *settings, when="INSERT OR UPDATE")
    served.execute("INSERT INTO fired VALUES (3, true, 'no \"{account}\" =')")
    served.execute("UPDATE fired SET note = 'b'")
    served.execute("UPDATE fired SET account = NULL")
    columns = '"group", "delete", max, timeout::text, data, retry, plan > now() + interval \'23 hours\''
    group = "account 3 of {{x}"
    assert served.execute(f"SELECT {columns} FROM task ORDER BY id") == [
        # What holds a null is not set: the column keeps its default.
        (group, False, 3, "00:00:03.5", None, 2, True),
        (group, False, 3, "00:00:03.5", 'no "{account}" =: b, t', 2, True),
        ("group", False, 0, "00:00:00", "b: b, t", 2, True),
    ]


def test_rows_of_a_statement_are_parted_by_what_the_settings_mention(
    served: Database, table: Callable[..., str]
) -> None:
    table("account int, amount int")
    served.execute("INSERT INTO fired SELECT n % 3, n FROM generate_series(1, 30) AS n")
    both = "REFERENCING NEW TABLE AS new OLD TABLE AS old"
    statement = (
        "INSERT INTO seen SELECT string_agg(DISTINCT new.account || ' ' || old.account, ','), count(*) FROM new, old"
    )
    fires(served, statement, "group = to {account}", when="UPDATE", tables=both)
    served.execute("UPDATE fired SET account = 7 WHERE account <> 0")
    served.execute("UPDATE fired SET account = NULL WHERE account = 0")
    # A row that it was follows the row that it is.
    assert seen(served) == [("7 1,7 2", "400"), (None, "100")]
    assert [task["group"] for task in served.tasks()] == ["to 7", "group"]


@pytest.mark.parametrize(
    ("arguments", "how", "error", "message"),
    [
        (["SELECT 1"], {"timing": "BEFORE"}, errors.TriggerProtocolViolated, "fires BEFORE"),
        ([], {}, errors.InvalidParameterValue, "no statement"),
        ([" \n"], {}, errors.InvalidParameterValue, "no statement"),
        (["SELECT 1", "state = DONE"], {}, errors.UndefinedColumn, "'state = DONE' sets nothing"),
        (["SELECT 1", "max"], {}, errors.UndefinedColumn, "'max' sets nothing"),
        (["SELECT 1", "max = many"], {}, errors.InvalidTextRepresentation, 'integer: "many"'),
        (["SELECT 1", "max = {a}000000000000"], {}, errors.NumericValueOutOfRange, "out of range"),
        (["SELECT 1", "timeout = -1 s"], {}, errors.InvalidParameterValue, "timeout >= "),
        (["SELECT 1", "delay = -1 s"], {}, errors.InvalidParameterValue, "negative"),
        (["SELECT 1", "group = {b}"], {}, errors.UndefinedColumn, "{b} names no column"),
        (["SELECT 1", 'data = {"a": 1}'], {}, errors.UndefinedColumn, '{"a": 1} names no column'),
        (["SELECT 1", "data = {"], {}, errors.UndefinedColumn, "{ names no column"),
        (["SELECT 1", "debounce = 1 s"], {}, errors.InvalidParameterValue, "debounce needs a key"),
        (["SELECT 1", "key = {a}"], {}, errors.InvalidParameterValue, "nothing but values of the row"),
        (["SELECT 1", "key = a", "delay = 1 s", "debounce = 1 s"], {}, errors.InvalidParameterValue, "exclude"),
        (["SELECT a FROM new"], {"each": "STATEMENT"}, errors.UndefinedTable, "uses new"),
        (["SELECT 1", "group = {a}"], {"each": "STATEMENT"}, errors.UndefinedTable, "no rows to take {a} from"),
    ],
)
def test_nonsense_is_an_error_of_the_firing_statement_that_names_the_trigger_and_mends_it(
    served: Database,
    table: Callable[..., str],
    arguments: list[str],
    how: dict[str, str],
    error: type[psycopg.Error],
    message: str,
) -> None:
    table("a int")
    served.execute(
        sql.SQL("CREATE TRIGGER t {} INSERT ON fired FOR EACH {} EXECUTE FUNCTION task_async({})").format(
            sql.SQL(cast(LiteralString, how.get("timing", "AFTER"))),
            sql.SQL(cast(LiteralString, how.get("each", "ROW"))),
            sql.SQL(", ").join(map(sql.Literal, arguments)),
        )
    )
    with pytest.raises(error) as raised:
        served.execute("INSERT INTO fired VALUES (1)")
    said = raised.value.diag
    assert message in (said.message_primary or "")
    assert "trigger t on public.fired" in (said.message_primary or "")
    assert said.message_hint
    assert served.execute("SELECT 1 FROM fired") == served.execute("SELECT 1 FROM task") == []


def test_words_of_literals_and_comments_ask_for_no_rows(served: Database, table: Callable[..., str]) -> None:
    table("a int")
    statement = "INSERT INTO seen VALUES ('from new', \"from old\") -- from new\n/* join old */"
    fires(served, statement.replace('"from old"', "'b'"), each="FOR EACH STATEMENT")
    served.execute("INSERT INTO fired VALUES (1)")
    assert seen(served) == [("from new", "b")]


# One task for each key


def test_a_key_has_one_unfinished_task_with_the_last_rows(served: Database, table: Callable[..., str]) -> None:
    table("account int, amount int")
    settings = ("key = account {account}", "delay = 1 day")
    fires(served, "SELECT amount FROM new", *settings)
    served.execute("INSERT INTO fired VALUES (1, 10), (2, 20)")
    [first, _] = served.tasks()
    served.execute("INSERT INTO fired VALUES (1, 11)")
    [again, other] = served.tasks()
    assert (again["id"], again["key"], again["plan"]) == (first["id"], "account 1", first["plan"])
    assert "'11'" in again["input"]
    assert (other["key"], "'20'" in other["input"]) == ("account 2", True)


def test_debounce_counts_anew_with_each_event(served: Database, table: Callable[..., str]) -> None:
    table("account int")
    fires(served, "SELECT account FROM new", "key = account {account}", "debounce = 1 day")
    served.execute("INSERT INTO fired VALUES (1)")
    [first] = served.tasks()
    served.execute("INSERT INTO fired VALUES (1)")
    [again] = served.tasks()
    assert (again["id"], again["plan"] > first["plan"]) == (first["id"], True)


def test_event_during_the_run_of_its_key_has_that_task_run_again(served: Database, table: Callable[..., str]) -> None:
    table("account int, amount int")
    note = "INSERT INTO seen SELECT current_setting('pg_task.id'), amount FROM new, pg_advisory_xact_lock_shared(77)"
    fires(served, note, "key = account {account}")
    with served.connect() as holder, served.connect(autocommit=False) as early:
        holder.execute("SELECT pg_advisory_lock(77)")
        early.execute("SELECT 1")
        served.execute("INSERT INTO fired VALUES (1, 10)")
        [task] = served.tasks()
        served.wait(task["id"], "WORK")
        # In a transaction that began before the run.
        early.execute("INSERT INTO fired VALUES (1, 11)")
    assert seen(served) == [(str(task["id"]), "10"), (str(task["id"]), "11")]


def test_on_a_partitioned_task_table_a_key_is_noted_and_not_unique(database: Database) -> None:
    columns = "id bigint GENERATED BY DEFAULT AS IDENTITY, input text NOT NULL"
    database.execute(
        f"CREATE TABLE task ({columns}) PARTITION BY LIST (id); CREATE TABLE rest PARTITION OF task DEFAULT"
    )
    install(database)
    database.execute("CREATE TABLE fired (a int)")
    fires(database, "SELECT a FROM new", "key = k {a}")
    database.execute("INSERT INTO fired VALUES (1), (1)")
    assert [task["key"] for task in database.tasks()] == ["k 1", "k 1"]


# Rights


@pytest.fixture
def roles(served: Database) -> Iterator[tuple[psycopg.Connection[Any], psycopg.Connection[Any]]]:
    """One who makes triggers, and one who only fires them."""
    names = [f"{served.name}_{what}" for what in ("maker", "clerk")]
    for name in names:
        served.admin_execute(f"CREATE ROLE {name} LOGIN; GRANT ALL ON SCHEMA public TO {name}")
    maker, clerk = (served.connect(served.server.conninfo(served.name, name)) for name in names)
    yield maker, clerk
    for name in names:
        served.admin_execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def test_who_fires_needs_no_right_on_tasks_and_who_makes_one_needs_to_be_let(
    served: Database,
    table: Callable[..., str],
    roles: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    maker, clerk = roles
    maker.execute("CREATE TABLE theirs (a int)")
    make = """CREATE TRIGGER t AFTER INSERT ON theirs FOR EACH ROW
        EXECUTE FUNCTION task_async('INSERT INTO seen SELECT user, a FROM new')"""
    with pytest.raises(errors.InsufficientPrivilege):
        maker.execute(make)
    served.execute(f"GRANT EXECUTE ON FUNCTION task_async() TO {maker.info.user}")
    maker.execute(make)
    maker.execute(f"GRANT INSERT ON theirs TO {clerk.info.user}")
    clerk.execute("INSERT INTO theirs VALUES (5)")
    assert seen(served) == [(served.user, "5")]
    with pytest.raises(errors.InsufficientPrivilege):
        clerk.execute("SELECT FROM task")


@pytest.mark.parametrize("way", ["ROW", "STATEMENT"])
def test_nothing_of_the_firing_sides_runs_with_our_rights(
    served: Database,
    table: Callable[..., str],
    roles: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
    way: str,
) -> None:
    """Casts, operators, functions, tables: what SQL of ours could be made to use instead of the server's own."""
    maker, clerk = roles
    for statement in [
        "CREATE TABLE caught (who text); GRANT ALL ON caught TO PUBLIC",
        "CREATE TYPE pair AS (a int, b text)",
        "CREATE TABLE theirs (a int, b text, c pair, d pair[])",
        *(
            f"""CREATE FUNCTION {name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO public.caught VALUES (current_user); RETURN {value}; END $$"""
            for name, arguments, result, value in [
                ("as_text", "pair", "text", "'x'"),
                ("as_text", "theirs", "text", "'x'"),
                ("as_text", "pair[]", "text", "'x'"),
                ("as_json", "pair", "json", "'1'"),
                ("format", "text, pair", "text", "'x'"),
                ("concat", "pair", "text", "'x'"),
                ("quote_ident", "text", "text", "'x'"),
                ("same", "text, text", "boolean", "true"),
            ]
        ),
        "CREATE CAST (pair AS text) WITH FUNCTION as_text(pair) AS IMPLICIT",
        "CREATE CAST (theirs AS text) WITH FUNCTION as_text(theirs) AS IMPLICIT",
        "CREATE CAST (pair[] AS text) WITH FUNCTION as_text(pair[]) AS IMPLICIT",
        "CREATE CAST (pair AS json) WITH FUNCTION as_json(pair)",
        "CREATE OPERATOR <> (FUNCTION = same, LEFTARG = text, RIGHTARG = text)",
        "CREATE TEMP TABLE pg_trigger (tgrelid oid, tgname name, tgnewtable name, tgoldtable name)",
        "CREATE TEMP TABLE task (input text)",
        f"GRANT INSERT ON theirs TO {clerk.info.user}",
    ]:
        maker.execute(statement.encode())
    served.admin_execute(f"GRANT EXECUTE ON FUNCTION task_async() TO {maker.info.user}")
    tables = "" if way == "ROW" else "REFERENCING NEW TABLE AS new "
    maker.execute(
        f"""CREATE TRIGGER t AFTER INSERT ON theirs {tables}FOR EACH {way} EXECUTE FUNCTION
        task_async('SELECT count(*) FROM new', 'group = {{c}} {{d}}', 'data = {{b}}', 'delete = false')""".encode()
    )
    evil = """'); SELECT 1/0; --$task$\\' {a}"""
    maker.execute("SET search_path TO public, pg_temp, pg_catalog")
    maker.execute("INSERT INTO theirs VALUES (1, %s, ROW(1, %s), ARRAY[ROW(2, %s)::pair])", [evil] * 3)
    [task] = served.tasks()
    assert served.wait(task["id"])["output"] == "1"
    assert task["data"] == evil
    maker.execute("SELECT ROW(1, 'a')::pair::text")
    assert served.execute("SELECT DISTINCT who FROM caught") == [(maker.info.user,)]
