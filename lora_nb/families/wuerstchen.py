"""Würstchen v2, first stage: a prior that makes a tiny picture code of 1 : 42 from text (Pernias et al. 2023).

x0 is what an EfficientNetV2-S says of the picture. The diffusers repositories do not hold that encoder, so its weights
are a file of their own.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from lora_nb.errors import ModelError
from lora_nb.families._imports import (
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
    quiet,
)
from lora_nb.families._two_stages import other_stage, prefixed
from lora_nb.families.base import Defaults, freeze, tokenize
from lora_nb.objectives import CosineDiffusion

PUBLISHED_DECODER = "warp-ai/wuerstchen"
ENCODER_FILE = "effnet_encoder.safetensors"
CONVERT = (
    "convert the published model_v2_stage_b.pt once: take torch.load(FILE, weights_only=True)"
    "['effnet_state_dict'] and write it with safetensors.torch.save_file"
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Stages of EfficientNetV2-S (Tan & Le 2021, table 4): fused, expansion, stride, channels, blocks.
STAGES = (
    (True, 1, 1, 24, 2),
    (True, 4, 2, 48, 4),
    (True, 4, 2, 64, 4),
    (False, 4, 2, 128, 6),
    (False, 6, 1, 160, 9),
    (False, 6, 2, 256, 15),
)


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act=True):
    """Convolution, batch norm and, mostly, SiLU."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(
        convolution, nn.BatchNorm2d(outputs, eps=1e-3), *[nn.SiLU()] if act else []
    )


class _SqueezeExcitation(nn.Module):
    """Each channel times a gate in (0, 1) computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class _Block(nn.Module):
    """A (fused) inverted bottleneck; it adds its input where the shapes allow it."""

    def __init__(self, fused: bool, expansion: int, stride: int, inputs: int, outputs: int):
        super().__init__()
        wide = inputs * expansion
        if fused and expansion == 1:
            layers = [_layer(inputs, outputs, 3, stride)]
        elif fused:
            layers = [_layer(inputs, wide, 3, stride), _layer(wide, outputs, 1, act=False)]
        else:
            layers = [
                _layer(inputs, wide, 1),
                _layer(wide, wide, 3, stride, groups=wide),
                _SqueezeExcitation(wide, inputs // 4),
                _layer(wide, outputs, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.adds else self.block(x)


class EffnetEncoder(nn.Module):
    """EfficientNetV2-S without its head, then a projection with batch norm: (B, 3, H, W) to (B, 16, H/32, W/32).

    The names of its weights are those of the published file. Stochastic depth is left out: it acts in training only.
    """

    def __init__(
        self, stages: tuple = STAGES, stem: int = 24, features: int = 1280, outputs: int = 16
    ):
        super().__init__()
        layers, channels, self.stride = [_layer(3, stem, 3, 2)], stem, 2
        for fused, expansion, stride, width, blocks in stages:
            stage = []
            for i in range(blocks):
                stage.append(_Block(fused, expansion, stride if i == 0 else 1, channels, width))
                channels = width
            self.stride *= stride
            layers.append(nn.Sequential(*stage))
        self.backbone = nn.Sequential(*layers, _layer(channels, features, 1))
        self.mapper = nn.Sequential(
            nn.Conv2d(features, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of pixels in [-1, 1]."""
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return self.mapper(self.backbone(((pixels + 1) / 2 - mean) / std))


def load_encoder(file: str | Path) -> EffnetEncoder:
    """The encoder of a safetensors file; raises ModelError with what to do for anything else.

    A header entry "encoder", JSON of EffnetEncoder's arguments, is for encoders of another size.
    """
    path = Path(file)
    if not path.is_file():
        raise ModelError(
            f"There is no encoder file {path}, and the base model does not hold the encoder; {CONVERT}, "
            "then name that file in image_encoder_file."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            sizes = json.loads((opened.metadata() or {}).get("encoder", "{}"))
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"The encoder file {path} is no safetensors file; a .pt file is a pickle, which can run code when it is "
            f"read, so it is not opened here: {CONVERT}."
        ) from error
    encoder = EffnetEncoder(**sizes)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"The encoder file {path} does not hold this encoder's weights "
            f"({str(error).splitlines()[1].strip()[:80]}...); {CONVERT}."
        ) from error
    return encoder


def _read(kind: type, model: str, revision: str | None = None, variant: str | None = None) -> Any:
    """A pipeline of this family, part by part: diffusers has moved its classes, so its index no longer finds them."""
    settings = kind.load_config(model, revision=revision)
    parts = {}
    for name, cls in get_type_hints(kind.__init__).items():
        if hasattr(cls, "from_pretrained"):
            weights = {"variant": variant, "use_safetensors": True}
            options = weights if issubclass(cls, nn.Module) else {}
            parts[name] = cls.from_pretrained(model, subfolder=name, revision=revision, **options)
        elif name in settings:
            parts[name] = settings[name]
    return kind(**parts)


class Wuerstchen(Defaults):
    """The family of WuerstchenPriorPipeline; pictures are drawn with the combined pipeline."""

    name = "wuerstchen"
    pipeline_class = WuerstchenPriorPipeline
    targets: ClassVar = {"prior": ("to_k", "to_q", "to_v", "to_out.0")}
    peft_keys = True
    resolution = 768  # whose 24 x 24 latents the decoder makes 1024 pixels of

    def __init__(
        self,
        pipeline: Any,
        encoder: EffnetEncoder,
        decoder: str,
        objective: CosineDiffusion,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.prior, self.text_encoder = pipeline.prior, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        self.encoder, self.decoder, self.objective = encoder, decoder, objective
        self.latent_mean, self.latent_std = (
            pipeline.config.latent_mean,
            pipeline.config.latent_std,
        )
        self.dtype, self.device = dtype, device
        self.trainable = {"prior": self.prior}
        self.pixel_multiple = encoder.stride
        for module in (self.prior, self.text_encoder):
            freeze(module, dtype, device)
        freeze(self.encoder, torch.float32, device)  # once per picture, so precision is cheap

    @classmethod
    def load(
        cls,
        model: str,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        snr_gamma: float | None = None,
        revision: str | None = None,
        variant: str | None = None,
        decoder: str | None = None,
        image_encoder_file: str | None = None,
    ) -> Self:
        """The family of a prior's diffusers folder or Hub name.

        image_encoder_file: safetensors file of the picture encoder; None means effnet_encoder.safetensors in the
        prior's folder. decoder: folder or Hub name of the second stage, for pictures; None means the folder
        `decoder` inside the prior's, or else the published one.
        """
        encoder = load_encoder(image_encoder_file or Path(model) / ENCODER_FILE)
        with quiet():
            pipeline = _read(cls.pipeline_class, model, revision, variant)
        objective = CosineDiffusion(pipeline.scheduler.config.s, snr_gamma)
        decoder = other_stage(model, "decoder", decoder, PUBLISHED_DECODER)
        return cls(pipeline, encoder, decoder, objective, dtype, torch.device(device))

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features + 1) / 42 of the encoder, (B, 16, H/32, W/32), and a standard deviation of zero."""
        features = torch.cat([self.encoder(p[None].to(self.device)).cpu() for p in pixels.float()])
        x0 = (features + self.latent_std) / self.latent_mean  # the pipeline undoes it
        return x0, torch.zeros_like(x0)

    def text_states(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The text encoder's last hidden states (B, tokens, width), computed without looking at padding."""
        tokens = tokenize(self.tokenizer, captions).to(self.device)
        output = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return {"c": output.last_hidden_state}

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, condition: dict[str, Any]
    ) -> torch.Tensor:
        """The prior's noise at times t in [0, 1), which it reads in its own dtype, as when sampling."""
        return self.prior(x_t.to(self.dtype), t.to(self.device, self.dtype), **condition)

    def decode(self, latents: torch.Tensor) -> None:
        """None: these latents have no decoder; only the second stage, sampling, makes a picture of them."""
        return None

    @cached_property
    def second_stage(self) -> Any:
        """The decoder's pipeline, loaded when the first picture is drawn."""
        with quiet():
            decoder = _read(WuerstchenDecoderPipeline, self.decoder)
        for module in (decoder.decoder, decoder.vqgan, decoder.text_encoder):
            freeze(module, self.dtype, self.device)
        return decoder

    def pipeline(self) -> Any:
        """The combined pipeline, from prompt to picture, over this prior."""
        first = WuerstchenPriorPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            prior=self.prior,
            scheduler=type(self.scheduler).from_config(self.scheduler.config),
        )
        with quiet():  # the class is announced as one that gets no new features
            pipeline = WuerstchenCombinedPipeline(
                **self.second_stage.components, **prefixed(first, "prior_")
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in the prior."""
        self.prior.enable_gradient_checkpointing()
