"""Exercises about model families."""

import torch

from lora_nb.checks.checking import Task, exercise
from lora_nb.checks.references import (
    random_tensor,
)
from lora_nb.objectives import FlowMatching

PLACES = ("x0", "condition", "target", "call")


@exercise(
    "09.1",
    hint="x0 is what gets noise, the condition goes in beside it, the target should come out, the call is the rest",
    right="every family is four answers",
)
def _places() -> Task:
    """In which of the four places five families differ from Stable Diffusion (a tuple of five words)."""
    x0, condition, target, call = PLACES
    return Task(
        (condition, x0, target, call, condition),
        mistakes={
            "the network's packing changes no x0: it is undone on the way out": (
                condition,
                x0,
                target,
                x0,
                condition,
            ),
            "an embedding that comes from the picture is still a condition: it gets no noise": (
                condition,
                x0,
                target,
                call,
                x0,
            ),
            "what should come out is the target; how the network is called does not change": (
                condition,
                x0,
                call,
                call,
                condition,
            ),
        },
    )


@exercise(
    "09.2",
    hint="put x_t = (1 - sigma) x0 + sigma noise and v = noise - x0 together and get rid of the noise",
    right="equal to the package's; at sigma 1 it is one step from pure noise to a picture",
)
def _x0_from_velocity() -> Task:
    """x0_from_velocity(x_t, v, sigma) -> the x0 that a velocity of flow matching implies; sigma is a number."""

    def by_package(x_t: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
        objective = FlowMatching(torch.linspace(1, 0.001, 1000))
        return objective.x0_from(velocity, x_t, torch.full((len(x_t),), 1000 * sigma))

    pairs = [
        (random_tensor(2, 4, 3, 3, seed=s), random_tensor(2, 4, 3, 3, seed=s + 1))
        for s in (91, 93, 95)
    ]
    return Task(
        by_package,
        cases=[(*pair, sigma) for pair, sigma in zip(pairs, (0.25, 1.0, 0.9), strict=True)],
        mistakes={
            "the velocity points from the picture to the noise: go back, so subtract": lambda x, v, s: (
                x + s * v
            ),
            "the way back to the picture is sigma long, not 1 - sigma": lambda x, v, s: (
                x - (1 - s) * v
            ),
            "this goes all the way as if x_t were pure noise": lambda x, v, s: x - v,
            "the velocity is no noise: x_t has both in it": lambda x, v, s: (x - s * v) / (1 - s),
        },
        tolerance=1e-4,
    )


@exercise(
    "09.3",
    hint="its time is 1 minus ours, and ours is t / 1000; turn the sign of what comes out",
    right="that is the whole `predict` of such a family",
)
def _other_convention() -> Task:
    """predict(network, x_t, t): our velocity from a network whose time and direction run the other way.

    The network takes time 0 for noise and 1 for a picture and says x0 - noise; ours is t in (0, 1000], noise - x0.
    """

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x.sin() * (1 + torch.as_tensor(time).view(-1, 1, 1, 1))

    x_t = random_tensor(2, 4, 3, 3, seed=97)
    return Task(
        lambda net, x, t: -net(x, 1 - t / 1000),
        cases=[(network, x_t, torch.tensor(t)) for t in ((250.0, 900.0), (1000.0, 1.0))],
        mistakes={
            "the sign is still the network's": lambda net, x, t: net(x, 1 - t / 1000),
            "the time still runs our way": lambda net, x, t: -net(x, t / 1000),
            "its time ends at 1, ours at 1000": lambda net, x, t: -net(x, 1000 - t),
            "time and sign are as we have them": lambda net, x, t: net(x, t / 1000),
        },
    )
