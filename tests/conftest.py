"""What all tests share: no network in any process, a runs folder of their own, a tiny base model."""

import gc
import os
import sys
from pathlib import Path

OFFLINE = Path(__file__).parent / "offline"
REPO = Path(__file__).resolve().parents[1]

# Before any import of a library that reads these.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LORA_NB_HEADLESS": "1",
    "PYTHONPATH": str(OFFLINE) + os.pathsep + str(REPO),
}
sys.path.insert(0, str(OFFLINE))
import pytest  # noqa: E402
import sitecustomize  # noqa: E402, F401
from hypothesis import HealthCheck, settings  # noqa: E402

import lora_nb  # noqa: E402, F401  # before torch, whose threads it tells how to wait

# A folder for all examples of a property is meant; times say nothing on a shared machine.
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=25, derandomize=True, **QUIET)
settings.register_profile("long", max_examples=200, print_blob=True, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_sessionstart():
    gc.disable()  # while all tests and libraries are imported, which is when it costs most and finds nothing


def pytest_collection_finish():
    gc.freeze()  # what is imported now stays, so no later collection looks through it
    gc.enable()


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Runs and caches go to scratch folders, wherever the developer's own may be."""
    monkeypatch.setenv("LORA_NB_RUNS", str(tmp_path_factory.mktemp("runs")))
    monkeypatch.setenv("LORA_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A Stable Diffusion pipeline of random weights, 16 px, built in a second; do not write into it."""
    from lora_nb.families import tiny

    return tiny.build("sd", tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Eight pictures of one colour with captions, 24 px, and two held out; do not write into it."""
    import json

    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 8), ("validation", 2)):
        (folder / split).mkdir()
        rows = []
        for i in range(count):
            Image.new("RGB", (24, 24), (30 * i, 90, 200)).save(folder / split / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": f"colour {i}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def config(tiny_sd, pictures, tmp_path):
    """Four steps on those pictures, rank 2, in a folder that does not exist yet."""
    from lora_nb.config import DataSpec, LoraSpec, TrainConfig

    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd),
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        lora={"unet": LoraSpec(rank=2)},
        output_dir=str(tmp_path / "run"),
        seed=3,
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-2,
    )
