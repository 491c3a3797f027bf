"""Products in float32 on a CPU by the one of torch's two libraries that takes all of the processor's width.

torch leaves them to MKL, which takes half of it on AMD's processors with AVX-512: (1024, 256) x (256, 768) takes 3.7 ms
on a core of Zen 5, and 1.7 in oneDNN, to which torch leaves convolutions and bfloat16.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Multiplications from which on a layer saves more than a function with a gradient of its own takes.
ENOUGH = 2**22


def _wider() -> bool:
    """Whether oneDNN's instructions are wider here; never by a clock, as the two round differently."""
    backends, ask = torch.backends, getattr(torch.cpu, "get_capabilities", dict)
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    found = ask()
    return "AMD" in found.get("cpu_name", "") and found.get("avx512_f", False)


WIDER = _wider()


def sooner(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN has x W^T sooner than torch's own way; x (..., in), weight (out, in)."""
    return (
        WIDER
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= ENOUGH
    )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, (..., out), for a function that has a gradient of its own."""
    if sooner(x, weight):
        return (_in_a_graph if torch.compiler.is_compiling() else _onednn)(x, weight, bias)
    return F.linear(x, weight, bias)


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product of (..., n) and (n, m), for a function that has a gradient of its own."""
    return product(left, right.mT, None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, (..., out), with gradients of x and W but none of b where it is `sooner` done."""
    return (_Linear.apply if sooner(x, weight) else F.linear)(x, weight, bias)


def use(module: nn.Module) -> None:
    """Let the frozen linear layers in float32 compute so, where it is ever sooner."""
    for layer in module.modules():
        if WIDER and type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.forward = MethodType(_forward, layer)


def _forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# A name for the compiler to call: of oneDNN's own it takes weights only that it has packed itself.
_in_a_graph = torch.library.custom_op("lora_nb::product", _onednn, mutates_args=())


@_in_a_graph.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        (x, weight), (of_x, of_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        dx = multiply(dy, weight) if of_x else None
        return dx, multiply(dy.flatten(0, -2).mT, x.flatten(0, -2)) if of_weight else None, None
