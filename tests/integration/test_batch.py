"""`batch`: short tasks of a group that share one transaction, and what cannot share."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.fixtures.database import Database
from tests.fixtures.master import Master
from tests.integration.test_groups import insert

FIRST = "SELECT pg_sleep(0.3)"
"""What the master assigns runs by itself; the others of the group are all there when it ends."""


@pytest.fixture
def serve(database: Database, master: Callable[..., Master]) -> Callable[..., Master]:
    """Starts a master whose log says everything."""

    def serve(*options: str) -> Master:
        return master("--log-level", "debug", *options, database.conninfo, tables=1)

    return serve


def insert_all(database: Database, inputs: list[str], **columns: Any) -> list[int]:
    """In one statement, so that all are due together."""
    values = {"delete": False, "batch": 50, "header": False} | columns
    names = ", ".join(f'"{name}"' for name in values)
    query = f"INSERT INTO task (input, {names}) SELECT i, {', '.join(['%s'] * len(values))}" + (
        " FROM unnest(%s::text[]) WITH ORDINALITY AS u (i, n) ORDER BY n RETURNING id"
    )
    return [id for (id,) in database.execute(query, [*values.values(), inputs])]


def rows(database: Database, ids: list[int]) -> list[dict[str, Any]]:
    return [database.wait(id) for id in ids]


def test_tasks_share_a_transaction_and_each_has_its_own_result(
    database: Database, serve: Callable[..., Master]
) -> None:
    serve()
    inputs = [FIRST] + ["SELECT txid_current(), current_setting('pg_task.id')"] * 200
    found = rows(database, insert_all(database, inputs))[1:]
    assert Counter(row["state"] for row in found) == {"DONE": 200}
    assert [row["output"].split("\t")[1] for row in found] == [str(row["id"]) for row in found]
    sizes = Counter(row["output"].split("\t")[0] for row in found)
    assert 4 <= len(sizes) <= 60
    assert max(sizes.values()) <= 50
    starts = [row["start"] for row in found]
    assert starts == sorted(starts)
    assert all(row["start"] <= row["stop"] for row in found)
    assert all(a["stop"] <= b["start"] for a, b in zip(found, found[1:], strict=False))
    assert {row["attempt"] for row in found} == {1}
