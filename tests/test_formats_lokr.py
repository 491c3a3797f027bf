"""LoKr files load to W + scale * kron(w1, w2); the product is written down here entry by entry, the files by hand."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoKrConfig, get_peft_model_state_dict
from peft.tuners.lokr import LoKrLayer
from safetensors.torch import load_file
from test_formats_reading import (
    ATTENTION,
    FLUX,
    UNET,
    assert_loads,
    kohya,
    predicted,
    two_of_each,
    write,
)
from test_formats_reading import drawn as drawn_lora

from lora_nb import formats, inference
from lora_nb.errors import ConfigError, FormatError
from lora_nb.families import Batch, load_family, tiny
from lora_nb.inference import attach

RANK, ALPHA = 3, 2.0
CONVOLUTIONS = ["down_blocks.0.resnets.0.conv1", "conv_in", "down_blocks.0.downsamplers.0.conv"]
FORMS = ("pieces", "whole", "both", "left", "core")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return two_of_each(tmp_path_factory)


def product(w1, w2):
    """Entry (o, i) is w1[o // k, i // n] * w2[o % k, i % n], for every place of the kernel."""
    (p, m), (k, n, *kernel) = w1.shape, w2.shape
    rows, columns = torch.arange(p * k), torch.arange(m * n)
    left = w1[rows // k][:, columns // n]
    return left.view(p * k, m * n, *[1] * len(kernel)) * w2[rows % k][:, columns % n]


def halves(number):
    """A factor of a number near its root, and the other."""
    small = max(d for d in range(1, number + 1) if number % d == 0 and d * d <= number)
    return small, number // small


def factors(shape, form, generator, rows=None, columns=None, rank=RANK):
    """The tensors of one layer, and kron(w1, w2) by hand.

    form: w2 in pieces, both whole, both in pieces, w1 alone in pieces, or w2 of a convolution with a core.
    """
    outputs, inputs, *kernel = shape
    (p, k), (m, n) = rows or halves(outputs), columns or halves(inputs)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    roles = {}
    if form in ("both", "left"):
        roles |= {"lokr_w1_a": draw(p, rank), "lokr_w1_b": draw(rank, m) / rank}
        w1 = roles["lokr_w1_a"] @ roles["lokr_w1_b"]
    else:
        w1 = roles["lokr_w1"] = draw(p, m)
    width = 0.3 / shape[1:].numel() ** 0.5
    if form in ("whole", "left"):
        w2 = roles["lokr_w2"] = draw(k, n, *kernel) * width
    elif form == "core" and kernel:
        roles["lokr_t2"] = draw(rank, rank, *kernel) * width / rank
        roles |= {"lokr_w2_a": draw(rank, k), "lokr_w2_b": draw(rank, n)}
        a, b, core = roles["lokr_w2_a"], roles["lokr_w2_b"], roles["lokr_t2"]
        w2 = sum(
            core[i, j] * (a[i][:, None] * b[j])[..., None, None]
            for i in range(rank)
            for j in range(rank)
        )
    else:
        roles["lokr_w2_a"] = draw(k, rank) * width
        roles["lokr_w2_b"] = draw(rank, n * torch.Size(kernel).numel())
        w2 = (roles["lokr_w2_a"] @ roles["lokr_w2_b"]).view(k, n, *kernel)
    return roles, product(w1, w2)


def shape_of(family, part, layer):
    state = dict(family.trainable[part].named_parameters())
    return state.get(f"{layer}.weight", state.get(f"text_model.{layer}.weight")).shape


def drawn(family, parts, forms=FORMS, seed=3):
    """{(part, layer): (tensors, product)}, the forms in turn."""
    generator = torch.Generator().manual_seed(seed)
    keys = [(part, layer) for part, layers in parts.items() for layer in layers]
    return {
        key: factors(shape_of(family, *key), forms[i % len(forms)], generator)
        for i, key in enumerate(keys)
    }


def layers_of(name):
    parts = {"unet": [*UNET[name][:5], *CONVOLUTIONS], "text_encoder": ATTENTION}
    return parts | ({"text_encoder_2": ATTENTION} if name == "sdxl" else {})


def scale_of(roles, alpha):
    """LyCORIS: alpha over the rank of what is in pieces, 1 if nothing is."""
    whole = {"lokr_w1", "lokr_w2"} <= roles.keys()
    return 1.0 if whole or alpha is None else alpha / RANK


def changes(layers, alpha=None):
    """{key: (A, B)} with B A the change, for assert_loads."""
    return {
        key: (scale_of(roles, alpha) * change, torch.eye(len(change)))
        for key, (roles, change) in layers.items()
    }


def lycoris(layers, name, alpha=None):
    """The names that LyCORIS has under sd-scripts: those of a Kohya LoRA with other endings."""
    stems = kohya({key: (torch.zeros(1), torch.zeros(1)) for key in layers}, name)
    stems = [s.removesuffix(".lora_down.weight") for s in stems if s.endswith("lora_down.weight")]
    out = {}
    for stem, (roles, _) in zip(stems, layers.values(), strict=True):
        out |= {f"{stem}.{role}": tensor for role, tensor in roles.items()}
        if alpha is not None:
            out[f"{stem}.alpha"] = torch.tensor(alpha)
    return out


def dotted(layers, before="{part}."):
    """The names that diffusers and peft have."""
    return {
        f"{before.format(part=part)}{layer}.{role}": tensor
        for (part, layer), (roles, _) in layers.items()
        for role, tensor in roles.items()
    }


# Loading


@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lycoris(models, tmp_path, name, alpha):
    """Network and text encoders, linear layers and convolutions, every form of the factors; alpha where it counts."""
    layers = drawn(models[name][0], layers_of(name))
    file = write(tmp_path, lycoris(layers, name, alpha))
    assert_loads(models, name, file, changes(layers, alpha))


def test_alpha_of_whole_factors_says_nothing(models, tmp_path):
    layers = drawn(models["sd"][0], {"unet": UNET["sd"]}, ("whole",))
    file = write(tmp_path, lycoris(layers, "sd", 64.0))
    assert_loads(models, "sd", file, changes(layers))


def test_lycoris_by_itself(models, tmp_path):
    """Without sd-scripts its names begin with lycoris_ and go on as in diffusers."""
    layers = drawn(models["sdxl"][0], {"unet": UNET["sdxl"]})
    tensors = {}
    for (_, layer), (roles, _) in layers.items():
        stem = f"lycoris_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.{role}": tensor for role, tensor in roles.items()}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    assert_loads(models, "sdxl", write(tmp_path, tensors), changes(layers, ALPHA))


def test_half_precision(models, tmp_path):
    """Factors of a half-precision file are used as float32 by a float32 base: no rounding but the file's."""
    layers = drawn(models["sd"][0], {"unet": UNET["sd"]}, ("pieces",))
    rounded = {}
    for key, (roles, change) in layers.items():
        roles = {role: tensor.half().float() for role, tensor in roles.items()}
        w2 = roles["lokr_w2_a"] @ roles["lokr_w2_b"]
        assert product(roles["lokr_w1"], w2).shape == change.shape
        rounded[key] = roles, product(roles["lokr_w1"], w2)
    tensors = {key: tensor.half() for key, tensor in lycoris(rounded, "sd", ALPHA).items()}
    assert_loads(models, "sd", write(tmp_path, tensors), changes(rounded, ALPHA))


@pytest.mark.parametrize("place", ["header", "folder", "nowhere"])
def test_peft_and_diffusers_keys(models, tmp_path, place):
    """peft's scale is alpha / rank, also where both factors are whole; without settings it is 1."""
    layers = drawn(models["sd"][0], {"unet": UNET["sd"]}, ("whole", "pieces"))
    config = {
        "peft_type": "LOKR",
        "r": RANK,
        "alpha": 6.0,
        "target_modules": UNET["sd"],
        "alpha_pattern": {"attn2.to_k": 1.5},
    }
    scale = lambda key: 0.5 if key[1].endswith("to_k") else 2.0  # noqa: E731
    if place == "folder":
        tensors = dotted(layers, "base_model.model.")
        file = write(tmp_path, tensors, name="adapter_model.safetensors").parent
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        prefixed = {f"unet.{name}": value for name, value in config.items()}
        header = {"lora_adapter_metadata": json.dumps(prefixed)}
        file = write(tmp_path, dotted(layers), header if place == "header" else None)
    if place == "nowhere":
        scale = lambda key: 1.0  # noqa: E731
    expected = {
        key: (scale(key) * change, torch.eye(len(change))) for key, (_, change) in layers.items()
    }
    assert_loads(models, "sd", file, expected)
    report = formats.inspect(file)
    found = {m.layer: m.scale for m in report.modules}
    assert found == pytest.approx({key[1]: scale(key) for key in layers})


@pytest.mark.parametrize("choices", [{}, {"decompose_both": True, "use_effective_conv2d": True}])
def test_what_peft_trains(models, tmp_path, choices):
    """A file of peft's own LoKr, with its own choice of factors, draws what peft drew."""
    family, fresh = models["sd"]
    targets = ["to_q", "conv1", "conv_in"]
    settings = {"r": 2, "alpha": 5, "rank_pattern": {"conv1": 3}, "decompose_factor": 4} | choices
    family.unet.add_adapter(LoKrConfig(target_modules=targets, **settings), adapter_name="default")
    generator = torch.Generator().manual_seed(1)
    for layer in family.unet.modules():
        if isinstance(layer, LoKrLayer):
            for name in LoKrLayer.adapter_layer_names:
                for weight in getattr(layer, name).values():
                    weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    expected, before = predicted(family), predicted(fresh)
    state = get_peft_model_state_dict(family.unet, adapter_name="default")
    stated = family.unet.peft_config["default"].to_dict()
    inference.remove_adapter(family.pipeline())
    described = {
        f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in stated.items() if v
    }
    header = {"lora_adapter_metadata": json.dumps(described)}
    file = write(tmp_path, {f"unet.{key}": value for key, value in state.items()}, header)
    pipeline = fresh.pipeline()
    assert inference.use_adapter(pipeline, file) == {"unet": len(state)}
    found = predicted(fresh)
    inference.remove_adapter(pipeline)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))


def test_lora_and_lokr_in_one_file(models, tmp_path):
    """As LyCORIS writes it where layers have methods of their own; a part of plain LoRA beside stays one."""
    family = models["sd"][0]
    products = drawn(family, {"unet": UNET["sd"][:4]})
    pairs = drawn_lora(
        family,
        {
            "unet": [*UNET["sd"][4:6], "down_blocks.0.resnets.0.conv1"],
            "text_encoder": ATTENTION,
        },
    )
    tensors = lycoris(products, "sd", ALPHA) | kohya(pairs, "sd", ALPHA)
    scaled = {key: (ALPHA / RANK * a, b) for key, (a, b) in pairs.items()}
    assert_loads(models, "sd", write(tmp_path, tensors), changes(products, ALPHA) | scaled)


def fused(family, generator, height):
    """LoKr of the FLUX layers with a w2 of this height: the file's tensors, the changes by our layers."""
    tensors, kept = {}, {}
    for name, layers in FLUX.items():
        shapes = [shape_of(family, "transformer", layer) for layer in layers]
        outputs = sum(shape[0] for shape in shapes)
        shape = torch.Size([outputs, shapes[0][1]])
        roles, change = factors(shape, "pieces", generator, (outputs // height, height))
        tensors |= {f"lora_unet_{name}.{role}": tensor for role, tensor in roles.items()}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(ALPHA)
        pieces = (ALPHA / RANK * change).split([shape[0] for shape in shapes])
        kept |= dict(zip(layers, pieces, strict=True))
    return tensors, kept


def test_fused_layers_are_taken_apart_where_blocks_end(models, tmp_path):
    """q, k and v of Black Forest Labs' files are one layer; rows of w1 are runs of its rows."""
    by_hand, fresh = models["flux"]
    width = shape_of(by_hand, "transformer", FLUX["single_blocks_0_linear1"][0])[0]
    tensors, kept = fused(by_hand, torch.Generator().manual_seed(1), width // 2)
    file = write(tmp_path, tensors)
    batch, x = Batch.of_captions(["a fox"], 16), torch.randn(1, 4, 8, 8)
    run = lambda f: f.predict(x, torch.tensor([500.0]), f.condition(batch)).detach()  # noqa: E731
    parameters = dict(by_hand.transformer.named_parameters())
    before = run(fresh)
    with torch.no_grad():
        for layer, change in kept.items():
            parameters[f"{layer}.weight"] += change
        expected = run(by_hand)
        for layer, change in kept.items():
            parameters[f"{layer}.weight"] -= change
    pipeline = fresh.pipeline()
    assert inference.use_adapter(pipeline, file) == {"transformer": 3 * len(kept)}
    found = run(fresh)
    inference.remove_adapter(pipeline)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


def test_a_product_across_fused_layers_is_refused(models, tmp_path):
    width = shape_of(models["flux"][0], "transformer", FLUX["single_blocks_0_linear1"][0])[0]
    tensors, _ = fused(models["flux"][0], torch.Generator().manual_seed(1), width // 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors[f"{name}.lokr_w1"].shape[0] == 6
    tensors[f"{name}.lokr_w1"] = torch.ones(2, tensors[f"{name}.lokr_w1"].shape[1])
    tensors[f"{name}.lokr_w2_a"] = torch.ones(width * 3 // 2, RANK)
    with pytest.raises(FormatError, match="cannot be taken apart exactly"):
        inference.use_adapter(models["flux"][1].pipeline(), write(tmp_path, tensors))


@pytest.mark.property
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_factors_of_any_layer(models, tmp_path_factory, data):
    """Any divisors of a layer's sizes, any form and rank, with and without alpha: the very change, layer by layer."""
    family, fresh = models["sd"]
    names = ["conv_in", "conv_out", "time_embedding.linear_1", UNET["sd"][1], CONVOLUTIONS[0]]
    names.append("mid_block.attentions.0.proj_in")  # a convolution of one place
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    divisors = lambda n: st.sampled_from([(d, n // d) for d in range(1, n + 1) if n % d == 0])  # noqa: E731
    tensors, expected = {}, {}
    for layer in chosen:
        shape = shape_of(family, "unet", layer)
        rows, columns = data.draw(divisors(shape[0])), data.draw(divisors(shape[1]))
        form, rank = data.draw(st.sampled_from(FORMS)), data.draw(st.integers(1, 6))
        alpha = data.draw(st.sampled_from([None, 0.5, 4.0]))
        roles, change = factors(shape, form, generator, rows, columns, rank)
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{stem}.{role}": tensor for role, tensor in roles.items()}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        expected[layer] = change * (1.0 if form == "whole" or alpha is None else alpha / rank)
    pipeline = fresh.pipeline()
    inference.use_adapter(pipeline, write(tmp_path_factory.mktemp("any"), tensors))
    found = {name: layer for _, name, layer in attach.named_layers(pipeline)}
    try:
        assert found.keys() == expected.keys()
        for name, change in expected.items():
            apart = found[name].get_delta_weight("default") - change
            assert apart.abs().max() <= 1e-6 * max(1.0, float(change.abs().max()))
    finally:
        inference.remove_adapter(pipeline)


# As with LoRA: scales, several at once, fused, swapped, removed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build("sd", tmp_path_factory.mktemp("base"))


@pytest.fixture
def pipeline(base):
    return inference.load_pipeline(base)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Two files over the same layers and their changes."""
    family, out = load_family("auto", str(base)), {}
    for seed, name in enumerate("ab"):
        layers = drawn(
            family, {"unet": [*UNET["sd"], CONVOLUTIONS[0]], "text_encoder": ATTENTION}, seed=seed
        )
        folder = tmp_path_factory.mktemp(name)
        out[name] = write(folder, lycoris(layers, "sd", ALPHA)), changes(layers, ALPHA)
    return out


@torch.no_grad()
def seen(pipeline, *scaled):
    """What the network makes of fixed latents and text, with changes added to the weights by hand and taken off."""
    kept = {}
    for changed, factor in scaled:
        for (part, layer), (change, _) in changed.items():
            state = dict(getattr(pipeline, part).named_parameters())
            weight = state.get(f"{layer}.weight", state.get(f"text_model.{layer}.weight"))
            kept.setdefault((part, layer), (weight, weight.clone()))
            weight += factor * change
    ids = torch.arange(32).view(2, 16) % 90
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = pipeline.text_encoder(ids)[0]
    out = pipeline.unet(x, torch.tensor([300, 40]), text).sample
    for weight, before in kept.values():
        weight.copy_(before)
    return out


def test_scales_and_two_at_once(base, pipeline, two):
    (a, change_a), (b, change_b) = two["a"], two["b"]
    plain = inference.load_pipeline(base)
    inference.use_adapter(pipeline, a, "a", 0.7)
    assert (seen(pipeline) - seen(plain, (change_a, 0.7))).abs().max() < 5e-6
    inference.use_adapter(pipeline, b, "b", -0.4)
    expected = seen(plain, (change_a, 0.7), (change_b, -0.4))
    assert (expected - seen(plain, (change_a, 0.7))).abs().max() > 1e-2
    assert (seen(pipeline) - expected).abs().max() < 5e-6
    with attach.scaled(pipeline, 0.0):
        assert torch.equal(seen(pipeline), seen(plain))
    assert (seen(pipeline) - expected).abs().max() < 5e-6
    inference.set_scale(pipeline, {"a": {"unet": 0.0, "unet.mid_block": 2.0}, "b": 0.0})
    block = {
        key: (
            change * (2.0 if ".mid_block." in f".{key[1]}." else 0.0 if key[0] == "unet" else 1),
            b,
        )
        for key, (change, b) in change_a.items()
    }
    assert (seen(pipeline) - seen(plain, (block, 1.0))).abs().max() < 5e-6
    with pytest.raises(ConfigError, match=r"no layer in unet\.middle"):
        inference.set_scale(pipeline, {"a": {"unet.middle": 1.0}})
    inference.remove_adapter(pipeline, "a")
    inference.set_scale(pipeline, 1.0)
    assert (seen(pipeline) - seen(plain, (change_b, 1.0))).abs().max() < 5e-6
    inference.remove_adapter(pipeline)
    assert torch.equal(seen(pipeline), seen(plain))
    assert {type(m) for m in pipeline.unet.modules()} == {type(m) for m in plain.unet.modules()}


def test_fused_and_back_bit_for_bit(pipeline, two):
    inference.use_adapter(pipeline, two["a"][0], "a")
    inference.use_adapter(pipeline, two["b"][0], "b", -0.5)
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    apart = seen(pipeline)
    with inference.fused(pipeline):
        assert all(layer.merged for layer in attach.layers(pipeline))
        assert (seen(pipeline) - apart).abs().max() < 1e-5
    assert torch.equal(seen(pipeline), apart)
    after = pipeline.unet.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_swapping_and_replacing(base, pipeline, two, tmp_path):
    """A LoKr takes the place of one of its name, and of a LoRA, and a LoRA takes its."""
    (a, _), (b, _) = two["a"], two["b"]
    expected = {file: seen(inference.load_pipeline(base, file)) for file in (a, b)}
    pairs = drawn_lora(load_family("auto", str(base)), {"unet": UNET["sd"]})
    lora = write(tmp_path, kohya(pairs, "sd", ALPHA))
    expected[lora] = seen(inference.load_pipeline(base, lora))
    for put in (inference.use_adapter, inference.swap_adapter):
        for file in (a, b, lora, a, lora):
            put(pipeline, file)
            assert torch.equal(seen(pipeline), expected[file])
            assert inference.adapter_names(pipeline) == ["default"]


def test_a_half_precision_base(base, two):
    """The factors have the base's dtype, as those of a LoRA."""
    plain = inference.load_pipeline(base)
    half = inference.load_pipeline(base, dtype=torch.bfloat16)
    inference.use_adapter(half, two["a"][0])
    for _, name, layer in attach.named_layers(half):
        assert layer.get_delta_weight("default").dtype == torch.bfloat16, name
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    inference.use_adapter(plain, two["a"][0])
    t = torch.tensor([300, 40])
    with torch.no_grad():
        found = half.unet(x.bfloat16(), t, text.bfloat16()).sample
        expected = plain.unet(x, t, text).sample
    assert (found.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


# Refusals: the sentence, and the pipeline as it was


def _without(*endings):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(endings)}


def _first(tensors, ending):
    return next(key for key in tensors if key.endswith(ending))


def _changed(ending, change):
    def apply(tensors):
        key = _first(tensors, ending)
        return tensors | {key: change(tensors[key])}

    return apply


def _beside(ending, new, value):
    return lambda tensors: tensors | {_first(tensors, ending).removesuffix(ending) + new: value}


REFUSED = [
    (lambda t: {k.replace("lora_unet_", "lora_net_"): v for k, v in t.items()}, "no place for"),
    (_beside("lokr_w1", "lokr_t1", torch.ones(2, 2)), "no place for"),
    (_without("lokr_w2_b"), "incomplete: .* not exactly the two factors"),
    (_without("lokr_w1"), "incomplete"),
    (_beside("lokr_w2_a", "lokr_w2", torch.ones(2, 2)), "incomplete"),
    (_beside("lokr_w1", "lora_down.weight", torch.ones(2, 2)), "incomplete"),
    (_beside("lokr_w1", "dora_scale", torch.ones(16, 1)), "LoKr with DoRA magnitudes"),
    (_changed("lokr_w1", lambda v: torch.ones(5, 7)), "another base model: the Kronecker factors"),
    (_changed("lokr_w2_b", lambda v: v[:, 1:]), "another base model"),
    (_changed("lokr_w2_b", lambda v: v[1:]), "another base model"),
    (_changed("lokr_w2_a", lambda v: v[0]), "another base model"),
    (_changed("lokr_w1", lambda v: v.flatten()), "another base model"),
    (_changed("lokr_w1", lambda v: v / 0), "not finite"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
@pytest.mark.parametrize("occupied", [False, True])
def test_refused_file_changes_nothing(pipeline, two, tmp_path, change, sentence, occupied):
    if occupied:
        inference.use_adapter(pipeline, two["b"][0], scale=0.8)
    before, types = seen(pipeline), [type(m) for m in pipeline.unet.modules()]
    file = write(tmp_path, change(load_file(two["a"][0])), name="bad.safetensors")
    for put in (inference.use_adapter, inference.swap_adapter):
        with pytest.raises(FormatError, match=rf"bad\.safetensors .*{sentence}"):
            put(pipeline, file)
    assert torch.equal(seen(pipeline), before)
    assert [type(m) for m in pipeline.unet.modules()] == types
    assert inference.adapter_names(pipeline) == (["default"] if occupied else [])


def test_a_kernel_that_blocks_would_cut_is_refused(models, tmp_path):
    """The numbers of rows and columns fit, but a block would end inside a kernel."""
    shape = shape_of(models["sd"][0], "unet", "conv_in")
    assert shape[1:] == (4, 3, 3)
    tensors = {"lokr_w1": torch.ones(2, 6), "lokr_w2": torch.ones(shape[0] // 2, 6)}
    file = write(tmp_path, {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()})
    with pytest.raises(FormatError, match="another base model"):
        inference.use_adapter(models["sd"][1].pipeline(), file)


def test_two_ranks_and_an_alpha_are_refused(models, tmp_path):
    """Readers disagree there on which rank divides alpha; without one there is nothing to disagree on."""
    pipeline, layer = models["sd"][1].pipeline(), UNET["sd"][0]
    generator = torch.Generator().manual_seed(0)
    shape = shape_of(models["sd"][0], "unet", layer)
    one, _ = factors(shape, "both", generator, rank=2)
    other, _ = factors(shape, "both", generator, rank=3)
    mixed = {k: (one if "w1" in k else other)[k] for k in one}
    stem = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{stem}.{k}": v for k, v in mixed.items()}
    w1, w2 = (mixed[f"lokr_w{i}_a"] @ mixed[f"lokr_w{i}_b"] for i in (1, 2))
    expected = {("unet", layer): (product(w1, w2), torch.eye(shape[0]))}
    assert_loads(models, "sd", write(tmp_path, tensors), expected)
    file = write(tmp_path, tensors | {f"{stem}.alpha": torch.tensor(2.0)})
    with pytest.raises(FormatError, match="two ranks at unet"):
        inference.use_adapter(pipeline, file)


@pytest.mark.parametrize(
    "change", [{"r": 7}, {"target_modules": ["to_q"]}, {"alpha": "x"}, {"q": 1}]
)
def test_settings_that_contradict_the_file_are_refused(models, tmp_path, change):
    layers = drawn(models["sd"][0], {"unet": UNET["sd"]}, ("pieces",))
    stated = {"r": RANK, "alpha": 6.0, "target_modules": UNET["sd"]} | change
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in stated.items()})}
    with pytest.raises(FormatError, match=r"lora\.safetensors"):
        inference.use_adapter(models["sd"][1].pipeline(), write(tmp_path, dotted(layers), header))


def test_the_two_kinds_do_not_share_a_model(base, pipeline, two, tmp_path):
    """A second adapter of the other kind is refused on the same part and taken on another."""
    pairs = drawn_lora(load_family("auto", str(base)), {"unet": UNET["sd"]})
    lora = write(tmp_path, kohya(pairs, "sd", ALPHA))
    for first, second, said in ((lora, two["a"][0], "LORA ink"), (two["a"][0], lora, "LOKR ink")):
        inference.use_adapter(pipeline, first, "ink")
        before = seen(pipeline)
        with pytest.raises(FormatError, match=f"carries the {said}"):
            inference.use_adapter(pipeline, second, "clay")
        assert torch.equal(seen(pipeline), before)
        assert inference.adapter_names(pipeline) == ["ink"]
        inference.remove_adapter(pipeline)
    text = drawn(load_family("auto", str(base)), {"text_encoder": ATTENTION})
    inference.use_adapter(pipeline, lora, "ink")
    inference.use_adapter(pipeline, write(tmp_path, lycoris(text, "sd"), name="t.safetensors"), "t")
    assert inference.adapter_names(pipeline) == ["ink", "t"]


# Conversion: all of it would be lost, so none is written


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_no_conversion(base, two, tmp_path, form):
    with pytest.raises(FormatError, match="is a LoKr"):
        inference.export(two["a"][0], tmp_path / "out.safetensors", form, model=str(base))
    assert list(tmp_path.iterdir()) == []


def test_no_arithmetic(pipeline, two, tmp_path):
    for where in (None, pipeline):
        with pytest.raises(FormatError, match="is a LoKr, whose changes are Kronecker products"):
            formats.read_weights(two["a"][0], where)


# Inspecting


def test_inspect_lycoris(models, tmp_path):
    layers = drawn(models["sdxl"][0], layers_of("sdxl"))
    report = formats.inspect(write(tmp_path, lycoris(layers, "sdxl", ALPHA)))
    assert (report.format, report.method) == ("lycoris", "LoKr")
    assert report.parts.keys() == {"unet", "text_encoder", "text_encoder_2"}
    assert len(report.modules) == len(layers)
    found = {(m.rank, m.alpha, round(m.scale, 5)) for m in report.modules}
    assert found == {(0, ALPHA, 1.0), (RANK, ALPHA, round(ALPHA / RANK, 5))}
    whole = [m.layer for m in report.modules if m.rank == 0]
    assert len(whole) == sum({"lokr_w1", "lokr_w2"} <= roles.keys() for roles, _ in layers.values())
    sizes = {(m.layer, m.inputs, m.outputs) for m in report.modules if m.part == "unet"}
    shape = shape_of(models["sdxl"][0], "unet", UNET["sdxl"][0])
    assert ("input_blocks_3_1_transformer_blocks_0_attn2_to_q", shape[1], shape[0]) in sizes
    assert sum(part.parameters for part in report.parts.values()) == sum(
        tensor.numel() for roles, _ in layers.values() for tensor in roles.values()
    )
    assert report.problems == ()
    for form in ("kohya", "diffusers"):
        assert "Kronecker product" in report.lost[form][0]
    assert "lycoris LoKr" in report.table(modules=True)
    assert "whole, 3" in report.table()


def test_inspect_knows_the_base_by_its_sizes(tmp_path):
    """Inputs are the columns of both factors: 32 * 64 = 2048, SDXL's text states."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lokr_w1": torch.zeros(16, 32), f"{stem}.lokr_w2": torch.zeros(40, 64)}
    report = formats.inspect(write(tmp_path, tensors))
    assert (report.family, report.base) == ("sdxl", "Stable Diffusion XL")
    assert report.modules[0].outputs == 640


def test_inspect_says_what_cannot_be_read(two, tmp_path):
    tensors = load_file(two["a"][0])
    dora = _first(tensors, "lokr_w1").replace("lokr_w1", "dora_scale")
    report = formats.inspect(write(tmp_path, tensors | {dora: torch.ones(16, 1)}))
    assert "DoRA magnitudes" in report.problems[0]
