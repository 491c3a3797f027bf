"""Pretrain the UNet and the text encoder of the embedded base together, then export them.

The autoencoder is frozen; the latent moments of every drawing are computed once. The objective is
v-prediction with zero terminal SNR and the plain mean squared error; large timesteps are drawn
more often, because there the caption alone must say what to draw. The learning rate follows a
budget given in minutes or steps; the checkpoint is exact, so a killed run continues with --minutes
as before. Made for one GPU (on_gpu.sh); on a CPU the same commands run, a thousand times slower.

    python data/build/pretrain.py train --minutes 5 --batch 512 --peak 1e-3
    python data/build/pretrain.py export
    python data/build/pretrain.py train --init data/base --out build/base2 --minutes 10
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
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
    adamw,
    count,
    generator,
    load_checkpoint,
    log,
    named_parameters,
    pick_device,
    recorded,
    save_checkpoint,
    swapped,
    uniform,
)
from transformers import CLIPTokenizer
from variants import colour_variants, pair_variants

PROMPTS = """red apple, noto style; fox, blob style; smiling face with sunglasses, twemoji style;
rocket, flat style; pizza, classic style; house, noto style; cat face, flat style; red heart;
hamburger, twemoji style; octopus, noto style; cactus, flat style; bicycle, classic style;
ghost, noto style; sunflower, blob style; guitar, twemoji style; penguin"""
PROMPTS = [" ".join(prompt.split()) for prompt in PROMPTS.split(";")]


# Of all samples: drawings as they are, in other colours, two on a page.
SHARES = (0.80, 0.12, 0.08)
PAIRS = 6000
WORDINGS = 16  # captions that are written for each drawing
NO_CAPTION = 0.10  # the empty caption is what classifier-free guidance subtracts


@dataclass
class Drawings:
    """Latent moments of drawings, with their concepts, styles and sampling weights."""

    mean: torch.Tensor  # N 8 16 16
    std: torch.Tensor
    concepts: list[Concept]
    styles: list[str]
    weights: torch.Tensor  # N


def base_concepts(which: str = "good") -> set[str]:
    """What the base learns: all good concepts, or the common ones and those of the style sets.

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


def load_drawings(wanted: set[str]) -> tuple[torch.Tensor, list[Concept], list[str]]:
    """The drawings of some concepts in all base styles: uint8 N 3 128 128, and what and whose each is."""
    book, pictures, members, styles = concepts(), [], [], []
    for style in BASE_STYLES:
        keys, array = load_style(style)
        rows = [i for i, key in enumerate(keys) if key in wanted]
        pictures.append(torch.from_numpy(array[rows]).permute(0, 3, 1, 2))
        members += [book[keys[i]] for i in rows]
        styles += [style] * len(rows)
    return torch.cat(pictures).contiguous(), members, styles


@torch.no_grad()
def encode(
    vae: AutoencoderKL,
    kept: Path,
    pictures: torch.Tensor,
    members: list[Concept],
    styles: list[str],
) -> Drawings:
    """The moments of some drawings, scaled, on the device of the autoencoder; or those kept last time."""
    if not kept.exists():
        found = [
            vae.encode(to_model(part.to(vae.device))).latent_dist for part in pictures.split(32)
        ]
        moments = {
            "mean": torch.cat([p.mean for p in found]),
            "std": torch.cat([p.std for p in found]),
        }
        save_file({name: value.contiguous() for name, value in moments.items()}, kept)
    moments = load_file(kept, device=str(vae.device))
    scale = vae.config.scaling_factor
    weights = torch.tensor([2.0 if c.name in COMMON else 1.0 for c in members], device=vae.device)
    return Drawings(moments["mean"] * scale, moments["std"] * scale, members, styles, weights)


def training_drawings(vae: AutoencoderKL, wanted: set[str], kept: Path) -> Drawings:
    """Drawings as they are, in other colours, and two on a page, in the shares of SHARES."""
    pictures, members, styles = load_drawings(wanted)
    plain = (pictures.to(vae.device), members, styles)
    kinds = {
        "plain": plain,
        "colours": colour_variants(*plain),
        "pairs": pair_variants(*plain, PAIRS),
    }
    sets = [
        encode(vae, kept / f"latents-{name}.safetensors", *kind) for name, kind in kinds.items()
    ]
    weights = [
        part * each.weights / each.weights.sum() for part, each in zip(SHARES, sets, strict=True)
    ]
    return Drawings(
        torch.cat([each.mean for each in sets]),
        torch.cat([each.std for each in sets]),
        [concept for each in sets for concept in each.concepts],
        [style for each in sets for style in each.styles],
        torch.cat(weights),
    )


def caption(concept: Concept, style: str, draw: list[float]) -> str:
    """A caption from five uniform numbers: mostly "<name>, <style> style", with variations."""
    kind, words, article, first, second = draw
    name = concept.name
    if words < 0.08 and concept.keywords:
        chosen = {int(x * len(concept.keywords)) for x in (first, second)}
        name = " ".join(concept.keywords[i] for i in sorted(chosen))
    elif article < 0.10:
        name = ("an " if name[0] in "aeiou" else "a ") + name
    if kind < 0.04:
        return name
    if kind < 0.06:
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
    low = 600.0 * (uniform(g, size) < 0.5)
    return (low + uniform(g, size) * (1000 - low)).long()


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
    """The tokenizer that the weights of this run know: that of the base it starts from, or the shipped one.

    Merges that are equally frequent come in another order each time they are learned, which gives
    some tokens other numbers; so they were learned once.
    """
    kept, shipped = args.out / "tokenizer", (args.init or ROOT / "data" / "base") / "tokenizer"
    if not kept.exists():
        known = CLIPTokenizer.from_pretrained(shipped) if shipped.exists() else build_tokenizer()
        known.save_pretrained(kept)
    return CLIPTokenizer.from_pretrained(kept)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token numbers, padded exactly as the pipeline pads them."""
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def held_out_loss(pipe: StableDiffusionPipeline, held: Drawings) -> float:
    """Mean loss of a base over held-out drawings at fixed noise and eight timesteps each."""
    losses, device, diffusion = [], pipe.unet.device, Diffusion(str(pipe.unet.device))
    texts = [
        f"{c.name}, {style} style" for c, style in zip(held.concepts, held.styles, strict=True)
    ]
    for start in range(0, len(held.mean), 32):
        x0 = held.mean[start : start + 32]
        ids = token_ids(pipe.tokenizer, texts[start : start + 32]).to(device)
        states = pipe.text_encoder(ids)[0]
        for k in range(8):
            noise = torch.randn(x0.shape, generator=generator(1234, start, k)).to(device)
            t = torch.full((len(x0),), 62 + 125 * k, device=device)
            x_t, target = diffusion.noised(x0, noise, t)
            v = pipe.unet(x_t, t, encoder_hidden_states=states).sample
            losses.append((v - target).square().mean(dim=(1, 2, 3)))
    return torch.cat(losses).mean().item()


class Pretraining:
    """Data, networks and the loss; batch number k depends on (seed, k) only.

    What a step reads lies in tensors that stay where they are, so that a GPU can replay it: `draw` fills them.
    """

    def __init__(self, args: argparse.Namespace):
        self.device, self.seed, self.batch = pick_device(), args.seed, args.batch
        self.vae = AutoencoderKL.from_pretrained(args.vae).to(self.device).eval()
        args.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = kept_tokenizer(args)
        self.train = training_drawings(self.vae, base_concepts(args.concepts), args.out)
        kept = args.out / "latents-held.safetensors"
        self.held = encode(self.vae, kept, *load_drawings(held_concepts()))
        self.wordings, self.no_words = self._wordings(), self.tokens([""])
        self.diffusion = Diffusion(self.device)
        torch.manual_seed(args.seed)
        if args.init:
            pipe = StableDiffusionPipeline.from_pretrained(args.init)
            self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        else:
            self.unet, self.text_encoder = build_unet(), build_text_encoder(self.tokenizer)
        self.modules = {
            "unet": self.unet.to(self.device),
            "text_encoder": self.text_encoder.to(self.device),
        }
        shape = (self.batch, *self.train.mean.shape[1:])
        self.posterior_noise = torch.zeros(shape, device=self.device)
        self.noise = torch.zeros(shape, device=self.device)
        self.rows = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.ids = self.no_words.repeat(self.batch, 1)
        self.t = torch.zeros(self.batch, dtype=torch.long, device=self.device)

    def _wordings(self) -> torch.Tensor:
        """Token numbers of the captions of every drawing, N WORDINGS MAX_TOKENS."""
        data, texts = self.train, []
        for i, (concept, style) in enumerate(zip(data.concepts, data.styles, strict=True)):
            draws = torch.rand(WORDINGS, 5, generator=generator(self.seed, -2, i)).tolist()
            texts += [caption(concept, style, draw) for draw in draws]
        return self.tokens(texts).view(-1, WORDINGS, MAX_TOKENS)

    def draw(self, step: int) -> None:
        """Choose the pictures, captions, timesteps and noise of batch number `step`."""
        g = generator(self.seed, step, device=self.device)
        self.rows.copy_(
            torch.multinomial(self.train.weights, self.batch, replacement=True, generator=g)
        )
        words = self.wordings[self.rows, (uniform(g, self.batch) * WORDINGS).long()]
        without = uniform(g, self.batch)[:, None] < NO_CAPTION
        self.ids.copy_(torch.where(without, self.no_words, words))
        self.t.copy_(timesteps(self.batch, g))
        self.posterior_noise.normal_(generator=g)
        self.noise.normal_(generator=g)

    def loss(self, unet: Callable, text_encoder: Callable) -> torch.Tensor:
        """Of the batch that was drawn last, by these networks (copies in bf16, perhaps)."""
        x0 = self.train.mean[self.rows] + self.train.std[self.rows] * self.posterior_noise
        x_t, target = self.diffusion.noised(x0, self.noise, self.t)
        states = text_encoder(self.ids)[0]
        predicted = unet(x_t.to(states.dtype), self.t, encoder_hidden_states=states).sample
        return F.mse_loss(predicted.float(), target)

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return token_ids(self.tokenizer, texts).to(self.device)

    def pipeline(self) -> StableDiffusionPipeline:
        return build_pipeline(self.vae, self.text_encoder, self.tokenizer, self.unet)


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


class HalfStep:
    """Forward and backward in bf16 copies of float32 networks, on a GPU; the optimizer sees float32 only.

    Under autocast the norms of a UNet run in float32, which costs as much time as its convolutions.
    """

    def __init__(self, run: Pretraining, layout: torch.memory_format):
        self.run = run
        self.copies = {k: copy.deepcopy(m).to(torch.bfloat16) for k, m in run.modules.items()}
        self.copies["unet"].to(memory_format=layout)
        self.whole = list(named_parameters(run.modules).values())
        self.half = list(named_parameters(self.copies).values())

    def backward(self) -> torch.Tensor:
        """Put the gradients of the drawn batch into the float32 weights; its loss."""
        with torch.no_grad():
            torch._foreach_copy_(self.half, self.whole)
        for p in self.half:
            p.grad = None
        loss = self.run.loss(**self.copies)
        loss.backward()
        for p, h in zip(self.whole, self.half, strict=True):
            p.grad = torch.empty_like(p).copy_(
                h.grad
            )  # laid out as the weight, whatever the copy's layout
        return loss.detach()


class CpuStep:
    """Forward and backward under bf16 autocast."""

    def __init__(self, run: Pretraining):
        self.run = run

    def backward(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16), attention_in_float32():
            loss = self.run.loss(**self.run.modules)
        loss.backward()
        return loss.detach()


def fastest(steps: list[Callable[[], None]]) -> Callable[[], None]:
    """The one of some recorded steps that takes the least time."""
    seconds = []
    for step in steps:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / 10)
    print(f"a step in each layout: {seconds} s", flush=True)
    return steps[seconds.index(min(seconds))]


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent; killed runs continue from the last checkpoint."""
    run = Pretraining(args)
    weights = named_parameters(run.modules)
    optimizer = adamw(weights.values(), run.device)
    average = Average(weights, decay=args.average)
    seconds = None if args.steps else args.minutes * 60
    budget = Budget(args.peak, args.steps, seconds, warmup_steps=args.warmup)
    total = torch.zeros((), device=run.device)

    def step(work: HalfStep | CpuStep) -> None:
        optimizer.zero_grad(set_to_none=True)
        total.add_(work.backward())
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()

    run.draw(0)
    if run.device == "cuda":
        layouts = (torch.contiguous_format, torch.channels_last)
        replay = fastest([recorded(partial(step, HalfStep(run, x)), run.device) for x in layouts])
    else:
        replay = partial(step, CpuStep(run))
    resumed = load_checkpoint(args.out, weights, optimizer, budget, average)
    total.zero_()
    log(
        args.out,
        event="resume" if resumed else "start",
        parameters=count(weights.values()),
        drawings=len(run.train.concepts),
        concepts=len({c.name for c in run.train.concepts}),
        device=run.device,
        minutes=args.minutes,
    )
    saved = budget.progress
    budget.begin()
    while not budget.done:
        run.draw(budget.step)
        optimizer.param_groups[0]["lr"].fill_(budget.learning_rate())
        replay()
        average.update(weights, budget.step)
        budget.tick(args.batch)
        if budget.step % 50 == 0:
            log(
                args.out,
                step=budget.step,
                loss=total.item() / 50,
                lr=budget.learning_rate(),
                samples=budget.samples,
                samples_per_second=budget.samples / budget.elapsed,
                minutes=budget.elapsed / 60,
                cpu_hours=budget.cpu_seconds / 3600,
            )
            total.zero_()
            if budget.progress - saved >= args.save_every and not budget.done:
                saved = budget.progress
                save_checkpoint(args.out, weights, optimizer, budget, average)
                look(run, weights, average, budget, args)
    save_checkpoint(args.out, weights, optimizer, budget, average)
    look(run, weights, average, budget, args)


def look(
    run: Pretraining,
    weights: dict[str, torch.Tensor],
    average: Average,
    budget: Budget,
    args: argparse.Namespace,
) -> None:
    """Held-out loss and sample pictures of the averaged weights."""
    with swapped(weights, average):
        log(args.out, step=budget.step, held_out_loss=held_out_loss(run.pipeline(), run.held))
        sample_grid(run.pipeline(), PROMPTS, args.out / f"sample-{budget.step:06d}.png")
    budget.begin()


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
    parser.add_argument("--concepts", choices=("common", "good"), default="good")
    parser.add_argument("--minutes", type=float, default=75.0, help="budget, pauses not counted")
    parser.add_argument("--steps", type=int, help="fixes the budget in steps instead")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=8e-4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--save-every", type=float, default=0.1, help="share of the budget")
    parser.add_argument(
        "--average", type=float, default=0.999, help="decay of the averaged weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"train": train, "export": export_base}[args.do](args)


if __name__ == "__main__":
    main()
