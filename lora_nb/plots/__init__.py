"""Every figure of the course, each returned as a matplotlib Figure that shows itself in a notebook.

`pictures` shows pictures, `training` curves by step, `timesteps` curves by noise, `adapters` what is in a LoRA,
`comparisons` what was varied; all draw with the `strokes`.
No pyplot, so there is no global state and no backend to choose: a figure is built, displayed and
forgotten. Nothing here computes a result; what is drawn comes from the caller or the history.
"""

from lora_nb.plots.adapters import (
    overlap_bars,
    parameter_bars,
    rank_xray,
    singular_values,
    strength_bars,
)
from lora_nb.plots.comparisons import rank_rate_map, rank_study, score_curves
from lora_nb.plots.pictures import (
    before_after_grid,
    contact_sheet,
    noise_ladder,
    picture_grid,
    scale_sweep_grid,
)
from lora_nb.plots.strokes import MINUS, PIXELS_PER_INCH, Picture, Plot
from lora_nb.plots.timesteps import loss_by_timestep, probe_by_timestep, snr_by_draw
from lora_nb.plots.training import (
    learning_rate_curve,
    loss_curve,
    paired_runs,
    training_figure,
)

__all__ = [
    "MINUS",
    "PIXELS_PER_INCH",
    "Picture",
    "Plot",
    "before_after_grid",
    "contact_sheet",
    "learning_rate_curve",
    "loss_by_timestep",
    "loss_curve",
    "noise_ladder",
    "overlap_bars",
    "paired_runs",
    "parameter_bars",
    "picture_grid",
    "probe_by_timestep",
    "rank_rate_map",
    "rank_study",
    "rank_xray",
    "scale_sweep_grid",
    "score_curves",
    "singular_values",
    "snr_by_draw",
    "strength_bars",
    "training_figure",
]
