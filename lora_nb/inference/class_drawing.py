"""Let the base model draw the class pictures of prior preservation."""

import io
from pathlib import Path

import torch
from PIL.Image import Image

from lora_nb import class_pictures, env
from lora_nb.config import TrainConfig
from lora_nb.families import family_of
from lora_nb.files import write_atomically
from lora_nb.inference.drawing import generate


def make_class_pictures(config: TrainConfig) -> list[Path]:
    """Draw what `class_data_dir` lacks of `num_class_images` pictures of `class_prompt`; the new files.

    Picture i is a function of the prompt, the sampling settings and i, and files that are there stay, so an
    interrupted call goes on with the next one. Pictures of one's own count too.
    """
    folder = Path(str(config.class_data_dir))
    missing = config.num_class_images - class_pictures.count(config)
    names = (folder / f"class-{i:05d}.png" for i in range(config.num_class_images))
    wanted = [file for file in names if not file.exists()][: max(missing, 0)]
    if not wanted:
        return []
    device = env.pick_device()
    family = family_of(config, getattr(torch, device.dtype), device.name)
    pipeline, size = family.pipeline(), config.sample_batch_size
    for start in range(0, len(wanted), size):
        files = wanted[start : start + size]
        seeds = [int(file.stem.split("-")[1]) for file in files]
        pictures = generate(
            pipeline,
            str(config.class_prompt),
            seeds,
            **config.sampling,
            batch_size=size,
            resolution=config.data.resolution,
        )
        for file, picture in zip(files, pictures, strict=True):
            write_atomically(file, _png(picture))
    return wanted


def _png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
