"""A LoRA as numbers: for each layer A, B and the scale, whatever file or model it came from.

The layer computes W x + scale B A x. Kohya files, the algebra and the rank X-ray all start from here.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save

from lora_nb import adapters
from lora_nb.errors import FormatError, NumericsError
from lora_nb.files import write_atomically
from lora_nb.formats import lokr
from lora_nb.formats.header import (
    ADAPTER_METADATA,
    adapter_file,
    first,
    holds_lokr,
    read_header,
    split_key,
    understood,
)
from lora_nb.formats.reading import Plan, plan


@dataclass(frozen=True)
class Pair:
    """The LoRA of one layer: down = A (rank, inputs...), up = B (outputs, rank...), float32, and their scale."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha of a reader that computes scale = alpha / rank."""
        return self.scale * self.rank

    def delta(self) -> torch.Tensor:
        """scale B A in the shape of the layer's weight; for a convolution A has the kernel, B is 1 by 1."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(self.up.shape[0], *self.down.shape[1:])


Weights = dict[str, dict[str, Pair]]  # part -> layer -> pair


def weights_of_modules(
    modules: dict[str, torch.nn.Module], adapter: str = adapters.ADAPTER
) -> Weights:
    """The LoRA that sits on modules, by part; raises FormatError for what is no plain LoRA (DoRA, LoKr, biases)."""
    lokr.refuse(modules, adapter)
    weights: Weights = {}
    for part, module in modules.items():
        for name, layer in adapters.layers(module):
            if adapter in layer.lora_A:
                weights.setdefault(part, {})[name] = _pair(part, name, layer, adapter)
    return weights


def _pair(part: str, name: str, layer: LoraLayer, adapter: str) -> Pair:
    variant = layer.lora_variant.get(adapter)
    if variant is not None or layer.lora_bias.get(adapter):
        kind = type(variant).__name__ if variant is not None else "a trained bias"
        raise FormatError(
            f"The adapter of {part}.{name} is no plain LoRA ({kind}), so scale B A is not all of it; "
            "keep the diffusers file."
        )
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Pair(_copy(down), _copy(up), layer.scaling[adapter])


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)


def read_weights(file: str | Path, pipeline: Any = None) -> Weights:
    """The LoRA of a file, which may be of any form if the pipeline is given that it was made for.

    Without one the file must name its parts and layers by itself, as diffusers and peft files do.
    Raises FormatError if it does not, and for DoRA and LoKr.
    """
    with understood(file):
        return _read_weights(file, pipeline)


def _read_weights(file: str | Path, pipeline: Any) -> Weights:
    path = adapter_file(file)
    if holds_lokr(read_header(path)[1]):
        raise FormatError(
            f"{path.name} is a LoKr, whose changes are Kronecker products and no B A of low rank; use it as it is."
        )
    places = plan(pipeline, path) if pipeline is not None else _plan_alone(path)
    weights: Weights = {}
    for part, (config, state) in places.items():
        if config.use_dora:
            raise FormatError(
                f"{path.name} is a DoRA, whose weights are no sum of the base's and scale B A; use it as it is."
            )
        for key, down in state.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                up = state[f"{layer}.lora_B.weight"]
                scale = scale_of(config, layer)
                weights.setdefault(part, {})[layer] = Pair(down.float(), up.float(), scale)
    return weights


def scale_of(config: LoraConfig, layer: str) -> float:
    """peft's scale of a layer: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
    alpha = config.alpha_pattern.get(
        get_pattern_key(config.alpha_pattern, layer), config.lora_alpha
    )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _plan_alone(file: Path) -> Plan:
    """Parts and layers as the keys name them: the part is the word before the first dot."""
    header, keys = read_header(file)
    settings = json.loads(header.get(ADAPTER_METADATA, "{}"))
    spelled = {key: split_key(key) for key in keys}
    if strange := [k for k, found in spelled.items() if found is None or found[1] == "kohya"]:
        raise FormatError(
            f"{file.name} does not say by itself which layers it means ({first(strange, 2)}); "
            "give the pipeline of its base model."
        )
    bare = header.get("part") if "lora_alpha" in settings else None
    tensors, states = load_file(file), {}
    for key, (stem, _, role) in spelled.items():
        part, _, layer = (bare, "", stem) if bare else stem.partition(".")
        ending = ".lora_magnitude_vector" if role == "magnitude" else f".{role}.weight"
        states.setdefault(part, {})[layer + ending] = tensors[key]
    places: Plan = {}
    for part, state in states.items():
        own = {
            k.removeprefix(f"{part}."): v
            for k, v in settings.items()
            if bare or k.startswith(f"{part}.")
        }
        if not own:  # alpha = rank, layer by layer
            ranks = {
                k.removesuffix(".lora_A.weight"): len(v) for k, v in state.items() if ".lora_A" in k
            }
            patterns = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()}
            own = {"rank_pattern": patterns, "alpha_pattern": patterns}
        places[part] = (LoraConfig(**own | {"init_lora_weights": True}), state)
    return places


def save_weights(weights: Weights, file: str | Path, extra: dict[str, str] | None = None) -> Path:
    """Write a LoRA as a peft-keyed file with diffusers' metadata, float32; returns the path.

    Ranks and alphas may differ from layer to layer. extra: further strings for the header.
    Raises NumericsError, and writes nothing, if a weight is not finite.
    """
    tensors, described = {}, {}
    for part, pairs in weights.items():
        for layer, pair in pairs.items():
            tensors[f"{part}.{layer}.lora_A.weight"] = pair.down.float().contiguous()
            tensors[f"{part}.{layer}.lora_B.weight"] = pair.up.float().contiguous()
        ranks = {f"^{re.escape(layer)}": pair.rank for layer, pair in pairs.items()}
        alphas = {f"^{re.escape(layer)}": pair.alpha for layer, pair in pairs.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="|".join(re.escape(layer) for layer in pairs),
            rank_pattern={name: r for name, r in ranks.items() if r != rank},
            alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        )
        described |= {f"{part}.{name}": plain(v) for name, v in config.to_dict().items()}
    refuse_infinite(tensors)
    header = {"format": "pt", ADAPTER_METADATA: json.dumps(described, indent=2, sort_keys=True)}
    return write_atomically(Path(file), save(tensors, metadata=header | (extra or {})))


def plain(value: object) -> object:
    """A setting as JSON has it."""
    return sorted(value) if isinstance(value, set) else value


def refuse_infinite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise NumericsError for a weight that is not finite."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"{key} is not finite, so the adapter was not written; go back to the last checkpoint."
            )
