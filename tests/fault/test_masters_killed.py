"""Masters that are killed under load, each followed at once by the next."""

import random
import time
from collections.abc import Callable
from datetime import timedelta
from signal import SIGKILL

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

PAUSE = "SELECT min(t.start) - m.since FROM task AS t, task_master AS m WHERE t.start > m.since GROUP BY m.since"


def test_masters_that_are_killed_again_and_again_lose_nothing(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    chance = random.Random(6)
    masters = [master(database.conninfo)]
    pauses: list[timedelta] = []
    for _ in range(3):
        ledger.fill(60, groups=20, ms=20)
        time.sleep(chance.uniform(0, 0.3))
        masters[-1].expect_exit = -SIGKILL
        masters[-1].stop(SIGKILL)
        ledger.fill(20, groups=20)
        masters.append(master(database.conninfo))
        [(pause,)] = eventually(lambda: database.execute(PAUSE))
        pauses.append(pause)
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert [one.logged("run_lost") for one in masters] == [[]] * len(masters)
    assert sorted(pauses)[2] < timedelta(seconds=5), pauses


def test_killed_master_is_replaced_by_the_one_that_stands_by_again_and_again(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    leads = master(database.conninfo)
    for turn in range(2):
        stands = master(database.conninfo, wait=False)
        stands.wait_log("standing_by")
        ledger.fill(60, groups=20, ms=2 * turn)
        leads.wait_log("worker_forked")
        leads.expect_exit = -SIGKILL
        leads.stop(SIGKILL)
        stands.wait_log(r"\bleading\b", timeout=5)
        leads = stands
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
