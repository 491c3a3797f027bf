"""Where data, runs and caches lie on each platform."""

import os
from pathlib import Path

from lora_nb.env.platforms import where
from lora_nb.errors import ConfigError, ModelError

_REPO = Path(__file__).resolve().parents[2]
_DRIVE = Path("/content/drive/MyDrive")  # where Colab mounts it


def data_dir() -> Path:
    """The folder of the embedded base model and pictures; raises ModelError if it is not found.

    Looked for in LORA_NB_DATA, beside the package, and upwards from the working directory.
    """
    if chosen := os.environ.get("LORA_NB_DATA"):
        candidates = [Path(chosen)]
    else:
        here = Path.cwd()
        candidates = [folder / "data" for folder in (_REPO, here, *here.parents)]
    for folder in candidates:
        if (folder / "base" / "model_index.json").is_file():
            return folder
    raise ModelError(
        f"No embedded base model in {candidates[0]}; work in a clone of the repository or set "
        "LORA_NB_DATA to its data folder."
    )


def runs_dir() -> Path:
    """The folder of all runs: LORA_NB_RUNS, Colab's own disk, Kaggle's working folder, else runs/."""
    if chosen := os.environ.get("LORA_NB_RUNS"):
        return Path(chosen)
    if where() == "colab":
        return Path("/content/runs")
    if where() == "kaggle":
        return Path("/kaggle/working/runs")
    return (_REPO if (_REPO / "pyproject.toml").is_file() else Path.cwd()) / "runs"


def keep_dir() -> Path | None:
    """Where copies of runs outlive this machine: LORA_NB_KEEP, on Colab a mounted Drive; None where none is needed.

    Nothing trains there: a Drive is slow, and its mount drops after some hours.
    """
    if chosen := os.environ.get("LORA_NB_KEEP"):
        return Path(chosen)
    if where() == "colab" and _DRIVE.is_dir():
        return _DRIVE / "lora_nb" / "runs"
    return None


def cache_dir() -> Path:
    """The folder of what can be computed again: LORA_NB_CACHE, else lora_nb in the user's cache folder."""
    return Path(os.environ.get("LORA_NB_CACHE") or Path.home() / ".cache" / "lora_nb")


def run_dir(name: str) -> Path:
    """The folder of one run, not created here; ConfigError on a name that is not one folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(
            f"A run's name is one folder name, not {name!r}; choose one such as 'my-style'."
        )
    return runs_dir() / name
