"""A UNet's blocks of convolutions without the division by one that the library's end in, and what else does nothing.

The results are the same to the bit. On a GPU `fusing` has kernels of its own for these blocks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from lora_nb import forwards


def shorten(network: torch.nn.Module) -> int:
    """Let the plain blocks compute so; returns how many there are."""
    found = [m for m in network.modules() if isinstance(m, ResnetBlock2D) and plain(m)]
    for block in found:
        block.forward = _Forward(block)
    return len(found)


def undo(network: torch.nn.Module) -> None:
    """Give the blocks the library's forward back."""
    forwards.restore(network, _Forward)


def plain(block: ResnetBlock2D) -> bool:
    """Whether a block is twice norm, SiLU and convolution, the time embedding between them, and a way past it all."""
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


class _Forward:
    """The forward of a plain block."""

    def __init__(self, block: Any):
        self.block = block

    def __call__(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        block = self.block
        shift = block.time_emb_proj(F.silu(temb))
        h = block.conv1(F.silu(block.norm1(x))) + shift[:, :, None, None]
        h = block.conv2(F.silu(block.norm2(h)))
        return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))
