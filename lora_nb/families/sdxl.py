"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is told sizes and crops (Podell et al. 2023)."""

from typing import Any, ClassVar

import torch

from lora_nb.families._imports import StableDiffusionXLPipeline
from lora_nb.families.base import Batch
from lora_nb.families.names import KohyaLayout
from lora_nb.families.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """The family of StableDiffusionXLPipeline; VAE, latents, prediction and decoding are Stable Diffusion's."""

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    unused: ClassVar = {"add_watermarker": False}
    targets: ClassVar = StableDiffusion.targets | {
        "text_encoder_2": StableDiffusion.targets["text_encoder"]
    }
    kohya: ClassVar = KohyaLayout(
        prefixes={
            "unet": "lora_unet",
            "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2",
        },
        compvis=True,
        base_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
    )

    def __init__(self, pipeline: Any, *rest: Any):
        self.text_encoder_2, self.tokenizer_2 = pipeline.text_encoder_2, pipeline.tokenizer_2
        self.empty_is_zero = pipeline.config.force_zeros_for_empty_prompt
        super().__init__(pipeline, *rest)

    @property
    def text_parts(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        return super().text_parts | {"text_encoder_2": (self.tokenizer_2, self.text_encoder_2)}

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Last states but one of both encoders side by side, and the pooled output of the second.

        (B, tokens, width 1 + width 2) and (B, projection width).
        """
        outputs = [
            encoder(self.token_ids(captions, tokenizer), output_hidden_states=True)
            for tokenizer, encoder in self.text_parts.values()
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": outputs[-1].text_embeds}

    def condition(self, batch: Batch) -> dict[str, Any]:
        """Encoder hidden states; pooled text and the geometry of the picture as added conditions."""
        states = super().condition(batch)
        pooled = states.pop("text_embeds")
        sizes = batch.geometry.to(self.device, self.dtype)
        return states | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    def parts(self) -> dict[str, Any]:
        """The modules and tokenizers that the pipeline is made of."""
        second = {"text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2}
        return super().parts() | second | {"force_zeros_for_empty_prompt": self.empty_is_zero}
