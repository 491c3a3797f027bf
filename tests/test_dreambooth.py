"""DreamBooth: one prompt for all pictures, class pictures drawn once, and the loss of both halves."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lora_nb import data, make_class_pictures
from lora_nb.cache import CLASS_POSITIONS, Cache, with_prior
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, DataError
from lora_nb.families import load_family
from lora_nb.loss import diffusion_loss
from lora_nb.trainer import train


@pytest.fixture
def config(tiny_sd, pictures, tmp_path) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd),
        data=DataSpec(train_data_dir=str(pictures), resolution=16, instance_prompt="a sks fox"),
        lora={"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2, learning_rate=1e-3)},
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        class_prompt="a fox",
        num_class_images=5,
        sample_batch_size=2,
        num_inference_steps=2,
        output_dir=str(tmp_path / "run"),
        seed=3,
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-2,
        lr_warmup_steps=0,
        checkpointing_steps=100,
    )


def bytes_of(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


def test_one_prompt_replaces_all_captions_and_the_report_says_so(config):
    loaded = data.load(config.data)
    assert {row.captions for row in loaded.rows} == {("a sks fox",)}
    assert "instance_prompt 'a sks fox' is used" in loaded.report.table()


def test_pictures_without_captions_need_only_the_prompt(config, pictures, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in sorted((Path(pictures) / "train").glob("*.png"))[:3]:
        (bare / file.name).write_bytes(file.read_bytes())
    spec = dataclasses.replace(config.data, train_data_dir=str(bare))
    assert len(data.load(spec)) == 3
    with pytest.raises(DataError, match="no captions"):
        data.load(dataclasses.replace(spec, instance_prompt=None))


def test_class_pictures_are_drawn_once_and_an_interrupted_call_goes_on(config):
    made = make_class_pictures(config)
    assert len(made) == 5
    before = bytes_of(config.class_data_dir)
    assert make_class_pictures(config) == []
    made[1].unlink()
    made[3].unlink()
    assert make_class_pictures(config) == [made[1], made[3]]
    assert bytes_of(config.class_data_dir) == before  # picture i is a function of i


def test_pictures_of_ones_own_count(config, pictures):
    folder = Path(config.class_data_dir)
    folder.mkdir()
    for file in sorted((Path(pictures) / "train").glob("*.png"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    assert len(make_class_pictures(config)) == 2


def test_too_few_class_pictures_are_refused_before_training(config):
    with pytest.raises(DataError, match=r"holds 0 of 5 class pictures; .*make_class_pictures"):
        train(config)


@pytest.mark.parametrize("missing", ["class_prompt", "class_data_dir"])
def test_prior_preservation_says_what_it_needs(config, missing):
    with pytest.raises(ConfigError, match=f"needs {missing}"):
        config.replace(**{missing: None}).validate()


@pytest.mark.parametrize("snr_gamma", [None, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_is_instance_plus_weight_times_class(config, weight, snr_gamma):
    make_class_pictures(config)
    family = load_family("auto", config.pretrained_model_name_or_path, snr_gamma=snr_gamma)
    classes = DataSpec(config.class_data_dir, resolution=16, instance_prompt="a fox")
    caches = [Cache(family, data.load(spec), spec, seed=3) for spec in (config.data, classes)]
    instance, prior = caches[0].batch([0, 1, 2]), caches[1].class_batch([0, 1, 2])
    joined = with_prior(instance, prior, weight)
    assert joined.captions == ["a sks fox"] * 3 + ["a fox"] * 3
    assert min(prior.positions) >= CLASS_POSITIONS
    a, b, both = (diffusion_loss(family, batch) for batch in (instance, prior, joined))
    torch.testing.assert_close(both.per_image, torch.cat([a.per_image, b.per_image]))
    torch.testing.assert_close(both.loss, a.loss + weight * b.loss)  # each half with its own SNR


def test_class_pictures_change_what_is_learned_and_resume_is_exact(config):
    make_class_pictures(config)
    losses = [step.loss for step in train(config)]
    without = config.replace(with_prior_preservation=False, output_dir=config.output_dir + "-alone")
    assert losses != [step.loss for step in train(without)]
    parts = config.replace(output_dir=config.output_dir + "-parts")
    training = train(parts)
    first = []
    for step in training:
        first.append(step.loss)
        if step.step == 2:
            break
    assert first + [step.loss for step in train(parts)] == losses


def test_other_class_pictures_are_another_run(config):
    make_class_pictures(config)
    for step in train(config):
        if step.step == 2:
            break
    victim = sorted(Path(config.class_data_dir).iterdir())[0]
    victim.write_bytes(sorted(Path(config.class_data_dir).iterdir())[1].read_bytes())
    with pytest.raises(Exception, match="not those that"):
        train(config)
