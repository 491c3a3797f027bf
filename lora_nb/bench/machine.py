"""The machine and its state: what it is, how fast it multiplies, how busy it is."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets")
SIDE, TIMES = 1024, 20  # of the matrices, and how often they are multiplied


def describe() -> dict[str, str]:
    """Processor, memory, versions, date and commit, as text by name."""
    import psutil

    there = {each.name for each in importlib.metadata.distributions()}
    versions = [f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES if n in there]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_processor()}, {os.cpu_count()} logical cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GB, {platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "versions": ", ".join(versions),
        "commit": _commit(),
    }


def state(environment: dict[str, str]) -> dict[str, str]:
    """Load average, threads, wait policy and malloc settings that jobs run under."""
    malloc = {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "LD_PRELOAD"))}
    waiting = f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    return {
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "threads": environment["OMP_NUM_THREADS"],
        "wait policy": f"{waiting}, GOMP_SPINCOUNT={environment['GOMP_SPINCOUNT']}",
        "malloc": ", ".join(f"{k}={v}" for k, v in malloc.items()) or "the C library's defaults",
    }


def peak(precision: str) -> float:
    """GFLOP/s of matrix products of 1024 by 1024 with the threads of this process, the best of 20.

    precision: bf16, or no for float32, in which a processor that knows no bf16 computes too.
    """
    import torch

    from lora_nb.families import products
    from lora_nb.families.widened import computed_in
    from lora_nb.precision import DTYPES

    dtype = computed_in(torch.empty(0, dtype=DTYPES[precision]))
    a, b = torch.randn(2, SIDE, SIDE, dtype=dtype).unbind()
    best = float("inf")
    for _ in range(TIMES):
        began = time.perf_counter()
        products.multiply(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best / 1e9


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not a checkout"
