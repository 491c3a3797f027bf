"""Stable Diffusion 1.x and 2.x: a VAE, one CLIP text encoder, a UNet; epsilon or v-prediction."""

from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL

from lora_nb.families._imports import StableDiffusionPipeline, quiet
from lora_nb.families.base import Defaults, freeze, tokenize
from lora_nb.families.names import KohyaLayout, second_version
from lora_nb.objectives import Diffusion


class StableDiffusion(Defaults):
    """The family of StableDiffusionPipeline (Rombach et al. 2022)."""

    name = "sd"
    pipeline_class = StableDiffusionPipeline
    unused: ClassVar = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    targets: ClassVar = {
        "unet": ("to_k", "to_q", "to_v", "to_out.0"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }
    kohya: ClassVar = KohyaLayout(
        prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
        compvis=False,
        base_version="sd_v1",
        architecture="stable-diffusion-v1",
        implementation="diffusers",
        second=second_version,
    )

    def __init__(
        self, pipeline: Any, objective: Diffusion, dtype: torch.dtype, device: torch.device
    ):
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.scheduler, self.objective = pipeline.scheduler, objective
        self.dtype, self.device = dtype, device
        encoders = {part: encoder for part, (_, encoder) in self.text_parts.items()}
        self.trainable = {"unet": self.unet} | encoders
        for module in self.trainable.values():
            freeze(module, dtype, device)
        # The VAE stays in float32: half precision overflows in some, and it runs once per picture.
        freeze(self.vae, torch.float32, device)
        self.pixel_multiple = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution = self.unet.config.sample_size * self.pixel_multiple

    @property
    def text_parts(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        """Tokenizer and text encoder of each text part."""
        return {"text_encoder": (self.tokenizer, self.text_encoder)}

    @classmethod
    def load(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        snr_floor: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
    ) -> Self:
        """The family of a diffusers folder or Hub name; the objective follows the model's own scheduler.

        vae: folder or Hub name of another autoencoder for the same latents.
        """
        with quiet():
            pipeline = cls.pipeline_class.from_pretrained(
                model, revision=revision, variant=variant, use_safetensors=True, **cls.unused
            )
            if vae is not None:
                pipeline.register_modules(vae=AutoencoderKL.from_pretrained(vae))
        objective = Diffusion.from_scheduler(
            pipeline.scheduler, prediction_type, snr_gamma, snr_floor
        )
        return cls(pipeline, objective, dtype, torch.device(device))

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the scaled latents, (B, C, h, w) each, float32 on the CPU.

        Pictures are encoded one by one, so that a picture's latents do not depend on its neighbours in the batch.
        """
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        means, stds = [], []
        for picture in pixels:
            posterior = self.vae.encode(picture[None].to(self.device, torch.float32)).latent_dist
            means.append((posterior.mean.cpu() - shift) * scale)
            stds.append(posterior.std.cpu() * scale)
        return torch.cat(means).contiguous(), torch.cat(stds).contiguous()

    def token_ids(
        self, captions: list[str], tokenizer: Any = None, length: int | None = None
    ) -> torch.Tensor:
        """Token numbers (B, length or model_max_length), padded and cut as the pipeline does it."""
        return tokenize(tokenizer or self.tokenizer, captions, length).input_ids.to(self.device)

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The text encoder's last hidden states, (B, model_max_length, width)."""
        return {"encoder_hidden_states": self.text_encoder(self.token_ids(captions))[0]}

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The UNet's output at timesteps t in 0..T-1."""
        return self.unet(x_t.to(self.dtype), t.to(self.device), **condition).sample

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] of scaled latents."""
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        return self.vae.decode(latents.to(self.device) / scale + shift).sample.clamp(-1, 1)

    def parts(self) -> dict[str, Any]:
        """The modules and tokenizers that the pipeline is made of."""
        own = {"unet": self.unet, "vae": self.vae}
        return own | {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer} | self.unused

    def pipeline(self) -> Any:
        """A sampling pipeline over these modules; it needs no dtype change of its own."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipeline = self.pipeline_class(scheduler=scheduler, **self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the network, the first part, and in the text encoders."""
        self.trainable[next(iter(self.targets))].enable_gradient_checkpointing()
        for _, encoder in self.text_parts.values():
            # Its name from transformers 5.2x on, and the one before.
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
