"""Draw docs/before-after.png, the README's picture, from the adapter that `make course` trained.

python scripts/figure.py [RUN_FOLDER]   (default runs/course/ink)
"""

import sys
from pathlib import Path

from lora_nb import generate, load_pipeline, plots, preset, read_config
from lora_nb.data import load

REPO = Path(__file__).resolve().parents[1]
CONCEPTS = 8  # every k-th of the validation split, so that nothing is picked by hand
SEED = 0


def main(run: Path) -> None:
    """Base, adapter and true drawing of every k-th held-out concept, all at the same seed."""
    tiny, config = preset("tiny"), read_config(run)
    rows = load(config.data, "validation").rows
    rows = rows[:: len(rows) // CONCEPTS][:CONCEPTS]
    captions = [row.caption for row in rows]
    sampling = tiny.sampling
    pipeline = load_pipeline(tiny.model, adapter=run)
    before, after = (generate(pipeline, captions, SEED, scale=s, **sampling) for s in (0.0, 1.0))
    names = [str(row.extra["concept"]) for row in rows]
    figure = plots.before_after_grid(before, after, names, true=[row.file for row in rows])
    (REPO / "docs").mkdir(exist_ok=True)
    (REPO / "docs" / "before-after.png").write_bytes(figure.png())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "runs" / "course" / "ink")
