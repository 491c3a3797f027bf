"""Base models of random weights in the sizes that benchmarks need: a small real one, and those of published models.

The small one is made to be saved; the published ones are made where they are used, in memory. No number here is
trained, so they cost what the real ones cost and draw noise.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_nb.families._imports import StableDiffusionPipeline, quiet
from lora_nb.families.base import Family
from lora_nb.families.sd import StableDiffusion
from lora_nb.families.sdxl import StableDiffusionXL
from lora_nb.families.tiny import _clip_tokenizer
from lora_nb.objectives import Diffusion

VOCABULARY, LENGTH = 49_408, 77  # of CLIP


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model. texts: width, layers, heads and whether it projects, of each text encoder.

    resolution: pixels. tflop: of UNet forward and LoRA backward (rank 8) of one picture, counted on the meta
    device, 1 multiplication and addition = 2. expected: by batch, samples/s on an H200, times the eager loop's, memory.
    """

    title: str
    family: type
    resolution: int
    tflop: float
    unet: dict[str, Any]
    vae: tuple[int, ...]
    texts: tuple[tuple[int, int, int, bool], ...]
    counts: str = ""  # what one picture takes, counted on the meta device
    expected: dict[int, tuple[int, int, str]] = field(default_factory=dict)


_CROSS, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_UP_CROSS, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
SHAPES = {
    "small": Shape(
        "a 17.8 M UNet",
        StableDiffusion,
        128,
        0.0035,
        {
            "sample_size": 16,
            "block_out_channels": (64, 128, 256),
            "down_block_types": (_CROSS, _CROSS, _DOWN),
            "up_block_types": (_UP, _UP_CROSS, _UP_CROSS),
            "attention_head_dim": 4,
            "cross_attention_dim": 128,
        },
        (32, 64, 128, 128),
        ((128, 4, 4, False),),
    ),
    "sd15": Shape(
        "SD 1.5",
        StableDiffusion,
        512,
        1.718,
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (_CROSS, _CROSS, _CROSS, _DOWN),
            "up_block_types": (_UP, _UP_CROSS, _UP_CROSS, _UP_CROSS),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        (128, 256, 512, 512),
        ((768, 12, 12, False),),
        "forward 0.806 and LoRA backward 0.912 TFLOP, 2,676 kernels a step (3,003 with peft's layers); in GiB: UNet "
        "in 16 bits 1.60, activations 0.79 a sample (0.14 with checkpointing), adapters, moments 0.02, the rest 0.39",
        {1: (60, 4, "3.0 GiB"), 4: (120, 3, "5.5 GiB"), 16: (160, 2, "15.5 GiB")},
    ),
    "sdxl": Shape(
        "SDXL",
        StableDiffusionXL,
        1024,
        14.13,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (_DOWN, _CROSS, _CROSS),
            "up_block_types": (_UP_CROSS, _UP_CROSS, _UP),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (128, 256, 512, 512),
        ((768, 12, 12, False), (1280, 32, 20, True)),
        "forward 6.782 and LoRA backward 7.344 TFLOP, 9,381 kernels a step (10,842 with peft's layers); in GiB: UNet "
        "in 16 bits 4.80, activations 5.60 a sample (0.45 with checkpointing), adapters, moments 0.17, the rest 1.84",
        {1: (14, 3, "11.5 GiB; 6.5 with checkpointing"), 4: (22, 2, "29 GiB")},
    ),
}


def parts(
    shape: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The modules of a shape by the pipeline's names, made on the default device; tokenizers lie in `folder`.

    dtype: of all but the VAE, which is made in float32. The tokenizer has one token per character; the encoder's table
    has all of CLIP's rows, and texts CLIP's length.
    """
    sizes = SHAPES[shape]
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), quiet(), _made_in(dtype):
        torch.manual_seed(seed)
        made["unet"] = UNet2DConditionModel(layers_per_block=2, **sizes.unet)
        with _made_in(torch.float32):
            made["vae"] = _vae(sizes.vae, 1 if shape == "small" else 2)
        for number, (width, layers, heads, projects) in enumerate(sizes.texts):
            suffix = f"_{number + 1}" if number else ""
            tokenizer = _clip_tokenizer(folder / f"tokenizer{suffix}", LENGTH)
            made[f"tokenizer{suffix}"] = tokenizer
            made[f"text_encoder{suffix}"] = _text(tokenizer, width, layers, heads, projects)
    with torch.device("cpu"):  # where a loaded scheduler has its table
        made["scheduler"] = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        )
    return made


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made inside have weights of this dtype, and are never any other."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def save_small(folder: Path, seed: int = 0) -> Path:
    """Write the small base model as a diffusers folder; returns the folder."""
    unused = StableDiffusion.unused
    with quiet():
        StableDiffusionPipeline(**parts("small", folder, seed), **unused).save_pretrained(folder)
    return folder


def load(
    shape: str, folder: Path, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Family:
    """A shape as a loaded family on the device, made there; tokenizers are written into `folder`."""
    with device:
        made = parts(shape, folder, seed, dtype)
    made["config"] = SimpleNamespace(force_zeros_for_empty_prompt=True)
    objective = Diffusion.from_scheduler(made["scheduler"])
    return SHAPES[shape].family(SimpleNamespace(**made), objective, dtype, device)


def _vae(channels: tuple[int, ...], layers: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=4,
    )


def _text(tokenizer: Any, width: int, layers: int, heads: int, projects: bool) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
