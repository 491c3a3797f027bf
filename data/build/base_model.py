"""The parts of the embedded base: tokenizer, text encoder, UNet, scheduler, and its files.

The layout is the one of Stable Diffusion, so `StableDiffusionPipeline.from_pretrained` reads it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from drawings import concepts, good_concepts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 256
MERGES = 2600
MAX_TOKENS = 32  # the pipeline pads every prompt to this length, and so does pretraining
# Words of styles that are learned later (ink, clay) are left to pieces that are trained.
STYLE_WORDS = ("noto", "blob", "twemoji", "classic", "flat", "emoji")
COMMON_WORDS = """
a an the of in on with and or to at by for from red green blue yellow orange purple pink brown
black white gray grey big small little old new happy sad angry funny cute tall short round
square one two three four five style drawing picture photo painting sketch colorful simple
shaded line art cartoon
""".split()


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learned from the names and keywords of all concepts.

    The vocabulary is built as CLIP's is: 256 bytes, the same bytes at the end of a word, the
    merges, two special tokens. So every text can be written, known words in one or two tokens.
    """
    blank = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    corpus = [word for word in (*COMMON_WORDS, *STYLE_WORDS) for _ in range(40)]
    good = set(good_concepts())
    for concept in concepts().values():
        corpus += [concept.name] * (6 if concept.slug in good else 1)
        corpus.append(" ".join(concept.keywords))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + MERGES,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in _merges(learner)][:MERGES]
    words = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Attention stands on all three levels: a LoRA on attention must reach the finest one too."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        # By an old quirk of diffusers this argument is the number of heads: here 64 wide each.
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Zero terminal SNR: the last timestep is pure noise, so sampling starts where training was.

    `clip_sample` must stay off, because latents are not limited to [-1, 1].
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # not used by trailing spacing, but the pipeline warns without it
    )


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write float16 weights in shards below 20 MB, then swap folders; other files stay."""
    temporary = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(temporary, max_shard_size="18MB")
    # transformers loads in the dtype that the configuration names, diffusers in float32: without
    # this line the pipeline would mix the two.
    config = temporary / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    pipe.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
    for path in temporary.rglob("*.safetensors"):
        path.chmod(0o644)
    if folder.exists():
        for kept in ("README.md", "LICENSE", "measured.json"):
            if (folder / kept).exists():
                shutil.copy2(folder / kept, temporary / kept)
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
