"""Z-Image: Qwen3's states of a chat, one transformer over text and picture, flow matching (Z-Image Team 2025)."""

from typing import Any, ClassVar

import torch

from lora_nb.families._imports import ZImagePipeline
from lora_nb.families.base import Batch
from lora_nb.families.sd3 import StableDiffusion3


class ZImage(StableDiffusion3):
    """The family of ZImagePipeline; loading, VAE and decoding are Stable Diffusion 3's, and Qwen3 takes T5's place."""

    name = "z_image"
    pipeline_class = ZImagePipeline
    flow: ClassVar = {"weighting_scheme": "none"}
    t5: ClassVar = ("tokenizer", "text_encoder")
    t5_tokens = 512
    uneven_texts = True
    targets: ClassVar = {"transformer": ("to_k", "to_q", "to_v", "to_out.0")}

    def __init__(self, pipeline: Any, *rest: Any):
        pipeline.default_sample_size = 128  # this pipeline does not say it: 1024 pixels
        super().__init__(pipeline, *rest)

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior's mean (B, C, h, w) and zeros: the reference draws no sample, it trains on the mean."""
        mean, std = super().moments(pixels)
        return mean, torch.zeros_like(std)

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Qwen3's last hidden states but one (B, t5_tokens, width) of a chat that opens with the caption, and its mask.

        mask: (B, t5_tokens), true where there is a token and no padding.
        """
        tokens = self.t5_tokenizer.apply_chat_template(
            [[{"role": "user", "content": caption}] for caption in captions],
            add_generation_prompt=True,
            enable_thinking=True,
            padding="max_length",
            max_length=self.t5_tokens,
            truncation=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.device)
        outputs = self.t5_encoder(**tokens, output_hidden_states=True)
        return {
            "encoder_hidden_states": outputs.hidden_states[-2],
            "mask": tokens["attention_mask"].bool(),
        }

    def condition(self, batch: Batch) -> dict[str, Any]:
        """The states of each caption without padding, B of (tokens, width); the transformer has padding of its own."""
        states = batch.text_states or self.text_states(batch.captions)
        texts = zip(states["encoder_hidden_states"], states["mask"], strict=True)
        return {"cap_feats": [text[kept].to(self.device, self.dtype) for text, kept in texts]}

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The velocity; this transformer's time runs from 0 at noise to 1, and it says x0 - noise."""
        frames = x_t.to(self.dtype).unsqueeze(2).unbind()  # B of (C, 1, H, W)
        time = 1 - t.to(self.device) / self.objective.num_timesteps
        outputs = self.transformer(list(frames), time, **condition).sample
        return -torch.stack(outputs).squeeze(2)
