"""A UNet in channels_last computes what it does in torch's own layout, and leaves the layout nowhere."""

import pytest
import torch
import torch.nn.functional as F

from lora_nb import channels_last, compiling
from lora_nb.families import load_family, tiny


@pytest.fixture(params=["sd", "sdxl"])
def unet(request, tmp_path):
    """The UNet of a family: one projects tokens by convolutions, the other by linear layers."""
    return load_family(request.param, str(tiny.build(request.param, tmp_path))).unet


def watched(unet):
    """Whether the output of each convolution and attention is in the layout, by name, from the next call on."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen[name] = output.is_contiguous(memory_format=channels_last.LAYOUT)

        return hook

    for name, module in unet.named_modules():
        if type(module).__name__ in ("Conv2d", "Transformer2DModel", "ResnetBlock2D"):
            module.register_forward_hook(note(name))
    return seen


def inputs(unet, sdxl):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    states = {"encoder_hidden_states": normal(2, 7, unet.config.cross_attention_dim)}
    if sdxl:
        pooled = (
            unet.config.projection_class_embeddings_input_dim
            - 6 * unet.config.addition_time_embed_dim
        )
        added = {"text_embeds": normal(2, pooled), "time_ids": torch.ones(2, 6)}
        states["added_cond_kwargs"] = added
    return normal(2, 4, 8, 8), torch.tensor([10, 900]), states


def test_a_unet_stays_in_the_layout_with_the_same_result(unet):
    x, t, states = inputs(unet, unet.config.addition_embed_type is not None)
    x.requires_grad_()

    def result():
        out = unet(x, t, **states).sample
        return out.detach(), torch.autograd.grad(out.square().mean(), x)[0]

    plain = result()
    channels_last.keep(unet)
    seen = watched(unet)
    torch.testing.assert_close(result(), plain, atol=1e-5, rtol=1e-4)
    assert len(seen) > 20
    assert [name for name, kept in seen.items() if not kept] == []
    channels_last.undo(unet)
    assert not any("_get_output_for_continuous_inputs" in vars(m) for m in unet.modules())
    assert all(w.is_contiguous() for w in unet.parameters())
    torch.testing.assert_close(result(), plain, atol=0, rtol=0)


def test_the_library_still_has_the_method_that_is_replaced():
    """Under another name it would silently copy again."""
    from diffusers import Transformer2DModel

    assert hasattr(Transformer2DModel, "_get_output_for_continuous_inputs")


@pytest.mark.parametrize("mean", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_norm_is_torchs(dtype, mean):
    """As near to the exact result in float64 as torch's own, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 12, 9, 5, generator=generator) + mean).to(dtype)
    x = x.to(memory_format=channels_last.LAYOUT).requires_grad_()
    weight, bias = (torch.randn(12, generator=generator).to(dtype) for _ in range(2))
    dy = torch.randn(x.shape, generator=generator).to(dtype)

    def both(norm, *numbers):
        x, weight, bias, dy = numbers
        y = norm(x, 4, weight, bias, 1e-5)
        return y, torch.autograd.grad(y, x, dy)[0]

    numbers = (x, weight, bias, dy)
    exact = both(F.group_norm, *(n.detach().double().requires_grad_() for n in numbers))
    ours, torchs = both(channels_last.group_norm, *numbers), both(F.group_norm, *numbers)
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=channels_last.LAYOUT)
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-4 * c.norm()


def test_a_norm_is_rewritten_only_where_it_pays(monkeypatch):
    """In half precision, with gradients, in the layout; elsewhere it is torch's own, bit for bit."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a: calls.append(1) or f(*a))
    norm = torch.nn.GroupNorm(2, 4).bfloat16().requires_grad_(False)
    forward = compiling._Norm(norm)
    x = torch.randn(1, 4, 6, 6, dtype=torch.bfloat16).to(memory_format=channels_last.LAYOUT)
    torch.testing.assert_close(forward(x), norm(x))
    assert calls == [1]
    with torch.no_grad():
        assert torch.equal(forward(x), norm(x))
    assert torch.equal(forward(x.contiguous()), norm(x))
    assert torch.equal(compiling._Norm(norm.float())(x.float()), norm(x.float()))
    assert calls == [1]
