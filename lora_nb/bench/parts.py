"""The parts of the benchmark: each measures one thing and returns plain data for the tables."""

import dataclasses
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nb.bench import ground, machine
from lora_nb.bench.processes import DROPPED, BenchError, Result, Runner, Running
from lora_nb.bench.switches import SWITCHES
from lora_nb.families import widened
from lora_nb.families.shapes import SHAPES

EPOCHS = (1, 3, 10)
GATES = {"no": 1e-6, "bf16": 2e-3}  # largest difference of losses
# Threads, and how long one waits awake for another; the last is the default of GNU's OpenMP.
WAITING = ((1, "500"), (2, "500"), (2, "0"), (2, "300000"))
PICTURE = ("--validation_prompt", "a red thing", "--num_validation_images", "4")


@dataclass
class Bench:
    """Where and how to measure. reference: the script, None for the plain loop in its place."""

    folder: Path
    reference: Path | None
    rounds: int = 3
    steps: int = 30
    threads: int = 1
    full: bool = False
    parity_steps: int = 30
    pictures: int = 200
    side: int = 128  # pixels

    def __post_init__(self) -> None:
        ground.lay(self.folder, self.pictures, self.side)
        self.runner = Runner(self.folder, self.threads)
        self.parity: dict[str, float] = {}

    def flags(self, side: str, steps: int, batch: int = 4, precision: str = "no") -> list[str]:
        """The command line of one side, with an output folder of its own."""
        output = self.folder / "runs" / side
        size = self.pictures, self.side
        return ground.flags(self.folder, output, steps, batch, precision, *size)

    def theirs(self, steps: int, batch: int = 4, precision: str = "no", **job: Any) -> Result:
        """The reference script, or the plain loop."""
        return self.runner.run(self.their_job("theirs", steps, batch, precision, **job))

    def their_job(
        self, folder: str, steps: int, batch: int, precision: str, **job: Any
    ) -> dict[str, Any]:
        """A job of the other side, in the named folder."""
        extra = job.pop("extra", ())
        kind = (
            {"kind": "script", "script": str(self.reference)}
            if self.reference
            else {"kind": "plain"}
        )
        argv = [*self.flags(folder, steps, batch, precision), *extra]
        return kind | {"argv": argv} | job

    def ours(
        self, kind: str, steps: int, batch: int = 4, precision: str = "no", **job: Any
    ) -> Result:
        """Our side of a kind of job, in a folder that is emptied first."""
        return self.begin(f"ours-{kind}", kind, steps, batch, precision, **job).wait()

    def begin(
        self, folder: str, kind: str, steps: int, batch: int, precision: str = "no", **job: Any
    ) -> Running:
        """The same in the named folder, started and not waited for."""
        return self.runner.start(self.our_job(folder, kind, steps, batch, precision, **job))

    def our_job(
        self, folder: str, kind: str, steps: int, batch: int, precision: str, **job: Any
    ) -> dict[str, Any]:
        """A job of our side, in the named folder, which is emptied first."""
        argv = [*self.flags(folder, steps, batch, precision), "--overwrite"]
        argv += job.pop("extra", ())
        return {"kind": kind, "argv": argv} | job

    def in_turns(self, jobs: list[dict[str, Any]]) -> list[Result]:
        """Sides of one job each, a few steps of each in turn."""
        return [result for [result] in self.runner.in_turns([[job] for job in jobs])]

    def fresh(self) -> dict[str, str]:
        """The environment of a job that finds nothing encoded."""
        return {"LORA_NB_CACHE": tempfile.mkdtemp(prefix="cold-", dir=self.folder)}

    def check_parity(self) -> dict[str, float]:
        """Largest loss difference of 30 steps on the other side's draws, by precision; once for a run of the bench.

        Raises BenchError if one is beyond its gate: no speed is reported then.
        """
        if self.parity:
            return self.parity
        draws = self.folder / "draws.safetensors"
        theirs = self.theirs(self.parity_steps, record=str(draws)).losses
        for precision, gate in GATES.items():
            changes = {"max_grad_norm": 0.0}  # the script's clipping does nothing
            job = {"draws": str(draws), "changes": changes}
            losses = self.ours("replay", self.parity_steps, 4, precision, **job).losses
            worst = max(abs(a - b) for a, b in zip(theirs, losses, strict=True))
            if not worst <= gate:
                raise BenchError(
                    f"The losses of {self.parity_steps} steps differ by up to {worst:.1e} in {precision!r} precision, "
                    f"more than {gate:.0e}, so this is not the same work and no speed is measured; look at {draws}."
                )
            self.parity[precision] = worst
        return self.parity

    def peak(self, precision: str = "no") -> float:
        """GFLOP/s of a matrix product now, with the threads of the benchmark."""
        return self.runner.run({"kind": "peak", "precision": precision}).found["gflops"]


def training(bench: Bench) -> dict[str, Any]:
    """Seconds of a steady step, a few steps of each side in turn; batch 4 in float32 and bf16, batch 1 in float32.

    At batch 4 our compiled step takes its turns too, where there is a C++ compiler, and beside bf16 their float32; that
    alone on a CPU that knows no bf16, where a step of theirs in it takes twenty seconds.
    """
    parity = bench.check_parity()
    rows, steps = [], bench.steps + DROPPED
    for batch, precision in ((4, "no"), (1, "no"), (4, "bf16")):
        other = precision if widened.SUPPORTED else "no"
        variants = {"": ()} | (
            {"compiled": ("--torch_compile",)} if batch > 1 and _compiler() else {}
        )
        pairs: dict[str, list[tuple[Result, Result]]] = {name: [] for name in variants}
        peaks, wide = [], []
        for _ in range(bench.rounds):
            peaks.append(bench.peak(precision))
            jobs = [bench.their_job("theirs", steps, batch, other)]
            for name, extra in variants.items():
                folder = f"ours-steady{name}"
                jobs.append(bench.our_job(folder, "steady", steps, batch, precision, extra=extra))
            if other != "no":
                jobs.append(bench.their_job("theirs-wide", steps, batch, "no"))
            theirs, *found = bench.in_turns(jobs)
            for name, ours in zip(variants, found, strict=False):
                pairs[name].append((theirs, ours))
            wide += found[len(variants) :]
        for name in variants:
            row = _compared(batch, precision, name, pairs[name], max(peaks))
            seconds = zip(wide, pairs[name], strict=False)
            row["to float32"] = [a.per_step() / ours.per_step() for a, (_, ours) in seconds]
            row["their precision"] = other
            rows.append(row)
    return {"parity": parity, "rows": rows, "steps": bench.steps, "rounds": bench.rounds}


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def _compared(
    batch: int, precision: str, variant: str, pairs: list[tuple[Result, Result]], peak: float
) -> dict[str, Any]:
    middle = statistics.median
    seconds = [middle(side.per_step() for side in column) for column in zip(*pairs, strict=True)]
    return {
        "batch": batch,
        "precision": precision,
        "variant": variant,
        "theirs": seconds[0],
        "ours": seconds[1],
        "cpu": [a.per_step(1) / b.per_step(1) for a, b in pairs],
        "wall": [a.per_step(0) / b.per_step(0) for a, b in pairs],
        "memory": [middle(side.memory for side in column) for column in zip(*pairs, strict=True)],
        "peak": peak,
        "of_peak": 1000 * SHAPES["small"].tflop * batch / seconds[1] / peak,
        "ours_losses": pairs[0][1].losses[:3],
    }


def switches(bench: Bench) -> dict[str, Any]:
    """Each switch on against off, in one process that runs both in turn; compiling takes a C++ compiler."""
    names = [name for name in SWITCHES if _compiler() or "compile" not in name]
    found = bench.ours(
        "switches", 1, names=names, rounds=bench.rounds, timed=max(4, bench.steps // 4)
    )
    return {"rows": found.found["rows"]}


def whole(bench: Bench) -> dict[str, Any]:
    """Start-up, caching and all steps of 1, 3 and 10 epochs, from the command to the adapter file, both sides in turn.

    And to our own end: a certificate, a report and a card, for which the other side has nothing.

    Ten epochs are measured with `full`; otherwise they are reckoned from three and the seconds of an epoch.
    """
    epoch = bench.pictures // 4
    last = EPOCHS[-1] if bench.full else EPOCHS[-2]
    pairs = []
    for _ in range(1 if bench.full else bench.rounds):
        steps, cold = last * epoch, bench.fresh()
        theirs = bench.their_job("theirs", steps, 4, "no")
        ours = bench.our_job("ours-command", "command", steps, 4, "no", environment=cold)
        pairs.append(bench.in_turns([theirs, ours]))
    rows = []
    for epochs in EPOCHS:
        step = epochs * epoch
        times = [
            (
                _until(theirs, theirs.cpu, step, epoch),
                _until(ours, ours.found["file"], step, epoch),
                _until(ours, ours.cpu, step, epoch),
            )
            for theirs, ours in pairs
        ]
        theirs, ours, all_of_ours = (
            statistics.median(column) for column in zip(*times, strict=True)
        )
        rows.append(
            {
                "epochs": epochs,
                "theirs": theirs,
                "ours": ours,
                "ratios": [a / b for a, b, _ in times],
                "all of ours": all_of_ours,
                "all ratios": [a / c for a, _, c in times],
                "reckoned": epochs > last,
            }
        )
    return {"rows": rows}


def _until(side: Result, end: float, step: int, epoch: int) -> float:
    """CPU seconds of a whole run that ends after `step`: up to there, and from this one's last step to its `end`."""
    used = [cpu for _, cpu, _ in side.steps]
    if step <= len(used):
        return used[step - 1] + end - used[-1]
    each = (used[-1] - used[-1 - epoch]) / epoch
    return end + each * (step - len(used))


def validation(bench: Bench) -> dict[str, Any]:
    """Four sample pictures of 30 denoising steps: the script draws one by one, ours in one batch, in turn.

    The script's are drawn in bf16, and not waited for on a CPU that knows none.
    """
    middle = statistics.median
    sides: dict[str, list[Result]] = {"no": [], "bf16": [], "theirs": []}
    peaks: dict[str, list[float]] = {"no": [], "bf16": []}
    for _ in range(min(2, bench.rounds)):
        jobs = []
        for precision, found in peaks.items():
            found.append(bench.peak(precision))
            job = {"extra": PICTURE, "sets": bench.rounds}
            folder = f"ours-validation-{precision}"
            jobs.append([bench.our_job(folder, "validation", 2, 4, precision, **job)])
        if bench.reference and widened.SUPPORTED:
            jobs.append([bench.their_job("theirs", 1, 4, "no", extra=PICTURE)])
        for side, [result] in zip(sides.values(), bench.runner.in_turns(jobs), strict=False):
            side.append(result)
    times = {
        name: [middle(side.found["pictures"]) for side in found] for name, found in sides.items()
    }
    theirs = times.pop("theirs")
    rows = [
        {
            "precision": precision,
            "theirs": theirs and middle(theirs),
            "ours": middle(ours),
            "ratios": [a / b for a, b in zip(theirs, ours, strict=False)],
            "difference": sides[precision][-1].found.get("difference"),
            "least": sides[precision][-1].found["flop"] / max(peaks[precision]) / 1e9,
        }
        for precision, ours in times.items()
    ]
    return {"rows": rows}


def startup(bench: Bench) -> dict[str, Any]:
    """Seconds from the command to the end of the first step: the other side, ours, and ours once all is on disk."""
    bench.theirs(1)  # writes its own table of the pictures, which every later run reads
    sides: dict[str, list[float]] = {"theirs": [], "ours": [], "ours again": []}
    importing = []
    for _ in range(2 * bench.rounds):
        cold = bench.fresh()
        sides["theirs"].append(bench.theirs(1).steps[0][1])
        sides["ours"].append(bench.ours("command", 1, environment=cold).steps[0][1])
        sides["ours again"].append(bench.ours("command", 1, environment=cold).steps[0][1])
        importing.append(_import_seconds())
    return {
        "seconds": {name: statistics.median(values) for name, values in sides.items()},
        "ratios": {
            name: [a / b for a, b in zip(sides["theirs"], sides[name], strict=True)]
            for name in ("ours", "ours again")
        },
        "import": statistics.median(importing),
    }


def _import_seconds() -> float:
    """CPU seconds of `import lora_nb` in a new interpreter, the interpreter's own not counted."""
    code = "import time; t = time.process_time(); import lora_nb; print(time.process_time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def scaling(bench: Bench) -> dict[str, Any]:
    """Steps over a growing index; two processes against one; a busy neighbour on one of two cores."""
    found = bench.ours("scaling", 1, sizes=[100, 1_000, 10_000, 100_000])
    return {
        "rows": found.found["rows"],
        "processes": _two_processes(bench),
        "neighbour": _neighbour(bench),
    }


def _two_processes(bench: Bench) -> dict[str, Any]:
    """Wall seconds of a step of one process and of two of one training; a thread each, a few steps of each in turn.

    flags: two processes with the flags of one, so with steps of twice the pictures. accumulated, batch: one process
    with such steps too, by accumulation and by its batch. apart: two trainings that exchange nothing.
    """
    steps = bench.steps + DROPPED

    def job(name: str, batch: int = 4, **job: Any) -> dict[str, Any]:
        return bench.our_job(f"ours-{name}", "steady", steps, batch, "no", **job)

    rounds = []
    for _ in range(bench.rounds):
        sides = {
            "one": [job("one")],
            "two": [job("two", environment=rank) for rank in _ranks(2)],
            "accumulated": [job("accumulated", extra=("--gradient_accumulation_steps", "2"))],
            "batch": [job("batch", 8)],
            "apart": [job("apart-a"), job("apart-b")],
        }
        found = bench.runner.in_turns(list(sides.values()))
        rounds.append({name: _step_of(results) for name, results in zip(sides, found, strict=True)})
    seconds = {name: [each[name] for each in rounds] for name in rounds[0]}
    ratios = {
        "flags": [2 * each["one"] / each["two"] for each in rounds],
        "accumulated": [each["accumulated"] / each["two"] for each in rounds],
        "batch": [each["batch"] / each["two"] for each in rounds],
        "apart": [2 * each["one"] / each["apart"] for each in rounds],
    }
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return {"seconds": middle, "ratios": ratios}


def _ranks(number: int) -> list[dict[str, str]]:
    """What each process of one training finds in its environment, as `accelerate launch` leaves it there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _step_of(results: list[Result]) -> float:
    return statistics.mean(result.per_step(0) for result in results)


def _neighbour(bench: Bench) -> list[dict[str, Any]]:
    """Wall seconds of a step, alone and beside a process that keeps one core busy; in turns, by threads and waiting."""
    rows = []
    for threads, spins in WAITING:
        one = dataclasses.replace(bench, threads=threads)
        pairs = [_alone_and_beside(one, {"GOMP_SPINCOUNT": spins}) for _ in range(bench.rounds)]
        quiet, beside = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [b / a for a, b in pairs]
        found = {"quiet": quiet, "beside": beside, "ratios": ratios}
        rows.append({"threads": threads, "spins": spins} | found)
    return rows


def _alone_and_beside(bench: Bench, environment: dict[str, str]) -> tuple[float, float]:
    def step() -> float:
        steps = bench.steps // 2 + DROPPED
        return bench.ours("steady", steps, environment=environment).per_step(0)

    quiet = step()
    busy = bench.runner.start({"kind": "spin", "environment": {"OMP_NUM_THREADS": "1"}})
    try:
        return quiet, step()
    finally:
        busy.process.kill()
        busy.process.wait()


def forecast(bench: Bench) -> dict[str, Any]:
    """What `preflight` says of a run, and what the run then takes, in turns; each in a process of its own."""
    extra = (*PICTURE, "--validation_steps", "50", "--num_inference_steps", "20")
    rounds = []
    for _ in range(bench.rounds):
        said = bench.ours("forecast", 100, extra=extra, environment=bench.fresh())
        was = bench.ours("run", 100, extra=extra, environment=bench.fresh())
        rounds.append((said.found, was.found | {"memory": was.memory}))
    return {"rounds": rounds}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "training": training,
    "switches": switches,
    "whole": whole,
    "validation": validation,
    "startup": startup,
    "scaling": scaling,
    "forecast": forecast,
}


def conditions(bench: Bench) -> dict[str, str]:
    """The state of the machine, for the record of a part."""
    return machine.state(bench.runner.environment)
