"""A slider over pictures of several scales, with a kernel and without one."""

from collections.abc import Sequence
from html import escape

import ipywidgets
from PIL import Image

from lora_nb.widgets.pictures import encoded, img


class ScaleExplorer:
    """A slider over the pictures of `inference.scale_sweep`: one list of pictures for each scale.

    As the last expression of a cell it shows the kernel-free page of `html()`; `widget` is the same
    as an ipywidgets box, for those who want to build on it (`slider`, `scale()`).
    """

    def __init__(self, sweep: Sequence[Sequence[Image.Image]], scales: Sequence[float]):
        self._images = [_side_by_side(pictures) for pictures in sweep]
        self._labels = [f"scale {scale:g}" + (" (base)" if not scale else "") for scale in scales]
        self._scales = list(scales)
        start = min(range(len(scales)), key=lambda i: abs(scales[i] - 1))
        self.slider = ipywidgets.IntSlider(
            value=start, max=len(scales) - 1, readout=False, layout={"width": "20em"}
        )
        size = {"width": f"{self._images[0].width}px"}  # or it stretches over the page
        self.label, self.picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=size)
        self.widget = ipywidgets.VBox([ipywidgets.HBox([self.slider, self.label]), self.picture])
        self.slider.observe(self._moved, "value")
        self._moved({"new": start})

    def scale(self) -> float:
        """The scale that the widget shows."""
        return self._scales[self.slider.value]

    def html(self) -> str:
        """A page with a slider that needs no kernel and stays alive in a saved notebook."""
        return scrubber_html(self._images, self._labels, start=self.slider.value)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"ScaleExplorer({', '.join(self._labels)})"

    def _moved(self, change: dict) -> None:
        self.label.value = self._labels[change["new"]]
        self.picture.value = encoded(self._images[change["new"]], "PNG")


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


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (width * index, 0))
    return row
