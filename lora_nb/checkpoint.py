"""Checkpoints: atomic, verified, exact.

A checkpoint is a folder checkpoint-<step> of state.safetensors, meta.json and MANIFEST.json. It is written under a
temporary name and renamed when every byte is on the disk; the manifest holds sizes and sha256 sums and decides whether
a folder counts. Nothing is pickled. Randomness is by counter, so there is no random state to keep.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from lora_nb.errors import CheckpointError
from lora_nb.files import sync_folder, write_through

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: flat tensors by name and the plain values beside them."""

    folder: Path
    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]
) -> Path:
    """Write checkpoint-<step> of a run and read it back; returns its folder.

    Raises CheckpointError if the disk has not enough room or refuses; older checkpoints are untouched either way.
    """
    contents = {
        "state.safetensors": save({name: t.contiguous() for name, t in tensors.items()}),
        "meta.json": json.dumps({"step": step} | meta, indent=2).encode(),
    }
    contents[MANIFEST] = json.dumps(
        {
            "step": step,
            "run": meta["run"],
            "files": {name: _entry(data) for name, data in contents.items()},
        },
        indent=2,
    ).encode()
    target = run / f"checkpoint-{step}"
    temporary = run / f".checkpoint-{step}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, data in contents.items():  # the manifest is last
            write_through(temporary / name, data)
        sync_folder(temporary)
        if target.exists():  # the same step of the same run, written before an interrupt
            shutil.rmtree(target)
        os.rename(temporary, target)
        sync_folder(run)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        need, free = (
            sum(map(len, contents.values())) / 1e6,
            shutil.disk_usage(_existing(run)).free / 1e6,
        )
        raise CheckpointError(
            f"Checkpoint {step} could not be written to {run} ({error.strerror or error}): it needs {need:.1f} MB and "
            f"{free:.1f} MB are free; older checkpoints are intact."
        ) from error
    verify(target)
    return target


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def verify(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each equal to its manifest; raises CheckpointError naming the first that is not."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        contents = {
            name: (folder / name).read_bytes() for name in ("state.safetensors", "meta.json")
        }
        for name, data in contents.items():
            if _entry(data) != listed[name]:
                raise CheckpointError(
                    f"{folder / name} is not what was written (size or sha256 differs)."
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint ({type(error).__name__}: {error})."
        ) from error
    return contents


def read(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint; raises CheckpointError."""
    contents = verify(folder)
    meta = json.loads(contents["meta.json"])
    return Checkpoint(folder, meta["step"], load(contents["state.safetensors"]), meta)


def found(run: Path) -> list[Path]:
    """The checkpoint folders of a run that have a manifest, newest first."""
    folders = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    folders = [p for p in folders if (p / MANIFEST).is_file()]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning that names the file."""
    for folder in found(run):
        try:
            return read(folder)
        except CheckpointError as error:
            warnings.warn(f"{error} The one before it is used.", stacklevel=2)
    return None


def prune(run: Path, limit: int | None, keep: set[int]) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest, never a step in `keep`."""
    if limit is None:
        return
    spare = [p for p in found(run) if int(p.name.split("-")[1]) not in keep]
    for folder in spare[limit:]:
        shutil.rmtree(folder)


def sweep(run: Path) -> None:
    """Remove temporary folders that a killed save has left."""
    for leftover in run.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
