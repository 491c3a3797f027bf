"""Metadata files and caption files: text to rows, with the file and line of everything that is wrong."""

import csv
import difflib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_nb.config import DataSpec
from lora_nb.data.report import Problems

METADATA = ("metadata.jsonl", "metadata.csv")  # the first wins where both are
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "description", "sentence")
SURROGATE = re.compile("[\ud800-\udfff]")
IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png")


class Line(NamedTuple):
    """One row of a metadata file; number counts lines from 1."""

    number: int
    values: dict[str, Any]


class Columns(NamedTuple):
    """The columns of a metadata file that hold the picture's path and the caption."""

    file: str
    caption: str


def read_text(file: Path, name: str, problems: Problems) -> str | None:
    """The text of a UTF-8 file, with or without BOM; None and a problem if it is not that."""
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        problems.error(name, f"cannot be read ({error.strerror})", "check the file's permissions")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1 or Windows-1252"
        what = f"is not UTF-8 text (byte {data[error.start]:#x}); it looks like {kind}"
        problems.error(f"{name} line {line}", what, "save the file with the encoding UTF-8")
    return None


def read_lines(file: Path, name: str, problems: Problems) -> list[Line]:
    """The rows of metadata.jsonl or metadata.csv; every bad line is a problem, the others are kept."""
    text = read_text(file, name, problems)
    if text is None:
        return []
    parse = _csv_lines if name.endswith(".csv") else _json_lines
    lines = parse(text, name, problems)
    if not lines and not any(p.where.startswith(name) for p in problems):
        problems.error(name, "has no rows", "write one line per picture")
    return lines


def _json_lines(text: str, name: str, problems: Problems) -> list[Line]:
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines cuts inside strings
        if not line.strip():
            continue
        where, fix = f"{name} line {number}", "write one JSON object per line, in double quotes"
        try:
            values = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg}, column {error.colno}"
            problems.error(where, f"is not JSON ({reason})", fix)
            if number == 1 and line.strip().startswith("["):
                break  # one list over many lines: all others would fail too
            continue
        if isinstance(values, dict):
            lines.append(Line(number, values))
        else:
            problems.error(where, f"is a JSON {type(values).__name__}, not an object", fix)
    return lines


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _csv_lines(text: str, name: str, problems: Problems) -> list[Line]:
    lines = []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if twice := sorted({c for c in columns if columns.count(c) > 1}):
            fix = "give each column a name of its own"
            problems.error(name, f"has two columns {twice[0]!r}", fix)
            return []
        for values in reader:
            extra = values.pop(None, None)
            if extra:
                what = f"has {len(extra)} more values than there are columns"
                fix = "put a caption with commas in double quotes"
                problems.error(f"{name} line {reader.line_num}", what, fix)
            else:
                lines.append(Line(reader.line_num, dict(values)))
    except csv.Error as error:
        where, fix = f"{name} line {reader.reader.line_num}", "check the quotes in this line"
        problems.error(where, f"is not CSV ({error})", fix)
    return lines


def choose_columns(
    lines: list[Line], name: str, spec: DataSpec, problems: Problems
) -> Columns | None:
    """The columns to read; None and a problem that lists the columns if one is missing from every row."""
    if not lines:
        return None
    columns = list(dict.fromkeys(key for line in lines for key in line.values))
    own = f"{spec.image_column}_file_name"  # imagefolder's name for a column that is not "image"
    file = "file_name" if own not in columns and spec.image_column == "image" else own
    if file not in columns:
        fix = "name the column with the picture's path file_name"
        if "file_name" in columns:
            fix = "leave image_column at 'image', which reads file_name"
        elif len(columns) == 1 and any(sign in columns[0] for sign in ";\t|"):
            fix = "separate the columns by commas"
        problems.error(name, f"has no column {file!r}; its columns are {', '.join(columns)}", fix)
    rest = [c for c in columns if c != file]
    captioned = check_column(name, "caption_column", spec.caption_column, rest, problems)
    return Columns(file, spec.caption_column) if captioned and file in columns else None


def check_column(
    where: str, setting: str, wanted: str, columns: Sequence[str], problems: Problems
) -> bool:
    """Whether a column is there; if not, a problem with the columns and the nearest one."""
    if wanted in columns:
        return True
    usual = CAPTION_NAMES if setting == "caption_column" else IMAGE_NAMES
    near = [c for c in columns if c.lower() in usual]
    near += difflib.get_close_matches(wanted, columns, 1, 0.5)
    fix = f"set {setting} to {near[0]!r}" if near else f"set {setting} to one of these columns"
    have = ", ".join(columns) or "none"
    problems.error(where, f"has no column {wanted!r} ({setting}); its columns are {have}", fix)
    return False


def captions_of(value: Any, where: str, problems: Problems) -> tuple[str, ...] | None:
    """The captions of a row, a text or a list of texts; None and a problem for anything else."""
    captions = value if isinstance(value, list) else [value]
    if value is None:
        what = "the caption is missing"
    elif not captions:
        what = "the list of captions is empty"
    elif bad := [c for c in captions if not isinstance(c, str)]:
        what = f"the caption is not a text but {bad[0]!r}"
    elif any(SURROGATE.search(caption) for caption in captions):
        what = "the caption has half of a character pair (a lone surrogate)"
    else:
        return tuple(captions)
    problems.error(where, what, "write a text or a list of texts")
    return None
