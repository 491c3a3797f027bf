"""What learns: the base model with fresh adapters, their learning rates and their optimizer."""

import math

import torch
from accelerate import Accelerator

from lora_nb import (
    adapters,
    channels_last,
    compiling,
    formats,
    fusing,
    optimization,
    packing,
    projections,
    resnets,
    tokens,
)
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import ConfigError, NumericsError
from lora_nb.families import Family, network
from lora_nb.families.quantized import kind_of
from lora_nb.learning_rates import LearningRates
from lora_nb.run_folder import History


class Learner:
    """The weights that a step changes and a checkpoint keeps, and what changes them.

    lora: the complete spec of each part. weights: the trainable ones by part, `parameters` numbers in all.
    untrained: the adapters' state before the first step. copies: of adapters, for the products of a step.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        accelerator: Accelerator,
        samples_per_step: int,
        total: int,
        history: History,
    ):
        self.family, self.lora = family, _adapt(family, config)
        self.weights = adapters.parameters(family)
        self.parameters = sum(weight.numel() for weight in self.all_weights())
        self.untrained = adapters.state(family)
        self.copies = projections.Copies(network(family))
        peaks = optimization.peak_learning_rates(
            config.replace(lora=self.lora), self.weights, samples_per_step
        )
        self.rates = LearningRates(config, peaks, total, history)
        self.optimizer = accelerator.prepare(
            optimization.make_optimizer(config, self.weights, peaks, accelerator.device.type)
        )

    def all_weights(self) -> list[torch.nn.Parameter]:
        """The trainable weights of all parts."""
        return [weight for weights in self.weights.values() for weight in weights]

    def set_rates(self, done: int) -> None:
        """Give the optimizer the learning rates of step done + 1."""
        rates = self.rates.of_step(done).values()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def require_float32(self) -> None:
        """Raise NumericsError if a trainable weight is of another type."""
        if any(weight.dtype != torch.float32 for weight in self.all_weights()):
            raise NumericsError("Trainable weights must be float32; something has changed theirs.")

    def norm(self) -> torch.Tensor:
        """The norm of all trainable weights together."""
        # Of a Parameter torch takes the norm by itself, thousands of kernels for a large adapter; of tensors at once.
        return torch.nn.utils.get_total_norm([weight.detach() for weight in self.all_weights()])

    def refuse_non_finite(self, norm: float, step: int, saved_step: int) -> None:
        """Raise NumericsError if step `step` has made a weight, and so their norm, infinite or not a number."""
        if not math.isfinite(norm):
            raise NumericsError(
                f"After step {step} the norm of the weights is not finite (learning rates {self.rates.peaks}), so it "
                f"was not kept; the last checkpoint is of step {saved_step}: lower the learning rate."
            )


def _adapt(family: Family, config: TrainConfig) -> dict[str, LoraSpec]:
    """Put fresh adapters on the base model, in place of any that it carries; their complete specs."""
    adapters.remove(family)
    _check_resolution(config.data, family)
    _check_precision(config.base_model_precision, family)
    if config.output_kohya_format:
        formats.kohya.layout_of(family)  # refuses now what could not be written at the end
    lora = adapters.named(family, config.lora)
    adapters.add(family, lora, seed=config.seed)
    (projections.group if config.fused_lora else projections.ungroup)(family)
    (compiling.compile_blocks if config.torch_compile else compiling.restore_blocks)(family)
    _lay_out(network(family), config, family.device.type)
    if config.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    return lora


def _lay_out(module: torch.nn.Module, config: TrainConfig, device: str) -> None:
    """Convolutions in the layout that the device's kernels read, and what is fused in it, or torch's."""
    wanted = config.channels_last
    (tokens.project if wanted else tokens.undo)(module)
    if device == "cuda":  # on a CPU the other kernels lose what convolutions gain
        resnets.undo(module)
        (channels_last.keep if wanted else channels_last.undo)(module)
        (fusing.fuse if wanted and config.fused_kernels else fusing.undo)(module)
    else:
        resnets.shorten(module)
        (packing.pack if wanted else packing.unpack)(module)


def _check_precision(asked: str | None, family: Family) -> None:
    """Refuse a family that the caller loaded in another way than the config says."""
    there = kind_of(network(family))
    if there != asked:
        raise ConfigError(
            f"base_model_precision is {asked!r}, but the base model that was given is loaded with {there!r}; "
            f"load it by load_family(..., base_model_precision={asked!r}), or give none."
        )


def _check_resolution(spec: DataSpec, family: Family) -> None:
    for name in ("resolution", "bucket_step"):
        value = getattr(spec, name)
        if value is not None and value % family.pixel_multiple:
            raise ConfigError(
                f"{name} is {value}; the latents of this model need a multiple of {family.pixel_multiple}."
            )
