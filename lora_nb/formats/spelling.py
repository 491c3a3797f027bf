"""Every name that the known tools have for each layer of a pipeline."""

from collections.abc import Iterator
from typing import Any

import torch

from lora_nb import adapters
from lora_nb.families.names import KOHYA_PREFIXES, foreign_names

Place = tuple[str, str]  # part and layer

# What diffusers before peft called a text encoder's projections.
OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


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
