"""The ladder: settings that cost less and less memory, the cheapest first; each rung keeps the changes above it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from lora_nb.config import TrainConfig
from lora_nb.families import network
from lora_nb.families.quantized import KINDS, kind_of, linears, size_of
from lora_nb.forecast.result import Rung, fits
from lora_nb.forecast.trial import Measured, Micro

CHECKPOINTING = "gradient checkpointing"
RECOMPUTED = "the same result, activations are computed twice"
SMALLER = 0.75  # the side of the pictures on the last rung, as a share of the asked one


@dataclass(frozen=True)
class Line:
    """Seconds and peak bytes of a micro-step, a straight line in its size through one picture and `many`."""

    one: Micro
    many: Micro
    base: int  # bytes in use before any step

    def __call__(self, size: int) -> Micro:
        """A micro-step of `size` pictures; exact where it was measured."""
        span = self.many.size - self.one.size
        if span:
            memory = (self.many.memory - self.one.memory) / span
            seconds = (self.many.seconds - self.one.seconds) / span
        else:
            memory, seconds = self.one.memory - self.base, self.one.seconds
        more = size - self.one.size
        return Micro(size, self.one.seconds + more * seconds, int(self.one.memory + more * memory))


@dataclass
class _Climb:
    """The settings so far and what they cost; `add` notes a rung."""

    config: TrainConfig
    line: Line
    elsewhere: int  # the peak outside of the steps: loading, encoding, sample pictures
    total: int
    size: int
    sooner: float = 0.0  # seconds that are saved in each step
    later: float = 0.0  # seconds that are lost in each micro-step, whatever its size
    less: int = 0  # bytes that are saved at all times
    less_in_steps: int = 0  # bytes that are saved in the steps
    area: float = 1.0  # of the pictures, as a share of the asked one
    changes: dict[str, Any] = field(default_factory=dict)
    rungs: list[Rung] = field(default_factory=list)

    @property
    def memory(self) -> int:
        step = self.line(self.size).memory
        step = int(self.line.base + (step - self.line.base) * self.area)
        return max(step - self.less_in_steps, self.elsewhere) - self.less

    @property
    def seconds(self) -> float:
        micro_steps = (
            self.config.gradient_accumulation_steps * self.config.train_batch_size / self.size
        )
        return micro_steps * (self.line(self.size).seconds * self.area + self.later) - self.sooner

    def add(self, name: str, says: str, measured: bool = False, **changes: Any) -> None:
        self.changes |= changes
        fit = fits(self.memory, self.total)
        rung = Rung(name, dict(self.changes), says, self.memory, self.seconds, fit, measured)
        self.rungs.append(rung)


def ladder(
    config: TrainConfig,
    measured: Measured,
    base: int,
    elsewhere: int,
    total: int,
    family: Any,
    can_wait: int = 0,
) -> list[Rung]:
    """The rungs for this config from top to bottom, without those that it has already or that are not for its device.

    base: bytes in use once the model is loaded. elsewhere: the peak of everything but the steps. total: what there is.
    can_wait: bytes of what need not be on the GPU in a step.
    """
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    line = Line(measured.alone, measured.whole, base)
    climb = _Climb(config, line, elsewhere, total, batch)
    on_gpu = family.device.type == "cuda"
    frozen = [p for p in network(family).parameters() if not p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in frozen)
    trained = sum(
        p.numel() for m in family.trainable.values() for p in m.parameters() if p.requires_grad
    )

    climb.add("as configured", "nothing changes", measured=measured.whole.size == batch)
    if not config.cache_latents:
        climb.sooner = accumulation * batch * measured.picture
        climb.add(
            "cached latents", "the same result, each picture encoded once", cache_latents=True
        )
    if on_gpu and can_wait:
        climb.less += can_wait
        climb.add(
            "encoders elsewhere",
            "the same result, everything is encoded before the first step",
            offload=True,
        )
    if on_gpu and family.dtype == torch.float32:
        climb.less += weights // 2
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        climb.add("16-bit base", "the frozen weights are rounded", mixed_precision=half)
    if batch > 1:
        climb.size = _largest(climb)
        climb.add(
            "smaller micro-batches",
            f"the same result, {climb.size} at a time",
            climb.size in (1, measured.whole.size) and not climb.less,
            train_batch_size=climb.size,
            gradient_accumulation_steps=accumulation * (batch // climb.size),
        )
    if measured.checkpointed:
        climb.line = Line(*measured.checkpointed, base)
        sure = climb.size in {m.size for m in measured.checkpointed} and not climb.less
        climb.add(
            CHECKPOINTING,
            RECOMPUTED,
            sure,
            gradient_checkpointing=True,
        )
    if on_gpu and not config.use_8bit_adam:
        climb.less += trained * 6  # two moments of 1 byte in place of two of 4
        climb.add("8-bit AdamW", "the optimizer's moments are rounded", use_8bit_adam=True)
    _quantized(climb, measured, family)
    side = int(config.data.resolution * SMALLER) // family.pixel_multiple * family.pixel_multiple
    if side >= family.pixel_multiple:
        climb.area = (side / config.data.resolution) ** 2
        climb.add("smaller pictures", f"another result: {side} pixels", resolution=side)
    return climb.rungs


def _quantized(climb: _Climb, measured: Measured, family: Any) -> None:
    """Rungs of a base in 8 and 4 bits, as far as it is not and as they save more than widening a layer takes."""
    layers = list(linears(network(family)).values())
    there, width = kind_of(network(family)), 2 if "mixed_precision" in climb.changes else None
    now = sum(size_of(layer, there, width) for layer in layers)
    # One layer at a time is wide, and takes as much again while it is made.
    room = 2 * max(size_of(layer, None, width) for layer in layers)
    # Forward and backward; checkpointing goes forward twice.
    checkpointing = climb.config.replace(**climb.changes).gradient_checkpointing
    times = 3 if checkpointing else 2
    before = climb.less
    for kind in KINDS[KINDS.index(there) + 1 if there else 0 :]:
        saved = now - sum(size_of(layer, kind, width) for layer in layers) - (0 if there else room)
        if saved <= 0:
            continue
        if family.device.type == "cuda":  # elsewhere the base is loaded in full first
            climb.less = before + saved
        else:
            climb.less_in_steps = saved
        climb.later = times * measured.widening[kind]
        says = f"another result: frozen linear layers are rounded to {kind}"
        plain = {"torch_compile": False} if climb.config.torch_compile else {}
        climb.add(f"{kind} base", says, base_model_precision=kind, **plain)


def _largest(climb: _Climb) -> int:
    """The largest part of the batch, by halves, whose step fits; 1 if none does, the half if all do."""
    batch = climb.config.train_batch_size
    parts = [size for size in range(batch // 2, 0, -1) if batch % size == 0]
    for size in parts:
        climb.size = size
        if fits(climb.memory, climb.total):
            return size
    return 1
