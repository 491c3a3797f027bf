"""A UNet in channels_last computes what it does in torch's own layout, and leaves the layout nowhere."""

import pytest
import torch
from diffusers import Transformer2DModel

from lora_nb import channels_last, tokens
from lora_nb.families import load_family, tiny


@pytest.fixture(params=["sd", "sdxl"])
def unet(request, tmp_path):
    """The UNet of a family: one projects tokens by convolutions, the other by linear layers."""
    return load_family(request.param, str(tiny.build(request.param, tmp_path))).unet


def watched(unet, layout=channels_last.LAYOUT):
    """Whether the output of each convolution and attention is in the layout, by name, from the next call on."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen[name] = output.is_contiguous(memory_format=layout)

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
    tokens.project(unet)
    seen = watched(unet)
    torch.testing.assert_close(result(), plain, atol=1e-5, rtol=1e-4)
    assert len(seen) > 20
    assert [name for name, kept in seen.items() if not kept] == []
    channels_last.undo(unet)
    # In torch's own layout too they are the library's numbers, and leave that layout nowhere.
    seen = watched(unet, torch.contiguous_format)
    torch.testing.assert_close(result(), plain, atol=1e-5, rtol=1e-4)
    assert [name for name, kept in seen.items() if not kept] == []
    tokens.undo(unet)
    assert not any(name in vars(m) for m in unet.modules() for name in tokens.REPLACED)
    assert all(w.is_contiguous() for w in unet.parameters())
    torch.testing.assert_close(result(), plain, atol=0, rtol=0)


def test_the_library_still_has_the_methods_that_are_replaced():
    """Under another name it would silently copy again."""
    assert all(hasattr(Transformer2DModel, name) for name in tokens.REPLACED)
