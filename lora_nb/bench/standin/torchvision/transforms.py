"""The picture transforms that the reference script composes, on PIL pictures."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    """Names of resampling filters."""

    NEAREST = "NEAREST"
    BILINEAR = "BILINEAR"
    BICUBIC = "BICUBIC"
    BOX = "BOX"
    HAMMING = "HAMMING"
    LANCZOS = "LANCZOS"


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = transforms

    def __call__(self, picture: Any) -> Any:
        for transform in self.transforms:
            picture = transform(picture)
        return picture


class Resize:
    """The shorter side becomes `size`, the longer one follows, rounded down."""

    def __init__(self, size: int, interpolation: InterpolationMode):
        self.size, self.filter = size, Image.Resampling[interpolation.value]

    def __call__(self, picture: Image.Image) -> Image.Image:
        short = min(picture.size)
        if short == self.size:
            return picture
        return picture.resize([int(self.size * side / short) for side in picture.size], self.filter)


class CenterCrop:
    """The square in the middle."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    """A square anywhere."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        room = [side - self.size + 1 for side in picture.size]
        left, top = (int(torch.randint(0, free, (1,))) for free in room)
        return picture.crop((left, top, left + self.size, top + self.size))


class RandomHorizontalFlip:
    """Mirrored with chance one half."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        if torch.rand(1) < 0.5:
            return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return picture


class Lambda:
    """Any function as a transform."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, picture: Any) -> Any:
        return self.function(picture)


class ToTensor:
    """(3, H, W) float32 in [0, 1]."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """(x - mean) / std, one number for all channels."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.sub(self.mean).div(self.std)
