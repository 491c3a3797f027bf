"""Jobs in processes of their own, timed from outside: wall time, CPU time and peak resident size of each."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lora_nb.bench.worker import SPAWNED, TURN
from lora_nb.errors import LoraNbError

DROPPED = 5  # first steps that no median counts
STEPS = 3  # of a job in turns, before it is the next one's


class BenchError(LoraNbError):
    """A side of a measurement that did not run."""


@dataclass
class Result:
    """What one process did. Seconds, bytes; steps: (since its start, CPU so far, loss) at the end of each."""

    wall: float
    cpu: float
    memory: int
    steps: list[tuple[float, float, float]]
    found: dict[str, Any] = field(default_factory=dict)

    def per_step(self, column: int = 1) -> float:
        """Median seconds of a steady step: column 0 wall, 1 CPU."""
        times = [step[column] for step in self.steps][DROPPED - 1 :]
        return median(b - a for a, b in itertools.pairwise(times))

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step[2] for step in self.steps]


@dataclass(frozen=True)
class Runner:
    """Starts jobs in `folder` with this many threads."""

    folder: Path
    threads: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """What the processes of both sides see."""
        folder = self.folder
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"],
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "LORA_NB_CACHE": str(folder / "cache"),
            "LORA_NB_HEADLESS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
        }

    def start(self, job: dict[str, Any]) -> "Running":
        """Start a job and do not wait for it; its `environment` is added to that of all."""
        jobs = self.folder / "jobs"
        jobs.mkdir(parents=True, exist_ok=True)
        name = f"{job['kind']}-{time.time_ns()}"
        file, out, log = (jobs / f"{name}.{end}" for end in ("json", "out", "log"))
        file.write_text(json.dumps(job | {"out": str(out)}))
        seen = os.environ | self.environment | job.get("environment", {})
        seen[SPAWNED] = repr(time.time())
        with log.open("w") as text:
            process = subprocess.Popen(
                [sys.executable, "-m", "lora_nb.bench.worker", str(file)],
                env=seen, stdout=text, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return Running(process, time.perf_counter(), out, log)

    def run(self, job: dict[str, Any]) -> Result:
        """Run a job to its end; raises BenchError with the last lines it printed if it fails."""
        return self.start(job).wait()

    def in_turns(self, sides: Sequence[Sequence[dict[str, Any]]]) -> list[list[Result]]:
        """Run sides, one at a time and a few steps of each in turn; raises BenchError if a job fails.

        The jobs of one side run at the same time. A machine that others use changes its speed within seconds, and so it
        does for all sides.
        """
        running: list[list[Running]] = []
        # Without it a job that has stopped would stay for ever.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for jobs in sides:
                running.append([])
                running[-1].extend(self.start(_in_turn(job)) for job in jobs)
                _until_they_stop(running[-1])
            going = running
            while going := [side for side in going if _go_on(side)]:
                pass
            return [[each.wait() for each in side] for side in running]
        finally:
            for each in itertools.chain(*running):
                each.kill()
            signal.signal(signal.SIGTERM, before)


@dataclass
class Running:
    """A job that has been started."""

    process: subprocess.Popen
    began: float
    out: Path
    log: Path

    def stopped(self) -> bool:
        """Wait until it has stopped itself, or ended; whether it has stopped."""
        of = os.P_PID, self.process.pid
        if os.waitid(*of, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED:
            return False
        os.waitid(*of, os.WSTOPPED)
        return True

    def go_on(self) -> None:
        """Let it go on, if it has stopped."""
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()

    def wait(self) -> Result:
        """Its result; raises BenchError if it failed."""
        _, status, used = os.wait4(self.process.pid, 0)
        wall = time.perf_counter() - self.began
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode or not self.out.is_file():
            tail = " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-4:])
            raise BenchError(f"A job of the benchmark failed ({self.log}): {tail}")
        found = json.loads(self.out.read_text())
        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * used.ru_maxrss
        return Result(wall, used.ru_utime + used.ru_stime, memory, found.pop("steps"), found)


def _in_turn(job: dict[str, Any]) -> dict[str, Any]:
    return job | {"environment": job.get("environment", {}) | {TURN: str(STEPS)}}


def _go_on(side: list[Running]) -> bool:
    """Let all go on together, and wait until they have stopped again; whether any has."""
    for each in side:
        each.go_on()
    return _until_they_stop(side)


def _until_they_stop(side: list[Running]) -> bool:
    stopped = [each.stopped() for each in side]
    return any(stopped)
