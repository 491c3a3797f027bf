"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer, flow matching (Esser et al. 2024)."""

import warnings
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL

from lora_nb.families._imports import StableDiffusion3Pipeline, quiet
from lora_nb.families.base import freeze
from lora_nb.families.sd import StableDiffusion
from lora_nb.objectives import FlowMatching


class StableDiffusion3(StableDiffusion):
    """The family of StableDiffusion3Pipeline; VAE, latents and decoding are Stable Diffusion's, with a shift.

    flow: what FlowMatching is made with unless asked otherwise. t5: names of the T5 tokenizer and encoder. t5_tokens:
    the length of its text in training. peft_keys: files keep peft's names of A and B, as the reference's do.
    """

    name = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    flow: ClassVar = {"weighting_scheme": "logit_normal", "precondition_outputs": True}
    t5: ClassVar = ("tokenizer_3", "text_encoder_3")
    t5_tokens = 77
    peft_keys = True
    kohya = None  # Stable Diffusion's has no place for a transformer
    targets: ClassVar = {
        "transformer": (
            "attn.to_k",
            "attn.to_q",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_k_proj",
            "attn.add_q_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ),
        "text_encoder": StableDiffusion.targets["text_encoder"],
        "text_encoder_2": StableDiffusion.targets["text_encoder"],
    }

    def __init__(
        self, pipeline: Any, objective: FlowMatching, dtype: torch.dtype, device: torch.device
    ):
        self.components = {n: part for n, part in pipeline.components.items() if n != "scheduler"}
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.tokenizer = pipeline.tokenizer
        self.t5_tokenizer, self.t5_encoder = (self.components[name] for name in self.t5)
        self.scheduler, self.objective = pipeline.scheduler, objective
        self.dtype, self.device = dtype, device
        self.trainable = {part: self.components[part] for part in self.targets}
        for module in self.trainable.values():
            freeze(module, dtype, device)
        freeze(self.vae, torch.float32, device)
        if self.t5_encoder is not None:
            # No dtype here: loaded in fp16, some of its layers are float32 because they overflow otherwise.
            self.t5_encoder.to(device).requires_grad_(False).eval()
        shrink = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.pixel_multiple = 2 * shrink  # the transformer reads patches of 2 by 2 latents
        self.resolution = pipeline.default_sample_size * shrink

    @property
    def text_parts(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        """Tokenizer and text encoder of each CLIP part."""
        _, *parts = self.targets
        return {
            part: (self.components[part.replace("text_encoder", "tokenizer")], self.trainable[part])
            for part in parts
        }

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
        vae: str | None = None,
        weighting_scheme: str | None = None,
        logit_mean: float | None = None,
        logit_std: float | None = None,
        mode_scale: float | None = None,
        precondition_outputs: bool | None = None,
        max_sequence_length: int | None = None,
    ) -> Self:
        """The family of a diffusers folder or Hub name, with the shift of the model's own scheduler.

        vae: folder or Hub name of another autoencoder for the same latents. weighting_scheme to precondition_outputs:
        of FlowMatching; None means `flow`, and then FlowMatching's default. max_sequence_length: T5 tokens in training.
        Raises ConfigError for prediction_type and snr_gamma, which only diffusion has.
        """
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.39 knows no other word
            index = cls.pipeline_class.load_config(model, revision=revision)
            absent = {name: None for name in cls.t5 if index.get(name, [None])[0] is None}
            # Read in their own dtype: in float32 the largest of these would not fit into most memories.
            pipeline = cls.pipeline_class.from_pretrained(
                model,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                torch_dtype={"default": dtype, "vae": torch.float32},
                **absent,
            )
            if vae is not None:
                pipeline.register_modules(vae=AutoencoderKL.from_pretrained(vae))
        flow = {
            "weighting_scheme": weighting_scheme,
            "logit_mean": logit_mean,
            "logit_std": logit_std,
            "mode_scale": mode_scale,
            "precondition_outputs": precondition_outputs,
        }
        flow = cls.flow | {name: value for name, value in flow.items() if value is not None}
        objective = FlowMatching.from_scheduler(
            pipeline.scheduler, prediction_type, snr_gamma, **flow
        )
        family = cls(pipeline, objective, dtype, torch.device(device))
        family.t5_tokens = max_sequence_length or cls.t5_tokens
        return family

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Both CLIP encoders' last states but one side by side, then T5's; both pooled outputs side by side.

        (B, CLIP tokens + T5 tokens, T5 width), the CLIP states padded with zeros, and (B, width 1 + width 2).
        """
        outputs = [
            encoder(self.token_ids(captions, tokenizer), output_hidden_states=True)
            for tokenizer, encoder in self.text_parts.values()
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        t5 = self.t5_states(captions)
        padded = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([padded, t5], dim=1),
            "pooled_projections": torch.cat([output.text_embeds for output in outputs], dim=-1),
        }

    def t5_states(self, captions: list[str]) -> torch.Tensor:
        """T5's last hidden states, (B, t5_tokens, width); zeros if the model comes without T5, as its pipeline does."""
        if self.t5_encoder is None:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros(
                len(captions), self.t5_tokens, width, dtype=self.dtype, device=self.device
            )
        length = min(self.t5_tokens, self.t5_tokenizer.model_max_length)
        return self.t5_encoder(self.token_ids(captions, self.t5_tokenizer, length))[0]

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The transformer's velocity at timesteps t in (0, T]."""
        return self.transformer(x_t.to(self.dtype), timestep=t.to(self.device), **condition).sample

    def parts(self) -> dict[str, Any]:
        """The modules and tokenizers that the pipeline is made of."""
        return self.components
