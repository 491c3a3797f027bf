"""Every notebook in the ways people use one: cells run twice, stopped in the longest one, its kernel killed there.

Running it from top to bottom is in test_notebooks. What a run leaves must not depend on the way it came about.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client import KernelManager
from safetensors.torch import load_file
from test_notebooks import NEEDS, NOTEBOOKS

from lora_nb import run_folder

PATIENCE = 1800  # seconds for one cell on a machine that has other work
BY_NAME = {path.stem: path for path in NOTEBOOKS}


class Kernel:
    """A kernel in the folder of the notebooks that keeps its runs in a folder of ours; use as a context manager."""

    def __init__(self, runs: Path):
        self.runs = runs

    def __enter__(self) -> "Kernel":
        own = {"LORA_NB_RUNS": str(self.runs), "OMP_NUM_THREADS": "1"}
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=BY_NAME["00_setup"].parent, env=os.environ | own)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        return self

    def __exit__(self, *failure: object) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def begin(self, source: str) -> str:
        """Send a cell to the kernel; the number of the request."""
        return self.client.execute(source, stop_on_error=False)

    def end(self, request: str, timeout: float = PATIENCE) -> dict:
        """Wait for the reply; raises queue.Empty if it does not come in time."""
        last = time.monotonic() + timeout
        while True:
            reply = self.client.get_shell_msg(timeout=max(0.0, last - time.monotonic()))
            if reply["parent_header"].get("msg_id") == request:
                return reply["content"]

    def run(self, source: str) -> float:
        """Run a cell, which must not fail; the seconds it took."""
        begun = time.monotonic()
        reply = self.end(self.begin(source))
        assert reply["status"] == "ok", (source, reply["ename"], reply["evalue"])
        return time.monotonic() - begun


@dataclass
class Whole:
    """An undisturbed run: the runs it found, the seconds of each of its cells, the runs it left."""

    found: Path
    cells: list[str]
    seconds: list[float]
    left: Path

    @property
    def longest(self) -> int:
        return self.seconds.index(max(self.seconds))


def sources(name: str) -> list[str]:
    notebook = nbformat.read(BY_NAME[name], as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def run_all(name: str, runs: Path) -> list[float]:
    with Kernel(runs) as kernel:
        return [kernel.run(cell) for cell in sources(name)]


def whole(name: str, folder: Path) -> Whole:
    """Run what the notebook needs, keep a copy of that, and run the notebook itself."""
    found, left = folder / "found", folder / "left"
    found.mkdir()
    needed = [name]
    while needed[0] in NEEDS:
        needed.insert(0, NEEDS[needed[0]])
    for before in needed[:-1]:
        run_all(before, found)
    shutil.copytree(found, left)
    return Whole(found, sources(name), run_all(name, left), left)


def start(run: Whole, runs: Path, kernel: Kernel) -> str:
    """Run all cells before the longest one, and that one half way."""
    for cell in run.cells[: run.longest]:
        kernel.run(cell)
    request = kernel.begin(run.cells[run.longest])
    time.sleep(run.seconds[run.longest] / 2)
    return request


def assert_same(left: Path, other: Path) -> None:
    """The same files; adapters with the same numbers; histories with the same steps and losses, none twice."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in (left, other)]  # fmt: skip
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith("pytorch_lora_weights.safetensors"):
            a, b = load_file(left / name), load_file(other / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), name
        if name.endswith("history.jsonl"):
            assert losses((left / name).parent) == losses((other / name).parent), name


def losses(folder: Path) -> list[tuple[int, float]]:
    events = run_folder.read_history(folder)
    return [(event["step"], event["loss"]) for event in events if event["event"] == "step"]


def every_cell_twice(run: Whole, runs: Path) -> None:
    with Kernel(runs) as kernel:
        for cell in run.cells:
            kernel.run(cell)
            kernel.run(cell)


def interrupted(run: Whole, runs: Path) -> None:
    """The stop button in the longest cell, then that cell again and the rest."""
    with Kernel(runs) as kernel:
        request = start(run, runs, kernel)
        kernel.manager.interrupt_kernel()
        reply = kernel.end(request)
        assert reply["status"] == "ok" or reply["ename"] == "KeyboardInterrupt", reply
        for cell in run.cells[run.longest :]:
            kernel.run(cell)


def killed(run: Whole, runs: Path) -> None:
    """The kernel dies in the longest cell; in a new one the notebook is run from the top."""
    with Kernel(runs) as kernel:
        start(run, runs, kernel)
        kernel.manager.provisioner.process.kill()
    with Kernel(runs) as kernel:
        for cell in run.cells:
            kernel.run(cell)


MODES = (every_cell_twice, interrupted, killed)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_notebook_in_four_ways(name, tmp_path):
    run = whole(name, tmp_path)
    for mode in MODES:
        runs = tmp_path / mode.__name__
        shutil.copytree(run.found, runs)
        mode(run, runs)
        assert_same(run.left, runs)
    place, seconds = run.longest + 1, max(run.seconds)
    print(
        f"{name}: 4 ways; stopped and killed in cell {place} of {len(run.cells)}, {seconds:.1f} s"
    )


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_notebook_killed_in_its_longest_cell_leaves_the_same(tmp_path):
    """The short form; a training that is stopped and killed in a notebook is in test_faults."""
    run = whole("02_lora_config", tmp_path)
    killed(run, tmp_path / "killed")
    assert_same(run.left, tmp_path / "killed")
