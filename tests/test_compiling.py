"""Compiled blocks: the same training to rounding, the same files, no compiling again and again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_nb import adapters, compiling, projections
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import load_family
from lora_nb.inference import with_samples
from lora_nb.trainer import train

long = pytest.mark.long  # g++ compiles for a minute and more


def losses(config):
    return [step.loss for step in train(config)]


def graphs():
    """How many graphs were compiled so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@long
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fused_lora": False},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_compiled_training_has_the_losses_of_a_plain_one(config, changes):
    config = config.replace(max_train_steps=6, overwrite=True, **changes)
    plain = losses(config)
    before = graphs()
    compiled = losses(config.replace(torch_compile=True))
    assert graphs() > before
    assert compiled == pytest.approx(plain, abs=1e-5)


@long
def test_files_are_those_of_a_plain_training(config):
    keys = {}
    for on in (False, True):
        training = train(config.replace(torch_compile=on, overwrite=True))
        list(training)
        names = list(training.family.unet.state_dict())
        keys[on] = names, [f.name for f in sorted(training.folder.rglob("*.safetensors"))]
    assert keys[True] == keys[False]


@long
def test_samples_probe_and_checkpoints_between_steps_compile_nothing(config):
    config = config.replace(
        torch_compile=True, max_train_steps=5, validation_prompts=("a",), num_validation_images=1,
        validation_steps=1, num_inference_steps=2, probe_steps=1, checkpointing_steps=1,
    )  # fmt: skip
    counts = [graphs() for _ in with_samples(train(config))]
    assert counts[0] > 0
    assert len(set(counts)) == 1


@long
def test_blocks_of_one_kind_are_compiled_once(tiny_sd):
    """Nothing that is put on a block, or in it, may make the compiler tell it from its likes."""
    family = load_family("sd", str(tiny_sd))
    larger = dict(family.unet.config) | {"layers_per_block": 3}
    family.unet = UNet2DConditionModel.from_config(larger).requires_grad_(False)
    family.trainable["unet"] = family.unet
    adapters.add(family, {"unet": LoraSpec(rank=2)}, seed=1)
    projections.group(family)
    kinds = []

    def note(block, args):
        kinds.append((args[0].shape, *(weight.shape for weight in block.parameters())))

    blocks = [m for m in family.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        block.register_forward_pre_hook(note)
    assert compiling.compile_blocks(family) == len(blocks)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    family.predict(*inputs, {"encoder_hidden_states": torch.randn(2, 16, 32)})
    assert len(kinds) == len(blocks)
    # Twice: the first block's input has no gradient.
    assert len(set(kinds)) <= graphs() <= 2 * len(set(kinds)) < len(blocks)


REST = """
import sys
from lora_nb import TrainConfig, train
print([step.loss for step in train(TrainConfig.from_json(sys.argv[1]))])
"""


@long
def test_a_compiled_run_goes_on_bit_for_bit_in_another_process_that_compiles_anew(config, tmp_path):
    config = config.replace(torch_compile=True)
    steps = iter(train(config))
    halves = [next(steps).loss, next(steps).loss]
    steps.close()
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REST, config.to_json()],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    halves += json.loads(done.stdout.splitlines()[-1])
    assert halves == losses(config.replace(output_dir=str(tmp_path / "whole")))


@long
def test_the_blocks_of_a_family_are_plain_again_in_the_next_training(config, tiny_sd):
    """They have the forwards of a training whose family was never compiled."""
    families = [load_family("sd", str(tiny_sd)) for _ in range(2)]
    list(train(config.replace(torch_compile=True, max_train_steps=1), families[0]))
    assert compiling.compiled(families[0].unet)
    found = []
    for family in families:
        list(train(config.replace(overwrite=True, max_train_steps=1), family))
        own = {name: vars(m).get("forward") for name, m in family.unet.named_modules()}
        found.append({name: getattr(f, "__func__", type(f)) for name, f in own.items()})
    assert found[0] == found[1]
    assert not compiling.compiled(families[0].unet)


def test_a_machine_without_a_compiler_is_told_before_the_first_step(config, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match="no-such-compiler"):
        train(config.replace(torch_compile=True))


def test_a_quantized_base_is_not_compiled(config):
    with pytest.raises(ConfigError, match="cannot be combined"):
        train(config.replace(torch_compile=True, base_model_precision="nf4"))


def test_a_network_without_repeated_blocks_is_refused(tiny_sd, monkeypatch):
    family = load_family("sd", str(tiny_sd))
    monkeypatch.setattr(type(family.unet), "_repeated_blocks", [])
    with pytest.raises(ConfigError, match="names none"):
        compiling.compile_blocks(family)
    assert not adapters.has_adapter(family.unet)
