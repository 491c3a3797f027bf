"""Copies of runs in a place that outlives this machine, such as a mounted Drive: written, read back, compared.

Training writes to the local disk only; what is complete there is copied. A run whose machine is gone comes back from
its copy. Where `keep_dir` names no place nothing happens.
"""

import hashlib
import os
import shutil
import warnings
from pathlib import Path

from lora_nb.env.folders import keep_dir, runs_dir
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.files import TEMPORARY, temporary_beside

_CHECKPOINT, _MANIFEST = (
    "checkpoint-*",
    "MANIFEST.json",
)  # without its manifest a checkpoint is none
_OWN = {".lock", "launch.json"}  # of this machine's processes


def keep(folder: Path) -> list[Path]:
    """Copy what is new in a run's folder, and forget checkpoints that it has pruned; returns the copies made.

    A place that does not answer is warned of, and the next call tries again: the local files are complete.
    """
    home = _home(folder)
    if home is None:
        return []
    try:
        made = _copy_all(_files(folder), folder, home, anew=True)
        for old in home.glob(_CHECKPOINT):
            if not (folder / old.name).is_dir():
                (old / _MANIFEST).unlink(missing_ok=True)  # first: a half is no checkpoint
                shutil.rmtree(old)
    except OSError as error:
        warnings.warn(
            f"{folder} could not be copied to {home} ({error.strerror or error}): it is complete here, and the next "
            "checkpoint tries again; is Drive still mounted?",
            stacklevel=2,
        )
        return []
    return made


def bring_back(folder: Path) -> list[Path]:
    """Copy a kept run back, if nothing was trained in this folder on this machine; returns the files that came.

    A file that is here already stays as it is. Raises CheckpointError if the place stops answering half way.
    """
    home = _home(folder)
    if home is None or not home.is_dir() or any(folder.glob(_CHECKPOINT)):
        return []
    try:
        return _copy_all(_files(home), home, folder, anew=False)
    except OSError as error:
        raise CheckpointError(
            f"The copy of this run in {home} could not be read ({error.strerror or error}): mount Drive again, or "
            f"choose another run name to begin without it."
        ) from error


def need(path: Path | str, notebook: str) -> Path:
    """The path, if it is here or comes back from the run's copy; else ConfigError that names the notebook to run."""
    path = Path(path)
    if not path.exists() and path.resolve().is_relative_to(runs_dir().resolve()):
        bring_back(runs_dir() / path.resolve().relative_to(runs_dir().resolve()).parts[0])
    if not path.exists():
        raise ConfigError(f"There is no {path} yet: run {notebook} first, it writes this.")
    return path


def _home(folder: Path) -> Path | None:
    """Where the copy of this folder lies; only runs of the workspace are kept."""
    kept = keep_dir()
    folder = folder.resolve()
    return kept / folder.name if kept and folder.parent == runs_dir().resolve() else None


def _files(folder: Path) -> list[Path]:
    """All files of a run, the manifest of each checkpoint behind everything else."""
    found = (path for path in folder.rglob("*") if path.is_file())
    named = [p for p in found if p.name not in _OWN and not TEMPORARY.fullmatch(p.name)]
    return sorted(named, key=lambda path: (path.name == _MANIFEST, path))


def _copy_all(files: list[Path], source: Path, target: Path, anew: bool) -> list[Path]:
    """Copy files to the same place below another folder; anew: also over those that are older there."""
    made = []
    for file in files:
        copy = target / file.relative_to(source)
        if copy.is_file() and not (anew and _differs(file, copy)):
            continue
        _copy(file, copy)
        made.append(copy)
    return made


def _differs(file: Path, copy: Path) -> bool:
    one, other = file.stat(), copy.stat()
    if one.st_size != other.st_size:
        return True
    return one.st_mtime > other.st_mtime and _sum(file) != _sum(copy)


def _copy(file: Path, copy: Path) -> None:
    """Write under a temporary name, read back, compare, rename; raises OSError if the bytes differ."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(copy)
    try:
        shutil.copyfile(file, temporary)
        if _sum(temporary) != _sum(file):
            raise OSError(f"{copy.name} read back differs from what was written")
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _sum(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
