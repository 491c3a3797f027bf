"""A UNet whose pictures lie in memory channel by channel at each place, which the fastest convolutions of a GPU read.

Convolutions hand the layout of their weights on; what the library does in between would undo it again and again, and
each time a picture is copied: see `tokens` and `fusing`.
"""

import torch

LAYOUT = torch.channels_last


def keep(network: torch.nn.Module) -> None:
    """Put the weights of convolutions into this layout."""
    torch.nn.Module.to(network, memory_format=LAYOUT)


def undo(network: torch.nn.Module) -> None:
    """Put the weights back into torch's own layout."""
    torch.nn.Module.to(network, memory_format=torch.contiguous_format)
