"""A worker's session as our statements need it, whatever a task has done to it, and how it becomes like a new one.

A task may have set anything: role, search_path, limits, isolation. So our statements run with the user, the role and
the settings put back, in a transaction that is ours from some point on. After the task all that it left is dropped:
what a new session has not, the next task does not find. Nothing here decides what is written into a row.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from psycopg.pq.abc import PGresult

from pgtask import log
from pgtask.store import Store, Task, statements
from pgtask.worker.run import python_codec
from pgtask.worker.session import Session, SessionLost, StatementFailed, Step

PATIENCE = 60.0
"""Seconds that the server may take to answer our statements (they wait for locks at most five)."""

NEEDED = {
    "role": "none",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "on",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "enable_sort": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
"""What our statements need, as in the statement `ours`: only what a new session has otherwise is set each time."""

ASKED = (*NEEDED, "client_encoding")
"""Settings whose values in a new session matter."""

TIDY = ("close", "unlisten", "sequences", "leftovers", "spotless", "temporary")
"""Steps after the commit: what tells whether the first three are needed would cost more than they do."""

CLEANUP = ("reset_role", "close", "unlisten", "unlock", "temporary", "sequences", "prepared")
"""What makes a session of ours as clean as a new one."""

PLAIN = ("begin", "encoding", "constraints", "savepoint", "rollback_to")
"""Steps on whose success the task's work hangs: they do not rely on prepared statements."""

ONCE = ("facts", "since")
"""Steps of a new session: each statement that stays prepared is one more to look through when a task has left some."""


class Steps:
    """A pipeline with a name for each step, so that a failure can be told by what failed."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[Step] = []
        self.look = ""
        """The one that finds the group's next task, if there is any."""

    def add(self, name: str, step: Step) -> None:
        self.names.append(name)
        self.steps.append(step)

    def own(self, *names: str) -> None:
        """Statements without parameters of sql/session.sql."""
        self.names += names
        self.steps += map(_own, names)


@cache
def own_text(name: str) -> bytes:
    """A statement of sql/session.sql, which knows no names of a user's."""
    return statements("session")[name].encode()


@cache
def _own(name: str) -> Step:
    return Step(own_text(name), plain=name in (*PLAIN, *ONCE))


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What a session was like while it was new, and the `mark` of the settings that it began with."""

    since: bytes  # when its backend started, a timestamptz as text
    limit_ms: int  # its statement_timeout; 0 is none
    user: bytes  # who logged in
    role: bytes  # its setting of that name
    again: Step  # the statement `ours_again`
    mark: bytes

    @classmethod
    def read(cls, steps: Steps, results: Sequence[PGresult], encoding: str) -> "Fresh":
        """From the answers to `Ours.questions`."""
        names = ("facts", "defaults", "since", "mark")
        facts, defaults, since, mark = (results[steps.names.index(name)] for name in names)
        limit, user, role = (facts.get_value(0, column) or b"" for column in range(3))
        has = {name: (defaults.get_value(row, 0) or b"").decode() for row, name in enumerate(ASKED)}
        needed = NEEDED | {"client_encoding": encoding}
        changed = {name: value for name, value in needed.items() if has[name] != value}
        text = "".join(f", pg_catalog.set_config('{name}', '{value}', true)" for name, value in changed.items())
        return cls(
            since=since.get_value(0, 0) or b"",
            limit_ms=int(limit),
            user=user,
            role=role,
            again=Step(own_text("ours_again").replace(b"{settings}", text.encode()), (user, role)),
            mark=mark.get_value(0, 0) or b"",
        )


class Ours:
    """One session of a worker. `encoding` is the server's, PostgreSQL's name for it."""

    fresh: Fresh
    """Set by whoever has asked `questions`."""

    def __init__(self, session: Session, store: Store, encoding: str):
        self.session = session
        self.store = store
        self.encoding = encoding
        # A server that knows no encoding keeps names as the master wrote them.
        anything = encoding == "SQL_ASCII"
        self._codec, self._errors = ("utf-8", "surrogateescape") if anything else (python_codec(encoding), "replace")
        self._texts: dict[str, bytes] = {}  # the statements on the task table, by name
        self._temporary = False  # has the session a schema for temporary objects?
        self._spotless = True  # has no task left what `spotless` fails at? Each failure stands in the server's log

    def questions(self) -> Steps:
        """What a new session is asked before it is of use."""
        steps = Steps()
        steps.own("open", "facts")
        asked = b"{%s}" % ",".join(ASKED).encode()
        steps.add("defaults", Step(own_text("defaults"), (asked,), plain=True))
        self.add(steps, clean=False)
        steps.own("since")
        self.task(steps, "mark")
        steps.own("commit")
        return steps

    def encode(self, text: str) -> bytes:
        return text.encode(self._codec, self._errors)

    def decode(self, text: bytes) -> str:
        return text.decode(self._codec, self._errors)

    def storable(self, text: bytes) -> bytes:
        """The same without what is no text in the server's encoding."""
        return text.decode(self._codec, "replace").encode(self._codec, "replace")

    # What a pipeline is made of

    def add(self, steps: Steps, *, clean: bool, sure: bool = True) -> None:
        """Add what makes the rest of the transaction ours; `clean` also drops what the task has SET.

        Unless we make `sure`, the session must be like a new one, or made so: it fails where the task has changed its
        user or role.
        """
        if not sure:
            steps.own(*(("reset",) if clean else ()))
            steps.add("ours", self.fresh.again)
            return
        steps.own(*(("authorization", "reset") if clean else ("local_authorization",)))
        steps.add("ours", Step(own_text("ours"), (self.encoding.encode(),)))

    def task(self, steps: Steps, name: str, *params: object) -> None:
        """Add a statement on the task table."""
        text = self._texts.get(name)
        if text is None:
            text = self._texts[name] = self.encode(self.store.text(name))
        steps.add(name, Step(text, [value if value.__class__ is bytes else param(value) for value in params]))

    def turn(self, steps: Steps, task: Task) -> None:
        """Add what a run that shares its transaction begins with, in a savepoint of its own, the settings last."""
        steps.own("savepoint", "reset")
        if self._temporary:
            steps.own("temporary")
        where = (self.encode(self.store.schema), self.encode(self.store.table))
        settings = (b"%d" % task.id, task.group, *where, task.name)
        dropped = b"true" if self._temporary else b"false"
        steps.add("turn", Step(own_text("turn"), (*settings, self.fresh.user, self.fresh.role, dropped)))

    @property
    def streams(self) -> bool:
        """May inputs go down behind the clean-up, before it is known what else that takes?

        Not where a new session has another encoding than ours.
        """
        plain = self._spotless and not self._temporary
        return plain and self.session.parameter("client_encoding") == self.encoding

    def tidy_up(self, steps: Steps) -> None:
        """Add, after the commit, what makes the session like a new one, and asks what else that takes."""
        steps.own("close", "unlisten", "sequences")
        if self._temporary:
            steps.own("temporary")
        steps.add("leftovers", Step(own_text("leftovers"), (self.fresh.role,)))

    def commit_and_tidy_up(self, steps: Steps) -> None:
        """Add both where the next input comes right behind, in the transaction that the clean-up begins: what only a
        commit makes true stands before ours."""
        steps.add("deaf", Step(own_text("unlisten")))
        steps.own("commit", "close", "sequences")
        steps.add("spotless", Step(own_text("spotless"), (self.fresh.role,)))

    # What is sent

    def commit(self, steps: Steps, *, timeout: float | None) -> Sequence[PGresult]:
        """Send what commits and, maybe, tidies up. Returns at least the results of what stands before that.

        Raises StatementFailed when it is not committed, SessionLost when nobody knows.
        """
        try:
            results = self.session.pipeline(steps.steps, timeout=timeout)
        except StatementFailed as failure:
            if steps.names[failure.step] not in TIDY:
                raise
            self.tidy_again(steps, failure)
            return failure.before
        if steps.names[-1] == "leftovers":
            self._clean_if_need_be(results[-1])
        return results

    def tidy_again(self, steps: Steps, failure: StatementFailed) -> None:
        """A step of TIDY has failed. Raises SessionLost where the session cannot be made like a new one."""
        if steps.names[failure.step] == "spotless":
            self._spotless = False
            self._look_over()
        else:
            self._unclean(steps, failure)
            self.clean()

    def _look_over(self) -> None:
        """Something is left in the session."""
        steps = Steps()
        steps.add("leftovers", Step(own_text("leftovers"), (self.fresh.role,)))
        try:
            [leftovers] = self.session.pipeline(steps.steps, timeout=PATIENCE)
        except StatementFailed as failure:
            self._unclean(steps, failure)
            self.clean()
        else:
            self._clean_if_need_be(leftovers)

    def _clean_if_need_be(self, leftovers: PGresult) -> None:
        role, temporary, prepared = (leftovers.get_value(0, column) == b"t" for column in (1, 2, 3))
        if role or prepared or temporary > self._temporary:
            self.clean()
        self._temporary = temporary

    def transaction(self, name: str, *params: object, clean: bool = False) -> PGresult:
        """Run one statement on the task table in a transaction of our own; what was open is rolled back.

        With `clean`, what a task has left in the session is dropped. Raises SessionLost when it fails twice.
        """

        def steps() -> Steps:
            made = Steps()
            if not self.session.idle:
                made.own("rollback")
            made.own("open")
            self.add(made, clean=clean)
            self.task(made, name, *params)
            made.own("commit")
            if clean:
                self.tidy_up(made)
            return made

        made, results = self._twice(name, steps)
        return results[made.names.index(name)]

    def rewind(self, *, save: bool) -> None:
        """Undo what an input did in our transaction, so that it can run without it. What the run needs stays set."""

        def steps() -> Steps:
            made = Steps()
            made.own("rollback")
            if not save:
                self.tidy_up(made)
            return made

        self._twice("undoing the first try", steps)

    def clean(self) -> None:
        """Drop whatever the session has that a new one has not. Raises SessionLost when that fails twice."""
        steps = Steps()
        steps.own(*CLEANUP)
        try:
            results = self.session.pipeline(steps.steps, timeout=PATIENCE)
        except StatementFailed as failure:
            self._unclean(steps, failure)
            try:
                results = self.session.pipeline(steps.steps, timeout=PATIENCE)
            except StatementFailed as final:
                raise SessionLost(f"cleaning the session: {final}") from final
        left = results[-1]
        if left.ntuples:
            names = [left.get_value(row, 0) or b"" for row in range(left.ntuples)]
            text = b";".join(b"DEALLOCATE " + name for name in names)
            self.session.query(text, lambda result: None, lambda data: None, lambda: None)

    def _twice(self, what: str, make: Callable[[], Steps]) -> tuple[Steps, Sequence[PGresult]]:
        """Send it, and if need be once more: the task may have dropped our prepared statements."""
        steps = make()
        try:
            return steps, self.commit(steps, timeout=PATIENCE)
        except StatementFailed:
            self.session.forget_statements()
        steps = make()
        try:
            return steps, self.commit(steps, timeout=PATIENCE)
        except StatementFailed as failure:
            raise SessionLost(f"{what}: {failure}") from failure

    def _unclean(self, steps: Steps, failure: StatementFailed) -> None:
        """Before another try: somebody's cancel has hit the clean-up, say, or the task has dropped our statements."""
        if failure.code == "26000":
            self.session.forget_statements()
            return
        log.warning("cleanup_failed", step=steps.names[failure.step], code=failure.code, error=str(failure))


def explain(session: Session, text: bytes) -> Step:
    """What has the server plan a statement that is prepared.

    EXPLAIN, since a statement of ours that finds no row would fire the user's statement triggers.
    """
    count = max(map(int, re.findall(rb"\$(\d+)", text)))
    return Step(b"EXPLAIN EXECUTE %s (%s)" % (session.prepared(text), b", ".join([b"NULL"] * count)), plain=True)


def param(value: object) -> bytes | None:
    """A parameter as text."""
    if value is None or isinstance(value, bytes):
        return value
    return str(value).encode()


def array(values: Iterable[bytes | None]) -> bytes:
    """The literal of an array of texts, which may be empty or null. Every server encoding is ASCII-safe."""
    return b"{%s}" % b",".join(
        b"NULL" if value is None else b'"%s"' % value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') for value in values
    )
