"""Several adapters at once: one picture for each pair of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from lora_nb.errors import ConfigError
from lora_nb.inference.attach import fused, scaled
from lora_nb.inference.drawing import generate


def weight_grid(
    pipeline: Any,
    prompt: str,
    seed: int,
    weights: Mapping[str, Sequence[float]],
    **sampling: Any,
) -> list[list[Image]]:
    """The same prompt and seed at every pair of weights: rows follow the first adapter, columns the second.

    weights: {adapter: its weights} for two adapters that are on the pipeline; others keep their scale. sampling:
    arguments of `generate`. Raises ConfigError for another number of adapters or a name that is not there.
    """
    if len(weights) != 2:
        raise ConfigError(
            f"weights names {', '.join(weights) or 'no adapter'}; a grid has two sides, so name two."
        )
    (first, down), (second, across) = weights.items()
    grid = []
    for a in down:
        row = []
        for b in across:
            with scaled(pipeline, {first: a, second: b}), fused(pipeline):
                row += generate(pipeline, prompt, seed, **sampling)
        grid.append(row)
    return grid
