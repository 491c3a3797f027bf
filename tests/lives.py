"""Lives of trainings in processes of their own, and what can befall them: signals, full disks, failing file operations.

Run as a program it reads jobs, one JSON object a line, and gives each a new process: forked from this one, which has
imported everything and trained nothing, or with "fresh" a new interpreter. It answers with the exit code of each.
"""

import builtins
import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGING = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "utime")


@contextlib.contextmanager
def watched(folder: Path | str, hook: Callable[[str], None]) -> Iterator[None]:
    """Inside, hook(name) is called before every file operation in a folder; it may raise or end the process.

    A written file makes three: opening, the first half of its bytes, the rest. Reading a file counts once.
    """

    def concerns(path) -> bool:  # a descriptor, or a name in an open folder, is of the file before
        return isinstance(path, int) or not os.path.isabs(path) or Path(path).is_relative_to(folder)

    class Halves(io.FileIO):
        def write(self, data):
            half = len(data) // 2
            hook("write")
            super().write(data[:half])
            hook("write the rest")
            return half + super().write(data[half:])

    def opened(file, mode="r", *args, **options):
        if not concerns(file):
            return real_open(file, mode, *args, **options)
        hook("open a file")
        if mode == "wb":
            return io.BufferedWriter(Halves(file, "wb"), 1)
        return real_open(file, mode, *args, **options)

    def noticed(name, function):
        def call(path, *args, **options):
            if concerns(path):
                hook(name)
            return function(path, *args, **options)

        return call

    real_open, real = builtins.open, {name: getattr(os, name) for name in CHANGING}
    try:
        builtins.open = io.open = opened
        for name in CHANGING:
            setattr(os, name, noticed(name, real[name]))
        yield
    finally:
        builtins.open = io.open = real_open
        for name in CHANGING:
            setattr(os, name, real[name])


class At:
    """A hook that counts, and at operation number k (and, if it lasts, at all later ones) does something."""

    def __init__(self, k: int | None, act: Callable[[], None] = lambda: None, lasts: bool = False):
        self.k, self.act, self.lasts, self.names = k, act, lasts, []

    def __call__(self, name: str) -> None:
        self.names.append(name)
        n = len(self.names)
        if self.k is not None and (n == self.k or (self.lasts and n > self.k)):
            self.act()


def die() -> None:
    """End this process as kill -9 does: nothing is flushed, nothing is tidied."""
    os.kill(os.getpid(), signal.SIGKILL)


def live(job: dict) -> None:
    """Train the config of a job, writing one line per step into its log: what was seen, what came out.

    stop_after: leave the loop at this step. operation: die before this file operation, counted from train() on.
    """
    from lora_nb.config import TrainConfig
    from lora_nb.trainer import train

    config = TrainConfig.from_dict(job["config"])
    hook = At(job.get("operation"), die)
    with open(job["log"], "a") as log, watched(config.output_dir, hook):
        training = train(config)
        seen, make = [], training.cache.batch

        def noted(positions):
            batch = make(positions)
            pixels = hashlib.sha256(batch.moments[0].numpy().tobytes()).hexdigest()[:16]
            seen.append([positions, batch.captions, pixels])
            return batch

        training.cache.batch = noted
        print("ready", flush=True)
        for step in training:
            line = [step.step, step.loss, step.lr, step.per_image, step.timesteps, seen]
            log.write(json.dumps(line) + "\n")
            log.flush()
            seen.clear()
            if step.step == job.get("stop_after"):
                break
    with open(job["log"] + ".operations", "w") as file:
        json.dump(hook.names, file)


def _forked(job: dict) -> int:
    """A life in a child of this process; killed `kill_after` seconds after it was born, if it still lives."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            live(job)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    if "kill_after" in job:
        time.sleep(job["kill_after"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fresh(job: dict) -> int:
    """A life in a new interpreter, which says when it is ready to train."""
    command = [sys.executable, __file__, json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if "kill_after" in job:
        process.stdout.readline()
        time.sleep(job["kill_after"])
        process.kill()
    process.communicate()
    return process.returncode


class Lives:
    """The program as a helper of a test; use as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "Lives":
        self._errors = open(self.folder / "errors.txt", "w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.stdin.close()
        self._process.wait(120)
        self._errors.close()

    def __call__(self, config, **job) -> int:
        """The exit code of one life of a config; its log is <output_dir>.log."""
        job |= {"config": config.to_dict(), "log": config.output_dir + ".log"}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @property
    def said(self) -> str:
        """What all lives have written to stderr."""
        return (self.folder / "errors.txt").read_text()


def log_of(config) -> dict[int, list]:
    """What each step of a run saw and gave, by step; the last of a step that was done again."""
    lines = Path(config.output_dir + ".log").read_text().splitlines()
    return {step: values for step, *values in map(json.loads, lines)}


if __name__ == "__main__":
    import lora_nb.families
    import lora_nb.trainer  # noqa: F401

    if len(sys.argv) > 1:
        live(json.loads(sys.argv[1]))
        sys.exit()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps((_fresh if job.pop("fresh", False) else _forked)(job)), flush=True)
