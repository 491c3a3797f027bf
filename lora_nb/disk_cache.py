"""Encoded pictures and captions on disk, shared by all runs that read the same content through the same encoders.

An entry is named by everything that its numbers depend on, so a hit has the very bits that encoding would give. It lies
in the user's cache folder (LORA_NB_CACHE), is checked when read, and may be deleted at any time: that costs only time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_nb import adapters, env
from lora_nb.families import Family, network
from lora_nb.files import free_megabytes, temporary_beside

ROOM = 2_000  # MB that are left free on the disk: nothing more is written then
SAMPLED = 1024  # values of each weight that enter the mark of the encoders
LIBRARIES = (torch.__version__, diffusers.__version__, transformers.__version__, PIL.__version__)

Tensors = dict[str, torch.Tensor]


def folder() -> Path:
    """Where the entries lie."""
    return env.cache_dir() / "encoded"


def clear() -> int:
    """Delete all entries; returns how many bytes that frees. Runs that are going on encode again."""
    size = sum(file.stat().st_size for file in folder().rglob("*") if file.is_file())
    shutil.rmtree(folder(), ignore_errors=True)
    return size


class DiskCache:
    """The entries that belong to one family's frozen encoders, on this kind of machine."""

    def __init__(self, family: Family):
        self.mark = _mark(family)
        self._warned = False

    def get(self, *key: Any) -> Tensors | None:
        """The tensors of a key (anything JSON can say), on the CPU; None if there are none or they are damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
        except (OSError, SafetensorError):
            whole = False
        if whole:
            return tensors
        if not self._warned:
            self._warned = True
            warnings.warn(f"The cache entry {path} is damaged; it is computed again.", stacklevel=2)
        return None

    def put(self, tensors: Tensors, *key: Any) -> None:
        """Keep tensors under a key; a disk that is full or cannot be written to only costs time."""
        path = self._path(key)
        if free_megabytes(path) < ROOM:
            return
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        temporary = temporary_beside(path)
        with contextlib.suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, temporary, {"sha256": _digest(tensors)})
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _path(self, key: tuple[Any, ...]) -> Path:
        name = hashlib.sha256(json.dumps([self.mark, *key]).encode()).hexdigest()
        return folder() / name[:2] / f"{name}.safetensors"


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _mark(family: Family) -> str:
    """A mark of all that encoding depends on besides the content: encoders, settings, libraries, kind of machine.

    Of each weight evenly spaced values are read, so that it costs little; adapters and the network do not enter.
    """
    apart = network(family)
    own = {name: value for name, value in vars(family).items() if value is not apart}
    own |= {part: module for part, module in family.trainable.items() if module is not apart}
    digest = hashlib.sha256(json.dumps([LIBRARIES, family.name, _machine(family)]).encode())
    for name in sorted(own):
        digest.update(f"{name} {_settings(own[name])}".encode())
        for key, weight in _weights(own[name]):
            spaced = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
            digest.update(f"{key} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(spaced.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _machine(family: Family) -> str:
    """Kernels differ in their last bits between kinds of processors, and between numbers of threads."""
    if family.device.type == "cuda":
        return torch.cuda.get_device_name(family.device)
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{family.device.type} {kind} {torch.get_num_threads()}"


def _settings(value: Any) -> str:
    """What a part says of itself, without the place where it was loaded from."""
    if isinstance(value, str | int | float | bool | torch.dtype):
        return str(value)
    if hasattr(value, "backend_tokenizer"):
        return f"{value.model_max_length} {value.backend_tokenizer.to_str()}"
    config = getattr(value, "config", None)
    if config is None and hasattr(value, "to_json_string"):  # an image processor
        return value.to_json_string()
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return json.dumps({k: v for k, v in sorted(config.items()) if k[0] != "_"}, default=str)


def _weights(value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [("", value)]
    if not isinstance(value, torch.nn.Module):
        return []
    named = adapters.base_weights(value.state_dict().items())
    return sorted((k, w) for k, w in named.items() if w.numel())
