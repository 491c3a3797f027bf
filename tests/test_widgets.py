"""Widgets without a browser: the panel edits the config, the board never disturbs the training, sliders turn pages."""

import base64
import dataclasses
import io
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageDraw

from lora_nb import adapters
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import load_family, tiny
from lora_nb.run_folder import read_history
from lora_nb.trainer import train
from lora_nb.widgets import ConfigPanel, LiveBoard, ScaleExplorer, readouts, scrubber_html


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build("sd", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def family(model):
    return load_family("sd", str(model))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(6):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4, 4, 27, 27), fill=(40 * i, 90, 200))
        image.save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"dot {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(model, pictures, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(model),
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        output_dir=str(tmp_path / "run"),
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=3e-4,
        seed=0,
    )


# the panel


def test_an_untouched_panel_returns_the_very_config(config):
    odd = dataclasses.replace(
        config,
        max_train_steps=None,
        learning_rate=3.21e-9,
        lora={"unet": LoraSpec(rank=300, lora_alpha=0.125, target_modules=("to_v",))},
    )
    for untouched in (config, odd):
        assert ConfigPanel(untouched).config() == untouched
    assert ConfigPanel(odd).controls["own_targets"].value == "to_v"


def test_moving_a_control_changes_its_setting_and_no_other(config, family):
    panel = ConfigPanel(config, family)
    spec = config.lora["unet"]
    panel.controls["rank"].value = 16  # as the browser does it
    assert panel.config() == dataclasses.replace(config, lora={"unet": LoraSpec(rank=16)})
    panel.set(rank=spec.rank)
    assert panel.config() == config
    panel.set(learning_rate=1e-3, max_train_steps=70)
    assert panel.config() == dataclasses.replace(config, learning_rate=1e-3, max_train_steps=70)
    panel.set(max_train_steps=0)
    assert panel.config().max_train_steps is None


def test_alpha_follows_rank_until_it_is_set(config):
    panel = ConfigPanel(config)
    panel.set(rank=16)
    assert panel.controls["lora_alpha"].value == 16
    assert panel.config().lora["unet"].lora_alpha is None
    panel.set(lora_alpha=16)  # where it stands already: from now on it stays
    panel.set(rank=32)
    assert panel.config().lora["unet"] == LoraSpec(rank=32, lora_alpha=16)
    assert panel.controls["lora_alpha"].value == 16


def test_targets_of_the_panel_fit_the_network(config, family):
    panel = ConfigPanel(config, family)
    panel.controls["target_modules"].value = "attention and feed-forward"
    wide = panel.config().lora
    assert set(wide["unet"].target_modules) == {
        *family.targets["unet"], "ff.net.0.proj", "ff.net.2"
    }  # fmt: skip
    adapters.check(family, wide)
    panel.set(target_modules=("to_q", "to_v"))
    assert panel.config().lora["unet"].target_modules == ("to_q", "to_v")
    panel.controls["own_targets"].value = "to_k to_out.0"  # typed with a blank instead of a comma
    assert panel.config().lora["unet"].target_modules == ("to_k", "to_out.0")
    panel.set(target_modules=None)
    assert panel.config() == config


def test_text_encoder_goes_on_and_off(config, family):
    panel = ConfigPanel(config, family).set(rank=8, text_encoder=True)
    assert panel.config().lora == {"unet": LoraSpec(rank=8), "text_encoder": LoraSpec(rank=8)}
    panel.set(text_encoder=False)
    assert panel.config().lora == {"unet": LoraSpec(rank=8)}
    own = LoraSpec(rank=2, learning_rate=1e-5)
    both = dataclasses.replace(config, lora={"unet": LoraSpec(), "text_encoder": own})
    panel = ConfigPanel(both, family)
    assert panel.controls["text_encoder"].value
    panel.set(text_encoder=False).set(text_encoder=True)
    assert panel.config().lora["text_encoder"] == own


def test_counts_and_file_size_are_those_of_the_real_adapter(config, family):
    panel = ConfigPanel(config, family).set(rank=6, text_encoder=True)
    adapters.add(family, panel.config().lora)
    real = sum(p.numel() for group in adapters.parameters(family).values() for p in group)
    adapters.remove(family)
    shown = re.sub("<.*?>", "", panel.numbers.value)
    base = sum(p.numel() for module in family.trainable.values() for p in module.parameters())
    assert f"({real / base:.2%} of the base)" in shown
    assert shown.startswith(f"{real:,} trainable parameters")
    assert f"file {readouts.file_size(panel.counts()) / 1000:.0f} kB" in shown
    assert "unet 32 layers, text_encoder 8 layers; scale alpha / rank = 1" in shown
    assert "trainable" not in ConfigPanel(config).numbers.value  # nothing to count on


def test_the_panel_refuses_what_it_cannot_set(config):
    panel = ConfigPanel(config)
    with pytest.raises(ConfigError, match="no control 'ranks'; it has rank, lora_alpha"):
        panel.set(ranks=3)
    with pytest.raises(ConfigError, match="rank does not reach 0"):
        panel.set(rank=0)
    assert panel.config() == config


def test_the_panel_says_itself_in_plain_text(config):
    panel = ConfigPanel(config).set(rank=8, lora_alpha=4, target_modules=("to_q",))
    expected = "unet: rank 8, alpha 4, scale 0.5, on to_q; learning rate 0.0003; 4 steps"
    assert panel.text() == expected
    assert repr(panel) == f"ConfigPanel({expected})"


# the board


def test_without_a_notebook_the_board_prints_lines(config, capsys):
    training = train(config)
    with LiveBoard(training) as board:
        for step in training:
            board.update(step)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/4 [====............] loss ")
    assert lines[-1].startswith("step 4/4 [================] loss ")
    assert f"loss {step.loss:.4f}" in lines[-1]
    assert "lr 3.0e-04" in lines[-1]
    assert len(lines) == 2  # the steps between came too quickly
    board.close()
    assert capsys.readouterr().out == ""


def test_a_training_that_stops_early_is_told_how_to_go_on(config, capsys):
    training = train(config)
    with LiveBoard(training) as board:
        for step in training:
            board.update(step)
            training.interrupted = True  # what the interrupt signal does
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("step 1/4 ")
    assert last.endswith("stopped after step 1; run this cell again to go on")


def test_a_board_that_saw_no_step_closes_silently(config, capsys):
    LiveBoard(train(config)).close()
    assert capsys.readouterr().out == ""


def test_a_board_on_a_finished_run_says_so(config, capsys):
    for _ in train(config):
        pass
    LiveBoard(train(config)).close()
    assert capsys.readouterr().out == "All 4 steps of this run are done already.\n"


def test_the_board_does_not_change_the_training(config, tmp_path):
    losses = []
    for name, watched in (("a", True), ("b", False)):
        training = train(dataclasses.replace(config, output_dir=str(tmp_path / name)))
        board = LiveBoard(training)
        for step in training:
            if watched:
                board.update(step)
                board.figure().png()
            losses.append(step.loss)
    assert losses[:4] == losses[4:]


def test_the_figure_is_that_of_the_folder(config):
    training = train(config)
    board = LiveBoard(training)
    assert len(board.figure().axes) == 5  # before the first step too
    losses = [step.loss for step in training]
    drawn = board.figure().axes[0].lines[0].get_ydata()
    assert drawn == pytest.approx(losses)
    assert losses == [e["loss"] for e in read_history(training.folder) if e["event"] == "step"]


BOARD = """
from lora_nb.config import TrainConfig
from lora_nb.trainer import train
from lora_nb.widgets import ConfigPanel, LiveBoard, ScaleExplorer
config = TrainConfig.from_json({config!r})
"""
LIVE = """
training = train(config)
with LiveBoard(training, every=0) as board:
    for step in training:
        board.update(step)
"""
BROKEN = """
training = train(config.replace(output_dir=config.output_dir + "-broken"))
with LiveBoard(training, every=0) as board:
    for step in training:
        with open(training.folder / "history.jsonl", "a") as file:
            file.write('{"event": "step", "step": 1}\\n')
        board.update(step)
step.step
"""


def run_cells(cells, monkeypatch, headless):
    for name in ("CI", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORA_NB_HEADLESS", "1" if headless else "0")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.slow
def test_in_a_notebook_widgets_show_and_the_board_leaves_a_line_and_a_picture(config, monkeypatch):
    setup = BOARD.format(config=config.to_json())
    _, panel, moved, live, broken = run_cells(
        [setup, "panel = ConfigPanel(config)\npanel", "panel.set(rank=7);", LIVE, BROKEN],
        monkeypatch,
        headless=False,
    )
    assert "application/vnd.jupyter.widget-view+json" in panel[0].data
    assert panel[1].data["text/plain"].startswith("unet: rank 7, ")  # the line followed the panel
    assert moved == []
    head, figure = live  # both were redrawn many times and are still one output each
    assert head.data["text/plain"].startswith("step 4/4 [================]")
    assert "step 4 of 4" in head.data["text/html"]
    assert len(figure.data["image/png"]) > 1000
    said = "".join(o.text for o in broken if o.output_type == "stream")
    assert said == "The board stops (KeyError: 'lr'); the training goes on.\n"
    assert broken[-1].data["text/plain"] == "4"  # it did


@pytest.mark.slow
def test_headless_the_board_leaves_lines_and_one_picture(config, monkeypatch):
    setup = BOARD.format(config=config.to_json())
    _, outputs = run_cells([setup, LIVE], monkeypatch, headless=True)
    kinds = [output.output_type for output in outputs]
    assert kinds == ["stream"] * (len(kinds) - 1) + ["display_data"]
    assert "step 4/4" in "".join(output.text for output in outputs[:-1])
    assert len(outputs[-1].data["image/png"]) > 1000


# the scale


def colours(n):
    return [Image.new("RGB", (8, 8), (20 * i, 0, 255 - 20 * i)) for i in range(n)]


def test_explorer_slider_turns_the_page():
    explorer = ScaleExplorer([[picture, picture] for picture in colours(5)], [0, 0.5, 1, 1.5, 2])
    assert explorer.scale() == 1
    explorer.slider.value = 0
    assert explorer.label.value == "scale 0 (base)"
    shown = Image.open(io.BytesIO(explorer.picture.value))
    assert shown.size == (16, 8)
    assert shown.getpixel((9, 3)) == (0, 0, 255)


def test_scrubber_holds_every_picture_and_shows_one():
    page = scrubber_html(colours(3), ["a", "<b>", "c"], start=1)
    assert "&lt;b&gt;" in page
    assert page.count("<figure") == 3
    assert [("hidden" in tag) for tag in re.findall(r"<figure[^>]*>", page)] == [True, False, True]
    encoded = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    reds = [Image.open(io.BytesIO(base64.b64decode(e))).getpixel((4, 4))[0] for e in encoded]
    assert reds == pytest.approx([0, 20, 40], abs=8)
    assert "http" not in page  # nothing from outside
