"""Shortened blocks of convolutions compute what the library's do, to the bit, and are its own again afterwards."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from lora_nb import resnets
from lora_nb.config import LoraSpec
from lora_nb.trainer import train


def outputs(block, x, temb):
    """The result and the gradients of both inputs."""
    x, temb = x.clone().requires_grad_(), temb.clone().requires_grad_()
    result = block(x, temb)
    return [result, *torch.autograd.grad(result.square().sum(), (x, temb))]


@pytest.mark.parametrize("out", [32, 64])
def test_results_and_gradients_are_those_of_the_library(out):
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, out_channels=out, temb_channels=16, groups=8).eval()
    inputs = torch.randn(2, 32, 6, 6), torch.randn(2, 16)
    theirs = outputs(block, *inputs)
    assert resnets.shorten(block) == 1
    copied = copy.deepcopy(block)
    for each in (block, copied):
        torch.testing.assert_close(outputs(each, *inputs), theirs, atol=0, rtol=0)
    assert copied.forward.block is copied
    resnets.undo(block)
    assert "forward" not in vars(block)


@pytest.mark.parametrize(
    "unlike",
    [
        {"up": True},
        {"down": True},
        {"dropout": 0.1},
        {"output_scale_factor": 2.0},
        {"time_embedding_norm": "scale_shift"},
        {"temb_channels": None},
        {"skip_time_act": True},
        {"non_linearity": "gelu"},
    ],
)
def test_other_blocks_are_left_alone(unlike):
    block = ResnetBlock2D(**{"in_channels": 32, "temb_channels": 16, "groups": 8} | unlike)
    assert resnets.shorten(block) == 0
    assert "forward" not in vars(block)


def test_a_training_has_them_and_adapters_in_them_learn(config):
    targets = ("to_q", "conv1", "time_emb_proj")
    training = train(
        config.replace(max_train_steps=2, lora={"unet": LoraSpec(target_modules=targets)})
    )
    blocks = [m for m in training.family.unet.modules() if isinstance(m, ResnetBlock2D)]
    assert blocks
    assert all(isinstance(vars(block)["forward"], resnets._Forward) for block in blocks)
    before = [weight.clone() for weight in training.learner.all_weights()]
    list(training)
    assert not any(map(torch.equal, before[1::2], training.learner.all_weights()[1::2]))
