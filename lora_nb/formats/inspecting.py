"""Describe a LoRA file without loading a model: form, family and base, rank, alpha and scale of every layer."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from lora_nb.errors import FormatError
from lora_nb.families import REGISTRY
from lora_nb.families.names import KOHYA_PREFIXES, recognise
from lora_nb.formats.header import (
    ADAPTER_METADATA,
    FAMILY,
    FILE_NAME,
    PEFT_CONFIG,
    other_methods,
    read_header,
    split_key,
    understood,
)
from lora_nb.formats.reading import RAW_PEFT


@dataclass(frozen=True)
class ModuleReport:
    """The LoRA of one layer as the file spells its name; scale is what multiplies B A."""

    part: str
    layer: str
    rank: int
    alpha: float
    scale: float
    inputs: int
    outputs: int


@dataclass(frozen=True)
class PartReport:
    """One part of a LoRA file: how many layers, which ranks and alphas, how many weights."""

    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int


@dataclass(frozen=True)
class FileReport:
    """What a LoRA file holds; `problems` names what is wrong with it, `lost` what a conversion drops, in sentences.

    family, base: told by our own header, or by the layers and their sizes; "unknown" if nothing tells.
    """

    file: str
    format: str
    parts: dict[str, PartReport]
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    problems: tuple[str, ...]
    family: str
    base: str
    modules: tuple[ModuleReport, ...]
    lost: dict[str, tuple[str, ...]]

    def table(self, modules: bool = False) -> str:
        """Plain text, a line per part; with modules=True also one per layer."""
        size, kinds = f"{self.bytes / 1e6:.2f} MB", ", ".join(self.dtypes)
        lines = [f"{self.file}: {self.format} LoRA, {size}, {self.tensors} tensors, {kinds}"]
        lines.append(f"family {self.family}, base {self.base}")
        lines.append(f"{'part':<16}{'layers':>8}{'rank':>10}{'alpha':>10}{'weights':>12}")
        for part, report in self.parts.items():
            ranks, alphas = (
                ", ".join(f"{v:g}" for v in values) for values in (report.ranks, report.alphas)
            )
            lines.append(
                f"{part:<16}{report.modules:>8}{ranks:>10}{alphas:>10}{report.parameters:>12,}"
            )
        if modules:
            lines.append(f"{'rank':>6}{'alpha':>10}{'scale':>10}{'in':>7}{'out':>7}  layer")
            lines += [
                f"{m.rank:>6}{m.alpha:>10.4g}{m.scale:>10.4g}{m.inputs:>7}{m.outputs:>7}  {m.part} {m.layer}"
                for m in self.modules
            ]
        shown = {k: v for k, v in self.metadata.items() if k not in ("format", ADAPTER_METADATA)}
        lines += [f"{key}: {value[:100]}" for key, value in sorted(shown.items())]
        for form, sentences in self.lost.items():
            lines += [f"lost in {form}: {sentence}" for sentence in sentences]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def inspect(file: str | Path) -> FileReport:
    """Describe a LoRA file without loading a model; raises FormatError if it is none."""
    with understood(file):
        return _inspect(file)


def _inspect(file: str | Path) -> FileReport:
    metadata, keys = read_header(file)
    path = Path(file) / FILE_NAME if Path(file).is_dir() else Path(file)
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
    bare = metadata.get("part", "model") if "lora_alpha" in settings else None
    spelled = {key: split_key(key) for key in tensors}
    forms: set[str] = set()
    sizes: dict[str, int] = {}
    modules = []
    for key, found in spelled.items():
        if found is None or found[2] not in ("lora_A", "lora_B"):
            continue
        stem, form, role = found
        part, layer = (bare, stem) if bare else _split(stem, form)
        forms.add(form)
        sizes[part] = sizes.get(part, 0) + tensors[key].numel()
        if role == "lora_A":
            down = tensors[key]
            rank, alpha, scale = _scale(
                tensors, settings, "" if bare else f"{part}.", stem, len(down)
            )
            up = next((tensors[k] for k, f in spelled.items() if f == (stem, form, "lora_B")), None)
            outputs = 0 if up is None else up.shape[0]
            modules.append(ModuleReport(part, layer, rank, alpha, scale, down.shape[1], outputs))
    return modules, forms, sizes


def _split(stem: str, form: str) -> tuple[str, str]:
    """Part and layer of a key without its ending."""
    if form == "kohya":
        for part, prefixes in KOHYA_PREFIXES.items():
            for prefix in sorted(prefixes, reverse=True):  # lora_te1 before lora_te
                if stem.startswith(prefix + "_"):
                    return part, stem[len(prefix) + 1 :]
    part, _, layer = stem.partition(".")
    return part, layer


def _scale(
    tensors: dict[str, torch.Tensor], settings: dict, prefix: str, stem: str, rank: int
) -> tuple[int, float, float]:
    """(rank, alpha, scale): alpha from the file's own tensor, else from the settings, else the rank."""
    if stem + ".alpha" in tensors:
        alpha = float(tensors[stem + ".alpha"])
        return rank, alpha, alpha / rank
    alpha = settings.get(f"{prefix}lora_alpha", rank)
    patterns = settings.get(f"{prefix}alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, stem.removeprefix(prefix)), alpha))
    rslora = settings.get(f"{prefix}use_rslora")
    return rank, alpha, alpha / (math.sqrt(rank) if rslora else rank)


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
    if "kohya" not in forms and not settings:
        problems.append(
            "no adapter metadata: readers take alpha = rank, which may not be how it was trained"
        )
    return problems


def _lost(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    settings: dict,
    modules: list[ModuleReport],
    forms: set[str],
    family: str,
) -> dict[str, tuple[str, ...]]:
    """What a conversion to the other form would drop or fold, by that form."""
    dora = any((split_key(key) or ("", "", ""))[2] == "magnitude" for key in tensors)
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
