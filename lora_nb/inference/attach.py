"""Adapters on a pipeline: load, combine, scale, merge, remove. Whether a file fits is decided in `formats`."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from peft import PeftType, set_peft_model_state_dict
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer

from lora_nb.errors import ConfigError, FormatError
from lora_nb.families import load_family
from lora_nb.families.quantized import QuantizedLinear
from lora_nb.formats import Plan, adapter_file, lokr, plan
from lora_nb.formats.weights import scale_of

# Bits of a float32 that half precision has no room for.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}

Layer = LoraLayer | LoKrLayer  # its `scaling` names the adapters on it

Factor = float | Mapping[str, float]  # of all of an adapter, or by block, such as unet.mid_block
Scale = float | Mapping[str, Factor]  # one for every adapter, or one for each adapter name


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
    """Put a LoRA or LoKr file on a pipeline; returns how many tensors each part took, together all of them.

    Adapters of other names stay and add up; one of the same name is replaced.
    Raises FormatError, with the pipeline as it was, if the file is no safetensors, is incomplete,
    holds a number that is not finite, or has a tensor that the pipeline has no place for, and for a LoKr where a LoRA
    stays or the other way round.
    """
    file = adapter_file(path)
    places = plan(pipeline, file)
    _refuse_two_kinds(pipeline, file, places, name)
    if name in adapter_names(pipeline):
        remove_adapter(pipeline, name)
    for part, (config, state) in places.items():
        module = getattr(pipeline, part)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a second adapter is meant
            # Draws start values; the next line puts the file's in their place.
            module.add_adapter(config, adapter_name=name)
        if config.peft_type == PeftType.LOKR:
            lokr.fill(module, name, state)
        else:
            set_peft_model_state_dict(module, state, adapter_name=name)
        module.train(module.training)  # new layers start in training mode, where dropout is on
    for layer in layers(pipeline):
        layer.set_adapter(sorted(layer.scaling), inference_mode=True)  # all of them, not the newest
    set_scale(pipeline, {name: scale})
    return {part: len(state) for part, (_, state) in places.items()}


def _refuse_two_kinds(pipeline: Any, file: Path, places: Plan, name: str) -> None:
    """peft puts adapters of one kind on a model."""
    for part, (config, _) in places.items():
        for other, there in getattr(getattr(pipeline, part), "peft_config", {}).items():
            if other != name and there.peft_type != config.peft_type:
                raise FormatError(
                    f"{file.name} is a {config.peft_type.value} for {part}, which carries the "
                    f"{there.peft_type.value} {other}, and the two kinds cannot share a model; remove {other} first."
                )


def remove_adapter(pipeline: Any, name: str | None = None) -> None:
    """Take one adapter off the pipeline, or all; without any, the plain layers are back in place."""
    for module in modules(pipeline):
        for adapter in sorted(getattr(module, "peft_config", {})):
            if name in (None, adapter):
                delete_adapter_layers(module, adapter)
        if not getattr(module, "peft_config", {}):
            recurse_remove_peft_layers(module)


def swap_adapter(
    pipeline: Any, path: str | Path, name: str = "default", scale: float = 1.0
) -> dict[str, int]:
    """`use_adapter` in the place of the adapter of the same name: no layer is made if layers and ranks are the same.

    The weights are then copied into those that are there, so memory does not grow and a compiled network stays valid.
    DoRA and LoKr make new layers.
    """
    places = plan(pipeline, adapter_file(path))
    there = {
        f"{part}.{layer}": module
        for part, layer, module in named_layers(pipeline)
        if name in module.scaling
    }
    if _no_plain_lora(there.values(), places, name):
        return use_adapter(pipeline, path, name, scale)
    shapes = {key: _shapes(module, name) for key, module in there.items()}
    wanted: dict[str, list[torch.Size]] = {}
    for part, (_, state) in places.items():
        for key, tensor in sorted(state.items()):
            layer, _, _ = key.partition(".lora_")
            wanted.setdefault(f"{part}.{layer}", []).append(tensor.shape)
    if shapes != wanted:
        return use_adapter(pipeline, path, name, scale)
    with torch.no_grad():
        for part, (config, state) in places.items():
            getattr(pipeline, part).peft_config[name] = config
            for key, tensor in state.items():
                layer, _, kind = key.rpartition(".lora_")
                module = there[f"{part}.{layer}"]
                (module.lora_A if kind.startswith("A") else module.lora_B)[name].weight.copy_(
                    tensor
                )
                module.lora_alpha[name] = module.r[name] * scale_of(config, layer)
                getattr(module, "use_rslora", {})[name] = False  # folded into alpha above
    set_scale(pipeline, {name: scale})
    return {part: len(state) for part, (_, state) in places.items()}


def _no_plain_lora(there: Iterable[Layer], places: Plan, name: str) -> bool:
    """Whether what is on the pipeline, or what is to come, is a LoKr or a DoRA."""
    if any(isinstance(layer, LoKrLayer) or name in layer.lora_variant for layer in there):
        return True
    return any(c.peft_type == PeftType.LOKR or c.use_dora for c, _ in places.values())


def _shapes(layer: LoraLayer, name: str) -> list[torch.Size]:
    return [layer.lora_A[name].weight.shape, layer.lora_B[name].weight.shape]


def set_scale(pipeline: Any, scale: Scale) -> None:
    """Multiply what the adapters add: 0 is the base model, 1 is as trained.

    scale: one number for all adapters, or {adapter name: number}, or {adapter name: {block: number}}, where a block is
    a part or the beginning of a layer's name in it, such as text_encoder or unet.down_blocks.1; the longest that fits
    counts, layers that none fits keep 1. Raises ConfigError if there is no such adapter or block.
    """
    names = adapter_names(pipeline)
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(names, scale)
    unknown = sorted(set(scales) - set(names))
    if unknown or not names:
        raise ConfigError(
            f"There is no adapter {', '.join(unknown) or 'at all'} on this pipeline; "
            f"{'it has ' + ', '.join(names) if names else 'load one with use_adapter'}."
        )
    found = [(f"{part}.{layer}", module) for part, layer, module in named_layers(pipeline)]
    for adapter, factor in scales.items():
        for block in factor if isinstance(factor, Mapping) else ():
            if not any(_within(name, block) for name, m in found if adapter in m.scaling):
                raise ConfigError(
                    f"The adapter {adapter} has no layer in {block}; name a part or block such as "
                    f"{'.'.join(found[0][0].split('.')[:2])}."
                )
    for name, layer in found:
        for adapter, factor in scales.items():
            layer.set_scale(adapter, _factor(name, factor))  # layers without this adapter ignore it


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")


def _factor(name: str, factor: Factor) -> float:
    if not isinstance(factor, Mapping):
        return factor
    fitting = [block for block in factor if _within(name, block)]
    return factor[max(fitting, key=len)] if fitting else 1.0


def adapter_names(pipeline: Any) -> list[str]:
    """The names of the adapters that sit on the pipeline, sorted."""
    return sorted({name for layer in layers(pipeline) for name in layer.scaling})


@contextmanager
def fused(pipeline: Any) -> Iterator[Any]:
    """Merge the active adapters into the weights for speed; afterwards the weights are what they were, bit for bit.

    The kept copies are put back: subtracting what was added would leave rounding behind. Scales are fixed inside.
    On quantized layers the adapters stay beside the weights, which could not hold them exactly. In half precision a
    sum becomes one of its two neighbours, at random and on average the sum (the same ones every time); rounded to the
    nearer one, most of a small adapter would be lost. Source: Gupta et al. 2015, section 3, stochastic rounding.
    """
    kept = []
    try:
        with torch.no_grad():
            for layer in layers(pipeline):
                quantized = isinstance(layer.get_base_layer(), QuantizedLinear)
                if not (layer.disable_adapters or layer.merged or quantized):
                    kept.append((layer, layer.get_base_layer().weight.detach().clone()))
                    _merge(layer, seed=len(kept))
        yield pipeline
    finally:
        with torch.no_grad():
            for layer, weight in kept:
                if layer.merged:
                    layer.unmerge()
                layer.get_base_layer().weight.copy_(weight)


def _merge(layer: Layer, seed: int) -> None:
    weight = layer.get_base_layer().weight
    narrow = weight.data
    if narrow.dtype not in DROPPED:
        layer.merge()
        return
    weight.data = narrow.float()
    try:
        layer.merge()
        sums = weight.data
    finally:
        weight.data = narrow  # others may have views of it
    narrow.copy_(_randomly_rounded(sums, DROPPED[narrow.dtype], seed))


def _randomly_rounded(sums: torch.Tensor, bits: int, seed: int) -> torch.Tensor:
    """Float32 whose last bits are zero: one of the two such numbers around each, the nearer one more often."""
    chance = torch.Generator(sums.device).manual_seed(seed)
    added = torch.empty_like(sums, dtype=torch.int32).random_(1 << bits, generator=chance)
    return (added.add_(sums.view(torch.int32)) & -(1 << bits)).view(torch.float32)


def modules(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def layers(pipeline: Any) -> list[Layer]:
    return [m for part in modules(pipeline) for m in part.modules() if isinstance(m, Layer)]


def named_layers(pipeline: Any) -> Iterator[tuple[str, str, Layer]]:
    """Part, name and layer of everything that carries an adapter."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for name, layer in module.named_modules():
                if isinstance(layer, Layer):
                    yield part, name, layer


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
