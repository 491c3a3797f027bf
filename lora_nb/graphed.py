"""The whole optimizer step as one CUDA graph: thousands of kernels, launched at once.

An eager step of batch 1 to 4 is bound by its launches, not by arithmetic. Here a step is captured the first time that
its batches have these shapes, and replayed from then on. All its numbers lie in buffers that are filled before; what is
drawn at random is drawn on the CPU as always, while the device still computes the step before. The result is the eager
step's to rounding. Where capturing does not work, the step stays eager, with one warning that says why.
"""

import contextlib
import dataclasses
import functools
import math
import traceback
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint

from lora_nb import memory, rng
from lora_nb.batches import Batches
from lora_nb.config import TrainConfig
from lora_nb.families import Batch, Family, network
from lora_nb.families.base import from_moments
from lora_nb.gradients import Gradients, clipped, training_mode
from lora_nb.learner import Learner
from lora_nb.loss import Loss, named_noise, weighted_error

GRAPHS = 32  # combinations of shapes that are captured; steps of further ones stay eager
SAME = 0.02  # relative, of a replay to the eager step: sums in bf16 may take another order
WARM = 3  # steps before capturing, in which libraries choose kernels and take their memory

Inputs = dict[str, torch.Tensor]
Run = Callable[[], torch.Tensor]


def applies(config: TrainConfig, accelerator: Accelerator, gradients: Gradients) -> bool:
    """Whether the steps of this training can be graphs: one process on CUDA, and nothing in them that the host decides.

    Dropout, a text encoder that trains, texts of several lengths and 8-bit moments all decide something there.
    """
    parts, family = gradients.learner.weights, gradients.learner.family
    return (
        config.cuda_graph
        and accelerator.device.type == "cuda"
        and accelerator.num_processes == 1
        and not any(part.startswith("text_encoder") for part in parts)
        and not getattr(family, "uneven_texts", False)
        and not (gradients.drops or config.use_8bit_adam)
    )


@dataclass(frozen=True)
class Micro:
    """A micro-step, or a piece of it: its share of the step's loss, its batch, and all its numbers by name."""

    share: float
    batch: Batch
    inputs: Inputs

    @property
    def shape(self) -> Hashable:
        """What must be equal for a graph to be replayed with these numbers."""
        numbers = ((name, x.shape, x.dtype) for name, x in self.inputs.items())
        return self.share, tuple(numbers)

    def buffered(self, device: torch.device) -> "Micro":
        """The same on buffers of its own on the device, not yet filled."""
        held = {name: torch.zeros_like(x, device=device) for name, x in self.inputs.items()}
        batch = dataclasses.replace(
            self.batch,
            geometry=held["geometry"],
            text_states=_under("text/", held),
            picture_states=_under("picture/", held),
        )
        return Micro(self.share, batch, held)


@dataclass(frozen=True)
class Found:
    """What is known after a step. losses: of each micro-step; taken: its sample positions. weights: their norm.

    norms and total: of the gradient before clipping, by part and of all. used: whether the weights have changed; they
    have not if a loss or the gradient is not finite, which a loss scaler takes as a sign to go on with a smaller scale.
    """

    losses: list[Loss]
    taken: list[list[int]]
    norms: dict[str, float]
    total: float
    weights: float

    @property
    def used(self) -> bool:
        return all(map(math.isfinite, (self.total, *(each.loss for each in self.losses))))


def inputs_of(family: Family, batch: Batch, noise_offset: float) -> Inputs:
    """All numbers of a batch on the CPU: `diffusion_loss` up to the network, and what the condition is made of."""
    objective, draw = family.objective, (batch.seed, batch.positions)
    x0 = from_moments(batch)
    noise = named_noise(x0, *draw, noise_offset)
    t = objective.sample_t(rng.uniform(draw[0], "timesteps", draw[1]))
    weight = objective.weight(t)
    found = {
        "x_t": objective.add_noise(x0, noise, t),
        "t": t,
        "target": objective.target(x0, noise, t),
        "weight": weight if batch.weights is None else weight * batch.weights,
        "geometry": batch.geometry,
    }
    found |= {f"text/{name}": x for name, x in (batch.text_states or {}).items()}
    return found | {f"picture/{name}": x for name, x in batch.picture_states.items()}


def loss_on(family: Family, micro: Micro) -> Loss:
    """`diffusion_loss` from the network on, of the numbers in a micro-step's buffers."""
    held = micro.inputs
    prediction = family.predict(held["x_t"], held["t"], family.condition(micro.batch))
    return weighted_error(prediction, held["target"], held["weight"], held["t"])


class StepOnBuffers:
    """One optimizer step as a function of buffers alone: it reads nothing back, and the host decides nothing in it.

    rates: a number on the device for each group of the optimizer. hold: 1 leaves weights, moments and the scale of the
    losses as they are. scaler: of losses in fp16.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        modules: list[torch.nn.Module],
        scaler: torch.amp.GradScaler | None,
    ):
        self.config, self.learner, self.modules, self.scaler = config, learner, modules, scaler
        device = learner.family.device
        self.rates = [torch.zeros((), device=device) for _ in learner.optimizer.param_groups]
        self.hold = torch.zeros((), device=device)

    def set_rates(self, done: int) -> None:
        """The learning rates of step done + 1."""
        values = self.learner.rates.of_step(done).values()
        for rate, value in zip(self.rates, values, strict=True):
            rate.fill_(value)

    def __call__(self, micros: list[Micro]) -> torch.Tensor:
        """All that is read back, in one row: losses, those of pictures, norms of the parts, of all, of the weights."""
        learner = self.learner
        learner.optimizer.zero_grad()
        losses, per_image = [], []
        with training_mode(self.modules), learner.copies.fresh():
            for micro in micros:
                result = loss_on(learner.family, micro)
                loss = result.loss * micro.share / self.config.gradient_accumulation_steps
                (self.scaler.scale(loss) if self.scaler else loss).backward()
                losses.append(loss.detach())
                per_image.append(result.per_image.detach())
        loss, skip = torch.stack(losses), self.hold
        if self.scaler:
            skip = torch.maximum(skip, self._unscaled())
        norms, total = clipped(learner.weights, self.config.max_grad_norm)
        finite = torch.isfinite(loss).all() & torch.isfinite(total)
        self._update(torch.maximum(skip, (~finite).float()))
        learner.optimizer.zero_grad()  # a graph's gradients are its own, and end with it
        after = [*norms.values(), total, learner.norm()]
        return torch.cat([loss, *per_image, torch.stack(after)]).detach()

    @torch.no_grad()
    def _unscaled(self) -> torch.Tensor:
        """Take the scale out of the gradients and choose the next one; 1 if a gradient is not finite, else 0."""
        optimizer, scaler = self.learner.optimizer.optimizer, self.scaler
        scaler.unscale_(optimizer)
        (found,) = scaler._found_inf_per_device(optimizer).values()
        state = scaler._scale, scaler._growth_tracker
        before = [number.clone() for number in state]
        scaler.update()
        for number, was in zip(state, before, strict=True):
            number.copy_(torch.where(self.hold > 0, was, number))
        return found

    @torch.no_grad()
    def _update(self, skip: torch.Tensor) -> None:
        """AdamW with learning rates and the decision to skip on the device; its states are the optimizer's own."""
        optimizer = self.learner.optimizer
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            weights = [weight for weight in group["params"] if weight.grad is not None]
            states = [_state(optimizer, weight) for weight in weights]
            adamw(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=skip,
                amsgrad=False,
                maximize=False,
                lr=rate,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


def _state(optimizer: Any, weight: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """The optimizer's state of a weight, begun as its own first step would."""
    state = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight) for _ in range(2))
    return state


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all trainings of the process: libraries keep a workspace of tens of MB for each stream for ever."""
    return torch.cuda.Stream()


class Capture:
    """Turns steps on buffers into graphs; they share their memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self.stream = _side_stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run, hold: torch.Tensor) -> Run:
        """A function that replays `run`, which is run a few times first with weights and moments held.

        The first replay must find what those runs have found, or RuntimeError is raised.
        """
        hold.fill_(1.0)
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # A capture that fails leaves its own stream in force; the outer block puts this one back.
        with torch.cuda.stream(now), _kernels_by_trial():
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM):
                    eager = run()
            now.wait_stream(self.stream)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                packed = run()
            graph.replay()
            require_same(packed, eager)
        hold.fill_(0.0)

        def replay() -> torch.Tensor:
            graph.replay()
            return packed

        return replay


def require_same(replayed: torch.Tensor, eager: torch.Tensor) -> None:
    """Raise RuntimeError unless a replay has the losses and norms of the eager step, to what half precision rounds."""
    if not torch.allclose(replayed, eager, rtol=SAME, atol=1e-6, equal_nan=True):
        apart = (replayed - eager).abs() / eager.abs().clamp(min=1e-6)
        worst = apart.nan_to_num().max().item()
        raise RuntimeError(f"its first replay differs from the eager step by {worst:.1e}")


@contextlib.contextmanager
def _kernels_by_trial():
    """Convolutions are tried out in the first step inside, and the fastest kernels taken."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class GraphedStep:
    """The steps of a training by graphs, one for each combination of shapes.

    make_capture: what makes the `Capture`; a test on a CPU gives one that captures nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: Learner,
        batches: Batches,
        gradients: Gradients,
        make_capture: Callable[[], Callable[[Run, torch.Tensor], Run]] = Capture,
    ):
        self.config, self.learner = config, learner
        self.batches, self.gradients = batches, gradients
        self.device, self.make_capture = learner.family.device, make_capture
        self.step = StepOnBuffers(config, learner, gradients.modules, gradients.accelerator.scaler)
        self.captured = 0  # graphs so far
        self.failed, self.reason = False, ""  # whether, and why, all steps are eager from now on
        self.too_large: set[Hashable] = set()  # shapes whose graph did not fit into memory
        self._next: tuple[int, list[Micro]] | None = None
        self.weights = list(network(learner.family).parameters())  # to walk the modules takes long
        self.forget()
        for module in network(learner.family).modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _recomputed

    def ready(self, done: int) -> bool:
        """Fill the buffers of step done + 1, and capture it if its shapes are new; whether it can be run."""
        if self.failed:
            return False
        micros = self._micros(done)
        if self.places != self._places():
            self.forget()  # a graph would read and write where the weights were
        key = tuple(micro.shape for micro in micros)
        if key not in self.graphs and not self._add(key, micros):
            return False
        self.held, self.replay = self.graphs[key]
        for buffers, micro in zip(self.held, micros, strict=True):
            for name, value in micro.inputs.items():
                buffers.inputs[name].copy_(value, non_blocking=True)
        return True

    def run(self, done: int, goes_on: bool) -> Found:
        """Step done + 1, which is ready; meanwhile the next one is prepared, if training goes on."""
        self.learner.set_rates(done)
        self.step.set_rates(done)
        packed = self.replay()
        micros, self._next = self._next[1], None
        if goes_on:
            # What cannot be made fails again, and is said, in the step it belongs to.
            with contextlib.suppress(Exception):
                self._micros(done + 1)
        return self._found(packed.tolist(), micros)

    def _micros(self, done: int) -> list[Micro]:
        """All numbers of step done + 1, made once; in pinned memory, from where they are copied without waiting."""
        if self._next is None or self._next[0] != done:
            family, offset = self.learner.family, self.config.noise_offset
            micros = []
            for micro in range(self.config.gradient_accumulation_steps):
                for share, batch in self.batches.of(done, micro, self.gradients.micro_batch):
                    inputs = inputs_of(family, batch, offset)
                    if self.device.type == "cuda":
                        inputs = {name: x.contiguous().pin_memory() for name, x in inputs.items()}
                    micros.append(Micro(share, batch, inputs))
            self._next = done, micros
        return self._next[1]

    def _add(self, key: Hashable, micros: list[Micro]) -> bool:
        """Capture the step at new shapes; False if there are too many of them or, after a warning, if that fails."""
        if len(self.graphs) == GRAPHS or key in self.too_large:
            return False
        memory.release()  # nothing may be freed while a graph is captured
        try:
            held = [micro.buffered(self.device) for micro in micros]
            for buffers, micro in zip(held, micros, strict=True):
                for name, value in micro.inputs.items():
                    buffers.inputs[name].copy_(value)
            self.capture = self.capture or self.make_capture()
            self.graphs[key] = held, self.capture(lambda: self.step(held), self.step.hold)
        except Exception as error:  # of many kinds: what a graph cannot hold, and memory
            self._give_up(key, error)
            return False
        self.places, self.captured = self._places(), self.captured + 1
        return True

    def _give_up(self, key: Hashable, error: BaseException) -> None:
        traceback.clear_frames(error.__traceback__)  # frames hold tensors
        while error.__context__ is not None:  # the end of a broken capture hides what broke it
            error = error.__context__
            traceback.clear_frames(error.__traceback__)
        words = next(iter(str(error).strip().splitlines()), "")
        self.reason = f"{type(error).__name__}: {words}"
        if isinstance(error, RuntimeError) and memory.ran_out(error):
            # The eager step takes fewer pictures at a time if it must, and those may fit into a graph.
            self.too_large.add(key)
        else:
            self.failed = True
        self.forget()
        self.learner.optimizer.zero_grad()
        if self.step.scaler:
            self.step.scaler._per_optimizer_states.clear()  # it may have begun with gradients that are gone
        memory.release()
        warnings.warn(
            f"The step could not be captured as one CUDA graph ({self.reason}), so each of its kernels is launched by "
            "itself, which is slower; the result is the same. cuda_graph=False says that this is meant.",
            stacklevel=5,
        )

    def forget(self) -> None:
        """Drop all graphs and give their memory back; the next step is captured anew."""
        self.graphs: dict[Hashable, tuple[list[Micro], Run]] = {}
        self.capture, self.replay, self.held = None, None, []
        self.places = self._places()

    def _places(self) -> list[int]:
        """Where weights and moments lie: merging, moving and loading put them elsewhere."""
        moments = self.learner.optimizer.state.get(self.learner.all_weights()[0]) or {}
        return [tensor.data_ptr() for tensor in (*self.weights, *moments.values())]

    def _found(self, values: list[float], micros: list[Micro]) -> Found:
        counts, parts = [len(micro.batch) for micro in micros], list(self.learner.weights)
        losses, values = values[: len(micros)], torch.tensor(values[len(micros) :])
        *images, norms = values.split([*counts, len(values) - sum(counts)])
        *norms, total, weights = norms.tolist()
        return Found(
            [
                Loss(torch.tensor(loss), errors, micro.inputs["t"])
                for loss, errors, micro in zip(losses, images, micros, strict=True)
            ],
            [micro.batch.positions for micro in micros],
            dict(zip(parts, norms, strict=True)),
            total,
            weights,
        )


def _recomputed(module: torch.nn.Module, *args: Any) -> Any:
    """A checkpointed block that keeps no random states, which a graph cannot: no step by a graph draws anything."""
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)


def _under(prefix: str, held: Inputs) -> Inputs:
    return {k.removeprefix(prefix): x for k, x in held.items() if k.startswith(prefix)}
