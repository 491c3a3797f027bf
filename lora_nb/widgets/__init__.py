"""What a learner touches in a notebook: a settings panel, a live board for training, a scale slider.

Only widgets that ipywidgets 7.7 (Colab) and 8 share are used, and nothing waits for a click.
Figures come from `plots`, results from elsewhere.
"""

from lora_nb.widgets.board import LiveBoard
from lora_nb.widgets.control import BackgroundBoard, run_in_background
from lora_nb.widgets.explorer import ScaleExplorer, WeightExplorer, scrubber_html
from lora_nb.widgets.map import RankRateMap
from lora_nb.widgets.panel import ConfigPanel

__all__ = [
    "BackgroundBoard",
    "ConfigPanel",
    "LiveBoard",
    "RankRateMap",
    "ScaleExplorer",
    "WeightExplorer",
    "run_in_background",
    "scrubber_html",
]
