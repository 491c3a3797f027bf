"""Adapters: start, freeze, count, scale, remove; published sizes on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_nb import adapters
from lora_nb.config import LoraSpec
from lora_nb.errors import ConfigError
from lora_nb.families import REGISTRY, load_family

BOTH = {"unet": LoraSpec(rank=4), "text_encoder": LoraSpec(rank=2, lora_alpha=8)}


@pytest.fixture
def family(tiny_sd):
    return load_family("auto", str(tiny_sd))


def outputs(family):
    g = torch.Generator().manual_seed(0)
    states = family.text_states(["a red apple"])["encoder_hidden_states"]
    x = torch.randn(1, 4, 8, 8, generator=g)
    return family.predict(
        x, torch.tensor([300]), {"encoder_hidden_states": states}
    ).detach(), states.detach()


def stir(family):
    """Give B some weight, as training would."""
    for part, weights in adapters.parameters(family).items():
        for i, weight in enumerate(weights):
            g = torch.Generator().manual_seed(i)
            weight.data = torch.randn(weight.shape, generator=g) * 0.1
        assert part in BOTH


def test_a_fresh_adapter_changes_nothing(family):
    before = outputs(family)
    adapters.add(family, BOTH)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(family), strict=True))


def test_start_values_follow_the_reference(family):
    adapters.add(family, {"unet": LoraSpec(rank=4)})
    a = torch.cat(
        [layer.lora_A["default"].weight.flatten() for _, layer in adapters.layers(family.unet)]
    )
    b = torch.cat(
        [layer.lora_B["default"].weight.flatten() for _, layer in adapters.layers(family.unet)]
    )
    assert abs(a.std() - 1 / 4) < 0.02
    assert b.abs().max() == 0


def test_start_values_are_named_by_the_seed(tiny_sd):
    def start(seed):
        family = load_family("auto", str(tiny_sd))
        torch.rand(seed + 3)  # the global stream must not matter
        adapters.add(family, BOTH, seed=seed)
        return adapters.state(family)["unet"]

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_only_adapters_train_and_in_float32(tiny_sd):
    family = load_family("auto", str(tiny_sd), dtype=torch.bfloat16)
    adapters.add(family, BOTH)
    for module in family.trainable.values():
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    assert set(adapters.parameters(family)) == set(BOTH)


def test_disabled_is_the_base_and_comes_back(family):
    before = outputs(family)
    adapters.add(family, BOTH)
    stir(family)
    changed = outputs(family)
    assert all(not torch.allclose(a, b) for a, b in zip(before, changed, strict=True))
    with adapters.disabled(family):
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(family), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(changed, outputs(family), strict=True))


def test_scale_zero_is_the_base_and_one_is_as_trained(family):
    before = outputs(family)
    adapters.add(family, BOTH)
    stir(family)
    changed = outputs(family)
    adapters.set_scale(family, 0.0)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(before, outputs(family), strict=True)
    )
    adapters.set_scale(family, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(changed, outputs(family), strict=True))
    adapters.set_scale(family, {"text_encoder": 0.0})
    assert torch.allclose(before[1], outputs(family)[1], atol=1e-6)


def test_remove_gives_the_base_back(family):
    before = outputs(family)
    adapters.add(family, BOTH)
    stir(family)
    adapters.remove(family)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(family), strict=True))
    assert not any(list(adapters.layers(module)) for module in family.trainable.values())
    adapters.add(family, BOTH)  # and a new one can be added


def test_state_goes_out_and_in(family, tiny_sd):
    adapters.add(family, BOTH)
    stir(family)
    other = load_family("auto", str(tiny_sd))
    adapters.add(other, BOTH, seed=9)
    adapters.load_state(other, adapters.state(family))
    assert all(torch.equal(a, b) for a, b in zip(outputs(family), outputs(other), strict=True))


def test_strength_is_the_norm_of_the_change(family):
    adapters.add(family, BOTH)
    assert all(change == 0 for _, _, change, _ in adapters.strength(family))
    stir(family)
    rows = {(part, name): (change, base) for part, name, change, base in adapters.strength(family)}
    name, layer = next(adapters.layers(family.text_encoder))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert rows["text_encoder", name][0] == pytest.approx((4.0 * b @ a).norm().item(), rel=1e-5)
    assert rows["text_encoder", name][1] == pytest.approx(
        layer.base_layer.weight.norm().item(), rel=1e-5
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_forecast_is_what_peft_adds(family, part):
    counts = adapters.forecast(family.trainable[part], family.targets[part], rank=3)
    adapters.add(family, {part: LoraSpec(rank=3)})
    added = adapters.parameters(family)[part]
    assert sum(c.parameters for c in counts) == sum(p.numel() for p in added)
    assert len(counts) * 2 == len(added)
    assert (
        adapters.forecast(family.trainable[part], family.targets[part], rank=3) == counts
    )  # also with one on


def test_forecast_of_convolutions_is_what_peft_adds(family):
    targets = ("conv1", "proj_in", "to_q")
    counts = adapters.forecast(family.unet, targets, rank=2)
    assert {c.kind for c in counts} == {"Conv2d", "Linear"}
    adapters.add(family, {"unet": LoraSpec(rank=2, target_modules=targets)})
    assert sum(c.parameters for c in counts) == sum(
        p.numel() for p in adapters.parameters(family)["unet"]
    )


def test_wrong_parts_and_targets_are_refused_before_anything_is_added(family):
    with pytest.raises(ConfigError, match="no trainable part 'vae'"):
        adapters.add(family, {"vae": LoraSpec()})
    with pytest.raises(ConfigError, match="'to_qq'"):
        adapters.add(family, {"unet": LoraSpec(target_modules=("to_q", "to_qq"))})
    assert not adapters.has_adapter(family.unet)


def test_published_sizes_of_stable_diffusion_15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
            cross_attention_dim=768,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    for rank, size in ((4, 797_184), (16, 3_188_736), (64, 12_754_944)):
        counts = adapters.forecast(unet, ("to_k", "to_q", "to_v", "to_out.0"), rank)
        assert (len(counts), sum(c.parameters for c in counts)) == (128, size)
    counts = adapters.forecast(text, ("q_proj", "k_proj", "v_proj", "out_proj"), 4)
    assert sum(c.parameters for c in counts) == 294_912
    assert adapters.file_size(counts) == 4 * 294_912


def test_published_sizes_of_stable_diffusion_xl():
    sdxl = REGISTRY["sdxl"].targets
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
            )
        )
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    for rank, size in ((4, 5_806_080), (16, 23_224_320), (64, 92_897_280)):
        counts = adapters.forecast(unet, sdxl["unet"], rank)
        assert (len(counts), sum(c.parameters for c in counts)) == (560, size)
    counts = adapters.forecast(second, sdxl["text_encoder_2"], 4)
    assert sum(c.parameters for c in counts) == 1_310_720
