"""Measure the exported base and write its card.

python data/build/make_card.py
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from base_model import MAX_TOKENS
from diffusers import StableDiffusionPipeline
from drawings import BASE_STYLES, NEW_STYLES, good_concepts, held_out
from fetch import PACKAGES, ROOT, WORK
from pretrain import Pretraining, base_concepts
from pretrain_vae import pictures, psnr
from state import count, generator

PROMPTS = ["red apple, noto style", "fox, blob style", "rocket, flat style", "pizza, classic style"]
CARD = Path(__file__).with_name("card.md")


def counters(folder: Path) -> dict:
    """What the training run counted."""
    return json.loads((folder / "counters.json").read_text())


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
        "held": sum(held_out(key) for key in good_concepts()),
    }
    for name, styles in (("base", tuple(BASE_STYLES)), *((s, (s,)) for s in NEW_STYLES)):
        data = pictures(styles, held=True)[::3]
        facts[f"psnr_{name}"] = f"{psnr(pipe.vae, data):.1f} dB ({len(data)} drawings)"

    run = Pretraining(
        argparse.Namespace(
            seed=0, batch=32, concepts="common", vae=args.base / "vae", out=args.run, init=args.base
        )
    )
    facts["drawings"] = len(run.train.concepts)
    facts["held_out_loss"] = f"{run.validation_loss():.4f} ({len(run.held.concepts)} drawings)"

    start = time.time()
    for i, prompt in enumerate(PROMPTS):
        pipe(
            prompt,
            num_inference_steps=25,
            guidance_scale=3.0,
            guidance_rescale=0.7,
            generator=generator(0, i),
        )
    facts["seconds"] = f"{(time.time() - start) / len(PROMPTS):.1f} s"
    for name, folder in (("vae", args.vae_run), ("unet", args.run)):
        c = counters(folder)
        c["cpu_seconds"] += args.uncounted if name == "unet" else 0.0
        facts[f"{name}_samples"] = f"{c['samples']:,}"
        facts[f"{name}_minutes"] = f"{c['elapsed'] / 60:.0f}"
        facts[f"{name}_hours"] = f"{c['cpu_seconds'] / 3600:.1f}"
        facts[f"{name}_steps"] = f"{c['step']:,}"
    facts |= {p.split("/")[-1].replace("-", "_"): v[0] for p, v in PACKAGES.items()}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "data" / "base")
    parser.add_argument("--vae-run", type=Path, default=WORK / "vae")
    parser.add_argument("--run", type=Path, default=WORK / "base")
    # The counter of our own run missed the second process for a while: 1,315 seconds.
    parser.add_argument("--uncounted", type=float, default=0.0, help="CPU seconds to add")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = measure(args)
    (args.base / "README.md").write_text(CARD.read_text().format(**facts))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
