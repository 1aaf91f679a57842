"""Ctrl-C at a moment of the training's choice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back; give the function that lets it through, for where stopping is safe.

    Wherever else a KeyboardInterrupt struck, it could leave a lock of the event writer taken, or
    come out of `torch.save` as another error. A second Ctrl-C strikes at once all the same.
    Does nothing outside the main thread, or where the interrupt is ignored.
    """
    asked = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def let_through() -> None:
        if asked:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield let_through
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, previous)
