"""Every figure of the course, each returned as a matplotlib Figure that shows itself in a notebook.

No pyplot, so there is no global state and no backend to choose: a figure is built, displayed and
forgotten. Nothing here computes a result; what is drawn comes from the caller or the history.
"""

import io
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image

from lora_nb.health import block_of
from lora_nb.metrics import smooth

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


# ---------------------------------------------------------------------------- pictures


def picture_grid(
    rows: Sequence[Sequence[Picture | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    size: float = 1.15,
) -> Figure:
    """Rows of pictures with labels; None leaves a gap. `size` is one picture's height in inches."""
    return _grid(rows, row_labels, column_labels, title, size)


def contact_sheet(
    pictures: Sequence[Picture], captions: Sequence[str], columns: int = 7, size: float = 1.15
) -> Figure:
    """Pictures in reading order, `columns` in a row, each under its own caption."""
    wrapped = [_wrap(caption, size) for caption in captions]
    top = 0.07 + 0.14 * max(label.count("\n") + 1 for label in wrapped)
    step, rows = size + 0.06, -(-len(pictures) // columns)
    figure = Plot(step * min(columns, len(pictures)) + 0.04, (step + top) * rows + 0.04)
    for index, (picture, label) in enumerate(zip(pictures, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, bottom = 0.04 + step * column, (step + top) * (rows - 1 - row) + 0.04
        figure.write(
            left + size / 2, bottom + size + 0.04, label, ha="center", va="bottom", fontsize=8
        )
        _draw_picture(figure.box(left, bottom, size, size), picture)
    return figure


def before_after_grid(
    before: Sequence[Picture],
    after: Sequence[Picture],
    prompts: Sequence[str],
    true: Sequence[Picture | None] = (),
    title: str = "",
) -> Figure:
    """One column per prompt: base model above, with the adapter below, then the true drawing."""
    rows, labels = [before, after], ["base model", "with adapter"]
    if true:
        rows, labels = [*rows, true], [*labels, "true drawing"]
    return _grid(rows, labels, prompts, title, size=1.15)


def scale_sweep_grid(
    sweep: Sequence[Sequence[Picture]], scales: Sequence[float], row_labels: Sequence[str] = ()
) -> Figure:
    """One column per scale, one row per seed, from `inference.scale_sweep`: a list for each scale."""
    columns = [f"scale {scale:g}" + (" (base)" if scale == 0 else "") for scale in scales]
    return _grid(list(zip(*sweep, strict=True)), row_labels, columns, "", size=1.15)


def noise_ladder(
    rows: Sequence[Sequence[Picture]],
    timesteps: Sequence[int],
    row_labels: Sequence[str] = (),
    snr: Sequence[float] = (),
) -> Figure:
    """The same pictures at rising timesteps; `snr` adds the signal-to-noise ratios below them."""
    columns = [f"t = {int(t)}" for t in timesteps]
    if len(snr):
        ratios = [f"{float(s):.0f}" if s >= 100 else f"{float(s):.2g}" for s in snr]
        columns = [f"{name}\nSNR {ratio}" for name, ratio in zip(columns, ratios, strict=True)]
    return _grid(rows, row_labels, columns, "", size=1.15)


# ---------------------------------------------------------------------------- numbers


def training_figure(
    history: Iterable[Mapping],
    samples: Mapping[str, Sequence[Picture]] | None = None,
    title: str = "",
) -> Figure:
    """Loss, held-out difference to the base model and learning rate from lines of history.jsonl.

    `samples` maps a label ("base", "step 100") to pictures in prompt order; the first label stays
    in view, then the latest that fit, below the curves. A step seen twice (after a resume) counts
    once, the later line.
    """
    steps = list({line["step"]: line for line in history if line["event"] == "step"}.values())
    probes = list({line["step"]: line for line in history if line["event"] == "probe"}.values())
    steps.sort(key=lambda line: line["step"])
    probes.sort(key=lambda line: line["step"])
    last = max((line["step"] for line in [*steps, *probes]), default=1)
    strip = _strip(samples or {})
    below = 0.3 + 0.98 * max((len(column) for column in strip.values()), default=-0.306)
    figure = Plot(9.2, 2.75 + below + (0.3 if title else 0))
    if title:
        figure.write(0.1, 2.75 + below + 0.12, title, fontsize=9.5, family="monospace")
    _draw_losses(figure.box(0.6, below + 0.5, 3.9, 1.85), steps)
    _draw_probes(figure.box(5.2, below + 0.5, 1.7, 1.85), probes, last)
    _draw_rates(figure.box(7.45, below + 0.5, 1.6, 1.85), _rates(steps), "step")
    for column, (label, pictures) in enumerate(strip.items()):
        left = 0.6 + 0.98 * column + (0.12 if column else 0)
        figure.write(left + 0.46, below - 0.08, label, ha="center", color=MUTED, fontsize=8)
        for row, picture in enumerate(pictures):
            _draw_picture(figure.box(left, below - 0.2 - 0.98 * row - 0.92, 0.92, 0.92), picture)
    return figure


def paired_runs(losses: Mapping, probes: Mapping) -> Figure:
    """Run b - run a by step, of the training loss and of the held-out one; below zero b is better.

    `losses` and `probes` map steps to `lora_nb.probe.Paired`; either may be empty. The band is two standard errors.
    """
    figure = Plot(7.6, 2.65)
    axes = _tidy(figure.box(0.75, 0.5, 3.9, 1.8), "Training loss, b - a", "step", "")
    if losses:
        mean = [pair.mean for pair in losses.values()]
        axes.plot(list(losses), mean, color="#c4c4c4", linewidth=0.8, label="each step")
        axes.plot(list(losses), smooth(mean), color=ADAPTER, linewidth=1.8, label="smoothed")
        _legend(axes)
    else:
        _nothing_yet(axes, "does not pair")
    other = _tidy(figure.box(5.5, 0.5, 1.95, 1.8), "Held-out loss, b - a", "step", "")
    if probes:
        mean = np.array([pair.mean for pair in probes.values()])
        error = 2 * np.array([pair.standard_error for pair in probes.values()])
        other.errorbar(
            list(probes),
            mean,
            yerr=error,
            color=ADAPTER,
            marker="o",
            ms=3.5,
            lw=1.4,
            elinewidth=0.8,
        )
    else:
        _nothing_yet(other, "does not pair")
    for each, drawn in ((axes, losses), (other, probes)):
        if drawn:
            each.axhline(0, color=BASE, linewidth=1)
            each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return figure


def loss_curve(losses: Sequence[float]) -> Figure:
    """The loss of every step, unsmoothed: for a batch that stays the same."""
    figure = Plot(5.2, 2.4)
    axes = _tidy(figure.box(0.7, 0.5, 4.3, 1.55), "Loss on one batch", "step", "loss (MSE)")
    axes.plot(range(1, len(losses) + 1), losses, color=ADAPTER, linewidth=1.8)
    axes.set_ylim(0, 1.08 * max(losses))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def learning_rate_curve(rates: Sequence[float] | Mapping[str, Sequence[float]]) -> Figure:
    """The learning rate at every step; a mapping draws one line per trained part."""
    rates = rates if isinstance(rates, Mapping) else {"learning rate": rates}
    figure = Plot(5.2, 2.4)
    curves = {part: (range(1, len(values) + 1), values) for part, values in rates.items()}
    _draw_rates(figure.box(0.7, 0.5, 4.3, 1.55), curves, "step")
    return figure


def loss_by_timestep(timesteps: Sequence[int], losses: Sequence[float], bins: int = 10) -> Figure:
    """Single losses as faint dots over their timestep, and the mean of each of `bins` slices.

    The band is one standard error of the mean. Where the loss is high by nature, one noisy batch
    says little: this is why the raw training curve jumps.
    """
    t, loss = np.asarray(timesteps, dtype=float), np.asarray(losses, dtype=float)
    slices = _slices(t, bins)
    centre = [t[part].mean() for part in slices]
    mean = np.array([loss[part].mean() for part in slices])
    error = np.array([loss[part].std() / len(part) ** 0.5 for part in slices])
    figure = Plot(5.2, 2.6)
    axes = _tidy(figure.box(0.7, 0.5, 4.3, 1.75), "Loss by timestep", "timestep", "loss (MSE)")
    axes.scatter(t, loss, s=6, color=BASE, alpha=0.35, linewidths=0, label="one picture")
    axes.fill_between(centre, mean - error, mean + error, color=ADAPTER, alpha=0.2, linewidth=0)
    axes.plot(centre, mean, color=ADAPTER, marker="o", markersize=3.5, label="mean")
    axes.set_ylim(0, max(np.quantile(loss, 0.98), (mean + error).max()) * 1.08)
    _legend(axes)
    return figure


def probe_by_timestep(by_timestep: Sequence[tuple[float, float, float]], bins: int = 8) -> Figure:
    """Held-out loss by timestep, and below it the change against the base in per cent.

    `by_timestep` is a ProbeResult's: (timestep, loss with adapter, loss of the base), one per draw.
    """
    draws = np.asarray(by_timestep, dtype=float)
    slices = _slices(draws[:, 0], bins)
    t, adapter, base = np.array([draws[part].mean(axis=0) for part in slices]).T
    figure = Plot(5.2, 3.5)
    axes = _tidy(figure.box(0.7, 1.75, 4.3, 1.4), "Held-out loss by timestep", "", "loss (MSE)")
    axes.plot(t, base, color=BASE, marker="o", markersize=3.5, label="base model")
    axes.plot(t, adapter, color=ADAPTER, marker="o", markersize=3.5, label="with adapter")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)
    _legend(axes)
    change = 100 * (adapter / base - 1)
    lower = _tidy(figure.box(0.7, 0.5, 4.3, 1.0), "", "timestep", "change (%)")
    # blue: better than the base; orange: worse
    colours = [ADAPTER if value <= 0 else SECOND for value in change]
    lower.bar(t, change, width=0.6 * np.ptp(t) / max(len(t) - 1, 1) or 1, color=colours)
    lower.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(lower.get_xlim())
    return figure


def score_curves(x: Sequence[float], scores: Mapping[str, Sequence], label: str) -> Figure:
    """Shares between 0 and 1 over something that was varied, such as the scale, with their intervals.

    `scores` maps a curve's name to a metrics.Score for each x; the band is the 95 % interval.
    """
    figure = Plot(5.2, 2.7)
    axes = _tidy(
        figure.box(0.7, 0.55, 4.3, 1.75), "What the judge sees", label, "share of pictures"
    )
    for (name, curve), colour in zip(scores.items(), (ADAPTER, SECOND), strict=False):
        low, mean, high = zip(*((s.low, s.mean, s.high) for s in curve), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(list(x))
    _legend(axes)
    return figure


def snr_by_draw(snr: Mapping[str, Sequence[float]]) -> Figure:
    """The signal-to-noise ratios that training draws, one line per name, the cleanest draw first.

    A steep line draws all ratios alike; a flat one dwells on the ratio where it is flat.
    """
    figure = Plot(6.2, 2.7)
    axes = figure.box(0.7, 0.5, 4.1, 1.85)
    _tidy(axes, "How much picture is left", "share of the draws", "signal-to-noise ratio")
    for (name, values), colour in zip(snr.items(), SERIES * len(snr), strict=False):
        # a ratio of 0 has no place on a log axis
        ordered = np.sort(np.clip(np.asarray(values, dtype=float), 1e-4, 1e4))[::-1]
        axes.plot(np.linspace(0, 1, len(ordered)), ordered, color=colour, lw=1.6, label=name)
    axes.set_yscale("log")
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle="--")
    _legend(axes, columns=1, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def parameter_bars(counts: Iterable, title: str = "Trainable parameters by block") -> Figure:
    """Adapter parameters per block of the network, stacked by the layers' own names (to_q, to_k).

    `counts` are `lora_nb.adapters.ModuleCount`s; a block is a module name up to its first number.
    """
    blocks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for count in counts:
        blocks[block_of(count.name)][_layer(count.name)] += count.parameters
    kinds = list(dict.fromkeys(kind for block in blocks.values() for kind in block))
    names = sorted(blocks, key=_after_the_middle)
    figure = Plot(7.4, 0.95 + 0.24 * len(names))
    indent = _indent(names)
    axes = figure.box(indent, 0.5, 7.0 - indent, 0.12 + 0.24 * len(names))
    _tidy(axes, title, "parameters", "")
    left = np.zeros(len(names))
    for kind, colour in zip(kinds, SERIES * len(kinds), strict=False):
        values = np.array([blocks[name][kind] for name in names])
        axes.barh(names, values, left=left, height=0.66, color=colour, label=kind)
        left += values
    for row, total in enumerate(left):
        axes.text(total, row, f" {int(total):,}", va="center", fontsize=7.5, color=MUTED)
    axes.set_xlim(0, left.max() * 1.16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    _by_rows(axes)
    if len(kinds) > 1:
        _legend(axes, columns=len(kinds))
    return figure


def strength_bars(strength: Iterable[tuple[str, str, float, float]]) -> Figure:
    """How far the adapter moved each block: |scale BA| over |W| (Frobenius) in per cent, per block.

    `strength` is the list of `lora_nb.adapters.strength`: (part, module, change, weight).
    """
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for part, name, change, weight in strength:
        sums[part, block_of(name)] += (change**2, weight**2)
    parts = list(dict.fromkeys(part for part, _ in sums))
    rows = sorted(sums, key=lambda row: (parts.index(row[0]), _after_the_middle(row[1])))
    labels = [f"{part} {block}" for part, block in rows]
    indent = _indent(labels)
    figure = Plot(6.4, 0.95 + 0.24 * len(sums))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(sums))
    _tidy(axes, "How far each block moved", "|scale BA| / |W| (%)", "")
    for row, (part, block) in enumerate(rows):
        change, weight = sums[part, block]
        per_cent = 100 * (change / weight) ** 0.5
        axes.barh(row, per_cent, height=0.66, color=SERIES[parts.index(part) % len(SERIES)])
        axes.text(per_cent, row, f" {per_cent:.2g}", va="center", fontsize=7.5, color=MUTED)
    axes.set_yticks(range(len(sums)), labels)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    _by_rows(axes)
    return figure


def singular_values(
    spectra: Mapping[str, Sequence[float]], rank: int | None = None, title: str = "Singular values"
) -> Figure:
    """Singular values, large to small, on a log axis; `rank` marks where such a LoRA ends."""
    figure = Plot(5.2, 2.6)
    axes = _tidy(figure.box(0.7, 0.5, 4.3, 1.75), title, "index", "singular value")
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
    _legend(axes)
    return figure


def rank_xray(spectra: Sequence) -> Figure:
    """How much of each block's change the first 1, 2, ... singular values hold: dark is all, a dot the effective rank.

    `spectra` is the list of `lora_nb.formats.xray`; a block shows the mean of its layers.
    """
    blocks: dict[str, list] = defaultdict(list)
    for spectrum in spectra:
        blocks[spectrum.block].append(spectrum)
    rows = sorted(
        blocks, key=lambda block: (block.split(".")[0], _after_the_middle(block.partition(".")[2]))
    )
    rank = max(len(spectrum.values) for spectrum in spectra)
    held = np.ones((len(rows), rank))
    for row, block in enumerate(rows):
        for k in range(rank):
            held[row, k] = np.mean([s.energy[min(k, len(s.values) - 1)] for s in blocks[block]])
    indent = _indent(rows)
    figure = Plot(6.4, 0.95 + 0.24 * len(rows))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(rows))
    _tidy(axes, "Share of the change held by the first singular values", "rank", "")
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


# ---------------------------------------------------------------------------- strokes


def _slices(values: np.ndarray, bins: int) -> list[np.ndarray]:
    """Positions of the values in order, cut into at most `bins` slices of about equal count."""
    return [part for part in np.array_split(np.argsort(values), bins) if len(part)]


def _tidy(axes: Axes, title: str, x: str, y: str) -> Axes:
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


def _by_rows(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _legend(axes: Axes, columns: int = 2, **place) -> None:
    """On the line of the title, where it hides nothing, unless placed elsewhere."""
    place = place or {"loc": "lower right", "bbox_to_anchor": (1.02, 0.99), "borderpad": 0.2}
    style = {"frameon": False, "fontsize": 7.5, "labelcolor": INK, "handlelength": 1.4}
    axes.legend(ncols=columns, columnspacing=1.2, **style, **place)


def _nothing_yet(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_losses(axes: Axes, steps: Sequence[Mapping]) -> None:
    _tidy(axes, "Training loss", "step", "loss (MSE)")
    if not steps:
        return _nothing_yet(axes, "no step yet")
    x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(x, losses, color="#c4c4c4", linewidth=0.8, label="each step")
    axes.plot(x, smooth(losses), color=ADAPTER, linewidth=1.8, label="smoothed")
    low, high = np.quantile(losses, [0.0, 0.99])  # one spike must not flatten the curve
    axes.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.15 * (high - low) + 1e-9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(axes)


def _draw_probes(axes: Axes, probes: Sequence[Mapping], last: int) -> None:
    _tidy(axes, "Held-out loss minus base", "step", "")
    if not probes:
        return _nothing_yet(axes, "no probe yet")
    x = [line["step"] for line in probes]
    mean = np.array([line["difference"] for line in probes])
    error = 2 * np.array([line["standard_error"] for line in probes])
    axes.axhline(0, color=BASE, linewidth=1)
    axes.fill_between(x, mean - error, mean + error, color=ADAPTER, alpha=0.18, linewidth=0)
    axes.errorbar(x, mean, yerr=error, color=ADAPTER, marker="o", ms=3.5, lw=1.4, elinewidth=0.8)
    axes.margins(y=0.15)
    axes.set_xlim(-0.06 * last, 1.06 * last)
    axes.text(0.98, 0, "base model", transform=axes.get_yaxis_transform(), va="bottom", ha="right",
              fontsize=7.5, color=MUTED)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.3g}".replace("-", MINUS))
    )


def _draw_rates(axes: Axes, curves: Mapping[str, tuple], x: str) -> None:
    _tidy(axes, "Learning rate", x, "")
    if not curves:
        return _nothing_yet(axes, "no step yet")
    for (part, (steps, values)), colour in zip(curves.items(), SERIES * len(curves), strict=False):
        axes.plot(steps, values, color=colour, linewidth=1.6, label=part)
    headroom = 1.1 + 0.17 * len(curves) * (len(curves) > 1)  # for the legend
    axes.set_ylim(0, headroom * max(max(values) for _, values in curves.values()) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    if len(curves) > 1:
        _legend(axes, columns=1, loc="upper right", borderaxespad=0)


def _rates(steps: Sequence[Mapping]) -> dict[str, tuple[list, list]]:
    curves: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for line in steps:
        for part, rate in line["lr"].items():
            curves[part][0].append(line["step"])
            curves[part][1].append(rate)
    return curves


def _strip(
    samples: Mapping[str, Sequence[Picture]], columns: int = 8, rows: int = 3
) -> dict[str, Sequence[Picture]]:
    """The first label and the latest others that fit, each with its first `rows` pictures."""
    labels = list(samples)
    kept = labels[:1] + labels[1:][-(columns - 1) :]
    return {label: samples[label][:rows] for label in kept}


def _grid(rows, row_labels, column_labels, title, size) -> Figure:
    columns = max(len(row) for row in rows)
    wrapped = [_wrap(label, size) for label in column_labels]
    left = _indent(row_labels)
    top = 0.07 + 0.14 * max((label.count("\n") + 1 for label in wrapped), default=0)
    step, caption = size + 0.06, 0.3 if title else 0
    height = top + caption + step * len(rows) + 0.04
    figure = Plot(left + step * columns + 0.04, height)
    if title:
        figure.write(left, height - 0.16, title, fontsize=9.5)
    for column, label in enumerate(wrapped):
        y = height - caption - top + 0.04
        middle = left + step * column + size / 2
        figure.write(middle, y, label, ha="center", va="bottom", fontsize=8)
    for index, row in enumerate(rows):
        bottom = height - caption - top - step * index - size
        if index < len(row_labels):
            figure.write(left - 0.08, bottom + size / 2, row_labels[index], ha="right")
        for column, picture in enumerate(row):
            if picture is not None:
                _draw_picture(figure.box(left + step * column, bottom, size, size), picture)
    return figure


def _indent(labels: Sequence[str]) -> float:
    """Inches that the longest of these labels needs at the left of a figure."""
    return 0.04 + max((0.1 + 0.068 * len(label) for label in labels), default=0)


def _draw_picture(axes: Axes, picture: Picture) -> None:
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    axes.set_axis_off()
    axes.imshow(np.asarray(picture.convert("RGB")), interpolation="antialiased")


def _wrap(label: str, size: float, lines: int = 3) -> str:
    width = max(6, int(size / 0.064))
    wrapped = [part for line in label.split("\n") for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(wrapped[:lines]) + (" ..." if len(wrapped) > lines else "")


def _after_the_middle(block: str) -> bool:
    """Sorts blocks as data flows: a network may list its way up before its middle."""
    return block.startswith("up")


def _layer(name: str) -> str:
    """The last word of a module name that is no number: "attn1.to_out.0" -> "to_out"."""
    return next(word for word in reversed(name.split(".")) if not word.isdigit())


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"


def _scientific(value: float) -> str:
    """0.00025 -> "2.5e-4"."""
    return "0" if value == 0 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


# ---------------------------------------------------------------------------- ranks and mixtures


def rank_study(study, shown: int = 4) -> Figure:
    """Above, what each rank keeps of one LoRA, in energy, in the judge's eyes and in held-out loss; below, pictures.

    `study` is a `lora_nb.rank_study.RankStudy`; `shown` is how many of its prompts get a row.
    """
    rows, size = study.rows, 0.98
    places = range(len(rows))  # doubling ranks at equal distances
    shown = min(shown, len(study.prompts))
    names = [_wrap(prompt.split(",")[0], 0.8) for prompt in study.prompts[:shown]]
    below = 0.35 + size * shown
    figure = Plot(max(7.4, 0.95 + size * len(rows)), below + 2.75)
    width = figure.get_size_inches()[0]
    measured = rows[0].lost is not None
    axes = figure.box(0.6, below + 0.6, (width - 1.5) * 0.58 if measured else width - 1, 1.7)
    _tidy(axes, "What a rank keeps", "rank", "share")
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
    _legend(axes, columns=3)
    if measured:
        left = width * 0.58 + 0.62
        axes = figure.box(left, below + 0.6, width - left - 0.15, 1.7)
        _tidy(axes, "Held-out loss above the whole", "rank", "")
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
            _draw_picture(figure.box(*place), row.pictures[line])
    for line, name in enumerate(names):
        y = below - 0.25 - size * (line + 0.5)
        figure.write(0.82, y, name, ha="right", fontsize=7.5, color=MUTED)
    return figure


def overlap_bars(overlaps: Sequence) -> Figure:
    """How much of the space that two LoRAs use they share, by block; the grey mark is what strangers would share.

    `overlaps` is the list of `lora_nb.formats.overlap`; a block shows the mean of its layers.
    """
    blocks: dict[str, list] = defaultdict(list)
    for overlap in overlaps:
        blocks[overlap.block].append((overlap.shared, overlap.chance))
    rows = sorted(
        blocks, key=lambda block: (block.split(".")[0], _after_the_middle(block.partition(".")[2]))
    )
    shared, chance = np.array([np.mean(blocks[block], axis=0) for block in rows]).T
    indent = _indent(rows)
    figure = Plot(6.4, 0.95 + 0.24 * len(rows))
    axes = figure.box(indent, 0.5, 6.0 - indent, 0.12 + 0.24 * len(rows))
    _tidy(axes, "Shared directions", "mean squared cosine (1: the same space)", "")
    axes.barh(rows, shared, height=0.66, color=ADAPTER, label="these two")
    axes.plot(chance, range(len(rows)), "|", color=INK, ms=11, mew=1.6, label="by chance")
    axes.set_xlim(0, max(1.25 * max(shared.max(), chance.max()), 0.2))
    _by_rows(axes)
    _legend(axes)
    return figure


def _rank_axis(axes: Axes, rows: Sequence) -> None:
    axes.set_xticks(range(len(rows)), [str(row.rank) if row.rank else "base" for row in rows])


# ---------------------------------------------------------------------------- rank and learning rate


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
    _tidy(axes, "Held-out loss minus base", "learning rate", "rank")
    axes.grid(visible=False)
    axes.set_xticks(range(len(rates)), [_scientific(rate) for rate in rates])
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
            _draw_picture(figure.box(*place, high - 0.04, high - 0.04), sweep.files(cell)[shown])
    for x, rate in enumerate(rates * pictured):
        middle = beside + (high + 0.04) * (x + 0.48)
        figure.write(middle, bottom - 0.13, _scientific(rate), ha="center", color=MUTED, fontsize=8)
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
