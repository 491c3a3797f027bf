"""Packed convolutions give torch's numbers, forward and backward, and nothing else of a network changes."""

import copy
import io
import time

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lora_nb import packing
from lora_nb.config import LoraSpec
from lora_nb.families import load_family, network, widened
from lora_nb.inference import with_samples
from lora_nb.trainer import train

knows = pytest.mark.skipif(not widened.SUPPORTED, reason="this CPU's kernels know no bfloat16")


def convolution(*args, dtype=torch.bfloat16, **kwargs):
    torch.manual_seed(0)
    return nn.Conv2d(*args, **kwargs).to(dtype).requires_grad_(False)


def both(layer, x, seed=1):
    """The output, and the gradient of the input for a drawn gradient of the output, of bfloat16's numbers."""
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


@knows
@pytest.mark.parametrize(
    ("args", "kwargs", "shape"),
    [
        ((8, 16, 3), {"padding": 1}, (2, 8, 9, 7)),
        ((16, 8, 1), {}, (3, 16, 5, 5)),
        ((4, 12, 3), {"padding": 0, "bias": False}, (1, 4, 8, 8)),
        ((4, 6, (3, 1)), {"padding": (2, 0)}, (2, 4, 6, 5)),
        ((40, 24, 5), {"padding": 2}, (2, 40, 4, 4)),
    ],
    ids=["3x3", "1x1", "no padding, no bias", "not square", "5x5"],
)
def test_numbers_are_torchs(args, kwargs, shape):
    """As near to the exact result as torch's own, and the output in the same layout."""
    conv = convolution(*args, **kwargs)
    x = torch.randn(shape).bfloat16()
    exact = both(copy.deepcopy(conv).double(), x.double())
    torchs = both(conv, x)
    assert packing.pack(conv) == 1
    ours = both(conv, x)
    assert ours[0].is_contiguous()
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).norm() <= 1.05 * (b - c).norm()
    assert both(conv, x[:1, :, :4])[0].shape[0] == 1  # another size of the input


@knows
@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        ({"stride": 2}, torch.bfloat16),
        ({"dilation": 2}, torch.bfloat16),
        ({"groups": 2}, torch.bfloat16),
        ({"padding": "same"}, torch.bfloat16),
        ({"padding": 1, "padding_mode": "reflect"}, torch.bfloat16),
        ({"padding": 3}, torch.bfloat16),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_others_stay_torchs(kwargs, dtype):
    conv = convolution(4, 4, 3, dtype=dtype, **kwargs)
    assert packing.pack(conv) == 0
    assert "forward" not in vars(conv)


@knows
def test_it_is_torchs_without_gradients_and_after_a_move():
    conv = convolution(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 6, 6).bfloat16()
    packing.pack(conv)
    with torch.no_grad():
        conv(x)
    assert conv.forward.packed_for is None  # nothing has been packed for it
    before = both(conv, x)
    conv.weight.data = 2 * conv.weight.data
    conv.bias.data = 2 * conv.bias.data
    torch.testing.assert_close(both(conv, x), (2 * before[0], 2 * before[1]), atol=0, rtol=0)
    conv.float()
    assert both(conv, x.float())[0].dtype == torch.float32
    packing.unpack(conv)
    assert "forward" not in vars(conv)


@knows
@pytest.mark.parametrize(("wide", "narrow", "side"), [(384, 256, 4), (384, 128, 8), (192, 64, 8)])
def test_weights_lie_as_the_kernel_reads_them_at_that_size(wide, narrow, side):
    """Laid out for another size they are laid out anew at each call, in up to 80 times the convolution's time."""
    conv = convolution(wide, narrow, 3, padding=1)
    plain = copy.deepcopy(conv)
    packing.pack(conv)
    for pictures, size in ((4, side), (1, 2 * side), (4, side)):
        x = torch.randn(pictures, wide, size, size).bfloat16()
        both(conv, x)
        assert conv.forward.packed_for[1] == x.shape
        assert seconds(conv, x) < 4 * seconds(plain, x)


def seconds(conv, x):
    """The quickest of ten times there and back."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        both(conv, x)
        times.append(time.perf_counter() - began)
    return min(times)


@knows
def test_large_pictures_are_torchs():
    conv = convolution(8, 8, 3, padding=1)
    packing.pack(conv)
    both(conv, torch.randn(4, 8, 12, 12).bfloat16())
    assert conv.forward.packed_for is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=knows)], ids=str
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed for steps", "not packed"])
def test_drawing_packs_what_the_weights_are_then_and_leaves_no_trace(dtype, packed):
    conv = convolution(8, 8, 3, padding=1, dtype=dtype)
    x = torch.randn(1, 8, 6, 6).to(dtype)
    if packed:
        packing.pack(conv)
    before = dict(vars(conv))
    with torch.no_grad():
        plain = conv(x)
        conv.weight.data *= 2  # as a merge does, which leaves no trace
        conv.bias.data *= 2
        with packing.drawing(conv):
            drawn = conv(x)
            assert conv.forward.packed_for is not None
            large = torch.randn(4, 8, 20, 20).to(dtype)
            assert conv.forward.packed_for[1] != large.shape == conv(large).shape
        torch.testing.assert_close(drawn, 2 * plain, atol=0, rtol=2e-2)
        torch.testing.assert_close(conv(x), 2 * plain, atol=0, rtol=0)
    assert vars(conv) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_drawing_leaves_other_dtypes_alone(dtype):
    conv = convolution(8, 8, 3, dtype=dtype)
    with packing.drawing(conv):
        assert "forward" not in vars(conv)


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=knows)])
def test_samples_are_drawn_with_packed_weights(config, monkeypatch, precision):
    ran, call = [], packing._Packed.__call__
    monkeypatch.setattr(
        packing._Packed,
        "__call__",
        lambda *a: ran.append(torch.is_grad_enabled()) or call(*a),
    )
    run = config.replace(mixed_precision=precision, max_train_steps=1, num_inference_steps=2)
    run = run.replace(validation_prompts=("a cat",), num_validation_images=1)
    list(with_samples(train(run)))
    assert ran.count(False) > 10  # every step of a picture has ten such convolutions
    ran.clear()
    list(with_samples(train(run.replace(channels_last=False, overwrite=True))))
    assert ran == []


@knows
def test_a_packed_network_can_be_copied_and_kept():
    conv = convolution(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 6, 6).bfloat16()
    packing.pack(conv)
    before = both(conv, x)
    twin = copy.deepcopy(conv)
    torch.testing.assert_close(both(twin, x), before, atol=0, rtol=0)
    assert twin.forward.conv is twin
    torch.save(conv, kept := io.BytesIO())
    kept.seek(0)
    again = torch.load(kept, weights_only=False)
    torch.testing.assert_close(both(again, x), before, atol=0, rtol=0)


@knows
@pytest.mark.parametrize(
    "targets", [["to_q", "to_v"], ["conv1", "to_q"]], ids=["attention", "convolutions too"]
)
def test_a_training_in_bf16_learns_the_same(config, targets):
    """With and without, also where convolutions carry adapters; a later training without it unpacks."""
    # A larger rate makes of the rounding, in either run, more than the tolerance.
    config = config.replace(
        mixed_precision="bf16",
        lora={"unet": LoraSpec(rank=2, target_modules=targets)},
        learning_rate=1e-3,
    )
    family = load_family("sd", config.pretrained_model_name_or_path, dtype=torch.bfloat16)

    def losses(name, **changes):
        config_of = config.replace(output_dir=f"{config.output_dir}-{name}", **changes)
        return [step.loss for step in train(config_of, family)]

    def packed():
        return sum(
            isinstance(vars(m).get("forward"), packing._Forward) for m in network(family).modules()
        )

    ours = losses("packed")
    assert packed() > 10
    assert ours == losses("again")
    assert ours == pytest.approx(losses("plain", channels_last=False), abs=2e-3)
    assert packed() == 0


def test_a_training_in_float32_packs_nothing(config):
    training = train(config)
    next(iter(training))
    others = (Attention, ResnetBlock2D, nn.Linear)  # which have forwards of ours in any precision
    modules = [m for m in network(training.family).modules() if not isinstance(m, others)]
    assert not any("forward" in vars(m) for m in modules)
