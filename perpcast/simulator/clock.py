"""The market's time: how far it has come, and waiting for an instant of it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

# How late the first bar may be noticed after a start.
_STANDING_SECONDS = 0.02


class Clock(Protocol):
    """What the exchange needs of time; all instants are UTC milliseconds of the market."""

    def now_ms(self) -> int:
        """The market's present instant."""
        ...

    def start(self) -> None:
        """Somebody looks: the first subscription says so, and each after it."""
        ...

    async def wait_until(self, time_ms: int, at_most_seconds: float) -> None:
        """Returns at the instant `time_ms`, or after so many seconds of the wall, whichever is first."""
        ...


class RunningClock:
    """Passes `speed` market seconds in each second of `monotonic` (`time.monotonic`), from `start` on.

    Until then it stands at `start_ms`: what is downloaded before a fast session does not depend on how long that took.
    """

    def __init__(self, start_ms: int, speed: float, monotonic: Callable[[], float]) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be larger than 0, received {speed}")
        self._start_ms, self._speed, self._monotonic = start_ms, speed, monotonic
        self._origin: float | None = None

    def start(self) -> None:
        """Lets time run; once it runs, this does nothing."""
        if self._origin is None:
            self._origin = self._monotonic()

    def now_ms(self) -> int:
        """The market's present instant."""
        passed = 0.0 if self._origin is None else self._monotonic() - self._origin
        return self._start_ms + int(passed * self._speed * 1000)

    async def wait_until(self, time_ms: int, at_most_seconds: float) -> None:
        """Sleeps on the wall; while the clock stands still, for a moment that a start may fall into."""
        if self._origin is None:
            await asyncio.sleep(min(_STANDING_SECONDS, at_most_seconds))
            return
        seconds = (time_ms - self.now_ms()) / 1000 / self._speed
        await asyncio.sleep(min(max(seconds, 0), at_most_seconds))


class SteppedClock:
    """Stands still until `advance_to`: for tests, and for a market in lock-step with what trades on it."""

    def __init__(self, start_ms: int) -> None:
        self._now_ms = start_ms
        self._moved = asyncio.Event()

    def now_ms(self) -> int:
        """The market's present instant."""
        return self._now_ms

    def start(self) -> None:
        """Nothing: only `advance_to` moves it."""

    def advance_to(self, time_ms: int) -> None:
        """Moves the market forward; call it from the exchange's own event loop."""
        if time_ms < self._now_ms:
            raise ValueError(f"time runs forward: it is {self._now_ms}, received {time_ms}")
        self._now_ms = time_ms
        self._moved.set()
        self._moved = asyncio.Event()

    async def wait_until(self, time_ms: int, at_most_seconds: float) -> None:
        """Waits for the next step, whatever its length; the wall does not count."""
        if self._now_ms < time_ms:
            await self._moved.wait()
