"""The two-stage families against their formulas in float64, their files, and their pipelines with an adapter on."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DDPMWuerstchenScheduler
from PIL import Image
from safetensors import safe_open
from transformers import CLIPImageProcessor

from lora_nb import adapters, data, formats, rng
from lora_nb.cache import Cache
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, ModelError
from lora_nb.families import load_family, tiny
from lora_nb.families._two_stages import image_embeds
from lora_nb.families.wuerstchen import load_encoder
from lora_nb.inference import generate, load_pipeline, set_scale
from lora_nb.loss import diffusion_loss
from lora_nb.objectives import CosineDiffusion
from lora_nb.trainer import train

NAMES = ("kandinsky_decoder", "kandinsky_prior", "wuerstchen")
SIDES = {"wuerstchen": 128}


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    return request.param, str(tiny.build(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def spec(pictures):
    return DataSpec(train_data_dir=str(pictures), resolution=16)


def batch_of(family, spec):
    return Cache(family, data.load(spec, "train"), spec, seed=5).batch([0, 1, 2, 3])


def cosine(t):
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def alpha_bar_by_hand(name, u):
    """Timestep and alpha_bar of a uniform number, in float64, from the published schedules."""
    if name == "wuerstchen":
        return u, min(max(cosine(u) / cosine(0.0), 0.0001), 0.9999)
    t = int(u * 1000)
    if name == "kandinsky_decoder":
        betas = np.linspace(0.00085, 0.012, 1000)
    else:
        steps = [cosine(i / 1000) for i in range(1001)]
        betas = np.array([min(1 - b / a, 0.999) for a, b in pairwise(steps)])
    return t, float(np.prod(1 - betas[: t + 1]))


def prediction_by_hand(name, family, batch, x_t, t):
    """The network called as the reference scripts call it, on one picture."""
    caption, row = batch.captions[0], {k: v[:1].double() for k, v in batch.picture_states.items()}
    if name == "kandinsky_decoder":
        out = family.unet(x_t, t, None, added_cond_kwargs={"image_embeds": row["image_embeds"]})
        return out.sample[:, :4]
    tokens = family.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
    if name == "wuerstchen":
        said = family.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return family.prior(x_t, t, said.last_hidden_state)
    said = family.text_encoder(tokens.input_ids)
    mask = tokens.attention_mask.bool()
    return family.prior(
        x_t, t, said.text_embeds, said.last_hidden_state, mask
    ).predicted_image_embedding


def x0_by_hand(name, family, pixels):
    if name == "kandinsky_decoder":
        return family.movq.encode(pixels).latents
    if name == "wuerstchen":
        return (family.encoder(pixels) + 1) / 42
    embeds = image_embeds(pixels, family.image_encoder, family.image_processor)
    return (embeds - family.clip_mean) / family.clip_std


@torch.no_grad()
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_the_loss_is_the_formulas_in_float64(model, spec, gamma):
    name, folder = model
    family = load_family("auto", folder, dtype=torch.float64, snr_gamma=gamma)
    pictures = data.load(spec, "train")
    cache = Cache(family, pictures, spec, seed=5)
    losses = []
    for position in (0, 1, 2, 3):
        batch = cache.batch([position])
        row = data.row_at(position, len(pictures), 5)
        pixels = data.pixels(pictures.image(row), spec, position, 5)[None]
        x0 = x0_by_hand(name, family, pixels).double()
        noise = rng.normal(x0.shape[1:], 5, "noise", [position]).double()
        t, alpha_bar = alpha_bar_by_hand(name, rng.uniform(5, "timesteps", [position]).item())
        x_t = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise
        t = torch.tensor([t], dtype=torch.float64 if name == "wuerstchen" else torch.long)
        predicted = prediction_by_hand(name, family, batch, x_t, t)
        target = x0 if name == "kandinsky_prior" else noise
        weight, snr = 1.0, alpha_bar / (1 - alpha_bar)
        if gamma is not None:
            weight = min(snr, gamma) / (1 if name == "kandinsky_prior" else snr)
        losses.append(weight * ((predicted - target) ** 2).mean().item())
        assert diffusion_loss(family, batch).loss.item() == pytest.approx(losses[-1], rel=1e-6)
    together = diffusion_loss(family, cache.batch([0, 1, 2, 3])).loss.item()
    assert together == pytest.approx(np.mean(losses), rel=1e-6)


def test_continuous_noise_is_the_schedulers():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(5, 4, 3, 3, generator=g), torch.randn(5, 4, 3, 3, generator=g)
    t = torch.tensor([0.0, 0.001, 0.4, 0.9, 0.9999])
    ours = CosineDiffusion()
    theirs = DDPMWuerstchenScheduler().add_noise(x0, noise, t)
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs, atol=1e-6)
    assert torch.allclose(ours.x0_from(noise, ours.add_noise(x0, noise, t), t), x0, atol=1e-3)
    assert ours.target(x0, noise, t) is noise
    assert torch.equal(ours.weight(t), torch.ones(5))
    weighted = CosineDiffusion(snr_gamma=5.0)
    assert torch.allclose(weighted.weight(t), (5.0 / weighted.snr(t)).clamp(max=1))


def test_the_priors_sampler_has_the_schedule_of_the_reference(tmp_path):
    family = load_family("auto", str(tiny.build("kandinsky_prior", tmp_path)))
    reference = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    assert torch.allclose(family.objective.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4)
    assert family.objective.prediction_type == "sample"


def test_image_embeds_sees_what_the_image_processor_gives():
    """Up to the processor's rounding to 256 levels."""

    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"image_size": 8})()
            self.device, self.dtype = torch.device("cpu"), torch.float32

        def forward(self, pixels):
            return type("Output", (), {"image_embeds": pixels})()

    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = torch.tensor(array).permute(2, 0, 1)[None] / 127.5 - 1
    ours = image_embeds(pixels, Seen(), processor)
    theirs = processor(Image.fromarray(array), return_tensors="pt").pixel_values
    assert (ours - theirs).abs().max() < 1.5 / 255 / min(processor.image_std)


@pytest.fixture
def saved(model, tmp_path):
    """A family with a stirred adapter of scale 4, and its file."""
    family = load_family("auto", model[1])
    part = next(iter(family.targets))
    adapters.add(family, {part: LoraSpec(rank=2, lora_alpha=8)})
    for i, weight in enumerate(adapters.parameters(family)[part]):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    return family, part, formats.save_adapter(family, tmp_path)


def test_file_keys_are_the_published_ones(model, saved):
    with safe_open(saved[2], framework="pt") as file:
        keys = set(file.keys())
    expected = {
        "kandinsky_decoder": "mid_block.attentions.0.add_k_proj.lora_A.weight",
        "kandinsky_prior": "transformer_blocks.1.attn1.to_q.lora_A.weight",
        "wuerstchen": "prior.blocks.2.attention.to_out.0.lora_B.weight",
    }
    assert expected[model[0]] in keys
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)


def test_inspect_names_part_rank_and_alpha(saved):
    _, part, file = saved
    report = formats.inspect(file)
    assert (report.format, list(report.parts)) == ("peft", [part])
    assert (report.parts[part].ranks, report.parts[part].alphas) == ((2,), (8.0,))
    assert report.problems == ()


def test_load_pipeline_draws_what_was_trained(model, saved):
    family, _, file = saved
    side = SIDES.get(model[0], 16)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "resolution": side}
    draw = lambda pipe: np.asarray(generate(pipe, "colour 3", 0, **settings)[0], dtype=float)  # noqa: E731
    trained = draw(family.pipeline())
    pipeline = load_pipeline(model[1], file)
    assert np.abs(draw(pipeline) - trained).max() <= 1
    set_scale(pipeline, 0.0)
    assert np.abs(draw(pipeline) - trained).max() > 1


def test_half_precision_draws_too(model):
    side = SIDES.get(model[0], 16)
    pipeline = load_pipeline(model[1], dtype=torch.bfloat16)
    (picture,) = generate(pipeline, "colour 3", 0, num_inference_steps=2, resolution=side)
    assert picture.size == (side, side)


def test_unet_in_a_config_is_the_network_of_any_family(model, spec, tmp_path):
    settings = {"train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, "seed": 0}
    config = TrainConfig(model[1], data=spec, output_dir=str(tmp_path), **settings)
    assert list(config.lora) == ["unet"]
    training = train(config)
    (step,) = training
    assert list(step.lr) == [next(iter(training.family.targets))]


def test_two_names_for_one_network_are_refused(tmp_path):
    family = load_family("auto", str(tiny.build("kandinsky_prior", tmp_path)))
    with pytest.raises(ConfigError, match="lora names 'prior' twice"):
        adapters.named(family, {"unet": LoraSpec(), "prior": LoraSpec()})


def test_settings_of_other_families_are_refused(model):
    name, folder = model
    useless = "prior" if name != "kandinsky_decoder" else "decoder"
    with pytest.raises(ConfigError, match=f"no use for {useless}"):
        load_family("auto", folder, **{useless: "somewhere"})


def test_an_encoder_that_is_missing_or_a_pickle_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no encoder file"):
        load_encoder(tmp_path / "absent.safetensors")
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 not read")
    with pytest.raises(ModelError, match="pickle"):
        load_encoder(tmp_path / "model.pt")
