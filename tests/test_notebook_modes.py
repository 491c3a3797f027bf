"""Every notebook in the ways people use one: cells run twice, stopped in the longest one, its kernel killed there.

What a run leaves must not depend on the way it came about. This is about state and not about quality, so the parameters
are small ones; with its own, each notebook is run in test_notebooks.
"""

import json
import os
import queue
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client import KernelManager
from PIL import Image
from safetensors.torch import load_file
from test_notebooks import NEEDS, NOTEBOOKS, code, with_parameters

from lora_nb import checkpoint, lock, read_config, run_folder, save_config

PATIENCE = 1800  # seconds for one cell on a machine that has other work
BY_NAME = {path.stem: path for path in NOTEBOOKS}
# Parameters with which a notebook takes seconds; the kernel dies after a checkpoint where there is one before the end.
SMALL = {
    "03_training": {"STEPS": 24, "EVERY": 8},
    "05_rank_and_learning_rate": {"STEPS": 6, "RANKS": [4, 16], "FACTORS": [0.25, 1, 4]},
    "06_dreambooth": {"STEPS": 12},
    "07_combining": {"STEPS": 16, "WEIGHTS": [0, 1]},
    "08_formats_and_sharing": {"STEPS": 16},
    "09_families": {"STEPS": 6},
    "10_bug_museum": {"STEPS": 12},
    "11_on_a_gpu": {"STEPS": 6},
}
# The cell that takes longest with the notebook's own parameters.
LONGEST = {
    "00_setup": "first",
    "01_dataset": "doctor",
    "02_lora_config": "layer",
    "03_training": "train",
    "04_inference": "curve",
    "05_rank_and_learning_rate": "sweep",
    "06_dreambooth": "both",
    "07_combining": "train",
    "08_formats_and_sharing": "train",
    "09_families": "train",
    "10_bug_museum": "train",
    "11_on_a_gpu": "train",
}


# Before the first cell: the preset of this machine with small batches and few denoising steps.
BEFORE = """
import dataclasses, lora_nb
full = lora_nb.preset
lora_nb.preset = lambda *name: dataclasses.replace(full(*name), train_batch_size=4, num_inference_steps=3)
"""


class Kernel:
    """A kernel in the folder of the notebooks that keeps its runs in a folder of ours; use as a context manager."""

    def __init__(self, runs: Path):
        self.runs = runs

    def __enter__(self) -> "Kernel":
        scratch = scratch_of(self.runs)
        scratch.mkdir(exist_ok=True)
        own = {"LORA_NB_RUNS": str(self.runs), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=BY_NAME["00_setup"].parent, env=os.environ | own)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)
        self.run(BEFORE)
        return self

    def __exit__(self, *failure: object) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def begin(self, source: str) -> str:
        """Send a cell to the kernel; the number of the request."""
        return self.client.execute(source, stop_on_error=False)

    def end(self, request: str, timeout: float = PATIENCE) -> dict | None:
        """The reply to a request; None if there is none in time."""
        last = time.monotonic() + timeout
        while True:
            try:
                reply = self.client.get_shell_msg(timeout=max(0.0, last - time.monotonic()))
            except queue.Empty:
                return None
            if reply["parent_header"].get("msg_id") == request:
                return reply["content"]

    def run(self, source: str) -> float:
        """Run a cell, which must not fail; the seconds it took."""
        begun = time.monotonic()
        reply = self.end(self.begin(source))
        assert reply, f"no reply within {PATIENCE} s: {source}"
        assert reply["status"] == "ok", (source, reply["ename"], reply["evalue"])
        return time.monotonic() - begun


def scratch_of(runs: Path) -> Path:
    """Where the kernels of these runs keep temporary files, trainings that are not kept among them."""
    return runs.with_name(runs.name + "-scratch")


@dataclass
class Whole:
    """An undisturbed run: the runs it found, the seconds of each of its cells, the runs it left."""

    found: Path
    cells: list[str]
    seconds: list[float]
    left: Path
    longest: int  # place of the cell that is stopped


@pytest.fixture(scope="session")
def wholes() -> dict[str, Whole]:
    """The undisturbed runs of this session; one that another needs is not repeated for it."""
    return {}


def whole(name: str, folder: Path, wholes: dict[str, Whole]) -> Whole:
    """Run a notebook from top to bottom, what it needs before it."""
    if name not in wholes:
        found, left = folder / name / "found", folder / name / "left"
        found.mkdir(parents=True)
        if name in NEEDS:
            shutil.copytree(whole(NEEDS[name], folder, wholes).left, found, dirs_exist_ok=True)
            probe_little(found)
        shutil.copytree(found, left)
        path = with_parameters(BY_NAME[name], SMALL.get(name, {}), folder)
        cells = code(nbformat.read(path, as_version=4))
        sources, ids = [cell.source for cell in cells], [cell.id for cell in cells]
        with Kernel(left) as kernel:
            seconds = [kernel.run(source) for source in sources]
        wholes[name] = Whole(found, sources, seconds, left, ids.index(LONGEST[name]))
    return wholes[name]


def probe_little(runs: Path) -> None:
    """Fewer probed pictures in the config that a chapter leaves to the next."""
    for path in runs.glob("*/config.json"):
        save_config(read_config(path.parent).replace(probe_size=8))


# What is left behind


def assert_same(left: Path, other: Path) -> None:
    """The same files with the same contents: tensors, pictures, settings, and what the histories tell, nothing twice.

    A run that was stopped has a checkpoint more, of the step it was stopped at. A training that was made and is not
    iterated over holds its folder until its kernel ends.
    """
    a, b = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != lock.FILE}
        for folder in (left, other)
    )
    more = {path for path in b - a if is_of_a_stop((other / path).parent)}
    assert a == b - more, (a - b, b - a)
    for name in sorted(a):
        assert contents(left / name, left) == contents(other / name, other), name


def is_of_a_stop(folder: Path) -> bool:
    """Whether this is the checkpoint of a step after which its run was stopped."""
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    stops = [e["step"] for e in run_folder.read_history(folder.parent) if e["event"] == "stop"]
    return bool(step) and int(step[1]) in stops


# Of a history: what was trained, measured and drawn, without times and without starts and stops.
KINDS, TOLD = ("step", "probe", "samples"), ("event", "step", "loss", "grad_norm", "files")


def contents(path: Path, runs: Path) -> object:
    """What must be equal in a file; nothing where it tells of times, processes or the run's random name."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    if path.name == run_folder.CONFIG:
        return json.loads(path.read_text().replace(str(runs), ""))
    if path.name == run_folder.HISTORY:
        events = run_folder.read_history(path.parent)
        return [[event.get(key) for key in TOLD] for event in events if event["event"] in KINDS]
    return None


# The ways


def count_of(kind: str, *folders: Path) -> int:
    """The events of one kind in the histories of all runs in these folders."""
    return sum(
        event["event"] == kind
        for f in folders
        for events in histories(f).values()
        for event in events
    )


def unfinished(run: Whole, runs: Path) -> set[Path]:
    """The runs that have begun here and not ended, as they do where nobody disturbs them."""
    begun, ended = histories(runs), histories(run.left)
    return {
        p for p in begun.keys() & ended.keys() if has_ended(ended[p]) and not has_ended(begun[p])
    }


def histories(folder: Path) -> dict[Path, list[dict]]:
    """By run folder, relative to that folder, what happened."""
    runs = [path.parent for path in folder.rglob(run_folder.HISTORY)]
    return {run.relative_to(folder): run_folder.read_history(run) for run in runs}


def has_ended(events: list[dict]) -> bool:
    return any(event["event"] == "end" for event in events)


def every_cell_twice(run: Whole, runs: Path, share: float) -> bool:
    with Kernel(runs) as kernel:
        for cell in run.cells:
            kernel.run(cell)
            kernel.run(cell)
    return True


def interrupted(run: Whole, runs: Path, share: float) -> bool:
    """The stop button in the longest cell, then that cell again and the rest; False if the cell ended before.

    A cell that does not train ends by KeyboardInterrupt. The history of a training says that it was stopped or, if
    that was before the first step, does not say that it came to its end.
    """
    with Kernel(runs) as kernel:
        request = start(run, kernel, share)
        before = count_of("stop", runs, scratch_of(runs))
        kernel.manager.interrupt_kernel()
        reply = kernel.end(request)
        assert reply["status"] == "ok" or reply["ename"] == "KeyboardInterrupt", reply
        stopped = count_of("stop", runs, scratch_of(runs)) > before
        if reply["status"] == "ok" and not stopped and not unfinished(run, runs):
            return False
        for cell in run.cells[run.longest :]:
            kernel.run(cell)
    return True


def killed(run: Whole, runs: Path, share: float) -> bool:
    """The kernel dies in the longest cell, in a new one the notebook is run again; False if the cell had ended.

    Where the run has checkpoints before its end, the kernel dies after the first one, and the run goes on from there.
    """
    wanted = early_checkpoints(run.left) - checkpoints(run.found)
    with Kernel(runs) as kernel:
        request = start(run, kernel, share)
        while not (reply := kernel.end(request, timeout=0.05)):
            if not wanted or wanted & checkpoints(runs):
                break
        if reply:
            return False
        kernel.manager.provisioner.process.kill()
    with Kernel(runs) as kernel:
        for cell in run.cells:
            kernel.run(cell)
    assert not wanted or count_of("resume", runs)
    return True


def checkpoints(runs: Path) -> set[Path]:
    """Complete checkpoints, relative to that folder."""
    return {path.parent.relative_to(runs) for path in runs.rglob(checkpoint.MANIFEST)}


def early_checkpoints(runs: Path) -> set[Path]:
    """Those that a training writes as it goes: not its last one and not where it was stopped."""
    found = {path for path in checkpoints(runs) if not is_of_a_stop(runs / path)}
    return {path for path in found if any(is_later(other, path) for other in found)}


def is_later(other: Path, path: Path) -> bool:
    return other.parent == path.parent and checkpoint.step_of(other) > checkpoint.step_of(path)


def start(run: Whole, kernel: Kernel, share: float) -> str:
    """Run all cells before the longest one, and a share of that one."""
    for cell in run.cells[: run.longest]:
        kernel.run(cell)
    request = kernel.begin(run.cells[run.longest])
    time.sleep(run.seconds[run.longest] * share)
    return request


MODES = (every_cell_twice, interrupted, killed)
SHARES = (0.5, 0.25, 0.1)  # earlier where the cell was faster than in the undisturbed run


def go(mode: object, run: Whole, folder: Path) -> str:
    """One of the ways on a copy of what the notebook found, until it really was stopped; compare what is left."""
    for share in SHARES:
        runs = folder / f"{mode.__name__}-{share}"
        shutil.copytree(run.found, runs)
        if mode(run, runs, share):
            assert_same(run.left, runs)
            return f"{mode.__name__}: {count_of('resume', runs)} resumed"
    pytest.fail(f"{mode.__name__}: the cell had ended each time before it could be stopped")


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_notebook_in_four_ways(name, tmp_path, tmp_path_factory, wholes):
    begun = time.monotonic()
    run = whole(name, tmp_path_factory.mktemp("whole"), wholes)
    said = ", ".join(go(mode, run, tmp_path) for mode in MODES)
    print(
        f"{name}: 4 ways in {time.monotonic() - begun:.0f} s ({said}); stopped and killed in cell {run.longest + 1} of "
        f"{len(run.cells)} ({LONGEST[name]}), {run.seconds[run.longest]:.1f} s of {sum(run.seconds):.1f} s"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", [interrupted, killed])
def test_a_cell_that_ended_is_not_taken_for_a_stopped_one(mode, tmp_path):
    run = Whole(tmp_path, ["import time", "time.sleep(0.1)"], [0, 0.1], tmp_path, 1)
    assert not mode(run, tmp_path, share=30)
    run.cells[1], run.seconds[1] = "time.sleep(4)", 4
    assert mode(run, tmp_path, share=0.25)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_notebook_killed_in_its_longest_cell_leaves_the_same(tmp_path, wholes):
    """The short form; a training that is stopped and killed in a notebook is in test_faults."""
    go(killed, whole("02_lora_config", tmp_path, wholes), tmp_path)
