"""Running out of memory: free what the failed attempt held, and do the same work in smaller pieces."""

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from lora_nb.errors import ConfigError

T = TypeVar("T")


class TooLittleMemory(ConfigError):
    """Not even a single picture fits with these settings."""


# How the backends that raise a plain RuntimeError say it (Apple's, and the CPU's allocator).
WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in WORDS)


def halving(attempt: Callable[[int], T], size: int) -> tuple[T, int]:
    """attempt(size), with half the size each time that memory runs out: (its result, the size that fitted).

    Before each new attempt everything that the failed one held is freed. Raises TooLittleMemory if 1 is too much.
    """
    while True:
        try:
            return attempt(size), size
        except RuntimeError as error:
            if not ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)  # frames hold the tensors of the attempt
            if size == 1:
                raise TooLittleMemory(
                    f"A single picture does not fit into memory ({error}): lower resolution or rank, or set "
                    "gradient_checkpointing or mixed_precision='bf16'."
                ) from error
        size = (size + 1) // 2
        release()


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
