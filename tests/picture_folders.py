"""Folders of pictures and captions for tests, good ones to be spoiled, and files that are traps."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lora_nb.config import DataSpec
from lora_nb.data import Report, scan

SIDE = 48


def picture(file: Path, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0, **save) -> Path:
    """Write a picture of noise, so that no two with different seeds are the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, **save)
    return file


def metadata(folder: Path, *rows: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def good(folder: Path, n: int = 3) -> Path:
    """A folder with n pictures a0.png ... and metadata that no doctor minds."""
    for i in range(n):
        picture(folder / f"a{i}.png", seed=i)
    metadata(folder, *({"file_name": f"a{i}.png", "text": f"picture {i}"} for i in range(n)))
    return folder


def add(folder: Path, **row) -> None:
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def odd(folder: Path, name: str, data: bytes | Image.Image, **save) -> None:
    """Put one odd picture with a caption into a good folder."""
    if isinstance(data, bytes):
        (folder / name).write_bytes(data)
    else:
        data.save(folder / name, **save)
    add(folder, file_name=name, text="odd")


def doctor(folder: Path, **changes) -> Report:
    return scan(DataSpec(**{"train_data_dir": str(folder), "resolution": SIDE} | changes))


def png_bytes(folder: Path) -> bytes:
    return (folder / "a0.png").read_bytes()


def bomb(width: int, height: int) -> bytes:
    """A small PNG file with an honest header of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    """A PNG whose compressed text chunk unfolds to 200 MB."""
    data = b"k\0\0" + zlib.compress(bytes(200_000_000), 9)
    start = bomb(64, 64)
    chunk = (
        struct.pack(">I", len(data))
        + b"zTXt"
        + data
        + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    )
    return start[:33] + chunk + start[33:]  # behind the signature and the header


def frames(n: int) -> dict:
    return {
        "save_all": True,
        "append_images": [Image.new("RGB", (SIDE, SIDE), (i, 9, 9)) for i in range(1, n)],
    }
