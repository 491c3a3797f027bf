"""Let ComfyUI's own code read the Kohya files that we write, and compare what it makes of them with what was trained.

python scripts/comfyui.py PATH    PATH: an unmodified checkout of ComfyUI

For the embedded base and tiny random models of the families that have a Kohya form, with two settings of rank and
alpha on all parts: ComfyUI's names for the layers, its reader and its arithmetic must give every layer the change that
the trained module has. Ends with 1 if a layer is missing or off by more than 1e-6 of its largest number.
"""

import importlib.util
import logging
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_nb import LoraSpec, adapters, formats, rng
from lora_nb.families import Family, load_family, tiny

REPO = Path(__file__).resolve().parents[1]
SPECS = {
    "alpha 2 of rank 4": LoraSpec(rank=4, lora_alpha=2),
    "alpha 5 of rank 3": LoraSpec(rank=3, lora_alpha=5),
}
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # ComfyUI's names for them
LIMIT = 1e-6


class Unloaded(logging.Handler):
    """Counts what ComfyUI says it did not load; it says so in its log only."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "not loaded" in record.getMessage()


class Classes(types.ModuleType):
    """A module in which every name is a class of its own: ComfyUI asks what a model is an instance of."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reader(path: Path) -> types.ModuleType:
    """ComfyUI's comfy.lora; modules that need its whole installation, and that reading a LoRA does not, stay away."""
    sys.path.insert(0, str(path))
    import comfy

    def put(module: types.ModuleType) -> None:
        sys.modules[module.__name__] = module
        setattr(comfy, module.__name__.split(".")[-1], module)

    management = types.ModuleType("comfy.model_management")
    management.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(
        device, dtype, copy=copy
    )
    options = types.ModuleType("comfy.cli_args")
    options.args = types.SimpleNamespace(mmap_torch_files=False, disable_mmap=False)
    for module in (management, options, Classes("comfy.model_base")):
        put(module)
    if importlib.util.find_spec("einops") is None:  # its pictures' business
        sys.modules["einops"] = Classes("einops")
    import comfy.lora

    return comfy.lora


class Model:
    """What ComfyUI's reader asks of a model: its weights by name, and how its UNet is built."""

    def __init__(self, weights: dict[str, torch.Tensor], unet_config: dict[str, Any] | None = None):
        self._weights = weights
        self.model_config = types.SimpleNamespace(unet_config=unet_config)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights


def unet_config(unet: torch.nn.Module) -> dict[str, Any]:
    """A diffusers UNet's shape in ComfyUI's words."""
    config, blocks = unet.config, len(unet.config.block_out_channels)
    depth = config.transformer_layers_per_block
    depths = [depth] * blocks if isinstance(depth, int) else list(depth)
    resnets = [config.layers_per_block] * blocks
    here = [d * ("Attn" in kind) for d, kind in zip(depths, config.down_block_types, strict=True)]
    return {
        "num_res_blocks": resnets,
        "channel_mult": [c // config.block_out_channels[0] for c in config.block_out_channels],
        "transformer_depth": [d for d, n in zip(here, resnets, strict=True) for _ in range(n)],
        "transformer_depth_output": [
            d for d, n in zip(here, resnets, strict=True) for _ in range(n + 1)
        ],
        "transformer_depth_middle": depths[-1],
    }


def as_read(comfy: types.ModuleType, family: Family, file: Path) -> dict[str, torch.Tensor]:
    """The change of each layer, by part and layer, that ComfyUI makes of the file."""
    shape = unet_config(family.unet)
    weights = adapters.base_weights(family.unet.state_dict().items())
    names = comfy.comfy.utils.unet_to_diffusers(shape)
    ours = {f"diffusion_model.{names[key]}": f"unet.{key}" for key in weights}
    known = {f"diffusion_model.{names[key]}": weight for key, weight in weights.items()}
    keys = comfy.model_lora_keys_unet(Model(known, shape), {})
    for part, theirs in ENCODERS.items():
        encoder = getattr(family, part, torch.nn.Module())
        for key, weight in adapters.base_weights(encoder.state_dict().items()).items():
            name = f"{theirs}.transformer.text_model.{key.removeprefix('text_model.')}"
            ours[name], known[name] = f"{part}.{key}", weight
    clip = {key: w for key, w in known.items() if not key.startswith("diffusion_model.")}
    keys |= comfy.model_lora_keys_clip(Model(clip), {})
    found = {}
    for key, patch in comfy.load_lora(load_file(file), keys).items():
        nothing = torch.zeros_like(known[key], dtype=torch.float32)
        change = comfy.calculate_weight([(1.0, patch, 1.0, None, None)], nothing, key)
        found[ours[key].removesuffix(".weight")] = change
    return found


def trained(family: Family, spec: LoraSpec) -> dict[str, torch.Tensor]:
    """Put adapters with drawn weights on all parts; the change of each layer."""
    adapters.remove(family)
    adapters.add(family, dict.fromkeys(family.trainable, spec), seed=0)
    changes = {}
    for part, module in family.trainable.items():
        for name, layer in adapters.layers(module):
            up = layer.lora_B[adapters.ADAPTER].weight
            up.data = 0.1 * rng.normal(up.shape, 0, f"{part}.{name}", [0])[0]
            changes[f"{part}.{name}"] = layer.get_delta_weight(adapters.ADAPTER).detach()
    return changes


def main(path: str) -> int:
    """Write, read, compare and print a line for each model and setting."""
    comfy, unloaded, failed = reader(Path(path)), Unloaded(), False
    logging.getLogger().addHandler(unloaded)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = {"embedded base": REPO / "data" / "base"}
        models |= {f"tiny {name}": tiny.build(name, place / name) for name in ("sd", "sdxl")}
        for model, source in models.items():
            family = load_family("auto", str(source))
            for words, spec in SPECS.items():
                changes, unloaded.count = trained(family, spec), 0
                file = formats.save_kohya(family, place / "file.safetensors")
                found = as_read(comfy, family, file)
                same = found.keys() == changes.keys()
                off = max(
                    float((found[n].reshape(c.shape) - c).abs().max() / c.abs().max())
                    for n, c in changes.items()
                    if n in found
                )
                failed |= not same or unloaded.count > 0 or off > LIMIT
                print(
                    f"{model}, {words}: {len(found)} of {len(changes)} layers, {unloaded.count} tensors not loaded, "
                    f"largest relative difference {off:.1e}"
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
