"""Two runs side by side: which settings differ, what the losses say pair by pair, pictures, sizes and times.

Draws are named by seed and sample number, so runs of one seed, batch and set of pictures saw the same noise, and their
losses can be subtracted picture by picture; what differs is then the settings' doing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nb import plots
from lora_nb.branching import paired_losses, paired_probes
from lora_nb.config import flat
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.probe import Paired, difference
from lora_nb.redaction import redacted, shown
from lora_nb.report import markup
from lora_nb.report.facts import Run

PLACES = {"output_dir", "overwrite", "resume_from_checkpoint", "resume_override", "logging_dir"}
ABSENT = "absent"


@dataclass(frozen=True)
class Comparison:
    """What sets run b apart from run a; all differences are b - a, so below zero b has the lower loss.

    settings: those that differ, by dotted name. losses: paired training losses by step; probes: the same of the
    held-out ones; unpaired: in one sentence each, why one of them is empty. numbers: sizes and times of both.
    """

    a: Run
    b: Run
    settings: dict[str, tuple[Any, Any]]
    losses: dict[int, Paired]
    probes: dict[int, Paired]
    unpaired: tuple[str, ...]
    numbers: dict[str, tuple[str, str]]

    @property
    def names(self) -> tuple[str, str]:
        """The runs' names; a and b if they are the same."""
        names = (self.a.name, self.b.name)
        return names if names[0] != names[1] else ("a", "b")

    @property
    def training(self) -> Paired | None:
        """Mean difference of the training loss over the steps that both have done, each step counting once."""
        return difference([p.mean for p in self.losses.values()]) if self.losses else None

    @property
    def held_out(self) -> Paired | None:
        """The last probe that both runs have, after training began."""
        steps = [step for step in self.probes if step > 0]
        return self.probes[max(steps)] if steps else None

    def said(self) -> list[str]:
        """The measured differences in sentences."""
        first, second = self.names
        lines = []
        if self.training:
            kind = f"over {self.training.n} steps with the same pictures, noise and timesteps"
            lines.append(f"Training loss of {second} - {first}, {kind}: {_in_words(self.training)}")
        if self.held_out:
            step = max(self.probes)
            kind = f"at step {step} over {self.held_out.n} draws"
            lines.append(f"Held-out loss of {second} - {first}, {kind}: {_in_words(self.held_out)}")
        return lines + list(self.unpaired)

    def table(self) -> str:
        """Plain text: settings that differ, what was measured, sizes and times."""
        rows = {name: tuple(map(markup.plain, both)) for name, both in self.settings.items()}
        rows = rows or {"(all settings)": ("the same", "the same")}
        wide = max(len(name) for name in [*rows, *self.numbers]) + 2
        column = max(len(a) for a, _ in [*rows.values(), *self.numbers.values(), self.names]) + 2

        def line(name: str, both: tuple[str, str]) -> str:
            return f"{name:<{wide}}{both[0]:<{column}}{both[1]}"

        lines = [line("", self.names)]
        lines += [line(name, both) for name, both in rows.items()]
        lines += ["", *self.said(), ""]
        lines += [line(name, both) for name, both in self.numbers.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<style>{NOTEBOOK_STYLE}</style><div class=compared>{redacted(_body(self))}</div>"

    def page(self) -> str:
        """All of it as one HTML page that needs nothing from outside."""
        title = markup.text(" and ".join(self.names))
        return redacted(
            markup.PAGE.format(
                title=title, style=markup.STYLE, body=f"<h1>{title}</h1>{_body(self)}"
            )
        )


def compare(a: str | Path, b: str | Path) -> Comparison:
    """What sets two finished or stopped runs apart; shows itself in a notebook, `table()` is its text.

    Raises CheckpointError if one of the folders holds no run.
    """
    runs = Run.read(a), Run.read(b)
    unpaired, losses, probes = [], {}, {}
    try:
        _same_pictures(*runs)
        losses = paired_losses(a, b)
    except CheckpointError:
        unpaired.append(
            "Training losses do not pair: the runs did not see the same pictures with the same noise and timesteps "
            "(give them one seed, batch and set of pictures)"
        )
    try:
        probes = paired_probes(a, b)
    except ConfigError:
        unpaired.append(
            "Held-out losses do not pair: the probes are of other pictures or another base model"
        )
    if not probes and len(unpaired) < 2:
        unpaired.append("No held-out loss at the same step: the runs have no probe in common")
    configs = [flat(run.config.to_dict()) for run in runs]
    names = sorted((configs[0].keys() | configs[1].keys()) - PLACES)
    both = {name: tuple(shown(c.get(name, ABSENT)) for c in configs) for name in names}
    return Comparison(
        *runs,
        settings={name: values for name, values in both.items() if values[0] != values[1]},
        losses=losses,
        probes=probes,
        unpaired=tuple(unpaired),
        numbers=_numbers(*runs),
    )


def _same_pictures(a: Run, b: Run) -> None:
    if a.start.get("fingerprint") != b.start.get("fingerprint"):
        raise CheckpointError("The runs were trained on different pictures.")


def _numbers(a: Run, b: Run) -> dict[str, tuple[str, str]]:
    costs = [{"steps": str(run.steps)} | run.cost() for run in (a, b)]
    return {
        name: (costs[0][name], costs[1].get(name, ABSENT)) for name in costs[0] if name != "energy"
    }


def _in_words(pair: Paired) -> str:
    sure = abs(pair.mean) / pair.standard_error if pair.standard_error else 0.0
    verdict = f"{sure:.1f} of them, " + ("which may be chance" if sure < 2 else "hardly chance")
    return f"{pair.mean:+.5f} with a standard error of {pair.standard_error:.5f} ({verdict})"


def _body(compared: Comparison) -> str:
    settings = {n: tuple(map(markup.plain, both)) for n, both in compared.settings.items()}
    settings = settings or {"all settings": ("the same", "the same")}
    sentences = "".join(f"<p>{markup.text(line)}</p>" for line in compared.said())
    figure = ""
    if compared.losses or compared.held_out:
        caption = (
            f"{compared.names[1]} - {compared.names[0]}: below zero {compared.names[1]} is better"
        )
        figure = markup.figure(plots.paired_runs(compared.losses, compared.probes), caption)
    return "".join(
        (
            markup.section("What differs", markup.table(settings, compared.names)),
            markup.section("What was measured", sentences + figure),
            _pictures(compared),
            markup.section("Sizes and times", markup.table(compared.numbers, compared.names)),
        )
    )


def _pictures(compared: Comparison) -> str:
    """The newest samples of both under the same prompt, for the prompts that both have drawn."""
    runs = (compared.a, compared.b)
    prompts = [
        p for p in runs[0].config.validation_prompts if p in runs[1].config.validation_prompts
    ]
    rows = {
        name: [run.drawn(prompt) for prompt in prompts]
        for name, run in zip(compared.names, runs, strict=True)
    }
    if not prompts or not all(all(files) for files in rows.values()):
        return ""
    rows = {"base": [runs[0].drawn(prompt, base=True) for prompt in prompts]} | rows
    shown = {label: files for label, files in rows.items() if all(files)}
    return markup.section(
        "Samples", markup.strip(prompts[:8], {k: v[:8] for k, v in shown.items()})
    )


NOTEBOOK_STYLE = """
.compared table { border-collapse: collapse; font-size: .92em; }
.compared th, .compared td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top; }
.compared .strip th, .compared .strip td { padding: .15em; vertical-align: middle; }
.compared .strip th[scope=colgroup] { width: 7em; font-weight: 400; vertical-align: bottom; }
.compared .strip img { width: 7em; max-width: none; border-radius: 3px; display: block; }
.compared h2 { font-size: 1.05em; margin: 1.2em 0 .4em; }
.compared figure { margin: 0; }
.compared figcaption { opacity: .75; font-size: .88em; }
"""
