"""What a settings panel says of a config before anything is trained: file size, learning-rate curve, time, memory."""

from html import escape

from lora_nb import adapters
from lora_nb.config import TrainConfig
from lora_nb.families import Family
from lora_nb.forecast import Forecast
from lora_nb.forecast.result import fits, gib, span
from lora_nb.optimization import learning_rate_factors
from lora_nb.sweep import Sweep
from lora_nb.widgets.map import caption, strip
from lora_nb.widgets.pictures import img

Counts = dict[str, list[adapters.ModuleCount]]  # by part
TRAINED = 16  # bytes for a trainable number: weight, gradient and two moments in float32


def parameters(counts: Counts) -> int:
    """Trainable numbers of all parts together."""
    return sum(count.parameters for part in counts.values() for count in part)


def file_size(counts: Counts) -> int:
    """Bytes of the adapter file, within one per cent: four for each weight, then names, shapes and settings."""
    return 4 * parameters(counts) + sum(_header(part, rows) for part, rows in counts.items())


def _header(part: str, rows: list[adapters.ModuleCount]) -> int:
    """Bytes that name and describe a part's tensors, two to a layer; diffusers' names are longer in text encoders."""
    text = part.startswith("text_encoder")
    named = sum(len(part) + len(row.name) + (93 if text else 79) for row in rows)
    return 2 * named + (1950 if text else 1590)


def rate_curve(config: TrainConfig, width: int = 240, height: int = 60) -> str:
    """A small picture of the learning rate over the steps with both ends of its axes, and its peak in words."""
    total = config.max_train_steps
    if total is None:
        return f"learning rate {config.learning_rate:.3g}, {config.lr_scheduler}; steps follow from the epochs"
    factor = learning_rate_factors(config, total)
    factors = [factor(step) for step in range(total)]
    points = [(i, factors[i * (total - 1) // width]) for i in range(width + 1)]
    top = max(1.0, *factors)
    left, bottom, right = 56, height + 6, 56 + width
    line = " ".join(f"{left + x},{6 + height * (1 - y / top):.1f}" for x, y in points)
    ends = (
        (left - 5, 10, f"{config.learning_rate * top:.3g}"),
        (left - 5, bottom, "0"),
        (left + 36, bottom + 14, "step 1"),
        (right, bottom + 14, f"{total}"),
    )
    words = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in ends)
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 8}" height="{bottom + 20}">'
        f'<path d="M{left} {bottom}H{right}M{left} 6V{bottom}" stroke="#b8b8b8" fill="none"/>'
        f'<polyline points="{line}" stroke="#0072b2" stroke-width="2" fill="none"/>'
        f'<g font-family="sans-serif" font-size="11" fill="#808080" text-anchor="end">{words}</g></svg>'
    )
    said = f"learning rate at most {config.learning_rate * max(factors):.3g} in {total} steps"
    if min(factors) == max(factors):
        said = f"learning rate {config.learning_rate:.3g} in all {total} steps"
    if max(factors) < 1:
        said += f"; it never reaches {config.learning_rate:.3g}, the warm-up is longer than the run"
    return f"{img(drawing.encode(), 'svg+xml', 'alt=learning-rate-curve')}<br>{escape(said)}"


def cost(
    forecast: Forecast, measured: TrainConfig, config: TrainConfig, family: Family | None
) -> str:
    """Time and memory of a config, reckoned from the forecast that was measured for another one."""
    about = "" if config == measured else "about "
    memory = scaled_memory(forecast, measured, config, family)
    verdict = "fits" if fits(memory, forecast.memory_total) else "<b>does not fit</b>"
    return (
        f"{about}<b>{span(scaled_seconds(forecast, measured, config))}</b>, {about}<b>{gib(memory)}</b> of "
        f"{gib(forecast.memory_total)} at most: {verdict}"
    )


def scaled_seconds(forecast: Forecast, measured: TrainConfig, config: TrainConfig) -> float:
    """The measured time with its steps as many and as large as the config says; the rest as it was."""
    steps = forecast.steps
    if config.max_train_steps and measured.max_train_steps:
        steps *= config.max_train_steps / measured.max_train_steps
    larger = config.train_batch_size / measured.train_batch_size
    return forecast.seconds - forecast.training + steps * forecast.seconds_per_step * larger


def scaled_memory(
    forecast: Forecast, measured: TrainConfig, config: TrainConfig, family: Family | None
) -> int:
    """The measured peak: the base's weights stay, adapters grow with their count, the rest with the batch."""
    if family is None:
        return forecast.peak_memory
    before, after = (TRAINED * parameters(counts(family, c)) for c in (measured, config))
    modules = family.pipeline().components.values()
    weights = sum(
        weight.numel() * weight.element_size()
        for module in modules
        if hasattr(module, "parameters")
        for weight in module.parameters()
    )
    rest = max(0, forecast.peak_memory - weights - before)
    return int(weights + after + rest * config.train_batch_size / measured.train_batch_size)


def counts(family: Family, config: TrainConfig) -> Counts:
    """The layers that would get LoRA, by part, counted on the family's modules."""
    return {
        part: adapters.forecast(
            family.trainable[part], spec.target_modules or family.targets[part], spec.rank
        )
        for part, spec in config.lora.items()
    }


def nearest(sweep: Sweep, rank: int, learning_rate: float) -> str:
    """Pictures and scores of the measured cell that is closest to a setting, the base model's pictures above."""
    cell = sweep.nearest(rank, learning_rate)
    return (
        f"<b>nearest measured:</b> {escape(caption(cell))}<br>"
        f"<small>base model</small><br>{strip(sweep, sweep.base)}<br>{strip(sweep, cell)}"
    )
