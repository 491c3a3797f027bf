"""Kernels for a GPU, in Triton: group norm with SiLU for pictures in channels_last, and the gated GELU.

Each does in one pass over memory, or two, what torch does in several with copies in between, and keeps only its input
for the backward pass. All sums are in float32 and in one order, so a step repeated is equal bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

PLACES, CHANNELS = 64, 32  # of a picture that one program looks at
WARPS = 2  # of 32 threads, in each program
MERGED = 1024  # partial sums that one program merges at a time
# Numbers that differ from layer to layer: a kernel compiled for each kind of them takes many seconds and wins nothing.
UNSPECIAL = ("blocks", "places", "size")
ROWS, WIDTH = 4, 256  # of a gated GELU that one program computes


def takes(x: torch.Tensor) -> bool:
    """Whether a tensor is for these kernels: on a GPU, of float32 or half precision."""
    return x.is_cuda and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


# A picture (N, C, H, W) lies in memory as (N, H * W, C); `places` is H * W. Statistics are (N, groups) pairs of floats.


@triton.jit
def _tile(places, channels, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    """Where this program's part of the picture lies, its channels, and what of both is inside."""
    p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.program_id(2).to(tl.int64)
    at = n * places * channels + p[:, None] * channels + c[None, :]
    return at, n, c, (p < places)[:, None] & (c < channels)[None, :], c < channels


@triton.jit
def _read(x, shift, at, n, c, channels, inside, known, SHIFTED: tl.constexpr):
    """The picture's part in float32, with what is added to each channel of it, rounded as torch rounds the sum."""
    found = tl.load(x + at, inside, 0.0)
    if SHIFTED:
        added = tl.load(shift + n * channels + c, known, 0.0)
        total = (found.to(tl.float32) + added.to(tl.float32)[None, :]).to(found.dtype)
        found = tl.where(inside, total, 0.0)
    return found.to(tl.float32)


@triton.jit
def _normed(x, stats, weight, bias, n, c, channels, size, known):
    """The normalized part, its affine image, the weights, and one over the standard deviation; size: of a group."""
    of = stats + 2 * (n * (channels // size) + c // size)
    mean, rstd = tl.load(of, known, 0.0), tl.load(of + 1, known, 0.0)
    w = tl.load(weight + c, known, 0.0).to(tl.float32)
    b = tl.load(bias + c, known, 0.0).to(tl.float32)
    normed = (x - mean[None, :]) * rstd[None, :]
    return normed, normed * w[None, :] + b[None, :], w, rstd


@triton.jit
def _gradient(dy, z, SILU: tl.constexpr):
    """The gradient before the activation."""
    if SILU:
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit(do_not_specialize=UNSPECIAL)
def _moments(
    x, shift, out, places, channels,
    SHIFTED: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel over the places of a program: mean, and sum of squares about it."""
    at, n, c, inside, known = _tile(places, channels, PLACES, CHANNELS)
    value = _read(x, shift, at, n, c, channels, inside, known, SHIFTED)
    count = 1.0 * tl.minimum(PLACES, places - tl.program_id(0) * PLACES)
    mean = tl.sum(value, 0) / count
    apart = tl.where(inside, value - mean[None, :], 0.0)
    to = out + 2 * ((n * tl.num_programs(0) + tl.program_id(0)) * channels + c)
    tl.store(to, mean, known)
    tl.store(to + 1, tl.sum(apart * apart, 0), known)


@triton.jit
def _of_group(start, blocks, channels, size, MERGED: tl.constexpr):
    """Where the two numbers of a group's channels in all blocks lie, MERGED of them from one on, and their blocks."""
    group, n = tl.program_id(0), tl.program_id(1)
    each = start + tl.arange(0, MERGED)
    block = each // size
    at = 2 * ((n * blocks + block) * channels + group * size + each - block * size)
    return at, block, each < blocks * size


@triton.jit(do_not_specialize=UNSPECIAL)
def _merge_moments(
    parts, stats, blocks, places, channels, size, eps,
    MERGED: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Mean and one over the standard deviation of a group, from all blocks' moments (Chan et al. 1979)."""
    total = 1.0 * places * size
    found = tl.zeros((MERGED,), tl.float32)
    for start in range(0, blocks * size, MERGED):
        at, block, inside = _of_group(start, blocks, channels, size, MERGED)
        count = 1.0 * tl.minimum(PLACES, places - block * PLACES)
        found += tl.load(parts + at, inside, 0.0) * count
    mean = tl.sum(found, 0) / total
    found = tl.zeros((MERGED,), tl.float32)
    for start in range(0, blocks * size, MERGED):
        at, block, inside = _of_group(start, blocks, channels, size, MERGED)
        count = 1.0 * tl.minimum(PLACES, places - block * PLACES)
        apart = tl.where(inside, tl.load(parts + at, inside, 0.0) - mean, 0.0)
        found += tl.load(parts + at + 1, inside, 0.0) + count * apart * apart
    to = stats + 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(to, mean)
    tl.store(to + 1, tl.rsqrt(tl.sum(found, 0) / total + eps))


@triton.jit(do_not_specialize=UNSPECIAL)
def _apply(
    x, shift, stats, weight, bias, y, places, channels, size,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, n, c, inside, known = _tile(places, channels, PLACES, CHANNELS)
    value = _read(x, shift, at, n, c, channels, inside, known, SHIFTED)
    _, z, _, _ = _normed(value, stats, weight, bias, n, c, channels, size, known)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + at, z.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=UNSPECIAL)
def _sums(
    x, shift, dy, stats, weight, bias, out, places, channels, size,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel over the places of a program: the gradient of what is normed, and that times it."""
    at, n, c, inside, known = _tile(places, channels, PLACES, CHANNELS)
    value = _read(x, shift, at, n, c, channels, inside, known, SHIFTED)
    normed, z, w, _ = _normed(value, stats, weight, bias, n, c, channels, size, known)
    d = _gradient(tl.load(dy + at, inside, 0.0).to(tl.float32), z, SILU) * w[None, :]
    to = out + 2 * ((n * tl.num_programs(0) + tl.program_id(0)) * channels + c)
    tl.store(to, tl.sum(d, 0), known)
    tl.store(to + 1, tl.sum(d * normed, 0), known)


@triton.jit(do_not_specialize=UNSPECIAL)
def _merge_sums(parts, means, blocks, places, channels, size, MERGED: tl.constexpr):
    """The means of both over a group."""
    first, second = tl.zeros((MERGED,), tl.float32), tl.zeros((MERGED,), tl.float32)
    for start in range(0, blocks * size, MERGED):
        at, _, inside = _of_group(start, blocks, channels, size, MERGED)
        first += tl.load(parts + at, inside, 0.0)
        second += tl.load(parts + at + 1, inside, 0.0)
    to = means + 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(to, tl.sum(first, 0) / (1.0 * places * size))
    tl.store(to + 1, tl.sum(second, 0) / (1.0 * places * size))


@triton.jit(do_not_specialize=UNSPECIAL)
def _apply_gradient(
    x, shift, dy, stats, means, weight, bias, dx, places, channels, size,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, n, c, inside, known = _tile(places, channels, PLACES, CHANNELS)
    value = _read(x, shift, at, n, c, channels, inside, known, SHIFTED)
    normed, z, w, rstd = _normed(value, stats, weight, bias, n, c, channels, size, known)
    d = _gradient(tl.load(dy + at, inside, 0.0).to(tl.float32), z, SILU) * w[None, :]
    of = means + 2 * (n * (channels // size) + c // size)
    first, second = tl.load(of, known, 0.0), tl.load(of + 1, known, 0.0)
    d = (d - first[None, :] - normed * second[None, :]) * rstd[None, :]
    tl.store(dx + at, d.to(dx.dtype.element_ty), inside)


class GroupNorm(torch.autograd.Function):
    """See `group_norm`; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, shift: Any, groups: int, weight: Any, bias: Any, eps: float, silu: bool
    ) -> Any:
        layout = _Layout(x, groups)
        parts, stats = layout.buffers(x)
        y = torch.empty_like(x)
        added = x if shift is None else shift
        given = {"SHIFTED": shift is not None, "PLACES": PLACES, "num_warps": WARPS}
        of = (layout.places, layout.channels)
        _moments[layout.tiles](x, added, parts, *of, **given, CHANNELS=CHANNELS)
        merged = (parts, stats, layout.blocks, *of, layout.size)
        _merge_moments[layout.groups](*merged, eps, MERGED=MERGED, PLACES=PLACES)
        given |= {"SILU": silu, "CHANNELS": CHANNELS}
        _apply[layout.tiles](x, added, stats, weight, bias, y, *of, layout.size, **given)
        ctx.layout, ctx.given = layout, given
        ctx.save_for_backward(x, shift, stats, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        x, shift, stats, weight, bias = ctx.saved_tensors
        layout, given = ctx.layout, ctx.given
        dy = dy.contiguous(memory_format=torch.channels_last)
        parts, means = layout.buffers(x)
        dx = torch.empty_like(x)
        read = (x, x if shift is None else shift, dy, stats)
        of = (layout.places, layout.channels)
        _sums[layout.tiles](*read, weight, bias, parts, *of, layout.size, **given)
        _merge_sums[layout.groups](parts, means, layout.blocks, *of, layout.size, MERGED=MERGED)
        _apply_gradient[layout.tiles](*read, means, weight, bias, dx, *of, layout.size, **given)
        return dx, None, None, None, None, None, None


class _Layout:
    """How the work on a picture (N, C, H, W) is cut into programs. size: channels of a group."""

    def __init__(self, x: torch.Tensor, groups: int):
        n, self.channels, height, width = x.shape
        self.places, self.size = height * width, self.channels // groups
        self.blocks = triton.cdiv(self.places, PLACES)
        self.tiles = (self.blocks, triton.cdiv(self.channels, CHANNELS), n)
        self.groups = (groups, n)

    def buffers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For two numbers of each channel in each block, and for two of each group; float32."""
        groups, n = self.groups
        parts, pairs = 2 * n * self.blocks * self.channels, 2 * n * groups
        return x.new_empty(parts, dtype=torch.float32), x.new_empty(pairs, dtype=torch.float32)


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    shift: torch.Tensor | None = None,
    silu: bool = False,
) -> torch.Tensor:
    """Group normalization (Wu & He 2018, equation 1) of x + shift, then SiLU if that is asked for.

    x: (N, C, H, W) in channels_last, on a GPU. weight and bias (C,) are frozen, and so is shift (N, C), which is added
    at every place. Result: as x. Sums of squares are about the mean, so a mean far from 0 costs nothing.
    """
    return GroupNorm.apply(x, shift, groups, weight, bias, eps, silu)


@triton.jit(do_not_specialize=UNSPECIAL)
def _add(x, y, bias, out, places, channels, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    at, _, c, inside, known = _tile(places, channels, PLACES, CHANNELS)
    total = tl.load(x + at, inside, 0.0).to(tl.float32)
    total += tl.load(y + at, inside, 0.0).to(tl.float32)
    total += tl.load(bias + c, known, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


class Sum(torch.autograd.Function):
    """See `add`; x and y have gradients."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, bias: Any) -> Any:
        layout, out = _Layout(x, 1), torch.empty_like(x)
        of = (layout.places, layout.channels)
        _add[layout.tiles](x, y, bias, out, *of, PLACES=PLACES, CHANNELS=CHANNELS, num_warps=WARPS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        return dy, dy, None


def add(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + y + bias of pictures (N, C, H, W) in channels_last on a GPU and a frozen bias (C,); result: as x."""
    return Sum.apply(x, y, bias)


@triton.jit
def _gated_tile(x, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's part of h and of g in float32, its place in (rows, width), and the share of g that passes."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    of = x + r[:, None] * (2 * width) + c[None, :]
    h = tl.load(of, inside, 0.0).to(tl.float32)
    g = tl.load(of + width, inside, 0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
    return h, g, share, r[:, None], c[None, :], inside


@triton.jit
def _gate(x, y, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    h, g, share, r, c, inside = _gated_tile(x, rows, width, ROWS, WIDTH)
    tl.store(y + r * width + c, (h * g * share).to(y.dtype.element_ty), inside)


@triton.jit
def _gate_gradient(x, dy, dx, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    h, g, share, r, c, inside = _gated_tile(x, rows, width, ROWS, WIDTH)
    d = tl.load(dy + r * width + c, inside, 0.0).to(tl.float32)
    slope = share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    to = dx + r * (2 * width) + c
    tl.store(to, (d * g * share).to(dx.dtype.element_ty), inside)
    tl.store(to + width, (d * h * slope).to(dx.dtype.element_ty), inside)


class GatedGelu(torch.autograd.Function):
    """See `gated_gelu`."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _over(_gate, y)(x, y, *_sides(y), ROWS=ROWS, WIDTH=WIDTH)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _over(_gate_gradient, dy)(x, dy.contiguous(), dx, *_sides(dy), ROWS=ROWS, WIDTH=WIDTH)
        return dx


def _sides(y: torch.Tensor) -> tuple[int, int]:
    return y.numel() // y.shape[-1], y.shape[-1]


def _over(kernel: Any, y: torch.Tensor) -> Any:
    """The kernel for programs that cover all of y (..., width); a GPU takes 65,535 of them but along the first side."""
    rows, width = _sides(y)
    return kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, WIDTH))]


def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """h GELU(g) (Shazeer 2020, GEGLU) of x = [h, g] (..., 2 D) on a GPU; result (..., D)."""
    return GatedGelu.apply(x)
