"""The training loop: a generator that yields one small record per optimizer step.

It owns nothing visual; plots, samples and boards consume the records. accelerate gives device, precision and processes.
Stopping at any time leaves a complete checkpoint, and the same call goes on from it, bit for bit on CPU in float32.
"""

import dataclasses
import math
import secrets
import time
import warnings
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list

from lora_nb import (
    adapters,
    checkpoint,
    class_pictures,
    data,
    env,
    formats,
    health,
    memory,
    optimization,
    precision,
    projections,
    rng,
    run_folder,
    run_state,
    stopping,
    trackers,
)
from lora_nb.cache import CLASS_POSITIONS, Cache, with_prior
from lora_nb.config import DataSpec, TrainConfig
from lora_nb.disk_cache import DiskCache
from lora_nb.errors import CheckpointError, ConfigError, NumericsError
from lora_nb.families import Batch, Family, family_of
from lora_nb.files import write_atomically
from lora_nb.health import Health
from lora_nb.lock import Lock
from lora_nb.loss import Loss, diffusion_loss
from lora_nb.probe import Probe, ProbeResult
from lora_nb.redaction import public

# Seconds before the platform ends the session, at which a training saves and stops.
BEFORE_THE_END = 600.0


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
    except (
        ValueError
    ) as error:  # it is executing: this is called from inside its own loop or another thread
        raise CheckpointError(
            "This very process is training in that folder at the moment; let it end, or choose another output_dir."
        ) from error


class Training:
    """A run that is ready to train: config, family with adapters, pictures, optimizer, folder.

    `interrupted` tells after the loop whether it stopped early; the same loop or the same config then goes on.
    """

    def __init__(self, config: TrainConfig, family: Family | None = None):
        config.validate()
        self.accelerator = self._accelerator(config)
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
        with self._claimed():
            self._make(config, family)

    def _make(self, config: TrainConfig, family: Family | None) -> None:
        """Base model, adapters and optimizer, fresh or from a checkpoint; then the run's folder."""
        self.config, resume = self._agreed(config)
        self.family = family or family_of(
            config, precision.DTYPES[self.accelerator.mixed_precision], self.accelerator.device
        )
        adapters.remove(self.family)
        _check_resolution(config.data, self.family)
        if config.output_kohya_format:
            formats.kohya.layout_of(self.family)  # refuses now what could not be written at the end
        self.lora = adapters.named(self.family, config.lora)
        adapters.add(self.family, self.lora, seed=self.config.seed)
        (projections.group if config.fused_lora else projections.ungroup)(self.family)
        if config.gradient_checkpointing:
            self.family.enable_gradient_checkpointing()
        self.weights = adapters.parameters(self.family)
        self.modules = [m for part in self.weights for m in self.family.trainable[part].modules()]
        self.drops = any(isinstance(m, torch.nn.Dropout) and m.p for m in self.modules)
        self.parameters = sum(w.numel() for w in self._all_weights())
        self.untrained = adapters.state(self.family)
        if self.accelerator.is_main_process:  # weights and two moments each, 4 bytes a number
            checkpoint.require_room(self.folder, 12 * self.parameters)
        self.max_train_steps = (
            config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        )
        self.schedule = optimization.learning_rate_factors(config, self.max_train_steps)
        # By step: what multiplies the learning rate from the next one on.
        self.changes: dict[int, float] = {}
        self._wanted: float | None = None
        self.forked_from: dict[str, Any] | None = None
        self.peaks = optimization.peak_learning_rates(
            config.replace(lora=self.lora), self.weights, self.samples_per_step
        )
        self.optimizer = self.accelerator.prepare(
            optimization.make_optimizer(
                config, self.weights, self.peaks, self.accelerator.device.type
            )
        )
        self.disk = DiskCache(self.family) if config.cache_to_disk else None
        self.cache = self._cache(self.pictures)
        if self.class_pictures is not None:
            self.class_cache = self._cache(self.class_pictures)
        self.start_step, self.interrupted = 0, False
        self.stopped_by: int | None = None  # number of the signal that asked to stop
        self.micro_batch = config.train_batch_size  # pictures at a time; fewer once memory ran out
        self.probe: Probe | None = None
        self.last_probe: ProbeResult | None = None
        self.run_id, self.best = secrets.token_hex(8), None
        if resume:
            self._restore(resume)
        if any(weight.dtype != torch.float32 for weight in self._all_weights()):
            raise NumericsError("Trainable weights must be float32; something has changed theirs.")
        self.done = self.saved_step = self.start_step
        self.whole = True  # whether the weights are those of step `done`; if not, the last checkpoint is the truth
        if self.accelerator.is_main_process:
            self._open_folder(resume)

    # what a run is made of

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder is this training's until its loop ends; given back at once if it cannot begin."""
        if not self.accelerator.is_main_process:
            yield
            return
        self._claim()
        try:
            yield
        except BaseException:
            self.lock.release()
            raise

    def _claim(self) -> None:
        self.lock = Lock(self.folder)
        weakref.finalize(self, self.lock.release)

    def _accelerator(self, config: TrainConfig) -> Accelerator:
        # A notebook makes many runs in one process; accelerate would keep the first one's precision for all.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        device = env.pick_device()
        if config.allow_tf32 and device.name == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=device.name == "cpu",
            log_with=trackers.wanted(config.report_to) or None,  # it warns of an empty list
            project_config=trackers.place(config),
        )
        precision.check(accelerator.mixed_precision, device)
        return accelerator

    def _agreed(self, config: TrainConfig) -> tuple[TrainConfig, checkpoint.Checkpoint | None]:
        """The main process decides on seed and checkpoint; the others follow."""
        decided: list[Any] = [None]
        if self.accelerator.is_main_process:
            env.bring_back(Path(config.output_dir))
            decided = [run_folder.prepare(config)]
        if self.accelerator.num_processes > 1:
            decided = broadcast_object_list(decided)
        return decided[0]

    @property
    def samples_per_step(self) -> int:
        """Pictures per optimizer step over all processes and micro-steps."""
        config = self.config
        return (
            config.train_batch_size
            * config.gradient_accumulation_steps
            * self.accelerator.num_processes
        )

    @property
    def fingerprint(self) -> str:
        """Of all pictures and captions that are trained on."""
        sets = (self.pictures, self.class_pictures)
        return "+".join(pictures.fingerprint for pictures in sets if pictures is not None)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every picture is seen about once."""
        return math.ceil(len(self.pictures) / self.samples_per_step)

    def _cache(self, pictures: data.Pictures) -> Cache:
        config = self.config
        captions = not any(part.startswith("text_encoder") for part in self.weights)
        return Cache(
            self.family,
            pictures,
            pictures.spec,
            config.seed,
            config.cache_latents,
            captions,
            self.disk,
            config.train_batch_size,
        )

    def _batch(self, positions: list[int]) -> Batch:
        """The pictures of a micro-step; with prior preservation as many class pictures follow."""
        batch = self.cache.batch(positions)
        if self.class_pictures is None:
            return batch
        prior = self.class_cache.class_batch(positions)
        return with_prior(batch, prior, self.config.prior_loss_weight)

    def _open_folder(self, resume: checkpoint.Checkpoint | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / run_folder.CONFIG, self.config.to_json())
        run_folder.rewind(self.folder, self.start_step if resume else -1, self.changes)
        self.record(
            "resume" if resume else "start",
            step=self.start_step,
            max_train_steps=self.max_train_steps,
            steps_per_epoch=self.steps_per_epoch,
            pictures=len(self.pictures),
            parameters=self.parameters,
            family=self.family.name,
            device=str(self.accelerator.device),
            dtype=str(self.family.dtype).removeprefix("torch."),
            fingerprint=self.fingerprint,
            encoded_each_time=self.cache.encoded_each_time,
        )

    # the loop

    def __iter__(self) -> Generator[Step]:
        steps = self._steps()
        RUNNING[self.folder.resolve()] = steps
        return steps

    def _steps(self) -> Generator[Step]:
        self._begin()
        with stopping.signals(lambda: self.interrupted, self._ask):
            try:
                trackers.start(self.accelerator, self.config)
                self._start_probe()
                while self.done < self.max_train_steps and not self._asked_to_stop():
                    self._take_wanted()
                    step = self._step(self.done)
                    step = dataclasses.replace(
                        step, health=self._health_if_due(), probe=self._probe_if_due()
                    )
                    self._log(step)
                    if self.done % self.config.checkpointing_steps == 0:
                        self._save()
                    yield step
            finally:
                self._close()

    def _step(self, done: int) -> Step:
        """Gradients of all micro-steps, then one clipped optimizer step."""
        started = time.perf_counter()
        results, fitted = memory.halving(lambda size: self._gradients(done, size), self.micro_batch)
        if fitted < self.micro_batch:
            self._note_less_memory(fitted, done + 1)
        self._average_gradients()
        grad_norms = self._clip(done)
        for group, peak in zip(self.optimizer.param_groups, self.peaks.values(), strict=True):
            group["lr"] = peak * self.factor(done)
        self.whole = False  # an interrupt from here to the end leaves weights between two steps
        self.optimizer.step()
        self._refuse_non_finite_weights(done)
        self.done, self.whole = done + 1, True
        return self._record_of(done, results, grad_norms, time.perf_counter() - started)

    def _gradients(self, done: int, size: int) -> list[Loss]:
        """Forward and backward over the micro-steps, `size` pictures at a time; the gradients add up to their mean."""
        config, results, taken = self.config, [], []
        self.optimizer.zero_grad()
        with training_mode(self.modules):
            for micro in range(config.gradient_accumulation_steps):
                for positions in self._pieces(self._positions(done, micro), size):
                    batch = self._batch(positions)
                    with self._named_dropout(batch):
                        result = diffusion_loss(self.family, batch, config.noise_offset)
                    share = len(positions) / config.train_batch_size
                    loss = result.loss * share / config.gradient_accumulation_steps
                    self.accelerator.backward(loss)
                    results.append(Loss(loss.detach(), result.per_image.detach(), result.timesteps))
                    taken.append(batch.positions)
        self._refuse_non_finite(results, taken, done)
        return results

    def _pieces(self, positions: list[int], size: int) -> list[list[int]]:
        """The positions, at most `size` at a time, and only pictures of one size together."""
        return [
            same[start : start + size]
            for same in self.cache.by_size(positions)
            for start in range(0, len(same), size)
        ]

    def factor(self, done: int) -> float:
        """What multiplies the peak learning rates in step done + 1: the schedule, and what was changed in mid-run."""
        return self.schedule(done) * self._changed_by(done)

    def _changed_by(self, done: int) -> float:
        changed = [step for step in self.changes if step <= done]
        return self.changes[max(changed)] if changed else 1.0

    @property
    def factor_in_force(self) -> float:
        """What the next step's learning rate is multiplied by besides its schedule; 1 if nothing was changed."""
        return self._changed_by(self.done) if self._wanted is None else self._wanted

    def multiply_learning_rate(self, factor: float) -> None:
        """From the next step on all learning rates are `factor` times what the config says; 1 undoes it.

        May be called from another thread. It becomes an event "change" in history.jsonl, which a resumed run keeps.
        With several processes each must call it. Raises ConfigError unless factor is finite and above 0.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(
                f"The learning rate cannot be multiplied by {factor}; choose a finite number above 0."
            )
        self._wanted = float(factor)

    def plan(self, changes: dict[int, float]) -> None:
        """Change the learning rate after the steps of `changes` by its factors, as `multiply_learning_rate` would."""
        for step, factor in changes.items():
            if self.changes.get(step) == factor:  # known, and in the history already
                continue
            self.changes[step] = factor
            self.record("change", step=step, learning_rate_factor=factor)

    def _take_wanted(self) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self.plan({self.done: wanted})

    def _positions(self, done: int, micro: int) -> list[int]:
        """Global sample numbers of this process in this micro-step: processes take turns within one micro-step."""
        size, processes = self.config.train_batch_size, self.accelerator.num_processes
        first = (done * self.config.gradient_accumulation_steps + micro) * size * processes
        first += self.accelerator.process_index * size
        return list(range(first, first + size))

    @contextmanager
    def _named_dropout(self, batch: Batch) -> Iterator[None]:
        """Dropout draws from torch's global stream; inside, that stream is named by the batch like all randomness."""
        if not self.drops:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(
                rng.generator(batch.seed, "lora dropout", batch.positions[0]).initial_seed()
            )
            yield

    def _refuse_non_finite(self, results: list[Loss], taken: list[list[int]], done: int) -> None:
        # One look at all micro-steps: each makes the processor wait for the device.
        losses = torch.stack([result.loss for result in results]).tolist()
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is None:
            return
        rows = {self.cache.row_at(p) for p in taken[bad] if p < CLASS_POSITIONS}
        names = ", ".join(self.pictures.rows[r].name for r in sorted(rows))
        raise NumericsError(
            f"The loss of step {done + 1} is {losses[bad]} (pictures: {names}; learning rates "
            f"{self.peaks}; {self.family.dtype}), so training stopped before the optimizer used it: lower the "
            "learning rate, train in float32 or bf16 instead of fp16, or look at these pictures."
        )

    def _average_gradients(self) -> None:
        """The mean over processes; adapters are small, so this is cheap and needs no wrapped modules."""
        if self.accelerator.num_processes > 1:
            # A layer whose output nothing uses (the last of SDXL's first encoder) has no gradient anywhere.
            for weight in (w for w in self._all_weights() if w.grad is not None):
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")

    def _clip(self, done: int) -> dict[str, float]:
        """Clip the gradients of all adapters together; the norm of each part before that."""
        self.accelerator.unscale_gradients()
        norms = {
            part: torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
            for part, weights in self.weights.items()
        }
        total = torch.nn.utils.get_total_norm(list(norms.values()))
        # A loss scaler skips such steps itself and goes on with a smaller scale.
        if not math.isfinite(total) and self.accelerator.scaler is None:
            raise NumericsError(
                f"The gradient of step {done + 1} is not finite, so training stopped before the optimizer used it: "
                "lower the learning rate or train in float32."
            )
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self._all_weights(), self.config.max_grad_norm, total
            )
        return {part: float(norm) for part, norm in norms.items()}

    def _refuse_non_finite_weights(self, done: int) -> None:
        if not math.isfinite(torch.nn.utils.get_total_norm(self._all_weights())):
            raise NumericsError(
                f"After step {done + 1} the norm of the weights is not finite (learning rates {self.peaks}), so it was "
                f"not kept; the last checkpoint is of step {self.saved_step}: lower the learning rate."
            )

    def _note_less_memory(self, fitted: int, step: int) -> None:
        """Say that memory ran out and what is done about it; the pictures and draws of each step stay the same."""
        pieces = math.ceil(self.config.train_batch_size / fitted)
        text = (
            f"Memory ran out in step {step}: from now on {fitted} pictures at a time instead of {self.micro_batch}, "
            f"and {pieces * self.config.gradient_accumulation_steps} micro-steps; the result is the same."
        )
        self.micro_batch = fitted
        self.record("memory", step=step, micro_batch=fitted, message=text)
        warnings.warn(text, stacklevel=4)

    def _all_weights(self) -> list[torch.nn.Parameter]:
        return [weight for weights in self.weights.values() for weight in weights]

    def _record_of(
        self, done: int, results: list[Loss], grad_norms: dict[str, float], seconds: float
    ) -> Step:
        per_image = self.accelerator.gather(torch.cat([r.per_image.detach() for r in results]))
        timesteps = self.accelerator.gather(
            torch.cat([r.timesteps for r in results]).to(per_image.device)
        )
        loss = self.accelerator.reduce(
            torch.stack([r.loss for r in results]).sum(), reduction="mean"
        )
        return Step(
            step=done + 1,
            loss=loss.item(),
            lr={part: peak * self.factor(done) for part, peak in self.peaks.items()},
            grad_norm=math.hypot(*grad_norms.values()),
            grad_norms=grad_norms,
            timesteps=timesteps.tolist(),
            per_image=per_image.tolist(),
            seconds=seconds,
            images_seen=(done + 1) * self.samples_per_step,
        )

    # probe, health and history

    def _start_probe(self) -> None:
        if self.probe is None and self.accelerator.is_main_process:
            if self.held_out is None:
                return
            config, captions = self.config, self.cache.keep_captions
            size, batch = config.probe_size, config.train_batch_size
            self.probe = Probe(self.family, self.held_out, size, batch, captions, self.disk)
            if self.done == 0:
                self._record_probe(self.probe.untrained())

    def _probe_if_due(self) -> ProbeResult | None:
        every = self.config.probe_steps
        due = self.done == self.max_train_steps or (every and self.done % every == 0)
        if self.probe is None or not due:
            return None
        result = self.probe.measure(self.done)
        self._record_probe(result)
        return result

    def _health_if_due(self) -> Health | None:
        """Now and then a look at all weights; a part that does not learn is said once."""
        if self.done not in (1, self.max_train_steps) and self.done % health.EVERY:
            return None
        result = health.measure(self.family, self.untrained)
        if self.done == health.SETTLED:
            for alarm in result.alarms(self.done):
                self.record("alarm", step=self.done, message=alarm)
                warnings.warn(alarm, stacklevel=3)
        return result

    def _record_probe(self, result: ProbeResult) -> None:
        self.record("probe", **dataclasses.asdict(result))
        self.last_probe = result

    def record(self, event: str, **values: Any) -> None:
        """Append an event to history.jsonl (main process only)."""
        if self.accelerator.is_main_process:
            run_folder.append(self.folder, {"event": event} | values)

    def _log(self, step: Step) -> None:
        values = {k: v for k, v in dataclasses.asdict(step).items() if k != "probe"}
        if step.health is None:
            del values["health"]
        self.record("step", **values)
        if self.accelerator.is_main_process:
            self.lock.refresh()
        trackers.log_step(self.accelerator, step)

    # stopping and going on

    def _ask(self, number: int) -> None:
        self.interrupted, self.stopped_by = True, number

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked; all of them stop after the same step."""
        if time.time() > self.leave_by and not self.interrupted:
            self.interrupted = True
            text = (
                f"This session ends in about {BEFORE_THE_END / 60:.0f} minutes, so training stops after step "
                f"{self.done} with a checkpoint; run the same again in a new session and it goes on."
            )
            self.record("session", step=self.done, message=text)
            warnings.warn(text, stacklevel=2)
        if self.accelerator.num_processes == 1:
            return self.interrupted
        asked = torch.tensor(float(self.interrupted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum"))

    def _begin(self) -> None:
        """Before the first step, also of a second loop over the same training."""
        if not self.whole:
            raise CheckpointError("This training has stopped inside a step; call train again.")
        self.interrupted, self.began = False, time.process_time()
        end = (env.session_end() or math.inf) - BEFORE_THE_END
        self.leave_by = end if time.time() < end else math.inf  # it was asked for after that point
        if self.accelerator.is_main_process and not self.lock.held():
            newest = next(map(checkpoint.step_of, checkpoint.found(self.folder)), 0)
            if newest != self.saved_step:
                raise CheckpointError(
                    f"Another training has gone on in {self.folder} since; call train again."
                )
            self._claim()

    def _close(self) -> None:
        """Leave a complete checkpoint and the adapter file, however the loop ended."""
        finished = self.whole and self.done >= self.max_train_steps
        try:
            if self.whole:
                self.save()
                if finished:
                    self._refuse_nothing_learned()
                # A kill after the last checkpoint may have left a finished run without its adapter file.
                if self.done > self.start_step or (finished and not self._has_ended()):
                    if self.accelerator.is_main_process:
                        self.save_adapter()
                    spent = time.process_time() - self.began
                    self.record("end" if finished else "stop", step=self.done, cpu_seconds=spent)
                    if self.accelerator.is_main_process:
                        env.keep(self.folder)
        finally:
            self.interrupted = not finished
            self.start_step = self.done
            if self.accelerator.is_main_process:
                self.lock.release()
                trackers.finish(self.accelerator)

    def _has_ended(self) -> bool:
        """Whether the history has the end of this very step."""
        events = run_folder.read_history(self.folder)
        return any(e["event"] == "end" and e["step"] == self.done for e in events)

    def _refuse_nothing_learned(self) -> None:
        if not health.measure(self.family, self.untrained).nothing_learned:
            return
        rates = [self.factor(done) for done in range(self.max_train_steps)]
        reason = "no gradient reached it, or it is lost in rounding"
        if not any(self.peaks.values()) or not any(rates):
            reason = (
                f"the learning rate was 0 in every step (learning_rate {self.peaks}, lr_scheduler "
                f"{self.config.lr_scheduler!r}, lr_warmup_steps {self.config.lr_warmup_steps})"
            )
        raise NumericsError(
            f"After {self.done} steps the adapter still does nothing (B is zero in every layer), because {reason}; so "
            "no adapter file was written. Change these settings and start anew with overwrite=True."
        )

    def save_adapter(self) -> Path:
        """Write pytorch_lora_weights.safetensors of the weights as they are now."""
        extra = {
            "base_model": public(self.config.pretrained_model_name_or_path),
            "run": self.run_id,
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
            self._note_best(self.done)
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            meta = {
                "run": self.run_id,
                "best": self.best,
                "scaler": scaler,
                "micro_batch": self.micro_batch,
                "changes": {k: v for k, v in self.changes.items() if k < self.done},
                "forked_from": self.forked_from,
                "made_from": self._made_from(),
                "config": self.config.to_dict(),
            }
            tensors = run_state.pack(self.family, self.optimizer)
            try:
                checkpoint.save_checkpoint(self.folder, self.done, tensors, meta)
            except (CheckpointError, NumericsError):
                self.whole = False  # it would not go better when the loop ends
                raise
            keep = {self.best[0]} if self.best else set()
            checkpoint.prune(self.folder, self.config.checkpoints_total_limit, keep, self.done)
            env.keep(self.folder)
        self.saved_step = self.done

    def _made_from(self) -> dict[str, Any]:
        """What no setting names and yet decides what is learned, by the name that resume_override takes."""
        return {
            "data": self.fingerprint,
            "base": run_state.base_mark(self.family),
            "processes": self.accelerator.num_processes,
        }

    def _note_best(self, done: int) -> None:
        """Remember the checkpoint with the lowest probe difference; it is never pruned."""
        probe = self.last_probe
        if probe and probe.step == done and (not self.best or probe.difference < self.best[1]):
            self.best = (done, probe.difference)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self._load(saved, saved.tensors)
        self.run_id, self.forked_from = saved.meta["run"], saved.meta.get("forked_from")
        self.best = tuple(saved.meta["best"]) if saved.meta["best"] else None
        # What was changed after the checkpoint happens again, unless an older one was asked for by name.
        if self.config.resume_from_checkpoint in (None, "latest"):
            self.changes |= run_folder.changes(run_folder.read_history(self.folder))

    def _load(self, saved: checkpoint.Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
        self._check_made_from(saved)
        run_state.unpack(self.family, self.optimizer, tensors)
        if self.accelerator.scaler and saved.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.meta["scaler"])
        self.start_step = saved.step
        self.micro_batch = min(self.micro_batch, saved.meta["micro_batch"])
        self.changes = {int(step): factor for step, factor in saved.meta.get("changes", {}).items()}

    def adopt(
        self,
        saved: checkpoint.Checkpoint,
        tensors: dict[str, torch.Tensor],
        origin: dict[str, Any],
    ) -> None:
        """Before the first step, go on from a checkpoint of another run, with its tensors in this training's shapes.

        origin: run, step and folder of that checkpoint; every checkpoint of this run names it as forked_from.
        """
        self._load(saved, tensors)
        self.done, self.forked_from = saved.step, origin

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


@contextmanager
def training_mode(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Dropout on inside, off for whatever happens between steps."""
    # Past the modules' own setter and recursion, which take 5 % of a small step.
    for module in modules:
        vars(module)["training"] = True
    try:
        yield
    finally:
        for module in modules:
            vars(module)["training"] = False


def _check_resolution(spec: DataSpec, family: Any) -> None:
    for name in ("resolution", "bucket_step"):
        value = getattr(spec, name)
        if value is not None and value % family.pixel_multiple:
            raise ConfigError(
                f"{name} is {value}; the latents of this model need a multiple of {family.pixel_multiple}."
            )
