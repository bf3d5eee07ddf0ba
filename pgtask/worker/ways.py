"""How an input may go down to the server: alone, behind BEGIN, right behind the run before, or with others.

No input may end a transaction that is not its own alone: that would commit the work of tasks that are not yet written
as done. So nothing is sent by the simple protocol in such a one that has any word that could, and by the extended one
the server takes single statements only, none of which can when it begins with one of ONE.
"""

import hashlib
import re
from enum import Enum

from pgtask.store import Task

ALONE = re.compile(
    rb"\s*(VACUUM|CREATE\s+DATABASE|DROP\s+DATABASE|ALTER\s+SYSTEM|CREATE\s+TABLESPACE|DROP\s+TABLESPACE"
    rb"|DISCARD\s+ALL|(CREATE|DROP)\s+(UNIQUE\s+)?INDEX\s+CONCURRENTLY|REINDEX\s+(DATABASE|SYSTEM))\b",
    re.IGNORECASE,
)
"""Inputs that no transaction block admits; the rest is found out by an error of REFUSED."""

REFUSED = ("25001", "2D000")
"""Errors of what no transaction block admits."""

ONE = re.compile(rb"\s*(SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE|CALL|DO)\b", re.IGNORECASE)
"""How an input begins that the extended protocol may try."""

ENDING = re.compile(rb"\b(COMMIT|END|ROLLBACK|ABORT|PREPARE|BEGIN|START|SAVEPOINT|RELEASE)\b", re.IGNORECASE)
"""Words without which no text of several statements can end or leave the transaction that it runs in."""

LASTING = re.compile(rb"\bCONSTRAINTS\b", re.IGNORECASE)
"""Without this nothing changes when the constraints of all others are checked, for which there is no way back."""

ENCODING = re.compile(rb"client_encoding", re.IGNORECASE)
"""Without this a single statement does not change how its own answer is encoded."""

FOLLOWS = re.compile(
    rb"\s*(SELECT|VALUES|TABLE|WITH(?!.*\b(INSERT|UPDATE|DELETE|MERGE)\b))\b", re.IGNORECASE | re.DOTALL
)
"""How an input begins that may follow right behind another. Not what a rule may add answers to, which the extended
protocol leaves out; nor what runs before the transaction has a snapshot, and so could tell that it has one already."""

UNCERTAIN = re.compile(rb"\$[0-9]|client_encoding|\bCONSTRAINTS\b", re.IGNORECASE)
"""Without this the extended protocol gives the same answer to a single statement as the simple one, errors too, and it
changes nothing that the run before, or the answer itself, depends on."""

LONERS = (*REFUSED, "42601", "42P02", "42P18")
"""Errors that would come again: of what no block admits, of several statements in one, or a parameter, of which the
extended protocol says otherwise what is meant."""

SHORT = 100_000
"""Bytes of an input that is looked through while the server waits for it."""

DETOURS = 1000
"""How many inputs are remembered of either kind."""


class Way(Enum):
    """How an input goes down that shares its transaction: with others in one pipeline, as a query, or not at all."""

    PIPELINE = "pipeline"
    QUERY = "query"
    ALONE = "alone"


def way(input: bytes) -> Way:
    """The quickest that can by no means end the transaction."""
    if LASTING.search(input):
        return Way.ALONE
    one = ONE.match(input) is not None and not ENCODING.search(input)
    if one and b";" not in input.rstrip(b"; \t\r\n"):
        return Way.PIPELINE
    if ENDING.search(input):
        return Way.PIPELINE if one else Way.ALONE
    return Way.QUERY


class Ways:
    """A worker's: what it can tell of an input beforehand, and what it has learned of those that it ran."""

    def __init__(self) -> None:
        self._bare: set[bytes] = set()
        self._loners: set[bytes] = set()

    def bare(self, task: Task) -> bool:
        """Must it run without a transaction block around it?"""
        return not task.atomic or ALONE.match(task.input) is not None or _among(task, self._bare)

    def shares(self, task: Task, *, most_ms: float) -> bool:
        """May it share a transaction with others, and with a timeout only if that is greater than `most_ms`?"""
        if task.batch <= 1 or way(task.input) is Way.ALONE or 0 < task.timeout_ms <= most_ms:
            return False
        return not _among(task, self._loners)

    def follows(self, task: Task) -> bool:
        """May it stand in a stream of runs, sent before the end of the run before is known?

        Not what takes more than its input to begin: it runs once, whatever comes of it. Nor one of a kind that a stream
        does not take, like those that share a transaction.
        """
        plain = task.atomic and task.remote is None and task.batch == 1
        plain = plain and not (task.save or task.repeated or task.aging)
        if not plain or len(task.input) > SHORT or b";" in task.input.rstrip(b"; \t\r\n"):
            return False
        follows = FOLLOWS.match(task.input) is not None and not UNCERTAIN.search(task.input)
        return follows and not _among(task, self._bare)

    def run_bare(self, task: Task) -> None:
        """No transaction block admits its input."""
        _remember(task, self._bare)

    def run_alone(self, task: Task) -> None:
        """Its input must not share a transaction."""
        _remember(task, self._loners)


def _among(task: Task, inputs: set[bytes]) -> bool:
    return bool(inputs) and _digest(task) in inputs


def _remember(task: Task, inputs: set[bytes]) -> None:
    if len(inputs) >= DETOURS:
        inputs.clear()
    inputs.add(_digest(task))


def _digest(task: Task) -> bytes:
    return hashlib.blake2b(task.input, digest_size=16).digest()
