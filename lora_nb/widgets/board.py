"""A live board: progress, curves, blocks and sample pictures of a training while it runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython import get_ipython
from IPython.display import display

from lora_nb import plots
from lora_nb.board_figure import board_figure
from lora_nb.env import headless
from lora_nb.inference import samples
from lora_nb.run_folder import read_config
from lora_nb.widgets.standing import Standing

LINES = 10.0  # seconds between two lines where nobody looks on
SHARPNESS = 1.5  # pixels per page pixel while it moves; the finished figure has 2


class LiveBoard:
    """Progress, curves, change per block and sample pictures of a training while it runs.

        with LiveBoard(training) as board:
            for step in with_samples(training):
                board.update(step)

    What it shows is read from the run's folder, which may be given instead of the training. The numbers are
    redrawn at most every `every` seconds, the figure for at most a tenth of the time. `close` leaves both as
    ordinary outputs of the cell. Without a person looking on it prints a line now and then. A fault in drawing is
    said once and never reaches the training loop.
    """

    def __init__(self, training: Any, every: float = 1.0):
        self.folder = Path(getattr(training, "folder", training))
        self.standing, self._every, self._closed = Standing(self.folder), every, False
        self._plain, self._shell = headless(), get_ipython()
        self._head = self._figure = None  # display handles
        self._due, self._figure_due, self._seen, self._printed = 0.0, 0.0, False, 0

    def update(self, step: Any = None) -> None:
        """Look at the run after a step; redraws if it is time."""
        self._seen = True
        if time.monotonic() >= self._due and not self._closed:
            self._safely(self._print if self._plain else self._draw)

    def close(self) -> None:
        """Leave the last numbers and the figure as real outputs; again does nothing."""
        if not self._closed:
            self._closed = True
            self._safely(self._leave)

    def watch(self, alive: Callable[[], bool]) -> None:
        """Follow a run that another process trains, until alive() is false; then close."""
        with self:
            while alive():
                if self.standing.read().steps:
                    self.update()
                time.sleep(self._every)
            self._seen = self._seen or bool(self.standing.read().steps)

    def line(self) -> str:
        """Where the training stands, like a progress bar in words."""
        return self.standing.read().line(self._closed)

    def figure(self) -> plots.Plot:
        """The curves, blocks and samples that the run's folder holds now."""
        standing, prompts = self.standing.read(), []
        if standing.events:
            config = read_config(self.folder)
            each = range(config.num_validation_images)
            prompts = [prompt for prompt in config.validation_prompts for _ in each]
        return board_figure(standing.events, samples(self.folder), standing.best, prompts)

    def show(self, note: str = "") -> None:
        """Draw at once, with a note such as "paused" instead of the time that is left; the clock starts anew."""
        self.standing.note, self._closed = note, False
        self.standing.restart_clock()
        self._figure_due = 0.0
        if not self._plain:
            self._safely(self._draw)

    def __enter__(self) -> "LiveBoard":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _safely(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as fault:  # a picture is not worth a training
            self._closed = True
            print(f"The board stops ({type(fault).__name__}: {fault}); the training goes on.")

    def _print(self) -> None:
        print(self.line(), flush=True)
        self._printed = self.standing.done
        self._due = time.monotonic() + max(self._every, LINES)

    def _draw(self) -> None:
        self._due = _after(self._show_head, self._every)
        if time.monotonic() >= self._figure_due:
            due = _after(lambda: self._show_figure(SHARPNESS), self._every)
            # Before the second step there is no curve, so the one figure without any is replaced at the next look.
            self._figure_due = due if len(self.standing.read().steps) > 1 else 0.0

    def _show_head(self) -> None:
        standing = self.standing.read()
        line = standing.line(self._closed) if standing.steps else standing.note
        bundle = {"text/plain": line, "text/html": standing.html(self._closed)}
        self._head = _shown(self._head, bundle)

    def _show_figure(self, sharpness: float) -> None:
        figure = self.figure()
        width, height = (int(side * plots.PIXELS_PER_INCH) for side in figure.get_size_inches())
        bundle = {
            "text/plain": f"<board of {self.folder.name}>",
            "image/png": figure.png(sharpness),
        }
        size = {"image/png": {"width": width, "height": height}}
        self._figure = _shown(self._figure, bundle, size)

    def _leave(self) -> None:
        standing = self.standing.read()
        finished = bool(standing.steps) and standing.done >= standing.total
        if not self._seen and not finished:
            return
        if not self._seen:
            standing.note = f"All {standing.total} steps of this run are done already."
        if self._plain:
            if not finished or self._printed != standing.done:
                print(self.line() if self._seen else standing.note, flush=True)
            if self._shell is not None:
                display(self.figure())
        else:
            self._show_head()
            self._show_figure(2.0)


def _after(draw: Callable[[], None], every: float) -> float:
    """Draw; when to draw the next time, so that it takes at most a tenth of the time."""
    began = time.monotonic()
    draw()
    now = time.monotonic()
    return now + max(every, 9 * (now - began))


def _shown(handle: Any, bundle: dict[str, Any], metadata: dict[str, Any] | None = None) -> Any:
    """The handle of an output that now shows the bundle."""
    if handle is None:
        return display(bundle, raw=True, metadata=metadata, display_id=True)
    handle.update(bundle, raw=True, metadata=metadata)
    return handle
