"""Pictures: seeded generation, adapters on a pipeline (load, scale, merge, remove), samples while training.

`fit` reads a LoRA file against a pipeline, `attach` puts it on, `drawing` generates, `watching` draws during training.
Training is in `trainer`, the LoRA file itself in `formats`, figures in `plots`.
"""

from lora_nb.inference.attach import (
    adapter_names,
    fused,
    load_pipeline,
    remove_adapter,
    set_scale,
    use_adapter,
)
from lora_nb.inference.class_drawing import make_class_pictures
from lora_nb.inference.drawing import generate, scale_sweep
from lora_nb.inference.watching import samples, with_samples

__all__ = [
    "adapter_names",
    "fused",
    "generate",
    "load_pipeline",
    "make_class_pictures",
    "remove_adapter",
    "samples",
    "scale_sweep",
    "set_scale",
    "use_adapter",
    "with_samples",
]
