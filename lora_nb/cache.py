"""What needs computing once is computed once: latent moments of a picture, encoder hidden states of a caption.

The moments are kept, not a drawn latent, so the posterior stays random and a cached run equals an uncached one.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch

from lora_nb import data
from lora_nb.config import DataSpec
from lora_nb.disk_cache import DiskCache, Tensors
from lora_nb.errors import NumericsError
from lora_nb.families import Batch, Family

Encoded = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]  # mean, std, picture states

IN_MEMORY = 4 * 2**30  # bytes
CLASS_POSITIONS = 1 << 40  # class pictures count from here; no run has so many samples


class Cache:
    """Makes the batch at any global sample positions, remembering what does not change.

    Moments are remembered by picture and flip; a picture that is cropped at random has too many to keep, and is encoded
    each time, unless `random_crops` bounds their number. Caption states are remembered unless a text encoder trains.
    disk: where both are kept for other runs, if anywhere. What exceeds IN_MEMORY is read from there each time.
    batch_size: of the micro-steps, by which aspect-ratio buckets are put together.
    """

    def __init__(
        self,
        family: Family,
        pictures: data.Pictures,
        spec: DataSpec,
        seed: int,
        latents: bool = True,
        captions: bool = True,
        disk: DiskCache | None = None,
        batch_size: int = 1,
    ):
        self.disk, self._bytes, self.order = disk, 0, None
        if spec.bucket_step is not None:
            sizes = [data.size_of(spec, row) for row in pictures.rows]
            self.order = data.Order(sizes, batch_size, seed)
        self.family, self.pictures, self.spec, self.seed = family, pictures, spec, seed
        self.keep_latents, self.keep_captions = latents, captions
        self._encoded: dict[Hashable, Encoded] = {}
        self._states: dict[str, Tensors] = {}

    def batch(self, positions: list[int]) -> Batch:
        """The batch of these sample positions, a pure function of (seed, positions)."""
        return self.rows([self.row_at(p) for p in positions], positions)

    def encode(self, positions: Iterable[int]) -> Iterator[int]:
        """Encode what these positions show before it is asked for, and yield each that was something new.

        It ends once everything has been seen that there is to see.
        """
        seen: set[Hashable] = set()
        captions = {caption for row in self.pictures.rows for caption in row.captions}
        views = sum(data.views(self.spec, row) for row in self.pictures.rows)
        total = views + len(captions) + bool(self.spec.caption_dropout)
        for position in positions:
            if len(seen) == total:
                return
            row = self.row_at(position)
            caption = self.pictures.caption(row, position, self.seed)
            look = data.transform_key(self.spec, self.pictures.rows[row], position, self.seed)
            if not {(row, look), caption} <= seen:
                seen |= {(row, look), caption}
                self.rows([row], [position])
                yield position

    def row_at(self, position: int) -> int:
        """The picture that a sample position shows."""
        if self.order is not None:
            return self.order.row_at(position)
        return data.row_at(position, len(self.pictures), self.seed)

    def by_size(self, positions: list[int]) -> list[list[int]]:
        """The positions in groups whose pictures have one size; one group without buckets."""
        groups: dict[tuple[int, int], list[int]] = {}
        for p in positions:
            shape = self.pictures.rows[self.row_at(p)]
            groups.setdefault(data.size_of(self.spec, shape), []).append(p)
        return list(groups.values())

    def class_batch(self, positions: list[int]) -> Batch:
        """The same for class pictures: other positions, so that they draw other noise than the instances do."""
        return self.batch([CLASS_POSITIONS + p for p in positions])

    def rows(self, rows: list[int], positions: list[int]) -> Batch:
        """The batch of named pictures; the positions name their random draws."""
        captions = [
            self.pictures.caption(r, p, self.seed) for r, p in zip(rows, positions, strict=True)
        ]
        encoded = [self._picture(r, p) for r, p in zip(rows, positions, strict=True)]
        means, stds, states = zip(*encoded, strict=True)
        shapes = [self.pictures.rows[r] for r in rows]
        return Batch(
            positions=positions,
            seed=self.seed,
            captions=captions,
            moments=(torch.cat(means), torch.cat(stds)),
            picture_states=_together(states),
            geometry=torch.tensor(
                [
                    data.geometry(self.spec, shape, p, self.seed)
                    for shape, p in zip(shapes, positions, strict=True)
                ]
            ),
            text_states=_together([self._caption(c) for c in captions])
            if self.keep_captions
            else None,
        )

    @property
    def encoded_each_time(self) -> int:
        """How many pictures are encoded anew whenever they are seen, because their crops are too many to keep."""
        if not self.keep_latents:
            return len(self.pictures)
        return sum(not data.few_crops(self.spec, row) for row in self.pictures.rows)

    def _picture(self, row: int, position: int) -> Encoded:
        """Moments and states of a picture as it looks at this position."""
        shape = self.pictures.rows[row]
        look = data.transform_key(self.spec, shape, position, self.seed)
        if (row, look) in self._encoded:
            return self._encoded[row, look]
        if not (self.keep_latents and data.few_crops(self.spec, shape)):
            return self._encode(row, position)
        if self.disk is None:
            encoded = self._encode(row, position)
        else:
            key = self._key(row, look)
            stored = self.disk.get("picture", *key)
            if stored is None:
                encoded = self._encode(row, position)
                self.disk.put(_packed(encoded), "picture", *key)
            else:
                encoded = _unpacked(stored)
        if self._room_for(_packed(encoded)):
            self._encoded[row, look] = encoded
        return encoded

    def on_disk(self, position: int) -> tuple[bool, bool]:
        """Whether the picture and the caption of a sample are encoded on disk already."""
        if self.disk is None:
            return False, False
        row = self.row_at(position)
        shape = self.pictures.rows[row]
        key = self._key(row, data.transform_key(self.spec, shape, position, self.seed))
        found = self.disk.get("picture", *key), self.disk.get("caption", shape.captions[0])
        return found[0] is not None, found[1] is not None

    def _key(self, row: int, look: data.Key) -> tuple[Hashable, ...]:
        """What names a picture on disk: its bytes, and all that is done to them."""
        setting = data.transform_setting(self.spec, self.pictures.rows[row])
        return (self.pictures.sha256(row), *setting, *look)

    def _encode(self, row: int, position: int) -> Encoded:
        picture = data.pixels(self.pictures.image(row), self.spec, position, self.seed)
        mean, std = self.family.moments(picture[None])
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise NumericsError(
                f"The VAE turns {self.pictures.rows[row].name} into numbers that are not finite; "
                "take the picture out, or use a VAE that is safe in this precision."
            )
        states = {k: v.contiguous() for k, v in self.family.picture_states(picture[None]).items()}
        # As they come back from the disk: kernels round differently on another layout in memory.
        return mean.contiguous(), std.contiguous(), states

    @torch.no_grad()
    def _caption(self, caption: str) -> Tensors:
        if caption in self._states:
            return self._states[caption]
        states = None if self.disk is None else self.disk.get("caption", caption)
        if states is None:
            found = self.family.text_states([caption])
            states = {name: value.cpu().contiguous() for name, value in found.items()}
            if self.disk is not None:
                self.disk.put(states, "caption", caption)
        if self._room_for(states):
            self._states[caption] = states
        return states

    def _room_for(self, tensors: Tensors) -> bool:
        """Whether to remember these in memory: without a disk all, with one up to IN_MEMORY bytes."""
        self._bytes += sum(value.nbytes for value in tensors.values())
        return self.disk is None or self._bytes <= IN_MEMORY


def _packed(encoded: Encoded) -> Tensors:
    mean, std, states = encoded
    return {"mean": mean, "std": std} | {f"state/{name}": value for name, value in states.items()}


def _unpacked(tensors: Tensors) -> Encoded:
    states = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    return tensors["mean"], tensors["std"], states


def with_prior(instance: Batch, prior: Batch, weight: float) -> Batch:
    """Instance and class pictures as one batch whose loss is mean(instance) + weight * mean(class).

    Ruiz et al. 2023, equation 2. Both halves have the same number of pictures.
    """
    n = len(instance)
    return Batch(
        positions=instance.positions + prior.positions,
        seed=instance.seed,
        captions=instance.captions + prior.captions,
        moments=tuple(map(torch.cat, zip(instance.moments, prior.moments, strict=True))),
        picture_states=_together((instance.picture_states, prior.picture_states)),
        geometry=torch.cat((instance.geometry, prior.geometry)),
        text_states=_together((instance.text_states, prior.text_states))
        if instance.text_states is not None
        else None,
        # The mean over 2 n pictures halves both.
        weights=torch.tensor([2.0] * n + [2.0 * weight] * n),
    )


def _together(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One dictionary of batches from one dictionary per sample."""
    return {name: torch.cat([each[name] for each in states]) for name in states[0]}
