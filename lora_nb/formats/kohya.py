"""Write a Kohya file, the form that ComfyUI, A1111 and sd-scripts read: UNet and text encoders in one file.

Their readers compute scale = alpha / rank in each layer. Where rank and alpha are the same all over a part, alpha says
the scale and B is stored as trained. Where they differ, some readers (diffusers 0.42 among them) take one layer's alpha
for another's, so there the scale is multiplied into B and alpha left out, which every reader takes for a scale of 1.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lora_nb.config import TrainConfig
from lora_nb.errors import FormatError
from lora_nb.families import Family
from lora_nb.families.names import KohyaLayout, compvis_name
from lora_nb.files import write_atomically
from lora_nb.formats.header import FAMILY, first
from lora_nb.formats.weights import Pair, Weights, refuse_infinite, weights_of_modules

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_kohya(
    family: Family,
    file: str | Path,
    dtype: torch.dtype = torch.float32,
    config: TrainConfig | None = None,
    extra: dict[str, str] | None = None,
) -> Path:
    """Write the family's adapters as one Kohya file, atomically; returns the path.

    config: of the run, for the header's ss_ entries. extra: further strings for the header, which win.
    Raises FormatError, and writes nothing, if the family has no Kohya layout, a layer no Kohya name, an adapter is no
    plain LoRA (DoRA, biases) or a weight is too large for the dtype; NumericsError if one is not finite.
    """
    layout = layout_of(family)
    weights = weights_of_modules(family.trainable)
    if not weights:
        raise FormatError("There is no adapter to write; train one or load one first.")
    tensors = kohya_tensors(family, weights)
    refuse_infinite(tensors)
    tensors = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
    if large := [key for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise FormatError(
            f"{len(large)} tensors hold numbers too large for {dtype} ({first(large)}); write fp32."
        )
    content = save(tensors)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    header = kohya_header(family, layout, weights, Path(file).stem, config)
    digest = hashlib.sha256(data).hexdigest()
    header |= {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return write_atomically(Path(file), save(tensors, metadata=header | (extra or {})))


def layout_of(family: Family) -> KohyaLayout:
    """How Kohya files of this family look; raises FormatError if it has no such layout here."""
    layout = getattr(family, "kohya", None)
    if layout is None:
        raise FormatError(
            f"There is no exact Kohya form for the family {family.name!r} here; use the diffusers file."
        )
    return layout


def kohya_tensors(family: Family, weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of a Kohya file, float32; raises FormatError for a layer that has no Kohya name."""
    tensors: dict[str, torch.Tensor] = {}
    for part, pairs in weights.items():
        mixed = len({(pair.rank, pair.alpha) for pair in pairs.values()}) > 1
        for layer, pair in pairs.items():
            stem = kohya_name(family, part, layer)
            tensors[f"{stem}.lora_down.weight"] = pair.down
            tensors[f"{stem}.lora_up.weight"] = pair.up * pair.scale if mixed else pair.up
            if not mixed:
                tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def kohya_name(family: Family, part: str, layer: str) -> str:
    """What a Kohya file calls a layer: lora_unet_..., lora_te_..., lora_te1_..., lora_te2_...

    Text encoders keep `text_model` in their names whatever transformers calls them: ComfyUI reads no others.
    """
    layout, name = layout_of(family), layer
    if part not in layout.prefixes:
        raise FormatError(f"A Kohya file has no place for {part}; use the diffusers file.")
    if part.startswith("text_encoder"):
        name = f"text_model.{layer.removeprefix('text_model.')}"
        if not name.startswith("text_model.encoder."):  # the projection: no reader has a name
            name = None
    elif layout.compvis:
        name = compvis_name(family.trainable[part], layer)
    if name is None:
        raise FormatError(f"A Kohya file has no name for {part}.{layer}; use the diffusers file.")
    return f"{layout.prefixes[part]}_{name.replace('.', '_')}"


def kohya_header(
    family: Family,
    layout: KohyaLayout,
    weights: Weights,
    title: str,
    config: TrainConfig | None = None,
) -> dict[str, str]:
    """The strings of sd-scripts (ss_) and of the model specification (modelspec.) that are known; no paths."""
    pairs: list[Pair] = [pair for found in weights.values() for pair in found.values()]
    side = config.data.resolution if config else family.resolution
    second = layout.second(family.trainable) if layout.second else None
    version, architecture = second or (layout.base_version, layout.architecture)
    predicts_v = getattr(family.objective, "prediction_type", "") == "v_prediction"
    header: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one({str(pair.rank) for pair in pairs}),
        "ss_network_alpha": _one({f"{pair.alpha:g}" for pair in pairs}),
        "ss_base_model_version": version,
        "ss_v2": str(second is not None),
        "ss_output_name": title,
        "ss_resolution": f"({side}, {side})",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": layout.implementation,
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }
    return {"format": "pt", FAMILY: family.name} | header | (_of_run(config) if config else {})


def _one(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "Dynamic"


def _of_run(config: TrainConfig) -> dict[str, str]:
    """The ss_ strings that a run's config knows."""
    rates = {p: spec.learning_rate or config.learning_rate for p, spec in config.lora.items()}
    text = [rate for part, rate in rates.items() if part.startswith("text_encoder")]
    network = [rate for part, rate in rates.items() if not part.startswith("text_encoder")]
    known = {
        "ss_sd_model_name": Path(config.pretrained_model_name_or_path or "").name,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": network[0] if network else None,
        "ss_text_encoder_lr": text[0] if text else None,
        "ss_max_train_steps": config.max_train_steps,
        "ss_num_epochs": None if config.max_train_steps else config.num_train_epochs,
        "ss_total_batch_size": config.train_batch_size,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_seed": config.seed,
        "ss_mixed_precision": config.mixed_precision,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_noise_offset": config.noise_offset,
        "ss_min_snr_gamma": config.snr_gamma,
        "ss_network_args": json.dumps(
            {"network_dropout": max(s.lora_dropout for s in config.lora.values())}
        ),
    }
    prompt = config.data.instance_prompt
    trigger = {"modelspec.trigger_phrase": prompt} if prompt else {}
    return {name: str(value) for name, value in known.items() if value is not None} | trigger
