"""Sliders in a saved notebook, opened as a plain page: no kernel, no network, moved by keyboard and mouse.

Screenshots are left in runs/browser.
"""

import io

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from nbconvert import HTMLExporter
from PIL import Image, ImageDraw

from lora_nb.metrics import Score
from lora_nb.sweep import Cell, Sweep
from lora_nb.widgets import RankRateMap, ScaleExplorer, WeightExplorer

from .conftest import PICTURES

pytestmark = pytest.mark.timeout(300)
SCALES = [0, 0.5, 1, 1.5, 2]
RANKS, RATES = (1, 4, 16), (1e-4, 1e-3)


def drawn(red: float, text: str) -> Image.Image:
    """A picture that can be told by its red, and by its text if one looks at it."""
    picture = Image.new("RGB", (160, 60), (round(red), 40, 90))
    ImageDraw.Draw(picture).text((40, 25), text, fill="white")
    return picture


def explorer() -> ScaleExplorer:
    return ScaleExplorer(lambda scale: [drawn(100 * scale, f"scale {scale:g}")] * 2, SCALES)


def two_weights() -> WeightExplorer:
    grid = [[drawn(90 * i + 30 * j, f"{i}, {j}") for j in range(3)] for i in range(2)]
    return WeightExplorer(grid, {"ink": [0, 1], "clay": [0, 0.5, 1]})


def sweep_map(folder) -> RankRateMap:
    """Red counts the cells, 30 for each; the second of rank 16 is the best."""
    score, cells = Score(0.5, 0.1, 0.9, 2), []
    for place, (rank, rate) in enumerate((rank, rate) for rank in RANKS for rate in RATES):
        drawn(30 * place, f"rank {rank}, {rate:g}").save(folder / f"{place}.png")
        measured = (-0.001 * place, 0.0002, score, score, 1000, 4000, 2.0, (f"{place}.png",))
        cells.append(Cell(str(place), ("unet",), rank, rank, rate, *measured))
    drawn(255, "base").save(folder / "base.png")
    return RankRateMap(Sweep(folder, Cell("base", pictures=("base.png",)), tuple(cells)))


def saved(results: list, folder):
    """A notebook with these results of its cells, saved, read again and exported as a page."""
    cells = []
    for result in results:
        data, metadata = DisplayFormatter().format(result)
        output = nbformat.v4.new_output("execute_result", data, metadata=metadata)
        cells.append(nbformat.v4.new_code_cell("show", outputs=[output]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "saved.ipynb")
    page, _ = HTMLExporter(template_name="basic").from_filename(str(folder / "saved.ipynb"))
    (folder / "saved.html").write_text(page, encoding="utf-8")
    return folder / "saved.html"


@pytest.fixture
def page(browser, tmp_path):
    """The page with all three, in a browser without a network."""
    file = saved([explorer(), two_weights(), sweep_map(tmp_path)], tmp_path)
    context, asked, errors = browser.new_context(offline=True), [], []
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert errors == []


class Scrubber:
    """One of the page's results: what it shows, and its sliders."""

    def __init__(self, page, place: int):
        self._page, self._box = page, page.locator(".output_html").nth(place)
        self.sliders = self._box.locator("input").all()

    def shown(self) -> tuple[str, int]:
        """The caption in sight and the red of the picture in sight, in tens; there is one of each."""
        figure = self._box.locator("figure:visible")
        assert figure.count() == 1
        picture = Image.open(io.BytesIO(figure.locator("img").screenshot()))
        red = picture.convert("RGB").getpixel((4, picture.height - 4))[0]
        return figure.locator("figcaption").inner_text(), round(red / 10)

    def press(self, slider: int, *keys: str) -> None:
        self.sliders[slider].focus()
        for key in keys:
            self._page.keyboard.press(key)

    def drag(self, slider: int, start: float, end: float) -> None:
        """With the mouse, from one share of the slider's length to another."""
        box = self.sliders[slider].bounding_box()
        across = [box["x"] + 8 + share * (box["width"] - 16) for share in (start, end)]
        middle = box["y"] + box["height"] / 2
        self._page.mouse.move(across[0], middle)
        self._page.mouse.down()
        self._page.mouse.move(across[1], middle, steps=5)
        self._page.mouse.up()


def test_the_scale_slider(page):
    scales, weights = Scrubber(page, 0), Scrubber(page, 1)
    others = weights.shown()
    assert scales.shown() == ("scale 1", 10)
    scales.press(0, "ArrowRight")
    assert scales.shown() == ("scale 1.5", 15)
    scales.press(0, "ArrowLeft", "ArrowLeft")
    assert scales.shown() == ("scale 0.5", 5)
    page.screenshot(path=PICTURES / "10-saved-notebook-scale-0.5.png")
    scales.press(0, "Home")
    assert scales.shown() == ("scale 0 (base)", 0)
    scales.drag(0, 0.0, 0.5)
    assert scales.shown() == ("scale 1", 10)
    scales.drag(0, 0.5, 1.0)
    assert scales.shown() == ("scale 2", 20)
    scales.drag(0, 0.25, 0.25)  # a click beside the handle
    assert scales.shown() == ("scale 0.5", 5)
    assert weights.shown() == others == ("ink 1, clay 1", 15)


def test_two_weights(page):
    weights = Scrubber(page, 1)
    weights.press(1, "ArrowLeft")
    assert weights.shown() == ("ink 1, clay 0.5", 12)
    weights.drag(0, 1.0, 0.0)
    assert weights.shown() == ("ink 0, clay 0.5", 3)
    weights.drag(1, 0.5, 1.0)
    assert weights.shown() == ("ink 0, clay 1", 6)


def test_the_map_of_rank_and_learning_rate(page):
    """The base model's picture stays above whatever the sliders turn over."""
    chart = Scrubber(page, 2)
    places = {
        (rank, rate): 2 * i + j for i, rank in enumerate(RANKS) for j, rate in enumerate(RATES)
    }

    def stands_at(rank: int, rate: float) -> bool:
        caption, red = chart.shown()
        place = places[rank, rate]
        named = f"rank {rank}, learning rate {rate:g}: held-out loss {-0.001 * place:+.4f}"
        return caption.startswith(named) and red == 3 * place

    assert stands_at(16, 1e-3)
    chart.press(0, "ArrowLeft")
    assert stands_at(4, 1e-3)
    chart.press(1, "ArrowLeft")
    assert stands_at(4, 1e-4)
    chart.drag(0, 0.5, 0.0)
    assert stands_at(1, 1e-4)
    chart.drag(1, 0.0, 1.0)
    assert stands_at(1, 1e-3)
    chart.drag(0, 0.0, 1.0)
    assert stands_at(16, 1e-3)
    chart.press(0, "Home")
    page.screenshot(path=PICTURES / "11-saved-notebook-map.png", full_page=True)
    assert stands_at(1, 1e-3)
    base = page.locator("small", has_text="base model")
    assert base.is_visible()
