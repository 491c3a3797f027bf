"""Write the data sets of the course: two styles (ink, clay) and one subject (cat).

Each is a Hugging Face imagefolder. Ink and clay draw the same concepts. Their validation concepts
are known to the base in its own styles, but are never shown in the new style, so a picture made
by a LoRA can be compared with the true drawing.

    python data/build/make_sets.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from drawings import (
    COMMON,
    NEW_STYLES,
    Concept,
    concepts,
    drawn,
    fetch_all,
    good_concepts,
    held_out,
    render,
    share,
)
from fetch import PACKAGES, ROOT

TRAIN, VALIDATION = 100, 60

# The subject: one cat in eight moods. "sks" is the customary rare word of DreamBooth.
CAT = {
    "grinning-cat": "sks cat, grinning",
    "cat-with-tears-of-joy": "sks cat, with tears of joy",
    "smiling-cat-with-heart-eyes": "sks cat, with heart eyes",
    "cat-with-wry-smile": "sks cat, with a wry smile",
    "kissing-cat": "sks cat, kissing",
    "weary-cat": "sks cat, weary",
    "crying-cat": "sks cat, crying",
    "pouting-cat": "sks cat, angry",
}

MIT = """MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

CARD = """---
license: mit
language: en
pretty_name: "{title}"
task_categories:
- text-to-image
size_categories:
- n<1K
tags:
- lora
- {tag}
- emoji
---

# {title}

{about}

| | |
|---|---|
| pictures | {counts}, 128 x 128 px, RGB on white |
| captions | {captions} |
| columns | `file_name`, `text` (the caption), `concept` (the name in emojibase) |
| drawings | Fluent Emoji by Microsoft, [MIT](LICENSE), from the npm package `{package}` {version} |
| names | emojibase-data {emojibase} by Miles Johnson, MIT |

```python
from datasets import load_dataset

data = load_dataset("imagefolder", data_dir="data/{name}")
```

{split}

Made by `python data/build/make_sets.py`; running it again gives the same bytes.
"""

STYLE_ABOUT = {
    "ink": "Black-and-white line drawings: a style that the embedded base has never seen, and the "
    "most visible change a first LoRA can make.",
    "clay": "Softly shaded, rounded drawings that look like modelling clay: a style that the "
    "embedded base has never seen.",
}
STYLE_SPLIT = """The validation concepts are everyday things, chosen by a hash of their name. The
base knows them in its own styles; neither the base nor a LoRA trained on `train/` has seen them in
this style. So the validation pictures are the true answers to "what would this look like in
{name} style?". About 5 % of all concepts are held out of everything, the base's pretraining
included; none of them is used here."""
CAT_ABOUT = (
    "One cat, eight moods: a subject set for DreamBooth. The rare word `sks` names this cat; "
    "`cat` alone stays the class."
)
CAT_SPLIT = """There is a train split only: a subject is judged by its pictures in new situations,
such as "sks cat, with sunglasses". The clay set holds none of these drawings."""


def split_concepts() -> tuple[list[Concept], list[Concept]]:
    """The train and validation concepts of the new styles, the same for both."""
    book = concepts()
    usable = [
        book[key]
        for key in good_concepts()
        if not held_out(key)
        and book[key].subgroup != "cat-face"
        and all(key in drawn(style) for style in NEW_STYLES)
    ]
    common = [c for c in usable if c.name in COMMON]
    validation = sorted(common, key=lambda c: share(c.slug, "validation"))[:VALIDATION]
    rest = [c for c in usable if c not in validation]
    train = sorted(rest, key=lambda c: share(c.slug, "train"))[:TRAIN]
    return sorted(train, key=lambda c: c.slug), sorted(validation, key=lambda c: c.slug)


def write_split(folder: Path, style: str, rows: list[tuple[Concept, str]]) -> None:
    """Write the pictures and metadata.jsonl of one split."""
    folder.mkdir(parents=True)
    lines = []
    for concept, text in rows:
        name = f"{concept.slug}.png"
        render(style, concept.slug).save(folder / name, optimize=True)
        row = {"file_name": name, "text": text, "concept": concept.name}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_papers(folder: Path, style: str, **facts: str) -> None:
    """Write the card and the licence of one set."""
    package = f"@iconify-json/{NEW_STYLES[style]}"
    card = CARD.format(
        package=package,
        version=PACKAGES[package][0],
        emojibase=PACKAGES["emojibase-data"][0],
        name=folder.name,
        **facts,
    )
    (folder / "README.md").write_text(card)
    (folder / "LICENSE").write_text(MIT)


def make_style(out: Path, style: str) -> None:
    """Write one style set."""
    folder = out / style
    shutil.rmtree(folder, ignore_errors=True)
    for split, members in zip(("train", "validation"), split_concepts(), strict=True):
        write_split(folder / split, style, [(c, f"{c.name}, {style} style") for c in members])
    write_papers(
        folder,
        style,
        title=f"{style.capitalize()}: emoji in one new style",
        tag="style",
        about=STYLE_ABOUT[style],
        counts=f"{TRAIN} train, {VALIDATION} validation",
        captions=f'`<concept>, {style} style`, for example "red apple, {style} style"',
        split=STYLE_SPLIT.format(name=style),
    )


def make_cat(out: Path) -> None:
    """Write the subject set."""
    folder = out / "cat"
    shutil.rmtree(folder, ignore_errors=True)
    book = concepts()
    write_split(folder / "train", "clay", [(book[key], text) for key, text in CAT.items()])
    write_papers(
        folder,
        "clay",
        title="Cat: one subject in eight moods",
        tag="dreambooth",
        about=CAT_ABOUT,
        counts=f"{len(CAT)} train",
        captions='`sks cat, <mood>`, for example "sks cat, grinning"',
        split=CAT_SPLIT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    fetch_all()
    for style in NEW_STYLES:
        make_style(args.out, style)
    make_cat(args.out)
    for name in (*NEW_STYLES, "cat"):
        files = [path for path in (args.out / name).rglob("*") if path.is_file()]
        print(f"{name}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
