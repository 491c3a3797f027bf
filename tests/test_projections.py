"""Grouped projections compute what peft's layers compute, and stand in the way of nothing."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image

from lora_nb import adapters, projections
from lora_nb.config import LoraSpec
from lora_nb.families import load_family
from lora_nb.inference import draw_samples, fused, generate, use_adapter, watching
from lora_nb.projections import GroupedAttention
from lora_nb.trainer import train


def outputs(family, requires_grad=True):
    """A prediction and the gradients of all adapter weights, at fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, 8, 8), (2, 16, 32)
    x, states = (torch.randn(shape, generator=generator).to(family.dtype) for shape in shapes)
    states = {"encoder_hidden_states": states}
    prediction = family.predict(x, torch.tensor([10, 900]), states)
    weights = adapters.parameters(family)["unet"]
    prediction.square().mean().backward()
    grads = [w.grad.clone() for w in weights]
    for weight in weights:
        weight.grad = None
    return prediction.detach(), grads


def adapted(model, dtype=torch.float32, seed=5, **spec):
    """A family whose adapters do something."""
    family = load_family("sd", str(model), dtype=dtype)
    adapters.add(family, {"unet": LoraSpec(**{"rank": 3, "lora_alpha": 5.0} | spec)}, seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in adapters.parameters(family)["unet"]:
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return family


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Layers of any size as small ones, whose branches are added to the weights, or as large ones."""
    monkeypatch.setattr(projections, "SMALL", {"small": 10**9, "large": 0}[request.param])


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"target_modules": ("to_k", "to_v")},
        {"target_modules": ("to_q", "to_out.0")},
        {"target_modules": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1")},
        {"lora_dropout": 0.5},
    ],
)
def test_prediction_and_gradients_are_those_of_peft(tiny_sd, spec):
    family = adapted(tiny_sd, **spec)
    family.unet.train(spec == {})
    plain, plain_grads = outputs(family)
    assert projections.group(family) > 0
    grouped, grads = outputs(family)
    torch.testing.assert_close(grouped, plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grads, plain_grads, atol=1e-6, rtol=1e-4)
    projections.ungroup(family)
    assert torch.equal(outputs(family)[0], plain)


@pytest.mark.usefixtures("size")
def test_recomputed_activations_give_the_same_gradients(tiny_sd):
    family = adapted(tiny_sd)
    projections.group(family)
    plain = outputs(family)
    family.enable_gradient_checkpointing()
    family.unet.train()
    assert family.unet.is_gradient_checkpointing
    torch.testing.assert_close(outputs(family), plain, atol=0, rtol=0)


def test_it_is_the_grouped_product_that_runs(tiny_sd, monkeypatch):
    family, small, large = adapted(tiny_sd), [], []
    summed, apply = projections.summed_projection, projections.Projection.apply
    count = {
        "summed_projection": lambda *a: small.append(len(a[4:]) // 2) or summed(*a),
        "Projection.apply": lambda *a: large.append(len(a[5:]) // 2) or apply(*a),
    }
    for name, call in count.items():
        monkeypatch.setattr(f"lora_nb.projections.{name}", call)
    layers = projections.group(family)
    # Cross attention has q, then k and v; self attention has all three; and each an output.
    expected = sorted([1, 2, 1] * (layers // 2) + [3, 1] * (layers // 2))
    outputs(family)
    assert (sorted(small), large) == (expected, [])
    small.clear()
    monkeypatch.setattr(projections, "SMALL", 0)
    outputs(family)
    assert (small, sorted(large)) == ([], expected)


def test_half_precision_is_never_summed(tiny_sd, monkeypatch):
    """What rounding takes of a weight in bfloat16, where that is computed in, is more than an adapter's step adds."""
    family = adapted(tiny_sd, torch.bfloat16)
    projections.group(family)
    monkeypatch.setattr(projections, "computed_in", lambda tensor: tensor.dtype)
    monkeypatch.delattr(projections, "summed_projection")
    outputs(family)


@pytest.mark.usefixtures("size")
def test_scaling_rank_stabilised_or_by_block_is_followed(tiny_sd):
    """As by peft's layers in float64: two float32 results are twice as far from each other as from that."""
    family, exact = adapted(tiny_sd), adapted(tiny_sd)
    exact.unet.double()
    exact.dtype = torch.float64
    projections.group(family)

    def alike():
        results = outputs(family), outputs(exact)
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4, check_dtype=False)

    for factor in (5 / 3**0.5, 0.0):
        for each in (family, exact):
            adapters.set_scale(each, factor)
        alike()
    for each in (family, exact):
        _, layer = next(adapters.layers(each.unet))
        layer.set_scale(adapters.ADAPTER, 3.0)  # one of three alone
    alike()


@torch.no_grad()
def test_disabled_merged_and_removed_adapters(tiny_sd):
    plain, grouped = adapted(tiny_sd), adapted(tiny_sd)
    before = {name: w.clone() for name, w in grouped.unet.named_parameters()}
    projections.group(grouped)
    draw = {"prompts": "a cat", "seeds": [1, 2], "num_inference_steps": 2}

    def both():
        return (
            torch.from_numpy(_numbers(generate(f.pipeline(), **draw))) for f in (plain, grouped)
        )

    torch.testing.assert_close(*both(), atol=1, rtol=0)
    with adapters.disabled(plain), adapters.disabled(grouped):
        torch.testing.assert_close(*both(), atol=1, rtol=0)
    with fused(plain.pipeline()), fused(grouped.pipeline()):
        torch.testing.assert_close(*both(), atol=1, rtol=0)
    assert all(torch.equal(w, before[name]) for name, w in grouped.unet.named_parameters())
    adapters.remove(plain)
    adapters.remove(grouped)
    torch.testing.assert_close(*both(), atol=1, rtol=0)


def _numbers(pictures):
    import numpy as np

    return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])


def test_several_adapters_are_left_to_peft(tiny_sd, config, tmp_path):
    training = train(config)
    list(training)
    plain, grouped = adapted(tiny_sd), adapted(tiny_sd)
    projections.group(grouped)
    for family in (plain, grouped):
        use_adapter(family.pipeline(), config.output_dir, name="second")
    draw = {"prompts": "a cat", "seeds": [1], "num_inference_steps": 2}
    assert generate(plain.pipeline(), **draw) == generate(grouped.pipeline(), **draw)


def test_another_processor_is_called_as_the_library_calls_it(tiny_sd):
    """The way past the library's forward is for our processor only, and goes with it."""
    family = adapted(tiny_sd)
    plain = outputs(family)
    projections.group(family)
    attn = next(m for m in family.unet.modules() if isinstance(m, Attention))
    seen = []

    class Own(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            seen.append(attn)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    attn.set_processor(Own())
    torch.testing.assert_close(outputs(family), plain, atol=1e-6, rtol=1e-4)
    assert seen
    projections.ungroup(family)
    assert not any("forward" in vars(m) for m in family.unet.modules() if isinstance(m, Attention))


def test_a_pipeline_that_was_grouped_saves_and_moves(tiny_sd, tmp_path):
    family = adapted(tiny_sd)
    projections.group(family)
    before = outputs(family)[0]
    family.unet.double().float()  # every weight gets a storage of its own
    assert torch.equal(outputs(family)[0], before)
    adapters.remove(family)
    family.pipeline().save_pretrained(tmp_path / "saved")
    again = load_family("sd", str(tmp_path / "saved"))
    for (name, ours), theirs in zip(
        family.unet.named_parameters(), again.unet.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_training_is_the_same_to_rounding(config):
    losses = {}
    for on in (True, False):
        run = config.replace(fused_lora=on, max_train_steps=8, overwrite=True)
        losses[on] = [step.loss for step in train(run)]
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)


def test_bfloat16_stays_near_float32_and_keeps_float32_adapters(config):
    """The frozen weights are rounded, the adapters are not."""
    losses = {}
    for precision in ("no", "bf16"):
        run = config.replace(mixed_precision=precision, max_train_steps=8, overwrite=True)
        training = train(run)
        losses[precision] = [step.loss for step in training]
        dtypes = {w.dtype for w in training.learner.weights["unet"]}
        assert dtypes == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["no"], abs=2e-3)


@pytest.mark.parametrize(
    ("names", "most"),
    [
        # Nothing is rounded from projection to projection.
        (("to_q", "to_k", "to_v", "to_out.0"), 1.0),
        # The library's layers project in half precision.
        (("to_k",), 1.5),
        (("to_out.0",), 1.5),
    ],
)
def test_gradients_in_bfloat16_on_a_cpu_are_as_near_to_float32_as_those_of_peft(
    tiny_sd, names, most
):
    errors = {"ours": 0.0, "peft's": 0.0}
    for seed in range(6):
        _, exact = outputs(adapted(tiny_sd, seed=seed, target_modules=names))
        family = adapted(tiny_sd, torch.bfloat16, seed=seed, target_modules=names)
        for whose, prepare in (("peft's", projections.ungroup), ("ours", projections.group)):
            prepare(family)
            prediction, gradients = outputs(family)
            assert prediction.dtype == torch.bfloat16
            pairs = list(zip(gradients, exact, strict=True))
            assert all(a.dtype == torch.float32 for a, _ in pairs)
            size = sum(b.square().sum() for _, b in pairs)
            errors[whose] += float(sum((a - b).square().sum() for a, b in pairs) / size)
    assert errors["ours"] < most * errors["peft's"]


@pytest.mark.parametrize(("queries", "keys"), [(64, 77), (100, 31), (63, 77), (64, 72), (64, 80)])
def test_masked_keys_change_nothing(queries, keys):
    """CLIP's 77 tokens are filled up to 80: the masked ones weigh nothing, forward and back."""
    wide = [torch.randn(2, n, 24, dtype=torch.float64) for n in (queries, keys, keys)]
    results = []
    for attend, dtype in (
        (projections.attention, torch.float32),
        (torch.nn.functional.scaled_dot_product_attention, torch.float64),
    ):
        leaves = [each.to(dtype).requires_grad_() for each in wide]
        mixed = attend(*(leaf.unflatten(-1, (3, 8)).transpose(1, 2) for leaf in leaves))
        mixed.square().sum().backward()
        results.append([mixed, *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_attention_in_bfloat16_on_a_cpu_is_computed_in_float32():
    q, k, v = torch.randn(3, 1, 2, 16, 8).bfloat16().unbind()
    exact = projections.attention(q.float(), k.float(), v.float())
    assert torch.equal(projections.attention(q, k, v), exact.bfloat16())


@pytest.fixture
def half(monkeypatch):
    """Branches in half precision beside weights in it, as on a GPU."""
    monkeypatch.setattr(projections, "computed_in", lambda tensor: tensor.dtype)
    monkeypatch.setattr(projections, "_of_branches", lambda weight: weight.dtype)


@pytest.mark.usefixtures("half")
def test_factors_are_copied_once_for_a_step_and_anew_for_the_next(tiny_sd, monkeypatch):
    """Between fresh copies a step computes what it does without them, to the bit, whatever the factors are by then."""
    family, made = adapted(tiny_sd, torch.bfloat16), []
    layers, stacked = projections.group(family), projections._stacked
    monkeypatch.setattr(projections, "_stacked", lambda *a: made.append(1) or stacked(*a))
    copies = projections.Copies(family.unet)
    generator = torch.Generator().manual_seed(2)

    def in_a_step():
        with copies.fresh():
            return outputs(family)

    for step in range(3):
        for weight in adapters.parameters(family)["unet"]:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        plain, before = outputs(family), len(made)
        torch.testing.assert_close(in_a_step(), plain, atol=0, rtol=0)
        # Cross attention has three products, self attention two; in the first step each makes its copies.
        assert len(made) - before == (0 if step else 5 * layers // 2)
    with copies.fresh(), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert not any(processor.fresh for processor in copies.processors)


@pytest.mark.usefixtures("half")
def test_a_second_training_makes_its_own_copies(tiny_sd):
    family = adapted(tiny_sd, torch.bfloat16)
    projections.group(family)
    with projections.Copies(family.unet).fresh():
        outputs(family)
    adapters.remove(family)
    adapters.add(family, {"unet": LoraSpec(rank=2)}, seed=9)
    for weight in adapters.parameters(family)["unet"]:
        weight.data += 0.1
    plain = outputs(family)
    with projections.Copies(family.unet).fresh():
        torch.testing.assert_close(outputs(family), plain, atol=0, rtol=0)


@pytest.mark.usefixtures("half")
def test_samples_in_bf16_that_are_not_merged_take_the_copies_of_a_step(config, monkeypatch):
    monkeypatch.setattr(watching, "_merges", lambda family: False)  # as on a GPU
    run = config.replace(mixed_precision="bf16", max_train_steps=1, num_inference_steps=2)
    training = train(run.replace(validation_prompts=("a cat",), num_validation_images=1))
    list(training)
    with torch.no_grad():
        for weight in training.learner.all_weights():
            weight.add_(0.1)
    made, stacked = [], projections._stacked
    monkeypatch.setattr(projections, "_stacked", lambda *a: made.append(1) or stacked(*a))
    [file] = draw_samples(training, "copies", 1)
    assert not made
    drawn = Image.open(file).tobytes()
    monkeypatch.setattr(training.learner, "copies", projections.Copies(torch.nn.Module()))
    [file] = draw_samples(training, "cast", 1)
    assert made
    assert Image.open(file).tobytes() == drawn


def prediction(family, text):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(family.dtype)
    with torch.no_grad():
        return family.predict(x, torch.tensor([10, 900]), {"encoder_hidden_states": text})


@pytest.fixture
def read(monkeypatch):
    """The names of the layers that are projected together, in turn."""
    names, project = [], GroupedAttention._project
    monkeypatch.setattr(GroupedAttention, "_project", lambda *a: names.append(a[2]) or project(*a))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_while_drawing_a_text_is_projected_once(tiny_sd, read, dtype):
    """Of the last tensor, and to the bit what is computed anew; afterwards nothing of it is held."""
    family = adapted(tiny_sd, dtype)
    layers = projections.group(family) // 2  # with cross attention
    texts = [torch.randn(2, 16, 32).to(dtype) for _ in range(2)]
    plain = [prediction(family, text) for text in texts]
    read.clear()
    with projections.drawing(family.unet):
        drawn = [prediction(family, text) for text in (texts[0], texts[0], texts[1], texts[0])]
    assert read.count(("to_k", "to_v")) == 3 * layers
    for one, other in zip(drawn, (plain[0], plain[0], plain[1], plain[0]), strict=True):
        assert torch.equal(one, other)
    read.clear()
    prediction(family, texts[0])
    assert read.count(("to_k", "to_v")) == layers
    processors = [m.processor for m in family.unet.modules() if isinstance(m, Attention)]
    assert all(processor.text is None for processor in processors)


def test_samples_are_drawn_with_texts_projected_once(config, read):
    run = config.replace(validation_prompts=("a cat",), num_validation_images=1)
    training = train(run.replace(max_train_steps=1, num_inference_steps=3))
    list(training)
    read.clear()
    draw_samples(training, "once", 1)
    assert read.count(("to_q",)) == 3 * read.count(("to_k", "to_v")) > 0
