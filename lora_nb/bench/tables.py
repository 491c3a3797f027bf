"""BENCHMARKS.md from what was measured: one section for each part, with its conditions."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from lora_nb.forecast.result import ROOM

Part = dict[str, Any]

# Cards that many learners get: TFLOP/s in 16 bits by their maker's data sheet, and GiB that a process can have.
CARDS = {"T4": (65.0, 14.6), "A100": (312.0, 39.4)}
GPU = "## GPU: "  # the title of what was measured on one begins so
FORETOLD = ("ours", "ours, checkpointing, offload")

HEAD = """# Benchmarks

Written by `{command}`; do not edit. Every figure of this file was measured by that command unless a line says
*prediction* or *reckoned*. Ratios are of rounds that took turns, median (least to most); above 1 ours is faster.
CPU times are the process's, so that a busy neighbour counts less; both sides run with the same threads, wait policy and
malloc settings, and no speed is reported unless the losses of 30 steps agree first.

Base model and pictures are made from a seed: a UNet of 17.84 M weights, a VAE of 3.88 M, a CLIP text encoder of 7.13 M,
200 PNGs of 128 pixels with captions; LoRA of rank 8 on the attention of the UNet, AdamW, constant learning rate. {peer}
"""
SCRIPT = """The other side is the **unmodified** `train_text_to_image_lora.py` of {name}, run by `runpy` with a clock on
its progress bar. Where torchvision is not installed (the one on PyPI cannot be imported beside a CPU torch), six
picture transforms in PIL and numpy stand in for it (`lora_nb/bench/standin`); the pixels are checked to be equal."""
PLAIN = """The other side is **the plain loop** (`lora_nb/bench/plain.py`), as no checkout of the reference script was
given: the same work in each step, and a little faster than the script, so these ratios are rather too small."""


def page(parts: dict[str, Part], about: dict[str, str], command: str, script: str | None) -> str:
    """The whole file. parts: by name, each with its `conditions`. script: the checkout, None for the plain loop."""
    peer = SCRIPT.format(name=script) if script else PLAIN
    blocks = [HEAD.format(command=command, peer=peer), _facts(about)]
    for name, write in SECTIONS.items():
        if name in parts:
            blocks += [write(parts[name]), _conditions(parts[name])]
    return "\n".join(block.rstrip() + "\n" for block in blocks)


def _facts(values: dict[str, str]) -> str:
    return _table(("", ""), list(values.items()))


def _conditions(part: Part) -> str:
    words = "; ".join(f"{name}: {value}" for name, value in part["conditions"].items())
    return f"<sub>Measured {words}.</sub>"


def _training(part: Part) -> str:
    rows = []
    for row in part["rows"]:
        memory = row["memory"]
        rows.append(
            (
                ", ".join(filter(None, (f"batch {row['batch']}", _precision(row), row["variant"]))),
                f"{row['theirs']:.3f} s{'' if _alike(row) else ' (float32)'}",
                f"{row['ours']:.3f} s",
                spread(row["cpu"]),
                spread(row["wall"]),
                f"{memory[1] / 2**20:.0f} MB, {memory[1] / memory[0]:.2f}x",
                f"{row['peak']:.0f} GFLOP/s, {row['of_peak']:.0%}",
            )
        )
    names = (
        "a step", "script, CPU", "ours, CPU", "ratio, CPU", "ratio, wall", "ours, peak memory",
        "peak of a product, ours of it",
    )  # fmt: skip
    ratios = [
        f"{spread(row['to float32'])} {row['variant']}".strip()
        for row in part["rows"]
        if row["to float32"]
    ]
    mixed = f" Our bf16 against the script's float32 in the same rounds: {', '.join(ratios)}."
    if not all(map(_alike, part["rows"])):
        mixed = " This CPU knows no bf16, and the script's was not waited for: those rows are against its float32."
    parity = ", ".join(f"{_named(p)} {worst:.1e}" for p, worst in part["parity"].items())
    return (
        "## A step\n\n"
        f"Largest difference of the losses of 30 steps at the script's own draws: {parity} (the gates are 1e-6 and "
        "2e-3; bf16 against the script's float32). Clipping is off on our side for that, as the script's does nothing; "
        f"for the times it is on. Median of {part['steps']} steps after 5, {part['rounds']} rounds in which both sides "
        "took three steps in turn, every picture encoded before."
        f"{mixed}\n\n" + _table(names, rows)
    )


def _alike(row: dict[str, Any]) -> bool:
    """Whether both sides computed in one precision."""
    return row.get("their precision", row["precision"]) == row["precision"]


def _switches(part: Part) -> str:
    rows = [
        (
            row["title"],
            f"{row['off']:.3f} s",
            f"{row['on']:.3f} s",
            spread(row["ratios"]),
            f"{row['difference']:.1e}",
        )
        for row in part["rows"]
    ]
    return (
        "## Each switch\n\nTwo trainings in one process that differ in one setting and take turns; batch 4, float32 "
        "unless the line says otherwise. The last column is the largest difference of their losses.\n\n"
        + _table(("switch", "off", "on", "ratio", "losses differ by"), rows)
    )


def _whole(part: Part) -> str:
    rows = [
        (
            f"{row['epochs']}{' (reckoned from the seconds of an epoch)' if row['reckoned'] else ''}",
            f"{row['theirs']:.1f} s",
            f"{row['ours']:.1f} s",
            spread(row["ratios"]),
            f"{row['all of ours']:.1f} s",
            spread(row["all ratios"]),
        )
        for row in part["rows"]
    ]
    names = (
        "epochs", "script", "ours", "ratio", "ours, with certificate, report and card", "ratio",
    )  # fmt: skip
    return (
        "## A whole run\n\nFrom the command to the adapter file, with imports, loading, caching and saving, on an "
        "empty cache; 50 steps of batch 4 are an epoch. CPU seconds; the sides took turns. Ours then reads its file "
        "back into a fresh base model, for a certificate, and writes a report and a card, for which the script has "
        "nothing.\n\n" + _table(names, rows)
    )


def _validation(part: Part) -> str:
    rows = [
        (
            _precision(row),
            f"{row['theirs']:.2f} s" if row["theirs"] else "not measured",
            f"{row['ours']:.2f} s",
            spread(row["ratios"]) if row["theirs"] else "-",
            f"{row['least']:.2f} s",
            f"{row['theirs'] / row['least']:.2f}" if row["theirs"] else "-",
            "-" if row["difference"] is None else f"{row['difference']:.1e}",
        )
        for row in part["rows"]
    ]
    names = (
        "ours", "script, a picture", "ours, a picture", "ratio", "arithmetic alone", "ratio it would give",
        "differs from one by one",
    )  # fmt: skip
    return (
        "## Sample pictures\n\nFour pictures of 30 denoising steps with guidance, CPU seconds; sets took turns. "
        "The script draws one by one under bf16 autocast, whatever it trains in; ours draws one batch with the adapter "
        "merged. *Arithmetic alone*: the counted products and convolutions of a picture at the peak of a "
        "product in that precision, with nothing else; no program that does this work is faster here.\n\n"
        + _table(names, rows)
    )


def _startup(part: Part) -> str:
    seconds, ratios = part["seconds"], part["ratios"]
    rows = [
        ("script", f"{seconds['theirs']:.2f} s", "1"),
        ("ours, nothing encoded", f"{seconds['ours']:.2f} s", spread(ratios["ours"])),
        ("ours, a second time", f"{seconds['ours again']:.2f} s", spread(ratios["ours again"])),
    ]
    return (
        "## Start-up\n\nCPU seconds from the command to the end of the first step of 4 pictures. `import lora_nb` "
        f"alone takes {part['import']:.2f} s.\n\n"
        + _table(("", "to the first step", "ratio"), rows)
    )


def _scaling(part: Part) -> str:
    sizes = [(f"{row['pictures']:,}", f"{row['step']:.3f} s") for row in part["rows"]]
    two = part["processes"]
    beside = [
        (
            str(row["threads"]),
            row["spins"],
            f"{row['quiet']:.3f} s",
            f"{row['beside']:.3f} s",
            spread(row["ratios"]),
        )
        for row in part["neighbour"]
    ]
    return (
        "## Growth\n\nA step of batch 4, by the number of pictures in the index (the same 200 over and over); the rows "
        "took turns, step by step.\n\n"
        + _table(("pictures", "a step, CPU"), sizes)
        + "\n## Two processes\n\nTwo processes of one training on two cores, one thread and batch 4 in each, so eight "
        f"pictures a step: {two['seconds']['two']:.3f} s (wall; all rows a few steps in turn). The ratio is of the "
        "pictures done in equal time.\n\n"
        + _table(
            ("against", "a step", "ratio"),
            [
                (against, f"{two['seconds'][side]:.3f} s", spread(two["ratios"][ratio]))
                for against, side, ratio in (
                    ("one process with the same flags, four pictures a step", "one", "flags"),
                    ("one that accumulates two batches of four", "accumulated", "accumulated"),
                    ("one with batch 8", "batch", "batch"),
                    ("(two trainings that exchange nothing, to one of them)", "apart", "apart"),
                )
            ],
        )
        + "\n"
        "## A busy neighbour\n\nA step of batch 4 beside a process that keeps a core busy, wall seconds. With more "
        "than one thread the fast ones wait for the one that shares its core.\n\n"
        + _table(("threads", "GOMP_SPINCOUNT", "alone", "beside", "times as long"), beside)
    )


def _forecast(part: Part) -> str:
    rows = []
    for label, name, form in (
        ("whole run", "seconds", lambda s: f"{s:.1f} s"),
        ("all steps, with what they encode", "training", lambda s: f"{s:.1f} s"),
        ("a step once all is encoded", "step", lambda s: f"{s:.3f} s"),
        ("peak memory", "memory", lambda b: f"{b / 2**20:.0f} MB"),
    ):
        pairs = [(said[name], was[name]) for said, was in part["rounds"]]
        said, was = (form(statistics.median(column)) for column in zip(*pairs, strict=True))
        rows.append((label, said, was, spread([a / b for a, b in pairs])))
    return (
        "## Forecast\n\n`lora_nb.preflight` in one process, the run of 100 steps with three sets of four pictures in "
        "another, wall seconds; medians of rounds in turn.\n\n"
        + _table(("", "forecast", "then", "ratio"), rows)
    )


def _gpu(part: Part) -> str:
    names = (
        "shape", "batch", "precision", "loop", "samples/s", "ratio", "peak allocated", "reserved", "of floor", "note",
    )  # fmt: skip
    title = f"{GPU}{part['gpu']}" + (", as a smaller card" if part["cap"] else "")
    return (
        f"{title}\n\nMeasured by `python -m lora_nb bench --gpu` on a machine with this card, "
        f"{part['conditions']['on']}. {part['cap']} "
        "Random weights, LoRA of rank 8. The eager loop is peft under autocast; like the "
        "reference script it encodes the pictures with the VAE, and the captions, in every step. Ours, in the same "
        "process, has latents and text states cached, as they are after the first epoch; `eager` launches kernel by "
        "kernel what is otherwise one CUDA graph, `compiled` has compiled blocks in it, and with "
        "`offload` text encoders and autoencoder are not on the GPU. Ratios are to the eager loop at the same batch, "
        "above 1 ours is faster. The floor is the arithmetic of a UNet step at the measured "
        f"{part['peak']:.0f} TFLOP/s of an 8192 product.\n\n"
        + _table(names, [gpu_row(row) for row in _dated(compared(part["rows"]))])
    )


def _dated(rows: Sequence[Part]) -> list[Part]:
    """The rows, with the day in the note of those that are older than the newest."""
    newest = max((row.get("on", "") for row in rows), default="")
    return [
        row
        if row.get("on", newest) == newest
        else row | {"note": "; ".join(filter(None, (f"of {row['on']}", row["note"])))}
        for row in rows
    ]


def compared(rows: Sequence[Part]) -> list[Part]:
    """The rows of each shape and batch together, the eager loop's first, and ratios to it if it ran apart."""
    eager = {case(row): row["rate"] for row in rows if not row["variant"].startswith("ours")}
    found = []
    for row in rows:
        there = eager.get(case(row)) if row["variant"].startswith("ours") else None
        ratio = {"ratio": row["rate"] / there} if there and row["rate"] else {}
        found.append(ratio | row)
    return sorted(found, key=lambda row: (*case(row), row["variant"].startswith("ours")))


def case(row: Part) -> tuple[str, int, str]:
    """What a row of the GPU's table is of, whatever the loop."""
    return row["shape"], row["batch"], row["precision"]


def gpu_row(row: Part) -> tuple[str, ...]:
    """The cells of a row of the GPU's table; a row without a rate did not run."""
    ran = bool(row["rate"])
    return (
        row["shape"],
        str(row["batch"]),
        _precision(row),
        row["variant"],
        f"{row['rate']:.1f}" if ran else "-",
        f"{row['ratio']:.2f}" if row.get("ratio") else "-",
        f"{row['memory'] / 2**30:.2f} GiB" if ran else "-",
        f"{row['reserved'] / 2**30:.2f} GiB" if ran else "-",
        f"{row['of_peak']:.0%}" if ran else "-",
        row["note"].replace("|", "/"),
    )


def predictions(
    shapes: Iterable[Any], measured: Part | None = None, measured_peak: float = 790.0
) -> str:
    """What is expected of a GPU where that was not measured, and why; empty where all was.

    measured: the part of the GPU, if there is one. measured_peak: TFLOP/s of an H200 in bf16.
    """
    done = {
        (row["shape"], row["batch"])
        for row in (measured["rows"] if measured else ())
        if row["variant"] == "ours" and row["rate"]
    }
    rows, counts = [], []
    for shape in shapes:
        floor = measured_peak / shape.tflop
        for batch, (rate, ratio, memory) in shape.expected.items():
            if (shape.title, batch) in done:
                continue
            share = f"{rate}, {rate / floor:.0%} of the floor"
            rows.append((f"{shape.title}, batch {batch}", share, f"{ratio}x", memory))
        counts.append(
            f"{shape.title} at {shape.resolution} pixels: {shape.counts}; floor {floor:.0f} samples a second"
        )
    names = (
        "bf16, rank 8",
        "samples/s, at least",
        "over the eager loop, at least",
        "memory, at most",
    )
    if not rows:
        return ""
    head = (
        "GPU (predictions of what was not measured)"
        if done
        else "GPU (predictions, nothing measured)"
    )
    return (
        f"## {head}\n\n`lora-nb bench --gpu` measures this. "
        f"Derivation: counted on the meta device, and an H200 at the {measured_peak:.0f} TFLOP/s in bf16 "
        f"that were measured on one elsewhere. {'. '.join(counts)}. At batch 1 to 4 an eager step is bound by its "
        "kernel launches, not by "
        "arithmetic, which is why the rates are a fraction of the floor.\n\n" + _table(names, rows)
    )


def other_cards(shapes: Iterable[Any], measured: Part) -> str:
    """What the measured rows in 16 bits mean for cards that were not at hand; empty where none was measured."""
    tflop = {shape.title: shape.tflop for shape in shapes}
    rows = [
        (
            f"{name}, {gib} GiB",
            f"{row['shape']}, batch {row['batch']}, {row['variant']}",
            f"{row['of_peak'] * peak / tflop[row['shape']]:.1f}",
            f"{row['memory'] / 2**30:.2f} GiB",
            "yes" if row["memory"] <= ROOM * gib * 2**30 else "no",
        )
        for name, (peak, gib) in CARDS.items()
        for row in compared(measured["rows"])
        if row["variant"] in FORETOLD and row["rate"] and row["precision"] != "no"
    ]
    if not rows:
        return ""
    peaks = ", ".join(f"{name} {peak} TFLOP/s" for name, (peak, _) in CARDS.items())
    return (
        "## GPU (predictions for other cards)\n\nDerivation: the share of its floor that each row above has on the "
        f"{measured['gpu']}, of the floor at the peak that the maker names for 16 bits ({peaks}). It is a lower bound "
        "as far as a slower card spends more of a step in arithmetic and less in launching it. The memory is the "
        "measured one: tensors have the same size in fp16 and bf16. It fits if 7 % of the card stay free.\n\n"
        + _table(("card", "row", "samples/s, at least", "memory", "fits"), rows)
    )


SECTIONS = {
    "training": _training,
    "switches": _switches,
    "whole": _whole,
    "validation": _validation,
    "startup": _startup,
    "scaling": _scaling,
    "forecast": _forecast,
    "gpu": _gpu,
    "gpu_capped": _gpu,
}


def spread(ratios: Sequence[float]) -> str:
    """Median of ratios, with the least and the most where there are several."""
    middle = statistics.median(ratios)
    if len(ratios) == 1:
        return f"{middle:.2f}"
    return f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _precision(row: Part) -> str:
    return _named(row["precision"])


def _named(precision: str) -> str:
    return {"no": "float32"}.get(precision, precision)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
