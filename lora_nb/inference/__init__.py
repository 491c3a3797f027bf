"""Pictures: seeded generation, adapters on a pipeline (load, scale, merge, swap, export), samples while training.

`attach` puts LoRA files on a pipeline, scales and swaps them, `drawing` generates, `schedulers` names noise schedulers,
`combining` draws pairs of weights, `watching` draws during training, `moving` makes a GIF of that, `certificate`
exports a file and proves it. Training is in `trainer`, the LoRA file itself in `formats`, figures in `plots`.
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
from lora_nb.inference.certificate import Certificate, certify, certify_run, export
from lora_nb.inference.class_drawing import make_class_pictures
from lora_nb.inference.combining import weight_grid
from lora_nb.inference.drawing import generate, scale_sweep
from lora_nb.inference.moving import gif
from lora_nb.inference.schedulers import scheduler_names, set_scheduler
from lora_nb.inference.watching import draw_samples, samples, with_samples

__all__ = [
    "Certificate",
    "adapter_names",
    "certify",
    "certify_run",
    "draw_samples",
    "export",
    "fused",
    "generate",
    "gif",
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
    "weight_grid",
    "with_samples",
]
