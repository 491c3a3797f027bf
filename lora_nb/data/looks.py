"""What a scan learns from one picture file, and keeps: a file that did not change is not decoded again.

Kept by path, size and time of change in the user's cache folder, never in the data folder, which may be read-only.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from lora_nb import env
from lora_nb.data.decode import BadPicture, Remark, decode, header
from lora_nb.data.sources import FileSource, Source
from lora_nb.files import write_atomically

FORM = f"lora_nb looks 1, Pillow {PIL.__version__}"  # the first line; any other is not read
SETTLED = (
    2 * 10**9
)  # nanoseconds: a file that changed just now may change again within one tick of its clock


class Look(NamedTuple):
    """One readable picture; width and height in pixels, after EXIF rotation."""

    format: str
    width: int
    height: int
    remarks: list[Remark]
    sha256: str  # of the file's bytes; empty if only the header was read
    outline: str  # hexadecimal, see `outline`; empty if only the header was read


class Looks:
    """Looks at pictures under one folder, remembered between scans."""

    def __init__(self, root: Path):
        name = _sum(str(root.resolve()))[:32]
        self._file = env.cache_dir() / "scans" / f"{name}.tsv"
        self._kept = _read(self._file)  # JSON of a name: mark, tab, JSON of what was seen
        self._new = False

    def at(self, source: Source, name: str) -> Look:
        """Decode a picture, or remember what was seen; raises BadPicture, which is remembered too."""
        if not isinstance(source, FileSource):
            return _look(source.read())
        (size, changed), now, key = source.mark(), time.time_ns(), json.dumps(name)
        mark, _, seen = self._kept.get(key, "").partition("\t")
        if mark != f"{size} {changed}":
            data = source.read()
            try:
                seen = json.dumps(_look(data))
            except BadPicture as bad:
                seen = json.dumps([bad.what, bad.fix])
            if now - changed > SETTLED and source.mark() == (size, changed):
                self._kept[key] = f"{size} {changed}\t{seen}"
                self._new = True
        values = json.loads(seen)
        if len(values) == 2:
            raise BadPicture(*values)
        return Look(*values)

    def keep(self) -> None:
        """Write down what is new; a cache folder that cannot be written only costs time at the next scan."""
        if not self._new:
            return
        body = "".join(f"{key}\t{entry}\n" for key, entry in self._kept.items())
        try:
            write_atomically(self._file, f"{FORM}, {_sum(body)}\n{body}")
        except OSError:
            return


def at_header(source: Source) -> Look:
    """What the header alone says, without decoding a pixel; raises BadPicture."""
    stream = source.open()
    with stream:
        return Look(*header(stream), "", "")


def _look(data: bytes) -> Look:
    image, kind, remarks = decode(data)
    return Look(kind, *image.size, remarks, hashlib.sha256(data).hexdigest(), outline(image))


def outline(image: Image.Image) -> str:
    """64 bits, set where a picture gets darker to the right, and 4 x 4 mean colours: 56 bytes in hexadecimal.

    Saving again with loss or in another size changes few of the bits and no colour by much.
    """
    small = image.resize((36, 32), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, :-1] - grey[:, 1:] > 2)
    return (bits.tobytes() + small.resize((4, 4), Image.Resampling.BOX).tobytes()).hex()


def _read(file: Path) -> dict[str, str]:
    """The kept looks; none if there are none, or if the file is of another form or damaged."""
    try:
        first, _, body = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    if first != f"{FORM}, {_sum(body)}":
        return {}
    return {key: entry for key, _, entry in (line.partition("\t") for line in body.split("\n"))}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
