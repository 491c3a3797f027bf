"""Write the adapters of a family as diffusers does, with the metadata that keeps alpha."""

import json
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save

from lora_nb import adapters
from lora_nb.families import Family
from lora_nb.files import write_atomically
from lora_nb.formats import lokr
from lora_nb.formats.header import ADAPTER_METADATA, FAMILY, FILE_NAME
from lora_nb.formats.weights import plain, refuse_infinite


def save_adapter(family: Family, folder: str | Path, extra: dict[str, str] | None = None) -> Path:
    """Write the family's adapters as pytorch_lora_weights.safetensors, float32, atomically; returns the path.

    extra: further strings for the header. Raises NumericsError, and writes nothing, if a weight is not finite, and
    FormatError for a LoKr.
    """
    return save_diffusers(family, Path(folder) / FILE_NAME, extra)


def save_diffusers(family: Family, file: str | Path, extra: dict[str, str] | None = None) -> Path:
    """As `save_adapter`, under any file name."""
    lokr.refuse(family.trainable, adapters.ADAPTER)
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, object] = {}
    header = {"format": "pt", FAMILY: family.name}
    for part, weights in adapters.state(family).items():
        kept = getattr(family, "peft_keys", False)
        prefix = f"{part}."
        if getattr(family, "bare_keys", False):  # one part, whose model loads the file by itself
            prefix, header["part"] = "", part
        for key, value in (weights if kept else _renamed(part, weights)).items():
            tensors[f"{prefix}{key}"] = value.contiguous()
        settings = family.trainable[part].peft_config[adapters.ADAPTER].to_dict()
        described |= {f"{prefix}{name}": plain(value) for name, value in settings.items()}
    refuse_infinite(tensors)
    header[ADAPTER_METADATA] = json.dumps(described, indent=2, sort_keys=True)
    return write_atomically(Path(file), save(tensors, metadata=header | (extra or {})))


def _renamed(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own key names, if it has one for every layer of the network.

    It has them for attention alone, and of a network with both sorts its loader takes the ones and drops the others
    without a word; such a part keeps peft's names, which it reads whole.
    """
    renamed = convert_state_dict_to_diffusers(weights)
    mixed = any(".lora_A." in key for key in renamed)
    return weights if mixed and not part.startswith("text_encoder") else renamed
