"""Encoders and decoders that no step needs wait in the CPU's memory, so that the GPU holds the network alone.

All pictures and captions are encoded before the first step, while the network waits there in its turn. What is needed
again, for a sample picture say, comes back by itself, one after the other, and leaves before the next step.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device

from lora_nb import memory
from lora_nb.errors import ConfigError
from lora_nb.families import Family, network
from lora_nb.families.base import move

CPU = torch.device("cpu")


def waiting(family: Family) -> list[torch.nn.Module]:
    """All modules of a family but its network."""
    found = {id(m): m for value in vars(family).values() for m in _modules(value)}
    return [module for module in found.values() if module is not network(family)]


def _modules(value: Any) -> list[torch.nn.Module]:
    values = value.values() if isinstance(value, dict) else (value,)
    return [each for each in values if isinstance(each, torch.nn.Module)]


def check(family: Family, parts: Iterable[str], encoded_each_time: int) -> None:
    """Raise ConfigError if every step needs an encoder.

    parts: those that train. encoded_each_time: the number of pictures that cannot be remembered.
    """
    if set(parts) != {next(iter(family.targets))}:
        raise ConfigError(
            "offload keeps the text encoders out of the GPU's memory, but they train too, and every step needs them; "
            "leave out offload, or the LoRA on them."
        )
    if encoded_each_time:
        raise ConfigError(
            f"offload keeps the autoencoder out of the GPU's memory, but {encoded_each_time} pictures are encoded anew "
            "whenever they are seen; set center_crop or random_crops, and cache_latents."
        )


def undo(family: Family) -> None:
    """Bring back what was sent away, to stay on the family's device."""
    hooks = [getattr(module, "_hf_hook", None) for module in waiting(family)]
    if any(isinstance(hook, _ComesWhenCalled) for hook in hooks):
        for module in waiting(family):
            remove_hook_from_module(module)
        move(family, family.device)


class Offload:
    """Sends all of a family but its network away, and brings back what is called; `device` is the family's from now on.

    The family may have been loaded anywhere.
    """

    def __init__(self, family: Family, device: torch.device):
        self.family, self.waiting = family, waiting(family)
        family.device = device
        self.hook = _ComesWhenCalled(device, network(family), self.waiting)
        for module in self.waiting:
            add_hook_to_module(module, self.hook)
        self.send_away()
        _put(network(family), device)

    def send_away(self) -> None:
        """Before a step, send what was called since the last one back to the CPU."""
        for module in self.waiting:
            _put(module, CPU)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Inside, the network leaves the GPU to the others, if any of them is called at all."""
        self.hook.encoding = True
        try:
            yield
        finally:
            self.hook.encoding = False
            self.send_away()
            _put(network(self.family), self.family.device)
            memory.release()


class _ComesWhenCalled(ModelHook):
    """Puts a module on the device when it is called.

    Before that the others leave it, or, while they are `encoding` for each other, the network.
    """

    def __init__(
        self, device: torch.device, network: torch.nn.Module, waiting: list[torch.nn.Module]
    ):
        self.execution_device, self.network, self.waiting = device, network, waiting
        self.encoding = False

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in [self.network] if self.encoding else self.waiting:
            if other is not module:
                _put(other, CPU)
        _put(module, self.execution_device)
        return send_to_device((args, kwargs), self.execution_device)


def _put(module: torch.nn.Module, device: torch.device) -> None:
    if next(module.parameters()).device.type != device.type:  # a whole module moves at once
        torch.nn.Module.to(module, device)
