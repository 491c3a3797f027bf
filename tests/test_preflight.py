"""The forecast of a run: it leaves no trace, has the right order of magnitude, and says what would fit."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

import lora_nb
from lora_nb import adapters
from lora_nb.cli import main
from lora_nb.families import load_family
from lora_nb.families.quantized import KINDS, linears, quantize
from lora_nb.forecast.ladder import Line, ladder
from lora_nb.forecast.result import Forecast, fits
from lora_nb.forecast.trial import Measured, Micro
from lora_nb.memory import TooLittleMemory

MIB = 2**20


@pytest.fixture
def family(tiny_sd):
    return load_family("sd", str(tiny_sd))


def test_a_forecast_leaves_no_trace(config, family, tmp_path):
    before = {name: w.clone() for name, w in family.unet.state_dict().items()}
    state = torch.random.get_rng_state()
    forecast = lora_nb.preflight(config, family)
    assert list(tmp_path.iterdir()) == []  # no run folder
    assert not adapters.has_adapter(family.unet)
    assert not family.unet.is_gradient_checkpointing
    assert all(torch.equal(family.unet.state_dict()[name], w) for name, w in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert forecast.steps == 4
    assert forecast.fits


def test_all_parts_are_counted(config, family):
    config = config.replace(
        train_batch_size=4,
        max_train_steps=100,
        validation_prompts=("a", "b"),
        num_validation_images=1,
        validation_steps=30,
        probe_steps=50,
        checkpointing_steps=40,
    )
    forecast = lora_nb.preflight(config, family)
    assert all(seconds > 0 for _, seconds in forecast.parts)
    assert forecast.seconds == pytest.approx(sum(s for _, s in forecast.parts))
    assert forecast.training == pytest.approx(100 * forecast.seconds_per_step)
    assert 0 < forecast.peak_memory < forecast.memory_total
    names = [rung.name for rung in forecast.ladder]
    assert names[0] == "as configured"
    assert "gradient checkpointing" in names
    assert forecast.first_fit is forecast.ladder[0]
    for text in (str(forecast), forecast._repr_html_()):
        assert "as configured" in text
        assert "4 at most" not in text
        assert "validation" in text


def test_what_is_on_disk_need_not_be_encoded_again(config, family):
    config = config.replace(random_flip=True, max_train_steps=40)
    before = lora_nb.preflight(config, family)
    for _ in lora_nb.train(config.replace(max_train_steps=24), family):
        pass
    after = lora_nb.preflight(config, family)
    assert after.caching < before.caching / 2


def test_every_rung_is_a_config_that_trains_on_as_many_pictures_a_step(config, family):
    config = config.replace(train_batch_size=6, gradient_accumulation_steps=2)
    forecast = lora_nb.preflight(config, family)
    for rung in forecast.ladder:
        changed = config.replace(**rung.changes)
        changed.validate()
        assert changed.train_batch_size * changed.gradient_accumulation_steps == 12
        assert changed.data.resolution % family.pixel_multiple == 0


def test_the_run_costs_what_was_forecast_within_a_factor_of_four(config):
    """The long form of this, on a model with some weight, holds 15 %."""
    config = config.replace(max_train_steps=30, validation_prompts=("a",), num_inference_steps=9)
    lora_nb.preflight(config)  # what a process does only once is done
    forecast = lora_nb.preflight(config)
    began = time.perf_counter()
    run = lora_nb.train(config)
    for _ in lora_nb.with_samples(run):
        pass
    assert forecast.seconds / 4 < time.perf_counter() - began < 4 * forecast.seconds


def room_for(family, pictures, recomputed):
    """A network that runs out of memory on more pictures than these, or than `recomputed` with checkpointing."""

    def check(module, values):
        room = recomputed if family.unet.is_gradient_checkpointing else pictures
        if len(values[0]) > room and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    family.unet.conv_in.register_forward_pre_hook(check)


def test_a_batch_that_does_not_fit_is_forecast_in_halves(config, family):
    room_for(family, 2, 8)
    forecast = lora_nb.preflight(config.replace(train_batch_size=4), family)
    assert not forecast.ladder[0].measured  # reckoned from what went through
    assert forecast.ladder[1].changes == {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert forecast.seconds_per_step > 0


def test_a_picture_that_fits_only_with_checkpointing_names_that_rung(config, family):
    room_for(family, 0, 8)
    forecast = lora_nb.preflight(config, family)
    assert not forecast.fits
    assert math.isnan(forecast.ladder[0].seconds)
    assert forecast.first_fit.name == "gradient checkpointing"
    assert forecast.first_fit.changes == {"gradient_checkpointing": True}
    assert "gradient_checkpointing=True" in str(forecast)


def test_a_picture_that_fits_nowhere_is_an_error(config, family):
    room_for(family, 0, 0)
    with pytest.raises(TooLittleMemory, match="single picture"):
        lora_nb.preflight(config, family)


def rungs(config, family, total, each=100 * MIB, recomputed=10 * MIB):
    """The ladder where a picture takes 100 MiB of activations, 10 with checkpointing, on 500 MiB of weights."""
    base, batch = 500 * MIB, config.train_batch_size
    measured = Measured(
        loading=1.0,
        picture=0.1,
        caption=0.0,
        alone=Micro(1, 0.1, base + each),
        whole=Micro(batch, 0.1 * batch, base + batch * each),
        checkpointed=[
            Micro(1, 0.13, base + recomputed),
            Micro(batch, 0.13 * batch, base + batch * recomputed),
        ],
        step=0.1 * batch,
        warming=0.0,
        set_of_samples=0.0,
        probing=(0.0, 0.0),
        saving=0.0,
        widening={"int8": 0.01, "nf4": 0.02},
    )
    return ladder(config, measured, base, 0, total, family)


@pytest.mark.parametrize(
    ("total", "first", "size"),
    [
        (1400, "as configured", 8),
        (1000, "smaller micro-batches", 4),
        (700, "smaller micro-batches", 1),
        (600, "gradient checkpointing", 1),
        (545, "smaller pictures", 1),
        (500, None, None),
    ],
)
def test_the_ladder_names_the_first_rung_that_fits(config, family, total, first, size):
    config = config.replace(train_batch_size=8, resolution=512)
    found = rungs(config, family, total * MIB)
    rung = next((rung for rung in found if rung.fits), None)
    assert (rung and rung.name) == first
    if rung:
        assert rung.changes.get("train_batch_size", 8) == size
        assert fits(rung.memory, total * MIB)
    memory = [rung.memory for rung in found]
    assert memory == sorted(memory, reverse=True)  # a ladder only goes down


@pytest.mark.parametrize(("there", "left"), [(None, KINDS), ("int8", ("nf4",)), ("nf4", ())])
def test_a_quantized_base_saves_what_its_weights_shrink_by_and_costs_its_widening(
    config, tiny_sd, there, left
):
    family = load_family("sd", str(tiny_sd), base_model_precision=there)
    config = config.replace(resolution=512, base_model_precision=there)
    found = {rung.name: rung for rung in rungs(config, family, 10**12)}
    assert [name for name in found if name.endswith("base")] == [f"{kind} base" for kind in left]
    before = found["gradient checkpointing"]
    bytes_before = _bytes(family.unet)
    widest = max(layer.in_features * layer.out_features for layer in linears(family.unet).values())
    for kind, seconds in zip(left, (0.01, 0.02)[-len(left) :], strict=False):
        quantize(family.unet, kind, "cpu")
        rung = found[f"{kind} base"]
        # A layer is wide while it computes, and so is its copy in the making; in an int8 base that is so already.
        wide = 0 if there else 2 * 4 * widest
        assert before.memory - rung.memory == bytes_before - _bytes(family.unet) - wide
        steps = rung.changes.get("gradient_accumulation_steps", 1)
        assert rung.seconds == pytest.approx(before.seconds + 3 * seconds * steps)
        assert rung.changes["base_model_precision"] == kind
        assert not rung.measured


def test_the_rungs_of_a_compiled_run_are_configs_too(config, family):
    config = config.replace(resolution=512, torch_compile=True)
    for rung in rungs(config, family, 10**12):
        config.replace(**rung.changes).validate()
    assert rung.changes["base_model_precision"] == "nf4"


def _bytes(module):
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def test_recomputing_costs_time_and_the_cache_saves_it(config, family):
    found = rungs(config.replace(cache_latents=False, resolution=512), family, 10**12)
    by_name = {rung.name: rung for rung in found}
    plain, cached = by_name["as configured"], by_name["cached latents"]
    assert cached.seconds == pytest.approx(plain.seconds - 2 * 0.1)
    assert by_name["gradient checkpointing"].seconds == pytest.approx(1.3 * plain.seconds - 2 * 0.1)


def test_a_line_through_two_sizes_meets_both():
    line = Line(Micro(1, 1.0, 100), Micro(5, 3.0, 500), 0)
    assert line(1) == Micro(1, 1.0, 100)
    assert line(5) == Micro(5, 3.0, 500)
    assert line(3) == Micro(3, 2.0, 300)


def test_a_session_that_is_too_short_is_said():
    many_hours = 13 * 3600.0
    forecast = Forecast(10, 1.0, 0, 0, many_hours, 0, 0, 0, 1, 10**9, "training", "cuda", 12.0)
    assert not forecast.in_session
    assert "lives 12 h" in forecast.verdict


def test_the_command_line_forecasts(config, capsys, tmp_path):
    flags = {
        "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
        "train_data_dir": config.data.train_data_dir,
        "output_dir": config.output_dir,
        "resolution": 16,
        "max_train_steps": 4,
        "train_batch_size": 2,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["preflight", *words]) == 0
    assert "Fits: 4 steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


REAL = """
import json, resource, sys, time
import lora_nb
from lora_nb.config import TrainConfig
config = TrainConfig.from_json(sys.argv[2])
if sys.argv[1] == "forecast":
    found = lora_nb.preflight(config)
    a_step = (found.caching + found.training) / found.steps
    print(json.dumps([found.seconds, a_step, found.peak_memory]))
else:
    import lora_nb.trainer, lora_nb.inference  # what a process loads once is not in a forecast
    began = time.perf_counter()
    steps = [step.seconds for step in lora_nb.with_samples(lora_nb.train(config))]
    seconds = time.perf_counter() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, sum(steps) / len(steps), peak]))
"""


@pytest.mark.long
def test_the_embedded_base_trains_as_forecast_within_15_percent(tmp_path):
    """Forecast and run in processes of their own, on one thread; prints both."""
    config = lora_nb.env.preset("tiny").config(
        "forecast",
        max_train_steps=60,
        output_dir=str(tmp_path / "run"),
        validation_prompts=("red apple, noto style",),
        num_validation_images=2,
        validation_steps=30,
    )
    found = {}
    for what in ("forecast", "run"):
        command = [sys.executable, "-c", REAL, what, config.to_json()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    for name, said, was in zip(
        ("seconds", "seconds per step", "peak bytes"), *found.values(), strict=True
    ):
        print(f"{name}: forecast {said:.4g}, run {was:.4g}, ratio {said / was:.3f}")
        assert 0.85 < said / was < 1.15, name
