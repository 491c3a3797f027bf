"""Objectives against diffusers' schedulers and training helpers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from lora_nb.errors import ConfigError
from lora_nb.objectives import Diffusion


def scheduler(prediction_type="epsilon", zero=False):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero,
    )


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(6, 4, 8, 8, generator=g), torch.randn(6, 4, 8, 8, generator=g)
    return x0, noise, torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.mark.parametrize("zero", [False, True])
def test_add_noise_is_the_schedulers(tensors, zero):
    x0, noise, t = tensors
    theirs = scheduler("v_prediction", zero)
    ours = Diffusion.from_scheduler(theirs)
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-6)


def test_velocity_is_the_schedulers(tensors):
    x0, noise, t = tensors
    theirs = scheduler("v_prediction")
    ours = Diffusion.from_scheduler(theirs)
    assert torch.allclose(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t), atol=1e-6)


def test_targets_of_the_other_types(tensors):
    x0, noise, t = tensors
    assert Diffusion.from_scheduler(scheduler("epsilon")).target(x0, noise, t) is noise
    assert Diffusion.from_scheduler(scheduler("sample")).target(x0, noise, t) is x0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_comes_back_from_a_perfect_prediction(tensors, kind):
    x0, noise, t = tensors
    ours = Diffusion.from_scheduler(scheduler(kind))
    x_t = ours.add_noise(x0, noise, t)
    assert torch.allclose(ours.x0_from(ours.target(x0, noise, t), x_t, t), x0, atol=1e-3)


def test_x0_from_agrees_with_a_ddim_step(tensors):
    x0, noise, _ = tensors
    theirs = DDIMScheduler.from_config(scheduler("v_prediction").config, clip_sample=False)
    theirs.set_timesteps(10)
    ours = Diffusion.from_scheduler(theirs)
    t = int(theirs.timesteps[3])
    x_t, prediction = x0 * 0.3 + noise, noise * 0.5
    expected = theirs.step(prediction, t, x_t).pred_original_sample
    assert torch.allclose(ours.x0_from(prediction, x_t, torch.full((6,), t)), expected, atol=1e-5)


def test_snr_is_diffusers(tensors):
    t = tensors[2]
    assert torch.allclose(
        Diffusion.from_scheduler(scheduler()).snr(t), compute_snr(scheduler(), t), rtol=1e-4
    )


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_weights(gamma):
    t = torch.arange(1000)
    snr = compute_snr(scheduler(), t)
    least = torch.minimum(snr, torch.tensor(gamma))
    expected = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}
    for kind, weights in expected.items():
        ours = Diffusion.from_scheduler(scheduler(kind), snr_gamma=gamma)
        assert torch.allclose(ours.weight(t), weights, rtol=1e-4)


def test_plain_loss_weighs_all_alike():
    assert torch.equal(Diffusion.from_scheduler(scheduler()).weight(torch.arange(5)), torch.ones(5))


def test_weights_stay_finite_without_any_signal():
    ours = Diffusion.from_scheduler(scheduler("v_prediction", zero=True), snr_gamma=5.0)
    assert torch.isfinite(ours.weight(torch.arange(1000))).all()


def test_timesteps_are_uniform_and_in_range():
    ours = Diffusion.from_scheduler(scheduler())
    t = ours.sample_t(torch.linspace(0, 1 - 1e-7, 10_000))
    assert (t.min(), t.max()) == (0, 999)
    counts = torch.bincount(t, minlength=1000)
    assert (counts.min(), counts.max()) == (10, 10) or (counts - 10).abs().max() <= 1


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ConfigError, match="v_prediction"):
        Diffusion.from_scheduler(scheduler("v_prediction", zero=True), prediction_type="epsilon")


def test_a_flow_scheduler_is_refused():
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConfigError, match="alphas_cumprod"):
        Diffusion.from_scheduler(FlowMatchEulerDiscreteScheduler())
