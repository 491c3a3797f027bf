"""Pictures as tokens and back, around a UNet's attention, by linear layers.

Some models project by convolutions of single places, which are linear layers that cost more; and the library copies
what attention gives before it is added to a picture, whatever the picture's layout.
"""

from types import MethodType

import torch
from diffusers import Transformer2DModel
from peft.tuners import lora

from lora_nb.families.widened import linear

REPLACED = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")


def project(network: torch.nn.Module) -> None:
    """Give attention these methods in place of the library's."""
    for module in network.modules():
        if isinstance(module, Transformer2DModel):
            for name, own in zip(REPLACED, (_tokens_of_picture, _picture_of_tokens), strict=True):
                setattr(module, name, MethodType(own, module))


def undo(network: torch.nn.Module) -> None:
    """Give attention the library's methods."""
    for module in network.modules():
        for name in REPLACED:
            vars(module).pop(name, None)


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
    """Tokens (B, H * W, inner) as a picture (B, C, H, W), added to the residual and in its layout."""
    tokens = _projected(self.proj_out, hidden_states, height, width)
    return residual + tokens.unflatten(1, (height, width)).movedim(3, 1)


def _projected(
    layer: torch.nn.Module, tokens: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Tokens (B, H * W, C) after a linear layer or a convolution of single places, which is one too."""
    if type(layer) is torch.nn.Conv2d:
        return linear(tokens, layer.weight.flatten(1), layer.bias)
    if isinstance(layer, torch.nn.Conv2d | lora.Conv2d):
        picture = layer(tokens.unflatten(1, (height, width)).movedim(3, 1))
        return picture.movedim(1, 3).flatten(1, 2)
    return layer(tokens)
