"""Published sizes of the two-stage families on the meta device; the configs are those of the Hub repositories."""

from typing import get_type_hints

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, WuerstchenPriorPipeline

from lora_nb import adapters
from lora_nb.families import REGISTRY
from lora_nb.families.wuerstchen import EffnetEncoder


def sizes(family, module, rank):
    """Number of adapted layers and of their weights, with the family's own targets."""
    targets = next(iter(REGISTRY[family].targets.values()))
    counts = adapters.forecast(module, targets, rank)
    return len(counts), sum(count.parameters for count in counts)


@pytest.mark.parametrize("rank", [4, 16])
def test_kandinsky_decoder(rank):
    """kandinsky-community/kandinsky-2-2-decoder, unet/config.json."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=8,
            block_out_channels=(384, 768, 1152, 1536),
            layers_per_block=3,
            attention_head_dim=64,
            cross_attention_dim=768,
            encoder_hid_dim=1280,
            encoder_hid_dim_type="image_proj",
            addition_embed_type="image",
            addition_embed_type_num_heads=64,
            resnet_time_scale_shift="scale_shift",
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        )
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(1.25e9, rel=0.01)
    # 3 attentions a level down, 4 up, one in the middle; q, k, v, out from C to C, added k, v from 768 to C.
    attentions = {768: 3 + 4, 1152: 3 + 4, 1536: 3 + 4 + 1}
    formula = sum(n * (4 * (c + c) + 2 * (768 + c)) for c, n in attentions.items())
    assert sizes("kandinsky_decoder", unet, rank) == (22 * 6, rank * formula)
    assert 4 * formula == 1_164_288


@pytest.mark.parametrize("rank", [4, 16])
def test_kandinsky_prior(rank):
    """kandinsky-community/kandinsky-2-2-prior, prior/config.json."""
    with torch.device("meta"):
        prior = PriorTransformer(
            num_attention_heads=32,
            attention_head_dim=64,
            num_layers=20,
            embedding_dim=1280,
            num_embeddings=77,
            additional_embeddings=4,
        )
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(1.02e9, rel=0.01)
    formula = 20 * 4 * (2048 + 2048)  # 20 blocks, q, k, v, out, 32 heads of 64
    assert sizes("kandinsky_prior", prior, rank) == (80, rank * formula)
    assert 4 * formula == 1_310_720


@pytest.mark.parametrize("rank", [4, 16])
def test_wuerstchen_prior(rank):
    """warp-ai/wuerstchen-prior, prior/config.json."""
    with torch.device("meta"):
        kind = get_type_hints(WuerstchenPriorPipeline.__init__)["prior"]
        prior = kind(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24)
    assert sum(p.numel() for p in prior.parameters()) == pytest.approx(0.99e9, rel=0.01)
    formula = 32 * 4 * (1536 + 1536)  # 32 blocks, q, k, v, out
    assert sizes("wuerstchen", prior, rank) == (128, rank * formula)
    assert 4 * formula == 1_572_864


def test_efficientnet_v2_s():
    """21,458,488 weights are published for the classifier (torchvision); 1280 x 1000 + 1000 of them are its head."""
    with torch.device("meta"):
        encoder = EffnetEncoder()
        assert encoder(torch.zeros(1, 3, 768, 768)).shape == (1, 16, 24, 24)
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 21_458_488 - 1_281_000
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    for name, shape in {
        "backbone.0.0.weight": (24, 3, 3, 3),
        "backbone.1.0.block.0.0.weight": (24, 24, 3, 3),
        "backbone.2.0.block.1.0.weight": (48, 96, 1, 1),
        "backbone.4.0.block.1.0.weight": (256, 1, 3, 3),
        "backbone.4.0.block.2.fc1.weight": (16, 256, 1, 1),
        "backbone.6.14.block.3.1.running_var": (256,),
        "backbone.7.0.weight": (1280, 256, 1, 1),
        "mapper.0.weight": (16, 1280, 1, 1),
        "mapper.1.running_mean": (16,),
    }.items():
        assert shapes[name] == shape, name
    assert encoder.stride == 32
