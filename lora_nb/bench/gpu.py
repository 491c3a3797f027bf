"""Large shapes on a GPU: samples per second and memory of the eager loop and of ours, side by side in one process."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_nb import adapters, memory
from lora_nb.bench import ground
from lora_nb.bench.plain import Plain
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import Family, network
from lora_nb.families.quantized import quantize
from lora_nb.families.shapes import SHAPES, load
from lora_nb.precision import DTYPES

WARM = 3
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A shape at a batch size in a precision, no, fp16 or bf16."""

    shape: str
    batch: int
    precision: str


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, checkpointing": {"gradient_checkpointing": True},
    "ours, checkpointing, int8": {"gradient_checkpointing": True, "base_model_precision": "int8"},
    "ours, checkpointing, nf4": {"gradient_checkpointing": True, "base_model_precision": "nf4"},
}


def cases(precision: str) -> list[Case]:
    """Batch 1, 4 and 16 of every published shape in 16 bits, batch 1 in float32."""
    large = [name for name, shape in SHAPES.items() if shape.expected]
    half = [Case(shape, batch, precision) for shape in large for batch in (1, 4, 16)]
    return half + [Case(shape, 1, "no") for shape in large]


def measure(folder: Path, cap: float | None) -> dict[str, Any]:
    """All cases on the CUDA device; cap: GiB that the allocator may use, to stand for a smaller card.

    Raises ConfigError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--gpu measures on a CUDA GPU, and there is none here; leave it out.")
    device = torch.device("cuda")
    there = torch.cuda.get_device_properties(device)
    if cap:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / there.total_memory))
    half = "bf16" if there.major >= 8 else "fp16"
    peak = product_peak(device, DTYPES[half])
    rows = [row for case in cases(half) for row in rows_of(case, folder, device, peak)]
    capped = f"The allocator was capped at {cap:g} GiB." if cap else ""
    return {"rows": rows, "gpu": there.name, "peak": peak, "cap": capped}


def rows_of(
    case: Case, folder: Path, device: torch.device, peak: float, steps: int = 20
) -> list[dict[str, Any]]:
    """The eager loop and our variants of one case; ratios are to the eager loop. peak: TFLOP/s."""
    found = [_row(case, "eager, peft, autocast", _eager(case, folder, device), peak, steps)]
    for variant, changes in VARIANTS.items():
        with _ours(case, folder, device, changes) as step:
            found.append(_row(case, variant, step, peak, steps))
    eager = found[0]["rate"]
    for row in found[1:]:
        row["ratio"] = row["rate"] / eager if eager else None
    return found


def _row(
    case: Case, variant: str, step: Callable[[], Any], peak: float, steps: int
) -> dict[str, Any]:
    shape, cuda = SHAPES[case.shape], torch.cuda.is_available()
    row = {"shape": shape.title, "batch": case.batch, "precision": case.precision}
    row |= {"variant": variant, "rate": 0.0, "memory": 0, "of_peak": 0.0}
    try:
        for _ in range(min(WARM, steps)):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
        row["rate"] = steps * case.batch / (time.perf_counter() - began)
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        return row
    row["memory"] = torch.cuda.max_memory_allocated() if cuda else 0
    row["of_peak"] = row["rate"] * shape.tflop / peak
    return row


def _eager(case: Case, folder: Path, device: torch.device) -> Callable[[], Any]:
    """A step of the plain loop, VAE and text encoders in each."""
    _release()
    made: list[Plain] = []
    side = SHAPES[case.shape].resolution

    def step() -> None:
        if not made:
            family = load(case.shape, folder, DTYPES[case.precision], device)
            made.append(Plain(family, case.precision, 1e-4))
        pixels = torch.zeros(case.batch, 3, side, side)
        made[0].step(pixels, ["a round thing"] * case.batch)

    return step


@contextlib.contextmanager
def _ours(
    case: Case, folder: Path, device: torch.device, changes: dict[str, Any]
) -> Iterator[Callable[[], Any]]:
    """A step of a training of ours; it lasts until the block ends."""
    from lora_nb.trainer import train

    _release()
    side = SHAPES[case.shape].resolution
    ground.lay_pictures(folder, 16, side)
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder),
        lora={adapters.MAIN: LoraSpec(rank=8)},
        data=DataSpec(str(folder / f"pictures-16-{side}"), resolution=side, center_crop=True),
        output_dir=str(folder / "runs" / "gpu"),
        overwrite=True,
        seed=0,
        train_batch_size=case.batch,
        max_train_steps=10**6,
        mixed_precision=case.precision,
        lr_scheduler="constant",
    ).replace(**changes)
    made: list[Iterator[Any]] = []

    def step() -> None:
        if not made:
            family: Family = load(case.shape, folder, DTYPES[case.precision], device)
            if kind := config.base_model_precision:
                quantize(network(family), kind, device)
            made.append(iter(train(config, family)))
        next(made[0])

    try:
        yield step
    finally:
        for steps in made:
            steps.close()


def product_peak(device: torch.device, dtype: torch.dtype, side: int = 8192) -> float:
    """TFLOP/s of a square matrix product on the device, the best of 10."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def _release() -> None:
    gc.collect()
    memory.release()
