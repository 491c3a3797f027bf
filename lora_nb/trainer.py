"""The training loop: a generator that yields one small record per optimizer step.

It owns nothing visual; plots, samples and boards consume the records. accelerate gives device, precision and processes.
Stopping at any time leaves a complete checkpoint, and the same call goes on from it, bit for bit on CPU in float32.
"""

import dataclasses
import math
import secrets
import signal
import threading
import time
from collections.abc import Iterator
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
    optimization,
    rng,
    run_folder,
)
from lora_nb.cache import CLASS_POSITIONS, Cache, with_prior
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError, ConfigError, NumericsError
from lora_nb.families import Batch, load_family
from lora_nb.files import write_atomically
from lora_nb.loss import Loss, diffusion_loss
from lora_nb.probe import Probe, ProbeResult

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """One optimizer step, detached from all graphs.

    loss: the trained mean. lr: learning rate by part. grad_norm: before clipping, over all adapters. timesteps and
    per_image: one entry per picture. seconds: since the step before. probe: if one was measured after this step.
    """

    step: int
    loss: float
    lr: dict[str, float]
    grad_norm: float
    timesteps: list[int]
    per_image: list[float]
    seconds: float
    images_seen: int
    probe: ProbeResult | None = None


def train(config: TrainConfig) -> "Training":
    """Check everything, load or continue, and return the run; iterate over it to train.

    Raises LoraNbError (its subclasses) before the first step for any input that cannot be trained on.
    """
    return Training(config)


class Training:
    """A run that is ready to train: config, family with adapters, pictures, optimizer, folder.

    Iterate once. `interrupted` tells afterwards whether it stopped early; the same config then goes on.
    """

    def __init__(self, config: TrainConfig):
        config.validate()
        self.accelerator = self._accelerator(config)
        # Data first: it is the cheapest to check and the likeliest to be wrong.
        self.pictures = data.load(config.data, "train")
        held_out = data.has_split(config.data, "validation")
        self.held_out = data.load(config.data, "validation") if held_out else None
        self.class_pictures = (
            class_pictures.load(config) if config.with_prior_preservation else None
        )
        self.config, resume = self._agreed(config)
        self.folder = Path(config.output_dir)
        self.family = load_family(
            config.family,
            _named_model(config),
            dtype=DTYPES[self.accelerator.mixed_precision],
            device=self.accelerator.device,
            prediction_type=config.prediction_type,
            snr_gamma=config.snr_gamma,
            revision=config.revision,
            variant=config.variant,
            vae=config.pretrained_vae_model_name_or_path,
            prior=config.pretrained_prior_model_name_or_path,
            decoder=config.pretrained_decoder_model_name_or_path,
            image_encoder_file=config.image_encoder_file,
        )
        _check_resolution(config.data.resolution, self.family)
        self.lora = adapters.named(self.family, config.lora)
        adapters.add(self.family, self.lora, seed=self.config.seed)
        if config.gradient_checkpointing:
            self.family.enable_gradient_checkpointing()
        self.weights = adapters.parameters(self.family)
        self.parameters = sum(p.numel() for group in self.weights.values() for p in group)
        self.max_train_steps = (
            config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        )
        self.factor = optimization.learning_rate_factors(config, self.max_train_steps)
        self.peaks = optimization.peak_learning_rates(
            config.replace(lora=self.lora), self.weights, self.samples_per_step
        )
        self.optimizer = self.accelerator.prepare(
            optimization.make_optimizer(
                config, self.weights, self.peaks, self.accelerator.device.type
            )
        )
        self.cache = self._cache(self.pictures)
        if self.class_pictures is not None:
            self.class_cache = self._cache(self.class_pictures)
        self.start_step, self.interrupted = 0, False
        self.stopped_by: int | None = None  # number of the signal that asked to stop
        self.probe: Probe | None = None
        self.last_probe: ProbeResult | None = None
        self.run_id, self.best = secrets.token_hex(8), None
        if resume:
            self._restore(resume)
        self.saved_step = self.start_step
        if self.accelerator.is_main_process:
            self._open_folder(resume)

    # what a run is made of

    def _accelerator(self, config: TrainConfig) -> Accelerator:
        # A notebook makes many runs in one process; accelerate would keep the first one's precision for all.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        device = env.pick_device()
        if config.mixed_precision == "fp16" and device.name == "cpu":
            raise ConfigError(
                "mixed_precision is 'fp16', but there is no GPU here; use 'no', or 'bf16'."
            )
        if config.allow_tf32 and device.name == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        return Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=device.name == "cpu",
            log_with=config.report_to,
            project_dir=config.output_dir,
        )

    def _agreed(self, config: TrainConfig) -> tuple[TrainConfig, checkpoint.Checkpoint | None]:
        """The main process decides on seed and checkpoint; the others follow."""
        decided: list[Any] = [None]
        if self.accelerator.is_main_process:
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
            self.family, pictures, pictures.spec, config.seed, config.cache_latents, captions
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
        run_folder.rewind(self.folder, self.start_step if resume else -1)
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
        )
        if self.config.report_to:
            self.accelerator.init_trackers("lora_nb", config={"settings": self.config.to_json()})

    # the loop

    def __iter__(self) -> Iterator[Step]:
        done = self.start_step
        with self._signals():
            try:
                self._start_probe(done)
                while done < self.max_train_steps and not self.interrupted:
                    step = self._step(done)
                    done = step.step
                    step = dataclasses.replace(step, probe=self._probe_if_due(done))
                    self._log(step)
                    if done % self.config.checkpointing_steps == 0:
                        self._save(done)
                    yield step
            finally:
                self._close(done)

    def _step(self, done: int) -> Step:
        """Forward and backward over the micro-steps, then one clipped optimizer step."""
        started, config = time.perf_counter(), self.config
        results: list[Loss] = []
        with _training_mode(self.family, self.weights):
            for micro in range(config.gradient_accumulation_steps):
                batch = self._batch(self._positions(done, micro))
                with self._named_dropout(batch):
                    result = diffusion_loss(self.family, batch, config.noise_offset)
                self._refuse_non_finite(result, batch, done)
                self.accelerator.backward(result.loss / config.gradient_accumulation_steps)
                results.append(result)
        self._average_gradients()
        grad_norm = self._clip(done)
        for group, peak in zip(self.optimizer.param_groups, self.peaks.values(), strict=True):
            group["lr"] = peak * self.factor(done)
        self._half_done = True
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._half_done = False
        return self._record_of(done, results, grad_norm, time.perf_counter() - started)

    def _positions(self, done: int, micro: int) -> list[int]:
        """Global sample numbers of this process in this micro-step: processes take turns within one micro-step."""
        size, processes = self.config.train_batch_size, self.accelerator.num_processes
        first = (done * self.config.gradient_accumulation_steps + micro) * size * processes
        first += self.accelerator.process_index * size
        return list(range(first, first + size))

    @contextmanager
    def _named_dropout(self, batch: Batch) -> Iterator[None]:
        """Dropout draws from torch's global stream; inside, that stream is named by the batch like all randomness."""
        modules = (m for part in self.weights for m in self.family.trainable[part].modules())
        if not any(isinstance(m, torch.nn.Dropout) and m.p for m in modules):
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(
                rng.generator(batch.seed, "lora dropout", batch.positions[0]).initial_seed()
            )
            yield

    def _refuse_non_finite(self, result: Loss, batch: Batch, done: int) -> None:
        if torch.isfinite(result.loss):
            return
        instances = [p for p in batch.positions if p < CLASS_POSITIONS]
        rows = {data.row_at(p, len(self.pictures), self.config.seed) for p in instances}
        names = ", ".join(self.pictures.rows[r].name for r in sorted(rows))
        raise NumericsError(
            f"The loss of step {done + 1} is {result.loss.item()} (pictures: {names}; learning rates "
            f"{self.peaks}; {self.family.dtype}), so training stopped before the optimizer used it: lower the "
            "learning rate, train in float32 or bf16 instead of fp16, or look at these pictures."
        )

    def _average_gradients(self) -> None:
        """The mean over processes; adapters are small, so this is cheap and needs no wrapped modules."""
        if self.accelerator.num_processes > 1:
            # A layer whose output nothing uses (the last of SDXL's first encoder) has no gradient anywhere.
            for weight in (w for w in self._all_weights() if w.grad is not None):
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")

    def _clip(self, done: int) -> float:
        limit = self.config.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self._all_weights(), limit))
        # A loss scaler skips such steps itself and goes on with a smaller scale.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NumericsError(
                f"The gradient of step {done + 1} is not finite, so training stopped before the optimizer used it: "
                "lower the learning rate or train in float32."
            )
        return norm

    def _all_weights(self) -> list[torch.nn.Parameter]:
        return [weight for weights in self.weights.values() for weight in weights]

    def _record_of(self, done: int, results: list[Loss], grad_norm: float, seconds: float) -> Step:
        per_image = self.accelerator.gather(torch.cat([r.per_image.detach() for r in results]))
        timesteps = self.accelerator.gather(
            torch.cat([r.timesteps for r in results]).to(per_image.device)
        )
        loss = self.accelerator.reduce(
            torch.stack([r.loss.detach() for r in results]).mean(), reduction="mean"
        )
        return Step(
            step=done + 1,
            loss=loss.item(),
            lr={part: peak * self.factor(done) for part, peak in self.peaks.items()},
            grad_norm=grad_norm,
            timesteps=timesteps.tolist(),
            per_image=per_image.tolist(),
            seconds=seconds,
            images_seen=(done + 1) * self.samples_per_step,
        )

    # probe and history

    def _start_probe(self, done: int) -> None:
        if self.probe is None and self.accelerator.is_main_process:
            if self.held_out is None:
                return
            config, captions = self.config, self.cache.keep_captions
            size, batch = config.probe_size, config.train_batch_size
            self.probe = Probe(self.family, self.held_out, size, batch, captions)
            if done == 0:
                self._record_probe(self.probe.untrained())

    def _probe_if_due(self, done: int) -> ProbeResult | None:
        every = self.config.probe_steps
        due = done == self.max_train_steps or (every and done % every == 0)
        if self.probe is None or not due:
            return None
        result = self.probe.measure(done)
        self._record_probe(result)
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
        self.record("step", **values)
        if self.config.report_to:
            rates = {f"lr/{part}": rate for part, rate in step.lr.items()}
            probe = {"probe_difference": step.probe.difference} if step.probe else {}
            self.accelerator.log(
                {"loss": step.loss, "grad_norm": step.grad_norm} | rates | probe, step=step.step
            )

    # stopping and going on

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first interrupt or SIGTERM lets the step finish; a second interrupt stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.interrupted, self.stopped_by = True, number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    _half_done = False

    def _close(self, done: int) -> None:
        """Leave a complete checkpoint and the adapter file, however the loop ended."""
        if self._half_done:  # stopped inside the optimizer step: the last checkpoint is the truth
            return
        if done > self.saved_step:
            self._save(done)
        finished = done >= self.max_train_steps
        if done > self.start_step:
            if self.accelerator.is_main_process:
                self.save_adapter()
            self.record("end" if finished else "stop", step=done)
        self.interrupted = not finished
        self.start_step = done
        if self.config.report_to and self.accelerator.is_main_process:
            self.accelerator.end_training()

    def save_adapter(self) -> Path:
        """Write pytorch_lora_weights.safetensors of the weights as they are now."""
        extra = {"base_model": str(self.config.pretrained_model_name_or_path), "run": self.run_id}
        return formats.save_adapter(self.family, self.folder, extra)

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            self._note_best(done)
            tensors = {
                f"adapter/{p}/{k}": v
                for p, w in adapters.state(self.family).items()
                for k, v in w.items()
            }
            for index, state in self.optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).cpu()
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            meta = {
                "run": self.run_id,
                "best": self.best,
                "scaler": scaler,
                "fingerprint": self.fingerprint,
                "config": self.config.to_dict(),
            }
            checkpoint.save_checkpoint(self.folder, done, tensors, meta)
            keep = {self.best[0]} if self.best else set()
            checkpoint.prune(self.folder, self.config.checkpoints_total_limit, keep)
        self.saved_step = done

    def _note_best(self, done: int) -> None:
        """Remember the checkpoint with the lowest probe difference; it is never pruned."""
        probe = self.last_probe
        if probe and probe.step == done and (not self.best or probe.difference < self.best[1]):
            self.best = (done, probe.difference)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        if (
            saved.meta["fingerprint"] != self.fingerprint
            and "data" not in self.config.resume_override
        ):
            raise CheckpointError(
                f"The pictures or captions are not those that {saved.folder} was trained on: choose another "
                "output_dir, start anew with overwrite=True, or go on with resume_override=['data']."
            )
        weights: dict[str, dict[str, torch.Tensor]] = {part: {} for part in self.weights}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in saved.tensors.items():
            kind, owner, key = name.split("/", 2)
            if kind == "adapter":
                weights[owner][key] = value
            else:
                state.setdefault(int(owner), {})[key] = value
        adapters.load_state(self.family, weights)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        if self.accelerator.scaler and saved.meta["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.meta["scaler"])
        self.start_step, self.run_id = saved.step, saved.meta["run"]
        self.best = tuple(saved.meta["best"]) if saved.meta["best"] else None


@contextmanager
def _training_mode(family: Any, parts: dict[str, Any]) -> Iterator[None]:
    """Dropout on inside, off for whatever happens between steps."""
    for part in parts:
        family.trainable[part].train()
    try:
        yield
    finally:
        for part in parts:
            family.trainable[part].eval()


def _named_model(config: TrainConfig) -> str:
    if config.pretrained_model_name_or_path is None:
        raise ConfigError(
            "pretrained_model_name_or_path is empty; name a diffusers folder or a Hub model, "
            "or take a preset: lora_nb.preset('tiny').config('my-run')."
        )
    return config.pretrained_model_name_or_path


def _check_resolution(resolution: int, family: Any) -> None:
    if resolution % family.pixel_multiple:
        raise ConfigError(
            f"resolution is {resolution}; the latents of this model need a multiple of {family.pixel_multiple}."
        )
