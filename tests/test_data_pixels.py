"""Pixels against Pillow by hand, purity of every random choice, tables against folders."""

import dataclasses
import io
import json
import pickle
import struct
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lora_nb.config import INTERPOLATIONS, DataSpec
from lora_nb.data import has_split, load, pixels, row_at, scan, to_image, transform_key
from lora_nb.data.decode import decode
from lora_nb.errors import DataError

CENTRE = DataSpec(resolution=32, center_crop=True)
RANDOM = DataSpec(resolution=32, random_flip=True)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **save) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


# Decoding


def test_exif_rotation_is_applied_once():
    image = noise(20, 12)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, save in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("TIFF", {})):
            data = encoded(image, kind, exif=exif, **save)
            upright = decode(data).image
            noted = [what for _, what, _ in decode(data).remarks]
            # Pillow turns a TIFF by itself
            assert noted == ["has an EXIF rotation"] * (orientation > 1 and kind != "TIFF")
            assert upright.size == ((20, 12) if orientation < 5 else (12, 20))
            plain = Image.open(io.BytesIO(encoded(image, kind, **save))).convert("RGB")
            turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
            by_hand = plain if turn is None else plain.transpose(Image.Transpose(turn))
            assert np.array_equal(np.array(upright), np.array(by_hand))


@pytest.mark.parametrize(
    ("image", "save", "colour"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),  # transparent red
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), {}, (255, 0, 0)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), {}, (204, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), {}, (255, 255, 255)),
        (Image.new("P", (4, 4), 0), {"transparency": 0}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), {"transparency": 7}, (255, 255, 255)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), {}, (7, 7, 7)),
        (Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    ],
)
def test_transparency_is_put_on_white(image, save, colour):
    rgb = decode(encoded(image, **save)).image
    assert rgb.mode == "RGB"
    assert {tuple(pixel) for pixel in np.array(rgb).reshape(-1, 3).tolist()} == {colour}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(kind):
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    grey = np.array(decode(encoded(Image.fromarray(ramp), kind)).image)
    assert np.abs(grey[..., 0] - ramp / 65535 * 255).max() <= 0.5
    assert abs(grey.mean() - 127.5) < 0.5
    assert (grey == grey[..., :1]).all()


def test_floats_are_scaled():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for values in (ramp, ramp * 255):
        grey = np.array(decode(encoded(Image.fromarray(values), "TIFF")).image)
        assert np.array_equal(grey[..., 0].ravel(), np.arange(256))


def paper_profile() -> bytes:
    """An ICC profile of a printer that has black ink only: Lab L = 100 (1 - K), whatever C, M and Y are."""
    identity = bytes(range(256))
    cells = b"".join(bytes([255 * (1 - i % 2), 128, 128]) for i in range(16))  # K varies fastest
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + cells + identity * 3
    start = 128 + 4 + 12
    head = struct.pack(
        ">I4sI4s4s4s", start + len(table), b"test", 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", start, len(table)) + table


def test_cmyk_with_and_without_a_profile():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert decode(encoded(image, "TIFF")).image.getpixel((0, 0)) == (255, 0, 0)
    printed = decode(encoded(image, "TIFF", icc_profile=paper_profile())).image
    assert printed.getpixel((0, 0)) == (255, 255, 255)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with pytest.raises(Exception, match="decoded"):  # an RGB profile on a CMYK picture
        decode(encoded(image, "TIFF", icc_profile=profile))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).image.getpixel((0, 0)) == (255, 0, 0)


# Pixels


@pytest.mark.parametrize("mode", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (48, 64), (33, 100), (20, 20), (50, 17)])
def test_resize_and_centre_crop_against_pillow(mode, size):
    image = noise(*size)
    spec = dataclasses.replace(CENTRE, image_interpolation_mode=mode)
    scale = 32 / min(size)
    full = tuple(32 if side == min(size) else int(side * scale + 1e-9) for side in size)
    by_hand = image.resize(full, Image.Resampling[mode.upper()])
    left, top = round((full[0] - 32) / 2), round((full[1] - 32) / 2)
    by_hand = np.array(by_hand)[top : top + 32, left : left + 32]
    values = pixels(image, spec, 0, 0)
    assert values.shape == (3, 32, 32)
    assert values.dtype == torch.float32
    expected = (
        torch.tensor(by_hand).permute(2, 0, 1) / 255 - 0.5
    ) / 0.5  # ToTensor and Normalize([0.5], [0.5])
    assert torch.equal(values, expected)
    assert np.array_equal(np.array(to_image(values)), by_hand)


def test_pixel_range_and_way_back():
    steps = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    values = pixels(steps, DataSpec(resolution=16), 0, 0)
    assert (values.min(), values.max()) == (-1, 1)
    assert np.array_equal(np.array(to_image(values)), np.array(steps))
    assert to_image(torch.full((3, 2, 2), 9.0)).getpixel((0, 0)) == (255, 255, 255)


def test_flip_and_crop_are_what_the_key_says():
    image = noise(48, 32)
    whole = np.array(image)
    for position in range(40):
        flip, top, left = transform_key(RANDOM, image, position, 7)
        by_hand = whole[top : top + 32, left : left + 32]
        by_hand = by_hand[:, ::-1] if flip else by_hand
        assert np.array_equal(np.array(to_image(pixels(image, RANDOM, position, 7))), by_hand)


def test_keys_cover_flips_and_crops_evenly():
    keys = [transform_key(RANDOM, noise(36, 32), p, 0) for p in range(2000)]
    assert abs(sum(k.flip for k in keys) / 2000 - 0.5) < 0.05
    lefts = Counter(k.left for k in keys)
    assert set(lefts) == {0, 1, 2, 3, 4}
    assert min(lefts.values()) > 320
    assert {k.top for k in keys} == {0}
    square = {transform_key(DataSpec(resolution=32), noise(64, 64), p, 0) for p in range(50)}
    assert square == {(False, 0, 0)}  # nothing random: one entry in a cache


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    resolution=st.sampled_from([8, 31, 64]),
    position=st.integers(0, 10**9),
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(INTERPOLATIONS),
)
def test_any_picture_fills_the_square(width, height, resolution, position, seed, mode):
    spec = DataSpec(resolution=resolution, random_flip=True, image_interpolation_mode=mode)
    image = Image.new("RGB", (width, height), "white")
    values = pixels(image, spec, position, seed)
    assert values.shape == (3, resolution, resolution)
    assert values.min() == 1  # a crop beyond the edge would be black there
    key = transform_key(spec, image, position, seed)
    assert key == transform_key(spec, image, position, seed)
    short, long = sorted((width, height))
    assert 0 <= max(key.top, key.left) <= int(resolution * long / short) - resolution


# Order and captions


@given(n=st.integers(1, 50), seed=st.integers(0, 1000), epoch=st.integers(0, 1000))
def test_each_epoch_shows_each_row_once(n, seed, epoch):
    rows = [row_at(epoch * n + i, n, seed) for i in range(n)]
    assert sorted(rows) == list(range(n))


def test_order_depends_on_position_alone():
    straight = [row_at(p, 10, 3) for p in range(200)]
    assert [row_at(p, 10, 3) for p in reversed(range(200))] == straight[::-1]
    assert straight[:10] != straight[10:20]
    assert straight != [row_at(p, 10, 4) for p in range(200)]


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    rows = [
        {"file_name": "0.png", "text": ["a red cat", "a cat"], "concept": "cat"},
        {"file_name": "1.jpg", "text": ["a dog"], "concept": "dog"},
        {"file_name": "2.png", "text": ["a fish, blue"], "concept": "fish"},
    ]
    for i, row in enumerate(rows):
        noise(40 + i, 36, i).save(path / row["file_name"])
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_captions_by_counter(tmp_path):
    spec = DataSpec(train_data_dir=str(folder(tmp_path / "set")), resolution=32)
    pictures = load(spec)
    drawn = [pictures.caption(0, p, 1) for p in range(400)]
    assert drawn == [pictures.caption(0, p, 1) for p in range(400)]
    counts = Counter(drawn)
    assert set(counts) == {"a red cat", "a cat"}
    assert min(counts.values()) > 150
    assert {pictures.caption(1, p, 1) for p in range(20)} == {"a dog"}
    dropped = load(dataclasses.replace(spec, caption_dropout=0.25))
    share = sum(dropped.caption(1, p, 1) == "" for p in range(1000)) / 1000
    assert abs(share - 0.25) < 0.05
    kept = [(dropped.caption(0, p, 1), c) for p, c in enumerate(drawn)]
    assert all(a in ("", b) for a, b in kept)  # dropout does not disturb the choice
    assert {b for a, b in kept if a == ""} == set(counts)  # nor does it prefer one caption
    always = load(dataclasses.replace(spec, caption_dropout=1.0))
    assert {always.caption(0, p, 1) for p in range(50)} == {""}


def test_rows_and_pictures(tmp_path):
    pictures = load(DataSpec(train_data_dir=str(folder(tmp_path / "set")), resolution=32))
    assert len(pictures) == 3
    row = pictures.rows[1]
    assert (row.index, row.name, row.caption, row.width, row.height) == (
        1,
        "1.jpg",
        "a dog",
        41,
        36,
    )
    assert row.file == tmp_path / "set" / "1.jpg"
    assert row.extra == {"concept": "dog"}
    assert pictures.image(0).size == (40, 36)
    again = pickle.loads(pickle.dumps(pictures))  # what a spawned worker gets
    assert np.array_equal(np.array(again.image(2)), np.array(pictures.image(2)))


# Tables


def parquet(source: Path, target: Path) -> Path:
    """The folder as a parquet data set with the same bytes and captions."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    table = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": (source / row["file_name"]).read_bytes(), "path": None} for row in rows
            ],
            "text": [row["text"] for row in rows],
            "concept": [row["concept"] for row in rows],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.List(datasets.Value("string")),
                "concept": datasets.Value("string"),
            }
        ),
    )
    target.mkdir()
    table.to_parquet(target / "train-00000-of-00001.parquet")
    return target


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_parquet_set_equals_its_folder(offline):
    here = load(DataSpec(train_data_dir=str(folder(offline / "set")), resolution=32))
    spec = DataSpec(dataset_name=str(parquet(offline / "set", offline / "table")), resolution=32)
    there = load(spec)
    assert there.fingerprint == here.fingerprint
    assert [r.captions for r in there.rows] == [r.captions for r in here.rows]
    assert [r.extra for r in there.rows] == [r.extra for r in here.rows]
    assert [(r.file, r.width) for r in there.rows] == [(None, 40), (None, 41), (None, 42)]
    for i in range(3):
        assert torch.equal(pixels(there.image(i), spec, i, 0), pixels(here.image(i), spec, i, 0))
    assert np.array_equal(
        np.array(pickle.loads(pickle.dumps(there)).image(0)), np.array(here.image(0))
    )
    assert has_split(spec, "train")
    assert not has_split(spec, "validation")
    with pytest.raises(DataError, match="no split 'validation', only train"):
        load(spec, "validation")
    held_out = dataclasses.replace(spec, validation_data_dir=str(offline / "set"))
    assert len(load(held_out, "validation")) == 3


def test_wrong_columns_and_rows_of_a_table(offline):
    name = str(parquet(folder(offline / "set").parent / "set", offline / "table"))
    spec = DataSpec(dataset_name=name, resolution=32, caption_column="txt", image_column="img")
    errors = scan(spec).errors
    assert [e.fix for e in errors] == [
        "set image_column to 'image'",
        "set caption_column to 'text'",
    ]
    assert "image, text, concept" in errors[0].what
    wrong = dataclasses.replace(spec, caption_column="text", image_column="concept")
    with pytest.raises(
        DataError, match="row 0"
    ):  # texts could be paths, but there are no such files
        load(wrong)
    with pytest.raises(DataError, match="cannot be loaded"):
        load(DataSpec(dataset_name=str(offline / "nowhere")))


def test_bad_rows_of_a_table_are_named_by_number(offline):
    secret = offline / "secret.png"
    noise(40, 40).save(secret)
    images = [
        {"bytes": encoded(noise(40, 40, 5)), "path": None},
        {"bytes": None, "path": str(secret)},
    ]
    images += [{"bytes": b"nonsense", "path": None}, None, images[0]]
    (offline / "table").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"image": [images[0]] * 5, "text": ["a", "b", "c", "d", None]}, features=features
    )
    raw = table.cast_column("image", datasets.Image(decode=False)).to_dict()
    raw["image"] = images
    datasets.Dataset.from_dict(raw, features=features).to_parquet(
        offline / "table" / "train.parquet"
    )
    report = scan(DataSpec(dataset_name=str(offline / "table"), resolution=32))
    assert [(e.where, e.what) for e in sorted(report.errors, key=lambda e: e.where)] == [
        ("row 1", "names a file outside the data set"),
        ("row 2", "is not a picture in one of the formats JPEG, PNG, WEBP, BMP, GIF, TIFF"),
        ("row 3", "has no picture"),
        ("row 4", "the caption is missing"),
    ]
    assert len(report.rows) == 1
