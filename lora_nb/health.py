"""Signs of life of the adapters: whether their weights move, how far each block has come, whether B is still zero."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer

from lora_nb import adapters
from lora_nb.families import Family

EVERY = 25  # steps between looks at all weights
SETTLED = 50  # steps after which a part that has not moved is worth an alarm
DEAD = 0.5  # share of weights that have moved, below which something holds them

State = dict[str, dict[str, torch.Tensor]]  # by part and key, as adapters.state gives it


@dataclass(frozen=True)
class Health:
    """moved: by part, share of its weights that differ from where training began.

    zero_b: by part, share of its layers whose B is zero; such a layer leaves its base layer as it is.
    change: by part and block, ||scale B A|| / ||W|| over the block's adapted layers (Frobenius norms).
    """

    moved: dict[str, float]
    zero_b: dict[str, float]
    change: dict[str, dict[str, float]]

    @property
    def nothing_learned(self) -> bool:
        """Whether the adapters as a whole still are the base model."""
        return all(share == 1 for share in self.zero_b.values())

    def alarms(self, step: int) -> list[str]:
        """One sentence for each part that has not moved, though it should have by this step."""
        found = []
        for part in self.moved:
            if self.zero_b[part] == 1:
                found.append(f"After {step} steps B is still zero in every layer of {part}.")
            elif self.moved[part] < DEAD:
                found.append(
                    f"After {step} steps only {self.moved[part]:.0%} of the weights of {part} have moved."
                )
        return found


class Watch:
    """Compares a family's adapters with `start`, their state before the first step, whenever it is called."""

    def __init__(self, family: Family, start: State):
        self.family, self.start = family, start
        self.weights = adapters.parameters(family)
        self._base: dict[str, torch.Tensor] = {}  # ||W||^2 of the layers of each part

    def __call__(self) -> Health:
        moved, zero_b = {}, {}
        for part, weights in self.weights.items():
            # From a GPU in one piece: each transfer waits for it, and there are a thousand weights.
            now = torch.cat([weight.detach().flatten() for weight in weights]).cpu()
            pieces = now.split([weight.numel() for weight in weights])
            named = list(zip(self.start[part].items(), pieces, strict=True))
            changed = sum((x != start.flatten()).count_nonzero() for (_, start), x in named)
            moved[part] = changed.item() / len(now)
            zero = [not x.any() for (key, _), x in named if "lora_B" in key]
            zero_b[part] = sum(zero) / len(zero)
        return Health(moved, zero_b, {part: self._change(part) for part in moved})

    @torch.no_grad()
    def _change(self, part: str) -> dict[str, float]:
        """||scale B A|| / ||W|| of each block that carries adapters, in the order of the module."""
        names, layers = zip(*adapters.layers(self.family.trainable[part]), strict=True)
        if part not in self._base:  # frozen, and far larger than the adapters
            self._base[part] = torch.stack([_square(layer.get_base_layer()) for layer in layers])
        squares: dict[str, torch.Tensor] = {}
        for name, *each in zip(names, _changes(layers), self._base[part].tolist(), strict=True):
            block = block_of(name)
            squares[block] = squares.get(block, 0) + torch.tensor(each, dtype=torch.float64)
        return {
            block: (change.clamp(min=0) / weight).sqrt().item()
            for block, (change, weight) in squares.items()
        }


def _square(layer: torch.nn.Module) -> torch.Tensor:
    return layer.weight.float().square().sum()


def _changes(layers: Sequence[LoraLayer]) -> list[float]:
    """||scale B A||^2 of each layer; those of one shape together, as an adapter has hundreds of layers."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    factors = []
    for i, layer in enumerate(layers):
        a = layer.lora_A[adapters.ADAPTER].weight.flatten(1)
        b = layer.lora_B[adapters.ADAPTER].weight.flatten(1)
        factors.append((a, b))
        alike.setdefault((a.shape, b.shape), []).append(i)
    found = [0.0] * len(layers)
    for rows in alike.values():
        a, b = (torch.stack(each) for each in zip(*(factors[i] for i in rows), strict=True))
        # ||B A||^2 = trace(B'B AA'): two products of rank by rank instead of one of the layer's size
        products = ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).tolist()
        for i, product in zip(rows, products, strict=True):
            found[i] = product * layers[i].scaling[adapters.ADAPTER] ** 2
    return found


def block_of(name: str) -> str:
    """A layer's name up to its first number: "mid.attentions.0.to_q" -> "mid.attentions.0"."""
    return re.match(r"(?:[^.\d]\w*\.)*\d+|[^.]+", name).group()
