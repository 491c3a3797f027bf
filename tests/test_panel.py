"""The panel's read-outs are the truth, or say about what; parts go on and off; measured cells show beside sliders."""

import base64
import dataclasses
import re

import pytest
import torch
from PIL import Image

from lora_nb import adapters
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import load_family
from lora_nb.formats import save_adapter
from lora_nb.metrics import Score
from lora_nb.sweep import Cell, Sweep
from lora_nb.widgets import ConfigPanel, RankRateMap, readouts


@pytest.fixture(scope="module")
def family(tiny_sd):
    return load_family("auto", str(tiny_sd))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two ranks and two learning rates; one run broke off."""
    folder = tmp_path_factory.mktemp("sweep")
    cells, score = [], Score(0.5, 0.1, 0.9, 2)
    for rank in (1, 16):
        for rate in (1e-3, 1e-1):
            name = f"{rank}-{rate:g}"
            Image.new("RGB", (8, 8), (10 * rank, 0, 0)).save(folder / f"{name}.png")
            cells.append(
                Cell(name, ("unet",), rank, rank, rate, -rank * 0.001, 0.0002, score, score,
                     1000 * rank, 4000 * rank, 2.0, (f"{name}.png",))
            )  # fmt: skip
    cells[-1] = dataclasses.replace(
        cells[-1], difference=None, pictures=(), fault="The loss is nan"
    )
    Image.new("RGB", (8, 8), "white").save(folder / "base.png")
    return Sweep(folder, Cell("base", pictures=("base.png",)), tuple(cells))


def shown(widget) -> str:
    return re.sub("<[^>]*>", "", widget.value)


@pytest.mark.parametrize(
    "lora",
    [
        {"unet": LoraSpec(rank=1)},
        {"unet": LoraSpec(rank=13), "text_encoder": LoraSpec(rank=2)},
        {"unet": LoraSpec(rank=4, target_modules=("ff.net.0.proj", "to_q", "conv1"))},
        {"text_encoder": LoraSpec(rank=64)},
    ],
    ids=["small", "both", "targets", "text encoder"],
)
def test_parameters_and_file_size_are_those_of_the_saved_file(config, family, lora, tmp_path):
    panel = ConfigPanel(config.replace(lora=lora), family)
    adapters.add(family, lora)
    real = sum(p.numel() for group in adapters.parameters(family).values() for p in group)
    size = save_adapter(family, tmp_path, {"base_model": "data/base", "run": "0" * 16})
    adapters.remove(family)
    assert shown(panel.numbers).startswith(f"{real:,} trainable parameters")
    assert readouts.file_size(panel.counts()) == pytest.approx(size.stat().st_size, rel=0.01)


def test_parts_go_on_and_off_and_one_stays(config, family):
    panel = ConfigPanel(config, family).set(text_encoder=True)
    assert list(panel.config().lora) == ["unet", "text_encoder"]
    panel.set(network=False, rank=8)
    assert panel.config().lora == {"text_encoder": LoraSpec(rank=8)}
    with pytest.raises(ConfigError, match="text_encoder does not reach False"):
        panel.set(text_encoder=False)
    assert panel.controls["text_encoder"].value
    panel.set(network=True)
    assert panel.config().lora == {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=8)}
    panel.set(text_encoder=False)
    assert panel.config() == config
    only = config.replace(lora={"text_encoder": LoraSpec(rank=2)})
    assert ConfigPanel(only, family).config() == only
    assert not ConfigPanel(only, family).controls["network"].value


def test_batch_schedule_and_warm_up(config):
    panel = ConfigPanel(config)
    warm_up, own = panel.controls["lr_warmup_steps"], panel.controls["own_targets"]
    assert (warm_up.disabled, own.disabled) == (True, True)  # neither would change anything
    panel.set(train_batch_size=5, lr_scheduler="cosine", lr_warmup_steps=20)
    assert (warm_up.disabled, own.disabled) == (False, True)
    expected = config.replace(train_batch_size=5, lr_scheduler="cosine", lr_warmup_steps=20)
    assert panel.config() == expected
    panel.set(lr_warmup_steps=0)
    assert panel.config().lr_warmup_steps == 0


def test_the_curve_is_the_one_that_training_will_follow(config):
    panel = ConfigPanel(config.replace(max_train_steps=100, learning_rate=1e-3))
    assert "learning rate 0.001 in all 100 steps" in shown(panel.cost)
    (drawing,) = re.findall(r"svg\+xml;base64,([^\"]+)", panel.cost.value)
    words = re.findall(r">([^<]+)</text>", base64.b64decode(drawing).decode())
    assert words == ["0.001", "0", "step 1", "100"]  # the ends of both axes
    panel.set(lr_scheduler="linear", lr_warmup_steps=50)
    assert "learning rate at most 0.001 in 100 steps" in shown(panel.cost)
    panel.set(lr_scheduler="cosine", lr_warmup_steps=500)  # what is easily overlooked
    assert "at most 0.000198 in 100 steps; it never reaches 0.001" in shown(panel.cost)
    assert "svg+xml;base64," in panel.cost.value
    panel.set(max_train_steps=0)
    assert "steps follow from the epochs" in shown(panel.cost)


def test_estimates_scale_from_one_measurement(config, family):
    panel = ConfigPanel(config, family)
    assert "not measured yet" in shown(panel.cost)
    forecast = panel.measure()
    assert "about" not in shown(panel.cost)
    start = panel.config()

    def seconds():
        return readouts.scaled_seconds(forecast, start, panel.config())

    def memory():
        return readouts.scaled_memory(forecast, start, panel.config(), family)

    assert seconds() == pytest.approx(forecast.seconds)
    assert memory() == pytest.approx(forecast.peak_memory, abs=1)
    panel.set(max_train_steps=100)
    more = 96 * forecast.seconds_per_step
    assert seconds() == pytest.approx(forecast.seconds + more)
    assert "about" in shown(panel.cost)
    before = memory()
    panel.set(rank=16)
    adapted = {
        rank: readouts.counts(family, config.replace(lora={"unet": LoraSpec(rank=rank)}))
        for rank in (2, 16)
    }
    extra = readouts.parameters(adapted[16]) - readouts.parameters(adapted[2])
    assert memory() - before == pytest.approx(16 * extra, abs=2)  # weight, gradient, two moments
    panel.set(train_batch_size=8)
    assert memory() > before
    assert not any(adapters.has_adapter(module) for module in family.trainable.values())


def test_the_button_measures(config, family):
    panel = ConfigPanel(config, family)
    panel.button.click()
    assert " at most: fits" in shown(panel.cost)
    assert not panel.button.disabled


def test_sliders_show_the_nearest_measured_cell(config, measured):
    panel = ConfigPanel(config, sweep=measured)  # rank 2, learning rate 1e-2
    panel.set(rank=12, learning_rate=2e-3)
    assert "nearest measured: rank 16, learning rate 0.001" in shown(panel.seen)
    assert "held-out loss -0.0160 (standard error 0.0002), style 0.50" in shown(panel.seen)
    assert panel.seen.value.count("<img") == 2  # the base's pictures and the cell's
    panel.controls["learning_rate"].value = 5e-2
    assert "The loss is nan" in shown(panel.seen)
    panel.set(rank=1)
    assert "nearest measured: rank 1, learning rate 0.1" in shown(panel.seen)


def test_the_map_without_a_kernel_holds_every_cell(measured):
    page = RankRateMap(measured).html()
    figures = re.findall(r"<figure.*?</figure>", page)
    assert [("hidden" in figure.split(">")[0]) for figure in figures] == [True, True, False, True]
    assert "rank 16, learning rate 0.001: held-out loss -0.0160" in figures[2]  # the best
    assert "The loss is nan" in figures[3]
    assert page.count("<img") == 4
    sliders = re.findall(r"<input[^>]*>", page)
    assert ['max="1" value="1"' in sliders[0], 'max="1" value="0"' in sliders[1]] == [True, True]
    assert all("stopPropagation" in slider for slider in sliders)
    assert "http" not in page
    torn = dataclasses.replace(measured, cells=measured.cells[:3])
    assert "not measured yet" in RankRateMap(torn).html()


def test_an_untouched_panel_measures_nothing(config, family, monkeypatch):
    state = torch.random.get_rng_state()
    panel = ConfigPanel(config, family)
    assert panel.config() == config
    assert torch.equal(state, torch.random.get_rng_state())
