"""The dataset doctor: what it reads, remembers and reports. Bad inputs, one by one, are in test_bad_inputs."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from picture_folders import SIDE, add, bomb, doctor, frames, good, metadata, odd, picture
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_nb import env
from lora_nb.config import DataSpec
from lora_nb.data import has_split, load, looks, scan
from lora_nb.data.decode import decode
from lora_nb.errors import DataError


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


def quick_set(folder: Path, n: int) -> Path:
    """n small pictures without two alike, a week old, with captions."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        values = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = folder / f"{i:06}.jpg"
        Image.fromarray(values).resize((64, 64), Image.Resampling.BICUBIC).save(file, quality=85)
    rows = [{"file_name": f"{i:06}.jpg", "text": f"colours {i}"} for i in range(n)]
    metadata(folder, *rows)
    age(folder)
    return folder


def age(folder: Path) -> None:
    """Make all files a week old: what changed just now is looked at again by every scan."""
    then = time.time() - 7 * 24 * 3600
    for file in folder.iterdir():
        os.utime(file, (then, then))


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_scan_of_1000_pictures_is_quick_and_a_second_one_quicker(tmp_path):
    folder = quick_set(tmp_path / "set", 1000)
    spec = DataSpec(train_data_dir=str(folder), resolution=64)
    assert cpu_seconds(lambda: scan(spec)) < 4.0
    assert cpu_seconds(lambda: scan(spec, headers_only=True)) < 2.0
    assert cpu_seconds(lambda: scan(spec)) < 0.4


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_scan_of_100_000_pictures(tmp_path):
    """Seconds of the processor, not of the clock: the machine may have other work."""
    folder = quick_set(tmp_path / "set", 100_000)
    spec, me = DataSpec(train_data_dir=str(folder), resolution=64), psutil.Process()
    before = me.memory_info().rss
    seconds = [
        cpu_seconds(lambda headers=headers: scan(spec, headers_only=headers))
        for headers in (True, False, False)
    ]
    grown = (me.memory_info().rss - before) / 1e6
    print(f"100,000 pictures: headers, first, second scan {seconds} s; {grown:.0f} MB more")
    assert seconds[0] < 60
    assert seconds[2] < 4.5  # 3 s on a quiet machine
    assert grown < 300


def test_what_was_seen_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    folder = good(tmp_path / "set")
    odd(folder, "bad.png", b"no picture")
    age(folder)
    first = doctor(folder)
    decoded = []
    monkeypatch.setattr(looks, "decode", lambda data: decoded.append(data) or decode(data))
    again = doctor(folder)
    assert decoded == []
    assert (again.problems, again.rows) == (first.problems, first.rows)
    assert again.fingerprint == first.fingerprint
    picture(folder / "a1.png", seed=77)
    changed = doctor(folder)
    assert len(decoded) == 1
    assert changed.fingerprint != first.fingerprint
    picture(
        folder / "a1.png", seed=78
    )  # of the same size, and perhaps within one tick of the clock
    assert doctor(folder).fingerprint not in (first.fingerprint, changed.fingerprint)


def test_a_damaged_memory_is_not_believed(tmp_path):
    folder = good(tmp_path / "set")
    age(folder)
    first = doctor(folder)
    (kept,) = (env.cache_dir() / "scans").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", b"\xff", whole[:-9], whole.replace(b"48", b"47"), b"x" + whole):
        kept.write_bytes(damaged)
        assert doctor(folder).rows == first.rows
        assert doctor(folder).fingerprint == first.fingerprint
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    assert doctor(folder).fingerprint == first.fingerprint


def test_headers_alone_say_what_they_can(tmp_path):
    folder = good(tmp_path / "set")
    whole = (folder / "a0.png").read_bytes()
    odd(folder, "cut.png", whole[:900])
    odd(folder, "empty.png", b"")
    odd(folder, "bomb.png", bomb(20_000, 20_000))
    odd(folder, "film.gif", Image.new("RGB", (SIDE, SIDE)), **frames(3))
    exif = Image.Exif()
    exif[0x0112] = 6
    odd(folder, "turned.jpg", Image.new("RGB", (SIDE, 60)), exif=exif)
    report = scan(DataSpec(train_data_dir=str(folder), resolution=SIDE), headers_only=True)
    assert {p.where.split()[-1] for p in report.errors} == {"(empty.png)", "(bomb.png)"}
    notes = [p.what for p in report.problems if p.severity == "note"]
    assert notes == ["were not decoded, only their headers read"]
    assert "several frames" in report.table()
    sizes = {row.name: (row.width, row.height) for row in report.rows}
    full = {row.name: (row.width, row.height) for row in doctor(folder).rows}
    assert sizes.pop("cut.png") == (SIDE, SIDE)  # the damage is inside
    assert sizes == full
    assert report.fingerprint == ""


def test_pictures_of_a_spawned_process_are_the_same(tmp_path):
    pictures = load(DataSpec(train_data_dir=str(good(tmp_path)), resolution=SIDE))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(pictures.image, (1,))
    assert there.tobytes() == pictures.image(1).tobytes()


def test_control_codes_in_names_do_not_reach_the_terminal(tmp_path):
    folder = good(tmp_path / "set")
    add(folder, file_name="\x1b[2Jevil\n.png", text="x")
    report = doctor(folder)
    assert "\x1b" not in report.table() + str(report.errors[0])
    assert "\\x1b[2Jevil\\n.png" in report.table()
