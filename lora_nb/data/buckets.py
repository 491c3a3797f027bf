"""Aspect-ratio buckets: the sizes pictures are cropped to, and an order of samples whose batches are of one size.

The order of an epoch is still a permutation that depends on (seed, epoch) alone, so every picture is seen equally often
and a run goes on exactly.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from lora_nb import rng
from lora_nb.config import DataSpec

Size = tuple[int, int]  # width, height


class Sized(Protocol):
    """Anything with a width and a height: a Row or a PIL picture."""

    width: int
    height: int


@lru_cache
def sizes(resolution: int, step: int) -> list[Size]:
    """The buckets: sides that are multiples of step, of at most resolution x resolution pixels, up to 4 to 1.

    For each side the largest other side that fits, so the network has about as much to do in all of them.
    """
    found = set()
    for side in range(step, 2 * resolution + 1, step):
        other = resolution**2 // side // step * step
        if other and max(side, other) <= 4 * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found)


def size_of(spec: DataSpec, picture: Sized) -> Size:
    """What a picture is cropped to: the bucket of the nearest aspect ratio, or the square without buckets."""
    if spec.bucket_step is None:
        return spec.resolution, spec.resolution
    return _nearest(spec.resolution, spec.bucket_step, picture.width, picture.height)


@lru_cache(maxsize=4096)
def _nearest(resolution: int, step: int, width: int, height: int) -> Size:
    aspect = math.log(width / height)
    return min(sizes(resolution, step), key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


class Order:
    """Which row a position shows, with batches of one size as far as they come out even.

    In each epoch, rows of one size are cut into whole batches, which come in random order. What is left over stands
    where no whole batch fits: before the first batch boundary of the epoch, and at its end. Such a batch has several
    sizes, and the trainer takes it in pieces.
    """

    def __init__(self, row_sizes: Sequence[Size], batch_size: int, seed: int):
        self.sizes, self.batch_size, self.seed = row_sizes, batch_size, seed
        self._epoch, self._rows = -1, []

    def row_at(self, position: int) -> int:
        """The row that sample `position` shows; each epoch of n positions shows every row once."""
        epoch, place = divmod(position, len(self.sizes))
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._of(epoch)
        return self._rows[place]

    def _of(self, epoch: int) -> list[int]:
        n, size = len(self.sizes), self.batch_size
        by_size: dict[Size, list[int]] = {}
        for row in rng.permutation(n, self.seed, "order", epoch):
            by_size.setdefault(self.sizes[row], []).append(row)
        batches, left = [], []
        for rows in by_size.values():
            even = len(rows) // size * size
            batches += [rows[start : start + size] for start in range(0, even, size)]
            left += rows[even:]
        mixed = rng.permutation(len(batches), self.seed, "order of batches", epoch)
        batches = [batches[i] for i in mixed]
        before = -epoch * n % size  # positions up to the first batch boundary
        while len(left) < before and batches:
            left += batches.pop()
        return [*left[:before], *(row for batch in batches for row in batch), *left[before:]]
