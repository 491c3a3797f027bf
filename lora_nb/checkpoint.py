"""Checkpoints: atomic, verified, exact.

A checkpoint is a folder checkpoint-<step> of state.safetensors, meta.json and MANIFEST.json. It is written under a
temporary name, read back, and renamed when every byte is on the disk; the manifest holds sizes and sha256 sums and
decides whether a folder counts. Nothing is pickled. Randomness is by counter, so there is no random state to keep.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from lora_nb.errors import CheckpointError, NumericsError
from lora_nb.files import TEMPORARY, free_megabytes, sync_folder, temporary_beside, write_through

STATE, META, MANIFEST = "state.safetensors", "meta.json", "MANIFEST.json"


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

    Raises CheckpointError if the disk has not enough room or refuses, NumericsError if a number is not finite; older
    checkpoints are untouched either way.
    """
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"{name} is not finite after step {step}, so no checkpoint was written; go back to an older one with a "
                "lower learning rate."
            )
    contents = {
        STATE: save({name: t.contiguous() for name, t in tensors.items()}),
        META: json.dumps({"step": step} | meta, indent=2).encode(),
    }
    contents[MANIFEST] = _manifest(contents)
    need = sum(map(len, contents.values()))
    target = run / f"checkpoint-{step}"
    temporary = temporary_beside(target)
    require_room(run, need)
    try:
        temporary.mkdir(parents=True)
        for name, data in contents.items():  # the manifest is last
            write_through(temporary / name, data)
        sync_folder(temporary)
        verify(temporary)
        if target.exists():  # of a run that went on from an older one, or damaged
            discard(target)
        os.rename(temporary, target)
        sync_folder(run)
    except (OSError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"Checkpoint {step} could not be written to {run} ({reason}): it needs {need / 1e6:.1f} MB and "
            f"{free_megabytes(run):.1f} MB are free; older checkpoints are intact. Make room, then run the same again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def require_room(run: Path, size: int) -> None:
    """Raise CheckpointError unless twice `size` bytes are free: a new checkpoint is whole before an old one goes."""
    free = free_megabytes(run)
    if free < 2 * size / 1e6:
        raise CheckpointError(
            f"The disk of {run} is too full for a checkpoint: {2 * size / 1e6:.1f} MB are needed (twice its size) and "
            f"{free:.1f} MB are free; make room, or choose an output_dir on another disk."
        )


def _manifest(contents: dict[str, bytes]) -> bytes:
    """What MANIFEST.json says of the other two files: a pure function of them, so that no bit of it goes unchecked."""
    meta = json.loads(contents[META])
    files = {name: _entry(contents[name]) for name in (STATE, META)}
    return json.dumps({"step": meta["step"], "run": meta["run"], "files": files}, indent=2).encode()


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def verify(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each equal to its manifest; raises CheckpointError naming the first that is not."""
    contents = {}
    for name in (MANIFEST, STATE, META):
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read ({error.strerror}).") from error
    try:
        listed = json.loads(contents[MANIFEST])["files"]
        damaged = next((n for n in (STATE, META) if listed[n] != _entry(contents[n])), None)
        if damaged is None and contents[MANIFEST] != _manifest(contents):
            damaged = MANIFEST
    except (ValueError, KeyError, TypeError, RecursionError):
        damaged = MANIFEST
    if damaged:
        raise CheckpointError(
            f"{folder / damaged} is not what was written (size or sha256 differs)."
        )
    return contents


def read(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint; raises CheckpointError."""
    contents = verify(folder)
    meta = json.loads(contents[META])
    return Checkpoint(folder, meta["step"], load(contents[STATE]), meta)


def found(run: Path) -> list[Path]:
    """The checkpoint folders of a run that have a manifest, newest first."""
    folders = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    folders = [p for p in folders if (p / MANIFEST).is_file()]
    return sorted(folders, key=step_of, reverse=True)


def latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning that names the file."""
    folders = found(run)
    for folder in folders:
        try:
            return read(folder)
        except CheckpointError as error:
            last = folder == folders[-1]
            instead = "training begins at step 1" if last else "the one before it is used"
            warnings.warn(f"{error} So {instead}.", stacklevel=2)
    return None


def prune(run: Path, limit: int | None, keep: set[int], after: int | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest, never a step in `keep`.

    after: a run that went back to an older checkpoint is at this step; what lies beyond is of the way it has left.
    """
    folders = found(run)
    beyond = [p for p in folders if after is not None and step_of(p) > after]
    ours = [p for p in folders if p not in beyond and step_of(p) not in keep]
    for folder in [*beyond, *(ours[limit:] if limit else [])]:
        discard(folder)


def runs(folders: list[Path]) -> set[str]:
    """The run ids that the manifests of checkpoint folders name, as far as they can be read."""
    named = set()
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            named.add(json.loads((folder / MANIFEST).read_bytes())["run"])
    return named


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.split("-")[1])


def discard(folder: Path) -> None:
    """Delete a checkpoint in one stroke: it is renamed first, so that a kill leaves no half of it to be found."""
    try:
        aside = temporary_beside(folder)
        os.rename(folder, aside)
        shutil.rmtree(aside)
    except OSError as error:
        warnings.warn(f"{folder} could not be deleted ({error.strerror}).", stacklevel=3)


def sweep(run: Path) -> None:
    """Remove the temporary files and folders that a killed process has left."""
    for leftover in run.iterdir():
        if TEMPORARY.fullmatch(leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
