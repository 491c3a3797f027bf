"""Measured numbers of pictures (colourfulness, distance) and of series (difference, smoothing).

No model is called here. Pictures are PIL images, series are sequences of floats.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from PIL import Image

from lora_nb.errors import DataError


class Difference(NamedTuple):
    """Mean of paired differences with its standard error, both in the unit of the input."""

    mean: float
    standard_error: float


class Nearest(NamedTuple):
    """Position of the closest picture in the list searched, and its distance."""

    index: int
    distance: float


def colourfulness(image: Image.Image) -> float:
    """How colourful a picture looks: 0 for grey, about 15 slightly, 45 averagely, 110 extremely.

    Source: Hasler & Suesstrunk, Measuring colourfulness in natural images (2003), the metric M3
    over 8-bit RGB.
    """
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def picture_distance(a: Image.Image, b: Image.Image, size: int = 64) -> float:
    """Root mean square difference of two pictures: 0 for equal, 1 for black against white.

    Both are first shrunk to size x size, so that pictures of different resolution compare and a
    shift by a pixel weighs little.
    """
    return _distance(_thumbnail(a, size), _thumbnail(b, size))


def nearest_picture(image: Image.Image, pictures: Sequence[Image.Image], size: int = 64) -> Nearest:
    """The closest of `pictures` by `picture_distance`: a copy of a training picture shows as ~0."""
    if not pictures:
        raise DataError("nearest_picture: the list of pictures is empty; give at least one")
    thumbnail = _thumbnail(image, size)
    distances = [_distance(thumbnail, _thumbnail(other, size)) for other in pictures]
    index = int(np.argmin(distances))
    return Nearest(index, distances[index])


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of a - b and its standard error; pairing removes what both sides share.

    For probe losses: a = with the adapter, b = base model, on the same pictures, noise and
    timesteps. A mean below -3 standard errors is not luck.
    """
    if len(a) != len(b) or len(a) < 2:
        raise DataError(
            f"paired_difference: needs two series of one length of at least 2, got {len(a)} and "
            f"{len(b)}"
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return Difference(float(difference.mean()), float(difference.std(ddof=1) / sqrt(len(a))))


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean: what a few values say when their spread is not normal."""
    if len(values) < 2:
        raise DataError(f"bootstrap_interval: needs at least 2 values, got {len(values)}")
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def smooth(values: Sequence[float], beta: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start at zero as Adam corrects its moments.

    beta in [0, 1): 0 returns the values, 0.95 looks back about 20 of them. A series of one
    constant comes back as that constant.
    """
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * float(value)
        smoothed.append(average / (1 - beta**count))
    return smoothed


def _thumbnail(image: Image.Image, size: int) -> np.ndarray:
    small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(sqrt(np.mean((a - b) ** 2)))
