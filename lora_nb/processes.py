"""Device, precision and processes of a training, by accelerate; what the processes have to agree on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list

from lora_nb import env, precision, trackers
from lora_nb.config import TrainConfig
from lora_nb.loss import Loss

T = TypeVar("T")


def accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a new training; raises ConfigError if its precision cannot work here."""
    # A notebook makes many runs in one process; accelerate would keep the first one's precision for all.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    device = env.pick_device()
    if config.allow_tf32 and device.name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    made = Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=device.name == "cpu",
        log_with=trackers.wanted(config.report_to) or None,  # it warns of an empty list
        project_config=trackers.place(config),
    )
    precision.check(made.mixed_precision, device)
    return made


def main_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What decide() says on the main process, on every process."""
    decided: list[Any] = [decide() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        decided = broadcast_object_list(decided)
    return decided[0]


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is true on any process."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, reduction="sum"))


def gathered(accelerator: Accelerator, losses: list[Loss]) -> Loss:
    """The losses of a step's pieces, on every process, as one: their sum, and the entries of all pictures."""
    loss = torch.stack([each.loss for each in losses]).sum()
    per_image = torch.cat([each.per_image for each in losses])
    timesteps = torch.cat([each.timesteps for each in losses]).to(per_image.device)
    if accelerator.num_processes == 1:
        return Loss(loss, per_image, timesteps)
    # As one: processes wait for each other at every exchange. A float64 holds each of the three exactly.
    mine = torch.cat([loss[None].double(), per_image.double(), timesteps.double()])
    every = accelerator.gather(mine).view(accelerator.num_processes, -1)
    losses_of, images_of, steps_of = every.split([1, len(per_image), len(timesteps)], dim=1)
    return Loss(
        losses_of.mean().to(loss.dtype),
        images_of.flatten().to(per_image.dtype),
        steps_of.flatten().to(timesteps.dtype),
    )
