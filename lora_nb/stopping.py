"""How a training is asked to stop: the first interrupt lets the step finish, a second one does not wait."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
