"""Pictures: seeded generation, adapters on a pipeline (load, scale, merge, swap, export), samples while training.

`attach` puts LoRA files on a pipeline, scales and swaps them, `drawing` generates, `schedulers` names noise schedulers,
`watching` draws during training, `certificate` exports a file and proves it.
Training is in `trainer`, the LoRA file itself in `formats`, figures in `plots`.
"""

from lora_nb.inference.attach import (
    adapter_names,
    fused,
    load_pipeline,
    remove_adapter,
    set_scale,
    swap_adapter,
    use_adapter,
)
from lora_nb.inference.certificate import Certificate, certify, export
from lora_nb.inference.class_drawing import make_class_pictures
from lora_nb.inference.drawing import generate, scale_sweep
from lora_nb.inference.schedulers import scheduler_names, set_scheduler
from lora_nb.inference.watching import samples, with_samples

__all__ = [
    "Certificate",
    "adapter_names",
    "certify",
    "export",
    "fused",
    "generate",
    "load_pipeline",
    "make_class_pictures",
    "remove_adapter",
    "samples",
    "scale_sweep",
    "scheduler_names",
    "set_scale",
    "set_scheduler",
    "swap_adapter",
    "use_adapter",
    "with_samples",
]
