"""Drawings that nobody drew, made from those that somebody did: in another colour, and two on one page.

They teach the base what a colour word and an "and" do. Some combinations are never made, by a hash of their names, so
that it can be measured whether the base has understood or only remembers.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from drawings import COMMON, Concept, share
from state import generator, uniform

# Hue in turns, factor on saturation, exponent on value (below 1 is brighter): what the word means in a drawing.
COLOURS = {
    "red": (0.995, 1.1, 1.0),
    "orange": (0.085, 1.1, 0.7),
    "yellow": (0.140, 1.0, 0.5),
    "green": (0.345, 1.0, 1.0),
    "blue": (0.580, 1.1, 1.0),
    "purple": (0.760, 0.9, 1.0),
    "pink": (0.930, 0.6, 0.4),
}
WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b")
NEAR = 0.11  # turns of hue: what counts as the colour of a drawing, and what is another
# Prompts that are in no caption; measure.py draws them.
EDITS = """blue apple, noto style; green lion, flat style; pink cat face, noto style;
purple star, twemoji style; red fish, flat style; yellow rose, noto style;
cat with sunglasses, noto style; robot with a crown, flat style;
dog face and red apple, noto style; rocket and crescent moon, twemoji style;
cat face and fish, flat style; pizza and fire, blob style"""
EDITS = [" ".join(text.split()) for text in EDITS.split(";")]


def coloured(name: str, colour: str) -> str:
    """The name with this colour word: in place of the one it has, or before it."""
    found = WORD.sub(colour, name, count=1)
    return found if WORD.search(name) else f"{colour} {name}"


def never_made(text: str) -> bool:
    """A fifth of all combinations, and those of the edits."""
    return share(text, "combinations") < 0.2 or any(edit.startswith(f"{text},") for edit in EDITS)


def to_hsv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hue, saturation and value, N H W in [0, 1] each, of N 3 H W in [0, 1]."""
    high, low = x.amax(1), x.amin(1)
    spread = (high - low).clamp(min=1e-6)
    r, g, b = x.unbind(1)
    hue = torch.where(
        high == r,
        (g - b) / spread,
        torch.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread),
    )
    return (hue / 6) % 1, (high - low) / high.clamp(min=1e-6), high


def to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """N 3 H W in [0, 1]."""
    k = (
        torch.tensor([5.0, 3.0, 1.0], device=hue.device)[None, :, None, None] + 6 * hue[:, None]
    ) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * fall)


def away(hue: torch.Tensor | float, other: torch.Tensor | float) -> torch.Tensor | float:
    """From one hue to another the short way, in turns, within -0.5 and 0.5."""
    return (other - hue + 0.5) % 1 - 0.5


def main_hue(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hue that most of each drawing is near to, and the share of its ink that is (0 where it is grey)."""
    hue, saturation, value = to_hsv(pictures.float() / 255)
    strong = saturation * value * ((saturation > 0.25) & (value > 0.2))
    angle = 2 * math.pi * hue
    steps = torch.arange(36, device=hue.device) / 36
    # The strength near each of 36 hues; near is within a ninth of a turn.
    near = torch.stack(
        [(strong * (away(hue, s).abs() < NEAR)).sum((1, 2)) for s in steps.tolist()], 1
    )
    best = steps[near.argmax(1)][:, None, None]
    mine = (away(hue, best).abs() < NEAR) * strong
    mean = torch.atan2((mine * angle.sin()).sum((1, 2)), (mine * angle.cos()).sum((1, 2)))
    ink = (pictures.float().amin(1) < 240).float().sum((1, 2))
    return (mean / (2 * math.pi)) % 1, (mine > 0).float().sum((1, 2)) / ink.clamp(min=1)


def recolour(pictures: torch.Tensor, hue: torch.Tensor, colour: str) -> torch.Tensor:
    """uint8 N 3 H W with everything near each drawing's hue (N,) in this colour; the rest as it is."""
    wanted, saturate, brighten = COLOURS[colour]
    h, s, v = to_hsv(pictures.float() / 255)
    from_main = -away(h, hue[:, None, None])
    painted = to_rgb(
        (wanted + 0.5 * from_main) % 1, (s * saturate).clamp(0, 1), v.clamp(min=1e-6) ** brighten
    )
    mine = (from_main.abs() < NEAR + 0.03) & (s > 0.12)
    page = torch.where(mine[:, None], painted, pictures.float() / 255)
    return (page * 255).round().to(torch.uint8)


def colour_variants(
    pictures: torch.Tensor, concepts: list[Concept], styles: list[str], each: int = 3
) -> tuple[torch.Tensor, list[Concept], list[str]]:
    """Drawings in `each` other colours, with concepts whose names say so; grey and many-coloured ones are left out."""
    hues, shares = main_hue(pictures)
    rows: dict[str, list[int]] = {colour: [] for colour in COLOURS}
    for i, (hue, part) in enumerate(zip(hues.tolist(), shares.tolist(), strict=True)):
        name = concepts[i].name
        others = [
            c
            for c, (wanted, *_) in COLOURS.items()
            if abs(away(hue, wanted)) > 0.06 and not never_made(coloured(name, c))
        ]
        others.sort(key=lambda c: share(f"{styles[i]}/{concepts[i].slug}/{c}", "colours"))
        for colour in others[: each if part > 0.4 else 0]:
            rows[colour].append(i)
    found, members, kept = [], [], []
    for colour, chosen in rows.items():
        for part in torch.tensor(chosen, device=pictures.device).split(256):
            found.append(recolour(pictures[part], hues[part], colour))
        for i in chosen:
            name, c = coloured(concepts[i].name, colour), concepts[i]
            members.append(Concept(name, c.slug, c.group, c.subgroup, ()))
            kept.append(styles[i])
    return torch.cat(found), members, kept


def pair_variants(
    pictures: torch.Tensor, concepts: list[Concept], styles: list[str], count: int, seed: int = 0
) -> tuple[torch.Tensor, list[Concept], list[str]]:
    """Two things of one style side by side at half their size, named "a and b"; common things more often."""
    weights = torch.tensor([4.0 if c.name in COMMON else 1.0 for c in concepts])
    by_style = {style: [i for i, s in enumerate(styles) if s == style] for style in set(styles)}
    found, members, kept = [], [], []
    order = sorted(by_style)
    for n in range(count):
        g, style = generator(seed, n), order[n % len(order)]
        rows = by_style[style]
        pick = torch.multinomial(weights[rows], 2, generator=g).tolist()
        a, b = (concepts[rows[k]] for k in pick)
        name = f"{a.name} and {b.name}"
        if a.name == b.name or never_made(name):
            continue
        page = torch.full((3, 128, 128), 255, dtype=torch.uint8, device=pictures.device)
        lift = (uniform(g, 2) * 24 - 12).long().tolist()
        for place, (k, dy) in enumerate(zip(pick, lift, strict=True)):
            small = F.avg_pool2d(pictures[rows[k]].float(), 2).round().to(torch.uint8)
            page[:, 32 + dy : 96 + dy, 64 * place : 64 * place + 64] = small
        found.append(page)
        members.append(Concept(name, f"{a.slug}+{b.slug}", a.group, a.subgroup, ()))
        kept.append(style)
    return torch.stack(found), members, kept
