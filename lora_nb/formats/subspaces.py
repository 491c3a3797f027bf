"""Where a LoRA acts: the singular values of scale B A layer by layer, and how two LoRAs overlap.

Nothing is formed in full size: QR of A and B leaves matrices of the rank.
"""

from dataclasses import dataclass

import torch

from lora_nb.formats.algebra import spectrum
from lora_nb.formats.weights import Pair, Weights

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Spectrum:
    """One layer's singular values, largest first."""

    part: str
    layer: str
    values: tuple[float, ...]

    @property
    def block(self) -> str:
        """The part and, in a network, the block that figures group by."""
        return _block(self.part, self.layer)

    @property
    def energy(self) -> tuple[float, ...]:
        """The share of sum(s^2) that the first 1, 2, ... values hold."""
        squares = torch.tensor(self.values, dtype=torch.float64) ** 2
        return tuple((squares.cumsum(0) / squares.sum().clamp(min=TINY)).tolist())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of s / sum(s): r for r equal values, 1 for one alone (Roy and Vetterli 2007)."""
        values = torch.tensor(self.values, dtype=torch.float64)
        shares = values / values.sum().clamp(min=TINY)
        return float(torch.special.entr(shares).sum().exp())

    def rank_for(self, energy: float) -> int:
        """How many values hold this share of sum(s^2)."""
        return min(sum(share < energy for share in self.energy) + 1, len(self.values))


BLOCKS = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks")


def _block(part: str, layer: str) -> str:
    words = layer.split(".")
    return ".".join([part, *words[: 2 if words[0] in BLOCKS else 1]])


def xray(weights: Weights) -> list[Spectrum]:
    """The singular values of scale B A in every layer."""
    return [
        Spectrum(part, layer, tuple(spectrum(pair)[1].tolist()))
        for part, pairs in weights.items()
        for layer, pair in pairs.items()
    ]


def xray_table(spectra: list[Spectrum], energy: float = 0.9) -> str:
    """Plain text, a line per block: layers, largest value, mean effective rank, rank that holds this energy."""
    lines = [f"{'block':<32}{'layers':>7}{'largest':>10}{'eff. rank':>10}{f'for {energy:.0%}':>10}"]
    for block in dict.fromkeys(s.block for s in spectra):
        rows = [s for s in spectra if s.block == block]
        largest = max(s.values[0] for s in rows)
        effective = sum(s.effective_rank for s in rows) / len(rows)
        needed = max(s.rank_for(energy) for s in rows)
        lines.append(f"{block:<32}{len(rows):>7}{largest:>10.3g}{effective:>10.1f}{needed:>10}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Overlap:
    """How two LoRAs meet in one layer.

    inputs, outputs: cosines of the principal angles between the spaces they read from and write to, largest first
    (Bjorck and Golub 1973). shared: mean squared cosine of both, 0 for strangers, 1 for the same spaces; chance: what
    random spaces of these sizes would have. cosine: between the two changes as vectors; below 0 they work against
    each other.
    """

    part: str
    layer: str
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    shared: float
    chance: float
    cosine: float

    @property
    def block(self) -> str:
        """The part and, in a network, the block that figures group by."""
        return _block(self.part, self.layer)


def overlap(first: Weights, second: Weights) -> list[Overlap]:
    """Principal angles between two LoRAs in every layer that both change; a forecast of whether they get in each
    other's way when combined."""
    return [
        _overlap(part, layer, pair, second[part][layer])
        for part, pairs in first.items()
        for layer, pair in pairs.items()
        if layer in second.get(part, {})
    ]


def _overlap(part: str, layer: str, a: Pair, b: Pair) -> Overlap:
    (ua, sa, va), (ub, sb, vb) = (_nonzero(*spectrum(pair)) for pair in (a, b))
    outputs, inputs = ua.T @ ub, va @ vb.T
    # <U1 S1 V1, U2 S2 V2> = sum over i, j of s1_i s2_j (u1_i . u2_j)(v1_i . v2_j)
    inner = float((sa[:, None] * sb * outputs * inputs).sum())
    norm = max(float(sa.norm() * sb.norm()), TINY)
    cosines = [torch.linalg.svdvals(m).clamp(max=1.0) for m in (inputs, outputs)]
    shared = sum(float((c**2).mean()) if len(c) else 0.0 for c in cosines) / 2
    larger = max(len(sa), len(sb))
    chance = sum(min(1.0, larger / n) for n in (va.shape[1], ua.shape[0])) / 2
    return Overlap(part, layer, *(tuple(c.tolist()) for c in cosines), shared, chance, inner / norm)


def _nonzero(
    u: torch.Tensor, values: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Without the directions that carry nothing."""
    size = int((values > 1e-7 * values.max()).sum())
    return u[:, :size], values[:size], v[:size]


def overlap_table(overlaps: list[Overlap]) -> str:
    """Plain text: the layers that share most, and the mean."""
    lines = [f"{'shared':>7}{'chance':>7}{'cosine':>8}  layer"]
    worst = sorted(overlaps, key=lambda o: o.shared - o.chance, reverse=True)
    lines += [
        f"{o.shared:>7.2f}{o.chance:>7.2f}{o.cosine:>8.2f}  {o.part}.{o.layer}" for o in worst[:10]
    ]
    n = max(len(overlaps), 1)
    means = [sum(getattr(o, f) for o in overlaps) / n for f in ("shared", "chance", "cosine")]
    lines.append(
        f"{means[0]:>7.2f}{means[1]:>7.2f}{means[2]:>8.2f}  mean of {len(overlaps)} layers"
    )
    return "\n".join(lines)
