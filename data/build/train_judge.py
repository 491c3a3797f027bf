"""Train the judge: a small dual encoder that names the style and the thing of a picture.

It learns from all styles, the new ones too, because it must tell them apart. Concepts that the course
does not use (people, most of them) are shown too, without their names: they teach styles. Drawings by other
hands teach things, not styles. Never shown to it, and what its accuracy is measured on: the validation
drawings of the style sets, and a tenth of all other drawings by a hash of style and name. Half of the
pictures it learns from have gone through the autoencoder, so that it does not take the blur of a decoder
for a style.

    python data/build/train_judge.py --epochs 40
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base_model import build_tokenizer
from diffusers import AutoencoderKL
from drawings import (
    DROPPED_GROUPS,
    NEW_STYLES,
    OTHER_HANDS,
    SIZE,
    STYLES,
    concepts,
    good_concepts,
    held_out,
    load_style,
    share,
)
from fetch import ROOT, WORK
from make_sets import split_concepts
from pretrain_vae import restyle, to_model
from safetensors.torch import load_file, save_file
from state import Average, adamw, count, generator, log, pick_device, recorded, uniform
from tokenizers import Tokenizer

from lora_nb.judge import Judge

CARD = Path(__file__).with_name("judge.md")


def never_shown(style: str, concept: str, validation: set[str]) -> bool:
    """Whether a drawing is kept for measuring the judge."""
    if style in NEW_STYLES and concept in validation:
        return True
    return share(f"{style}/{concept}", "judge") < 0.1


def drawings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (uint8 N 3 128 128), style, concept, never shown; those that can be measured come first.

    Drawings of other concepts have the concept -1, those by other hands the style -1.
    """
    wanted = {key: i for i, key in enumerate(judged_concepts())}
    others = {
        key
        for key, concept in concepts().items()
        if concept.group not in DROPPED_GROUPS and key not in wanted and not held_out(key)
    }
    named = chosen_drawings(wanted, STYLES)
    unnamed = chosen_drawings(dict.fromkeys(others, -1), STYLES)
    by_others = chosen_drawings(wanted, OTHER_HANDS)
    by_others[1].fill_(-1)
    by_others[3].fill_(False)
    return tuple(torch.cat(parts) for parts in zip(named, by_others, unnamed, strict=True))


def chosen_drawings(
    wanted: dict[str, int], hands: Iterable[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The drawings of some concepts by some hands; the style is the place among them."""
    validation = {c.slug for c in split_concepts()[1]}
    pictures, styles, names, kept = [], [], [], []
    for number, style in enumerate(hands):
        keys, array = load_style(style)
        rows = [i for i, key in enumerate(keys) if key in wanted]
        pictures.append(np.asarray(array[rows]))
        styles += [number] * len(rows)
        names += [wanted[keys[i]] for i in rows]
        kept += [wanted[keys[i]] >= 0 and never_shown(style, keys[i], validation) for i in rows]
    stack = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).contiguous()
    return stack, torch.tensor(styles), torch.tensor(names), torch.tensor(kept)


def judged_concepts() -> list[str]:
    """The names that pictures are ranked among: all good concepts but those held out everywhere."""
    return [key for key in good_concepts() if not held_out(key)]


@torch.no_grad()
def through_the_decoder(
    pictures: torch.Tensor, vae_folder: Path, cache: Path, device: str
) -> torch.Tensor:
    """The same pictures encoded and decoded again, computed once."""
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(vae_folder).to(device).eval()
        parts = []
        for part in pictures.split(32):
            with torch.autocast(device, torch.bfloat16):
                y = vae.decode(vae.encode(to_model(part.to(device))).latent_dist.mean).sample
            parts.append(((y.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        save_file({"pictures": torch.cat(parts)}, cache)
    return load_file(cache)["pictures"]


def vary(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Shift, scale, stretch, shear a little, blur some, change brightness and colour of half a little."""
    n = len(x)

    def draw(low: float, high: float) -> torch.Tensor:
        return uniform(g, n) * (high - low) + low

    scale, stretch, angle = draw(0.8, 1.25), draw(0.92, 1.08), draw(-0.2, 0.2)
    affine = torch.stack(
        [
            torch.stack(
                [scale * stretch * angle.cos(), -scale * angle.sin(), draw(-0.08, 0.08)], 1
            ),
            torch.stack([scale * angle.sin(), scale / stretch * angle.cos(), draw(-0.08, 0.08)], 1),
        ],
        1,
    )
    # White is 0 while the picture moves, so that what comes in from outside is white.
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    x = torch.where((draw(0, 1) < 0.3)[:, None, None, None], x.flip(-1), x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, (draw(0, 4) - 3).clamp(min=0)[:, None, None, None])
    # The other half keeps its paints: a palette is told by shades.
    strength = (draw(-1, 1).clamp(min=0))[:, None, None, None]
    normal = torch.randn(n, 3, 1, 1, generator=g, device=x.device)
    grain = torch.randn(x.shape, generator=g, device=x.device)
    x = (x - 1) * (1 + 0.02 * strength * normal) + 1 + 0.02 * strength * grain
    return x.clamp(-1, 1)


def restyle_some(x: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Redraw two fifths of the pictures in no style; and which of them are still in their own.

    A thing stays the thing in other colours, as an outline, and as a black shape with white lines. The
    first judge never saw that, took colour for the thing, and named 2 % of the ink drawings.
    """
    kind = uniform(g, len(x))[:, None, None, None]
    shape = (1 - x.amin(1, keepdim=True)).mul(4).clamp(0, 1)
    across = F.pad((x[..., 1:] - x[..., :-1]).abs().amax(1, keepdim=True), (1, 0))
    down = F.pad((x[..., 1:, :] - x[..., :-1, :]).abs().amax(1, keepdim=True), (0, 0, 1, 0))
    edge = F.max_pool2d((across + down).mul(3).clamp(0, 1), 3, stride=1, padding=1)
    cut = (1 - 2 * shape * (1 - edge)).expand_as(x)
    other = torch.where(kind < 0.2, cut, restyle(x, g))
    kept = kind[:, 0, 0, 0] >= 0.4
    return torch.where(kept[:, None, None, None], x, other), kept


@torch.no_grad()
def measure(judge: Judge, pictures: torch.Tensor, style: torch.Tensor, name: torch.Tensor) -> dict:
    """Accuracy of style and of concept (first, and among the first five) on some drawings."""
    judge.eval()
    device = next(judge.parameters()).device
    features = torch.cat([judge.picture(to_model(p.to(device))) for p in pictures.split(64)])
    found = judge.logits(features, judge.styles, "style").argmax(1) == style.to(device)
    logits = judge.logits(features, judge.names, "concept")
    rank = (logits > logits.gather(1, name.to(device)[:, None])).sum(1) + 1
    return {
        "pictures": len(pictures),
        "style_accuracy": found.float().mean().item(),
        "concept_top1": (rank == 1).float().mean().item(),
        "concept_top5": (rank <= 5).float().mean().item(),
    }


def floats(judge: Judge) -> dict[str, torch.Tensor]:
    """Weights and running statistics: both are averaged."""
    return {k: v for k, v in judge.state_dict().items() if v.is_floating_point()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=ROOT / "data" / "base" / "vae")
    parser.add_argument("--out", type=Path, default=WORK / "judge")
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "judge")
    parser.add_argument("--init", type=Path, help="go on from the judge in this folder")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1.5e-3)
    parser.add_argument(
        "--average", type=float, default=0.999, help="decay of the averaged weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, style, name, kept = drawings()
    good = int((name >= 0).sum())
    book, device = concepts(), pick_device()
    cache = args.out / "decoded-all.safetensors"
    decoded = through_the_decoder(pictures, args.vae, cache, device)
    torch.manual_seed(args.seed)
    # Learned anew, some tokens would get other numbers each time.
    shipped = (args.init or ROOT / "data" / "judge") / "tokenizer.json"
    tokenizer = (
        Tokenizer.from_file(str(shipped))
        if shipped.exists()
        else build_tokenizer().backend_tokenizer
    )
    tokenizer.no_padding()
    names = [book[key].name for key in judged_concepts()]
    judge = Judge(tokenizer, tuple(STYLES), names, {})
    seen = 0
    if args.init:
        judge.load_state_dict(load_file(args.init / "judge.safetensors"))
        judge.float()
        seen = json.loads((args.init / "judge.json").read_text())["samples"]
    judge.to(device)
    average = Average(floats(judge), args.average)
    averaged = Judge(tokenizer, tuple(STYLES), names, {}).to(device)
    shown, held = (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]
    both = torch.stack([pictures, decoded]).to(device)
    labels = style.to(device), name.to(device)
    log(args.out, event="start", parameters=count(judge.parameters()), shown=len(shown))
    optimizer = adamw(judge.parameters(), device, decay=0.05)
    x = torch.zeros(args.batch, 3, SIZE, SIZE, device=device)
    true_style, true_name = (torch.zeros(args.batch, dtype=torch.long, device=device) for _ in "ab")
    texts = judge.tokens(judge.styles), judge.tokens(judge.names)
    sums = torch.zeros(2, device=device)
    judge.train()

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            features = judge.picture(x).float()
        of_style = judge.similar(features, texts[0], "style")
        of_name = judge.similar(features, texts[1], "concept")
        style_loss = F.cross_entropy(of_style, true_style, ignore_index=-1)
        loss = 2 * style_loss
        loss = loss + F.cross_entropy(of_name, true_name, label_smoothing=0.05, ignore_index=-1)
        loss.backward()
        optimizer.step()
        sums.add_(torch.stack([loss.detach(), style_loss.detach()]))

    replay = recorded(train_step, device)
    sums.zero_()
    per_epoch = len(shown) // args.batch
    total, report = args.epochs * per_epoch, max(1, args.epochs // 10) * per_epoch
    began = time.time()
    for step in range(total):
        g = generator(args.seed, step, device=device)
        if step % per_epoch == 0:
            order = shown[torch.randperm(len(shown), generator=generator(args.seed, -1, step))]
            order = order.to(device)
        place = step % per_epoch * args.batch
        index = order[place : place + args.batch]
        blurred = (uniform(g, len(index)) < 0.5).long()
        # A thing stays the thing in other colours and as an outline, but its style is gone then.
        seen_as, kept_style = restyle_some(vary(to_model(both[blurred, index]), g), g)
        x.copy_(seen_as)
        true_style.copy_(torch.where(kept_style, labels[0][index], -1))
        true_name.copy_(labels[1][index])
        warm = min(1.0, (step + 1) / 100)
        rate = args.peak * warm * 0.5 * (1 + math.cos(math.pi * step / total))
        optimizer.param_groups[0]["lr"].fill_(rate)
        replay()
        average.update(floats(judge), step)
        if (step + 1) % report == 0:
            total_loss, of_styles = (sums / report).tolist()
            record = {"step": step + 1, "loss": total_loss, "style_loss": of_styles}
            record["seconds"] = time.time() - began
            averaged.load_state_dict(judge.state_dict() | average.shadow)
            log(args.out, **record, **measure(averaged, pictures[held], style[held], name[held]))
            sums.zero_()
    averaged.load_state_dict(judge.state_dict() | average.shadow)
    averaged.cpu()
    sources = {"drawings": pictures[:good], "decoded": decoded[:good]}
    seen += total * args.batch
    write(averaged, args.to, sources, style[:good], name[:good], kept[:good], seen)


def write(
    judge: Judge,
    folder: Path,
    sources: dict[str, torch.Tensor],
    style: torch.Tensor,
    name: torch.Tensor,
    kept: torch.Tensor,
    seen: int,
) -> None:
    """Export in float16, then measure what was exported: the drawings, and they decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(weights, folder / "judge.safetensors")
    (folder / "judge.safetensors").chmod(0o644)
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    validation = {c.slug for c in split_concepts()[1]}
    in_validation = torch.tensor([key in validation for key in judged_concepts()])[name]
    card: dict = {source: {} for source in sources}
    for number, word in [(None, "all"), *enumerate(judge.styles)]:
        chosen = kept if number is None else kept & (style == number)
        if word in NEW_STYLES:
            chosen = chosen & in_validation
        for source, data in sources.items():
            card[source][word] = measure(judge, data[chosen], style[chosen], name[chosen])
    record = {"styles": judge.styles, "names": judge.names, "samples": seen, "held_out": card}
    (folder / "judge.json").write_text(json.dumps(record, indent=1) + "\n")
    judge.tokenizer.save(str(folder / "tokenizer.json"))
    rows = []
    for word, plain in card["drawings"].items():
        decoded = card["decoded"][word]
        shares = (plain["style_accuracy"], plain["concept_top1"], plain["concept_top5"])
        shares += (decoded["style_accuracy"], decoded["concept_top5"])
        cells = " | ".join(f"{100 * value:.1f} %" for value in shares)
        rows.append(f"| {word} | {plain['pictures']} | {cells} |")
    text = CARD.read_text().format(
        parameters=f"{count(judge.parameters()) / 1e6:.1f} M",
        size=f"{(folder / 'judge.safetensors').stat().st_size / 1e6:.1f} MB",
        styles=len(judge.styles),
        names=len(judge.names),
        table="\n".join(rows),
        seen=f"{seen:,}",
        shown=int((~kept).sum()),
    )
    (folder / "README.md").write_text(text)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
