"""What waits in the CPU's memory while training: the same training, with everything encoded before the first step."""

import json

import pytest
import torch

from lora_nb import adapters, offload
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import REGISTRY, load_family, network, tiny
from lora_nb.families.quantized import KINDS
from lora_nb.forecast import preflight
from lora_nb.forecast.ladder import ladder
from lora_nb.forecast.preflight import _can_wait
from lora_nb.forecast.trial import Measured, Micro
from lora_nb.inference import with_samples
from lora_nb.trainer import train

gpu = pytest.mark.gpu
VALIDATION = {
    "validation_prompts": ("a", "b"), "num_validation_images": 1, "validation_steps": 2, "num_inference_steps": 2,
}  # fmt: skip


@pytest.fixture
def offloaded(config):
    return config.replace(offload=True, output_dir=config.output_dir + "-offloaded")


def calls(training, monkeypatch):
    """How often a training's family encodes pictures and captions, counted from now on."""
    counts = {"pictures": 0, "captions": 0}
    family = training.family
    for name, what in (("moments", "pictures"), ("text_states", "captions")):
        method = getattr(family, name)

        def counting(*args, method=method, what=what):
            counts[what] += 1
            return method(*args)

        monkeypatch.setattr(family, name, counting)
    return counts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"random_flip": True},
        {"random_crops": 3, "center_crop": False},
        {"caption_dropout": 0.5},
    ],
    ids=str,
)
def test_everything_is_encoded_before_the_first_step(config, offloaded, changes, monkeypatch):
    """And the steps, which then encode nothing, are those of a run that encodes as it goes."""
    longer = {"max_train_steps": 12, "cache_to_disk": False, **changes}
    plain = train(config.replace(**longer))
    losses = [step.loss for step in plain]
    training = train(offloaded.replace(**longer))
    counts = calls(training, monkeypatch)
    steps = iter(training)
    found = [next(steps).loss]
    before = dict(counts)
    assert before["pictures"] >= 8
    found += [step.loss for step in steps]
    assert counts == before
    assert found == losses
    for key, value in adapters.state(plain.family)["unet"].items():
        assert torch.equal(value, adapters.state(training.family)["unet"][key])


def test_a_run_goes_on_with_and_without(config, offloaded):
    config = config.replace(max_train_steps=6)
    whole = [step.loss for step in train(config)]
    halves = []
    for part in (offloaded, offloaded.replace(offload=False)):
        for step in train(part.replace(max_train_steps=6)):
            halves.append(step.loss)
            if step.step == 3:
                break
    assert halves == whole


def test_class_pictures_are_encoded_first_too(offloaded, tmp_path, monkeypatch):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (16, 16), (10, 60 * i, 30)).save(tmp_path / f"{i}.png")
    config = offloaded.replace(
        with_prior_preservation=True, class_data_dir=str(tmp_path), class_prompt="a thing", num_class_images=4,
        max_train_steps=6, cache_to_disk=False,
    )  # fmt: skip
    training = train(config)
    counts = calls(training, monkeypatch)
    steps = iter(training)
    next(steps)
    before = dict(counts)
    list(steps)
    assert counts == before


def test_an_interrupt_while_encoding_ends_before_the_first_step(offloaded, monkeypatch):
    training = train(offloaded.replace(cache_to_disk=False))
    counts = calls(training, monkeypatch)
    moments = training.family.moments

    def interrupted(pixels):
        training._ask(2)
        return moments(pixels)

    monkeypatch.setattr(training.family, "moments", interrupted)
    assert list(training) == []
    assert counts["pictures"] == 3  # one, and the two held-out ones of the probe
    assert training.interrupted


def test_what_every_step_needs_cannot_wait(config, offloaded):
    parts = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2)}
    with pytest.raises(
        ConfigError, match="the text encoders out of the GPU's memory, but they train"
    ):
        train(offloaded.replace(lora=parts))
    with pytest.raises(ConfigError, match="8 pictures are encoded anew whenever"):
        train(offloaded.replace(cache_latents=False))


@pytest.mark.parametrize("name", list(REGISTRY))
def test_all_but_the_network_waits_in_every_family(name, tmp_path):
    family = load_family(name, str(tiny.build(name, tmp_path)))
    found = offload.waiting(family)
    assert found
    assert network(family) not in found
    inside = {id(m) for module in found for m in module.modules()}
    assert not inside & {id(m) for m in network(family).modules()}


def test_hooks_are_gone_in_the_next_training(config, offloaded):
    first = train(offloaded)
    list(first)
    assert all(hasattr(module, "_hf_hook") for module in first.offload.waiting)
    list(train(config, first.family))
    assert not any(hasattr(module, "_hf_hook") for module in first.offload.waiting)


def test_a_forecast_knows_it_and_gives_the_base_back_whole(offloaded, tiny_sd):
    family = load_family("sd", str(tiny_sd))
    found = preflight(offloaded.replace(probe_size=2, **VALIDATION), family)
    assert found.seconds > 0
    assert not any(hasattr(module, "_hf_hook") for module in offload.waiting(family))


def test_the_ladder_names_it_where_it_would_help(config, tiny_sd):
    """On a GPU, with the bytes of all but the network."""
    training = train(config)
    others = sum(
        p.numel() * p.element_size()
        for module in (training.family.vae, training.family.text_encoder)
        for p in module.parameters()
    )
    assert _can_wait(training) == others
    both = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2)}
    assert _can_wait(train(config.replace(lora=both, overwrite=True))) == 0
    one = Micro(1, 0.1, 1000)
    measured = Measured(
        0, 0, 0, one, Micro(1, 0.1, 1000), [], 0.1, 0, 0, (0, 0), 0, {}, dict.fromkeys(KINDS, 0)
    )
    family = load_family("sd", str(tiny_sd), dtype=torch.bfloat16)
    rungs = {}
    for place in ("cpu", "cuda"):
        family.device = torch.device(place)
        asked = config.replace(train_batch_size=1, use_8bit_adam=True)
        found = ladder(asked, measured, 500, 0, 10**9, family, can_wait=300)
        rungs[place] = {rung.name: rung for rung in found}
    assert "encoders elsewhere" not in rungs["cpu"]
    rung = rungs["cuda"]["encoders elsewhere"]
    assert (rung.memory, rung.changes) == (700, {"offload": True})


# on a GPU


def places(training):
    return {module: next(module.parameters()).device.type for module in training.offload.waiting}


@gpu
def test_encoders_are_off_the_gpu_in_every_step_and_the_result_is_the_same(config, offloaded):
    config = config.replace(max_train_steps=6, cuda_graph=False, cache_to_disk=False)
    plain = [step.loss for step in train(config)]
    training = train(offloaded.replace(max_train_steps=6, cuda_graph=False, cache_to_disk=False))
    assert set(places(training).values()) == {"cpu"}
    assert next(network(training.family).parameters()).device.type == "cuda"
    found, inside = [], []
    replaced = training.gradients.of_step
    training.gradients.of_step = lambda done: (inside.append(places(training)), replaced(done))[1]
    for step in training:
        found.append(step.loss)
    assert {place for each in inside for place in each.values()} == {"cpu"}
    assert found == pytest.approx(plain, rel=1e-5)


@gpu
@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_family_trains_and_draws_with_its_encoders_away(name, offloaded, tmp_path):
    base = str(tiny.build(name, tmp_path / "base"))
    changes = {"pretrained_model_name_or_path": base, "family": name, "max_train_steps": 4}
    config = offloaded.replace(**changes, **VALIDATION)
    training = train(config)
    # A warning, such as that a step could not be captured as a graph, would be an error here.
    assert [step.step for step in with_samples(training)] == [1, 2, 3, 4]
    events = [json.loads(line) for line in (training.folder / "history.jsonl").open()]
    assert len([event for event in events if event["event"] == "samples"]) == 3


@gpu
def test_graphs_with_samples_between_steps_are_not_disturbed(config, offloaded):
    config = config.replace(max_train_steps=8, learning_rate=1e-3)
    plain = [step.loss for step in train(config)]
    training = train(offloaded.replace(max_train_steps=8, learning_rate=1e-3, **VALIDATION))
    found = [step.loss for step in with_samples(training)]
    assert training.graphed.captured
    assert found == pytest.approx(plain, rel=1e-4)
