"""Command-line flags derived from the config's fields, so that a new field is a new flag."""

import argparse
import dataclasses
import json
import sys
import types
import typing
from typing import Any

from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError

TEXT = "text_encoders"  # all text encoders that the family can train, alike
_LORA_FLAGS = {
    "rank": ("unet", "rank"),
    "lora_alpha": ("unet", "lora_alpha"),
    "target_modules": ("unet", "target_modules"),
    "lora_dropout": ("unet", "lora_dropout"),
    "text_encoder_rank": (TEXT, "rank"),
    "text_encoder_lora_alpha": (TEXT, "lora_alpha"),
    "text_encoder_target_modules": (TEXT, "target_modules"),
    "text_encoder_lr": (TEXT, "learning_rate"),
}
_ALIASES = {
    "validation_prompts": ["--validation_prompt"],
    "train_data_dir": ["--instance_data_dir"],  # the DreamBooth scripts' name
}
# Flags of the reference scripts that change nothing of what is learned here: they are taken, and answered.
_ANSWERED = {
    "cache_dir": (str, "downloads go where HF_HOME says; set that variable instead"),
    "local_rank": (int, "the launcher tells each process its rank"),
    "enable_xformers_memory_efficient_attention": (bool, "PyTorch's own fused attention is used"),
    "enable_npu_flash_attention": (bool, "PyTorch's own fused attention is used"),
    "debug_loss": (bool, "history.jsonl always has the loss of each picture"),
    "pre_compute_text_embeddings": (
        bool,
        "captions are always encoded once, unless their encoder trains",
    ),
    "prior_generation_precision": (
        str,
        "class pictures are drawn in the precision that suits the device",
    ),
    "tracker_project_name": (str, "the tracker's project is lora_nb"),
    "upcast_before_saving": (bool, "adapters are float32 all the time"),
    "prodigy_beta3": (str, "the optimizer is AdamW"),
    "prodigy_decouple": (str, "the optimizer is AdamW"),
    "prodigy_use_bias_correction": (str, "the optimizer is AdamW"),
    "prodigy_safeguard_warmup": (str, "the optimizer is AdamW"),
}
# What happens with the finished run, which no config knows: a token must not get into a file.
_SHARING = {
    "push_to_hub": (bool, "upload adapter, card, report and samples after training, privately"),
    "hub_model_id": (str, "where to: user/name [the name of output_dir]"),
    "hub_token": (str, "the Hub's token, used and forgotten [that of `hf auth login`]"),
}
# Flags that would change what is learned, and cannot be followed.
_REFUSED = {
    "tokenizer_name": (str, "the model's own tokenizer is used; leave it out"),
    "tokenizer_max_length": (
        int,
        "captions have the length that the model's own tokenizer says; leave it out",
    ),
    "text_encoder_use_attention_mask": (
        bool,
        "no family here masks captions that its pipeline does not mask",
    ),
    "class_labels_conditioning": (str, "it is for DeepFloyd IF, which is no family here"),
    "validation_images": (str, "it is for DeepFloyd IF's second stage, which is no family here"),
    "do_edm_style_training": (bool, "there is no EDM objective here; leave it out"),
    "use_dora": (bool, "adapters are plain LoRA here; leave it out"),
    "lora_layers": (str, "give the layers' names to target_modules, with spaces between them"),
    "lora_blocks": (str, "name the layers with their blocks in target_modules"),
    "repeats": (int, "pictures are drawn in endless epochs; say how long by max_train_steps"),
    "optimizer": (str, "the optimizer is AdamW, with use_8bit_adam in 8 bits"),
    "adam_weight_decay_text_encoder": (float, "all parts share adam_weight_decay"),
}
# What of these is done anyway.
_FOLLOWED = {"repeats": 1, "optimizer": "adamw"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each setting, in groups, with the dataclass's help and default."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file of settings (a run's config.json); flags win over it",
    )
    lora = parser.add_argument_group("adapters")
    spec_fields = {f.name: f for f in dataclasses.fields(LoraSpec)}
    hints = typing.get_type_hints(LoraSpec)
    for flag, (part, name) in _LORA_FLAGS.items():
        _add_flag(lora, flag, hints[name], spec_fields[name], f" ({part})")
    lora.add_argument(
        "--train_text_encoder", action="store_true", help="give the text encoders a LoRA too"
    )
    lora.add_argument(
        "--no_unet",
        action="store_true",
        help="leave the UNet (or the model's network) without LoRA",
    )
    for title, cls in (("data", DataSpec), ("training", TrainConfig)):
        group, hints = parser.add_argument_group(title), typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name not in ("lora", "data"):
                _add_flag(group, f.name, hints[f.name], f, "")
    _add_plain(parser.add_argument_group("sharing"), _SHARING)
    others = parser.add_argument_group(
        "flags of the reference scripts", "Taken and answered, or refused, in one sentence."
    )
    _add_plain(others, _ANSWERED | _REFUSED)


def _add_plain(group: Any, named: dict[str, tuple[type, str]]) -> None:
    """Flags that are no settings, absent unless they were typed."""
    for name, (kind, text) in named.items():
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        how |= {"action": "store_true"} if kind is bool else {"type": kind, "metavar": "VALUE"}
        group.add_argument(f"--{name}", **how)


def _add_flag(group: Any, flag: str, hint: Any, f: dataclasses.Field, note: str) -> None:
    """One flag; its default is SUPPRESS so that only what was typed overrides a --config file."""
    kind = (
        next((a for a in typing.get_args(hint) if a is not type(None)), hint)
        if _optional(hint)
        else hint
    )
    default = "" if f.default is None or f.default == () else f" [{f.default}]"
    common: dict[str, Any] = {
        "dest": flag,
        "default": argparse.SUPPRESS,
        "help": (f.metadata["help"] + note + default).replace("%", "%%"),
    }
    names = [f"--{flag}", *_ALIASES.get(flag, [])]
    if kind is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
    elif typing.get_origin(kind) is tuple:
        group.add_argument(*names, nargs="+", metavar="TEXT", **common)
    else:
        group.add_argument(
            *names, type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind], **common
        )


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def from_flags(namespace: argparse.Namespace, base: dict[str, Any] | None = None) -> TrainConfig:
    """The config of parsed flags over a --config file over `base` (a plain dictionary)."""
    given = dict(vars(namespace))
    for name in [name for name in given if name in _FOLLOWED]:
        value = given[name].lower() if isinstance(given[name], str) else given[name]
        if value == _FOLLOWED[name]:
            given.pop(name)
    for name in [name for name in given if name in _REFUSED]:
        raise ConfigError(f"--{name} cannot be followed: {_REFUSED[name][1]}.")
    for name in [name for name in given if name in _ANSWERED]:
        given.pop(name)
        print(f"--{name} does nothing here: {_ANSWERED[name][1]}.", file=sys.stderr)
    for name in [name for name in _SHARING if name in given and "push_to_hub" not in given]:
        print(f"--{name} does nothing here without --push_to_hub.", file=sys.stderr)
    values = dict(base or {})
    if path := given.pop("config", None):
        try:
            with open(path, encoding="utf-8") as file:
                loaded = json.load(file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The config file {path} cannot be read ({error}); give a JSON file."
            ) from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"The config file {path} must hold one JSON object of settings.")
        values |= loaded
    lora = {part: dict(spec) for part, spec in values.get("lora", {"unet": {}}).items()}
    if given.pop("train_text_encoder", False):
        _give_text_encoders(lora, given)
    if given.pop("no_unet", False):
        lora.pop("unet", None)
    for flag, (part, name) in _LORA_FLAGS.items():
        if flag in given:
            parts = _text_parts(lora) if part == TEXT else [p for p in lora if p == part]
            if not parts:
                how = "add --train_text_encoder" if part == TEXT else "leave out --no_unet"
                raise ConfigError(
                    f"--{flag} is for the {part.replace('_', ' ')}, without LoRA here; {how}."
                )
            value = given.pop(flag)
            for each in parts:
                lora[each][name] = value
    data_names = {f.name for f in dataclasses.fields(DataSpec)}
    train_names = {f.name for f in dataclasses.fields(TrainConfig)}
    data = dict(values.get("data", {})) | {k: v for k, v in given.items() if k in data_names}
    values |= {k: v for k, v in given.items() if k in train_names}
    return TrainConfig.from_dict(values | {"lora": lora, "data": data})


def _text_parts(lora: dict[str, Any]) -> list[str]:
    return [part for part in lora if part.startswith("text_encoder")]


def _give_text_encoders(lora: dict[str, Any], given: dict[str, Any]) -> None:
    """Text encoders start with the rank and dropout of the network, as in the reference scripts."""
    if not _text_parts(lora):
        same = {"rank": LoraSpec().rank} | given
        lora[TEXT] = {name: same[name] for name in ("rank", "lora_dropout") if name in same}
