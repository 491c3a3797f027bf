"""What a learner touches in a notebook: a settings panel, a live board for training, a scale slider.

Only widgets that ipywidgets 7.7 (Colab) and 8 share are used, and nothing waits for a click.
Figures come from `plots`, results from elsewhere.
"""

import base64
import io
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from PIL import Image

from lora_nb import adapters, plots
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.env import headless
from lora_nb.errors import ConfigError
from lora_nb.families import Family
from lora_nb.inference import samples
from lora_nb.run_folder import read_history

# What diffusers and transformers call the linear layers of attention and of feed-forward blocks.
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
DEFAULT, WITH_FEED_FORWARD, OWN = "attention", "attention and feed-forward", "own list"


# ---------------------------------------------------------------------------- settings


class ConfigPanel:
    """Sliders over a TrainConfig: `config()` is the config as they stand, with or without a click.

    Only what was moved is replaced, so an untouched panel returns an equal config. The sliders act
    on the first part that carries LoRA; text encoders are switched on with its rank and alpha, or
    with their own if the config had them. With a `family` the panel counts trainable parameters and
    the file size from the real modules.
    """

    def __init__(self, config: TrainConfig, family: Family | None = None):
        if family:
            config = replace(config, lora=adapters.named(family, config.lora))
        self._config, self._family, self._line, self._following = config, family, None, False
        self._part = next(iter(config.lora))
        parts = tuple(family.trainable) if family else ("text_encoder",)
        self._encoders = [p for p in parts if p.startswith("text_encoder") and p != self._part]
        self._kept = {p: spec for p, spec in config.lora.items() if p in self._encoders}
        self.controls = _controls(config, config.lora[self._part], bool(self._kept))
        self.controls["text_encoder"].disabled = not self._encoders
        self.numbers = ipywidgets.HTML()
        self.box = ipywidgets.VBox([*self.controls.values(), self.numbers])
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name, change["new"]), "value")
        self._show()

    def config(self) -> TrainConfig:
        """The config as the panel stands now."""
        return self._config

    def set(self, **values: Any) -> "ConfigPanel":
        """Move controls by name, as a hand would: set(rank=16, learning_rate=1e-3, text_encoder=True).

        target_modules takes layer names, or None for the family's default. Raises ConfigError for a
        name that no control has, or a value that its scale does not reach.
        """
        if "target_modules" in values:
            own = values["target_modules"]
            values |= {
                "own_targets": ", ".join(own or ()),
                "target_modules": OWN if own else DEFAULT,
            }
        for name, value in values.items():
            if name not in self.controls:
                known = ", ".join(self.controls)
                raise ConfigError(f"The panel has no control {name!r}; it has {known}.")
            control = self.controls[name]
            before = control.value
            control.value = value
            if control.value == before == value:
                self._moved(
                    name, value
                )  # said outright, though nothing moves: alpha stops following
            elif control.value != value:
                control.value = before
                raise ConfigError(
                    f"The panel's {name} does not reach {value}; set it in the config."
                )
        return self

    def counts(self) -> dict[str, list[adapters.ModuleCount]]:
        """The layers that would get LoRA, by part, counted on the family's modules."""
        return {
            part: adapters.forecast(
                self._family.trainable[part],
                spec.target_modules or self._family.targets[part],
                spec.rank,
            )
            for part, spec in self._config.lora.items()
        }

    def text(self) -> str:
        """The settings in one line of plain text, for pages that show no widgets."""
        config = self._config
        parts = [
            f"{part}: rank {spec.rank}, alpha {spec.alpha:g}, scale {spec.scale:g}, "
            f"on {', '.join(spec.target_modules or ['attention'])}"
            for part, spec in config.lora.items()
        ]
        length = f"{config.max_train_steps} steps"
        if config.max_train_steps is None:
            length = f"{config.num_train_epochs} epochs"
        return "; ".join([*parts, f"learning rate {config.learning_rate:.3g}", length])

    def __repr__(self) -> str:
        return f"ConfigPanel({self.text()})"

    def _ipython_display_(self) -> None:
        display(self.box)
        self._line = display({"text/plain": self.text()}, raw=True, display_id=True)

    def _moved(self, name: str, value: Any) -> None:
        if self._following:
            return
        config, spec = self._config, self._config.lora[self._part]
        if name == "text_encoder":
            own = self._kept or {p: replace(spec, target_modules=None) for p in self._encoders}
            lora = {p: s for p, s in config.lora.items() if p not in self._encoders}
            self._config = replace(config, lora=lora | own if value else lora)
        elif name in ("learning_rate", "max_train_steps"):
            self._config = replace(config, **{name: value or None})
        else:
            if name in ("rank", "lora_alpha"):
                spec = replace(spec, **{name: value})
            else:
                spec = replace(spec, target_modules=self._targets())
            self._config = replace(config, lora=config.lora | {self._part: spec})
            self._following = True  # alpha = rank until alpha is moved itself: show it, set nothing
            self.controls["lora_alpha"].value = spec.alpha
            self._following = False
        self._show()

    def _targets(self) -> tuple[str, ...] | None:
        choice = self.controls["target_modules"].value
        if choice == OWN:
            names = self.controls["own_targets"].value.replace(",", " ").split()
            return tuple(names) or None
        if choice == DEFAULT:
            return None
        if self._family is None:
            return ATTENTION + FEED_FORWARD[:2]
        layers = adapters.adaptable(self._family.trainable[self._part])
        wide = [t for t in FEED_FORWARD if any(adapters.matches(name, t) for name in layers)]
        return (*self._family.targets[self._part], *wide)

    def _show(self) -> None:
        self.numbers.value = self._numbers()
        if self._line is not None:
            self._line.update({"text/plain": self.text()}, raw=True)

    def _numbers(self) -> str:
        scale = f"scale alpha / rank = {self._config.lora[self._part].scale:g}"
        if self._family is None:
            return scale
        counts = self.counts()
        everything = [count for part in counts.values() for count in part]
        parameters = sum(count.parameters for count in everything)
        base = sum(
            weight.numel()
            for part in counts
            for name, weight in self._family.trainable[part].named_parameters()
            if ".lora_" not in name  # the panel may stand beside a family that is adapted already
        )
        per_part = ", ".join(f"{escape(part)} {len(rows)} layers" for part, rows in counts.items())
        return (
            f"<b>{parameters:,}</b> trainable parameters ({parameters / base:.2%} of the base), "
            f"file <b>{_bytes(adapters.file_size(everything))}</b><br>{per_part}; {scale}"
        )


def _controls(config: TrainConfig, spec: LoraSpec, text_encoder: bool) -> dict[str, Any]:
    """One widget per setting, its scale wide enough for the value that the config has."""
    style = {"description_width": "9em"}
    steps, lowest = config.max_train_steps or 0, math.floor(math.log10(config.learning_rate))
    common: dict[str, Any] = {"style": style, "layout": {"width": "30em"}}
    slider = common | {"continuous_update": False}
    return {
        "rank": ipywidgets.IntSlider(
            value=spec.rank, min=1, max=max(64, spec.rank), description="rank", **slider
        ),
        "lora_alpha": ipywidgets.FloatSlider(
            value=spec.alpha,
            min=min(0.5, spec.alpha),
            max=max(128, spec.alpha),
            step=0.5,
            description="alpha",
            **slider,
        ),
        "learning_rate": ipywidgets.FloatLogSlider(
            value=config.learning_rate,
            min=min(-6, lowest),
            max=max(-1, lowest + 1),
            step=0.05,
            readout_format=".2e",
            description="learning rate",
            **slider,
        ),
        "max_train_steps": ipywidgets.IntSlider(
            value=steps, max=max(2000, steps), step=10, description="steps (0: epochs)", **slider
        ),
        "target_modules": ipywidgets.Dropdown(
            options=[DEFAULT, WITH_FEED_FORWARD, OWN],
            value=OWN if spec.target_modules else DEFAULT,
            description="target modules",
            **common,
        ),
        "own_targets": ipywidgets.Text(
            value=", ".join(spec.target_modules or ()),
            placeholder="to_q, to_v",
            description="own list",
            **slider,
        ),
        "text_encoder": ipywidgets.Checkbox(
            value=text_encoder, description="train the text encoder too", **common
        ),
    }


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


# ---------------------------------------------------------------------------- training


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
        page = f"<pre>{escape(line)}</pre>{_img(png, 'png', 'style=max-width:920px;width:100%')}"
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


# ---------------------------------------------------------------------------- scale


class ScaleExplorer:
    """A slider over the pictures of `inference.scale_sweep`: one list of pictures for each scale.

    As the last expression of a cell it shows the kernel-free page of `html()`; `widget` is the same
    as an ipywidgets box, for those who want to build on it (`slider`, `scale()`).
    """

    def __init__(self, sweep: Sequence[Sequence[Image.Image]], scales: Sequence[float]):
        self._images = [_side_by_side(pictures) for pictures in sweep]
        self._labels = [f"scale {scale:g}" + (" (base)" if not scale else "") for scale in scales]
        self._scales = list(scales)
        start = min(range(len(scales)), key=lambda i: abs(scales[i] - 1))
        self.slider = ipywidgets.IntSlider(
            value=start, max=len(scales) - 1, readout=False, layout={"width": "20em"}
        )
        size = {"width": f"{self._images[0].width}px"}  # or it stretches over the page
        self.label, self.picture = ipywidgets.HTML(), ipywidgets.Image(format="png", layout=size)
        self.widget = ipywidgets.VBox([ipywidgets.HBox([self.slider, self.label]), self.picture])
        self.slider.observe(self._moved, "value")
        self._moved({"new": start})

    def scale(self) -> float:
        """The scale that the widget shows."""
        return self._scales[self.slider.value]

    def html(self) -> str:
        """A page with a slider that needs no kernel and stays alive in a saved notebook."""
        return scrubber_html(self._images, self._labels, start=self.slider.value)

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return f"ScaleExplorer({', '.join(self._labels)})"

    def _moved(self, change: dict) -> None:
        self.label.value = self._labels[change["new"]]
        self.picture.value = _encoded(self._images[change["new"]], "PNG")


def scrubber_html(images: Sequence[Image.Image], labels: Sequence[str], start: int = 0) -> str:
    """HTML in which a slider turns over the pictures; all of them are inside, as base64."""
    frames = "".join(
        f'<figure style="margin:0" {"" if index == start else "hidden"}>'
        f"<figcaption>{escape(label)}</figcaption>{_img(_encoded(image, 'WEBP'), 'webp')}</figure>"
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    )
    turn = "this.parentNode.querySelectorAll('figure').forEach((f, i) =&gt; f.hidden = i != this.value)"
    # stopPropagation: or JupyterLab takes the arrow keys for its own
    return (
        f'<div><input type="range" min="0" max="{len(images) - 1}" value="{start}" '
        f'style="width:20em" aria-label="picture" onkeydown="event.stopPropagation()" '
        f'oninput="{turn}">{frames}</div>'
    )


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (width * index, 0))
    return row


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "WEBP" else {}))
    return buffer.getvalue()


def _img(data: bytes, kind: str, attributes: str = "") -> str:
    return f'<img {attributes} src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
