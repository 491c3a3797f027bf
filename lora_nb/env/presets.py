"""Presets: a base model with pictures, size, steps and precision for the hardware, and a reason."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lora_nb.config import DataSpec, LoraSpec, TrainConfig, sampling, unknown_setting
from lora_nb.env.folders import data_dir, run_dir
from lora_nb.env.hardware import pick_device
from lora_nb.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """The one dial: a base model with pictures, size, steps and precision for the hardware."""

    name: str
    family: str
    model: str
    data: str
    resolution: int
    train_batch_size: int
    max_train_steps: int
    learning_rate: float
    rank: int
    mixed_precision: str | None
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    reason: str
    gradient_checkpointing: bool = False
    adam_weight_decay: float = TrainConfig.adam_weight_decay

    @property
    def sampling(self) -> dict[str, Any]:
        """How a sample is drawn, as keywords of `generate` and of a pipeline."""
        return sampling(self)

    def config(self, run: str, **changes: Any) -> TrainConfig:
        """The training config of this preset for the run of that name.

        `changes` are fields of TrainConfig, DataSpec, or LoraSpec (then of the UNet's LoRA); None
        keeps the preset's value. Raises ConfigError on an unknown field or an impossible value.
        """
        own = {f.name for f in dataclasses.fields(TrainConfig)}
        data = {f.name for f in dataclasses.fields(DataSpec)}
        lora = {f.name for f in dataclasses.fields(LoraSpec)} - own
        for name in changes:
            if name not in own | data | lora:
                raise ConfigError(unknown_setting(name, own | data | lora))
        changes = {name: value for name, value in changes.items() if value is not None}
        spec = {"rank": self.rank} | {k: v for k, v in changes.items() if k in lora}
        config = TrainConfig(
            pretrained_model_name_or_path=self.model,
            family=self.family,
            lora={"unet": LoraSpec(**spec)},
            data=DataSpec(
                train_data_dir=None if "dataset_name" in changes else self.data,
                resolution=self.resolution,
            ),
            output_dir=str(run_dir(run)),
            seed=0,
            train_batch_size=self.train_batch_size,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            adam_weight_decay=self.adam_weight_decay,
            **self.sampling,
        ).replace(**{k: v for k, v in changes.items() if k not in lora})
        config.validate()
        return config


_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_KANDINSKY = "kandinsky-community/kandinsky-2-2"
# By family: base model, resolution, denoising steps and guidance of a sample, AdamW's weight decay. Learning rate and
# weight decay are the reference scripts' (1e-4 for all), sampling is the pipelines' default or the model card's.
_LARGE = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024, 30, 5.0, 1e-2),
    "sd3": ("stabilityai/stable-diffusion-3.5-medium", 1024, 40, 4.5, 1e-4),
    "flux": ("black-forest-labs/FLUX.1-dev", 512, 28, 3.5, 1e-4),
    "z_image": ("Tongyi-MAI/Z-Image", 1024, 50, 5.0, 1e-4),
    "kandinsky_decoder": (f"{_KANDINSKY}-decoder", 512, 30, 4.0, 0.0),
    "kandinsky_prior": (f"{_KANDINSKY}-prior", 224, 30, 4.0, 0.0),  # its image encoder sees 224
    "wuerstchen": ("warp-ai/wuerstchen-prior", 768, 12, 4.0, 0.0),
}
PRESETS = ("tiny", "sd15", *_LARGE)


# GPU memory in GB that training wants: what the allocator held on an H200 (BENCHMARKS.md), batch 4 and batch 1 with
# checkpointing, rounded up.
GPU_GB = {"sd15": 7.0, "sdxl": 12.0}


def fitting(memory_gb: float) -> list[str]:
    """The presets of GPU_GB that should fit a GPU of that size."""
    return [name for name, wanted in GPU_GB.items() if wanted <= memory_gb]


def preset(name: str = "auto") -> Preset:
    """A preset by name; "auto" picks by hardware and network and says why in `reason`.

    Raises ConfigError on a name that no preset has.
    """
    if name == "auto":
        name, reason = _choose()
    else:
        reason = "chosen by name"
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; choose auto, {', '.join(PRESETS)}.")
    ink = str(data_dir() / "ink")
    if name == "tiny":
        base = str(data_dir() / "base")
        return Preset("tiny", "sd", base, ink, 128, 8, 200, 2e-3, 8, None, 25, 1.5, 0.7, reason)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(pick_device().dtype)
    if name == "sd15":
        return Preset("sd15", "sd", _SD15, ink, 512, 4, 500, 1e-4, 8, half, 30, 7.5, 0.0, reason)
    model, resolution, steps, guidance, decay = _LARGE[name]
    rest = (resolution, 1, 500, 1e-4, 8, half, steps, guidance, 0.0, reason, True, decay)
    return Preset(name, name, model, ink, *rest)


def _choose() -> tuple[str, str]:
    """The preset for this machine and one clause that says why."""
    device = pick_device()
    if device.name != "cuda":
        return (
            "tiny",
            f"the embedded base model, because there is no usable CUDA GPU ({device.reason})",
        )
    if "sd15" not in fitting(device.memory_gb):
        return (
            "tiny",
            f"the embedded base model, because sd15 wants 8 GB and {device.gpu} has less",
        )
    if not _reachable(_SD15):
        return (
            "tiny",
            f"the embedded base model, because {_SD15} is neither in the cache nor within reach",
        )
    return "sd15", f"{_SD15}, because {device.gpu} has {device.memory_gb:.0f} GB"


def _reachable(model: str) -> bool:
    """Whether a Hub model is in the local cache, or the Hub answers within three seconds."""
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "model_index.json"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return httpx.head(
            f"{constants.ENDPOINT}/{model}", timeout=3, follow_redirects=True
        ).is_success
    except httpx.HTTPError:
        return False
