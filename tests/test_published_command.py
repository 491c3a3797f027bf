"""The guide's published command, with nothing changed but paths, precision and what needs a network."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL, AutoPipelineForText2Image, UNet2DConditionModel
from PIL import Image as Pillow

from lora_nb import run_folder
from lora_nb.cli import main
from lora_nb.families import tiny
from lora_nb.formats import FILE_NAME
from lora_nb.optimization import learning_rate_factors

# Left out: --push_to_hub, --hub_model_id, --report_to=wandb. Paths in the guide are shell variables too.
COMMAND = """
  --pretrained_model_name_or_path=$MODEL_NAME
  --dataset_name=$DATASET_NAME
  --dataloader_num_workers=8
  --resolution=512
  --center_crop
  --random_flip
  --train_batch_size=1
  --gradient_accumulation_steps=4
  --max_train_steps=15000
  --learning_rate=1e-04
  --max_grad_norm=1
  --lr_scheduler="cosine"
  --lr_warmup_steps=0
  --output_dir=${OUTPUT_DIR}
  --checkpointing_steps=500
  --validation_prompt="A naruto with blue eyes."
  --seed=1337
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = ["--multi_gpu", "--num_processes=2", "--main_process_port=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model that takes 512 pixels: its autoencoder shrinks eightfold, its attention is at the bottom only."""
    folder, levels = tiny.build("sd", tmp_path_factory.mktemp("model")), 4
    vae = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eighty pictures with captions in a parquet file, as data sets lie on the Hub."""
    folder = tmp_path_factory.mktemp("pictures")
    features = Features({"image": Image(), "text": Value("string")})
    rows = [
        {"image": Pillow.new("RGB", (600, 520), (3 * i, 90, 200)), "text": f"colour {i}"}
        for i in range(80)
    ]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def command(model, pictures, tmp_path) -> list[str]:
    names = {"MODEL_NAME": model, "DATASET_NAME": pictures, "OUTPUT_DIR": tmp_path / "naruto"}
    text = COMMAND
    for name, value in names.items():
        text = text.replace("${" + name + "}", str(value)).replace(f"${name}", str(value))
    return ["-m", "lora_nb", "train", *shlex.split(text)]


def run_until_step_10(words: list[str]) -> tuple[str, str]:
    """Start a command, ask all its processes to stop after step 10, and return what they printed."""
    started = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    printed = []
    for line in started.stdout:
        printed.append(line)
        if line.startswith("step 10/15000"):
            os.killpg(started.pid, signal.SIGTERM)
    _, errors = started.communicate(timeout=120)
    return "".join(printed), errors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_guides_command_runs_as_it_is(command, model, tmp_path, processes):
    launch = [*LAUNCH, "--mixed_precision=bf16", *(TWO if processes == 2 else [])]
    printed, errors = run_until_step_10([*launch, *command])
    assert "step 10/15000" in printed, errors
    folder = tmp_path / "naruto"
    history = run_folder.read_history(folder)
    config = run_folder.read_config(folder)
    assert history[0]["dtype"] == "bfloat16"  # said to accelerate alone
    assert config.mixed_precision == "bf16"
    steps = [event for event in history if event["event"] == "step"]
    factor = learning_rate_factors(config, 15000)  # optimizer steps, whatever the processes
    assert [e["lr"]["unet"] for e in steps] == [1e-4 * factor(k) for k in range(len(steps))]
    assert {len(e["per_image"]) for e in steps} == {4 * processes}
    assert steps[9]["images_seen"] == 10 * 4 * processes
    stopped = len(steps)
    names = {path.name for path in folder.iterdir()}
    assert names >= {FILE_NAME, f"checkpoint-{stopped}"}
    pipeline = AutoPipelineForText2Image.from_pretrained(model)
    pipeline.load_lora_weights(str(folder), weight_name=FILE_NAME)
    assert pipeline.get_active_adapters()


def test_fp16_said_to_accelerate_is_refused_where_there_is_no_gpu(command, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main(command[2:]) == 2
    assert "error: mixed_precision is 'fp16', but there is no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_should_have_had_company_says_so(tiny_sd, tmp_path):
    launch = [*LAUNCH, "--cpu", "--num_processes=2", "--mixed_precision=no"]
    settings = f"--pretrained_model_name_or_path={tiny_sd} --train_data_dir={tmp_path / 'none'}"
    done = subprocess.run(
        [*launch, "-m", "lora_nb", "train", *settings.split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        "started only this one, which trains alone on smaller batches; add --multi_gpu"
        in done.stderr
    )
