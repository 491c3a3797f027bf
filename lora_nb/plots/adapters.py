"""Figures of what is in an adapter: parameters, strength, singular values and shared directions by block."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_nb.health import block_of
from lora_nb.plots.strokes import (
    ADAPTER,
    INK,
    MUTED,
    SECOND,
    SERIES,
    Plot,
    by_rows,
    indent_for,
    legend,
    tidy,
)


def parameter_bars(counts: Iterable, title: str = "Trainable parameters by block") -> Figure:
    """Adapter parameters per block of the network, stacked by the layers' own names (to_q, to_k).

    `counts` are `lora_nb.adapters.ModuleCount`s; a block is a module name up to its first number.
    """
    blocks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for count in counts:
        blocks[block_of(count.name)][_layer(count.name)] += count.parameters
    kinds = list(dict.fromkeys(kind for block in blocks.values() for kind in block))
    names = sorted(blocks, key=after_the_middle)
    figure = Plot(7.4, 0.95 + 0.24 * len(names))
    indent = indent_for(names)
    axes = figure.box(indent, 0.5, 7.0 - indent, 0.12 + 0.24 * len(names))
    tidy(axes, title, "parameters", "")
    left = np.zeros(len(names))
    for kind, colour in zip(kinds, SERIES * len(kinds), strict=False):
        values = np.array([blocks[name][kind] for name in names])
        axes.barh(names, values, left=left, height=0.66, color=colour, label=kind)
        left += values
    for row, total in enumerate(left):
        axes.text(total, row, f" {int(total):,}", va="center", fontsize=7.5, color=MUTED)
    axes.set_xlim(0, left.max() * 1.16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    by_rows(axes)
    if len(kinds) > 1:
        legend(axes, columns=len(kinds))
    return figure


def strength_bars(strength: Iterable[tuple[str, str, float, float]]) -> Figure:
    """How far the adapter moved each block: |scale BA| over |W| (Frobenius) in per cent, per block.

    `strength` is the list of `lora_nb.adapters.strength`: (part, module, change, weight).
    """
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for part, name, change, weight in strength:
        sums[part, block_of(name)] += (change**2, weight**2)
    parts = list(dict.fromkeys(part for part, _ in sums))
    rows = sorted(sums, key=lambda row: (parts.index(row[0]), after_the_middle(row[1])))
    labels = [f"{part} {block}" for part, block in rows]
    indent = indent_for(labels)
    figure = Plot(6.4, 0.95 + 0.24 * len(sums))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(sums))
    tidy(axes, "How far each block moved", "|scale BA| / |W| (%)", "")
    for row, (part, block) in enumerate(rows):
        change, weight = sums[part, block]
        per_cent = 100 * (change / weight) ** 0.5
        axes.barh(row, per_cent, height=0.66, color=SERIES[parts.index(part) % len(SERIES)])
        axes.text(per_cent, row, f" {per_cent:.2g}", va="center", fontsize=7.5, color=MUTED)
    axes.set_yticks(range(len(sums)), labels)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    by_rows(axes)
    return figure


def singular_values(
    spectra: Mapping[str, Sequence[float]], rank: int | None = None, title: str = "Singular values"
) -> Figure:
    """Singular values, large to small, on a log axis; `rank` marks where such a LoRA ends."""
    figure = Plot(5.2, 2.6)
    axes = tidy(figure.box(0.7, 0.5, 4.3, 1.75), title, "index", "singular value")
    largest = max(float(max(values)) for values in spectra.values())
    for (name, values), colour in zip(spectra.items(), SERIES * len(spectra), strict=False):
        # what float32 leaves of an exact zero is not information
        shown = [float(value) for value in values if value > 1e-5 * largest]
        axes.plot(range(1, len(shown) + 1), shown, color=colour, marker="o", ms=2.5, label=name)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if rank is not None:
        axes.axvline(rank + 0.5, color=MUTED, linewidth=0.8, linestyle="--")
        axes.text(rank + 0.5, 0.03, f" rank {rank}", transform=axes.get_xaxis_transform(),
                  va="bottom", fontsize=7.5, color=MUTED)  # fmt: skip
    legend(axes)
    return figure


def rank_xray(spectra: Sequence) -> Figure:
    """How much of each block's change the first 1, 2, ... singular values hold: dark is all, a dot the effective rank.

    `spectra` is the list of `lora_nb.formats.xray`; a block shows the mean of its layers.
    """
    blocks: dict[str, list] = defaultdict(list)
    for spectrum in spectra:
        blocks[spectrum.block].append(spectrum)
    rows = sorted(
        blocks, key=lambda block: (block.split(".")[0], after_the_middle(block.partition(".")[2]))
    )
    rank = max(len(spectrum.values) for spectrum in spectra)
    held = np.ones((len(rows), rank))
    for row, block in enumerate(rows):
        for k in range(rank):
            held[row, k] = np.mean([s.energy[min(k, len(s.values) - 1)] for s in blocks[block]])
    indent = indent_for(rows)
    figure = Plot(6.4, 0.95 + 0.24 * len(rows))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(rows))
    tidy(axes, "Share of the change held by the first singular values", "rank", "")
    axes.imshow(
        held,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0.5, rank + 0.5, len(rows) - 0.5, -0.5),
    )
    effective = [np.mean([s.effective_rank for s in blocks[block]]) for block in rows]
    axes.plot(effective, range(len(rows)), "o", color=SECOND, ms=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    return figure


def overlap_bars(overlaps: Sequence) -> Figure:
    """How much of the space that two LoRAs use they share, by block; the grey mark is what strangers would share.

    `overlaps` is the list of `lora_nb.formats.overlap`; a block shows the mean of its layers.
    """
    blocks: dict[str, list] = defaultdict(list)
    for overlap in overlaps:
        blocks[overlap.block].append((overlap.shared, overlap.chance))
    rows = sorted(
        blocks, key=lambda block: (block.split(".")[0], after_the_middle(block.partition(".")[2]))
    )
    shared, chance = np.array([np.mean(blocks[block], axis=0) for block in rows]).T
    indent = indent_for(rows)
    figure = Plot(6.4, 0.95 + 0.24 * len(rows))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(rows))
    tidy(axes, "Shared directions", "mean squared cosine (1: the same space)", "")
    axes.barh(rows, shared, height=0.66, color=ADAPTER, label="these two")
    axes.plot(chance, range(len(rows)), "|", color=INK, ms=11, mew=1.6, label="by chance")
    axes.set_xlim(0, max(1.25 * max(shared.max(), chance.max()), 0.2))
    by_rows(axes)
    legend(axes)
    return figure


def after_the_middle(block: str) -> bool:
    """Sorts blocks as data flows: a network may list its way up before its middle."""
    return block.startswith("up")


def _layer(name: str) -> str:
    """The last word of a module name that is no number: "attn1.to_out.0" -> "to_out"."""
    return next(word for word in reversed(name.split(".")) if not word.isdigit())


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"
