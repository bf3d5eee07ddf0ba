"""Masters that are killed under load, each followed at once by the next."""

import random
import time
from collections.abc import Callable
from signal import SIGKILL

from tests.fixtures.database import Database
from tests.fixtures.ledger import Ledger
from tests.fixtures.master import Master
from tests.fixtures.wait import eventually

SERVED = "SELECT 1 FROM task AS t, task_master AS m WHERE t.start > m.since LIMIT 1"
"""Has the new master begun to?"""


def test_masters_that_are_killed_again_and_again_lose_nothing(
    database: Database, ledger: Ledger, master: Callable[..., Master]
) -> None:
    chance = random.Random(6)
    masters = [master(database.conninfo)]
    for _ in range(3):
        ledger.fill(60, groups=20, ms=20)
        time.sleep(chance.uniform(0, 0.3))
        masters[-1].expect_exit = -SIGKILL
        masters[-1].stop(SIGKILL)
        ledger.fill(20, groups=20)
        masters.append(master(database.conninfo))
        eventually(lambda: database.execute(SERVED))
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
    assert [one.logged("run_lost") for one in masters] == [[]] * len(masters)


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
        stands.wait_log(r"\bleading\b")
        leads = stands
    ledger.settled()
    assert {row["attempt"] for row in database.tasks()} == {1}
