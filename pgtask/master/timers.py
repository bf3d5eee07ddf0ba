"""An event loop whose timers are exact: what is planned for 12:00:00.250 shall start then, not a millisecond later.

epoll waits whole milliseconds, rounded up. select() on the descriptor of the epoll instance waits microseconds.
"""

import asyncio
import select
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Exact(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0 and self.fileno() < 1024:  # select() knows no greater ones
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class Loop(asyncio.SelectorEventLoop):
    """The master's."""

    def __init__(self) -> None:
        super().__init__(_Exact())


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run does."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main)
