"""What needs computing once is computed once: latent moments of a picture, encoder hidden states of a caption.

The moments are kept, not a drawn latent, so the posterior stays random and a cached run equals an uncached one.
"""

from collections.abc import Hashable, Sequence

import torch

from lora_nb import data
from lora_nb.config import DataSpec
from lora_nb.errors import NumericsError
from lora_nb.families import Batch, Family

Encoded = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]  # mean, std, picture states

CLASS_POSITIONS = 1 << 40  # class pictures count from here; no run has so many samples


class Cache:
    """Makes the batch at any global sample positions, remembering what does not change.

    Moments are remembered by picture and flip; a picture that is cropped at random has too many to keep, and is encoded
    each time. Caption states are remembered unless a text encoder trains.
    """

    def __init__(
        self,
        family: Family,
        pictures: data.Pictures,
        spec: DataSpec,
        seed: int,
        latents: bool = True,
        captions: bool = True,
    ):
        self.family, self.pictures, self.spec, self.seed = family, pictures, spec, seed
        self.keep_latents, self.keep_captions = latents, captions
        self._encoded: dict[Hashable, Encoded] = {}
        self._states: dict[str, dict[str, torch.Tensor]] = {}

    def batch(self, positions: list[int]) -> Batch:
        """The batch of these sample positions, a pure function of (seed, positions)."""
        rows = [data.row_at(p, len(self.pictures), self.seed) for p in positions]
        return self.rows(rows, positions)

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

    def _picture(self, row: int, position: int) -> Encoded:
        shape = self.pictures.rows[row]
        one_crop = self.spec.center_crop or shape.width == shape.height
        key = (row, data.transform_key(self.spec, shape, position, self.seed))
        if key in self._encoded:
            return self._encoded[key]
        picture = data.pixels(self.pictures.image(row), self.spec, position, self.seed)
        encoded = (*self.family.moments(picture[None]), self.family.picture_states(picture[None]))
        if not all(torch.isfinite(m).all() for m in encoded[:2]):
            raise NumericsError(
                f"The VAE turns {shape.name} into numbers that are not finite; "
                "take the picture out, or use a VAE that is safe in this precision."
            )
        if self.keep_latents and one_crop:
            self._encoded[key] = encoded
        return encoded

    @torch.no_grad()
    def _caption(self, caption: str) -> dict[str, torch.Tensor]:
        if caption not in self._states:
            states = self.family.text_states([caption])
            self._states[caption] = {name: value.cpu() for name, value in states.items()}
        return self._states[caption]


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
