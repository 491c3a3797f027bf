"""A training in a thread: the same bits as in the foreground, held and steered between two steps, safe at the end."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from lora_nb import background, checkpoint, run_folder
from lora_nb.background import BackgroundTraining
from lora_nb.branching import replay
from lora_nb.errors import CheckpointError, DataError
from lora_nb.trainer import train
from lora_nb.widgets import BackgroundBoard, run_in_background

LONG = 60.0  # seconds that a loaded machine may take


def same(a, b):
    one, other = (checkpoint.latest(Path(folder)).tensors for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def events(folder, *kinds):
    return [(e["event"], e["step"]) for e in run_folder.read_history(folder) if e["event"] in kinds]


class Held(BackgroundTraining):
    """One that pauses itself after some steps, and a way to wait for a state."""

    def __init__(self, config, pauses=(), stops=()):
        self.pauses, self.stops, self.reached = set(pauses), set(stops), {}
        super().__init__(config, self._look, lambda state: self._event(state).set())

    def _event(self, state):
        return self.reached.setdefault(state, threading.Event())

    def _look(self, step):
        if step.step in self.pauses:
            self.pause()
        if step.step in self.stops:
            self.stop()

    def until(self, state):
        assert self._event(state).wait(LONG), self.state
        self.reached[state] = threading.Event()


def test_in_a_thread_the_weights_are_those_of_the_foreground(config, tmp_path):
    front = config.replace(output_dir=str(tmp_path / "front"))
    list(train(front))
    run = BackgroundTraining(config)
    assert run.state == background.READY
    run.start()
    assert run.join(LONG)
    assert run.state == background.FINISHED
    assert same(config.output_dir, front.output_dir)
    assert (Path(config.output_dir) / "pytorch_lora_weights.safetensors").is_file()


def test_pause_change_go_on_and_a_replay_of_it_is_equal(config, tmp_path):
    run = Held(config, pauses=[2])
    run.start()
    run.until(background.PAUSED)
    assert (
        checkpoint.latest(Path(config.output_dir)).step == 2
    )  # a pause may last until the session dies
    with pytest.raises(CheckpointError, match="paused already"):
        run.start()
    run.multiply_learning_rate(0.25)
    run.go_on()
    assert run.join(LONG)
    kinds = ("step", "pause", "go on", "change")
    assert events(config.output_dir, *kinds) == [
        ("step", 1), ("step", 2), ("pause", 2), ("go on", 2), ("change", 2), ("step", 3), ("step", 4)
    ]  # fmt: skip
    rates = [
        s["lr"]["unet"] for s in run_folder.read_history(config.output_dir) if s["event"] == "step"
    ]
    assert rates == [1e-2, 1e-2, 2.5e-3, 2.5e-3]
    assert [step.step for step in replay(config.output_dir, tmp_path / "again")] == [1, 2, 3, 4]
    assert same(config.output_dir, tmp_path / "again")


def test_stop_leaves_a_checkpoint_and_start_goes_on(config, tmp_path):
    run = Held(config.replace(overwrite=True), stops=[1], pauses=[3])
    run.start()
    assert run.join(LONG)
    assert run.state == background.STOPPED
    assert checkpoint.latest(Path(config.output_dir)).step == 1
    run.multiply_learning_rate(2.0)  # before the next start
    run.start()
    run.until(background.PAUSED)
    run.stop()  # out of a pause
    assert run.join(LONG)
    assert (run.state, run.training.done) == (background.STOPPED, 3)
    assert [s.step for s in train(config)] == [4]  # the same config, in the foreground
    assert events(config.output_dir, "step") == [("step", s) for s in (1, 2, 3, 4)]
    assert run_folder.changes(run_folder.read_history(config.output_dir)) == {1: 2.0}


def test_what_ends_the_thread_is_raised_by_join(config, tmp_path):
    run = BackgroundTraining(config.replace(train_data_dir=str(tmp_path / "nothing")))
    run.start()
    with pytest.raises(DataError, match="nothing"):
        run.join(LONG)
    assert run.state == background.FAILED


ENDING = """
import os, signal, sys, time
from lora_nb.background import BackgroundTraining
from lora_nb.config import TrainConfig
run = BackgroundTraining(TrainConfig.from_json(open(sys.argv[1]).read()))
run.start()
while not (run.training and run.training.done >= 2):
    time.sleep(0.01)
if sys.argv[2] == "terminated":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("ending", "code"), [pytest.param("restarted", 0, marks=pytest.mark.long), ("terminated", -15)]
)
def test_a_kernel_that_ends_leaves_a_checkpoint(config, tmp_path, ending, code):
    file = tmp_path / "config.json"
    file.write_text(config.replace(max_train_steps=10_000).to_json())
    done = subprocess.run([sys.executable, "-c", ENDING, file, ending], timeout=120, env=os.environ)
    assert done.returncode == code
    last = max(step for _, step in events(config.output_dir, "step"))
    assert checkpoint.latest(Path(config.output_dir)).step == last >= 2
    assert events(config.output_dir, "stop") == [("stop", last)]


# the buttons


def pressable(board):
    return [name for name, button in board.buttons.items() if not button.disabled]


def test_buttons_and_slider_do_what_they_say(config):
    board = BackgroundBoard(config.replace(max_train_steps=50))
    paused = threading.Event()
    entered = board._on_state
    board._on_state = lambda state: (entered(state), state == background.PAUSED and paused.set())
    assert pressable(board) == ["Start"]
    assert board.said.value == "= 0.01, from the next step on"
    board.rate.value = 0.5
    board.buttons["Start"].click()
    board.buttons["Pause"].click()
    assert paused.wait(LONG)
    assert pressable(board) == ["Go on", "Stop"]
    assert board.said.value == "= 0.005, from the next step on"
    assert "paused after step" in board.board.standing.note
    board.rate.value = 0.1
    board.buttons["Go on"].click()
    board.buttons["Stop"].click()
    assert board.join(LONG)
    assert pressable(board) == ["Start"]
    assert board.board.line().endswith("; press Start, or run the cell again, to go on")
    changes = run_folder.changes(run_folder.read_history(config.output_dir))
    assert list(changes.values())[:1] == [0.5]
    again = BackgroundBoard(board.config)
    again.start()
    assert again.join(LONG)
    assert pressable(again) == []
    rates = again.training.rates
    assert again.rate.value == rates.in_force(again.training.done)  # the slider stands where it is
    assert run_folder.changes(run_folder.read_history(config.output_dir)) == rates.changes


CELLS = (
    "from lora_nb import run_in_background\nfrom lora_nb.config import TrainConfig\n"
    "run = run_in_background(TrainConfig.from_json({config!r}))",
    "run.start(); run.join(60);",
    "assert run_in_background(run.config) is not run  # it has ended",
)


@pytest.mark.long
def test_in_a_notebook_the_cell_ends_at_once_and_its_board_moves_on(config, monkeypatch):
    for name in ("CI", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_NB_HEADLESS", "0")
    cells = [nbformat.v4.new_code_cell(cell.format(config=config.to_json())) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    buttons, head, figure = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in buttons.data
    assert "step 4 of 4" in head.data["text/html"]  # drawn by the thread, cells later
    assert len(figure.data["image/png"]) > 1000
    assert notebook.cells[1].outputs == []
    again = notebook.cells[2].outputs[1]
    assert "step 4 of 4" in again.data["text/html"]


def test_where_threads_cannot_be_watched_it_says_so_and_trains_at_once(config, capsys):
    run = run_in_background(config)
    said = capsys.readouterr().out
    assert said.startswith("Training in the foreground: nobody looks on here.\n")
    assert "step 4/4" in said
    assert run.state == background.FINISHED
    assert run.training.done == 4
