"""Adapters on a pipeline: load, combine, scale, merge, remove. Whether a file fits is decided in `fit`."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from lora_nb.errors import ConfigError
from lora_nb.families import load_family
from lora_nb.inference.fit import adapter_file, plan

Scale = float | Mapping[str, float]  # one factor for every adapter, or one for each adapter name


def load_pipeline(
    model: str | Path,
    adapter: str | Path | None = None,
    scale: float = 1.0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **stages: str,
) -> Any:
    """The diffusers pipeline of a folder or Hub model (safetensors only), with an adapter if one is given.

    adapter: a LoRA file, or a folder with pytorch_lora_weights.safetensors. stages: where the other parts of a
    two-stage model are, `prior`, `decoder` or `image_encoder_file`, if not in their usual places.
    Raises ModelError if there is no such model, FormatError if the adapter does not fit it.
    """
    pipeline = load_family(
        "auto", str(model), dtype=dtype or torch.float32, device=device, **stages
    ).pipeline()
    if adapter is not None:
        use_adapter(pipeline, adapter, scale=scale)
    return pipeline


def use_adapter(
    pipeline: Any, path: str | Path, name: str = "default", scale: float = 1.0
) -> dict[str, int]:
    """Put a LoRA file on a pipeline; returns how many tensors each part took, together all of them.

    Adapters of other names stay and add up; one of the same name is replaced.
    Raises FormatError, with the pipeline as it was, if the file is no safetensors, is incomplete,
    holds a number that is not finite, or has a tensor that the pipeline has no place for.
    """
    places = plan(pipeline, adapter_file(path))
    if name in adapter_names(pipeline):
        remove_adapter(pipeline, name)
    for part, (config, state) in places.items():
        module = getattr(pipeline, part)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a second adapter is meant
            # Draws start values; the next line puts the file's in their place.
            module.add_adapter(config, adapter_name=name)
        set_peft_model_state_dict(module, state, adapter_name=name)
        module.train(module.training)  # new layers start in training mode, where dropout is on
    for layer in layers(pipeline):
        layer.set_adapter(sorted(layer.lora_A), inference_mode=True)  # all of them, not the newest
    set_scale(pipeline, {name: scale})
    return {part: len(state) for part, (_, state) in places.items()}


def remove_adapter(pipeline: Any, name: str | None = None) -> None:
    """Take one adapter off the pipeline, or all; without any, the plain layers are back in place."""
    for module in modules(pipeline):
        for adapter in sorted(getattr(module, "peft_config", {})):
            if name in (None, adapter):
                delete_adapter_layers(module, adapter)
        if not getattr(module, "peft_config", {}):
            recurse_remove_peft_layers(module)


def set_scale(pipeline: Any, scale: Scale) -> None:
    """Multiply what the adapters add: 0 is the base model, 1 is as trained.

    scale: one number for all adapters, or {adapter name: number}. Raises ConfigError if there is no such adapter.
    """
    names = adapter_names(pipeline)
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(names, scale)
    unknown = sorted(set(scales) - set(names))
    if unknown or not names:
        raise ConfigError(
            f"There is no adapter {', '.join(unknown) or 'at all'} on this pipeline; "
            f"{'it has ' + ', '.join(names) if names else 'load one with use_adapter'}."
        )
    for layer in layers(pipeline):
        for adapter, factor in scales.items():
            layer.set_scale(adapter, factor)  # layers without this adapter ignore it


def adapter_names(pipeline: Any) -> list[str]:
    """The names of the adapters that sit on the pipeline, sorted."""
    return sorted({name for layer in layers(pipeline) for name in layer.lora_A})


@contextmanager
def fused(pipeline: Any) -> Iterator[Any]:
    """Merge the active adapters into the weights for speed; afterwards the weights are what they were, bit for bit.

    The kept copies are put back: subtracting what was added would leave rounding behind. Scales are fixed inside.
    """
    kept = []
    try:
        with torch.no_grad():
            for layer in layers(pipeline):
                if not (layer.disable_adapters or layer.merged):
                    kept.append((layer, layer.get_base_layer().weight.detach().clone()))
                    layer.merge()
        yield pipeline
    finally:
        with torch.no_grad():
            for layer, weight in kept:
                if layer.merged:
                    layer.unmerge()
                layer.get_base_layer().weight.copy_(weight)


def modules(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def layers(pipeline: Any) -> list[LoraLayer]:
    return [m for part in modules(pipeline) for m in part.modules() if isinstance(m, LoraLayer)]


@contextmanager
def scaled(pipeline: Any, scale: Scale | None) -> Iterator[None]:
    """Another adapter scale inside, the present one afterwards; None changes nothing."""
    before = [(layer, dict(layer.scaling)) for layer in layers(pipeline)]
    try:
        if scale is not None:
            set_scale(pipeline, scale)
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)
