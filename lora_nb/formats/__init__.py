"""LoRA files: read any known form, write diffusers and Kohya, say what a file holds, compute with what is in it.

`header` is the outside of a file, `spelling` knows every name of a layer, `placing` looks the keys up, `reading` makes
adapters of them or refuses, `lokr` knows Kronecker products, `weights` is a LoRA as numbers, `writing` and `kohya`
write, `inspecting` describes in a `file_report`, `algebra` adds, concatenates, resizes, extracts and merges,
`subspaces` looks at singular values and overlaps.
A file is safetensors, never a pickle. Without the adapter metadata readers take alpha = rank, so it is always written.
"""

from lora_nb.formats.algebra import (
    add,
    concatenate,
    extract,
    merge,
    resize,
    spectrum,
    undo,
)
from lora_nb.formats.file_report import FileReport, ModuleReport, PartReport
from lora_nb.formats.header import ADAPTER_METADATA, FILE_NAME, adapter_file, read_header
from lora_nb.formats.inspecting import inspect
from lora_nb.formats.kohya import DTYPES, KOHYA_FILE, save_kohya
from lora_nb.formats.reading import Plan, plan
from lora_nb.formats.subspaces import (
    Overlap,
    Spectrum,
    overlap,
    overlap_table,
    xray,
    xray_table,
)
from lora_nb.formats.weights import (
    Pair,
    Weights,
    read_weights,
    save_weights,
    weights_of_modules,
)
from lora_nb.formats.writing import save_adapter, save_diffusers

__all__ = [
    "ADAPTER_METADATA",
    "DTYPES",
    "FILE_NAME",
    "KOHYA_FILE",
    "FileReport",
    "ModuleReport",
    "Overlap",
    "Pair",
    "PartReport",
    "Plan",
    "Spectrum",
    "Weights",
    "adapter_file",
    "add",
    "concatenate",
    "extract",
    "inspect",
    "merge",
    "overlap",
    "overlap_table",
    "plan",
    "read_header",
    "read_weights",
    "resize",
    "save_adapter",
    "save_diffusers",
    "save_kohya",
    "save_weights",
    "spectrum",
    "undo",
    "weights_of_modules",
    "xray",
    "xray_table",
]
