"""Bad and odd inputs, one line each: our own report line with place, finding and remedy; nothing passes in silence."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from picture_folders import (
    SIDE,
    add,
    bomb,
    doctor,
    frames,
    good,
    metadata,
    odd,
    picture,
    png_bytes,
    text_bomb,
)
from PIL import Image

from lora_nb.config import DataSpec
from lora_nb.data import load
from lora_nb.errors import DataError


def plain(mode: str = "RGB", colour=0) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


def array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.reshape(SIDE, SIDE))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def second_metadata(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na0.png,hello\n")


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).symlink_to(target)
    add(folder, file_name=name, text="linked")


def secret(folder: Path) -> Path:
    return picture(folder.parent / "elsewhere" / "secret.png", seed=99)


def only_text(folder: Path, text: bytes) -> None:
    (folder / "metadata.jsonl").write_bytes(text)


def header_only(kind: str, side: int = 20_000) -> bytes:
    """The start of a file whose header claims side x side pixels."""
    if kind == "GIF":
        screen = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
        return screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02\x4c\x01\0;"
    if kind == "BMP":
        return b"BM" + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0
        )
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\x01\x11\x00"
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # Pillow 11 opens no JPEG without one
    return b"\xff\xd8" + frame + scan


def resaved(folder: Path, **save) -> None:
    """A picture with something on it, and the same again as a small JPEG."""
    draw = np.random.default_rng(5).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    whole = Image.fromarray(draw).resize((96, 96), Image.Resampling.BICUBIC)
    odd(folder, "whole.png", whole)
    odd(folder, "again.jpg", whole.resize((64, 64)), quality=60)


def sidecars(folder: Path, **texts: bytes) -> None:
    """Captions as text files beside the pictures in place of metadata; None leaves one out."""
    (folder / "metadata.jsonl").unlink()
    for i in range(3):
        (folder / f"a{i}.txt").write_bytes(texts.get(f"a{i}", b"a caption"))


def shared_sidecar(folder: Path) -> None:
    sidecars(folder)
    picture(folder / "a0.jpg", seed=9)


def csv_only(folder: Path, text: str) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(text, encoding="utf-8")


RAMP = np.arange(SIDE * SIDE)
JPEG = "odd.jpg"

# name: (change to a good folder of a0.png, a1.png, a2.png; severity; where; what)
CASES: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "empty file": (lambda f: odd(f, "odd.png", b""), "error", "line 4 (odd.png)", "0 bytes"),
    "text as png": (lambda f: odd(f, "odd.png", b"hello"), "error", "line 4 (odd.png)", "is not a picture"),
    "truncated png": (lambda f: odd(f, "odd.png", png_bytes(f)[:900]), "error", "odd.png", "cannot be decoded"),
    "truncated jpeg": (
        lambda f: odd(f, JPEG, picture(f.parent / "x.jpg").read_bytes()[:-200]), "error", JPEG, "truncated"),
    "eps as png": (
        lambda f: odd(f, "odd.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "error", "odd.png", "not a"),
    "ico as png": (lambda f: odd(f, "odd.png", plain(), format="ICO"), "error", "odd.png", "formats JPEG"),
    "400 megapixels": (lambda f: odd(f, "odd.png", bomb(20_000, 20_000)), "error", "odd.png", "far more pixels"),
    "144 megapixels": (lambda f: odd(f, "odd.png", bomb(12_000, 12_000)), "error", "odd.png", "12000 x 12000"),
    "72 megapixels": (lambda f: odd(f, "odd.png", bomb(9_000, 8_000)), "error", "odd.png", "9000 x 8000"),
    "text bomb": (lambda f: odd(f, "odd.png", text_bomb()), "error", "odd.png", "cannot be"),
    "300 MB": (
        lambda f: (odd(f, "odd.png", b""), os.truncate(f / "odd.png", 300_000_000)), "error", "odd.png", "300 MB"),
    "not a number": (
        lambda f: odd(f, "odd.tif", array(np.full(SIDE * SIDE, np.nan, "f"))), "error", "odd.tif", "not finite"),
    "float range": (
        lambda f: odd(f, "odd.tif", array(np.full(SIDE * SIDE, 900, "f"))), "error", "odd.tif", "900 to 900"),
    "32-bit": (lambda f: odd(f, "odd.tif", plain("I", 70_000)), "error", "odd.tif", "32-bit"),
    "1e6 x 1": (lambda f: odd(f, "odd.png", Image.new("L", (1_000_000, 1))), "error", "odd.png", "too long and thin"),
    "1 x 1": (lambda f: odd(f, "odd.png", Image.new("L", (1, 1))), "warning", "odd.png", "is tiny: 1 x 1"),
    "small": (lambda f: odd(f, "odd.png", Image.new("L", (40, 60))), "warning", "odd.png", "smaller than"),
    "wide": (lambda f: odd(f, "odd.png", Image.new("L", (400, 50))), "warning", "odd.png", "long and thin"),
    "gif": (lambda f: odd(f, "odd.gif", plain(), **frames(3)), "warning", "odd.gif", "several frames"),
    "webp frames": (lambda f: odd(f, "odd.webp", plain(), **frames(2)), "warning", "odd.webp", "several frames"),
    "pages": (lambda f: odd(f, "odd.tiff", plain(), **frames(2)), "warning", "odd.tiff", "several frames"),
    "rgba": (lambda f: odd(f, "odd.png", plain("RGBA", (255, 0, 0, 0))), "note", "odd.png", "transparent"),
    "16 bits": (lambda f: odd(f, "odd.png", array((RAMP * 28).astype(np.uint16))), "note", "odd.png", "16 bits"),
    "float": (lambda f: odd(f, "odd.tif", array((RAMP / RAMP.max()).astype("f"))), "note", "odd.tif", "floating-point"),
    "cmyk": (lambda f: odd(f, JPEG, plain("CMYK")), "note", JPEG, "CMYK"),
    "jpeg as png": (lambda f: odd(f, "odd.png", plain(), format="JPEG"), "note", "odd.png", "is a JPEG file"),
    "heic": (lambda f: (f / "b.HEIC").write_bytes(b"x"), "warning", "b.HEIC", "not read"),
    "no caption key": (lambda f: add(f, file_name="a0.png"), "error", "line 4 (a0.png)", "caption is missing"),
    "null caption": (lambda f: add(f, file_name="a0.png", text=None), "error", "line 4 (a0.png)", "is missing"),
    "number caption": (lambda f: add(f, file_name="a0.png", text=7), "error", "line 4 (a0.png)", "not a text but 7"),
    "no captions": (lambda f: add(f, file_name="a0.png", text=[]), "error", "line 4 (a0.png)", "list of captions"),
    "mixed list": (lambda f: add(f, file_name="a0.png", text=["x", None]), "error", "line 4 (a0.png)", "None"),
    "surrogate": (lambda f: add(f, file_name="a0.png", text="\ud800"), "error", "line 4 (a0.png)", "surrogate"),
    "empty caption": (lambda f: add(f, file_name="a0.png", text=" "), "warning", "a0.png", "caption is empty"),
    "other column": (
        lambda f: metadata(f, {"file_name": "a0.png", "prompt": "x"}), "error", "metadata.jsonl", "columns are prompt"),
    "no file_name": (
        lambda f: metadata(f, {"image": "a0.png", "text": "x"}), "error", "metadata.jsonl", "no column 'file_name'"),
    "missing file": (lambda f: add(f, file_name="b.png", text="x"), "error", "line 4", "'b.png', which is not there"),
    "other case": (lambda f: add(f, file_name="A0.PNG", text="x"), "error", "line 4", "(there is 'a0.png')"),
    "null file": (lambda f: add(f, file_name=None, text="x"), "error", "line 4", "picture is None"),
    "parent path": (
        lambda f: add(f, file_name=f"../elsewhere/{secret(f).name}", text="x"), "error", "line 4", "leaves the folder"),
    "hidden parent path": (
        lambda f: add(f, file_name=f"x/../../elsewhere/{secret(f).name}", text=""), "error", "line 4", "leaves the"),
    "windows parent": (lambda f: add(f, file_name="..\\s.png", text="x"), "error", "line 4", "leaves the folder"),
    "absolute path": (lambda f: add(f, file_name=str(secret(f)), text="x"), "error", "line 4", "leaves the folder"),
    "windows drive": (lambda f: add(f, file_name="C:\\s.png", text="x"), "error", "line 4", "leaves the folder"),
    "link outside": (lambda f: link(f, "b.png", secret(f)), "error", "b.png", "link that leaves"),
    "broken link": (lambda f: link(f, "b.png", f / "gone.png"), "error", "b.png", "not a plain file"),
    "pipe": (lambda f: os.mkfifo(f / "b.png"), "error", "b.png", "not a plain file"),
    "linked folder": (
        lambda f: (f / "more").symlink_to(secret(f).parent), "error", "more/", "link to a folder"),
    "not in metadata": (lambda f: picture(f / "b.png", seed=9), "warning", "b.png", "has no line"),
    "two lines": (lambda f: add(f, file_name="a0.png", text="x"), "warning", "a0.png", "more than one line"),
    "same file": (lambda f: odd(f, "odd.png", png_bytes(f)), "warning", "odd.png", "the same picture as a0.png"),
    "bad json": (
        lambda f: only_text(f, b'{"file_name": "a0.png", "text": "x"}\n{"fi\n'), "error", "line 2", "not JSON"),
    "deep json": (lambda f: only_text(f, b"[" * 200_000), "error", "metadata.jsonl line 1", "not JSON"),
    "json list": (lambda f: only_text(f, b'[{"file_name": "a0.png"}]'), "error", "jsonl line 1", "list, not an object"),
    "no rows": (lambda f: only_text(f, b"\n\n"), "error", "metadata.jsonl", "no rows"),
    "latin-1": (
        lambda f: only_text(f, b'{"file_name": "a0.png", "text": "x"}\n{"text": "caf\xe9"}'),
        "error", "metadata.jsonl line 2", "not UTF-8 text (byte 0xe9); it looks like latin-1"),
    "utf-16": (lambda f: only_text(f, "{}".encode("utf-16")), "error", "metadata.jsonl line 1", "UTF-16"),
    "csv too": (second_metadata, "warning", "metadata.csv", "second metadata"),
    "texts too": (lambda f: (f / "a0.txt").write_text("x"), "note", "metadata", ".txt files"),
    "gif bomb": (lambda f: odd(f, "odd.gif", header_only("GIF")), "error", "odd.gif", "more pixels"),
    "bmp bomb": (lambda f: odd(f, "odd.bmp", header_only("BMP")), "error", "odd.bmp", "more pixels"),
    "jpeg bomb": (lambda f: odd(f, JPEG, header_only("JPEG")), "error", JPEG, "more pixels"),
    "header without pixels": (lambda f: odd(f, JPEG, header_only("JPEG", 64)), "error", JPEG, "cannot be decoded"),
    "pdf as jpg": (lambda f: odd(f, JPEG, b"%PDF-1.7\n%%EOF"), "error", JPEG, "is not a picture"),
    "html as jpg": (lambda f: odd(f, JPEG, b"<!doctype html><h1>404"), "error", JPEG, "is not a picture"),
    "git lfs pointer": (
        lambda f: odd(f, "odd.png", b"version https://git-lfs.github.com/spec/v1\n"), "error", "odd.png", "is not a"),
    "palette with holes": (
        lambda f: odd(f, "odd.gif", plain("P"), transparency=0), "note", "odd.gif", "transparent"),
    "grey with alpha": (lambda f: odd(f, "odd.png", plain("LA", (9, 0))), "note", "odd.png", "transparent"),
    "16-bit tiff": (
        lambda f: odd(f, "odd.tif", array((RAMP * 28).astype(np.uint16))), "note", "odd.tif", "16 bits"),
    "exif": (lambda f: odd(f, JPEG, plain(), exif=turned()), "note", JPEG, "EXIF rotation"),
    "apng": (lambda f: odd(f, "odd.png", plain(), **frames(2)), "warning", "odd.png", "several frames"),
    "svg": (lambda f: (f / "b.svg").write_text("<svg/>"), "warning", "b.svg", "not read"),
    "checkpoints of jupyter": (
        lambda f: picture(f / ".ipynb_checkpoints" / "a0-checkpoint.png"), "note", ".ipynb_checkpoints/", "hidden"),
    "saved again": (resaved, "warning", "again.jpg", "looks almost like whole.png"),
    "true caption": (lambda f: add(f, file_name="a0.png", text=True), "error", "line 4 (a0.png)", "a text but True"),
    "nan caption": (
        lambda f: (f / "metadata.jsonl").open("a").write('{"file_name": "a0.png", "text": NaN}'), "error",
        "line 4 (a0.png)", "not a text but nan"),
    "object as caption": (lambda f: add(f, file_name="a0.png", text={"en": "x"}), "error", "line 4", "not a text but"),
    "key twice": (
        lambda f: (f / "metadata.jsonl").open("a").write('{"file_name": "a0.png", "text": "a", "text": "b"}'), "error",
        "metadata.jsonl line 4", "the key 'text' stands twice"),
    "mojibake": (lambda f: add(f, file_name="a0.png", text="caf\u00c3\u00a9"), "warning", "a0.png", "wrong encoding"),
    "lost letters": (lambda f: add(f, file_name="a0.png", text="caf\ufffd"), "warning", "a0.png", "wrong encoding"),
    "number as file": (lambda f: add(f, file_name=7, text="x"), "error", "line 4", "picture is 7"),
    "empty file name": (lambda f: add(f, file_name=" ", text="x"), "error", "line 4", "picture is ' '"),
    "address as file": (lambda f: add(f, file_name="https://x.org/a.png", text="x"), "error", "line 4", "not there"),
    "folder as file": (lambda f: add(f, file_name=".", text="x"), "error", "line 4", "not there"),
    "nul in a file name": (lambda f: add(f, file_name="a\0.png", text="x"), "error", "line 4", "not there"),
    "endless file name": (lambda f: add(f, file_name="a" * 9000, text="x"), "error", "line 4", "not there"),
    "home": (lambda f: add(f, file_name="~/s.png", text="x"), "error", "line 4", "not there"),
    "share": (lambda f: add(f, file_name="\\\\host\\s.png", text="x"), "error", "line 4", "leaves the folder"),
    "link in a circle": (lambda f: link(f, "b.png", f / "b.png"), "error", "b.png", "not a plain file"),
    "semicolons": (lambda f: csv_only(f, "file_name;text\na0.png;x\n"), "error", "metadata.csv", "'file_name'; its"),
    "column twice": (lambda f: csv_only(f, "file_name,text,text\n"), "error", "metadata.csv", "two columns 'text'"),
    "short csv row": (lambda f: csv_only(f, "file_name,text\na0.png\n"), "error", "line 2 (a0.png)", "is missing"),
    "nul in csv": (lambda f: csv_only(f, "file_name,text\na0.png,\0\n"), "warning", "a0.png", "wrong encoding"),
    "open quote": (lambda f: csv_only(f, 'file_name,text\na0.png,"x\n'), "error", "metadata.csv line 2", "not CSV"),
    "empty csv": (lambda f: csv_only(f, ""), "error", "metadata.csv", "no rows"),
    "empty text": (lambda f: sidecars(f, a1=b" \n"), "warning", "a1.png", "caption is empty"),
    "latin-1 text": (lambda f: sidecars(f, a1=b"caf\xe9"), "error", "a1.txt line 1", "looks like latin-1"),
    "no text": (lambda f: (sidecars(f), (f / "a1.txt").unlink()), "error", "a1.png", "no caption"),
    "text alone": (lambda f: (sidecars(f), (f / "b.txt").write_text("x")), "warning", "b.txt", "without a picture"),
    "text of two": (shared_sidecar, "warning", "a0.png", "shares its caption file a0.txt with a0.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_odd_inputs_are_reported_with_their_place(case, tmp_path):
    change, severity, where, what = CASES[case]
    folder = good(tmp_path / "set")
    assert doctor(folder).problems == []
    change(folder)
    report = doctor(folder)
    matches = [p for p in report.problems if where in p.where and what in p.what]
    assert [p.severity for p in matches] == [severity], report.table()
    assert all(p.fix for p in report.problems)
    assert what in report.table()
    assert [row.index for row in report.rows] == list(range(len(report.rows)))
    if severity == "error":
        with pytest.raises(DataError, match="set") as caught:
            load(DataSpec(train_data_dir=str(folder), resolution=SIDE))
        assert where in str(caught.value)
        assert what in str(caught.value)
    else:
        pictures = load(DataSpec(train_data_dir=str(folder), resolution=SIDE))
        assert pictures.image(len(pictures) - 1).mode == "RGB"


def test_there_are_more_than_sixty():
    assert len(CASES) >= 100


def test_one_scan_reports_them_together(tmp_path):
    """Every case that adds a row, in one folder: one report with all of their errors."""
    folder = good(tmp_path / "set")
    for i in range(30):
        odd(folder, f"bad{i}.png", [b"", b"text", png_bytes(folder)[:500]][i % 3])
    add(folder, file_name="../x.png", text="x")
    add(folder, file_name="gone.png", text="x")
    add(folder, file_name="a0.png", text=None)
    assert len(doctor(folder).errors) == 33


def test_near_duplicates_are_not_seen_where_pictures_differ(tmp_path):
    """A mirrored picture, another brightness, drawings on white: none is a duplicate."""
    folder = tmp_path / "set"
    draw = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(draw).resize((64, 64), Image.Resampling.BICUBIC)
    one, two = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    one.paste("black", (10, 10, 26, 26))
    two.paste("black", (30, 30, 46, 46))
    others = [
        image,
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        image.point(lambda v: v // 2),
        one,
        two,
    ]
    others += [Image.new("RGB", (64, 64), (grey, grey, grey)) for grey in range(0, 256, 16)]
    folder.mkdir()
    for i, other in enumerate(others):
        other.save(folder / f"{i}.png")
    metadata(folder, *({"file_name": f"{i}.png", "text": "x"} for i in range(len(others))))
    assert doctor(folder).problems == []
