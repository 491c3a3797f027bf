"""A settings panel: sliders over a TrainConfig, with read-outs of what they cost and of what was measured nearby."""

import math
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets
from IPython.display import display

from lora_nb import adapters
from lora_nb.config import SCHEDULES, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import Family
from lora_nb.forecast import Forecast, preflight
from lora_nb.sweep import Sweep
from lora_nb.widgets import readouts

# What diffusers and transformers call the linear layers of attention and of feed-forward blocks.
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
DEFAULT, WITH_FEED_FORWARD, OWN = "attention", "attention and feed-forward", "own list"
NETWORK, ENCODERS = "network", "text_encoder"  # the controls that switch parts on and off
# Controls that are fields of the config by the same name; 0 means empty.
FIELDS = ("learning_rate", "max_train_steps", "train_batch_size", "lr_scheduler", "lr_warmup_steps")


class ConfigPanel:
    """Sliders over a TrainConfig: `config()` is the config as they stand, with or without a click.

    Only what was moved is replaced, so an untouched panel returns an equal config. Rank, alpha and target modules act
    on the network, or on the text encoders where they train alone; a part that is switched on takes the rank and alpha
    of the sliders, or its own if the config had them. With a `family` the panel counts trainable parameters and the
    file size from the real modules. With a `forecast`, or after `measure`, it says time and memory, reckoned from that
    one measurement. With a `sweep` of rank and learning rate it shows pictures and scores of the nearest measured cell.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family | None = None,
        sweep: Sweep | None = None,
        forecast: Forecast | None = None,
    ):
        if family:
            config = replace(config, lora=adapters.named(family, config.lora))
        self._config, self._family, self._line, self._following = config, family, None, False
        self._sweep, self._forecast, self._measured = sweep, forecast, config
        parts = tuple(family.trainable) if family else (adapters.MAIN, ENCODERS, *config.lora)
        self._encoders = [p for p in dict.fromkeys(parts) if p.startswith(ENCODERS)]
        self._networks = [p for p in parts if p not in self._encoders][:1]
        self._kept = dict(config.lora)
        self.controls = _controls(config, config.lora[self._part], self._on)
        self.controls[ENCODERS].disabled = not self._encoders or not self._networks
        self.controls[NETWORK].disabled = self.controls[ENCODERS].disabled
        self.numbers, self.cost, self.seen = (ipywidgets.HTML() for _ in range(3))
        self.button = ipywidgets.Button(description="Measure time and memory")
        self.button.layout.width = "20em"
        self.button.on_click(lambda _: self.measure())
        read_outs = (self.numbers, self.cost, self.button, self.seen)
        self.box = ipywidgets.VBox([*self.controls.values(), *read_outs])
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._moved(name, change["new"]), "value")
        self._show()

    def config(self) -> TrainConfig:
        """The config as the panel stands now."""
        return self._config

    def measure(self) -> Forecast:
        """Make a few steps of the config as it stands, throw them away, and reckon time and memory from them.

        Raises the errors that `train` would raise.
        """
        self.button.disabled, self.cost.value = True, "measuring a few steps ..."
        try:
            self._forecast, self._measured = preflight(self._config, self._family), self._config
        finally:
            self.button.disabled = False
            self._show()
        return self._forecast

    def set(self, **values: Any) -> "ConfigPanel":
        """Move controls by name, as a hand would: set(rank=16, learning_rate=1e-3, text_encoder=True).

        target_modules takes layer names, or None for the family's default. Raises ConfigError for a
        name that no control has, a value that its scale does not reach, or a panel that would train nothing.
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
        return readouts.counts(self._family, self._config)

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

    @property
    def _part(self) -> str:
        """The part that the sliders act on first."""
        return next(iter(self._config.lora))

    @property
    def _on(self) -> dict[str, bool]:
        """Which of the two kinds of parts train."""
        kinds = {NETWORK: self._networks, ENCODERS: self._encoders}
        return {kind: any(p in self._config.lora for p in parts) for kind, parts in kinds.items()}

    def _moved(self, name: str, value: Any) -> None:
        if self._following:
            return
        if name in FIELDS:
            empty = None if name == "max_train_steps" else 0
            self._config = replace(self._config, **{name: value or empty})
        elif name in (NETWORK, ENCODERS):
            self._switch(name, value)
        else:
            self._adapt(name, value)
        self._show()

    def _adapt(self, name: str, value: Any) -> None:
        """Change the LoRA of the network, or of all text encoders where they train alone."""
        lora = dict(self._config.lora)
        changes = {name: value} if name in ("rank", "lora_alpha") else {}
        for part in [self._part] if self._on[NETWORK] else list(lora):
            targets = changes or {"target_modules": self._targets(part)}
            lora[part] = replace(lora[part], **targets)
        self._config = replace(self._config, lora=lora)
        self._follow("lora_alpha", lora[self._part].alpha)  # alpha = rank until it is moved itself

    def _switch(self, kind: str, on: bool) -> None:
        """Put LoRA on the network or the text encoders, or take it off; one of them stays on."""
        spec, lora = self._config.lora[self._part], dict(self._config.lora)
        if kind == NETWORK and not on:
            self._kept |= {part: lora[part] for part in self._networks}
        for part in self._networks if kind == NETWORK else self._encoders:
            lora.pop(part, None)
            if on:
                lora[part] = self._kept.get(part) or replace(spec, target_modules=None)
        if not lora:
            self._follow(kind, True)
            return
        lora = {part: lora[part] for part in (*self._networks, *self._encoders) if part in lora}
        self._config = replace(self._config, lora=lora)

    def _follow(self, name: str, value: Any) -> None:
        """Show a value in a control without taking it for a hand's."""
        self._following = True
        self.controls[name].value = value
        self._following = False

    def _targets(self, part: str) -> tuple[str, ...] | None:
        choice = self.controls["target_modules"].value
        if choice == OWN:
            names = self.controls["own_targets"].value.replace(",", " ").split()
            return tuple(names) or None
        if choice == DEFAULT:
            return None
        if self._family is None:
            return ATTENTION + FEED_FORWARD[:2]
        layers = adapters.adaptable(self._family.trainable[part])
        wide = [t for t in FEED_FORWARD if any(adapters.matches(name, t) for name in layers)]
        return (*self._family.targets[part], *wide)

    def _show(self) -> None:
        # What would have no effect cannot be moved by hand.
        self.controls["lr_warmup_steps"].disabled = self._config.lr_scheduler == "constant"
        self.controls["own_targets"].disabled = self.controls["target_modules"].value != OWN
        self.numbers.value = self._numbers()
        self.cost.value = self._cost()
        if self._sweep is not None:
            rank, rate = self._config.lora[self._part].rank, self._config.learning_rate
            self.seen.value = readouts.nearest(self._sweep, rank, rate)
        if self._line is not None:
            self._line.update({"text/plain": self.text()}, raw=True)

    def _numbers(self) -> str:
        scale = f"scale alpha / rank = {self._config.lora[self._part].scale:g}"
        if self._family is None:
            return scale
        counts = self.counts()
        parameters = readouts.parameters(counts)
        base = sum(
            weight.numel()
            for part in counts
            for name, weight in self._family.trainable[part].named_parameters()
            if ".lora_" not in name  # the panel may stand beside a family that is adapted already
        )
        per_part = ", ".join(f"{escape(part)} {len(rows)} layers" for part, rows in counts.items())
        return (
            f"<b>{parameters:,}</b> trainable parameters ({parameters / base:.2%} of the base), "
            f"file <b>{_bytes(readouts.file_size(counts))}</b><br>{per_part}; {scale}"
        )

    def _cost(self) -> str:
        curve = readouts.rate_curve(self._config)
        if self._forecast is None:
            return f"{curve}<br>time and memory: not measured yet"
        return f"{curve}<br>{readouts.cost(self._forecast, self._measured, self._config, self._family)}"


def _controls(config: TrainConfig, spec: LoraSpec, on: dict[str, bool]) -> dict[str, Any]:
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
        "train_batch_size": ipywidgets.IntSlider(
            value=config.train_batch_size,
            min=1,
            max=max(32, config.train_batch_size),
            description="batch",
            **slider,
        ),
        "lr_scheduler": ipywidgets.Dropdown(
            options=SCHEDULES, value=config.lr_scheduler, description="schedule", **common
        ),
        "lr_warmup_steps": ipywidgets.IntSlider(
            value=config.lr_warmup_steps,
            max=max(1000, config.lr_warmup_steps),
            step=10,
            description="warm-up steps",
            **slider,
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
        NETWORK: ipywidgets.Checkbox(
            value=on[NETWORK], description="train the network that denoises", **common
        ),
        ENCODERS: ipywidgets.Checkbox(
            value=on[ENCODERS], description="train the text encoder", **common
        ),
    }


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
