"""Noise schedulers by name: the same model, other steps from noise to picture."""

from typing import Any

import diffusers

from lora_nb.errors import ConfigError

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}


def scheduler_names(pipeline: Any) -> list[str]:
    """The names that fit a pipeline's model."""
    fitting = {kind.__name__ for kind in pipeline.scheduler.compatibles}
    fitting.add(type(pipeline.scheduler).__name__)
    return [name for name, (kind, _) in SCHEDULERS.items() if kind in fitting]


def set_scheduler(pipeline: Any, name: str) -> None:
    """Sample with this scheduler from now on; the noise schedule and prediction type stay the model's.

    Raises ConfigError for a name that is unknown or that does not fit the model.
    """
    fitting = scheduler_names(pipeline)
    if name not in fitting:
        known = "does not fit this model" if name in SCHEDULERS else "is unknown"
        raise ConfigError(f"The scheduler {name!r} {known}; choose one of {', '.join(fitting)}.")
    kind, changes = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changes)
