"""The folder of a run: its config, its history, and whether a config may go on in it."""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_nb import checkpoint
from lora_nb.config import TrainConfig, flat
from lora_nb.errors import CheckpointError
from lora_nb.files import free_megabytes, write_atomically

CONFIG, HISTORY = "config.json", "history.jsonl"

# Settings that change what is looked at or kept, not what is learned: they may differ when a run goes on.
FREE = {
    "output_dir", "overwrite", "resume_from_checkpoint", "resume_override", "max_train_steps", "num_train_epochs",
    "validation_prompts", "num_validation_images", "validation_steps", "validation_epochs", "num_inference_steps",
    "guidance_scale", "guidance_rescale", "probe_steps", "probe_size", "checkpointing_steps",
    "checkpoints_total_limit", "report_to", "logging_dir", "cache_latents", "cache_to_disk",
    "dataloader_num_workers", "seed", "cuda_graph", "channels_last", "fused_kernels", "offload",
    "output_kohya_format", "gradient_checkpointing", "data.validation_data_dir",
    "pretrained_decoder_model_name_or_path", "sample_batch_size",
}  # fmt: skip


def read_config(folder: str | Path) -> TrainConfig:
    """The resolved config of a run; raises CheckpointError if there is no run in the folder.

    Its output_dir is that folder, also where the run was moved or copied since: what goes on from it goes on there.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"There is no run in {folder} (no {CONFIG}); train one there first.")
    # What is no UTF-8 shows as a wrong value.
    config = TrainConfig.from_json(path.read_text(encoding="utf-8", errors="replace"))
    return dataclasses.replace(config, output_dir=str(folder))


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line cut off by a crash is left out."""
    path = Path(folder) / HISTORY
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(event, dict):
            break
        events.append(event)
    return events


class HistoryTail:
    """The history of a run that goes on: `read` parses only what was appended since the last time."""

    def __init__(self, folder: str | Path):
        self.path, self.events = Path(folder) / HISTORY, []
        self._file, self._offset = None, 0

    def read(self) -> list[dict[str, Any]]:
        """All events so far, oldest first; a last line without its end is left for the next time."""
        if not self.path.is_file():
            return self.events
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if (
                status.st_ino != self._file or status.st_size < self._offset
            ):  # rewound: another file
                self._file, self._offset, self.events = status.st_ino, 0, []
            file.seek(self._offset)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._offset += sum(map(len, whole))
        self.events = self.events + [json.loads(line) for line in whole]
        return self.events


class History:
    """What a training writes into the history of its run; with several processes, only the main one does."""

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main

    def record(self, event: str, **values: Any) -> None:
        """Append an event; raises CheckpointError if the disk refuses."""
        if self.main:
            append(self.folder, {"event": event} | values)

    def ends_at(self, step: int) -> bool:
        """Whether it has the end of a run of so many steps."""
        events = read_history(self.folder)
        return any(e["event"] == "end" and e["step"] == step for e in events)


def append(folder: Path, event: dict[str, Any]) -> None:
    """Add one line to the history; raises CheckpointError if the disk refuses."""
    try:
        with open(folder / HISTORY, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder / HISTORY} could not be written ({error.strerror}): {free_megabytes(folder):.1f} MB are free; "
            "make room, then run the same again."
        ) from error


def by_step(events: Sequence[Mapping[str, Any]], kind: str) -> dict[int, Mapping[str, Any]]:
    """The events of one kind by step, in order of steps; a step that was done again counts once, as the later one."""
    found = {event["step"]: event for event in events if event["event"] == kind}
    return {step: found[step] for step in sorted(found)}


def changes(events: list[dict[str, Any]]) -> dict[int, float]:
    """What was changed in mid-run: by step, the factor of the learning rate from the next step on."""
    return {e["step"]: e["learning_rate_factor"] for e in events if e["event"] == "change"}


def rewind(folder: Path, step: int, kept: Container[int] = ()) -> None:
    """Drop what the history says of steps after `step`, which are about to be done again, and changes not in `kept`."""
    events = [
        e
        for e in read_history(folder)
        if (e["step"] in kept if e["event"] == "change" else e.get("step", 0) <= step)
    ]
    write_atomically(folder / HISTORY, "".join(json.dumps(e) + "\n" for e in events))


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings, by dotted name, that change what is learned and differ between two configs."""
    a, b = (_with_tuples(flat(dataclasses.asdict(config))) for config in (old, new))
    return {
        name: (a.get(name), b.get(name))
        for name in sorted(a.keys() | b.keys())
        if name not in FREE and a.get(name) != b.get(name)
    }


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def prepare(config: TrainConfig) -> tuple[TrainConfig, checkpoint.Checkpoint | None]:
    """Fill in the seed and find what to continue from: (config, checkpoint or None).

    Raises CheckpointError if the folder holds another run, if an option has changed, or if the named checkpoint is not
    there. Deletes an old run only if `overwrite` says so.
    """
    folder = Path(config.output_dir)
    if config.overwrite:
        delete(folder)
    checkpoint.sweep(folder)
    saved = _chosen(config, folder)
    if config.seed is None:
        config = dataclasses.replace(config, seed=_seed_of(folder, saved))
    if saved:
        _refuse_changes(folder, TrainConfig.from_dict(saved.meta["config"]), config)
    return config, saved


def _seed_of(folder: Path, saved: checkpoint.Checkpoint | None) -> int:
    """The seed that the run has already, or a new one."""
    seed = saved.meta["config"]["seed"] if saved else None
    if seed is None and (folder / CONFIG).is_file():
        seed = read_config(folder).seed
    return secrets.randbits(31) if seed is None else seed


def save_config(config: TrainConfig) -> Path:
    """Write a config into its run folder for a later `train`; returns the path.

    Raises CheckpointError if something is trained there already with other settings.
    """
    folder = Path(config.output_dir)
    if trained := checkpoint.latest(folder):
        _refuse_changes(folder, TrainConfig.from_dict(trained.meta["config"]), config)
    return write_atomically(folder / CONFIG, config.to_json())


def _refuse_changes(folder: Path, old: TrainConfig, new: TrainConfig) -> None:
    changed = differences(old, new)
    if new.seed is not None and old.seed != new.seed:
        changed["seed"] = (old.seed, new.seed)
    changed = {name: values for name, values in changed.items() if name not in new.resume_override}
    if changed:
        raise _other_run(folder, changed)


def _chosen(config: TrainConfig, folder: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: the newest, or the one that is named by path or, in this folder, by bare name."""
    wanted, found = config.resume_from_checkpoint, checkpoint.found(folder)
    if wanted in (None, "latest"):
        return checkpoint.latest(folder)
    place = Path(wanted)
    if len(place.parts) == 1 and not place.is_dir():
        place = folder / place
    if not (place / checkpoint.MANIFEST).is_file():
        if not found:
            raise CheckpointError(
                f"There is no checkpoint in {folder}, so nothing to resume as {wanted}; leave out "
                "resume_from_checkpoint."
            )
        names = ", ".join(p.name for p in found)
        raise CheckpointError(
            f"There is no complete checkpoint at {wanted}; found in {folder}: {names}."
        )
    saved = checkpoint.read(place)
    if not checkpoint.runs(found) <= {saved.meta["run"]}:
        raise CheckpointError(
            f"{place} belongs to another run than the checkpoints in {folder}: choose another output_dir for going on "
            "from it, or delete the old run with overwrite=True."
        )
    return saved


def _other_run(folder: Path, changed: dict[str, tuple[Any, Any]]) -> CheckpointError:
    listed = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
    names = ", ".join(repr(name) for name in changed)
    return CheckpointError(
        f"{folder} holds a run with other settings ({listed}): choose another output_dir, delete the old run with "
        f"overwrite=True, or go on with the new values by resume_override=[{names}]."
    )


def delete(folder: Path) -> None:
    """Remove a run's own files; anything else in the folder stays."""
    if not (folder / CONFIG).is_file():
        return
    for path in checkpoint.found(folder):
        shutil.rmtree(path)
    shutil.rmtree(folder / "samples", ignore_errors=True)
    for name in (HISTORY, CONFIG):
        if (folder / name).is_file():
            os.unlink(folder / name)
