"""Named places at which a test ends the process, as kill -9 or a power cut would: nowhere else may work be half done.

A module names its places once, on import; passing one costs a comparison. Only a script arms one.
"""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count

_passes: dict[str, Iterator[int]] = {}  # counts how often each place is passed while it is armed, in any thread
_armed: tuple[str, int] | None = None


def kill_point(name: str) -> Callable[[], None]:
    """Registers a place; call what is returned there."""
    passes = _passes[name] = count(1)

    def passed() -> None:
        if _armed is not None and _armed[0] == name and next(passes) == _armed[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    return passed


def kill_points() -> tuple[str, ...]:
    """The names of all places in the modules that are loaded."""
    return tuple(sorted(_passes))


def arm(name: str, passing: int) -> None:
    """From now on the process dies when it passes that place for the `passing`-th time (from 1)."""
    global _armed
    _armed = (name, passing)
