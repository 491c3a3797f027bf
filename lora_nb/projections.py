"""Attention whose LoRA projections take fewer kernels: peft's numbers to float32 rounding, in less time.

peft adds a branch by a product, a scaling and an addition of the full width, and q, k and v each read their common
input. Here projections of one input are one product with their branches. Layers and weights stay where peft has them,
so there is nothing to undo for saving, scaling, merging or removing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from lora_nb import adapters
from lora_nb.families import Family, network, products
from lora_nb.families.widened import computed_in, linear, narrow, operands

# Entries of a layer's weight up to which a CPU has multiplied them before it has started one more product.
SMALL = 128 * 128
# A CPU's kernel of attention takes this many keys at once, and what is left over one by one.
KEYS_AT_ONCE = 16
QUERIES = 64  # from how many on it pays to fill the last keys up


class Projection(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T for layers of one shape side by side (Hu et al. 2021, equation 3).

    x: (N, in). weight: (layers x out, in), one layer's below the other's, and bias (layers x out,) or None; both
    frozen. factors: A (rank, in) of each layer, then B (out, rank) of each, float32; `copies` has them as `_stacked`
    makes them already, if it is not None. x W^T + b is computed as `computed_in` says and the branches as
    `_of_branches` says. Result: (N, layers x out) in the given dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        weight: Any,
        bias: Any,
        scale: float,
        dtype: Any,
        copies: Any,
        *factors: Any,
    ) -> Any:
        branches = _of_branches(weight)
        a, b = copies or _stacked(factors, branches)
        inner = _scaled(x.to(branches) @ a.T, scale)  # (N, layers x rank)
        y = products.product(*operands(x, weight, bias)).to(branches)
        _add_products(_by_layer(y, len(b)), _by_layer(inner, len(b)), b.mT)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, inner, a, b)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, inner, a, b = ctx.saved_tensors
        layers, rank = len(b), b.shape[2]
        dx = products.multiply(*operands(dy, weight)[:2]) if ctx.needs_input_grad[0] else None
        dys, d_inner = _by_layer(dy.to(a.dtype), layers), torch.empty_like(inner)
        _multiply(dys, b, out=_by_layer(d_inner, layers))
        _scaled(d_inner, ctx.scale)
        d_a = _in_float32(torch.mm, d_inner.T, x.to(a.dtype)).split(rank)
        d_b = _gradient_of_b(dys, _by_layer(inner, layers)).unbind()
        if dx is not None:
            dx = dx.to(a.dtype).addmm_(d_inner, a).to(x.dtype)
        return dx, None, None, None, None, None, *d_a, *d_b


def _of_branches(weight: torch.Tensor) -> torch.dtype:
    """What branches beside this weight are computed in.

    Narrow products of bfloat16 take a CPU up to twice as long as those of float32 and all the widening.
    """
    return weight.dtype if weight.is_cuda else torch.float32


def plain_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    scale: float,
    dtype: torch.dtype,
    *factors: torch.Tensor,
) -> torch.Tensor:
    """What `Projection` computes, for a compiler that writes the backward pass itself."""
    branches = _of_branches(weight)
    a, b = _stacked(factors, branches)
    added = torch.bmm(_by_layer(x.to(branches) @ a.T, len(b)), b.mT)
    y = products.linear(*operands(x, weight, bias)).to(branches)
    return (_by_layer(y, len(b)) + scale * added).transpose(0, 1).flatten(1).to(dtype)


def summed_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    scale: float,
    dtype: torch.dtype,
    *factors: torch.Tensor,
) -> torch.Tensor:
    """What `Projection` computes, with weights W + scale B A that are made for it: fewer products, and wider ones."""
    a, b = _stacked(factors, torch.float32)
    weight, a = (each.float().unflatten(0, (len(b), -1)) for each in (weight, a))
    summed = torch.baddbmm(weight, b, a, alpha=scale).flatten(0, 1)
    return products.linear(*operands(x, summed, bias)).to(dtype)


def _small(weight: torch.Tensor, layers: int) -> bool:
    """Whether it is sooner done with summed weights; half precision would round away what is added to them."""
    plain = weight.device.type == "cpu" and computed_in(weight) == torch.float32
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
    return rows.view(len(rows), layers, -1).transpose(0, 1)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """The product of each layer's matrices; a single one starts sooner than a batch of one."""
    if len(out) > 1:
        torch.bmm(left, right, out=out)
    else:
        torch.mm(left[0], right[0], out=out[0])


def _add_products(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if len(sums) > 1:
        sums.baddbmm_(left, right)
    else:
        sums[0].addmm_(left[0], right[0])


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x times the scale, in place; mostly alpha is the rank, and nothing is to be done."""
    return x if scale == 1 else x.mul_(scale)


def _gradient_of_b(dys: torch.Tensor, inners: torch.Tensor) -> torch.Tensor:
    """Of each layer (layers, out, rank), float32."""
    if dys.is_cuda:
        return _in_float32(torch.bmm, dys.mT, inners)
    # A CPU takes up to twice as long for a product whose second factor is as narrow as a rank.
    turned = dys.new_empty(len(dys), inners.shape[2], dys.shape[2])
    _multiply(inners.mT, dys, out=turned)
    return turned.mT.contiguous()


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
        self.drawing = False
        self.text: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # with its keys and values

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
        dtype, wide = hidden_states.dtype, _of_attention(hidden_states)
        if encoder_hidden_states is None:
            names = ("to_q", "to_k", "to_v")
            q, k, v = self._heads(attn, names, hidden_states, dtype, wide)
        else:
            [q] = self._heads(attn, ("to_q",), hidden_states, dtype, wide)
            k, v = self._of_text(attn, encoder_hidden_states, dtype, wide)
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](*self._project(attn, ("to_out.0",), mixed, dtype, dtype))

    def _of_text(
        self, attn: Attention, text: torch.Tensor, dtype: torch.dtype, wide: torch.dtype
    ) -> list[torch.Tensor]:
        """Its keys and values; inside `drawing` those of the same tensor as before are not computed again."""
        names = ("to_k", "to_v")
        if not self.drawing:
            return self._heads(attn, names, text, dtype, wide)
        if self.text is None or self.text[0] is not text:
            parts = self._heads(attn, names, text, dtype, wide)
            self.text = text, [part.to(wide) for part in parts]
        return self.text[1]

    def _heads(self, attn: Attention, *projection: Any) -> list[torch.Tensor]:
        """What `_project` gives, as (B, heads, N, width of a head)."""
        parts = self._project(attn, *projection)
        return [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts]

    def lay(self, attn: Attention) -> None:
        """Lay the frozen weights of the layers with a common input below each other, unless they lie so."""
        names = ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v")
        _, bases = _layers(attn, names)
        if {type(base) for base in bases} == {nn.Linear}:
            self._frozen(names, bases)

    def _project(
        self,
        attn: Attention,
        names: tuple[str, ...],
        x: torch.Tensor,
        dtype: torch.dtype,
        result: torch.dtype,
    ) -> tuple[torch.Tensor, ...]:
        """The outputs of the named layers for their common input x, (B, N, out) each.

        dtype: what the network computes in, and all layers take; result: what they give if they are one product.
        """
        layers, bases = _layers(attn, names)
        adapted = [layer for layer in layers if layer not in bases and _active(layer)]
        alike = len(adapted) in (0, len(layers)) and all(map(_simple, adapted))
        alike = alike and len({_kind(layer) for layer in adapted}) < 2
        if not alike or {type(base) for base in bases} != {nn.Linear}:
            return tuple(layer(x.to(dtype)) for layer in layers)
        weight, bias = self._frozen(names, bases)
        rows = x.flatten(0, 1)
        if adapted:
            factors = [layer.lora_A[adapters.ADAPTER].weight for layer in layers]
            factors += [layer.lora_B[adapters.ADAPTER].weight for layer in layers]
            scale = layers[0].scaling[adapters.ADAPTER]
            if _small(weight, len(layers)):
                y = summed_projection(rows, weight, bias, scale, result, *factors)
            elif torch.compiler.is_compiling():
                y = plain_projection(rows, weight, bias, scale, result, *factors)
            else:
                copies = self._copied(names, factors, weight)
                y = Projection.apply(rows, weight, bias, scale, result, copies, *factors)
        else:
            y = linear(rows.to(dtype), weight, bias)
        return y.unflatten(0, x.shape[:2]).split([base.out_features for base in bases], -1)

    def _copied(
        self, names: tuple[str, ...], factors: list[nn.Parameter], weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors stacked as they are used beside the weight, if they are kept so in this step."""
        dtype = _of_branches(weight)
        if not self.fresh or dtype == torch.float32:
            return None
        if names not in self.copies:
            self.copies[names] = _Copies(factors, dtype)
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
        self.processors = [attn.processor for attn in grouped(network)]
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


@contextmanager
def drawing(network: nn.Module) -> Iterator[None]:
    """Inside, grouped attention computes keys and values of a text once, not at every denoising step of a picture.

    A pipeline hands on one tensor for all of them. Layers must not change inside.
    """
    processors = [attn.processor for attn in grouped(network)]
    try:
        for processor in processors:
            processor.drawing = True
        yield
    finally:
        for processor in processors:
            processor.drawing, processor.text = False, None


def grouped(network: nn.Module) -> list[Attention]:
    """The attention layers in a module that compute so."""
    found = [module for module in network.modules() if isinstance(module, Attention)]
    return [attn for attn in found if isinstance(attn.processor, GroupedAttention)]


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
    """Scaled dot-product attention of (B, heads, N, d), in q's dtype; bfloat16 on a CPU is computed in float32.

    There the backward pass in bfloat16 takes two to five times as long.
    """
    inside = _of_attention(q)
    attend = _filled_up if q.device.type == "cpu" else F.scaled_dot_product_attention
    return attend(q.to(inside), k.to(inside), v.to(inside)).to(q.dtype)


def _of_attention(x: torch.Tensor) -> torch.dtype:
    """What attention over x is computed in."""
    return torch.float32 if narrow(x) else x.dtype


def _filled_up(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in which keys that are masked complete the last group, where that is less than its leftover costs.

    CLIP's 77 tokens as 80 take 0.5 to 0.8 times as long forward, and 0.9 to 1 times back.
    """
    keys, leftover = k.shape[2], k.shape[2] % KEYS_AT_ONCE
    if q.shape[2] < QUERIES or leftover <= KEYS_AT_ONCE // 2:
        return F.scaled_dot_product_attention(q, k, v)
    missing = KEYS_AT_ONCE - leftover
    mask = q.new_zeros(1, keys + missing)
    mask[:, keys:] = -torch.inf
    k, v = (F.pad(each, (0, 0, 0, missing)) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def group(family: Family) -> int:
    """Let the plain attention layers of the network project together; returns how many do.

    Layers with dropout, several adapters or another kind of attention compute as before.
    """
    found = [m for m in network(family).modules() if isinstance(m, Attention) and _plain(m)]
    for attn in found:
        if not isinstance(attn.processor, GroupedAttention):
            attn.set_processor(GroupedAttention())
        attn.forward = MethodType(_straight, attn)
    return len(found)


def ungroup(family: Family) -> None:
    """Give the attention layers the library's own processor back."""
    for attn in filter(lambda module: isinstance(module, Attention), network(family).modules()):
        if isinstance(attn.processor, GroupedAttention):
            attn.set_processor(AttnProcessor2_0())
        if getattr(vars(attn).get("forward"), "__func__", None) is _straight:
            del attn.forward


def _straight(self: Attention, *args: Any, **named: Any) -> torch.Tensor:
    """The forward of attention without the library's look at its processor's signature.

    At every call that takes as long as a small layer.
    """
    if isinstance(self.processor, GroupedAttention):
        return self.processor(self, *args, **named)
    return type(self).forward(self, *args, **named)


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
