"""Signs of life of the adapters: whether their weights move, how far each block has come, whether B is still zero."""

import re
from dataclasses import dataclass

import torch

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


def measure(family: Family, start: State) -> Health:
    """Compare the adapters with `start`, their state before the first step."""
    now = adapters.state(family)
    moved, zero_b = {}, {}
    for part, weights in now.items():
        changed = sum((value != start[part][key]).sum().item() for key, value in weights.items())
        moved[part] = changed / sum(value.numel() for value in weights.values())
        zero = [not value.any() for key, value in weights.items() if "lora_B" in key]
        zero_b[part] = sum(zero) / len(zero)
    return Health(moved, zero_b, {part: _change(family.trainable[part]) for part in now})


@torch.no_grad()
def _change(module: torch.nn.Module) -> dict[str, float]:
    """||scale B A|| / ||W|| of each block that carries adapters, in the order of the module."""
    squares: dict[str, list[torch.Tensor]] = {}
    for name, layer in adapters.layers(module):
        a = layer.lora_A[adapters.ADAPTER].weight.flatten(1)
        b = layer.lora_B[adapters.ADAPTER].weight.flatten(1)
        # ||B A||^2 = trace(B'B AA'): two products of rank by rank instead of one of the layer's size
        product = ((b.T @ b) * (a @ a.T)).sum() * layer.scaling[adapters.ADAPTER] ** 2
        weight = layer.get_base_layer().weight.float().square().sum()
        sums = squares.setdefault(block_of(name), [torch.zeros_like(weight)] * 2)
        squares[block_of(name)] = [sums[0] + product, sums[1] + weight]
    return {
        block: (change.clamp(min=0) / weight).sqrt().item()
        for block, (change, weight) in squares.items()
    }


def block_of(name: str) -> str:
    """A layer's name up to its first number: "mid.attentions.0.to_q" -> "mid.attentions.0"."""
    return re.match(r"(?:[^.\d]\w*\.)*\d+|[^.]+", name).group()
