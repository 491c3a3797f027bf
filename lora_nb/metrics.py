"""Measured numbers of pictures (colourfulness, distance, what a judge sees) and of series (difference, smoothing).

Pictures are PIL images, series are sequences of floats. The only model here is the judge that is handed in.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from PIL import Image

from lora_nb.errors import DataError
from lora_nb.judge import Judge


class Difference(NamedTuple):
    """Mean of paired differences with its standard error, both in the unit of the input."""

    mean: float
    standard_error: float


class Score(NamedTuple):
    """A mean over `count` pictures with the 95 % interval that so few pictures leave open."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f}, {self.count} pictures)"


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


def style_score(images: Sequence[Image.Image], style: str, judge: Judge) -> Score:
    """The share of pictures, 0 to 1, that the judge takes for `style` and not for any other style.

    Raises DataError for a style that the judge was not taught. Put judge.card beside the score: it says how
    often the judge is right about real drawings.
    """
    if style not in judge.styles:
        known = ", ".join(judge.styles)
        raise DataError(f"style_score: the judge does not know the style {style!r}, only {known}")
    found = judge.style_probabilities(images).argmax(axis=1) == judge.styles.index(style)
    return share(found)


def concept_score(
    images: Sequence[Image.Image], concepts: Sequence[str], judge: Judge, top: int = 5
) -> Score:
    """The share of pictures, 0 to 1, whose right name is among the judge's first `top` of all its names.

    concepts: the right name of each picture. Raises DataError for a name that the judge was not taught.
    """
    return share(judge.concept_ranks(images, concepts) <= top)


def subject_score(
    images: Sequence[Image.Image], subject: Sequence[Image.Image], judge: Judge
) -> Score:
    """How much the pictures look like those of one subject: mean cosine similarity, -1 to 1.

    As CLIP-I of DreamBooth (Ruiz et al. 2023, section 4.2), with the judge's features in place of CLIP's.
    The score of the subject's own pictures against each other is the most that can be hoped for.
    """
    similarity = judge.features(images) @ judge.features(subject).T
    return _score(similarity.mean(axis=1))


def drift(before: Sequence[Image.Image], after: Sequence[Image.Image], judge: Judge) -> Score:
    """How far training has moved what it should have left alone: mean cosine distance of pairs, 0 to 2.

    Picture i of both lists has the same prompt and seed, for example siblings of a DreamBooth subject.
    """
    if len(before) != len(after):
        raise DataError(
            f"drift: {len(before)} pictures before but {len(after)} after; they are compared in pairs"
        )
    similarity = (judge.features(before) * judge.features(after)).sum(axis=1)
    return _score(1 - similarity)


def share(found: Sequence[bool]) -> Score:
    """How often something was true, with Wilson's 95 % interval, which is right near 0 and 1 too.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    n, z = len(found), 1.959964
    if n == 0:
        raise DataError("share: needs at least one observation")
    p = float(np.mean(found))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Score(p, max(0.0, centre - reach), min(1.0, centre + reach), n)


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


def _score(values: np.ndarray) -> Score:
    low, high = bootstrap_interval(values)
    return Score(float(values.mean()), low, high, len(values))


def _thumbnail(image: Image.Image, size: int) -> np.ndarray:
    small = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(sqrt(np.mean((a - b) ** 2)))
