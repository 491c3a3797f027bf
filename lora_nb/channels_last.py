"""A UNet whose pictures lie in memory channel by channel at each place, from its first convolution to its last.

The fastest convolutions of a GPU read that layout. What the library does in between would undo it again and again, and
each time a picture is copied.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel
from peft.tuners import lora

LAYOUT = torch.channels_last


def keep(network: torch.nn.Module) -> None:
    """Put the weights of convolutions into this layout, and let attention leave pictures in it."""
    torch.nn.Module.to(network, memory_format=LAYOUT)
    for module in network.modules():
        if isinstance(module, Transformer2DModel):
            module._operate_on_continuous_inputs = MethodType(_tokens_of_picture, module)
            module._get_output_for_continuous_inputs = MethodType(_picture_of_tokens, module)


def undo(network: torch.nn.Module) -> None:
    """Put the weights back into torch's own layout, and give attention the library's method."""
    torch.nn.Module.to(network, memory_format=torch.contiguous_format)
    for module in network.modules():
        vars(module).pop("_operate_on_continuous_inputs", None)
        vars(module).pop("_get_output_for_continuous_inputs", None)


def _tokens_of_picture(
    self: Transformer2DModel, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """A picture (B, C, H, W) as tokens (B, H * W, inner), and how wide they are."""
    height, width = hidden_states.shape[2:]
    tokens = self.norm(hidden_states).movedim(1, 3).flatten(1, 2)
    tokens = _projected(self.proj_in, tokens, height, width)
    return tokens, tokens.shape[2]


def _picture_of_tokens(
    self: Transformer2DModel,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """Tokens (B, H * W, inner) as a picture (B, C, H, W) that is added to the residual; the library copies it first."""
    tokens = _projected(self.proj_out, hidden_states, height, width)
    return tokens.unflatten(1, (height, width)).movedim(3, 1) + residual


def _projected(
    layer: torch.nn.Module, tokens: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Tokens (B, H * W, C) after a linear layer or a convolution of single places, which is one too."""
    if type(layer) is torch.nn.Conv2d:
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)
    if isinstance(layer, torch.nn.Conv2d | lora.Conv2d):
        picture = layer(tokens.unflatten(1, (height, width)).movedim(3, 1))
        return picture.movedim(1, 3).flatten(1, 2)
    return layer(tokens)
