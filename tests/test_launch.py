"""Several processes from a notebook: the same training, stopped, gone on with, joined after the notebook died."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lora_nb import read_history, save_config, train
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.launch import LOG, PROCESS, SCRIPT, Launch

NOTEBOOK = """
import sys
from lora_nb import read_config
from lora_nb.launch import Launch
for step in Launch(read_config(sys.argv[1]), 2):
    print(step.step, flush=True)
"""


@pytest.mark.long
def test_two_processes_outlive_the_notebook_stop_and_go_on(config, tmp_path):
    """The losses are those of one process with batches twice as large."""
    steps = 2000
    run = config.replace(max_train_steps=steps, checkpointing_steps=1000)
    folder = save_config(run).parent
    notebook = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert notebook.stdout.readline() == "1\n"
    notebook.send_signal(signal.SIGKILL)
    notebook.communicate()

    launch = Launch(run, 2)
    seen = []
    for step in launch:
        seen.append(step.step)
        if len(seen) == 3:
            break
    assert launch.interrupted
    done = [e["step"] for e in read_history(folder) if e["event"] == "step"][-1]
    assert seen[0] > 1
    assert seen[-1] <= done < steps
    assert [e["event"] for e in read_history(folder) if e["event"] in ("start", "stop")] == [
        "start",
        "stop",
    ]
    assert (folder / f"checkpoint-{done}" / "MANIFEST.json").is_file()

    end = done + 2
    again = Launch(run.replace(max_train_steps=end), 2)
    assert [step.step for step in again] == [done + 1, end]
    assert not again.interrupted
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    together = [e["loss"] for e in read_history(folder) if e["event"] == "step"][:8]
    alone = config.replace(
        output_dir=str(tmp_path / "alone"), max_train_steps=len(together), train_batch_size=4
    )
    assert [step.loss for step in train(alone)] == pytest.approx(together, rel=1e-4)


@pytest.mark.slow
def test_an_old_run_is_overwritten_once_and_its_steps_are_not_taken_for_new_ones(config):
    run = config.replace(max_train_steps=3, seed=1)
    assert len(list(Launch(run, 1))) == 3
    launch = Launch(run.replace(max_train_steps=2, learning_rate=2e-3, overwrite=True), 1)
    assert [step.step for step in launch] == [1, 2]
    assert list(launch) == []  # the second time it goes on, and nothing is left to do
    saved = {path.name for path in launch.folder.glob("checkpoint-*")}
    assert saved == {"checkpoint-2"}


@pytest.mark.slow
def test_what_the_processes_said_is_not_lost(config):
    launch = Launch(config.replace(train_data_dir="/nowhere"), 1)
    with pytest.raises(CheckpointError, match=r"error: .*/nowhere.*launch\.log"):
        list(launch)
    assert "/nowhere" in (launch.folder / LOG).read_text()


def test_the_script_is_a_command_for_a_terminal(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config.replace(output_dir="a run", mixed_precision="bf16")
    text = (Launch(run, 2).folder / SCRIPT).read_text()
    assert text.startswith(f"#!/usr/bin/env bash\ncd {tmp_path}\nexec {sys.executable} ")
    assert "--multi_gpu" in text
    assert "--mixed_precision=bf16" in text
    assert f"'--config={Path('a run').resolve() / 'config.json'}'" in text
    assert "--multi_gpu" not in (Launch(run, 1).folder / SCRIPT).read_text()
    assert subprocess.run(["bash", "-n", str(tmp_path / "a run" / SCRIPT)]).returncode == 0


def test_a_launch_does_not_overwrite_a_run_that_goes_on(config):
    launch = Launch(config, 1)
    sleeper = psutil.Popen(["sleep", "60"])
    try:
        mark = {"pid": sleeper.pid, "started": sleeper.create_time()}
        (launch.folder / PROCESS).write_text(json.dumps(mark))
        with pytest.raises(CheckpointError, match=f"Process {sleeper.pid} still trains"):
            Launch(config.replace(overwrite=True), 1)
        assert (launch.folder / "config.json").is_file()
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_launch_refuses_what_cannot_run(config):
    with pytest.raises(ConfigError, match="one for each GPU"):
        Launch(config, 0)
