"""Other ways for a run to begin: from a checkpoint of another one, also with a higher rank, or again from its history.

All draws are named by seed and sample number, so two branches of one run see the same pictures, noise and timesteps,
and their losses can be subtracted picture by picture.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_nb import adapters, checkpoint, run_folder, run_state
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.families import Family
from lora_nb.files import write_atomically
from lora_nb.probe import Paired, difference, paired
from lora_nb.trainer import Step, Training, train

BEGINNINGS = ("start", "resume", "fork")


def fork(
    folder: str | Path,
    output_dir: str | Path,
    rank: int | None = None,
    alpha: float | None = None,
    step: int | None = None,
    family: Family | None = None,
    **changes: Any,
) -> Training:
    """A new run in output_dir that goes on from a checkpoint of the run in `folder`, which is only read.

    rank: higher than before, for all parts; A gets fresh rows, B zero columns and Adam zero moments, so the adapter's
    output at the fork is the same. alpha: for all parts; without it alpha / rank stays. With it B is rescaled, so that
    the output stays all the same. step: of the checkpoint, the newest if empty. family: the base model, loaded already.
    changes: fields of TrainConfig, such as learning_rate. Seed and step count go on, so twins see the same pictures,
    noise and timesteps. Called again, it goes on with the fork. Raises CheckpointError if there is no such checkpoint
    or another run in output_dir, ConfigError if the rank would fall or no step is left to do.
    """
    saved = _checkpoint(Path(folder), step)
    before = TrainConfig.from_dict(saved.meta["config"])
    lora = {part: _raised(part, spec, rank, alpha) for part, spec in before.lora.items()}
    fixed = {"output_dir": str(output_dir), "overwrite": False, "resume_from_checkpoint": None}
    config = before.replace(**{"lora": lora} | changes | fixed)
    config.validate()
    origin = {"run": saved.meta["run"], "step": saved.step, "folder": str(folder)}
    if _is_there(Path(output_dir), origin):
        return train(config, family)
    return _branch(saved, config, origin, family)


def replay(folder: str | Path, output_dir: str | Path) -> Iterator[Step]:
    """Train a run again from its config and history, into another folder: the same steps, weights equal bit for bit.

    What was changed in mid-run happens at the same step, and a fork begins at the same checkpoint of its parent. Bit
    for bit holds on the CPU in float32. Raises CheckpointError if the run went on with settings of resume_override.
    """
    config, events = run_folder.read_config(folder), run_folder.read_history(folder)
    if config.resume_override:
        raise CheckpointError(
            f"{folder} went on with other settings (resume_override {list(config.resume_override)}), and its history "
            "does not say since when; only a run of one config can be trained again."
        )
    fixed = {"output_dir": str(output_dir), "overwrite": False, "resume_from_checkpoint": None}
    if checkpoint.found(Path(output_dir)):
        raise CheckpointError(
            f"{output_dir} holds a run already; choose another output_dir to train {folder} again."
        )
    config = config.replace(**fixed)
    last = max((event["step"] for event in events if event["event"] == "step"), default=0)
    begun = [event for event in events if event["event"] in BEGINNINGS]
    origin = next((event for event in reversed(begun) if event["event"] == "fork"), None)
    begun = begun[begun.index(origin) :] if origin else begun
    for event, following in zip(begun, [*begun[1:], {"step": last}], strict=True):
        if following["step"] == event["step"]:
            continue
        part = config.replace(max_train_steps=event["max_train_steps"])
        training = _again(part, event["forked_from"]) if event is origin else train(part)
        training.rates.plan(run_folder.changes(events))
        for done in training:
            yield done
            if done.step == following["step"]:
                break


def paired_losses(a: str | Path, b: str | Path) -> dict[int, Paired]:
    """By step, the mean of b - a over the pictures of that step, for the steps that both runs have done.

    Below zero b is better. Both must have the same seed, pictures and batch, or nothing pairs; raises CheckpointError.
    """
    runs = [run_folder.by_step(run_folder.read_history(folder), "step") for folder in (a, b)]
    common = sorted(runs[0].keys() & runs[1].keys())
    if not common or any(runs[0][s]["timesteps"] != runs[1][s]["timesteps"] for s in common):
        raise CheckpointError(
            f"The runs in {a} and {b} have not trained on the same draws; fork both from one checkpoint, or give them "
            "one seed, batch and set of pictures."
        )
    return {
        s: difference([y - x for x, y in zip(*(r[s]["per_image"] for r in runs), strict=True)])
        for s in common
    }


def paired_probes(a: str | Path, b: str | Path) -> dict[int, Paired]:
    """By step, the paired difference b - a of the probes of two runs; below zero b is better.

    Raises ConfigError if the probes are of other pictures or another base.
    """
    runs = [run_folder.by_step(run_folder.read_history(folder), "probe") for folder in (a, b)]
    return {
        s: paired(*(run[s]["by_timestep"] for run in runs))
        for s in sorted(runs[0].keys() & runs[1].keys())
    }


def _checkpoint(folder: Path, step: int | None) -> checkpoint.Checkpoint:
    if step is not None and (folder / f"checkpoint-{step}" / checkpoint.MANIFEST).is_file():
        return checkpoint.read(folder / f"checkpoint-{step}")
    saved = checkpoint.latest(folder) if step is None else None
    if saved is None:
        names = ", ".join(path.name for path in checkpoint.found(folder)) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint-{step}"
        raise CheckpointError(
            f"There is {wanted} in {folder} to fork from (found: {names}); train there first."
        )
    return saved


def _raised(part: str, spec: LoraSpec, rank: int | None, alpha: float | None) -> LoraSpec:
    """The spec with the new rank; alpha grows with it unless it is given."""
    rank = spec.rank if rank is None else rank
    if rank < spec.rank:
        raise ConfigError(
            f"The rank of {part} is {spec.rank} and can only grow in a fork, not fall to {rank}; "
            "lora_nb.formats cuts finished adapters down."
        )
    if alpha is None and spec.lora_alpha is not None:
        alpha = spec.lora_alpha * rank / spec.rank
    return dataclasses.replace(spec, rank=rank, lora_alpha=alpha)


def _is_there(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether this very fork lies in the folder; raises CheckpointError if another run does."""
    saved, events = checkpoint.latest(folder), run_folder.read_history(folder)
    ours = [e["forked_from"] for e in events if e["event"] == "fork"][-1:] == [origin]
    if saved is not None and saved.meta.get("forked_from") == origin:
        return True
    if saved is None and (ours or not any(e["event"] == "step" for e in events)):
        return False  # nothing, or a fork that was killed before its first checkpoint
    raise CheckpointError(
        f"{folder} holds another run than this fork; choose another output_dir, or delete that folder."
    )


def _branch(
    saved: checkpoint.Checkpoint,
    config: TrainConfig,
    origin: dict[str, Any],
    family: Family | None = None,
) -> Training:
    """A training of `config` with the state of a checkpoint, which it writes down as its own first one."""
    training = train(config, family)
    try:
        if training.max_train_steps <= saved.step:
            raise ConfigError(
                f"max_train_steps is {training.max_train_steps} and the fork begins after step {saved.step}; give the "
                "fork a larger max_train_steps."
            )
        training.adopt(saved, _fitting(training, saved), origin)
        _copy_past(saved, Path(origin["folder"]), training)
        training.save()
    except BaseException:
        training.lock.release()
        raise
    return training


def _again(config: TrainConfig, origin: dict[str, Any]) -> Training:
    """The fork that an event of a history tells of, once more."""
    saved = _checkpoint(Path(origin["folder"]), origin["step"])
    if saved.meta["run"] != origin["run"]:
        raise CheckpointError(
            f"{saved.folder} is not the checkpoint that this run was forked from, so it cannot be trained again."
        )
    return _branch(saved, config, origin)


def _fitting(training: Training, saved: checkpoint.Checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in the shapes of the new training."""
    before = TrainConfig.from_dict(saved.meta["config"])
    old, new = adapters.named(training.family, before.lora), training.learner.lora
    fresh = training.learner.untrained
    mine = {f"adapter/{part}/{key}" for part, keys in fresh.items() for key in keys}
    if mine != {name for name in saved.tensors if name.startswith("adapter/")}:
        raise ConfigError(
            "A fork keeps its parts and target_modules; train a new run for other layers."
        )
    if before.use_8bit_adam and any(old[part].rank != new[part].rank for part in old):
        raise ConfigError(
            "The 8-bit moments of use_8bit_adam cannot grow; fork with the old rank, or train with plain AdamW."
        )
    shrink = {part: old[part].scale / new[part].scale for part in old}
    return run_state.grown(training.family, training.learner.optimizer, saved.tensors, shrink)


def _copy_past(saved: checkpoint.Checkpoint, parent: Path, training: Training) -> None:
    """The parent's history and samples up to the fork, so that the branch tells its whole story."""
    step, changes = saved.step, training.rates.changes
    events = [
        event
        for event in run_folder.read_history(parent)
        if (event["step"] in changes if event["event"] == "change" else event["step"] <= step)
    ]
    fork = {"event": "fork", "step": step, "forked_from": training.checkpoints.forked_from}
    totals = {"max_train_steps": training.max_train_steps, "parameters": training.parameters}
    lines = "".join(json.dumps(event) + "\n" for event in [*events, fork | totals])
    write_atomically(training.folder / run_folder.HISTORY, lines)
    for event in events:
        for name in event["files"] if event["event"] == "samples" else ():
            if (parent / name).is_file():
                (training.folder / name).parent.mkdir(exist_ok=True)
                shutil.copy2(parent / name, training.folder / name)
