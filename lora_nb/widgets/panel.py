"""A settings panel: sliders over a TrainConfig, with read-outs of what they cost."""

import math
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets
from IPython.display import display

from lora_nb import adapters
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import Family

# What diffusers and transformers call the linear layers of attention and of feed-forward blocks.
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "fc1", "fc2")
DEFAULT, WITH_FEED_FORWARD, OWN = "attention", "attention and feed-forward", "own list"


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
