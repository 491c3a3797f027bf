"""Exercises about training."""

import math

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import (
    by_scheduler,
    noising_cases,
)
from lora_nb.objectives import Diffusion


@exercise(
    "03.1",
    hint="min(SNR, gamma) divided by SNR + 1",
    right="equal to the weight in the package's loss; easy timesteps no longer drown the others",
)
def _min_snr() -> Task:
    """min_snr_weight(snr, gamma) -> loss weight for v-prediction (Hang et al. 2023)."""
    alphas = torch.tensor([0.9991, 0.98, 0.9, 0.8333, 0.5, 0.1, 0.0])

    def by_package(snr: torch.Tensor, gamma: float) -> torch.Tensor:
        objective = Diffusion(alphas, "v_prediction", snr_gamma=gamma)
        t = (objective.snr(torch.arange(len(alphas))) - snr[:, None]).abs().argmin(dim=1)
        return objective.weight(t)

    snr = alphas / (1 - alphas)
    return Task(
        by_package,
        cases=[(snr, 5.0), (snr.flip(0), 1.0), (snr[1:4], 20.0)],
        mistakes={
            "this is the weight for a prediction of x0": lambda snr, gamma: snr.clamp(max=gamma),
            "this is the weight for epsilon-prediction; for v divide by SNR + 1": lambda s, g: (
                s.clamp(max=g) / s
            ),
            "this takes the larger of the two: min, not max": lambda s, g: s.clamp(min=g) / (s + 1),
        },
    )


@exercise(
    "03.2",
    hint="sqrt(alpha_bar) of the noise minus sqrt(1 - alpha_bar) of the signal",
    right="equal to diffusers' get_velocity",
)
def _v_target() -> Task:
    """v_target(x0, noise, alpha_bar) -> what a v-prediction network should output (Salimans & Ho 2022)."""
    return Task(
        by_scheduler("get_velocity"),
        cases=noising_cases(32),
        mistakes={
            "this is x_t; v takes the noise with sqrt(alpha_bar)": lambda x, n, a: (
                a**0.5 * x + (1 - a) ** 0.5 * n
            ),
            "the sign is turned around": lambda x, n, a: (1 - a) ** 0.5 * x - a**0.5 * n,
            "this is the target for epsilon-prediction": lambda x, n, a: n,
            "the square roots are missing": lambda x, n, a: a * n - (1 - a) * x,
        },
    )


@exercise(
    "03.3",
    hint="step / warmup while it warms up, then half of 1 + cos(pi * progress) over the steps that remain",
    right="equal to diffusers' cosine schedule",
)
def _cosine() -> Task:
    """learning_rate(step, peak, warmup, total), step = 0, 1, ...: linear warm-up, then half a cosine down to 0."""

    def by_diffusers(step: int, peak: float, warmup: int, total: int) -> float:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        return peak * get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0](step)

    def half_cosine(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2

    return Task(
        by_diffusers,
        cases=[
            (0, 1e-3, 50, 400),
            (25, 1e-3, 50, 400),
            (50, 2e-4, 50, 400),
            (130, 1e-3, 50, 400),
            (399, 1e-4, 0, 400),
        ],
        mistakes={
            "the warm-up is missing": lambda k, peak, w, n: peak * half_cosine(k / n),
            "progress counts from the end of the warm-up": lambda k, p, w, n: (
                p * (k / w if k < w else half_cosine(k / n))
            ),
            "after the warm-up it follows a cosine": lambda k, p, w, n: (
                p * (k / w if k < w else (n - k) / (n - w))
            ),
        },
    )
