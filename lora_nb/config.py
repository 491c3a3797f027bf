"""What to train, on what, and how: three frozen dataclasses that are also the JSON of a run and the command-line flags.

Field names are the flag names of the reference text-to-image LoRA script; `flags` makes flags of them. Nothing here
knows about models or pictures.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from lora_nb.errors import ConfigError

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "nearest", "box", "hamming")


def _setting(default: Any, help: str) -> Any:
    """A dataclass field that carries its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoraSpec:
    """The LoRA of one trainable part (the UNet or whatever network a family has, a text encoder).

    Hu et al. 2021, section 4.1: the adapted layer computes W x + (alpha / rank) B A x.
    """

    rank: int = _setting(
        4, "inner dimension of A and B; more rank, more trainable weights (1 to a few hundred)"
    )
    lora_alpha: float | None = _setting(
        None, "scale is alpha / rank; empty means alpha = rank, a scale of 1"
    )
    target_modules: tuple[str, ...] | None = _setting(
        None,
        "name endings of the layers that get LoRA; empty means the family's attention projections",
    )
    lora_dropout: float = _setting(
        0.0, "chance that an input of A is dropped in training (0 to below 1)"
    )
    learning_rate: float | None = _setting(
        None, "this part's own learning rate; empty means the run's"
    )

    @property
    def alpha(self) -> float:
        """Alpha with its default filled in."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def scale(self) -> float:
        """The factor alpha / rank before B A x."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class DataSpec:
    """Which pictures and captions, and how a picture becomes pixels."""

    train_data_dir: str | None = _setting(
        None, "folder of pictures with metadata.jsonl or .txt captions"
    )
    dataset_name: str | None = _setting(
        None, "a data set on the Hub, or a local folder of parquet files"
    )
    dataset_config_name: str | None = _setting(None, "configuration of the Hub data set")
    validation_data_dir: str | None = _setting(
        None,
        "held-out pictures for the probe; empty means the folder's own validation split, if any",
    )
    image_column: str = _setting("image", "column with the picture")
    caption_column: str = _setting("text", "column with the caption or a list of captions")
    max_train_samples: int | None = _setting(None, "use only the first so many pictures")
    resolution: int = _setting(512, "side of the square training picture in pixels")
    center_crop: bool = _setting(False, "crop the centre instead of a random place")
    random_crops: int | None = _setting(
        None,
        "crop in only so many random places, so that latents can be cached; empty draws a new place each time",
    )
    bucket_step: int | None = _setting(
        None,
        "crop to sides that are multiples of this, of about resolution x resolution pixels in the picture's own "
        "aspect ratio (64 is usual); empty crops squares",
    )
    random_flip: bool = _setting(False, "mirror a picture with chance one half")
    image_interpolation_mode: str = _setting("lanczos", f"resampling: {', '.join(INTERPOLATIONS)}")
    caption_dropout: float = _setting(
        0.0, "chance that a caption is replaced by the empty one (0 to 1)"
    )
    instance_prompt: str | None = _setting(
        None, "one caption for all pictures, in place of their own (DreamBooth)"
    )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: base model, adapters, data, objective, optimizer, validation, files."""

    pretrained_model_name_or_path: str | None = _setting(
        None, "base model: a diffusers folder or a Hub name"
    )
    pretrained_vae_model_name_or_path: str | None = _setting(
        None, "another autoencoder for the same latents: a diffusers folder or a Hub name"
    )
    pretrained_prior_model_name_or_path: str | None = _setting(
        None,
        "first stage of a two-stage model whose second one trains; empty means the published one",
    )
    pretrained_decoder_model_name_or_path: str | None = _setting(
        None,
        "second stage of a two-stage model whose first one trains; empty means the published one",
    )
    image_encoder_file: str | None = _setting(
        None, "safetensors file of the picture encoder, for a base model that comes without it"
    )
    family: str = _setting("auto", "model family; auto reads it from the model's own index")
    revision: str | None = _setting(None, "revision of the Hub model")
    variant: str | None = _setting(None, "weight variant of the Hub model, such as fp16")
    lora: dict[str, LoraSpec] = field(
        default_factory=lambda: {"unet": LoraSpec()},
        metadata={"help": "one LoRA for each trained part; unet is the network of any family"},
    )
    data: DataSpec = field(default_factory=DataSpec, metadata={"help": "the pictures"})
    output_dir: str = _setting("sd-model-finetuned-lora", "folder of the run")
    overwrite: bool = _setting(
        False, "start anew where another run already lies, and delete that run"
    )
    seed: int | None = _setting(
        None, "names every random draw; empty means one is drawn and written down"
    )

    train_batch_size: int = _setting(16, "pictures per micro-step and process")
    gradient_accumulation_steps: int = _setting(1, "micro-steps per optimizer step")
    num_train_epochs: int = _setting(100, "passes over the pictures, if max_train_steps is empty")
    max_train_steps: int | None = _setting(None, "optimizer steps; wins over num_train_epochs")
    gradient_checkpointing: bool = _setting(
        False, "recompute activations in backward: less memory, slower"
    )
    mixed_precision: str | None = _setting(
        None, "no, fp16 or bf16 for the frozen weights; adapters stay float32"
    )
    base_model_precision: str | None = _setting(
        None,
        "int8 or nf4 keeps the network's frozen linear layers in 8 or 4 bits: less memory, slower; empty means "
        "mixed_precision's",
    )
    allow_tf32: bool = _setting(False, "TensorFloat-32 matrix products on Ampere and later")
    cache_latents: bool = _setting(True, "encode each picture once; the result is the same")
    cache_to_disk: bool = _setting(
        True, "keep latents and text states in the cache folder, for other runs with the same data"
    )
    fused_lora: bool = _setting(
        True, "q, k and v with their adapters in one product; the result is the same to rounding"
    )
    torch_compile: bool = _setting(
        False,
        "compile the network's repeated blocks in the first step (a minute or two, by a C++ compiler); the result is "
        "the same to rounding",
    )
    cuda_graph: bool = _setting(
        True,
        "on a CUDA GPU, launch the whole step at once where it can be captured; the result is the same to rounding",
    )
    channels_last: bool = _setting(
        True,
        "keep the network's convolutions in the layout its fastest kernels read, on a CUDA GPU, and on a CPU in "
        "bf16 and for sample pictures (there in copies of their weights); the result is the same to rounding",
    )
    fused_kernels: bool = _setting(
        True,
        "on a CUDA GPU in channels_last, compute norms with their activations, and gated activations, by Triton "
        "kernels; the result is the same to rounding",
    )
    offload: bool = _setting(
        False,
        "encode everything first, and keep text encoders and autoencoder out of the GPU's memory while training; the "
        "result is the same",
    )
    dataloader_num_workers: int = _setting(
        0, "accepted for compatibility; batches are made in the training process"
    )

    learning_rate: float = _setting(1e-4, "peak learning rate; LoRA takes 1e-4 to 1e-3")
    scale_lr: bool = _setting(
        False, "multiply the learning rate by batch, accumulation and processes"
    )
    lr_scheduler: str = _setting("constant", f"one of {', '.join(SCHEDULES)}")
    lr_warmup_steps: int = _setting(500, "optimizer steps of linear warm-up (constant has none)")
    lr_num_cycles: int = _setting(1, "hard restarts of cosine_with_restarts")
    lr_power: float = _setting(1.0, "power of polynomial")
    use_8bit_adam: bool = _setting(False, "AdamW with 8-bit moments (needs bitsandbytes and CUDA)")
    adam_beta1: float = _setting(0.9, "decay of AdamW's first moment")
    adam_beta2: float = _setting(0.999, "decay of AdamW's second moment")
    adam_weight_decay: float = _setting(1e-2, "AdamW's decoupled weight decay")
    adam_epsilon: float = _setting(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _setting(
        1.0, "gradients of all adapters together are clipped to this norm"
    )

    prediction_type: str | None = _setting(
        None, "epsilon, v_prediction or sample; empty means the model's own"
    )
    weighting_scheme: str | None = _setting(
        None,
        f"timesteps and weights of flow matching: {', '.join(WEIGHTING_SCHEMES)}; empty means the family's own",
    )
    logit_mean: float | None = _setting(
        None, "mean of logit_normal, 0 if empty; larger means less noise"
    )
    logit_std: float | None = _setting(None, "standard deviation of logit_normal, 1 if empty")
    mode_scale: float | None = _setting(None, "scale of mode, 1.29 if empty")
    precondition_outputs: int | None = _setting(
        None, "1 measures the error of x0, 0 that of the velocity; empty means the family's own"
    )
    max_sequence_length: int | None = _setting(
        None, "tokens of the longest text encoder in training; empty means the family's own"
    )
    training_guidance_scale: float | None = _setting(
        None,
        "what a guidance-distilled model is told in training (its reference script's guidance_scale); empty means 3.5",
    )
    with_prior_preservation: bool = _setting(
        False, "train on pictures of the class too, so that it is not forgotten (DreamBooth)"
    )
    class_data_dir: str | None = _setting(None, "folder of the class pictures")
    class_prompt: str | None = _setting(
        None, "caption of the class pictures, such as a photo of a dog"
    )
    num_class_images: int = _setting(
        100, "class pictures wanted; the base model draws what is missing"
    )
    sample_batch_size: int = _setting(4, "class pictures drawn at a time")
    prior_loss_weight: float = _setting(1.0, "weight of the loss on the class pictures")

    snr_gamma: float | None = _setting(None, "Min-SNR weighting; 5.0 is the paper's value")
    snr_floor: bool = _setting(
        False, "with v_prediction, Min-SNR weights of at least 1: min(SNR, gamma) / SNR + 1"
    )
    noise_offset: float = _setting(
        0.0, "standard deviation of a constant added to each noise channel"
    )

    validation_prompts: tuple[str, ...] = _setting((), "prompts of the sample pictures")
    num_validation_images: int = _setting(4, "pictures per prompt, each with its own fixed seed")
    validation_steps: int | None = _setting(
        None, "optimizer steps between samples; empty means by epochs"
    )
    validation_epochs: int = _setting(1, "epochs between samples, if validation_steps is empty")
    num_inference_steps: int = _setting(30, "denoising steps of a sample")
    guidance_scale: float = _setting(7.5, "classifier-free guidance of a sample")
    guidance_rescale: float = _setting(
        0.0, "guidance rescale of a sample (Lin et al. 2023, section 3.4)"
    )
    probe_steps: int = _setting(
        0, "optimizer steps between probes; 0 means only before and after training"
    )
    probe_size: int = _setting(64, "held-out pictures in the probe")

    checkpointing_steps: int = _setting(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = _setting(
        None, "checkpoints kept besides the best; empty keeps all"
    )
    resume_from_checkpoint: str | None = _setting(
        None, "latest or a checkpoint folder; empty continues the same run if its folder holds one"
    )
    resume_override: tuple[str, ...] = _setting(
        (), "settings that may differ from the run that is continued"
    )
    report_to: str | None = _setting(
        None, "tracker through accelerate: tensorboard, wandb, trackio, or all that are installed"
    )
    logging_dir: str = _setting("logs", "the tracker's folder inside output_dir")
    output_kohya_format: bool = _setting(
        False, "write a Kohya file for ComfyUI and A1111 too, with its certificate, after training"
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """How a sample is drawn, as keywords of `generate` and of a pipeline."""
        return sampling(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Build and check a config; raises ConfigError on unknown keys, wrong types or impossible values."""
        config = _build(cls, values, "")
        config.validate()
        return config

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """The config of a JSON text; raises ConfigError if it is not JSON."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"The config is not JSON (line {error.lineno}: {error.msg})."
            ) from error
        except RecursionError as error:
            raise ConfigError("The config is not JSON (nested too deeply).") from error
        return cls.from_dict(values)

    def validate(self) -> None:
        """Refuse what cannot be trained; raises ConfigError with the field, its value and what is allowed."""
        for name, low in _LOWEST.items():
            _at_least(name, getattr(self, name), low)
        _at_least("resolution", self.data.resolution, 8)
        _at_least("max_train_samples", self.data.max_train_samples, 1)
        _at_least("random_crops", self.data.random_crops, 1)
        _at_least("bucket_step", self.data.bucket_step, 8)
        if self.data.bucket_step and self.data.resolution % self.data.bucket_step:
            raise ConfigError(
                f"resolution is {self.data.resolution}; with buckets it must be a multiple of bucket_step "
                f"({self.data.bucket_step})."
            )
        if self.data.bucket_step and self.with_prior_preservation:
            raise ConfigError(
                "bucket_step and with_prior_preservation cannot be combined: class pictures are square; leave one out."
            )
        _between("caption_dropout", self.data.caption_dropout, 0, 1)
        _one_of("lr_scheduler", self.lr_scheduler, SCHEDULES)
        _one_of("mixed_precision", self.mixed_precision, (None, "no", "fp16", "bf16"))
        _one_of("base_model_precision", self.base_model_precision, (None, "int8", "nf4"))
        if self.torch_compile and self.base_model_precision:
            raise ConfigError(
                "torch_compile and base_model_precision cannot be combined: quantized layers are not compiled; leave "
                "one out."
            )
        _one_of(
            "prediction_type", self.prediction_type, (None, "epsilon", "v_prediction", "sample")
        )
        _one_of("weighting_scheme", self.weighting_scheme, (None, *WEIGHTING_SCHEMES))
        _one_of("precondition_outputs", self.precondition_outputs, (None, 0, 1))
        _one_of("image_interpolation_mode", self.data.image_interpolation_mode, INTERPOLATIONS)
        if not self.lora:
            raise ConfigError(
                "No part gets a LoRA; name at least one in lora, such as {'unet': LoraSpec(rank=4)}."
            )
        if self.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if not getattr(self, name):
                    raise ConfigError(f"with_prior_preservation needs {name}; set it.")
        for part, spec in self.lora.items():
            _at_least(f"rank of {part}", spec.rank, 1)
            _at_least(f"lora_alpha of {part}", spec.lora_alpha, 0, strict=True)
            _at_least(f"learning_rate of {part}", spec.learning_rate, 0, strict=True)
            _between(f"lora_dropout of {part}", spec.lora_dropout, 0, 0.999)
            if spec.target_modules is not None and not spec.target_modules:
                raise ConfigError(
                    f"target_modules of {part} is empty; leave it out for the family's default."
                )

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with some fields changed; a field of DataSpec may be named directly."""
        data_fields = {f.name for f in dataclasses.fields(DataSpec)}
        own = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in own | data_fields:
                raise ConfigError(unknown_setting(name, own | data_fields))
        inner = {k: v for k, v in changes.items() if k in data_fields}
        outer = {k: v for k, v in changes.items() if k in own}
        if inner:
            outer["data"] = dataclasses.replace(outer.get("data", self.data), **inner)
        return dataclasses.replace(self, **outer)


def sampling(settings: Any) -> dict[str, Any]:
    """Number of steps, guidance and guidance rescale of anything that has these three."""
    names = ("num_inference_steps", "guidance_scale", "guidance_rescale")
    return {name: getattr(settings, name) for name in names}


_LOWEST = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "num_class_images": 1,
    "sample_batch_size": 1,
    "prior_loss_weight": 0,
    "max_train_steps": 1,
    "learning_rate": 0,
    "lr_warmup_steps": 0,
    "lr_num_cycles": 1,
    "adam_weight_decay": 0,
    "max_grad_norm": 0,
    "snr_gamma": 0,
    "max_sequence_length": 1,
    "training_guidance_scale": 0,
    "noise_offset": 0,
    "num_validation_images": 1,
    "validation_steps": 1,
    "validation_epochs": 1,
    "num_inference_steps": 1,
    "probe_steps": 0,
    "probe_size": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
}


def _at_least(name: str, value: float | None, low: float, strict: bool = False) -> None:
    if value is None:
        return
    if not (value > low if strict else value >= low):  # also refuses NaN
        raise ConfigError(
            f"{name} is {value}; it must be {'more than' if strict else 'at least'} {low}."
        )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}.")


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        named = ", ".join(str(v) for v in allowed if v is not None)
        raise ConfigError(f"{name} is {value!r}; choose one of {named}.")


def unknown_setting(name: str, known: typing.Iterable[str], where: str = "") -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
    return f"There is no setting {where}{name!r}; {hint}"


def _build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from plain JSON values, refusing unknown keys and wrong types by name."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where or 'The config'} must be an object of settings, not {type(values).__name__}."
        )
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(unknown_setting(name, hints, where))
    return cls(
        **{name: _convert(hints[name], value, where + name) for name, value in values.items()}
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in inner if a is not type(None)), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be an object, not {value!r}.")
        return {key: _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}.")
        return tuple(_convert(inner[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}.")
    return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return out
