"""What a checkpoint holds of a run: adapters and optimizer as flat named tensors, and a mark of the base model."""

import hashlib
from typing import Any

import torch

from lora_nb import adapters
from lora_nb.families import Family

SAMPLED = 64  # values of each base weight that enter its mark


def pack(family: Family, optimizer: Any) -> dict[str, torch.Tensor]:
    """Tensors on the CPU by name: adapter/<part>/<key> and optimizer/<weight number>/<moment>."""
    tensors = {
        f"adapter/{part}/{key}": value
        for part, weights in adapters.state(family).items()
        for key, value in weights.items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value).cpu()
    return tensors


def adapter_weights(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The adapters alone of what `pack` gave, by part and peft key."""
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, owner, key = name.split("/", 2)
        if kind == "adapter":
            weights.setdefault(owner, {})[key] = value
    return weights


def unpack(family: Family, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put what `pack` gave back into adapters of the same shape and their optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, owner, key = name.split("/", 2)
        if kind == "optimizer":
            state.setdefault(int(owner), {})[key] = value
    adapters.load_state(family, adapter_weights(tensors))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def grown(
    family: Family, optimizer: Any, tensors: dict[str, torch.Tensor], shrink: dict[str, float]
) -> dict[str, torch.Tensor]:
    """What `pack` gave of adapters of a lower rank, in the shapes of the fresh ones that `family` carries now.

    New rows of A keep their fresh values, new columns of B and all new moments are zero, so that B A is what it was.
    shrink: by part, old scale / new scale; B is multiplied by it, and its gradient's moments are divided.
    """
    fresh = pack(family, optimizer)
    named = [
        (part, name, weight)
        for part, module in family.trainable.items()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    ]
    out = {}
    for name, value in tensors.items():
        kind, owner, key = name.split("/", 2)
        if kind == "adapter":
            factor = shrink[owner] if "lora_B" in key else 1.0
            out[name] = _within(fresh[name], value * factor)
        else:
            part, weight_name, weight = named[int(owner)]
            power = {"exp_avg": 1, "exp_avg_sq": 2}.get(key, 0) * ("lora_B" in weight_name)
            whole = torch.zeros(weight.shape) if value.dim() else value
            out[name] = _within(whole, value / shrink[part] ** power)
    return out


def _within(whole: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    """`whole` with its first entries of each dimension replaced by `corner`."""
    whole = whole.clone()
    whole[tuple(slice(size) for size in corner.shape)] = corner
    return whole


def base_mark(family: Family) -> str:
    """A short mark of the frozen weights under the adapters, the same in float32 and bfloat16.

    A few values of each weight, so that it costs little: it tells models apart, it does not prove them equal.
    """
    digest = hashlib.sha256()
    for part in sorted(family.trainable):
        named = adapters.base_weights(family.trainable[part].named_parameters())
        for name in sorted(named):
            values = named[name].detach().flatten()[:SAMPLED].to("cpu", torch.bfloat16)
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
