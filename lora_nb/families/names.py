"""What other programs call the layers of our families, and how to tell a family by the layers a LoRA sits on.

Sources: the checkpoint layouts of CompVis/Stability (input_blocks, middle_block, output_blocks) and of Black Forest
Labs (double_blocks, single_blocks); the key prefixes of sd-scripts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

Names = dict[
    str, tuple[str, ...]
]  # their dotted name -> our layers; several where theirs is one fused layer


@dataclass(frozen=True)
class KohyaLayout:
    """How sd-scripts writes a family: the prefix of each part, and the words of the header.

    compvis: the network's layers by the checkpoint's names, not by diffusers'. second: the words for a second version
    of the base, by its modules; None for the first.
    """

    prefixes: dict[str, str]
    compvis: bool
    base_version: str
    architecture: str
    implementation: str
    second: Callable[[dict[str, torch.nn.Module]], tuple[str, str] | None] | None = None


def second_version(modules: dict[str, torch.nn.Module]) -> tuple[str, str] | None:
    """Stable Diffusion 2.x reads text states of 1024 numbers."""
    if modules["unet"].config.cross_attention_dim != 1024:
        return None
    return "sd_v2", "stable-diffusion-v2-512"


# What a part's keys may begin with in a Kohya file, whatever the family; `lycoris` where LyCORIS trained by itself.
KOHYA_PREFIXES = {
    "unet": ("lora_unet", "lycoris"),
    "transformer": ("lora_unet", "lora_transformer", "lycoris"),
    "prior": ("lora_unet", "lora_prior_unet", "lycoris"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def compvis_name(unet: UNet2DConditionModel, layer: str) -> str | None:
    """The name in the original checkpoint of a layer named as in diffusers; None if it has none."""
    if layer in UNET_ENDS:
        return UNET_ENDS[layer]
    words = layer.split(".")
    blocks, per_block = words[0], unet.config.layers_per_block
    if not isinstance(per_block, int) or blocks not in ("down_blocks", "mid_block", "up_blocks"):
        return None
    if blocks == "mid_block":
        kind, j, rest = words[1], int(words[2]), words[3:]
        place = f"middle_block.{1 if kind == 'attentions' else 2 * j}"
    else:
        i, kind, j, rest = int(words[1]), words[2], int(words[3]), words[4:]
        size = per_block + 1
        if kind == "downsamplers":
            return f"input_blocks.{(i + 1) * size}.0.op"
        if kind == "upsamplers":
            after = 2 if hasattr(unet.up_blocks[i], "attentions") else 1
            return f"output_blocks.{i * size + per_block}.{after}.conv"
        stage, index = (
            ("input", 1 + i * size + j) if blocks == "down_blocks" else ("output", i * size + j)
        )
        place = f"{stage}_blocks.{index}.{1 if kind == 'attentions' else 0}"
    if kind == "resnets":
        rest = [RESNET[rest[0]]]
    return ".".join([place, *rest])


def _compvis(unet: UNet2DConditionModel, layers: Iterable[str]) -> Names:
    names = {layer: compvis_name(unet, layer) for layer in layers}
    return {name: (layer,) for layer, name in names.items() if name}


DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
# final_layer.adaLN_modulation.1 is left out: its two halves are swapped in diffusers.
OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}


def _fused(transformer: FluxTransformer2DModel, layers: Iterable[str]) -> Names:
    names: Names = dict(OUTER)
    for theirs, ours, table, blocks in (
        ("double_blocks", "transformer_blocks", DOUBLE, transformer.transformer_blocks),
        (
            "single_blocks",
            "single_transformer_blocks",
            SINGLE,
            transformer.single_transformer_blocks,
        ),
    ):
        for i in range(len(blocks)):
            for name, parts in table.items():
                names[f"{theirs}.{i}.{name}"] = tuple(f"{ours}.{i}.{part}" for part in parts)
    there = set(layers)
    return {name: parts for name, parts in names.items() if there.issuperset(parts)}


FOREIGN: dict[type, Callable[..., Names]] = {
    UNet2DConditionModel: _compvis,
    FluxTransformer2DModel: _fused,
}


def foreign_names(module: torch.nn.Module, layers: Iterable[str]) -> Names:
    """The names that other programs give to a module's layers, where they differ from ours."""
    return FOREIGN[type(module)](module, layers) if type(module) in FOREIGN else {}


# Signs of a family in the names and shapes of a LoRA file: (family, base, a piece of a layer's name, inputs of A).
CROSS = ("attn2_to_k", "attn2_to_v")
SIGNS = (
    ("flux", "FLUX.1", ("single_blocks_", "single_transformer_blocks_"), None),
    ("sd3", "Stable Diffusion 3", ("joint_blocks_", "attn_add_k_proj", "attn_add_q_proj"), None),
    ("sdxl", "Stable Diffusion XL", CROSS, 2048),
    ("sd", "Stable Diffusion 2", CROSS, 1024),
    ("sd", "Stable Diffusion 1", CROSS, 768),
    ("z_image", "Z-Image", ("attention_to_k", "attention_qkv"), 3840),
    ("wuerstchen", "Wuerstchen", ("attention_to_k",), None),
    ("kandinsky_decoder", "Kandinsky 2.2 decoder", ("attentions_0_add_k_proj",), None),
    ("kandinsky_prior", "Kandinsky 2.2 prior", ("transformer_blocks_0_attn1_to_k",), 2048),
)


def recognise(layers: Iterable[tuple[str, int]]) -> tuple[str, str] | None:
    """(family, base) that layers belong to, given as names and numbers of inputs; None if nothing tells."""
    spelled = [(name.replace(".", "_"), inputs) for name, inputs in layers]
    for family, base, pieces, inputs in SIGNS:
        for name, found in spelled:
            if any(piece in name for piece in pieces) and inputs in (None, found):
                return family, base
    return None
