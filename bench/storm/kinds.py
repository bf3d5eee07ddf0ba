"""The kinds of tasks that clients insert, and the ledger that each run writes itself into.

The ledger has no constraint, so that what ran twice or never shows. A task is known by a key that its client made:
it stands in `data` and in the input, so a task whose id nobody was told can still be found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from random import Random

LEDGER = """
CREATE TABLE ledger (key text NOT NULL, id bigint NOT NULL, pid int DEFAULT pg_backend_pid(),
    at timestamptz DEFAULT clock_timestamp());
"""
"""In the task's database and in the one that remote tasks run on."""

OWN = """
CREATE TABLE debt (key text PRIMARY KEY);
CREATE TABLE promise (key text REFERENCES debt DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION enter(key text) RETURNS SETOF bigint LANGUAGE sql AS $$
    INSERT INTO ledger (key, id) VALUES (key, current_setting('pg_task.id')::bigint);
    SELECT 1::bigint WHERE false
$$;
CREATE FUNCTION rest(ms int) RETURNS SETOF bigint LANGUAGE sql AS $$
    SELECT pg_sleep(ms / 1000.0);
    SELECT 1::bigint WHERE false
$$;
CREATE FUNCTION promise(key text) RETURNS SETOF bigint LANGUAGE sql AS $$
    INSERT INTO promise VALUES (key);
    SELECT 1::bigint WHERE false
$$;
"""
"""Nobody makes a debt, so a promise fails at the commit. The functions say nothing, so their task is silent."""

ENTRY = "INSERT INTO ledger (key, id) VALUES ('{key}', current_setting('pg_task.id')::bigint)"
SLEEP = "SELECT pg_sleep({ms} / 1000.0)"

QUERY = "SELECT enter('{key}') UNION ALL SELECT rest({ms})"

LONGEST_MS = 60
GROUPS = 8


class Promise(Enum):
    """What is promised of a task: `ATOMIC` ones run exactly once, the others at least once."""

    ATOMIC = "atomic"
    LOOSE = "not atomic"
    REMOTE = "remote"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of task. `code` is the SQLSTATE that it must fail with, `weight` how often it comes."""

    name: str
    weight: int
    input: str
    promise: Promise = Promise.ATOMIC
    code: str | None = None
    silent: bool = False  # says nothing and is to be deleted: the ledger alone tells
    repeated: bool = False
    columns: Mapping[str, object] = field(default_factory=dict)

    def text(self, key: str, chance: Random) -> str:
        # Most are short, so that many commits are in the air; some are long, so that a fault finds them at work.
        return self.input.format(key=key, ms=round(LONGEST_MS * chance.random() ** 3))


KEPT = {"delete": False}

KINDS = (
    Kind(name="kept", weight=28, input=f"{ENTRY}; {SLEEP}", columns=KEPT),
    Kind(name="silent", weight=24, input="SELECT enter('{key}'); SELECT rest({ms})", silent=True),
    Kind(name="told", weight=8, input=f"{ENTRY}; {SLEEP}; SELECT 'said by ' || '{{key}}'"),
    Kind(name="failing", weight=8, input=f"{ENTRY}; {SLEEP}; SELECT 1 / 0", code="22012"),
    Kind(name="deferred", weight=8, input=f"{ENTRY}; {SLEEP}; INSERT INTO promise VALUES ('{{key}}')", code="23503"),
    # One query each: these are sent while the run before is being committed.
    Kind(name="query", weight=28, input=f"{QUERY} UNION ALL SELECT 1", columns=KEPT),
    Kind(name="silent query", weight=16, input=QUERY, silent=True),
    Kind(name="failing query", weight=8, input=f"{QUERY} UNION ALL SELECT 1 / (random() < 0)::int", code="22012"),
    Kind(name="deferred query", weight=8, input=f"{QUERY} UNION ALL SELECT promise('{{key}}')", code="23503"),
    Kind(
        name="loose",
        weight=12,
        input=f"BEGIN; {ENTRY}; COMMIT; {SLEEP}",
        promise=Promise.LOOSE,
        columns=KEPT | {"atomic": False},
    ),
    Kind(name="remote", weight=12, input=f"BEGIN; {ENTRY}; COMMIT; {SLEEP}", promise=Promise.REMOTE, columns=KEPT),
)

REPEATED = Kind(
    name="repeated",
    weight=0,
    input=f"{ENTRY}; {SLEEP}",
    repeated=True,
    columns=KEPT | {"repeat": "300 ms", "group": "repeated", "max": 2},
)
"""Inserted once by each client; it goes on until the scenario ends."""

REMOTE_LOST = ("08006", "08001")
"""A remote task may fail with these when its own session, on the other database, is ended under it."""


def pick(chance: Random) -> Kind:
    return chance.choices(KINDS, [kind.weight for kind in KINDS])[0]


def columns(kind: Kind, chance: Random, remote: str) -> dict[str, object]:
    """What the row says beside its input: a group, in two of eight of which three may run at once, and in half of which
    short ones share a commit, and a time.
    """
    number = chance.randrange(GROUPS)
    values: dict[str, object] = {"group": f"group {number}"}
    if number < 2:
        values["max"] = 2
    elif number == 2:
        values["max"] = -2
    if number % 2:
        values["batch"] = 20
    if chance.random() < 0.1:
        values["plan_in"] = chance.random()
    if kind.promise is Promise.REMOTE:
        values["remote"] = remote
    return {**values, **kind.columns}
