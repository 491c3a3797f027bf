"""A frozen network in 8 or 4 bits: its linear layers keep small integers, and widen them each time they compute.

That saves memory and costs time. It is plain torch, so it needs no library and is the same on every device.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lora_nb.errors import ConfigError
from lora_nb.families import products
from lora_nb.families.widened import linear, operands

KINDS = ("int8", "nf4")  # the larger first
BLOCK = 64  # weights with a scale of their own in nf4


@cache
def nf4_values() -> torch.Tensor:
    """The 16 values of NormalFloat4, from -1 to 1: quantiles of a normal distribution, with a zero.

    Dettmers et al. 2023 (QLoRA), section 3: eight quantiles above zero and seven below, each side evenly spaced in
    probability from the same tail, then divided by the largest.
    """
    tail = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(tail, 0.5, count, dtype=torch.float64))
        for count in (9, 8)
    )
    values = torch.cat([-below, above[:-1].flip(0)])  # both sides end in the zero, kept once
    return (values / values[-1]).float()


@cache
def _nf4_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values that each byte stands for, the upper half byte's first, as one whole number of both's bits (256,).

    So that looking them up is one read: that takes a tenth of the time on a CPU.
    """
    values = nf4_values()
    both = torch.cartesian_prod(values, values).to(device, dtype)
    return both.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten()


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer with its weight in 8 or 4 bits; to adapters and formats it is a linear layer.

    int8: m / 127 times a whole number, m the largest |w| of the output's row. nf4: m times the nearest of 16 values, m
    the largest |w| of 64 weights in sequence, two weights to a byte. Inputs are never rounded. `weight` is a widened
    copy; merging into it raises ConfigError.
    """

    def __init__(self, layer: torch.nn.Linear, kind: str, device: torch.device):
        torch.nn.Module.__init__(self)  # a linear layer's own would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        pack = {"int8": _pack_int8, "nf4": _pack_nf4}[kind]
        codes, scales = pack(layer.weight.detach().to(device, torch.float32))
        self.codes = torch.nn.Parameter(codes, requires_grad=False)
        # A buffer, so that the first parameter still tells a network's dtype.
        self.register_buffer("scales", scales)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight (out, in) that this layer computes with, in the dtype it was loaded in."""
        return self.widened(self.dtype).as_subclass(_Copy)

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor of the weight (out, in)."""
        if self.kind == "int8":
            return self.codes.to(dtype).mul_(self.scales)
        pairs = _nf4_pairs(dtype, self.codes.device).index_select(0, self.codes.flatten().int())
        values = pairs.view(dtype).view(-1, BLOCK).mul_(self.scales).flatten()
        return values[: self.in_features * self.out_features].view(self.out_features, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b in x's dtype; the widened W is not kept for the backward pass."""
        return _Product.apply(x, self)


class _Copy(torch.Tensor):
    """A layer's widened weight, which refuses to be changed: nothing would come of it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed of it is plain

    @property
    def data(self) -> torch.Tensor:
        raise ConfigError(
            "Nothing can be merged into quantized weights; load the base model without base_model_precision for that."
        )

    def copy_(self, *others: Any) -> torch.Tensor:
        return self.data


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, layer.widened(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide, weight, _ = operands(dy, ctx.layer.widened(dy.dtype))
        return products.multiply(wide, weight).to(dy.dtype), None


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """max |w| of each row, (rows, 1), and for a row of zeros a number that can be divided by."""
    return rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (out, in) from -127 to 127, and what one of them is worth, (out, 1)."""
    scales = _largest(weight / 127)
    return (weight / scales).round().to(torch.int8), scales


def _pack_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (blocks, 32) of two weights each, and the blocks' largest values (blocks, 1)."""
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = _largest(blocks)
    values = nf4_values().to(weight.device)
    nearest = torch.bucketize(blocks / scales, (values[1:] + values[:-1]) / 2, out_int32=True)
    return (nearest[:, ::2] * 16 + nearest[:, 1::2]).to(torch.uint8), scales


def size_of(layer: torch.nn.Linear, kind: str | None, width: int | None = None) -> int:
    """Bytes of a linear layer's weight in that kind; None: plain, `width` bytes a number, its own dtype's if None."""
    numbers = layer.in_features * layer.out_features
    if kind == "int8":
        return numbers + 4 * layer.out_features
    if kind == "nf4":
        blocks = -(-numbers // BLOCK)
        return blocks * (BLOCK // 2 + 4)
    return numbers * (width or layer.weight.element_size())


def linears(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers that `quantize` replaces, by name."""
    kinds = (torch.nn.Linear, QuantizedLinear)
    found = {name: layer for name, layer in module.named_modules() if type(layer) in kinds}
    return {name: layer for name, layer in found.items() if ".lora_" not in name}


def quantize(module: torch.nn.Module, kind: str, device: str | torch.device) -> None:
    """Replace a frozen module's linear layers, one by one, by quantized ones on the device."""
    for name, layer in linears(module).items():
        module.set_submodule(name, QuantizedLinear(layer, kind, torch.device(device)))


def kind_of(module: torch.nn.Module) -> str | None:
    """What a module was quantized to, None for a plain one."""
    return next((m.kind for m in module.modules() if isinstance(m, QuantizedLinear)), None)
