"""Sweeps: short runs that differ in one thing and are measured alike, on a base model that is loaded once.

A cell of a sweep is an ordinary run in a folder of its own; what was measured of it is a file in there, written last,
so a sweep that was killed goes on where it was. Seed, pictures, noise and timesteps are the same in all cells.
"""

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_nb import adapters, checkpoint, data
from lora_nb.config import DataSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError, NumericsError
from lora_nb.families import Family
from lora_nb.files import write_atomically
from lora_nb.formats import FILE_NAME
from lora_nb.inference import draw_samples
from lora_nb.judge import Judge
from lora_nb.metrics import Score, concept_score, style_score
from lora_nb.probe import Paired, paired
from lora_nb.run_folder import read_history
from lora_nb.trainer import Training, train

CELL, TABLE, BASE = "cell.json", "sweep.json", "base"
# What may differ between the cells: nothing of it touches the loaded base model or what is drawn with it.
VARIES = {
    "lora", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power",
    "max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "use_8bit_adam", "noise_offset", "data",
    *(field.name for field in dataclasses.fields(DataSpec)),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What was measured of one run; the base model has a cell with rank 0.

    rank, alpha: of the first part. difference: held-out loss minus the base's at the last step, with the standard error
    of that mean over the pictures; None where the run broke off, and `fault` says why. style, concept: the judge's
    scores, None where it was not taught what the prompts ask for. bytes: of the adapter file. seconds: of all steps.
    pictures: files of the prompts in order, relative to the sweep's folder.
    """

    name: str
    parts: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    learning_rate: float = 0.0
    difference: float | None = 0.0
    standard_error: float | None = 0.0
    style: Score | None = None
    concept: Score | None = None
    parameters: int = 0
    bytes: int = 0
    seconds: float = 0.0
    pictures: tuple[str, ...] = ()
    fault: str = ""

    def __str__(self) -> str:
        what = f"{self.name:<22}"
        if self.difference is None:
            return f"{what}broke: {self.fault}"
        scores = {"style": self.style, "thing": self.concept}
        judged = "".join(f"  {k} {score.mean:.2f}" for k, score in scores.items() if score)
        if not self.rank:
            return f"{what}{'':33}{judged}"
        probe = f"{self.difference:+.4f} (standard error {self.standard_error:.4f})"
        return f"{what}{probe:>33}{judged}  {self.bytes / 1e6:5.2f} MB {self.seconds:6.1f} s"


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep that are finished, and the base model's."""

    folder: Path
    base: Cell
    cells: tuple[Cell, ...]

    def __getitem__(self, name: str) -> Cell:
        """A cell by name; raises ConfigError if there is none."""
        named = {cell.name: cell for cell in (self.base, *self.cells)}
        if name not in named:
            raise ConfigError(f"The sweep has no cell {name!r}; it has {', '.join(named)}.")
        return named[name]

    def best(self) -> Cell:
        """The cell with the lowest held-out loss; raises ConfigError if all runs broke off."""
        whole = [cell for cell in self.cells if cell.difference is not None]
        if not whole:
            raise ConfigError("No run of this sweep came to its end; lower the learning rates.")
        return min(whole, key=lambda cell: cell.difference)

    def nearest(self, rank: int, learning_rate: float) -> Cell:
        """The measured cell closest to a setting; distances are ratios, so 2 is as far from 1 as 8 from 4."""

        def distance(cell: Cell) -> float:
            return math.hypot(
                math.log(cell.rank / rank), math.log(cell.learning_rate / learning_rate)
            )

        return min(self.cells, key=distance)

    def between(self, before: Cell, after: Cell) -> Paired:
        """Held-out loss of `after` minus that of `before`, draw by draw; below zero `after` is better."""
        draws = (last_probe(self.folder / cell.name)["by_timestep"] for cell in (before, after))
        return paired(*draws)

    def files(self, cell: Cell) -> list[Path]:
        """The pictures of a cell."""
        return [self.folder / file for file in cell.pictures]

    def table(self) -> str:
        """A line of plain text for the base and for each cell."""
        return "\n".join(map(str, (self.base, *self.cells)))

    def __repr__(self) -> str:
        return self.table()


def rank_and_rate(
    config: TrainConfig, ranks: Sequence[int], learning_rates: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Variants for `run_sweep`: every rank with every learning rate, alpha = rank, all else as in the config."""
    return {
        f"rank-{rank}-lr-{rate:g}": {
            "learning_rate": rate,
            "lora": {
                part: dataclasses.replace(spec, rank=rank, lora_alpha=None, learning_rate=None)
                for part, spec in config.lora.items()
            },
        }
        for rank in ranks
        for rate in learning_rates
    }


def run_sweep(
    config: TrainConfig, variants: Mapping[str, Mapping[str, Any]], judge: Judge | None = None
) -> Iterator[Cell]:
    """Train and measure each variant of a config in a folder of its name below config.output_dir; the base comes first.

    variants: by name, fields of the config that are replaced. What each cell draws are the config's validation_prompts
    with its sampling settings. A cell that was measured before is read back, unless its config or data have changed.
    `read_sweep` returns what is there. Raises ConfigError without held-out pictures, or for a variant that would need
    another base model; a run whose numbers are not finite becomes a cell with a fault.
    """
    if not data.has_split(config.data, "validation"):
        raise ConfigError("A sweep compares held-out losses; give pictures in validation_data_dir.")
    config = config.replace(overwrite=False, seed=0 if config.seed is None else config.seed)
    configs = {name: _variant(config, name, changes) for name, changes in variants.items()}
    bench, folder, done = _Bench(config, judge), Path(config.output_dir), []
    for name, each in {BASE: config.replace(output_dir=str(folder / BASE)), **configs}.items():
        cell = bench.cell(name, each, bench.base if name == BASE else bench.trained)
        if cell is None:
            warnings.warn(
                f"The sweep stopped in {name}; the same call goes on from there.", stacklevel=2
            )
            return
        done.append(cell)
        table = [dataclasses.asdict(cell) for cell in done]
        write_atomically(folder / TABLE, json.dumps(table, indent=1))
        yield done[-1]


def read_sweep(folder: str | Path) -> Sweep:
    """The sweep of a folder as far as it is measured; raises CheckpointError if there is none."""
    file = Path(folder) / TABLE
    if not file.is_file():
        raise CheckpointError(f"There is no sweep in {folder} (no {TABLE}); run one there first.")
    base, *cells = map(_cell, json.loads(file.read_text(encoding="utf-8")))
    return Sweep(Path(folder), base, tuple(cells))


class _Bench:
    """One base model on which the cells of a sweep are trained and measured in turn."""

    def __init__(self, config: TrainConfig, judge: Judge | None):
        self.folder, self.config, self.judge = Path(config.output_dir), config, judge
        self.family: Family | None = None
        self.marks: dict[DataSpec, str] = {}

    def cell(
        self, name: str, config: TrainConfig, measure: Callable[[Training], Cell | None]
    ) -> Cell | None:
        """The cell as it was measured before, or measured now and written down; None if it was interrupted."""
        file, mark = self.folder / name / CELL, self._mark(config)
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("mark") == mark:
                return _cell(content)
        with warnings.catch_warnings():
            # Killed between training and measuring: only the measuring is left.
            warnings.filterwarnings("ignore", "This run is already finished")
            training = train(config, self.family)
        self.family = training.family
        cell = measure(training)
        if cell is not None:
            content = {"mark": mark} | dataclasses.asdict(cell)
            write_atomically(file, json.dumps(content, indent=1))
        return cell

    def base(self, training: Training) -> Cell:
        """Measure the base model, with a training that is never begun."""
        with adapters.disabled(training.family):
            return self._judged(Cell(BASE), _drawn(training, BASE))

    def trained(self, training: Training) -> Cell | None:
        """Train to the end and measure; None if it was interrupted."""
        spec = next(iter(training.learner.lora.values()))
        cell = Cell(
            training.folder.name,
            tuple(training.learner.lora),
            spec.rank,
            spec.alpha,
            next(iter(training.rates.peaks.values())),
            parameters=training.parameters,
        )
        fault, files = "", []
        try:
            for _ in training:
                pass
            if training.interrupted:
                return None
            files = _drawn(training, f"step-{training.done:06d}")
        except NumericsError as error:
            fault = re.split(r"[,:(]", str(error))[0].strip()
        for folder in checkpoint.found(training.folder):  # three times the adapter's size
            checkpoint.discard(folder)
        if fault:
            return dataclasses.replace(cell, difference=None, standard_error=None, fault=fault)
        steps = [line for line in read_history(training.folder) if line["event"] == "step"]
        probe = last_probe(training.folder)
        cell = dataclasses.replace(
            cell,
            difference=probe["difference"],
            standard_error=probe["standard_error"],
            bytes=(training.folder / FILE_NAME).stat().st_size,
            seconds=sum(line["seconds"] for line in steps),
        )
        return self._judged(cell, files)

    def _judged(self, cell: Cell, files: list[Path]) -> Cell:
        """The cell with its pictures and, as far as the judge was taught what they should show, its scores."""
        names = tuple(str(file.relative_to(self.folder)) for file in files)
        cell, config = dataclasses.replace(cell, pictures=names), self.config
        prompts = [
            p for p in config.validation_prompts for _ in range(config.num_validation_images)
        ]
        things = [prompt.split(", ")[0] for prompt in prompts]
        styles = {prompt.split(", ")[-1].removesuffix(" style") for prompt in prompts}
        if not files or self.judge is None or len(styles) != 1:
            return cell
        if not self.judge.knows(*styles, things):
            return cell
        images = [Image.open(file) for file in files]
        return dataclasses.replace(
            cell,
            style=style_score(images, *styles, self.judge),
            concept=concept_score(images, things, self.judge),
        )

    def _mark(self, config: TrainConfig) -> str:
        """Of all that a cell is made from, wherever its folder lies."""
        if config.data not in self.marks:
            splits = [data.load(config.data, split) for split in ("train", "validation")]
            self.marks[config.data] = "+".join(pictures.fingerprint for pictures in splits)
        judged = "" if self.judge is None else "judged"
        made_from = config.replace(output_dir="").to_json() + self.marks[config.data] + judged
        return hashlib.sha256(made_from.encode()).hexdigest()[:16]


def _drawn(training: Training, label: str) -> list[Path]:
    return (
        draw_samples(training, label, training.done) if training.config.validation_prompts else []
    )


def last_probe(folder: Path) -> dict[str, Any]:
    """The last probe in the history of a run."""
    return [line for line in read_history(folder) if line["event"] == "probe"][-1]


def _variant(config: TrainConfig, name: str, changes: Mapping[str, Any]) -> TrainConfig:
    if name == BASE or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(
            f"A variant cannot be called {name!r}; it needs a plain name for its folder."
        )
    for setting in changes.keys() - VARIES:
        raise ConfigError(
            f"The cells of a sweep share the base model and what they draw, so {setting} of {name!r} cannot vary; "
            "set it in the config, or make another sweep."
        )
    return config.replace(**changes, output_dir=str(Path(config.output_dir) / name))


def _cell(values: dict[str, Any]) -> Cell:
    """A cell from its JSON."""
    scores = {key: Score(*values[key]) for key in ("style", "concept") if values[key]}
    lists = {key: tuple(values[key]) for key in ("parts", "pictures")}
    return Cell(**values | lists | scores)
