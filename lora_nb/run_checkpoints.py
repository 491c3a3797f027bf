"""What the checkpoints of a run hold beside its tensors: who it is, what it was made from, where it stands."""

import secrets
from typing import Any

import torch
from accelerate import Accelerator

from lora_nb import checkpoint, run_folder, run_state
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError
from lora_nb.gradients import Gradients
from lora_nb.learner import Learner
from lora_nb.probe import ProbeResult
from lora_nb.run_folder import History


class RunCheckpoints:
    """Writes the checkpoints of one run, and brings it back to where one of them was written.

    run_id: names the run from its first step on. best: step and difference of the lowest probe; that checkpoint is
    never pruned. forked_from: run, step and folder of the checkpoint that it began from, if it is a fork.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        gradients: Gradients,
        history: History,
        fingerprint: str,
    ):
        self.config, self.accelerator, self.folder = config, accelerator, history.folder
        self.learner, self.gradients, self.fingerprint = learner, gradients, fingerprint
        self.run_id = secrets.token_hex(8)
        self.best: tuple[int, float] | None = None
        self.forked_from: dict[str, Any] | None = None

    def write(self, step: int) -> None:
        """Write checkpoint-<step>; raises CheckpointError or NumericsError as `save_checkpoint` does."""
        meta = self._meta(step)
        tensors = run_state.pack(self.learner.family, self.learner.optimizer)
        checkpoint.save_checkpoint(self.folder, step, tensors, meta)

    def prune(self, step: int) -> None:
        """Delete those beyond checkpoints_total_limit, but the best one, of a run that is at this step."""
        keep = {self.best[0]} if self.best else set()
        checkpoint.prune(self.folder, self.config.checkpoints_total_limit, keep, step)

    def note_best(self, step: int, probe: ProbeResult | None) -> None:
        """Remember the step if the probe was taken after it and is the lowest so far."""
        if probe and probe.step == step and (not self.best or probe.difference < self.best[1]):
            self.best = (step, probe.difference)

    def _meta(self, step: int) -> dict[str, Any]:
        scaler, changes = self.accelerator.scaler, self.learner.rates.changes
        return {
            "run": self.run_id,
            "best": self.best,
            "scaler": scaler.state_dict() if scaler else None,
            "micro_batch": self.gradients.micro_batch,
            "changes": {k: v for k, v in changes.items() if k < step},
            "forked_from": self.forked_from,
            "made_from": self._made_from(),
            "config": self.config.to_dict(),
        }

    def _made_from(self) -> dict[str, Any]:
        """What no setting names and yet decides what is learned, by the name that resume_override takes."""
        return {
            "data": self.fingerprint,
            "base": run_state.base_mark(self.learner.family),
            "processes": self.accelerator.num_processes,
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint of this run."""
        self._load(saved, saved.tensors)
        self.run_id, self.forked_from = saved.meta["run"], saved.meta.get("forked_from")
        self.best = tuple(saved.meta["best"]) if saved.meta["best"] else None
        # What was changed after the checkpoint happens again, unless an older one was asked for by name.
        if self.config.resume_from_checkpoint in (None, "latest"):
            events = run_folder.read_history(self.folder)
            self.learner.rates.changes |= run_folder.changes(events)

    def adopt(
        self,
        saved: checkpoint.Checkpoint,
        tensors: dict[str, torch.Tensor],
        origin: dict[str, Any],
    ) -> None:
        """Go on from a checkpoint of another run, with its tensors in this one's shapes, as a run of its own."""
        self._load(saved, tensors)
        self.forked_from = origin

    def _load(self, saved: checkpoint.Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        self._check_made_from(saved)
        run_state.unpack(self.learner.family, self.learner.optimizer, tensors)
        if self.accelerator.scaler and saved.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.meta["scaler"])
        self.gradients.micro_batch = min(self.gradients.micro_batch, saved.meta["micro_batch"])
        changes = saved.meta.get("changes", {})
        self.learner.rates.changes = {int(step): factor for step, factor in changes.items()}

    def _check_made_from(self, saved: checkpoint.Checkpoint) -> None:
        if "made_from" not in saved.meta:
            raise CheckpointError(
                f"{saved.folder} was written by another version of lora_nb; start anew with overwrite=True."
            )
        for name, now in self._made_from().items():
            before = saved.meta["made_from"][name]
            if before != now and name not in self.config.resume_override:
                what = {"data": "pictures or captions", "base": "weights of the base model"}
                raise CheckpointError(
                    f"The {what.get(name, 'number of ' + name)} are not those that {saved.folder} was trained with "
                    f"({name} was {str(before)[:16]}, now {str(now)[:16]}): choose another output_dir, start anew with "
                    f"overwrite=True, or go on with resume_override=[{name!r}]."
                )
