"""Randomness by counter: every draw is named by (seed, purpose, index), so there is no stream to save or to lose.

A picture's noise depends on its global sample number alone. The number of processes, the batch size, a cache, a restart
or a validation in between cannot change it. All draws are made on the CPU in float32 and moved afterwards, so they are
the same on every device.
"""

import hashlib
from collections.abc import Sequence

import torch


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator whose state is a function of its three names only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], seed: int, purpose: str, positions: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, one draw per position: (len(positions), *shape), float32."""
    return torch.stack(
        [torch.randn(*shape, generator=generator(seed, purpose, p)) for p in positions]
    )


def uniform(seed: int, purpose: str, positions: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), one per position: (len(positions),), float32."""
    return torch.cat([torch.rand(1, generator=generator(seed, purpose, p)) for p in positions])


def permutation(n: int, seed: int, purpose: str, index: int) -> list[int]:
    """The numbers 0..n-1 in an order that depends on the three names only."""
    return torch.randperm(n, generator=generator(seed, purpose, index)).tolist()
