"""Layers in bfloat16 that compute in float32: nearer to the exact result than torch's own, and nothing wide is kept."""

import copy

import pytest
import torch
from test_packing import both
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_nb.config import LoraSpec
from lora_nb.families import base, widened
from lora_nb.inference import with_samples
from lora_nb.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_bfloat16(monkeypatch):
    """A CPU whose kernels do not know it, whichever this is."""
    monkeypatch.setattr(widened, "SUPPORTED", False)


def layers():
    yield "linear", nn.Linear(40, 24), (2, 5, 40)
    yield "linear without bias", nn.Linear(24, 40, bias=False), (7, 24)
    yield "convolution", nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 7)
    yield "of stride 2", nn.Conv2d(8, 4, 3, 2, 1, bias=False), (2, 8, 9, 8)
    yield "of groups", nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)
    yield "dilated", nn.Conv2d(8, 4, (3, 1), padding=(2, 0), dilation=(2, 1)), (1, 8, 6, 5)


@pytest.mark.parametrize(
    ("layer", "shape"), [(a, b) for _, a, b in layers()], ids=[n for n, *_ in layers()]
)
def test_numbers_are_the_exact_ones_rounded_once(layer, shape):
    """As near to the exact result as float32's rounding to bfloat16, forward and backward."""
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer), torch.randn(shape).bfloat16()
    nn.init.normal_(layer.weight)
    base.freeze(layer, torch.bfloat16, CPU)
    exact = both(copy.deepcopy(layer).double(), x.double())
    for a, b in zip(both(layer, x), exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16(), atol=1e-3, rtol=2**-7)
        assert (a - b).norm() < 2**-8 * b.norm()


def test_weights_stay_narrow_and_nothing_wide_is_kept_for_the_gradient():
    layer = nn.Linear(64, 64)
    base.freeze(layer, torch.bfloat16, CPU)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64).bfloat16().requires_grad_())
    assert layer.weight.dtype == torch.bfloat16
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]


def test_what_is_merged_or_moved_to_float32_counts():
    layer = nn.Conv2d(4, 4, 3)
    base.freeze(layer, torch.bfloat16, CPU)
    x = torch.randn(1, 4, 6, 6).bfloat16()
    before = both(layer, x)
    layer.weight.data *= 2
    layer.bias.data *= 2
    torch.testing.assert_close(both(layer, x), (2 * before[0], 2 * before[1]), atol=0, rtol=0)
    twin = copy.deepcopy(layer)
    twin.weight.data *= 2
    assert both(layer, x)[1].equal(2 * before[1])
    assert both(twin, x)[1].equal(4 * before[1])
    layer.float()
    assert both(layer, x.float())[0].dtype == torch.float32


def test_others_stay_torchs(monkeypatch):
    reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").bfloat16()
    same, wide = nn.Conv2d(4, 4, 3, padding="same").bfloat16(), nn.Linear(4, 4)
    assert widened.widen(nn.ModuleList([reflecting, same, wide])) == 0
    monkeypatch.setattr(widened, "SUPPORTED", True)
    assert widened.widen(nn.Linear(4, 4).bfloat16()) == 0


class Products(TorchDispatchMode):
    """Counts products with weights, and those in bfloat16."""

    def __init__(self):
        super().__init__()
        self.all, self.narrow = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("mm", "convolution", "linear_pointwise")):
            self.all += 1
            dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
            if torch.bfloat16 in dtypes:
                self.narrow.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fused_lora": False},
        {"base_model_precision": "int8"},
        {"lora": {"unet": LoraSpec(rank=2, target_modules=("conv1", "proj_in", "to_q"))}},
        {"lora": {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2)}},
    ],
    ids=lambda changes: ", ".join(changes) or "as it is",
)
def test_a_run_computes_no_product_in_bfloat16_and_learns_the_same(config, changes):
    """Encoding, steps and a sample picture, compared with a run in float32."""
    losses = {}
    for precision in ("no", "bf16"):
        run = config.replace(mixed_precision=precision, max_train_steps=2, **changes)
        run = run.replace(
            output_dir=f"{config.output_dir}-{precision}",
            learning_rate=1e-3,
            validation_prompts=("a cat",),
            num_validation_images=1,
            num_inference_steps=2,
        )
        with Products() as products:
            losses[precision] = [step.loss for step in with_samples(train(run))]
        assert products.all > 500
        assert not products.narrow
    assert losses["bf16"] == pytest.approx(losses["no"], abs=5e-3)
