"""Bybit's limit for one IP: 600 HTTP requests in any 5 seconds; one more, and all are turned away for ten minutes."""

from collections import deque
from collections.abc import Callable

REQUESTS = 600
WINDOW_SECONDS = 5.0
BAN_SECONDS = 600.0


class IpLimit:
    """Counts the requests of one IP (all of loopback is one); `seconds` is any clock that only runs forward."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._admitted: deque[float] = deque(maxlen=REQUESTS)
        self._banned_until = float("-inf")

    def admits(self) -> bool:
        """Whether a request may pass now. Asking on during a ban does not make it longer."""
        now = self._seconds()
        if now < self._banned_until:
            return False
        if len(self._admitted) == REQUESTS and now - self._admitted[0] < WINDOW_SECONDS:
            self._banned_until = now + BAN_SECONDS
            return False
        self._admitted.append(now)
        return True
