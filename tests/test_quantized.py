"""A base in 8 or 4 bits: how far it is from the plain one, and that everything done with a base works with it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lora_nb
from lora_nb import adapters, checkpoint, data, run_state
from lora_nb.cache import Cache
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.families import REGISTRY, load_family, network, tiny, widened
from lora_nb.families.quantized import (
    BLOCK,
    KINDS,
    QuantizedLinear,
    kind_of,
    linears,
    nf4_values,
    size_of,
)
from lora_nb.formats import FILE_NAME
from lora_nb.inference import certify, certify_run, fused, generate, load_pipeline
from lora_nb.loss import diffusion_loss
from lora_nb.trainer import train

CPU = torch.device("cpu")
each_kind = pytest.mark.parametrize("kind", KINDS)
# Appendix E of Dettmers et al. 2023.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def linear(inputs, outputs, bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(inputs, outputs, bias).requires_grad_(False)


def test_the_values_of_nf4_are_the_published_ones():
    torch.testing.assert_close(nf4_values(), torch.tensor(NF4), atol=1e-6, rtol=0)


@each_kind
@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (37, 30), (5, 3)])
def test_a_weight_is_rounded_by_no_more_than_half_a_step(kind, shape):
    plain = linear(*shape)
    plain.weight[1] = 0.0  # the largest of them is no divisor
    plain.weight[2] *= 1e4
    error = (QuantizedLinear(plain, kind, CPU).weight - plain.weight).abs()
    if kind == "int8":
        limit = plain.weight.abs().amax(1, keepdim=True).expand(error.shape) / 127 / 2
    else:
        blocks = F.pad(plain.weight.flatten(), (0, -error.numel() % BLOCK)).view(-1, BLOCK)
        widest = (nf4_values()[1:] - nf4_values()[:-1]).max() / 2
        limit = (widest * blocks.abs().amax(1, keepdim=True)).expand(blocks.shape)
        limit = limit.flatten()[: error.numel()].view(error.shape)
    assert (error <= limit * (1 + 1e-5)).all()
    assert (error[1] == 0).all()


@each_kind
def test_it_has_the_size_it_is_reckoned_with(kind):
    layer = QuantizedLinear(linear(96, 37), kind, CPU)
    tensors = (layer.codes, layer.scales)
    assert sum(t.numel() * t.element_size() for t in tensors) == size_of(layer, kind)
    assert size_of(layer, "nf4") < size_of(layer, "int8") < size_of(layer, None, 2)
    assert size_of(layer, None) == 4 * 96 * 37


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_as_a_plain_layer_of_its_weight_does_and_keeps_nothing_wide(kind, dtype):
    layer = QuantizedLinear(linear(96, 40).to(dtype), kind, CPU)
    plain = linear(96, 40).to(dtype)
    plain.weight.copy_(layer.weight)
    widened.widen(plain)  # as all frozen layers are, where the CPU knows no bfloat16
    x = torch.randn(2, 5, 96).to(dtype)
    kept, found = [], []
    for each in (layer, plain):
        x = x.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, each=each: kept.append(each) or t, lambda t: t
        ):
            y = each(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert layer not in kept
    assert plain in kept


@pytest.mark.parametrize("width", [64, 128])
def test_nf4_is_that_of_bitsandbytes(width):
    functional = pytest.importorskip("bitsandbytes.functional")
    plain = linear(width, 40)
    codes, state = functional.quantize_4bit(plain.weight, quant_type="nf4", blocksize=BLOCK)
    layer = QuantizedLinear(plain, "nf4", CPU)
    assert torch.equal(codes.flatten(), layer.codes.flatten())
    torch.testing.assert_close(functional.dequantize_4bit(codes, state), layer.weight.detach())


def test_int8_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    plain = linear(96, 40).half()  # theirs reads 16 bits
    codes, scales, _ = functional.int8_vectorwise_quant(plain.weight)
    layer = QuantizedLinear(plain, "int8", CPU)
    assert (codes.int() - layer.codes.int()).abs().max() <= 1  # they round halves otherwise
    torch.testing.assert_close(scales / 127, layer.scales.flatten(), rtol=1e-3, atol=0)


# whole families


@pytest.fixture(scope="module", params=list(REGISTRY))
def model(request, tmp_path_factory):
    return request.param, str(tiny.build(request.param, tmp_path_factory.mktemp("quantized")))


def loss_of(family, spec):
    """Loss and predictions (rms of them and of a picture's error) of three pictures, with fresh adapters on."""
    adapters.add(family, {next(iter(family.targets)): LoraSpec(rank=2)})
    batch = Cache(family, data.load(spec, "train"), spec, seed=5).batch([0, 1, 2])
    said = []
    predict = family.predict
    family.predict = lambda *args: said.append(predict(*args)) or said[-1]
    loss = diffusion_loss(family, batch)
    loss.loss.backward()
    return loss, said[0].detach().flatten(1).float()


@each_kind
def test_the_loss_is_that_of_the_plain_base_within_the_rounding(model, kind, config):
    """Each layer's output is off by the relative error e of its weights, and n independent errors add in squares.

    So the prediction is off by d <= e sqrt(n) of its size; by Cauchy and Schwarz the mean square of (prediction -
    target) then changes by no more than 2 sqrt(loss) d + d^2.
    """
    plain, rounded = load_family(*model), load_family(*model, base_model_precision=kind)
    assert (kind_of(network(plain)), kind_of(network(rounded))) == (None, kind)
    theirs = linears(network(rounded))
    n = len(theirs)
    e = max(
        float((theirs[name].weight - layer.weight).norm() / layer.weight.norm())
        for name, layer in linears(network(plain)).items()
    )
    assert e < {"int8": 0.01, "nf4": 0.12}[kind]
    (loss, said), (other, wrong) = loss_of(plain, config.data), loss_of(rounded, config.data)
    d = (said - wrong).square().mean(1).sqrt()
    size = said.square().mean(1).sqrt()
    assert (d > 0).all()
    assert (d <= e * math.sqrt(n) * size).all(), (d / size, e, n)
    change = (other.per_image - loss.per_image).abs()
    limit = (2 * loss.per_image.sqrt() * d + d.square()) * 1.001
    assert (change <= limit).all()
    part = next(iter(plain.targets))
    reached, found = (
        [w.grad is not None for w in adapters.parameters(family)[part]]
        for family in (plain, rounded)
    )
    assert reached == found


def test_a_quantized_family_is_on_its_device_as_a_whole(model):
    family = load_family(*model, base_model_precision="nf4", device="meta")
    for plain, part in vars(load_family(*model, device="meta")).items():
        if isinstance(part, torch.nn.Module):
            there = {tensor.device.type for tensor in part.state_dict().values()}
            assert {t.device.type for t in getattr(family, plain).state_dict().values()} == there
    assert family.device.type == "meta"


# whole runs


def losses(config):
    return [step.loss for step in train(config)]


@each_kind
def test_a_run_is_resumed_bit_for_bit_and_its_file_fits_the_plain_base(kind, config, tmp_path):
    config = config.replace(base_model_precision=kind, max_train_steps=6, lr_warmup_steps=0)
    whole = losses(config)
    halves = config.replace(output_dir=str(tmp_path / "halves"))
    for step in train(halves):
        if step.step == 3:
            break
    assert losses(halves) == whole[3:]
    file, other = (load_file(f"{c.output_dir}/{FILE_NAME}") for c in (config, halves))
    assert all(torch.equal(other[name], value) for name, value in file.items())

    plain = config.replace(base_model_precision=None, output_dir=str(tmp_path / "plain"))
    other = losses(plain)
    assert other != whole
    # Off by less than the weights are: their errors, 1 / 254 of them and a tenth, partly cancel in a mean of squares.
    assert whole == pytest.approx(other, rel={"int8": 1 / 254, "nf4": 0.1}[kind])
    assert file.keys() == load_file(f"{plain.output_dir}/{FILE_NAME}").keys()
    pipeline = load_pipeline(config.pretrained_model_name_or_path, config.output_dir)
    family = load_family("sd", config.pretrained_model_name_or_path)
    adapters.add(family, config.lora)
    saved = checkpoint.latest(Path(config.output_dir))
    adapters.load_state(family, run_state.adapter_weights(saved.tensors))
    x = torch.randn(1, 4, 8, 8)
    states = torch.randn(1, 16, 32)
    with torch.no_grad():
        found, wanted = (unet(x, 10, states).sample for unet in (pipeline.unet, family.unet))
    torch.testing.assert_close(found, wanted)


def test_switches_change_nothing(config, tmp_path):
    config = config.replace(base_model_precision="nf4", lr_warmup_steps=0)
    plain = losses(config)
    for name, value in (("gradient_checkpointing", True), ("fused_lora", False)):
        other = config.replace(**{name: value}, output_dir=str(tmp_path / name))
        assert losses(other) == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_other_families_go_on_bit_for_bit(name, config, tmp_path):
    base = str(tiny.build(name, tmp_path / "base"))
    config = config.replace(
        pretrained_model_name_or_path=base, base_model_precision="nf4", mixed_precision="bf16"
    )
    whole = losses(config)
    halves = config.replace(output_dir=str(tmp_path / "halves"))
    for _ in train(halves):
        break
    assert losses(halves) == whole[1:]


def test_samples_certificates_and_loading_work_on_it(config):
    config = config.replace(
        base_model_precision="int8",
        validation_prompts=("a",),
        num_inference_steps=2,
        lr_warmup_steps=0,
    )
    run = train(config)
    for _ in lora_nb.with_samples(run):
        pass
    pipeline = run.family.pipeline()
    apart = generate(pipeline, ["a"], [1], num_inference_steps=2)[0]
    with fused(pipeline):
        assert list(generate(pipeline, ["a"], [1], num_inference_steps=2)[0].getdata()) == list(
            apart.getdata()
        )
    model = config.pretrained_model_name_or_path
    assert certify(run.family, f"{config.output_dir}/{FILE_NAME}", model).holds
    assert certify_run(config.output_dir).holds
    with pytest.raises(ConfigError, match="merged into quantized"):
        pipeline.fuse_lora()


def test_what_cannot_be_is_refused(config, tiny_sd, tmp_path):
    with pytest.raises(ConfigError, match="base_model_precision is 'fp8'"):
        TrainConfig.from_dict(config.to_dict() | {"base_model_precision": "fp8"})
    plain = load_family("sd", str(tiny_sd))
    with pytest.raises(ConfigError, match="is 'nf4', but the base model that was given"):
        train(config.replace(base_model_precision="nf4"), plain)
    losses(config)
    with pytest.raises((CheckpointError, ConfigError), match="base_model_precision"):
        train(config.replace(base_model_precision="nf4", max_train_steps=6))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["base_model_precision"] is None
