"""The live board: what it says and draws is what the run's files say, also after a kill or a change of the rate."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_nb import adapters, health, run_folder
from lora_nb.board_figure import board_figure
from lora_nb.branching import fork
from lora_nb.config import LoraSpec
from lora_nb.run_folder import HistoryTail
from lora_nb.trainer import train
from lora_nb.widgets import LiveBoard
from lora_nb.widgets.standing import Standing

PARTS = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2, learning_rate=1e-3)}


@pytest.fixture
def done(config):
    """A finished run of both parts with probes."""
    config = config.replace(lora=PARTS, probe_steps=2, max_train_steps=6)
    list(train(config))
    return Path(config.output_dir)


def texts(figure):
    return [t.get_text() for axes in figure.axes for t in (axes.title, *axes.texts)]


def test_the_figure_shows_every_part_and_block(done):
    events = run_folder.read_history(done)
    loss, probe, rate, gradient, blocks = LiveBoard(done).figure().axes
    steps = [e for e in events if e["event"] == "step"]
    assert list(loss.lines[0].get_ydata()) == [s["loss"] for s in steps]
    assert probe.containers[0].lines[0].get_xdata().tolist() == [0, 2, 4, 6]
    assert {line.get_label() for line in rate.lines} == set(PARTS)
    drawn = {line.get_label(): list(line.get_xdata()) for line in gradient.lines}
    assert drawn["text_encoder"] == [1, 2, 3, 4, 5, 6]
    change = steps[-1]["health"]["change"]
    heights = sorted(bar.get_height() for bar in blocks.patches)
    assert heights == pytest.approx(
        sorted(100 * v for part in change.values() for v in part.values())
    )
    assert blocks.get_title(loc="left") == "Change per block (step 6)"


def test_change_per_block_is_that_of_the_matrices(config):
    training = train(config.replace(lora=PARTS))
    list(training)
    measured = training.monitor.health().change
    sums = {}
    for part, name, change, weight in adapters.strength(training.family):
        squares = sums.setdefault((part, health.block_of(name)), [0.0, 0.0])
        squares[0] += change**2
        squares[1] += weight**2
    expected = {key: (a / b) ** 0.5 for key, (a, b) in sums.items()}
    got = {(part, block): v for part, blocks in measured.items() for block, v in blocks.items()}
    assert got == pytest.approx(expected, rel=1e-4)
    assert len(got) > 4


def test_the_head_names_the_numbers_and_escapes_them(done):
    standing = Standing(done).read()
    page = standing.html(closed=True)
    probe = standing.probes[-1]
    assert 'aria-valuenow="6" aria-valuemin="0" aria-valuemax="6"' in page
    assert f"{abs(probe['difference']):.4f} ± {2 * probe['standard_error']:.4f}" in page
    assert "0.01 / 0.001" in page
    assert "unet / text_encoder" in page
    memory = float(re.search(r">(\d+\.\d) GB<", page).group(1))
    assert memory == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.3)
    standing.note = "<b>"
    assert "<b>" not in standing.html(closed=False).replace("<b>step 6 of 6</b>", "")


def test_resumes_forks_and_changes_are_marked(config, tmp_path):
    config = config.replace(checkpointing_steps=1)
    for step in train(config):
        if step.step == 2:
            break
    branch = fork(config.output_dir, tmp_path / "branch", rank=3)
    branch.rates.multiply(0.5)
    next(iter(branch))
    list(train(branch.config))
    marks = [t for t in texts(LiveBoard(branch.folder).figure()) if t.strip()]
    assert [t for t in marks if t[1:6] in ("forke", "rate ", "resum")] == [
        " forked",
        " rate x 0.5",
        " resumed",
    ]


def probe_line(step, losses):
    draws = [(10 * i, loss, 0.5) for i, loss in enumerate(losses)]
    return {"event": "probe", "step": step, "difference": sum(losses) / 4 - 0.5,
            "standard_error": 0.1, "by_timestep": draws}  # fmt: skip


def test_alarms_are_on_the_board(tmp_path, monkeypatch):
    step = {
        "event": "step",
        "loss": 0.1,
        "lr": {"unet": 1e-3},
        "grad_norms": {"unet": 1.0},
        "seconds": 1.0,
    }
    for line in (
        {"event": "start", "step": 0, "max_train_steps": 600},
        step | {"step": 1},
        probe_line(10, [0.3, 0.4, 0.2, 0.3]),
        step | {"step": 20},
        {"event": "alarm", "step": 20, "message": "B is <zero>"},
        probe_line(20, [0.35, 0.46, 0.25, 0.34]),
    ):
        run_folder.append(tmp_path, line)
    standing = Standing(tmp_path).read()
    alarm, turned = standing.warnings()
    assert alarm == "B is <zero>"
    assert turned.startswith("Overfitting: held-out loss is +0.0500 from its best, after step 10 (")
    assert standing.best == 10
    assert "B is &lt;zero&gt;" in standing.html(closed=True)
    # a session that ends before the training does
    monkeypatch.setenv("LORA_NB_SESSION_HOURS", "0.0001")
    standing._began = time.monotonic() - 60, 0
    assert standing.warnings()[2].startswith("This session ends in 0:00 at the latest, before the")
    assert len(standing.warnings(closed=True)) == 2


def test_the_tail_of_a_history_reads_each_line_once_and_follows_a_rewind(tmp_path):
    tail = HistoryTail(tmp_path)
    assert tail.read() == []
    run_folder.append(tmp_path, {"event": "step", "step": 1})
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"event": "step", "st')
        file.flush()
        assert [e["step"] for e in tail.read()] == [1]
        file.write('ep": 2}\n')
    first = tail.read()
    assert [e["step"] for e in first] == [1, 2]
    assert tail.read()[0] is first[0]  # not parsed again
    run_folder.rewind(tmp_path, 1)
    run_folder.append(tmp_path, {"event": "step", "step": 2, "again": True})
    assert tail.read()[1] == {"event": "step", "step": 2, "again": True}


def test_drawing_takes_at_most_a_tenth_of_the_time(done, monkeypatch):
    monkeypatch.setenv("LORA_NB_HEADLESS", "0")
    board, drawn = LiveBoard(done, every=0), []
    board._plain = False

    def slow(sharpness):
        drawn.append(time.monotonic())
        time.sleep(0.05)

    monkeypatch.setattr(board, "_show_head", lambda: None)
    monkeypatch.setattr(board, "_show_figure", slow)
    began = time.monotonic()
    while time.monotonic() - began < 1.2:
        board.update()
    assert 2 <= len(drawn) <= 3
    assert all(b - a >= 0.5 for a, b in itertools.pairwise(drawn))


def test_a_figure_without_a_curve_is_replaced_at_the_next_look(done, tmp_path, monkeypatch):
    for event in run_folder.read_history(done):
        if event["event"] != "step" or event["step"] == 1:
            run_folder.append(tmp_path, event)
    for folder, draws in ((done, 1), (tmp_path, 2)):
        board, drawn = LiveBoard(folder, every=0), []
        board._plain = False
        monkeypatch.setattr(board, "_show_head", lambda: None)
        monkeypatch.setattr(board, "_show_figure", lambda _, d=drawn: d.append(time.sleep(0.05)))
        board.update()
        board.update()
        assert len(drawn) == draws


KILLED = """
import os, sys
from lora_nb import LiveBoard, train
from lora_nb.config import TrainConfig
training = train(TrainConfig.from_json(open(sys.argv[1]).read()))
with LiveBoard(training) as board:
    for step in training:
        board.update(step)
        if step.step == 5:
            os.kill(os.getpid(), 9)
"""


def test_after_a_kill_the_same_cell_goes_on_and_the_curve_is_whole(config, tmp_path, capsys):
    config = config.replace(max_train_steps=8, checkpointing_steps=2)
    whole = config.replace(output_dir=str(tmp_path / "whole"))
    expected = [step.loss for step in train(whole)]
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    killed = subprocess.run([sys.executable, "-c", KILLED, file], capture_output=True, timeout=120)
    assert killed.returncode == -9
    assert "step 1/8" in killed.stdout.decode()
    training = train(config)
    with LiveBoard(training) as board:
        for step in training:
            board.update(step)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/8 [")  # step 5 was lost with the process, and is done again
    assert last.startswith("step 8/8 [")
    steps = [e["step"] for e in run_folder.read_history(training.folder) if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    curve = board.figure().axes[0].lines[0]
    assert list(curve.get_xdata()) == steps
    assert list(curve.get_ydata()) == expected


def test_a_board_follows_the_run_of_another_process_by_its_files(done, capsys):
    looks = iter([True, True, False])
    LiveBoard(done, every=0).watch(lambda: next(looks))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 6/6 [")
    assert lines[-1].endswith("finished")


def test_a_figure_before_the_second_step_says_so(config):
    next(iter(train(config)))
    one, later = LiveBoard(config.output_dir).figure(), "after two steps"
    said = [t for t in texts(board_figure([])) if "yet" in t or t == later]
    assert said == [later, "no probe yet", later, later, "not measured yet"]
    assert texts(one).count(later) == 3
    assert "not measured yet" not in texts(one)
