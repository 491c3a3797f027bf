"""The outside of a LoRA file: safetensors and nothing else, its header, and what the ending of a key says."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_nb.errors import FormatError, LoraNbError

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RAW_PEFT = "base_model.model."  # before the keys of a file that peft itself has written
ADAPTER_METADATA = "lora_adapter_metadata"
FAMILY = "family"  # our own entry of the header: which model family the file was trained for

PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare ones

# What a key's ending says: (form, role). Longer endings stand before those that they end with.
ENDINGS = {
    ".lora.down.weight": ("diffusers", "lora_A"),
    ".lora.up.weight": ("diffusers", "lora_B"),
    ".lora_linear_layer.down.weight": ("diffusers", "lora_A"),
    ".lora_linear_layer.up.weight": ("diffusers", "lora_B"),
    "_lora.down.weight": ("diffusers", "lora_A"),  # attention processors, before peft
    "_lora.up.weight": ("diffusers", "lora_B"),
    ".lora_A.weight": ("peft", "lora_A"),
    ".lora_B.weight": ("peft", "lora_B"),
    ".lora_magnitude_vector.weight": ("peft", "magnitude"),
    ".lora_magnitude_vector": ("peft", "magnitude"),
    ".lora_down.weight": ("kohya", "lora_A"),
    ".lora_up.weight": ("kohya", "lora_B"),
    ".dora_scale": ("kohya", "magnitude"),
    ".lokr_w1": ("lycoris", "lokr_w1"),
    ".lokr_w1_a": ("lycoris", "lokr_w1_a"),
    ".lokr_w1_b": ("lycoris", "lokr_w1_b"),
    ".lokr_w2": ("lycoris", "lokr_w2"),
    ".lokr_w2_a": ("lycoris", "lokr_w2_a"),
    ".lokr_w2_b": ("lycoris", "lokr_w2_b"),
    ".lokr_t2": ("lycoris", "lokr_t2"),
    ".alpha": ("kohya", "alpha"),
}
# Adapters that cannot be read here, by what their keys look like.
OTHER_METHODS = {
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.boft_": "BOFT",
    r"\.lora_mid\.": "LoCon in Tucker form",
    r"\.on_input$": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.[wb]_norm$": "trained norms",
    r"\.diff(_b)?$": "full weight differences",
    r"\.lora_[AB]\.bias$": "LoRA biases",
    r"^(bundle_emb\.|emb_params$|clip_[lg]$)": "text embeddings (pivotal tuning)",
}

# What safetensors, torch, peft and json raise over numbers, shapes, names and nesting that make no sense.
STUMBLES = (
    SafetensorError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


@contextmanager
def understood(file: str | Path) -> Iterator[None]:
    """Turn what a damaged or made-up file makes our reading stumble over into one sentence.

    Any shape, type and nesting may stand in such a file, so its places are not foreseen one by one; a fault of the
    machine (no memory, no permission) stays what it is.
    """
    try:
        yield
    except LoraNbError:
        raise
    except STUMBLES as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FormatError(
            f"{Path(file).name} cannot be understood as a LoRA file ({why}); get it again."
        ) from error


def adapter_file(path: str | Path) -> Path:
    """The LoRA file that a path means, itself or in the folder of a run; raises FormatError if it is none."""
    path = inside(path)
    read_header(path)  # refuses pickles by their first bytes, and all that is no safetensors file
    if path.suffix != ".safetensors":
        raise FormatError(f"{path.name} must end in .safetensors to be read; rename it.")
    return path


def inside(path: str | Path) -> Path:
    """The path, or in a folder the file that a run or peft has put there."""
    path = Path(path)
    if path.is_dir():
        return path / (PEFT_FILE if (path / PEFT_FILE).is_file() else FILE_NAME)
    return path


def read_header(file: str | Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and tensor names of a safetensors file; raises FormatError for anything else."""
    path = inside(file)
    if not path.is_file():
        raise FormatError(f"There is no LoRA file {file}; give the path of a .safetensors file.")
    with open(path, "rb") as opened:
        start = opened.read(9)
    # A safetensors file begins with the length of its header in eight bytes, which may be any, and then a brace.
    if start[:2] in PICKLES and start[8:] != b"{":
        raise FormatError(
            f"{file} is a pickle, which can run code when it is read, and is not opened; get the safetensors version."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {}), list(opened.keys())
    except SafetensorError as error:
        raise FormatError(
            f"{file} is no readable safetensors file ({error}); get it again."
        ) from error


def split_key(key: str) -> tuple[str, str, str] | None:
    """(name of the layer as the file spells it, form, role) of a tensor, or None for a key of no known LoRA form."""
    for ending, (form, role) in ENDINGS.items():
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            if ending.startswith("_lora"):
                # attn1.processor.to_out_lora.down.weight is the LoRA of attn1.to_out.0
                stem = stem.replace(".processor.", ".")
                stem += ".0" if stem.endswith("to_out") else ""
            return stem, form, role
    return None


def holds_lokr(keys: Iterable[str]) -> bool:
    """Whether some of the tensors are factors of Kronecker products."""
    return any(".lokr_" in key for key in keys)


def other_methods(keys: list[str]) -> list[str]:
    """The names of what a file holds besides LoRA and LoKr, sorted."""
    found = {n for key in keys for look, n in OTHER_METHODS.items() if re.search(look, key)}
    return sorted(found)


def first(names: list[str], n: int = 5) -> str:
    """Some names for a sentence."""
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
