"""What the mender was told outlives what fails while it looks into it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from pgtask.master.mender import Mender, Term


class Lost:
    """A session that is gone."""

    async def rows(self, *_: object) -> list[tuple[Any, ...]]:
        raise psycopg.OperationalError("gone")


def test_stop_of_a_deleted_row_is_not_forgotten_with_the_session() -> None:
    nothing: Any = SimpleNamespace(wake=lambda: None, text=str)
    mender = Mender(nothing, nothing, nothing, nothing, nothing)
    mender.stopped(7)
    with pytest.raises(psycopg.OperationalError):
        asyncio.run(mender._cancel_stopped(Term(session=Lost(), number=1, since="")))  # type: ignore[arg-type]
    assert mender._stopped == {7}
