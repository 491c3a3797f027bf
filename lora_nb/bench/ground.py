"""What is measured on: a small real base model, 200 pictures with captions, and the flags that both sides are given."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lora_nb.families.shapes import save_small

WORDS = ("red", "green", "blue", "round", "square", "small", "large", "bright", "dark", "old")


def lay(folder: Path, count: int, side: int) -> Path:
    """Make the base model and the pictures in `folder` unless they are there; returns the folder."""
    if not (folder / "base" / "model_index.json").is_file():
        save_small(folder / "base")
    lay_pictures(folder, count, side)
    return folder


def lay_pictures(folder: Path, count: int, side: int) -> None:
    """Make the pictures in `folder` unless they are there."""
    pictures = folder / f"pictures-{count}-{side}"
    if not (pictures / "metadata.jsonl").is_file():
        pictures.mkdir(parents=True)
        draw(pictures, count, side)


def draw(folder: Path, count: int, side: int) -> None:
    """Write `count` PNGs of smooth colours with a little grain, and their captions."""
    rows = []
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        grain = random.integers(-6, 7, smooth.shape)
        picture = (smooth.astype(int) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:05d}.png")
        words = " ".join(random.choice(WORDS, 4))
        rows.append(json.dumps({"file_name": f"{i:05d}.png", "text": f"a {words} thing"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def flags(
    folder: Path, output: Path, steps: int, batch: int, precision: str, count: int, side: int
) -> list[str]:
    """The command line of one training, understood alike by the reference script and by `lora-nb train`."""
    values = {
        "pretrained_model_name_or_path": folder / "base",
        "train_data_dir": folder / f"pictures-{count}-{side}",
        "output_dir": output,
        "resolution": side,
        "train_batch_size": batch,
        "max_train_steps": steps,
        "mixed_precision": precision,
        "rank": 8,
        "learning_rate": "1e-4",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": 42,
        "checkpointing_steps": 100_000,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*words, "--center_crop"]
