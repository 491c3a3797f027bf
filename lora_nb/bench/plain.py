"""The plain training loop: what a reference script does at every step, and nothing that is done to be fast.

The baseline where no checkout of the reference script is at hand, and on GPUs: peft's layers, the VAE and the text
encoder in each step, autocast for precision. Measured, the script itself is a little slower than this.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tqdm.auto
from diffusers import DDPMScheduler

from lora_nb import adapters, data
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.families import Family, load_family
from lora_nb.precision import DTYPES


class Plain:
    """A family with peft's adapters and torch's AdamW; `step(pixels, captions)` trains on one batch."""

    def __init__(self, family: Family, precision: str | None, rate: float, rank: int = 8):
        self.family, self.dtype = family, DTYPES[precision or "no"]
        for module in (family.vae, *family.trainable.values()):
            module.to(family.device, self.dtype)
        main = next(iter(family.targets))
        adapters.add(family, {main: LoraSpec(rank=rank)}, seed=42)
        self.network = family.trainable[main].train()
        self.weights = [w for w in self.network.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=1e-2)
        self.scheduler = DDPMScheduler.from_config(family.scheduler.config)

    def autocast(self) -> Any:
        """Autocast in the precision; nothing in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.family.device.type, self.dtype)

    def step(self, pixels: torch.Tensor, captions: list[str]) -> float:
        """The loss of one optimizer step on (B, 3, H, W) pixels in [-1, 1]."""
        family, device = self.family, self.family.device
        posterior = family.vae.encode(pixels.to(device, self.dtype)).latent_dist
        latents = posterior.sample() * family.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (len(latents),), device=device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        condition = self._condition(captions)
        with self.autocast():
            prediction = self.network(noisy, t, **condition).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _condition(self, captions: list[str]) -> dict[str, Any]:
        family = self.family
        states = family.text_states(captions)
        pooled = states.pop("text_embeds", None)
        if pooled is None:
            return states
        side = family.resolution
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(captions)).to(pooled)
        return states | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


def batches(config: TrainConfig) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Pixels and captions in a shuffled order, decoded anew each time, for ever."""
    pictures = data.load(config.data, "train")
    loader = torch.utils.data.DataLoader(
        range(len(pictures)), config.train_batch_size, shuffle=True
    )
    while True:
        for rows in loader:
            pixels = [data.pixels(pictures.image(r), config.data, 0, 0) for r in rows.tolist()]
            yield torch.stack(pixels), [pictures.caption(r, 0, 0) for r in rows.tolist()]


def main(config: TrainConfig) -> None:
    """Train by the plain loop on the CPU, with the progress bar that the reference script has."""
    torch.manual_seed(config.seed)
    family = load_family("auto", config.pretrained_model_name_or_path)
    plain = Plain(family, config.mixed_precision, config.learning_rate)
    bar = tqdm.auto.tqdm(range(config.max_train_steps))
    for _, (pixels, captions) in zip(range(config.max_train_steps), batches(config), strict=False):
        loss = plain.step(pixels, captions)
        bar.update(1)
        bar.set_postfix(step_loss=loss)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
