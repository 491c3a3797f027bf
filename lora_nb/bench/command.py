"""`lora-nb bench`: run the parts that are asked for, keep their results, and write the tables from all there are."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_nb import env
from lora_nb.bench import machine, tables
from lora_nb.bench.parts import PARTS, Bench, conditions
from lora_nb.errors import ConfigError
from lora_nb.families.shapes import SHAPES
from lora_nb.files import write_atomically

SCRIPT = Path("examples") / "text_to_image" / "train_text_to_image_lora.py"


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for. reference: a diffusers checkout. work: where results and inputs are kept."""

    reference: str | None = None
    rounds: int = 3
    steps: int = 30
    threads: int = 1
    only: Sequence[str] = ()
    full: bool = False
    gpu: bool = False
    gpu_cases: Sequence[str] = ()
    gpu_loops: Sequence[str] = ()
    gpu_cap: float | None = None
    work: str | None = None
    out: str = "BENCHMARKS.md"


def run(wanted: Wanted, say=print) -> Path:
    """Measure and write; returns the path of the tables. A part that was measured before is kept until measured anew.

    Raises ConfigError for a part that does not exist or a checkout without the script, BenchError if the two sides do
    not compute the same.
    """
    names = wanted.only or (() if wanted.gpu else tuple(PARTS))
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"There is no part {name!r}; choose from {', '.join(PARTS)}.")
    folder = Path(wanted.work) if wanted.work else env.cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, _script(wanted), wanted.rounds, wanted.steps, wanted.threads, wanted.full)
    if names:
        bench.check_parity()
    for name in names:
        began = time.perf_counter()
        found = {"conditions": _conditions(bench)} | PARTS[name](bench)
        _keep(folder, name, found)
        say(f"{name}: {time.perf_counter() - began:.0f} s")
    if wanted.gpu:
        _measure_gpu(wanted, folder, _conditions(bench), say)
    return _write(wanted, folder)


def _measure_gpu(wanted: Wanted, folder: Path, conditions: dict[str, str], say) -> None:
    """Every row is said, kept and in the tables as soon as it is measured: a rented GPU may go at any time.

    Rows of the same card that were measured before are kept until measured anew.
    """
    from lora_nb.bench import gpu

    name = "gpu_capped" if wanted.gpu_cap else "gpu"
    file = folder / f"{name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}

    def keep(part: dict) -> None:
        new = part["rows"][-1]
        new["on"] = conditions["on"]
        same_card = all(before.get(key) == part[key] for key in ("gpu", "cap"))
        anew = {(tables.case(row), row["variant"]) for row in part["rows"]}
        old = [
            row
            for row in before.get("rows", ())
            if same_card and (tables.case(row), row["variant"]) not in anew
        ]
        _keep(folder, name, {"conditions": conditions} | part | {"rows": old + part["rows"]})
        _write(wanted, folder)
        say(", ".join(tables.gpu_row(new)))

    gpu.measure(folder, wanted.gpu_cap, wanted.gpu_cases, wanted.gpu_loops, keep)


def _script(wanted: Wanted) -> Path | None:
    if wanted.reference is None:
        return None
    script = Path(wanted.reference).resolve() / SCRIPT
    if not script.is_file():
        raise ConfigError(f"There is no {script}; give the folder of a diffusers checkout.")
    return script


def _conditions(bench: Bench) -> dict[str, str]:
    return {"on": machine.describe()["date"]} | conditions(bench)


def _keep(folder: Path, name: str, found: dict) -> None:
    write_atomically(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")


def _write(wanted: Wanted, folder: Path) -> Path:
    found = {
        name: json.loads(file.read_text())
        for name in tables.SECTIONS
        if (file := folder / f"{name}.json").is_file()
    }
    script = None
    if wanted.reference:
        script = f"huggingface/diffusers ({Path(wanted.reference).name})"
    command = "python -m lora_nb bench " + " ".join(_words(sys.argv))
    text, out = tables.page(found, machine.describe(), command.strip(), script), Path(wanted.out)
    kept = "" if {"gpu", "gpu_capped"} & set(found) else _of_a_gpu(out)
    return write_atomically(out, text + (kept or _expected(found.get("gpu"))))


def _of_a_gpu(file: Path) -> str:
    """What stands in the file of a GPU that was at hand when it was written: to measure here must not lose it."""
    before = file.read_text() if file.is_file() else ""
    _, title, rest = before.partition(f"\n{tables.GPU}")
    return title + rest


def _expected(measured: tables.Part | None) -> str:
    """What is expected of the cases and the cards that were not measured."""
    large = [shape for shape in SHAPES.values() if shape.expected]
    blocks = [tables.predictions(large, measured)]
    if measured:
        blocks.append(tables.other_cards(large, measured))
    return "".join(f"\n{block}" for block in blocks if block)


def _words(argv: list[str]) -> list[str]:
    """The arguments after `bench`, without the folders of this machine."""
    rest = argv[argv.index("bench") + 1 :] if "bench" in argv else []
    return [Path(word).name if "/" in word else word for word in rest]
