"""lora_nb: a notebook teaches, this package does.

Public names are imported on first use, so that `import lora_nb` is quick.
"""

import atexit
import gc
import importlib
import logging
import os
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "config": ("DataSpec", "LoraSpec", "TrainConfig"),
    "errors": ("LoraNbError",),
    "env": (
        "data_dir",
        "doctor",
        "gpu_count",
        "headless",
        "keep",
        "need",
        "pick_device",
        "preset",
        "run_dir",
        "runs_dir",
        "setup",
        "where",
    ),
    "show": ("show_source",),
    "data": ("pixels", "scan", "to_image"),
    "objectives": ("Diffusion",),
    "families": ("Batch", "load_family"),
    "cache": ("Cache",),
    "loss": ("diffusion_loss",),
    "formats": ("inspect", "save_adapter"),
    "run_folder": ("read_config", "read_history", "save_config"),
    "trainer": ("train",),
    "inference": (
        "export",
        "fused",
        "generate",
        "gif",
        "load_pipeline",
        "make_class_pictures",
        "remove_adapter",
        "samples",
        "scale_sweep",
        "set_scale",
        "use_adapter",
        "weight_grid",
        "with_samples",
    ),
    "forecast": ("preflight",),
    "launch": ("Launch",),
    "judge": ("load_judge",),
    "early_stopping": ("early_stop", "verdict"),
    "sweep": ("rank_and_rate", "read_sweep", "run_sweep"),
    "rank_study": ("which_rank",),
    "report": ("compare", "write_card", "write_report"),
    "hub": ("push_to_hub",),
    "widgets": (
        "ConfigPanel",
        "LiveBoard",
        "RankRateMap",
        "ScaleExplorer",
        "WeightExplorer",
        "run_in_background",
    ),
    "branching": ("fork", "paired_losses", "paired_probes", "replay"),
    "checks": ("check",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_MODULES = (*_PUBLIC, "adapters", "checkpoint", "disk_cache", "metrics", "plots", "rng")
__all__ = sorted(_HOME)


# transformers says at every import that it will do without torchvision, which nothing here needs.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)


# How long a thread of torch waits awake for the others; read when torch is imported. Beside another busy program the
# default of GNU's OpenMP makes a step take four times as long; no such wait makes it a tenth longer on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "500")

# When Python ends it looks for cycles among a million objects of the libraries: a fifth of a short command's time.
atexit.register(gc.freeze)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module, when it is first asked for (PEP 562)."""
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'lora_nb' has no attribute {name!r}")
    with importlib.import_module("lora_nb.collector").without_collector():
        module = importlib.import_module(f"lora_nb.{_HOME.get(name, name)}")
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
