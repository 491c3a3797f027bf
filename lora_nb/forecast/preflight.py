"""The forecast of a run from a trial of it, made in a scratch folder and thrown away."""

import dataclasses
import math
import tempfile

from lora_nb import adapters, data, env, offload
from lora_nb.cache import Cache
from lora_nb.config import TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import Family
from lora_nb.forecast import meter
from lora_nb.forecast.ladder import CHECKPOINTING, RECOMPUTED, Line, ladder
from lora_nb.forecast.result import Forecast, Rung
from lora_nb.forecast.trial import Measured, Trial, recompute
from lora_nb.memory import TooLittleMemory
from lora_nb.trainer import Training

SAMPLE = 100  # samples that are looked up on disk


def preflight(config: TrainConfig, family: Family | None = None) -> Forecast:
    """What the run of this config will cost, from its first step made a few times; the run's folder is not touched.

    family: the base model of this config, loaded already; it is given back whole and without adapters, and its loading
    is then not in the forecast. The forecast is of the whole run from its first step, in this process and on this
    machine as busy as they are now. Raises the errors that `train` would raise, and TooLittleMemory if no picture fits
    even with gradient checkpointing.
    """
    try:
        return _tried(config, family)
    except TooLittleMemory:
        if config.gradient_checkpointing:
            raise
    # Not one picture went through as configured; what is below on the ladder may go.
    smaller = {"gradient_checkpointing": True}
    found = _tried(config.replace(**smaller), family)
    top = Rung(
        "as configured", {}, "one picture is too much", found.memory_total, math.nan, False, True
    )
    rungs = [dataclasses.replace(rung, changes=smaller | rung.changes) for rung in found.ladder]
    rungs[0] = dataclasses.replace(rungs[0], name=CHECKPOINTING, says=RECOMPUTED)
    return dataclasses.replace(
        found, peak_memory=found.memory_total, highest="training", ladder=[top, *rungs]
    )


def _tried(config: TrainConfig, family: Family | None) -> Forecast:
    """The forecast of a config of which at least a single picture fits; raises TooLittleMemory if none does."""
    with tempfile.TemporaryDirectory(prefix="lora-nb-preflight-") as folder:
        scratch = config.replace(
            output_dir=folder, overwrite=False, resume_from_checkpoint=None, report_to=None
        )
        trial = Trial(scratch, family)
        try:
            return _forecast(trial)
        finally:
            adapters.remove(trial.training.family)
            recompute(trial.training.family, False)
            if family is not None:
                offload.undo(family)
            trial.training.lock.release()


def _forecast(trial: Trial) -> Forecast:
    training = trial.training
    base, total = meter.in_use(trial.device), meter.total(trial.device)
    measured = trial.measure()
    config, steps = training.config, training.max_train_steps
    whole = Line(measured.alone, measured.whole, base)(config.train_batch_size)
    peaks = measured.peaks
    if measured.whole.size < config.train_batch_size:
        peaks = peaks | {"training": whole.memory}
    highest = max(peaks, key=peaks.get)
    others = max(size for name, size in peaks.items() if name != "training")
    return Forecast(
        steps=steps,
        seconds_per_step=measured.step,
        startup=measured.loading + measured.warming,
        caching=_caching(training, measured),
        training=steps * measured.step,
        validation=_sets(training) * measured.set_of_samples,
        probe=_probing(training, measured),
        saving=_checkpoints(config, steps) * measured.saving,
        peak_memory=peaks[highest],
        memory_total=total,
        highest=highest,
        device=str(trial.device),
        session_hours=env.session_hours(),
        ladder=ladder(config, measured, base, others, total, training.family, _can_wait(training)),
    )


def _can_wait(training: Training) -> int:
    """Bytes of what `offload` would keep out of the GPU's memory; 0 where it does so already, or cannot."""
    try:
        offload.check(training.family, training.learner.lora, training.cache.encoded_each_time)
    except ConfigError:
        return 0
    if training.offload is not None:
        return 0
    parts = [p for module in offload.waiting(training.family) for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)


def _caching(training: Training, measured: Measured) -> float:
    """Seconds of encoding what is seen for the first time and then remembered, without what is on disk already."""
    samples = training.max_train_steps * training.samples_per_step
    caches = [training.cache]
    if training.class_pictures is not None:
        caches.append(training.class_cache)
    seconds = 0.0
    for cache in caches:
        seen = samples / len(cache.pictures)  # how often each is shown
        here, said = _on_disk(cache, samples)
        seconds += (1 - here) * _views(cache, seen) * measured.picture
        captions = len({row.caption for row in cache.pictures.rows})
        seconds += (1 - said) * captions * min(1.0, seen) * measured.caption
    return seconds


def _views(cache: Cache, seen: float) -> float:
    """How many different looks (crop, mirrored or not) are expected of the pictures whose looks are remembered."""
    if not cache.keep_latents:
        return 0.0
    spec, rows = cache.spec, cache.pictures.rows
    kinds = [data.views(spec, row) for row in rows if data.few_crops(spec, row)]
    return sum(min(seen, n * (1 - (1 - 1 / n) ** seen)) for n in kinds)


def _on_disk(cache: Cache, samples: int) -> tuple[float, float]:
    """Share of the pictures and of the captions of a run that are encoded on disk, from some of its samples."""
    looked = [cache.on_disk(position) for position in range(0, samples, max(1, samples // SAMPLE))]
    pictures, captions = (sum(found) / len(looked) for found in zip(*looked, strict=True))
    return pictures, captions


def _sets(training: Training) -> int:
    """Sets of sample pictures: the base model's, then as `with_samples` draws them."""
    config, last = training.config, training.max_train_steps
    every = config.validation_steps or config.validation_epochs * training.steps_per_epoch
    return 1 + math.ceil(last / every)


def _probing(training: Training, measured: Measured) -> float:
    """Seconds of the probe before training, those between, and the one at the end."""
    every, last = training.config.probe_steps, training.max_train_steps
    later = math.ceil(last / every) if every else 1
    return measured.probing[0] + later * measured.probing[1]


def _checkpoints(config: TrainConfig, steps: int) -> int:
    return math.ceil(steps / config.checkpointing_steps)
