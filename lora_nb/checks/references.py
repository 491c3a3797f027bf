"""What several exercises compare on: random inputs, and references by diffusers and peft."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, inject_adapter_in_model


def random_tensor(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_pair(
    rank: int, inputs: int, outputs: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    return random_tensor(rank, inputs, seed=seed + 100), random_tensor(
        outputs, rank, seed=seed + 200
    )


def noising_cases(seed: int) -> list[tuple]:
    """(x0, noise, alpha_bar) with alpha_bar of some timestep of a usual schedule."""
    alphas = DDPMScheduler().alphas_cumprod
    return [
        (
            random_tensor(2, 4, 3, 3, seed=seed + i),
            random_tensor(2, 4, 3, 3, seed=seed + 50 + i),
            float(alphas[t]),
        )
        for i, t in enumerate((0, 321, 999))
    ]


def by_scheduler(function: str) -> Callable:
    """A DDPMScheduler method as a function of (x0, noise, alpha_bar)."""
    scheduler = DDPMScheduler()

    def call(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        t = int((scheduler.alphas_cumprod - alpha_bar).abs().argmin())
        return getattr(scheduler, function)(x0, noise, torch.tensor([t] * len(x0)))

    return call


def peft_layer(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, rank: int
) -> torch.nn.Module:
    """A linear layer without bias that peft has adapted with these very matrices."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight
    model = torch.nn.ModuleDict({"layer": base})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"]), model)
    layer = model["layer"]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer
