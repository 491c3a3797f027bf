"""Exercises about LoRA files and what is in them."""

import math
from typing import Any

from lora_nb.checks.checking import Task, exercise
from lora_nb.formats import Spectrum
from lora_nb.formats.kohya import kohya_name

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0.attn2"
LAYERS = (
    ("unet", f"{BLOCK}.to_q"),
    ("unet", f"{BLOCK}.to_out.0"),
    ("text_encoder", "text_model.encoder.layers.3.mlp.fc1"),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"),
)
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


@exercise(
    "08.1",
    hint="a prefix for the part, then the layer's name with underscores for dots",
    right="these are the names that ComfyUI and A1111 look up",
)
def _name(family: Any) -> Task:
    """kohya_key(part, layer) -> the name of a layer in a Kohya file, up to the first dot."""
    return Task(
        lambda part, layer: kohya_name(family, part, layer),
        cases=LAYERS,
        mistakes={
            "what follows the first dot is the tensor's own name, so the layer's dots become underscores": (
                lambda part, layer: PREFIXES[part] + layer
            ),
            "the text encoder's prefix is lora_te_": (
                lambda part, layer: f"lora_{part}_{layer.replace('.', '_')}"
            ),
            "a text encoder's layers begin with text_model_, whether or not the model's own names do": (
                lambda part, layer: PREFIXES[part] + layer.replace(".", "_")
            ),
        },
    )


@exercise(
    "08.2",
    hint="their readers compute alpha / rank; ours computed something else for rsLoRA",
    right="the reader's quotient is the scale that was trained with",
)
def _alpha() -> Task:
    """alpha_to_write(rank, alpha, rslora) -> the alpha that gives a reader of alpha / rank the trained scale."""

    def scaled(rank: int, alpha: float, rslora: bool) -> float:
        return alpha / (math.sqrt(rank) if rslora else rank) * rank

    return Task(
        scaled,
        cases=[(32, 16.0, False), (16, 8.0, True), (9, 6.0, True), (4, 4.0, False)],
        mistakes={
            "rsLoRA's scale is alpha / sqrt(rank), which is more than alpha / rank": lambda r, a, s: (
                a
            ),
            "this is the scale; the reader divides by the rank once more": lambda r, a, s: (
                scaled(r, a, s) / r
            ),
            "then every reader takes a scale of 1": lambda r, a, s: float(r),
        },
    )


@exercise(
    "08.3",
    hint="squares of the singular values, added up from the largest on",
    right="energy is the sum of squares, and the first few values often hold most of it",
)
def _energy() -> Task:
    """rank_for(values, share) -> how many of the singular values, largest first, hold this share of the energy."""

    def by_sums(values: tuple, share: float) -> int:
        sums = [sum(values[: n + 1]) / sum(values) for n in range(len(values))]
        return next(n + 1 for n, found in enumerate(sums) if found >= share)

    return Task(
        lambda values, share: Spectrum("unet", "x", values).rank_for(share),
        cases=[
            ((3.0, 2.0, 1.0, 1.0), 0.85),
            ((5.0, 1.0, 1.0, 1.0, 1.0), 0.9),
            ((1.0, 1.0, 1.0, 1.0), 0.7),
        ],
        mistakes={
            "energy adds up squares, not the values": by_sums,
            "this is one too few: the share must be reached": lambda values, share: (
                Spectrum("unet", "x", values).rank_for(share) - 1
            ),
        },
    )
