"""Two sliders over a measured sweep of rank and learning rate; they need no kernel."""

from PIL import Image

from lora_nb.sweep import Cell, Sweep
from lora_nb.widgets.explorer import two_sliders_html
from lora_nb.widgets.pictures import encoded, img, side_by_side


class RankRateMap:
    """A page of a sweep's pictures and scores that two sliders, rank and learning rate, turn over.

    Everything is inside, so it stays alive in a saved notebook. Above each cell's pictures stand the base model's.
    """

    def __init__(self, sweep: Sweep):
        self._sweep = sweep
        self._ranks = sorted({cell.rank for cell in sweep.cells})
        self._rates = sorted({cell.learning_rate for cell in sweep.cells})

    def html(self) -> str:
        """The page; it starts at the best cell."""
        cells = {(cell.rank, cell.learning_rate): cell for cell in self._sweep.cells}
        best = self._sweep.best()
        base = f"<br><small>base model</small><br>{strip(self._sweep, self._sweep.base)}"
        pages = [
            self._page(cells.get((rank, rate))) for rank in self._ranks for rate in self._rates
        ]
        sides = (
            ("rank", len(self._ranks), self._ranks.index(best.rank)),
            ("learning rate", len(self._rates), self._rates.index(best.learning_rate)),
        )
        return two_sliders_html(sides, pages, above=base)

    def _page(self, cell: Cell | None) -> tuple[str, str]:
        if cell is None:
            return "not measured yet", ""
        return caption(cell), strip(self._sweep, cell)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return repr(self._sweep)


def caption(cell: Cell) -> str:
    """A cell's settings and what was measured, in one line."""
    text = f"rank {cell.rank}, learning rate {cell.learning_rate:g}: "
    if cell.difference is None:
        return text + cell.fault
    text += f"held-out loss {cell.difference:+.4f} (standard error {cell.standard_error:.4f})"
    if cell.style:
        text += f", style {cell.style.mean:.2f}, right thing {cell.concept.mean:.2f}"
    return f"{text}, {cell.bytes / 1e6:.2f} MB, {cell.seconds:.0f} s"


def strip(sweep: Sweep, cell: Cell) -> str:
    """A cell's pictures side by side, as an HTML image."""
    if not cell.pictures:
        return ""
    images = [Image.open(file).convert("RGB") for file in sweep.files(cell)]
    return img(encoded(side_by_side(images), "WEBP"), "webp", 'style="max-width:100%"')
