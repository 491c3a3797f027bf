"""Kohya files: exact for every scale, certified by two readers, named as ComfyUI and A1111 look them up."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from packaging.version import Version
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_nb import adapters, cli, formats, inference
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, FormatError
from lora_nb.families import REGISTRY, load_family, tiny
from lora_nb.formats.kohya import kohya_name
from lora_nb.formats.weights import weights_of_modules

FAMILIES = ("sd", "sdxl")
MAPS = json.loads((Path(__file__).parent / "key_maps.json").read_text())
# Before 0.42 diffusers does not read a Kohya file's text encoders beside transformers from 5.6 on: certificate.py.
diffusers_reads = pytest.mark.skipif(
    Version(importlib.metadata.version("diffusers")) < Version("0.42"),
    reason="this diffusers misreads text encoders of Kohya files",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: tiny.build(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def loaded(models):
    """Two copies of each family: one to train, one to read into."""
    return {n: tuple(load_family("auto", str(m)) for _ in range(2)) for n, m in models.items()}


def stir(family, configs: dict[str, dict], seed: int = 0) -> None:
    """Adapters with these peft settings and a B that is not zero, in place of any others."""
    inference.remove_adapter(family.pipeline())
    generator = torch.Generator().manual_seed(seed)
    for part, config in configs.items():
        module = family.trainable[part]
        targets = config.get("target_modules", list(family.targets[part]))
        module.add_adapter(
            LoraConfig(**config | {"target_modules": targets}), adapter_name="default"
        )
        for _, layer in adapters.layers(module):
            for weight, size in (
                (layer.lora_A["default"].weight, 0.3),
                (layer.lora_B["default"].weight, 0.05),
            ):
                weight.data = size * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def deltas(family) -> dict[str, torch.Tensor]:
    """scale B A of every adapted layer, as peft itself computes it."""
    return {
        f"{part}.{name}": layer.get_delta_weight(layer.active_adapters[0])
        for part, module in family.trainable.items()
        for name, layer in adapters.layers(module)
    }


def assert_close(a, b, limit=1e-6):
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= limit


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = {"unet": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


CASES = {
    "half": {"r": 4, "lora_alpha": 2},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "mixed": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_k": 2, "k_proj": 3},
        "alpha_pattern": {"to_q": 7, "q_proj": 0.5},
    },
    "alphas": {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 7, "k_proj": 0.5}},
}

# Names: what ComfyUI and A1111 look up, for the real architectures


SIZES = {
    "sd": {"cross_attention_dim": 768},
    "sdxl": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP = {
    "text_encoder": (
        CLIPTextModel,
        {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    ),
    "text_encoder_2": (
        CLIPTextModelWithProjection,
        {
            "num_hidden_layers": 32,
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 5120,
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def real(request):
    """The published architecture on the meta device, as far as names go: (family name, object with trainable)."""
    from lora_nb.families import REGISTRY

    parts = ["text_encoder"] + (["text_encoder_2"] if request.param == "sdxl" else [])
    with torch.device("meta"):
        modules = {"unet": UNet2DConditionModel(**SIZES[request.param])}
        modules |= {part: CLIP[part][0](CLIPTextConfig(**CLIP[part][1])) for part in parts}
    family = REGISTRY[request.param].__new__(REGISTRY[request.param])
    family.trainable = modules
    return request.param, family


def stems(family) -> dict[str, list[str]]:
    """The Kohya names of all layers that the reference scripts and sd-scripts train, by part."""
    wanted = {"unet": LAYERS["unet"]}
    return {
        part: [
            kohya_name(family, part, layer)
            for layer in adapters.adaptable(module)
            if any(adapters.matches(layer, t) for t in wanted.get(part, TEXT))
        ]
        for part, module in family.trainable.items()
    }


def checkpoint_modules(name: str) -> set[str]:
    """The modules of the published checkpoint, written from its own config: a list of blocks, each with its depth."""
    layout = MAPS["checkpoints"][name]
    found = set()
    for block, depth in layout["transformers"].items():
        found |= {f"{block}_proj_in", f"{block}_proj_out"}
        for i in range(depth):
            found |= {f"{block}_transformer_blocks_{i}_{leaf}" for leaf in layout["leaves"]}
    for prefix, layers, leaves in layout["text"]:
        found |= {f"{prefix}{i}_{leaf}" for i in range(layers) for leaf in leaves}
    return found


def looked_up(program: str, name: str, stem: str) -> str:
    """The checkpoint module that a program's published rules make of a Kohya name."""
    for rule in MAPS[program][name]:
        match = re.fullmatch(rule["key"], stem)
        if match:
            values = {k: int(v) if v.isdigit() else v for k, v in match.groupdict().items()}
            if "index" in rule:
                a, b, c = rule["index"]
                values["n"] = a + b * values["i"] + c * values["j"]
            return rule["module"].format(**values)
    return ""


@pytest.mark.parametrize("program", ["comfyui", "a1111"])
def test_every_name_is_found_by_the_program(real, program):
    name, family = real
    modules, names = checkpoint_modules(name), stems(family)
    counted = {part: len(found) for part, found in names.items()}
    # 16 transformers of 1 block in the first, 11 of 70 blocks in all in the second, 10 layers each and 2 around.
    assert counted["unet"] == {"sd": 16 * 10 + 32, "sdxl": 70 * 10 + 22}[name]
    assert counted["text_encoder"] == 12 * 6
    found = [looked_up(program, name, stem) for part in names.values() for stem in part]
    assert set(found) <= modules
    assert len(set(found)) == len(found) == sum(counted.values())


def test_names_are_those_of_sd_scripts(real):
    name, family = real
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    expected = {
        "sd": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "sdxl": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_out_0",
    }
    assert kohya_name(family, "unet", unet) == expected[name]
    prefix = {"sd": "lora_te", "sdxl": "lora_te1"}[name]
    for layer in ("encoder.layers.3.mlp.fc1", "text_model.encoder.layers.3.mlp.fc1"):
        stem = kohya_name(family, "text_encoder", layer)
        assert stem == f"{prefix}_text_model_encoder_layers_3_mlp_fc1"


# What is in the file


def test_alpha_per_layer_and_its_header(models, loaded, tmp_path):
    family = loaded["sd"][0]
    stir(family, {"unet": {"r": 4, "lora_alpha": 2}, "text_encoder": {"r": 3, "lora_alpha": 6}})
    config = TrainConfig(
        pretrained_model_name_or_path="/home/somebody/base-model",
        lora={"unet": LoraSpec(4, 2), "text_encoder": LoraSpec(3, 6, learning_rate=5e-6)},
        learning_rate=1e-4,
        seed=7,
    )
    file = formats.save_kohya(family, tmp_path / "ink.safetensors", config=config, extra={"x": "y"})
    tensors = load_file(file)
    for key in (k for k in tensors if k.endswith(".alpha")):
        assert tensors[key] == (2.0 if key.startswith("lora_unet_") else 6.0)
    assert len(tensors) == 3 * sum(1 for k in tensors if k.endswith(".alpha"))
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-06",
        "ss_seed": "7",
        "ss_sd_model_name": "base-model",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "ink",
        "x": "y",
    }
    assert expected.items() <= header.items()
    assert all(isinstance(v, str) and "/home" not in v for v in header.values())
    assert re.fullmatch("0x[0-9a-f]{64}", header["modelspec.hash_sha256"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_certified_within_its_rounding(models, loaded, tmp_path, dtype):
    family = loaded["sdxl"][0]
    stir(family, dict.fromkeys(family.trainable, CASES["half"]))
    source = formats.save_adapter(family, tmp_path / "source")
    out = tmp_path / "half.safetensors"
    certificate = inference.export(source, out, model=str(models["sdxl"]), dtype=dtype)
    kinds = {value.dtype for value in load_file(out).values()}
    assert kinds == {formats.DTYPES[dtype]}
    assert certificate.holds
    assert 0 < certificate.readings[0].difference < 0.1 * certificate.effect


def test_too_large_for_half_precision_is_refused(loaded, tmp_path):
    family = loaded["sd"][0]
    stir(family, {"unet": {"r": 2}})
    next(adapters.layers(family.unet))[1].lora_A["default"].weight.data[0, 0] = 1e5
    with pytest.raises(FormatError, match="too large for"):
        formats.save_kohya(family, tmp_path / "x.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "trained bias")],
)
def test_what_is_no_plain_lora_is_refused(loaded, tmp_path, settings, reason):
    family = loaded["sd"][0]
    stir(family, {"unet": {"r": 2, "init_lora_weights": False} | settings})
    with pytest.raises(FormatError, match=reason):
        formats.save_kohya(family, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    inference.remove_adapter(family.pipeline())


def test_convolutions_are_exact_too(models, loaded, tmp_path):
    """LoCon parts: A keeps the kernel."""
    for name in FAMILIES:
        family, fresh = loaded[name]
        stir(
            family,
            {
                "unet": {
                    "r": 3,
                    "lora_alpha": 2,
                    "target_modules": ["conv1", "conv2", "conv", "to_q"],
                }
            },
        )
        file = formats.save_kohya(family, tmp_path / f"{name}.safetensors")
        inference.remove_adapter(fresh.pipeline())
        inference.use_adapter(fresh.pipeline(), file)
        assert_close(deltas(fresh), deltas(family), 0.0)
        assert any(
            pair.down.ndim == 4 for pair in weights_of_modules(fresh.trainable)["unet"].values()
        )
        inference.remove_adapter(fresh.pipeline())


# The certificate, and the command


@diffusers_reads
def test_certificate_says_what_was_proved(models, loaded, tmp_path):
    family = loaded["sd"][0]
    stir(family, dict.fromkeys(family.trainable, CASES["mixed"]))
    source = formats.save_adapter(family, tmp_path / "run", {"base_model": str(models["sd"])})
    certificate = inference.export(source.parent, tmp_path / "out.safetensors")
    assert certificate.holds
    assert [r.reader for r in certificate.readings] == ["lora_nb", "diffusers"]
    assert all(r.difference <= 3e-6 and not r.missing for r in certificate.readings)
    assert certificate.effect > 1e-2
    scales = {(p, name.rsplit(".", 1)[-1]): (r, a, s) for p, name, r, a, s in certificate.modules}
    assert scales["unet", "to_k"] == (2, 2.0, 1.0)
    assert scales["unet", "to_q"] == (4, 7.0, 1.75)
    assert "holds" in certificate.table()
    kept = json.loads((tmp_path / "out.certificate.json").read_text())
    assert kept["holds"] is True
    assert len(kept["modules"]) == len(certificate.modules)
    assert "/" not in kept["base"]


def test_a_file_that_lies_gets_no_certificate(models, loaded, tmp_path):
    """Doubling one alpha, dropping one layer, or a key that no layer uses, is found."""
    family = loaded["sd"][0]
    stir(family, {"unet": {"r": 2, "lora_alpha": 1}})
    file = formats.save_kohya(family, tmp_path / "good.safetensors")
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith(".alpha"))
    save_file(tensors | {name: tensors[name] * 2}, tmp_path / "alpha.safetensors")
    certificate = inference.certify(family, tmp_path / "alpha.safetensors", str(models["sd"]))
    assert not certificate.holds
    assert certificate.readings[0].weights > 1e-3
    stem = name.removesuffix(".alpha")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith(stem)}, tmp_path / "less.safetensors"
    )
    certificate = inference.certify(family, tmp_path / "less.safetensors", str(models["sd"]))
    assert not certificate.holds
    assert len(certificate.readings[0].missing) == 1
    stray = tensors | {"lora_unet_nowhere.alpha": torch.tensor(1.0)}
    save_file(stray, tmp_path / "more.safetensors")
    certificate = inference.certify(family, tmp_path / "more.safetensors", str(models["sd"]))
    assert not certificate.holds
    assert "no place for (lora_unet_nowhere.alpha)" in certificate.readings[0].refused


def test_there_and_back_again(models, loaded, tmp_path):
    """diffusers -> Kohya -> diffusers is the same LoRA."""
    family, fresh = loaded["sdxl"]
    stir(family, dict.fromkeys(family.trainable, CASES["rslora"]))
    expected = deltas(family)
    source = formats.save_adapter(family, tmp_path / "source")
    model = str(models["sdxl"])
    inference.export(source, tmp_path / "k.safetensors", model=model)
    inference.export(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers", model)
    inference.remove_adapter(fresh.pipeline())
    inference.use_adapter(fresh.pipeline(), tmp_path / "d.safetensors")
    assert_close(deltas(fresh), expected)
    inference.remove_adapter(fresh.pipeline())


def test_export_command(models, loaded, tmp_path, capsys):
    family = loaded["sd"][0]
    stir(family, {"unet": {"r": 2}})
    source = formats.save_adapter(family, tmp_path / "run")
    out = tmp_path / "out.safetensors"
    words = ["export", str(source), "--format", "kohya", "--output", str(out)]
    assert cli.main(words) == 2  # the file does not say its base
    assert "does not say which base model" in capsys.readouterr().err
    assert cli.main([*words, "--model", str(models["sd"]), "--dtype", "fp16"]) == 0
    assert "round trip holds" in capsys.readouterr().out
    assert out.is_file()
    assert out.with_suffix(".certificate.json").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "onnx"}, "format is 'onnx'"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
        ({"format": "diffusers", "dtype": "fp16"}, "written in fp32"),
        ({"output": "x.bin"}, r"must end in \.safetensors"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(tmp_path, change, sentence):
    given = {"source": tmp_path / "none.safetensors", "output": "x.safetensors"} | change
    with pytest.raises(ConfigError, match=sentence):
        inference.export(**given)


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - set(FAMILIES)))
def test_diffusers_files_of_other_families_are_certified(tmp_path, monkeypatch, name):
    """Text, pictures and geometry at fixed values, for whatever the family's condition is made of; rsLoRA, patterns."""
    monkeypatch.setattr(REGISTRY["wuerstchen"], "resolution", 64)  # 768 would be 576 latents
    model = tiny.build(name, tmp_path / "model")
    family = load_family("auto", str(model))
    part, (some, *_) = next(iter(family.targets.items()))
    mixed = {"use_rslora": True, "rank_pattern": {some: 2}, "alpha_pattern": {some: 7}}
    stir(family, {part: {"r": 3, "lora_alpha": 5} | mixed})
    source = formats.save_adapter(family, tmp_path / "run", {"base_model": str(model)})
    certificate = inference.export(source, tmp_path / "out.safetensors", "diffusers")
    assert certificate.holds
    assert certificate.effect > 1e-3
    assert certificate.readings[0].weights == 0.0
