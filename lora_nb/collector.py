"""Python's collector of cycles, which stands aside where much is made and all of it is kept."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """It finds nothing there and takes a third of the time: of importing the libraries, and of scanning many rows."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
