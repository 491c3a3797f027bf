"""Figures of a training: its loss, its held-out loss and its learning rate by step, alone or against another run."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_nb.metrics import smooth
from lora_nb.plots.strokes import (
    ADAPTER,
    BASE,
    MINUS,
    MUTED,
    SERIES,
    Picture,
    Plot,
    draw_picture,
    legend,
    nothing_yet,
    scientific,
    tidy,
)


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
    strip = shown_samples(samples or {})
    below = 0.3 + 0.98 * max((len(column) for column in strip.values()), default=-0.306)
    figure = Plot(9.2, 2.75 + below + (0.3 if title else 0))
    if title:
        figure.write(0.1, 2.75 + below + 0.12, title, fontsize=9.5, family="monospace")
    draw_losses(figure.box(0.6, below + 0.5, 3.9, 1.85), steps)
    draw_probes(figure.box(5.2, below + 0.5, 1.7, 1.85), probes, last)
    draw_rates(figure.box(7.45, below + 0.5, 1.6, 1.85), rates_by_part(steps), "step")
    draw_strip(figure, strip, below, 0.6, 0.98)
    return figure


def draw_strip(
    figure: Plot, strip: Mapping[str, Sequence[Picture]], below: float, left: float, pitch: float
) -> None:
    """Columns of samples under their labels, the first a little apart; inches, from `below` down and `left` on."""
    for column, (label, pictures) in enumerate(strip.items()):
        edge = left + pitch * column + (0.12 if column else 0)
        figure.write(edge + 0.46, below - 0.08, label, ha="center", color=MUTED, fontsize=8)
        for row, picture in enumerate(pictures):
            draw_picture(figure.box(edge, below - 0.2 - 0.98 * row - 0.92, 0.92, 0.92), picture)


def paired_runs(losses: Mapping, probes: Mapping) -> Figure:
    """Run b - run a by step, of the training loss and of the held-out one; below zero b is better.

    `losses` and `probes` map steps to `lora_nb.probe.Paired`; either may be empty. The band is two standard errors.
    """
    figure = Plot(7.6, 2.65)
    axes = tidy(figure.box(0.75, 0.5, 3.9, 1.8), "Training loss, b - a", "step", "")
    if losses:
        mean = [pair.mean for pair in losses.values()]
        axes.plot(list(losses), mean, color="#c4c4c4", linewidth=0.8, label="each step")
        axes.plot(list(losses), smooth(mean), color=ADAPTER, linewidth=1.8, label="smoothed")
        legend(axes)
    else:
        nothing_yet(axes, "does not pair")
    other = tidy(figure.box(5.5, 0.5, 1.95, 1.8), "Held-out loss, b - a", "step", "")
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
        nothing_yet(other, "does not pair")
    for each, drawn in ((axes, losses), (other, probes)):
        if drawn:
            each.axhline(0, color=BASE, linewidth=1)
            each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    return figure


def loss_curve(losses: Sequence[float]) -> Figure:
    """The loss of every step, unsmoothed: for a batch that stays the same."""
    figure = Plot(5.2, 2.4)
    axes = tidy(figure.box(0.7, 0.5, 4.3, 1.55), "Loss on one batch", "step", "loss (MSE)")
    axes.plot(range(1, len(losses) + 1), losses, color=ADAPTER, linewidth=1.8)
    axes.set_ylim(0, 1.08 * max(losses))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def learning_rate_curve(rates: Sequence[float] | Mapping[str, Sequence[float]]) -> Figure:
    """The learning rate at every step; a mapping draws one line per trained part."""
    rates = rates if isinstance(rates, Mapping) else {"learning rate": rates}
    figure = Plot(5.2, 2.4)
    curves = {part: (range(1, len(values) + 1), values) for part, values in rates.items()}
    draw_rates(figure.box(0.7, 0.5, 4.3, 1.55), curves, "step")
    return figure


def shown_samples(
    samples: Mapping[str, Sequence[Picture]], columns: int = 8, rows: int = 3
) -> dict[str, Sequence[Picture]]:
    """The first label and the latest others that fit, each with its first `rows` pictures."""
    labels = list(samples)
    kept = labels[:1] + labels[1:][-(columns - 1) :]
    return {label: samples[label][:rows] for label in kept}


def draw_losses(axes: Axes, steps: Sequence[Mapping]) -> None:
    """Training loss by step, as it is and smoothed, from events "step"."""
    tidy(axes, "Training loss", "step", "loss (MSE)")
    if not steps:
        return nothing_yet(axes, "no step yet")
    x, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(x, losses, color="#c4c4c4", linewidth=0.8, label="each step")
    axes.plot(x, smooth(losses), color=ADAPTER, linewidth=1.8, label="smoothed")
    low, high = np.quantile(losses, [0.0, 0.99])  # one spike must not flatten the curve
    axes.set_ylim(max(0, low - 0.1 * (high - low)), high + 0.15 * (high - low) + 1e-9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    legend(axes)


def draw_probes(axes: Axes, probes: Sequence[Mapping], last: int) -> None:
    """Held-out loss minus the base's with two standard errors, from events "probe"; `last` is where the axis ends."""
    tidy(axes, "Held-out loss minus base", "step", "")
    if not probes:
        return nothing_yet(axes, "no probe yet")
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


def draw_rates(axes: Axes, curves: Mapping[str, tuple], x: str) -> None:
    """Learning rates, a curve for each trained part: its steps and its values."""
    tidy(axes, "Learning rate", x, "")
    if not curves:
        return nothing_yet(axes, "no step yet")
    for (part, (steps, values)), colour in zip(curves.items(), SERIES * len(curves), strict=False):
        axes.plot(steps, values, color=colour, linewidth=1.6, label=part)
    headroom = 1.1 + 0.17 * len(curves) * (len(curves) > 1)  # for the legend
    axes.set_ylim(0, headroom * max(max(values) for _, values in curves.values()) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    if len(curves) > 1:
        legend(axes, columns=1, loc="upper right", borderaxespad=0)


def rates_by_part(steps: Sequence[Mapping]) -> dict[str, tuple[list, list]]:
    """By part, steps and learning rates, from events "step"."""
    curves: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for line in steps:
        for part, rate in line["lr"].items():
            curves[part][0].append(line["step"])
            curves[part][1].append(rate)
    return curves
