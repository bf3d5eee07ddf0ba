"""Whoever may write a `remote` names a server of his own: what the daemon tells it, and what its answers can do.

The daemon here has everything that libpq would use by itself: PG* variables, a password file, a service, a client
certificate in its home. None of it may reach a server that a task names, while `remote_password` is true.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.fixtures.hostile import GSS, PEM, TRUST, Hostile, error, hostile, message
from tests.fixtures.served import Served, served
from tests.fixtures.server import AnyServer

BAIT = "daemons-own"
SENT = {"user", "database", "application_name", "client_encoding", "options"}
"""All that a client may say of itself at the start, besides its password."""


def trap(home: Path) -> Mapping[str, str]:
    """The environment of a daemon whose home and variables are full of what is nobody else's."""
    keys = home / ".postgresql"
    keys.mkdir(parents=True)
    for name in ("postgresql.crt", "postgresql.key"):
        shutil.copy(PEM, keys / name)
        (keys / name).chmod(0o600)
    (home / ".pgpass").write_text(f"*:*:*:*:{BAIT}\n", "utf-8")
    (home / ".pgpass").chmod(0o600)
    service = f"[mine]\nuser={BAIT}\ndbname={BAIT}\npassword={BAIT}\nsslkey={keys}/postgresql.key\n"
    (home / ".pg_service.conf").write_text(service, "utf-8")
    return {
        "HOME": str(home),
        "PGPASSWORD": BAIT,
        "PGUSER": BAIT,
        "PGDATABASE": BAIT,
        "PGAPPNAME": BAIT,
        "PGOPTIONS": f"-c my.own={BAIT}",
        "PGSERVICE": "mine",
        "PGSSLCERT": f"{keys}/postgresql.crt",
        "PGSSLKEY": f"{keys}/postgresql.key",
    }


@pytest.fixture(scope="module")
def base(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("hostile")
    with served(server, directory, env=trap(directory / "home")) as one:
        yield one


@pytest.fixture(scope="module")
def trusting(server: AnyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same daemon where the DBA has allowed all of it."""
    directory = tmp_path_factory.mktemp("trusting")
    with served(server, directory, config="remote_password = false", env=trap(directory / "home")) as one:
        yield one


@pytest.fixture
def other() -> Iterator[Hostile]:
    with hostile() as one:
        yield one


def failed(base: Served, remote: str) -> str:
    """The error of a task that could not run there; the worker and its session have come to no harm."""
    row = base.then_next("SELECT 1", remote=remote, next_remote=None, group=f"g {remote[:60]}")
    assert row["state"] == "FAIL", row
    assert BAIT not in row["error"]
    return str(row["error"])


def test_conninfo_with_its_own_password_says_nothing_of_the_daemon(base: Served, other: Hostile) -> None:
    row = base.run("SELECT 1", remote=f"host=127.0.0.1 port={other.port} password=theirs")
    assert row["state"] == "DONE"
    [visit] = other.visits
    assert visit.password == "theirs"
    assert set(visit.startup) <= SENT
    assert BAIT not in json.dumps(visit.startup)


def test_trap_is_a_trap(trusting: Served, other: Hostile) -> None:
    """Where the DBA allows it, libpq does use all of that: the other tests prove something."""
    assert trusting.run("SELECT 1", remote=f"host=127.0.0.1 port={other.port}")["state"] == "DONE"
    [visit] = other.visits
    assert (visit.password, visit.startup["user"], visit.startup["database"]) == (BAIT, BAIT, BAIT)
    assert BAIT in visit.startup["options"]
    with hostile(tls=True) as encrypted:
        assert trusting.run("SELECT 1", remote=encrypted.conninfo)["state"] == "DONE"
        assert encrypted.visits[-1].certificate


@pytest.mark.parametrize("mode", ["prefer", "require"])
def test_certificate_of_the_daemon_is_not_shown(base: Served, mode: str) -> None:
    with hostile(tls=True) as encrypted:
        row = base.run("SELECT 1", remote=f"{encrypted.conninfo} sslmode={mode}")
        assert row["state"] == "DONE", row
        assert not any(visit.certificate for visit in encrypted.visits)


@pytest.mark.parametrize(
    "text",
    [
        "host=127.0.0.1 port=PORT",
        "host=127.0.0.1 port=PORT user=theirs password=''",
        "hostaddr=127.0.0.1 port=PORT",
        "postgresql://127.0.0.1:PORT",
        "postgresql://theirs@127.0.0.1:PORT/theirs",
        "postgresql://theirs:@127.0.0.1:PORT/theirs",
        "postgres://127.0.0.1:PORT/theirs?password=",
    ],
)
def test_conninfo_without_a_password_reaches_nobody(base: Served, other: Hostile, text: str) -> None:
    assert failed(base, text.replace("PORT", str(other.port))).startswith("ERROR:  password is required\n")
    assert other.visits == []


FORBIDDEN = {
    "service": "mine",
    "passfile": "/nothing",
    "sslkey": "/nothing",
    "sslcert": "/nothing",
    "sslrootcert": "system",
    "sslpassword": "x",
    "sslcertmode": "require",
    "sslkeylogfile": "/tmp/keys",
    "gssencmode": "require",
    "gssdelegation": "1",
    "krbsrvname": "x",
    "gsslib": "gssapi",
    "requirepeer": "x",
    "scram_client_key": "x",
    "scram_server_key": "x",
    "oauth_issuer": "http://127.0.0.1:PORT",
    "oauth_client_id": "x",
    "oauth_client_secret": "x",
}
"""What reaches for files, services or credentials; a library that does not know one of them refuses it, too."""


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_parameter_reaches_nobody_in_any_form(base: Served, other: Hostile, name: str) -> None:
    value = FORBIDDEN[name].replace("PORT", str(other.port))
    odd = f"%{ord(name[0]):02x}{name[1:]}"
    uri = f"postgresql://theirs:theirs@127.0.0.1:{other.port}/theirs?"
    texts = [
        f"{other.conninfo} {name}={value}",
        f"{other.conninfo} {name} = '{value}'",
        f"{other.conninfo} {name.upper()}={value}",
        *(f"{uri}{name}={value}", f"{uri}{odd}={value}", f"{uri}{name.upper()}={value}"),
    ]
    ids = [base.database.insert("SELECT 1", remote=text, group=f"{name} {n}") for n, text in enumerate(texts)]
    errors = [str(base.database.wait(id)["error"]).splitlines()[0] for id in ids]
    assert set(errors) <= {f'ERROR:  remote may not set "{name}"', "ERROR:  PQconninfoParse failed"}, errors
    assert len([error for error in errors if name in error]) in (0, 4)
    assert other.visits == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dbname", "'service=mine passfile=/x'", "service=mine passfile=/x"),
        ("dbname", "'postgresql://127.0.0.1/?service=mine'", "postgresql://127.0.0.1/?service=mine"),
        ("dbname", "'a\\' service=mine'", "a' service=mine"),
        ("dbname", "'a\\\\'", "a\\"),
        ("user", "'a b\\' passfile=/x user=\\'c'", "a b' passfile=/x user='c"),
        ("application_name", "'x\nsslkey=/x'", "x\nsslkey=/x"),
        ("password", "'x\\' service=mine'", "x' service=mine"),
        ("options", "'-c a.b=c service=mine'", "-c a.b=c service=mine"),
    ],
)
def test_value_that_looks_like_a_parameter_stays_a_value(
    base: Served, other: Hostile, name: str, value: str, said: str
) -> None:
    assert base.run("SELECT 1", remote=f"{other.conninfo} {name}={value}")["state"] == "DONE"
    [visit] = other.visits
    assert set(visit.startup) <= SENT
    given = {**visit.startup, "dbname": visit.startup["database"], "password": visit.password}
    assert given[name] == said


@pytest.mark.parametrize("allowed", ["", "require_auth=gss", "require_auth=gss,password", "require_auth=!md5"])
def test_ticket_of_the_daemon_is_not_used(base: Served, allowed: str) -> None:
    with hostile(authentication=GSS) as one:
        said = failed(base, f"{one.conninfo} {allowed}")
        assert "ERROR:  connection to remote failed\nDETAIL:" in said
        assert "requirement" in said
        assert [visit.password for visit in one.visits] == [None]


@pytest.mark.parametrize("allowed", ["none", "password,none", "!password"])
def test_server_without_a_password_gets_no_task_whatever_is_required(base: Served, allowed: str) -> None:
    with hostile(authentication=TRUST) as one:
        assert failed(base, f"{one.conninfo} require_auth={allowed}").startswith("ERROR:  password is required\n")


def test_password_asked_for_by_one_host_does_not_count_for_another(base: Served, other: Hostile) -> None:
    """The first is left because no standby was found there, and comes back at last, as it is."""
    with hostile(authentication=TRUST) as open_one:
        hosts = f"host=127.0.0.1,127.0.0.1 port={open_one.port},{other.port} target_session_attrs=prefer-standby"
        said = failed(base, f"{hosts} user=theirs dbname=theirs password=theirs")
        assert said.startswith("ERROR:  ")
        assert not any(visit.password for visit in open_one.visits)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:hun%zzter2x@h/d",
        "postgresql://h/d?password=hun%zzter2x",
        "postgresql://h/d?password=a&hunter2x",
        "postgresql://u:p@h/d?hunter2x=c",
        "password=a hunter2x=c",
        "postgresql:/u:hunter2x@h/d",
        "password=a hunter2x",
        "password='hunter2x",
    ],
)
def test_malformed_conninfo_is_explained_without_a_piece_of_its_password(base: Served, text: str) -> None:
    row = base.run("SELECT 1", remote=text)
    assert row["error"].startswith("ERROR:  PQconninfoParse failed\nDETAIL:  ")
    assert "ter2x" not in row["error"]


# What it answers


ANSWERS = [
    error(S=b"ERROR", C=b"\xff\xfe\xfd\xfc\xfb", M=b"\xff\0", P=b"x"),
    error(S=b"ERROR", C=b"", M=b"", P=b"9" * 5000),
    error(S=b"ERROR", C=b"25001", M=b"again and again"),
    error(P=b"-5", p=b"\xb2"),
    message(b"N", b"SNOTICE\0C\xff\0M\x1b[2J\0P\xb2\0\0") + message(b"C", b"\xff\0"),
    message(b"T", b"\0\1\xff\xff\0" + b"\0" * 18) + message(b"D", b"\0\1\0\0\0\2\xff\xfe") + message(b"C", b"\xff\0"),
    message(b"G", b"\0\0\0") + error(S=b"ERROR", C=b"57014", M=b"no"),
    message(b"S", b"client_encoding\0\xff\xff\0") + message(b"C", b"SELECT 1\0"),
    b"\x7f\x7f\x7f\x7f\x7f" * 10,
    message(b"R", b"\0\0\0\3"),
    message(b"A", b"\0\0\0\1pgtask_1\x00007\0") + message(b"C", b"LISTEN\0"),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
@pytest.mark.parametrize("encoding", [b"UTF8", b"\xff\xfe"], ids=["utf8", "odd"])
def test_answer_that_makes_no_sense_costs_no_worker(base: Served, answer: bytes, encoding: bytes) -> None:
    with hostile(answer=answer, encoding=encoding) as one:
        row = base.then_next(
            "SELECT 1", remote=one.conninfo, next_remote=None, timeout="5 s", delete=False, group="answers"
        )
        assert row["state"] in ("DONE", "FAIL")
        assert row["attempt"] == 1
