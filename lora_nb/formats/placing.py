"""What a file holds, by part, layer and role: every key is looked up among the spellings, fused layers taken apart."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_nb.errors import FormatError
from lora_nb.formats import lokr
from lora_nb.formats.header import (
    ADAPTER_METADATA,
    PEFT_CONFIG,
    RAW_PEFT,
    first,
    other_methods,
    read_header,
    split_key,
)
from lora_nb.formats.spelling import Place

Found = dict[str, lokr.Roles]  # layer -> role -> tensor
Layers = dict[str, Found]  # by part


def finite(file: Path) -> dict[str, torch.Tensor]:
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


def refuse_other_methods(file: Path, keys: list[str]) -> None:
    """Raise FormatError for a file of LoHa, OFT and their like."""
    if methods := other_methods(keys):
        raise FormatError(
            f"{file.name} holds {' and '.join(methods)}, which cannot be read here "
            f"({first([k for k in keys if split_key(k) is None], 2)}); get a LoRA version of it."
        )


def described(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The header, and the adapter's settings: from the header, or from peft's adapter_config.json beside the file."""
    header = read_header(file)[0]
    beside = file.with_name(PEFT_CONFIG)
    if ADAPTER_METADATA not in header and beside.is_file():
        return header, json.loads(beside.read_text(encoding="utf-8"))
    return header, json.loads(header.get(ADAPTER_METADATA, "{}"))


def settings_of(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A part's settings, under its name, under the name its own pipeline gives it, or alone in the file."""
    for prefix in (f"{part}.", f"{part.removeprefix('prior_')}."):
        own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        if own:
            return own
    return settings if stands_alone(settings) else {}


def stands_alone(settings: dict[str, Any]) -> bool:
    """Whether a file's settings are those of one part, not each under the name of its part."""
    return "lora_alpha" in settings or settings.get("peft_type") == "LOKR"


def placed(
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
            _put(file, fused.setdefault(places, {}), role, tensor)
        else:
            _put(file, _roles(layers, places[0]), role, tensor)
    if strangers:
        raise FormatError(
            f"{file.name} has {len(strangers)} tensors of {len(tensors)} that this model has no place for "
            f"({first(sorted(strangers))}); it was made for another model or by another tool."
        )
    for places, roles in fused.items():
        if lokr.is_lokr(roles):
            _take_product_apart(file, layers, places, roles)
        else:
            _take_apart(file, layers, places, roles)
    return layers


def _roles(layers: Layers, place: Place) -> lokr.Roles:
    part, layer = place
    return layers.setdefault(part, {}).setdefault(layer, {})


def _put(file: Path, roles: lokr.Roles, role: str, tensor: torch.Tensor) -> None:
    if role in roles:
        raise FormatError(
            f"{file.name} has the {role} of a layer twice, under two names; get it again."
        )
    roles[role] = tensor


def _take_product_apart(
    file: Path, layers: Layers, places: tuple[Place, ...], roles: lokr.Roles
) -> None:
    """One LoKr on a fused layer as one on each of ours, if its blocks end where theirs do."""
    part, layer = places[0]
    check_factors(file, part, {layer: roles})
    w1, w2 = lokr.shapes(roles)
    each = w1[0] * w2[0] // 3 if len(places) == 3 else w1[1] * w2[1]  # see _take_apart
    pieces = lokr.take_apart(roles, [each * i for i in range(1, len(places))])
    if pieces is None:
        raise FormatError(
            f"{file.name} has one Kronecker product over {first([n for _, n in places])}, whose blocks do not end "
            "where these layers do, so it cannot be taken apart exactly; get a LoRA version of it."
        )
    for place, piece in zip(places, pieces, strict=True):
        for role, tensor in piece.items():
            _put(file, _roles(layers, place), role, tensor)


def _take_apart(file: Path, layers: Layers, places: tuple[Place, ...], roles: lokr.Roles) -> None:
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
            _put(file, _roles(layers, place), role, piece.contiguous())


def check_factors(file: Path, part: str, found: Found) -> None:
    """Both factors of each Kronecker product are there, and nothing that belongs to another method."""
    if dora := [f"{part}.{layer}" for layer, roles in found.items() if "magnitude" in roles]:
        raise FormatError(
            f"{file.name} is a LoKr with DoRA magnitudes ({first(dora, 2)}), which peft has no layer for; get it "
            "without them."
        )
    if bad := [f"{part}.{layer}" for layer, roles in found.items() if not lokr.complete(roles)]:
        raise FormatError(
            f"{file.name} is incomplete: {len(bad)} layers have not exactly the two factors of a Kronecker product "
            f"({first(bad)}); get it again."
        )
