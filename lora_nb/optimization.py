"""The optimizer and its learning rates: pure functions of the config."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from lora_nb.config import TrainConfig
from lora_nb.errors import ConfigError

Weights = dict[str, list[torch.nn.Parameter]]  # by part


def learning_rate_factors(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The schedule as a pure function: factor(k) multiplies the peak learning rate in step k = 0, 1, ...

    The formulas are diffusers' (`diffusers.optimization`), counted in optimizer steps whatever the accumulation and
    the number of processes; the last step of `total` is the last of the curve.
    """
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer=carrier,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return schedule.lr_lambdas[0]


def peak_learning_rates(
    config: TrainConfig, weights: Weights, samples_per_step: int
) -> dict[str, float]:
    """The learning rate of each part before the schedule; scale_lr multiplies by the samples of a step."""
    factor = samples_per_step if config.scale_lr else 1
    own = {part: config.lora[part].learning_rate for part in weights}
    return {part: factor * (config.learning_rate if lr is None else lr) for part, lr in own.items()}


def make_optimizer(
    config: TrainConfig, weights: Weights, peaks: dict[str, float], device: str
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with one group per part; ConfigError for 8 bit without bitsandbytes or CUDA."""
    groups = [{"params": group, "lr": peaks[part]} for part, group in weights.items()]
    settings = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        if device != "cuda":
            raise ConfigError(
                f"use_8bit_adam needs a CUDA GPU, and this training runs on {device!r}; leave it out."
            )
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                "use_8bit_adam needs bitsandbytes; install it with pip install bitsandbytes."
            ) from error
        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=device != "mps", **settings)
