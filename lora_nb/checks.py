"""Soft checks for the notebooks' exercises: `check("02.1", my_answer)` says what is missing and goes on.

An exercise compares an answer with a reference from peft, diffusers or the package itself, on inputs the learner does
not see. It also knows the usual mistakes, so that a wrong answer is told why. Nothing here is used by training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from peft import LoraConfig, inject_adapter_in_model

from lora_nb import adapters
from lora_nb.cache import with_prior
from lora_nb.errors import LoraNbError
from lora_nb.families import Batch
from lora_nb.objectives import Diffusion, FlowMatching


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
        raise WrongAnswer(f"There is no exercise {name!r}; there are {', '.join(EXERCISES)}.")
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


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(rank: int, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B."""
    return _random(rank, inputs, seed=seed + 100), _random(outputs, rank, seed=seed + 200)


# 00 setup


@exercise(
    "00.1",
    hint="divide the parameters of the base's network by those that LoRA trains",
    right="that is why a style fits into a file you can mail",
)
def _times_smaller(family: Any, rank: int = 4) -> Task:
    """How many times fewer weights does LoRA of this rank train than the network has? (a number, to 1 %)"""
    part, module = next(iter(family.trainable.items()))
    weights = {n: p.numel() for n, p in module.named_parameters() if ".lora_" not in n}
    trained = sum(c.parameters for c in adapters.forecast(module, family.targets[part], rank))
    ratio = sum(weights.values()) / trained
    return Task(
        ratio,
        mistakes={
            "this is the inverse: how large the adapter is, not how many times smaller": 1 / ratio
        },
        tolerance=0.01,
    )


@exercise(
    "00.2",
    hint="count the pictures that all steps show, and divide by the number of pictures in the folder",
    right="an epoch is one such round",
)
def _rounds() -> Task:
    """rounds(steps, batch_size, accumulation, pictures): how often is each picture seen?"""
    return Task(
        lambda steps, batch, accumulation, pictures: steps * batch * accumulation / pictures,
        cases=[(400, 8, 1, 100), (250, 4, 3, 60), (7, 2, 2, 100)],
        mistakes={
            "a step shows batch_size pictures for each accumulated micro-step": lambda s, b, a, p: (
                s * b / p
            ),
            "accumulation makes a step larger, not smaller": lambda s, b, a, p: s * b / a / p,
        },
    )


# 01 dataset


@exercise(
    "01.1",
    hint="encode a picture of zeros with family.moments and look at its shape",
    right="the network never sees pixels, only this much smaller grid",
)
def _latents_shape(family: Any) -> Task:
    """latents_shape(height, width) -> (channels, height, width) of the latents of one picture."""
    multiple = family.pixel_multiple

    def encoded(height: int, width: int) -> tuple[int, ...]:
        return tuple(family.moments(torch.zeros(1, 3, height, width))[0].shape[1:])

    return Task(
        encoded,
        cases=[
            (4 * multiple, 4 * multiple),
            (2 * multiple, 6 * multiple),
            (8 * multiple, 3 * multiple),
        ],
        mistakes={"height comes before width": lambda height, width: encoded(width, height)},
    )


@exercise(
    "01.2",
    hint="len(tokenizer(caption).input_ids) counts the tokens, start and end included",
    right="what is cut is never learned",
)
def _is_cut(tokenizer: Any) -> Task:
    """is_cut(caption) -> bool: does the tokenizer have to cut this caption?"""
    room = tokenizer.model_max_length

    def tokens(caption: str) -> int:
        return len(tokenizer(caption, truncation=False, verbose=False).input_ids)

    def repeated(limit: int) -> str:
        return " ".join(["a"] * limit)

    fits = next(n for n in range(room, 0, -1) if tokens(repeated(n)) <= room)
    unusual = "xqzj" * (room // 2)  # one word of many tokens
    return Task(
        lambda caption: tokens(caption) > room,
        cases=[(text,) for text in ("a cat", unusual, repeated(fits), repeated(fits + 1))],
        mistakes={
            "words are not tokens": lambda caption: len(caption.split()) > room,
            "start and end take two of the places": lambda caption: tokens(caption) - 2 > room,
            "a caption that just fits is whole": lambda caption: tokens(caption) >= room,
        },
    )


def _noising_cases(seed: int) -> list[tuple]:
    """(x0, noise, alpha_bar) with alpha_bar of some timestep of a usual schedule."""
    alphas = DDPMScheduler().alphas_cumprod
    return [
        (
            _random(2, 4, 3, 3, seed=seed + i),
            _random(2, 4, 3, 3, seed=seed + 50 + i),
            float(alphas[t]),
        )
        for i, t in enumerate((0, 321, 999))
    ]


def _by_scheduler(function: str) -> Callable:
    """A DDPMScheduler method as a function of (x0, noise, alpha_bar)."""
    scheduler = DDPMScheduler()

    def call(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        t = int((scheduler.alphas_cumprod - alpha_bar).abs().argmin())
        return getattr(scheduler, function)(x0, noise, torch.tensor([t] * len(x0)))

    return call


@exercise(
    "01.3",
    hint="sqrt(alpha_bar) of the signal and sqrt(1 - alpha_bar) of the noise",
    right="equal to diffusers' noise scheduler",
)
def _add_noise() -> Task:
    """add_noise(x0, noise, alpha_bar) -> x_t."""
    return Task(
        _by_scheduler("add_noise"),
        cases=_noising_cases(13),
        mistakes={
            "the square roots are missing: variances add, not standard deviations": lambda x, n, a: (
                a * x + (1 - a) * n
            ),
            "signal and noise have changed places": lambda x, n, a: (1 - a) ** 0.5 * x + a**0.5 * n,
        },
    )


# 02 LoRA


def _peft_layer(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, rank: int
) -> torch.nn.Module:
    """A linear layer without bias that peft has adapted with these very matrices."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight
    model = torch.nn.ModuleDict({"layer": base})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"]), model)
    layer = model["layer"]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return layer


@exercise(
    "02.1",
    hint="A is rank x in_features, B is out_features x rank",
    right="rank * (in + out), far below in * out",
)
def _count() -> Task:
    """lora_parameters(rank, in_features, out_features) -> number of trainable weights."""

    def by_peft(rank: int, inputs: int, outputs: int) -> int:
        layer = _peft_layer(
            torch.zeros(outputs, inputs),
            torch.zeros(rank, inputs),
            torch.zeros(outputs, rank),
            1,
            rank,
        )
        return sum(p.numel() for n, p in layer.named_parameters() if "lora_" in n)

    return Task(
        by_peft,
        cases=[(4, 768, 320), (8, 320, 320), (1, 5, 7)],
        mistakes={
            "A and B have rank * in and rank * out weights: add, do not multiply": lambda r, i, o: (
                r * i * o
            ),
            "this counts A alone": lambda r, i, o: r * i,
            "this counts B alone": lambda r, i, o: r * o,
        },
    )


@exercise(
    "02.2",
    hint="x @ W.T plus alpha / rank times the same x through A, then B",
    right="equal to peft's layer",
)
def _forward() -> Task:
    """lora_forward(x, W, A, B, alpha, rank) -> the adapted layer's output; W (out, in), A (rank, in), B (out, rank)."""
    cases = [
        (_random(5, 12, seed=s), _random(8, 12, seed=s + 1), *_pair(r, 12, 8, seed=s), alpha, r)
        for s, alpha, r in ((21, 8.0, 4), (22, 1.0, 2), (23, 9.0, 3))
    ]
    return Task(
        lambda x, w, a, b, alpha, rank: _peft_layer(w, a, b, alpha, rank)(x),
        cases=cases,
        mistakes={
            "the scale alpha / rank is missing": lambda x, w, a, b, *_: x @ w.T + x @ a.T @ b.T,
            "the scale is alpha / rank, not alpha": lambda x, w, a, b, al, r: (
                x @ w.T + al * x @ a.T @ b.T
            ),
            "the scale is alpha / rank, not rank / alpha": lambda x, w, a, b, al, r: (
                x @ w.T + r / al * x @ a.T @ b.T
            ),
            "the base's W x is missing": lambda x, w, a, b, al, r: al / r * x @ a.T @ b.T,
            "the scale belongs to B A x alone": lambda x, w, a, b, al, r: (
                al / r * (x @ w.T + x @ a.T @ b.T)
            ),
        },
        tolerance=1e-4,
    )


@exercise(
    "02.3",
    hint="the scale is alpha / rank: keep the quotient",
    right="double the rank, double alpha, and the adapter acts as strongly as before",
)
def _alpha() -> Task:
    """The alpha for rank 16 that keeps the scale of rank 4 with alpha 4 (a number)."""
    return Task(
        16,
        mistakes={
            "with alpha 4 at rank 16 the scale falls to 1/4": 4,
            "this is the scale, not alpha": 1,
            "this is four times the scale that we had": 64,
        },
    )


# 03 training


@exercise(
    "03.1",
    hint="min(SNR, gamma) divided by SNR + 1",
    right="equal to the weight in the package's loss; easy timesteps no longer drown the others",
)
def _min_snr() -> Task:
    """min_snr_weight(snr, gamma) -> loss weight for v-prediction (Hang et al. 2023)."""
    alphas = torch.tensor([0.9991, 0.98, 0.9, 0.8333, 0.5, 0.1, 0.0])

    def by_package(snr: torch.Tensor, gamma: float) -> torch.Tensor:
        objective = Diffusion(alphas, "v_prediction", snr_gamma=gamma)
        t = (objective.snr(torch.arange(len(alphas))) - snr[:, None]).abs().argmin(dim=1)
        return objective.weight(t)

    snr = alphas / (1 - alphas)
    return Task(
        by_package,
        cases=[(snr, 5.0), (snr.flip(0), 1.0), (snr[1:4], 20.0)],
        mistakes={
            "this is the weight for a prediction of x0": lambda snr, gamma: snr.clamp(max=gamma),
            "this is the weight for epsilon-prediction; for v divide by SNR + 1": lambda s, g: (
                s.clamp(max=g) / s
            ),
            "this takes the larger of the two: min, not max": lambda s, g: s.clamp(min=g) / (s + 1),
        },
    )


@exercise(
    "03.2",
    hint="sqrt(alpha_bar) of the noise minus sqrt(1 - alpha_bar) of the signal",
    right="equal to diffusers' get_velocity",
)
def _v_target() -> Task:
    """v_target(x0, noise, alpha_bar) -> what a v-prediction network should output (Salimans & Ho 2022)."""
    return Task(
        _by_scheduler("get_velocity"),
        cases=_noising_cases(32),
        mistakes={
            "this is x_t; v takes the noise with sqrt(alpha_bar)": lambda x, n, a: (
                a**0.5 * x + (1 - a) ** 0.5 * n
            ),
            "the sign is turned around": lambda x, n, a: (1 - a) ** 0.5 * x - a**0.5 * n,
            "this is the target for epsilon-prediction": lambda x, n, a: n,
            "the square roots are missing": lambda x, n, a: a * n - (1 - a) * x,
        },
    )


@exercise(
    "03.3",
    hint="step / warmup while it warms up, then half of 1 + cos(pi * progress) over the steps that remain",
    right="equal to diffusers' cosine schedule",
)
def _cosine() -> Task:
    """learning_rate(step, peak, warmup, total), step = 0, 1, ...: linear warm-up, then half a cosine down to 0."""

    def by_diffusers(step: int, peak: float, warmup: int, total: int) -> float:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        return peak * get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas[0](step)

    def half_cosine(progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2

    return Task(
        by_diffusers,
        cases=[
            (0, 1e-3, 50, 400),
            (25, 1e-3, 50, 400),
            (50, 2e-4, 50, 400),
            (130, 1e-3, 50, 400),
            (399, 1e-4, 0, 400),
        ],
        mistakes={
            "the warm-up is missing": lambda k, peak, w, n: peak * half_cosine(k / n),
            "progress counts from the end of the warm-up": lambda k, p, w, n: (
                p * (k / w if k < w else half_cosine(k / n))
            ),
            "after the warm-up it follows a cosine": lambda k, p, w, n: (
                p * (k / w if k < w else (n - k) / (n - w))
            ),
        },
    )


# 04 inference


@exercise(
    "04.1",
    hint="alpha / rank times B @ A has the shape of W: add it",
    right="equal to peft's merge; a merged adapter costs nothing at inference",
)
def _merge() -> Task:
    """merge(W, A, B, alpha, rank) -> one weight that does what base and adapter do together."""

    def by_peft(
        weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, rank: int
    ) -> torch.Tensor:
        layer = _peft_layer(weight, a, b, alpha, rank)
        layer.merge()
        return layer.weight.detach()

    cases = [
        (_random(6, 6, seed=s), *_pair(r, 6, 6, seed=s), alpha, r)
        for s, alpha, r in ((41, 8.0, 4), (42, 1.0, 2))
    ]
    return Task(
        by_peft,
        cases=cases,
        mistakes={
            "the scale alpha / rank is missing": lambda w, a, b, alpha, r: w + b @ a,
            "the scale is alpha / rank, not alpha": lambda w, a, b, alpha, r: w + alpha * b @ a,
            "B comes first: A takes the input, B gives the output": lambda w, a, b, alpha, r: (
                w + alpha / r * (b @ a).T
            ),
            "subtracting is how it is undone": lambda w, a, b, alpha, r: w - alpha / r * b @ a,
        },
        tolerance=1e-4,
    )


@exercise(
    "04.2",
    hint="which factor makes W + scale * B A equal to W?",
    right="at scale 0 the adapter adds nothing",
)
def _base_scale() -> Task:
    """The adapter scale that gives the base model's picture (a number)."""
    return Task(
        0,
        mistakes={
            "at scale 1 the adapter acts as it was trained": 1,
            "a negative scale pushes away from the style": -1,
        },
    )


# 06 DreamBooth


@exercise(
    "06.1",
    hint="errors.chunk(2) gives the subject's half and the class's; add their means, one of them weighted",
    right="equal to what the trainer makes of a joined batch",
)
def _dreambooth_loss() -> Task:
    """dreambooth_loss(errors, weight) -> one number from 2 n errors, first the subject's, then the class's."""

    def by_package(errors: torch.Tensor, weight: float) -> torch.Tensor:
        half = Batch.of_captions([""] * (len(errors) // 2), resolution=8)
        return (errors * with_prior(half, half, weight).weights).mean()

    errors = [_random(8, seed=61).square(), _random(2, seed=62).square()]
    return Task(
        by_package,
        cases=[(errors[0], 1.0), (errors[1], 0.3), (errors[0], 0.0)],
        mistakes={
            "this is half of it: each half has its own mean": lambda e, w: (
                (e.chunk(2)[0].mean() + w * e.chunk(2)[1].mean()) / 2
            ),
            "the weight belongs to the class, the second half": lambda e, w: (
                w * e.chunk(2)[0].mean() + e.chunk(2)[1].mean()
            ),
            "the weight is missing": lambda e, w: 2 * e.mean(),
            "take the mean of each half, not the sum": lambda e, w: (
                e.chunk(2)[0].sum() + w * e.chunk(2)[1].sum()
            ),
        },
    )


@exercise(
    "06.2",
    hint="divide each row by its length; the cosine similarity of a pair is then the sum of products",
    right="metrics.drift is the mean of these",
)
def _moved() -> Task:
    """moved(before, after), features (n, width) each -> (n,) cosine distances of the pairs."""
    before, after = _random(5, 16, seed=63), _random(5, 16, seed=64)
    return Task(
        lambda a, b: 1 - F.cosine_similarity(a, b, dim=1),
        cases=[(before, after), (before, 3 * after), (before + 2, after + 2)],
        mistakes={
            "this is the similarity; the distance is 1 minus it": lambda a, b: F.cosine_similarity(
                a, b, dim=1
            ),
            "the rows have not been divided by their lengths": lambda a, b: 1 - (a * b).sum(1),
            "this compares every picture with every other; pictures come in pairs": lambda a, b: (
                1 - F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
            ),
            "this is the length of the difference, which grows with the length of the rows": lambda a, b: (
                (a - b).norm(dim=1)
            ),
        },
        tolerance=1e-4,
    )


# 09 families

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

    pairs = [(_random(2, 4, 3, 3, seed=s), _random(2, 4, 3, 3, seed=s + 1)) for s in (91, 93, 95)]
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

    x_t = _random(2, 4, 3, 3, seed=97)
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
