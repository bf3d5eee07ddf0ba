"""How long a worker goes on with a group, and what it wants of it next."""

import pytest

from pgtask.worker import turn as module
from pgtask.worker.turn import Turn


class Clock:
    """What the module takes for time.monotonic()."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def entered(batch_time: float = 0.01) -> Turn:
    turn = Turn(batch_time)
    turn.enter(term=7, lane=5, slot=2)
    return turn


def wants(turn: Turn, *, more: bool = True) -> bool:
    return turn.want(more=more, batch=1).next


def test_it_goes_on_as_long_as_nobody_waits(clock: Clock) -> None:
    turn = entered()
    turn.runs, clock.now = 1000, clock.now + 3600
    assert wants(turn)
    assert not wants(turn, more=False)


@pytest.mark.parametrize(
    ("seconds", "runs", "goes_on"), [(0.009, 200, True), (0.011, 100, False), (0.149, 99, True), (0.151, 1, False)]
)
def test_while_others_wait_it_has_a_moment_or_longer_for_few_runs(
    clock: Clock, seconds: float, runs: int, goes_on: bool
) -> None:
    turn = entered()
    turn.make_room(now=False)
    turn.runs, clock.now = runs, clock.now + seconds
    assert wants(turn) is goes_on


def test_who_is_told_to_make_room_now_takes_nothing_more(clock: Clock) -> None:
    turn = entered()
    turn.make_room(now=True)
    turn.make_room(now=False)
    assert not wants(turn)
    turn.forget_others()
    assert wants(turn)


def test_a_turn_counts_its_own_runs(clock: Clock) -> None:
    turn = entered()
    turn.runs = 12
    assert turn.had == 12
    turn.enter(term=7, lane=6, slot=0)
    assert (turn.had, turn.want(more=True, batch=1, ahead=1).runs) == (0, 13)


def test_it_looks_below_for_a_while_where_a_task_comes_right_after_none_was_found(clock: Clock) -> None:
    turn = entered()
    turn.over()
    clock.now += 0.01
    turn.enter(term=7, lane=5, slot=2)
    assert turn.want(more=True, batch=1).below
    clock.now += 1.01
    assert not turn.want(more=True, batch=1).below


@pytest.mark.parametrize(("lane", "pause"), [(6, 0.01), (5, 0.03)])
def test_not_in_another_group_nor_later(clock: Clock, lane: int, pause: float) -> None:
    turn = entered()
    turn.over()
    clock.now += pause
    turn.enter(term=7, lane=lane, slot=2)
    assert not turn.want(more=True, batch=1).below


def test_as_many_share_a_transaction_as_its_time_allows(clock: Clock) -> None:
    turn = entered(batch_time=0.01)
    assert turn.want(more=True, batch=50).batch == 50
    for _ in range(50):
        turn.took(0.001)
    assert turn.each == pytest.approx(0.001, rel=0.01)
    assert turn.want(more=True, batch=50).batch == 10
    for _ in range(50):
        turn.took(1.0)
    assert turn.want(more=True, batch=50).batch == 1
