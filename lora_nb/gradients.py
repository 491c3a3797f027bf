"""The gradients of one step: all its micro-steps, averaged over processes and clipped."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lora_nb import memory, rng
from lora_nb.batches import Batches
from lora_nb.config import TrainConfig
from lora_nb.errors import NumericsError
from lora_nb.families import Batch
from lora_nb.learner import Learner
from lora_nb.loss import Loss, diffusion_loss
from lora_nb.run_folder import History

# Most of a network's modules compute the same in training mode, and setting it costs time in every step. The library's
# blocks of convolutions copy their input there, for a way to share gradients that is not used here; their dropout is
# a module of its own.
SAME_IN_TRAINING = {nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.SiLU, nn.Identity}
SAME_IN_TRAINING |= {nn.ModuleList, nn.ModuleDict, nn.ParameterDict, ResnetBlock2D}


class Gradients:
    """Forward and backward over the batches of a step.

    modules: of the parts that carry adapters, those that training mode is meant for. micro_batch: pictures at a time;
    fewer once memory ran out.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        batches: Batches,
        history: History,
    ):
        self.config, self.accelerator, self.history = config, accelerator, history
        self.learner, self.batches = learner, batches
        parts = [learner.family.trainable[part] for part in learner.weights]
        modules = [module for part in parts for module in part.modules()]
        self.modules = [m for m in modules if type(m) not in SAME_IN_TRAINING]
        self.drops = any(isinstance(m, torch.nn.Dropout) and m.p for m in self.modules)
        self.micro_batch = config.train_batch_size

    def of_step(self, done: int) -> list[Loss]:
        """Put the gradients of step done + 1 into the weights, in smaller pieces once memory runs out; the losses."""
        results, fitted = memory.halving(lambda size: self._summed(done, size), self.micro_batch)
        if fitted < self.micro_batch:
            self._note_less_memory(fitted, done + 1)
        self._average()
        return results

    def _summed(self, done: int, size: int) -> list[Loss]:
        """Forward and backward over the micro-steps, `size` pictures at a time; the gradients add up to their mean."""
        config, results, taken = self.config, [], []
        self.learner.optimizer.zero_grad()
        with training_mode(self.modules), self.learner.copies.fresh():
            for micro in range(config.gradient_accumulation_steps):
                for share, batch in self.batches.of(done, micro, size):
                    with self._named_dropout(batch):
                        result = diffusion_loss(self.learner.family, batch, config.noise_offset)
                    loss = result.loss * share / config.gradient_accumulation_steps
                    self.accelerator.backward(loss)
                    results.append(Loss(loss.detach(), result.per_image.detach(), result.timesteps))
                    taken.append(batch.positions)
        self.refuse_loss(results, taken, done)
        return results

    @contextmanager
    def _named_dropout(self, batch: Batch) -> Iterator[None]:
        """Dropout draws from torch's global stream; inside, that stream is named by the batch like all randomness."""
        if not self.drops:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(
                rng.generator(batch.seed, "lora dropout", batch.positions[0]).initial_seed()
            )
            yield

    def refuse_loss(self, results: list[Loss], taken: list[list[int]], done: int) -> None:
        """Raise NumericsError if a loss of step done + 1 is not finite; taken: the sample positions of each."""
        # One look at all micro-steps: each makes the processor wait for the device.
        losses = torch.stack([result.loss for result in results]).tolist()
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is None:
            return
        names = ", ".join(self.batches.names(taken[bad]))
        raise NumericsError(
            f"The loss of step {done + 1} is {losses[bad]} (pictures: {names}; learning rates "
            f"{self.learner.rates.peaks}; {self.learner.family.dtype}), so training stopped before the optimizer used "
            "it: lower the learning rate, train in float32 or bf16 instead of fp16, or look at these pictures."
        )

    def _note_less_memory(self, fitted: int, step: int) -> None:
        """Say that memory ran out and what is done about it; the pictures and draws of each step stay the same."""
        pieces = math.ceil(self.config.train_batch_size / fitted)
        text = (
            f"Memory ran out in step {step}: from now on {fitted} pictures at a time instead of {self.micro_batch}, "
            f"and {pieces * self.config.gradient_accumulation_steps} micro-steps; the result is the same."
        )
        self.micro_batch = fitted
        self.history.record("memory", step=step, micro_batch=fitted, message=text)
        warnings.warn(text, stacklevel=5)

    def _average(self) -> None:
        """The mean over processes; adapters are small, so this is cheap and needs no wrapped modules."""
        if self.accelerator.num_processes > 1:
            # A layer whose output nothing uses (the last of SDXL's first encoder) has no gradient anywhere.
            gradients = [w.grad for w in self.learner.all_weights() if w.grad is not None]
            # As one: processes wait for each other at every exchange, and there are hundreds of small gradients.
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = self.accelerator.reduce(flat, reduction="mean")
            means = flat.split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def clip(self, done: int) -> dict[str, float]:
        """Clip the gradients of all adapters together; the norm of each part before that."""
        self.accelerator.unscale_gradients()
        norms, total = clipped(self.learner.weights, self.config.max_grad_norm)
        whole, *each = torch.stack([total, *norms.values()]).tolist()  # one wait for the device
        # A loss scaler skips such steps itself and goes on with a smaller scale.
        if self.accelerator.scaler is None:
            refuse_gradient(whole, done)
        return dict(zip(norms, each, strict=True))


def clipped(
    weights: dict[str, list[torch.nn.Parameter]], limit: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Clip the gradients of all parts together, not at all for 0; the norm of each part and of all before that."""
    norms = {
        part: torch.nn.utils.get_total_norm([w.grad for w in group if w.grad is not None])
        for part, group in weights.items()
    }
    total = torch.nn.utils.get_total_norm(list(norms.values()))
    if limit:
        every = [weight for group in weights.values() for weight in group]
        torch.nn.utils.clip_grads_with_norm_(every, limit, total)
    return norms, total


def refuse_gradient(norm: float, done: int) -> None:
    """Raise NumericsError if the norm of the gradient of step done + 1 is not finite."""
    if not math.isfinite(norm):
        raise NumericsError(
            f"The gradient of step {done + 1} is not finite, so training stopped before the optimizer used it: "
            "lower the learning rate or train in float32."
        )


@contextmanager
def training_mode(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Dropout on inside, off for whatever happens between steps."""
    # Past the modules' own setter and recursion, which take 5 % of a small step.
    for module in modules:
        vars(module)["training"] = True
    try:
        yield
    finally:
        for module in modules:
            vars(module)["training"] = False
