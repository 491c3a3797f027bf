"""Tiny base models of random weights, for tests and benchmarks: real classes and tokenizers, a second to build."""

import json
import string
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PriorTransformer,
    SD3Transformer2DModel,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lora_nb.errors import ModelError
from lora_nb.families._imports import (
    FluxPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
    ZImagePipeline,
    quiet,
)
from lora_nb.families.wuerstchen import ENCODER_FILE, EffnetEncoder


def build(
    family: str,
    folder: str | Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write a random pipeline of the family into `folder` (diffusers layout, at most 2 MB) and return the folder.

    prediction_type: of the diffusion families. options: of the builder, t5 and guidance.
    """
    if family not in BUILDERS:
        raise ModelError(f"There is no tiny {family!r}; choose one of {', '.join(BUILDERS)}.")
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        BUILDERS[family](folder, prediction_type, **options).save_pretrained(folder)
    return folder


def _clip_tokenizer(folder: Path, length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every character is a token, so every text can be said."""
    characters = sorted(ByteLevel.alphabet())
    words = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def _clip_text(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def _t5_tokenizer(length: int = 16) -> T5TokenizerFast:
    """A T5 tokenizer whose words are single characters."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation]
    words = ["<pad>", "</s>", "<unk>", "\u2581", *characters]
    scored = [(word, 0.0 if word[1:] else -2.0) for word in words]
    return T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=length)


def _t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config)


def _unet(**different: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | different)


def _vae(latent_channels: int = 4, **different: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **different,
    )


def _shifted_vae() -> AutoencoderKL:
    """The autoencoder of the flow families: a shift, and no convolutions around the latents."""
    return _vae(
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    zero_snr = prediction_type == "v_prediction"
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        clip_sample=False,
        set_alpha_to_one=not zero_snr,
        steps_offset=1,
    )


def _sd(folder: Path, prediction_type: str) -> StableDiffusionPipeline:
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(folder: Path, prediction_type: str) -> StableDiffusionXLPipeline:
    tokenizers = [_clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    unet = _unet(
        cross_attention_dim=64,  # both encoders side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip_text(tokenizers[0]),
        text_encoder_2=_clip_text(tokenizers[1], CLIPTextModelWithProjection),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=_scheduler(prediction_type),
        add_watermarker=False,
    )


def _sd3(folder: Path, _: str, t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizers = [_clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [_clip_text(tokenizer, CLIPTextModelWithProjection) for tokenizer in tokenizers]
    width = 72  # more than both CLIP encoders side by side
    third = _t5_tokenizer() if t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        vae=_shifted_vae(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=_t5(third, width) if t5 else None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=third,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(folder: Path, _: str, guidance: bool = True) -> FluxPipeline:
    first, second = _clip_tokenizer(folder / "tokenizer"), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,  # 4 latent channels in patches of 2 by 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        vae=_shifted_vae(),
        text_encoder=_clip_text(first),
        text_encoder_2=_t5(second, 32),
        tokenizer=first,
        tokenizer_2=second,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
        ),
    )


def _z_image(folder: Path, _: str) -> ZImagePipeline:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        {word: i for i, word in enumerate(words)},
        extra_special_tokens=marks[1:],
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    )
    encoder = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=(4, 6, 6),
    )
    return ZImagePipeline(
        vae=_shifted_vae(),
        text_encoder=Qwen3Model(encoder),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def _kandinsky_first_stage(folder: Path) -> KandinskyV22PriorPipeline:
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=32,
        num_embeddings=tokenizer.model_max_length,
    )
    torch.nn.init.normal_(prior.clip_mean, std=0.2)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 1.5)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    size = {"height": vision.image_size, "width": vision.image_size}
    return KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=_clip_text(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size),
    )


def _kandinsky_second_stage(prediction_type: str = "epsilon") -> KandinskyV22Pipeline:
    unet = _unet(
        out_channels=8,  # noise and variance
        attention_head_dim=8,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    movq = VQModel(
        block_out_channels=(32, 32),  # its spatial norm has groups of 32
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
        sample_size=16,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
        variance_type="learned_range",
    )
    return KandinskyV22Pipeline(unet=unet, movq=movq, scheduler=scheduler)


def _kandinsky_decoder(folder: Path, prediction_type: str) -> KandinskyV22Pipeline:
    _kandinsky_first_stage(folder / "prior").save_pretrained(folder / "prior")
    return _kandinsky_second_stage(prediction_type)


def _kandinsky_prior(folder: Path, _: str) -> KandinskyV22PriorPipeline:
    _kandinsky_second_stage().save_pretrained(folder / "decoder")
    return _kandinsky_first_stage(folder)


def _wuerstchen(folder: Path, _: str) -> WuerstchenPriorPipeline:
    sizes = {
        "stages": [(True, 1, 1, 8, 1), (True, 2, 2, 8, 2), (False, 2, 2, 16, 1)],
        "stem": 8,
        "features": 16,
        "outputs": 4,
    }
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    kind = get_type_hints(WuerstchenPriorPipeline.__init__)["prior"]
    encoder = EffnetEncoder(**sizes)
    torch.nn.init.constant_(encoder.mapper[1].weight, 1e5)  # random layers say next to nothing
    save_file(
        encoder.state_dict(),
        folder / ENCODER_FILE,
        metadata={"encoder": json.dumps(sizes)},
    )
    prior = kind(c_in=4, c=16, c_cond=32, c_r=8, depth=2, nhead=2)
    # The network divides by |1 - b| of its last layer's b, so a large random b near 1 would explode.
    prior.out[1].weight.data *= 0.1
    prior.out[1].bias.data *= 0.1
    _wuerstchen_second_stage(folder / "decoder").save_pretrained(folder / "decoder")
    return WuerstchenPriorPipeline(
        tokenizer=tokenizer,
        text_encoder=_clip_text(tokenizer),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
    )


def _wuerstchen_second_stage(folder: Path) -> WuerstchenDecoderPipeline:
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    # diffusers moves these two classes about; the pipeline knows where they are.
    kinds = get_type_hints(WuerstchenDecoderPipeline.__init__)
    decoder = kinds["decoder"](
        c_cond=32,
        c_hidden=[16, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=32,
        c_r=8,
    )
    # These start at or near zero, where the picture does not show what the first stage says.
    torch.nn.init.normal_(decoder.clf[1].weight, std=0.05)
    for block in (block for blocks in decoder.up_blocks for block in blocks):
        if hasattr(block, "channelwise"):
            torch.nn.init.normal_(block.channelwise[-1].weight, std=0.1)
    vqgan = kinds["vqgan"](bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)
    return WuerstchenDecoderPipeline(
        tokenizer=tokenizer,
        text_encoder=_clip_text(tokenizer),
        decoder=decoder,
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan,
    )


BUILDERS = {
    "sd": _sd,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "z_image": _z_image,
    "kandinsky_decoder": _kandinsky_decoder,
    "kandinsky_prior": _kandinsky_prior,
    "wuerstchen": _wuerstchen,
}
