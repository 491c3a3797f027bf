"""Measure the exported base and write its card.

python data/build/make_card.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from base_model import MAX_TOKENS
from diffusers import StableDiffusionPipeline
from drawings import BASE_STYLES, NEW_STYLES
from fetch import PACKAGES, ROOT
from pretrain import base_concepts, encode, held_concepts, held_out_loss, load_drawings
from pretrain_vae import pictures, psnr
from state import count, generator

from lora_nb import preset

PROMPTS = ["red apple, noto style", "fox, blob style", "rocket, flat style", "pizza, classic style"]
CARD = Path(__file__).with_name("card.md")
RUN = ("before", "after", "true")


def percent(score: dict) -> str:
    """A share with its interval: "77 % (71 to 82)"."""
    return "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * score[k] for k in ("mean", "low", "high")))


def judged(folder: Path, judge: dict) -> dict:
    """The tables of what the judge saw, from measured.json."""
    figures = json.loads((folder / "measured.json").read_text())
    base, real = figures["base"], judge["held_out"]["decoded"]
    rows = []
    for word in (*BASE_STYLES, "all", "common"):
        own = base if word == "all" else base[word]
        shares = " | ".join(percent(own[key]) for key in ("style", "concept_top1", "concept_top5"))
        ceiling = "| |"
        if word in real:
            found = real[word]
            ceiling = (
                f"{100 * found['style_accuracy']:.0f} % | {100 * found['concept_top5']:.0f} % |"
            )
        rows.append(f"| {word} | {own['style']['count']} | {shares} | {ceiling}")
    loras = []
    for name, run in figures.items():
        if not name.startswith("lora-"):
            continue
        _, style, parts = name.split("-")
        cells = [percent(run[when][key]) for key in ("style", "concept_top5") for when in RUN]
        loras.append(
            f"| {style} | {parts.replace('_', ' ')} | {run['weights']:,} | {run['steps']} steps, "
            f"{run['seconds']:.0f} s | {' | '.join(cells)} |"
        )
    return {
        "base_table": "\n".join(rows),
        "style_all": percent(base["style"]),
        "first_five_all": percent(base["concept_top5"]),
        "ink_style": percent(figures["lora-ink-unet"]["after"]["style"]),
        "both_style": percent(figures["lora-ink-both"]["after"]["style"]),
        "clay_style": percent(figures["lora-clay-unet"]["after"]["style"]),
        "clay_both": percent(figures["lora-clay-both"]["after"]["style"]),
        "judge_style": f"{100 * judge['held_out']['drawings']['all']['style_accuracy']:.1f} %",
        "judge_style_decoded": f"{100 * real['all']['style_accuracy']:.1f} %",
        "lora_table": "\n".join(loras),
        "colours": percent(figures["colours"]["colour"]),
        "colours_both": percent(figures["colours"]["both"]),
        "colours_count": figures["colours"]["colour"]["count"],
        "guidance_table": guidance(figures["guidance"]),
        "subject_table": "\n".join(
            subject(words, figures[name])
            for words, name in (("alone", "subject"), ("with class pictures", "subject-with-prior"))
        ),
        "subject_itself": f"{figures['subject']['subject_itself']['mean']:.2f}",
    }


def subject(words: str, run: dict) -> str:
    """A line on one DreamBooth run."""

    def shown(key: str) -> str:
        return "{mean:.2f} ({low:.2f} to {high:.2f})".format(**run[key])

    likeness = f"{shown('subject_before')} | {shown('subject_after')}"
    known = f"{percent(run['siblings_top5_before'])} | {percent(run['siblings_top5_after'])}"
    head = f"| {words} | {run['steps']} steps, {run['seconds']:.0f} s"
    return f"{head} | {likeness} | {known} | {shown('siblings_drift')} |"


def guidance(figures: dict) -> str:
    """A line for each pair of guidance and rescale."""
    return "\n".join(
        f"| {name} | {percent(found['style'])} | {percent(found['concept_top5'])} |"
        for name, found in figures.items()
    )


def measure(args: argparse.Namespace) -> dict:
    """Every figure of the card."""
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    facts = {
        "vae_parameters": f"{count(pipe.vae.parameters()) / 1e6:.1f} M",
        "unet_parameters": f"{count(pipe.unet.parameters()) / 1e6:.1f} M",
        "text_parameters": f"{count(pipe.text_encoder.parameters()) / 1e6:.1f} M",
        "vocabulary": len(pipe.tokenizer),
        "tokens": MAX_TOKENS,
        "scaling_factor": pipe.vae.config.scaling_factor,
        "size": f"{sum(p.stat().st_size for p in args.base.rglob('*')) / 1e6:.0f} MB",
        "concepts": len(base_concepts()),
        "held": len(held_concepts()),
    }
    for name, styles in (("base", tuple(BASE_STYLES)), *((s, (s,)) for s in NEW_STYLES)):
        data = pictures(styles, held=True)[::3]
        facts[f"psnr_{name}"] = f"{psnr(pipe.vae, data):.1f} dB ({len(data)} drawings)"

    facts["drawings"] = f"{len(load_drawings(base_concepts())[1]):,}"
    with tempfile.TemporaryDirectory() as folder:
        held = encode(pipe.vae, Path(folder) / "held.safetensors", *load_drawings(held_concepts()))
    facts["held_out_loss"] = f"{held_out_loss(pipe, held):.4f} ({len(held.concepts)} drawings)"

    settings = preset("tiny").sampling
    pipe(PROMPTS[0], **settings)  # the first one pays for what is set up once
    start = time.time()
    for i, prompt in enumerate(PROMPTS):
        pipe(prompt, **settings, generator=generator(0, i))
    facts["seconds"] = f"{(time.time() - start) / len(PROMPTS):.1f} s"
    facts |= judged(args.base, json.loads((ROOT / "data" / "judge" / "judge.json").read_text()))
    facts |= {p.split("/")[-1].replace("-", "_"): v[0] for p, v in PACKAGES.items()}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "data" / "base")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = measure(args)
    (args.base / "README.md").write_text(CARD.read_text().format(**facts))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
