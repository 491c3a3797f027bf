"""What each switch gives: two trainings that differ in one setting take turns, a few steps each, in one process."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lora_nb.config import TrainConfig

WARM = 3  # steps before anything is timed


@dataclass(frozen=True)
class Switch:
    """A setting that costs no or little accuracy; `off` and `on` are fields of TrainConfig that differ.

    alike: the largest difference of losses that is allowed, None where another number of bits is the point.
    """

    title: str
    off: dict[str, Any]
    on: dict[str, Any]
    alike: float | None = 1e-6
    also: dict[str, Any] = field(default_factory=dict)  # of both sides


SWITCHES = {
    "cache": Switch("latents and text states cached", {"cache_latents": False}, {}),
    "fused": Switch("q, k, v and their adapters in one product", {"fused_lora": False}, {}),
    "bf16": Switch("frozen weights in bf16 (fused)", {}, {"mixed_precision": "bf16"}, 2e-3),
    "bf16 fused": Switch(
        "fused projections, attention in float32, in bf16",
        {"fused_lora": False},
        {},
        2e-3,
        {"mixed_precision": "bf16"},
    ),
    "bf16 packed": Switch(
        "weights of convolutions packed (channels_last), in bf16",
        {"channels_last": False},
        {},
        2e-3,
        {"mixed_precision": "bf16"},
    ),
    "compile": Switch("repeated blocks compiled", {}, {"torch_compile": True}, 1e-5),
    "bf16 compile": Switch(
        "repeated blocks compiled, in bf16",
        {},
        {"torch_compile": True},
        2e-3,
        {"mixed_precision": "bf16"},
    ),
    "checkpointing": Switch(
        "gradient checkpointing (for memory)", {}, {"gradient_checkpointing": True}
    ),
    "int8": Switch("a base in int8 (for memory)", {}, {"base_model_precision": "int8"}, None),
    "nf4": Switch("a base in nf4 (for memory)", {}, {"base_model_precision": "nf4"}, None),
}


def measure(config: TrainConfig, rounds: int, steps: int, names: list[str]) -> list[dict[str, Any]]:
    """One row for each switch: CPU seconds of a step off and on, the ratio by round, the largest loss difference."""
    return [_row(name, SWITCHES[name], config, rounds, steps) for name in names]


def _row(name: str, switch: Switch, config: TrainConfig, rounds: int, steps: int) -> dict[str, Any]:
    sides = [
        _Side(config, f"{name}-{label}", switch.also | changes, WARM + rounds * steps)
        for label, changes in (("off", switch.off), ("on", switch.on))
    ]
    for side in sides:
        for _ in range(WARM):
            side.step()
    times = [_round(sides, steps) for _ in range(rounds)]
    losses = zip(*(side.losses for side in sides), strict=True)
    return {
        "name": name,
        "title": switch.title,
        "off": median(off for off, _ in times),
        "on": median(on for _, on in times),
        "ratios": [off / on for off, on in times],
        "difference": max(abs(a - b) for a, b in losses),
        "allowed": switch.alike,
    }


def _round(sides: list["_Side"], steps: int) -> list[float]:
    """Median CPU seconds of a step of each side; they take turns step by step, as neighbours come and go."""
    times = [[side.step() for side in sides] for _ in range(steps)]
    return [median(column) for column in zip(*times, strict=True)]


class _Side:
    """One of two trainings; every picture is encoded before it starts, where it caches."""

    def __init__(self, config: TrainConfig, name: str, changes: dict[str, Any], last: int):
        from lora_nb.trainer import train

        output = str(Path(config.output_dir) / name)
        changes = {"output_dir": output, "overwrite": True, "max_train_steps": last} | changes
        training = train(config.replace(**changes))
        if training.config.cache_latents:
            for position in range(len(training.pictures)):
                training.cache.batch([position])
        self.steps: Iterator[Any] = iter(training)
        self.losses: list[float] = []

    def step(self) -> float:
        """CPU seconds of the next step."""
        began = time.process_time()
        self.losses.append(next(self.steps).loss)
        return time.process_time() - began
