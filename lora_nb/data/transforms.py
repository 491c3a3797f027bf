"""From an RGB picture to the pixels that are trained on, and the order of samples.

Every random choice is a function of (seed, position); position is the global number of a sample, counted over the
whole run. Decoding files is in decode.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from lora_nb import rng
from lora_nb.config import DataSpec
from lora_nb.data.buckets import Sized, size_of


class Key(NamedTuple):
    """Everything random about one transform; equal keys of one picture give equal pixels."""

    flip: bool
    top: int  # of the crop, in pixels of the resized picture
    left: int


def resized(picture: Sized, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height after the picture was scaled to cover `size` (width, height); what exceeds is rounded down."""
    width, height = size
    if width * picture.height >= height * picture.width:
        return width, int(width * picture.height / picture.width)
    return int(height * picture.width / picture.height), height


def transform_key(spec: DataSpec, row: Sized, position: int, seed: int) -> Key:
    """Where the crop lies and whether the picture is mirrored at this position."""
    size = size_of(spec, row)
    right, down = (whole - part for whole, part in zip(resized(row, size), size, strict=True))
    if spec.center_crop or not (down or right):
        top, left = round(down / 2), round(right / 2)
    else:
        place = position
        if spec.random_crops is not None:
            place = int(rng.uniform(seed, "crop choice", [position]).item() * spec.random_crops)
        u = torch.rand(2, generator=rng.generator(seed, "crop", place)).tolist()
        top, left = int(u[0] * (down + 1)), int(u[1] * (right + 1))
    flip = spec.random_flip and rng.uniform(seed, "flip", [position]).item() < 0.5
    return Key(flip, top, left)


def transform_setting(spec: DataSpec, row: Sized) -> tuple[int, int, str]:
    """What is the same at all positions: width and height of the crop, and how pixels are resampled."""
    return *size_of(spec, row), spec.image_interpolation_mode


def few_crops(spec: DataSpec, row: Sized) -> bool:
    """Whether a picture is cropped in so few places that each can be remembered."""
    return _one_place(spec, row) or spec.random_crops is not None


def _one_place(spec: DataSpec, row: Sized) -> bool:
    size = size_of(spec, row)
    return spec.center_crop or resized(row, size) == size


def views(spec: DataSpec, row: Sized) -> int:
    """In how many ways a picture is seen at most, if `few_crops`: places of the crop, mirrored or not."""
    places = 1 if _one_place(spec, row) else spec.random_crops
    return (2 if spec.random_flip else 1) * places


def geometry(
    spec: DataSpec, row: Sized, position: int, seed: int
) -> tuple[int, int, int, int, int, int]:
    """Original height and width, top and left of the crop, its height and width, in pixels.

    Seen as if the whole resized picture had been mirrored before the crop: what is cut off on the left is counted on
    the right then. SDXL is told this (Podell et al. 2023, section 2.2).
    """
    key, (width, height) = transform_key(spec, row, position, seed), size_of(spec, row)
    right = resized(row, (width, height))[0] - width - key.left
    left = right if key.flip else key.left
    return row.height, row.width, key.top, left, height, width


def pixels(image: Image.Image, spec: DataSpec, position: int, seed: int) -> torch.Tensor:
    """Scale, crop, maybe mirror: (3, H, W) float32 in [-1, 1], square unless there are buckets. `image` is RGB."""
    flip, top, left = transform_key(spec, image, position, seed)
    width, height = size_of(spec, image)
    whole = resized(image, (width, height))
    if whole != image.size:
        image = image.resize(whole, Image.Resampling[spec.image_interpolation_mode.upper()])
    image = image.crop((left, top, left + width, top + height))
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
