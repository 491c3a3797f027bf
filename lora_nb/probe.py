"""The probe: the loss on held-out pictures at fixed noise and timesteps, as a paired difference to the base model.

The training loss jumps with the timestep that was drawn. Here the draws are the same each time, so what differs between
two measurements is the adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_nb import adapters, data, memory
from lora_nb.cache import Cache
from lora_nb.disk_cache import DiskCache
from lora_nb.errors import ConfigError
from lora_nb.families import Family
from lora_nb.loss import diffusion_loss
from lora_nb.offload import Offload

Draw = tuple[int, float, float]  # timestep, loss with the adapter, loss of the base

SEED = 20_210_617  # the same for all runs, so that runs can be compared
DRAWS = 2  # noise draws per picture; their mean counts once


@dataclass(frozen=True)
class ProbeResult:
    """Mean loss with adapter and of the base; difference = loss - base, negative is better.

    standard_error: of the mean paired difference over n pictures. by_timestep: (t, loss, base) of every draw.
    """

    step: int
    loss: float
    base: float
    difference: float
    standard_error: float
    n: int
    by_timestep: list[Draw]


class Probe:
    """Held-out pictures with their fixed draws; the base model's losses are measured once."""

    def __init__(
        self,
        family: Family,
        pictures: data.Pictures,
        size: int,
        batch_size: int,
        captions: bool,
        disk: DiskCache | None = None,
        offload: Offload | None = None,
    ):
        self.family, self.batch_size = family, batch_size
        self.n = min(size, len(pictures))
        self.cache = Cache(family, pictures, pictures.spec, SEED, captions=captions, disk=disk)
        if offload is not None:
            with offload.encoding():
                for row in range(self.n):
                    self.cache.rows([row], [row])
        with adapters.disabled(family):
            self.base, self.timesteps = self._losses()

    def _losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and timestep of each draw, (DRAWS, n) each; in smaller batches once memory runs out."""
        measured, self.batch_size = memory.halving(self._measured, self.batch_size)
        return measured

    @torch.no_grad()
    def _measured(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        losses, timesteps = [], []
        for start in range(0, self.n * DRAWS, batch_size):
            positions = list(range(start, min(start + batch_size, self.n * DRAWS)))
            batch = self.cache.rows([p % self.n for p in positions], positions)
            result = diffusion_loss(self.family, batch)
            losses.append(result.per_image.cpu())
            timesteps.append(result.timesteps.cpu())
        return torch.cat(losses).view(DRAWS, self.n), torch.cat(timesteps).view(DRAWS, self.n)

    def untrained(self) -> ProbeResult:
        """The probe before the first step: B is zero there, so the losses are the base model's."""
        return self._result(0, self.base)

    def measure(self, step: int) -> ProbeResult:
        """The probe with the adapters as they are now."""
        return self._result(step, self._losses()[0])

    def _result(self, step: int, losses: torch.Tensor) -> ProbeResult:
        paired = (losses - self.base).mean(0)  # (n,)
        error = (paired.std() / self.n**0.5).item() if self.n > 1 else float("inf")
        rows = zip(
            self.timesteps.flatten().tolist(),
            losses.flatten().tolist(),
            self.base.flatten().tolist(),
            strict=True,
        )
        return ProbeResult(
            step,
            losses.mean().item(),
            self.base.mean().item(),
            paired.mean().item(),
            error,
            self.n,
            sorted(rows),
        )


@dataclass(frozen=True)
class Paired:
    """Mean of b - a over n pairs of losses at equal noise, and its standard error; below zero b is better."""

    mean: float
    standard_error: float
    n: int


def paired(a: Sequence[Draw], b: Sequence[Draw]) -> Paired:
    """The paired difference of two probes of the same pictures and base, from their `by_timestep`, draw by draw.

    Raises ConfigError if they are not of the same draws.
    """
    # A draw is known by its timestep and the base's loss; the adapter's own loss must not order them.
    rows = [sorted(draws, key=lambda draw: (draw[0], draw[2])) for draws in (a, b)]
    same = [
        x[0] == y[0] and math.isclose(x[2], y[2], rel_tol=1e-3) for x, y in zip(*rows, strict=False)
    ]
    if not all(same) or len(a) != len(b):
        raise ConfigError(
            "These two probes are not of the same pictures and base model, so no loss of one belongs to one of the "
            "other; compare runs with equal data, probe_size, resolution and base."
        )
    return difference([y[1] - x[1] for x, y in zip(*rows, strict=True)])


def difference(values: Sequence[float]) -> Paired:
    """Mean and standard error of paired differences."""
    pairs = torch.tensor(values, dtype=torch.float64)
    error = (pairs.std() / len(pairs) ** 0.5).item() if len(pairs) > 1 else float("inf")
    return Paired(pairs.mean().item(), error, len(pairs))
