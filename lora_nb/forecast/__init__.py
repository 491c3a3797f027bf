"""What a run will cost before it starts: seconds, memory, and what to change if it does not fit."""

from lora_nb.forecast.preflight import preflight
from lora_nb.forecast.result import Forecast, Rung

__all__ = ["Forecast", "Rung", "preflight"]
