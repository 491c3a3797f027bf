"""The learning rates in force: their peaks, the schedule, and what was changed in mid-run."""

import math

from lora_nb.config import TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.optimization import learning_rate_factors
from lora_nb.run_folder import History


class LearningRates:
    """The learning rate of each part in each step.

    peaks: by part, before the schedule. changes: by step, what multiplies all of them from the next step on.
    """

    def __init__(self, config: TrainConfig, peaks: dict[str, float], total: int, history: History):
        self.peaks, self.history = peaks, history
        self.schedule = learning_rate_factors(config, total)
        self.changes: dict[int, float] = {}
        self._wanted: float | None = None

    def of_step(self, done: int) -> dict[str, float]:
        """By part, the learning rate of step done + 1."""
        return {part: peak * self.factor(done) for part, peak in self.peaks.items()}

    def factor(self, done: int) -> float:
        """What multiplies the peak learning rates in step done + 1: the schedule, and what was changed in mid-run."""
        return self.schedule(done) * self._changed_by(done)

    def _changed_by(self, done: int) -> float:
        changed = [step for step in self.changes if step <= done]
        return self.changes[max(changed)] if changed else 1.0

    def in_force(self, done: int) -> float:
        """What step done + 1 is multiplied by besides its schedule; 1 if nothing was changed."""
        return self._changed_by(done) if self._wanted is None else self._wanted

    def multiply(self, factor: float) -> None:
        """From the next step on all learning rates are `factor` times what the config says; 1 undoes it.

        May be called from another thread. It becomes an event "change" in history.jsonl, which a resumed run keeps.
        With several processes each must call it. Raises ConfigError unless factor is finite and above 0.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(
                f"The learning rate cannot be multiplied by {factor}; choose a finite number above 0."
            )
        self._wanted = float(factor)

    def take_wanted(self, done: int) -> None:
        """Between two steps: what `multiply` asked for since the last time is in force from here on."""
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self.plan({done: wanted})

    def plan(self, changes: dict[int, float]) -> None:
        """Change the learning rate after the steps of `changes` by its factors, as `multiply` would."""
        for step, factor in changes.items():
            if self.changes.get(step) == factor:  # known, and in the history already
                continue
            self.changes[step] = factor
            self.history.record("change", step=step, learning_rate_factor=factor)

    def always_zero(self, total: int) -> bool:
        """Whether nothing could be learned in the first `total` steps."""
        factors = [self.factor(done) for done in range(total)]
        return not any(self.peaks.values()) or not any(factors)
