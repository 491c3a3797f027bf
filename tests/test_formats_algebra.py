"""Arithmetic on LoRAs is exact where it can be, and the best possible where it cannot."""

import pytest
import torch

from lora_nb import adapters, formats, inference
from lora_nb.errors import ConfigError, FormatError
from lora_nb.families import load_family
from lora_nb.formats import Pair

SHAPES = {
    "unet": {"a": (24, 16), "b": (8, 32), "conv": (12, 6, 3, 3)},
    "text_encoder": {"q": (10, 10)},
}


def lora(seed: int, rank: int = 4, scale: float = 0.7) -> formats.Weights:
    """Random pairs for the layers of SHAPES."""
    g = torch.Generator().manual_seed(seed)
    out: formats.Weights = {}
    for part, layers in SHAPES.items():
        for name, (rows, *inputs) in layers.items():
            ones = [1] * (len(inputs) - 1)
            down, up = (
                torch.randn(rank, *inputs, generator=g),
                torch.randn(rows, rank, *ones, generator=g),
            )
            out.setdefault(part, {})[name] = Pair(down, up, scale)
    return out


def deltas(weights):
    return {(p, n): pair.delta() for p, pairs in weights.items() for n, pair in pairs.items()}


def assert_same(found, expected, limit=2e-6):
    assert found.keys() == expected.keys()
    for key in expected:
        assert (found[key] - expected[key]).abs().max() <= limit * expected[key].abs().max(), key


def test_a_pair_is_what_peft_adds(tiny_sd):
    """delta() in shape and value, also for convolutions."""
    family = load_family("auto", str(tiny_sd))
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["to_q", "conv1"])
    family.unet.add_adapter(config, adapter_name="default")
    for _, layer in adapters.layers(family.unet):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    for name, layer in adapters.layers(family.unet):
        pair = formats.weights_of_modules({"unet": family.unet})["unet"][name]
        assert torch.allclose(pair.delta(), layer.get_delta_weight("default"), atol=1e-6)


def test_concatenation_is_the_weighted_sum_exactly():
    a, b = lora(1, rank=3), lora(2, rank=5, scale=2.0)
    del b["text_encoder"]
    together = formats.concatenate([a, b], [0.5, -1.25])
    expected = {k: 0.5 * v for k, v in deltas(a).items()}
    for key, value in deltas(b).items():
        expected[key] = expected[key] - 1.25 * value
    assert_same(deltas(together), expected)
    assert {pair.rank for pair in together["unet"].values()} == {8}
    assert {pair.rank for pair in together["text_encoder"].values()} == {3}


def test_adding_the_opposite_leaves_nothing():
    a = lora(1)
    nothing = formats.add([a, a], [1.0, -1.0])
    assert max(float(d.abs().max()) for d in deltas(nothing).values()) < 1e-5
    assert_same(deltas(formats.add([a], [1.0], rank=4)), deltas(a))


def test_wrong_sums_are_refused():
    a, b = lora(1), lora(2)
    with pytest.raises(ConfigError, match="2 LoRAs and 1 factors"):
        formats.add([a, b], [1.0])
    b["unet"]["a"] = Pair(torch.ones(2, 5), torch.ones(24, 2), 1.0)
    with pytest.raises(FormatError, match=r"different base models: unet\.a"):
        formats.add([a, b])


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_resizing_is_the_best_there_is(rank):
    """The error is sqrt of the dropped squared singular values: none of this rank is nearer (Eckart and Young)."""
    weights = lora(3, rank=4)
    smaller, kept = formats.resize(weights, rank)
    for (part, name), full in deltas(weights).items():
        values = torch.linalg.svdvals(full.flatten(1).double())
        error = (full - smaller[part][name].delta()).norm()
        best = (values[rank:] ** 2).sum().sqrt()
        assert smaller[part][name].rank == min(rank, 4)
        assert abs(error - best) < 1e-5 * full.norm()
        (energy,) = [k.energy for k in kept if (k.part, k.layer) == (part, name)]
        assert energy == pytest.approx(
            float((values[:rank] ** 2).sum() / (values**2).sum()), rel=1e-6
        )


def test_resizing_by_energy_keeps_the_fewest_that_hold_it():
    weights = lora(4, rank=6)
    _, kept = formats.resize(weights, 6, energy=0.8)
    for one in kept:
        values = torch.linalg.svdvals(weights[one.part][one.layer].delta().flatten(1).double())
        shares = (values**2).cumsum(0) / (values**2).sum()
        assert one.energy >= 0.8
        assert one.rank == 1 or shares[one.rank - 2] < 0.8
    assert {one.rank for one in kept} != {6}


def test_spectrum_needs_no_product():
    pair = lora(5)["unet"]["conv"]
    u, values, v = formats.spectrum(pair)
    full = pair.delta().flatten(1).double()
    assert torch.allclose(values, torch.linalg.svdvals(full)[:4])
    assert torch.allclose((u * values) @ v, full, atol=1e-5)


@pytest.fixture
def two(tiny_sd):
    """A base, and a copy with the LoRA of `source` merged into it."""
    base, tuned = (load_family("auto", str(tiny_sd)) for _ in range(2))
    layers = {
        n: m.weight.shape
        for n, m in adapters.adaptable(base.unet).items()
        if n.endswith(("to_q", "conv1"))
    }
    g = torch.Generator().manual_seed(0)
    source: formats.Weights = {"unet": {}}
    for name, (rows, *inputs) in layers.items():
        ones = [1] * (len(inputs) - 1)
        down, up = torch.randn(2, *inputs, generator=g), torch.randn(rows, 2, *ones, generator=g)
        source["unet"][name] = Pair(down, up, 0.1)
    return base, tuned, source


def test_extraction_finds_what_was_merged(two):
    base, tuned, source = two
    formats.merge(tuned.trainable, source)
    found, kept = formats.extract(base.trainable, tuned.trainable, rank=2)
    assert_same(deltas(found), deltas(source), 1e-5)  # float32 weights carry the change's rounding
    assert all(one.energy > 1 - 1e-9 for one in kept)
    less, kept = formats.extract(base.trainable, tuned.trainable, rank=1)
    for (part, name), full in deltas(source).items():
        dropped = torch.linalg.svdvals(full.flatten(1).double())[1]
        assert abs((full - less[part][name].delta()).norm() - dropped) < 1e-4 * full.norm()
    assert all(0.3 < one.energy < 1 for one in kept)


def test_extraction_refuses_what_it_would_leave_out(two):
    base, tuned, source = two
    formats.merge(tuned.trainable, source)
    with pytest.raises(FormatError, match=r"also differ in .* tensors of unet"):
        formats.extract(base.trainable, tuned.trainable, 2, {"unet": ("to_q",)})
    tuned.unet.conv_in.bias.data += 1
    with pytest.raises(FormatError, match=r"conv_in\.bias"):
        formats.extract(base.trainable, tuned.trainable, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_undone_bit_for_bit(two, dtype):
    _, tuned, source = two
    tuned.unet.to(dtype)
    before = {k: v.clone() for k, v in tuned.unet.state_dict().items()}
    kept = formats.merge(tuned.trainable, source, 0.5)
    after = tuned.unet.state_dict()
    for name, pair in source["unet"].items():
        exact = before[f"{name}.weight"].float() + 0.5 * pair.delta()
        assert torch.equal(after[f"{name}.weight"], exact.to(dtype))
    formats.undo(tuned.trainable, kept)
    after = tuned.unet.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_merging_into_another_base_changes_nothing(two):
    base, _, source = two
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    source["unet"]["nowhere"] = source["unet"][next(iter(source["unet"]))]
    with pytest.raises(FormatError, match=r"no layer unet\.nowhere"):
        formats.merge(base.trainable, source)
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())


def test_a_sum_is_a_file_that_draws_like_both(two, tiny_sd, tmp_path):
    """Written, read without and with a pipeline, and put on: the same change everywhere, each layer its own rank."""
    _, _, source = two
    smaller, _ = formats.resize(source, 1)
    total = formats.add([source, smaller], [0.5, 2.0])
    first = next(iter(total["unet"]))
    total["unet"][first] = smaller["unet"][first]  # ranks differ
    file = formats.save_weights(total, tmp_path / "sum.safetensors", {"trigger": "x"})
    assert_same(deltas(formats.read_weights(file)), deltas(total))
    pipeline = load_family("auto", str(tiny_sd)).pipeline()
    assert_same(deltas(formats.read_weights(file, pipeline)), deltas(total))
    inference.use_adapter(pipeline, file)
    assert_same(deltas(formats.weights_of_modules({"unet": pipeline.unet})), deltas(total))
    assert formats.inspect(file).metadata["trigger"] == "x"
    inference.remove_adapter(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)  # diffusers reads it too
    name = inference.adapter_names(pipeline)[0]
    assert_same(deltas(formats.weights_of_modules({"unet": pipeline.unet}, name)), deltas(total))


def test_a_kohya_file_needs_the_pipeline(tmp_path):
    from safetensors.torch import save_file

    names = ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight")
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "k.safetensors")
    with pytest.raises(FormatError, match="give the pipeline"):
        formats.read_weights(tmp_path / "k.safetensors")
