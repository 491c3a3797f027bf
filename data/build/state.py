"""What both pretraining scripts share: the learning rate, exact checkpoints, the log, the average.

A checkpoint is one safetensors file (weights, optimizer moments, average) and one JSON file
(counters). Batches are drawn by counter from (seed, step), so these two files are the whole state.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass
class Budget:
    """How far training has come: by steps when `steps` is given, else by seconds of training."""

    peak: float
    steps: int | None = None
    seconds: float | None = None
    warmup_steps: int = 200
    step: int = 0
    elapsed: float = 0.0
    samples: int = 0
    cpu_seconds: float = 0.0
    agreed: float | None = None  # several processes follow one clock, or they would stop apart
    _last: tuple[float, float] = field(default_factory=lambda: (time.time(), time.process_time()))

    @property
    def progress(self) -> float:
        if self.steps is not None:
            return self.step / self.steps
        return (self.elapsed if self.agreed is None else self.agreed) / self.seconds

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def learning_rate(self) -> float:
        """Warm up over `warmup_steps`, then down a half cosine to nothing at the end."""
        warm = min(1.0, (self.step + 1) / self.warmup_steps)
        return self.peak * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.progress)))

    def tick(self, samples: int, processes: int = 1) -> None:
        """Count one optimizer step; the processes are taken to work alike."""
        now = (time.time(), time.process_time())
        self.step += 1
        self.samples += samples
        self.elapsed += now[0] - self._last[0]
        self.cpu_seconds += (now[1] - self._last[1]) * processes
        self._last = now

    def counters(self) -> dict:
        names = ("step", "samples", "elapsed", "cpu_seconds", "peak", "steps", "seconds")
        return {name: getattr(self, name) for name in names}


class Average:
    """Exponential moving average of parameters, with a warm-up so that early noise is forgotten."""

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float = 0.999):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow = [self.shadow[name] for name in parameters]
        torch._foreach_lerp_(shadow, [p.detach() for p in parameters.values()], 1.0 - decay)


def named_parameters(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters of several modules under `module.parameter` names."""
    return {
        f"{prefix}.{name}": p
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
    }


def save_checkpoint(
    folder: Path,
    parameters: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    budget: Budget,
    average: Average | None = None,
    extra: dict | None = None,
) -> None:
    """Write the whole state under a temporary name, then move it into place."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    if average is not None:
        tensors |= {f"average/{n}": v.cpu().contiguous() for n, v in average.shadow.items()}
    temporary = folder / "state.tmp"
    counters = json.dumps(budget.counters() | (extra or {}))
    # The counters travel inside the same file: one rename makes weights and counters appear.
    save_file(tensors, temporary, metadata={"counters": counters})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / "state.safetensors")
    (folder / "counters.json").write_text(counters)


def load_checkpoint(
    folder: Path,
    parameters: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    budget: Budget,
    average: Average | None = None,
) -> bool:
    """Restore what `save_checkpoint` wrote; False when there is nothing to restore."""
    path = folder / "state.safetensors"
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in list(file.keys())}
        counters = json.loads(file.metadata()["counters"])
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(stored[f"weight/{name}"])
            if f"exp_avg/{name}" in stored:
                optimizer.state[p] = {
                    key: stored[f"{key}/{name}"].to(p.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        if average is not None:
            for name, value in average.shadow.items():
                value.copy_(stored[f"average/{name}"])
    for name in ("step", "samples", "elapsed", "cpu_seconds"):
        setattr(budget, name, counters[name])
    return True


def generator(seed: int, *counter: int) -> torch.Generator:
    """Randomness by counter: the same (seed, counter) always gives the same stream."""
    mixed = seed
    for number in counter:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def log(folder: Path, **record: float | int | str) -> None:
    """One JSON line in the log file and on the screen."""
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
    with open(folder / "log.jsonl", "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)
