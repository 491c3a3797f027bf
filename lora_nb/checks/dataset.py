"""Exercises about the data set."""

from typing import Any

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import by_scheduler, noising_cases


@exercise(
    "01.1",
    hint="encode a picture of zeros with family.moments and look at its shape",
    right="the network never sees pixels, only this much smaller grid",
)
def _latents_shape(family: Any) -> Task:
    """latents_shape(height, width) -> (channels, height, width) of the latents of one picture."""
    multiple = family.pixel_multiple

    def encoded(height: int, width: int) -> tuple[int, ...]:
        return tuple(family.moments(torch.zeros(1, 3, height, width))[0].shape[1:])

    return Task(
        encoded,
        cases=[
            (4 * multiple, 4 * multiple),
            (2 * multiple, 6 * multiple),
            (8 * multiple, 3 * multiple),
        ],
        mistakes={"height comes before width": lambda height, width: encoded(width, height)},
    )


@exercise(
    "01.2",
    hint="len(tokenizer(caption).input_ids) counts the tokens, start and end included",
    right="what is cut is never learned",
)
def _is_cut(tokenizer: Any) -> Task:
    """is_cut(caption) -> bool: does the tokenizer have to cut this caption?"""
    room = tokenizer.model_max_length

    def tokens(caption: str) -> int:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids)

    def repeated(limit: int) -> str:
        return " ".join(["a"] * limit)

    fits = next(n for n in range(room, 0, -1) if tokens(repeated(n)) <= room)
    unusual = "xqzj" * (room // 2)  # one word of many tokens
    return Task(
        lambda caption: tokens(caption) > room,
        cases=[(text,) for text in ("a cat", unusual, repeated(fits), repeated(fits + 1))],
        mistakes={
            "words are not tokens": lambda caption: len(caption.split()) > room,
            "start and end take two of the places": lambda caption: tokens(caption) - 2 > room,
            "a caption that just fits is whole": lambda caption: tokens(caption) >= room,
        },
    )


@exercise(
    "01.3",
    hint="sqrt(alpha_bar) of the signal and sqrt(1 - alpha_bar) of the noise",
    right="equal to diffusers' noise scheduler",
)
def _add_noise() -> Task:
    """add_noise(x0, noise, alpha_bar) -> x_t."""
    return Task(
        by_scheduler("add_noise"),
        cases=noising_cases(13),
        mistakes={
            "the square roots are missing: variances add, not standard deviations": lambda x, n, a: (
                a * x + (1 - a) * n
            ),
            "signal and noise have changed places": lambda x, n, a: (1 - a) ** 0.5 * x + a**0.5 * n,
        },
    )
