"""An event loop on which hours pass in moments: its clock jumps to the next timer whenever nothing else can happen."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")

# So long must nothing arrive from sockets (the proxy's thread and the kernel are real) before the clock jumps.
# What takes longer arrives late in warped time, as over a slow network.
QUIET_SECONDS = 0.003


class _JumpingSelector(selectors.DefaultSelector):
    """Adds what would have been waited for to `passed` instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(QUIET_SECONDS)
        if not ready:
            self.passed += timeout
        return ready


class _WarpLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.passed


def run(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """asyncio.run in warped time: sleeps and time-outs take their full length on the loop's clock, and next to nothing
    on the wall. The clock starts at 0 and stands still while anything happens: hand `loop.time` on as `monotonic`."""
    with asyncio.Runner(loop_factory=_WarpLoop) as runner:
        return runner.run(coroutine)
