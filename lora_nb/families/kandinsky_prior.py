"""Kandinsky 2.2, first stage: a transformer that makes a CLIP image embedding from text (Ramesh et al. 2022).

There are no pixels in it: x0 is the embedding of the picture, normalised by the model's own mean and deviation.
"""

from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch.utils.checkpoint import checkpoint

from lora_nb.families._imports import (
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    quiet,
)
from lora_nb.families._two_stages import image_embeds, other_stage, prefixed
from lora_nb.families.base import Defaults, freeze, tokenize
from lora_nb.objectives import Diffusion

PUBLISHED_DECODER = "kandinsky-community/kandinsky-2-2-decoder"


class KandinskyPrior(Defaults):
    """The family of KandinskyV22PriorPipeline; pictures are drawn with the combined pipeline."""

    name = "kandinsky_prior"
    pipeline_class = KandinskyV22PriorPipeline
    targets: ClassVar = {"prior": ("to_k", "to_q", "to_v", "to_out.0")}
    peft_keys = bare_keys = True
    pixel_multiple = 1

    def __init__(
        self,
        pipeline: Any,
        decoder: str,
        objective: Diffusion,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.prior, self.tokenizer = pipeline.prior, pipeline.tokenizer
        self.text_encoder, self.image_encoder = pipeline.text_encoder, pipeline.image_encoder
        self.image_processor, self.scheduler = pipeline.image_processor, pipeline.scheduler
        self.decoder, self.objective, self.dtype, self.device = decoder, objective, dtype, device
        self.trainable = {"prior": self.prior}
        # Copies from before the cast: in half precision they would bend the target.
        self.clip_mean = self.prior.clip_mean.detach().float().clone()  # (1, D)
        self.clip_std = self.prior.clip_std.detach().float().clone()
        for module in (self.prior, self.text_encoder, self.image_encoder):
            freeze(module, dtype, device)
        self.resolution = self.image_encoder.config.image_size

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
        decoder: str | None = None,
    ) -> Self:
        """The family of a prior's diffusers folder or Hub name.

        The sampler's scheduler has the noise schedule of the training: squared cosine, predicting x0.
        decoder: folder or Hub name of the second stage, for pictures; None means the folder `decoder` inside the
        prior's, or else the published one.
        """
        with quiet():
            pipeline = cls.pipeline_class.from_pretrained(
                model, revision=revision, variant=variant, use_safetensors=True
            )
        objective = Diffusion.from_scheduler(pipeline.scheduler, prediction_type, snr_gamma)
        decoder = other_stage(model, "decoder", decoder, PUBLISHED_DECODER)
        return cls(pipeline, decoder, objective, dtype, torch.device(device))

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised CLIP image embedding (B, D), and a standard deviation of zero."""
        embeds = image_embeds(pixels, self.image_encoder, self.image_processor)
        x0 = (embeds - self.clip_mean) / self.clip_std
        return x0, torch.zeros_like(x0)

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Pooled text (B, D), last hidden states (B, tokens, width), and which tokens are text (B, tokens)."""
        tokens = tokenize(self.tokenizer, captions)
        output = self.text_encoder(tokens.input_ids.to(self.device))
        return {
            "proj_embedding": output.text_embeds,
            "encoder_hidden_states": output.last_hidden_state,
            "attention_mask": tokens.attention_mask,
        }

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The transformer's predicted embedding (B, D) at timesteps t in 0..T-1."""
        output = self.prior(x_t.to(self.dtype), t.to(self.device), **condition)
        return output.predicted_image_embedding

    def decode(self, latents: torch.Tensor) -> None:
        """None: an embedding has no pixels; only the second stage, sampling, makes a picture of it."""
        return None

    @cached_property
    def second_stage(self) -> Any:
        """The decoder's pipeline, loaded when the first picture is drawn."""
        with quiet():
            decoder = KandinskyV22Pipeline.from_pretrained(self.decoder, use_safetensors=True)
        freeze(decoder.unet, self.dtype, self.device)
        freeze(decoder.movq, torch.float32, self.device)
        return decoder

    def pipeline(self) -> Any:
        """The combined pipeline, from prompt to picture, over this prior."""
        first = KandinskyV22PriorPipeline(
            prior=self.prior,
            image_encoder=self.image_encoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
            image_processor=self.image_processor,
        )
        pipeline = KandinskyV22CombinedPipeline(
            **self.second_stage.components, **prefixed(first, "prior_")
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the transformer's blocks; the class itself has no switch for it."""
        for block in self.prior.transformer_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
