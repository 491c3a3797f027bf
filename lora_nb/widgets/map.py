"""Two sliders over a measured sweep of rank and learning rate; they need no kernel."""

from html import escape

from PIL import Image

from lora_nb.sweep import Cell, Sweep
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
        pages = "".join(
            self._page(
                cells.get((rank, rate)), hidden=(rank, rate) != (best.rank, best.learning_rate)
            )
            for rank in self._ranks
            for rate in self._rates
        )
        turn = (
            "const box=this.closest('div'),[a,b]=box.querySelectorAll('input'),"
            f"at={len(self._rates)}*a.value+ +b.value;box.querySelectorAll('figure').forEach((f,i)=&gt;f.hidden=i!=at)"
        )
        rank = _slider("rank", self._ranks.index(best.rank), len(self._ranks), turn)
        rate = _slider(
            "learning rate", self._rates.index(best.learning_rate), len(self._rates), turn
        )
        base = strip(self._sweep, self._sweep.base)
        return f"<div>{rank}{rate}<br><small>base model</small><br>{base}{pages}</div>"

    def _page(self, cell: Cell | None, hidden: bool) -> str:
        text = "not measured yet" if cell is None else caption(cell)
        pictures = "" if cell is None else strip(self._sweep, cell)
        state = "hidden" * hidden
        return f'<figure style="margin:0" {state}><figcaption>{escape(text)}</figcaption>{pictures}</figure>'

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


def _slider(name: str, start: int, count: int, turn: str) -> str:
    # stopPropagation: or JupyterLab takes the arrow keys for its own
    return (
        f'<label style="display:inline-block;margin-right:2em">{name} <input type="range" min="0" max="{count - 1}" '
        f'value="{start}" style="width:12em;vertical-align:middle" aria-label="{name}" '
        f'onkeydown="event.stopPropagation()" oninput="{turn}"></label>'
    )
