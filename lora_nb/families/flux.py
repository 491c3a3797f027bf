"""FLUX.1, dev and schnell: CLIP's pooled output and T5's states, a transformer over packed latents, flow matching."""

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F

from lora_nb.families._imports import FluxPipeline
from lora_nb.families.base import Batch
from lora_nb.families.sd3 import StableDiffusion3


class Flux(StableDiffusion3):
    """The family of FluxPipeline; loading, VAE, latents, T5 and decoding are Stable Diffusion 3's.

    training_guidance_scale: what a guidance-distilled model (dev) is told in training; schnell has no such input.
    """

    name = "flux"
    pipeline_class = FluxPipeline
    flow: ClassVar = {"weighting_scheme": "none"}
    t5: ClassVar = ("tokenizer_2", "text_encoder_2")
    t5_tokens = 512
    training_guidance_scale = 3.5
    targets: ClassVar = {
        "transformer": (
            *StableDiffusion3.targets["transformer"],
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        "text_encoder": StableDiffusion3.targets["text_encoder"],
    }

    @classmethod
    def load(cls, model: str, training_guidance_scale: float | None = None, **options: Any) -> Self:
        """The family of a diffusers folder or Hub name; options as for Stable Diffusion 3."""
        family = super().load(model, **options)
        if training_guidance_scale is not None:
            family.training_guidance_scale = training_guidance_scale
        return family

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """T5's last hidden states (B, t5_tokens, width) and CLIP's pooled output (B, width)."""
        clip = self.components["text_encoder"](self.token_ids(captions))
        return {
            "encoder_hidden_states": self.t5_states(captions),
            "pooled_projections": clip.pooler_output,
        }

    def condition(self, batch: Batch) -> dict[str, Any]:
        """Text states, their positions (all 0), and the guidance (B,) if the model takes one."""
        states = super().condition(batch)
        tokens = states["encoder_hidden_states"].shape[1]
        guidance = None
        if self.transformer.config.guidance_embeds:
            scale = float(self.training_guidance_scale)
            guidance = torch.full((len(batch),), scale, device=self.device)
        return states | {
            "txt_ids": torch.zeros(tokens, 3, device=self.device),
            "guidance": guidance,
        }

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The transformer's velocity; it reads 2 by 2 latents as one token, and time as t / T in (0, 1]."""
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        rows, columns = (torch.arange(side, device=self.device) for side in (height, width))
        grid = torch.cartesian_prod(rows, columns).float()  # (tokens, 2)
        velocity = self.transformer(
            F.pixel_unshuffle(x_t.to(self.dtype), 2).flatten(2).transpose(1, 2),  # (B, tokens, 4 C)
            timestep=t.to(self.device) / self.objective.num_timesteps,
            img_ids=F.pad(grid, (1, 0)),  # (0, row, column)
            **condition,
        ).sample
        return F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, (height, width)), 2)
