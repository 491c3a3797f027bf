"""One side of a measurement in a process of its own: `python -m lora_nb.bench.worker JOB.json`.

A job names what to do and where to write what was seen: for each step the seconds since this process was started, the
CPU seconds it has used, and the loss.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPAWNED = "LORA_NB_BENCH_SPAWNED"  # when the parent started this process, seconds since 1970
TURN = "LORA_NB_BENCH_TURN"  # steps after which this process stops, until its parent lets it go on


class Clock:
    """Notes the end of each step."""

    def __init__(self) -> None:
        self.spawned = float(os.environ[SPAWNED])
        self.turn = int(os.environ.get(TURN, 0))
        self.steps: list[tuple[float, float, float]] = []
        self.found: dict[str, Any] = {}

    def tick(self, loss: float) -> None:
        """A step has ended, and with it perhaps a turn."""
        self.steps.append((time.time() - self.spawned, time.process_time(), loss))
        if self.turn and len(self.steps) % self.turn == 0:
            self.stop()

    def stop(self) -> None:
        """In turns, stop the process until its parent lets it go on; how long that is does not count."""
        if self.turn:
            before = time.time()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.spawned += time.time() - before


def main(file: str) -> None:
    """Do the job and write what was seen into its `out`."""
    job, clock = json.loads(Path(file).read_text()), Clock()
    KINDS[job["kind"]](job, clock)
    Path(job["out"]).write_text(json.dumps({"steps": clock.steps} | clock.found))


def _script(job: dict[str, Any], clock: Clock) -> None:
    """The unmodified reference script, its progress bar read as a clock."""
    with _recording(job), _watched_bar(clock), _timed_pictures(job, clock):
        _put_in_torchvision()
        sys.argv = [job["script"], *job["argv"]]
        runpy.run_path(job["script"], run_name="__main__")


def _plain(job: dict[str, Any], clock: Clock) -> None:
    """The plain loop in the script's place."""
    with _recording(job), _watched_bar(clock):
        from lora_nb.bench import plain

        plain.main(_config(job))


def _command(job: dict[str, Any], clock: Clock) -> None:
    """`lora-nb train`, as it is typed; `file` are the CPU seconds until the adapter file is there."""
    from lora_nb import trainer

    log, save = trainer.Training._log, trainer.Training.save_adapter

    def ticking(self: Any, step: Any) -> None:
        log(self, step)
        clock.tick(step.loss)

    def saving(self: Any) -> Path:
        file = save(self)
        clock.found["file"] = time.process_time()
        return file

    trainer.Training._log, trainer.Training.save_adapter = ticking, saving
    sys.argv = ["lora_nb", "train", *job["argv"]]
    try:
        runpy.run_module("lora_nb", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        trainer.Training._log, trainer.Training.save_adapter = log, save


def _steady(job: dict[str, Any], clock: Clock) -> None:
    """Our loop with every picture encoded before it starts."""
    from lora_nb.trainer import train

    training = train(_config(job))
    began = time.perf_counter()
    for position in range(len(training.pictures)):
        training.cache.batch([position])
    clock.found["encoding"] = time.perf_counter() - began
    for step in training:
        clock.tick(step.loss)


def _replay(job: dict[str, Any], clock: Clock) -> None:
    """Our loop on the draws that another side made."""
    from lora_nb.bench.draws import Draws, played_back
    from lora_nb.trainer import train

    training = train(_config(job))
    with played_back(Draws(Path(job["draws"])), training):
        for step in training:
            clock.tick(step.loss)


def _validation(job: dict[str, Any], clock: Clock) -> None:
    """Our sample pictures of some validations: CPU seconds of one by set, a turn each, and arithmetic of one.

    In float32 also the largest difference to pictures drawn one by one.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lora_nb.inference import draw_samples, drawing
    from lora_nb.trainer import train

    training = train(_config(job))
    next(iter(training))
    draw_samples(training, "warm", 1)
    times = clock.found["pictures"] = []
    for _ in range(job["sets"]):
        began = time.process_time()
        draw_samples(training, "timed", 1)
        times.append((time.process_time() - began) / 4)
        clock.stop()
    with FlopCounterMode(display=False, custom_mapping=uncounted()) as counter:
        draw_samples(training, "counted", 1)
    clock.found["flop"] = counter.get_total_flops() / 4
    if training.family.dtype == torch.float32:
        prompts, seeds = ["a red thing"] * 4, [0, 1, 2, 3]
        sampling = {"num_inference_steps": 4, "guidance_scale": 7.5, "guidance_rescale": 0.0}
        options = {"resolution": None, "scale": None} | sampling
        pipeline = training.family.pipeline()
        both = [
            drawing._pixels(pipeline, prompts, seeds, batch_size=size, **options) for size in (1, 4)
        ]
        clock.found["difference"] = float(abs(both[0] - both[1]).max())


def uncounted() -> dict[Any, Any]:
    """Multiplications and additions of the products whose kernels torch's counter does not know."""
    import math

    import torch

    def product(x: Any, weight: Any, *args: Any, out_shape: Any, **named: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    names = ("_linear_pointwise", "_convolution_pointwise")
    return {getattr(torch.ops.mkldnn, name): product for name in names}


def _forecast(job: dict[str, Any], clock: Clock) -> None:
    """The forecast of a run."""
    from lora_nb.forecast import preflight

    found = preflight(_config(job))
    clock.found |= {"seconds": found.seconds, "step": found.seconds_per_step}
    clock.found |= {"training": found.caching + found.training, "memory": found.peak_memory}


def _run(job: dict[str, Any], clock: Clock) -> None:
    """The run that was forecast; `step` is the median once every picture is encoded."""
    from statistics import median

    from lora_nb.inference import with_samples
    from lora_nb.trainer import train

    began = time.perf_counter()
    training = train(_config(job))
    seconds = [step.seconds for step in with_samples(training)]
    clock.found |= {"seconds": time.perf_counter() - began, "training": sum(seconds)}
    clock.found |= {"step": median(seconds[training.steps_per_epoch :])}


def _switches(job: dict[str, Any], clock: Clock) -> None:
    """Pairs of trainings in one process, a few steps of each in turn."""
    from lora_nb.bench.switches import measure

    clock.found["rows"] = measure(_config(job), job["rounds"], job["timed"], job["names"])


def _scaling(job: dict[str, Any], clock: Clock) -> None:
    """Seconds of making a batch from an index of many pictures."""
    from lora_nb.bench.scaling import measure

    clock.found["rows"] = measure(_config(job), job["sizes"])


def _spin(job: dict[str, Any], clock: Clock) -> None:
    """Keep one core busy until killed."""
    while True:
        pass


def _peak(job: dict[str, Any], clock: Clock) -> None:
    """GFLOP/s of a matrix product."""
    from lora_nb.bench.machine import peak

    clock.found["gflops"] = peak(job["precision"])


KINDS = {
    "script": _script,
    "plain": _plain,
    "command": _command,
    "steady": _steady,
    "replay": _replay,
    "validation": _validation,
    "forecast": _forecast,
    "run": _run,
    "switches": _switches,
    "scaling": _scaling,
    "spin": _spin,
    "peak": _peak,
}


def _config(job: dict[str, Any]) -> Any:
    """The config of a job's command line, with the job's own changes."""
    import argparse

    from lora_nb import flags

    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    config = flags.from_flags(parser.parse_args(job["argv"]), None)
    return config.replace(**job.get("changes", {}))


def _recording(job: dict[str, Any]) -> Any:
    if "record" not in job:
        return contextlib.nullcontext()
    from lora_nb.bench.draws import recorded

    return recorded(Path(job["record"]))


@contextlib.contextmanager
def _watched_bar(clock: Clock) -> Iterator[None]:
    """Every tqdm bar that shows a step_loss ticks the clock."""
    import tqdm.auto

    plain = tqdm.auto.tqdm

    class Watched(plain):
        def set_postfix(self, *args: Any, **values: Any) -> None:
            super().set_postfix(*args, **values)
            if "step_loss" in values:
                clock.tick(values["step_loss"])

    tqdm.auto.tqdm = Watched
    try:
        yield
    finally:
        tqdm.auto.tqdm = plain


@contextlib.contextmanager
def _timed_pictures(job: dict[str, Any], clock: Clock) -> Iterator[None]:
    """CPU seconds of every picture that a Stable Diffusion pipeline draws, by drawing order; a turn each."""
    if "--validation_prompt" not in job["argv"]:  # importing the pipeline early would cost
        yield
        return
    from lora_nb.families._imports import StableDiffusionPipeline

    plain, times = StableDiffusionPipeline.__call__, clock.found.setdefault("pictures", [])

    def timed(self: Any, *args: Any, **options: Any) -> Any:
        began = time.process_time()
        result = plain(self, *args, **options)
        times.append(time.process_time() - began)
        clock.stop()
        return result

    StableDiffusionPipeline.__call__ = timed
    try:
        yield
    finally:
        StableDiffusionPipeline.__call__ = plain


def _put_in_torchvision() -> None:
    """Without torchvision, put the stand-in in its place, once transformers has looked for the real one."""
    from importlib.util import find_spec

    from transformers.utils import import_utils

    if find_spec("torchvision") is None:
        import_utils.is_torchvision_available()
        sys.path.append(str(Path(__file__).parent / "standin"))


if __name__ == "__main__":
    main(sys.argv[1])
