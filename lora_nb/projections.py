"""Attention whose LoRA projections take fewer kernels: peft's numbers to float32 rounding, in less time.

peft adds a branch by a product, a scaling and an addition of the full width, and q, k and v each read their common
input. Here projections of one input are one product with their branches. Layers and weights stay where peft has them,
so there is nothing to undo for saving, scaling, merging or removing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from lora_nb import adapters
from lora_nb.families import Family, network

# Entries of a layer's weight up to which a CPU has multiplied them before it has started one more product.
SMALL = 128 * 128


class Projection(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T for layers of one shape side by side (Hu et al. 2021, equation 3).

    x: (N, in). weight: (layers x out, in), one layer's below the other's, and bias (layers x out,) or None; both
    frozen. factors: A (rank, in) of each layer, then B (out, rank) of each, float32; they are used in x's dtype, as
    which `copies` has them already if it is not None. Result: (N, layers x out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, scale: float, copies: Any, *factors: Any
    ) -> Any:
        a, b = copies or _stacked(factors, x.dtype)
        inner = _scaled(x @ a.T, scale)  # (N, layers x rank)
        y = F.linear(x, weight, bias)
        _by_layer(y, len(b)).baddbmm_(_by_layer(inner, len(b)), b.mT)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, inner, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, inner, a, b = ctx.saved_tensors
        layers, rank = len(b), b.shape[2]
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        if not dy.is_cuda:
            # There narrow products of bfloat16 take up to twice as long as those of float32 and all the widening.
            dy, x, inner, b = (each.float() for each in (dy, x, inner, b))
        dys, d_inner = _by_layer(dy, layers), torch.empty_like(inner)
        torch.bmm(dys, b, out=_by_layer(d_inner, layers))
        _scaled(d_inner, ctx.scale)
        d_a = _in_float32(torch.mm, d_inner.T, x).split(rank)
        d_b = _gradient_of_b(dys, _by_layer(inner, layers)).unbind()
        if dx is not None:
            dx.addmm_(d_inner.to(dx.dtype), a)
        return dx, None, None, None, None, *d_a, *d_b


def plain_projection(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, scale: float, *factors: torch.Tensor
) -> torch.Tensor:
    """What `Projection` computes, for a compiler that writes the backward pass itself."""
    a, b = _stacked(factors, x.dtype)
    branches = torch.bmm(_by_layer(x @ a.T, len(b)), b.mT)
    y = _by_layer(F.linear(x, weight, bias), len(b)) + scale * branches
    return y.transpose(0, 1).flatten(1)


def summed_projection(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, scale: float, *factors: torch.Tensor
) -> torch.Tensor:
    """What `Projection` computes, with weights W + scale B A that are made for it: fewer products, and wider ones."""
    a, b = _stacked(factors, x.dtype)
    weight, a = (each.unflatten(0, (len(b), -1)) for each in (weight, a))
    return F.linear(x, torch.baddbmm(weight, b, a, alpha=scale).flatten(0, 1), bias)


def _small(x: torch.Tensor, weight: torch.Tensor, layers: int) -> bool:
    """Whether it is sooner done with summed weights; half precision would round away what is added to them."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and weight.numel() <= layers * SMALL


def _stacked(
    factors: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A of all layers below each other (layers x rank, in), and B of each (layers, out, rank), in the dtype."""
    half = len(factors) // 2
    if half == 1:
        return factors[0].to(dtype), factors[1].to(dtype)[None]
    return torch.cat(factors[:half]).to(dtype), torch.stack(factors[half:]).to(dtype)


def _by_layer(rows: torch.Tensor, layers: int) -> torch.Tensor:
    """Rows (N, layers x width) as a view (layers, N, width)."""
    return rows.unflatten(1, (layers, -1)).transpose(0, 1)


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x times the scale, in place; mostly alpha is the rank, and nothing is to be done."""
    return x if scale == 1 else x.mul_(scale)


def _gradient_of_b(dys: torch.Tensor, inners: torch.Tensor) -> torch.Tensor:
    """Of each layer (layers, out, rank), float32."""
    if dys.is_cuda:
        return _in_float32(torch.bmm, dys.mT, inners)
    # A CPU takes up to twice as long for a product whose second factor is as narrow as a rank.
    return torch.bmm(inners.mT, dys).mT.contiguous()


def _in_float32(product: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product that sums in float32 and, on a GPU, is never rounded to the half precision of its factors."""
    if left.is_cuda and left.dtype != torch.float32:
        return product(left, right, out_dtype=torch.float32)
    return product(left, right).float()


class GroupedAttention:
    """A processor of plain attention: layers that read the same input are one product with their branches."""

    def __init__(self) -> None:
        self._shared: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.copies: dict[tuple[str, ...], _Copies] = {}
        self.fresh = False  # whether the copies are of what the factors are now

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """Hidden states (B, N, width) after attention, as diffusers' own processor gives them."""
        if attention_mask is not None or hidden_states.ndim != 3:
            others = (encoder_hidden_states, attention_mask)
            return AttnProcessor2_0()(attn, hidden_states, *others, **rest)
        if encoder_hidden_states is None:
            parts = self._project(attn, ("to_q", "to_k", "to_v"), hidden_states)
        else:
            parts = self._project(attn, ("to_q",), hidden_states)
            parts += self._project(attn, ("to_k", "to_v"), encoder_hidden_states)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](*self._project(attn, ("to_out.0",), mixed))

    def lay(self, attn: Attention) -> None:
        """Lay the frozen weights of the layers with a common input below each other, unless they lie so."""
        names = ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v")
        _, bases = _layers(attn, names)
        if {type(base) for base in bases} == {nn.Linear}:
            self._frozen(names, bases)

    def _project(
        self, attn: Attention, names: tuple[str, ...], x: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of the named layers for their common input x, (B, N, out) each."""
        layers, bases = _layers(attn, names)
        adapted = [layer for layer in layers if layer not in bases and _active(layer)]
        alike = len(adapted) in (0, len(layers)) and all(map(_simple, adapted))
        alike = alike and len({_kind(layer) for layer in adapted}) < 2
        if not alike or {type(base) for base in bases} != {nn.Linear}:
            return tuple(layer(x) for layer in layers)
        weight, bias = self._frozen(names, bases)
        rows = x.flatten(0, 1)
        if adapted:
            factors = [layer.lora_A[adapters.ADAPTER].weight for layer in layers]
            factors += [layer.lora_B[adapters.ADAPTER].weight for layer in layers]
            scale = layers[0].scaling[adapters.ADAPTER]
            if _small(rows, weight, len(layers)):
                y = summed_projection(rows, weight, bias, scale, *factors)
            elif torch.compiler.is_compiling():
                y = plain_projection(rows, weight, bias, scale, *factors)
            else:
                copies = self._copied(names, factors, x)
                y = Projection.apply(rows, weight, bias, scale, copies, *factors)
        else:
            y = F.linear(rows, weight, bias)
        return y.unflatten(0, x.shape[:2]).split([base.out_features for base in bases], -1)

    def _copied(
        self, names: tuple[str, ...], factors: list[nn.Parameter], x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors stacked in x's dtype, if they are kept so in this step."""
        if not self.fresh or x.dtype == torch.float32:
            return None
        if names not in self.copies:
            self.copies[names] = _Copies(factors, x.dtype)
        return self.copies[names].a, self.copies[names].b

    def _frozen(
        self, names: tuple[str, ...], bases: list[nn.Linear]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers' weights and biases below each other, in one tensor that theirs are views of.

        So nothing is kept twice, and an adapter merged into them is merged here. Made anew after a move to a device.
        """
        first = bases[0]
        if len(bases) == 1:
            return first.weight, first.bias
        if torch.compiler.is_compiling():  # `lay` has been called; an address cannot be compiled
            return self._shared[names]
        if (
            names not in self._shared
            or self._shared[names][0].data_ptr() != first.weight.data_ptr()
        ):
            bias = None if first.bias is None else _side_by_side([base.bias for base in bases])
            self._shared[names] = _side_by_side([base.weight for base in bases]), bias
        return self._shared[names]


class _Copies:
    """What `_stacked` makes of the factors of layers; parts: of it, in the order of the factors."""

    @torch.no_grad()
    def __init__(self, factors: list[nn.Parameter], dtype: torch.dtype):
        self.factors = factors
        self.a, self.b = _stacked(factors, dtype)
        self.parts = [*self.a.split(self.b.shape[2]), *self.b]


class Copies:
    """The factors of all grouped attention of a network in half precision, made all at once for each step.

    One by one they are hundreds of kernels that each move a few kilobytes.
    """

    def __init__(self, network: nn.Module):
        modules = [getattr(module, "processor", None) for module in network.modules()]
        self.processors = [each for each in modules if isinstance(each, GroupedAttention)]
        for processor in self.processors:
            processor.copies = {}

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Inside, projections read the copies, and the factors must not change."""
        held = [copies for each in self.processors for copies in each.copies.values()]
        if held:
            with torch.no_grad():
                factors = [factor for copies in held for factor in copies.factors]
                torch._foreach_copy_([part for copies in held for part in copies.parts], factors)
        for processor in self.processors:
            processor.fresh = True
        try:
            yield
        finally:
            for processor in self.processors:
                processor.fresh = False


def _layers(attn: Attention, names: tuple[str, ...]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The named layers, and under those that carry adapters the plain ones."""
    layers = [attn.get_submodule(name) for name in names]
    return layers, [layer.base_layer if isinstance(layer, Linear) else layer for layer in layers]


def _side_by_side(tensors: list[nn.Parameter]) -> torch.Tensor:
    together = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, together.split([len(t) for t in tensors]), strict=True):
        tensor.data = part
    return together


def _active(layer: Linear) -> bool:
    return not (layer.disable_adapters or layer.merged)


def _kind(layer: Linear) -> tuple[float, torch.Size]:
    """What layers must have in common to be projected together: scale, and the shape of B."""
    return layer.scaling[adapters.ADAPTER], layer.lora_B[adapters.ADAPTER].weight.shape


def _simple(layer: Linear) -> bool:
    """Whether a layer carries one plain adapter, ours, without dropout."""
    name = adapters.ADAPTER
    return (
        list(layer.lora_A) == [name] == layer.active_adapters
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[name]
    )


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of (B, heads, N, d); bfloat16 on a CPU is computed in float32.

    There the backward pass in bfloat16 takes two to five times as long.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        whole = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        return whole.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def group(family: Family) -> int:
    """Let the plain attention layers of the network project together; returns how many do.

    Layers with dropout, several adapters or another kind of attention compute as before.
    """
    found = [m for m in network(family).modules() if isinstance(m, Attention) and _plain(m)]
    for attn in found:
        if not isinstance(attn.processor, GroupedAttention):
            attn.set_processor(GroupedAttention())
    return len(found)


def ungroup(family: Family) -> None:
    """Give the attention layers the library's own processor back."""
    for attn in network(family).modules():
        if isinstance(attn, Attention) and isinstance(attn.processor, GroupedAttention):
            attn.set_processor(AttnProcessor2_0())


def _plain(attn: Attention) -> bool:
    """Whether attention is projections, softmax and an output projection, and nothing else."""
    norms = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")
    return (
        type(attn.processor) in (AttnProcessor2_0, GroupedAttention)
        and all(getattr(attn, norm) is None for norm in norms)
        and attn.add_k_proj is None
        and attn.inner_kv_dim == attn.inner_dim
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )
