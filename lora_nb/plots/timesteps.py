"""Figures over the timestep, or the noise that it stands for: losses, the probe, signal-to-noise ratios."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lora_nb.plots.strokes import ADAPTER, BASE, MUTED, SECOND, SERIES, Plot, legend, tidy


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
    axes = tidy(figure.box(0.7, 0.5, 4.3, 1.75), "Loss by timestep", "timestep", "loss (MSE)")
    axes.scatter(t, loss, s=6, color=BASE, alpha=0.35, linewidths=0, label="one picture")
    axes.fill_between(centre, mean - error, mean + error, color=ADAPTER, alpha=0.2, linewidth=0)
    axes.plot(centre, mean, color=ADAPTER, marker="o", markersize=3.5, label="mean")
    axes.set_ylim(0, max(np.quantile(loss, 0.98), (mean + error).max()) * 1.08)
    legend(axes)
    return figure


def probe_by_timestep(by_timestep: Sequence[tuple[float, float, float]], bins: int = 8) -> Figure:
    """Held-out loss by timestep, and below it the change against the base in per cent.

    `by_timestep` is a ProbeResult's: (timestep, loss with adapter, loss of the base), one per draw.
    """
    draws = np.asarray(by_timestep, dtype=float)
    slices = _slices(draws[:, 0], bins)
    t, adapter, base = np.array([draws[part].mean(axis=0) for part in slices]).T
    figure = Plot(5.2, 3.5)
    axes = tidy(figure.box(0.7, 1.75, 4.3, 1.4), "Held-out loss by timestep", "", "loss (MSE)")
    axes.plot(t, base, color=BASE, marker="o", markersize=3.5, label="base model")
    axes.plot(t, adapter, color=ADAPTER, marker="o", markersize=3.5, label="with adapter")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)
    legend(axes)
    change = 100 * (adapter / base - 1)
    lower = tidy(figure.box(0.7, 0.5, 4.3, 1.0), "", "timestep", "change (%)")
    # blue: better than the base; orange: worse
    colours = [ADAPTER if value <= 0 else SECOND for value in change]
    lower.bar(t, change, width=0.6 * np.ptp(t) / max(len(t) - 1, 1) or 1, color=colours)
    lower.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(lower.get_xlim())
    return figure


def snr_by_draw(snr: Mapping[str, Sequence[float]]) -> Figure:
    """The signal-to-noise ratios that training draws, one line per name, the cleanest draw first.

    A steep line draws all ratios alike; a flat one dwells on the ratio where it is flat.
    """
    figure = Plot(6.2, 2.7)
    axes = figure.box(0.7, 0.5, 4.1, 1.85)
    tidy(axes, "How much picture is left", "share of the draws", "signal-to-noise ratio")
    for (name, values), colour in zip(snr.items(), SERIES * len(snr), strict=False):
        # a ratio of 0 has no place on a log axis
        ordered = np.sort(np.clip(np.asarray(values, dtype=float), 1e-4, 1e4))[::-1]
        axes.plot(np.linspace(0, 1, len(ordered)), ordered, color=colour, lw=1.6, label=name)
    axes.set_yscale("log")
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle="--")
    legend(axes, columns=1, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _slices(values: np.ndarray, bins: int) -> list[np.ndarray]:
    """Positions of the values in order, cut into at most `bins` slices of about equal count."""
    return [part for part in np.array_split(np.argsort(values), bins) if len(part)]
