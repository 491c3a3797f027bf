"""Draw the README's pictures from what notebooks have left.

python scripts/figure.py before-after [RUN_FOLDER]       the adapter of `make course` (default runs/course/ink)
python scripts/figure.py rank-and-rate [SWEEP_FOLDER]    the map of notebook 05 (default runs/map)
"""

import sys
from pathlib import Path

from lora_nb import generate, load_pipeline, plots, preset, read_config, read_sweep
from lora_nb.data import load

REPO = Path(__file__).resolve().parents[1]
CONCEPTS = 8  # every k-th of the validation split, so that nothing is picked by hand
SEED = 0


def before_after(run: Path) -> plots.Plot:
    """Base, adapter and true drawing of every k-th held-out concept, all at the same seed."""
    tiny, config = preset("tiny"), read_config(run)
    rows = load(config.data, "validation").rows
    rows = rows[:: len(rows) // CONCEPTS][:CONCEPTS]
    captions = [row.caption for row in rows]
    sampling = tiny.sampling
    pipeline = load_pipeline(tiny.model, adapter=run)
    before, after = (generate(pipeline, captions, SEED, scale=s, **sampling) for s in (0.0, 1.0))
    names = [str(row.extra["concept"]) for row in rows]
    return plots.before_after_grid(before, after, names, true=[row.file for row in rows])


def rank_and_rate(sweep: Path) -> plots.Plot:
    """The map as the notebook shows it; its cells are printed."""
    found = read_sweep(sweep)
    for cell in found.cells:
        print(cell)
    return plots.rank_rate_map(found, shown=3)


FIGURES = {"before-after": (before_after, "course/ink"), "rank-and-rate": (rank_and_rate, "map")}


def main(name: str, folder: str | None = None) -> None:
    """Write docs/<name>.png."""
    draw, usual = FIGURES[name]
    figure = draw(Path(folder) if folder else REPO / "runs" / usual)
    (REPO / "docs" / f"{name}.png").write_bytes(figure.png())


if __name__ == "__main__":
    main(*sys.argv[1:])
