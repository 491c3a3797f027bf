"""Rows of a folder: metadata.jsonl or metadata.csv in it or below, else a text file beside each picture.

Nothing outside the folder is ever opened: names are looked up among the plain files found in it. Reading metadata
files is in metadata.
"""

import os
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_nb.config import DataSpec
from lora_nb.data.decode import SUFFIXES, suffix
from lora_nb.data.metadata import METADATA, captions_of, choose_columns, read_lines, read_text
from lora_nb.data.report import Problems
from lora_nb.data.sources import FileSource, Found

OTHER_PICTURES = {".heic", ".heif", ".avif", ".svg", ".psd", ".jxl", ".jp2", ".ico", ".tga", ".eps"}
PACKED = {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"}
HELD_OUT = ("validation", "test")
COPY = "copy the real file into the folder (from the Hub: snapshot_download with local_dir)"
NO_CAPTIONS = (
    'write metadata.jsonl with a line per picture, such as {"file_name": "0001.png", "text": "a red cat"}, '
    "or a text file beside each picture (0001.txt)"
)


def split_folder(spec: DataSpec, split: str, problems: Problems) -> Path | None:
    """The folder of a split: <data>/train or else <data>, <data>/validation; None and a problem if none."""
    named = spec.train_data_dir
    if split == "validation" and spec.validation_data_dir:
        named = spec.validation_data_dir
    if not named:
        fix = "set train_data_dir or dataset_name"
        problems.error("data", "no folder and no data set is named", fix)
        return None
    base = Path(named).expanduser()
    inner = base / split
    if not base.exists():
        fix = "check the path and the working directory"
        problems.error(str(base), "the folder does not exist", fix)
    elif not base.is_dir():
        fix = "name the folder that holds the pictures"
        problems.error(str(base), "is a file, not a folder", fix)
    elif inner.is_dir() and not inner.resolve().is_relative_to(base.resolve()):
        problems.error(str(inner), "is a link that leaves the folder", COPY)
    elif inner.is_dir():
        return inner
    elif split == "train" or named == spec.validation_data_dir:
        return base
    else:
        fix = f"make a folder {split}/ beside train/, or set validation_data_dir"
        problems.error(str(base), f"there is no folder {split}/", fix)
    return None


def read_folder(root: Path, spec: DataSpec, problems: Problems) -> list[Found]:
    """Rows of a folder: metadata.jsonl or metadata.csv in it or below, else a text file beside each picture."""
    files, refused = _walk(root, problems)
    pictures = [name for name in files if suffix(name) in SUFFIXES]
    lists = [name for name in files if name.rpartition("/")[2] in METADATA]
    if not pictures and not any(suffix(name) in SUFFIXES for name in refused):
        _report_nothing(root, files, problems)
        return []
    if spec.instance_prompt is not None:
        return _with_one_caption(files, pictures, lists, spec.instance_prompt, problems)
    if not lists:
        return _from_sidecars(root, files, pictures, problems)
    rows, named = _from_metadata(files, refused, lists, spec, problems)
    if named:  # else no metadata file could be read, and its problem is enough
        _report_leftovers(files, pictures, named, problems)
    return rows


def _walk(root: Path, problems: Problems) -> tuple[dict[str, str], set[str]]:
    """Plain files by their path inside the folder, sorted, and the names that are refused.

    Paths are plain strings here and below: a set may have 100,000 pictures.
    """
    files: dict[str, str] = {}
    refused: set[str] = set()
    home = root.resolve()
    waiting = [("", str(root))]
    while waiting:
        inside, folder = waiting.pop()
        folders = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                key = unicodedata.normalize("NFC", inside + entry.name)
                if _is_folder(entry):
                    if _is_read(entry, key, problems):
                        folders.append((f"{key}/", entry.path))
                elif not entry.name.startswith("."):
                    if _is_plain(entry, key, home, problems):
                        files[key] = entry.path
                    else:
                        refused.add(key)
        waiting += reversed(folders)
    return files, refused


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_read(folder: os.DirEntry[str], key: str, problems: Problems) -> bool:
    if folder.name.startswith("."):
        problems.note(f"{key}/", "is a hidden folder", "it is not read")
    elif folder.is_symlink():
        problems.error(f"{key}/", "is a link to a folder", COPY)
    elif key in HELD_OUT:
        problems.note(f"{key}/", "is a held-out split", "it is not read here")
    else:
        return True
    return False


def _is_plain(file: os.DirEntry[str], key: str, home: Path, problems: Problems) -> bool:
    linked = file.is_symlink()
    if linked and not Path(os.path.realpath(file.path)).is_relative_to(home):
        problems.error(key, "is a link that leaves the folder", COPY)
        return False
    if not (os.path.isfile(file.path) if linked else file.is_file()):  # a link may lead in a circle
        problems.error(key, "is not a plain file (a broken link or a device)", COPY)
        return False
    if (kind := suffix(key)) in OTHER_PICTURES:
        fix = f"save it in one of {', '.join(SUFFIXES)}"
        problems.warning(key, f"pictures of type {kind} are not read", fix)
    return True


def _text_beside(name: str) -> str:
    return f"{os.path.splitext(name)[0]}.txt"


def _report_nothing(root: Path, files: dict[str, str], problems: Problems) -> None:
    suffixes = set(map(suffix, files))
    fix = "put pictures there, or name another folder"
    if ".parquet" in suffixes:
        fix = "give a folder of parquet files as dataset_name instead of train_data_dir"
    elif suffixes & PACKED:
        fix = "unpack the archive there first"
    what = f"no pictures found (looked for {', '.join(SUFFIXES)})"
    problems.error(str(root), what, fix)


def _from_metadata(
    files: dict[str, str],
    refused: set[str],
    lists: list[str],
    spec: DataSpec,
    problems: Problems,
) -> tuple[list[Found], set[str]]:
    """The good rows, and every picture named by any row."""
    rows: list[Found] = []
    named: set[str] = set()
    spelled: dict[str, str] = {}  # names in lower case, once one is needed
    for name in lists:
        folder = PurePosixPath(name).parent
        prefix = "" if folder == PurePosixPath(".") else f"{folder}/"
        if name != f"{prefix}{METADATA[0]}" and f"{prefix}{METADATA[0]}" in lists:
            fix = f"it is not read beside {METADATA[0]}; remove one of them"
            problems.warning(name, "is a second metadata file", fix)
            continue
        lines = read_lines(Path(files[name]), name, problems)
        columns = choose_columns(lines, name, spec, problems)
        if columns is None:
            continue
        for line in lines:
            value = line.values.get(columns.file)
            key = prefix + value if isinstance(value, str) else None
            if key not in files:  # the slow way
                key = _inside(folder, value)
            if key in refused:
                continue
            if key not in files:
                spelled = spelled or {name.lower(): name for name in files}
                _report_lost(f"{name} line {line.number}", value, key, spelled, problems)
                continue
            named.add(key)
            where = f"{name} line {line.number} ({key})"
            captions = captions_of(line.values.get(columns.caption), where, problems)
            if captions:
                extra = {k: v for k, v in line.values.items() if k not in columns}
                rows.append(Found(where, key, captions, FileSource(files[key]), extra))
    return rows, named


def _inside(folder: PurePosixPath, value: Any) -> str | None:
    """The path inside the data folder that a metadata row names; None if it names none there."""
    if not isinstance(value, str) or not value.strip():
        return None
    if value.startswith("/") or PureWindowsPath(value).drive:
        return None
    key = os.path.normpath(str(folder / value.replace("\\", "/")))  # Windows writes a\b.png
    if key.split(os.sep)[0] == "..":
        return None
    return unicodedata.normalize("NFC", Path(key).as_posix())


def _report_lost(
    where: str, value: Any, key: str | None, spelled: dict[str, str], problems: Problems
) -> None:
    """Say why a metadata row finds no file; `key` is from _inside, `spelled` has the names in lower case."""
    if not isinstance(value, str) or not value.strip():
        fix = "write the picture's path inside the folder"
        problems.error(where, f"the path of the picture is {value!r}", fix)
    elif key is None:
        fix = "name only files inside the folder"
        problems.error(where, f"the path {value!r} leaves the folder", fix)
    else:
        near = spelled.get(key.lower())
        hint = f" (there is {near!r})" if near else ""
        fix = "add the file or remove the line"
        problems.error(where, f"names {value!r}, which is not there{hint}", fix)


def _report_leftovers(
    files: dict[str, str], pictures: list[str], named: set[str], problems: Problems
) -> None:
    """Pictures that no metadata row names, and text files that metadata makes unread."""
    for name in pictures:
        if name not in named:
            fix = "it is left out; add a line to the metadata file"
            problems.warning(name, "has no line in the metadata", fix)
    texts = any(name.endswith(".txt") for name in files)
    if unread := [n for n in pictures if texts and _text_beside(n) in files]:
        what = f"there are .txt files beside {len(unread)} of the pictures too"
        problems.note("metadata", what, "the captions of the metadata file are used")


def _with_one_caption(
    files: dict[str, str], pictures: list[str], lists: list[str], caption: str, problems: Problems
) -> list[Found]:
    if lists or any(name.lower().endswith(".txt") for name in files):
        what = f"the pictures have captions of their own; instance_prompt {caption!r} is used"
        problems.note("captions", what, "leave out instance_prompt to train on theirs")
    return [Found(name, name, (caption,), FileSource(files[name]), {}) for name in pictures]


def _from_sidecars(
    root: Path, files: dict[str, str], pictures: list[str], problems: Problems
) -> list[Found]:
    texts = {name for name in files if name.lower().endswith(".txt")}
    beside = {name: _text_beside(name) for name in pictures}
    if pictures and not texts & set(beside.values()):
        other = [name for name in files if suffix(name) in (".jsonl", ".json", ".csv", ".parquet")]
        what = "no captions found: neither metadata.jsonl nor text files beside the pictures"
        if other:
            what += f" (there is {other[0]}, which is not a name that is read)"
        problems.error(str(root), what, NO_CAPTIONS)
        return []
    rows, owner = [], {}
    for name, text in beside.items():
        if (first := owner.setdefault(text, name)) != name:
            fix = "both have the same caption; rename one of the pictures"
            problems.warning(name, f"shares its caption file {text} with {first}", fix)
        if text not in texts:
            problems.error(name, "has no caption", "write it into a .txt file of the same name")
        elif (caption := read_text(Path(files[text]), text, problems)) is not None:
            words = " ".join(caption.split())
            rows.append(Found(name, name, (words,), FileSource(files[name]), {}))
    for text in sorted(texts - set(beside.values())):
        fix = "add the picture of the same name, or remove the text"
        problems.warning(text, "is a caption without a picture", fix)
    return rows
