"""The trial behind a forecast: the run's own training, made in a scratch folder, with every part of it timed once."""

import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_nb import env, health, memory
from lora_nb.cache import Cache
from lora_nb.config import TrainConfig
from lora_nb.families import Family, network
from lora_nb.families.quantized import KINDS, QuantizedLinear, linears
from lora_nb.forecast import meter
from lora_nb.gradients import training_mode
from lora_nb.inference import draw_samples
from lora_nb.loss import diffusion_loss
from lora_nb.probe import DRAWS, Probe
from lora_nb.trainer import Training

LEAST, MOST = 2, 8  # times: of a step at the least, of anything at the most
ENOUGH = 1.5  # seconds of one kind of work after which it is not timed again
# What the libraries call it: diffusers, transformers from 5.2x on, and before.
OFF = (
    "disable_gradient_checkpointing",
    "activation_checkpointing_disable",
    "gradient_checkpointing_disable",
)
TURNS = 5  # times that a layer is widened to see how long it takes
FEW, MORE = 2, 6  # denoising steps between which a sample's cost is measured


@dataclass
class Micro:
    """One micro-step of `size` pictures, measured: seconds and peak bytes."""

    size: int
    seconds: float
    memory: int


@dataclass
class Measured:
    """What the trial found. Times in seconds, memory in bytes; `peaks` by what was going on.

    alone and whole: a micro-step of one picture, and of as many of the batch as fit; checkpointed: both with
    activations computed twice. step: one optimizer step. warming: what only the first step does.
    set_of_samples, probing, saving: one of each. picture, caption: the first encoding of one. widening: of all linear
    layers of the network once, by what they would be quantized to.
    """

    loading: float
    picture: float
    caption: float
    alone: Micro
    whole: Micro
    checkpointed: list[Micro]
    step: float
    warming: float
    set_of_samples: float
    probing: tuple[float, float]  # the first, with what it encodes, and one
    saving: float
    peaks: dict[str, int] = field(default_factory=dict)
    widening: dict[str, float] = field(default_factory=dict)


class Trial:
    """A training in a scratch folder, of which a few steps are made; `measure` does all of it."""

    def __init__(self, config: TrainConfig, family: Family | None):
        self.peaks: dict[str, int] = {}
        self.device = torch.device(env.pick_device().name)
        made = []
        memory.release()
        with meter.watch(self.device) as peak:
            self.loading = _seconds(lambda: made.append(Training(config, family)))
        self.training, self.peaks["loading"] = made[0], peak.bytes

    def measure(self) -> Measured:
        """Each part once, what many of the run's seconds are reckoned from up to eight times."""
        picture, caption = self._encoding()
        first, training = self._first_step(), self.training
        step, peak = self._steady()
        pieces = -(-training.config.train_batch_size // training.gradients.micro_batch)
        pieces *= training.config.gradient_accumulation_steps
        samples = training.config.train_batch_size * training.config.gradient_accumulation_steps
        encoded = 0 if training.offload else samples  # in the first step
        self.peaks["training"] = peak
        return Measured(
            loading=self.loading,
            picture=picture,
            caption=caption,
            alone=self._micro(1),
            whole=Micro(training.gradients.micro_batch, step / pieces, peak),
            checkpointed=self._checkpointed(training.gradients.micro_batch),
            step=step,
            warming=max(0.0, first - step - encoded * (picture + caption)),
            set_of_samples=self._samples(),
            probing=self._probe(),
            saving=_seconds(training._save),
            peaks=self.peaks,
            widening={kind: self._widening(kind) for kind in KINDS},
        )

    # encoding

    def _encoding(self) -> tuple[float, float]:
        """Seconds of encoding a picture and a caption, not remembering either."""
        training, family = self.training, self.training.family
        cache = Cache(
            family, training.pictures, training.pictures.spec, training.config.seed, latents=False
        )
        positions = training.batches.positions(0, 0)[:4]
        said = [training.pictures.caption(0, p, 0) for p in positions]
        each = [0.0]
        with training.encoding(), meter.watch(self.device) as peak:
            cache.batch(positions)  # warms up, and remembers the captions
            pictures = _seconds(lambda: cache.batch(positions)) / len(positions)
            if training.cache.keep_captions:
                with torch.no_grad():
                    each = [_seconds(lambda c=c: family.text_states([c])) for c in said]
            if training.offload:
                list(training.batches.encode(range(1)))
        self.peaks["encoding"] = peak.bytes
        return pictures, min(each)

    # steps

    def _first_step(self) -> float:
        """Seconds of the first step, in pieces of the batch if the whole does not fit."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that fewer pictures fit is in the forecast
            return _seconds(self._step)

    def _step(self) -> None:
        self.training._log(self.training._step(0))

    def _steady(self) -> tuple[float, int]:
        """Seconds of a warm step with its share of the looks at the adapters' health, and its peak in bytes."""
        with meter.watch(self.device) as peak:
            # The first of them is still warming up.
            step = _typical(self._step, least=LEAST)
        graphed = self.training.graphed
        if graphed is not None:  # a replayed step allocates nothing: it has its memory already
            peak.bytes = max(peak.bytes, self._micro(self.training.gradients.micro_batch).memory)
        look = _seconds(self.training.monitor.health)
        return step + look / health.EVERY, peak.bytes

    def _micro(self, size: int) -> Micro:
        """Forward and backward of the first `size` pictures of the run, or as many of them as are of one size."""
        training = self.training
        _, batch = next(training.batches.of(0, 0, size))

        def gradients() -> None:
            training.learner.optimizer.zero_grad()
            diffusion_loss(training.family, batch, training.config.noise_offset).loss.backward()

        with meter.watch(self.device) as peak, training_mode(training.gradients.modules):
            seconds = _seconds(gradients)
        training.learner.optimizer.zero_grad()
        return Micro(size, seconds, peak.bytes)

    def _checkpointed(self, size: int) -> list[Micro]:
        """One picture and `size` of them with activations recomputed; nothing where the run does so anyway."""
        if self.training.config.gradient_checkpointing:
            return []
        recompute(self.training.family, True)
        try:
            return [self._micro(1), self._micro(size)]
        finally:
            recompute(self.training.family, False)

    def _widening(self, kind: str) -> float:
        """Seconds of widening all quantized layers once, from one layer of each shape."""
        alike: dict[tuple[int, int], list[torch.nn.Linear]] = {}
        for layer in linears(network(self.training.family)).values():
            alike.setdefault((layer.out_features, layer.in_features), []).append(layer)
        ones = [QuantizedLinear(layers[0], kind, self.device) for layers in alike.values()]
        # All in turn, as in a step: the same layer again would find its numbers in the processor's cache.
        turns = [[_seconds(lambda w=w: w.widened(w.dtype)) for w in ones] for _ in range(TURNS)]
        each = map(statistics.median, zip(*turns, strict=True))
        return sum(s * len(layers) for s, layers in zip(each, alike.values(), strict=True))

    # what else a run does

    def _samples(self) -> float:
        """Seconds of one set of sample pictures, from two short ones: every denoising step costs the same.

        Nothing, and a peak of all there is, if memory runs out.
        """
        training, config = self.training, self.training.config
        if not config.validation_prompts:
            return 0.0

        def draw(steps: int) -> None:
            training.config = config.replace(num_inference_steps=steps)
            draw_samples(training, "trial", 0)

        few = more = 0.0
        try:
            with meter.watch(self.device) as peak:
                draw(FEW)
                few, more = (_typical(lambda n=n: draw(n)) for n in (FEW, MORE))
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            peak.bytes = meter.total(self.device)
        training.config, self.peaks["validation"] = config, peak.bytes
        each = (more - few) / (MORE - FEW)
        return few + each * (config.num_inference_steps - FEW)

    def _probe(self) -> tuple[float, float]:
        """Seconds of the probe before the first step, and of one later, from a probe of one batch."""
        training, config = self.training, self.training.config
        if training.held_out is None:
            return 0.0, 0.0
        size = min(max(1, config.train_batch_size // DRAWS), len(training.held_out))
        arguments = training.family, training.held_out, size, config.train_batch_size
        arguments += training.cache.keep_captions, None, training.offload
        made: deque[Probe] = deque(maxlen=1)
        first = _typical(lambda: made.append(Probe(*arguments)))
        later = _typical(lambda: made[0].measure(1))
        times = min(config.probe_size, len(training.held_out)) / size
        return times * first, times * later


def recompute(family: Family, on: bool) -> None:
    """Switch gradient checkpointing on, or off again."""
    if on:
        family.enable_gradient_checkpointing()
        return
    for module in family.trainable.values():
        off = next(getattr(module, name) for name in OFF if hasattr(module, name))
        off()


def _typical(work: Callable[[], Any], least: int = 1) -> float:
    """Median seconds of what is done again while that is soon done: a neighbour's spikes are not the run's."""
    times: list[float] = []
    while len(times) < least or (sum(times) < ENOUGH and len(times) < MOST):
        times.append(_seconds(work))
    return statistics.median(times)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
