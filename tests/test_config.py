"""Configs: JSON both ways, unknown keys refused by name, flags derived from the fields."""

import argparse
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.flags import add_flags, from_flags


def parse(line: str, base: dict | None = None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(line.split()), base)


@given(
    rank=st.integers(1, 512),
    alpha=st.none() | st.floats(0.01, 512),
    prompts=st.lists(st.text(max_size=20), max_size=3),
    lr=st.floats(0, 1),
    resolution=st.integers(8, 2048),
)
def test_json_both_ways(rank, alpha, prompts, lr, resolution):
    config = TrainConfig(
        lora={
            "unet": LoraSpec(rank=rank, lora_alpha=alpha),
            "text_encoder": LoraSpec(target_modules=("q_proj",)),
        },
        data=DataSpec(resolution=resolution),
        validation_prompts=tuple(prompts),
        learning_rate=lr,
    )
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rat": 1e-3}, "learning_rate"),
        ({"data": {"resolutoin": 64}}, "resolution"),
        ({"lora": {"unet": {"ranks": 4}}}, "rank"),
        ({"lora": {"unet": {"rank": 0}}}, "rank of unet is 0"),
        ({"lora": {"unet": {"lora_alpha": 0}}}, "lora_alpha"),
        ({"lora": {"unet": {"lora_dropout": 1.0}}}, "lora_dropout"),
        ({"lora": {}}, "No part"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"max_train_steps": "20"}, "max_train_steps must be int"),
        ({"train_batch_size": True}, "train_batch_size must be int"),
        ({"snr_gamma": float("nan")}, "snr_gamma"),
        ({"lr_scheduler": "cosin"}, "cosine"),
        ({"mixed_precision": "fp8"}, "bf16"),
        ({"validation_prompts": "a fox"}, "list"),
        ({"data": {"caption_dropout": 1.5}}, "between 0 and 1"),
        ({"data": {"resolution": 4}}, "resolution"),
        ({"weighting_scheme": "cosmos"}, "cosmap"),
        ({"precondition_outputs": 2}, "precondition_outputs"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"training_guidance_scale": -1}, "training_guidance_scale"),
    ],
)
def test_wrong_values_are_refused_by_name(values, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict(values)


def test_not_json():
    with pytest.raises(ConfigError, match="line 1"):
        TrainConfig.from_json("{rank: 4}")


def test_defaults_are_the_reference_scripts():
    config = TrainConfig()
    reference = {
        "train_batch_size": 16, "num_train_epochs": 100, "gradient_accumulation_steps": 1, "learning_rate": 1e-4,
        "lr_scheduler": "constant", "lr_warmup_steps": 500, "adam_weight_decay": 1e-2, "max_grad_norm": 1.0,
        "checkpointing_steps": 500, "noise_offset": 0.0, "num_validation_images": 4,
        "output_dir": "sd-model-finetuned-lora", "snr_gamma": None, "prediction_type": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in reference} == reference
    assert (config.lora["unet"].rank, config.lora["unet"].scale, config.data.resolution) == (
        4,
        1.0,
        512,
    )


def test_every_field_has_a_flag_and_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for cls in (TrainConfig, DataSpec):
        for f in dataclasses.fields(cls):
            assert f.metadata["help"]
            assert f.name in ("lora", "data") or f"--{f.name}" in text


def test_flags_reach_their_fields():
    config = parse(
        "--rank 8 --lora_alpha 4 --train_text_encoder --text_encoder_lr 1e-5 --random_flip --no-center_crop "
        "--validation_prompt fox --max_train_steps 20 --train_data_dir pics --gradient_checkpointing"
    )
    assert config.lora["unet"] == LoraSpec(rank=8, lora_alpha=4)
    assert config.lora["text_encoders"] == LoraSpec(rank=8, learning_rate=1e-5)
    assert config.data == DataSpec(train_data_dir="pics", random_flip=True)
    assert (config.validation_prompts, config.max_train_steps, config.gradient_checkpointing) == (
        ("fox",),
        20,
        True,
    )


def test_flags_win_over_the_file_and_the_file_over_the_base(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(TrainConfig(learning_rate=1e-3, max_train_steps=7).to_json())
    config = parse(
        f"--config {file} --max_train_steps 9", base={"output_dir": "kept", "learning_rate": 5.0}
    )
    assert (config.max_train_steps, config.learning_rate) == (9, 1e-3)


def test_text_encoder_flags_need_the_text_encoder():
    with pytest.raises(ConfigError, match="--train_text_encoder"):
        parse("--text_encoder_rank 4")
    assert list(parse("--no_unet --train_text_encoder").lora) == ["text_encoders"]
    with pytest.raises(ConfigError, match="--no_unet"):
        parse("--no_unet --train_text_encoder --rank 4")


def test_text_encoder_flags_reach_each_text_encoder_of_a_file(tmp_path):
    file = tmp_path / "config.json"
    lora = {part: LoraSpec() for part in ("unet", "text_encoder", "text_encoder_2")}
    file.write_text(TrainConfig(lora=lora).to_json())
    config = parse(f"--config {file} --train_text_encoder --text_encoder_lr 1e-5")
    own = LoraSpec(learning_rate=1e-5)
    assert config.lora == {"unet": LoraSpec(), "text_encoder": own, "text_encoder_2": own}


def test_text_encoders_start_like_the_network():
    config = parse("--rank 8 --lora_dropout 0.1 --train_text_encoder")
    assert config.lora["text_encoders"] == config.lora["unet"] == LoraSpec(8, lora_dropout=0.1)
    assert parse("--train_text_encoder --text_encoder_rank 2").lora["text_encoders"].rank == 2


def test_replace_reaches_into_the_data():
    config = TrainConfig().replace(resolution=128, max_train_steps=3)
    assert (config.data.resolution, config.max_train_steps) == (128, 3)
    with pytest.raises(ConfigError, match="resolution"):
        config.replace(resolutions=1)


REFERENCE_FLAGS = """
allow_tf32 cache_dir caption_column center_crop checkpointing_steps checkpoints_total_limit class_data_dir
class_labels_conditioning class_prompt dataloader_num_workers dataset_config_name dataset_name debug_loss
do_edm_style_training enable_npu_flash_attention enable_xformers_memory_efficient_attention
gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token image_column image_interpolation_mode
instance_data_dir instance_prompt learning_rate local_rank logging_dir lora_dropout lr_num_cycles lr_power
cache_latents guidance_scale logit_mean logit_std lora_alpha lora_blocks lora_layers max_sequence_length mode_scale
precondition_outputs prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction
tracker_project_name upcast_before_saving validation_prompts weighting_scheme
lr_scheduler lr_warmup_steps max_grad_norm max_train_samples max_train_steps mixed_precision noise_offset
num_class_images num_train_epochs num_validation_images optimizer output_dir output_kohya_format
pre_compute_text_embeddings prediction_type pretrained_model_name_or_path pretrained_vae_model_name_or_path
prior_generation_precision prior_loss_weight push_to_hub random_flip rank repeats report_to resolution
resume_from_checkpoint revision sample_batch_size scale_lr seed snr_gamma text_encoder_lr
text_encoder_use_attention_mask tokenizer_max_length tokenizer_name train_batch_size train_data_dir
train_text_encoder use_8bit_adam use_dora validation_epochs validation_images validation_prompt variant
with_prior_preservation adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder
""".split()


def test_every_flag_of_the_reference_scripts_is_known():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    known = {
        option.removeprefix("--") for action in parser._actions for option in action.option_strings
    }
    assert set(REFERENCE_FLAGS) <= known


def test_flags_that_do_nothing_say_so_and_flags_that_cannot_be_followed_are_refused(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    plain = from_flags(parser.parse_args(["--train_data_dir", "x"]))
    answered = ["--instance_data_dir", "x", "--debug_loss", "--local_rank", "-1"]
    assert from_flags(parser.parse_args(answered)) == plain
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["--debug_loss", "--local_rank"]
    with pytest.raises(ConfigError, match="--use_dora cannot be followed: adapters are plain LoRA"):
        from_flags(parser.parse_args(["--use_dora"]))
    assert from_flags(parser.parse_args(["--optimizer", "AdamW", "--repeats", "1"])) == parse("")
    with pytest.raises(ConfigError, match="--optimizer cannot be followed"):
        from_flags(parser.parse_args(["--optimizer", "prodigy"]))
