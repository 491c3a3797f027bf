"""Every known form of file loads to the right output. The files are made here from the published layouts, by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_nb import formats, inference
from lora_nb.errors import FormatError
from lora_nb.families import Batch, load_family, tiny

RANK, ALPHA = 3, 2.0
CROSS = "transformer_blocks.0.attn2"
# The layers that are adapted, in the names of the tiny models' own state dicts.
UNET = {
    "sd": [
        f"{b}.{CROSS}.to_{x}"
        for b in (
            "down_blocks.0.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.1.attentions.1",
        )
        for x in ("q", "k", "out.0")
    ],
    "sdxl": [
        f"{b}.{CROSS}.to_{x}"
        for b in (
            "down_blocks.1.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.0.attentions.1",
        )
        for x in ("q", "v", "out.0")
    ],
}
TEXT = [
    f"encoder.layers.{i}.{n}"
    for i in (0, 1)
    for n in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
]
ATTENTION = [n for n in TEXT if "self_attn" in n]
# The tiny SDXL has one layer per block, so its checkpoint would count: conv_in, then per stage one layer and one
# downsampler; upwards two layers per stage.
CHECKPOINT = {
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
    "up_blocks.1.resnets.0.conv2": "output_blocks_2_0_out_layers_3",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
CONVOLUTIONS = [n for n in CHECKPOINT if "attentions" not in n]


def two_of_each(tmp_path_factory):
    """Two copies of each family by name: one to add the change to by hand, one to load the file into."""
    out = {}
    for name in ("sd", "sdxl", "flux"):
        folder = tiny.build(name, tmp_path_factory.mktemp(name))
        out[name] = tuple(load_family("auto", str(folder)) for _ in range(2))
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return two_of_each(tmp_path_factory)


def layers_of(name, text=ATTENTION):
    parts = {"unet": UNET[name], "text_encoder": text}
    return parts | ({"text_encoder_2": text} if name == "sdxl" else {})


def weight_of(family, part, layer):
    state = dict(family.trainable[part].named_parameters())
    return state.get(f"{layer}.weight", state.get(f"text_model.{layer}.weight"))


def drawn(family, parts):
    """A and B for each named layer, {(part, layer): (A, B)}."""
    generator = torch.Generator().manual_seed(3)
    out = {}
    for part, layers in parts.items():
        for layer in layers:
            shape = weight_of(family, part, layer).shape
            ones = (1, 1) if len(shape) == 4 else ()
            a = torch.randn(RANK, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
            b = torch.randn(shape[0], RANK, *ones, generator=generator) * 0.2
            out[part, layer] = (a, b)
    return out


@torch.no_grad()
def predicted(family):
    captions, side = ["", "a fox"], family.resolution
    batch = Batch.of_captions(captions, side)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return family.predict(x, torch.tensor([400, 30]), family.condition(batch))


def assert_loads(models, name, file, pairs, scale=1.0, change=None):
    """The network's output with the file is that of the weights changed by hand: W + scale B A."""
    by_hand, fresh = models[name]
    before, kept = predicted(by_hand), {}
    change = change or (lambda key, w, product: w + scale * product)
    with torch.no_grad():
        for key, (a, b) in pairs.items():
            weight = weight_of(by_hand, *key)
            kept[key] = weight.clone()
            weight.copy_(change(key, weight, (b.flatten(1) @ a.flatten(1)).view(weight.shape)))
    try:
        expected = predicted(by_hand)
    finally:
        with torch.no_grad():
            for key, weight in kept.items():
                weight_of(by_hand, *key).copy_(weight)
    pipeline = fresh.pipeline()
    taken = inference.use_adapter(pipeline, file)
    found = predicted(fresh)
    inference.remove_adapter(pipeline)
    assert sum(taken.values()) >= 2 * len(pairs)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))
    assert torch.equal(predicted(fresh), before)


def write(folder, tensors, metadata=None, name="lora.safetensors"):
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata=metadata)
    return folder / name


# diffusers and peft


def diffusers(pairs, level="text_model."):
    out = {}
    for (part, layer), (a, b) in pairs.items():
        text = part.startswith("text")
        stem = f"{part}.{level if text else ''}{layer}.{'lora_linear_layer' if text else 'lora'}"
        out |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
    return out


@pytest.mark.parametrize("level", ["text_model.", ""], ids=["before 5.6", "from 5.6"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers(models, tmp_path, name, level):
    pairs = drawn(models[name][0], layers_of(name))
    assert_loads(models, name, write(tmp_path, diffusers(pairs, level)), pairs)


def test_peft_keys_with_settings(models, tmp_path):
    """alpha from the header, one layer's own from alpha_pattern."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    tensors = {
        f"{p}.{n}.lora_{x}.weight": t
        for (p, n), ab in pairs.items()
        for x, t in zip("AB", ab, strict=True)
    }
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": 6.0,
        "unet.target_modules": UNET["sd"],
        "unet.alpha_pattern": {"attn2.to_k": 1.5},
    }
    file = write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
    change = lambda key, w, p: w + p * (0.5 if key[1].endswith("to_k") else 2.0)  # noqa: E731
    assert_loads(models, "sd", file, pairs, change=change)


def test_rslora_of_a_header(models, tmp_path):
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    settings = {
        "unet.r": RANK,
        "unet.lora_alpha": 3.0,
        "unet.use_rslora": True,
        "unet.target_modules": UNET["sd"],
    }
    file = write(tmp_path, diffusers(pairs), {"lora_adapter_metadata": json.dumps(settings)})
    assert_loads(models, "sd", file, pairs, scale=3.0 / RANK**0.5)


def test_a_peft_folder(models, tmp_path):
    """adapter_model.safetensors with adapter_config.json beside it, as peft's save_pretrained leaves them."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    tensors = {
        f"base_model.model.{n}.lora_{x}.weight": t
        for (_, n), ab in pairs.items()
        for x, t in zip("AB", ab, strict=True)
    }
    write(tmp_path, tensors, name="adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": UNET["sd"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert_loads(models, "sd", tmp_path, pairs, scale=2.0)


def test_attention_processors_of_old(models, tmp_path):
    """diffusers before peft: attn2.processor.to_q_lora, and to_out for to_out.0."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    tensors = {}
    for (part, layer), (a, b) in pairs.items():
        stem = f"{part}.{layer}".removesuffix(".0").replace("attn2.", "attn2.processor.")
        tensors |= {f"{stem}_lora.down.weight": a, f"{stem}_lora.up.weight": b}
    assert any("processor.to_out_lora" in key for key in tensors)
    assert_loads(models, "sd", write(tmp_path, tensors), pairs)


def test_text_encoder_names_of_old(models, tmp_path):
    """diffusers before peft called the projections of a text encoder to_q, to_k, to_v, to_out."""
    pairs = drawn(models["sd"][0], {"text_encoder": ATTENTION})
    tensors = {}
    for (part, layer), (a, b) in pairs.items():
        old = layer.replace("q_proj", "to_q").replace("out_proj", "to_out")
        tensors |= {
            f"{part}.text_model.{old}_lora.down.weight": a,
            f"{part}.text_model.{old}_lora.up.weight": b,
        }
    assert_loads(models, "sd", write(tmp_path, tensors), pairs)


# Kohya


def kohya(pairs, name, alpha=None, text="text_model_"):
    """sd-scripts: diffusers names for the first family's UNet, the checkpoint's for the second's."""
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te" if name == "sd" else "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    out = {}
    for (part, layer), (a, b) in pairs.items():
        if part == "unet" and name == "sdxl":
            for ours, theirs in CHECKPOINT.items():
                if layer.startswith(ours):
                    layer = theirs + layer[len(ours) :]
                    break
        stem = f"{prefixes[part]}_{text if part != 'unet' else ''}{layer.replace('.', '_')}"
        out |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        if alpha is not None:
            out[f"{stem}.alpha"] = torch.tensor(alpha)
    return out


@pytest.mark.parametrize("text", ["text_model_", ""], ids=["before 5.6", "from 5.6"])
@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohya(models, tmp_path, name, alpha, text):
    pairs = drawn(models[name][0], layers_of(name, TEXT))
    scale = 1.0 if alpha is None else alpha / RANK
    assert_loads(models, name, write(tmp_path, kohya(pairs, name, alpha, text)), pairs, scale)


def test_kohya_in_half_precision(models, tmp_path):
    pairs = drawn(models["sd"][0], layers_of("sd", TEXT))
    pairs = {key: tuple(t.half().float() for t in ab) for key, ab in pairs.items()}
    tensors = {key: t.half() for key, t in kohya(pairs, "sd", ALPHA).items()}
    assert_loads(models, "sd", write(tmp_path, tensors), pairs, ALPHA / RANK)


def test_kohya_with_ranks_and_alphas_of_its_own_in_each_layer(models, tmp_path):
    """What diffusers 0.42 gets wrong."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    pairs = {
        key: (a[: 1 + i % RANK], b[:, : 1 + i % RANK])
        for i, (key, (a, b)) in enumerate(pairs.items())
    }
    tensors = kohya(pairs, "sd")
    alphas = {}
    for i, (key, stem) in enumerate(
        zip(pairs, [k for k in tensors if "lora_down" in k], strict=True)
    ):
        alphas[key] = 0.5 + i
        tensors[stem.replace("lora_down.weight", "alpha")] = torch.tensor(alphas[key])
    change = lambda key, w, p: w + p * alphas[key] / len(pairs[key][0])  # noqa: E731
    assert_loads(models, "sd", write(tmp_path, tensors), pairs, change=change)


def test_papercut(models, tmp_path):
    """TheLastBen's SDXL files: sd-scripts names of both text encoders and the UNet, alpha in each layer."""
    pairs = drawn(models["sdxl"][0], layers_of("sdxl"))
    tensors = {k: v.half() for k, v in kohya(pairs, "sdxl", float(RANK)).items()}
    assert {k.split("_")[1] for k in tensors} == {"unet", "te1", "te2"}
    rounded = {key: tuple(t.half().float() for t in ab) for key, ab in pairs.items()}
    assert_loads(
        models, "sdxl", write(tmp_path, tensors, {"ss_network_module": "networks.lora"}), rounded
    )


def test_convolutions_and_ends_by_the_checkpoints_names(models, tmp_path):
    """LoCon: all kinds of layers that a checkpoint has outside attention."""
    pairs = drawn(models["sdxl"][0], {"unet": CONVOLUTIONS})
    file = write(tmp_path, kohya(pairs, "sdxl", ALPHA))
    assert_loads(models, "sdxl", file, pairs, ALPHA / RANK)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_dora(models, tmp_path, form):
    """Liu et al. 2024: every output's row is scaled to its own magnitude m."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    m = {key: weight_of(models["sd"][0], *key).detach().norm(dim=1) * 1.3 for key in pairs}
    if form == "kohya":
        tensors = kohya(pairs, "sd", float(RANK))
        for key, stem in zip(pairs, [k for k in tensors if "lora_down" in k], strict=True):
            tensors[stem.replace("lora_down.weight", "dora_scale")] = m[key][:, None]
    else:
        tensors = {
            f"unet.{n}.lora_{x}.weight": t
            for (_, n), ab in pairs.items()
            for x, t in zip("AB", ab, strict=True)
        }
        tensors |= {f"unet.{n}.lora_magnitude_vector": m["unet", n] for _, n in pairs}
    change = lambda key, w, p: m[key][:, None] * (w + p) / (w + p).norm(dim=1, keepdim=True)  # noqa: E731
    assert_loads(models, "sd", write(tmp_path, tensors), pairs, change=change)


# Black Forest Labs' names, q, k and v in one layer


FLUX = {
    "double_blocks_0_img_attn_qkv": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ],
    "double_blocks_0_txt_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks_0_img_mlp_2": ["transformer_blocks.0.ff.net.2"],
    "single_blocks_0_linear1": [
        f"single_transformer_blocks.0.{n}"
        for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
    "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
}


@pytest.mark.parametrize("spelling", ["kohya", "dotted"])
def test_fused_layers_are_taken_apart(models, tmp_path, spelling):
    by_hand, fresh = models["flux"]
    generator = torch.Generator().manual_seed(1)
    tensors, kept = {}, {}
    parameters = dict(by_hand.transformer.named_parameters())
    with torch.no_grad():
        for name, layers in FLUX.items():
            rows = [parameters[f"{layer}.weight"].shape[0] for layer in layers]
            a = (
                torch.randn(RANK, parameters[f"{layers[0]}.weight"].shape[1], generator=generator)
                * 0.3
            )
            b = torch.randn(sum(rows), RANK, generator=generator) * 0.3
            for layer, part in zip(layers, b.split(rows), strict=True):
                kept[layer] = parameters[f"{layer}.weight"].clone()
                parameters[f"{layer}.weight"] += ALPHA / RANK * part @ a
            stem = f"lora_unet_{name}"
            down, up = "lora_down", "lora_up"
            if spelling == "dotted":
                stem = (
                    name.replace("blocks_0_", "blocks.0.")
                    .replace("attn_", "attn.")
                    .replace("mlp_", "mlp.")
                )
                stem, down, up = f"diffusion_model.{stem}", "lora_A", "lora_B"
                b = b * (ALPHA / RANK)
            else:
                tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
            tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
    batch = Batch.of_captions(["a fox"], 16)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    run = lambda f: f.predict(x, torch.tensor([500.0]), f.condition(batch)).detach()  # noqa: E731
    expected, before = run(by_hand), run(fresh)
    with torch.no_grad():
        for layer, weight in kept.items():
            parameters[f"{layer}.weight"].copy_(weight)
    pipeline = fresh.pipeline()
    taken = inference.use_adapter(pipeline, write(tmp_path, tensors))
    assert taken == {"transformer": 2 * sum(len(v) for v in FLUX.values())}
    found = run(fresh)
    inference.remove_adapter(pipeline)
    assert (expected - before).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


# What cannot be read says what it is


@pytest.mark.parametrize(
    ("endings", "method"),
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
        (("oft_blocks",), "OFT"),
        (("diff", "diff_b"), "full weight differences"),
        (("lora_down.weight", "lora_up.weight", "lora_mid.weight"), "LoCon in Tucker form"),
    ],
)
def test_other_methods_are_named(models, tmp_path, endings, method):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    file = write(tmp_path, {f"{stem}.{ending}": torch.ones(2, 2) for ending in endings})
    with pytest.raises(FormatError, match=f"holds {method}, which cannot be read here"):
        inference.use_adapter(models["sd"][1].pipeline(), file)
    if len(endings) != 3:
        with pytest.raises(FormatError, match=method):
            formats.inspect(file)


def test_a_file_for_another_family_names_its_layers(models, tmp_path):
    pairs = drawn(models["sdxl"][0], layers_of("sdxl"))
    file = write(tmp_path, kohya(pairs, "sdxl", ALPHA))
    with pytest.raises(FormatError, match=r"no place for \(lora_te2_text_model"):
        inference.use_adapter(models["sd"][1].pipeline(), file)


def test_a_layer_under_two_names_is_refused(models, tmp_path):
    """One of them would win, and nothing would say which."""
    pairs = drawn(models["sd"][0], {"unet": UNET["sd"]})
    again = {key: tensor.clone() for key, tensor in kohya(pairs, "sd").items()}
    file = write(tmp_path, diffusers(pairs) | again)
    with pytest.raises(FormatError, match=r"lora\.safetensors has the lora_\w of a layer twice"):
        inference.use_adapter(models["sd"][1].pipeline(), file)


def test_a_magnitude_of_inputs_is_refused(models, tmp_path):
    pairs = drawn(
        models["sd"][0], {"unet": UNET["sd"][:2]}
    )  # to_q and to_k: the second has 32 inputs, 16 outputs
    tensors = kohya(pairs, "sd", 1.0)
    for key, stem in zip(pairs, [k for k in tensors if "lora_down" in k], strict=True):
        shape = weight_of(models["sd"][0], *key).shape
        tensors[stem.replace("lora_down.weight", "dora_scale")] = torch.ones(1, shape[1])
    with pytest.raises(FormatError, match="magnitudes of inputs"):
        inference.use_adapter(models["sd"][1].pipeline(), write(tmp_path, tensors))


# Inspecting


def test_inspect_tells_family_base_and_every_layer(models, tmp_path):
    pairs = drawn(models["sdxl"][0], layers_of("sdxl"))
    header = {"ss_network_dim": "3", "modelspec.title": "x"}
    report = formats.inspect(write(tmp_path, kohya(pairs, "sdxl", ALPHA), header))
    assert report.format == "kohya"
    assert set(report.parts) == {"unet", "text_encoder", "text_encoder_2"}
    assert len(report.modules) == len(pairs)
    assert {(m.rank, m.alpha, round(m.scale, 6)) for m in report.modules} == {(3, 2.0, 0.666667)}
    assert "2 entries of the header" in report.lost["diffusers"][0]
    assert report.problems == ()
    assert "0.6667" in report.table(modules=True)


@pytest.mark.parametrize(
    ("stem", "inputs", "family", "base"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            768,
            "sd",
            "Stable Diffusion 1",
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            1024,
            "sd",
            "Stable Diffusion 2",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            2048,
            "sdxl",
            "Stable Diffusion XL",
        ),
        ("lora_unet_single_blocks_3_linear1", 3072, "flux", "FLUX.1"),
        ("lora_unet_layers_0_attention_to_k", 3840, "z_image", "Z-Image"),
        ("lora_unet_blocks_1_attention_to_k", 1536, "wuerstchen", "Wuerstchen"),
        ("lora_unet_somewhere", 5, "unknown", "unknown"),
    ],
)
def test_inspect_tells_the_base_by_shapes(tmp_path, stem, inputs, family, base):
    tensors = {
        f"{stem}.lora_down.weight": torch.zeros(2, inputs),
        f"{stem}.lora_up.weight": torch.zeros(4, 2),
    }
    report = formats.inspect(write(tmp_path, tensors))
    assert (report.family, report.base) == (family, base)


def test_inspect_says_what_kohya_would_lose(tmp_path):
    tensors = {f"unet.{n}.lora_{x}.weight": torch.zeros(2, 2) for n in "ab" for x in "AB"}
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.use_rslora": True,
        "unet.alpha_pattern": {"b": 1.0},
        "unet.lora_dropout": 0.1,
    }
    report = formats.inspect(
        write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
    )
    said = " ".join(report.lost["kohya"])
    assert "rsLoRA" in said
    assert "multiplied into B" in said
    assert "lora_dropout" in said
    assert [m.scale for m in report.modules] == pytest.approx([4 / 2**0.5, 1 / 2**0.5])
