"""Whether a device can train in the precision that was asked for, by config, environment or launcher."""

import warnings

from lora_nb.env import Device
from lora_nb.errors import ConfigError


def check(asked: str, device: Device) -> None:
    """asked: "no", "fp16" or "bf16". Warns where it is slow; raises ConfigError where it cannot work."""
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
