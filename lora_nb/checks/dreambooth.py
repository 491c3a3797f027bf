"""Exercises about DreamBooth."""

import torch
import torch.nn.functional as F

from lora_nb.cache import with_prior
from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import (
    random_tensor,
)
from lora_nb.families import Batch


@exercise(
    "06.1",
    hint="errors.chunk(2) gives the subject's half and the class's; add their means, one of them weighted",
    right="equal to what the trainer makes of a joined batch",
)
def _dreambooth_loss() -> Task:
    """dreambooth_loss(errors, weight) -> one number from 2 n errors, first the subject's, then the class's."""

    def by_package(errors: torch.Tensor, weight: float) -> torch.Tensor:
        half = Batch.of_captions([""] * (len(errors) // 2), resolution=8)
        return (errors * with_prior(half, half, weight).weights).mean()

    errors = [random_tensor(8, seed=61).square(), random_tensor(2, seed=62).square()]
    return Task(
        by_package,
        cases=[(errors[0], 1.0), (errors[1], 0.3), (errors[0], 0.0)],
        mistakes={
            "this is half of it: each half has its own mean": lambda e, w: (
                (e.chunk(2)[0].mean() + w * e.chunk(2)[1].mean()) / 2
            ),
            "the weight belongs to the class, the second half": lambda e, w: (
                w * e.chunk(2)[0].mean() + e.chunk(2)[1].mean()
            ),
            "the weight is missing": lambda e, w: 2 * e.mean(),
            "take the mean of each half, not the sum": lambda e, w: (
                e.chunk(2)[0].sum() + w * e.chunk(2)[1].sum()
            ),
        },
    )


@exercise(
    "06.2",
    hint="divide each row by its length; the cosine similarity of a pair is then the sum of products",
    right="metrics.drift is the mean of these",
)
def _moved() -> Task:
    """moved(before, after), features (n, width) each -> (n,) cosine distances of the pairs."""
    before, after = random_tensor(5, 16, seed=63), random_tensor(5, 16, seed=64)
    return Task(
        lambda a, b: 1 - F.cosine_similarity(a, b, dim=1),
        cases=[(before, after), (before, 3 * after), (before + 2, after + 2)],
        mistakes={
            "this is the similarity; the distance is 1 minus it": lambda a, b: F.cosine_similarity(
                a, b, dim=1
            ),
            "the rows have not been divided by their lengths": lambda a, b: 1 - (a * b).sum(1),
            "this compares every picture with every other; pictures come in pairs": lambda a, b: (
                1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
            ),
            "this is the length of the difference, which grows with the length of the rows": lambda a, b: (
                (a - b).norm(dim=1)
            ),
        },
        tolerance=1e-4,
    )
