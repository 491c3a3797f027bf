"""The model families by name, and how to tell which one a base model is."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from lora_nb.config import TrainConfig
from lora_nb.errors import ConfigError, ModelError
from lora_nb.families.base import Batch, Family, move, network
from lora_nb.families.flux import Flux
from lora_nb.families.kandinsky_decoder import KandinskyDecoder
from lora_nb.families.kandinsky_prior import KandinskyPrior
from lora_nb.families.quantized import quantize
from lora_nb.families.sd import StableDiffusion
from lora_nb.families.sd3 import StableDiffusion3
from lora_nb.families.sdxl import StableDiffusionXL
from lora_nb.families.wuerstchen import Wuerstchen
from lora_nb.families.z_image import ZImage

REGISTRY: dict[str, type] = {
    family.name: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusion3,
        Flux,
        ZImage,
        KandinskyDecoder,
        KandinskyPrior,
        Wuerstchen,
    )
}

# Settings of a run that only some families know.
NOT_FOR_ALL = (
    *("vae", "prior", "decoder", "image_encoder_file", "prediction_type", "snr_floor"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs"),
    *("max_sequence_length", "training_guidance_scale"),
)

__all__ = ["REGISTRY", "Batch", "Family", "family_of", "guess", "load_family", "network"]


def guess(model: str, revision: str | None = None) -> str:
    """The family name of a diffusers folder or Hub model, read from its model_index.json.

    Raises ModelError if there is no such folder, no index in it, or no family for its pipeline class.
    """
    index = _index(model, revision)
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{index} is no diffusers index ({error}); give a folder saved by diffusers."
        ) from error
    for name, family in REGISTRY.items():
        if family.pipeline_class.__name__ == kind:
            return name
    known = ", ".join(
        f"{name} ({family.pipeline_class.__name__})" for name, family in REGISTRY.items()
    )
    raise ModelError(f"{model} is a {kind}, for which there is no family here; there are: {known}.")


def _index(model: str, revision: str | None) -> Path:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"The folder {model} holds no model_index.json, so it is no diffusers base model; "
                "give the folder that contains unet/, vae/ and model_index.json."
            )
        return folder / "model_index.json"
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"There is no base model folder {model}; check the path, or give a Hub name owner/model."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "model_index.json", revision=revision))
    except (
        Exception
    ) as error:  # the Hub client raises a dozen kinds: offline, gated, absent, timeouts
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The base model {model} is neither a folder here nor reachable on the Hub ({reason}); "
            "check the name, your network and, for gated models, your token."
        ) from error


def _options(family: type) -> set[str]:
    """The names that the `load` of a family and of its ancestors takes."""
    loads = [vars(cls)["load"].__func__ for cls in family.__mro__ if "load" in vars(cls)]
    return {name for load in loads for name in inspect.signature(load).parameters}


def load_family(name: str, model: str, **options: Any) -> Family:
    """Load a base model as a family; name "auto" reads the family from the model's index.

    options: dtype, device, prediction_type, snr_gamma, revision, variant, and what the family's `load` names besides;
    None is the family's default. base_model_precision: "int8" or "nf4" quantizes the network's linear layers.
    Raises ModelError if the name is unknown or the folder is no complete model of that family, ConfigError for an
    option that the family has no use for.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if name == "auto":
        name = guess(model, options.get("revision"))
    if name not in REGISTRY:
        raise ModelError(
            f"There is no family {name!r}; choose one of {', '.join(REGISTRY)} or auto."
        )
    if guess(model, options.get("revision")) != name:
        raise ModelError(f"{model} is not of the family {name!r}; leave family at auto.")
    taken = _options(REGISTRY[name])
    if useless := [key for key in NOT_FOR_ALL if key in options and key not in taken]:
        raise ConfigError(
            f"The family {name!r} has no use for {', '.join(useless)}; leave that setting empty."
        )
    kind, device = options.pop("base_model_precision", None), options.get("device", "cpu")
    if kind:
        # Quantized on its way to the device, where the whole may not fit.
        family = load_family(name, model, **options | {"device": "cpu"})
        quantize(network(family), kind, device)
        move(family, device)
        return family
    try:
        return REGISTRY[name].load(model, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The base model {model} is incomplete or damaged ({reason}); get it again."
        ) from error


def family_of(config: TrainConfig, dtype: torch.dtype, device: str | torch.device) -> Family:
    """The base model of a run, loaded with all that the config says of it; errors as for `load_family`.

    Raises ConfigError if the config names no base model.
    """
    if config.pretrained_model_name_or_path is None:
        raise ConfigError(
            "pretrained_model_name_or_path is empty; name a diffusers folder or a Hub model, "
            "or take a preset: lora_nb.preset('tiny').config('my-run')."
        )
    return load_family(
        config.family,
        config.pretrained_model_name_or_path,
        dtype=dtype,
        device=device,
        prediction_type=config.prediction_type,
        snr_gamma=config.snr_gamma,
        snr_floor=config.snr_floor or None,
        base_model_precision=config.base_model_precision,
        revision=config.revision,
        variant=config.variant,
        vae=config.pretrained_vae_model_name_or_path,
        prior=config.pretrained_prior_model_name_or_path,
        decoder=config.pretrained_decoder_model_name_or_path,
        image_encoder_file=config.image_encoder_file,
        weighting_scheme=config.weighting_scheme,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        precondition_outputs=config.precondition_outputs,
        max_sequence_length=config.max_sequence_length,
        training_guidance_scale=config.training_guidance_scale,
    )
