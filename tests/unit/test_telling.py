"""How much the log tells of tasks, and that what it leaves out is counted."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pgtask import log, telling
from pgtask.config import load
from pgtask.telling import Quota, Telling, shared

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    """What was written at INFO and above."""
    file = tmp_path / "log"
    log.setup("info", str(file), "json")
    yield lambda: [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    log.setup("error", "stderr")


def made(**settings: object) -> Telling:
    return Telling(load(None, ["dbname=app user=app"], settings, {}).tables[0])


def test_bound_holds_for_all_processes_that_were_forked_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota(3, *shared(1))
    assert quota.next_look() == math.inf
    for _ in range(4):
        if (pid := os.fork()) == 0:
            os._exit(sum(quota.admits() for _ in range(5)))
        os.waitpid(pid, 0)
    assert quota.beyond() == 17
    later = time.monotonic() + telling.WINDOW
    monkeypatch.setattr(telling, "time", SimpleNamespace(monotonic=lambda: later))
    assert [quota.admits() for _ in range(5)] == [True, True, True, False, False]
    assert quota.next_look() < math.inf
    assert (quota.beyond(), quota.beyond()) == (2, 0)
    assert quota.next_look() == math.inf


def test_what_is_left_out_is_counted_and_told_when_the_minute_is_over_or_at_the_end(lines: Lines) -> None:
    one = made(log_failed=2)
    for id in range(5):
        one.failed(id, "no")
    one.tell()
    assert [line["id"] for line in lines()] == [0, 1]
    one.tell(last=True)
    one.tell(last=True)
    assert [(line["of"], line["count"]) for line in lines()[2:]] == [("task_failed", 3)]


def test_what_the_level_hides_uses_up_nothing(lines: Lines, tmp_path: Path) -> None:
    log.setup("warning", str(tmp_path / "log"), "json")
    one = made(log_failed=1)
    for id in range(5):
        one.failed(id, "no", retried=True)
    one.failed(5, "no")
    one.tell(last=True)
    assert [line["id"] for line in lines()] == [5]


def test_new_settings_hold_at_once(lines: Lines) -> None:
    one = made(log_failed=0)
    one.failed(1, "no")
    one.configure(load(None, ["dbname=app user=app"], {"log_failed": 1, "slow_run": "5 s"}, {}).tables[0])
    one.failed(2, "no")
    assert [line["id"] for line in lines()] == [2]
    assert (one.slow_run, one.slow_take) == (5.0, 1.0)


def test_zero_is_never() -> None:
    one = made(slow_run="0", slow_take="0")
    assert (one.slow_run, one.slow_take) == (math.inf, math.inf)
