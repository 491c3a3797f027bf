"""Where a training stands, read from its history: as a line of text and as the head of the live board."""

import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import psutil

from lora_nb import env
from lora_nb.early_stopping import verdict
from lora_nb.metrics import smooth
from lora_nb.plots import MINUS
from lora_nb.run_folder import HistoryTail

BEGINNINGS = ("start", "resume", "fork")
RECENT = 30  # steps whose seconds tell the pace of one


class Standing:
    """The run in `folder` as its history tells it; `read` brings it up to date."""

    def __init__(self, folder: str | Path):
        self._tail = HistoryTail(folder)
        self._began: tuple[float, int] | None = None
        self.events: list[dict[str, Any]] = []
        self.note = ""  # what the owner of the training adds, such as "paused"
        self.onward = "run this cell again to go on"  # what one does after a stop

    def read(self) -> "Standing":
        """Take in what the history says now."""
        self.events = self._tail.read()
        self.steps = [event for event in self.events if event["event"] == "step"]
        self.probes = [event for event in self.events if event["event"] == "probe"]
        begun = [event for event in self.events if event["event"] in BEGINNINGS]
        self.total = begun[-1]["max_train_steps"] if begun else 0
        self.done = self.steps[-1]["step"] if self.steps else 0
        if self._began is None and self.steps:
            self._began = time.monotonic(), self.done  # the first step fills the cache
        return self

    def restart_clock(self) -> None:
        """Count time and steps from now on, after a pause."""
        self._began = None

    @property
    def best(self) -> int:
        """The step with the best probe; 0 before there is one better than the base."""
        found = verdict(self.events)
        return found.best if found else 0

    @property
    def seconds_per_step(self) -> float:
        """The median of the latest steps."""
        recent = sorted(step["seconds"] for step in self.steps[-RECENT:])
        return recent[len(recent) // 2]

    def seconds_left(self) -> float | None:
        """Until the last step, at the pace since the board first looked; None before there is one."""
        began, first = self._began or (0.0, self.done)
        if self.done == first:
            return None
        return (time.monotonic() - began) / (self.done - first) * (self.total - self.done)

    def line(self, closed: bool) -> str:
        """Where the training stands, like a progress bar in words."""
        step, filled = self.steps[-1], 16 * self.done // self.total
        rates = "/".join(f"{rate:.1e}" for rate in step["lr"].values())
        probe = f"  held-out {self._probe(self.probes[-1])}" if len(self.probes) > 1 else ""
        return (
            f"step {self.done}/{self.total} [{'=' * filled}{'.' * (16 - filled)}] "
            f"loss {step['loss']:.4f}{probe}  lr {rates}  {self._time(closed)}"
        )

    def html(self, closed: bool) -> str:
        """The head of the board: a progress bar, the numbers, and what deserves attention."""
        share = self.done / self.total if self.total else 0.0
        bar = (
            f'<div role="progressbar" aria-valuenow="{self.done}" aria-valuemin="0" aria-valuemax="{self.total}" '
            f'style="height:8px;border-radius:4px;background:rgba(128,128,128,.22);margin:4px 0 8px">'
            f'<div style="height:8px;border-radius:4px;width:{share:.1%};background:#0072b2"></div></div>'
        )
        head = (
            '<div style="display:flex;justify-content:space-between;font-size:14px">'
            f"<b>step {self.done} of {self.total or '...'}</b><span>{escape(self._time(closed))}</span></div>"
        )
        tiles = "".join(_tile(name, *values) for name, values in self._numbers().items())
        said = "".join(_said(text) for text in self.warnings(closed))
        return (
            f'<div style="max-width:{902}px;font-family:system-ui,sans-serif;line-height:1.35">'
            f'{head}{bar}<div style="display:flex;flex-wrap:wrap;gap:6px">{tiles}</div>{said}</div>'
        )

    def warnings(self, closed: bool = False) -> list[str]:
        """What deserves attention: alarms of the training, held-out loss that rises, a session that will not do."""
        found = [e["message"] for e in self.events if e["event"] in ("alarm", "memory", "session")][
            -2:
        ]
        turned = verdict(self.events)
        if turned and turned.overfits:
            found.append(
                f"Overfitting: held-out loss is {turned.behind.mean:+.4f} from its best, after step {turned.best} "
                f"(standard error {turned.behind.standard_error:.4f}); more steps learn the pictures by heart."
            )
        left, ends = self.seconds_left(), session_left()
        if ends is not None and left is not None and left > ends and not closed:
            found.append(
                f"This session ends in {clock(ends)} at the latest, before the last step; then run the same cells "
                "again, and it goes on from the last checkpoint."
            )
        return found

    def _numbers(self) -> dict[str, Sequence[str]]:
        """What the tiles show: name, value, and what the value means."""
        if not self.steps:
            return {}
        step = self.steps[-1]
        losses = [s["loss"] for s in self.steps]
        rates = " / ".join(f"{rate:.2g}" for rate in step["lr"].values())
        norms = " / ".join(f"{norm:.2g}" for norm in step["grad_norms"].values())
        parts = " / ".join(step["lr"]) if len(step["lr"]) > 1 else ""
        numbers = {"training loss": (f"{smooth(losses)[-1]:.4f}", "smoothed")}
        if len(self.probes) > 1:
            best = f"best after step {self.best}" if self.best else "not better than the base"
            numbers["held-out minus base"] = (self._probe(self.probes[-1]), best)
        return numbers | {
            "learning rate": (rates, parts),
            "gradient norm": (norms, parts),
            "pace": (f"{self.seconds_per_step:.2f} s", "per step"),
            "memory": (f"{memory_gb():.1f} GB", "of the GPU, at most" if _cuda() else "of this process"),
        }  # fmt: skip

    def _probe(self, probe: Mapping[str, Any]) -> str:
        return f"{probe['difference']:+.4f} ± {2 * probe['standard_error']:.4f}".replace("-", MINUS)

    def _time(self, closed: bool) -> str:
        if self.note and not closed:
            return self.note
        if self.done >= self.total:
            watched = self._began is not None and self._began[1] < self.done
            return f"finished in {clock(self._spent())}" if watched else "finished"
        if closed:
            return f"stopped after step {self.done}; {self.onward}"
        left = self.seconds_left()
        if left is None:
            return "the clock starts now"
        return f"{clock(self._spent())} gone, about {clock(left)} left"

    def _spent(self) -> float:
        return time.monotonic() - self._began[0]


def session_left() -> float | None:
    """Seconds until the platform ends this session at the latest; None where nobody does."""
    end = env.session_end()
    return None if end is None else max(0.0, end - time.time())


def memory_gb() -> float:
    """The most GPU memory that tensors took, or what this process holds in RAM."""
    if _cuda():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _cuda() -> bool:
    return sys.modules["torch"].cuda.is_available()


def clock(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _tile(name: str, value: str, meaning: str) -> str:
    return (
        '<div style="padding:5px 10px;border-radius:6px;background:rgba(128,128,128,.12);min-width:92px">'
        f'<div style="font-size:11px;opacity:.7">{escape(name)}</div>'
        f'<div style="font-size:15px;font-weight:600;font-variant-numeric:tabular-nums">{escape(value)}</div>'
        f'<div style="font-size:11px;opacity:.7">{escape(meaning)}&nbsp;</div></div>'
    )


def _said(text: str) -> str:
    return (
        '<div style="margin-top:6px;padding:5px 10px;border-left:3px solid #d55e00;'
        f'background:rgba(213,94,0,.1);font-size:13px">{escape(text)}</div>'
    )
