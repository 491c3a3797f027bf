"""Going on where a run stopped: bit for bit the same on the CPU in float32, from every step, in new processes."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lives import Lives, log_of
from PIL import Image
from test_properties import by_hand

from lora_nb import checkpoint, run_folder
from lora_nb.config import DataSpec, LoraSpec, TrainConfig

STEPS = 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Seven pictures that are not square and no two pixels alike, so that crop and flip show."""
    folder = tmp_path_factory.mktemp("scenes")
    noise = np.random.default_rng(0)
    rows = []
    for i in range(7):
        pixels = noise.integers(0, 256, (20 + i, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": [f"scene {i}", f"view {i}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def config(tiny_sd, scenes, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd),
        data=DataSpec(
            train_data_dir=str(scenes), resolution=16, random_flip=True, caption_dropout=0.3
        ),
        lora={"unet": LoraSpec(rank=2, lora_dropout=0.1)},
        output_dir=str(tmp_path / "run"),
        seed=3,
        max_train_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        checkpointing_steps=1,
    )


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    with Lives(tmp_path_factory.mktemp("lives")) as lives:
        yield lives


def same_end(a: TrainConfig, b: TrainConfig) -> bool:
    """Whether adapters and Adam's moments of two finished runs are equal, bit for bit."""
    ends = [checkpoint.read(Path(c.output_dir) / f"checkpoint-{c.max_train_steps}") for c in (a, b)]
    one, other = (end.tensors for end in ends)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def as_if_killed_after(step: int, whole: TrainConfig) -> TrainConfig:
    """A copy of a run's folder as it was when its newest checkpoint was of this step."""
    copy = whole.replace(output_dir=f"{whole.output_dir}-from-{step}")
    shutil.copytree(whole.output_dir, copy.output_dir)
    for folder in checkpoint.found(Path(copy.output_dir)):
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)
    return copy


GRID = [
    {
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
        "train_batch_size": batch,
        "cache_latents": cached,
    }
    for accumulation, workers, batch, cached in itertools.product((1, 2, 3), (0, 2), (1, 3), (True, False))
]  # fmt: skip
SAMPLE = [
    GRID[14],
    GRID[17],
]  # accumulation 2 and 3, batch 3 and 1, cached and not, workers 2 and 0


def restarts_are_exact(config, lives, settings, fresh=()) -> int:
    """Restart from every step, from those in `fresh` in a new interpreter; the number of restarts."""
    whole = config.replace(**settings)
    assert lives(whole) == 0, lives.said
    expected = log_of(whole)
    for step in range(1, STEPS):
        again = as_if_killed_after(step, whole)
        assert lives(again, fresh=step in fresh) == 0, lives.said
        assert log_of(again) == {k: v for k, v in expected.items() if k > step}
        assert same_end(whole, again)
    return STEPS - 1


@pytest.mark.slow
def test_restarts_from_every_step_are_exact(config, lives):
    """10 restarts: losses, rates, pictures in order as pixels and captions, adapters and moments."""
    for i, settings in enumerate(SAMPLE):
        here = config.replace(output_dir=f"{config.output_dir}-{i}")
        restarts_are_exact(here, lives, settings)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_120_restarts_in_new_processes_are_exact(config, lives):
    """Every step of every setting, each in a process of its own; one of each setting in a new interpreter too."""
    points = 0
    for i, settings in enumerate(GRID):
        here = config.replace(output_dir=f"{config.output_dir}-{i}")
        points += restarts_are_exact(here, lives, settings, fresh={1 + i % (STEPS - 1)})
        print(f"{points} restart points exact, the last with {settings}", flush=True)
    assert points == 120


@pytest.mark.slow
def test_workers_and_cache_change_nothing(config, lives):
    """dataloader_num_workers is accepted for compatibility: nothing reads it."""
    settings = [(0, True), (2, True), (0, False)]
    runs = [
        config.replace(
            dataloader_num_workers=workers, cache_latents=cached,
            output_dir=f"{config.output_dir}-{workers}-{cached}",
        )
        for workers, cached in settings
    ]  # fmt: skip
    assert [lives(run) for run in runs] == [0, 0, 0], lives.said
    assert log_of(runs[0]) == log_of(runs[1]) == log_of(runs[2])
    assert same_end(runs[0], runs[1])
    assert same_end(runs[0], runs[2])


def losses(config) -> list[tuple[int, float]]:
    """Step and loss from the history; a step that stands there twice shows."""
    lines = run_folder.read_history(config.output_dir)
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


@pytest.mark.slow
def test_a_chain_of_20_kills_equals_the_uninterrupted_run(config, lives):
    """Each life dies at a file operation of its own: in a save, between saves, in the history, while starting."""
    config = config.replace(max_train_steps=20, checkpoints_total_limit=2)
    whole = config.replace(output_dir=config.output_dir + "-whole")
    assert lives(whole) == 0, lives.said
    numbers, deaths = random.Random(5), 0
    for _ in range(20):
        deaths += lives(config, operation=numbers.randint(5, 90)) == -9
    assert deaths == 20
    assert lives(config) == 0, lives.said
    # A life that dies between checkpoint and log has done its step all the same.
    assert log_of(config).items() <= log_of(whole).items()
    assert losses(config) == losses(whole)
    assert same_end(config, whole)
    left = {p.name for p in Path(config.output_dir).iterdir()}
    assert left == {p.name for p in Path(whole.output_dir).iterdir()}


TWO_PROCESSES = """
import json, os, signal, sys
from lora_nb.config import TrainConfig
from lora_nb.trainer import train
config = TrainConfig.from_json(open(sys.argv[1]).read())
rank = int(os.environ["RANK"])
whole = [s.loss for s in train(config.replace(output_dir=config.output_dir + "-whole"))]
training = train(config)
for step in training:
    if rank == 1 and step.step == 2:  # one of two is interrupted: both stop after the next step at the latest
        os.kill(os.getpid(), signal.SIGINT)
assert training.interrupted and training.start_step == 2, (rank, training.start_step)
rest = [s.loss for s in train(config)]
assert rest == whole[2:], (rest, whole)
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_exactly(config, tmp_path):
    file, code = tmp_path / "config.json", tmp_path / "two.py"
    file.write_text(config.replace(gradient_accumulation_steps=2).to_json())
    code.write_text(TWO_PROCESSES)
    command = "-m torch.distributed.run --nproc_per_node 2 --master_port 29523".split()
    done = subprocess.run(
        [sys.executable, *command, str(code), str(file)], capture_output=True, text=True,
        timeout=400, env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_end(config, config.replace(output_dir=config.output_dir + "-whole"))


SCHEDULES = """
import itertools, json, sys
from lora_nb.config import TrainConfig
from lora_nb.trainer import train
base = TrainConfig.from_json(open(sys.argv[1]).read())
for name, warmup, accumulation in itertools.product(("constant", "linear", "cosine"), (0, 2), (1, 3)):
    config = base.replace(
        lr_scheduler=name, lr_warmup_steps=warmup, gradient_accumulation_steps=accumulation,
        output_dir=f"{base.output_dir}-{name}-{warmup}-{accumulation}",
    )
    training = train(config)
    rates = [step.lr["unet"] for step in training]
    if training.accelerator.is_main_process:
        print(json.dumps([name, warmup, rates]), flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_learning_rates_are_the_formula_whatever_processes_and_accumulation(
    config, tmp_path, processes
):
    file, code = tmp_path / "config.json", tmp_path / "schedules.py"
    file.write_text(config.replace(max_train_steps=5, train_batch_size=1).to_json())
    code.write_text(SCHEDULES)
    command = f"-m torch.distributed.run --nproc_per_node {processes} --master_port 29531".split()
    done = subprocess.run(
        [sys.executable, *command, str(code), str(file)], capture_output=True, text=True,
        timeout=500, env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 12
    for name, warmup, rates in runs:
        expected = [1e-2 * by_hand(name, k, warmup, 5, 1, 1.0) for k in range(5)]
        assert rates == pytest.approx(expected)
        assert name == "constant" or by_hand(name, 5, warmup, 5, 1, 1.0) == 0  # what comes next
