"""Where we differ from the reference scripts on purpose: each test computes their fault, then shows ours without it.

Exact resume, the last of the list, is in test_families.py and test_command_line_families.py.
"""

import inspect
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, WuerstchenCombinedPipeline
from diffusers.optimization import get_scheduler
from peft import get_peft_model_state_dict
from PIL import Image

from lora_nb import adapters, checkpoint, data, formats, run_folder
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.families import load_family, tiny
from lora_nb.inference import generate, with_samples
from lora_nb.optimization import learning_rate_factors
from lora_nb.trainer import train


@pytest.fixture
def config(config):
    return config.replace(num_inference_steps=2)


def test_the_schedule_ends_with_the_training_whatever_the_accumulation():
    """Theirs has accumulation times as many steps as are ever taken: a cosine gets through its first quarter."""
    steps, accumulation = 20, 4
    weight = torch.nn.Parameter(torch.zeros(1))
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    total = steps * accumulation
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=total)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    for _ in range(total):
        with accelerator.accumulate():
            accelerator.backward(weight.sum())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert schedule.get_last_lr() == pytest.approx([0.5 * (1 + math.cos(math.pi / 4))])  # not 0
    config = TrainConfig(
        lr_scheduler="cosine", lr_warmup_steps=0, gradient_accumulation_steps=accumulation
    )
    assert learning_rate_factors(config, steps)(steps) == 0


def test_clipping_sees_every_tensor(config):
    """Their list of weights is an iterator, which the optimizer has used up before clipping asks for it."""
    layer = torch.nn.Linear(3, 3)
    weights = filter(lambda p: p.requires_grad, layer.parameters())
    torch.optim.AdamW(weights)
    (1000 * layer(torch.ones(3)).sum()).backward()
    before = layer.weight.grad.clone()
    assert torch.nn.utils.clip_grad_norm_(weights, 1.0) == 0
    assert torch.equal(layer.weight.grad, before)

    (step,) = train(config.replace(max_grad_norm=1e-3, max_train_steps=1))
    assert step.grad_norm > 1e-2
    saved = checkpoint.read(Path(config.output_dir) / "checkpoint-1").tensors
    first_moments = [v for k, v in saved.items() if k.endswith("exp_avg")]
    norm = torch.stack([m.norm() for m in first_moments]).norm()  # 1 - beta1 times the gradient
    assert norm.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def moved_share(before: torch.Tensor, after: torch.Tensor) -> float:
    return (before != after).float().mean().item()


def test_adapters_are_float32_beside_a_half_precision_base(config):
    """Theirs have the base's bfloat16, whose spacing around A's start values is wider than a step of 1e-4."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        start = 0.25 * torch.randn(4, 64, generator=generator)  # N(0, 1/r) at rank 4
        start = start.to(dtype)
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(50):
            weight.grad = torch.randn(4, 64, generator=generator).to(dtype)
            optimizer.step()
        moved[dtype] = moved_share(start, weight.detach())
    assert moved[torch.bfloat16] < 0.3
    assert moved[torch.float32] == 1

    training = train(config.replace(mixed_precision="bf16", learning_rate=1e-4))
    before = adapters.state(training.family)["unet"]
    list(training)
    after = adapters.state(training.family)["unet"]
    shares = [moved_share(before[key], after[key]) for key in before]
    assert min(shares) > 0.9


def scale_of(pipeline: StableDiffusionPipeline) -> float:
    _, layer = next(adapters.layers(pipeline.unet))
    return layer.scaling[layer.active_adapters[0]]


def test_alpha_is_in_the_file(tiny_sd, tmp_path):
    """Their file says nothing of alpha, so an adapter of scale 4 comes back at scale 1."""
    family = load_family("auto", str(tiny_sd))
    adapters.add(family, {"unet": LoraSpec(rank=4, lora_alpha=16)})
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    StableDiffusionPipeline.save_lora_weights(
        theirs, unet_lora_layers=get_peft_model_state_dict(family.unet, adapter_name="default")
    )
    ours.mkdir()
    formats.save_adapter(family, ours)
    scales = []
    for folder in (theirs, ours):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipeline.load_lora_weights(str(folder), weight_name=formats.FILE_NAME)
        scales.append(scale_of(pipeline))
    assert scales == [1.0, 4.0]


def test_each_validation_picture_has_a_seed_of_its_own(tiny_sd):
    """Theirs share one generator, so that the second picture cannot be drawn without the first."""
    pipeline = load_family("auto", str(tiny_sd)).pipeline()
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    one = torch.Generator().manual_seed(1)
    second = [pipeline("a fox", generator=one, **settings).images for _ in range(2)][1]
    alone = pipeline("a fox", generator=torch.Generator().manual_seed(1), **settings).images
    assert abs(second - alone).max() > 0.01

    settings = {"num_inference_steps": 2, "resolution": 16}
    _, second = generate(pipeline, "a fox", [0, 1], **settings)
    (alone,) = generate(pipeline, "a fox", 1, **settings)
    assert second.tobytes() == alone.tobytes()


def test_validation_counts_steps(config):
    """Theirs counts epochs from 0: with fewer of them than validation_epochs, only the untrained adapter is seen."""
    epochs, validation_epochs = 20, 50  # the second is the DreamBooth scripts' default
    assert [e for e in range(epochs) if e % validation_epochs == 0] == [0]

    config = config.replace(
        validation_prompts=("a fox",), validation_steps=3, num_validation_images=1
    )
    list(with_samples(train(config)))
    events = run_folder.read_history(config.output_dir)
    drawn = [(e["step"], e["base"]) for e in events if e["event"] == "samples"]
    assert drawn == [(0, True), (3, False), (4, False)]


def test_what_is_no_picture_is_passed_over(pictures, tmp_path):
    """The reference opens every entry of the folder, also what Jupyter leaves there."""
    (tmp_path / "fox.png").write_bytes((pictures / "train" / "0.png").read_bytes())
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "notes.md").write_text("my pictures")
    with pytest.raises(OSError, match=r"ipynb_checkpoints|cannot identify"):
        [Image.open(entry) for entry in tmp_path.iterdir()]

    loaded = data.load(DataSpec(str(tmp_path), instance_prompt="a sks fox", resolution=16))
    assert [row.name for row in loaded.rows] == ["fox.png"]


def test_validation_draws_with_the_tuned_prior(tmp_path):
    """The combined pipeline calls the first stage's network `prior_prior`; theirs is handed over as `prior`."""
    names = inspect.signature(WuerstchenCombinedPipeline.__init__).parameters
    assert "prior" not in names
    assert "prior_prior" in names

    family = load_family("auto", str(tiny.build("wuerstchen", tmp_path)))
    settings = {"num_inference_steps": 2, "resolution": 128}
    (base,) = generate(family.pipeline(), "a fox", 0, **settings)
    adapters.add(family, {"prior": LoraSpec(rank=2)})
    for weight in adapters.parameters(family)["prior"]:
        weight.data += 0.3
    assert family.pipeline().prior_prior is family.prior
    (tuned,) = generate(family.pipeline(), "a fox", 0, **settings)
    assert tuned.tobytes() != base.tobytes()
