"""Soft checks for the notebooks' exercises: `check("02.1", my_answer)` says what is missing and goes on.

An exercise compares an answer with a reference from peft, diffusers or the package itself, on inputs the learner does
not see. It also knows the usual mistakes, so that a wrong answer is told why. Nothing here is used by training.
"""

# Each registers its exercises.
from lora_nb.checks import (  # noqa: F401
    bug_museum,
    combining,
    dataset,
    dreambooth,
    formats_and_sharing,
    lora,
    model_families,
    on_a_gpu,
    rank_and_rate,
    sampling,
    setup,
    training,
)
from lora_nb.checks.checking import EXERCISES, Exercise, Task, WrongAnswer, check

__all__ = ["EXERCISES", "Exercise", "Task", "WrongAnswer", "check"]
