"""What a run leaves for people to read: one HTML page, and the model card that goes with the adapter file.

Both are made from the run's folder alone (config, history, samples) and the licences beside data and base model, and
name no absolute path and no user. Figures are in `plots`, numbers in history.jsonl.
"""

from lora_nb.report.card import write_card
from lora_nb.report.compare import Comparison, compare
from lora_nb.report.facts import Run
from lora_nb.report.page import write_report

__all__ = ["Comparison", "Run", "compare", "write_card", "write_report"]
