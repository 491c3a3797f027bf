"""What all figures share: the figure that shows itself, its colours, and the strokes that are drawn into it."""

import io
import textwrap
from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

# Okabe & Ito's palette, told apart by colour-blind readers. Grey is always the base model.
INK, MUTED, FAINT, BASE = "#222222", "#6b6b6b", "#e4e4e4", "#8c8c8c"
ADAPTER, SECOND = "#0072b2", "#d55e00"
SERIES = (ADAPTER, SECOND, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MINUS = "\N{MINUS SIGN}"
PIXELS_PER_INCH = 96  # on the page; drawn at twice that for sharp screens

Picture = Image.Image | str | PathLike


class Plot(Figure):
    """A Figure that carries its own PNG, so that it shows as the last expression of a cell.

    A bare Figure shows only after pyplot has registered the inline backend, which we never import.
    """

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
        FigureCanvasAgg(self)

    def png(self, sharpness: float = 2.0) -> bytes:
        """The figure as PNG bytes at twice the page resolution, or at `sharpness` times it."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=sharpness * PIXELS_PER_INCH)
        return buffer.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict]:
        width, height = (int(side * PIXELS_PER_INCH) for side in self.get_size_inches())
        return self.png(), {"width": width, "height": height}

    def box(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """New axes at a place given in inches from the lower left corner."""
        whole_width, whole_height = self.get_size_inches()
        return self.add_axes(
            (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
        )

    def write(self, x: float, y: float, text: str, **style) -> None:
        """Text at a place given in inches from the lower left corner."""
        whole_width, whole_height = self.get_size_inches()
        style = {"fontsize": 8.5, "color": INK, "va": "center"} | style
        self.text(x / whole_width, y / whole_height, text, **style)


def tidy(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Give axes their title, the names of their axes, and the look of all our figures."""
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8)
    axes.set_xlabel(x, fontsize=8.5, color=MUTED)
    axes.set_ylabel(y, fontsize=8.5, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8b8b8")
    axes.tick_params(labelsize=8, colors=MUTED, length=3, width=0.6)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def logarithmic(axes: Axes, low: float, high: float) -> None:
    """A log axis from low to high with numbers on it, also where all lies within one power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.minorticks_off()


def by_rows(axes: Axes) -> None:
    """The look of horizontal bars, the first one on top."""
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def legend(axes: Axes, columns: int = 2, **place) -> None:
    """On the line of the title, where it hides nothing, unless placed elsewhere."""
    place = place or {"loc": "lower right", "bbox_to_anchor": (1.02, 0.99), "borderpad": 0.2}
    style = {"frameon": False, "fontsize": 7.5, "labelcolor": INK, "handlelength": 1.4}
    axes.legend(ncols=columns, columnspacing=1.2, **style, **place)


def nothing_yet(axes: Axes, text: str) -> None:
    """Empty axes that say why."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_picture(axes: Axes, picture: Picture) -> None:
    """A picture, or the one in a file, and nothing else."""
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    axes.set_axis_off()
    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="antialiased")


def indent_for(labels: Sequence[str]) -> float:
    """Inches that the longest of these labels needs at the left of a figure."""
    return 0.04 + max((0.1 + 0.068 * len(label) for label in labels), default=0)


def wrap(label: str, size: float, lines: int = 3) -> str:
    """A label in lines that fit over `size` inches; what is beyond so many lines is left out."""
    width = max(6, int(size / 0.064))
    wrapped = [part for line in label.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(wrapped[:lines]) + (" ..." if len(wrapped) > lines else "")


def scientific(value: float) -> str:
    """0.00025 -> "2.5e-4"."""
    return "0" if value == 0 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
