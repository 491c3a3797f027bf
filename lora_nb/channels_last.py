"""A UNet whose pictures lie in memory channel by channel at each place, from its first convolution to its last.

The fastest convolutions of a GPU read that layout. What the library does in between would undo it again and again, and
each time a picture is copied.
"""

from types import MethodType

import torch
from diffusers import Transformer2DModel

LAYOUT = torch.channels_last


def keep(network: torch.nn.Module) -> None:
    """Put the weights of convolutions into this layout, and let attention leave pictures in it."""
    torch.nn.Module.to(network, memory_format=LAYOUT)
    for module in network.modules():
        if isinstance(module, Transformer2DModel):
            module._get_output_for_continuous_inputs = MethodType(_picture_of_tokens, module)


def undo(network: torch.nn.Module) -> None:
    """Put the weights back into torch's own layout, and give attention the library's method."""
    torch.nn.Module.to(network, memory_format=torch.contiguous_format)
    for module in network.modules():
        vars(module).pop("_get_output_for_continuous_inputs", None)


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
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    picture = hidden_states.unflatten(1, (height, width)).movedim(3, 1)
    if not self.use_linear_projection:
        picture = self.proj_out(picture)
    return picture + residual


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Group normalization (Wu & He 2018, equation 1) of x (N, C, H, W) in this layout, for a compiler to make fast.

    Mean and square are summed over places first, where neighbours in memory are channels, and then over a group's
    channels; in float32, which holds the difference of the two while a mean is not hundreds of standard deviations.
    """
    n, channels = x.shape[:2]
    rows = x.movedim(1, 3).flatten(1, 2).float()  # (N, H * W, C), a view before it is widened
    mean, square = (
        each.unflatten(1, (groups, -1)).mean(2, keepdim=True)
        for each in (rows.mean(1), rows.square().mean(1))
    )
    factor = weight.float().unflatten(0, (groups, -1)) * (square - mean.square() + eps).rsqrt()
    shift = bias.float().unflatten(0, (groups, -1)) - mean * factor
    normed = rows * factor.reshape(n, 1, channels) + shift.reshape(n, 1, channels)
    return normed.to(x.dtype).unflatten(1, x.shape[2:]).movedim(3, 1)
