"""The dataset doctor: each bad or odd input gives our report line, with the file, and nothing raises anything else."""

import dataclasses
import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_nb.config import DataSpec
from lora_nb.data import Report, has_split, load, scan
from lora_nb.errors import DataError

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


def plain(mode: str = "RGB", colour=0) -> Image.Image:
    return Image.new(mode, (SIDE, SIDE), colour)


def array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.reshape(SIDE, SIDE))


def second_metadata(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\na0.png,hello\n")


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).symlink_to(target)
    add(folder, file_name=name, text="linked")


def secret(folder: Path) -> Path:
    return picture(folder.parent / "elsewhere" / "secret.png", seed=99)


def only_text(folder: Path, text: bytes) -> None:
    (folder / "metadata.jsonl").write_bytes(text)


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
    "144 megapixels": (lambda f: odd(f, "odd.png", bomb(12_000, 12_000)), "error", "odd.png", "far more pixels"),
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


def test_all_errors_come_at_once(tmp_path):
    folder = good(tmp_path / "set")
    for i in range(14):
        odd(folder, f"bad{i:02}.png", b"no picture")
    report = doctor(folder)
    assert len(report.errors) == 14
    assert len(report.rows) == 3
    assert report.table().count("bad") == 3  # the rest is counted
    assert "and 11 more" in report.table()
    with pytest.raises(DataError, match="14 errors") as caught:
        report.raise_for_errors()
    assert "bad09.png" in str(caught.value)
    assert "and 4 more" in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_text("x"), "is a file, not a folder"),
        (lambda f: f.mkdir(), "no pictures found (looked for .jpg"),
        (lambda f: metadata(f, {"file_name": "a.png", "text": "x"}), "no pictures found"),
        (lambda f: picture(f / ".ipynb_checkpoints" / "a-checkpoint.png"), "no pictures found"),
        (lambda f: picture(f / "a.png"), "no captions found"),
        (lambda f: picture(f / "cats" / "a.png"), "no captions found"),
    ],
)
def test_folders_without_data(prepare, what, tmp_path):
    folder = tmp_path / "set"
    prepare(folder)
    with pytest.raises(DataError) as caught:
        load(DataSpec(train_data_dir=str(folder), resolution=SIDE))
    assert what in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("all.zip", "unpack"), ("train.parquet", "as dataset_name"), ("x.md", "put pictures there")],
)
def test_a_folder_without_pictures_says_what_to_do(name, fix, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    assert fix in doctor(tmp_path).errors[0].fix


def test_nothing_named_is_one_error():
    with pytest.raises(DataError, match="set train_data_dir or dataset_name"):
        load(DataSpec())


def test_wrong_columns_list_the_columns_and_suggest_one(tmp_path):
    folder = good(tmp_path)
    metadata(folder, {"file_name": "a0.png", "Caption": "x", "concept": "y"})
    (problem,) = doctor(folder).errors
    assert "Caption, concept" in problem.what
    assert problem.fix == "set caption_column to 'Caption'"
    metadata(folder, {"file_name": "a0.png", "title_de": "x"})
    assert doctor(folder, caption_column="titel_de").errors[0].fix.endswith("'title_de'")
    metadata(folder, {"file_name": "a0.png", "qqq": "x"})
    assert doctor(folder).errors[0].fix.endswith("one of these columns")
    assert "image_column" in doctor(folder, caption_column="qqq", image_column="foto").errors[0].fix


def test_a_misnamed_metadata_file_is_pointed_at(tmp_path):
    folder = good(tmp_path)
    (folder / "metadata.jsonl").rename(folder / "captions.jsonl")
    assert "captions.jsonl" in doctor(folder).errors[0].what


def test_text_files_as_captions(tmp_path):
    for i, name in enumerate(["a.png", "sub/b.JPG", "c.png"]):
        picture(tmp_path / name, seed=i)
    (tmp_path / "a.txt").write_bytes("\ufeffa café,\n red\n".encode())
    (tmp_path / "sub/b.txt").write_text("")
    (tmp_path / "lost.txt").write_text("x")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    report = doctor(tmp_path)
    assert [(row.name, row.caption) for row in report.rows] == [
        ("a.png", "a café, red"),
        ("sub/b.JPG", ""),
    ]
    assert {(p.severity, p.where) for p in report.problems} == {
        ("error", "c.txt line 1"),
        ("warning", "lost.txt"),
        ("warning", "sub/b.JPG"),
    }
    (tmp_path / "c.txt").unlink()
    assert [(p.where, p.what) for p in doctor(tmp_path).errors] == [("c.png", "has no caption")]


def test_csv_bom_subfolders_and_foreign_spellings(tmp_path):
    picture(tmp_path / "deep/é.png", seed=1)  # composed in the folder, decomposed in the file
    picture(tmp_path / "b.png", seed=2)
    text = '\ufefffile_name,text,concept\ndeep\\e\u0301.png,"red, or blue",heart\nb.png,x\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    report = doctor(tmp_path)
    assert report.problems == []
    assert [row.caption for row in report.rows] == ["red, or blue", "x"]
    assert report.rows[0].extra == {"concept": "heart"}
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,red, or blue\n")
    assert "line 2" in doctor(tmp_path).errors[0].where
    (tmp_path / "metadata.csv").write_text('file_name,text\nb.png,"red"x\n')
    assert "not CSV" in doctor(tmp_path).errors[0].what


def test_jsonl_keeps_odd_line_ends(tmp_path):
    picture(tmp_path / "a.png")
    text = '\ufeff{"file_name": "a.png", "text": "one\u2028two"}\r\n\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    report = doctor(tmp_path)
    assert report.problems == []
    assert report.rows[0].caption == "one\u2028two"


def test_splits(tmp_path):
    good(tmp_path / "train")
    assert not has_split(DataSpec(train_data_dir=str(tmp_path)), "validation")
    assert (
        "no folder validation/"
        in scan(DataSpec(train_data_dir=str(tmp_path)), "validation").errors[0].what
    )
    good(tmp_path / "validation", 2)
    spec = DataSpec(
        train_data_dir=str(tmp_path),
        resolution=SIDE,
        random_flip=True,
        caption_dropout=1.0,
        max_train_samples=1,
    )
    assert has_split(spec, "train")
    assert has_split(spec, "validation")
    assert len(load(spec)) == 1
    held_out = load(spec, "validation")
    assert len(held_out) == 2
    assert held_out.caption(0, 0, 0) == "picture 0"  # no dropout where results are measured
    assert (held_out.spec.random_flip, held_out.spec.center_crop) == (False, True)
    typo = dataclasses.replace(spec, validation_data_dir=str(tmp_path / "validatoin"))
    assert has_split(
        typo, "validation"
    )  # named, so its absence is an error and not a run without probe
    with pytest.raises(DataError, match="validatoin: the folder does not exist"):
        load(typo, "validation")
    elsewhere = good(tmp_path / "more", 3)
    assert (
        len(load(dataclasses.replace(spec, validation_data_dir=str(elsewhere)), "validation")) == 3
    )


def test_a_split_that_is_a_link_outside_is_refused(tmp_path):
    good(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    assert "leaves the folder" in doctor(tmp_path / "set").errors[0].what
    (tmp_path / "friend").symlink_to(tmp_path / "elsewhere")
    assert len(doctor(tmp_path / "friend").rows) == 3  # the folder that was named may be a link


def test_a_flat_folder_leaves_its_validation_split_out(tmp_path):
    good(tmp_path)
    picture(tmp_path / "validation" / "v.png", seed=50)
    report = doctor(tmp_path)
    assert [row.name for row in report.rows] == ["a0.png", "a1.png", "a2.png"]
    assert [(p.severity, p.where) for p in report.problems] == [("note", "validation/")]


@pytest.mark.parametrize(("limit", "used"), [(2, 2), (3, 3), (99, 3)])
def test_max_train_samples_clamps_with_a_note(limit, used, tmp_path):
    report = doctor(good(tmp_path), max_train_samples=limit)
    assert len(report.rows) == used
    (note,) = report.problems
    assert (note.severity, note.where) == ("note", "max_train_samples")
    assert f"the first {used} are used" in note.fix


def test_fingerprint_follows_bytes_and_captions_only(tmp_path):
    one, two = good(tmp_path / "one"), good(tmp_path / "two")
    assert doctor(one).fingerprint == doctor(two).fingerprint
    add(two, file_name="a0.png", text="more")
    assert doctor(one).fingerprint != doctor(two).fingerprint
    for folder, second in ((one, "x"), (two, "y")):
        metadata(folder, {"file_name": "a0.png", "text": ["first", second]})
    assert doctor(one).fingerprint != doctor(two).fingerprint
    good(one)
    picture(one / "a1.png", seed=77)
    assert doctor(one).fingerprint != doctor(good(tmp_path / "three")).fingerprint


def words_tokenizer(limit: int) -> PreTrainedTokenizerFast:
    """A word per token, with a start and an end token as CLIP has."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "a",
        "red",
        "cat",
        "on",
        "the",
        "green",
        "mat",
        "picture",
        "0",
        "1",
        "2",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=limit,
    )


def test_token_report_shows_what_is_cut(tmp_path):
    folder = good(tmp_path)
    for i in range(4):
        picture(folder / f"long{i}.png", seed=10 + i)
        add(folder, file_name=f"long{i}.png", text="a red cat on the green mat")
    picture(folder / "fits.png", seed=20)
    add(folder, file_name="fits.png", text="a red cat on the")
    spec = DataSpec(train_data_dir=str(folder), resolution=SIDE)
    (problem,) = scan(spec, tokenizer=words_tokenizer(7)).problems
    assert problem.severity == "warning"
    assert problem.where == "4 of 8 captions"
    assert "long0.png: 'green mat'" in problem.what
    assert "long2.png" in problem.what
    assert "long3.png" not in problem.what
    kept = words_tokenizer(7)("a red cat on the green mat", truncation=True).input_ids  # the oracle
    assert words_tokenizer(7).decode(kept[1:-1]) + " green mat" == "a red cat on the green mat"
    assert scan(spec, tokenizer=words_tokenizer(9)).problems == []


def test_report_as_html_escapes_what_files_say(tmp_path):
    folder = good(tmp_path)
    add(folder, file_name="<script>alert(1)</script>.png", text="x")
    page = doctor(folder)._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "3 pictures" in page
    assert doctor(good(tmp_path / "fine")).table().count("\n") == 0


def test_a_picture_that_changes_after_the_scan_is_an_error_of_ours(tmp_path):
    pictures = load(DataSpec(train_data_dir=str(good(tmp_path)), resolution=SIDE))
    (tmp_path / "a1.png").unlink()
    with pytest.raises(DataError, match=r"a1\.png"):
        pictures.image(1)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Random damage to pictures and metadata: the doctor reports, whatever happens."""
    rng = np.random.default_rng(0)
    kinds = {
        "PNG": {},
        "JPEG": {},
        "GIF": {},
        "WEBP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "BMP": {},
    }
    whole = {
        k: picture(tmp_path / f"x.{k}", (40, 40), format=k, **save).read_bytes()
        for k, save in kinds.items()
    }
    folder = tmp_path / "set"
    folder.mkdir()
    rows = []
    for i in range(240):
        kind = list(kinds)[i % len(kinds)]
        data = bytearray(
            whole[kind][: rng.integers(20, len(whole[kind]))] if i % 2 else whole[kind]
        )
        for place in rng.integers(0, min(len(data), 200), 4):
            data[place] = rng.integers(256)
        (folder / f"p{i}.{kind.lower()}").write_bytes(data)
        rows.append({"file_name": f"p{i}.{kind.lower()}", "text": f"picture {i}"})
    metadata(folder, *rows)
    report = doctor(folder)
    assert len(report.errors) > 60
    assert len(report.rows) + len(report.errors) == 240
    text = (folder / "metadata.jsonl").read_bytes()[:3000]
    for _ in range(60):
        data = bytearray(text)
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(256)
        (folder / "metadata.jsonl").write_bytes(data)
        doctor(folder, max_train_samples=1)


def test_scan_of_1000_pictures_is_quick(tmp_path):
    for i in range(200):
        picture(tmp_path / f"{i}.png", (128, 128), seed=i)
    metadata(tmp_path, *({"file_name": f"{i}.png", "text": "x"} for i in range(200)))
    start = time.process_time()
    assert len(doctor(tmp_path).rows) == 200
    assert (time.process_time() - start) * 5 < 2.0
