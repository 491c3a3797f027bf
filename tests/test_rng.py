"""Named randomness: a pure function of (seed, purpose, index)."""

import torch

from lora_nb import rng


def test_draws_do_not_depend_on_company():
    together = rng.normal((3, 4), 7, "noise", [5, 6, 7])
    assert torch.equal(together[1:2], rng.normal((3, 4), 7, "noise", [6]))
    assert torch.equal(rng.uniform(7, "t", [2, 9])[1:], rng.uniform(7, "t", [9]))


def test_each_name_matters():
    def draw(seed, purpose, position):
        return rng.normal((8,), seed, purpose, [position])

    draws = [draw(0, "a", 0), draw(1, "a", 0), draw(0, "b", 0), draw(0, "a", 1)]
    assert all(not torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])


def test_the_global_stream_is_left_alone():
    before = torch.get_rng_state()
    rng.normal((8,), 0, "noise", [0])
    rng.permutation(9, 0, "order", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_distributions():
    noise = rng.normal((1000,), 3, "noise", range(50))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    u = rng.uniform(3, "timesteps", range(4000))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02


def test_permutation_covers_everything_and_changes_with_the_epoch():
    first, second = (rng.permutation(50, 0, "order", epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
