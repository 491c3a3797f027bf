"""LoRA files: write the diffusers form with its metadata, read and describe the known forms.

A file is safetensors, never a pickle. Without the adapter metadata a reader takes alpha = rank, so it is always
written.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_nb import adapters
from lora_nb.errors import FormatError, NumericsError
from lora_nb.families import Family
from lora_nb.files import write_atomically

FILE_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"

PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare ones

# How each known form ends the key of A, B, alpha and a DoRA magnitude.
ENDINGS = {
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "diffusers (text encoder)": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}
KOHYA_PARTS = {
    "lora_unet": "unet",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te": "text_encoder",
}


def save_adapter(family: Family, folder: str | Path, extra: dict[str, str] | None = None) -> Path:
    """Write the family's adapters as pytorch_lora_weights.safetensors, float32, atomically; returns the path.

    extra: further strings for the header. Raises NumericsError, and writes nothing, if a weight is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, object] = {}
    header = {"format": "pt"}
    for part, weights in adapters.state(family).items():
        kept = getattr(family, "peft_keys", False)
        prefix = f"{part}."
        if getattr(family, "bare_keys", False):  # one part, whose model loads the file by itself
            prefix, header["part"] = "", part
        for key, value in (weights if kept else convert_state_dict_to_diffusers(weights)).items():
            if not torch.isfinite(value).all():
                raise NumericsError(
                    f"{prefix}{key} is not finite, so the adapter was not written; go back to the last checkpoint."
                )
            tensors[f"{prefix}{key}"] = value.contiguous()
        settings = family.trainable[part].peft_config[adapters.ADAPTER].to_dict()
        described |= {f"{prefix}{name}": _plain(value) for name, value in settings.items()}
    header[ADAPTER_METADATA] = json.dumps(described, indent=2, sort_keys=True)
    return write_atomically(
        Path(folder) / FILE_NAME, save(tensors, metadata=header | (extra or {}))
    )


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value


@dataclass(frozen=True)
class PartReport:
    """One part of a LoRA file: how many layers, which ranks and alphas, how many weights."""

    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int


@dataclass(frozen=True)
class FileReport:
    """What a LoRA file holds; `problems` names what is wrong with it, in sentences."""

    file: str
    format: str
    parts: dict[str, PartReport]
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    problems: tuple[str, ...]

    def table(self) -> str:
        """Plain text, a line per part."""
        size, kinds = f"{self.bytes / 1e6:.2f} MB", ", ".join(self.dtypes)
        lines = [f"{self.file}: {self.format} LoRA, {size}, {self.tensors} tensors, {kinds}"]
        lines.append(f"{'part':<16}{'layers':>8}{'rank':>10}{'alpha':>10}{'weights':>12}")
        for part, report in self.parts.items():
            ranks, alphas = (
                ", ".join(f"{v:g}" for v in values) for values in (report.ranks, report.alphas)
            )
            lines.append(
                f"{part:<16}{report.modules:>8}{ranks:>10}{alphas:>10}{report.parameters:>12,}"
            )
        shown = {k: v for k, v in self.metadata.items() if k not in ("format", ADAPTER_METADATA)}
        lines += [f"{key}: {value[:100]}" for key, value in sorted(shown.items())]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def read_header(file: str | Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and tensor names of a safetensors file; raises FormatError for anything else."""
    path = Path(file)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FormatError(f"There is no LoRA file {file}; give the path of a .safetensors file.")
    with open(path, "rb") as opened:
        start = opened.read(2)
    if start in PICKLES:
        raise FormatError(
            f"{file} is a pickle, which can run code when it is read, and is not opened; get the safetensors version."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {}), list(opened.keys())
    except SafetensorError as error:
        raise FormatError(
            f"{file} is no readable safetensors file ({error}); get it again."
        ) from error


def inspect(file: str | Path) -> FileReport:
    """Describe a LoRA file without loading a model; raises FormatError if it is none."""
    metadata, keys = read_header(file)
    path = Path(file) / FILE_NAME if Path(file).is_dir() else Path(file)
    described = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    bare = metadata.get("part", "model") if "lora_alpha" in described else None
    layers: dict[tuple[str, str], tuple[int, float | None]] = {}
    problems, formats, sizes, dtypes = [], set(), {}, set()
    with safe_open(path, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in keys}
    for key, value in tensors.items():
        dtypes.add(str(value.dtype).removeprefix("torch."))
        if value.is_floating_point() and not torch.isfinite(value).all():
            problems.append(f"{key} holds numbers that are not finite; this file is broken")
        for name, endings in ENDINGS.items():
            for ending in endings:
                if key.endswith(ending):
                    stem = key.removesuffix(ending)
                    part, layer = (bare, stem) if bare else _split(stem, name)
                    formats.add(name.split(" ")[0])
                    sizes[part] = sizes.get(part, 0) + value.numel()
                    if ending == endings[0]:
                        alpha = _alpha(tensors, described, "" if bare else f"{part}.", stem)
                        layers[part, layer] = (value.shape[0], alpha)
    if not layers:
        raise FormatError(f"{file} holds no LoRA weights (no key ends like {ENDINGS['peft'][0]}).")
    parts = {}
    for part in dict.fromkeys(part for part, _ in layers):
        found = [values for (p, _), values in layers.items() if p == part]
        parts[part] = PartReport(
            modules=len(found),
            ranks=tuple(sorted({rank for rank, _ in found})),
            alphas=tuple(sorted({rank if alpha is None else alpha for rank, alpha in found})),
            parameters=sizes[part],
        )
    if "kohya" not in formats and not described:
        problems.append(
            "no adapter metadata: readers take alpha = rank, which may not be how it was trained"
        )
    return FileReport(
        file=str(file),
        format=" + ".join(sorted(formats)),
        parts=parts,
        tensors=len(tensors),
        bytes=path.stat().st_size,
        dtypes=tuple(sorted(dtypes)),
        metadata=metadata,
        problems=tuple(problems),
    )


def _split(stem: str, form: str) -> tuple[str, str]:
    """Part and layer of a key without its ending."""
    if form == "kohya":
        for prefix, part in KOHYA_PARTS.items():
            if stem.startswith(prefix + "_"):
                return part, stem[len(prefix) + 1 :]
    part, _, layer = stem.partition(".")
    return part, layer


def _alpha(
    tensors: dict[str, torch.Tensor], described: dict, prefix: str, stem: str
) -> float | None:
    if stem + ".alpha" in tensors:
        return float(tensors[stem + ".alpha"])
    alpha = described.get(f"{prefix}lora_alpha")
    for pattern, value in described.get(f"{prefix}alpha_pattern", {}).items():
        if stem.endswith(pattern):
            alpha = value
    return alpha
