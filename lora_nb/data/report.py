"""What a scan found: rows that can be trained on, and problems with their place and remedy. Finding them is in scan."""

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_nb.errors import DataError

SEVERITIES = ("error", "warning", "note")
SHOWN = 3  # problems of one kind that a table spells out
RAISED = 10  # errors that an exception spells out


@dataclass(frozen=True)
class Row:
    """One picture with its captions; width and height in pixels, after EXIF rotation."""

    index: int
    name: str  # path inside the folder, or the row of a table
    path: str | None  # of the file; None where the picture lies inside a table
    captions: tuple[str, ...]  # at least one; more than one means a choice by counter
    width: int
    height: int
    extra: dict[str, Any] = field(default_factory=dict)  # other metadata columns, such as "concept"

    @property
    def file(self) -> Path | None:
        """The picture's file."""
        return None if self.path is None else Path(self.path)

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


@dataclass(frozen=True)
class Problem:
    """One finding: where it is, what is wrong, and what to do (the same words for all problems of one kind)."""

    severity: str  # one of SEVERITIES; only an error keeps the data from being trained on
    where: str
    what: str
    fix: str

    def __post_init__(
        self,
    ) -> None:  # names and captions are anybody's: no control codes to a terminal
        for name in ("where", "what"):
            object.__setattr__(self, name, _printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}."


class Problems(list[Problem]):
    """The problems found so far."""

    def error(self, where: str, what: str, fix: str) -> None:
        """Add what keeps the data from being trained on."""
        self.append(Problem("error", where, what, fix))

    def warning(self, where: str, what: str, fix: str) -> None:
        """Add what can be trained on but is likely a mistake."""
        self.append(Problem("warning", where, what, fix))

    def note(self, where: str, what: str, fix: str) -> None:
        """Add what was done with the data and may surprise."""
        self.append(Problem("note", where, what, fix))


@dataclass(frozen=True)
class Report:
    """The result of one scan."""

    folder: Path | str  # a folder, or the name of a data set
    rows: list[Row]
    problems: list[Problem]
    seconds: float
    fingerprint: str  # sha256 over file bytes and captions of the rows, in their order

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the data from being trained on."""
        return [p for p in self.problems if p.severity == "error"]

    def raise_for_errors(self) -> None:
        """Raise DataError with the first ten errors and their count, if there are any."""
        errors = self.errors
        if len(errors) == 1:
            place = "" if errors[0].where == str(self.folder) else f"In {self.folder}: "
            raise DataError(f"{place}{errors[0]}")
        if errors:
            lines = [f"\n  {problem}" for problem in errors[:RAISED]]
            if len(errors) > RAISED:
                lines.append(f"\n  and {len(errors) - RAISED} more (the doctor lists all)")
            raise DataError(f"{self.folder} has {len(errors)} errors:{''.join(lines)}")

    def summary(self) -> str:
        """One line: how many pictures, how large, how long the captions are, how many problems."""
        counts = [sum(p.severity == s for p in self.problems) for s in SEVERITIES]
        found = ", ".join(_count(n, s) for n, s in zip(counts, SEVERITIES, strict=True) if n)
        parts = [_count(len(self.rows), "picture"), found or "no problems", f"{self.seconds:.1f} s"]
        if self.rows:
            sides = sorted(
                {(row.width, row.height) for row in self.rows}, key=lambda s: s[0] * s[1]
            )
            words = [len(caption.split()) for row in self.rows for caption in row.captions]
            sizes = f"{sides[0][0]} x {sides[0][1]}"
            if len(sides) > 1:
                sizes += f" to {sides[-1][0]} x {sides[-1][1]}"
            parts[1:1] = [f"{sizes} px", f"captions of {min(words)} to {max(words)} words"]
        return f"{self.folder}: {', '.join(parts)}"

    def table(self) -> str:
        """All problems as plain text, errors first, problems of one kind together."""
        lines = [self.summary()]
        for group in self._groups():
            lines += [f"{p.severity:<8} {p.where}: {p.what}" for p in group[:SHOWN]]
            if len(group) > SHOWN:
                lines.append(f"{'':<8} and {len(group) - SHOWN} more like this")
            lines.append(f"{'':<8} -> {group[0].fix}")
        return "\n".join(lines)

    def __repr__(self) -> str:  # a notebook keeps it beside the HTML; the rows would fill pages
        return self.table()

    def _repr_html_(self) -> str:
        lines = [f"<p>{html.escape(self.summary())}</p>"]
        if self.problems:
            lines.append("<table><tr><th></th><th>where</th><th>what</th><th>what to do</th></tr>")
            for group in self._groups():
                for p in group[:SHOWN]:
                    cells = (p.severity, p.where, p.what, p.fix)
                    row = "".join(
                        f"<td style='text-align:left'>{html.escape(c)}</td>" for c in cells
                    )
                    lines.append(f"<tr>{row}</tr>")
                if len(group) > SHOWN:
                    lines.append(
                        f"<tr><td></td><td colspan=3>and {len(group) - SHOWN} more</td></tr>"
                    )
            lines.append("</table>")
        return "".join(lines)

    def _groups(self) -> Iterator[list[Problem]]:
        groups: dict[tuple[str, str], list[Problem]] = {}
        for severity in SEVERITIES:
            for problem in self.problems:
                if problem.severity == severity:
                    groups.setdefault((severity, problem.fix), []).append(problem)
        yield from groups.values()


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
