"""Flow matching against diffusers and against its formulas written down a second time, in float64."""

import re
from math import cos, exp, pi
from statistics import NormalDist

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from safetensors import safe_open

from lora_nb import adapters, formats, rng
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import REGISTRY, Batch, load_family, tiny
from lora_nb.inference import generate, use_adapter
from lora_nb.loss import diffusion_loss
from lora_nb.objectives import WEIGHTING_SCHEMES, FlowMatching

SHIFTS = [{"shift": 1.0}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}]
CAPTIONS, POSITIONS, SEED = ["a red apple", "two dogs, one cat"], [3, 8], 11
FLOW = ("sd3", "flux", "z_image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(tiny.build(name, tmp_path_factory.mktemp(name))) for name in FLOW}


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def batch_of(family, pixels):
    return Batch(POSITIONS, SEED, CAPTIONS, family.moments(pixels), {}, torch.zeros(2, 6))


# The objective against diffusers


@pytest.mark.parametrize("settings", SHIFTS)
def test_add_noise_is_the_schedulers(settings):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    objective = FlowMatching.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 1000, 4, 2, 2)
    t = objective.sample_t(torch.arange(1000) / 1000 + 0.0005)
    assert torch.equal(t, scheduler.timesteps)
    theirs = scheduler.scale_noise(x0, scheduler.timesteps, noise)
    torch.testing.assert_close(objective.add_noise(x0, noise, t), theirs, rtol=1e-6, atol=1e-6)


def test_timesteps_are_distributed_as_in_the_reference():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    settings = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.29}
    for scheme in WEIGHTING_SCHEMES:
        objective = FlowMatching.from_scheduler(scheduler, weighting_scheme=scheme, **settings)
        first, second = (torch.Generator().manual_seed(5) for _ in range(2))
        density = compute_density_for_timestep_sampling(scheme, 2000, generator=first, **settings)
        if scheme == "logit_normal":  # the uniform numbers behind the same normal draws
            u = torch.special.ndtr(torch.normal(0.0, 1.0, (2000,), generator=second).double())
        else:
            u = torch.rand(2000, generator=second)
        theirs = scheduler.timesteps[(density * 1000).long()]
        assert torch.equal(objective.sample_t(u), theirs), scheme


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_weights_are_the_references(scheme):
    objective = FlowMatching.from_scheduler(
        FlowMatchEulerDiscreteScheduler(shift=3.0), weighting_scheme=scheme
    )
    sigmas = objective.sigmas
    theirs = compute_loss_weighting_for_sd3(scheme, sigmas)
    torch.testing.assert_close(objective.weight(sigmas * 1000), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_the_ends_of_the_uniform_numbers_are_timesteps(scheme):
    objective = FlowMatching.from_scheduler(
        FlowMatchEulerDiscreteScheduler(), weighting_scheme=scheme, logit_std=20.0, mode_scale=1.75
    )
    t = objective.sample_t(torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24]))
    assert ((t >= 1) & (t <= 1000)).all()
    assert torch.isfinite(objective.weight(t)).all()


def test_x0_and_snr_follow_from_the_line():
    objective = FlowMatching.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    x0, noise = torch.randn(2, 3, 4, 2, 2)
    t = torch.tensor([1.0, 250.0, 1000.0])
    velocity, x_t = objective.target(x0, noise, t), objective.add_noise(x0, noise, t)
    torch.testing.assert_close(objective.x0_from(velocity, x_t, t), x0, rtol=1e-5, atol=1e-6)
    assert objective.snr(t).tolist() == pytest.approx([999.0**2, 9.0, 0.0], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting_scheme": "cosmos"}, "weighting_scheme"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"mode_scale": 2.0}, "mode_scale"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"snr_gamma": 5.0}, "snr_gamma"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FlowMatching.from_scheduler(FlowMatchEulerDiscreteScheduler(), **settings)


def test_a_diffusion_scheduler_is_refused():
    with pytest.raises(ConfigError, match="DDPMScheduler"):
        FlowMatching.from_scheduler(DDPMScheduler())


# The loss against its formulas, with the public pipeline's own modules in float64


def sigma_of(u: float, scheme: str, shift: float) -> float:
    """The share of noise that a uniform number stands for."""
    if scheme == "logit_normal":
        u = 1 / (1 + exp(-NormalDist().inv_cdf(u)))
    elif scheme == "mode":
        u = 1 - u - 1.29 * (cos(pi * u / 2) ** 2 - 1 + u)
    plain = (1000 - int(u * 1000)) / 1000
    return shift * plain / (1 + (shift - 1) * plain)


def weight_of(sigma: float, scheme: str) -> float:
    if scheme == "sigma_sqrt":
        return 1 / sigma**2
    return 2 / (pi * (1 - 2 * sigma + 2 * sigma**2)) if scheme == "cosmap" else 1.0


def velocity_of_sd3(pipeline, x_t, t):
    states, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    return pipeline.transformer(x_t, states, pooled, t, return_dict=False)[0]


def velocity_of_flux(pipeline, x_t, t):
    states, pooled, text_ids = pipeline.encode_prompt(CAPTIONS, max_sequence_length=16)
    count, channels, height, width = x_t.shape
    ids = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", x_t.dtype)
    packed = pipeline._pack_latents(x_t, count, channels, height, width)
    guidance = torch.full((count,), 3.5) if pipeline.transformer.config.guidance_embeds else None
    velocity = pipeline.transformer(
        packed, states, pooled, t / 1000, ids, text_ids, guidance, return_dict=False
    )[0]
    factor = pipeline.vae_scale_factor
    return pipeline._unpack_latents(velocity, height * factor, width * factor, factor)


def velocity_of_z_image(pipeline, x_t, t):
    """Its transformer takes a list of clips of one frame, counts time from noise, and says x0 - noise."""
    states, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    clips = [picture[:, None] for picture in x_t]
    outputs = pipeline.transformer(clips, (1000 - t) / 1000, states, return_dict=False)[0]
    return torch.cat([-output.movedim(1, 0) for output in outputs])


VELOCITIES = {"sd3": velocity_of_sd3, "flux": velocity_of_flux, "z_image": velocity_of_z_image}


@torch.no_grad()
def loss_of(name, folder, pixels, scheme, preconditioned):
    """The reference's training step: its pipeline's encoders, its time and its weights."""
    pipeline = REGISTRY[name].pipeline_class.from_pretrained(folder)
    config = pipeline.vae.config
    posterior = pipeline.vae.encode(pixels).latent_dist
    draw = rng.normal(posterior.mean.shape[1:], SEED, "posterior", POSITIONS)
    spread = 0.0 if name == "z_image" else posterior.std  # its reference trains on the mean
    z = (posterior.mean + spread * draw).double()
    x0 = (z - config.shift_factor) * config.scaling_factor
    noise = rng.normal(x0.shape[1:], SEED, "noise", POSITIONS).double()
    # Shifted by picture size while sampling, a scheduler does not shift in training.
    settings = pipeline.scheduler.config
    shift = 1.0 if settings.use_dynamic_shifting else settings.shift
    uniform = rng.uniform(SEED, "timesteps", POSITIONS).tolist()
    sigmas = [sigma_of(u, scheme, shift) for u in uniform]
    sigma = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    pipeline.to(torch.float64)
    velocity = VELOCITIES[name](pipeline, x_t, 1000 * sigma.flatten())
    error = x_t - sigma * velocity - x0 if preconditioned else velocity - (noise - x0)
    weights = torch.tensor([weight_of(s, scheme) for s in sigmas])
    return (weights * error.square().flatten(1).mean(1)).mean().item()


@pytest.mark.parametrize("scheme", [None, *WEIGHTING_SCHEMES])
@pytest.mark.parametrize("name", FLOW)
@torch.no_grad()
def test_the_loss_is_the_formulas(folders, pixels, name, scheme):
    chosen = {} if scheme is None else {"weighting_scheme": scheme, "precondition_outputs": False}
    family = load_family(name, folders[name], dtype=torch.float64, **chosen)
    default = ("logit_normal", True) if name == "sd3" else ("none", False)
    expected = loss_of(
        name, folders[name], pixels, *(default if scheme is None else (scheme, False))
    )
    assert diffusion_loss(family, batch_of(family, pixels)).loss.item() == pytest.approx(
        expected, rel=1e-6
    )


# What only some of these models have


@torch.no_grad()
def test_without_t5_its_states_are_zeros(tmp_path, pixels):
    family = load_family("auto", str(tiny.build("sd3", tmp_path, t5=False)))
    ours = family.text_states(CAPTIONS)
    states, _, pooled, _ = family.pipeline().encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=77
    )
    torch.testing.assert_close(ours["encoder_hidden_states"], states)
    torch.testing.assert_close(ours["pooled_projections"], pooled)
    assert diffusion_loss(family, batch_of(family, pixels)).loss.isfinite()
    assert family.pipeline()("x", num_inference_steps=1, height=16, width=16).images


@torch.no_grad()
def test_guidance_is_told_to_models_that_read_it(folders, tmp_path, pixels):
    def loss(folder, guidance):
        family = load_family("auto", folder, training_guidance_scale=guidance)
        return diffusion_loss(family, batch_of(family, pixels)).loss

    assert not torch.equal(loss(folders["flux"], 1.0), loss(folders["flux"], None))
    assert torch.equal(loss(folders["flux"], 3.5), loss(folders["flux"], None))
    schnell = str(tiny.build("flux", tmp_path, guidance=False))
    assert torch.equal(loss(schnell, 1.0), loss(schnell, None))
    expected = loss_of("flux", schnell, pixels, "none", False)
    assert loss(schnell, None).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_text_length_is_a_choice(folders, name):
    short = load_family(name, folders[name], max_sequence_length=5).text_states(["a"])
    longest = load_family(name, folders[name]).text_states(["a"])
    difference = longest["encoder_hidden_states"].shape[1] - short["encoder_hidden_states"].shape[1]
    limit = 512 if name == "z_image" else 16  # of the pipeline, or of the tiny tokenizer itself
    assert difference == limit - 5


@torch.no_grad()
def test_a_caption_is_as_long_as_its_chat(folders):
    """What the transformer gets is what the pipeline gives it, and padding changes nothing."""
    family = load_family("z_image", folders["z_image"])
    blank = Batch.of_captions(CAPTIONS, 16)
    ours = family.condition(blank)["cap_feats"]
    theirs, _ = family.pipeline().encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    assert [len(text) for text in ours] == [
        len("user\n\nassistant\n") + 3 + len(c) for c in CAPTIONS
    ]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    family.t5_tokens = 64
    for one, other in zip(ours, family.condition(blank)["cap_feats"], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_half_precision_spares_the_layers_of_t5_that_overflow(folders, name):
    family = load_family(name, folders[name], dtype=torch.float16)
    kinds = {n: p.dtype for n, p in family.t5_encoder.named_parameters()}
    assert {kind for n, kind in kinds.items() if ".wo." in n} == {torch.float32}
    assert {kind for n, kind in kinds.items() if ".wo." not in n} == {torch.float16}
    assert family.vae.dtype == torch.float32


@pytest.mark.parametrize("name", FLOW)
def test_files_keep_the_names_of_the_reference(folders, tmp_path, name):
    family = load_family(name, folders[name])
    adapters.add(family, {part: LoraSpec(rank=2, lora_alpha=3.0) for part in family.trainable})
    with safe_open(formats.save_adapter(family, tmp_path), framework="pt") as file:
        keys = list(file.keys())
    parts = "|".join(family.trainable)
    assert all(re.fullmatch(rf"({parts})\..+\.lora_[AB]\.weight", key) for key in keys)
    report = formats.inspect(tmp_path)
    assert set(report.parts) == set(family.trainable)
    assert all(part.alphas == (3.0,) for part in report.parts.values())
    assert not report.problems


@pytest.mark.parametrize("name", FLOW)
def test_a_file_fits_a_fresh_pipeline(folders, tmp_path, name):
    family = load_family(name, folders[name])
    adapters.add(family, {part: LoraSpec(rank=2, lora_alpha=3.0) for part in family.trainable})
    for weights in adapters.parameters(family).values():
        for weight in weights:
            weight.data += 0.05
    file = formats.save_adapter(family, tmp_path)
    fresh = load_family(name, folders[name]).pipeline()
    sampling = {"num_inference_steps": 2, "resolution": 16, "guidance_scale": 2.0}
    base = generate(fresh, "x", [1], **sampling)
    assert set(use_adapter(fresh, file)) == set(family.trainable)
    ours, theirs = (generate(p, "x", [1], **sampling) for p in (family.pipeline(), fresh))
    assert ours[0].tobytes() == theirs[0].tobytes() != base[0].tobytes()
