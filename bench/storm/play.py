"""One scenario from its first task to its account: clients insert, faults strike, all settles, the books are read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pgtask.embedded import Server
from storm.account import Account, account, read, settled
from storm.clients import Answer, Client
from storm.scenarios import Scenario, Strike
from storm.stand import PATIENCE, Broken, Stand, stand

CLIENTS = 4
SETTLE = 90.0
"""Seconds after the last fault within which every task must have ended; those that have not are lost."""

TICK = 0.05
FIRST = (0.3, 1.0)
"""Seconds before the first fault, so that a short run has one too."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for: for how long each scenario breaks things (seconds), the seed, and inserts a second."""

    seconds: float
    seed: str
    rate: float


@dataclass(kw_only=True)
class Play:
    """One scenario as it goes on; `account` is None until it has ended."""

    scenario: Scenario
    plan: Plan
    clients: list[Client] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    account: Account | None = None

    def __str__(self) -> str:
        inserts = [insert for client in self.clients for insert in client.inserts]
        committed = sum(insert.answer is Answer.COMMITTED for insert in inserts)
        return f"{self.scenario.name}: {committed} tasks inserted, {len(self.strikes)} faults"

    def run(self, server: Server, directory: Path) -> Account:
        """All of it. Raises Broken when it cannot go on; the stand is gone in any case."""
        with stand(server, f"chaos_{self.scenario.name}", directory) as made:
            for _ in range(self.scenario.masters):
                made.start_master()
            _until(lambda: made.ask("SELECT to_regclass('task_master') IS NOT NULL") == [(True,)], "no table was made")
            _until(lambda: made.ask("SELECT count(*) FROM task_master WHERE term > 0") == [(1,)], "no master leads")
            try:
                self._break_things(made)
            finally:
                for client in self.clients:
                    client.stop()
            made.calm()
            for client in self.clients:
                client.join()
            self._settle(made)
            made.end_masters()
            inserts = [insert for client in self.clients for insert in client.inserts]
            self.account = account(self.scenario.name, read(made, inserts, self.strikes))
            self.account.wrong += made.complaints
        return self.account

    def _break_things(self, made: Stand) -> None:
        seed = f"{self.plan.seed} {self.scenario.name}"
        for number in range(CLIENTS):
            rate = self.plan.rate / CLIENTS
            client = Client(number=number, conninfo=made.conninfo, remote=made.other, rate=rate, seed=seed)
            self.clients.append(client)
            client.start()
        chance = Random(seed)
        end = time.monotonic() + self.plan.seconds
        following = time.monotonic() + chance.uniform(*FIRST)
        while (now := time.monotonic()) < end:
            self._look_after(made)
            if now >= following:
                if (strike := self.scenario.fault(made, chance)) is not None:
                    self.strikes.append(strike)
                following = time.monotonic() + chance.uniform(*self.scenario.pause)
            time.sleep(TICK)

    def _settle(self, made: Stand) -> None:
        deadline = time.monotonic() + SETTLE
        while not settled(made) and time.monotonic() < deadline:
            self._look_after(made)
            time.sleep(TICK)

    def _look_after(self, made: Stand) -> None:
        made.tend()
        for client in self.clients:
            if client.trouble is not None:
                raise Broken(f"client {client.number} failed: {client.trouble!r}")


def _until(true: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise Broken(otherwise)
        time.sleep(TICK)
