"""The blocks that a network repeats, compiled where they are: once for each shape, not once for each block.

Only steps with gradients run compiled. Sampling, the probe and everything else calls the blocks as they are, and the
network keeps its layers and their names, so files and checkpoints are those of a run without it.
"""

import warnings
from typing import Any

import torch

from lora_nb import forwards
from lora_nb.errors import ConfigError
from lora_nb.families import Family, network
from lora_nb.projections import grouped

SHAPES = 64  # kinds of input that one kind of block is compiled for, before it runs as it is


def compile_blocks(family: Family) -> int:
    """Compile the network's repeated blocks for steps with gradients; returns how many blocks there are.

    Each new shape of the input (batch, size) is compiled in the first step that has it.
    Raises ConfigError if the network names no repeated blocks, or if compiling does not work on this machine.
    """
    names = getattr(network(family), "_repeated_blocks", None) or ()
    found = [m for m in network(family).modules() if type(m).__name__ in names]
    if not found:
        raise ConfigError(
            f"torch_compile compiles the blocks that a network repeats, and the network of {family.name!r} names none; "
            "leave it out."
        )
    _try(family.device)
    restore_blocks(family)
    settings = torch._dynamo.config  # newer versions of torch take this limit as an argument
    settings.cache_size_limit = max(SHAPES, settings.cache_size_limit)
    for block in found:
        block.forward = _Forward(block)
    return len(found)


def restore_blocks(family: Family) -> None:
    """Run every block as it is again."""
    forwards.restore(network(family), _Forward)


def compiled(module: torch.nn.Module) -> set[torch.nn.Module]:
    """All that lies in compiled blocks of a module, and they."""
    return {inner for block in forwards.having(module, _Forward) for inner in block.modules()}


class _Forward:
    """The forward of a block: compiled where there are gradients, its own elsewhere."""

    def __init__(self, block: torch.nn.Module):
        self.own = type(block).forward.__get__(block)
        self.compiled = torch.compile(self.own, dynamic=False)
        self.grouped = grouped(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        for attn in self.grouped:
            attn.processor.lay(attn)
        return self.compiled(*args, **kwargs)


def _try(device: torch.device) -> None:
    """Compile something tiny; raises ConfigError if that fails, mostly because there is no C++ compiler."""
    try:
        # What an earlier process left in the compiler's cache would hide that there is none now.
        with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a cache is off is meant
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"torch_compile does not work on this machine ({type(error).__name__}: {reason}); install a C++ compiler "
            "such as g++, or leave torch_compile out."
        ) from error
