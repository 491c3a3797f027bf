"""Frozen layers in bfloat16 on a CPU whose kernels do not know it: they keep their weights and compute in float32.

torch's own loops for it take 6 to 75 times as long there as products of float32 and all the widening.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_nb.families import products

# Whether this machine's kernels know bfloat16; asked once, as the question cannot be compiled.
SUPPORTED = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def narrow(tensor: torch.Tensor) -> bool:
    """Whether it is bfloat16 on a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """What products with this tensor are computed in: its own dtype, or float32 where that is sooner done."""
    return torch.float32 if narrow(tensor) and not SUPPORTED else tensor.dtype


def operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """All three in what products with the weight are computed in."""
    wide = computed_in(weight)
    return x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)


def widen(module: nn.Module) -> int:
    """Let the linear layers and convolutions that are slow on this machine compute so; returns how many do.

    Each looks where its weight is when it is called, so a module may be moved, and merged into, at any time.
    """
    found = [m for m in module.modules() if _can(m) and computed_in(m.weight) != m.weight.dtype]
    for layer in found:
        layer.forward = MethodType(_of_linear if type(layer) is nn.Linear else _of_conv, layer)
    return len(found)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in x's dtype, (..., out), of a frozen weight (out, in); what was widened is not kept for a gradient."""
    run = _product if _slow(x, weight) else products.linear
    return run(x, weight, bias)


def _can(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _of_linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _of_conv(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    if not _slow(x, self.weight):
        return type(self).forward(self, x)
    how = self.stride, self.padding, self.dilation, self.groups
    return _product(x, self.weight, self.bias, how)


def _slow(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype != computed_in(weight)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: Any, how: Any = None) -> torch.Tensor:
    run = _computed if torch.compiler.is_compiling() else _Product.apply
    return run(x, weight, bias, how)


def _computed(x: torch.Tensor, weight: torch.Tensor, bias: Any, how: Any) -> torch.Tensor:
    wide = operands(x, weight, bias)
    y = products.product(*wide) if how is None else F.conv2d(*wide, *how)
    return y.to(x.dtype)


class _Product(torch.autograd.Function):
    """A linear layer, or a convolution of the stride, padding, dilation and groups in `how`; both are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, how: Any) -> Any:
        ctx.shape, ctx.how = x.shape, how
        ctx.save_for_backward(weight)
        return _computed(x, weight, bias, how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        wide, weight, _ = operands(dy, *ctx.saved_tensors)
        if ctx.how is None:
            return products.multiply(wide, weight).to(dy.dtype), None, None, None
        dx = nn.grad.conv2d_input(ctx.shape, weight, wide, *ctx.how)
        return dx.to(dy.dtype), None, None, None
