"""How much memory is in use, and how much there is: of torch's allocator on a GPU, of the process on a CPU."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

LOOK = 0.005  # seconds between two looks where no allocator keeps a peak
CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Peak:
    """bytes: the most that was in use within the `watch` that made it."""

    bytes: int = 0


@contextmanager
def watch(device: torch.device) -> Iterator[Peak]:
    """The peak of memory inside the block, in bytes, beginning with what is in use before it.

    What is free is first given back, so that an earlier peak does not hide this one.
    """
    give_back()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    reading, stop = _reading(device), threading.Event()
    peak.bytes = reading()

    def look() -> None:
        while not stop.wait(LOOK):
            peak.bytes = max(peak.bytes, reading())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(peak.bytes, reading())


def in_use(device: torch.device) -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _reading(device)()


def total(device: torch.device) -> int:
    """Bytes that this process may use in all: what it holds and what is free, within every limit set on it."""
    if device.type == "cuda":
        free, all_there = torch.cuda.mem_get_info(device)
        # Readable from torch 2.8 on.
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
        cap = int(all_there * fraction(device))
        return min(free + torch.cuda.memory_reserved(device), cap)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = [int(text) for path in CGROUP if (text := _line(path)).isdigit()]
    return min(psutil.virtual_memory().total, *limits, 1 << 62)


def give_back() -> None:
    """On Linux, return the freed memory to the system that the C library keeps for later."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _reading(device: torch.device) -> Callable[[], int]:
    if device.type == "mps":
        return torch.mps.driver_allocated_memory
    process = psutil.Process()
    return lambda: process.memory_info().rss


def _line(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).is_file() else ""
