"""Measure base, LoRA and subject with the judge, and keep every figure in data/base/measured.json.

Base: 200 captions that it was trained on, 40 in each style. LoRA: a run as the course does it, then the
60 validation concepts, which were never shown in the new style. Subject: DreamBooth on the cat,
without and with prior preservation, then the cat in new situations and its siblings.

    python data/build/measure.py guidance
    python data/build/measure.py base
    python data/build/measure.py colours
    python data/build/measure.py lora --style ink --parts unet
    python data/build/measure.py subject
    python data/build/make_card.py
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from drawings import BASE_STYLES, COMMON, NEW_STYLES, concepts, drawn, share
from fetch import ROOT, WORK
from PIL import Image
from pretrain import base_concepts, load_drawings
from variants import COLOURS, EDITS, NEAR, away, coloured, main_hue, never_made

from lora_nb import (
    generate,
    load_judge,
    load_pipeline,
    make_class_pictures,
    metrics,
    preset,
    train,
)
from lora_nb.config import LoraSpec

PARTS = {"unet": ("unet",), "text_encoder": ("text_encoder",), "both": ("unet", "text_encoder")}
NEW_SITUATIONS = (
    "sks cat, sleeping",
    "sks cat, with sunglasses",
    "sks cat, with a top hat",
    "sks cat, surprised",
)
SIBLINGS = (
    "cat face",
    "dog face",
    "fox",
    "tiger face",
    "panda",
    "mouse face",
    "rabbit face",
    "bear",
)


def seen_captions(per_style: int = 40) -> list[tuple[str, str, str]]:
    """(caption, concept, style): the common things first, then others, in an order by hash."""
    book, judged, rows = concepts(), set(load_judge().names), []
    for style in BASE_STYLES:
        keys = [key for key in base_concepts() if key in drawn(style) and book[key].name in judged]
        keys.sort(key=lambda key: share(f"{style}/{key}", "seen captions"))
        rows += [
            (f"{book[key].name}, {style} style", book[key].name, style) for key in keys[:per_style]
        ]
    return rows


def scores(pictures: list[Image.Image], names: list[str], styles: list[str]) -> dict:
    """Style and concept of pictures, each with its own right answer."""
    judge = load_judge()
    found = judge.style_probabilities(pictures).argmax(axis=1)
    right = [judge.styles[i] == style for i, style in zip(found, styles, strict=True)]
    return {
        "style": metrics.share(right)._asdict(),
        "concept_top1": metrics.concept_score(pictures, names, judge, top=1)._asdict(),
        "concept_top5": metrics.concept_score(pictures, names, judge)._asdict(),
    }


def measure_base(args: argparse.Namespace) -> dict:
    tiny, rows = preset("tiny"), seen_captions()
    pipeline = load_pipeline(str(args.base))
    began = time.perf_counter()
    pictures = generate(pipeline, [r[0] for r in rows], list(range(len(rows))), **tiny.sampling)
    seconds = (time.perf_counter() - began) / len(rows)
    result = scores(pictures, [r[1] for r in rows], [r[2] for r in rows])
    common = [i for i, row in enumerate(rows) if row[1] in COMMON]
    chosen = [[group[i] for i in common] for group in (pictures, *zip(*rows, strict=True))]
    result["common"] = scores(chosen[0], chosen[2], chosen[3])
    for style in BASE_STYLES:
        own = [i for i, row in enumerate(rows) if row[2] == style]
        result[style] = scores(
            [pictures[i] for i in own], [rows[i][1] for i in own], [style] * len(own)
        )
    sheet(pictures[::5], [rows[i][0] for i in range(0, len(rows), 5)], args.out / "base.png")
    edits = generate(pipeline, EDITS, list(range(len(EDITS))), **tiny.sampling)
    sheet(edits, EDITS, args.out / "edits.png")
    return {"base": result | {"seconds_per_picture_in_batches": seconds}}


def measure_guidance(args: argparse.Namespace) -> dict:
    """Style and concept over guidance and its rescale, on every fourth caption of `seen_captions`."""
    rows, result = seen_captions()[::4], {}
    pipeline = load_pipeline(str(args.base))
    for guidance, rescale in ((1.0, 0.0), (1.5, 0.7), (2.0, 0.7), (3.0, 0.7), (5.0, 0.7)):
        pictures = generate(
            pipeline,
            [r[0] for r in rows],
            list(range(len(rows))),
            num_inference_steps=25,
            guidance_scale=guidance,
            guidance_rescale=rescale,
        )
        found = scores(pictures, [r[1] for r in rows], [r[2] for r in rows])
        result[f"guidance {guidance:g}, rescale {rescale:g}"] = found
        shares = {key: round(score["mean"], 3) for key, score in found.items()}
        print(f"guidance {guidance:g}, rescale {rescale:g}: {shares}", flush=True)
    return {"guidance": result}


def unmade_colours(count: int = 100) -> list[tuple[str, str, str]]:
    """(caption, name, colour): drawings that have one colour, in another that the base was never shown them in."""
    pictures, members, styles = load_drawings(base_concepts())
    hues, shares = main_hue(pictures)
    judged, found = set(load_judge().names), []
    for concept, style, hue, part in zip(members, styles, hues, shares, strict=True):
        for colour, (wanted, *_) in COLOURS.items():
            name = coloured(concept.name, colour)
            far = away(hue, wanted).abs() > 2 * NEAR
            if part > 0.5 and far and never_made(name) and concept.name in judged:
                found.append((f"{name}, {style} style", concept.name, colour))
    known = {f"{name}, {style} style" for name in judged for style in BASE_STYLES}
    found = [row for row in found if row[0] not in known]
    return sorted(found, key=lambda row: share(row[0], "unmade colours"))[:count]


def measure_colours(args: argparse.Namespace) -> dict:
    """Prompts of colour and thing that no caption had: how many come out in the colour, and as the thing."""
    rows, tiny = unmade_colours(), preset("tiny")
    pipeline = load_pipeline(str(args.base))
    pictures = generate(pipeline, [r[0] for r in rows], list(range(len(rows))), **tiny.sampling)
    stack = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    hues, _ = main_hue(stack)
    wanted = torch.tensor([COLOURS[row[2]][0] for row in rows])
    right = (away(hues, wanted).abs() < NEAR / 2).tolist()
    names, judge = [r[1] for r in rows], load_judge()
    named = judge.concept_ranks(pictures, names) <= 5
    both = [a and b for a, b in zip(right, named, strict=True)]
    sheet(pictures[:48], [r[0] for r in rows[:48]], args.out / "colours.png")
    return {
        "colours": {
            "colour": metrics.share(right)._asdict(),
            "concept_top5": metrics.share(named)._asdict(),
            "both": metrics.share(both)._asdict(),
        }
    }


def sheet(pictures: list[Image.Image], labels: list[str], path: Path, columns: int = 8) -> None:
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    page = Image.new("RGB", (columns * 128, len(rows) * 128), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (x * 128, y * 128))
    page.save(path)
    path.with_suffix(".txt").write_text("\n".join(labels) + "\n")


def train_lora(args: argparse.Namespace, name: str, **changes) -> tuple[dict, object]:
    """A run with the settings of the course; seconds of training and the probe's last difference."""
    rate = {part: LoraSpec(rank=args.rank, learning_rate=args.rate) for part in PARTS[args.parts]}
    config = preset("tiny").config(name, lora=rate, overwrite=True, **changes)
    config = config.replace(output_dir=str(args.out / "runs" / name))
    if config.with_prior_preservation:
        make_class_pictures(config)
    began = time.perf_counter()
    for step in (training := train(config)):
        if step.step % 50 == 0:
            print(f"{name} {step.step} {step.loss:.4f} {time.perf_counter() - began:.0f} s")
    facts = {
        "steps": config.max_train_steps,
        "seconds": time.perf_counter() - began,
        "weights": training.parameters,
    }
    return facts, training


def measure_lora(args: argparse.Namespace) -> dict:
    name, tiny = f"{args.style}-{args.parts}", preset("tiny")
    facts, training = train_lora(args, name, train_data_dir=str(ROOT / "data" / args.style))
    rows = training.held_out.rows
    prompts, things = [r.caption for r in rows], [r.extra["concept"] for r in rows]
    pipeline = load_pipeline(str(args.base), adapter=training.folder)
    true = [training.held_out.image(row.index) for row in rows]
    trained = [training.pictures.image(i) for i in range(len(training.pictures))]
    pages = []
    for group, scale in (("before", 0.0), ("after", 1.0)):
        pictures = generate(pipeline, prompts, list(range(len(rows))), scale=scale, **tiny.sampling)
        facts[group] = scores(pictures, things, [args.style] * len(rows))
        pages.append(pictures)
    facts["true"] = scores(true, things, [args.style] * len(rows))
    for group, pictures in (("after", pages[1]), ("true", true)):
        nearest = [metrics.nearest_picture(picture, trained).distance for picture in pictures]
        facts[f"nearest_trained_{group}"] = min(nearest)
    mixed = [p for i in range(0, 60, 8) for p in (pages[0][i], pages[1][i], true[i])]
    sheet(
        mixed,
        [f"{prompts[i]}: base, LoRA, true" for i in range(0, 60, 8)],
        args.out / f"{name}.png",
        6,
    )
    return {f"lora-{name}": facts}


def measure_subject(args: argparse.Namespace) -> dict:
    """DreamBooth on the cat, without and with prior preservation: likeness, and what it costs the class.

    Both runs take the same steps over the same pictures in the same order; the second sees as many
    pictures of the class beside them, which the base has drawn.
    """
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": str(args.out / "class"),
        "class_prompt": "cat face, noto style",
        "num_class_images": 32,
    }
    return {
        "subject": subject_run(args, "cat-alone"),
        "subject-with-prior": subject_run(args, "cat-with-prior", **prior),
    }


def subject_run(args: argparse.Namespace, name: str, **changes) -> dict:
    tiny, judge, seeds = preset("tiny"), load_judge(), list(range(4))
    facts, training = train_lora(
        args,
        name,
        train_data_dir=str(ROOT / "data" / "cat"),
        max_train_steps=args.steps,
        train_batch_size=4,
        **changes,
    )
    pipeline = load_pipeline(str(args.base), adapter=training.folder)
    subject = [training.pictures.image(i) for i in range(len(training.pictures))]
    prompts = {
        "subject": [text for text in NEW_SITUATIONS for _ in seeds],
        "siblings": [f"{sibling}, noto style" for sibling in SIBLINGS for _ in seeds],
    }
    drawn = {
        (what, when): generate(
            pipeline, texts, seeds * (len(texts) // len(seeds)), scale=scale, **tiny.sampling
        )
        for what, texts in prompts.items()
        for when, scale in (("before", 0.0), ("after", 1.0))
    }
    names = [sibling for sibling in SIBLINGS for _ in seeds]
    for when in ("before", "after"):
        likeness = metrics.subject_score(drawn["subject", when], subject, judge)
        known = metrics.concept_score(drawn["siblings", when], names, judge)
        facts[f"subject_{when}"], facts[f"siblings_top5_{when}"] = (
            likeness._asdict(),
            known._asdict(),
        )
    facts["subject_itself"] = metrics.subject_score(subject, subject, judge)._asdict()
    facts["siblings_drift"] = metrics.drift(
        drawn["siblings", "before"], drawn["siblings", "after"], judge
    )._asdict()
    for what, texts in prompts.items():
        pictures = drawn[what, "before"] + drawn[what, "after"]
        sheet(pictures, texts * 2, args.out / f"{name}-{what}.png", len(texts))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("base", "colours", "guidance", "lora", "subject"))
    parser.add_argument("--base", type=Path, default=ROOT / "data" / "base")
    parser.add_argument("--style", choices=tuple(NEW_STYLES), default="ink")
    parser.add_argument("--parts", choices=tuple(PARTS), default="unet")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, help="learning rate; empty means the preset's")
    parser.add_argument("--steps", type=int, default=100, help="of the subject's run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=WORK / "measured", help="pictures and runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    measures = {
        "base": measure_base,
        "colours": measure_colours,
        "guidance": measure_guidance,
        "lora": measure_lora,
        "subject": measure_subject,
    }
    found = measures[args.what](args)
    store = args.base / "measured.json"
    figures = json.loads(store.read_text()) if store.exists() else {}
    store.write_text(json.dumps(figures | found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
