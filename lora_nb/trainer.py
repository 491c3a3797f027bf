"""The training loop: a generator that yields one small record per optimizer step.

It owns nothing visual; plots, samples and boards consume the records. accelerate gives device, precision and processes.
Stopping at any time leaves a complete checkpoint, and the same call goes on from it, bit for bit on CPU in float32.
"""

import atexit
import contextlib
import dataclasses
import math
import time
import warnings
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_nb import (
    checkpoint,
    class_pictures,
    data,
    env,
    formats,
    graphed,
    offload,
    precision,
    processes,
    run_folder,
    stopping,
    trackers,
)
from lora_nb.batches import Batches
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError, NumericsError
from lora_nb.families import Family, family_of
from lora_nb.files import write_atomically
from lora_nb.gradients import Gradients, refuse_gradient
from lora_nb.graphed import GraphedStep
from lora_nb.health import Health
from lora_nb.learner import Learner
from lora_nb.lock import Claim
from lora_nb.loss import Loss
from lora_nb.monitor import Monitor
from lora_nb.probe import ProbeResult
from lora_nb.redaction import public
from lora_nb.run_checkpoints import RunCheckpoints


@dataclass(frozen=True)
class Step:
    """One optimizer step, detached from all graphs.

    loss: the trained mean. lr: learning rate by part. grad_norm: before clipping, over all adapters; grad_norms: of
    each part. timesteps and per_image: one entry per picture. seconds: since the step before. health and probe: if they
    were measured after this step.
    """

    step: int
    loss: float
    lr: dict[str, float]
    grad_norm: float
    grad_norms: dict[str, float]
    timesteps: list[float]
    per_image: list[float]
    seconds: float
    images_seen: int
    health: Health | None = None
    probe: ProbeResult | None = None


def train(config: TrainConfig, family: Family | None = None) -> "Training":
    """Check everything, load or continue, and return the run; iterate over it to train.

    family: the base model of this config, loaded already; adapters on it are taken off. The result is the same.
    Raises LoraNbError (its subclasses) before the first step for any input that cannot be trained on.
    """
    folder = Path(config.output_dir).resolve()
    if folder in RUNNING:
        # Left half way by this process: it saves, then this one goes on from there.
        _finish(RUNNING[folder])
    training = Training(config, family)
    if training.start_step >= training.max_train_steps:
        warnings.warn(
            f"This run is already finished at step {training.start_step} of {training.max_train_steps}: raise "
            "max_train_steps to go on, or start anew with overwrite=True.",
            stacklevel=2,
        )
    return training


# The loops of this process that have not ended, by run folder.
RUNNING: weakref.WeakValueDictionary[Path, Generator] = weakref.WeakValueDictionary()


def _finish(steps: Generator) -> None:
    try:
        steps.close()
    except ValueError as error:
        # It is executing: this is called from inside its own loop or another thread.
        raise CheckpointError(
            "This very process is training in that folder at the moment; let it end, or choose another output_dir."
        ) from error


def _finish_all() -> None:
    """Loops that were left half way save what they have when the interpreter ends, while there still is one.

    Each does, also where another one fails. One that is executing is another thread's, and that has a
    `stopping.before_exit`.
    """
    with contextlib.ExitStack() as ends:
        for steps in RUNNING.values():
            if not steps.gi_running:
                ends.callback(steps.close)


class Training:
    """A run that is ready to train: pictures, base model with adapters, optimizer, folder.

    `interrupted` tells after the loop whether it stopped early; the same loop or the same config then goes on.
    """

    def __init__(self, config: TrainConfig, family: Family | None = None):
        config.validate()
        self.accelerator = processes.accelerator(config)
        if self.accelerator.mixed_precision != "no":  # which the launcher alone may have said
            config = config.replace(mixed_precision=self.accelerator.mixed_precision)
        # Data first: it is the cheapest to check and the likeliest to be wrong.
        self.pictures = data.load(config.data, "train")
        held_out = data.has_split(config.data, "validation")
        self.held_out = data.load(config.data, "validation") if held_out else None
        self.class_pictures = (
            class_pictures.load(config) if config.with_prior_preservation else None
        )
        self.folder = Path(config.output_dir)
        self.history = run_folder.History(self.folder, self.accelerator.is_main_process)
        self.lock = Claim(self.folder, self.accelerator.is_main_process)
        with self.lock.taken():
            self._make(config, family)

    def _make(self, config: TrainConfig, family: Family | None) -> None:
        """Base model, adapters and optimizer, fresh or from a checkpoint; then the run's folder."""
        self.config, resume = processes.main_decides(self.accelerator, lambda: _begun(config))
        config, accelerator, history = self.config, self.accelerator, self.history
        device = accelerator.device
        self.family = family or family_of(
            config,
            precision.DTYPES[accelerator.mixed_precision],
            "cpu" if config.offload else device,  # from where its network alone goes on
        )
        self.offload = offload.Offload(self.family, device) if config.offload else None
        if self.offload is None:
            offload.undo(self.family)
        epochs = config.num_train_epochs * self.steps_per_epoch
        self.max_train_steps = config.max_train_steps or epochs
        self.learner = Learner(
            config, self.family, accelerator, self.samples_per_step, self.max_train_steps, history
        )
        self.rates, self.parameters = self.learner.rates, self.learner.parameters
        if accelerator.is_main_process:  # weights and two moments each, 4 bytes a number
            checkpoint.require_room(self.folder, 12 * self.parameters)
        self.batches = Batches(
            config, accelerator, self.learner, self.pictures, self.class_pictures
        )
        self.cache, self.class_cache = self.batches.cache, self.batches.class_cache
        if self.offload is not None:
            offload.check(self.family, self.learner.lora, self.cache.encoded_each_time)
        self.gradients = Gradients(config, accelerator, self.learner, self.batches, history)
        self.graphed = (
            GraphedStep(config, self.learner, self.batches, self.gradients)
            if graphed.applies(config, accelerator, self.gradients)
            else None
        )
        self.monitor = Monitor(config, self.learner, self.max_train_steps, history)
        self.checkpoints = RunCheckpoints(
            config, accelerator, self.learner, self.gradients, history, self.batches.fingerprint
        )
        self.start_step, self.interrupted = 0, False
        self.stopped_by: int | None = None  # number of the signal that asked to stop
        if resume:
            self.checkpoints.restore(resume)
            self.start_step = resume.step
        self.learner.require_float32()
        self.done = self.saved_step = self.start_step
        self.whole = True  # whether the weights are those of step `done`; if not, the last checkpoint is the truth
        if accelerator.is_main_process:
            self._open_folder(resume)

    @property
    def samples_per_step(self) -> int:
        """Pictures per optimizer step over all processes and micro-steps."""
        size = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return size * self.accelerator.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every picture is seen about once."""
        return math.ceil(len(self.pictures) / self.samples_per_step)

    @property
    def last_probe(self) -> ProbeResult | None:
        """The newest result of the probe, if there was one."""
        return self.monitor.last_probe

    def _open_folder(self, resume: checkpoint.Checkpoint | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / run_folder.CONFIG, self.config.to_json())
        run_folder.rewind(self.folder, self.start_step if resume else -1, self.rates.changes)
        self.history.record(
            "resume" if resume else "start",
            step=self.start_step,
            max_train_steps=self.max_train_steps,
            steps_per_epoch=self.steps_per_epoch,
            pictures=len(self.pictures),
            parameters=self.parameters,
            family=self.family.name,
            device=str(self.accelerator.device),
            dtype=str(self.family.dtype).removeprefix("torch."),
            fingerprint=self.batches.fingerprint,
            encoded_each_time=self.cache.encoded_each_time,
        )

    # the loop

    def __iter__(self) -> Generator[Step]:
        steps = self._steps()
        RUNNING[self.folder.resolve()] = steps
        # What is registered last is called first: before this run's lock is given up.
        atexit.unregister(_finish_all)
        atexit.register(_finish_all)
        return steps

    def _steps(self) -> Generator[Step]:
        self._begin()
        with stopping.signals(lambda: self.interrupted, self._ask):
            try:
                trackers.start(self.accelerator, self.config)
                if self.offload is not None:
                    self._encode_first()
                if self.accelerator.is_main_process:
                    self.monitor.start(self.done, self.held_out, self.cache, self.offload)
                while self.done < self.max_train_steps and not self._asked_to_stop():
                    self.rates.take_wanted(self.done)
                    step = self._step(self.done)
                    step = dataclasses.replace(
                        step,
                        health=self.monitor.health_if_due(self.done),
                        probe=self.monitor.probe_if_due(self.done),
                    )
                    self._log(step)
                    if self.done % self.config.checkpointing_steps == 0:
                        self._save()
                    yield step
            finally:
                self._close()

    def encoding(self) -> contextlib.AbstractContextManager[None]:
        """Inside, much is encoded at once; with `offload` the network makes room for it."""
        return self.offload.encoding() if self.offload else contextlib.nullcontext()

    def _encode_first(self) -> None:
        """Encode all that the steps will need; or less, if asked to stop."""
        with self.encoding():
            for _ in self.batches.encode(range(self.done, self.max_train_steps)):
                if self.interrupted:
                    break

    def _step(self, done: int) -> Step:
        """Gradients of all micro-steps, then one clipped optimizer step; by a graph where there is one."""
        started = time.perf_counter()
        if self.offload is not None:
            self.offload.send_away()
        if self.graphed is not None and self.graphed.ready(done):
            losses, grad_norms = self._replay(done)
        else:
            losses, grad_norms = self._compute(done)
        self.done, self.whole = done + 1, True
        return self._record_of(done, losses, grad_norms, time.perf_counter() - started)

    def _compute(self, done: int) -> tuple[list[Loss], dict[str, float]]:
        losses = self.gradients.of_step(done)
        grad_norms = self.gradients.clip(done)
        self.learner.set_rates(done)
        self.whole = False  # an interrupt from here to the end leaves weights between two steps
        self.learner.optimizer.step()
        self.learner.refuse_non_finite(float(self.learner.norm()), done + 1, self.saved_step)
        return losses, grad_norms

    def _replay(self, done: int) -> tuple[list[Loss], dict[str, float]]:
        self.whole = False
        found = self.graphed.run(done, done + 1 < self.max_train_steps)
        self.whole = not found.used
        self.gradients.refuse_loss(found.losses, found.taken, done)
        if self.accelerator.scaler is None:
            refuse_gradient(found.total, done)
        self.learner.refuse_non_finite(found.weights, done + 1, self.saved_step)
        return found.losses, found.norms

    def _record_of(
        self, done: int, losses: list[Loss], grad_norms: dict[str, float], seconds: float
    ) -> Step:
        whole = processes.gathered(self.accelerator, losses)
        return Step(
            step=done + 1,
            loss=whole.loss.item(),
            lr=self.rates.of_step(done),
            grad_norm=math.hypot(*grad_norms.values()),
            grad_norms=grad_norms,
            timesteps=whole.timesteps.tolist(),
            per_image=whole.per_image.tolist(),
            seconds=seconds,
            images_seen=(done + 1) * self.samples_per_step,
        )

    def _log(self, step: Step) -> None:
        values = {k: v for k, v in dataclasses.asdict(step).items() if k != "probe"}
        if step.health is None:
            del values["health"]
        self.history.record("step", **values)
        self.lock.refresh()
        trackers.log_step(self.accelerator, step)

    # stopping and going on

    def _ask(self, number: int) -> None:
        self.interrupted, self.stopped_by = True, number

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked; all of them stop after the same step."""
        if time.time() > self.leave_by and not self.interrupted:
            self.interrupted = True
            stopping.say_session_ends(self.done, self.history)
        return processes.any_of(self.accelerator, self.interrupted)

    def _begin(self) -> None:
        """Before the first step, also of a second loop over the same training."""
        if not self.whole:
            raise CheckpointError("This training has stopped inside a step; call train again.")
        self.interrupted, self.began = False, time.process_time()
        self.leave_by = stopping.leave_by()
        if not self.lock.held():
            newest = next(map(checkpoint.step_of, checkpoint.found(self.folder)), 0)
            if newest != self.saved_step:
                raise CheckpointError(
                    f"Another training has gone on in {self.folder} since; call train again."
                )
            self.lock.take()

    def _close(self) -> None:
        """Leave a complete checkpoint and the adapter file, however the loop ended."""
        finished = self.whole and self.done >= self.max_train_steps
        try:
            if self.whole:
                self.save()
                if finished:
                    self.monitor.refuse_nothing_learned(self.done)
                # A kill after the last checkpoint may have left a finished run without its adapter file.
                if self.done > self.start_step or (
                    finished and not self.history.ends_at(self.done)
                ):
                    if self.accelerator.is_main_process:
                        self.save_adapter()
                    spent = time.process_time() - self.began
                    event = "end" if finished else "stop"
                    self.history.record(event, step=self.done, cpu_seconds=spent)
                    if self.accelerator.is_main_process:
                        env.keep(self.folder)
        finally:
            self.interrupted = not finished
            self.start_step = self.done
            if self.graphed is not None:
                self.graphed.forget()
            self.lock.release()
            if self.accelerator.is_main_process:
                trackers.finish(self.accelerator)

    def save_adapter(self) -> Path:
        """Write pytorch_lora_weights.safetensors of the weights as they are now."""
        extra = {
            "base_model": public(self.config.pretrained_model_name_or_path),
            "run": self.checkpoints.run_id,
        }
        return formats.save_adapter(self.family, self.folder, extra)

    def save(self) -> None:
        """Write a checkpoint of the last step, between two steps; nothing if there is one already."""
        if self.done > self.saved_step:
            self._save()

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            if not self.lock.held():
                raise CheckpointError(
                    f"{self.folder} is no longer this training's (deleted, or taken by another one), so step "
                    f"{self.done} was not saved; call train again."
                )
            self.checkpoints.note_best(self.done, self.monitor.last_probe)
            try:
                self.checkpoints.write(self.done)
            except (CheckpointError, NumericsError):
                self.whole = False  # it would not go better when the loop ends
                raise
            self.checkpoints.prune(self.done)
            env.keep(self.folder)
        self.saved_step = self.done

    def adopt(
        self,
        saved: checkpoint.Checkpoint,
        tensors: dict[str, torch.Tensor],
        origin: dict[str, Any],
    ) -> None:
        """Before the first step, go on from a checkpoint of another run, with its tensors in this training's shapes.

        origin: run, step and folder of that checkpoint; every checkpoint of this run names it as forked_from.
        """
        self.checkpoints.adopt(saved, tensors, origin)
        self.start_step = self.done = saved.step


def _begun(config: TrainConfig) -> tuple[TrainConfig, checkpoint.Checkpoint | None]:
    """The config with its seed, and the checkpoint that the folder goes on from; earlier copies are brought back."""
    env.bring_back(Path(config.output_dir))
    return run_folder.prepare(config)
