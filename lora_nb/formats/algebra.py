"""Arithmetic on LoRAs: add, concatenate, resize by SVD, extract from two models, merge into a base and undo.

A LoRA is the change scale B A of each layer, a matrix of low rank. What is exact stays exact: adding is concatenating,
and only `resize` and `extract` drop something, the smallest singular values, and say how much.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_nb import adapters
from lora_nb.errors import ConfigError, FormatError
from lora_nb.formats.weights import Pair, Weights


def scaled(weights: Weights, factor: float) -> Weights:
    """The same LoRA with its effect multiplied."""
    return {
        part: {n: dataclasses.replace(p, scale=p.scale * factor) for n, p in pairs.items()}
        for part, pairs in weights.items()
    }


def concatenate(loras: Sequence[Weights], factors: Sequence[float] | None = None) -> Weights:
    """One LoRA whose effect is the weighted sum of all, exactly: A's stacked, B's side by side, ranks add up.

    Each scale is multiplied into its B, so the result's is 1. A layer that only some have keeps their ranks.
    Raises ConfigError for another number of factors, FormatError if two LoRAs disagree on a layer's shape.
    """
    factors = [1.0] * len(loras) if factors is None else list(factors)
    if len(factors) != len(loras):
        raise ConfigError(
            f"There are {len(loras)} LoRAs and {len(factors)} factors; give one each."
        )
    found: dict[str, dict[str, list[tuple[Pair, float]]]] = {}
    for weights, factor in zip(loras, factors, strict=True):
        for part, pairs in weights.items():
            for layer, pair in pairs.items():
                found.setdefault(part, {}).setdefault(layer, []).append((pair, factor))
    return {
        part: {layer: _stacked(f"{part}.{layer}", pairs) for layer, pairs in layers.items()}
        for part, layers in found.items()
    }


def _stacked(name: str, pairs: list[tuple[Pair, float]]) -> Pair:
    if len({(pair.down.shape[1:], pair.up.shape[0]) for pair, _ in pairs}) > 1:
        raise FormatError(f"The LoRAs are of different base models: {name} differs in shape.")
    down = torch.cat([pair.down for pair, _ in pairs])
    up = torch.cat([pair.up * (pair.scale * factor) for pair, factor in pairs], dim=1)
    return Pair(down, up, 1.0)


def add(
    loras: Sequence[Weights], factors: Sequence[float] | None = None, rank: int | None = None
) -> Weights:
    """The weighted sum as one LoRA: exact, with the ranks added up, or the best of the given rank."""
    total = concatenate(loras, factors)
    return total if rank is None else resize(total, rank)[0]


@dataclass(frozen=True)
class Kept:
    """What a resized layer keeps: its new rank and the share of sum(s^2) that its singular values s hold."""

    part: str
    layer: str
    rank: int
    energy: float


def spectrum(pair: Pair) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (outputs, r), singular values (r,) and V (r, inputs) of scale B A, float64, without forming the product.

    B = Q1 R1 and A^T = Q2 R2, so the singular values are those of the small R1 R2^T. r is at most the rank.
    """
    q_up, r_up = torch.linalg.qr(pair.up.flatten(1).double() * pair.scale)
    q_down, r_down = torch.linalg.qr(pair.down.flatten(1).double().T)
    u, values, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, values, v @ q_down.T


def resize(weights: Weights, rank: int, energy: float | None = None) -> tuple[Weights, list[Kept]]:
    """The LoRA of at most this rank nearest to the given one in every layer (Eckart and Young 1936).

    energy: keep only as many singular values as hold this share of sum(s^2), at most `rank`, in each layer.
    Returns the LoRA, scales 1, and what each layer kept.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; a LoRA needs at least 1.")
    out: Weights = {}
    kept = []
    for part, pairs in weights.items():
        for layer, pair in pairs.items():
            u, values, v = spectrum(pair)
            shares = (values**2).cumsum(0) / (values**2).sum().clamp(
                min=torch.finfo(torch.double).tiny
            )
            size = min(rank, len(values))
            if energy is not None:
                size = min(size, int((shares < energy).sum()) + 1)
            out.setdefault(part, {})[layer] = _split(
                u, values, v, size, pair.down.shape[1:], pair.up.shape[2:]
            )
            kept.append(Kept(part, layer, size, float(shares[size - 1])))
    return out, kept


def _split(
    u: torch.Tensor,
    values: torch.Tensor,
    v: torch.Tensor,
    rank: int,
    inputs: Sequence[int],
    ones: Sequence[int],
) -> Pair:
    """A and B of a decomposition's first terms, each with the root of the singular values."""
    root = values[:rank].sqrt()
    down = (root[:, None] * v[:rank]).float().view(rank, *inputs)
    up = (u[:, :rank] * root).float().view(len(u), rank, *ones)
    return Pair(down.contiguous(), up.contiguous(), 1.0)


@torch.no_grad()
def extract(
    base: dict[str, torch.nn.Module],
    tuned: dict[str, torch.nn.Module],
    rank: int,
    targets: dict[str, tuple[str, ...]] | None = None,
) -> tuple[Weights, list[Kept]]:
    """The LoRA of this rank nearest to the difference of two models, by part: tuned - base, layer by layer.

    targets: name endings of the layers to look at, by part; all linear layers and convolutions if None. Layers that do
    not differ are left out. Raises FormatError if the models differ in a layer that a LoRA cannot sit on, or in shape.
    """
    out: Weights = {}
    kept = []
    for part, module in base.items():
        ours, theirs = module.state_dict(), tuned[part].state_dict()
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            raise FormatError(
                f"The two models differ in the layers of {part}, so no LoRA leads from one to the other."
            )
        changed = {key for key in ours if not torch.equal(ours[key], theirs[key])}
        layers = adapters.adaptable(module)
        for layer, kind in layers.items():
            key = f"{layer}.weight"
            wanted = targets is None or any(
                adapters.matches(layer, t) for t in targets.get(part, ())
            )
            if key not in changed or not wanted:
                continue
            changed.remove(key)
            change = theirs[key].double() - ours[key].double()
            u, values, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            size = min(rank, len(values))
            ones = (1, 1) if isinstance(kind, torch.nn.Conv2d) else ()
            out.setdefault(part, {})[layer] = _split(u, values, v, size, change.shape[1:], ones)
            energy = float((values[:size] ** 2).sum() / (values**2).sum())
            kept.append(Kept(part, layer, size, energy))
        if changed:
            raise FormatError(
                f"The two models also differ in {len(changed)} tensors of {part} that it would not hold, such as "
                f"{sorted(changed)[0]}; name more targets, or keep the full model."
            )
    return out, kept


Undo = dict[str, dict[str, torch.Tensor]]  # part -> layer -> the base's weight


@torch.no_grad()
def merge(modules: dict[str, torch.nn.Module], weights: Weights, factor: float = 1.0) -> Undo:
    """Add factor * scale B A to the weights of the modules; returns what `undo` needs to put them back bit for bit.

    The base's own weights are kept: subtracting what was added would leave rounding behind.
    Raises FormatError, with nothing changed, if a part or layer is not there or has another shape.
    """
    places = {}
    for part, pairs in weights.items():
        layers = adapters.adaptable(modules[part]) if part in modules else {}
        for layer, pair in pairs.items():
            shape = (pair.up.shape[0], *pair.down.shape[1:])
            if layer not in layers or layers[layer].weight.shape != shape:
                raise FormatError(
                    f"The model has no layer {part}.{layer} of shape {shape}; it is another base."
                )
            places[part, layer] = layers[layer].weight
    kept: Undo = {}
    for (part, layer), weight in places.items():
        kept.setdefault(part, {})[layer] = weight.detach().clone()
        change = weights[part][layer].delta().to(weight.device) * factor
        weight.copy_((weight.float() + change).to(weight.dtype))
    return kept


@torch.no_grad()
def undo(modules: dict[str, torch.nn.Module], kept: Undo) -> None:
    """Put back the weights that `merge` kept."""
    for part, layers in kept.items():
        there = adapters.adaptable(modules[part])
        for layer, weight in layers.items():
            there[layer].weight.copy_(weight)
