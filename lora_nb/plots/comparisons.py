"""Figures of what was varied and measured: scale, rank, rank and learning rate, with the pictures beside it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_nb.plots.strokes import (
    ADAPTER,
    BASE,
    INK,
    MINUS,
    MUTED,
    SECOND,
    Plot,
    draw_picture,
    legend,
    scientific,
    tidy,
    wrap,
)


def score_curves(x: Sequence[float], scores: Mapping[str, Sequence], label: str) -> Figure:
    """Shares between 0 and 1 over something that was varied, such as the scale, with their intervals.

    `scores` maps a curve's name to a metrics.Score for each x; the band is the 95 % interval.
    """
    figure = Plot(5.2, 2.7)
    axes = tidy(figure.box(0.7, 0.55, 4.3, 1.75), "What the judge sees", label, "share of pictures")
    for (name, curve), colour in zip(scores.items(), (ADAPTER, SECOND), strict=False):
        low, mean, high = zip(*((s.low, s.mean, s.high) for s in curve), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(list(x))
    legend(axes)
    return figure


def rank_study(study, shown: int = 4) -> Figure:
    """Above, what each rank keeps of one LoRA, in energy, in the judge's eyes and in held-out loss; below, pictures.

    `study` is a `lora_nb.rank_study.RankStudy`; `shown` is how many of its prompts get a row.
    """
    rows, size = study.rows, 0.98
    places = range(len(rows))  # doubling ranks at equal distances
    shown = min(shown, len(study.prompts))
    names = [wrap(prompt.split(",")[0], 0.8) for prompt in study.prompts[:shown]]
    below = 0.35 + size * shown
    figure = Plot(max(7.4, 0.95 + size * len(rows)), below + 2.75)
    width = figure.get_size_inches()[0]
    measured = rows[0].lost is not None
    axes = figure.box(0.6, below + 0.6, (width - 1.5) * 0.58 if measured else width - 1, 1.7)
    tidy(axes, "What a rank keeps", "rank", "share")
    axes.plot(places, [row.energy for row in rows], "--", color=BASE, label="energy")
    curves = (("style", f"{study.style} style", ADAPTER), ("concept", "right thing", SECOND))
    for field, name, colour in curves:
        scores = [getattr(row, field) for row in rows]
        if scores[0] is not None:
            low, mean, high = zip(*((s.low, s.mean, s.high) for s in scores), strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(places, mean, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_ylim(-0.03, 1.05)
    _rank_axis(axes, rows)
    legend(axes, columns=3)
    if measured:
        left = width * 0.58 + 0.62
        axes = figure.box(left, below + 0.6, width - left - 0.15, 1.7)
        tidy(axes, "Held-out loss above the whole", "rank", "")
        mean = np.array([row.lost.mean for row in rows])
        error = 2 * np.array([row.lost.standard_error for row in rows])
        axes.axhline(0, color=BASE, linewidth=1)
        axes.errorbar(
            places, mean, yerr=error, color=ADAPTER, marker="o", ms=3.5, lw=1.4, elinewidth=0.8
        )
        _rank_axis(axes, rows)
    for column, row in enumerate(rows):
        x = 0.9 + size * column
        label = f"rank {row.rank}" if row.rank else "base"
        figure.write(x + size / 2, below - 0.12, label, ha="center", color=MUTED, fontsize=8)
        for line in range(shown):
            place = (x, below - 0.25 - size * (line + 1), size - 0.06, size - 0.06)
            draw_picture(figure.box(*place), row.pictures[line])
    for line, name in enumerate(names):
        y = below - 0.25 - size * (line + 0.5)
        figure.write(0.82, y, name, ha="right", fontsize=7.5, color=MUTED)
    return figure


def rank_rate_map(sweep, shown: int = 0) -> Figure:
    """Held-out loss minus the base's for every rank and learning rate, and beside it a picture of each cell.

    `sweep` is a `lora_nb.sweep.Sweep` of `rank_and_rate`; `shown` is the place of the picture among its prompts. Blue
    is better than the base, orange is worse, an outlined cell is the best.
    """
    ranks = sorted({cell.rank for cell in sweep.cells})
    rates = sorted({cell.learning_rate for cell in sweep.cells})
    wide, high, left, bottom = 1.02, 0.86, 0.75, 0.5
    pictured = any(cell.pictures for cell in sweep.cells)
    beside = left + wide * len(rates) + 0.25
    figure = Plot(beside + (high + 0.04) * len(rates) * pictured, bottom + high * len(ranks) + 0.4)
    axes = figure.box(left, bottom, wide * len(rates), high * len(ranks))
    tidy(axes, "Held-out loss minus base", "learning rate", "rank")
    axes.grid(visible=False)
    axes.set_xticks(range(len(rates)), [scientific(rate) for rate in rates])
    axes.set_yticks(range(len(ranks)), ranks)
    axes.set_xlim(-0.5, len(rates) - 0.5)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    gain = (
        -sweep.best().difference
    )  # colours are full at the best cell's gain, and at the same loss
    for cell in sweep.cells:
        x, y = rates.index(cell.learning_rate), ranks.index(cell.rank)
        _map_cell(axes, x, y, cell, gain, outlined=cell == sweep.best())
        if cell.pictures:
            place = (beside + (high + 0.04) * x, bottom + high * (len(ranks) - 1 - y) + 0.02)
            draw_picture(figure.box(*place, high - 0.04, high - 0.04), sweep.files(cell)[shown])
    for x, rate in enumerate(rates * pictured):
        middle = beside + (high + 0.04) * (x + 0.48)
        figure.write(middle, bottom - 0.13, scientific(rate), ha="center", color=MUTED, fontsize=8)
    return figure


def _map_cell(axes: Axes, x: int, y: int, cell, gain: float, outlined: bool) -> None:
    """One cell of a map: colour, difference, standard error, and the judge's score of the style."""
    value = cell.difference
    colour, depth = (BASE, 0.5) if value is None else (ADAPTER if value < 0 else SECOND, 0.0)
    if value is not None and gain:
        depth = 0.7 * min(1, abs(value / gain))
    axes.fill_between((x - 0.48, x + 0.48), y - 0.48, y + 0.48, color=colour, alpha=depth, lw=0)
    if outlined:
        axes.plot(
            x + 0.46 * np.array([-1, 1, 1, -1, -1]),
            y + 0.46 * np.array([-1, -1, 1, 1, -1]),
            color=INK,
        )
    if value is None:
        axes.text(x, y, "broke", ha="center", va="center", fontsize=8, color=INK)
        return
    lines = [f"{value:+.3f}", f"± {cell.standard_error:.3f}"]
    if cell.style:
        lines.append(f"style {cell.style.mean:.2f}")
    text = "\n".join(lines).replace("-", MINUS)
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK)


def _rank_axis(axes: Axes, rows: Sequence) -> None:
    axes.set_xticks(range(len(rows)), [str(row.rank) if row.rank else "base" for row in rows])
