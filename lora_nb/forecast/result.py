"""The forecast of a run: what it will cost, part by part, and the ladder of settings that cost less memory."""

import html
import math
from dataclasses import dataclass, field
from typing import Any

ROOM = 0.93  # share of the memory that may be planned with; the rest is lost between blocks


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: the settings of all rungs above it and one more change.

    changes: fields for `config.replace`, those of the rungs above included. memory: peak in bytes. seconds: of one
    optimizer step, not a number if none was
    possible. measured: by a real step; otherwise it is reckoned from one.
    """

    name: str
    changes: dict[str, Any]
    says: str
    memory: int
    seconds: float
    fits: bool
    measured: bool


@dataclass(frozen=True)
class Forecast:
    """What a whole run will cost on this machine. Times in seconds, memory in bytes.

    startup: reading pictures and base model, and what only the first step does. caching: latents and text states that
    are not on disk yet. training: all steps. validation: sample pictures. probe, saving: all of them in the run.
    peak_memory: the most at any time; of the process on a CPU, of torch's allocator on a GPU. highest: when that is.
    memory_total: what this process may use. session_hours: how long the platform lets a session live, None for ever.
    """

    steps: int
    seconds_per_step: float
    startup: float
    caching: float
    training: float
    validation: float
    probe: float
    saving: float
    peak_memory: int
    memory_total: int
    highest: str
    device: str
    session_hours: float | None = None
    ladder: list[Rung] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The whole run, from the call of `train` to the adapter file."""
        return sum(seconds for _, seconds in self.parts)

    @property
    def parts(self) -> list[tuple[str, float]]:
        """What the time goes into, in the order in which it is first spent."""
        names = ("startup", "caching", "training", "validation", "probe", "saving")
        return [(name, getattr(self, name)) for name in names]

    @property
    def fits(self) -> bool:
        """Whether the peak leaves some room in memory."""
        return fits(self.peak_memory, self.memory_total)

    @property
    def first_fit(self) -> Rung | None:
        """The first rung of the ladder that fits this machine; None if none does."""
        return next((rung for rung in self.ladder if rung.fits), None)

    @property
    def in_session(self) -> bool:
        """Whether the run ends before the platform ends the session."""
        return self.session_hours is None or self.seconds < 3600 * self.session_hours

    @property
    def verdict(self) -> str:
        """One or two sentences: whether it fits, and if not what does."""
        if self.fits:
            text = f"Fits: {self.steps} steps in about {span(self.seconds)}."
        elif rung := self.first_fit:
            text = f"Does not fit as configured; the first that does is {rung.name} ({_settings(rung.changes)})."
        else:
            text = "Does not fit, nor does any rung below; take a smaller base model or a larger machine."
        if not self.in_session:
            text += f" A session here lives {self.session_hours:g} h; the next one goes on from the last checkpoint."
        return text

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The ladder as text: rung, change, memory, seconds of a step, whether it fits."""
        return [
            (
                rung.name,
                rung.says,
                f"{'' if rung.measured else 'about '}{gib(rung.memory)}",
                _seconds(rung),
                "fits" if rung.fits else "too much",
            )
            for rung in self.ladder
        ]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {span(seconds)}" for name, seconds in self.parts if seconds)
        lines = [
            self.verdict,
            f"time    {self.steps} steps of {self.seconds_per_step:.3f} s; {parts}",
            f"memory  {gib(self.peak_memory)} at most (in {self.highest}) of {gib(self.memory_total)}, {self.device}",
        ]
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        parts = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{span(seconds)}</td></tr>"
            for name, seconds in self.parts
            if seconds
        )
        ladder = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in row)
            + "</tr>"
            for row in self.rows()
        )
        return (
            f"<p><b>{html.escape(self.verdict)}</b><br>{gib(self.peak_memory)} at most (in {self.highest}) of "
            f"{gib(self.memory_total)}, {html.escape(self.device)}</p><table>{parts}</table><table>{ladder}</table>"
        )


def fits(memory: int, total: int) -> bool:
    """Whether a peak of `memory` bytes leaves some room in `total`."""
    return memory <= ROOM * total


def gib(size: int) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _seconds(rung: Rung) -> str:
    if math.isnan(rung.seconds):
        return "-"
    return f"{'' if rung.measured else 'about '}{rung.seconds:.2f} s"


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in changes.items())
