"""What it costs to insert a task: indexes, checks, triggers and notifications, while a master is there.

The reference has the same columns and defaults, and a primary key. Rows are planned for later, so that nothing else
runs than the inserts and what they wake; a third case has its tasks done at the same time.
"""

import contextlib
import select
import threading
from collections.abc import Iterator

import psycopg

from measure import bare
from measure.figure import Course, Outcome, subject
from measure.ground import Ground

CLIENTS = 8
LIKE = """CREATE TABLE plain (LIKE task INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING GENERATED, PRIMARY KEY (id))"""
LATER = """INSERT INTO {} (plan, input) VALUES (now() + interval '1 day', 'SELECT 1')"""
BULK = """INSERT INTO {} (plan, input) SELECT now() + interval '1 day', 'SELECT 1' FROM generate_series(1, {})"""
DUE = """INSERT INTO {} ("group", input) VALUES ('g' || pg_backend_pid() % 8, 'SELECT 1')"""


@subject
def inserts(course: Course) -> Outcome:
    """Single rows from 8 clients, and 100,000 in one statement, against the same columns with only a primary key."""
    outcome = Outcome()
    count, rows = course.size(4000, 80), course.size(100_000, 1000)
    against = "same columns and defaults, primary key only"
    single = outcome.figure(
        f"{CLIENTS} clients: time of a row", "ms", against=against, better="less", mark=1.5, headline=True
    )
    bulk = outcome.figure(
        f"{rows:,} rows in one statement: time", "s", against=against, better="less", mark=2.0, headline=True
    )
    busy = outcome.figure(f"{CLIENTS} clients, tasks being done: time of a row", "ms", against=against, better="less")
    sent = outcome.figure(f"notifications of {count} single rows", "", better="less")
    sent_bulk = outcome.figure(f"notifications of {rows:,} rows", "", better="less")
    sent_busy = outcome.figure(f"notifications of {count} rows, tasks being done", "", better="less")
    with course.site.ground("inserts") as ground:
        ground.install()
        ground.own(LIKE)
        for _ in course.rounds():
            with ground.master():
                for statement, figure, notified in ((LATER, single, sent), (DUE, busy, sent_busy)):
                    course.say(figure.name)
                    reference = _rows(ground, statement.format("plain"), count)
                    with _notifications(ground) as heard:
                        ours = _rows(ground, statement.format("task"), count)
                    figure.add(ours, reference)
                    notified.add(heard[0])
                    if statement is DUE:
                        ground.drained()
                    _empty(ground)
                course.say(bulk.name)
                reference = bare.together("insert", 1, ground.conninfo, BULK.format("plain", rows), 1)[0]
                with _notifications(ground) as heard:
                    ours = bare.together("insert", 1, ground.conninfo, BULK.format("task", rows), 1)[0]
                bulk.add(ours[1] - ours[0], reference[1] - reference[0])
                sent_bulk.add(heard[0])
                _empty(ground)
    return outcome


def _rows(ground: Ground, statement: str, count: int) -> float:
    """Milliseconds a row, all clients together."""
    times = bare.together("insert", CLIENTS, ground.conninfo, statement, count // CLIENTS)
    return (max(end for _, end in times) - min(begin for begin, _ in times)) / count * 1000


def _empty(ground: Ground) -> None:
    ground.settle()
    ground.own("TRUNCATE task", "TRUNCATE plain")
    ground.ask("CHECKPOINT")


@contextlib.contextmanager
def _notifications(ground: Ground) -> Iterator[list[int]]:
    """How many wake-ups were sent meanwhile: one of a transaction, as the server sends them."""
    heard = [0]
    over = threading.Event()
    with psycopg.connect(ground.conninfo, autocommit=True) as session:
        session.execute(f"LISTEN pgtask_{ground.value('SELECT $$task$$::regclass::oid')}".encode())

        def listen() -> None:
            while not over.is_set():
                if select.select([session.fileno()], [], [], 0.05)[0]:
                    heard[0] += len(list(session.notifies(timeout=0)))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield heard
        finally:
            over.set()
            thread.join()
            heard[0] += len(list(session.notifies(timeout=0.1)))
