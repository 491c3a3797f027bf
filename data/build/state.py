"""What the training scripts share: the learning rate, exact checkpoints, the log, the average.

A checkpoint is one safetensors file (weights, optimizer moments, average) and one JSON file
(counters). Batches are drawn by counter from (seed, step), so these two files are the whole state.
On a GPU a step is recorded once and replayed: its thousands of small kernels would else wait for Python.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
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
    _last: tuple[float, float] = field(default_factory=lambda: (time.time(), time.process_time()))

    def begin(self) -> None:
        """Start the clock here, after what had to be made ready."""
        self._last = (time.time(), time.process_time())

    @property
    def progress(self) -> float:
        if self.steps is not None:
            return self.step / self.steps
        return self.elapsed / self.seconds

    @property
    def done(self) -> bool:
        return self.progress >= 1.0

    def learning_rate(self) -> float:
        """Warm up over `warmup_steps`, then down a half cosine to nothing at the end."""
        warm = min(1.0, (self.step + 1) / self.warmup_steps)
        return self.peak * warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.progress)))

    def tick(self, samples: int) -> None:
        """Count one optimizer step."""
        now = (time.time(), time.process_time())
        self.step += 1
        self.samples += samples
        self.elapsed += now[0] - self._last[0]
        self.cpu_seconds += now[1] - self._last[1]
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

    @torch.no_grad()
    def give(self, parameters: dict[str, torch.Tensor]) -> None:
        """Put the averages in place of the parameters."""
        for name, p in parameters.items():
            p.copy_(self.shadow[name])


class swapped:
    """Use the averaged weights inside a `with` block."""

    def __init__(self, weights: dict[str, torch.Tensor], average: Average):
        self.weights, self.average = weights, average

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.weights.items():
            kept = p.detach().clone()
            p.copy_(self.average.shadow[name])
            self.average.shadow[name].copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


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
                # In place where there are some: a recorded step goes on using those.
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    value = stored[f"{key}/{name}"].to(p.device)
                    optimizer.state[p].setdefault(key, value).copy_(value)
        if average is not None:
            for name, value in average.shadow.items():
                value.copy_(stored[f"average/{name}"])
    for name in ("step", "samples", "elapsed", "cpu_seconds"):
        setattr(budget, name, counters[name])
    return True


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def adamw(
    parameters: Iterable[torch.Tensor], device: str, decay: float = 0.01
) -> torch.optim.AdamW:
    """AdamW whose learning rate is a tensor on the device, so that a recorded step can be given another one."""
    rate = torch.zeros((), device=device)
    cuda = device == "cuda"
    return torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True, capturable=cuda
    )


def recorded(step: Callable[[], None], device: str) -> Callable[[], None]:
    """The same step as one CUDA graph; the step itself on a CPU.

    It must read only from tensors that stay where they are, and not wait for the device. It runs three times
    before, so the learning rate should be 0 by then.
    """
    if device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # minutes on a GPU are dear: rather slow than not at all
        print(f"not recorded: {error}", flush=True)
        torch.cuda.synchronize()
        return step
    return graph.replay


def generator(seed: int, *counter: int, device: str = "cpu") -> torch.Generator:
    """Randomness by counter: the same (seed, counter) always gives the same stream on the same kind of device."""
    mixed = seed
    for number in counter:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator(device).manual_seed(mixed)


def uniform(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) on the generator's device."""
    return torch.rand(shape, generator=g, device=g.device)


def log(folder: Path, **record: float | int | str) -> None:
    """One JSON line in the log file and on the screen."""
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
    with open(folder / "log.jsonl", "a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)
