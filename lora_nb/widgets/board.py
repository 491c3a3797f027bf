"""A live board: progress, curves and sample pictures of a training while it runs."""

import time
from html import escape
from typing import Any

from IPython import get_ipython
from IPython.display import display

from lora_nb import plots
from lora_nb.env import headless
from lora_nb.inference import samples
from lora_nb.run_folder import read_history
from lora_nb.widgets.pictures import img


class LiveBoard:
    """Progress, curves and sample pictures of a training while it runs.

        with LiveBoard(training) as board:
            for step in with_samples(training):
                board.update(step)

    One output is redrawn, at most every `every` seconds and for at most a tenth of the time; what
    it shows is read from the run's folder. `close` leaves the last line and the figure as ordinary
    outputs. Without a person looking on it prints a line now and then. A fault in drawing is said
    once and never reaches the training loop.
    """

    def __init__(self, training: Any, every: float = 1.0):
        self._training, self._every = training, every
        self._plain, self._shell = headless(), get_ipython()
        self._handle, self._step, self._closed = None, None, False
        self._began, self._first, self._due, self._image = time.monotonic(), None, 0.0, b""

    def update(self, step: Any) -> None:
        """Take one step of the training; redraws if it is time."""
        self._step = step
        if self._first is None:  # the clock starts behind the first step, which fills the cache
            self._first, self._began = step.step, time.monotonic()
        if time.monotonic() >= self._due and not self._closed:
            self._safely(self._print if self._plain else self._draw)

    def close(self) -> None:
        """Leave the last line and the figure as real outputs; again does nothing."""
        if not self._closed:
            self._closed = True
            self._safely(self._leave)

    def line(self) -> str:
        """Where the training stands, like a progress bar in words."""
        step, total = self._step, self._training.max_train_steps
        rates = "/".join(f"{rate:.1e}" for rate in step.lr.values())
        filled = 16 * step.step // total
        return (
            f"step {step.step}/{total} [{'=' * filled}{'.' * (16 - filled)}] "
            f"loss {step.loss:.4f}  lr {rates}  {self._time()}"
        )

    def _time(self) -> str:
        left, done = self._training.max_train_steps - self._step.step, self._step.step - self._first
        if self._closed and left:
            return "stopped; run it again to go on"
        if not done:
            return "the clock starts now"
        spent = time.monotonic() - self._began
        pace = spent / done
        return f"{pace:.2f} s/step  {_clock(spent)} gone, {_clock(pace * left)} left"

    def figure(self) -> plots.Figure:
        """The curves and samples that the run's folder holds now."""
        folder = self._training.folder
        return plots.training_figure(read_history(folder), samples(folder))

    def __enter__(self) -> "LiveBoard":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _safely(self, act: Any) -> None:
        try:
            act()
        except Exception as fault:  # a picture is not worth a training
            self._closed = True
            print(f"The board stops ({type(fault).__name__}: {fault}); the training goes on.")

    def _print(self) -> None:
        print(self.line(), flush=True)
        self._wait(max(self._every, 10.0), since=time.monotonic())

    def _draw(self) -> None:
        began = time.monotonic()
        self._show(self.figure().png())
        self._wait(self._every, began)

    def _wait(self, every: float, since: float) -> None:
        now = time.monotonic()
        self._due = now + max(every, 9 * (now - since))

    def _show(self, png: bytes) -> None:
        line = self.line()
        page = f"<pre>{escape(line)}</pre>{img(png, 'png', 'style=max-width:920px;width:100%')}"
        bundle = {"text/plain": line, "text/html": page}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _leave(self) -> None:
        finished = self._training.start_step >= self._training.max_train_steps
        if self._step is None and not finished:
            return
        if self._step is None:
            print(f"All {self._training.max_train_steps} steps of this run are done already.")
        elif self._handle is None:
            print(self.line(), flush=True)
        else:
            self._handle.update({"text/plain": self.line()}, raw=True)
        if self._shell is not None:
            display(self.figure())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
