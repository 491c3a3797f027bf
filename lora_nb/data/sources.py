"""Rows with the place of their picture, as folders and tables both give them; nothing is decoded here."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from huggingface_hub.constants import HF_HUB_CACHE

from lora_nb.data.decode import MAX_BYTES, SHRINK, BadPicture

if TYPE_CHECKING:
    import datasets


class FileSource(NamedTuple):
    """A picture file on disk."""

    path: str

    def mark(self) -> tuple[int, int]:
        """Size in bytes and time of change in nanoseconds; raises BadPicture as `read` does."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise _unreadable(error) from error
        if found.st_size > MAX_BYTES:
            raise BadPicture(f"the file has {found.st_size / 1e6:.0f} MB", SHRINK)
        return found.st_size, found.st_mtime_ns

    def read(self) -> bytes:
        """The bytes of the file; raises BadPicture if there are too many or none can be read."""
        with self.open() as stream:
            return stream.read()

    def open(self) -> BinaryIO:
        """The file to read from; raises BadPicture as `read` does."""
        self.mark()
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise _unreadable(error) from error


def _unreadable(error: OSError) -> BadPicture:
    return BadPicture(f"cannot be read ({error.strerror})", "check the file and its permissions")


@dataclass(frozen=True)
class TableSource:
    """A picture inside a table of the `datasets` library, not decoded."""

    table: "datasets.Dataset"
    column: str
    number: int
    home: Path | None  # pictures beside the table may lie here, and in the caches of the Hub

    def read(self) -> bytes:
        """The bytes of the picture; raises BadPicture if the row has none or names a file elsewhere."""
        value = self.table[self.number][self.column] or {}
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise BadPicture("has no picture", "remove the row")
        from datasets import config

        file = Path(value["path"]).resolve()
        homes = [self.home, HF_HUB_CACHE, config.HF_DATASETS_CACHE]
        if not any(file.is_relative_to(Path(home).resolve()) for home in homes if home):
            raise BadPicture(
                "names a file outside the data set", "store the picture itself in the table"
            )
        return FileSource(str(file)).read()

    def open(self) -> BinaryIO:
        """The bytes of the picture as a stream; raises BadPicture as `read` does."""
        return io.BytesIO(self.read())


Source = FileSource | TableSource


class Found(NamedTuple):
    """A picture with captions, before it is opened; `where` names it in problems."""

    where: str
    name: str
    captions: tuple[str, ...]
    source: Source
    extra: dict[str, Any]
