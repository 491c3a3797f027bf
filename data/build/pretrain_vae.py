"""Pretrain the autoencoder of the embedded base on 64 px crops of the base styles.

128 px pictures become 16 x 16 x 8 latents. The loss is L1 plus L1 of the picture gradients at
three scales (drawings are flat areas and edges, and the gradient terms keep the edges) plus the
squared error that PSNR measures. Some crops are recoloured or redrawn as black lines, so that
styles which nobody has seen yet can be reconstructed too.

    python data/build/pretrain_vae.py --minutes 20
    python data/build/pretrain_vae.py --init data/base/vae --out build/vae2 --peak 6e-4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from drawings import BASE_STYLES, NEW_STYLES, WORK, held_out, load_style
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

CROP = 64


def build_vae() -> AutoencoderKL:
    """The architecture; `scaling_factor` is measured after training."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def pictures(styles: tuple[str, ...], held: bool) -> torch.Tensor:
    """All drawings of some styles, either the held-out concepts or the others: uint8, N 3 H W."""
    parts = []
    for style in styles:
        keys, array = load_style(style)
        rows = [i for i, key in enumerate(keys) if held_out(key) == held]
        parts.append(np.asarray(array[rows]))
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()


def to_model(batch: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to the [-1, 1] of the model."""
    return batch.float() / 127.5 - 1.0


def crops(data: torch.Tensor, size: int, g: torch.Generator) -> torch.Tensor:
    """Random pictures, random crops, half of them mirrored, on the generator's device, where `data` must be."""
    index = (uniform(g, size) * len(data)).long()
    top, left = (uniform(g, 2, size) * (data.shape[-1] - CROP + 1)).long()
    side = torch.arange(CROP, device=data.device)
    across = torch.where(uniform(g, size)[:, None] < 0.5, side.flip(0), side)
    rows, columns = (top[:, None] + side)[:, None, :, None], (left[:, None] + across)[:, None, None]
    channel = torch.arange(3, device=data.device)[None, :, None, None]
    return restyle(to_model(data[index[:, None, None, None], channel, rows, columns]), g)


def restyle(batch: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Half of the pictures as they are, the others in colours or lines that no base style has.

    A sixth with its colours permuted or inverted, a sixth as hard black and white, a sixth as black
    outlines on white. The style sets (ink, clay) are never shown to the autoencoder.
    """
    size = len(batch)
    kind = uniform(g, size)[:, None, None, None] * 6
    order = uniform(g, size, 3).argsort(1)
    sign = torch.where(uniform(g, size) < 0.5, 1.0, -1.0)[:, None, None, None]
    recoloured = batch.gather(1, order[:, :, None, None].expand_as(batch)) * sign

    grey = batch.mean(1, keepdim=True)
    level = (uniform(g, size) * 1.2 - 0.4)[:, None, None, None]
    hard = ((grey - level) * 6).clamp(-1, 1).expand_as(batch)

    slope = torch.zeros_like(batch)
    slope[..., 1:] += (batch[..., 1:] - batch[..., :-1]).abs()
    slope[..., 1:, :] += (batch[..., 1:, :] - batch[..., :-1, :]).abs()
    lines = (1 - 4 * slope.amax(1, keepdim=True)).clamp(-1, 1).expand_as(batch)
    batch = torch.where(kind < 1, recoloured, batch)
    batch = torch.where((kind >= 1) & (kind < 2), hard, batch)
    return torch.where((kind >= 2) & (kind < 3), lines, batch)


def vae_loss(vae: AutoencoderKL, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Reconstruction plus a very weak pull of the latents towards a normal distribution."""
    posterior = vae.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    restored = vae.decode(mean + noise * torch.exp(0.5 * logvar)).sample.float()
    loss = F.l1_loss(restored, x) + 2.0 * F.mse_loss(restored, x)
    a, b = restored, x
    for _ in range(3):
        loss = loss + 0.5 * F.l1_loss(a.diff(dim=-1), b.diff(dim=-1))
        loss = loss + 0.5 * F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1.0 - logvar).mean()
    return loss + 1e-4 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, data: torch.Tensor, batch: int = 16) -> float:
    """Mean peak signal-to-noise ratio in decibels of the reconstructions from the latent mean."""
    values = []
    device = next(vae.parameters()).device
    for part in data.split(batch):
        x = to_model(part).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.float().clamp(-1, 1)
        mse = ((y - x) / 2).pow(2).mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return torch.cat(values).mean().item()


@torch.no_grad()
def normalise(vae: AutoencoderKL, data: torch.Tensor, batch: int = 32) -> None:
    """Give every latent channel mean 0 and the same spread, then set `scaling_factor`.

    An affine map of the channels is folded into the 1 x 1 convolutions at both ends of the
    latents, so pictures do not change. Without it a white page is a large constant that the
    noise can never quite hide.
    """
    device = next(vae.parameters()).device
    parts = [vae.encode(to_model(p).to(device)).latent_dist.mean for p in data.split(batch)]
    latents = torch.cat(parts)
    shift, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    common = spread.square().mean().sqrt()
    gain = common / spread

    # Encoder side: (mean - shift) * gain; the log-variance moves by 2 log(gain).
    width = len(gain)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:width].mul_(gain[:, None, None, None])
    quant.bias[:width].sub_(shift).mul_(gain)
    quant.bias[width:].add_(2 * gain.log())
    # Decoder side: the inverse, applied to the inputs of the convolution.
    post.bias.add_(post.weight[:, :, 0, 0] @ shift)
    post.weight.div_(gain[None, :, None, None])
    vae.register_to_config(scaling_factor=round(1.0 / common.item(), 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WORK / "vae")
    parser.add_argument("--init", type=Path, help="start from this autoencoder")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="fixes the budget in steps instead of minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init) if args.init else build_vae()
    vae.to(device)
    train = pictures(tuple(BASE_STYLES), held=False).to(device)
    valid = pictures(tuple(BASE_STYLES), held=True)[::3]
    weights = named_parameters({"vae": vae})
    optimizer = adamw(weights.values(), device)
    average = Average(weights)
    seconds = None if args.steps else args.minutes * 60
    budget = Budget(args.peak, args.steps, seconds, warmup_steps=300)
    args.out.mkdir(parents=True, exist_ok=True)
    resumed = load_checkpoint(args.out, weights, optimizer, budget, average)
    log(
        args.out, event="start", parameters=count(vae.parameters()), train=len(train), device=device
    )

    x = torch.zeros(args.batch, 3, CROP, CROP, device=device)
    noise = torch.zeros(args.batch, 8, CROP // 8, CROP // 8, device=device)
    total = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = vae_loss(vae, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        total.add_(loss.detach())

    replay = recorded(step, device)
    if resumed:  # what recording did to the moments is undone
        load_checkpoint(args.out, weights, optimizer, budget, average)
    total.zero_()
    budget.begin()
    while not budget.done:
        g = generator(args.seed, budget.step, device=device)
        x.copy_(crops(train, args.batch, g))
        noise.normal_(generator=g)
        optimizer.param_groups[0]["lr"].fill_(budget.learning_rate())
        replay()
        average.update(weights, budget.step)
        budget.tick(args.batch)
        if budget.step % 100 == 0:
            log(
                args.out,
                step=budget.step,
                loss=total.item() / 100,
                lr=budget.learning_rate(),
                samples_per_second=budget.samples / budget.elapsed,
                minutes=budget.elapsed / 60,
                cpu_hours=budget.cpu_seconds / 3600,
            )
            total.zero_()
        if budget.step % 2000 == 0:
            save_checkpoint(args.out, weights, optimizer, budget, average)
            with swapped(weights, average):
                log(args.out, step=budget.step, psnr_held_out=psnr(vae, valid))
    save_checkpoint(args.out, weights, optimizer, budget, average)
    average.give(weights)
    log(args.out, event="done", step=budget.step, psnr_held_out=psnr(vae, valid))
    for style in NEW_STYLES:
        log(args.out, style=style, psnr_held_out=psnr(vae, pictures((style,), held=True)))
    if not args.init:  # the UNet of an earlier base knows the latents as they are
        normalise(vae, train[:: max(1, len(train) // 600)])
        log(args.out, event="normalised", psnr_held_out=psnr(vae, valid))
    vae.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
