"""Find a place in a pipeline for every tensor of a LoRA file, or say in one sentence why there is none.

Nothing here changes the pipeline. Putting the tensors there is in `attach`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_nb import adapters
from lora_nb.errors import FormatError
from lora_nb.formats import ADAPTER_METADATA, FILE_NAME, read_header


def adapter_file(path: str | Path) -> Path:
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    read_header(file)  # refuses pickles by their first bytes, and all that is no safetensors file
    if file.suffix != ".safetensors":
        raise FormatError(f"{file.name} must end in .safetensors to be read; rename it.")
    return file


# What diffusers calls a text encoder's projections when it reads a Kohya file.
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
Plan = dict[str, tuple[LoraConfig, dict[str, torch.Tensor]]]  # by part, in peft's keys


def plan(pipeline: Any, file: Path) -> Plan:
    """A place for every tensor of the file; raises FormatError and changes nothing."""
    raw = _finite_keys(file)
    if not hasattr(pipeline, "lora_state_dict"):
        return _plan(pipeline, file, raw, *_read_plainly(pipeline, file))
    extra = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    try:
        # By folder and file name: with a full path as first argument the metadata, and alpha, is lost.
        # Some pipelines hand out a Kohya file's alphas, some only if asked, some never.
        state, *alphas, metadata = pipeline.lora_state_dict(
            file.parent,
            weight_name=file.name,
            return_lora_metadata=True,
            return_alphas=True,
            **extra,
        )
    except (ValueError, KeyError, IndexError) as error:
        raise FormatError(
            f"{file.name} has keys of no known LoRA format ({error}); get the diffusers or Kohya version."
        ) from error
    return _plan(pipeline, file, raw, state, (alphas and alphas[0]) or {}, metadata or {})


def _read_plainly(pipeline: Any, file: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """Tensors, alphas and metadata for a pipeline that has no LoRA loader of its own, but parts that have.

    The keys of such files name no part, or the part as its own pipeline does; here they get the name it has in this
    one, which for a first stage begins with prior_.
    """
    state, metadata = load_file(file), json.loads(read_header(file)[0].get(ADAPTER_METADATA, "{}"))
    parts = {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    layer = next(iter(state)).rpartition(".lora_")[0]
    for part, module in parts.items():
        for prefix in ("", f"{part}.", f"{part.removeprefix('prior_')}."):
            if layer.startswith(prefix) and layer.removeprefix(prefix) in adapters.adaptable(
                module
            ):
                return (
                    {f"{part}.{k.removeprefix(prefix)}": v for k, v in state.items()},
                    {},
                    {f"{part}.{k.removeprefix(prefix)}": v for k, v in metadata.items()},
                )
    return state, {}, metadata


def _plan(
    pipeline: Any, file: Path, raw: list[str], state: dict, alphas: dict, metadata: dict
) -> Plan:
    layers, strangers = _layers_of(pipeline, state)
    if strangers or len(state) != len(raw):
        names = strangers or sorted(set(raw) - set(state))
        raise FormatError(
            f"{file.name} has {len(names)} tensors of {len(raw)} that this model has no place for "
            f"({_first(names)}); it was made for another model or by another tool."
        )
    given = _alphas_of(pipeline, alphas)
    places: Plan = {}
    for part, pairs in layers.items():
        module = getattr(pipeline, part)
        _check_pairs(file, module, part, pairs)
        settings = _under(part, metadata)
        config = (
            _config(file, settings) if settings else _config_from_shapes(pairs, given.get(part, {}))
        )
        _check_complete(file, module, part, pairs, config)
        places[part] = (
            config,
            {f"{layer}.{ab}.weight": t for layer, pair in pairs.items() for ab, t in pair.items()},
        )
    return places


def _finite_keys(file: Path) -> list[str]:
    """The names of the file's weight tensors, all finite; Kohya's alpha scalars are not counted."""
    tensors = load_file(file)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FormatError(
            f"{file.name} holds numbers that are not finite in {len(broken)} tensors "
            f"({_first(broken)}); the training diverged, take an earlier checkpoint."
        )
    if not tensors:
        raise FormatError(f"{file.name} holds no tensors; train the adapter again.")
    return [key for key in tensors if not key.endswith(".alpha")]


Pairs = dict[str, dict[str, torch.Tensor]]  # layer -> {"lora_A": ..., "lora_B": ...}


def _layers_of(pipeline: Any, state: dict[str, torch.Tensor]) -> tuple[dict[str, Pairs], list[str]]:
    """The tensors by part and layer, and the keys that fit no layer of the pipeline."""
    layers: dict[str, Pairs] = {}
    strangers = []
    for key, tensor in convert_unet_state_dict_to_peft(state).items():
        for old, new in (("down", "lora_A"), ("up", "lora_B")):
            key = key.replace(f"lora_linear_layer.{old}", new)
        path, _, ending = key.rpartition(".lora_")
        part, layer = _place(pipeline, path)
        if layer is None or ending not in ("A.weight", "B.weight"):
            strangers.append(key)
        else:
            layers.setdefault(part, {}).setdefault(layer, {})[f"lora_{ending[0]}"] = tensor
    return layers, strangers


def _place(pipeline: Any, path: str) -> tuple[str, str | None]:
    """Part and layer that `unet.down_blocks.0...to_q` names; the layer is None if there is none."""
    part, _, layer = path.partition(".")
    module = getattr(pipeline, part, None)
    if not isinstance(module, torch.nn.Module):
        return part, None
    if not hasattr(module, "text_model"):  # gone in newer transformers, still in files
        layer = layer.removeprefix("text_model.")
    stem, _, name = layer.rpartition(".self_attn.")
    layer = f"{stem}.self_attn.{OLD_NAMES[name]}" if stem and name in OLD_NAMES else layer
    return part, layer if layer in adapters.adaptable(module) else None


def _alphas_of(pipeline: Any, alphas: dict[str, float]) -> dict[str, dict[str, float]]:
    """A Kohya file's alphas by part and layer."""
    given: dict[str, dict[str, float]] = {}
    plain = {key.removesuffix(".alpha"): float(alpha) for key, alpha in alphas.items()}
    for key, alpha in convert_unet_state_dict_to_peft(plain).items():
        part, layer = _place(pipeline, key.split(".lora_")[0])
        given.setdefault(part, {})[layer] = alpha
    return given


def _under(part: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}


def _config(file: Path, settings: dict[str, Any]) -> LoraConfig:
    """The peft config of a file's metadata; start values are those of the file, never computed from the base."""
    try:
        return LoraConfig(**(settings | {"init_lora_weights": True}))
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"The adapter metadata of {file.name} cannot be read ({error}); a newer peft may have written it."
        ) from error


def _config_from_shapes(pairs: Pairs, alphas: dict[str, float]) -> LoraConfig:
    """Without metadata: rank from the shapes, alpha = rank unless the file says otherwise."""
    ranks = {layer: pair["lora_A"].shape[0] for layer, pair in pairs.items()}
    # Each name anchored: peft reads pattern keys as regular expressions that match at the end.
    return LoraConfig(
        target_modules=list(pairs),
        rank_pattern={f"^{re.escape(layer)}": rank for layer, rank in ranks.items()},
        alpha_pattern={
            f"^{re.escape(layer)}": alphas.get(layer, rank) for layer, rank in ranks.items()
        },
    )


def _check_pairs(file: Path, module: torch.nn.Module, part: str, pairs: Pairs) -> None:
    """A and B of every layer are there and fit the layer."""
    single = [f"{part}.{layer}" for layer, pair in pairs.items() if len(pair) == 1]
    if single:
        raise FormatError(
            f"{file.name} is incomplete: {len(single)} layers have A or B but not both "
            f"({_first(single)}); get it again."
        )
    layers = adapters.adaptable(module)
    for layer, pair in pairs.items():
        outputs, inputs = layers[layer].weight.shape[:2]
        made_for = (pair["lora_B"].shape[0], pair["lora_A"].shape[1])
        if made_for != (outputs, inputs):
            raise FormatError(
                f"{file.name} was made for another base model: its {part}.{layer} goes from "
                f"{made_for[1]} to {made_for[0]} numbers, this model's from {inputs} to {outputs}."
            )


def _check_complete(
    file: Path, module: torch.nn.Module, part: str, pairs: Pairs, config: LoraConfig
) -> None:
    """The layers and ranks that the config names are those of the file."""
    named = {
        layer
        for layer in adapters.adaptable(module)
        if check_target_module_exists(config, layer) is True
    }
    if missing := [f"{part}.{layer}" for layer in sorted(named - pairs.keys())]:
        raise FormatError(
            f"{file.name} is incomplete: {len(missing)} trained layers are not in it ({_first(missing)}); get it again."
        )
    wrong = sorted(pairs.keys() - named)
    for layer, pair in pairs.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        if pair["lora_A"].shape[0] != rank or pair["lora_B"].shape[1] != rank:
            wrong.append(layer)
    if wrong:
        raise FormatError(
            f"{file.name} contradicts its own metadata in {len(wrong)} layers ({_first(wrong)}); get it again."
        )


def _first(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
