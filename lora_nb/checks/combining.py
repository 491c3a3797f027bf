"""Exercises about LoRAs that combine."""

import torch

from lora_nb import formats
from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import random_pair
from lora_nb.formats import Pair


@exercise(
    "07.1",
    hint="torch.linalg.qr(A.T).Q has an orthonormal basis of what A reads in its columns",
    right="equal to what formats.overlap says of the inputs",
)
def _shared() -> Task:
    """shared(A1, A2), (rank, inputs) each, of equal rank -> mean squared cosine of the principal angles."""

    def by_package(a1: torch.Tensor, a2: torch.Tensor) -> float:
        b = torch.eye(7, len(a1))
        pairs = ({"unet": {"x": Pair(a, b, 1.0)}} for a in (a1, a2))
        return sum(c**2 for c in formats.overlap(*pairs)[0].inputs) / len(a1)

    a1, a2 = (random_pair(3, 20, 7, seed=s)[0] for s in (71, 72))
    half = torch.cat([a1[:1], a2[1:]])

    def basis(a: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(a.T).Q

    return Task(
        by_package,
        cases=[(a1, a2), (a1, half), (a1, 3 * a1)],
        mistakes={
            "the rows of A are no orthonormal basis; take Q of its QR first": lambda a, b: (
                (a @ b.T).square().sum() / len(a)
            ),
            "square the cosines before you take the mean": lambda a, b: torch.linalg.svdvals(
                basis(a).T @ basis(b)
            ).mean(),
            "this is the sum; divide by the rank": lambda a, b: (
                (basis(a).T @ basis(b)).square().sum()
            ),
            "this is the mean over all entries; there are rank angles, not rank squared": lambda a, b: (
                (basis(a).T @ basis(b)).square().mean()
            ),
        },
        tolerance=1e-4,
    )


@exercise(
    "07.2",
    hint="weights and scales go into B; torch.cat(..., dim=1) puts matrices side by side",
    right="B A is now the weighted sum of both changes, and its scale is 1",
)
def _beside() -> Task:
    """beside(B1, scale1, B2, scale2, weights) -> the B that goes with torch.cat([A1, A2])."""

    def by_package(
        b1: torch.Tensor, s1: float, b2: torch.Tensor, s2: float, weights: tuple[float, float]
    ) -> torch.Tensor:
        pairs = [Pair(torch.zeros(b.shape[1], 5), b, s) for b, s in ((b1, s1), (b2, s2))]
        joined = formats.concatenate([{"unet": {"x": pair}} for pair in pairs], weights)
        return joined["unet"]["x"].up

    b1, b2 = random_pair(3, 5, 6, seed=73)[1], random_pair(3, 5, 6, seed=74)[1]
    return Task(
        by_package,
        cases=[(b1, 1.0, b2, 1.0, (1.0, 1.0)), (b1, 0.5, b2, 2.0, (0.7, -0.4))],
        mistakes={
            "stacked in the wrong direction: B has a column for every row of A": lambda b1, s1, b2, s2, w: (
                torch.cat([w[0] * s1 * b1, w[1] * s2 * b2])
            ),
            "the scales are missing": lambda b1, s1, b2, s2, w: torch.cat(
                [w[0] * b1, w[1] * b2], dim=1
            ),
            "the weights are missing": lambda b1, s1, b2, s2, w: torch.cat(
                [s1 * b1, s2 * b2], dim=1
            ),
            "this adds the matrices; their columns have to stay apart": lambda b1, s1, b2, s2, w: (
                w[0] * s1 * b1 + w[1] * s2 * b2
            ),
        },
    )


@exercise(
    "07.3",
    hint="multiply out (B1 + B2)(A1 + A2) / 4 and take away (B1 A1 + B2 A2) / 2",
    right="it is zero only where both have the same A or the same B",
)
def _crossed() -> Task:
    """crossed(A1, B1, A2, B2) -> mean(B) mean(A) minus the mean of both products."""

    def by_hand(
        a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor
    ) -> torch.Tensor:
        mean = torch.stack([b1, b2]).double().mean(0) @ torch.stack([a1, a2]).double().mean(0)
        return mean - (b1.double() @ a1.double() + b2.double() @ a2.double()) / 2

    (a1, b1), (a2, b2) = (random_pair(3, 8, 6, seed=s) for s in (75, 76))
    return Task(
        by_hand,
        cases=[(a1, b1, a2, b2), (a2, b1, a1, b2)],  # a zero would be a matter of rounding
        mistakes={
            "these are the cross terms alone; averaging has also halved the two products": lambda a1, b1, a2, b2: (
                (b1 @ a2 + b2 @ a1) / 4
            ),
            "the sign: averaged factors minus averaged products": lambda a1, b1, a2, b2: (
                (b1 - b2) @ (a1 - a2) / 4
            ),
            "two factors were halved, so their product is divided by 4": lambda a1, b1, a2, b2: (
                (b1 + b2) @ (a1 + a2) / 2 - (b1 @ a1 + b2 @ a2) / 2
            ),
        },
        tolerance=1e-4,
    )
