"""Training with several processes from a notebook: a script for `accelerate launch`, and its run followed by its files.

The notebook's own process touches no GPU, so nothing is forked from it, and the training outlives the notebook.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from lora_nb import env, run_folder, stopping
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.files import write_atomically
from lora_nb.trainer import Step

SCRIPT, LOG, PROCESS = "launch.sh", "launch.log", "launch.json"
_PAUSE = 0.2  # seconds between two looks at the files


class Launch:
    """A training in `processes` processes of their own; iterate over it as over a Training.

    Writes config.json and launch.sh into the run's folder. Each iteration starts the script, or joins the one that is
    running still, and yields the steps that appear in history.jsonl. The interrupt button lets all processes finish
    their step and leave a checkpoint; `interrupted` tells so, and the same loop goes on from there. Samples and the
    report are made by the first process. `overwrite` deletes an old run once, here, not at each iteration. Raises
    ConfigError for a config that cannot be trained or fewer than one process, CheckpointError if an old run to be
    deleted is still going, or if the processes end on their own before the last step.
    """

    def __init__(self, config: TrainConfig, processes: int):
        if processes < 1:
            raise ConfigError(f"processes is {processes}; it must be at least 1, one for each GPU.")
        config.validate()
        folder = Path(config.output_dir).resolve()
        self.config, self.processes = config.replace(output_dir=str(folder)), processes
        self.folder, self.script, self.interrupted = folder, folder / SCRIPT, False
        env.bring_back(folder)
        if config.overwrite:
            self._delete_old_run()
        run_folder.save_config(self.config)
        write_atomically(self.script, self._text())

    @property
    def command(self) -> list[str]:
        """The words of the command that the script runs."""
        several = (
            ["--multi_gpu"] if self.processes > 1 else []
        )  # without GPUs too: it connects them
        return [
            *(sys.executable, "-m", "accelerate.commands.launch", *several),
            *(f"--num_processes={self.processes}", "--num_machines=1", "--dynamo_backend=no"),
            *("--main_process_port=0", f"--mixed_precision={self.config.mixed_precision or 'no'}"),
            *("-m", "lora_nb", "train", f"--config={self.folder / run_folder.CONFIG}"),
        ]

    def __iter__(self) -> Iterator[Step]:
        tail = run_folder.HistoryTail(self.folder)
        seen, self.interrupted = self._last_step(tail.read()), False
        process = self._running() or self._start()
        with stopping.signals(lambda: self.interrupted, lambda number: self._ask(process)):
            try:
                alive = True
                while alive:  # one more look at the files after the end
                    alive = _alive(process)
                    for step in _steps(tail.read(), seen):
                        seen = step.step
                        yield step
                    time.sleep(_PAUSE if alive else 0)
            finally:
                if _alive(process) and not self.interrupted:  # the loop was left
                    self._ask(process)
                code = process.wait()
        if code and not self.interrupted:
            raise self._failure()

    def _text(self) -> str:
        """The script: the same command works in a terminal, and again goes on."""
        lines = " \\\n  ".join(shlex.quote(word) for word in self.command)
        return f"#!/usr/bin/env bash\ncd {shlex.quote(os.getcwd())}\nexec {lines}\n"

    def _delete_old_run(self) -> None:
        if running := self._running():
            raise CheckpointError(
                f"Process {running.pid} still trains in {self.folder}, so its run was not overwritten; stop it first, "
                "or leave out overwrite to join it."
            )
        run_folder.delete(self.folder)
        self.config = self.config.replace(overwrite=False)

    def _start(self) -> psutil.Process:
        with open(self.folder / LOG, "w", encoding="utf-8") as log:
            process = psutil.Popen(
                ["bash", str(self.script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        mark = {"pid": process.pid, "started": process.create_time()}
        write_atomically(self.folder / PROCESS, json.dumps(mark))
        return process

    def _running(self) -> psutil.Process | None:
        """The processes that an earlier loop, perhaps of a notebook that is gone, has started."""
        try:
            mark = json.loads((self.folder / PROCESS).read_text(encoding="utf-8"))
            process = psutil.Process(mark["pid"])
            same = math.isclose(process.create_time(), mark["started"], abs_tol=0.1)
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        return process if same and _alive(process) else None

    def _ask(self, process: psutil.Process) -> None:
        """Ask all processes to stop; they agree on the step after which they do."""
        self.interrupted = True
        with contextlib.suppress(ProcessLookupError):  # they have ended meanwhile
            os.killpg(process.pid, signal.SIGTERM)

    def _last_step(self, events: list[dict]) -> int:
        return max((event["step"] for event in events if event["event"] == "step"), default=0)

    def _failure(self) -> CheckpointError:
        said = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        ours = [line for line in said if line.startswith("error: ")]
        others = [line for line in said if "Error: " in line]
        return CheckpointError(
            "The processes ended before the last step "
            f"({(ours or others or said or ['nothing was said'])[-1].strip()}); "
            f"{self.folder / LOG} has all that they said, and the same loop goes on from the last checkpoint."
        )


def _steps(events: list[dict], seen: int) -> Iterator[Step]:
    """The steps behind `seen`, without what was measured after them."""
    names = set(Step.__dataclass_fields__) - {"health", "probe"}
    for event in events:
        if event["event"] == "step" and event["step"] > seen:
            yield Step(**{name: event[name] for name in names})


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False
