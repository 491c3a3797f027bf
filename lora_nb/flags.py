"""Command-line flags derived from the config's fields, so that a new field is a new flag."""

import argparse
import dataclasses
import json
import types
import typing
from typing import Any

from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError

_LORA_FLAGS = {
    "rank": ("unet", "rank"),
    "lora_alpha": ("unet", "lora_alpha"),
    "target_modules": ("unet", "target_modules"),
    "lora_dropout": ("unet", "lora_dropout"),
    "text_encoder_rank": ("text_encoder", "rank"),
    "text_encoder_lora_alpha": ("text_encoder", "lora_alpha"),
    "text_encoder_target_modules": ("text_encoder", "target_modules"),
    "text_encoder_lr": ("text_encoder", "learning_rate"),
}
_ALIASES = {"validation_prompts": ["--validation_prompt"]}


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
        "--train_text_encoder", action="store_true", help="give the text encoder a LoRA too"
    )
    lora.add_argument("--no_unet", action="store_true", help="leave the UNet without LoRA")
    for title, cls in (("data", DataSpec), ("training", TrainConfig)):
        group, hints = parser.add_argument_group(title), typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name not in ("lora", "data"):
                _add_flag(group, f.name, hints[f.name], f, "")


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
        lora.setdefault("text_encoder", {"rank": given.get("rank", LoraSpec().rank)})
    if given.pop("no_unet", False):
        lora.pop("unet", None)
    for flag, (part, name) in _LORA_FLAGS.items():
        if flag in given:
            if part not in lora:
                how = "--train_text_encoder" if part == "text_encoder" else "no --no_unet"
                raise ConfigError(
                    f"--{flag} is for the {part}, which gets no LoRA here; add {how}."
                )
            lora[part][name] = given.pop(flag)
    data_names = {f.name for f in dataclasses.fields(DataSpec)}
    train_names = {f.name for f in dataclasses.fields(TrainConfig)}
    data = dict(values.get("data", {})) | {k: v for k, v in given.items() if k in data_names}
    values |= {k: v for k, v in given.items() if k in train_names}
    return TrainConfig.from_dict(values | {"lora": lora, "data": data})
