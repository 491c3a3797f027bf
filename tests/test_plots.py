"""Figures: they show in a notebook without pyplot, draw what they were given, and leave no global state."""

import io
import json
import re
import subprocess
import sys

import matplotlib.figure
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from lora_nb import adapters, metrics, plots
from lora_nb.families import load_family, tiny

RED, BLUE = (220, 30, 30), (30, 30, 220)


def picture(colour, size=32):
    return Image.new("RGB", (size, size), colour)


def texts(figure):
    """Every word in the figure: loose texts, titles, axis and tick labels, legends."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def drawn(figure):
    return np.asarray(Image.open(io.BytesIO(figure.png())).convert("RGB"))


def history(steps=30, probes=(0, 10, 20, 30), parts=("unet",)):
    lines = [{"event": "start", "step": 0}]
    for step in range(1, steps + 1):
        rates = dict.fromkeys(parts, 0.001)
        lines.append({"event": "step", "step": step, "loss": 1 / step, "lr": rates})
    for step in probes:
        lines.append(
            {"event": "probe", "step": step, "difference": -0.01 * step, "standard_error": 0.005}
        )
    return lines


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family("sd", str(tiny.build("sd", tmp_path_factory.mktemp("tiny"))))


FIGURES = {
    "picture_grid": lambda: plots.picture_grid([[picture(RED)]], ["row"], ["column"], "title"),
    "contact_sheet": lambda: plots.contact_sheet([picture(RED)] * 3, ["a", "b", "c"], columns=2),
    "before_after_grid": lambda: plots.before_after_grid([picture(RED)], [picture(BLUE)], ["cat"]),
    "scale_sweep_grid": lambda: plots.scale_sweep_grid([[picture(RED)], [picture(BLUE)]], [0, 1]),
    "noise_ladder": lambda: plots.noise_ladder([[picture(RED)] * 2], [0, 999], snr=[1000.0, 0.0]),
    "training_figure": lambda: plots.training_figure(history(), {"base": [picture(RED)]}, "title"),
    "training_figure, nothing yet": lambda: plots.training_figure([]),
    "loss_curve": lambda: plots.loss_curve([0.3, 0.2, 0.1]),
    "learning_rate_curve": lambda: plots.learning_rate_curve({"unet": [0, 1e-4], "other": [0, 0]}),
    "loss_by_timestep": lambda: plots.loss_by_timestep([10, 500, 900], [0.5, 0.2, 0.1]),
    "score_curves": lambda: plots.score_curves(
        [0, 1], {"style": [metrics.share([0, 0, 1]), metrics.share([1, 1, 1])]}, "scale"
    ),
    "snr_by_draw": lambda: plots.snr_by_draw({"sd": [0.0, 2.0, 9.0], "flux": [1.0]}),
    "probe_by_timestep": lambda: plots.probe_by_timestep([(10, 0.4, 0.5), (10, 0.3, 0.2)]),
    "singular_values": lambda: plots.singular_values({"BA": [3.0, 1.0, 1e-12]}, rank=2),
    "strength_bars": lambda: plots.strength_bars([("unet", "down_blocks.0.to_q", 0.1, 2.0)]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_figure_with_its_own_png(name):
    figure = FIGURES[name]()
    assert isinstance(figure, matplotlib.figure.Figure)
    png, size = figure._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert image.width == pytest.approx(2 * size["width"], abs=2)  # sharp on sharp screens
    assert size["width"] <= 900
    assert np.asarray(image.convert("L")).std() > 1  # not blank


def test_pyplot_is_never_imported():
    code = "import sys, lora_nb.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_figure_shows_as_the_last_expression_of_a_cell(tmp_path):
    cells = [
        "from lora_nb import plots\nplots.learning_rate_curve([0.0, 1e-4])",
        "import matplotlib.pyplot\nplots.learning_rate_curve([0.0, 1e-4])",  # with the inline backend
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in notebook.cells:
        (output,) = cell.outputs
        assert output.output_type == "execute_result"
        assert len(output.data["image/png"]) > 1000


def test_contact_sheet_reads_left_to_right_with_each_picture_under_its_caption():
    figure = plots.contact_sheet([picture(RED), picture(BLUE), picture(RED)], ["a", "b", "c"], 2)
    place = {t.get_text(): t.get_position() for t in figure.texts}
    assert place["a"][1] == place["b"][1] > place["c"][1]
    assert place["a"][0] == place["c"][0] < place["b"][0]
    pixels = drawn(figure)
    height, width = pixels.shape[:2]
    x, y = place["b"]  # just below its words lies the second picture
    assert tuple(pixels[int((1 - y) * height) + 40, int(x * width)]) == BLUE


def test_grid_places_each_picture_in_its_row_and_column():
    rows = [[picture(RED), picture(BLUE)], [None, picture(RED)]]
    figure = plots.picture_grid(rows, ["first", "second"], ["left", "right"])
    assert set(texts(figure)) == {"first", "second", "left", "right"}
    middles = {}
    for axes in figure.axes:
        box = axes.get_position()
        middles[round(box.x0, 3), round(box.y0, 3)] = tuple(axes.images[0].get_array()[0, 0])
    (left, right), (low, high) = (sorted({p[i] for p in middles}) for i in (0, 1))
    assert middles == {(left, high): RED, (right, high): BLUE, (right, low): RED}
    pixels = drawn(figure)
    assert (pixels == RED).all(axis=2).sum() > 2 * 0.9 * (1.15 * 192) ** 2


def test_before_after_grid_has_a_row_for_the_truth_only_if_there_is_one():
    two = plots.before_after_grid([picture(RED)], [picture(BLUE)], ["a cat"])
    three = plots.before_after_grid([picture(RED)], [picture(BLUE)], ["a cat"], [picture(BLUE)])
    assert texts(two) == ["a cat", "base model", "with adapter"]
    assert texts(three) == [*texts(two), "true drawing"]


def test_scale_sweep_grid_has_a_column_per_scale():
    sweep = [[picture(RED), picture(RED)], [picture(BLUE), picture(BLUE)], [picture(BLUE)] * 2]
    figure = plots.scale_sweep_grid(sweep, [0, 0.5, 1], ["seed 0", "seed 1"])
    assert texts(figure)[:3] == ["scale 0 (base)", "scale 0.5", "scale 1"]
    leftmost = [a for a in figure.axes if a.get_position().x0 < 0.3]
    assert [tuple(a.images[0].get_array()[0, 0]) for a in leftmost] == [RED, RED]


def test_pictures_may_be_files_and_long_captions_are_wrapped(tmp_path):
    picture(RED).save(tmp_path / "a.png")
    figure = plots.picture_grid([[tmp_path / "a.png"]], column_labels=["a long caption " * 20])
    (label,) = texts(figure)
    assert label.count("\n") == 2
    assert label.endswith(" ...")


def lines_of(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def test_training_figure_draws_raw_smoothed_probe_and_rate():
    lines = history(parts=("unet", "text_encoder"))
    loss, probe, rate = plots.training_figure(lines).axes
    assert lines_of(loss, "each step").get_ydata() == pytest.approx([1 / s for s in range(1, 31)])
    assert lines_of(loss, "smoothed").get_ydata()[0] == pytest.approx(1)  # bias corrected
    bars = probe.containers[0]
    assert bars.lines[0].get_xydata()[-1] == pytest.approx((30, -0.3))
    low, high = bars.lines[2][0].get_segments()[-1][:, 1]
    assert (low, high) == pytest.approx((-0.31, -0.29))  # two standard errors each way
    assert [line.get_label() for line in rate.lines] == ["unet", "text_encoder"]


def test_a_step_done_again_after_a_resume_counts_once():
    again = [{"event": "step", "step": 30, "loss": 5.0, "lr": {"unet": 1e-3}}]
    loss, *_ = plots.training_figure(history() + again).axes
    assert lines_of(loss, "each step").get_xydata()[-1] == pytest.approx((30, 5.0))
    assert len(lines_of(loss, "each step").get_xdata()) == 30


def test_sample_strip_keeps_the_base_and_the_latest():
    samples = {"base": [picture(RED)] * 4} | {f"step {s}": [picture(BLUE)] * 4 for s in range(20)}
    figure = plots.training_figure(history(), samples)
    labels = [t for t in texts(figure) if t == "base" or re.fullmatch(r"step \d+", t)]
    assert labels == ["base", *[f"step {s}" for s in range(13, 20)]]
    assert len(figure.axes) == 3 + 8 * 3


def test_loss_by_timestep_means_are_the_means_of_the_slices():
    t = np.arange(1000)
    figure = plots.loss_by_timestep(t, np.where(t < 500, 2.0, 1.0), bins=4)
    means = lines_of(figure.axes[0], "mean").get_xydata()
    assert means == pytest.approx(np.array([(124.5, 2), (374.5, 2), (624.5, 1), (874.5, 1)]))


def test_probe_by_timestep_shows_the_change_against_the_base():
    draws = [(t, 0.9 if t < 500 else 1.2, 1.0) for t in range(0, 1000, 10)]
    upper, lower = plots.probe_by_timestep(draws, bins=2).axes
    assert [bar.get_height() for bar in lower.patches] == pytest.approx([-10, 20])
    assert lines_of(upper, "base model").get_ydata() == pytest.approx([1, 1])


def test_snr_by_draw_sorts_the_draws_and_keeps_zero_on_the_axis():
    axes = plots.snr_by_draw({"sd": [4.0, 0.0, 100.0]}).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0, 0.5, 1]
    assert list(axes.lines[0].get_ydata()) == [100, 4, 1e-4]


def test_score_curves_draw_the_means_and_the_intervals():
    curve = [metrics.share([0, 0, 1, 1]), metrics.share([1, 1, 1, 1])]
    axes = plots.score_curves([0, 1], {"style": curve}, "scale").axes[0]
    assert lines_of(axes, "style").get_ydata() == pytest.approx([0.5, 1.0])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(curve[0].low)
    assert band[:, 1].max() == pytest.approx(1.0)


def test_parameter_bars_add_up_to_the_forecast(family):
    counts = adapters.forecast(family.unet, family.targets["unet"], rank=4)
    axes = plots.parameter_bars(counts).axes[0]
    widths = sum(bar.get_width() for bar in axes.patches)
    assert widths == sum(count.parameters for count in counts) > 0
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["down_blocks.0", "mid_block.attentions.0", "up_blocks.1"]  # as data flows
    kinds = [t.get_text() for t in axes.get_legend().get_texts()]
    assert set(kinds) == {"to_q", "to_k", "to_v", "to_out"}


def test_strength_is_the_norm_over_the_whole_block():
    rows = [("unet", "up.0.a", 3.0, 10.0), ("unet", "up.0.b", 4.0, 0.0), ("te", "layers.1.q", 1, 4)]
    axes = plots.strength_bars(rows).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([50, 25])  # 5/10, 1/4 in %
    assert [t.get_text() for t in axes.get_yticklabels()] == ["unet up.0", "te layers.1"]


def test_singular_values_leave_out_what_float32_makes_of_zero():
    product = np.random.default_rng(0).normal(size=(40, 3)) @ np.ones((3, 40)) * np.arange(40)
    values = np.linalg.svd(product.astype(np.float32))[1]
    axes = plots.singular_values({"BA": values}, rank=1).axes[0]
    assert len(lines_of(axes, "BA").get_xdata()) == 1
    assert axes.get_yscale() == "log"


def test_history_lines_of_a_file_draw_as_they_are():
    lines = [json.loads(json.dumps(line)) for line in history()]
    assert len(plots.training_figure(lines).axes) == 3
