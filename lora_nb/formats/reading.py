"""Find a place in a pipeline for every tensor of a LoRA file, or say in one sentence why there is none.

Every spelling that the known tools have for each layer of this very pipeline is written down first; then a key is
looked up, never guessed from its underscores. Nothing here changes the pipeline.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_nb import adapters
from lora_nb.errors import FormatError
from lora_nb.formats import lokr
from lora_nb.formats.header import first, understood
from lora_nb.formats.placing import (
    Found,
    check_factors,
    described,
    finite,
    placed,
    refuse_other_methods,
    settings_of,
)
from lora_nb.formats.spelling import spellings

Plan = dict[str, tuple[PeftConfig, dict[str, torch.Tensor]]]  # by part, in peft's keys


def plan(pipeline: Any, file: Path) -> Plan:
    """A place for every tensor of the file; raises FormatError and changes nothing."""
    with understood(file):
        return _plan(pipeline, file)


def _plan(pipeline: Any, file: Path) -> Plan:
    tensors = finite(file)
    refuse_other_methods(file, list(tensors))
    header, settings = described(file)
    layers = placed(file, tensors, spellings(pipeline, header.get("part")))
    places: Plan = {}
    for part, found in layers.items():
        module, named = getattr(pipeline, part), settings_of(part, settings)
        make = _lokr_plan if any(map(lokr.is_lokr, found.values())) else _lora_plan
        places[part] = make(file, module, part, found, named)
    return places


def _lora_plan(
    file: Path, module: torch.nn.Module, part: str, found: Found, settings: dict[str, Any]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    _check_pairs(file, module, part, found)
    config = _config(file, settings) if settings else _config_from_shapes(module, found)
    _check_complete(file, module, part, found, config)
    return config, dict(_peft_state(found))


def _lokr_plan(
    file: Path, module: torch.nn.Module, part: str, found: Found, settings: dict[str, Any]
) -> tuple[LoKrConfig, dict[str, torch.Tensor]]:
    """As `_lora_plan`; a LoRA beside LoKr in the same part is one too, for peft has one kind in a model."""
    pairs = {layer: roles for layer, roles in found.items() if not lokr.is_lokr(roles)}
    _check_pairs(file, module, part, pairs)
    found = found | {layer: lokr.of_lora(roles) for layer, roles in pairs.items()}
    _check_factors(file, module, part, found)
    ranks = {layer: max(1, lokr.rank(roles)) for layer, roles in found.items()}
    scales = {layer: lokr.scale(roles) for layer, roles in found.items()}
    if settings:
        stated = _config(file, settings, LoKrConfig)
        _check_complete(file, module, part, found, stated)
        scales = {layer: lokr_scale(stated, layer) for layer in found}
    alphas = {layer: scales[layer] * ranks[layer] for layer in found}
    state = {
        f"{layer}.{role}": tensor.contiguous()
        for layer, roles in found.items()
        for role, tensor in roles.items()
        if role in lokr.FACTORS
    }
    rank, alpha, patterns = _patterns(module, ranks, alphas)
    return LoKrConfig(r=rank, alpha=alpha, decompose_both=True, **patterns), state


def _peft_state(found: Found) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, roles in found.items():
        for role in ("lora_A", "lora_B"):
            yield f"{layer}.{role}.weight", roles[role]
        if "magnitude" in roles:
            yield f"{layer}.lora_magnitude_vector", roles["magnitude"].flatten()


def _config(file: Path, settings: dict[str, Any], kind: type = LoraConfig) -> PeftConfig:
    """The peft config of a file's metadata; start values are those of the file, never computed from the base."""
    start = "init_lora_weights" if kind is LoraConfig else "init_weights"
    try:
        return kind(**(settings | {start: True}))
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"The adapter metadata of {file.name} cannot be read ({error}); a newer peft may have written it."
        ) from error


def _config_from_shapes(module: torch.nn.Module, found: Found) -> LoraConfig:
    """Without metadata: rank from the shapes, alpha = rank unless the file says otherwise."""
    ranks = {layer: roles["lora_A"].shape[0] for layer, roles in found.items()}
    alphas = {layer: float(found[layer].get("alpha", rank)) for layer, rank in ranks.items()}
    return pattern_config(module, ranks, alphas, any("magnitude" in r for r in found.values()))


def pattern_config(
    module: torch.nn.Module, ranks: dict[str, int], alphas: dict[str, float], dora: bool = False
) -> LoraConfig:
    """A peft config of these layers, each with its own rank and alpha."""
    rank, alpha, patterns = _patterns(module, ranks, alphas)
    return LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, **patterns)


def _patterns(
    module: torch.nn.Module, ranks: dict[str, int], alphas: dict[str, float]
) -> tuple[int, float, dict[str, Any]]:
    """The commonest rank and alpha, and peft's settings for layers that have others."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # Each name anchored: peft reads pattern keys as regular expressions that match at the end.
    return (
        rank,
        alpha,
        {
            "target_modules": targets(module, list(ranks)),
            "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        },
    )


def lokr_scale(config: LoKrConfig, layer: str) -> float:
    """peft's scale of a LoKr layer: alpha / rank, also if both factors are whole."""
    rank, alpha = (
        pattern.get(get_pattern_key(pattern, layer), default)
        for pattern, default in (
            (config.rank_pattern, config.r),
            (config.alpha_pattern, config.alpha),
        )
    )
    return alpha / rank


def targets(module: torch.nn.Module, layers: list[str]) -> list[str] | str:
    """peft target modules that mean these layers and no others.

    peft takes a name in a list for the end of a name too; where that would catch more, one expression names them all.
    """
    caught = [n for n in adapters.adaptable(module) if any(adapters.matches(n, t) for t in layers)]
    return layers if len(caught) == len(layers) else "|".join(re.escape(layer) for layer in layers)


def _check_pairs(file: Path, module: torch.nn.Module, part: str, found: Found) -> None:
    """A and B of every layer are there and fit the layer."""
    single = [
        f"{part}.{n}" for n, roles in found.items() if not {"lora_A", "lora_B"} <= roles.keys()
    ]
    if single:
        raise FormatError(
            f"{file.name} is incomplete: {len(single)} layers have A or B but not both "
            f"({first(single)}); get it again."
        )
    layers = adapters.adaptable(module)
    for layer, roles in found.items():
        outputs, inputs = layers[layer].weight.shape[:2]
        made_for = (roles["lora_B"].shape[0], roles["lora_A"].shape[1])
        if made_for != (outputs, inputs):
            raise FormatError(
                f"{file.name} was made for another base model: its {part}.{layer} goes from "
                f"{made_for[1]} to {made_for[0]} numbers, this model's from {inputs} to {outputs}."
            )
        magnitude = roles.get("magnitude")
        if magnitude is not None and magnitude.numel() != outputs:
            raise FormatError(
                f"{file.name} has a DoRA magnitude of {magnitude.numel()} numbers at {part}.{layer}, which has "
                f"{outputs} outputs; magnitudes of inputs cannot be read here."
            )


def _check_factors(file: Path, module: torch.nn.Module, part: str, found: Found) -> None:
    """The factors of every layer are there, make a change of its shape and mean one scale."""
    check_factors(file, part, found)
    layers = adapters.adaptable(module)
    for layer, roles in found.items():
        weight = layers[layer].weight.shape
        if not lokr.fits(roles, weight):
            w1, w2 = lokr.shapes(roles)
            raise FormatError(
                f"{file.name} was made for another base model: the Kronecker factors of its {part}.{layer} are "
                f"{w1} and {w2}, this model's weight is {tuple(weight)}."
            )
        if (
            "alpha" in roles and len(lokr.ranks(roles)) > 1
        ):  # LyCORIS divides by w1's, others by w2's
            raise FormatError(
                f"{file.name} has two ranks at {part}.{layer}, so its alpha could mean two scales; get it again."
            )


def _check_complete(
    file: Path,
    module: torch.nn.Module,
    part: str,
    found: Found,
    config: PeftConfig,
) -> None:
    """The layers and ranks that the config names are those of the file."""
    named = {
        layer
        for layer in adapters.adaptable(module)
        if bool(check_target_module_exists(config, layer)) is True
    }
    if missing := [f"{part}.{layer}" for layer in sorted(named - found.keys())]:
        raise FormatError(
            f"{file.name} is incomplete: {len(missing)} trained layers are not in it ({first(missing)}); get it again."
        )
    wrong = sorted(found.keys() - named)
    for layer, roles in found.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        if lokr.is_lokr(roles):
            agrees = lokr.ranks(roles) <= {rank}
        else:
            agrees = roles["lora_A"].shape[0] == roles["lora_B"].shape[1] == rank
            agrees &= ("magnitude" in roles) == config.use_dora
        if not agrees:
            wrong.append(layer)
    if wrong:
        raise FormatError(
            f"{file.name} contradicts its own metadata in {len(wrong)} layers ({first(wrong)}); get it again."
        )
