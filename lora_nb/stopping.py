"""How a training is asked to stop: the first interrupt lets the step finish, a second one does not wait.

Signals reach a process's main thread only; what trains in another thread is asked before the process ends.
"""

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals(asked: Callable[[], bool], ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, a signal calls ask(number); an interrupt when asked() is true already raises KeyboardInterrupt.

    Afterwards the handlers are those of before. Only a process's main thread gets signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if asked() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ask(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def before_exit(save: Callable[[], None]) -> None:
    """Call save() when the interpreter ends, and, from the main thread, when SIGTERM comes, before what it did so far.

    A kernel restart ends the interpreter and waits about five seconds for that; SIGKILL asks nobody.
    """
    atexit.register(save)
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

        def handle(number: int, frame: FrameType | None) -> None:
            save()
            signal.signal(number, before)
            os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, handle)
