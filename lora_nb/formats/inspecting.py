"""Describe a LoRA file without loading a model: form, family and base, rank, alpha and scale of every layer."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_nb.errors import FormatError
from lora_nb.families import REGISTRY
from lora_nb.families.names import KOHYA_PREFIXES, recognise
from lora_nb.formats import lokr
from lora_nb.formats.file_report import FileReport, ModuleReport, PartReport
from lora_nb.formats.header import (
    ADAPTER_METADATA,
    FAMILY,
    PEFT_CONFIG,
    RAW_PEFT,
    holds_lokr,
    inside,
    other_methods,
    read_header,
    split_key,
    understood,
)
from lora_nb.formats.placing import stands_alone


def inspect(file: str | Path) -> FileReport:
    """Describe a LoRA file without loading a model; raises FormatError if it is none."""
    with understood(file):
        return _inspect(file)


def _inspect(file: str | Path) -> FileReport:
    metadata, keys = read_header(file)
    path = inside(file)
    tensors = {key.removeprefix(RAW_PEFT): value for key, value in load_file(path).items()}
    settings = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    if not settings and any(key.startswith(RAW_PEFT) for key in keys):
        beside = path.with_name(PEFT_CONFIG)
        settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    modules, forms, sizes = _modules(tensors, metadata, settings)
    if not modules:
        methods = " and ".join(other_methods(keys))
        held = f"it is {methods}" if methods else "no key ends like .lora_A.weight"
        raise FormatError(f"{file} holds no LoRA weights ({held}); get a LoRA version of it.")
    family, base = _family(metadata, modules)
    parts = {}
    for part in dict.fromkeys(m.part for m in modules):
        found = [m for m in modules if m.part == part]
        parts[part] = PartReport(
            modules=len(found),
            ranks=tuple(sorted({m.rank for m in found})),
            alphas=tuple(sorted({m.alpha for m in found})),
            parameters=sizes[part],
        )
    return FileReport(
        file=str(file),
        format=" + ".join(sorted(forms)),
        parts=parts,
        tensors=len(tensors),
        bytes=path.stat().st_size,
        dtypes=tuple(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()})),
        metadata=metadata,
        problems=tuple(_problems(tensors, forms, settings)),
        family=family,
        base=base,
        modules=tuple(modules),
        lost=_lost(tensors, metadata, settings, modules, forms, family),
        method="LoKr" if holds_lokr(keys) else "LoRA",
    )


def _family(metadata: dict[str, str], modules: list[ModuleReport]) -> tuple[str, str]:
    """Family and base: what our own header says, else what the layers and their sizes tell."""
    stated = Path(metadata.get("base_model", "unknown")).name
    told = recognise((m.layer, m.inputs) for m in modules) or ("unknown", stated)
    own = metadata.get(FAMILY)
    if own not in REGISTRY or own == told[0]:
        return told
    return own, stated


def _modules(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], settings: dict
) -> tuple[list[ModuleReport], set[str], dict[str, int]]:
    """The layers, the forms of their keys, and the number of weights by part."""
    bare = metadata.get("part", "model") if stands_alone(settings) else None
    layers: dict[tuple[str, str], dict[str, torch.Tensor]] = {}  # by stem and form
    for key, tensor in tensors.items():
        stem, form, role = split_key(key) or ("", "", "")
        if role not in ("", "alpha", "magnitude"):
            layers.setdefault((stem, form), {})[role] = tensor
    sizes: dict[str, int] = {}
    modules = []
    for (stem, _), roles in layers.items():
        part, layer = (bare, stem) if bare else _split(stem)
        sizes[part] = sizes.get(part, 0) + sum(tensor.numel() for tensor in roles.values())
        if (shape := _shape(roles)) is not None:
            prefix = "" if bare else f"{part}."
            alpha = tensors.get(stem + ".alpha")
            rank, alpha, scale = _scale(roles, alpha, settings, prefix, stem)
            modules.append(ModuleReport(part, layer, rank, alpha, scale, *shape))
    return modules, {form for _, form in layers}, sizes


def _shape(roles: lokr.Roles) -> tuple[int, int] | None:
    """(inputs, outputs) of a layer's change; outputs 0 if B is missing, None if there is too little to tell."""
    if lokr.complete(roles):
        w1, w2 = lokr.shapes(roles)
        return (w1[1] * w2[1], w1[0] * w2[0]) if w1 and w2 else None
    if "lora_A" not in roles:
        return None
    return roles["lora_A"].shape[1], len(roles["lora_B"]) if "lora_B" in roles else 0


def _split(stem: str) -> tuple[str, str]:
    """Part and layer of a key without its ending."""
    if "." not in stem:
        for part, prefixes in KOHYA_PREFIXES.items():
            for prefix in sorted(prefixes, reverse=True):  # lora_te1 before lora_te
                if stem.startswith(prefix + "_"):
                    return part, stem[len(prefix) + 1 :]
    part, _, layer = stem.partition(".")
    return part, layer


def _scale(
    roles: lokr.Roles, alpha: torch.Tensor | None, settings: dict, prefix: str, stem: str
) -> tuple[int, float, float]:
    """(rank, alpha, scale): alpha from the file's own tensor, else from the settings, else the rank."""
    product = lokr.is_lokr(roles)
    rank = lokr.rank(roles) if product else len(roles["lora_A"])
    if alpha is not None:
        scale = lokr.scale(roles | {"alpha": alpha}) if product else float(alpha) / rank
        return rank, float(alpha), scale
    name = stem.removeprefix(prefix)
    divisor = rank
    if product:  # peft divides by the config's rank also where both factors are whole
        divisor = _setting(settings, prefix, "r", "rank_pattern", name, rank or 1)
    key = "alpha" if product else "lora_alpha"
    value = float(_setting(settings, prefix, key, "alpha_pattern", name, divisor))
    rslora = settings.get(f"{prefix}use_rslora")
    return rank, value, value / (math.sqrt(divisor) if rslora else divisor)


def _setting(
    settings: dict, prefix: str, name: str, pattern: str, layer: str, default: float
) -> float:
    """A layer's rank or alpha: from the pattern that fits its name, else from the setting, else the default."""
    patterns = settings.get(f"{prefix}{pattern}") or {}
    value = settings.get(f"{prefix}{name}", default)
    return patterns.get(get_pattern_key(patterns, layer), value)


def _problems(tensors: dict[str, torch.Tensor], forms: set[str], settings: dict) -> list[str]:
    problems = [
        f"{key} holds numbers that are not finite; this file is broken"
        for key, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if methods := other_methods(list(tensors)):
        problems.append(f"it also holds {' and '.join(methods)}, which cannot be read here")
    strange = [key for key in tensors if split_key(key) is None and not other_methods([key])]
    if strange:
        problems.append(f"{len(strange)} tensors are of no known form, such as {strange[0]}")
    if holds_lokr(tensors) and _has_magnitudes(tensors):
        problems.append("it is a LoKr with DoRA magnitudes, which cannot be read here")
    stated = settings or "kohya" in forms or any(key.endswith(".alpha") for key in tensors)
    if not stated:
        problems.append(
            "no adapter metadata: readers take alpha = rank, which may not be how it was trained"
        )
    return problems


def _has_magnitudes(keys: Iterable[str]) -> bool:
    return any((split_key(key) or ("", "", ""))[2] == "magnitude" for key in keys)


def _lost(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    settings: dict,
    modules: list[ModuleReport],
    forms: set[str],
    family: str,
) -> dict[str, tuple[str, ...]]:
    """What a conversion to the other form would drop or fold, by that form."""
    if holds_lokr(tensors):
        all_of_it = (
            "everything: LoKr is a Kronecker product and no B A of low rank, the export is refused"
        )
        return {"diffusers": (all_of_it,), "kohya": (all_of_it,)}
    dora = _has_magnitudes(tensors)
    if "kohya" in forms:
        lost = []
        if entries := [k for k in metadata if k.startswith(("ss_", "sshs_", "modelspec."))]:
            lost.append(f"{len(entries)} entries of the header, such as {sorted(entries)[0]}")
        return {"diffusers": tuple(lost)}
    if family in REGISTRY and not getattr(REGISTRY[family], "kohya", None):
        return {"kohya": ("everything: this family has no Kohya form here, the export is refused",)}
    lost = ["everything: DoRA has no exact Kohya form, the export is refused"] if dora else []
    if any(v for k, v in settings.items() if k.endswith("use_rslora")):
        lost.append(
            "the word rsLoRA: its scale alpha / sqrt(rank) becomes an alpha of scale * rank"
        )
    for part in dict.fromkeys(m.part for m in modules):
        if len({(m.rank, m.alpha) for m in modules if m.part == part}) > 1:
            lost.append(f"alpha in {part}: its layers differ, so the scale is multiplied into B")
    if any(v for k, v in settings.items() if k.endswith("lora_dropout")):
        lost.append(
            "lora_dropout in each layer, which only training uses (kept as ss_network_args)"
        )
    return {"kohya": tuple(lost)}
