"""A cache, in memory or on disk, changes no result, and what lies on disk is never trusted unseen."""

import os
import warnings

import pytest
import torch
from PIL import Image

from lora_nb import data, disk_cache
from lora_nb.cache import Cache
from lora_nb.config import DataSpec, LoraSpec
from lora_nb.disk_cache import DiskCache
from lora_nb.families import REGISTRY, load_family, tiny
from lora_nb.trainer import train


def entries():
    return sorted(disk_cache.folder().rglob("*.safetensors"))


def losses(config, **changes):
    return [step.loss for step in train(config.replace(overwrite=True, **changes))]


@pytest.fixture
def counted(monkeypatch):
    """Numbers of what was encoded, by kind."""
    counts = {"moments": 0, "text_states": 0}

    def counting(name):
        method = getattr(REGISTRY["sd"], name)

        def call(*arguments):
            counts[name] += 1
            return method(*arguments)

        monkeypatch.setattr(REGISTRY["sd"], name, call)

    for name in counts:
        counting(name)
    return counts


def test_losses_are_equal_without_a_cache_with_one_and_from_the_disk(config, counted):
    config = config.replace(random_flip=True, max_train_steps=6)
    none = losses(config, cache_latents=False, cache_to_disk=False)
    memory = losses(config, cache_to_disk=False)
    assert entries() == []
    written = losses(config)
    before = dict(counted)
    read = losses(config)
    assert none == memory == written == read
    assert counted == before
    assert len(entries()) > 8


def test_an_entry_has_the_very_bits(tiny_sd, pictures):
    family, spec = load_family("sd", str(tiny_sd)), DataSpec(str(pictures), resolution=16)
    set_ = data.load(spec)
    plain = Cache(family, set_, spec, 5, latents=False, captions=False).batch([0, 1, 2])
    for _ in range(2):
        stored = Cache(family, set_, spec, 5, disk=DiskCache(family)).batch([0, 1, 2])
        for ours, theirs in zip(stored.moments, plain.moments, strict=True):
            assert torch.equal(ours, theirs)
        expected = family.text_states(plain.captions)["encoder_hidden_states"]
        torch.testing.assert_close(stored.text_states["encoder_hidden_states"], expected)


def test_runs_that_differ_only_in_training_share_all_entries(config, counted):
    losses(config, max_train_steps=8)
    kept, before = entries(), dict(counted)
    losses(config, max_train_steps=8, lora={"unet": LoraSpec(rank=4)}, learning_rate=1e-3, seed=9)
    assert entries() == kept
    assert counted == before


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 24},
        {"image_interpolation_mode": "nearest"},
        {"center_crop": True, "resolution": 8},
        {"mixed_precision": "bf16"},
    ],
)
def test_other_settings_do_not_find_these_entries(config, change):
    losses(config)
    kept = entries()
    fresh = losses(config, cache_to_disk=False, **change)
    assert losses(config, **change) == fresh
    assert len(entries()) > len(kept)


def test_another_autoencoder_tokenizer_or_picture_is_another_entry(tiny_sd, pictures, tmp_path):
    family = load_family("sd", str(tiny_sd))
    mark = DiskCache(family).mark
    assert DiskCache(load_family("sd", str(tiny_sd))).mark == mark
    weight = family.vae.encoder.conv_out.weight
    weight.data[0, 0] += 1e-3
    assert DiskCache(family).mark != mark
    weight.data[0, 0] = load_family("sd", str(tiny_sd)).vae.encoder.conv_out.weight[0, 0]
    assert DiskCache(family).mark == mark
    family.unet.conv_in.weight.data += 1  # the network encodes nothing
    assert DiskCache(family).mark == mark
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # convolutions then differ in their last bits
    assert DiskCache(family).mark != mark
    torch.set_num_threads(threads)
    family.tokenizer.add_tokens(["<new>"])
    assert DiskCache(family).mark != mark
    other = tiny.build("sd", tmp_path / "other", seed=1)
    assert DiskCache(load_family("sd", str(other))).mark != mark


def test_a_changed_picture_is_encoded_anew_under_the_same_name(tiny_sd, tmp_path):
    family, spec = load_family("sd", str(tiny_sd)), DataSpec(str(tmp_path), resolution=16)
    (tmp_path / "a.txt").write_text("a")
    batches = []
    for colour in ((0, 0, 0), (255, 0, 0)):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "a.png")
        set_ = data.load(spec)
        stored = Cache(family, set_, spec, 5, disk=DiskCache(family)).batch([0]).moments[0]
        assert torch.equal(stored, Cache(family, set_, spec, 5).batch([0]).moments[0])
        batches.append(stored)
    assert not torch.equal(*batches)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_said_once_and_computed_again(config, damage):
    whole = losses(config)
    for path in entries():
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-5] ^= 1
        path.write_bytes({"cut": content[:-9], "empty": b"", "other": b"text"}.get(damage, content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert losses(config) == whole
    said = [str(w.message) for w in caught if "damaged" in str(w.message)]
    assert len(said) == 1
    assert "computed again" in said[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk = DiskCache(load_family("sd", config.pretrained_model_name_or_path))
        assert disk.get("caption", "colour 0") is not None


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root writes anywhere")
def test_a_cache_folder_that_cannot_be_written_costs_only_time(config):
    disk_cache.folder().mkdir(parents=True)
    disk_cache.folder().chmod(0o500)
    assert losses(config) == losses(config, cache_to_disk=False)


def test_a_full_disk_costs_only_time(config, monkeypatch):
    monkeypatch.setattr(disk_cache, "free_megabytes", lambda folder: 5.0)
    assert losses(config) == losses(config, cache_to_disk=False)
    assert entries() == []


def test_clearing_gives_the_room_back(config):
    losses(config)
    size = sum(path.stat().st_size for path in entries())
    assert disk_cache.clear() == size > 0
    assert entries() == []
    assert disk_cache.clear() == 0


def test_beyond_the_bound_in_memory_entries_are_read_each_time(tiny_sd, pictures, monkeypatch):
    monkeypatch.setattr("lora_nb.cache.IN_MEMORY", 0)
    family, spec = load_family("sd", str(tiny_sd)), DataSpec(str(pictures), resolution=16)
    cache = Cache(family, data.load(spec), spec, 5, disk=DiskCache(family))
    first = cache.batch([0, 1])
    assert cache._encoded == {}
    assert cache._states == {}
    monkeypatch.setattr(family, "moments", None)
    for ours, theirs in zip(cache.batch([0, 1]).moments, first.moments, strict=True):
        assert torch.equal(ours, theirs)


def test_a_text_encoder_that_trains_leaves_no_captions_on_the_disk(config):
    part = {"text_encoder": LoraSpec(rank=2)}
    plain = losses(config, lora=part, cache_to_disk=False)
    assert losses(config, lora=part) == plain
    disk = DiskCache(load_family("sd", config.pretrained_model_name_or_path))
    assert disk.get("caption", "colour 0") is None


def test_random_crops_are_cached_only_where_their_number_is_bounded(tiny_sd, tmp_path, counted):
    Image.effect_mandelbrot((40, 24), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    family = load_family("sd", str(tiny_sd))
    for crops, most in ((None, 12), (3, 3)):
        spec = DataSpec(str(tmp_path), resolution=16, random_crops=crops)
        cache, before = Cache(family, data.load(spec), spec, 5), counted["moments"]
        for position in range(12):
            cache.batch([position])
        assert counted["moments"] - before == most
        assert cache.encoded_each_time == (crops is None)
    places = {data.transform_key(spec, data.load(spec).rows[0], p, 5) for p in range(200)}
    assert len(places) == 3


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_family_reads_back_what_it_wrote(name, pictures, tmp_path):
    family = load_family(name, str(tiny.build(name, tmp_path / name)))
    spec = DataSpec(str(pictures), resolution=getattr(family, "resolution", 16))
    set_ = data.load(spec)
    first, second = (
        Cache(family, set_, spec, 5, disk=DiskCache(family)).batch([0, 1]) for _ in range(2)
    )
    plain = Cache(family, set_, spec, 5, latents=False).batch([0, 1])
    for batch in (second, plain):
        for kind in ("picture_states", "text_states"):
            ours, theirs = getattr(first, kind), getattr(batch, kind)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert all(map(torch.equal, first.moments, batch.moments))
