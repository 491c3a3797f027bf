"""Pictures depend on prompt and seed alone; a LoRA file is used whole or refused with nothing changed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_nb import adapters, inference
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, FormatError, ModelError, NumericsError
from lora_nb.families import load_family, tiny, widened
from lora_nb.formats import save_adapter
from lora_nb.inference import attach, drawing, watching
from lora_nb.run_folder import read_history
from lora_nb.trainer import train

LORA = {"unet": LoraSpec(rank=2, lora_alpha=8), "text_encoder": LoraSpec(rank=3, lora_alpha=1)}
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return tiny.build("sd", tmp_path_factory.mktemp("base"), prediction_type="v_prediction")


def trained(model: Path, lora: dict[str, LoraSpec] = LORA, strength: float = 0.05):
    """A family with an adapter whose B is not zero, as if it had been trained.

    Not too strong: random networks amplify rounding, and a stronger adapter makes them chaotic.
    """
    family = load_family("auto", str(model))
    adapters.add(family, lora)
    generator = torch.Generator().manual_seed(7)
    for module in family.trainable.values():
        for _, layer in adapters.layers(module):
            weight = layer.lora_B["default"].weight
            weight.data = strength * torch.randn(weight.shape, generator=generator)
    return family


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    return Path(save_adapter(trained(base), tmp_path_factory.mktemp("adapter")))


@pytest.fixture
def pipeline(base):
    return inference.load_pipeline(base)


def pixels(pipeline, prompts=("a fox", "an apple", "a house"), seeds=(1, 2, 3), **changes):
    settings = {"batch_size": 8, "resolution": None, "scale": None, "guidance_rescale": 0.0}
    return drawing._pixels(pipeline, prompts, seeds, **(SAMPLING | settings | changes))


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{key}": value.clone()
        for i, module in enumerate(attach.modules(pipeline))
        for key, value in module.state_dict().items()
    }


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def rewrite(
    file: Path, folder: Path, change, name: str = "pytorch_lora_weights.safetensors"
) -> Path:
    """A copy of a LoRA file with its tensors changed and its metadata kept."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), folder / name, metadata=metadata)
    return folder / name


# Generation


def test_batch_equals_one_by_one(pipeline):
    together = pixels(pipeline)
    alone = np.concatenate(
        [
            pixels(pipeline, p, s)
            for p, s in zip(("a fox", "an apple", "a house"), (1, 2, 3), strict=True)
        ]
    )
    assert together.shape == (3, 16, 16, 3)  # the model's own size: 8 latents at a factor of 2
    assert np.abs(together - alone).max() < 1e-4
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_several_prompts_are_drawn_by_a_pipeline_that_takes_one(tmp_path):
    """Würstchen's second stage takes all pictures of a batch for those of one prompt, and fails with two."""
    pipeline = load_family("wuerstchen", str(tiny.build("wuerstchen", tmp_path))).pipeline()
    draw = {"num_inference_steps": 2, "resolution": 128}
    both = inference.generate(pipeline, ["a cat", "a dog"], [1, 2], **draw)
    alone = [inference.generate(pipeline, p, s, **draw)[0] for p, s in (("a cat", 1), ("a dog", 2))]
    assert both == alone


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_batch_equals_one_by_one_with_noise_in_every_step(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading"
    )
    together, alone = (pixels(pipeline, batch_size=size) for size in (3, 1))
    assert np.abs(together - alone).max() < 1e-4


def test_picture_depends_on_its_own_prompt_and_seed_only(pipeline):
    first = pixels(pipeline, ["a fox", "an apple"], [5, 6])[0]
    other = pixels(pipeline, ["a tree", "a car", "a fox"], [1, 2, 5], batch_size=2)[2]
    assert np.abs(first - other).max() < 1e-4


def test_prompts_and_seeds_are_broadcast(pipeline):
    assert len(inference.generate(pipeline, "a fox", [1, 2, 3], **SAMPLING)) == 3
    assert len(inference.generate(pipeline, ["a fox", "a car"], 4, **SAMPLING)) == 2
    with pytest.raises(ConfigError, match="2 prompts and 3 seeds"):
        inference.generate(pipeline, ["a", "b"], [1, 2, 3], **SAMPLING)


def test_resolution_and_rescale_reach_the_pipeline(pipeline):
    assert inference.generate(pipeline, "a fox", 1, **SAMPLING, resolution=32)[0].size == (32, 32)
    plain, rescaled = (pixels(pipeline, "a fox", 1, guidance_rescale=r) for r in (0.0, 0.7))
    assert np.abs(plain - rescaled).max() > 1e-4


def test_global_random_state_does_not_matter_and_is_not_used(pipeline):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = pixels(pipeline)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert np.array_equal(first, pixels(pipeline))


def test_half_precision_network_beside_float32_decoder(base):
    pipeline = inference.load_pipeline(base, dtype=torch.bfloat16)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    assert np.abs(pixels(pipeline) - pixels(inference.load_pipeline(base))).mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_that_knows_it_decodes_latents_of_bfloat16_in_it(base, monkeypatch, dtype):
    """And only those; what that changes is far less than what a denoiser in bfloat16 does."""
    pipeline, seen, drawn = inference.load_pipeline(base, dtype=dtype), [], []
    pipeline.vae.decoder.conv_out.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    for supported in (False, True):
        monkeypatch.setattr(widened, "SUPPORTED", supported)
        drawn.append(pixels(pipeline))
    assert seen == [torch.float32, dtype]
    difference = np.abs(drawn[0] - drawn[1])
    assert difference.max() < 0.03
    assert (difference.mean() > 0) == (dtype == torch.bfloat16)


def test_not_finite_is_refused(pipeline):
    pipeline.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        inference.generate(pipeline, "a fox", 1, **SAMPLING)


def test_missing_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json"):
        inference.load_pipeline(tmp_path)


# Adapters


def test_loaded_adapter_draws_what_was_trained(base, adapter):
    """Alpha differs from rank in both parts, so a lost alpha would show."""
    expected = pixels(trained(base).pipeline())
    for path in (adapter, adapter.parent):
        assert np.abs(pixels(inference.load_pipeline(base, path)) - expected).max() < 1e-6
    assert np.abs(pixels(inference.load_pipeline(base)) - expected).max() > 1e-2


def test_other_readers_see_the_same_adapter(base, adapter):
    """diffusers' own loader, and a Kohya file with its alphas, give the same pictures as ours."""
    expected = pixels(inference.load_pipeline(base, adapter))
    theirs = inference.load_pipeline(base)
    theirs.load_lora_weights(adapter.parent, weight_name=adapter.name)
    assert np.abs(pixels(theirs) - expected).max() < 1e-6


def kohya(file: Path, folder: Path) -> Path:
    """The file as sd-scripts would write it: underscored names and an alpha for each layer."""
    alphas = {"unet": 8.0, "text_encoder": 1.0}
    out = {}
    for key, tensor in load_file(file).items():
        part, _, rest = key.partition(".")
        name, _, kind = rest.partition(".lora")
        level = "text_model." if part == "text_encoder" else ""
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + (level + name).replace(
            ".", "_"
        )
        out[stem + (".lora_down.weight" if "down" in kind else ".lora_up.weight")] = tensor
        out[stem + ".alpha"] = torch.tensor(alphas[part])
    save_file(out, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def test_kohya_file_keeps_its_alphas(base, adapter, tmp_path):
    expected = pixels(inference.load_pipeline(base, adapter))
    pipeline = inference.load_pipeline(base, kohya(adapter, tmp_path))
    assert np.abs(pixels(pipeline) - expected).max() < 1e-6


def test_every_tensor_is_counted(pipeline, adapter):
    taken = inference.use_adapter(pipeline, adapter)
    assert sum(taken.values()) == len(load_file(adapter))
    assert set(taken) == {"unet", "text_encoder"}


def test_scale_zero_is_the_base_and_a_scale_argument_is_for_one_call(pipeline, adapter):
    before = pixels(pipeline)
    inference.use_adapter(pipeline, adapter)
    full = pixels(pipeline)
    assert np.array_equal(pixels(pipeline, scale=0.0), before)
    assert np.array_equal(pixels(pipeline), full)
    inference.set_scale(pipeline, 0.5)
    half = pixels(pipeline)
    assert np.array_equal(pixels(pipeline, scale={"default": 1.0}), full)
    assert np.array_equal(pixels(pipeline), half)


def test_scale_without_adapter_or_of_unknown_name(pipeline, adapter):
    with pytest.raises(ConfigError, match="no adapter at all"):
        inference.set_scale(pipeline, 1.0)
    inference.use_adapter(pipeline, adapter)
    with pytest.raises(ConfigError, match="no adapter ink on this pipeline; it has default"):
        inference.set_scale(pipeline, {"ink": 1.0})


def test_two_adapters_add_up_and_leave_one_by_one(base, pipeline, adapter):
    """Twice the same file at one half each is the file at one."""
    plain, untouched = pixels(pipeline), weights(pipeline)
    inference.use_adapter(pipeline, adapter, name="a", scale=0.5)
    half = pixels(pipeline)
    inference.use_adapter(pipeline, adapter, name="b", scale=0.5)
    assert inference.adapter_names(pipeline) == ["a", "b"]
    assert np.abs(pixels(pipeline) - pixels(inference.load_pipeline(base, adapter))).max() < 1e-4
    inference.remove_adapter(pipeline, "b")
    assert np.array_equal(pixels(pipeline), half)
    inference.remove_adapter(pipeline)
    assert np.array_equal(pixels(pipeline), plain)
    assert_same_weights(weights(pipeline), untouched)


def test_loading_twice_replaces(pipeline, adapter):
    inference.use_adapter(pipeline, adapter)
    once = pixels(pipeline)
    inference.use_adapter(pipeline, adapter)
    assert inference.adapter_names(pipeline) == ["default"]
    assert np.array_equal(pixels(pipeline), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_draws_the_same_and_is_undone_bit_for_bit(base, adapter, dtype):
    pipeline = inference.load_pipeline(base, adapter, scale=0.7, dtype=dtype)
    before, apart = weights(pipeline), pixels(pipeline)
    with inference.fused(pipeline):
        assert all(layer.merged for layer in attach.layers(pipeline))
        merged = pixels(pipeline)
    assert np.abs(merged - apart).max() < (1e-4 if dtype == torch.float32 else 0.2)
    assert_same_weights(weights(pipeline), before)
    assert not any(layer.merged for layer in attach.layers(pipeline))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_small_adapters_are_not_rounded_away(base, adapter, dtype, digits):
    """On average the sums are kept; rounded to the nearer number, four of five would be the base's own."""
    pipeline = inference.load_pipeline(base, adapter, dtype=dtype)
    layers = attach.layers(pipeline)
    bases = [layer.get_base_layer().weight for layer in layers]
    before = [weight.detach().clone() for weight in bases]
    inference.set_scale(pipeline, 0.1 * 2.0**-digits)
    added = [layer.get_delta_weight("default").detach().float() for layer in layers]
    with inference.fused(pipeline):
        merged = [weight.detach().clone() for weight in bases]
    with inference.fused(pipeline):  # the same pictures every time
        assert all(map(torch.equal, merged, bases))
    inference.set_scale(pipeline, 0.0)
    with inference.fused(pipeline):  # what half precision can hold stays as it is
        assert all(map(torch.equal, before, bases))
    base, now, sums = (
        torch.cat([each.flatten().float() for each in several])
        for several in (before, merged, map(torch.add, map(torch.Tensor.float, before), added))
    )
    step = 2.0 ** (sums.abs().log2().floor() + 1 - digits)
    assert (sums.to(dtype).float() == base).float().mean() > 0.8
    assert ((now - sums).abs() <= step).all()
    # In units of a step, what is left over has a mean of 0 and a variance of f (1 - f), of the fraction f of the sum.
    fraction = (sums / step).remainder(1)
    variance = (fraction * (1 - fraction)).sum()
    assert abs(((now - sums) / step).sum()) < 4 * variance.sqrt()
    assert ((now - sums) / step).square().sum() == pytest.approx(float(variance), rel=0.1)


def test_fused_is_undone_after_an_error(pipeline, adapter):
    inference.use_adapter(pipeline, adapter)
    before = weights(pipeline)
    with pytest.raises(KeyboardInterrupt), inference.fused(pipeline):
        raise KeyboardInterrupt
    assert_same_weights(weights(pipeline), before)


def test_fused_is_undone_where_merging_is_interrupted(base, adapter, monkeypatch):
    pipeline = inference.load_pipeline(base, adapter, dtype=torch.bfloat16)
    before = weights(pipeline)
    monkeypatch.setattr(attach.layers(pipeline)[2], "merge", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), inference.fused(pipeline):
        pass
    assert_same_weights(weights(pipeline), before)


def test_scale_sweep_starts_at_the_base(pipeline, adapter):
    base_picture = inference.generate(pipeline, "a fox", [1, 2], **SAMPLING)
    inference.use_adapter(pipeline, adapter, scale=0.9)
    rows = inference.scale_sweep(pipeline, "a fox", [1, 2], [0.0, 1.0, 2.0], **SAMPLING)
    assert [len(row) for row in rows] == [2, 2, 2]
    assert [p.tobytes() for p in rows[0]] == [p.tobytes() for p in base_picture]
    assert rows[1][0].tobytes() != rows[2][0].tobytes()
    assert {
        layer.scaling["default"] for layer in adapters.layers(pipeline.unet) for layer in layer[1:]
    } == {0.9 * 4.0}


# Refusals: the sentence, and the pipeline as it was


def _renamed(state):
    return {key.replace("unet.", "transformer.", 1): value for key, value in state.items()}


def _deeper(state):
    return {key.replace("unet.", "unet.diffusion.", 1): value for key, value in state.items()}


def _only_a(state):
    return {key: value for key, value in state.items() if ".down." in key or "lora_A" in key}


def _half(state):
    layers = sorted({key.rsplit(".lora", 1)[0] for key in state})
    return {k: v for k, v in state.items() if k.rsplit(".lora", 1)[0] in layers[: len(layers) // 2]}


def _wider(state):
    return {
        k: torch.ones(v.shape[0], 24) if "attn2.to_k.lora.down" in k else v
        for k, v in state.items()
    }


def _nan(state):
    return state | {next(iter(state)): torch.full_like(next(iter(state.values())), float("nan"))}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_renamed, "no place for"),
        (_deeper, "no place for"),
        (_only_a, "A or B but not both"),
        (_half, "trained layers are not in it"),
        (_wider, "another base model: its unet"),
        (_nan, "not finite"),
        (lambda state: {}, "no tensors"),
    ],
)
@pytest.mark.parametrize("occupied", [False, True])
def test_refused_file_changes_nothing(pipeline, adapter, tmp_path, change, sentence, occupied):
    if occupied:
        inference.use_adapter(pipeline, adapter, scale=0.8)
    before, names = weights(pipeline), inference.adapter_names(pipeline)
    file = rewrite(adapter, tmp_path, change)
    with pytest.raises(FormatError, match=sentence):
        inference.use_adapter(pipeline, file)
    assert_same_weights(weights(pipeline), before)
    assert inference.adapter_names(pipeline) == names


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt", "pth", "safetensors"])
@pytest.mark.parametrize("protocol", ["pickle", "zip"])
def test_pickles_are_refused_unopened(pipeline, tmp_path, suffix, protocol):
    file, mark = tmp_path / f"adapter.{suffix}", tmp_path / "ran"
    if protocol == "pickle":
        file.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(Evil(mark), file)
    with pytest.raises(FormatError, match="is a pickle"):
        inference.use_adapter(pipeline, file)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"])
def test_damaged_files_are_refused(pipeline, tmp_path, content):
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(content)
    with pytest.raises(FormatError, match="safetensors"):
        inference.use_adapter(pipeline, file)


def test_missing_adapter_is_one_sentence(pipeline, tmp_path):
    with pytest.raises(FormatError, match="There is no LoRA file"):
        inference.use_adapter(pipeline, tmp_path)


def test_file_without_metadata_loads_with_alpha_equal_rank(base, tmp_path):
    """What other tools write: no metadata, so alpha is the rank; nothing tells which layers were trained."""
    lora = {"unet": LoraSpec(rank=2)}
    family = trained(base, lora)
    file = Path(save_adapter(family, tmp_path))
    save_file(load_file(file), tmp_path / "plain.safetensors")
    pipeline = inference.load_pipeline(base, tmp_path / "plain.safetensors")
    assert np.abs(pixels(pipeline) - pixels(family.pipeline())).max() < 1e-6


# Samples while training


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six training and four held-out pictures of noise, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("validation", 4)):
        (folder / split).mkdir()
        rows = []
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                folder / split / f"{i}.png"
            )
            rows.append(json.dumps({"file_name": f"{i}.png", "text": f"noise {i}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def config(base, pictures, tmp_path) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path=str(base),
        lora={"unet": LoraSpec(rank=2, lora_dropout=0.5), "text_encoder": LoraSpec(rank=2)},
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        output_dir=str(tmp_path / "run"),
        seed=11,
        train_batch_size=2,
        max_train_steps=5,
        learning_rate=2e-3,
        validation_prompts=("a fox", "a car"),
        num_validation_images=2,
        validation_steps=2,
        num_inference_steps=2,
        guidance_scale=3.0,
    )


def test_samples_are_drawn_and_labelled(config):
    training = train(config)
    assert [step.step for step in inference.with_samples(training)] == [1, 2, 3, 4, 5]
    found = inference.samples(training.folder)
    assert list(found) == ["base", "step 2", "step 4", "step 5"]
    names = [f"step-000002-p{p}-s{s}.png" for p in (0, 1) for s in (0, 1)]
    assert [file.name for file in found["step 2"]] == names
    lines = [event for event in read_history(training.folder) if event["event"] == "samples"]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert [line["base"] for line in lines] == [True, False, False, False]
    assert all((training.folder / name).is_file() for line in lines for name in line["files"])


def test_base_sample_is_the_base_and_the_last_is_the_saved_adapter(config, base):
    training = train(config)
    list(inference.with_samples(training))
    drawn, found = [], []
    for name, adapter in (("base-p1-s1", None), ("step-000005-p1-s1", training.folder)):
        pipeline = inference.load_pipeline(base, adapter)
        drawn.append(np.asarray(inference.generate(pipeline, "a car", 12, 2, 3.0)[0], dtype=int))
        found.append(np.asarray(Image.open(training.folder / "samples" / f"{name}.png"), dtype=int))
    effect = np.abs(drawn[0] - drawn[1]).mean()
    assert effect > 1
    assert [np.abs(a - b).mean() < 0.1 * effect for a, b in zip(drawn, found, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_samples_are_drawn_with_the_adapter_merged(config, monkeypatch, precision):
    """Into convolutions too, and they are what it draws beside the weights."""
    lora = {"unet": LoraSpec(rank=2, target_modules=("to_q", "to_v", "conv1"))}
    training = train(config.replace(mixed_precision=precision, max_train_steps=1, lora=lora))
    list(training)
    with torch.no_grad():
        for weight in training.learner.all_weights():
            weight.add_(0.05)
    merged, draw = [], watching.generate
    monkeypatch.setattr(
        watching,
        "generate",
        lambda *a, **k: merged.extend(m.merged for m in attach.layers(a[0])) or draw(*a, **k),
    )
    files = watching.draw_samples(training, "merged", 1)
    assert merged
    assert all(merged)
    pipeline = training.family.pipeline()
    prompts, seeds = ["a fox", "a fox", "a car", "a car"], [11, 12, 11, 12]
    apart, none = (
        draw(pipeline, prompts, seeds, **training.config.sampling, scale=scale) for scale in (1, 0)
    )
    effect, error = (
        np.mean(
            [
                np.abs(np.subtract(a, b, dtype=float)).mean()
                for a, b in zip(apart, other, strict=True)
            ]
        )
        for other in (none, [Image.open(file) for file in files])
    )
    assert effect > 1
    assert error < 0.1 * effect, (error, effect)


def test_samples_do_not_change_the_training(config, tmp_path):
    """Dropout and both parts on: the trained weights are bit for bit those of a run without samples."""
    plain = train(config.replace(output_dir=str(tmp_path / "plain")))
    losses = [step.loss for step in plain]
    training = train(config)
    assert [step.loss for step in inference.with_samples(training)] == losses
    for part, state in adapters.state(plain.family).items():
        assert_same_weights(state, adapters.state(training.family)[part])


def test_modes_random_state_and_adapters_are_left_as_they_were(config):
    """Also in the middle of a step, where the network is in training mode."""
    training = train(config)
    next(iter(training))
    training.family.unet.train()
    before, state = weights(training.family.pipeline()), torch.get_rng_state()
    watching.draw_samples(training, "step-000001", 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in training.family.unet.modules())
    assert not any(module.training for module in training.family.text_encoder.modules())
    for _, layer in adapters.layers(training.family.unet):
        assert not layer.merged
        assert not layer.disable_adapters
    assert_same_weights(weights(training.family.pipeline()), before)
    assert (
        sum(p.numel() for group in adapters.parameters(training.family).values() for p in group) > 0
    )


def test_stopping_early_leaves_a_run_that_goes_on(config):
    steps = inference.with_samples(train(config))
    next(steps)
    steps.close()
    again = train(config)
    assert again.start_step == 1
    assert [step.step for step in inference.with_samples(again)] == [2, 3, 4, 5]


@pytest.mark.parametrize("last", [2, 3, 5])
def test_a_run_that_goes_on_draws_what_is_missing_and_nothing_twice(config, last):
    """At step 3 none are due; those of steps 2 and 5 are taken away, as by a kill while they were drawn."""
    config = config.replace(checkpointing_steps=1)
    for step in inference.with_samples(train(config)):
        if step.step == last:
            break
    lines = (Path(config.output_dir) / "history.jsonl").read_text().splitlines()
    lost = [line for line in lines if f'"samples", "step": {last},' not in line]
    (Path(config.output_dir) / "history.jsonl").write_text("\n".join(lost) + "\n")
    list(inference.with_samples(train(config)))
    events = [e for e in read_history(config.output_dir) if e["event"] == "samples"]
    assert [event["step"] for event in events] == [0, 2, 4, 5]


def test_no_prompts_no_pictures(config):
    training = train(config.replace(validation_prompts=()))
    assert len(list(inference.with_samples(training))) == 5
    assert inference.samples(training.folder) == {}
