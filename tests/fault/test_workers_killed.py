"""Workers that are killed at random while a table is busy."""

import contextlib
import os
import random
import time
from collections.abc import Callable
from signal import SIGKILL

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master


def test_every_task_runs_once_while_workers_are_killed(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    one = master("--crashes", "1000", "--workers", "6", database.conninfo, tables=1)
    one.may_log_errors = True
    ledger.fill(900, groups=6, ms=20)  # enough to be there when we are slow to kill
    chance = random.Random(1)
    deadline = time.monotonic() + 20
    kills = 0
    while ledger.unfinished() and time.monotonic() < deadline and kills < 20:
        if workers := one.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(workers), SIGKILL)
                kills += 1
        time.sleep(chance.uniform(0.02, 0.1))
    assert kills > 3
    ledger.settled()
