"""Ten losses of the diffusion families against the reference scripts' formulas, written down in float64.

Noise, timesteps and picture order are named draws, so both sides have the same; network and encoders are those that the
public pipeline reads. Nothing of `lora_nb.objectives` or `lora_nb.loss` is used by hand.
"""

import json
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lora_nb import data, rng
from lora_nb.cache import CLASS_POSITIONS, Cache, with_prior
from lora_nb.config import DataSpec
from lora_nb.families import load_family, tiny
from lora_nb.loss import diffusion_loss

SEED, STEPS, BATCH = 5, 10, 2
SIDE, HEIGHT, WIDTH = 16, 20, 30
MODELS = {"epsilon": ("sd", "epsilon"), "v": ("sd", "v_prediction"), "xl": ("sdxl", "epsilon")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        name: str(tiny.build(family, tmp_path_factory.mktemp(name), prediction_type=kind))
        for name, (family, kind) in MODELS.items()
    }


def folder_of_pictures(folder, count: int) -> str:
    rows = []
    for i in range(count):
        picture = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).rotate(30 * i)
        Image.merge("RGB", (picture, picture.rotate(90), picture)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"slope {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = folder_of_pictures(tmp_path_factory.mktemp("pictures"), 7)
    return DataSpec(folder, resolution=SIDE, center_crop=True)


@pytest.fixture(scope="module")
def class_spec(tmp_path_factory):
    folder = folder_of_pictures(tmp_path_factory.mktemp("class"), 5)
    return DataSpec(folder, resolution=SIDE, center_crop=True, instance_prompt="a slope")


load = cache(data.load)


class ByHand:
    """A training script in float64: `errors` are mean squared errors and signal-to-noise ratios of pictures."""

    def __init__(self, model: str):
        self.pipeline = DiffusionPipeline.from_pretrained(model)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            if name in self.pipeline.components:
                self.pipeline.components[name].double()
        self.alphas_cumprod = self.pipeline.scheduler.alphas_cumprod.double()
        self.prediction_type = self.pipeline.scheduler.config.prediction_type

    @torch.no_grad()
    def error(self, spec: DataSpec, position: int, offset: float) -> tuple[float, float]:
        pictures = load(spec)
        row = data.row_at(position, len(pictures), SEED)
        pixels = data.pixels(pictures.image(row), spec, position, SEED)[None]
        posterior = self.pipeline.vae.encode(pixels).latent_dist
        draw = rng.normal(posterior.mean.shape[1:], SEED, "posterior", [position])
        x0 = (posterior.mean + posterior.std * draw).double() * 0.18215
        noise = rng.normal(x0.shape[1:], SEED, "noise", [position]).double()
        constant = rng.normal((4, 1, 1), SEED, "noise offset", [position]).double()
        noise = noise + offset * constant
        t = int(1000 * rng.uniform(SEED, "timesteps", [position]).item())
        alpha_bar = self.alphas_cumprod[t]
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        prediction = self.predict(signal * x0 + spread * noise, t, pictures.rows[row].caption)
        velocity = signal * noise - spread * x0
        target = noise if self.prediction_type == "epsilon" else velocity
        return ((prediction - target) ** 2).mean().item(), (alpha_bar / (1 - alpha_bar)).item()

    def predict(self, x_t: torch.Tensor, t: int, caption: str) -> torch.Tensor:
        said = self.pipeline.encode_prompt(
            caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {}
        if "text_encoder_2" in self.pipeline.components:
            # The shorter side becomes 16 and the longer 24, of which the middle is taken.
            sizes = torch.tensor([[HEIGHT, WIDTH, 0, 4, SIDE, SIDE]], dtype=torch.float64)
            added = {"added_cond_kwargs": {"text_embeds": said[2], "time_ids": sizes}}
        return self.pipeline.unet(x_t, t, said[0], **added).sample

    def weight(self, snr: float, gamma: float | None, form: str) -> float:
        """Min-SNR as the text-to-image scripts have it, and as the SDXL DreamBooth script has it."""
        if gamma is None:
            return 1.0
        least = min(snr, gamma)
        if self.prediction_type == "epsilon":
            return least / snr
        return least / (snr + 1) if form == "text to image" else least / snr + 1

    def loss(self, spec, positions, offset=0.0, gamma=None, form="text to image") -> float:
        errors = [self.error(spec, position, offset) for position in positions]
        return sum(self.weight(snr, gamma, form) * error for error, snr in errors) / len(errors)


def positions_of_steps() -> list[list[int]]:
    return [list(range(BATCH * step, BATCH * (step + 1))) for step in range(STEPS)]


CASES = {
    "epsilon": ("epsilon", {}, 0.0),
    "v": ("v", {}, 0.0),
    "noise offset": ("epsilon", {}, 0.1),
    "min-SNR, epsilon": ("epsilon", {"gamma": 0.5}, 0.0),
    "min-SNR, v, divided by SNR + 1": ("v", {"gamma": 0.5}, 0.0),
    "min-SNR, v, floored at 1": ("v", {"gamma": 0.5, "form": "DreamBooth"}, 0.0),
    "sdxl": ("xl", {}, 0.0),
    "sdxl, min-SNR and offset": ("xl", {"gamma": 0.5}, 0.05),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_ten_losses_are_the_formulas(models, spec, case):
    model, options, offset = CASES[case]
    floor = True if options.get("form") == "DreamBooth" else None
    family = load_family(
        "auto",
        models[model],
        dtype=torch.float64,
        snr_gamma=options.get("gamma"),
        snr_floor=floor,
    )
    batches, hand = Cache(family, load(spec), spec, SEED), ByHand(models[model])
    ours = [
        diffusion_loss(family, batches.batch(p), offset).loss.item() for p in positions_of_steps()
    ]
    expected = [hand.loss(spec, p, offset, **options) for p in positions_of_steps()]
    assert ours == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == STEPS


@pytest.mark.parametrize("gamma", [None, 0.5])
@pytest.mark.parametrize("model", ["epsilon", "v", "xl"])
@torch.no_grad()
def test_ten_losses_with_prior_preservation(models, spec, class_spec, model, gamma):
    """Instance plus weight times class, each half a mean of its own, each picture with the weight of its own SNR."""
    family = load_family("auto", models[model], dtype=torch.float64, snr_gamma=gamma)
    instances = Cache(family, load(spec), spec, SEED)
    classes = Cache(family, load(class_spec), class_spec, SEED)
    hand = ByHand(models[model])
    for positions in positions_of_steps():
        batch = with_prior(instances.batch(positions), classes.class_batch(positions), weight=0.7)
        shifted = [CLASS_POSITIONS + p for p in positions]
        first = hand.loss(spec, positions, gamma=gamma)
        second = hand.loss(class_spec, shifted, gamma=gamma)
        assert diffusion_loss(family, batch).loss.item() == pytest.approx(
            first + 0.7 * second, rel=1e-6
        )
