"""From an RGB picture to a square of pixels, and the order of samples.

Every random choice is a function of (seed, position); position is the global number of a sample, counted over the
whole run. Decoding files is in decode.
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from lora_nb import rng
from lora_nb.config import DataSpec


class Sized(Protocol):
    """Anything with a width and a height: a Row or a PIL picture."""

    width: int
    height: int


class Key(NamedTuple):
    """Everything random about one transform; equal keys of one picture give equal pixels."""

    flip: bool
    top: int  # of the crop, in pixels of the resized picture
    left: int


def resized(picture: Sized, resolution: int) -> tuple[int, int]:
    """Width and height after the shorter side became `resolution`, the longer one rounded down."""
    short, long = sorted((picture.width, picture.height))
    long = int(resolution * long / short)
    return (resolution, long) if picture.width <= picture.height else (long, resolution)


def transform_key(spec: DataSpec, row: Sized, position: int, seed: int) -> Key:
    """Where the crop lies and whether the picture is mirrored at this position."""
    width, height = resized(row, spec.resolution)
    down, right = height - spec.resolution, width - spec.resolution
    if spec.center_crop or not (down or right):
        top, left = round(down / 2), round(right / 2)
    else:
        u = torch.rand(2, generator=rng.generator(seed, "crop", position)).tolist()
        top, left = int(u[0] * (down + 1)), int(u[1] * (right + 1))
    flip = spec.random_flip and rng.uniform(seed, "flip", [position]).item() < 0.5
    return Key(flip, top, left)


def geometry(
    spec: DataSpec, row: Sized, position: int, seed: int
) -> tuple[int, int, int, int, int, int]:
    """Original height and width, top and left of the crop, height and width of the square, in pixels.

    Seen as if the whole resized picture had been mirrored before the crop: what is cut off on the left is counted on
    the right then. SDXL is told this (Podell et al. 2023, section 2.2).
    """
    key = transform_key(spec, row, position, seed)
    right = resized(row, spec.resolution)[0] - spec.resolution - key.left
    left = right if key.flip else key.left
    return row.height, row.width, key.top, left, spec.resolution, spec.resolution


def pixels(image: Image.Image, spec: DataSpec, position: int, seed: int) -> torch.Tensor:
    """Resize the shorter side, crop, maybe mirror: (3, R, R) float32 in [-1, 1]. `image` is RGB."""
    flip, top, left = transform_key(spec, image, position, seed)
    size = resized(image, spec.resolution)
    if size != image.size:
        image = image.resize(size, Image.Resampling[spec.image_interpolation_mode.upper()])
    image = image.crop((left, top, left + spec.resolution, top + spec.resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return values.float().div(255).mul(2).sub(1)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """The PIL picture of (3, H, W) pixels in [-1, 1]; values outside are clipped."""
    values = pixels.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255)
    return Image.fromarray(values.byte().permute(1, 2, 0).numpy())


def row_at(position: int, n: int, seed: int) -> int:
    """The row of n that sample `position` shows; each epoch of n positions shows every row once."""
    epoch, place = divmod(position, n)
    return _order(n, seed, epoch)[place]


@lru_cache(
    maxsize=8
)  # one permutation serves n calls; a pure function, so a cache cannot change it
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return rng.permutation(n, seed, "order", epoch)
