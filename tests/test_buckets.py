"""Aspect-ratio buckets: sizes, an order that shows every picture equally often, and the same run after a restart."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lora_nb import data
from lora_nb.cache import Cache
from lora_nb.config import DataSpec
from lora_nb.data.buckets import Order, sizes
from lora_nb.errors import ConfigError
from lora_nb.families import load_family, tiny
from lora_nb.loss import diffusion_loss
from lora_nb.trainer import train

SHAPES = [(64, 32), (32, 64), (40, 40), (60, 31), (33, 66), (50, 49), (90, 40)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Seven pictures of three shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = []
    for i, shape in enumerate(SHAPES):
        Image.linear_gradient("L").resize(shape).convert("RGB").save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"shape {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def bucketed(config, mixed):
    return config.replace(
        train_data_dir=str(mixed), resolution=32, bucket_step=8, train_batch_size=2
    )


@given(st.integers(2, 40), st.sampled_from([8, 16, 64]))
def test_sizes_are_multiples_within_the_area(times, step):
    side = times * step
    found = sizes(side, step)
    assert (side, side) in found
    assert len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= side**2
        assert max(width, height) <= 4 * min(width, height)
        assert (height, width) in found


@given(
    st.lists(st.sampled_from([(8, 8), (8, 16), (16, 8)]), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(0, 5),
)
def test_every_epoch_is_a_permutation_and_batches_are_of_one_size(row_sizes, batch, seed):
    n, order = len(row_sizes), Order(row_sizes, batch, seed)
    shown = [order.row_at(p) for p in range(12 * n)]
    for epoch in range(12):
        assert sorted(shown[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert [Order(row_sizes, batch, seed).row_at(p) for p in reversed(range(12 * n))] == shown[::-1]
    # A batch is mixed only around the end of an epoch: there the sizes need not come out even.
    kinds = len(set(row_sizes))
    of_one_size = sum(
        len({row_sizes[row] for row in shown[start : start + batch]}) == 1
        for start in range(0, 12 * n, batch)
    )
    assert of_one_size >= 12 * n // batch - 12 * (kinds + 2)


def test_order_depends_on_the_seed_and_the_epoch():
    row_sizes = [(8, 8)] * 20 + [(8, 16)] * 20
    orders = {tuple(Order(row_sizes, 4, seed).row_at(p) for p in range(40)) for seed in range(5)}
    assert len(orders) == 5
    order = Order(row_sizes, 4, 0)
    assert [order.row_at(p) for p in range(40)] != [order.row_at(p) for p in range(40, 80)]


def test_pixels_have_the_size_of_the_bucket_and_little_is_cut_off(mixed):
    spec = DataSpec(str(mixed), resolution=32, bucket_step=8, center_crop=True)
    pictures = data.load(spec)
    for row in pictures.rows:
        width, height = data.size_of(spec, row)
        assert data.pixels(pictures.image(row.index), spec, 0, 0).shape == (3, height, width)
        square = min(row.width, row.height) / max(row.width, row.height)
        aspect, own = width / height, row.width / row.height
        assert min(aspect / own, own / aspect) >= max(square, 0.7)  # share of the picture seen


def test_geometry_tells_the_crop_and_size_of_the_bucket(mixed):
    spec = DataSpec(str(mixed), resolution=32, bucket_step=8, random_flip=True)
    row = data.load(spec).rows[6]  # 90 x 40
    width, height = data.size_of(spec, row)
    assert width > height
    for position in range(20):
        flip, top, left = data.transform_key(spec, row, position, 1)
        told = data.geometry(spec, row, position, 1)
        whole = max(width, int(height * 90 / 40))
        shown = whole - width - left if flip else left
        assert told == (40, 90, top, shown, height, width)


def test_without_buckets_nothing_changes(mixed):
    spec = DataSpec(str(mixed), resolution=32)
    rows = data.load(spec).rows
    assert {data.size_of(spec, row) for row in rows} == {(32, 32)}
    cache = Cache(None, data.load(spec), spec, 4)
    assert [cache.row_at(p) for p in range(14)] == [data.row_at(p, 7, 4) for p in range(14)]
    assert cache.by_size(list(range(5))) == [list(range(5))]


def test_a_mixed_batch_is_the_mean_over_its_pictures(bucketed):
    """Batches of seven of several sizes: the pieces' gradients and losses add up."""
    run = bucketed.replace(train_batch_size=7, max_train_steps=1)
    training = train(run)
    step = next(iter(training))
    assert len(step.per_image) == len(step.timesteps) == 7
    assert step.loss == pytest.approx(sum(step.per_image) / 7, rel=1e-5)


def test_a_bucketed_run_goes_on_exactly_and_caches_change_nothing(bucketed, tmp_path):
    bucketed = bucketed.replace(max_train_steps=9, checkpointing_steps=1)
    whole = [step.loss for step in train(bucketed)]
    again = bucketed.replace(output_dir=str(tmp_path / "again"))
    first = []
    for step in train(again):
        first.append(step.loss)
        if step.step == 4:
            break
    rest = [step.loss for step in train(again)]
    assert first + rest == whole
    plain = bucketed.replace(overwrite=True, cache_latents=False, cache_to_disk=False)
    assert [step.loss for step in train(plain)] == whole


def test_each_picture_is_trained_on_equally_often(bucketed):
    training = train(bucketed)
    seen = Counter(training.cache.row_at(p) for p in range(7 * 6))
    assert seen == dict.fromkeys(range(7), 6)


def test_the_probe_stays_square(bucketed, mixed, tmp_path):
    run = bucketed.replace(validation_data_dir=str(mixed), max_train_steps=1)
    training = train(run)
    list(training)
    assert training.held_out.spec.bucket_step is None
    assert training.last_probe.n == 7


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "z_image", "kandinsky_decoder"])
def test_other_families_take_pictures_that_are_not_square(name, mixed, tmp_path):
    family = load_family(name, str(tiny.build(name, tmp_path / name)))
    side = 8 * family.pixel_multiple
    spec = DataSpec(str(mixed), resolution=side, bucket_step=side // 4, center_crop=True)
    wide = Cache(family, data.load(spec), spec, 5)
    position = next(p for p in range(7) if wide.row_at(p) == 0)
    with torch.no_grad():
        assert torch.isfinite(diffusion_loss(family, wide.batch([position])).loss)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bucket_step": 9, "resolution": 36}, "bucket_step is 9"),
        ({"bucket_step": 4}, "at least 8"),
        ({"bucket_step": 24}, "multiple of bucket_step"),
        (
            {"with_prior_preservation": True, "class_data_dir": "x", "class_prompt": "a dog"},
            "cannot be combined",
        ),
        ({"random_crops": 0}, "random_crops"),
    ],
)
def test_impossible_buckets_are_refused(bucketed, change, words):
    with pytest.raises(ConfigError, match=words):
        train(bucketed.replace(**change))
