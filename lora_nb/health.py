"""Signs of life of the adapters: whether their weights move, and whether any layer does something at all."""

from dataclasses import dataclass

import torch

from lora_nb import adapters
from lora_nb.families import Family

EVERY = 50  # steps between looks at all weights
SETTLED = 50  # steps after which a part that has not moved is worth an alarm
DEAD = 0.5  # share of weights that have moved, below which something holds them

State = dict[str, dict[str, torch.Tensor]]  # by part and key, as adapters.state gives it


@dataclass(frozen=True)
class Health:
    """moved: by part, share of its weights that differ from where training began.

    zero_b: by part, share of its layers whose B is zero; such a layer leaves its base layer as it is.
    """

    moved: dict[str, float]
    zero_b: dict[str, float]

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
    return Health(moved, zero_b)
