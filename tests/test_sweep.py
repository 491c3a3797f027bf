"""Sweeps measure each cell once, go on where they were killed, and share without changing a result."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_nb import early_stopping, plots, sweep
from lora_nb.config import LoraSpec
from lora_nb.early_stopping import early_stop, verdict
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.formats import FILE_NAME
from lora_nb.inference import draw_samples
from lora_nb.judge import load_judge
from lora_nb.metrics import concept_score, style_score
from lora_nb.run_folder import read_history
from lora_nb.sweep import Cell, Sweep, rank_and_rate, read_sweep, run_sweep
from lora_nb.trainer import train


@pytest.fixture
def config(config, tmp_path):
    return config.replace(
        output_dir=str(tmp_path / "sweep"),
        max_train_steps=3,
        validation_prompts=("colour 1", "colour 5"),
        num_validation_images=1,
        num_inference_steps=2,
        guidance_scale=2.0,
    )


def weights(folder):
    return load_file(Path(folder) / FILE_NAME)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_cell_equals_the_same_config_trained_alone(config, tmp_path):
    """After other cells on the same model, also one with a text encoder: bit for bit."""
    both = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=4)}
    variants = {"both": {"lora": both}} | rank_and_rate(config, [1, 4], [1e-2])
    cells = {cell.name: cell for cell in run_sweep(config, variants)}
    assert list(cells) == ["base", "both", "rank-1-lr-0.01", "rank-4-lr-0.01"]
    for name, lora in (("rank-4-lr-0.01", {"unet": LoraSpec(rank=4)}), ("both", both)):
        alone = train(config.replace(lora=lora, output_dir=str(tmp_path / "alone"), overwrite=True))
        for _ in alone:
            pass
        cell = cells[name]
        assert same(weights(alone.folder), weights(tmp_path / "sweep" / name))
        assert cell.difference == alone.last_probe.difference
        assert cell.standard_error == alone.last_probe.standard_error
        assert cell.parameters == alone.parameters
        drawn = draw_samples(alone, "step-000003", 3)
        for ours, file in zip(cell.pictures, drawn, strict=True):
            assert (tmp_path / "sweep" / ours).read_bytes() == file.read_bytes()
    assert cells["both"].parts == ("unet", "text_encoder")
    file = tmp_path / "sweep" / "rank-4-lr-0.01" / FILE_NAME
    assert cells["rank-4-lr-0.01"].bytes == file.stat().st_size


KILLED = """
import sys
from lora_nb.config import TrainConfig
from lora_nb.sweep import rank_and_rate, run_sweep
config = TrainConfig.from_json(sys.argv[1])
for cell in run_sweep(config, rank_and_rate(config, [1, 2], [1e-3, 1e-2])):
    print(cell.name, flush=True)
"""


def measured(cells):
    """Cells without what the clock said."""
    return [dataclasses.replace(cell, seconds=0.0) for cell in cells]


def times(folder):
    return {file.parent.name: file.stat().st_mtime_ns for file in Path(folder).glob("*/cell.json")}


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_missing_cells(config, tmp_path):
    command = [sys.executable, "-c", KILLED, config.to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for name in ("base", "rank-1-lr-0.001", "rank-1-lr-0.01"):
            assert process.stdout.readline() == f"{name}\n"
        process.kill()  # in the third run
    before = times(config.output_dir)
    variants = rank_and_rate(config, [1, 2], [1e-3, 1e-2])
    cells = list(run_sweep(config, variants))
    assert len(before) >= 3
    assert before.items() <= times(config.output_dir).items()
    whole = list(run_sweep(config.replace(output_dir=str(tmp_path / "whole")), variants))
    assert measured(cells) == measured(whole)
    found = read_sweep(config.output_dir)
    assert (found.base, *found.cells) == tuple(cells)
    assert found.table().count("\n") == 4


def test_an_interrupted_sweep_goes_on_in_the_middle_of_a_cell(config):
    config = config.replace(validation_prompts=(), max_train_steps=60)
    variants = rank_and_rate(config, [1, 2], [1e-3])
    history = Path(config.output_dir) / "rank-1-lr-0.001" / "history.jsonl"

    def interrupt():
        while not (history.is_file() and '"step", "step": 3' in history.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # the stop button

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.warns(UserWarning, match="The sweep stopped in rank-1-lr-0.001; the same call"):
        cells = list(run_sweep(config, variants))
    thread.join()
    assert [cell.name for cell in cells] == ["base"]
    cells = list(run_sweep(config, variants))
    assert [cell.name for cell in cells] == ["base", *variants]
    events = [line["event"] for line in read_history(history.parent)]
    assert "resume" in events
    assert events.count("step") == 60


def test_only_what_has_changed_is_measured_again(config):
    config = config.replace(validation_prompts=())
    first = list(run_sweep(config, rank_and_rate(config, [1, 2], [1e-2])))
    written = times(config.output_dir)
    again = list(run_sweep(config, rank_and_rate(config, [1, 2], [1e-2])))
    assert again == first
    assert times(config.output_dir) == written
    (Path(config.output_dir) / "rank-1-lr-0.01" / "cell.json").unlink()
    variants = rank_and_rate(config, [1, 2], [1e-2])
    variants["rank-2-lr-0.01"]["max_train_steps"] = 2
    changed = list(run_sweep(config, variants))
    assert measured(changed)[:2] == measured(first)[:2]  # the same once more
    assert changed[2].difference != first[2].difference
    assert times(config.output_dir)["base"] == written["base"]
    assert not list(Path(config.output_dir).rglob("checkpoint-*"))


def test_a_run_that_breaks_is_a_cell_too(config):
    config = config.replace(validation_prompts=())
    variants = rank_and_rate(config, [1], [1e-2, 1e30])
    _, whole, broken = run_sweep(config, variants)
    assert broken.difference is None
    assert "finite" in broken.fault or "nan" in broken.fault
    assert "broke: " in str(broken)
    found = read_sweep(config.output_dir)
    assert found["rank-1-lr-1e+30"] == broken
    assert found.best() == whole
    with pytest.raises(ConfigError, match="No run of this sweep came to its end"):
        dataclasses.replace(found, cells=(broken,)).best()
    assert list(run_sweep(config, variants))[2] == broken  # read back
    assert "broke" in {text.get_text() for text in plots.rank_rate_map(found).axes[0].texts}


def test_what_a_sweep_refuses(config, tmp_path):
    for changes, said in (
        ({"seed": 4}, "seed of 'a' cannot vary"),
        ({"num_inference_steps": 3}, "num_inference_steps of 'a' cannot vary"),
    ):
        with pytest.raises(ConfigError, match=said):
            next(run_sweep(config, {"a": changes}))
    for name in ("base", "a/b", ".."):
        with pytest.raises(ConfigError, match="cannot be called"):
            next(run_sweep(config, {name: {"learning_rate": 1e-3}}))
    alone = config.replace(train_data_dir=str(tmp_path / "alone"))
    (tmp_path / "alone").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "alone" / "a.png")
    with pytest.raises(ConfigError, match="held-out"):
        next(run_sweep(alone, {}))
    with pytest.raises(CheckpointError, match="There is no sweep"):
        read_sweep(tmp_path)
    assert not (tmp_path / "sweep").exists()


def cell(rank, rate, difference=0.0):
    return Cell(f"{rank}-{rate}", ("unet",), rank, rank, rate, difference, 0.01)


def test_nearest_is_by_ratio_and_best_by_loss():
    found = Sweep(Path(), Cell("base"), (cell(1, 1e-3), cell(64, 1e-3, -0.2), cell(4, 1e-1)))
    assert found.nearest(9, 1e-3) == found.cells[1]
    assert found.nearest(7, 1e-3) == found.cells[0]
    assert found.nearest(64, 2e-2) == found.cells[1]
    assert found.nearest(2, 2e-2) == found.cells[2]
    assert found.best() == found["64-0.001"]
    with pytest.raises(ConfigError, match=r"no cell '9'; it has base, 1-0\.001"):
        found["9"]


def test_two_cells_are_compared_draw_by_draw(config):
    config = config.replace(validation_prompts=())
    _, slow, fast = run_sweep(config, rank_and_rate(config, [2], [1e-3, 1e-2]))
    found = read_sweep(config.output_dir)
    paired = found.between(slow, fast)
    assert paired.mean == pytest.approx(fast.difference - slow.difference, abs=1e-6)
    draws = [
        sorted(
            (t, base, loss)
            for t, loss, base in sweep.last_probe(found.folder / c.name)["by_timestep"]
        )
        for c in (slow, fast)
    ]
    values = torch.tensor([b[2] - a[2] for a, b in zip(*draws, strict=True)], dtype=torch.float64)
    assert paired.standard_error == pytest.approx((values.std() / len(values) ** 0.5).item())


def test_the_judge_scores_what_it_was_taught(config, monkeypatch):
    """On prompts whose style and things it knows, by the pictures' own prompts; else there is no score."""
    config = config.replace(
        validation_prompts=("red apple, ink style", "cat face, ink style"), num_validation_images=2
    )
    judge = load_judge()
    base, one = run_sweep(config, rank_and_rate(config, [1], [1e-2]), judge)
    images = [Image.open(file) for file in read_sweep(config.output_dir).files(one)]
    names = ["red apple"] * 2 + ["cat face"] * 2
    assert one.concept == concept_score(images, names, judge)
    assert one.style == style_score(images, "ink", judge)
    assert base.style.count == 4
    assert read_sweep(config.output_dir)["rank-1-lr-0.01"] == one  # scores survive JSON
    other = config.replace(validation_prompts=("colour 1",), output_dir=config.output_dir + "-2")
    assert next(run_sweep(other, {}, judge)).style is None


def test_the_map_says_what_the_cells_say(config):
    found = Sweep(
        Path(),
        Cell("base"),
        (cell(1, 1e-3, -0.1), cell(1, 1e-2, 0.3), cell(8, 1e-3, -0.2), cell(8, 1e-2, -0.05)),
    )
    axes = plots.rank_rate_map(found).axes[0]
    minus = plots.MINUS
    assert [text.get_text().split("\n")[0] for text in axes.texts] == [
        f"{minus}0.100", "+0.300", f"{minus}0.200", f"{minus}0.050",
    ]  # fmt: skip
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "8"]
    assert len(axes.lines) == 1  # the outline of the best


# early stopping


def history(*differences):
    """Probes of two pictures whose losses differ by 0.02."""
    return [
        {
            "event": "probe",
            "step": step,
            "difference": d,
            "by_timestep": [(1, 1 + d - 0.01, 1.0), (2, 1 + d + 0.01, 1.0)],
        }
        for step, d in enumerate(differences)
    ]


def test_the_verdict_is_on_the_best_and_the_last_probe():
    assert verdict([{"event": "step", "step": 1}]) is None
    so_far = verdict(history(0.0, -0.3, -0.1, -0.2))
    assert (so_far.best, so_far.since, so_far.overfits) == (1, 2, True)
    assert so_far.behind.mean == pytest.approx(0.1)
    assert not verdict(history(0.0, -0.3)).since
    assert not verdict(history(0.0, -0.3)).overfits
    noisy = history(0.0, -0.3, -0.29)
    noisy[2]["by_timestep"] = [(1, 0.5, 1.0), (2, 0.92, 1.0)]
    assert not verdict(noisy).overfits  # 0.01 worse, and the pictures do not agree
    twice = [*history(0.0, -0.3, 0.5), *history(0.0, -0.3, -0.4)[2:]]
    assert verdict(twice).best == 2  # a step that was done again counts once


def test_training_ends_early_with_the_best_adapter_kept(config, tmp_path):
    many = tmp_path / "held out"  # so that the standard error is small
    many.mkdir()
    for i in range(16):
        Image.new("RGB", (24, 24), (10 * i, 90, 200)).save(many / f"{i}.png")
        (many / f"{i}.txt").write_text(f"colour {i}")
    config = config.replace(validation_data_dir=str(many), output_dir=str(tmp_path / "run"))
    config = config.replace(max_train_steps=30, probe_steps=1, learning_rate=2e-3)
    training = train(config)

    def spoiled():
        for step in early_stop(training, patience=2):
            if step.step == 3:  # from here on the loss is climbed
                training.learner.optimizer.state.clear()
                for group in training.learner.optimizer.param_groups:
                    group["maximize"] = True
            yield step.step

    with pytest.warns(UserWarning, match=r"Overfit\. Stopped early at step 5"):
        assert list(spoiled()) == [1, 2, 3, 4, 5]
    assert verdict(read_history(training.folder)).best == 3
    assert [e["step"] for e in read_history(training.folder) if e["event"] == "alarm"] == [5]
    assert training.interrupted
    shorter = train(config.replace(max_train_steps=3, output_dir=str(tmp_path / "short")))
    for _ in shorter:
        pass
    assert same(weights(training.folder / early_stopping.BEST), weights(shorter.folder))
    assert list(early_stop(train(config), patience=2)) == []  # called again it does not go on
    assert next(iter(early_stop(train(config), patience=9))).step == 6


def test_nothing_happens_while_the_probe_falls(config, tmp_path, recwarn):
    training = train(
        config.replace(output_dir=str(tmp_path / "run"), probe_steps=1, learning_rate=1e-3)
    )
    assert [step.step for step in early_stop(training, patience=1)] == [1, 2, 3]
    assert same(weights(training.folder / early_stopping.BEST), weights(training.folder))
    assert not [w for w in recwarn if "early" in str(w.message)]


def test_a_best_adapter_that_a_kill_prevented_is_written_when_the_run_goes_on(config, tmp_path):
    config = config.replace(
        output_dir=str(tmp_path / "run"), probe_steps=2, max_train_steps=5, learning_rate=1e-3
    )
    for step in early_stop(train(config)):
        if step.step == 2:
            break
    best = tmp_path / "run" / early_stopping.BEST / FILE_NAME
    before = weights(best.parent)
    best.unlink()
    assert next(iter(early_stop(train(config)))).step == 3
    assert same(weights(best.parent), before)
