"""Kandinsky 2.2, second stage: a UNet that turns a CLIP image embedding into a picture (Razzhigaev et al. 2023).

It sees no text. In training the embedding is that of the picture itself; the first stage makes one from a prompt.
"""

from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from lora_nb.families._imports import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    quiet,
)
from lora_nb.families._two_stages import image_embeds, other_stage, prefixed
from lora_nb.families.base import Batch, Defaults, freeze
from lora_nb.objectives import Diffusion

PUBLISHED_PRIOR = "kandinsky-community/kandinsky-2-2-prior"


class KandinskyDecoder(Defaults):
    """The family of KandinskyV22Pipeline; pictures are drawn with the combined pipeline."""

    name = "kandinsky_decoder"
    pipeline_class = KandinskyV22Pipeline
    targets: ClassVar = {
        "unet": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    }
    peft_keys = bare_keys = True
    tokenizer = None

    def __init__(
        self,
        pipeline: Any,
        image_encoder: CLIPVisionModelWithProjection,
        image_processor: CLIPImageProcessor,
        prior: str,
        objective: Diffusion,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.unet, self.movq, self.scheduler = pipeline.unet, pipeline.movq, pipeline.scheduler
        self.image_encoder, self.image_processor = image_encoder, image_processor
        self.prior, self.objective, self.dtype, self.device = prior, objective, dtype, device
        self.trainable = {"unet": self.unet}
        for module in (self.unet, self.image_encoder):
            freeze(module, dtype, device)
        freeze(self.movq, torch.float32, device)  # runs once per picture, so precision is cheap
        self.pixel_multiple = 2 ** (len(self.movq.config.block_out_channels) - 1)
        self.resolution = self.unet.config.sample_size * self.pixel_multiple

    @classmethod
    def load(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        revision: str | None = None,
        variant: str | None = None,
        prior: str | None = None,
    ) -> Self:
        """The family of a decoder's diffusers folder or Hub name.

        prior: folder or Hub name of the first stage, which has the image encoder; None means the folder `prior`
        inside the decoder's, or else the published one.
        """
        prior = other_stage(model, "prior", prior, PUBLISHED_PRIOR)
        with quiet():
            pipeline = cls.pipeline_class.from_pretrained(
                model, revision=revision, variant=variant, use_safetensors=True
            )
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                prior, subfolder="image_encoder", use_safetensors=True
            )
            processor = CLIPImageProcessor.from_pretrained(prior, subfolder="image_processor")
        objective = Diffusion.from_scheduler(pipeline.scheduler, prediction_type, snr_gamma)
        return cls(pipeline, encoder, processor, prior, objective, dtype, torch.device(device))

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The MoVQ encoder's latents (B, C, h, w) without any scale, and a standard deviation of zero."""
        latents = torch.cat(
            [self.movq.encode(p[None].to(self.device, torch.float32)).latents.cpu() for p in pixels]
        )
        return latents, torch.zeros_like(latents)

    def picture_states(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """CLIP's image embedding of the picture, (B, projection_dim)."""
        return {"image_embeds": image_embeds(pixels, self.image_encoder, self.image_processor)}

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Nothing: this stage sees no text."""
        return {}

    def condition(self, batch: Batch) -> dict[str, Any]:
        """The image embedding as an added condition; no encoder hidden states."""
        embeds = batch.picture_states["image_embeds"].to(self.device, self.dtype)
        return {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": embeds}}

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The first half of the UNet's channels; the second half is a learned variance, which is not trained."""
        both = self.unet(x_t.to(self.dtype), t.to(self.device), **condition).sample
        return both[:, : x_t.shape[1]]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of latents, which are not rounded to the code book, as in the pipeline."""
        return self.movq.decode(
            latents.to(self.device, torch.float32), force_not_quantize=True
        ).sample.clamp(-1, 1)

    @cached_property
    def first_stage(self) -> Any:
        """The prior's pipeline, loaded when the first picture is drawn; it shares the image encoder."""
        with quiet():
            prior = KandinskyV22PriorPipeline.from_pretrained(
                self.prior, image_encoder=self.image_encoder, use_safetensors=True
            )
        for module in (prior.prior, prior.text_encoder):
            freeze(module, self.dtype, self.device)
        return prior

    def pipeline(self) -> Any:
        """The combined pipeline, from prompt to picture, over this UNet."""
        pipeline = KandinskyV22CombinedPipeline(
            unet=self.unet,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            movq=self.movq,
            **prefixed(self.first_stage, "prior_"),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the UNet."""
        self.unet.enable_gradient_checkpointing()
