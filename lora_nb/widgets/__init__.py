"""What a learner touches in a notebook: a settings panel, a live board for training, a scale slider.

Only widgets that ipywidgets 7.7 (Colab) and 8 share are used, and nothing waits for a click.
Figures come from `plots`, results from elsewhere.
"""

from lora_nb.widgets.board import LiveBoard
from lora_nb.widgets.explorer import ScaleExplorer, scrubber_html
from lora_nb.widgets.panel import ConfigPanel

__all__ = ["ConfigPanel", "LiveBoard", "ScaleExplorer", "scrubber_html"]
