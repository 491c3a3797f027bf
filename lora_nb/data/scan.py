"""The dataset doctor: opens every picture once before the first step and reports all problems together.

It decides what is worth a word; finding rows is in sources, opening pictures in decode.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from textwrap import shorten
from typing import Any

from lora_nb.collector import without_collector
from lora_nb.config import DataSpec
from lora_nb.data.decode import MAX_PIXELS, SUFFIXES, BadPicture, suffix
from lora_nb.data.duplicates import check_duplicates
from lora_nb.data.folder import read_folder, split_folder
from lora_nb.data.looks import Look, Looks, at_header
from lora_nb.data.report import Problem, Problems, Report, Row
from lora_nb.data.sources import FileSource, Found, Source
from lora_nb.data.table import in_table, read_table, table_splits

TINY = 32  # shorter side in pixels
LONG = 4.0  # longer side over shorter side
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SHOWN = 3  # cut captions that are quoted


def scan(
    spec: DataSpec, split: str = "train", tokenizer: Any = None, headers_only: bool = False
) -> Report:
    """Check the data of one split; with a tokenizer also the length of captions. Raises nothing for bad data.

    headers_only: a quick look that decodes no picture, so it finds no damage inside and no duplicates, and gives no
    fingerprint. Pictures that did not change since the last scan are not decoded again either way.
    """
    return examine(spec, split, tokenizer, headers_only)[0]


def has_split(spec: DataSpec, split: str) -> bool:
    """Whether the data has this split ("train", "validation"); its pictures are not opened.

    A validation_data_dir that is named counts as there, so that loading it says what is wrong with it.
    """
    if split == "validation" and spec.validation_data_dir:
        return True
    if in_table(spec, split):
        return split in table_splits(spec, Problems())
    return split_folder(spec, split, Problems()) is not None


@without_collector()
def examine(
    spec: DataSpec, split: str, tokenizer: Any = None, headers_only: bool = False
) -> tuple[Report, list[Source]]:
    """The report of `scan` and, for each of its rows, where to read the picture."""
    start = time.perf_counter()
    problems = Problems()
    folder, found = _find(spec, split, problems)
    if split == "train":
        found = _clamp(found, spec, problems)
    if headers_only:
        fix = "training decodes each of them first"
        problems.note("pictures", "were not decoded, only their headers read", fix)
    rows: list[Row] = []
    sources: list[Source] = []
    looks: list[Look] = []
    memory = Looks(Path(folder))
    for item in found:
        try:
            look = at_header(item.source) if headers_only else memory.at(item.source, item.name)
            _check_size(item, (look.width, look.height), spec, problems)
        except BadPicture as bad:
            problems.error(item.where, bad.what, bad.fix)
            continue
        problems += [Problem(severity, item.where, *rest) for severity, *rest in look.remarks]
        _check_name(item, look.format, problems)
        path = item.source.path if isinstance(item.source, FileSource) else None
        row = Row(len(rows), item.name, path, item.captions, look.width, look.height, item.extra)
        rows.append(row)
        sources.append(item.source)
        looks.append(look)
    memory.keep()
    if not headers_only:
        check_duplicates(rows, looks, problems)
    _check_captions(rows, problems)
    if tokenizer is not None:
        _check_tokens(rows, tokenizer, problems)
    fingerprint = "" if headers_only else _fingerprint(rows, looks)
    return Report(folder, rows, problems, time.perf_counter() - start, fingerprint), sources


def _fingerprint(rows: list[Row], looks: list[Look]) -> str:
    whole = json.dumps([[look.sha256, row.captions] for look, row in zip(looks, rows, strict=True)])
    return hashlib.sha256(whole.encode()).hexdigest()


def _find(spec: DataSpec, split: str, problems: Problems) -> tuple[Path | str, list[Found]]:
    """The place and the rows of a split."""
    if in_table(spec, split):
        return str(spec.dataset_name), read_table(spec, split, problems)
    root = split_folder(spec, split, problems)
    if root is None:
        return Path(problems[-1].where), []
    return root, read_folder(root, spec, problems)


def _clamp(found: list[Found], spec: DataSpec, problems: Problems) -> list[Found]:
    limit = spec.max_train_samples
    if limit is None:
        return found
    fix = f"the first {min(limit, len(found))} are used"
    problems.note("max_train_samples", f"is {limit}; there are {len(found)} pictures", fix)
    return found[:limit]


def _check_size(item: Found, size: tuple[int, int], spec: DataSpec, problems: Problems) -> None:
    short, long = sorted(size)
    shape, side = f"{size[0]} x {size[1]} pixels", spec.resolution
    if side * int(side * long / short) > MAX_PIXELS:
        what = f"is {shape}: too long and thin for a resolution of {side}"
        raise BadPicture(what, "crop it, or remove it")
    if long / short > LONG:
        fix = f"a square crop shows less than 1/{LONG:.0f} of it; crop it yourself"
        problems.warning(item.where, f"is {shape}, long and thin", fix)
    if short < TINY:
        fix = "use a larger version, or remove it"
        problems.warning(item.where, f"is tiny: {shape}", fix)
    elif short < side:
        fix = f"it is enlarged to {side} and will look soft; use a larger version or a lower resolution"
        problems.warning(item.where, f"is smaller than the resolution: {shape}", fix)


def _check_name(item: Found, kind: str, problems: Problems) -> None:
    if SUFFIXES.get(suffix(item.name), kind) != kind:
        fix = "it is read all the same; rename it for other programs"
        problems.note(item.where, f"is a {kind} file by its content", fix)


def _check_captions(rows: list[Row], problems: Problems) -> None:
    for row in rows:
        for caption in row.captions:
            if not caption.strip():
                fix = "write what is in the picture (caption_dropout makes some empty on purpose)"
                problems.warning(row.name, "the caption is empty", fix)
            elif _is_garbled(caption):
                fix = "write it again and save the file with the encoding UTF-8"
                quote = shorten(caption, 60, placeholder=" ...")
                problems.warning(row.name, f"a wrong encoding has damaged {quote!r}", fix)


def _is_garbled(caption: str) -> bool:
    """Whether a caption lost letters to a wrong encoding, or shows UTF-8 read as something else."""
    if CONTROL.search(caption):
        return True
    if caption.isascii():
        return False
    try:
        return caption.encode("cp1252").decode("utf-8") != caption
    except UnicodeError:
        return "\ufffd" in caption  # what decoders put for what they cannot read


def _check_tokens(rows: list[Row], tokenizer: Any, problems: Problems) -> None:
    limit = tokenizer.model_max_length
    captions = [(row.name, caption) for row in rows for caption in row.captions]
    if not captions:
        return
    ids = tokenizer([caption for _, caption in captions], verbose=False).input_ids
    named = [(name, tokens) for (name, _), tokens in zip(captions, ids, strict=True)]
    long = [(name, tokens) for name, tokens in named if len(tokens) > limit]
    if not long:
        return
    # The last token marks the end and is kept; what stands from limit - 1 up to it is lost.
    cut = [(name, tokenizer.decode(tokens[limit - 1 : -1])) for name, tokens in long[:SHOWN]]
    quotes = "; ".join(f"{name}: {shorten(text, 80, placeholder=' ...')!r}" for name, text in cut)
    what = f"longer than {limit} tokens, the model does not see the end of {quotes}"
    what += f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    where = f"{len(long)} of {len(captions)} captions"
    problems.warning(where, what, f"shorten to {limit} tokens, most important words first")
