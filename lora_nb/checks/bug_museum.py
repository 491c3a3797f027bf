"""Exercises about faults that raise no error."""

import math

import torch

from lora_nb import optimization, rng
from lora_nb.checks.checking import Task, exercise
from lora_nb.config import TrainConfig


@exercise(
    "10.1",
    hint="2 ** (e - 7), with e the exponent of the power of two at or below x",
    right="equal to the distance that torch finds; at 0.2 ten times a step of 1e-4",
)
def _spacing() -> Task:
    """spacing(x) -> the distance from x > 0 up to the next number of bfloat16, where x is one."""

    def by_torch(x: float) -> float:
        number = torch.tensor(x, dtype=torch.bfloat16)
        following = (number.view(torch.int16) + 1).view(torch.bfloat16)  # the next pattern of bits
        return (following.double() - number.double()).item()

    return Task(
        by_torch,
        cases=[(0.2,), (0.125,), (0.002,), (1.5,), (24.0,)],
        mistakes={
            "the exponent is rounded down, so that 0.2 and 0.125 have one spacing": lambda x: (
                2.0 ** (math.ceil(math.log2(x)) - 7)
            ),
            "128 steps between two powers of two are 2 ** 7, not 2 ** 8": lambda x: (
                2.0 ** (math.floor(math.log2(x)) - 8)
            ),
            "this grows with x itself; the spacing is the same between two powers of two": lambda x: (
                x / 128
            ),
            "these are the steps of float16, which has three more bits": lambda x: (
                2.0 ** (math.floor(math.log2(x)) - 10)
            ),
        },
    )


@exercise(
    "10.2",
    hint="solve the formula for L with k = n - 1: acos(2 rate / peak - 1) = pi (n - 1) / L",
    right="it finds the length that the package's schedule was made for",
)
def _stretch() -> Task:
    """stretch(rates, peak) -> length of the cosine in units of the run, for a cosine without warm-up."""
    config = TrainConfig(lr_scheduler="cosine", lr_warmup_steps=0)

    def run(steps: int, times: int, peak: float) -> list[float]:
        factor = optimization.learning_rate_factors(config, steps * times)
        return [peak * factor(step) for step in range(steps)]

    cases = {(steps, times): (run(steps, times, 1e-3), 1e-3) for steps, times in ((60, 4), (10, 2))}

    def known(rates: list[float], peak: float) -> float:
        return next(float(t) for (n, t), case in cases.items() if case[0] == rates)

    def angle(rates: list[float], peak: float) -> float:
        return math.acos(2 * rates[-1] / peak - 1)

    return Task(
        known,
        cases=list(cases.values()),
        mistakes={
            "this is the length in steps; divide it by n": lambda r, p: (
                math.pi * (len(r) - 1) / angle(r, p)
            ),
            "the last of n steps is k = n - 1": lambda r, p: math.pi / angle(r, p),
            "this is one over it": lambda r, p: len(r) * angle(r, p) / math.pi / (len(r) - 1),
        },
    )


@exercise(
    "10.3",
    hint="cut the rows into pieces of n; each has len(piece) - len(set(piece)) repeats",
    right="zero for the order that the package trains in, whatever the interruptions",
)
def _repeats() -> Task:
    """repeats(rows, n) -> views that are not the first of their picture in their round of n."""

    def by_counting(rows: list[int], n: int) -> int:
        first = {(place // n, row): place for place, row in reversed(list(enumerate(rows)))}
        return len(rows) - len(first)

    order = [row for epoch in range(3) for row in rng.permutation(6, 0, "audit", epoch)]
    restarted = order[:4] + order[:9]
    return Task(
        by_counting,
        cases=[(order, 6), (restarted, 6), ([1, 1, 2, 2, 3, 3], 4)],
        mistakes={
            "a picture that comes again in a later round is no repeat": lambda rows, n: (
                len(rows) - len(set(rows))
            ),
            "only whole rounds are counted here; the last one has begun too": lambda rows, n: sum(
                n - len(set(rows[i : i + n])) for i in range(0, len(rows) - n + 1, n)
            ),
            "this counts the pictures that are seen; repeats are the rest": lambda rows, n: sum(
                len(set(rows[i : i + n])) for i in range(0, len(rows), n)
            ),
        },
    )
