"""Buttons for a training in the background: Start, Pause, Go on, Stop, and a live learning rate."""

from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display

from lora_nb import background, env
from lora_nb.background import BackgroundTraining
from lora_nb.config import TrainConfig
from lora_nb.inference import with_samples
from lora_nb.trainer import train
from lora_nb.widgets.board import LiveBoard

ENABLED = {  # by state, the buttons that can be pressed
    background.READY: ("Start",),
    background.LOADING: ("Stop",),
    background.RUNNING: ("Pause", "Stop"),
    background.PAUSED: ("Go on", "Stop"),
    background.STOPPED: ("Start",),
    background.FINISHED: (),
    background.FAILED: ("Start",),
}
ONWARD = "press Start, or run the cell again, to go on"
SAID = {
    background.READY: "ready: press Start",
    background.LOADING: "loading the base model ...",
    background.PAUSED: "paused after step {step}; its checkpoint is written",
    background.STOPPED: f"stopped after step {{step}}; {ONWARD}",
}


class BackgroundBoard(BackgroundTraining):
    """A training in the background with its buttons and its board; made by `run_in_background`.

    Buttons by name in `buttons`, the slider is `rate`: it multiplies the learning rates of the config, from the next
    step on. The methods start, pause, go_on, stop and join do what the buttons do.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config, self._stepped, self._entered)
        self.board = LiveBoard(Path(config.output_dir))
        acts = {"Start": self.start, "Pause": self.pause, "Go on": self.go_on, "Stop": self.stop}
        self.buttons = {name: ipywidgets.Button(description=name) for name in acts}
        for name, act in acts.items():
            self.buttons[name].on_click(lambda _, act=act: act())
        self.rate = ipywidgets.FloatLogSlider(
            value=1.0,
            min=-2,
            max=1,
            step=0.05,
            description="learning rate x",
            readout_format=".2f",
            continuous_update=False,
            style={"description_width": "8em"},
            layout={"width": "26em"},
        )
        self.said, self._following = ipywidgets.HTML(), False
        self.rate.observe(self._moved, "value")
        rows = [ipywidgets.HBox([*self.buttons.values()]), ipywidgets.HBox([self.rate, self.said])]
        self.widget = ipywidgets.VBox(rows)
        self._entered(self.state)

    def pause(self) -> None:
        """Wait after the step in progress, with a checkpoint on the disk."""
        super().pause()
        self.board.standing.note = "pausing after this step ..."

    def show(self) -> None:
        """Put buttons and board below this cell; an older board stays as it is."""
        display(self.widget)
        self.board = LiveBoard(Path(self.config.output_dir))
        self.board.show(self._note())

    def _stepped(self, step: Any) -> None:
        self.board.update(step)

    def _moved(self, change: dict[str, Any]) -> None:
        if not self._following:
            self.multiply_learning_rate(change["new"])
        self._say_rate()

    def _say_rate(self) -> None:
        peaks = self.training.rates.peaks if self.training else {"": self.config.learning_rate}
        rates = " / ".join(f"{self.rate.value * peak:.2g}" for peak in peaks.values())
        self.said.value = f"= {rates}, from the next step on"

    def _entered(self, state: str) -> None:
        """Called in the thread that trains, but for the first time; only values of widgets are set here."""
        for name, button in self.buttons.items():
            button.disabled = name not in ENABLED[state]
        if state == background.RUNNING:
            self._following = True  # a run that goes on has its factor already
            self.rate.value = self.training.rates.in_force(self.training.done)
            self._following = False
        self._say_rate()
        if state != background.READY:
            self.board.show(self._note())
        if state in (background.STOPPED, background.FINISHED):
            self.board.standing.onward = ONWARD
            self.board.close()

    def _note(self) -> str:
        if self.state == background.FAILED:
            return f"failed: {type(self.error).__name__}: {self.error}"
        done = self.training.done if self.training else 0
        return SAID.get(self.state, "").format(step=done)

    def __repr__(self) -> str:
        return f"BackgroundBoard({self.state})"


def run_in_background(config: TrainConfig) -> BackgroundTraining:
    """Show buttons and a board for a training in a thread, so that the notebook stays free; press Start.

    The interrupt button does not reach it: press Stop. Where threads cannot update the page (Colab) or nobody looks
    on, it says so and trains at once in the foreground, with the same files. Run again while the training lives, it
    shows that one here.
    """
    if reason := env.why_no_background():
        print(f"Training in the foreground: {reason}.")
        return _in_the_foreground(config)
    run = background.living(config.output_dir) or BackgroundBoard(config)
    run.show()
    return run


def _in_the_foreground(config: TrainConfig) -> BackgroundTraining:
    run = BackgroundTraining(config)
    run.training = train(config)
    with LiveBoard(run.training) as board:
        for step in with_samples(run.training):
            board.update(step)
    done = run.training.done >= run.training.max_train_steps
    run.state = background.FINISHED if done else background.STOPPED
    return run
