"""Train a quick UNet LoRA on a shipped style and compare: is the base good ground for it?

Writes the mean loss on the validation concepts before and after (fixed noise, eight timesteps)
and a picture with three rows: base, LoRA at the same seeds, true drawing.

    python data/build/check_lora.py --style ink --steps 300
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from fetch import ROOT, WORK
from peft import LoraConfig
from PIL import Image
from pretrain import Diffusion
from pretrain_vae import to_model
from state import generator

SHOWN = """rocket; penguin; guitar; cactus; hot dog; smiling face with sunglasses; umbrella;
unicorn; croissant; fire engine; ghost; gem stone"""
SHOWN = [" ".join(name.split()) for name in SHOWN.split(";")]


def load_split(folder: Path) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pictures (uint8, N 3 H W), captions, concepts of one split."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(folder / r["file_name"])) for r in rows]
    data = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return data, [r["text"] for r in rows], [r["concept"] for r in rows]


@torch.no_grad()
def encode(
    pipe: StableDiffusionPipeline, data: torch.Tensor, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (posterior means) and text states of one split."""
    latents = [pipe.vae.encode(to_model(p)).latent_dist.mean for p in data.split(20)]
    tokens = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return torch.cat(latents) * pipe.vae.config.scaling_factor, pipe.text_encoder(tokens)[0]


@torch.no_grad()
def probe(pipe: StableDiffusionPipeline, x0: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Loss of every picture, averaged over eight timesteps at fixed noise."""
    diffusion, losses = Diffusion("cpu"), []
    for k in range(8):
        noise = torch.randn(x0.shape, generator=generator(99, k))
        t = torch.full((len(x0),), 62 + 125 * k)
        x_t, target = diffusion.noised(x0, noise, t)
        v = pipe.unet(x_t, t, encoder_hidden_states=states).sample
        losses.append((v - target).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(0)


def sample(pipe: StableDiffusionPipeline, prompts: list[str], guidance: float) -> list[Image.Image]:
    return pipe(
        prompts,
        num_inference_steps=25,
        guidance_scale=guidance,
        guidance_rescale=0.7,
        generator=[generator(7, i) for i in range(len(prompts))],
    ).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "data" / "base")
    parser.add_argument("--style", default="ink")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=WORK)
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    pipe.set_progress_bar_config(disable=True)
    folder = ROOT / "data" / args.style
    x0, states = encode(pipe, *load_split(folder / "train")[:2])
    pictures, texts, names = load_split(folder / "validation")
    valid = encode(pipe, pictures, texts)
    shown = [names.index(name) for name in SHOWN]
    prompts = [texts[i] for i in shown]
    before, base_images = probe(pipe, *valid), sample(pipe, prompts, args.guidance)

    pipe.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=targets))
    weights = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    diffusion, start = Diffusion("cpu"), time.time()
    for step in range(args.steps):
        g = generator(0, step)
        index = torch.randint(len(x0), (8,), generator=g)
        t = torch.randint(1000, (8,), generator=g)
        noise = torch.randn((8, *x0.shape[1:]), generator=g)
        x_t, target = diffusion.noised(x0[index], noise, t)
        v = pipe.unet(x_t, t, encoder_hidden_states=states[index]).sample
        F.mse_loss(v, target).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.time() - start

    change = probe(pipe, *valid) - before
    lora_images = sample(pipe, prompts, args.guidance)
    page = Image.new("RGB", (len(shown) * 128, 3 * 128), "white")
    for column, i in enumerate(shown):
        true = Image.fromarray(pictures[i].permute(1, 2, 0).numpy())
        for row, image in enumerate((base_images[column], lora_images[column], true)):
            page.paste(image, (column * 128, row * 128))
    page.save(args.out / f"lora-{args.style}.png")
    error = change.std() / len(change) ** 0.5
    print(
        f"{args.style}: {sum(w.numel() for w in weights)} weights, {args.steps} steps in "
        f"{seconds:.0f} s; validation loss {before.mean():.4f}, change {change.mean():+.4f} "
        f"+- {error:.4f}"
    )


if __name__ == "__main__":
    main()
