"""Creates and upgrades the SQL objects of a task table, and says what it would do.

`look` reads what is there into `Facts`; `changes` compares it with what should be (`objects.py`) and gives the
statements that are missing, each with a line that says what it does. The same list is run by the master, told by
`--check`, and printed by `pgtask sql`: for an empty database or, with `--upgrade`, for a table as it is. What a user
added (columns, indexes, partitions, triggers) is never touched, and a table made by the C extension pg_task is taken
over as it stands.

What is changed is changed under one advisory lock, so that two masters that start together do not collide. Nothing
here touches a row of the task table.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import AsyncConnection

from pgtask import objects, settings
from pgtask.errors import UserError
from pgtask.objects import (
    COLUMNS,
    FORMER_TRIGGERS,
    INDEXES,
    MASTER,
    ROUTINES,
    SIDES,
    STATES,
    STORAGE,
    TRIGGERS,
    UNIQUE,
    Column,
    Names,
)
from pgtask.store import statements

INSTALL_LOCK = "SELECT pg_advisory_xact_lock(hashtext('pgtask'), hashtext('install'))"
PATIENT = "SET LOCAL lock_timeout = '30s'"
"""For the lock of those who install: with many tables in one database it may take some time until it is our turn."""

FORMER_ROUTINE = re.compile(r"\s*-- pgtask [0-9a-f]{12}\b")
"""How the body of a function of ours begins."""

GIVEN_DEFAULT = re.compile(r"''::text\), (?P<escaped>E?)'(?P<text>(?:[^']|'')*)'::text\)")
"""In a setting's column default, as the server writes it: what holds where nobody says otherwise."""

IMPATIENT = "SET LOCAL lock_timeout = '5s'"
NO_LIMIT = "SET LOCAL statement_timeout = 0"
"""An index of a large table that is taken over takes its time."""

CREATING = re.compile("CREATE (TYPE|TABLE|(UNIQUE )?INDEX|SEQUENCE|OR REPLACE (FUNCTION|PROCEDURE))")
"""Changes that need the right to create in the schema."""

ALTERING = re.compile("ALTER TABLE|CREATE (UNIQUE )?INDEX|CREATE OR REPLACE TRIGGER|DROP (TRIGGER|INDEX)")
"""Changes that need the right to alter the table, where it is there already."""

STORING = re.compile(r"ALTER TABLE .* SET \((autovacuum|vacuum)_", re.DOTALL)
"""A change of storage parameters."""

WRONG = (psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.DataError, psycopg.NotSupportedError)
"""What the database says when a change is impossible there, and not only just now."""


class Refused(UserError):
    """What is in the database cannot be served as it is; the line says what, and what mends it."""


class Denied(Refused):
    """The role that connects lacks a right."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A column that the table has."""

    type: str
    notnull: bool
    doc: str | None
    default: str | None  # as the server writes it; of an identity column its kind


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the database has of the objects of one task table. The default is an empty database."""

    schema: bool = False
    labels: tuple[str, ...] | None = None  # of the type state: None without it, none if it is no enum
    oid: int | None = None
    kind: str = "r"  # r a table, p a partitioned one
    owner: str | None = None  # of the table
    partition: bool = False
    storage: frozenset[str] = frozenset()  # parameters of the table that somebody has set
    may_make_schema: bool = True
    may_create: bool = True  # in the schema
    may_alter: bool = True  # the table
    columns: Mapping[str, Found] = field(default_factory=dict)
    primary: bool = False
    id_found: bool = False  # an index finds a row by its id
    id_unique: bool = False  # and no two rows have the same
    indexes: Mapping[str, bool] = field(default_factory=dict)  # name -> valid
    input_indexes: tuple[str, ...] = ()  # the C extension's
    triggers: Mapping[str, str] = field(default_factory=dict)  # name -> comment; "extension" for the C extension's
    routines: Mapping[tuple[str, str], str] = field(default_factory=dict)  # name and types -> body
    sides: Mapping[str, frozenset[str]] = field(default_factory=dict)  # suffix -> the columns that are ours
    layout: str | None = None
    extension: str | None = None  # the title of a running worker of the C extension
    strangers: tuple[tuple[str, str], ...] = ()  # objects of ours that belong to somebody else, and to whom


@dataclass(frozen=True, kw_only=True)
class Change:
    """One statement, and what it does."""

    what: str
    sql: str
    makes: str | None = None  # what then has an owner of its own, as ALTER names it

    @property
    def minor(self) -> bool:
        """Not worth a line of the log: a comment, or our own note of what was done."""
        return self.sql.startswith(("COMMENT ON", "INSERT INTO"))

    @property
    def optional(self) -> bool:
        """A table is served as well without it."""
        return self.sql.startswith(("COMMENT ON COLUMN", "COMMENT ON TABLE")) or STORING.match(self.sql) is not None


async def look(conn: AsyncConnection[Any], names: Names) -> Facts:
    """Read what is there. Raises Refused; the connection's search_path must be the server's own."""
    [relation] = await _all(conn, "relation", names.schema, names.table)
    schema, labels, oid, kind, partition, owner, storage, *may = relation
    sides: dict[str, frozenset[str]] = {}
    denied: list[str] = []
    for side in SIDES:
        name = names.quoted(names.derived(side.suffix))
        for may_write, found in await _all(conn, "side", name, list(side.columns)):
            sides[side.suffix] = frozenset(found)
            if set(side.columns) <= sides[side.suffix] and not may_write:
                denied.append(names.derived(side.suffix))
    derived = sorted({names.derived(one.suffix) for one in ROUTINES})
    routines = await _all(conn, "routines", names.schema, derived)
    more: dict[str, Any] = {"sides": sides, "routines": {(name, types): body for name, types, body in routines}}
    tables = [names.derived(side.suffix) for side in SIDES]
    more["strangers"] = tuple(await _all(conn, "strangers", names.schema, names.table, tables, derived))
    if denied and not more["strangers"]:
        named = ["--schema", names.schema, "--table", names.table, "--grant", conn.info.user]
        script = shlex.join(["pgtask", "sql", *named])
        raise Denied(f"permission denied for table {denied[0]}; the rights it needs are at the end of: {script}")
    # What a stranger has laid out may be a view that calls functions of his: it is not even read.
    if set(MASTER.columns) <= sides.get("master", frozenset()) and not more["strangers"]:
        more["layout"] = await _layout(conn, names)
    if oid is not None:
        more |= await _look_at_table(conn, names, oid)
    return Facts(
        schema=schema,
        labels=None if labels is None else tuple(labels),
        oid=oid,
        kind=kind or "r",
        owner=owner,
        partition=bool(partition),
        storage=frozenset(storage),
        may_make_schema=may[0],
        may_create=may[1],
        may_alter=may[2],
        **more,
    )


def configured(facts: Facts, names: Names) -> tuple[dict[str, str], bool]:
    """What a master is configured to, as far as the table tells: its defaults, and whether inserts wake it."""
    defaults = {setting.name: setting.sql_default for setting in settings.by_name("task").values()}
    for name in defaults:
        found = facts.columns.get(name)
        if found is not None and (value := GIVEN_DEFAULT.search(found.default or "")) is not None:
            text = value["text"].replace("''", "'")
            defaults[name] = text.replace("\\\\", "\\") if value["escaped"] else text
    quiet = objects.trigger("change", names, partitioned=facts.kind == "p", wake=False)
    return defaults, facts.triggers.get("pgtask_change") != objects.mark(quiet)


async def foreign_owner(conn: AsyncConnection[Any], oid: int) -> str | None:
    """Who owns the table, if he is neither we nor one who could have all of it anyway."""
    return next((row[0] for row in await _all(conn, "owner", oid)), None)


async def _layout(conn: AsyncConnection[Any], names: Names) -> str | None:
    cursor = await conn.execute(f"SELECT layout FROM {names.quoted(names.master)}".encode())
    return next((row[0] for row in await cursor.fetchall()), None)


async def _look_at_table(conn: AsyncConnection[Any], names: Names, oid: int) -> dict[str, Any]:
    columns = await _all(conn, "columns", oid, [column.name for column in COLUMNS])
    [(primary, id_found, id_unique)] = await _all(conn, "keys", oid)
    indexes = await _all(conn, "indexes", oid, [names.derived(suffix) for suffix in (*INDEXES, "id")])
    return {
        "columns": {name: Found(type=t, notnull=n, doc=doc, default=value) for name, t, n, doc, value in columns},
        "primary": primary,
        "id_found": id_found,
        "id_unique": id_unique,
        "indexes": {name: valid for name, valid, old in indexes if not old},
        "input_indexes": tuple(name for name, _, old in indexes if old),
        "triggers": dict(
            await _all(conn, "triggers", oid, [f"pgtask_{suffix}" for suffix in (*TRIGGERS, *FORMER_TRIGGERS)])
        ),
        "extension": next((row[0] for row in await _all(conn, "extension", names.schema, names.table)), None),
    }


def changes(
    facts: Facts, names: Names, defaults: Mapping[str, str], *, wake: bool = True
) -> tuple[list[Change], list[Change]]:
    """What is missing: first what must be committed before the rest can use it (the type), then the rest.

    `defaults` are the SQL texts of the task settings. Raises Refused for what cannot be taken over.
    """
    _refuse(facts, names)
    return list(_type_changes(facts, names)), list(_table_changes(facts, names, defaults, wake=wake))


def _refuse(facts: Facts, names: Names) -> None:
    for wrong in _wrong(facts, names):
        raise Refused(wrong)


def _wrong(facts: Facts, names: Names) -> Iterator[str]:
    where = names.label
    if names.table == "state":
        yield f"{where} would have the name of the type of its column state; choose another name"
    if facts.labels is not None and (not facts.labels or not set(facts.labels) <= set(STATES)):
        yield f"type {names.schema}.state exists and is not the scheduler's; use another schema"
    if facts.oid is not None and facts.kind not in ("r", "p"):
        yield f"{where} is not a table; rename it or choose another table"
    if facts.partition:
        yield f"{where} is a partition; name the table that it is a part of"
    if facts.extension is not None:
        yield (
            f"the extension pg_task still serves {where} ({facts.extension});"
            " take the table out of pg_task.json, reload and retry"
        )
    for column in COLUMNS:
        found = facts.columns.get(column.name)
        if found is not None and found.type != column.type:
            yield (
                f"column {column.name} of {where} has type {found.type}, not {column.type};"
                " rename it or choose another table"
            )
    for side in SIDES:
        if side.suffix in facts.sides and not set(side.columns) <= facts.sides[side.suffix]:
            name = names.derived(side.suffix)
            yield f"{names.schema}.{name} exists and is not the scheduler's; rename it or choose another table"
    for what, owner in facts.strangers:
        yield (
            f"{what} belongs to {owner}, who could have SQL of his own run in the scheduler's name;"
            f" give it to the owner of {where} (ALTER ... OWNER TO), or drop it"
        )
    for one in ROUTINES:
        key = (names.derived(one.suffix), one.types)
        if "pgtask" not in facts.routines.get(key, "pgtask"):
            yield f"function {names.schema}.{key[0]}({key[1]}) exists and is not the scheduler's; rename it"


def _type_changes(facts: Facts, names: Names) -> Iterator[Change]:
    if not facts.schema:
        text = f"CREATE SCHEMA {objects.identifier(names.schema)}"
        yield Change(what=f"create schema {names.schema}", sql=text)
    if facts.labels is None:
        makes = f"TYPE {names.state}"
        yield Change(what=f"create type {names.schema}.state", sql=objects.type_(names), makes=makes)
        return
    for label in STATES:
        if label not in facts.labels:
            text = f"ALTER TYPE {names.state} ADD VALUE IF NOT EXISTS '{label}'"
            yield Change(what=f"add state {label}", sql=text)


def _table_changes(facts: Facts, names: Names, defaults: Mapping[str, str], *, wake: bool) -> Iterator[Change]:
    if facts.oid is None:
        makes = f"TABLE {names.task}"
        yield Change(what=f"create table {names.label}", sql=objects.table(names, defaults), makes=makes)
    else:
        yield from _column_changes(facts, names, defaults)
        yield from _key_changes(facts, names)
        yield from _storage_changes(facts, names)
    yield from _index_changes(facts, names)
    for side in SIDES:
        if side.suffix not in facts.sides:
            name = names.derived(side.suffix)
            makes = f"TABLE {names.quoted(name)}"
            yield Change(what=f"create table {names.schema}.{name}", sql=objects.side(side, names), makes=makes)
            yield Change(what=f"comment on {name}", sql=objects.comment(makes, side.doc))
    yield from _routine_changes(facts, names, defaults)
    yield from _trigger_changes(facts, names, wake=wake)
    for column in COLUMNS:
        found = facts.columns.get(column.name)
        # A comment of the user's own stays; who is not the owner writes none.
        if (found is None or found.doc is None) and facts.may_alter:
            yield Change(what=f"comment on column {column.name}", sql=objects.column_comment(column, names))
    if facts.oid is not None:
        yield from _default_changes(facts, names, defaults)
    if facts.layout != objects.layout(defaults):
        yield Change(what="note which defaults the table has", sql=objects.note_layout(names, defaults))


def _column_changes(facts: Facts, names: Names, defaults: Mapping[str, str]) -> Iterator[Change]:
    alter = f"ALTER TABLE {names.task}"
    for column in COLUMNS:
        name = objects.identifier(column.name)
        found = facts.columns.get(column.name)
        if found is None and column.name == "id":
            yield Change(what="add column id", sql=f"{alter} ADD COLUMN id bigserial")
        elif found is None:
            definition = objects.definition(column, names, defaults)
            yield Change(what=f"add column {column.name}", sql=f"{alter} ADD COLUMN {definition}")
        elif found.notnull == column.null:
            how, what = ("DROP", "let {} be null") if column.null else ("SET", "set {} not null")
            yield Change(what=what.format(column.name), sql=f"{alter} ALTER COLUMN {name} {how} NOT NULL")


def _default_changes(facts: Facts, names: Names, defaults: Mapping[str, str]) -> Iterator[Change]:
    """All of them when the configuration has changed, else those that somebody took away."""
    found = facts.columns.get("id")
    if found is not None and found.default is None:
        yield from _sequence_changes(names)
    rewrite = facts.layout != objects.layout(defaults)
    wrong = tuple(
        column
        for column in COLUMNS
        if objects.default(column, names, defaults) is not None
        and column.name in facts.columns
        and (rewrite or not _has_default(column, facts.columns[column.name]))
    )
    if wrong:
        what = "the columns' defaults" if rewrite else "the default of " + ", ".join(column.name for column in wrong)
        yield Change(what=f"set {what}", sql=objects.set_defaults(wrong, names, defaults))


def _has_default(column: Column, found: Found) -> bool:
    """A setting's column must ask for the setting; what else a column has may be the user's choice."""
    if found.default is None:
        return False
    return not column.setting or f"NULLIF(current_setting('pg_task.{column.name}'::text, true)" in found.default


def _sequence_changes(names: Names) -> Iterator[Change]:
    """An id without a default: ours counts on from the greatest."""
    name = names.derived("id_seq")
    sequence = names.quoted(name)
    yield Change(what=f"create sequence {name}", sql=f"CREATE SEQUENCE {sequence} OWNED BY {names.task}.id")
    start = f"SELECT setval({objects.literal(sequence)}, coalesce(max(id), 0) + 1, false) FROM {names.task}"
    yield Change(what=f"start sequence {name} after the greatest id", sql=start)
    text = f"ALTER TABLE {names.task} ALTER COLUMN id SET DEFAULT nextval({objects.literal(sequence)})"
    yield Change(what="set the default of id", sql=text)


def _key_changes(facts: Facts, names: Names) -> Iterator[Change]:
    """A row is found by its id, and a plain table has it once; on partitions only the user's key can say so."""
    index = f"INDEX {objects.identifier(names.derived('id'))} ON {names.task} (id)"
    if facts.kind == "p":
        if not facts.id_found:
            yield Change(what=f"create index {names.derived('id')}", sql=f"CREATE {index}")
    elif not facts.primary:
        yield Change(what="add primary key (id)", sql=f"ALTER TABLE {names.task} ADD PRIMARY KEY (id)")
    elif not facts.id_unique:
        yield Change(what=f"create unique index {names.derived('id')}", sql=f"CREATE UNIQUE {index}")


def _storage_changes(facts: Facts, names: Names) -> Iterator[Change]:
    """Parameters that nobody has set; a value of the user's own stays. A partitioned table can have none."""
    missing = [name for name in STORAGE if name not in facts.storage]
    if missing and facts.kind == "r" and facts.may_alter:
        text = f"ALTER TABLE {names.task} SET ({objects.storage(missing)})"
        yield Change(what=f"set {', '.join(missing)}", sql=text)


def _index_changes(facts: Facts, names: Names) -> Iterator[Change]:
    for suffix in INDEXES:
        if facts.kind == "p" and suffix in UNIQUE:
            continue
        name = names.derived(suffix)
        if facts.indexes.get(name) is False:
            yield Change(what=f"drop invalid index {name}", sql=f"DROP INDEX {names.quoted(name)}")
        if not facts.indexes.get(name):
            yield Change(what=f"create index {name}", sql=objects.index(suffix, names))
    for name in facts.input_indexes:
        yield Change(
            what=f"drop index {name}: a long input could not be inserted", sql=f"DROP INDEX {names.quoted(name)}"
        )


def _routine_changes(facts: Facts, names: Names, defaults: Mapping[str, str]) -> Iterator[Change]:
    """Our functions, known by a mark in their bodies; those of an earlier layout with other arguments are dropped."""
    wanted = {(names.derived(one.suffix), one.types) for one in ROUTINES}
    for (name, types), body in facts.routines.items():
        if (name, types) not in wanted and FORMER_ROUTINE.match(body):
            what = f"drop function {names.schema}.{name}({types}) of an earlier layout"
            yield Change(what=what, sql=f"DROP ROUTINE {names.quoted(name)}({types})")
    for one in ROUTINES:
        text = objects.routine(one, names, defaults)
        name = names.derived(one.suffix)
        there = facts.routines.get((name, one.types))
        if there is None or there != objects.body(text):
            target = objects.signature(one.suffix, one.types, names)
            makes = f"ROUTINE {target}"
            yield Change(what=f"create function {names.schema}.{name}({one.types})", sql=text, makes=makes)
            if one.private:
                text = f"REVOKE EXECUTE ON {makes} FROM PUBLIC"
                yield Change(what=f"let nobody else call {name}", sql=text)


def _trigger_changes(facts: Facts, names: Names, *, wake: bool) -> Iterator[Change]:
    """Our triggers, known by a fingerprint in their comment; those that wake the C extension are dropped."""
    for name, mark in facts.triggers.items():
        text = f"DROP TRIGGER {objects.identifier(name)} ON {names.task}"
        if mark == "extension":
            yield Change(what=f"drop trigger {name} of the extension", sql=text)
        elif name.removeprefix("pgtask_") in FORMER_TRIGGERS:
            yield Change(what=f"drop trigger {name} of an earlier layout", sql=text)
    for suffix in TRIGGERS:
        name = f"pgtask_{suffix}"
        text = objects.trigger(suffix, names, partitioned=facts.kind == "p", wake=wake)
        found, mark = facts.triggers.get(name), objects.mark(text)
        if suffix == "wake" and not wake:
            if found is not None:
                yield Change(what=f"drop trigger {name}", sql=f"DROP TRIGGER {name} ON {names.task}")
        elif found != mark:
            yield Change(what=f"create trigger {name}", sql=text)
            comment = objects.comment(f"TRIGGER {name} ON {names.task}", mark)
            yield Change(what=f"mark trigger {name}", sql=comment)


async def missing(
    conn: AsyncConnection[Any], names: Names, defaults: Mapping[str, str], *, wake: bool = True, create: bool = True
) -> list[Change]:
    """What `install` would change. Raises Refused for what cannot be taken over, or must not be created."""
    facts = await look(conn, names)
    lacking = [change for step in changes(facts, names, defaults, wake=wake) for change in step]
    needed = [change for change in lacking if not change.optional]
    _refuse_missing(needed, facts, names, create=create)
    _refuse_unable(needed, facts, names, user=conn.info.user)
    return lacking if create else []


async def install(
    conn: AsyncConnection[Any], names: Names, defaults: Mapping[str, str], *, wake: bool = True
) -> list[Change]:
    """Bring the database to what it should be; returns what was changed. Raises Refused as `missing`."""
    made: list[Change] = []
    for step in (0, 1):
        async with conn.transaction():
            for text in (PATIENT, INSTALL_LOCK, IMPATIENT, NO_LIMIT):
                await conn.execute(text)
            wanted = changes(await look(conn, names), names, defaults, wake=wake)[step]
            for change in wanted:
                await _apply(conn, change, names)
            made += wanted
    return made


def _refuse_missing(needed: list[Change], facts: Facts, names: Names, *, create: bool) -> None:
    """With `create` off the table must be right as it is."""
    if needed and not create:
        raise Refused(
            f"{names.label} is not as it should be (to do: {needed[0].what}), but create is false;"
            f" apply what {_printed_by(facts)} prints"
        )


def _refuse_unable(needed: list[Change], facts: Facts, names: Names, *, user: str) -> None:
    """Say which right is missing before anything is tried, so that --check knows it too."""
    creating = [change for change in needed if CREATING.match(change.sql)]
    altering = [change for change in needed if facts.oid is not None and ALTERING.match(change.sql)]
    if not facts.schema and not facts.may_make_schema:
        first, lack = needed[0], f"may not create schema {names.schema}; create it, or GRANT CREATE ON DATABASE"
    elif facts.schema and creating and not facts.may_create:
        first = creating[0]
        lack = f"may not create in schema {names.schema}; GRANT CREATE ON SCHEMA {names.schema}"
    elif altering and not facts.may_alter:
        first, lack = altering[0], f"may not alter {names.label}, which is not its own; GRANT its owner"
    else:
        return
    raise Refused(f"to do: {first.what}, but user {user} {lack} TO {user}, or apply what {_printed_by(facts)} prints")


def _printed_by(facts: Facts) -> str:
    return "pgtask sql" if facts.oid is None else "pgtask sql --upgrade"


async def _apply(conn: AsyncConnection[Any], change: Change, names: Names) -> None:
    try:
        await conn.execute(change.sql.encode())
    except WRONG as error:
        reason = error.diag.message_primary or str(error)
        raise Refused(f"{names.label}: cannot {change.what}: {reason}") from error


def script(
    *,
    schema: str,
    table: str,
    defaults: Mapping[str, str] | None = None,
    wake: bool = True,
    owner: str | None = None,
    grant: str | None = None,
) -> str:
    """Everything for one table in an empty database, as a script for a DBA, who may also run it again.

    `owner` gets the objects, `grant` the rights that a master needs without owning them.
    """
    names = Names(schema=schema, table=table)
    values = {s.name: s.sql_default for s in settings.by_name("task").values()} if defaults is None else defaults
    types, rest = changes(Facts(schema=schema == "public"), names, values, wake=wake)
    rest[1:1] = [Change(what="set the columns' defaults", sql=objects.set_defaults(COLUMNS, names, values))]
    more = _owner_lines(names, [*types, *rest], owner) + _grant_lines(names, grant)
    head = f"-- The objects of task table {_one_line(names.label)}, as pgtask-master would create them.\n"
    return head + _transaction([*_lines([*types, *rest]), *more])


async def upgrade(
    conn: AsyncConnection[Any],
    names: Names,
    defaults: Mapping[str, str] | None = None,
    *,
    wake: bool = True,
    owner: str | None = None,
    grant: str | None = None,
) -> str:
    """What `install` would change of a table that is there, as a script for its owner or a superuser.

    Without `defaults` the table keeps those that it has, and is woken or not as it is. `owner` gets what it creates,
    the table's own one by default; `grant` the rights that a master needs without owning anything. Raises Refused.
    """
    facts = replace(await look(conn, names), may_alter=True)  # who runs it may
    if facts.oid is None:
        raise Refused(f"there is no table {names.label}; without --upgrade the script is printed that makes it")
    if defaults is None:
        defaults, wake = configured(facts, names)
    types, rest = changes(facts, names, defaults, wake=wake)
    if not types and not rest:
        head, more = f"-- Task table {_one_line(names.label)} is as it should be.\n", _grant_lines(names, grant)
    else:
        head = f"-- What pgtask-master would change of task table {_one_line(names.label)}.\n"
        more = _owner_lines(names, [*types, *rest], owner or facts.owner) + _grant_lines(names, grant)
    # A new label of the type must be committed before anything uses it.
    return head + "".join(_transaction(part) for part in (_lines(types), [*_lines(rest), *more]) if part)


def _lines(changes: Iterable[Change]) -> list[str]:
    return [f"-- {_one_line(change.what)}\n{objects.repeatable(change.sql)}" for change in changes]


def _transaction(lines: Iterable[str]) -> str:
    begin = ["BEGIN", "SET LOCAL search_path TO pg_catalog, pg_temp", "SET LOCAL lock_timeout TO '5s'", NO_LIMIT]
    return ";\n".join([*begin, *lines, "COMMIT"]) + ";\n"


def _one_line(text: str) -> str:
    """For a comment: what comes after a line's end in a name would be SQL."""
    return re.sub(r"[\r\n]", " ", text)


def _owner_lines(names: Names, changes: Iterable[Change], owner: str | None) -> list[str]:
    made = [change.makes for change in changes if change.makes is not None]
    if owner is None or not made:
        return []
    role = objects.identifier(owner)
    usage = f"GRANT USAGE ON SCHEMA {objects.identifier(names.schema)} TO {role}"
    return [usage, *(f"ALTER {target} OWNER TO {role}" for target in made)]


def _grant_lines(names: Names, grant: str | None) -> list[str]:
    if grant is None:
        return []
    role = objects.identifier(grant)
    return [
        f"GRANT USAGE ON SCHEMA {objects.identifier(names.schema)} TO {role}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join([names.task, *_sides(names)])} TO {role}",
    ]


def _sides(names: Names) -> list[str]:
    return [names.quoted(names.derived(side.suffix)) for side in SIDES]


async def _all(conn: AsyncConnection[Any], name: str, *params: object) -> list[tuple[Any, ...]]:
    """The rows of a query of sql/catalog.sql."""
    cursor = await conn.execute(statements("catalog")[name].encode(), params)
    rows: list[tuple[Any, ...]] = await cursor.fetchall()
    return rows
