"""Pretrain the UNet and the text encoder of the embedded base together, then export them.

The autoencoder is frozen; the latent moments of every drawing are computed once. The objective is
v-prediction with zero terminal SNR and the plain mean squared error; large timesteps are drawn
more often, because there the caption alone must say what to draw. The learning rate follows a
budget given in minutes or steps; the checkpoint is exact, so a killed run continues with --minutes
as before. Several processes average their weights every few steps.

    python data/build/pretrain.py train --minutes 75
    python data/build/pretrain.py export
    python data/build/pretrain.py train --init data/base --out build/base2 --minutes 10
    torchrun --standalone --nproc-per-node 2 data/build/pretrain.py train --threads 1 --batch 16
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from base_model import (
    MAX_TOKENS,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    export,
)
from diffusers import AutoencoderKL, StableDiffusionPipeline
from drawings import BASE_STYLES, COMMON, Concept, concepts, good_concepts, held_out, load_style
from fetch import ROOT, WORK
from make_sets import split_concepts
from PIL import Image
from pretrain_vae import to_model
from safetensors.torch import load_file, save_file
from state import (
    Average,
    Budget,
    count,
    generator,
    load_checkpoint,
    log,
    named_parameters,
    save_checkpoint,
)
from transformers import CLIPTokenizer

PROMPTS = """red apple, noto style; fox, blob style; smiling face with sunglasses, twemoji style;
rocket, flat style; pizza, classic style; house, noto style; cat face, flat style; red heart;
hamburger, twemoji style; octopus, noto style; cactus, flat style; bicycle, classic style;
ghost, noto style; sunflower, blob style; guitar, twemoji style; penguin"""
PROMPTS = [" ".join(prompt.split()) for prompt in PROMPTS.split(";")]


@dataclass
class Drawings:
    """Latent moments of all drawings, with their concepts, styles and sampling weights."""

    mean: torch.Tensor  # N 8 16 16
    std: torch.Tensor
    concepts: list[Concept]
    styles: list[str]
    weights: torch.Tensor  # N


def base_concepts(which: str = "common") -> set[str]:
    """What the base learns: the common concepts and those of the style sets, or all good ones.

    With little compute 270 concepts seen often are worth more than 578 seen seldom.
    """
    book = concepts()
    good = {key for key in good_concepts() if not held_out(key)}
    if which == "good":
        return good
    common = {key for key in good if book[key].name in COMMON}
    return common.union(*({c.slug for c in split} for split in split_concepts()))


def held_concepts() -> set[str]:
    """The good concepts that nothing is ever trained on."""
    return {key for key in good_concepts() if held_out(key)}


@torch.no_grad()
def encode_drawings(vae: AutoencoderKL, wanted: set[str], cache: Path, device: str) -> Drawings:
    """Encode some concepts in all base styles, or read the moments written last time."""
    book = concepts()
    rows = []
    for style in BASE_STYLES:
        keys, array = load_style(style)
        rows += [(style, key, array[i]) for i, key in enumerate(keys) if key in wanted]
    if not cache.exists():
        means, stds = [], []
        for start in range(0, len(rows), 32):
            part = torch.stack([torch.from_numpy(r[2].copy()) for r in rows[start : start + 32]])
            x = to_model(part.permute(0, 3, 1, 2).contiguous()).to(device)
            with torch.autocast(device, torch.bfloat16):
                posterior = vae.encode(x).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
        save_file(
            {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}, cache
        )
    moments = load_file(cache)
    scale = vae.config.scaling_factor
    members = [book[key] for _, key, _ in rows]
    return Drawings(
        mean=(moments["mean"] * scale).to(device),
        std=(moments["std"] * scale).to(device),
        concepts=members,
        styles=[style for style, _, _ in rows],
        weights=torch.tensor([2.0 if c.name in COMMON else 1.0 for c in members]),
    )


def caption(concept: Concept, style: str, draw: list[float]) -> str:
    """A caption from five uniform numbers: mostly "<name>, <style> style", with variations."""
    kind, words, article, first, second = draw
    if kind < 0.10:  # the empty caption is what classifier-free guidance subtracts
        return ""
    name = concept.name
    if words < 0.08 and concept.keywords:
        chosen = {int(x * len(concept.keywords)) for x in (first, second)}
        name = " ".join(concept.keywords[i] for i in sorted(chosen))
    elif article < 0.10:
        name = ("an " if name[0] in "aeiou" else "a ") + name
    if kind < 0.14:
        return name
    if kind < 0.16:
        return f"{name} emoji"
    return f"{name}, {style} style"


class Diffusion:
    """The forward process of the shipped scheduler: noise, v target."""

    def __init__(self, device: str):
        alphas = build_scheduler().alphas_cumprod.to(device)
        self.signal, self.sigma = alphas.sqrt(), (1.0 - alphas).sqrt()

    def noised(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents and the v they should be mapped to."""
        a, s = self.signal[t][:, None, None, None], self.sigma[t][:, None, None, None]
        return a * x0 + s * noise, a * noise - s * x0


def timesteps(size: int, g: torch.Generator) -> torch.Tensor:
    """Half of them uniform in 0..999, half in 600..999.

    After 110,000 uniform samples the loss at timestep 999 was 0.55 with the caption and 0.76 without
    it, of a variance of 0.93: what is missing is the way from caption to picture, which is learned
    where noise hides everything.
    """
    low = torch.where(torch.rand(size, generator=g) < 0.5, 600, 0)
    return (low + torch.rand(size, generator=g) * (1000 - low)).long()


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """On a CPU, short attention runs two to seven times faster in float32 than under bf16 autocast.

    Only at 256 x 256 tokens bf16 wins (35 against 69 ms forward and backward at batch 32).
    """
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, *rest, **options):
        if k.shape[-2] > 64:
            return plain(q, k, v, *rest, **options)
        with torch.autocast("cpu", enabled=False):
            return plain(q.float(), k.float(), v.float(), *rest, **options).to(q.dtype)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def kept_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """The tokenizer that the weights of this run know.

    Merges that are equally frequent come in another order each time they are learned, which gives
    some tokens other numbers; so they are learned once and kept beside the checkpoint.
    """
    kept = args.out / "tokenizer"
    if not kept.exists():
        fresh = None if args.init else build_tokenizer()
        tokenizer = fresh or CLIPTokenizer.from_pretrained(args.init / "tokenizer")
        tokenizer.save_pretrained(kept)
    return CLIPTokenizer.from_pretrained(kept)


class Pretraining:
    """Data, networks and the loss; batch number k depends on (seed, k) only."""

    def __init__(self, args: argparse.Namespace):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seed, self.batch = args.seed, args.batch
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.vae = AutoencoderKL.from_pretrained(args.vae).to(self.device).eval()
        args.out.mkdir(parents=True, exist_ok=True)
        if self.rank:  # the first process writes what is kept, the others read what it wrote
            dist.barrier()
        self.tokenizer = kept_tokenizer(args)
        known, held = base_concepts(args.concepts), held_concepts()
        cache = args.out / f"latents-{args.concepts}.safetensors"
        self.train = encode_drawings(self.vae, known, cache, self.device)
        cache = args.out / "latents-held.safetensors"
        self.held = encode_drawings(self.vae, held, cache, self.device)
        if self.world > 1 and not self.rank:
            dist.barrier()
        self.diffusion = Diffusion(self.device)
        torch.manual_seed(args.seed)
        if args.init:
            pipe = StableDiffusionPipeline.from_pretrained(args.init)
            self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        else:
            self.unet, self.text_encoder = build_unet(), build_text_encoder(self.tokenizer)
        self.unet.to(self.device)
        self.text_encoder.to(self.device)
        self.modules = {"unet": self.unet, "text_encoder": self.text_encoder}

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Token numbers, padded exactly as the pipeline pads them."""
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return batch.input_ids.to(self.device)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, texts: list[str]) -> torch.Tensor:
        states = self.text_encoder(self.tokens(texts))[0]
        return self.unet(x_t, t, encoder_hidden_states=states).sample

    def loss(self, step: int) -> torch.Tensor:
        """The loss of this process's part of batch number `step`."""
        g, data = generator(self.seed, step * self.world + self.rank), self.train
        index = torch.multinomial(data.weights, self.batch, replacement=True, generator=g)
        draws = torch.rand(self.batch, 5, generator=g).tolist()
        t = timesteps(self.batch, g).to(self.device)
        shape = (2, self.batch, *data.mean.shape[1:])
        posterior_noise, noise = torch.randn(shape, generator=g).to(self.device)
        texts = [
            caption(data.concepts[i], data.styles[i], draw)
            for i, draw in zip(index.tolist(), draws, strict=True)
        ]
        index = index.to(self.device)
        x0 = data.mean[index] + data.std[index] * posterior_noise
        x_t, target = self.diffusion.noised(x0, noise, t)
        with torch.autocast(self.device, torch.bfloat16):
            if self.device == "cpu":
                with attention_in_float32():
                    predicted = self.predict(x_t, t, texts)
            else:
                predicted = self.predict(x_t, t, texts)
        return F.mse_loss(predicted.float(), target)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the held-out concepts at fixed noise and eight timesteps each."""
        losses, data = [], self.held
        for start in range(0, len(data.mean), 32):
            x0 = data.mean[start : start + 32]
            texts = [
                f"{c.name}, {style} style"
                for c, style in zip(
                    data.concepts[start : start + 32], data.styles[start : start + 32], strict=True
                )
            ]
            for k in range(8):
                g = generator(1234, start, k)
                noise = torch.randn(x0.shape, generator=g).to(self.device)
                t = torch.full((len(x0),), 62 + 125 * k, device=self.device)
                x_t, target = self.diffusion.noised(x0, noise, t)
                with torch.autocast(self.device, torch.bfloat16):
                    v = self.predict(x_t, t, texts)
                losses.append((v.float() - target).square().mean(dim=(1, 2, 3)))
        return torch.cat(losses).mean().item()

    def pipeline(self) -> StableDiffusionPipeline:
        return build_pipeline(self.vae, self.text_encoder, self.tokenizer, self.unet)


class swapped:
    """Use the averaged weights inside a `with` block."""

    def __init__(self, weights: dict[str, torch.Tensor], average: Average):
        self.weights, self.average = weights, average

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.weights.items():
            kept = p.detach().clone()
            p.copy_(self.average.shadow[name])
            self.average.shadow[name].copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


def sample_grid(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    path: Path,
    columns: int = 8,
    steps: int = 25,
    guidance: float = 3.0,
    rescale: float = 0.7,
    seed: int = 0,
) -> None:
    """Sample every prompt from its own seed and write one picture of all of them."""
    noise = [generator(seed, i) for i in range(len(prompts))]
    images = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_rescale=rescale,
        generator=noise,
    ).images
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * 128, rows * 128), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * 128, i // columns * 128))
    page.save(path)


@torch.no_grad()
def average_processes(
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    budget: Budget,
    moments: bool,
) -> None:
    """Average the weights over the processes; all of them follow the clock of the first.

    Between two calls each process takes its own optimizer steps (local SGD). Averaging gradients
    at every step would cost a quarter of the time on a CPU.
    """
    if not dist.is_initialized():
        return
    tensors = list(weights.values())
    if moments:
        for name in ("exp_avg", "exp_avg_sq"):
            tensors += [optimizer.state[p][name] for p in weights.values()]
    clock = torch.tensor([budget.elapsed if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([t.flatten() for t in tensors] + [clock])
    dist.all_reduce(flat)
    budget.agreed = flat[-1].item()
    flat /= dist.get_world_size()
    sizes = [t.numel() for t in tensors]
    for t, part in zip(tensors, flat[:-1].split(sizes), strict=True):
        t.copy_(part.view_as(t))


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent; killed runs continue from the last checkpoint."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    run = Pretraining(args)
    weights = named_parameters(run.modules)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=args.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = Average(weights)
    seconds = None if args.steps else args.minutes * 60
    budget = Budget(args.peak, args.steps, seconds, warmup_steps=args.warmup)
    resumed = load_checkpoint(args.out, weights, optimizer, budget, average)
    first = run.rank == 0
    if run.world > 1:
        budget.agreed = budget.elapsed
    if first:
        log(
            args.out,
            event="resume" if resumed else "start",
            parameters=count(weights.values()),
            drawings=len(run.train.concepts),
            concepts=len({c.name for c in run.train.concepts}),
            device=run.device,
            minutes=args.minutes,
        )
    losses: list[float] = []
    saved = budget.progress
    while not budget.done:
        loss = run.loss(budget.step)
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        budget.tick(args.batch * run.world, run.world)
        if budget.step % args.sync == 0:
            due = budget.progress - saved >= args.save_every
            average_processes(weights, optimizer, budget, moments=due)
        average.update(weights, budget.step)
        if not first:
            if budget.step % args.sync == 0 and due:
                saved = budget.progress
            continue
        if budget.step % 50 == 0:
            log(
                args.out,
                step=budget.step,
                loss=sum(losses) / len(losses),
                lr=budget.learning_rate(),
                samples=budget.samples,
                samples_per_second=budget.samples / budget.elapsed,
                minutes=budget.elapsed / 60,
                cpu_hours=budget.cpu_seconds / 3600,
            )
            losses.clear()
        if budget.step % args.sync == 0 and due:
            saved = budget.progress
            save_checkpoint(args.out, weights, optimizer, budget, average)
            with swapped(weights, average):
                held = run.validation_loss()
                sample_grid(run.pipeline(), PROMPTS, args.out / f"sample-{budget.step:06d}.png")
            log(args.out, step=budget.step, held_out_loss=held)
    average_processes(weights, optimizer, budget, moments=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return
    save_checkpoint(args.out, weights, optimizer, budget, average)
    with swapped(weights, average):
        log(args.out, event="done", step=budget.step, held_out_loss=run.validation_loss())
        sample_grid(run.pipeline(), PROMPTS, args.out / f"sample-{budget.step:06d}.png")


def export_base(args: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint as a diffusers pipeline folder."""
    vae = AutoencoderKL.from_pretrained(args.vae)
    tokenizer = kept_tokenizer(args)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    weights = named_parameters({"unet": unet, "text_encoder": text_encoder})
    stored = load_file(args.out / "state.safetensors")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(stored[f"average/{name}"])
    export(build_pipeline(vae, text_encoder, tokenizer, unet), args.to)
    print(f"exported {args.out} to {args.to}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=("train", "export"))
    parser.add_argument("--vae", type=Path, default=WORK / "vae" / "vae")
    parser.add_argument("--out", type=Path, default=WORK / "base", help="checkpoint and log")
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "base", help="export folder")
    parser.add_argument("--init", type=Path, help="start from the weights of this base")
    parser.add_argument("--concepts", choices=("common", "good"), default="common")
    parser.add_argument("--minutes", type=float, default=75.0, help="budget, pauses not counted")
    parser.add_argument("--steps", type=int, help="fixes the budget in steps instead")
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    parser.add_argument("--peak", type=float, default=8e-4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--save-every", type=float, default=0.1, help="share of the budget")
    parser.add_argument("--sync", type=int, default=8, help="steps between averaging processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"train": train, "export": export_base}[args.do](args)


if __name__ == "__main__":
    main()
