"""What a precision means, and whether a device can train in the one that was asked for."""

import warnings

import torch

from lora_nb.env import Device
from lora_nb.errors import ConfigError

# What the frozen weights are kept in, by mixed_precision.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check(asked: str, device: Device) -> None:
    """Warn where a precision is slow on this device; raise ConfigError where it cannot work.

    asked: "no", "fp16" or "bf16", by config, environment or launcher.
    """
    if asked == "fp16" and device.name == "cpu":
        raise ConfigError(
            "mixed_precision is 'fp16', but there is no GPU here; use 'no', or 'bf16'."
        )
    if asked != "no" and device.name == "mps":
        raise ConfigError(
            f"mixed_precision is {asked!r}, but half precision is not reliable on Apple's GPUs; use 'no'."
        )
    if asked == "bf16" and device.dtype == "float16":
        warnings.warn(
            f"mixed_precision is 'bf16', which {device.gpu} has not in hardware, so it is slow there; 'fp16' is not.",
            stacklevel=2,
        )
