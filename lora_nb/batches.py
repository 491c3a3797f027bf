"""Which pictures a step sees: the batches of a training, a pure function of step, micro-step and process."""

from collections.abc import Iterator

from accelerate import Accelerator

from lora_nb.cache import CLASS_POSITIONS, Cache, with_prior
from lora_nb.config import TrainConfig
from lora_nb.data import Pictures
from lora_nb.disk_cache import DiskCache
from lora_nb.families import Batch
from lora_nb.learner import Learner


class Batches:
    """The batches of this process; with prior preservation as many class pictures follow in each.

    cache: makes batches of the pictures. class_cache: of the class pictures, None without prior preservation.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        pictures: Pictures,
        class_pictures: Pictures | None,
    ):
        self.config, self.accelerator, self.learner = config, accelerator, learner
        self.disk = DiskCache(learner.family) if config.cache_to_disk else None
        self.cache = self._cache(pictures)
        self.class_cache = self._cache(class_pictures) if class_pictures is not None else None

    def _cache(self, pictures: Pictures) -> Cache:
        config = self.config
        captions = not any(part.startswith("text_encoder") for part in self.learner.weights)
        return Cache(
            self.learner.family,
            pictures,
            pictures.spec,
            config.seed,
            config.cache_latents,
            captions,
            self.disk,
            config.train_batch_size,
        )

    @property
    def fingerprint(self) -> str:
        """Of all pictures and captions that are trained on."""
        caches = (self.cache, self.class_cache)
        return "+".join(cache.pictures.fingerprint for cache in caches if cache is not None)

    def encode(self, steps: range) -> Iterator[int]:
        """Encode all that this process sees in steps `done + 1` before the first of them; yields after each sample."""
        yield from self.cache.encode(self._shown(steps))
        if self.class_cache is not None:
            yield from self.class_cache.encode(CLASS_POSITIONS + p for p in self._shown(steps))

    def _shown(self, steps: range) -> Iterator[int]:
        for done in steps:
            for micro in range(self.config.gradient_accumulation_steps):
                yield from self.positions(done, micro)

    def of(self, done: int, micro: int, size: int) -> Iterator[tuple[float, Batch]]:
        """A micro-step of step done + 1, at most `size` pictures at a time: (their share of it, their batch)."""
        for positions in self._pieces(self.positions(done, micro), size):
            yield len(positions) / self.config.train_batch_size, self._batch(positions)

    def positions(self, done: int, micro: int) -> list[int]:
        """Global sample numbers of this process in this micro-step: processes take turns within one micro-step."""
        size, processes = self.config.train_batch_size, self.accelerator.num_processes
        first = (done * self.config.gradient_accumulation_steps + micro) * size * processes
        first += self.accelerator.process_index * size
        return list(range(first, first + size))

    def _pieces(self, positions: list[int], size: int) -> list[list[int]]:
        """The positions, at most `size` at a time, and only pictures of one size together."""
        return [
            same[start : start + size]
            for same in self.cache.by_size(positions)
            for start in range(0, len(same), size)
        ]

    def _batch(self, positions: list[int]) -> Batch:
        batch = self.cache.batch(positions)
        if self.class_cache is None:
            return batch
        prior = self.class_cache.class_batch(positions)
        return with_prior(batch, prior, self.config.prior_loss_weight)

    def names(self, positions: list[int]) -> list[str]:
        """The files that these sample positions show, class pictures left out."""
        rows = {self.cache.row_at(p) for p in positions if p < CLASS_POSITIONS}
        return [self.cache.pictures.rows[row].name for row in sorted(rows)]
