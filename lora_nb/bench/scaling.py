"""How the cost of a batch grows with the number of pictures: it should not."""

import time
from statistics import median
from typing import Any

from lora_nb import data
from lora_nb.bench.processes import DROPPED
from lora_nb.config import TrainConfig

BATCHES = 40  # of each size


def measure(config: TrainConfig, sizes: list[int]) -> list[dict[str, Any]]:
    """Median CPU seconds of the steps of a run whose index has so many rows; the runs take turns, step by step.

    The rows are those of the given pictures over and over, so everything but their number is alike: each file is read,
    and each picture found in the cache, as its own row would be.
    """
    trainings = [_training(config, size) for size in sizes]
    times = [[_step(training, done) for training in trainings] for done in range(BATCHES)]
    for training in trainings:
        training.lock.release()
    steps = [median(column) for column in zip(*times[DROPPED:], strict=True)]
    return [{"pictures": size, "step": step} for size, step in zip(sizes, steps, strict=True)]


def _training(config: TrainConfig, size: int) -> Any:
    from lora_nb.trainer import train

    training = train(
        config.replace(overwrite=True, output_dir=f"{config.output_dir}-{size}", max_train_steps=1)
    )
    _repeat(training.pictures, size)
    data.row_at(0, size, training.config.seed)  # once an epoch, and reported apart
    return training


def _step(training: Any, done: int) -> float:
    for _ in training.batches.of(done, 0, training.config.train_batch_size):
        pass  # encoded now, so that only the step is timed
    began = time.process_time()
    training._step(done)
    return time.process_time() - began


def _repeat(pictures: Any, size: int) -> None:
    """Lengthen an index to `size` rows in place."""
    rows, sources = pictures.rows[:], pictures.sources[:]
    pictures.rows[:] = [rows[i % len(rows)] for i in range(size)]
    pictures.sources[:] = [sources[i % len(sources)] for i in range(size)]
