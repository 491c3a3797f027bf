"""The random draws of one training, written down, and played back to another: so that losses can be compared.

The reference script draws from one stream, ours by counter. In a parity run ours is given the script's pictures,
posterior noise, noise, timesteps and first adapter weights; what is compared is everything that is computed from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LORA = "lora/"


@contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Write what a diffusers training draws inside into a safetensors file; nothing it computes is changed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.autoencoders import vae
    from peft import get_peft_model_state_dict

    seen: dict[str, list[torch.Tensor]] = {"pixels": [], "posterior": [], "noise": [], "t": []}
    weights: dict[str, torch.Tensor] = {}

    def noting(name: str, draw: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen[name].append(draw(*args, **options))
            return seen[name][-1]

        return call

    def encode(self: Any, pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen["pixels"].append(pixels)
        return plain_encode(self, pixels, *args, **options)

    def add_adapter(self: Any, *args: Any, **options: Any) -> None:
        plain_add(self, *args, **options)
        for key, value in get_peft_model_state_dict(self).items():
            weights[LORA + key] = value.detach().clone()

    plain_encode, plain_add = AutoencoderKL.encode, UNet2DConditionModel.add_adapter
    places = [
        (torch, "randn_like", noting("noise", torch.randn_like)),
        (torch, "randint", noting("t", torch.randint)),
        (vae, "randn_tensor", noting("posterior", vae.randn_tensor)),
        (AutoencoderKL, "encode", encode),
        (UNet2DConditionModel, "add_adapter", add_adapter),
    ]
    kept = [(where, name, getattr(where, name)) for where, name, _ in places]
    try:
        for where, name, new in places:
            setattr(where, name, new)
        yield
    finally:
        for where, name, old in kept:
            setattr(where, name, old)
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = {k: torch.cat(v).float().contiguous().cpu() for k, v in seen.items()}
        save_file(steps | {k: v.float().contiguous().cpu() for k, v in weights.items()}, file)


class Draws:
    """What `recorded` wrote: pixels, posterior noise, noise and timesteps by sample position, and adapter weights."""

    def __init__(self, file: Path):
        tensors = load_file(file)
        self.weights = {k.removeprefix(LORA): v for k, v in tensors.items() if k.startswith(LORA)}
        self.pixels, self.t = tensors["pixels"], tensors["t"]
        self.normal = {name: tensors[name] for name in ("posterior", "noise")}

    def rows(self, pictures: Any, spec: Any) -> list[int]:
        """Which picture was shown at each position; raises KeyError if its pixels are not exactly one of ours."""
        from lora_nb import data

        known = {
            data.pixels(pictures.image(i), spec, 0, 0).numpy().tobytes(): i
            for i in range(len(pictures))
        }
        return [known[pixels.numpy().tobytes()] for pixels in self.pixels]


@contextmanager
def played_back(draws: Draws, training: Any, timesteps: int = 1000) -> Iterator[None]:
    """Inside, the training is given the recorded draws by sample position; it starts from the recorded weights."""
    from lora_nb import adapters, data, rng

    rows = draws.rows(training.pictures, training.pictures.spec)
    part = next(iter(training.learner.weights))
    adapters.load_state(training.family, {part: draws.weights})
    normal, uniform, row_at = rng.normal, rng.uniform, data.row_at

    def given_normal(shape: Any, seed: int, purpose: str, positions: Any) -> torch.Tensor:
        if purpose in draws.normal:
            return draws.normal[purpose][list(positions)]
        return normal(shape, seed, purpose, positions)

    def given_uniform(seed: int, purpose: str, positions: Any) -> torch.Tensor:
        if purpose == "timesteps":  # the middle of the interval that means this timestep
            return (draws.t[list(positions)] + 0.5) / timesteps
        return uniform(seed, purpose, positions)

    try:
        rng.normal, rng.uniform = given_normal, given_uniform
        data.row_at = lambda position, n, seed: rows[position]
        yield
    finally:
        rng.normal, rng.uniform, data.row_at = normal, uniform, row_at
