"""Tasks that run on another database: the second session of a worker, and the rules for its conninfo.

The conninfo is the inserter's text, used with the daemon's rights. Unless configured otherwise it must carry its own
password and the server must have asked for it, and it may name nothing that reaches for the daemon's own credentials:
no files, no services, no client certificates, no Kerberos ticket, and no PG* variable of the daemon fills in what it
leaves out. The session is kept for the following tasks with the same conninfo; it
asks the server to notice when the worker dies. Such tasks are at least once: their effect and their row are on two
servers.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator

from psycopg import OperationalError, ProgrammingError, conninfo, pq

from pgtask import log
from pgtask.log import redact
from pgtask.output import Error
from pgtask.process import Watch
from pgtask.settings import did_you_mean
from pgtask.store import Task
from pgtask.worker.run import Heed, Limits, Outcome, execute, read_error, transcode
from pgtask.worker.session import SYNC, Session, SessionLost, StatementFailed, Step

ALLOWED = frozenset(
    {
        *("host", "hostaddr", "port", "dbname", "user", "password", "options"),
        *("application_name", "fallback_application_name", "client_encoding"),
        *("connect_timeout", "tcp_user_timeout"),
        *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
        *("sslmode", "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version"),
        *("channel_binding", "require_auth", "target_session_attrs", "load_balance_hosts"),
    }
)
"""Conninfo parameters that reach for nothing of the daemon's."""

GUARDED = {"passfile": "", "sslcertmode": "disable", "gssencmode": "disable"}
"""What keeps libpq from offering the daemon's own credentials by default."""

TICKETS = ("gss", "sspi")
"""Ways to log in that a server may ask for, and libpq would follow, with what the daemon's own user has."""

KEPT = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3", "tcp_user_timeout": "60000"}

OPEN_TIMEOUT = 60.0
"""Seconds to connect in where neither the conninfo nor the task's timeout says less."""

ANSWER = 60.0
"""Seconds that the remote server may take for our own statements."""

STUBBORN = 3
"""Cancel requests without effect before the remote backend is terminated."""

SET = b"SELECT pg_catalog.set_config($1, $2, false)"
LIMIT = (
    b"SELECT pg_catalog.set_config(name, $1, false) FROM pg_catalog.pg_settings"
    b" WHERE name OPERATOR(pg_catalog.=) 'statement_timeout'"
    b" AND (setting OPERATOR(pg_catalog.=) '0' OR setting::pg_catalog.int4 OPERATOR(pg_catalog.>) $1::pg_catalog.int4)"
)
"""The server ends the statement by itself; a smaller limit of the remote role's wins."""

WATCHFUL = (
    b"SELECT pg_catalog.set_config(name, '1s', false) FROM pg_catalog.pg_settings"
    b" WHERE name OPERATOR(pg_catalog.=) 'client_connection_check_interval'"
)


class Refused(Exception):
    """The conninfo cannot be used; `error` is what the row shall say."""

    def __init__(self, error: Error):
        super().__init__(error.message.decode(errors="replace"))
        self.error = error


class Remote:
    """The remote session of a worker: at most one, to the conninfo of the last remote task."""

    def __init__(self, watch: Watch, encoding: str, *, password: bool, heed: Heed):
        self._watch = watch
        self._encoding = encoding
        self._password = password
        self._heed = heed
        self._session: Session | None = None
        self._conninfo: str | None = None
        self._opened = ""  # the conninfo with what we add
        self._own_encoding = ""
        self._limited = False  # by a task that saves its session

    def execute(self, task: Task, limits: Limits, tick: Callable[[], None]) -> Outcome:
        """Run the task on its remote. Whatever goes wrong, the loss of that session too, is the task's error."""
        try:
            session = self._open(task, limits, tick)
            outcome = self._run(session, task, limits, lambda: self._tick(session, task, limits, tick))
        except Refused as refused:
            return self._failed(refused.error)
        except (SessionLost, StatementFailed) as lost:
            self.close()
            if limits.cancelled or limits.expired():
                return self._failed(_cancelled(task, limits))
            detail = redact(str(lost)).encode()
            return self._failed(Error(message=b"the remote session was lost", code=b"08006", detail=detail))
        if not task.save:
            self._clean(session)
        return outcome

    def _tick(self, session: Session, task: Task, limits: Limits, tick: Callable[[], None]) -> None:
        """What the worker has to look at; and a run that no cancel request ends must not go on for ever."""
        tick()
        if limits.tries >= STUBBORN:
            self._terminate(session, task)

    def _terminate(self, session: Session, task: Task) -> None:
        """End the remote backend over one more session; if none is to be had, the server notices that we are gone."""
        log.warning("remote_ignores_cancel", id=task.id, backend=session.pid)
        try:
            with _bare_environment() if self._password else contextlib.nullcontext():
                other = Session.open(self._opened, self._watch, timeout=5.0, stop=lambda: False)
            try:
                pid = str(session.pid).encode()
                other.pipeline([Step(b"SELECT pg_catalog.pg_terminate_backend($1)", (pid,))], timeout=5.0)
            finally:
                other.close()
        except (SessionLost, StatementFailed) as failure:
            log.warning("remote_not_terminated", id=task.id, backend=session.pid, error=str(failure))
        raise SessionLost("the remote run ignored cancel requests")

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._conninfo = None

    def _failed(self, error: Error) -> Outcome:
        return Outcome(output=None, errors=(error,), notice=None, encoding=self._encoding)

    def _run(self, session: Session, task: Task, limits: Limits, tick: Callable[[], None]) -> Outcome:
        self._prepare(session, task)
        encoding = session.parameter("client_encoding")
        sql = self._in(encoding, task.input)
        outcome = execute(session, sql, task.format, prefix=b"", limits=limits, tick=tick, heed=self._heed)
        if session.idle:
            return outcome
        try:
            session.pipeline([Step(b"COMMIT" if outcome.ok else b"ROLLBACK")], timeout=ANSWER)
        except StatementFailed as failure:
            return Outcome(
                output=outcome.output, errors=(read_error(failure.result),), notice=outcome.notice, encoding=encoding
            )
        return outcome

    def _prepare(self, session: Session, task: Task) -> None:
        """Tell the session which task it runs; what a task before has saved of its own limit and encoding is undone."""
        steps = [Step(b"RESET statement_timeout", plain=True)] if self._limited else []
        if session.parameter("client_encoding") != self._own_encoding:
            steps.append(Step(SET, (b"client_encoding", self._own_encoding.encode())))
        steps.append(Step(SET, (b"pg_task.id", str(task.id).encode())))
        steps.append(Step(SET, (b"pg_task.group", task.group)))
        if task.timeout_ms:
            steps.append(Step(LIMIT, (str(task.timeout_ms).encode(),)))
        self._limited = task.save and bool(task.timeout_ms)
        try:
            session.pipeline([*steps, SYNC, Step(WATCHFUL)], timeout=ANSWER)
        except StatementFailed as failure:
            if failure.code != "26000":
                raise
            session.forget_statements()  # a task that saved its session had dropped them
            session.pipeline([*steps, SYNC, Step(WATCHFUL)], timeout=ANSWER)

    def _in(self, encoding: str, sql: bytes) -> bytes:
        """The input in the remote session's encoding; never one that differs from what was meant."""
        text = transcode(sql, self._encoding, encoding)
        if transcode(text, encoding, self._encoding) != sql:
            message = b"the input cannot be sent to the remote in encoding " + encoding.encode()
            raise Refused(Error(message=message, code=b"22P05"))
        return text

    def _clean(self, session: Session) -> None:
        """As a new session for the next task; one that cannot be cleaned is closed."""
        session.forget_statements()
        try:
            session.pipeline([Step(b"DISCARD ALL", plain=True)], timeout=ANSWER)
        except (SessionLost, StatementFailed):
            self.close()

    def _open(self, task: Task, limits: Limits, tick: Callable[[], None]) -> Session:
        text = transcode(task.remote or b"", self._encoding, "UTF8").decode(errors="replace")
        if self._session is not None and self._conninfo == text and self._alive(self._session):
            return self._session
        self.close()
        params = self._params(text)
        timeout = _connect_timeout(params.pop("connect_timeout", ""))
        if limits.deadline is not None:
            timeout = min(timeout, limits.deadline - time.monotonic())

        def stop() -> bool:
            tick()
            return bool(limits.cancelled)

        self._opened = conninfo.make_conninfo(**params)
        try:
            with _bare_environment() if self._password else contextlib.nullcontext():
                session = Session.open(self._opened, self._watch, timeout=timeout, stop=stop, listen=True)
        except SessionLost as lost:
            if limits.cancelled or limits.expired():
                raise
            detail = redact(str(lost)).encode()
            raise Refused(Error(message=b"connection to remote failed", code=b"08001", detail=detail)) from lost
        if self._password and not session.pgconn.used_password:
            session.close()
            raise Refused(
                Error(
                    message=b"password is required",
                    code=b"2F003",
                    detail=b"Non-superusers cannot connect if the server does not request a password.",
                    hint=b"The remote server's authentication method must ask for one, or set remote_password = false.",
                )
            )
        self._session, self._conninfo, self._limited = session, text, False
        self._own_encoding = session.parameter("client_encoding")
        return session

    def _alive(self, session: Session) -> bool:
        """A kept session may have ended meanwhile: a new one is then opened, not the task failed."""
        try:
            session.pgconn.consume_input()
            session.settle(timeout=5.0)
        except (OperationalError, SessionLost):
            return False
        return True

    def _params(self, text: str) -> dict[str, str]:
        try:
            params = {name: str(value) for name, value in conninfo.conninfo_to_dict(text).items()}
        except ProgrammingError as error:
            detail = _parse_error(text, str(error).strip()).encode()
            raise Refused(Error(message=b"PQconninfoParse failed", code=b"42601", detail=detail)) from error
        if "replication" in params:
            message = b"a replication connection cannot run tasks"
            hint = b"Leave replication out of the conninfo."
            raise Refused(Error(message=message, code=b"0A000", hint=hint))
        if self._password:
            self._check(params)
            params = {**params, **GUARDED, "require_auth": _without_tickets(params.get("require_auth", ""))}
        if self._encoding != "SQL_ASCII":
            params.setdefault("client_encoding", self._encoding)
        return {**KEPT, **params}

    def _check(self, params: dict[str, str]) -> None:
        refused = sorted(set(params) - ALLOWED)
        if refused:
            raise Refused(
                Error(
                    message=b'remote may not set "%s"' % refused[0].encode(),
                    code=b"42501",
                    detail=b"It would reach for files or credentials of the scheduler.",
                    hint=b"Leave it out, or set remote_password = false for this table in the configuration.",
                )
            )
        if not params.get("password"):
            raise Refused(
                Error(
                    message=b"password is required",
                    code=b"2F003",
                    detail=b"Non-superusers must provide a password in the connection string.",
                )
            )


@contextlib.contextmanager
def _bare_environment() -> Iterator[None]:
    """No PG* variable fills in what a conninfo leaves out: PGSERVICE would name files, PGOPTIONS speak for others."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PG")}
    try:
        yield
    finally:
        os.environ.update(kept)


def _without_tickets(wanted: str) -> str:
    """The ways to log in that the conninfo allows, in libpq's words, without those that need no password of its own."""
    methods = [method.strip() for method in wanted.split(",") if method.strip()]
    chosen = [method for method in methods if not method.startswith("!") and method not in TICKETS]
    refused = [method for method in methods if method.startswith("!")] + [f"!{method}" for method in TICKETS]
    return ",".join(chosen or dict.fromkeys(refused))


def _parse_error(text: str, message: str) -> str:
    """libpq's message; what it quotes may be a piece of a password that was not quoted or escaped right."""
    if not re.search("pass|secret|key|//|@|postgres", text, re.IGNORECASE):
        return message
    unknown = re.search('option "([^"]*)"', message)
    if unknown and did_you_mean(unknown[1], [option.keyword.decode() for option in pq.Conninfo.get_defaults()]):
        return message
    return re.sub('".*"', '"***"', message.replace('"="', "="), flags=re.DOTALL)


def _connect_timeout(text: str) -> float:
    """Seconds; none, 0 and less mean libpq's own patience, which is ours."""
    try:
        return int(text or 0) if int(text or 0) > 0 else OPEN_TIMEOUT
    except ValueError:
        detail = f'invalid integer value "{text}" for connection option "connect_timeout"'.encode()
        raise Refused(Error(message=b"connection to remote failed", code=b"08001", detail=detail)) from None


def _cancelled(task: Task, limits: Limits) -> Error:
    """The session ended because the run was to end: the error says that, not how."""
    if limits.cancelled in ("", "timeout"):
        message = b"canceling statement due to statement timeout"
        return Error(message=message, code=b"57014", detail=b"The task's timeout is %d ms." % task.timeout_ms)
    return Error(message=b"canceling statement due to user request", code=b"57014")
