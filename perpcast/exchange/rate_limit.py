"""The pace: a token bucket that all requests of a process share, and the pauses after what failed."""

import asyncio

FIRST_PAUSE_SECONDS = 0.25  # doubling from failure to failure
LONGEST_PAUSE_SECONDS = 30.0  # 10 to 20 lines in five minutes, of the 500 that the exchange allows


class RateLimit:
    """At most `requests` in any `seconds`, handed out evenly after a first burst of a tenth of them.

    A bucket of b tokens refilled at rate r lets through b + r x seconds requests, so both together stay below the cap.
    Bybit allows 600 in 5 s over all its hosts and bans an IP for ten minutes beyond; the default leaves head-room for
    a trader on the same line.
    """

    def __init__(self, requests: int = 500, seconds: float = 5.0) -> None:
        self._size = max(1.0, requests / 10)
        self._per_second = max(requests - self._size, 1.0) / seconds
        self._tokens = self._size
        self._filled_at: float | None = None

    async def take(self) -> None:
        """Waits for the next free place; places are given in the order in which they were asked for."""
        now = asyncio.get_running_loop().time()
        if self._filled_at is not None:
            self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        self._tokens -= 1
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._per_second)


def pause_seconds(failures: int) -> float:
    """How long to wait at most after so many failures in a row; callers wait between half and all of it, drawn."""
    return min(FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 16), LONGEST_PAUSE_SECONDS)
