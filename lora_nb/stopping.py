"""How a training is asked to stop: by a person, by a signal, or by the end of the platform's session.

The first interrupt lets the step finish, a second one does not wait. Signals reach a process's main thread only; what
trains in another thread is asked before the process ends.
"""

import atexit
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lora_nb import env
from lora_nb.run_folder import History

# Seconds before the platform ends the session, at which a training saves and stops.
BEFORE_THE_END = 600.0


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


def leave_by() -> float:
    """When a training that begins now should save and stop, as time.time() counts; infinity without a limit."""
    end = (env.session_end() or math.inf) - BEFORE_THE_END
    return end if time.time() < end else math.inf  # it was asked for after that point


def say_session_ends(done: int, history: History) -> None:
    """Warn that training stops after step `done`, and put it into the run's history."""
    text = (
        f"This session ends in about {BEFORE_THE_END / 60:.0f} minutes, so training stops after step {done} with a "
        "checkpoint; run the same again in a new session and it goes on."
    )
    history.record("session", step=done, message=text)
    warnings.warn(text, stacklevel=3)
