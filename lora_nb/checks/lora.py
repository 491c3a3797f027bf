"""Exercises about LoRA."""

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import (
    peft_layer,
    random_pair,
    random_tensor,
)


@exercise(
    "02.1",
    hint="A is rank x in_features, B is out_features x rank",
    right="rank * (in + out), far below in * out",
)
def _count() -> Task:
    """lora_parameters(rank, in_features, out_features) -> number of trainable weights."""

    def by_peft(rank: int, inputs: int, outputs: int) -> int:
        layer = peft_layer(
            torch.zeros(outputs, inputs),
            torch.zeros(rank, inputs),
            torch.zeros(outputs, rank),
            1,
            rank,
        )
        return sum(p.numel() for n, p in layer.named_parameters() if "lora_" in n)

    return Task(
        by_peft,
        cases=[(4, 768, 320), (8, 320, 320), (1, 5, 7)],
        mistakes={
            "A and B have rank * in and rank * out weights: add, do not multiply": lambda r, i, o: (
                r * i * o
            ),
            "this counts A alone": lambda r, i, o: r * i,
            "this counts B alone": lambda r, i, o: r * o,
        },
    )


@exercise(
    "02.2",
    hint="x @ W.T plus alpha / rank times the same x through A, then B",
    right="equal to peft's layer",
)
def _forward() -> Task:
    """lora_forward(x, W, A, B, alpha, rank) -> the adapted layer's output; W (out, in), A (rank, in), B (out, rank)."""
    cases = [
        (
            random_tensor(5, 12, seed=s),
            random_tensor(8, 12, seed=s + 1),
            *random_pair(r, 12, 8, seed=s),
            alpha,
            r,
        )
        for s, alpha, r in ((21, 8.0, 4), (22, 1.0, 2), (23, 9.0, 3))
    ]
    return Task(
        lambda x, w, a, b, alpha, rank: peft_layer(w, a, b, alpha, rank)(x),
        cases=cases,
        mistakes={
            "the scale alpha / rank is missing": lambda x, w, a, b, *_: x @ w.T + x @ a.T @ b.T,
            "the scale is alpha / rank, not alpha": lambda x, w, a, b, al, r: (
                x @ w.T + al * x @ a.T @ b.T
            ),
            "the scale is alpha / rank, not rank / alpha": lambda x, w, a, b, al, r: (
                x @ w.T + r / al * x @ a.T @ b.T
            ),
            "the base's W x is missing": lambda x, w, a, b, al, r: al / r * x @ a.T @ b.T,
            "the scale belongs to B A x alone": lambda x, w, a, b, al, r: (
                al / r * (x @ w.T + x @ a.T @ b.T)
            ),
        },
        tolerance=1e-4,
    )


@exercise(
    "02.3",
    hint="the scale is alpha / rank: keep the quotient",
    right="double the rank, double alpha, and the adapter acts as strongly as before",
)
def _alpha() -> Task:
    """The alpha for rank 16 that keeps the scale of rank 4 with alpha 4 (a number)."""
    return Task(
        16,
        mistakes={
            "with alpha 4 at rank 16 the scale falls to 1/4": 4,
            "this is the scale, not alpha": 1,
            "this is four times the scale that we had": 64,
        },
    )
