"""Parts of a UNet that a GPU's own kernels compute: norms with their activations, and gated activations.

Torch's group norm knows one layout only, and copies what lies in another, before and after. The network keeps its
layers and their names, so adapters, files and checkpoints are those of a run without this.
"""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D

from lora_nb import channels_last, compiling, forwards, resnets


def fuse(network: torch.nn.Module, kernels: Any = None) -> int:
    """Let the kernels compute what they can of the network; returns how many of its modules they take part in.

    kernels: None is the module of that name, if it works here; else a warning says so, and nothing changes. What is in
    compiled blocks is left to the compiler.
    """
    undo(network)
    compiled = compiling.compiled(network)
    found = [m for m in network.modules() if m not in compiled and _kind(m)]
    if found and kernels is None:
        kernels = _working(next(found[0].parameters()).dtype)
    if kernels is None:
        return 0
    for module in found:
        module.forward = _kind(module)(module, kernels)
    return len(found)


def undo(network: torch.nn.Module) -> None:
    """Run every module as it is again."""
    forwards.restore(network, _Fused)


class _Fused:
    """The forward of a module: by the kernels if they take the input, else its own."""

    def __init__(self, module: Any, kernels: Any):
        self.module, self.kernels = module, kernels

    def __call__(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if self.kernels.takes(x):
            return self.fused(x, *rest, **named)
        return type(self.module).forward(self.module, x, *rest, **named)

    def norm(self, x: torch.Tensor, norm: torch.nn.GroupNorm, **more: Any) -> torch.Tensor:
        """x after the norm, and what `kernels.group_norm` does besides."""
        x = x.contiguous(memory_format=channels_last.LAYOUT)
        given = (norm.num_groups, norm.weight, norm.bias, norm.eps)
        return self.kernels.group_norm(x, *given, **more)


class _Norm(_Fused):
    def fused(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:  # tokens
            return type(self.module).forward(self.module, x)
        return self.norm(x, self.module)


class _Gated(_Fused):
    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.gated_gelu(self.module.proj(x))


class _Resnet(_Fused):
    def fused(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        block, shift = self.module, self.module.time_emb_proj(F.silu(temb))
        h, bias = _without_bias(block.conv1, self.norm(x, block.norm1, silu=True))
        if shift.requires_grad:  # where the time embedding carries adapters too
            h, shift = h + shift[:, :, None, None], torch.zeros_like(shift)
        h = self.norm(h, block.norm2, silu=True, shift=shift.detach() + bias)
        h, bias = _without_bias(block.conv2, h)
        if block.conv_shortcut is not None:
            x, more = _without_bias(block.conv_shortcut, x)
            bias = bias + more
        if not isinstance(bias, torch.Tensor):
            return h + x
        layout = channels_last.LAYOUT
        return self.kernels.add(
            h.contiguous(memory_format=layout), x.contiguous(memory_format=layout), bias
        )


def _without_bias(conv: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The convolution of x, and the bias that is still to be added to it: torch would do so in a pass of its own."""
    if type(conv) is not torch.nn.Conv2d or conv.bias is None:
        return conv(x), 0.0
    return conv._conv_forward(x, conv.weight, None), conv.bias


def _kind(module: torch.nn.Module) -> type[_Fused] | None:
    if isinstance(module, torch.nn.GroupNorm):
        return _Norm
    if isinstance(module, GEGLU):
        return _Gated
    return _Resnet if isinstance(module, ResnetBlock2D) and resnets.plain(module) else None


@functools.cache
def _working(dtype: torch.dtype) -> Any:
    """The module `kernels` if it computes here, in this type, what torch does; None, after a warning, if not."""
    try:
        from lora_nb import kernels

        _try(kernels, dtype)
    except (
        Exception
    ) as error:  # of many kinds: no Triton, no compiler, a card that it does not know
        words = next(iter(str(error).strip().splitlines()), "")
        warnings.warn(
            f"The fused kernels do not work here ({type(error).__name__}: {words}), so torch's are used, which is "
            "slower; the result is the same. fused_kernels=False says that this is meant.",
            stacklevel=2,
        )
        return None
    return kernels


def _try(kernels: Any, dtype: torch.dtype) -> None:
    """Raise RuntimeError unless a small picture and the gradient at it come out as torch's in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 64, 8, 8), (2, 64), (64,), (64,)
    given = [torch.randn(shape, generator=generator).to(dtype).cuda() for shape in shapes]

    def found(by: Any, x: torch.Tensor, shift: torch.Tensor, *affine: torch.Tensor) -> list[Any]:
        x = x.contiguous(memory_format=channels_last.LAYOUT).requires_grad_()
        y = by.group_norm(x, 4, *affine, 1e-5, shift, silu=True)
        y = by.add(y, x, affine[1])
        y = by.gated_gelu(y.movedim(1, 3))
        return [y.double(), torch.autograd.grad(y.sum(), x)[0].double()]

    ours, exact = found(kernels, *given), found(Torchs, *(each.double() for each in given))
    for a, b in zip(ours, exact, strict=True):
        apart = ((a - b).norm() / b.norm()).item()
        if not apart < (1e-4 if dtype == torch.float32 else 3e-2):
            raise RuntimeError(f"their results differ from torch's by {apart:.1e}")


class Torchs:
    """What `kernels` computes, by torch."""

    @staticmethod
    def group_norm(
        x: torch.Tensor,
        groups: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        shift: torch.Tensor | None = None,
        silu: bool = False,
    ) -> torch.Tensor:
        y = F.group_norm(
            x if shift is None else x + shift[:, :, None, None], groups, weight, bias, eps
        )
        return F.silu(y) if silu else y

    @staticmethod
    def add(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x + y + bias[:, None, None]

    @staticmethod
    def gated_gelu(x: torch.Tensor) -> torch.Tensor:
        h, g = x.chunk(2, -1)
        return h * F.gelu(g)
