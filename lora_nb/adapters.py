"""Adapters on a family's trainable modules: add, freeze, count, scale, look inside, take off.

The layers are peft's. What is decided here: start values by named randomness, float32 whatever the base's dtype, and
one place that says which weights train.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from lora_nb import rng
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import Family

ADAPTER = "default"
MAIN = "unet"  # what a config may call the network of any family
TEXT = "text_encoders"  # what it may call all text encoders together that the family can train


def peft_config(spec: LoraSpec, targets: tuple[str, ...]) -> LoraConfig:
    """The peft config of a LoraSpec: A from N(0, 1/rank), B zero, as the reference scripts start."""
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(spec.target_modules or targets),
    )


def check(family: Family, lora: dict[str, LoraSpec]) -> None:
    """Refuse parts that the family has not and target modules that match nothing; raises ConfigError."""
    for part, spec in lora.items():
        if part not in family.trainable:
            raise ConfigError(
                f"The family {family.name!r} has no trainable part {part!r}; it has {', '.join(family.trainable)}."
            )
        for target in spec.target_modules or ():
            if not any(matches(name, target) for name in adaptable(family.trainable[part])):
                raise ConfigError(
                    f"target_modules of {part} names {target!r}, which no linear or convolution layer there ends with; "
                    f"look at lora_nb.adapters.adaptable(family.trainable[{part!r}])."
                )


def named(family: Family, lora: dict[str, LoraSpec]) -> dict[str, LoraSpec]:
    """The specs by the family's own part names: `unet` is its network, `text_encoders` are all it can train.

    So one config, one flag and one preset serve all families. Raises ConfigError if a part is named twice, or if there
    are no text encoders to train.
    """
    main, *others = family.targets
    texts = [part for part in others if part.startswith("text_encoder")]
    if TEXT in lora and not texts:
        raise ConfigError(
            f"lora names {TEXT!r}, but the family {family.name!r} has none that can be trained; leave them out."
        )
    specs: dict[str, LoraSpec] = {}
    for part, spec in lora.items():
        for own in {MAIN: [main], TEXT: texts}.get(part, [part]):
            if own in specs:
                raise ConfigError(
                    f"lora names {own!r} twice, by itself and as {MAIN!r} or {TEXT!r}; keep one of them."
                )
            specs[own] = spec
    return specs


def add(family: Family, lora: dict[str, LoraSpec], seed: int = 0) -> None:
    """Put a fresh adapter on each named part and make its weights, and nothing else, trainable.

    A is drawn by (seed, part), B is zero, so the family's output does not change. Trainable weights are float32.
    Raises ConfigError as `check` does.
    """
    check(family, lora)
    for part, spec in lora.items():
        module = family.trainable[part]
        with torch.random.fork_rng(devices=[]):  # peft draws A from the global stream
            torch.manual_seed(rng.generator(seed, f"adapter/{part}", 0).initial_seed())
            module.add_adapter(peft_config(spec, family.targets[part]), adapter_name=ADAPTER)
        module.train(
            module.training
        )  # peft's new layers come in training mode: dropout would be on
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def remove(family: Family) -> None:
    """Take every adapter off; the plain layers are back in place."""
    for module in family.trainable.values():
        if has_adapter(module):
            delete_adapter_layers(module, ADAPTER)
            recurse_remove_peft_layers(module)


def has_adapter(module: torch.nn.Module) -> bool:
    """Whether a module carries an adapter of ours."""
    return ADAPTER in getattr(module, "peft_config", {})


def parameters(family: Family) -> dict[str, list[torch.nn.Parameter]]:
    """The trainable weights of each part that has an adapter, in a fixed order."""
    found = {
        part: [p for p in module.parameters() if p.requires_grad]
        for part, module in family.trainable.items()
    }
    return {part: weights for part, weights in found.items() if weights}


@contextmanager
def disabled(family: Family) -> Iterator[None]:
    """The base model, inside the block: adapters stay where they are but are passed over."""
    modules = [module for module in family.trainable.values() if has_adapter(module)]
    for module in modules:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters()


def layers(module: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers of a module with their names."""
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def base_weights(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of a module's named weights those under its adapters, by the names that they have without any."""
    plain = ((name.replace(".base_layer", ""), weight) for name, weight in named)
    return {name: weight for name, weight in plain if "lora_" not in name}


def set_scale(family: Family, scale: float | dict[str, float]) -> None:
    """Multiply alpha / rank by `scale`, for all parts or for each by name; 1 is as trained, 0 is the base model."""
    for part, module in family.trainable.items():
        value = scale if not isinstance(scale, dict) else scale.get(part, 1.0)
        for _, layer in layers(module):
            layer.set_scale(ADAPTER, value)


def state(family: Family) -> dict[str, dict[str, torch.Tensor]]:
    """The adapter weights by part and peft key, copies in float32 on the CPU."""
    return {
        part: {
            key: value.detach().to("cpu", torch.float32, copy=True)
            for key, value in get_peft_model_state_dict(module, adapter_name=ADAPTER).items()
        }
        for part, module in family.trainable.items()
        if has_adapter(module)
    }


def load_state(family: Family, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put weights from `state` back into adapters of the same shape."""
    for part, tensors in weights.items():
        set_peft_model_state_dict(family.trainable[part], tensors, adapter_name=ADAPTER)


@dataclass(frozen=True)
class ModuleCount:
    """What LoRA would add to one layer; `block` is the part of the name that figures group by."""

    name: str
    kind: str
    in_features: int
    out_features: int
    parameters: int

    @property
    def block(self) -> str:
        words = self.name.split(".")
        return ".".join(words[:2]) if words[0] in ("down_blocks", "up_blocks") else words[0]


def matches(name: str, target: str) -> bool:
    """peft's rule: a target is the layer's whole name or its end after a dot."""
    return name == target or name.endswith("." + target)


def adaptable(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that LoRA can sit on, by name: linear layers and convolutions."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and ".lora_" not in name
    }


def forecast(module: torch.nn.Module, targets: tuple[str, ...], rank: int) -> list[ModuleCount]:
    """Trainable weights that LoRA would add, layer by layer, without adding it: rank * (in + out) for a linear layer.

    For a convolution A keeps the kernel: rank * (in * kernel + out). Works on the meta device.
    """
    counts = []
    for name, layer in adaptable(module).items():
        if any(matches(name, target) for target in targets):
            out_features = layer.weight.shape[0]
            in_features = layer.weight[0].numel()
            counts.append(
                ModuleCount(
                    name,
                    type(layer).__name__,
                    in_features,
                    out_features,
                    rank * (in_features + out_features),
                )
            )
    return counts


def file_size(counts: list[ModuleCount]) -> int:
    """Bytes of the weights in a float32 file (headers add a few kilobytes)."""
    return 4 * sum(count.parameters for count in counts)


@torch.no_grad()
def strength(family: Family) -> list[tuple[str, str, float, float]]:
    """(part, layer, ||scale B A||, ||W||), Frobenius norms, for every adapted layer."""
    rows = []
    for part, module in family.trainable.items():
        for name, layer in layers(module):
            change = layer.get_delta_weight(ADAPTER).float().norm().item()
            rows.append((part, name, change, layer.get_base_layer().weight.float().norm().item()))
    return rows
