"""Seeded pictures: picture i is a function of (prompt i, seed i) and the settings, not of its neighbours."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils import numpy_to_pil
from PIL.Image import Image

from lora_nb.errors import ConfigError, NumericsError
from lora_nb.families import widened
from lora_nb.inference.attach import Scale, fused, scaled

# Pipelines whose second stage takes all pictures of a batch for those of one prompt.
ONE_BY_ONE = ("WuerstchenCombinedPipeline",)


def generate(
    pipeline: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    batch_size: int = 8,
    resolution: int | None = None,
    scale: Scale | None = None,
) -> list[Image]:
    """One picture for each (prompt, seed); a single prompt is repeated for all seeds and the other way round.

    resolution: side in pixels; None means the model's own. scale: factor on the adapters for these pictures only.
    Raises ConfigError if the numbers of prompts and seeds do not match, NumericsError if a picture is not finite.
    """
    pixels = _pixels(
        pipeline,
        prompts,
        seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        batch_size=batch_size,
        resolution=resolution,
        scale=scale,
    )
    return numpy_to_pil(pixels)


@torch.no_grad()
def _pixels(
    pipeline: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    *,
    batch_size: int,
    resolution: int | None,
    scale: Scale | None,
    **sampling: float,
) -> np.ndarray:
    """The pictures before they become bytes: (N, H, W, 3) float32 in [0, 1]."""
    pairs = _pairs(prompts, seeds)
    accepted = inspect.signature(pipeline.__call__).parameters
    # A pipeline of two stages may have the setting for its first one, and few have all of them.
    names = {name: name if name in accepted else f"prior_{name}" for name in sampling}
    sampling = {names[n]: value for n, value in sampling.items() if names[n] in accepted}
    if resolution is not None:
        sampling |= {"height": resolution, "width": resolution}
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    batch_size = 1 if type(pipeline).__name__ in ONE_BY_ONE else batch_size
    with scaled(pipeline, scale), _decoding(pipeline):
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            # CPU generators, one per picture: the same noise on every device and in every batch.
            generators = [torch.Generator().manual_seed(seed) for _, seed in chunk]
            with warnings.catch_warnings():
                # Combined pipelines hand on an argument of their own that is on its way out.
                warnings.simplefilter("ignore", FutureWarning)
                output = pipeline(
                    prompt=[prompt for prompt, _ in chunk],
                    generator=generators,
                    output_type="np",
                    **sampling,
                )
            pictures.append(output.images)
    pixels = np.concatenate(pictures)
    if not np.isfinite(pixels).all():
        raise NumericsError(
            "A picture is not finite; generate in float32, or look for broken weights with `python -m lora_nb inspect`."
        )
    return pixels


def _pairs(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[tuple[str, int]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if len(prompts) == 1:
        prompts *= len(seeds)
    if len(seeds) == 1:
        seeds *= len(prompts)
    if len(prompts) != len(seeds) or not prompts:
        raise ConfigError(
            f"There are {len(prompts)} prompts and {len(seeds)} seeds; give as many of each, or one of either."
        )
    return list(zip(prompts, seeds, strict=True))


@contextmanager
def _decoding(pipeline: Any) -> Iterator[None]:
    """Hand the VAE (or MoVQ) latents of its own dtype: it stays float32 beside half-precision networks.

    On a CPU that knows bfloat16 it decodes such latents in that, in half the time; a pixel of the course's pictures
    differs by a fifth of a level of 256.
    """
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "movq", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    def decoding(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        known = widened.SUPPORTED and widened.narrow(latents)
        with torch.autocast("cpu", torch.bfloat16, enabled=known):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = decoding
    try:
        yield
    finally:
        del vae.decode  # the class's method shows again


def scale_sweep(
    pipeline: Any, prompt: str, seeds: Sequence[int], scales: Sequence[float], **sampling: Any
) -> list[list[Image]]:
    """The same seeds at growing adapter scales: one row of pictures per scale. sampling: arguments of `generate`."""
    rows = []
    for scale in scales:
        with scaled(pipeline, scale), fused(pipeline):
            rows.append(generate(pipeline, prompt, seeds, **sampling))
    return rows
