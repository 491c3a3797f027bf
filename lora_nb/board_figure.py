"""The live board's figure: what a training does now, from lines of history.jsonl and the run's sample pictures.

Drawn with the strokes of `plots`, in one PNG: losses above, then learning rate, gradients and blocks, then the samples.
"""

from collections.abc import Mapping, Sequence

from lora_nb.metrics import smooth
from lora_nb.plots.adapters import after_the_middle
from lora_nb.plots.strokes import (
    FAINT,
    INK,
    MUTED,
    SERIES,
    Axes,
    Picture,
    Plot,
    logarithmic,
    nothing_yet,
    tidy,
    wrap,
)
from lora_nb.plots.training import (
    draw_losses,
    draw_probes,
    draw_rates,
    draw_strip,
    rates_by_part,
    shown_samples,
)
from lora_nb.run_folder import by_step

WIDTH = 9.4  # inches
BRANCHINGS = {"resume": "resumed", "fork": "forked"}
MOST_BARS = 26  # blocks whose names still fit below their bars


def board_figure(
    events: Sequence[Mapping],
    samples: Mapping[str, Sequence[Picture]] | None = None,
    best: int = 0,
    prompts: Sequence[str] = (),
) -> Plot:
    """Training and held-out loss, learning rate, gradient norm and change per block, and a strip of samples.

    events: lines of history.jsonl. samples: by label ("base", "step 100") pictures in prompt order. best: the step
    whose probe is marked as the best. prompts: one per row of pictures, written beside it.
    """
    steps, probes = (list(by_step(events, kind).values()) for kind in ("step", "probe"))
    last = max((line["step"] for line in [*steps, *probes]), default=1)
    strip = shown_samples(samples or {})
    rows = max((len(column) for column in strip.values()), default=0)
    below = 0.34 + 0.98 * rows if rows else 0.0
    figure = Plot(WIDTH, 4.42 + below)
    upper, lower = below + 2.62, below + 0.62
    _losses(figure.box(0.62, upper, 4.9, 1.5), steps, events)
    _probes(figure.box(6.35, upper, 2.9, 1.5), probes, last, best)
    colours = _colours(steps)
    _rates(figure.box(0.62, lower, 2.0, 1.3), steps)
    _gradients(figure.box(3.32, lower, 2.2, 1.3), steps, colours)
    _blocks(figure.box(6.35, lower, 2.9, 1.3), steps, colours)
    for row, prompt in enumerate(prompts[:rows]):
        middle = below - 0.2 - 0.98 * row - 0.46
        style = {"ha": "right", "rotation": 90, "fontsize": 7, "multialignment": "center"}
        figure.write(0.5, middle, wrap(prompt, 0.92), **style)
    draw_strip(figure, strip, below, 0.65, 1.08)
    return figure


def _colours(steps: Sequence[Mapping]) -> dict[str, str]:
    """One colour per trained part, the same in every box."""
    parts = list(steps[-1]["lr"]) if steps else []
    return dict(zip(parts, SERIES * len(parts), strict=False))


def _too_short(axes: Axes, title: str, steps: Sequence[Mapping]) -> bool:
    """Whether there is no curve yet; then the box says so."""
    if len(steps) < 2:
        tidy(axes, title, "step", "")
        nothing_yet(axes, "after two steps")
    return len(steps) < 2


def _losses(axes: Axes, steps: Sequence[Mapping], events: Sequence[Mapping]) -> None:
    if _too_short(axes, "Training loss", steps):
        return
    draw_losses(axes, steps)
    for event in events:
        if event["event"] in BRANCHINGS and event["step"] > 0:
            _mark(axes, event["step"], BRANCHINGS[event["event"]])
        if event["event"] == "change":
            _mark(axes, event["step"], f"rate x {event['learning_rate_factor']:.2g}")


def _mark(axes: Axes, step: int, text: str) -> None:
    """A line between this step and the next, with what happened there."""
    axes.axvline(step + 0.5, color=MUTED, linewidth=0.7, linestyle=":")
    axes.text(step + 0.5, 0.98, f" {text}", transform=axes.get_xaxis_transform(), va="top",
              fontsize=6.5, color=MUTED, rotation=90)  # fmt: skip


def _probes(axes: Axes, probes: Sequence[Mapping], last: int, best: int) -> None:
    draw_probes(axes, probes, last)
    marked = [line for line in probes if line["step"] == best]
    if marked and len(probes) > 2:
        place = (best, marked[0]["difference"])
        axes.plot(*place, "o", ms=9, mfc="none", mec=INK, mew=1, zorder=5)
        axes.annotate("best", place, (0, 8), textcoords="offset points", ha="center", fontsize=7.5)


def _rates(axes: Axes, steps: Sequence[Mapping]) -> None:
    if not _too_short(axes, "Learning rate", steps):
        draw_rates(axes, rates_by_part(steps), "step")


def _gradients(axes: Axes, steps: Sequence[Mapping], colours: Mapping[str, str]) -> None:
    if _too_short(axes, "Gradient norm", steps):
        return
    tidy(axes, "Gradient norm", "step", "")
    x = [line["step"] for line in steps]
    norms = {part: [line["grad_norms"].get(part, 0.0) for line in steps] for part in colours}
    for part, colour in colours.items():
        axes.plot(x, norms[part], color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(x, smooth(norms[part]), color=colour, linewidth=1.6, label=part)
    low, high = (end(map(end, norms.values())) for end in (min, max))
    if low > 0:
        logarithmic(axes, low, high)
    axes.locator_params(axis="x", integer=True, nbins=5)


def _blocks(axes: Axes, steps: Sequence[Mapping], colours: Mapping[str, str]) -> None:
    """How far each block has come, as data flows through the parts."""
    measured = [line for line in steps if line.get("health")]
    step = f" (step {measured[-1]['step']})" if measured else ""
    tidy(axes, f"Change per block{step}", "", "|BA| / |W| (%)")
    if not measured:
        return nothing_yet(axes, "not measured yet")
    change = measured[-1]["health"]["change"]
    bars = [
        (part, block, 100 * blocks[block])
        for part, blocks in change.items()
        for block in sorted(blocks, key=after_the_middle)
    ]  # in the colours of the learning rates
    axes.bar(range(len(bars)), [b[2] for b in bars], color=[colours[b[0]] for b in bars], width=0.7)
    named = len(bars) <= MOST_BARS
    axes.set_xticks(range(len(bars)) if named else [], [_short(b[1]) for b in bars] * named)
    axes.tick_params(axis="x", rotation=90, labelsize=6.5, length=0, pad=1)
    axes.grid(axis="x", color=FAINT, linewidth=0)


def _short(block: str) -> str:
    """ "down_blocks.0" -> "down 0", "mid_block.attentions.0" -> "mid", "encoder.layers.3" -> "layer 3"."""
    words = block.removeprefix("text_model.").removeprefix("encoder.").split(".")
    name = words[0].removesuffix("_blocks").removesuffix("_block").removesuffix("s")
    return name if words[0].endswith("_block") or len(words) == 1 else f"{name} {words[-1]}"
