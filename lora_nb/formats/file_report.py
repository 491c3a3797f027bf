"""What was found in a LoRA file, as values, as text and as a view in a notebook."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lora_nb.formats.header import ADAPTER_METADATA


@dataclass(frozen=True)
class ModuleReport:
    """The LoRA of one layer as the file spells its name; scale is what multiplies B A.

    Of a LoKr, scale multiplies kron(w1, w2); rank is that of its pieces, 0 if both factors are whole. inputs counts a
    convolution's kernel where w2 has it in its columns.
    """

    part: str
    layer: str
    rank: int
    alpha: float
    scale: float
    inputs: int
    outputs: int


@dataclass(frozen=True)
class PartReport:
    """One part of a LoRA file: how many layers, which ranks and alphas, how many weights."""

    modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    parameters: int


@dataclass(frozen=True, repr=False)
class FileReport:
    """What a LoRA file holds; `problems` names what is wrong with it, `lost` what a conversion drops, in sentences.

    family, base: told by our own header, or by the layers and their sizes; "unknown" if nothing tells. method: LoKr as
    soon as some of the layers are.
    """

    file: str
    format: str
    parts: dict[str, PartReport]
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    problems: tuple[str, ...]
    family: str
    base: str
    modules: tuple[ModuleReport, ...]
    lost: dict[str, tuple[str, ...]]
    method: str = "LoRA"  # or LoKr

    def _size(self) -> str:
        size, kinds = f"{self.bytes / 1e6:.2f} MB", ", ".join(self.dtypes)
        return f"{self.format} {self.method}, {size}, {self.tensors} tensors, {kinds}"

    def table(self, modules: bool = False) -> str:
        """Plain text, a line per part; with modules=True also one per layer."""
        lines = [f"{self.file}: {self._size()}", f"family {self.family}, base {self.base}"]
        lines.append(f"{'part':<16}{'layers':>8}{'rank':>10}{'alpha':>10}{'weights':>12}")
        for part, report in self.parts.items():
            ranks, alphas = _ranks(report.ranks), _numbers(report.alphas)
            lines.append(
                f"{part:<16}{report.modules:>8}{ranks:>10}{alphas:>10}{report.parameters:>12,}"
            )
        if modules:
            lines.append(f"{'rank':>6}{'alpha':>10}{'scale':>10}{'in':>7}{'out':>7}  layer")
            lines += [
                f"{_ranks([m.rank]):>6}{m.alpha:>10.4g}{m.scale:>10.4g}{m.inputs:>7}{m.outputs:>7}  {m.part} {m.layer}"
                for m in self.modules
            ]
        shown = {k: v for k, v in self.metadata.items() if k not in ("format", ADAPTER_METADATA)}
        lines += [f"{key}: {value[:100]}" for key, value in sorted(shown.items())]
        for form, sentences in self.lost.items():
            lines += [f"lost in {form}: {sentence}" for sentence in sentences]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """The same for a notebook: parts, what is wrong or would be lost, and behind a click every layer and entry."""
        about = (f"family {self.family}", f"base {self.base}")
        heads = ("part", "layers", "rank", "alpha", "weights")
        parts = [
            (part, str(r.modules), _ranks(r.ranks), _numbers(r.alphas), f"{r.parameters:,}")
            for part, r in self.parts.items()
        ]
        layers = [
            (
                f"{m.part} {m.layer}",
                _ranks([m.rank]),
                f"{m.alpha:.4g}",
                f"{m.scale:.4g}",
                f"{m.inputs} to {m.outputs}",
            )
            for m in self.modules
        ]
        said = [("problem", p) for p in self.problems]
        said += [(f"lost in {form}", s) for form, sentences in self.lost.items() for s in sentences]
        entries = [(key, value[:1000]) for key, value in sorted(self.metadata.items())]
        return (
            f"<p><b>{escape(Path(self.file).name)}</b>: {escape(', '.join((self._size(), *about)))}</p>"
            + _table(parts, heads)
            + (_table(said) if said else "")
            + _folded(
                f"{len(layers)} layers",
                _table(layers, ("layer", "rank", "alpha", "scale", "numbers")),
            )
            + _folded(f"{len(entries)} entries in the header", _table(entries))
        )


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(f"{rank}" if rank else "whole" for rank in ranks)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """All of it escaped: names and entries are the file's own words."""
    lines = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"] if heads else []
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
