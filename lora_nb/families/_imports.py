"""diffusers' pipelines, imported and loaded without notices that say nothing to a learner (torchvision, inner bars)."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging as diffusers_logging
import transformers.utils.logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the libraries' notices and loading bars; downloads from the Hub keep theirs."""
    levels = transformers_logging.get_verbosity(), diffusers_logging.get_verbosity()
    bars = (
        transformers_logging.is_progress_bar_enabled(),
        diffusers_logging.is_progress_bar_enabled(),
    )
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(
            (transformers_logging, diffusers_logging), levels, bars, strict=True
        ):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


with quiet():
    from diffusers import (
        FluxPipeline,
        KandinskyV22CombinedPipeline,
        KandinskyV22Pipeline,
        KandinskyV22PriorPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        WuerstchenCombinedPipeline,
        WuerstchenDecoderPipeline,
        WuerstchenPriorPipeline,
        ZImagePipeline,
    )

__all__ = [
    "FluxPipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "WuerstchenCombinedPipeline",
    "WuerstchenDecoderPipeline",
    "WuerstchenPriorPipeline",
    "ZImagePipeline",
    "quiet",
]
