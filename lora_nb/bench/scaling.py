"""How the cost of a batch grows with the number of pictures: it should not."""

import time
from statistics import median
from typing import Any

from lora_nb import data
from lora_nb.config import TrainConfig

BATCHES = 40  # timed ones, spread over the epoch


def measure(config: TrainConfig, sizes: list[int]) -> list[dict[str, Any]]:
    """Median CPU seconds of the steps of a run whose index has so many rows.

    The rows are those of the given pictures over and over, so everything but their number is alike: each file is read,
    and each picture found in the cache, as its own row would be.
    """
    return [{"pictures": size, "step": _step(config, size)} for size in sizes]


def _step(config: TrainConfig, size: int) -> float:
    from lora_nb.trainer import train

    training = train(
        config.replace(overwrite=True, output_dir=f"{config.output_dir}-{size}", max_train_steps=1)
    )
    _repeat(training.pictures, size)
    times = []
    data.row_at(0, size, training.config.seed)  # once an epoch, and reported apart
    for done in range(0, BATCHES):
        for _ in training.batches.of(done, 0, config.train_batch_size):
            pass  # encoded now, so that only the step is timed
        began = time.process_time()
        training._step(done)
        times.append(time.process_time() - began)
    training.lock.release()
    return median(times[5:])


def _repeat(pictures: Any, size: int) -> None:
    """Lengthen an index to `size` rows in place."""
    rows, sources = pictures.rows[:], pictures.sources[:]
    pictures.rows[:] = [rows[i % len(rows)] for i in range(size)]
    pictures.sources[:] = [sources[i % len(sources)] for i in range(size)]
