"""Where we run: platform, device, dtype and its reason, folders, presets, and the doctor.

The only package that knows Colab or Kaggle. Heavy libraries are imported inside functions, so
that importing this is fast.
"""

from lora_nb.env.checkup import TORCHAO_FLOOR, VERSIONS, Check, Setup, doctor, setup
from lora_nb.env.copies import bring_back, keep, need
from lora_nb.env.folders import cache_dir, data_dir, keep_dir, run_dir, runs_dir
from lora_nb.env.hardware import Device, gpu_count, pick_device
from lora_nb.env.platforms import headless, session_end, session_hours, where, why_no_background
from lora_nb.env.presets import PRESETS, Preset, preset

__all__ = [
    "PRESETS",
    "TORCHAO_FLOOR",
    "VERSIONS",
    "Check",
    "Device",
    "Preset",
    "Setup",
    "bring_back",
    "cache_dir",
    "data_dir",
    "doctor",
    "gpu_count",
    "headless",
    "keep",
    "keep_dir",
    "need",
    "pick_device",
    "preset",
    "run_dir",
    "runs_dir",
    "session_end",
    "session_hours",
    "setup",
    "where",
    "why_no_background",
]
