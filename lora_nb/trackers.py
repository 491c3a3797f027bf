"""Trackers through accelerate: tensorboard, wandb and trackio are told losses, probes and samples of a run.

What they keep lies in the run's folder (trackio keeps its own, TRACKIO_DIR); no token, path or command line goes in.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from lora_nb.config import TrainConfig, flat
from lora_nb.errors import ConfigError
from lora_nb.redaction import redacted, shown

KNOWN = ("tensorboard", "wandb", "trackio")
PROJECT = "lora_nb"
# What wandb would write down by itself: host, user, command line, git remote, installed packages, the terminal.
UNASKED = {
    "host": "",
    "disable_git": True,
    "disable_code": True,
    "console": "off",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "silent": True,
}


def wanted(report_to: str | None) -> list[str]:
    """The trackers that a setting means; `all` are those that are installed.

    Raises ConfigError for one that is not known or not installed.
    """
    if report_to is None:
        return []
    installed = [name for name in KNOWN if importlib.util.find_spec(name)]
    if report_to == "all":
        return installed
    if report_to not in KNOWN:
        raise ConfigError(
            f"report_to is {report_to!r}; choose one of {', '.join(KNOWN)}, or all for those that are installed."
        )
    if report_to not in installed:
        raise ConfigError(
            f"report_to is {report_to!r}, which is not installed here; pip install {report_to}, or leave it out "
            "(history.jsonl has the same numbers)."
        )
    return [report_to]


def place(config: TrainConfig) -> ProjectConfiguration:
    """Where accelerate lets trackers write: logging_dir inside the run's folder."""
    folder = Path(config.output_dir)
    return ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir))


def start(accelerator: Accelerator, config: TrainConfig) -> None:
    """Open the run's trackers, once, on the main process; raises ConfigError if one does not start."""
    if not accelerator.log_with or accelerator.trackers or not accelerator.is_main_process:
        return
    folder, name = Path(accelerator.logging_dir), Path(config.output_dir).resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "wandb": {"name": name, "dir": str(folder), "settings": UNASKED},
        "trackio": {"name": name, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False},
    }
    try:
        accelerator.init_trackers(PROJECT, settings(config), options)
    except Exception as error:  # each tracker has errors of its own
        accelerator.trackers.clear()
        why = redacted(str(error)).strip().partition("\n")[0][:200].rstrip(".")
        raise ConfigError(
            f"The tracker {config.report_to} does not start ({type(error).__name__}: {why}); log in to it, set it to "
            "work offline (WANDB_MODE=offline), or leave out report_to."
        ) from error


def settings(config: TrainConfig) -> dict[str, Any]:
    """The config as flat names with plain values, without folders and secrets."""
    return {name: _plain(value) for name, value in flat(config.to_dict()).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return redacted(", ".join(map(str, value)))
    return "default" if value is None else redacted(shown(value))


def log_step(accelerator: Accelerator, step: Any) -> None:
    """Tell the trackers a `trainer.Step`: loss, gradient norm, learning rates, and the probe if there was one."""
    values = {"loss": step.loss, "grad_norm": step.grad_norm, "seconds": step.seconds}
    values |= {f"lr/{part}": rate for part, rate in step.lr.items()}
    if step.probe:
        probe = step.probe
        values |= {"probe/loss": probe.loss, "probe/difference": probe.difference}
        values |= {"probe/standard_error": probe.standard_error}
    accelerator.log(values, step=step.step)


def log_pictures(
    accelerator: Accelerator,
    config: TrainConfig,
    pictures: Sequence[Image.Image],
    step: int,
) -> None:
    """Tell the trackers the samples of a step: those of one prompt together, in the order of the prompts."""
    start(accelerator, config)
    seeds = config.num_validation_images
    rows = {
        f"samples/{p} {redacted(prompt)}": list(pictures[p * seeds : (p + 1) * seeds])
        for p, prompt in enumerate(config.validation_prompts)
    }
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = {name: np.stack([np.asarray(p) for p in row]) for name, row in rows.items()}
            tracker.log_images(stacked, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images(rows, step=step)
        else:
            import trackio

            # It takes one picture under a name.
            tracker.log({name: trackio.Image(row[0]) for name, row in rows.items()}, step=step)


def finish(accelerator: Accelerator) -> None:
    """Close the trackers; a later loop over the same training opens them again."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
