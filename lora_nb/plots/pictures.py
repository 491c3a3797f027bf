"""Figures of pictures: grids with labels, contact sheets, before and after, scales, rising noise."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from lora_nb.plots.strokes import Picture, Plot, draw_picture, indent_for, wrap


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
    wrapped = [wrap(caption, size) for caption in captions]
    top = 0.07 + 0.14 * max(label.count("\n") + 1 for label in wrapped)
    step, rows = size + 0.06, -(-len(pictures) // columns)
    figure = Plot(step * min(columns, len(pictures)) + 0.04, (step + top) * rows + 0.04)
    for index, (picture, label) in enumerate(zip(pictures, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, bottom = 0.04 + step * column, (step + top) * (rows - 1 - row) + 0.04
        figure.write(
            left + size / 2, bottom + size + 0.04, label, ha="center", va="bottom", fontsize=8
        )
        draw_picture(figure.box(left, bottom, size, size), picture)
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


def _grid(rows, row_labels, column_labels, title, size) -> Figure:
    columns = max(len(row) for row in rows)
    wrapped = [wrap(label, size) for label in column_labels]
    left = indent_for(row_labels)
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
                draw_picture(figure.box(left + step * column, bottom, size, size), picture)
    return figure
