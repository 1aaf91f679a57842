"""Ctrl-C at moments where the training can stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Defer KeyboardInterrupt; yield the function that raises it, for where stopping is safe.

    Elsewhere it could leave a lock of the event writer taken, or come out of `torch.save` as
    another error. A second Ctrl-C is raised at once. Does nothing outside the main thread, or where
    the interrupt is ignored.
    """
    asked = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def raise_if_asked() -> None:
        if asked:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield raise_if_asked
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_asked
    finally:
        signal.signal(signal.SIGINT, previous)
