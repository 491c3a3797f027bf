"""The scale explorer: every picture is drawn once, and its page works without a kernel."""

import base64
import io
import re

import pytest
from PIL import Image

from lora_nb.widgets import ScaleExplorer, WeightExplorer

SCALES = [0, 0.5, 1, 1.5, 2]


def pictures(scale):
    return [Image.new("RGB", (8, 8), (round(100 * scale), 0, 50 * i)) for i in range(2)]


def shown(explorer):
    return Image.open(io.BytesIO(explorer.picture.value)).getpixel((3, 3))[0]


@pytest.fixture
def asked():
    return []


@pytest.fixture
def explorer(asked):
    def draw(scale):
        asked.append(scale)
        return pictures(scale)

    return ScaleExplorer(draw, SCALES)


def test_a_scale_is_drawn_when_the_slider_first_stands_there(explorer, asked):
    assert asked == [1]
    explorer.slider.value = 4
    assert (asked, explorer.scale(), shown(explorer)) == ([1, 2], 2, 200)
    explorer.slider.value = 2
    explorer.slider.value = 4
    assert (asked, shown(explorer)) == ([1, 2], 200)


def test_the_page_holds_all_of_them_and_draws_the_rest_once(explorer, asked):
    page = explorer._repr_html_()
    assert sorted(asked) == SCALES
    assert explorer.html() == page
    assert len(asked) == len(SCALES)
    encoded = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    reds = [Image.open(io.BytesIO(base64.b64decode(e))).getpixel((3, 3))[0] for e in encoded]
    assert reds == pytest.approx([0, 50, 100, 150, 200], abs=8)
    assert re.findall(r"<figcaption>([^<]+)", page)[:2] == ["scale 0 (base)", "scale 0.5"]


def test_a_sweep_that_is_drawn_already_gives_the_same_page(explorer):
    ready = ScaleExplorer([pictures(scale) for scale in SCALES], SCALES)
    assert ready.html() == explorer.html()


def test_the_page_is_alive_without_a_kernel(explorer):
    """Nothing is asked of Jupyter or the network: the slider's own attribute turns the figures."""
    page = explorer.html()
    assert "http" not in page
    assert not re.search(r"<script|require|jupyter", page, flags=re.I)
    script = re.search(r'oninput="([^"]+)"', page)[1]
    assert "querySelectorAll('figure')" in script
    assert "hidden = i != this.value" in script


def test_two_sliders_have_a_page_for_every_pair():
    weights = {"ink": [0, 1], "<clay>": [0, 0.5, 1]}
    grid = [[Image.new("RGB", (8, 8), (60 * i + 20 * j, 0, 0)) for j in range(3)] for i in range(2)]
    page = WeightExplorer(grid, weights)._repr_html_()
    captions = re.findall(r"<figcaption>([^<]+)", page)
    assert captions[0] == "ink 0, &lt;clay&gt; 0"
    assert captions[4] == "ink 1, &lt;clay&gt; 0.5"
    encoded = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    reds = [Image.open(io.BytesIO(base64.b64decode(e))).getpixel((3, 3))[0] for e in encoded]
    assert reds == pytest.approx([0, 20, 40, 60, 80, 100], abs=8)
    hidden = ["hidden" in tag for tag in re.findall(r"<figure[^>]*>", page)]
    assert hidden == [True] * 5 + [False]  # both weights 1
    sliders = re.findall(r'max="(\d)" value="(\d)"', page)
    assert sliders == [("1", "1"), ("2", "2")]
    assert "at=3*a.value+ +b.value" in page
    assert "http" not in page
