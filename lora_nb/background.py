"""A training in a thread of its own: start, pause, go on, stop, another learning rate, while the notebook stays free.

No widgets here: `widgets.run_in_background` puts buttons on it. What is asked takes effect between two steps.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_nb import stopping
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError
from lora_nb.inference import with_samples
from lora_nb.trainer import Step, Training, train

READY, LOADING, RUNNING, PAUSED = "ready", "loading", "running", "paused"
STOPPED, FINISHED, FAILED = "stopped", "finished", "failed"
ALIVE = (LOADING, RUNNING, PAUSED)
PATIENCE = 20.0  # seconds that the end of the interpreter waits for a step and its checkpoint

_LIVING: weakref.WeakSet["BackgroundTraining"] = weakref.WeakSet()


class BackgroundTraining:
    """A training of `config` in a thread: the same steps, files and bits as in the foreground.

    state: "ready", then "loading", "running", "paused", and at last "stopped", "finished" or "failed" (`error` says
    why). on_step(step) and on_state(state) are called in that thread. `training` is there once it has loaded.
    Randomness is by counter, so what other cells draw in the meantime changes nothing; only LoRA dropout uses torch's
    global stream, so with it leave that stream alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_step: Callable[[Step], Any] = lambda step: None,
        on_state: Callable[[str], Any] = lambda state: None,
    ):
        self.config, self._on_step, self._on_state = config, on_step, on_state
        self.training: Training | None = None
        self.state, self.error = READY, None
        self._factor: float | None = None
        self._go, self._stop, self._thread = threading.Event(), threading.Event(), None

    def start(self) -> None:
        """Begin, or go on with a run that was stopped; raises CheckpointError while it is running."""
        if self.state in ALIVE:
            raise CheckpointError(
                f"This training is {self.state} already; stop it before you start it again."
            )
        _stop_at_exit()
        self._stop.clear()
        self._go.set()
        self.error = None
        self._enter(LOADING)
        self._thread = threading.Thread(target=self._work, name="lora_nb training", daemon=True)
        _LIVING.add(self)
        self._thread.start()

    def pause(self) -> None:
        """Wait after the step in progress, with a checkpoint on the disk."""
        self._go.clear()

    def go_on(self) -> None:
        """End a pause."""
        self._go.set()

    def stop(self) -> None:
        """Finish the step in progress, leave a checkpoint and end; `start` or the same config then goes on."""
        self._stop.set()
        if self.training is not None:
            self.training.interrupted = True
        self._go.set()

    def multiply_learning_rate(self, factor: float) -> None:
        """From the next step on all learning rates are `factor` times the config's; see LearningRates."""
        if self.state in ALIVE and self.training is not None:
            self.training.rates.multiply(factor)
        else:
            self._factor = factor

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread; whether it has ended. Raises what ended it, if that was an error."""
        if self._thread is not None:
            self._thread.join(seconds)
        if self.error is not None:
            raise self.error
        return self.state not in ALIVE

    def _work(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = error
            self._enter(FAILED)

    def _train(self) -> None:
        before = self.training
        training = self.training = train(self.config, before and before.family)
        # A second start goes on: it must not begin anew, nor from an older checkpoint again.
        self.config = training.config.replace(overwrite=False, resume_from_checkpoint=None)
        if self._factor is not None:
            training.rates.multiply(self._factor)
            self._factor = None
        self._enter(RUNNING)
        with closing(with_samples(training)) as steps:
            for step in () if self._stop.is_set() else steps:
                self._on_step(step)
                self._wait()
                if self._stop.is_set():
                    break
        self._enter(FINISHED if training.done >= training.max_train_steps else STOPPED)

    def _wait(self) -> None:
        """Hold between two steps while paused."""
        if self._go.is_set():
            return
        self.training.save()
        self.training.history.record("pause", step=self.training.done)
        self._enter(PAUSED)
        self._go.wait()
        if not self._stop.is_set():
            self.training.history.record("go on", step=self.training.done)
            self._enter(RUNNING)

    def _enter(self, state: str) -> None:
        self.state = state
        self._on_state(state)


def living(folder: str | Path) -> BackgroundTraining | None:
    """The training that this process has going, or paused, in a run's folder."""
    for run in list(_LIVING):
        if run.state in ALIVE and Path(run.config.output_dir).resolve() == Path(folder).resolve():
            return run
    return None


@functools.cache
def _stop_at_exit() -> None:
    stopping.before_exit(_stop_all)


def _stop_all() -> None:
    """Ask every living training to stop and wait for its checkpoint."""
    living = [worker for worker in _LIVING if worker.state in ALIVE]
    for worker in living:
        worker.stop()
    for worker in living:
        worker._thread.join(PATIENCE)
