"""Find a place in a pipeline for every tensor of a LoRA file, or say in one sentence why there is none.

Every spelling that the known tools have for each layer of this very pipeline is written down first; then a key is
looked up, never guessed from its underscores. Nothing here changes the pipeline.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_nb import adapters
from lora_nb.errors import FormatError
from lora_nb.families.names import KOHYA_PREFIXES, foreign_names
from lora_nb.formats.header import (
    ADAPTER_METADATA,
    PEFT_CONFIG,
    first,
    other_methods,
    read_header,
    split_key,
    understood,
)

Plan = dict[str, tuple[LoraConfig, dict[str, torch.Tensor]]]  # by part, in peft's keys
Place = tuple[str, str]  # part and layer
Layers = dict[str, dict[str, dict[str, torch.Tensor]]]  # part -> layer -> role -> tensor

RAW_PEFT = "base_model.model."
# What diffusers before peft called a text encoder's projections.
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


def plan(pipeline: Any, file: Path) -> Plan:
    """A place for every tensor of the file; raises FormatError and changes nothing."""
    with understood(file):
        return _plan(pipeline, file)


def _plan(pipeline: Any, file: Path) -> Plan:
    tensors = _finite(file)
    _refuse_other_methods(file, list(tensors))
    header, settings = _described(file)
    layers = _placed(file, tensors, spellings(pipeline, header.get("part")))
    places: Plan = {}
    for part, found in layers.items():
        module = getattr(pipeline, part)
        _check_pairs(file, module, part, found)
        named = _settings_of(part, settings)
        config = _config(file, named) if named else _config_from_shapes(module, found)
        _check_complete(file, module, part, found, config)
        places[part] = (config, dict(_peft_state(found)))
    return places


def spellings(pipeline: Any, stated: str | None = None) -> dict[str, tuple[Place, ...]]:
    """Every name that a file may have for a layer of the pipeline -> the layers it means, several if fused.

    stated: the part that the file's own header names; without it a name that names no part is taken only if one part
    alone has such a layer.
    """
    table: dict[str, tuple[Place, ...]] = {}
    bare: dict[str, set[tuple[Place, ...]]] = {}
    for part, module in _modules(pipeline):
        own = list(adapters.adaptable(module))
        names = {name: ((part, name),) for name in own}
        foreign = {
            name: tuple((part, layer) for layer in layers)
            for name, layers in foreign_names(module, own).items()
        }
        for name, places in names.items():
            for variant in _variants(name):
                table[f"{part}.{variant}"] = places
                table.setdefault(f"{part.removeprefix('prior_')}.{variant}", places)
                bare.setdefault(variant, set()).add(places)
        for name, places in foreign.items():
            table[f"diffusion_model.{name}"] = table[f"model.diffusion_model.{name}"] = places
        for prefix in KOHYA_PREFIXES.get(part.removeprefix("prior_"), ()):
            for name, places in (names | foreign).items():
                for variant in _variants(name):
                    table.setdefault(f"{prefix}_{variant.replace('.', '_')}", places)
    for name, meant in bare.items():
        if stated is not None:
            if stated_place := table.get(f"{stated}.{name}"):
                table.setdefault(name, stated_place)
        elif len(meant) == 1:
            table.setdefault(name, next(iter(meant)))
    return table


def _modules(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            yield name, part


def _variants(layer: str) -> list[str]:
    """A layer's name and, for a CLIP text encoder, those with and without `text_model.` (gone in transformers 5.6)."""
    names = [layer]
    if layer.startswith(("text_model.", "encoder.layers.")):
        plain = layer.removeprefix("text_model.")
        stem, _, projection = plain.rpartition(".self_attn.")
        old = [
            f"{stem}.self_attn.{o}" for o, new in OLD_NAMES.items() if stem and new == projection
        ]
        names = [prefix + name for name in (plain, *old) for prefix in ("", "text_model.")]
    return names


def _finite(file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors, all finite."""
    tensors = load_file(file)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FormatError(
            f"{file.name} holds numbers that are not finite in {len(broken)} tensors "
            f"({first(broken)}); the training diverged, take an earlier checkpoint."
        )
    if not tensors:
        raise FormatError(f"{file.name} holds no tensors; train the adapter again.")
    return tensors


def _refuse_other_methods(file: Path, keys: list[str]) -> None:
    if methods := other_methods(keys):
        raise FormatError(
            f"{file.name} holds {' and '.join(methods)}, which is no LoRA and cannot be read here "
            f"({first([k for k in keys if split_key(k) is None], 2)}); get a LoRA version of it."
        )


def _described(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The header, and the adapter's settings: from the header, or from peft's adapter_config.json beside the file."""
    header = read_header(file)[0]
    beside = file.with_name(PEFT_CONFIG)
    if ADAPTER_METADATA not in header and beside.is_file():
        return header, json.loads(beside.read_text(encoding="utf-8"))
    return header, json.loads(header.get(ADAPTER_METADATA, "{}"))


def _settings_of(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A part's settings, under its name, under the name its own pipeline gives it, or alone in the file."""
    for prefix in (f"{part}.", f"{part.removeprefix('prior_')}."):
        own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        if own:
            return own
    return settings if "lora_alpha" in settings else {}


def _placed(
    file: Path, tensors: dict[str, torch.Tensor], table: dict[str, tuple[Place, ...]]
) -> Layers:
    """The tensors by part, layer and role; a fused layer is taken apart."""
    layers: Layers = {}
    strangers, fused = [], {}
    for key, tensor in tensors.items():
        stem, _, role = split_key(key.removeprefix(RAW_PEFT)) or (key, "", "")
        places = table.get(stem)
        if places is None or not role:
            strangers.append(key)
        elif len(places) > 1:
            fused.setdefault(places, {})[role] = tensor
        else:
            _put(layers, places[0], role, tensor)
    if strangers:
        raise FormatError(
            f"{file.name} has {len(strangers)} tensors of {len(tensors)} that this model has no place for "
            f"({first(sorted(strangers))}); it was made for another model or by another tool."
        )
    for places, roles in fused.items():
        _take_apart(layers, places, roles)
    return layers


def _put(layers: Layers, place: Place, role: str, tensor: torch.Tensor) -> None:
    part, layer = place
    layers.setdefault(part, {}).setdefault(layer, {})[role] = tensor


def _take_apart(layers: Layers, places: tuple[Place, ...], roles: dict[str, torch.Tensor]) -> None:
    """One LoRA on a fused layer as one on each of ours: all share A and alpha, each takes its rows of B.

    Only the last of ours may differ in size (the hidden layer beside q, k and v); what B lacks shows as a wrong shape.
    """
    for role, tensor in roles.items():
        if role in ("lora_A", "alpha"):
            pieces = [tensor.clone() for _ in places]
        elif len(places) == 3:
            pieces = list(tensor.tensor_split(3))
        else:
            # q, k and v have as many rows as the layer has inputs; the rest is the hidden layer's.
            inputs = roles["lora_A"].shape[1]
            pieces = list(tensor.tensor_split([inputs, 2 * inputs, 3 * inputs]))
        for place, piece in zip(places, pieces, strict=True):
            _put(layers, place, role, piece.contiguous())


def _peft_state(found: dict[str, dict[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, roles in found.items():
        for role in ("lora_A", "lora_B"):
            yield f"{layer}.{role}.weight", roles[role]
        if "magnitude" in roles:
            yield f"{layer}.lora_magnitude_vector", roles["magnitude"].flatten()


def _config(file: Path, settings: dict[str, Any]) -> LoraConfig:
    """The peft config of a file's metadata; start values are those of the file, never computed from the base."""
    try:
        return LoraConfig(**(settings | {"init_lora_weights": True}))
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"The adapter metadata of {file.name} cannot be read ({error}); a newer peft may have written it."
        ) from error


def _config_from_shapes(
    module: torch.nn.Module, found: dict[str, dict[str, torch.Tensor]]
) -> LoraConfig:
    """Without metadata: rank from the shapes, alpha = rank unless the file says otherwise."""
    ranks = {layer: roles["lora_A"].shape[0] for layer, roles in found.items()}
    alphas = {layer: float(found[layer].get("alpha", rank)) for layer, rank in ranks.items()}
    return pattern_config(module, ranks, alphas, any("magnitude" in r for r in found.values()))


def pattern_config(
    module: torch.nn.Module, ranks: dict[str, int], alphas: dict[str, float], dora: bool = False
) -> LoraConfig:
    """A peft config of these layers, each with its own rank and alpha."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # Each name anchored: peft reads pattern keys as regular expressions that match at the end.
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets(module, list(ranks)),
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        use_dora=dora,
    )


def targets(module: torch.nn.Module, layers: list[str]) -> list[str] | str:
    """peft target modules that mean these layers and no others.

    peft takes a name in a list for the end of a name too; where that would catch more, one expression names them all.
    """
    caught = [n for n in adapters.adaptable(module) if any(adapters.matches(n, t) for t in layers)]
    return layers if len(caught) == len(layers) else "|".join(re.escape(layer) for layer in layers)


def _check_pairs(
    file: Path, module: torch.nn.Module, part: str, found: dict[str, dict[str, torch.Tensor]]
) -> None:
    """A and B of every layer are there and fit the layer."""
    single = [
        f"{part}.{n}" for n, roles in found.items() if not {"lora_A", "lora_B"} <= roles.keys()
    ]
    if single:
        raise FormatError(
            f"{file.name} is incomplete: {len(single)} layers have A or B but not both "
            f"({first(single)}); get it again."
        )
    layers = adapters.adaptable(module)
    for layer, roles in found.items():
        outputs, inputs = layers[layer].weight.shape[:2]
        made_for = (roles["lora_B"].shape[0], roles["lora_A"].shape[1])
        if made_for != (outputs, inputs):
            raise FormatError(
                f"{file.name} was made for another base model: its {part}.{layer} goes from "
                f"{made_for[1]} to {made_for[0]} numbers, this model's from {inputs} to {outputs}."
            )
        magnitude = roles.get("magnitude")
        if magnitude is not None and magnitude.numel() != outputs:
            raise FormatError(
                f"{file.name} has a DoRA magnitude of {magnitude.numel()} numbers at {part}.{layer}, which has "
                f"{outputs} outputs; magnitudes of inputs cannot be read here."
            )


def _check_complete(
    file: Path,
    module: torch.nn.Module,
    part: str,
    found: dict[str, dict[str, torch.Tensor]],
    config: LoraConfig,
) -> None:
    """The layers and ranks that the config names are those of the file."""
    named = {
        layer
        for layer in adapters.adaptable(module)
        if bool(check_target_module_exists(config, layer)) is True
    }
    if missing := [f"{part}.{layer}" for layer in sorted(named - found.keys())]:
        raise FormatError(
            f"{file.name} is incomplete: {len(missing)} trained layers are not in it ({first(missing)}); get it again."
        )
    wrong = sorted(found.keys() - named)
    for layer, roles in found.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        magnitude = "magnitude" in roles
        if (
            roles["lora_A"].shape[0] != rank
            or roles["lora_B"].shape[1] != rank
            or magnitude != config.use_dora
        ):
            wrong.append(layer)
    if wrong:
        raise FormatError(
            f"{file.name} contradicts its own metadata in {len(wrong)} layers ({first(wrong)}); get it again."
        )
