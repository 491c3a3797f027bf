"""Frozen convolutions on a CPU with weights that are laid out once as the processor's kernels read them.

torch has them laid out anew at every call, which takes longer than a small convolution itself. The copies for steps in
bfloat16 cost as much memory as the weights, twice: one is for the gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lora_nb import forwards
from lora_nb.families import widened

ONES = (1, 1)  # stride and dilation


def pack(network: nn.Module) -> int:
    """Let the convolutions that can compute so in steps with gradients; returns how many do.

    Those of stride 1 in bfloat16 on a CPU that knows it. Without gradients a convolution is torch's own, as something
    may have been merged into it; weights that were moved are packed again.
    """
    unpack(network)
    found = [conv for conv in _found(network) if widened.narrow(conv.weight)]
    for conv in found:
        conv.forward = _Forward(conv)
    return len(found)


def unpack(network: nn.Module) -> None:
    """Give the convolutions torch's own forward back."""
    forwards.restore(network, _Forward)


@contextmanager
def drawing(network: nn.Module) -> Iterator[None]:
    """Inside, convolutions compute so without gradients, in float32 too; their weights must not change there."""
    before = {conv: vars(conv).get("forward") for conv in _found(network)}
    for conv in before:
        conv.forward = _Forward(conv, drawing=True)
    try:
        yield
    finally:
        for conv, forward in before.items():
            if forward is None:
                del conv.forward
            else:
                conv.forward = forward


def _found(network: nn.Module) -> list[nn.Conv2d]:
    return [m for m in network.modules() if type(m) is nn.Conv2d and _can(m)]


def _can(conv: nn.Conv2d) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and _known(conv.weight)
        and (conv.stride, conv.dilation, conv.groups) == (ONES, ONES, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(pad < size for pad, size in zip(conv.padding, conv.kernel_size, strict=True))
    )


def _known(tensor: torch.Tensor) -> bool:
    """Whether the kernels know its dtype, and it is on their device."""
    known = (torch.float32, torch.bfloat16) if widened.SUPPORTED else (torch.float32,)
    return tensor.device.type == "cpu" and tensor.dtype in known


class _Forward:
    """The forward of a convolution: by packed weights where there are gradients or it draws, its own elsewhere."""

    def __init__(self, conv: nn.Conv2d, drawing: bool = False):
        self.conv, self.drawing, self.packed_for = conv, drawing, None

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its own, as torch cannot copy these.
        return {"conv": self.conv, "drawing": self.drawing, "packed_for": None}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        wanted = self.drawing != torch.is_grad_enabled()
        fits = _known(x) and x.dtype == conv.weight.dtype
        # With larger pictures the output's way back to torch's layout takes longer than the weight's to the kernel's.
        pays = x.numel() < conv.weight.numel()
        if torch.compiler.is_compiling() or not (wanted and fits and pays):
            return type(conv).forward(conv, x)
        if self.packed_for != (conv.weight.data_ptr(), x.shape):
            self.packed_for = conv.weight.data_ptr(), x.shape
            self._pack(conv.weight.detach(), x.shape)
        return self.there(x, conv.bias) if self.drawing else _Convolution.apply(x, conv.bias, self)

    def _pack(self, weight: torch.Tensor, shape: torch.Size) -> None:
        sizes, padding = self.conv.kernel_size, self.conv.padding
        self.there = _Packed(weight, padding, shape)
        if not self.drawing:
            # What a picture gets from its neighbours it gives back to them: the same convolution, turned half round.
            edges = [size - 1 - pad for size, pad in zip(sizes, padding, strict=True)]
            places = [
                n + pad - edge for n, pad, edge in zip(shape[2:], padding, edges, strict=True)
            ]
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            self.back = _Packed(turned, edges, (shape[0], len(weight), *places))


class _Packed:
    """A weight (out, in, height, width) as the kernel reads it, for a padding and inputs of a shape.

    How the kernel reads it depends on the shape. To lay out anew what was laid out for another takes up to 80 times as
    long as the convolution.
    """

    def __init__(self, weight: torch.Tensor, padding: Any, shape: Any):
        self.padding = list(padding)
        pack = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = pack(weight, self.padding, ONES, ONES, 1, list(shape))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        y = run(x, self.weight, bias, self.padding, ONES, ONES, 1, "none", [], "")
        return y.contiguous()  # norms and whatever follows are fast in this layout only


class _Convolution(torch.autograd.Function):
    """A convolution by packed weights, frozen like the bias; x (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, packed: _Forward) -> Any:
        ctx.back = packed.back
        return packed.there(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        return ctx.back(dy, None), None, None
