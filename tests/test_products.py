"""Products by oneDNN: torch's numbers to the rounding of float32, in frozen layers, adapters and whole runs."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from lora_nb.bench.worker import uncounted
from lora_nb.config import LoraSpec
from lora_nb.families import base, products
from lora_nb.trainer import train

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _wider(monkeypatch):
    """A CPU where oneDNN takes wider instructions, whichever this is, and pays from the first product on."""
    monkeypatch.setattr(products, "WIDER", True)
    monkeypatch.setattr(products, "ENOUGH", 0)


@pytest.fixture
def ran(monkeypatch):
    """Whether each product was by oneDNN."""
    found, product = [], products.product
    monkeypatch.setattr(
        products, "product", lambda x, w, b: found.append(products.sooner(x, w)) or product(x, w, b)
    )
    return found


@pytest.mark.parametrize("shape", [(7, 40), (2, 5, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_as_near_to_the_exact_ones_as_torchs(shape, bias):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(shape), torch.randn(24, 40), torch.randn(*shape[:-1], 24)
    b = torch.randn(24) if bias else None

    def of(call, dtype):
        leaves = [each.to(dtype).requires_grad_() for each in (x, weight)]
        y = call(*leaves, None if b is None else b.to(dtype))
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    exact = of(nn.functional.linear, torch.float64)
    torchs = of(nn.functional.linear, torch.float32)
    for a, c, e in zip(of(products.linear, torch.float32), torchs, exact, strict=True):
        assert a.shape == e.shape
        assert (a - e).norm() <= 1.5 * (c - e).norm() + 1e-7 * e.norm()


def test_frozen_layers_compute_so_and_keep_no_input(ran):
    layer = nn.Linear(64, 64)
    plain = copy.deepcopy(layer)
    base.freeze(layer, torch.float32, CPU)
    kept, x = [], torch.randn(3, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (layer, plain)))
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
    assert ran == [True] * 3
    twin = copy.deepcopy(layer)
    twin.weight.data *= 2  # as a merge does, which leaves no trace
    twin.bias.data *= 2
    torch.testing.assert_close(twin(x), 2 * layer(x))


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 8).bfloat16(), torch.randn(3, 8).double(), torch.empty(3, 8, device="meta")],
    ids=["bfloat16", "float64", "another device"],
)
def test_other_products_are_torchs(x, ran, monkeypatch):
    weight = torch.ones(4, 8, dtype=x.dtype, device=x.device)
    assert not products.sooner(x, weight)
    assert products.linear(x, weight, None).shape == (3, 4)
    monkeypatch.setattr(products, "ENOUGH", 2**10)
    assert not products.sooner(torch.ones(3, 8), torch.ones(4, 8))
    monkeypatch.setattr(products, "WIDER", False)
    assert not products.sooner(torch.ones(64, 64), torch.ones(64, 64))
    assert ran == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fused_lora": False},
        {"base_model_precision": "int8"},
        {"lora": {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2)}},
    ],
    ids=lambda changes: ", ".join(changes) or "as it is",
)
def test_a_run_learns_the_same(config, changes, ran, monkeypatch):
    losses = {}
    for wider in (False, True):
        monkeypatch.setattr(products, "WIDER", wider)
        ran.clear()
        run = config.replace(output_dir=f"{config.output_dir}-{wider}", max_train_steps=3)
        losses[wider] = [step.loss for step in train(run.replace(**changes))]
        assert any(ran) == wider
    assert losses[True] == pytest.approx(losses[False], abs=1e-6)


def test_a_compiled_graph_holds_them():
    """In one piece, there and back; oneDNN's own operation is taken by the compiler with weights of its own only."""
    x, weight, bias = torch.randn(2, 7, 40), torch.randn(24, 40), torch.randn(24)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    found = []
    for run in (torch.compile(products.linear, backend=backend, fullgraph=True), products.linear):
        leaf = x.clone().requires_grad_()
        y = run(leaf, weight, bias)
        found.append((y, torch.autograd.grad(y.square().sum(), leaf)[0]))
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert ["lora_nb.product" in graph.code for graph in graphs] == [True, True]


def test_the_benchmark_counts_their_multiplications():
    x, weight = torch.randn(3, 5, 64), torch.randn(32, 64)
    counts = []
    for run in (products.product, nn.functional.linear):
        with FlopCounterMode(display=False, custom_mapping=uncounted()) as counter:
            run(x, weight, None)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 15 * 32 * 64] * 2
