"""Exercises about inference."""

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import (
    peft_layer,
    random_pair,
    random_tensor,
)


@exercise(
    "04.1",
    hint="alpha / rank times B @ A has the shape of W: add it",
    right="equal to peft's merge; a merged adapter costs nothing at inference",
)
def _merge() -> Task:
    """merge(W, A, B, alpha, rank) -> one weight that does what base and adapter do together."""

    def by_peft(
        weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, rank: int
    ) -> torch.Tensor:
        layer = peft_layer(weight, a, b, alpha, rank)
        layer.merge()
        return layer.weight.detach()

    cases = [
        (random_tensor(6, 6, seed=s), *random_pair(r, 6, 6, seed=s), alpha, r)
        for s, alpha, r in ((41, 8.0, 4), (42, 1.0, 2))
    ]
    return Task(
        by_peft,
        cases=cases,
        mistakes={
            "the scale alpha / rank is missing": lambda w, a, b, alpha, r: w + b @ a,
            "the scale is alpha / rank, not alpha": lambda w, a, b, alpha, r: w + alpha * b @ a,
            "B comes first: A takes the input, B gives the output": lambda w, a, b, alpha, r: (
                w + alpha / r * (b @ a).T
            ),
            "subtracting is how it is undone": lambda w, a, b, alpha, r: w - alpha / r * b @ a,
        },
        tolerance=1e-4,
    )


@exercise(
    "04.2",
    hint="which factor makes W + scale * B A equal to W?",
    right="at scale 0 the adapter adds nothing",
)
def _base_scale() -> Task:
    """The adapter scale that gives the base model's picture (a number)."""
    return Task(
        0,
        mistakes={
            "at scale 1 the adapter acts as it was trained": 1,
            "a negative scale pushes away from the style": -1,
        },
    )
