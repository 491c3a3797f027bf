"""Sample pictures while training, drawn without a trace in the training."""

import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lora_nb import adapters, packing, projections, trackers
from lora_nb.errors import NumericsError
from lora_nb.families import network
from lora_nb.inference.attach import fused, modules
from lora_nb.inference.drawing import generate
from lora_nb.run_folder import read_history


def with_samples(training: Any) -> Iterator[Any]:
    """Pass the steps of a training through, and draw its validation prompts into samples/ on the way.

    First the base model's pictures (base-p0-s0.png); then the adapter's, every validation_steps
    steps or validation_epochs epochs and at the last step, before that step is passed on
    (step-000100-p0-s0.png). Picture s of a prompt has seed run seed + s in every set. Each set is a
    line "samples" in history.jsonl; a run that goes on draws what is missing there and nothing twice.
    The training's random state, train or eval modes and adapters are afterwards as before.
    """
    config = training.config
    every = config.validation_steps or config.validation_epochs * training.steps_per_epoch
    draws = bool(config.validation_prompts) and training.accelerator.is_main_process

    def draw(step: int) -> None:
        if draws and (step % every == 0 or step == training.max_train_steps):
            draw_samples(training, f"step-{step:06d}", step)

    with closing(iter(training)) as steps:
        past, done = read_history(training.folder) if draws else [], training.start_step
        drawn = {event["step"] for event in past if event["event"] == "samples"}
        if draws and 0 not in drawn and done < training.max_train_steps:
            with adapters.disabled(training.family):
                draw_samples(training, "base", 0)
        if drawn and done not in drawn:  # the checkpoint was kept, and a kill took its pictures
            draw(done)
        for step in steps:
            draw(step.step)
            yield step


def samples(folder: str | Path) -> dict[str, list[Path]]:
    """The sample pictures of a run by label ("base", "step 100", ...), in order of step, prompt and seed."""
    found: dict[str, list[Path]] = {}
    for file in sorted((Path(folder) / "samples").glob("*-p*-s*.png"), key=_sample_order):
        step = _sample_order(file)[0]
        found.setdefault("base" if step < 0 else f"step {step}", []).append(file)
    return found


def _sample_order(file: Path) -> tuple[int, int, int]:
    """(step or -1 for the base, prompt, seed) of a sample's file name."""
    label, prompt, seed = file.stem.rsplit("-", 2)
    return (
        -1 if label == "base" else int(label.removeprefix("step-")),
        int(prompt[1:]),
        int(seed[1:]),
    )


def draw_samples(training: Any, label: str, step: int) -> list[Path]:
    """Draw the validation prompts with the adapters as they are now into samples/<label>-p0-s0.png and so on.

    As in `with_samples`: a line in the history, and no trace in the training. Returns the files by prompt and seed.
    Samples that are not finite are left out and black ones are kept, both with a warning: training itself goes on.
    """
    config, family = training.config, training.family
    pipeline = family.pipeline()
    began = time.perf_counter()
    seeds = [config.seed + s for s in range(config.num_validation_images)]
    with _left_as_it_was(family), _quick(training):
        try:
            pictures = generate(
                pipeline,
                [prompt for prompt in config.validation_prompts for _ in seeds],
                seeds * len(config.validation_prompts),
                **config.sampling,
            )
        except NumericsError:
            _alarm(training, step, "a sample is not finite, so none was kept")
            return []
    if any(picture.getextrema() == ((0, 0),) * 3 for picture in pictures):
        _alarm(training, step, "a sample is all black")
    folder = training.folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    places = [(p, s) for p in range(len(config.validation_prompts)) for s in range(len(seeds))]
    files = [folder / f"{label}-p{p}-s{s}.png" for p, s in places]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    trackers.log_pictures(training.accelerator, config, pictures, step)
    training.history.record(
        "samples",
        step=step,
        base=label == "base",
        files=[f"samples/{file.name}" for file in files],
        seconds=time.perf_counter() - began,
    )
    return files


def _alarm(training: Any, step: int, what: str) -> None:
    text = (
        f"After step {step} {what}: numbers have overflowed while drawing it. Train in bf16 or float32 instead of "
        "fp16, or use a VAE that is safe in it (pretrained_vae_model_name_or_path)."
    )
    training.history.record("alarm", step=step, message=text)
    warnings.warn(text, stacklevel=4)


@contextmanager
def _quick(training: Any) -> Iterator[None]:
    """Inside, adapters are merged, convolutions packed, texts projected once; or adapters cast once, as in a step."""
    family = training.family
    if _merges(family):
        pipeline, drawn = family.pipeline(), network(family)
        packed = packing.drawing(drawn) if training.config.channels_last else nullcontext()
        with fused(pipeline), packed, projections.drawing(drawn):
            yield
    else:
        with training.learner.copies.fresh():
            yield


def _merges(family: Any) -> bool:
    """Whether samples are drawn so; on a GPU in half precision the weights to put back afterwards would cost memory."""
    return family.device.type == "cpu" or family.dtype == torch.float32


@contextmanager
def _left_as_it_was(family: Any) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own mode and torch's random state are back."""
    pipeline = family.pipeline()
    modes = [(module, module.training) for part in modules(pipeline) for module in part.modules()]
    devices = [family.device] if family.device.type == "cuda" else []
    try:
        for part in modules(pipeline):
            part.eval()
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
