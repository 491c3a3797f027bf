"""Exercises about the setup."""

from typing import Any

from lora_nb import adapters
from lora_nb.checks.checking import Task, exercise


@exercise(
    "00.1",
    hint="divide the parameters of the base's network by those that LoRA trains",
    right="that is why a style fits into a file you can mail",
)
def _times_smaller(family: Any, rank: int = 4) -> Task:
    """How many times fewer weights does LoRA of this rank train than the network has? (a number, to 1 %)"""
    part, module = next(iter(family.trainable.items()))
    weights = {n: p.numel() for n, p in module.named_parameters() if ".lora_" not in n}
    trained = sum(c.parameters for c in adapters.forecast(module, family.targets[part], rank))
    ratio = sum(weights.values()) / trained
    return Task(
        ratio,
        mistakes={
            "this is the inverse: how large the adapter is, not how many times smaller": 1 / ratio
        },
        tolerance=0.01,
    )


@exercise(
    "00.2",
    hint="count the pictures that all steps show, and divide by the number of pictures in the folder",
    right="an epoch is one such round",
)
def _rounds() -> Task:
    """rounds(steps, batch_size, accumulation, pictures): how often is each picture seen?"""
    return Task(
        lambda steps, batch, accumulation, pictures: steps * batch * accumulation / pictures,
        cases=[(400, 8, 1, 100), (250, 4, 3, 60), (7, 2, 2, 100)],
        mistakes={
            "a step shows batch_size pictures for each accumulated micro-step": lambda s, b, a, p: (
                s * b / p
            ),
            "accumulation makes a step larger, not smaller": lambda s, b, a, p: s * b / a / p,
        },
    )
