"""metrics against closed formulas, numpy and statistics oracles."""

import statistics

import numpy as np
import pytest
from PIL import Image

from lora_nb.errors import DataError
from lora_nb.metrics import (
    bootstrap_interval,
    colourfulness,
    nearest_picture,
    paired_difference,
    picture_distance,
    share,
    smooth,
)


def noise_picture(seed: int, size: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_colourfulness_of_grey_is_zero_and_of_one_colour_is_the_mean_term():
    assert colourfulness(Image.new("RGB", (8, 8), (90, 90, 90))) == 0
    assert colourfulness(noise_picture(0).convert("L")) == 0
    # one colour: no spread; rg = 255, yb = 127.5, so M = 0.3 * sqrt(255^2 + 127.5^2)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert colourfulness(red) == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5)


def test_colourfulness_spread_term_by_hand():
    # half red, half cyan: rg = +-255, yb = 127.5 or -127.5; the means vanish
    picture = Image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 255, 255))
    assert colourfulness(picture) == pytest.approx((255**2 + 127.5**2) ** 0.5)


def test_picture_distance_scale_symmetry_and_resolution():
    black, white = Image.new("RGB", (16, 16)), Image.new("RGB", (40, 40), "white")
    assert picture_distance(black, black) == 0
    assert picture_distance(black, white) == pytest.approx(1)
    a, b = noise_picture(1, 64), noise_picture(2, 64)
    by_numpy = np.sqrt(np.mean(((np.float64(a) - np.float64(b)) / 255) ** 2))
    assert picture_distance(a, b) == pytest.approx(by_numpy) == picture_distance(b, a)


def test_nearest_picture_finds_a_noisy_copy():
    pictures = [noise_picture(seed) for seed in range(6)]
    copy = Image.fromarray(np.asarray(pictures[4]) // 2 + 64)
    index, distance = nearest_picture(copy, pictures)
    assert index == 4
    assert distance == picture_distance(copy, pictures[4]) < picture_distance(copy, pictures[3])
    with pytest.raises(DataError, match="empty"):
        nearest_picture(copy, [])


def test_paired_difference_is_the_textbook_one_and_pairing_matters():
    rng = np.random.default_rng(0)
    base = rng.exponential(1.0, 64)
    adapter = base - 0.01 + rng.normal(0, 0.005, 64)
    mean, error = paired_difference(adapter, base)
    differences = [a - b for a, b in zip(adapter, base, strict=True)]
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / 8)
    assert mean < -3 * error  # unpaired, the spread of the losses would drown it
    assert base.std(ddof=1) / 8 > abs(mean)
    for wrong in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(DataError):
            paired_difference(wrong, [1.0, 2.0][: len(wrong)])


def test_bootstrap_interval_covers_and_agrees_with_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.01)
    assert bootstrap_interval(values) == (low, high)


def test_smooth_keeps_constants_and_equals_the_weighted_mean():
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    values = np.random.default_rng(1).normal(size=7)
    assert smooth(values, 0) == pytest.approx(values)
    weights = 0.8 ** np.arange(6, -1, -1)
    assert smooth(values, 0.8)[-1] == pytest.approx((weights * values).sum() / weights.sum())
    assert smooth([]) == []


def test_share_is_wilsons_interval():
    # Wilson 1927 for 8 of 10: solutions of (p - 0.8)^2 = z^2 p (1 - p) / 10
    z = statistics.NormalDist().inv_cdf(0.975)
    low, high = sorted(np.roots([1 + z * z / 10, -(1.6 + z * z / 10), 0.64]))
    assert share([True] * 8 + [False] * 2) == pytest.approx((0.8, low, high, 10))


def test_share_of_all_or_none_still_leaves_doubt():
    assert share([1] * 20) == pytest.approx((1, 20 / (20 + 1.959964**2), 1, 20))
    assert share([0] * 20)[:2] == (0, 0)
    assert share([0] * 20).high > 0.1
    with pytest.raises(DataError, match="at least one"):
        share([])
