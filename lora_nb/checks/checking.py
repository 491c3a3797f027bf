"""What an exercise is, and how an answer is compared with its reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_nb.errors import LoraNbError


class WrongAnswer(LoraNbError):
    """What `check(..., strict=True)` raises where a soft check prints."""


@dataclass(frozen=True)
class Task:
    """One exercise made concrete.

    reference: the right answer, a value or a function. cases: arguments to compare a function on; none for a value.
    mistakes: usual wrong answers of the same kind, each under the sentence that explains it.
    """

    reference: Any
    cases: Sequence[tuple] = ()
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Exercise:
    """A registered exercise; `task` builds its Task from what the notebook hands over with `check`."""

    name: str
    hint: str
    right: str
    task: Callable[..., Task]


EXERCISES: dict[str, Exercise] = {}


def check(name: str, answer: Any, strict: bool = False, **given: Any) -> bool:
    """Compare an answer with the reference, print one line and return whether it is right.

    None, `...` or a function that returns one of them (or raises NotImplementedError) counts as not yet done.
    given: what the exercise is about where it needs that, such as family=family. strict: raise WrongAnswer instead.
    """
    if name not in EXERCISES:
        raise WrongAnswer(
            f"There is no exercise {name!r}; there are {', '.join(sorted(EXERCISES))}."
        )
    exercise = EXERCISES[name]
    with torch.random.fork_rng(devices=[]):  # references may draw, the notebook's stream stays
        complaint = _complaint(exercise, exercise.task(**given), answer)
    if complaint and strict:
        raise WrongAnswer(f"{name} {complaint}")
    print(f"{name} {complaint or 'right: ' + exercise.right}")
    return not complaint


def _complaint(exercise: Exercise, task: Task, answer: Any) -> str:
    """What to tell about an answer; empty if it is right."""
    if answer is None or answer is ...:
        return f"not yet: {exercise.hint}"
    if callable(task.reference) != callable(answer):
        wanted = "a function" if callable(task.reference) else "a value"
        return f"expected {wanted}, got {_said(answer)}"
    for count, arguments in enumerate(task.cases or [()], start=1):
        expected = _value(task.reference, arguments)
        # a single value is the whole answer, so it is not given away
        wanted = _said(expected) if task.cases else "another value"
        try:
            got = _value(answer, arguments)
        except NotImplementedError:
            return f"not yet: {exercise.hint}"
        except Exception as fault:
            return f"expected {wanted}, got {type(fault).__name__}: {fault}"
        if got is None or got is ...:
            return f"not yet: {exercise.hint}"
        if not _same(got, expected, task.tolerance):
            return f"expected {wanted}, got {_said(got)}{_why(task, answer, count)}"
    return ""


def _value(answer: Any, arguments: tuple) -> Any:
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    return answer(*copies) if callable(answer) else answer


def _why(task: Task, answer: Any, count: int) -> str:
    """The sentence of the usual mistake that gives what this answer gave in the first `count` cases."""
    cases = list(task.cases[:count]) or [()]
    for sentence, mistake in task.mistakes.items():
        pairs = ((_value(answer, case), _value(mistake, case)) for case in cases)
        if all(_same(got, wrong, task.tolerance) for got, wrong in pairs):
            return f" ({sentence})"
    return ""


def _same(got: Any, expected: Any, tolerance: float) -> bool:
    """Equal shape and value; tuples, lists and torch.Size are one kind, and so are all numbers."""
    if isinstance(expected, str):
        return isinstance(got, str) and got == expected
    if isinstance(expected, tuple):
        return isinstance(got, (tuple, list)) and tuple(got) == expected
    try:
        got = torch.as_tensor(got, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    near = got.shape == expected.shape
    return near and torch.allclose(got, expected, rtol=tolerance, atol=1e-7, equal_nan=True)


def _said(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.ndim:
        first = ", ".join(f"{number:.4g}" for number in value.flatten()[:3].tolist())
        return f"tensor of shape {tuple(value.shape)} starting {first}"
    if isinstance(value, torch.Tensor):
        value = value.item()
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def exercise(
    name: str, hint: str, right: str
) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Register a function that builds a Task under an exercise's name."""

    def register(task: Callable[..., Task]) -> Callable[..., Task]:
        EXERCISES[name] = Exercise(name, hint, right, task)
        return task

    return register
