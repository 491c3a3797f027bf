"""The class pictures of prior preservation: which they are, and whether there are enough.

DreamBooth (Ruiz et al. 2023, section 3.2) shows the model its own pictures of the class beside the subject, so that it
does not forget what other members of the class look like. Drawing them is in lora_nb.inference.
"""

import dataclasses
from pathlib import Path

from lora_nb import data
from lora_nb.config import DataSpec, TrainConfig
from lora_nb.errors import DataError


def spec(config: TrainConfig) -> DataSpec:
    """How class pictures are read: like the others, all of them with the class prompt."""
    return dataclasses.replace(
        config.data,
        train_data_dir=config.class_data_dir,
        dataset_name=None,
        validation_data_dir=None,
        instance_prompt=config.class_prompt,
        max_train_samples=config.num_class_images,
    )


def load(config: TrainConfig) -> data.Pictures:
    """The class pictures of a run with prior preservation.

    Raises DataError if there are fewer than `num_class_images`, or if they cannot be read.
    """
    there = count(config)
    if there < config.num_class_images:
        raise DataError(
            f"{config.class_data_dir} holds {there} of {config.num_class_images} class pictures; let the base model "
            "draw the others with lora_nb.make_class_pictures(config), or lower num_class_images."
        )
    return data.load(spec(config))


def count(config: TrainConfig) -> int:
    """How many picture files the class folder holds."""
    folder = Path(str(config.class_data_dir))
    return sum(f.suffix.lower() in data.SUFFIXES for f in folder.glob("*") if f.is_file())
