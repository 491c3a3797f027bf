"""The parts of data/build that need no packages of drawings: variants of drawings, checkpoints of the trainings."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "build"))
import state
import variants


@pytest.fixture
def apple():
    """A red square with a green leaf on a white page, uint8 1 3 32 32."""
    page = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    page[0, :, 8:28, 6:26] = torch.tensor([220, 30, 25])[:, None, None]
    page[0, :, 4:8, 14:20] = torch.tensor([40, 160, 60])[:, None, None]
    return page


def test_hue_saturation_and_value_are_the_picture():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(variants.to_rgb(*variants.to_hsv(x)), x, atol=1e-5)


@pytest.mark.parametrize("colour", variants.COLOURS)
def test_the_main_colour_changes_and_nothing_else(apple, colour):
    hue, share = variants.main_hue(apple)
    assert abs(variants.away(hue.item(), 0.0)) < 0.02
    assert share.item() == pytest.approx(400 / 424)
    painted = variants.recolour(apple, hue, colour)
    assert torch.equal(painted[..., :8, :], apple[..., :8, :])  # the leaf, and paper
    found, _ = variants.main_hue(painted)
    assert abs(variants.away(found.item(), variants.COLOURS[colour][0])) < 0.03


def test_grey_drawings_have_no_colour_to_change():
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert variants.main_hue(grey)[1].item() == 0


def test_a_colour_word_is_put_before_a_name_or_in_place_of_another():
    assert variants.coloured("fox", "blue") == "blue fox"
    assert variants.coloured("red apple", "blue") == "blue apple"


def test_what_is_measured_is_never_made():
    """The edits, and a fifth of all else."""
    assert all(variants.never_made(edit.split(",")[0]) for edit in variants.EDITS)
    names = [f"{colour} thing {i}" for colour in variants.COLOURS for i in range(200)]
    assert 0.15 < sum(map(variants.never_made, names)) / len(names) < 0.25


def test_a_training_that_was_killed_goes_on_exactly(tmp_path):
    """Weights, moments, average and counters of 3 + 3 steps are those of 6."""

    def trained(folder: Path, *stops: int) -> list[torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            net = torch.nn.Linear(4, 3)
            weights = state.named_parameters({"net": net})
            optimizer, average = state.adamw(weights.values(), "cpu"), state.Average(weights)
            budget = state.Budget(0.1, steps=6, warmup_steps=2)
            state.load_checkpoint(folder, weights, optimizer, budget, average)
            while budget.step < stop:
                x = torch.randn(8, 4, generator=state.generator(1, budget.step))
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.param_groups[0]["lr"].fill_(budget.learning_rate())
                optimizer.step()
                average.update(weights, budget.step)
                budget.tick(8)
            state.save_checkpoint(folder, weights, optimizer, budget, average)
        assert budget.samples == 48
        return [*weights.values(), *average.shadow.values()]

    whole, parts = trained(tmp_path / "a", 6), trained(tmp_path / "b", 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
