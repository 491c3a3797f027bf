"""The contract that every registered family keeps; a new family is tested by being registered."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_nb import adapters, data, formats
from lora_nb.cache import Cache
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, ModelError
from lora_nb.families import REGISTRY, guess, load_family, tiny
from lora_nb.loss import diffusion_loss
from lora_nb.objectives import FlowMatching
from lora_nb.trainer import train

PREDICTION_TYPES = {
    "sd": ("epsilon", "v_prediction"),
    "sdxl": ("epsilon",),
    "sd3": ("flow",),
    "flux": ("flow",),
    "z_image": ("flow",),
    "kandinsky_decoder": ("epsilon",),
    "kandinsky_prior": ("sample",),
    "wuerstchen": ("epsilon",),
}
UNREACHED = {
    # SDXL reads its first encoder one layer before the end. The reference adapts the last layer all the same.
    ("sdxl", "text_encoder"): "layers.1.",
    # The last block of SD3 drops its text tokens, so nothing reads what they ask for.
    ("sd3", "transformer"): "transformer_blocks.1.attn.add_q_proj.",
}
# What diffusers loads a file with, where the pipeline itself has no loader.
LOADERS = {
    "kandinsky_decoder": lambda pipe: partial(pipe.unet.load_lora_adapter, prefix=None),
    "kandinsky_prior": lambda pipe: partial(pipe.prior_prior.load_lora_adapter, prefix=None),
    "wuerstchen": lambda pipe: pipe.prior_pipe.load_lora_weights,
}
SIDES = {"wuerstchen": 128}  # of a sample; the second stage multiplies by fixed factors
CASES = [(name, kind) for name in REGISTRY for kind in PREDICTION_TYPES[name]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request, tmp_path_factory) -> tuple[str, Path]:
    name, kind = request.param
    return name, tiny.build(name, tmp_path_factory.mktemp(name), prediction_type=kind)


@pytest.fixture
def family(model):
    return load_family(model[0], str(model[1]))


@pytest.fixture
def spec(pictures):
    return DataSpec(train_data_dir=str(pictures), resolution=16)


def everything(family, rank=4, alpha=2.0):
    return {part: LoraSpec(rank=rank, lora_alpha=alpha) for part in family.trainable}


def batch_of(family, spec, positions=(0, 1, 2), **options):
    return Cache(family, data.load(spec, "train"), spec, seed=5, **options).batch(list(positions))


def config_of(model, spec, folder, **changes):
    first, *others = REGISTRY[model[0]].targets
    slower = LoraSpec(rank=3, lora_alpha=6.0, learning_rate=2e-3)
    lora = {first: LoraSpec(rank=2)} | dict.fromkeys(others, slower)
    settings = {
        "pretrained_model_name_or_path": str(model[1]), "data": spec, "lora": lora, "seed": 1,
        "output_dir": str(folder), "train_batch_size": 2, "max_train_steps": 6, "learning_rate": 1e-2,
        "lr_warmup_steps": 0, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "checkpointing_steps": 100,
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def test_no_family_of_the_guide_is_missing():
    guide = {"sd", "sdxl", "kandinsky_decoder", "kandinsky_prior", "wuerstchen"}
    assert (
        guide | {"sd3", "flux", "z_image"}
        <= set(REGISTRY)
        == set(PREDICTION_TYPES)
        == set(tiny.BUILDERS)
    )


def test_the_index_names_the_family(model):
    assert guess(str(model[1])) == model[0]


def test_shapes(family, spec):
    batch = batch_of(family, spec, captions=False)
    x0 = family.latents(batch)
    assert x0.dtype == torch.float32
    assert not x0.requires_grad
    t = family.objective.sample_t(torch.tensor([0.0, 0.01, 0.9999]))
    assert family.predict(x0, t, family.condition(batch)).shape == x0.shape
    pixels = family.decode(x0)  # None where x0 is no picture
    assert pixels is None or pixels.shape == (3, 3, 16, 16)
    assert (pixels is None) == (family.name in ("kandinsky_prior", "wuerstchen"))


def test_everything_is_frozen_after_loading(family):
    assert adapters.parameters(family) == {}
    modules = [part for part in vars(family).values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 2
    for module in modules:
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_a_fresh_adapter_changes_nothing(family, spec):
    batch = batch_of(family, spec, captions=False)
    before = diffusion_loss(family, batch)
    adapters.add(family, everything(family))
    assert torch.equal(diffusion_loss(family, batch).per_image, before.per_image)


def test_every_trainable_tensor_gets_a_gradient(family, spec):
    adapters.add(family, everything(family))
    for weights in adapters.parameters(family).values():
        for weight in weights:
            weight.data += 0.01  # with B = 0 the gradient of A is zero
    diffusion_loss(family, batch_of(family, spec, captions=False)).loss.backward()
    for part, module in family.trainable.items():
        for name, weight in module.named_parameters():
            if weight.requires_grad and UNREACHED.get((family.name, part), "no layer") not in name:
                assert weight.grad is not None, (part, name)
                assert weight.grad.abs().max() > 0, (part, name)


def test_gradient_checkpointing_gives_the_same_gradients(model, family, spec):
    other = load_family(model[0], str(model[1]))
    other.enable_gradient_checkpointing()
    grads = []
    for each in (family, other):
        adapters.add(each, everything(each), seed=1)
        for module in each.trainable.values():
            module.train()
        for weights in adapters.parameters(each).values():
            for weight in weights:
                weight.data += 0.01
        batch = batch_of(each, spec, captions=False)
        torch.manual_seed(0)  # some networks have dropout
        diffusion_loss(each, batch).loss.backward()
        grads.append(
            [
                w.grad
                for weights in adapters.parameters(each).values()
                for w in weights
                if w.grad is not None
            ]
        )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_one_batch_can_be_overfitted(family, spec):
    adapters.add(family, everything(family, rank=8, alpha=8.0))
    batch = batch_of(family, spec, captions=False)
    weights = [w for group in adapters.parameters(family).values() for w in group]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    first = diffusion_loss(family, batch).loss.item()
    for _ in range(60):
        loss = diffusion_loss(family, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


@pytest.mark.parametrize("flip", [False, True])
def test_cached_equals_uncached(family, spec, flip):
    spec = DataSpec(**{**vars(spec), "random_flip": flip, "caption_dropout": 0.3})
    cached = Cache(family, data.load(spec), spec, seed=5)
    plain = Cache(family, data.load(spec), spec, seed=5, latents=False, captions=False)
    for start in (0, 4, 8, 4):
        positions = [start, start + 1, start + 2, start + 3]
        a, b = (diffusion_loss(family, c.batch(positions)) for c in (cached, plain))
        assert torch.allclose(a.per_image, b.per_image, atol=1e-5)
        assert torch.equal(a.timesteps, b.timesteps)
    assert torch.equal(
        cached.batch([0, 1]).moments[0], plain.batch([0, 1]).moments[0]
    )  # bit for bit


def test_the_loss_is_a_pure_function_of_the_batch(family, spec):
    batch = batch_of(family, spec)
    first = diffusion_loss(family, batch, noise_offset=0.1)
    torch.rand(7)
    again = diffusion_loss(family, batch, noise_offset=0.1)
    assert torch.equal(first.per_image, again.per_image)
    assert not torch.equal(first.per_image, diffusion_loss(family, batch).per_image)


def test_min_snr_weighs_each_picture(model, spec):
    if isinstance(load_family(model[0], str(model[1])).objective, FlowMatching):
        with pytest.raises(ConfigError, match="snr_gamma"):
            load_family(model[0], str(model[1]), snr_gamma=0.5)
        return
    family = load_family(model[0], str(model[1]), snr_gamma=0.05)
    result = diffusion_loss(family, batch_of(family, spec))
    expected = (result.per_image * family.objective.weight(result.timesteps)).mean()
    assert torch.allclose(result.loss, expected)
    assert not torch.allclose(result.loss, result.per_image.mean())


def test_text_encoders_are_all_that_the_family_trains(family):
    main, *texts = family.targets
    lora = {"unet": LoraSpec(), "text_encoders": LoraSpec(rank=2)}
    if texts:
        expected = {main: LoraSpec()} | dict.fromkeys(texts, LoraSpec(rank=2))
        assert adapters.named(family, lora) == expected
        with pytest.raises(ConfigError, match="names 'text_encoder' twice"):
            adapters.named(family, {"text_encoder": LoraSpec()} | lora)
    else:
        with pytest.raises(ConfigError, match="has none that can be trained"):
            adapters.named(family, lora)


FLOW = {
    "weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 0.7, "precondition_outputs": 1
}  # fmt: skip


def test_settings_of_flow_matching_reach_it_or_are_refused(model, spec, tmp_path):
    own = {"max_sequence_length": 5}
    if model[0] == "flux":
        own["training_guidance_scale"] = 1.5
    config = config_of(model, spec, tmp_path, **FLOW, **own)
    if model[0] not in ("sd3", "flux", "z_image"):
        with pytest.raises(ConfigError, match="no use for weighting_scheme, logit_mean, logit_std"):
            train(config)
        return
    family = train(config).family
    assert {name: getattr(family.objective, name) for name in FLOW} == FLOW
    assert family.t5_tokens == 5
    if model[0] == "flux":
        assert family.training_guidance_scale == 1.5
    else:
        with pytest.raises(ConfigError, match="no use for training_guidance_scale"):
            load_family("auto", str(model[1]), training_guidance_scale=2.0)
    plain = load_family("auto", str(model[1])).objective
    assert (plain.logit_mean, plain.logit_std, plain.mode_scale) == (0.0, 1.0, 1.29)


def test_another_autoencoder_takes_the_place_of_the_models(model, family, tmp_path):
    if not hasattr(family, "vae"):
        with pytest.raises(ConfigError, match="no use for vae"):
            load_family("auto", str(model[1]), vae=str(tmp_path))
        return
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own = family.moments(pixels)[0]
    for weight in family.vae.parameters():
        weight.data *= 1.1
    family.vae.save_pretrained(tmp_path)
    other = load_family("auto", str(model[1]), vae=str(tmp_path))
    assert torch.equal(other.moments(pixels)[0], family.moments(pixels)[0])
    assert not torch.allclose(other.moments(pixels)[0], own)


def test_training_lowers_the_probe_and_the_file_holds_all_of_it(model, spec, tmp_path):
    training = train(config_of(model, spec, tmp_path, max_train_steps=30))
    steps = list(training)
    assert steps[-1].probe.difference < 0
    pipeline = REGISTRY[model[0]].load(str(model[1])).pipeline()
    load = LOADERS.get(model[0], lambda pipe: pipe.load_lora_weights)(pipeline)
    load(str(tmp_path), weight_name=formats.FILE_NAME)
    for part, module in training.family.trainable.items():
        other = getattr(pipeline, part, None) or getattr(pipeline, f"prior_{part}")
        ours = dict(adapters.layers(module))
        theirs = dict(adapters.layers(other))
        assert ours.keys() == theirs.keys()
        for name in ours:
            change = ours[name].get_delta_weight("default")
            other_name = theirs[name].active_adapters[0]
            assert torch.allclose(change, theirs[name].get_delta_weight(other_name), atol=1e-7)
    side = SIDES.get(model[0], 16)
    sampling = {"num_inference_steps": 3, "output_type": "pt", "height": side, "width": side}
    ours, theirs, base = (
        p(prompt="colour 3", generator=torch.Generator().manual_seed(0), **sampling).images
        for p in (
            training.family.pipeline(),
            pipeline,
            REGISTRY[model[0]].load(str(model[1])).pipeline(),
        )
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-3)


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_resume_equals_uninterrupted(model, spec, tmp_path, stop_after):
    spec = DataSpec(**{**vars(spec), "random_flip": True, "caption_dropout": 0.3})
    straight = list(train(config_of(model, spec, tmp_path / "a")))
    for step in train(config_of(model, spec, tmp_path / "b")):
        if step.step == stop_after:
            break
    resumed = train(config_of(model, spec, tmp_path / "b"))
    assert resumed.start_step == stop_after
    rest = list(resumed)
    assert [s.loss for s in rest] == [s.loss for s in straight[stop_after:]]
    assert [s.timesteps for s in rest] == [s.timesteps for s in straight[stop_after:]]
    states = [formats_state(tmp_path / run / "checkpoint-6") for run in "ab"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def formats_state(folder):
    from lora_nb import checkpoint

    return checkpoint.read(folder).tensors


def test_a_bfloat16_base_keeps_float32_adapters_and_learns(model, spec, tmp_path):
    training = train(config_of(model, spec, tmp_path, mixed_precision="bf16", max_train_steps=8))
    before = adapters.state(training.family)
    steps = list(training)
    assert all(torch.isfinite(torch.tensor(s.loss)) for s in steps)
    after = adapters.state(training.family)
    moved = total = 0
    for part in before:
        assert all(w.dtype == torch.float32 for w in adapters.parameters(training.family)[part])
        unreached = UNREACHED.get((training.family.name, part), "no layer")
        for key in (key for key in before[part] if unreached not in key):
            moved += (before[part][key] != after[part][key]).sum().item()
            total += before[part][key].numel()
    assert moved > 0.99 * total


def test_a_folder_without_weights_is_refused(model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model[1], broken)
    first, *_ = REGISTRY[model[0]].targets
    for weights in (broken / first).glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match="incomplete"):
        load_family("auto", str(broken))


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_family("auto", str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    with pytest.raises(ModelError, match="AudioLDMPipeline"):
        load_family("auto", str(tmp_path))
    with pytest.raises(ModelError, match="no base model folder"):
        load_family("auto", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no family 'sdd'"):
        load_family("sdd", str(tmp_path))
