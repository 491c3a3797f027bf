"""Large shapes on a GPU: samples per second and memory of the eager loop and of ours, side by side in one process."""

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_nb import (
    adapters,
    channels_last,
    compiling,
    fusing,
    memory,
    offload,
    packing,
    projections,
    tokens,
)
from lora_nb.bench import ground
from lora_nb.bench.plain import Plain
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import Family, network
from lora_nb.families.base import freeze
from lora_nb.families.quantized import quantize
from lora_nb.families.shapes import SHAPES, load
from lora_nb.precision import DTYPES

WARM = 3
SECONDS, MOST = 2.0, 300  # of timed steps in a row, and how many at most
PICTURES = 4  # at least
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A shape at a batch size in a precision, no, fp16 or bf16."""

    shape: str
    batch: int
    precision: str


BASELINE = "plain"
# By the name of the command line: the name in the table, and the settings of our training; the baseline has none.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("eager, peft, autocast", {}),
    "ours": ("ours", {}),
    "compiled": ("ours, compiled", {"torch_compile": True}),
    "eager": ("ours, eager", {"cuda_graph": False}),
    "contiguous": ("ours, not channels_last", {"channels_last": False}),
    "unfused": ("ours, torch's norms and gates", {"fused_kernels": False}),
    "checkpointing": ("ours, checkpointing", {"gradient_checkpointing": True}),
    "offload": (
        "ours, checkpointing, offload",
        {"gradient_checkpointing": True, "offload": True},
    ),
    "int8": (
        "ours, checkpointing, offload, int8",
        {"gradient_checkpointing": True, "offload": True, "base_model_precision": "int8"},
    ),
    "nf4": (
        "ours, checkpointing, offload, nf4",
        {"gradient_checkpointing": True, "offload": True, "base_model_precision": "nf4"},
    ),
}


def cases(named: Sequence[str], precision: str) -> list[Case]:
    """The cases of words such as sdxl:4, or sdxl:4:no for float32, in their order.

    Without any: batch 1, 4 and 16 of every published shape in `precision`, and batch 1 in float32. Raises ConfigError
    for a word that is no case.
    """
    large = [name for name, shape in SHAPES.items() if shape.expected]
    if not named:
        half = [Case(shape, batch, precision) for shape in large for batch in (1, 4, 16)]
        return half + [Case(shape, 1, "no") for shape in large]
    found = []
    for word in named:
        shape, _, rest = word.partition(":")
        batch, _, own = rest.partition(":")
        if shape not in SHAPES or not batch.isdecimal() or (own or precision) not in DTYPES:
            raise ConfigError(
                f"There is no case {word!r}; write SHAPE:BATCH or SHAPE:BATCH:PRECISION with a shape of "
                f"{', '.join(SHAPES)}, such as {large[0]}:4."
            )
        found.append(Case(shape, int(batch), own or precision))
    return found


def variants(named: Sequence[str]) -> list[str]:
    """The keys of VARIANTS that are named, all without any; raises ConfigError for another word."""
    for word in named:
        if word not in VARIANTS:
            raise ConfigError(f"There is no loop {word!r}; choose from {', '.join(VARIANTS)}.")
    return list(named or VARIANTS)


def measure(
    folder: Path,
    cap: float | None,
    named: Sequence[str],
    loops: Sequence[str],
    keep: Callable[[dict[str, Any]], Any],
) -> None:
    """All rows on the CUDA device; `keep` is given what there is after each, so that a time limit loses one row.

    cap: GiB that the allocator may use, to stand for a smaller card. Raises ConfigError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--gpu measures on a CUDA GPU, and there is none here; leave it out.")
    device = torch.device("cuda", 0)
    there = torch.cuda.get_device_properties(device)
    half = "bf16" if there.major >= 8 else "fp16"
    wanted, loops = cases(named, half), variants(loops)
    peak = product_peak(device, DTYPES[half])
    if cap:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / there.total_memory))
    capped = f"The allocator was capped at {cap:g} GiB." if cap else ""
    part = {"rows": [], "gpu": there.name, "peak": peak, "cap": capped}
    for row in rows_of(wanted, loops, folder, device, peak):
        part["rows"].append(row)
        keep(part)


def rows_of(
    wanted: Sequence[Case],
    loops: Sequence[str],
    folder: Path,
    device: torch.device,
    peak: float,
    seconds: float = SECONDS,
) -> Iterator[dict[str, Any]]:
    """A row for each loop of each case, as soon as it is measured; ratios are to the eager loop. peak: TFLOP/s.

    Quantized base models come last, as each has to be made for itself.
    """
    models, eager = Models(folder, device), {}
    pairs = [(case, loop) for case in wanted for loop in loops]
    kinds = {loop: VARIANTS[loop][1].get("base_model_precision", "") for loop in loops}
    quantized = [(case, loop) for case, loop in pairs if kinds[loop]]
    quantized.sort(key=lambda pair: (pair[0].shape, pair[0].precision, kinds[pair[1]]))
    for case, loop in [pair for pair in pairs if not kinds[pair[1]]] + quantized:
        row = _row(case, loop, models, peak, seconds)
        if loop == BASELINE:
            eager[case] = row["rate"]
        elif eager.get(case):
            row["ratio"] = row["rate"] / eager[case]
        yield row


class Models:
    """The base model that was asked for last; another one is made in its place."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self.made: tuple[Any, Family] | None = None

    def of(self, case: Case, kind: str | None) -> Family:
        """The base model of a case, quantized to `kind` if not None, and without what was done to it before."""
        key = case.shape, case.precision, kind
        if self.made is None or self.made[0] != key:
            self.made = None
            memory.release()
            family = load(case.shape, self.folder, DTYPES[case.precision], self.device)
            if kind:
                quantize(network(family), kind, self.device)
            self.made = key, family
        family = self.made[1]
        adapters.remove(family)
        projections.ungroup(family)
        offload.undo(family)
        compiling.restore_blocks(family)
        network(family).disable_gradient_checkpointing()
        channels_last.undo(network(family))
        tokens.undo(network(family))
        fusing.undo(network(family))
        packing.unpack(network(family))
        network(family).requires_grad_(False).eval()
        freeze(family.vae, torch.float32, self.device)
        memory.release()
        return family


def _row(case: Case, loop: str, models: Models, peak: float, seconds: float) -> dict[str, Any]:
    shape, (title, changes) = SHAPES[case.shape], VARIANTS[loop]
    row = {"shape": shape.title, "batch": case.batch, "precision": case.precision}
    row |= {"variant": title, "rate": 0.0, "memory": 0, "reserved": 0, "of_peak": 0.0, "note": ""}
    try:
        family = models.of(case, changes.get("base_model_precision"))
        made = _eager(case, family) if loop == BASELINE else _ours(case, family, models, changes)
        with made as (step, note):
            row |= _timed(step, case.batch, seconds) | {"note": note()}
    except Exception as error:  # a row that fails must not cost the others
        traceback.clear_frames(error.__traceback__)  # frames hold the tensors of the attempt
        words = (str(error).strip().splitlines() or [""])[0]
        short = isinstance(error, memory.TooLittleMemory | torch.OutOfMemoryError)
        row["note"] = "out of memory" if short else f"{type(error).__name__}: {words}"
    row["of_peak"] = row["rate"] * shape.tflop / peak
    return row


def _timed(step: Callable[[], Any], batch: int, seconds: float) -> dict[str, Any]:
    """Samples per second over about so many seconds of steps, and the peaks of memory from the first one on.

    The first steps capture the graph: its activations count as allocated only then.
    """
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        step()
    wait()
    began = time.perf_counter()
    step()
    wait()
    count = min(MOST, max(2, math.ceil(seconds / (time.perf_counter() - began))))
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return {
        "rate": count * batch / (time.perf_counter() - began),
        "steps": count,
        "memory": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
    }


Steps = tuple[Callable[[], Any], Callable[[], str]]  # a step, and what is to be said after all


@contextlib.contextmanager
def _eager(case: Case, family: Family) -> Iterator[Steps]:
    """A step of the plain loop, VAE and text encoders in each."""
    side = SHAPES[case.shape].resolution
    plain, pixels = Plain(family, case.precision, 1e-4), torch.zeros(case.batch, 3, side, side)
    yield lambda: plain.step(pixels, ["a round thing"] * case.batch), lambda: ""


@contextlib.contextmanager
def _ours(case: Case, family: Family, models: Models, changes: dict[str, Any]) -> Iterator[Steps]:
    """A step of a training of ours with all pictures encoded; it lasts until the block ends."""
    from lora_nb.trainer import train

    folder, side = models.folder, SHAPES[case.shape].resolution
    pictures = max(PICTURES, case.batch)
    ground.lay_pictures(folder, pictures, side)
    spec = DataSpec(str(folder / f"pictures-{pictures}-{side}"), resolution=side, center_crop=True)
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder),
        lora={adapters.MAIN: LoraSpec(rank=8)},
        data=spec,
        output_dir=str(folder / "runs" / "gpu"),
        overwrite=True,
        seed=0,
        train_batch_size=case.batch,
        max_train_steps=10**6,
        mixed_precision=case.precision,
        lr_scheduler="constant",
    ).replace(**changes)
    training = train(config, family)
    with training.encoding():
        list(training.cache.encode(range(pictures)))  # an epoch
    memory.release()
    steps = iter(training)

    def note() -> str:
        pieces, graphed = training.gradients.micro_batch, training.graphed
        few = f"{pieces} pictures at a time" if pieces < case.batch else ""
        failed = (
            f"no graph: {graphed.reason}" if graphed is not None and not graphed.captured else ""
        )
        return "; ".join(filter(None, (few, failed)))

    try:
        yield lambda: next(steps), note
    finally:
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
