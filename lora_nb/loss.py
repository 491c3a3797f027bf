"""The loss of one batch, the same for every family."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_nb import rng
from lora_nb.families import Batch, Family


@dataclass(frozen=True)
class Loss:
    """loss: the scalar that is trained on. per_image: (B,) unweighted errors. timesteps: (B,)."""

    loss: torch.Tensor
    per_image: torch.Tensor
    timesteps: torch.Tensor


def diffusion_loss(family: Family, batch: Batch, noise_offset: float = 0.0) -> Loss:
    """Mean squared error between prediction and target at one random noise level per picture.

    Ho et al. 2020, algorithm 1; noise and timesteps are named by (batch.seed, position), so the same batch always has
    the same loss. noise_offset adds one constant per picture and channel to the noise.
    """
    objective, draw = family.objective, (batch.seed, batch.positions)
    x0 = family.latents(batch)  # (B, C, h, w), or (B, D) for an embedding
    condition = family.condition(batch)
    noise = named_noise(x0, *draw, noise_offset)
    t = objective.sample_t(rng.uniform(draw[0], "timesteps", draw[1]))  # (B,)
    x_t = objective.add_noise(x0, noise, t)
    prediction = family.predict(x_t, t, condition)
    target = objective.target(x0, noise, t)
    weight = objective.weight(t).to(prediction.device)
    if batch.weights is not None:
        weight = weight * batch.weights.to(prediction.device)
    return weighted_error(prediction, target, weight, t)


def weighted_error(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, t: torch.Tensor
) -> Loss:
    """Mean squared error of each picture in float32, and their mean weighted by `weight` (B,)."""
    per_image = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    return Loss((per_image * weight).mean(), per_image, t)


def named_noise(x0: torch.Tensor, seed: int, positions: list[int], offset: float) -> torch.Tensor:
    """Standard normal noise like x0, plus the offset's constants."""
    noise = rng.normal(x0.shape[1:], seed, "noise", positions)
    if offset:
        shape = (x0.shape[1], *[1] * (x0.ndim - 2))
        noise = noise + offset * rng.normal(shape, seed, "noise offset", positions)
    return noise.to(x0)
