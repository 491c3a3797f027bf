"""Full-size flow-matching transformers on the meta device: their published sizes, and what LoRA adds at rank 4."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel

from lora_nb import adapters
from lora_nb.families import REGISTRY

RANK = 4
LATENTS = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16}
TEXT = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}  # T5-XXL; CLIP-L and CLIP-G


def sd3(blocks, **different):
    """Of transformer/config.json: as many heads of 64 as the model is wide."""
    with torch.device("meta"):
        return SD3Transformer2DModel(
            num_layers=blocks, attention_head_dim=64, **LATENTS, **TEXT, **different
        )


def of_linear(inputs, outputs):
    return RANK * (inputs + outputs)


@pytest.mark.parametrize(
    ("blocks", "width", "size", "different"),
    [
        pytest.param(24, 1536, 2_028_328_000, {"pos_embed_max_size": 192}, id="sd3-medium"),
        pytest.param(
            24,
            1536,
            2_243_171_520,
            {
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": tuple(range(13)),
            },
            id="sd3.5-medium",
        ),
        pytest.param(
            38,
            2432,
            8_056_627_520,
            {"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
            id="sd3.5-large",
        ),
    ],
)
def test_stable_diffusion_3(blocks, width, size, different):
    model = sd3(blocks, num_attention_heads=width // 64, caption_projection_dim=width, **different)
    assert sum(p.numel() for p in model.parameters()) == size
    counts = adapters.forecast(model, REGISTRY["sd3"].targets["transformer"], RANK)
    # Query, key, value and output of picture and of text; the last block has no output for text.
    # The second attention of 3.5 medium (attn2) is no target of the reference.
    layers = 8 * blocks - 1
    assert len(counts) == layers
    assert sum(c.parameters for c in counts) == layers * of_linear(width, width)


def test_adapters_of_stable_diffusion_3_at_rank_4():
    assert (8 * 24 - 1) * of_linear(1536, 1536) == 2_347_008  # medium
    assert (8 * 38 - 1) * of_linear(2432, 2432) == 5_895_168  # 3.5 large


@pytest.mark.parametrize(
    ("guidance", "size"),
    [
        pytest.param(True, 11_901_408_320, id="dev"),
        pytest.param(False, 11_891_178_560, id="schnell"),
    ],
)
def test_flux_1(guidance, size):
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56),
        )
    assert sum(p.numel() for p in model.parameters()) == size
    counts = adapters.forecast(model, REGISTRY["flux"].targets["transformer"], RANK)
    width = 24 * 128
    # A double block has 8 attention layers and, for picture and text, 2 of the feed-forward; a single block has
    # query, key and value.
    double = 8 * of_linear(width, width) + 4 * of_linear(width, 4 * width)
    single = 3 * of_linear(width, width)
    assert len(counts) == 19 * 12 + 38 * 3
    assert sum(c.parameters for c in counts) == 19 * double + 38 * single == 11_206_656


def test_z_image():
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30
        )
    assert sum(p.numel() for p in model.parameters()) == 6_154_908_736
    counts = adapters.forecast(model, REGISTRY["z_image"].targets["transformer"], RANK)
    # Query, key, value and output of 30 blocks, and of 2 more each for the picture and for the text alone.
    layers = 4 * (30 + 2 + 2)
    assert len(counts) == layers
    assert sum(c.parameters for c in counts) == layers * of_linear(3840, 3840) == 4_177_920
