"""A UNet whose norms and activations are computed together: torch's numbers, and nothing of it left afterwards."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D

from lora_nb import adapters, channels_last, fusing
from lora_nb.config import LoraSpec
from lora_nb.families import load_family, tiny
from lora_nb.trainer import train

gpu = pytest.mark.gpu


class Torchs(fusing.Torchs):
    """What the kernels compute, on any device; `calls` counts the kinds of them."""

    def __init__(self):
        self.calls = {}

    def _note(self, *kind):
        self.calls[kind] = self.calls.get(kind, 0) + 1

    def takes(self, x):
        return x.dtype == torch.float32

    def group_norm(self, x, groups, weight, bias, eps, shift=None, silu=False):
        self._note("norm", shift is not None, silu)
        assert x.is_contiguous(memory_format=channels_last.LAYOUT)
        assert shift is None or not shift.requires_grad
        return super().group_norm(x, groups, weight, bias, eps, shift, silu)

    def add(self, x, y, bias):
        self._note("add")
        assert all(each.is_contiguous(memory_format=channels_last.LAYOUT) for each in (x, y))
        return super().add(x, y, bias)

    def gated_gelu(self, x):
        self._note("gate")
        return super().gated_gelu(x)


def numbers(unet):
    """Input, timesteps and conditions of a tiny UNet, the same each time."""
    weight, generator = next(unet.parameters()), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(weight)

    states = {"encoder_hidden_states": normal(2, 7, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": normal(2, pooled), "time_ids": torch.ones(2, 6).to(weight)}
        states["added_cond_kwargs"] = added
    return normal(2, 4, 8, 8), torch.tensor([10, 900], device=weight.device), states


def result(unet):
    """A UNet's output and the gradient at its input."""
    x, t, states = numbers(unet)
    y = unet(x.requires_grad_(), t, **states).sample
    return y.detach(), torch.autograd.grad(y.float().square().mean(), x)[0]


@pytest.fixture(params=["sd", "sdxl"])
def family(request, tmp_path):
    return load_family(request.param, str(tiny.build(request.param, tmp_path)))


@pytest.fixture
def unet(family):
    return family.unet.requires_grad_(False)


def forwards_of(unet):
    """What hides the forward of its class, by module: on some CPUs a frozen layer's products do."""
    return {m: vars(m)["forward"] for m in unet.modules() if "forward" in vars(m)}


def of_type(unet, kind):
    return [module for module in unet.modules() if isinstance(module, kind)]


def test_a_fused_unet_computes_the_same_and_is_undone(unet):
    plain, torchs, own = result(unet), Torchs(), forwards_of(unet)
    blocks, gates = of_type(unet, ResnetBlock2D), of_type(unet, GEGLU)
    norms = of_type(unet, torch.nn.GroupNorm)
    assert fusing.fuse(unet, torchs) == len(blocks) + len(gates) + len(norms)
    torch.testing.assert_close(result(unet), plain, atol=1e-5, rtol=1e-4)
    assert torchs.calls == {
        ("norm", False, True): len(blocks),
        ("norm", True, True): len(blocks),
        ("norm", False, False): len(norms) - 2 * len(blocks),
        ("gate",): len(gates),
        ("add",): len(blocks),
    }
    again = copy.deepcopy(unet)
    assert forwards_of(unet) != own
    fusing.undo(unet)
    assert forwards_of(unet) == own
    torch.testing.assert_close(result(unet), plain, atol=0, rtol=0)
    torchs.calls.clear()
    torch.testing.assert_close(
        result(again), plain, atol=1e-5, rtol=1e-4
    )  # the copy runs its own layers


def test_what_the_kernels_do_not_take_runs_as_it_is(unet):
    plain, torchs = result(unet.double()), Torchs()
    fusing.fuse(unet, torchs)
    torch.testing.assert_close(result(unet), plain, atol=0, rtol=0)
    assert not torchs.calls


def test_adapters_on_fused_layers_learn_as_on_others(family):
    """On convolutions, the time embedding and the gated layers, put there before or taken away after."""
    names = ["conv1", "conv2", "time_emb_proj", "ff.net.0.proj", "to_q"]

    unet = family.unet

    def gradients(fused):
        adapters.remove(family)
        spec = LoraSpec(rank=2, target_modules=names)
        adapters.add(family, adapters.named(family, {"unet": spec}), seed=0)
        if fused:
            fusing.fuse(unet, torchs)
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        generator = torch.Generator().manual_seed(1)
        for weight in weights:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
        x, t, states = numbers(unet)
        unet(x, t, **states).sample.square().mean().backward()
        return [weight.grad for weight in weights]

    torchs = Torchs()
    plain = gradients(False)
    assert len(plain) > 30
    torch.testing.assert_close(gradients(True), plain, atol=1e-6, rtol=1e-4)
    # What learns is not left to the kernels, which give no gradient for it: their shift here is what is left of it, 0.
    assert ("add",) in torchs.calls  # of a block's bias past its two convolutions
    adapters.remove(family)
    bare = result(unet.requires_grad_(False))
    fusing.undo(unet)
    torch.testing.assert_close(result(unet), bare, atol=1e-5, rtol=1e-4)


def test_blocks_of_another_make_are_left_alone():
    """What a block does besides norms and convolutions is the library's to do."""
    make = {"in_channels": 32, "temb_channels": 16}
    others = (
        {"time_embedding_norm": "scale_shift"}, {"up": True}, {"down": True}, {"dropout": 0.1}, {"temb_channels": None},
        {"non_linearity": "gelu"}, {"output_scale_factor": 2.0}, {"skip_time_act": True, "out_channels": 16},
    )  # fmt: skip
    for changes in others:
        block = ResnetBlock2D(**(make | changes), groups=4).requires_grad_(False).eval()
        x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
        temb = None if block.time_emb_proj is None else temb
        plain, torchs = block(x, temb), Torchs()
        assert fusing.fuse(block, torchs) == 2, changes  # its norms
        torch.testing.assert_close(block(x, temb), plain, atol=1e-5, rtol=1e-4)
        assert torchs.calls == {("norm", False, False): 2}


def test_a_decoder_of_another_make_learns_the_same(config, tmp_path):
    """Kandinsky's blocks scale and shift after a norm, and its attention norms tokens."""
    base = str(tiny.build("kandinsky_decoder", tmp_path / "base"))
    config = config.replace(pretrained_model_name_or_path=base, family="kandinsky_decoder")
    plain, torchs = [step.loss for step in train(config)], Torchs()
    training = train(config.replace(overwrite=True))
    fusing.fuse(training.family.unet, torchs)
    assert [step.loss for step in training] == pytest.approx(plain, rel=1e-4)
    assert set(torchs.calls) == {("norm", False, False)}


def test_norms_of_tokens_are_torchs():
    norm, torchs = torch.nn.GroupNorm(2, 8), Torchs()
    x = torch.randn(2, 8, 5)
    plain = norm(x)
    fusing.fuse(norm, torchs)
    assert torch.equal(norm(x), plain)
    assert not torchs.calls


def test_without_a_working_triton_nothing_changes_but_a_warning(unet, monkeypatch):
    own = forwards_of(unet)
    monkeypatch.setitem(sys.modules, "lora_nb.kernels", None)
    fusing._working.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="fused kernels do not work here .* fused_kernels=False"
        ):
            assert fusing.fuse(unet) == 0
        assert forwards_of(unet) == own
    finally:
        fusing._working.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_compute_something_else_are_refused(monkeypatch, dtype):
    class Wrong(Torchs):
        def gated_gelu(self, x):
            return 1.1 * super().gated_gelu(x)

    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    fusing._try(Torchs(), dtype)
    with pytest.raises(RuntimeError, match=r"differ from torch's by 1\.0e-01"):
        fusing._try(Wrong(), dtype)


def pictures(dtype, shape, mean, generator):
    x = (3 * torch.randn(shape, generator=generator) + mean).to(dtype).cuda()
    return x.to(memory_format=channels_last.LAYOUT)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 12, 9, 5), 4), ((1, 32, 1, 1), 8), ((2, 320, 64, 64), 32), ((1, 2560, 8, 8), 32), ((1, 80, 160, 144), 8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_norm_is_as_exact_as_torchs(dtype, shape, groups, mean):
    """Against float64, forward and backward, with and without shift and SiLU; and equal each time it is computed."""
    from lora_nb import kernels

    generator = torch.Generator().manual_seed(0)
    x, dy = pictures(dtype, shape, mean, generator), pictures(dtype, shape, 0, generator)
    weight, bias = (torch.randn(shape[1], generator=generator).to(dtype).cuda() for _ in range(2))
    added = torch.randn(shape[:2], generator=generator).to(dtype).cuda()

    def torchs(x, weight, bias, dy, silu):
        x = x.detach().requires_grad_()
        y = F.group_norm(x, groups, weight, bias, 1e-5)
        y = F.silu(y) if silu else y
        return y, torch.autograd.grad(y, x, dy)[0]

    for shift in (None, added):
        for silu in (False, True):
            moved = x if shift is None else x + shift[:, :, None, None]
            exact = torchs(*(n.double() for n in (moved, weight, bias, dy)), silu)
            theirs = torchs(moved, weight, bias, dy, silu)
            leaf = x.detach().requires_grad_()

            def ours(leaf=leaf, shift=shift, silu=silu):
                y = kernels.group_norm(leaf, groups, weight, bias, 1e-5, shift, silu)
                return y, torch.autograd.grad(y, leaf, dy)[0]

            found = ours()
            assert found[0].dtype == dtype
            assert all(n.is_contiguous(memory_format=channels_last.LAYOUT) for n in found)
            for a, b, c in zip(found, theirs, exact, strict=True):
                assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-5 * c.norm()
            assert all(torch.equal(a, b) for a, b in zip(found, ours(), strict=True))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 7, 34), (2, 4096, 2560), (300_000, 12)], ids=str)
def test_a_gate_is_as_exact_as_torchs(dtype, shape):
    from lora_nb import kernels

    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator)).to(dtype).cuda()
    dy = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator).to(dtype).cuda()

    def by(gated, x, dy):
        x = x.detach().requires_grad_()
        y = gated(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    torchs = fusing.Torchs.gated_gelu
    exact, theirs = by(torchs, x.double(), dy.double()), by(torchs, x, dy)
    for a, b, c in zip(by(kernels.gated_gelu, x, dy), theirs, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-6 * c.norm()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_is_torchs_to_rounding(dtype):
    from lora_nb import kernels

    generator = torch.Generator().manual_seed(0)
    x, y = (pictures(dtype, (2, 80, 7, 9), 0, generator).requires_grad_() for _ in range(2))
    bias = torch.randn(80, generator=generator).to(dtype).cuda()
    found, exact = kernels.add(x, y, bias), fusing.Torchs.add(x.double(), y.double(), bias.double())
    torch.testing.assert_close(found, exact.to(dtype))
    slopes = torch.autograd.grad(found.square().sum(), (x, y))
    assert torch.equal(*slopes)
    torch.testing.assert_close(slopes[0], 2 * found)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_on_a_gpu_computes_the_same(unet, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    unet = unet.to("cuda", dtype)
    channels_last.keep(unet)
    plain = result(unet)
    assert fusing.fuse(unet) > 10
    half = dtype == torch.bfloat16
    torch.testing.assert_close(
        result(unet), plain, atol=3e-2 if half else 1e-4, rtol=5e-2 if half else 1e-3
    )


@gpu
def test_a_training_on_a_gpu_uses_the_kernels_and_learns_the_same(config):
    def losses(name, **changes):
        run = config.replace(output_dir=f"{config.output_dir}-{name}", max_train_steps=12)
        training = train(run.replace(**changes))
        found = [step.loss for step in training]
        modules = training.family.unet.modules()
        return found, sum(isinstance(vars(m).get("forward"), fusing._Fused) for m in modules)

    (ours, fused), (theirs, none) = losses("ours"), losses("theirs", fused_kernels=False)
    assert fused > 10
    assert none == 0
    assert losses("contiguous", channels_last=False)[1] == 0
    assert ours == pytest.approx(theirs, abs=1e-4)
