"""Clients that insert tasks at a steady rate, whatever becomes of the server, and remember what they were told.

What a client knows of its inserts is kept here, outside of the database, which is about to be killed. An insert
whose commit got no answer is unknown: it may have happened or not.
"""

import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from random import Random

import psycopg
from psycopg import sql

from storm.kinds import REPEATED, Kind, columns, pick

PAUSE = 0.1
"""Seconds between the tries of a client that has lost its session."""

NAME = "chaos client"
"""The application_name of clients, whose sessions are nobody's target."""


class Answer(Enum):
    """COMMITTED: the server said so. UNKNOWN: COMMIT got no answer. NEVER: no COMMIT was sent."""

    COMMITTED = "committed"
    UNKNOWN = "unknown"
    NEVER = "never"


@dataclass(kw_only=True)
class Insert:
    """One insert as its client knows it; `id` is what RETURNING said."""

    key: str
    kind: Kind
    answer: Answer = Answer.NEVER
    id: int | None = None


@dataclass(kw_only=True, eq=False)
class Client:
    """One thread with one session."""

    number: int
    conninfo: str
    remote: str  # the conninfo of remote tasks
    rate: float  # inserts a second
    seed: str
    inserts: list[Insert] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = Random(f"{self.seed} {self.number}")
        self._stop = threading.Event()
        self._session: psycopg.Connection | None = None
        self.trouble: Exception | None = None  # what is neither an answer nor a lost session: a bug
        self._repeats = False  # our repeated task may be in
        self._thread = threading.Thread(target=self._run, name=f"client {self.number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self._insert_steadily()
        except Exception as error:
            self.trouble = error

    def _insert_steadily(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            try:
                self._insert()
            except psycopg.OperationalError:
                self._leave()
                self._stop.wait(PAUSE)
            # After an outage the rate goes on; what was missed is not made up for.
            due = max(due + self._chance.uniform(0.5, 1.5) / self.rate, time.monotonic() - 1)
        self._leave()

    def _insert(self) -> None:
        if self._session is None:
            self._session = psycopg.connect(self.conninfo, application_name=NAME, connect_timeout=5)
        kind = pick(self._chance) if self._repeats else REPEATED
        insert = Insert(key=f"{self.number}-{len(self.inserts)}", kind=kind)
        self.inserts.append(insert)
        insert.id = self._send(self._session, insert)
        insert.answer = Answer.UNKNOWN
        self._repeats = True
        self._session.commit()
        insert.answer = Answer.COMMITTED

    def _send(self, session: psycopg.Connection, insert: Insert) -> int:
        values: dict[str, object] = {"data": insert.key, "input": insert.kind.text(insert.key, self._chance)}
        values |= columns(insert.kind, self._chance, self.remote)
        ahead = values.pop("plan_in", 0)
        query = sql.SQL("INSERT INTO task (plan, {}) VALUES (now() + %s * interval '1 s', {}) RETURNING id").format(
            sql.SQL(", ").join(map(sql.Identifier, values)), sql.SQL(", ").join(sql.Placeholder() * len(values))
        )
        row = session.execute(query, [ahead, *values.values()]).fetchone()
        assert row is not None
        return int(row[0])

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
