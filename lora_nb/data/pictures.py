"""A checked data set, ready for training: pictures and captions by row.

Checking is in scan, pixels are in transforms.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_nb import rng
from lora_nb.config import DataSpec
from lora_nb.data.decode import BadPicture, decode
from lora_nb.data.report import Report, Row
from lora_nb.data.scan import examine
from lora_nb.data.sources import Source
from lora_nb.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """Rows that passed the scan; a picture is read again each time it is asked for, so memory stays flat."""

    spec: DataSpec  # for a validation split: without flip, random crop, buckets and caption dropout
    report: Report
    sources: list[Source]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> list[Row]:
        """One row per picture; rows[i].index == i."""
        return self.report.rows

    @property
    def folder(self) -> Path | str:
        """Where the pictures came from."""
        return self.report.folder

    @property
    def fingerprint(self) -> str:
        """Sha256 over file bytes and captions, in row order; names and folders do not enter."""
        return self.report.fingerprint

    def image(self, i: int) -> Image.Image:
        """Picture i, upright, in RGB; raises DataError if the file changed since the scan."""
        with self._named(i):
            return decode(self.sources[i].read()).image

    def sha256(self, i: int) -> str:
        """Of the bytes of picture i as they are now; raises DataError if there are none any more."""
        with self._named(i):
            return hashlib.sha256(self.sources[i].read()).hexdigest()

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """Say of which picture a problem is."""
        try:
            yield
        except BadPicture as bad:
            raise DataError(
                f"In {self.folder}: {self.rows[i].name}: {bad.what}; {bad.fix}."
            ) from bad

    def caption(self, i: int, position: int, seed: int) -> str:
        """Caption of row i at this position: one of its captions, or "" where caption dropout strikes."""
        if rng.uniform(seed, "dropout", [position]).item() < self.spec.caption_dropout:
            return ""
        captions = self.rows[i].captions
        if len(captions) == 1:
            return captions[0]
        return captions[int(rng.uniform(seed, "caption", [position]).item() * len(captions))]


def load(spec: DataSpec, split: str = "train", tokenizer: Any = None) -> Pictures:
    """Scan and keep the data of one split; raises DataError with all errors of the scan."""
    report, sources = examine(spec, split, tokenizer)
    report.raise_for_errors()
    if split != "train":
        plain = {"center_crop": True, "random_flip": False, "bucket_step": None}
        spec = dataclasses.replace(spec, **plain, caption_dropout=0.0)
    return Pictures(spec, report, sources)
