"""The contract of a model family: all that the loss, the trainer and the adapters know about a model.

The training steps of all families differ in four places: how x0 is made, how the condition is made, what is noised and
predicted (the objective), and how the network is called. A new family is one file that fills in these places.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lora_nb import rng
from lora_nb.families import products, widened
from lora_nb.objectives import CosineDiffusion, Diffusion, FlowMatching


@dataclass(frozen=True)
class Batch:
    """The pictures of one micro-step.

    positions: global sample numbers; they name every random draw of these pictures.
    captions: B strings, after choice and dropout.
    moments: (mean, std) of x0, each (B, ...) float32.
    picture_states: what else the family wants to know of each picture, (B, ...) by name.
    geometry: (B, 6), original height and width, top and left of the crop, height and width of the square.
    text_states: what the text encoders say, (B, ...) by name; None where one of them trains.
    weights: (B,) factors on the pictures' losses, None for all alike.
    """

    positions: list[int]
    seed: int
    captions: list[str]
    moments: tuple[torch.Tensor, torch.Tensor]
    picture_states: dict[str, torch.Tensor]
    geometry: torch.Tensor
    text_states: dict[str, torch.Tensor] | None = None
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @classmethod
    def of_captions(cls, captions: list[str], resolution: int, seed: int = 0) -> "Batch":
        """A batch that has a condition but no pictures, for asking the network what it makes of given latents.

        resolution: pixels; the geometry is that of uncropped squares of this side.
        """
        side = [resolution, resolution, 0, 0, resolution, resolution]
        size = len(captions)
        nothing = torch.empty(size, 0)
        geometry = torch.tensor([side] * size)
        return cls(list(range(size)), seed, captions, (nothing, nothing), {}, geometry)


def from_moments(batch: Batch) -> torch.Tensor:
    """x0 = mean + std * noise, the noise named by the batch's positions; float32 on the CPU."""
    mean, std = batch.moments
    return mean + std * rng.normal(mean.shape[1:], batch.seed, "posterior", batch.positions)


def freeze(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put a module on the device in the dtype, in eval mode, with no weight that trains."""
    # The library's own `to` warns even where nothing is at stake.
    torch.nn.Module.to(module, device, dtype)
    module.requires_grad_(False).eval()
    widened.widen(module)
    products.use(module)


def move(family: "Family", device: str | torch.device) -> None:
    """Put all modules of a loaded family on the device."""
    for part in vars(family).values():
        for module in part.values() if isinstance(part, dict) else (part,):
            if isinstance(module, torch.nn.Module):
                torch.nn.Module.to(module, device)
    family.device = torch.device(device)


def tokenize(tokenizer: Any, captions: list[str], length: int | None = None) -> Any:
    """Token numbers and mask (B, length or model_max_length), padded and cut as the pipelines do it; on the CPU."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


class Defaults:
    """What most families do alike: x0 drawn from the moments, and a condition that is the caption alone."""

    def picture_states(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing: the condition is the caption alone."""
        return {}

    def latents(self, batch: Batch) -> torch.Tensor:
        """x0 = mean + std * noise of the moments, float32 on the device."""
        return from_moments(batch).to(self.device)

    def condition(self, batch: Batch) -> dict[str, Any]:
        """What `text_states` says, on the device in the family's dtype."""
        states = batch.text_states or self.text_states(batch.captions)
        return {name: value.to(self.device, self.dtype) for name, value in states.items()}


def network(family: "Family") -> torch.nn.Module:
    """The part that denoises, which every family names first among its targets."""
    return family.trainable[next(iter(family.targets))]


class Family(Protocol):
    """One kind of model, loaded and frozen.

    trainable: the modules that may carry LoRA, by the name used in configs and files.
    targets: the default LoRA target modules of each; the first part is the network that predicts.
    resolution: the side of the pictures it was trained on. pixel_multiple: what a side must be divisible by.
    tokenizer: of its text encoder; None for a network that sees no text.
    peft_keys, where there and true: files keep peft's names of A and B. bare_keys, likewise: they do not name the part.
    uneven_texts, likewise: the network takes as many tokens of each caption as it has, which the host must know.
    """

    name: str
    objective: Diffusion | CosineDiffusion | FlowMatching
    trainable: dict[str, torch.nn.Module]
    targets: dict[str, tuple[str, ...]]
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    resolution: int
    pixel_multiple: int

    @classmethod
    def load(cls, model: str, **options: Any) -> "Family":
        """Called once per run. In: a folder or Hub name. Out: modules frozen, in eval mode, on the device."""
        ...

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Called once per picture when cached. In: (B, 3, H, W) in [-1, 1]. Out: mean and std of x0, no gradient."""
        ...

    def picture_states(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Called once per picture when cached. Out: what the condition takes from the picture; mostly nothing."""
        ...

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Called once per caption when cached. Out: (B, ...) by name; has a gradient where a text encoder trains."""
        ...

    def latents(self, batch: Batch) -> torch.Tensor:
        """Called every micro-step. Out: x0 (B, ...) float32, drawn from the moments, no gradient."""
        ...

    def condition(self, batch: Batch) -> dict[str, Any]:
        """Called every micro-step. Out: keyword arguments of the network, handed to `predict`."""
        ...

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """Called every micro-step. In: noisy latents and timesteps (B,). Out: prediction, same shape as x_t."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Called by figures only. In: x0. Out: pixels (B, 3, H, W) in [-1, 1], or None where x0 is no picture."""
        ...

    def pipeline(self) -> Any:
        """Called for sampling. Out: a diffusers pipeline that shares these very modules."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """Called before the first step if asked for."""
        ...
