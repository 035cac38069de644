"""Signals while money runs: the first one ends the work, and none disturbs the way out or a request half-way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A closed terminal counts as Ctrl-C does.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def first_only() -> Iterator[None]:
    """Inside, the first signal raises KeyboardInterrupt and the later ones are ignored, as `ignore` does.

    The caller's own handlers still tell Ctrl-C from termination; what was ignored before stays ignored.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def interrupt(number: int, frame: FrameType | None) -> None:
        ignore()
        handler = before[signal.Signals(number)]
        handler = handler if callable(handler) else before[signal.SIGTERM]
        if callable(handler):
            handler(number, frame)
        raise KeyboardInterrupt

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        _restore(before)


def ignore() -> None:
    """From now on no signal ends this process but SIGKILL."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, signals wait: the first of them is delivered at the end."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda arrived, frame: came.append(arrived))
    try:
        yield
    finally:
        _restore(before)
        if came:
            signal.raise_signal(came[0])


def _restore(before: dict) -> None:
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
