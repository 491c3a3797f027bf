"""Early stopping: the adapter of the best probe is kept, and training ends once the probe has turned for good.

The training loss cannot say when to stop: it falls while a few pictures are learned by heart. The probe, on pictures
that are not trained on, turns.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nb import formats
from lora_nb.probe import Paired, paired
from lora_nb.run_folder import by_step, read_history

BEST = "best"  # folder of the best adapter inside a run's


@dataclass(frozen=True)
class Verdict:
    """What the probes of a run say so far.

    best: the step with the lowest held-out loss. since: how many probes came after it. behind: held-out loss of the
    last probe minus that of the best, draw by draw.
    """

    best: int
    since: int
    behind: Paired

    @property
    def overfits(self) -> bool:
        """Whether the last probe is worse than the best by more than two standard errors."""
        return self.behind.mean > 2 * self.behind.standard_error

    def __str__(self) -> str:
        if not self.since:
            return f"step {self.best} is the best so far"
        return (
            f"step {self.best} was the best; the held-out loss is {self.behind.mean:+.4f} from there "
            f"(standard error {self.behind.standard_error:.4f}) after {self.since} probes"
        )


def verdict(history: Sequence[dict[str, Any]]) -> Verdict | None:
    """Best probe and what has become of it, from the lines of history.jsonl; None before the first probe."""
    probes = list(by_step(history, "probe").values())
    if not probes:
        return None
    place = min(range(len(probes)), key=lambda i: probes[i]["difference"])
    best, last = probes[place], probes[-1]
    behind = paired(best["by_timestep"], last["by_timestep"])
    return Verdict(best["step"], len(probes) - 1 - place, behind)


def early_stop(
    training: Any, patience: int = 3, steps: Iterator[Any] | None = None
) -> Iterator[Any]:
    """Pass the steps of a training through, and end it after `patience` probes in a row that are not the best.

    The adapter of the best probe lies in the run's folder under best/, as a file like any other. If the last probe is
    worse by more than two standard errors, that is an alarm: a warning, and an event in history.jsonl. steps: what to
    pass through, such as with_samples(training); the training itself if empty. How often is probed says the config's
    probe_steps. A run that was ended so ends at once when it is called again.
    """
    folder = Path(training.folder)
    with closing(iter(training if steps is None else steps)) as steps:
        so_far = verdict(read_history(folder))
        if so_far and so_far.since >= patience:
            return
        if so_far and so_far.best == training.start_step and so_far.best:
            formats.save_adapter(training.family, folder / BEST)  # a kill may have come before
        for step in steps:
            if step.probe is None:
                yield step
                continue
            so_far = verdict(read_history(folder))
            if so_far.best == step.step:
                formats.save_adapter(training.family, folder / BEST)
            yield step
            if so_far.since >= patience:
                _end(training, so_far)
                return


def _end(training: Any, so_far: Verdict) -> None:
    where = f"Its adapter is in {BEST}/." if so_far.best else "No adapter was better than the base."
    text = f"Stopped early at step {training.done}: {so_far}. {where}"
    if so_far.overfits:
        text = f"Overfit. {text}"
        warnings.warn(text, stacklevel=3)
    training.history.record(
        "alarm" if so_far.overfits else "early stop", step=training.done, message=text
    )
