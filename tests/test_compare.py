"""Two runs side by side: differences pair by pair where they pair, and the reason where they do not."""

import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from lora_nb import cli
from lora_nb.errors import CheckpointError
from lora_nb.inference import with_samples
from lora_nb.report import compare
from lora_nb.run_folder import read_history
from lora_nb.trainer import train


@pytest.fixture(scope="module")
def runs(tiny_sd, pictures, tmp_path_factory) -> dict[str, Path]:
    """Four short runs of one seed: another rate, other pictures; and one of another seed."""
    from lora_nb.config import DataSpec, LoraSpec, TrainConfig

    folder = tmp_path_factory.mktemp("jane-canary")
    plain = TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), data=DataSpec(train_data_dir=str(pictures), resolution=16),
        lora={"unet": LoraSpec(rank=2)}, seed=3, train_batch_size=2, max_train_steps=4, learning_rate=1e-2,
        validation_prompts=("colour 1", "<b>colour</b> 2"), num_validation_images=1, validation_steps=4,
        num_inference_steps=1, probe_steps=2,
    )  # fmt: skip
    fast = {"learning_rate": 3e-2, "lora": {"unet": LoraSpec(rank=2, lora_alpha=4.0)}}
    configs = {
        "plain": plain,
        "fast": plain.replace(**fast, max_train_steps=3),
        "fewer": plain.replace(max_train_samples=4, validation_prompts=()),
        "seed": plain.replace(seed=4, validation_prompts=()),
    }
    for name, config in configs.items():
        for _ in with_samples(train(config.replace(output_dir=str(folder / name)))):
            pass
    return {name: folder / name for name in configs}


def events(run: Path, kind: str) -> dict[int, dict]:
    return {e["step"]: e for e in read_history(run) if e["event"] == kind}


def test_settings_that_differ_and_no_others(runs):
    found = compare(runs["plain"], runs["fast"]).settings
    assert found == {
        "learning_rate": (1e-2, 3e-2),
        "lora.unet.lora_alpha": (None, 4.0),
        "max_train_steps": (4, 3),
    }
    assert compare(runs["plain"], runs["plain"]).settings == {}


def test_losses_are_subtracted_picture_by_picture(runs):
    """Against the history, by hand: over the steps that both have, each picture with itself."""
    found = compare(runs["plain"], runs["fast"])
    a, b = (events(runs[name], "step") for name in ("plain", "fast"))
    assert list(found.losses) == [1, 2, 3]
    steps = []
    for step, pair in found.losses.items():
        pairs = list(zip(a[step]["per_image"], b[step]["per_image"], strict=True))
        differences = [y - x for x, y in pairs]
        assert pair.mean == pytest.approx(mean(differences))
        assert pair.standard_error == pytest.approx(stdev(differences) / math.sqrt(len(pairs)))
        steps.append(mean(differences))
    assert found.losses[1].mean == 0  # before the first step both are the base model
    assert found.training.mean == pytest.approx(mean(steps))
    assert found.training.standard_error == pytest.approx(stdev(steps) / math.sqrt(3))
    a, b = (events(runs[name], "probe") for name in ("plain", "fast"))
    assert list(found.probes) == [0, 2]
    draws = [y[1] - x[1] for x, y in zip(a[2]["by_timestep"], b[2]["by_timestep"], strict=True)]
    assert found.held_out.mean == pytest.approx(mean(draws))
    assert found.unpaired == ()


def test_the_other_way_round_is_the_opposite(runs):
    there, back = compare(runs["plain"], runs["fast"]), compare(runs["fast"], runs["plain"])
    assert back.training.mean == -there.training.mean
    assert back.held_out.standard_error == there.held_out.standard_error
    assert back.settings == {name: (b, a) for name, (a, b) in there.settings.items()}


@pytest.mark.parametrize("other", ["fewer", "seed"])
def test_what_does_not_pair_is_said(runs, other):
    found = compare(runs["plain"], runs[other])
    assert found.training is None
    assert found.held_out is not None  # the same held-out pictures at the same draws
    assert "did not see the same pictures with the same noise" in found.table()
    assert "does not pair" not in found.table()


def test_text_numbers_and_page(runs, tmp_path, capsys):
    found = compare(runs["plain"], runs["fast"])
    text = found.table()
    assert re.search(r"^ +plain +fast$", text, re.MULTILINE)
    assert re.search(r"^learning_rate +0\.01 +0\.03$", text, re.MULTILINE)
    assert re.search(r"^steps +4 +3$", text, re.MULTILINE)
    assert f"{found.training.mean:+.5f} with a standard error of" in text
    assert repr(found) == text
    html = found._repr_html_()
    assert html.count("<img") == 1 + 2 * 3  # the figure; two prompts of the base and both runs
    assert "<b>colour" not in html
    assert "&lt;b&gt;colour" in html

    page = tmp_path / "both.html"
    assert cli.main(["compare", str(runs["plain"]), str(runs["fast"]), "--output", str(page)]) == 0
    said, written = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert text in said
    assert written.startswith("<!DOCTYPE html>")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", written)
    for part in (said.replace(str(page), ""), written, html):
        assert "jane-canary" not in part
        assert str(Path.home()) + "/" not in part


def test_no_pictures_no_strip(runs):
    assert "strip" not in compare(runs["plain"], runs["seed"]).page().split("</style>")[1]


def test_no_run_is_one_sentence(runs, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="There is no run in"):
        compare(runs["plain"], tmp_path)
    assert cli.main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: There is no run in")
