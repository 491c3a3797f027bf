"""What is measured beside the training loss, when it is due: the probe, and the health of the adapters."""

import dataclasses
import warnings

from lora_nb import health
from lora_nb.cache import Cache
from lora_nb.config import TrainConfig
from lora_nb.data import Pictures
from lora_nb.errors import NumericsError
from lora_nb.health import Health
from lora_nb.learner import Learner
from lora_nb.offload import Offload
from lora_nb.probe import Probe, ProbeResult
from lora_nb.run_folder import History


class Monitor:
    """Looks at a run that has `total` steps and tells its history.

    probe: None before `start`, or without held-out pictures. last_probe: its last result.
    """

    def __init__(self, config: TrainConfig, learner: Learner, total: int, history: History):
        self.config, self.learner, self.total, self.history = config, learner, total, history
        self.probe: Probe | None = None
        self.last_probe: ProbeResult | None = None
        self.health = health.Watch(learner.family, learner.untrained)

    def start(
        self,
        done: int,
        held_out: Pictures | None,
        cache: Cache,
        offload: Offload | None = None,
    ) -> None:
        """Measure the base model on the held-out pictures, once; captions are kept as `cache` keeps them."""
        if self.probe is not None or held_out is None:
            return
        size, batch = self.config.probe_size, self.config.train_batch_size
        self.probe = Probe(
            self.learner.family, held_out, size, batch, cache.keep_captions, cache.disk, offload
        )
        if done == 0:
            self._record(self.probe.untrained())

    def probe_if_due(self, done: int) -> ProbeResult | None:
        """The probe every probe_steps steps and after the last one."""
        every = self.config.probe_steps
        due = done == self.total or (every and done % every == 0)
        if self.probe is None or not due:
            return None
        result = self.probe.measure(done)
        self._record(result)
        return result

    def _record(self, result: ProbeResult) -> None:
        self.history.record("probe", **dataclasses.asdict(result))
        self.last_probe = result

    def health_if_due(self, done: int) -> Health | None:
        """Now and then a look at all weights; a part that does not learn is said once."""
        if done not in (1, self.total) and done % health.EVERY:
            return None
        result = self.health()
        if done == health.SETTLED:
            for alarm in result.alarms(done):
                self.history.record("alarm", step=done, message=alarm)
                warnings.warn(alarm, stacklevel=3)
        return result

    def refuse_nothing_learned(self, done: int) -> None:
        """Raise NumericsError if the adapters still are the base model after the last step, and say why."""
        if not self.health().nothing_learned:
            return
        reason, rates = "no gradient reached it, or it is lost in rounding", self.learner.rates
        if rates.always_zero(self.total):
            reason = (
                f"the learning rate was 0 in every step (learning_rate {rates.peaks}, lr_scheduler "
                f"{self.config.lr_scheduler!r}, lr_warmup_steps {self.config.lr_warmup_steps})"
            )
        raise NumericsError(
            f"After {done} steps the adapter still does nothing (B is zero in every layer), because {reason}; so "
            "no adapter file was written. Change these settings and start anew with overwrite=True."
        )
