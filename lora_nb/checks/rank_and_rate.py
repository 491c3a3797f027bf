"""Exercises about rank and learning rate."""

from collections.abc import Sequence

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import peft_layer, random_pair, random_tensor
from lora_nb.early_stopping import verdict


@exercise(
    "05.1",
    hint="keep the ranks that are behind by at most two of their standard errors, and take the smallest",
    right="the smallest rank that nobody can tell from the best",
)
def _cheapest() -> Task:
    """cheapest(ranks, behind, errors) -> a rank; behind: held-out loss above the best's; errors: standard errors."""

    def reference(ranks: Sequence[int], behind: Sequence[float], errors: Sequence[float]) -> int:
        rows = zip(ranks, behind, errors, strict=True)
        return min(rank for rank, loss, error in rows if loss <= 2 * error)

    return Task(
        reference,
        cases=[
            ((1, 4, 8, 16), (0.03, 0.005, 0.002, 0.0), (0.01, 0.003, 0.003, 0.0)),
            ((64, 16, 4, 2), (0.0, 0.01, 0.05, 0.09), (0.0, 0.001, 0.01, 0.05)),
            ((8, 2), (0.0, 0.3), (0.0, 0.1)),
        ],
        mistakes={
            "this is the best one itself; a smaller one may be as good": lambda r, b, e: r[
                list(b).index(min(b))
            ],
            "this is the smallest rank, however far behind": lambda r, b, e: min(r),
            "one standard error is too strict: luck goes beyond it one time in three": lambda r, b, e: (
                min(rank for rank, loss, error in zip(r, b, e, strict=True) if loss <= error)
            ),
        },
    )


@exercise(
    "05.2",
    hint="in the first step A stands still and each number of B moves by the learning rate, whatever alpha is",
    right="equal to what one step of AdamW does to peft's layer",
)
def _equal_rate() -> Task:
    """equal_rate(learning_rate, alpha, new_alpha) -> the learning rate with the same first step, at equal rank."""

    def first_change(learning_rate: float, alpha: float) -> float:
        weight, x = random_tensor(6, 10, seed=51), random_tensor(7, 10, seed=52)
        a, _ = random_pair(4, 10, 6, seed=53)
        layer = peft_layer(weight, a, torch.zeros(6, 4), alpha, 4)
        b = layer.lora_B["default"].weight
        before, optimizer = (
            layer(x).detach(),
            torch.optim.AdamW([b], lr=learning_rate, weight_decay=0),
        )
        (layer(x) - random_tensor(7, 6, seed=54)).square().sum().backward()
        optimizer.step()
        return (layer(x) - before).norm().item()

    def by_adamw(learning_rate: float, alpha: float, new_alpha: float) -> float:
        return learning_rate * first_change(1e-3, alpha) / first_change(1e-3, new_alpha)

    return Task(
        by_adamw,
        cases=[(1e-3, 4.0, 8.0), (2e-3, 16.0, 4.0), (5e-4, 1.0, 3.0)],
        mistakes={
            "the other way round: a larger alpha speaks louder, so it wants a smaller rate": lambda lr, a, n: (
                lr * n / a
            ),
            "so it is for plain SGD, whose gradient grows with alpha too; Adam divides that out": lambda lr, a, n: (
                lr * (a / n) ** 2
            ),
            "alpha matters: it multiplies whatever B becomes": lambda lr, a, n: lr,
        },
        tolerance=1e-3,
    )


@exercise(
    "05.3",
    hint="go through the probes, remember where the lowest one was, and stop when it lies `patience` probes back",
    right="equal to what early_stop does",
)
def _stop() -> Task:
    """stop(differences, patience) -> (place of the best probe, place of the probe after which training ends)."""

    def by_package(differences: Sequence[float], patience: int) -> tuple[int, int]:
        history, last = [], 0
        for place, value in enumerate(differences):
            draw = [(0, value, 0.0)]
            history.append(
                {"event": "probe", "step": place, "difference": value, "by_timestep": draw}
            )
            last = place
            if verdict(history).since >= patience:
                break
        return verdict(history).best, last

    def first_rise(differences: Sequence[float], patience: int) -> tuple[int, int]:
        for place in range(1, len(differences)):
            if differences[place] > differences[place - 1]:
                return place - 1, place
        return len(differences) - 1, len(differences) - 1

    def rises(differences: Sequence[float], patience: int) -> tuple[int, int]:
        """Counts probes that are worse than the one before, in a row."""
        row = 0
        for place in range(1, len(differences)):
            row = row + 1 if differences[place] > differences[place - 1] else 0
            if row >= patience:
                return min(range(place + 1), key=lambda i: differences[i]), place
        last = len(differences) - 1
        return min(range(last + 1), key=lambda i: differences[i]), last

    return Task(
        by_package,
        cases=[
            ([0.0, -0.1, -0.2, -0.15, -0.3, -0.2, -0.25, -0.1, -0.05, 0.0, -0.4], 3),
            ([0.0, -0.1, -0.2], 2),
            ([0.0, 0.1, 0.2, -0.5], 2),
        ],
        mistakes={
            "this stops at the first rise; patience waits for more": first_rise,
            "compare with the best so far, not with the probe before": rises,
            "this looks at the whole run, also at what comes after the stop": lambda d, p: (
                min(range(len(d)), key=lambda i: d[i]),
                len(d) - 1,
            ),
        },
    )
