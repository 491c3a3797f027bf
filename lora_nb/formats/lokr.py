"""LoKr: the change of a layer is scale * kron(w1, w2), as LyCORIS and peft train it (Yeh et al., arXiv:2309.14859).

w1 is (l, m) and w2 is (k, n, kernel), so that the product has l k rows and m n columns. A file holds either of them
whole or as two pieces of `rank` columns and rows; w2 of a convolution also as two pieces around a core t2.
"""

import torch
from peft.tuners.lokr import LoKrLayer

from lora_nb.errors import FormatError

Roles = dict[str, torch.Tensor]  # what a file holds of one layer, by the ending of the key

FACTORS = LoKrLayer.adapter_layer_names  # lokr_w1, lokr_w1_a, lokr_w1_b, ... lokr_t2


def is_lokr(roles: Roles) -> bool:
    """Whether these are the factors of a Kronecker product."""
    return any(role in FACTORS for role in roles)


def complete(roles: Roles) -> bool:
    """Whether both factors are there, each whole or in its two pieces but not both, and nothing else but alpha."""
    rest = roles.keys() - {"alpha"}
    for factor in ("lokr_w1", "lokr_w2"):
        there = {factor} if factor in rest else {f"{factor}_a", f"{factor}_b"}
        if not there <= rest:
            return False
        rest -= there
    return not rest or (rest == {"lokr_t2"} and "lokr_w2" not in roles)


def ranks(roles: Roles) -> set[int]:
    """The ranks of the factors that are in pieces."""
    return {len(roles[b]) for b in ("lokr_w1_b", "lokr_w2_b") if b in roles}


def rank(roles: Roles) -> int:
    """The rank of the pieces; 0 if both factors are whole."""
    return max(ranks(roles), default=0)


def scale(roles: Roles) -> float:
    """LyCORIS's scale: alpha / rank, and 1 without an alpha or if both factors are whole, whatever alpha then says."""
    r = rank(roles)
    return float(roles["alpha"]) / r if r and "alpha" in roles else 1.0


def shapes(roles: Roles) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of w1 and w2 put together; () for one whose pieces do not meet."""
    return _shape(roles, "lokr_w1"), _shape(roles, "lokr_w2")


def _shape(roles: Roles, factor: str) -> tuple[int, ...]:
    if factor in roles:
        return tuple(roles[factor].shape)
    a, b = (tuple(roles[f"{factor}_{piece}"].shape) for piece in "ab")
    if len(a) != 2 or len(b) != 2:
        return ()
    if factor == "lokr_w2" and "lokr_t2" in roles:
        inner, kernel = roles["lokr_t2"].shape[:2], roles["lokr_t2"].shape[2:]
        return (a[1], b[1], *kernel) if inner == (a[0], b[0]) else ()
    return (a[0], b[1]) if a[1] == b[0] else ()


def fits(roles: Roles, weight: torch.Size) -> bool:
    """Whether the product has the shape of a layer's weight, channel by channel; the kernel may lie in w2's columns."""
    w1, w2 = shapes(roles)
    if len(w1) != 2 or len(w2) < 2:
        return False
    outputs, inputs, *window = weight
    kernel = list(w2[2:])
    columns = inputs if kernel else inputs * torch.Size(window).numel()
    same = not kernel or kernel == (window or [1, 1])
    return (
        same
        and w1[0] * w2[0] == outputs
        and w1[1] * w2[1] == columns
        and inputs % w1[1] == 0  # else one block of w1 would end inside a kernel
    )


def of_lora(roles: Roles) -> Roles:
    """The LoRA of a layer as the LoKr of the same change: kron(1, B A), with the same rank and alpha."""
    a, b = roles["lora_A"], roles["lora_B"]
    pieces = {"lokr_w1": a.new_ones(1, 1), "lokr_w2_a": b.flatten(1), "lokr_w2_b": a.flatten(1)}
    return pieces | {role: roles[role] for role in ("alpha", "magnitude") if role in roles}


def take_apart(roles: Roles, ends: list[int]) -> list[Roles] | None:
    """The LoKr of a fused layer as one on each run of its rows, cut before these; None if a cut meets no end of w2.

    A row of w1 stands for as many rows of the product as w2 has, so the cuts are cuts of w1.
    """
    tall = "lokr_w1" if "lokr_w1" in roles else "lokr_w1_a"
    height = _shape(roles, "lokr_w2")[0]
    if any(end % height for end in ends):
        return None
    pieces = roles[tall].tensor_split([end // height for end in ends])
    return [
        {name: piece if name == tall else value.clone() for name, value in roles.items()}
        for piece in pieces
    ]


def fill(module: torch.nn.Module, adapter: str, state: Roles) -> None:
    """Put a file's factors, in peft's keys, in the place of those that peft made, of shapes that it chose itself."""
    for name, layer in module.named_modules():
        if not isinstance(layer, LoKrLayer) or adapter not in layer.scaling:
            continue
        kept = {factor: getattr(layer, factor) for factor in FACTORS}
        made = [there.pop(adapter) for there in kept.values() if adapter in there]
        for factor, there in kept.items():
            if (tensor := state.get(f"{name}.{factor}")) is not None:
                tensor = tensor.to(made[0].device, made[0].dtype)
                there[adapter] = torch.nn.Parameter(tensor, requires_grad=False)


def refuse(modules: dict[str, torch.nn.Module], adapter: str) -> None:
    """Raise FormatError if an adapter on these parts is a LoKr: a LoRA file has no place for it."""
    for part, module in modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, LoKrLayer) and adapter in layer.scaling:
                raise FormatError(
                    f"The adapter of {part}.{name} is a LoKr, a Kronecker product and no B A of low rank, "
                    "so no LoRA file holds it; keep the file it came from."
                )
