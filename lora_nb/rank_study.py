"""Which rank was needed: one run's LoRA cut down by SVD to smaller and smaller ranks, drawn with and judged.

One training answers, because the best LoRA of rank r inside a larger one is known (`formats.resize`). It is not
quite what training at rank r would have found; it says how much room the learned change takes.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from lora_nb import adapters, data, env, formats
from lora_nb.errors import ConfigError
from lora_nb.families import Family, family_of
from lora_nb.inference import fused, generate, use_adapter
from lora_nb.judge import Judge, load_judge
from lora_nb.metrics import Score, concept_score, drift, style_score
from lora_nb.probe import Paired, Probe, ProbeResult, paired
from lora_nb.run_folder import read_config

RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class AtRank:
    """The LoRA cut to one rank; rank 0 is the base model.

    energy: share of sum(s^2) over all layers that is kept. moved: cosine distance of the judge's features to the
    pictures of the whole LoRA with the same prompt and seed. style, concept: None where the judge was not taught them.
    loss, lost: held-out loss, and how much higher it is than the whole LoRA's; None without held-out pictures.
    """

    rank: int
    energy: float
    pictures: list[Image]
    moved: Score
    style: Score | None = None
    concept: Score | None = None
    loss: float | None = None
    lost: Paired | None = None


@dataclass(frozen=True)
class RankStudy:
    """A row for each rank, smallest first; the last is the whole LoRA. style: the one that the judge looks for."""

    rows: tuple[AtRank, ...]
    prompts: tuple[str, ...]
    style: str | None

    def needed(self, keep: float = 0.95) -> int | None:
        """The smallest rank that keeps this share of what the whole LoRA gained in held-out loss over the base.

        None if there are no held-out pictures, or if the whole LoRA gained nothing on them.
        """
        base, whole = self.rows[0].loss, self.rows[-1].loss
        if base is None or whole is None or whole >= base:
            return None
        return next(row.rank for row in self.rows[1:] if base - row.loss >= keep * (base - whole))

    def alike(self) -> int | None:
        """The smallest rank whose pictures the judge takes for the style as often as the whole LoRA's.

        As often: within the whole LoRA's 95 % interval. None for a style that the judge was not taught.
        """
        if self.style is None:
            return None
        return next(row.rank for row in self.rows[1:] if row.style.mean >= self.rows[-1].style.low)

    def table(self) -> str:
        """Plain text: a line per rank, and which rank was needed."""
        lines = [
            "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
            for cells in (_TITLES, *self._cells())
        ]
        return "\n".join([*lines, *self.verdict()])

    def verdict(self) -> list[str]:
        """What the rows add up to, in sentences."""
        said, needed, alike = [], self.needed(), self.alike()
        if needed is not None:
            said.append(f"Rank {needed} keeps 95 % of what the whole LoRA gained in held-out loss.")
        if alike is not None:
            said.append(
                f"From rank {alike} on the judge sees {self.style} style as often as with the whole LoRA."
            )
        return said or [
            "Nothing here can be judged: no held-out pictures, and a style that the judge was not taught."
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                str(row.rank) if row.rank else "base",
                f"{row.energy:.0%}",
                _interval(row.style),
                _interval(row.concept),
                f"{max(row.moved.mean, 0):.2f}",  # rounding may leave -0.00
                "" if row.loss is None else f"{row.loss:.4f}",
                "" if row.lost is None else f"{row.lost.mean:+.4f} ± {row.lost.standard_error:.4f}",
            )
            for row in self.rows
        ]

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(title)}</th>" for title in _TITLES)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        return f"<table><tr>{head}</tr>{body}</table><p>{escape(' '.join(self.verdict()))}</p>"


_TITLES = ("rank", "energy", "style", "right thing", "moved", "loss", "above the whole")
_WIDTHS = (6, 8, 20, 20, 7, 9, 18)


def _interval(score: Score | None) -> str:
    return "" if score is None else f"{score.mean:.2f} ({score.low:.2f} to {score.high:.2f})"


def which_rank(
    run: str | Path,
    ranks: Sequence[int] = RANKS,
    pictures: int = 10,
    held_out: int = 24,
    judge: Judge | None = None,
    **sampling: Any,
) -> RankStudy:
    """Cut a run's LoRA to each rank, draw the same prompts and seeds with each, judge them and measure the loss.

    run: a run's folder. pictures: how many captions, of the held-out split if there is one, are drawn for each rank;
    the seed of picture i is i. held_out: pictures that the loss is measured on. sampling: arguments of `generate`, by
    default the run's with 10 steps. Ranks that the LoRA has not are left out. Raises CheckpointError if there is no
    run, FormatError if its file is no plain LoRA (DoRA), ConfigError for a rank below 1.
    """
    judge, config = judge or load_judge(), read_config(run)
    weights = formats.read_weights(run)
    whole = max(pair.rank for pairs in weights.values() for pair in pairs.values())
    if min(ranks, default=0) < 1:
        raise ConfigError(f"ranks is {tuple(ranks)}; name ranks of at least 1.")
    device = env.pick_device()
    family = family_of(config, getattr(torch, device.dtype), device.name)
    split = "validation" if data.has_split(config.data, "validation") else "train"
    held = data.load(config.data, split)
    count = min(pictures, len(held))
    rows = [held.rows[i * len(held) // count] for i in range(count)]
    probe = None
    if split == "validation":
        captions = not any(part.startswith("text_encoder") for part in weights)
        probe = Probe(family, held, held_out, config.train_batch_size, captions)
    settings = config.sampling | {"num_inference_steps": 10, "batch_size": count} | sampling
    drawn, probed = {}, {}
    for rank in (0, *(r for r in sorted(set(ranks)) if r < whole), whole):
        _put(family, weights, rank)
        drawn[rank] = _draw(family, [row.caption for row in rows], settings)
        probed[rank] = _probed(probe, rank)
    return _judged(rows, drawn, probed, _energy(formats.xray(weights)), judge)


def _judged(
    rows: Sequence[data.Row],
    drawn: dict[int, list[Image]],
    probed: dict[int, ProbeResult | None],
    energy: Sequence[float],
    judge: Judge,
) -> RankStudy:
    """What the pictures and losses of each rank say; the last rank is the whole LoRA."""
    whole = max(drawn)
    style, concepts = _taught(judge, rows)
    found = []
    for rank, images in drawn.items():
        loss = probed[rank]
        row = AtRank(
            rank,
            energy[rank],
            images,
            moved=drift(drawn[whole], images, judge),
            style=style_score(images, style, judge) if style else None,
            concept=concept_score(images, concepts, judge) if concepts else None,
            loss=loss.loss if loss else None,
            lost=paired(probed[whole].by_timestep, loss.by_timestep) if loss else None,
        )
        found.append(row)
    return RankStudy(tuple(found), tuple(row.caption for row in rows), style)


def _put(family: Family, weights: formats.Weights, rank: int) -> None:
    """The LoRA cut to this rank in the place of the one before; through a file, so that every precision is served."""
    if rank:
        with tempfile.TemporaryDirectory() as folder:
            file = formats.save_weights(
                formats.resize(weights, rank)[0], Path(folder) / formats.FILE_NAME
            )
            use_adapter(family.pipeline(), file, adapters.ADAPTER)


def _draw(family: Family, prompts: list[str], settings: dict[str, Any]) -> list[Image]:
    pipeline = family.pipeline()
    with fused(pipeline):
        return generate(pipeline, prompts, list(range(len(prompts))), **settings)


def _probed(probe: Probe | None, rank: int) -> ProbeResult | None:
    if probe is None:
        return None
    return probe.measure(rank) if rank else probe.untrained()


def _energy(spectra: Sequence[formats.Spectrum]) -> list[float]:
    """The share of sum(s^2) over all layers that rank 0, 1, 2, ... keeps."""
    size = max(len(s.values) for s in spectra)
    squares = torch.zeros(size, dtype=torch.float64)
    for spectrum in spectra:
        squares[: len(spectrum.values)] += torch.tensor(spectrum.values, dtype=torch.float64) ** 2
    return [0.0, *(squares.cumsum(0) / squares.sum()).tolist()]


def _taught(judge: Judge, rows: Sequence[data.Row]) -> tuple[str | None, list[str]]:
    """The style with which all captions end, and the concept of each, as far as the judge was taught them."""
    style = next(
        (s for s in judge.styles if all(row.caption.endswith(f"{s} style") for row in rows)), None
    )
    concepts = [str(row.extra.get("concept", "")) for row in rows]
    return style, concepts if set(concepts) <= set(judge.names) else []
