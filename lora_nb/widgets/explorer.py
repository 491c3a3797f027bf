"""Sliders over pictures of several scales or weights, with a kernel and without one."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets
from PIL import Image

from lora_nb.widgets.pictures import encoded, img, side_by_side


class ScaleExplorer:
    """A slider over pictures of several scales, each drawn once.

    sweep: the pictures of `inference.scale_sweep`, one list for each scale; or a function that draws the list of a
    scale, called when the slider first stands there. As the last expression of a cell it shows the kernel-free page of
    `html()`, for which all are drawn; `widget` is the same as an ipywidgets box (`slider`, `scale()`).
    """

    def __init__(
        self,
        sweep: Sequence[Sequence[Image.Image]] | Callable[[float], Sequence[Image.Image]],
        scales: Sequence[float],
    ):
        self._draw = sweep if callable(sweep) else dict(zip(scales, sweep, strict=True)).get
        self._labels = [f"scale {scale:g}" + (" (base)" if not scale else "") for scale in scales]
        self._scales, self._rows = list(scales), {}
        start = min(range(len(scales)), key=lambda i: abs(scales[i] - 1))
        self.slider = ipywidgets.IntSlider(
            value=start, max=len(scales) - 1, readout=False, layout={"width": "20em"}
        )
        size = {"width": f"{self._row(start).width}px"}  # or it stretches over the page
        self.label, self.picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=size)
        self.widget = ipywidgets.VBox([ipywidgets.HBox([self.slider, self.label]), self.picture])
        self.slider.observe(self._moved, "value")
        self._moved({"new": start})

    def _row(self, index: int) -> Image.Image:
        """The pictures of one scale side by side, from memory after the first time."""
        if index not in self._rows:
            self._rows[index] = side_by_side(self._draw(self._scales[index]))
        return self._rows[index]

    def scale(self) -> float:
        """The scale that the widget shows."""
        return self._scales[self.slider.value]

    def html(self) -> str:
        """A page with a slider that needs no kernel and stays alive in a saved notebook."""
        rows = [self._row(index) for index in range(len(self._scales))]
        return scrubber_html(rows, self._labels, start=self.slider.value)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"ScaleExplorer({', '.join(self._labels)})"

    def _moved(self, change: dict) -> None:
        self.label.value = self._labels[change["new"]]
        self.picture.value = encoded(self._row(change["new"]), "PNG")


def scrubber_html(images: Sequence[Image.Image], labels: Sequence[str], start: int = 0) -> str:
    """HTML in which a slider turns over the pictures; all of them are inside, as base64."""
    frames = "".join(
        f'<figure style="margin:0" {"" if index == start else "hidden"}>'
        f"<figcaption>{escape(label)}</figcaption>{img(encoded(image, 'WEBP'), 'webp')}</figure>"
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    )
    turn = "this.parentNode.querySelectorAll('figure').forEach((f, i) =&gt; f.hidden = i != this.value)"
    # stopPropagation: or JupyterLab takes the arrow keys for its own
    return (
        f'<div><input type="range" min="0" max="{len(images) - 1}" value="{start}" '
        f'style="width:20em" aria-label="picture" onkeydown="event.stopPropagation()" '
        f'oninput="{turn}">{frames}</div>'
    )


def two_sliders_html(
    sides: Sequence[tuple[str, int, int]], pages: Sequence[tuple[str, str]], above: str = ""
) -> str:
    """HTML in which two sliders turn over pages that need no kernel.

    sides: name, number of places and first place of each slider. pages: caption and inner HTML for every pair of
    places, those of the second slider next to each other. above: HTML that stands over all pages.
    """
    (_, _, down), (_, across, right) = sides
    turn = (
        "const d=this.closest('div'),[a,b]=d.querySelectorAll('input'),"
        f"at={across}*a.value+ +b.value;"
        "d.querySelectorAll('figure').forEach((f,i)=&gt;f.hidden=i!=at)"
    )
    # stopPropagation: or JupyterLab takes the arrow keys for its own
    sliders = "".join(
        f'<label style="display:inline-block;margin-right:2em">{escape(name)} <input type="range" min="0" '
        f'max="{count - 1}" value="{start}" style="width:12em;vertical-align:middle" aria-label="{escape(name)}" '
        f'onkeydown="event.stopPropagation()" oninput="{turn}"></label>'
        for name, count, start in sides
    )
    first = across * down + right
    figures = "".join(
        f'<figure style="margin:0" {"" if place == first else "hidden"}><figcaption>{escape(caption)}</figcaption>'
        f"{inner}</figure>"
        for place, (caption, inner) in enumerate(pages)
    )
    return f"<div>{sliders}{above}{figures}</div>"


class WeightExplorer:
    """Two sliders over the pictures of `inference.weight_grid`, which need no kernel.

    grid: rows follow the first adapter's weights, columns the second's. weights: {adapter: its weights}, in this order.
    """

    def __init__(
        self, grid: Sequence[Sequence[Image.Image]], weights: Mapping[str, Sequence[float]]
    ):
        self._grid, (self._down, self._across) = grid, weights.items()

    def html(self) -> str:
        """A page that stays alive in a saved notebook; it starts where the weights are nearest to 1."""
        sides = [
            (name, len(values), min(range(len(values)), key=lambda i, w=values: abs(w[i] - 1)))
            for name, values in (self._down, self._across)
        ]
        pages = [
            (self._label(i, j), img(encoded(picture, "WEBP"), "webp"))
            for i, row in enumerate(self._grid)
            for j, picture in enumerate(row)
        ]
        return two_sliders_html(sides, pages)

    def _label(self, i: int, j: int) -> str:
        places = ((self._down, i), (self._across, j))
        return ", ".join(f"{name} {values[place]:g}" for (name, values), place in places)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        sides = (
            f"{name} {', '.join(f'{v:g}' for v in w)}" for name, w in (self._down, self._across)
        )
        return f"WeightExplorer({'; '.join(sides)})"
