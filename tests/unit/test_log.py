"""The lines of the log: quoting, JSON, redaction, rotation, and a disk that is full."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgtask import log
from pgtask.errors import UserError


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A log file; afterwards the log goes to standard error again."""
    yield tmp_path / "pgtask.log"
    log.setup("error", "stderr")


def test_line_has_instant_level_pid_event_and_fields(target: Path) -> None:
    log.setup("info", str(target))
    log.info("worker_forked", worker=4711, table="a@b public.task", clean=True, group="mail", nothing=None)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO \[\d+\] worker_forked"
        r' worker=4711 table="a@b public\.task" clean=true group=mail\n',
        target.read_text(),
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "x"', r'"say \"x\""'),
        ("a=b", '"a=b"'),
        ("a\nb", r'"a\nb"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("\x7f", r'"\u007f"'),
        ("a\u2028b", r'"a\u2028b"'),
        ("\udcff", r'"\udcff"'),
        ("ü", "ü"),
        (b"bytes", "bytes"),
        (1.5, "1.5"),
        (Path("/a"), "/a"),
    ],
)
def test_value_is_quoted_when_it_could_be_misread(target: Path, value: object, shown: str) -> None:
    log.setup("info", str(target))
    log.info("event", value=value)
    assert target.read_text().endswith(f" event value={shown}\n")


def test_json_line_holds_the_same(target: Path) -> None:
    log.setup("info", str(target), "json")
    log.warning("table_down", table="x", tries=3, ok=False, error='a "b"\nc', nan=float("nan"), level="mine")
    line = json.loads(target.read_text())
    assert line.pop("time").endswith("Z")
    assert line.pop("pid") > 0
    assert line == {
        "level": "WARNING",
        "event": "table_down",
        "table": "x",
        "tries": 3,
        "ok": False,
        "error": 'a "b"\nc',
        "nan": "nan",
        "level_": "mine",
    }


def test_lower_levels_are_left_out(target: Path) -> None:
    log.setup("warning", str(target))
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.event("error", "d")
    assert [line.split()[3] for line in target.read_text().splitlines()] == ["c", "d"]


def test_traceback_is_indented_under_its_event(target: Path) -> None:
    log.setup("info", str(target))
    try:
        raise RuntimeError("password=hunter2")
    except RuntimeError:
        log.exception("poller_crashed", table="x")
    first, *rest = target.read_text().splitlines()
    assert first.endswith("poller_crashed table=x")
    assert all(line.startswith("\t") for line in rest)
    assert rest[-1] == "\tRuntimeError: password=***"


def test_warning_of_a_library_is_an_event_too(target: Path) -> None:
    log.setup("info", str(target))
    logging.getLogger("asyncio").warning("slow %s", "callback")
    assert target.read_text().endswith('library_message logger=asyncio text="slow callback"\n')


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("host=a password=hunter2 dbname=b", "host=a password=*** dbname=b"),
        ("password = 'hunter2 \\' x' dbname=b", "password = *** dbname=b"),
        ("password='hunter2 unfinished", "password=***"),
        ("password=hun\\ ter2 dbname=b", "password=*** dbname=b"),
        ("sslpassword=hunter2", "sslpassword=***"),
        ("PASSWORD=hunter2", "PASSWORD=***"),
        ("postgresql://u:hunter2@h/d", "postgresql://u:***@h/d"),
        ("postgres://u:hun@ter2@h/d", "postgres://u:***@h/d"),
        ("postgresql://u:hun/ter2@h/d", "postgresql://u:***@h/d"),
        ("postgresql://h/d?password=hunter2", "postgresql://h/d?password=***"),
        ("ALTER ROLE x PASSWORD 'hun''ter2' LOGIN", "ALTER ROLE x PASSWORD *** LOGIN"),
        ("ALTER ROLE x PASSWORD E'hunt er\\'2' LOGIN", "ALTER ROLE x PASSWORD *** LOGIN"),
        ('password authentication failed for user "x"', 'password authentication failed for user "x"'),
        ("no password supplied", "no password supplied"),
        ("postgresql://u@h:5432/d", "postgresql://u@h:5432/d"),
        ("nothing secret", "nothing secret"),
    ],
)
def test_passwords_are_taken_out(text: str, shown: str) -> None:
    assert log.redact(text) == shown


def test_no_password_gets_into_the_log(target: Path) -> None:
    for format in ("text", "json"):
        log.setup("info", str(target), format)
        log.error("failed", error=RuntimeError("bad: password=hunter2"), conninfo=b"postgresql://u:hunter2@h")
    assert "hunter2" not in target.read_text()


@pytest.mark.parametrize(
    "character", ["\x1b", "\x9b", "\u202e", "\u200b", "\u2066", "\ufeff", "\U000e0041", "\n", "\u2028"]
)
def test_what_does_not_show_as_itself_is_escaped(target: Path, character: str) -> None:
    try:
        raise ValueError(f"a{character}b")
    except ValueError as error:
        for format in ("text", "json"):
            log.setup("info", str(target), format)
            log.info("odd", value=f"a{character}b")
            log.exception("odd", error=error)
    for line in target.read_text("utf-8").split("\n"):
        assert line.replace("\t", "").isprintable()


def test_link_that_another_user_has_laid_out_is_not_followed(target: Path, tmp_path: Path) -> None:
    """Only root can make such a link for this test; that our own are followed shows for everybody."""
    link = tmp_path / "link"
    link.symlink_to(target)
    log.setup("info", str(link))
    log.info("followed")
    assert "followed" in target.read_text("utf-8")
    if os.geteuid() == 0:
        os.lchown(link, 65534, 65534)
        with pytest.raises(UserError, match="symbolic link"):
            log.setup("info", str(link))
        log.reopen()
        log.info("refused")
        assert "refused" in target.read_text("utf-8")  # by the old descriptor: no line is lost


def test_moved_file_is_noticed(target: Path) -> None:
    log.setup("info", str(target))
    log.info("before")
    target.rename(target.with_suffix(".1"))
    log.info("after")
    assert "before" in target.with_suffix(".1").read_text()
    assert "after" in target.read_text()


def test_reopen_opens_the_file_anew(target: Path) -> None:
    log.setup("info", str(target))
    target.unlink()
    log.reopen()
    assert target.exists()
    assert log.descriptors()


def test_full_disk_never_disturbs_and_is_said_once_when_it_is_over(
    target: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target.symlink_to("/dev/full")
    log.setup("info", str(target))
    for _ in range(3):
        log.info("lost")
    target.unlink()
    log.info("written")
    log.info("written")
    events = [line.split()[3:] for line in target.read_text().splitlines()]
    assert events == [["written"], ["log_writable_again", "lost=3"], ["written"]]
    assert capfd.readouterr().err == ""


def test_vanished_directory_never_disturbs(target: Path) -> None:
    (target.parent / "sub").mkdir()
    log.setup("info", str(target.parent / "sub" / "log"))
    (target.parent / "sub" / "log").unlink()
    (target.parent / "sub").rmdir()
    log.info("lost")
    log.reopen()
    log.info("lost")
    (target.parent / "sub").mkdir()
    log.info("written")
    assert "log_writable_again lost=3" in (target.parent / "sub" / "log").read_text()


def test_file_that_cannot_be_opened_is_refused_and_the_old_log_stays(target: Path) -> None:
    log.setup("info", str(target))
    with pytest.raises(UserError, match=r"log .*: No such file or directory"):
        log.setup("info", str(target.parent / "none" / "log"))
    log.info("still_here")
    assert "still_here" in target.read_text()


def test_standard_error_is_a_target(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("info", "stderr")
    log.info("hello")
    log.setup("error", "stderr")
    assert capfd.readouterr().err.endswith(" hello\n")
    assert log.descriptors() == {2}
