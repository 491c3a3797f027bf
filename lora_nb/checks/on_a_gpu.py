"""Exercises about training on GPUs."""

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.env.hardware import dtype_of


@exercise(
    "11.1",
    hint="bfloat16 in hardware begins with compute capability 8.0, whatever torch says",
    right="the setup table decides in the same way",
)
def _dtype() -> Task:
    """dtype(major, minor) -> "bfloat16" or "float16", by the compute capability of a GPU."""
    return Task(
        lambda major, minor: dtype_of((major, minor)),
        cases=[(8, 0), (7, 0), (7, 5), (8, 9), (9, 0), (12, 0)],
        mistakes={
            "a T4 (7.5) only imitates bfloat16": lambda major, minor: "bfloat16",
            "from 8.0 on the hardware has bfloat16, which needs no loss scaling": lambda major, minor: (
                "float16"
            ),
            "Turing is 7.5: the border is 8.0": lambda major, minor: (
                "bfloat16" if (major, minor) >= (7, 5) else "float16"
            ),
        },
    )


@exercise(
    "11.2",
    hint="2 bytes for each frozen weight, 4 x 4 for each trained one, and what each picture of the batch leaves behind",
    right="what preflight measures comes on top of this: the CUDA context and blocks between tensors",
)
def _memory() -> Task:
    """memory(frozen, trained, per_picture, batch) -> bytes, frozen in half precision and AdamW in float32."""

    def counted(frozen: int, trained: int, per_picture: int, batch: int) -> int:
        half, full = torch.finfo(torch.float16).bits // 8, torch.finfo(torch.float32).bits // 8
        adam = 1 + 1 + 2  # the weight, its gradient and AdamW's two moments
        return half * frozen + adam * full * trained + batch * per_picture

    return Task(
        counted,
        cases=[
            (859_500_000, 1_590_000, 850_000_000, 4),
            (2_567_500_000, 11_610_000, 480_000_000, 1),
        ],
        mistakes={
            "frozen weights need no gradient and no moments, and 2 bytes are enough": lambda f, t, p, b: (
                16 * (f + t) + b * p
            ),
            "AdamW keeps two moments for each trained weight, beside the weight and its gradient": lambda f, t, p, b: (
                2 * f + 8 * t + b * p
            ),
            "every picture of the batch leaves its own activations": lambda f, t, p, b: (
                2 * f + 16 * t + p
            ),
        },
    )
