"""Export a LoRA to another program's form and prove it: read the file into a fresh model and compare with what was.

The proof is made twice, with our reader and with diffusers' own, at fixed noise, and is kept as JSON beside the file.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from packaging.version import Version

from lora_nb import adapters, checkpoint, env, formats, rng, run_state
from lora_nb.config import TrainConfig
from lora_nb.errors import CheckpointError, ConfigError, FormatError
from lora_nb.families import Batch, Family, family_of, load_family, network
from lora_nb.families._imports import quiet
from lora_nb.families.quantized import kind_of
from lora_nb.files import write_atomically
from lora_nb.inference.attach import adapter_names, remove_adapter, use_adapter
from lora_nb.precision import DTYPES
from lora_nb.run_folder import CONFIG, read_config

Outputs = dict[str, torch.Tensor]  # by name: the prediction and the text states

FORMATS = ("diffusers", "kohya")
SUFFIX = ".certificate.json"  # in place of .safetensors
SEED = 20_261_123  # the same latents, noise and timestep in every certificate
LIBRARIES = ("diffusers", "peft", "transformers", "torch", "safetensors")
CAPTIONS = ("", "a drawing of a fox")
# Of the largest output: float32 rounding, where scale was multiplied into B; half precision rounds every
# weight, so there it is a share of the adapter's effect.
LIMITS = {"fp32": 1e-6, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Reading:
    """What one reader made of the file.

    difference: largest absolute difference of the network's outputs and text states to the trained model's.
    weights: the same of scale B A over all layers. missing: trained layers that it did not load. refused: its error.
    """

    reader: str
    difference: float = float("inf")
    weights: float = float("inf")
    missing: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Certificate:
    """The round trip of one file.

    effect: how much the adapter changes the outputs of the base; output: the largest of them; both absolute.
    modules: (part, layer, rank, alpha, scale) as trained. limit: what a difference may be, see `holds`.
    """

    file: str
    sha256: str
    format: str
    dtype: str
    base: str
    effect: float
    output: float
    limit: float
    modules: tuple[tuple[str, str, int, float, float], ...]
    readings: tuple[Reading, ...]
    versions: dict[str, str]

    @property
    def holds(self) -> bool:
        """Whether every reader loaded every layer and is within the limit."""
        return all(
            not r.refused and not r.missing and r.difference <= self.limit for r in self.readings
        )

    def table(self) -> str:
        """Plain text: the verdict, a line per reader, and ranks and scales by part."""
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        lines = [
            f"{Path(self.file).name}: {self.format} {self.dtype}, {len(self.modules)} layers, round trip {verdict} "
            f"(limit {self.limit:.1e}; the adapter itself changes outputs by {self.effect:.3g})"
        ]
        for r in self.readings:
            said = r.refused or (
                f"outputs differ by {r.difference:.1e}, scale B A by {r.weights:.1e}, "
                f"{len(r.missing)} layers not loaded"
            )
            lines.append(f"  read by {r.reader}: {said}")
        for part in dict.fromkeys(m[0] for m in self.modules):
            rows = [m for m in self.modules if m[0] == part]
            spread = (sorted({f"{m[i]:g}" for m in rows}) for i in (2, 3, 4))
            ranks, alphas, scales = (", ".join(values) for values in spread)
            lines.append(
                f"  {part}: {len(rows)} layers, rank {ranks}, alpha {alphas}, scale {scales}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it, with the verdict."""
        return json.dumps(dataclasses.asdict(self) | {"holds": self.holds}, indent=1)

    @classmethod
    def beside(cls, file: str | Path) -> "Certificate | None":
        """The certificate kept beside a LoRA file; None if there is none for these very bytes."""
        kept = _place(Path(file))
        if not kept.is_file():
            return None
        values = json.loads(kept.read_text(encoding="utf-8"))
        del values["holds"]
        values["modules"] = tuple(map(tuple, values["modules"]))
        values["readings"] = tuple(
            Reading(**r | {"missing": tuple(r["missing"])}) for r in values["readings"]
        )
        certificate = cls(**values)
        return certificate if certificate.sha256 == _sha256(Path(file)) else None


def export(
    source: str | Path,
    output: str | Path,
    format: str = "kohya",
    model: str | None = None,
    dtype: str = "fp32",
    **stages: str | None,
) -> Certificate:
    """Convert a LoRA file of any readable form, or a run's, and certify the result; returns the certificate.

    format: kohya or diffusers. model: the base it was trained on; a run's file knows its own. dtype: fp32, fp16 or bf16
    (Kohya only). The certificate lies beside the output as .certificate.json. stages: as for `load_pipeline`.
    Raises ConfigError for an unknown format or dtype, FormatError for what has no exact form there; then nothing is
    written, and nothing is left if the proof fails.
    """
    output = Path(output)
    if format not in FORMATS or dtype not in formats.DTYPES:
        raise ConfigError(
            f"format is {format!r} and dtype {dtype!r}; choose of {', '.join(FORMATS)} and {', '.join(formats.DTYPES)}."
        )
    if format == "diffusers" and dtype != "fp32":
        raise ConfigError("A diffusers file is written in fp32; leave out the dtype.")
    if output.suffix != ".safetensors":
        raise ConfigError(f"The output {output} must end in .safetensors.")
    path = formats.adapter_file(source)
    if output.resolve() == path.resolve():
        raise ConfigError(f"The output is the source {path}; give another name.")
    model, config = _origin(path, model)
    if config:
        stages = {"revision": config.revision, "variant": config.variant} | stages
    family = load_family("auto", model, **stages)
    use_adapter(family.pipeline(), path)
    kept = {k: v for k, v in formats.read_header(path)[0].items() if k == "trigger"}
    if format == "kohya":
        formats.save_kohya(family, output, formats.DTYPES[dtype], config, kept)
    else:
        formats.save_diffusers(family, output, kept)
    certificate = certify(family, output, model, dtype, **stages)
    if not certificate.holds:
        output.unlink()
        raise FormatError(f"The file was not kept: {certificate.table()}")
    return certificate


def _origin(path: Path, model: str | None) -> tuple[str, TrainConfig | None]:
    """The base model of a LoRA file, as given or as its run tells, and the run's config if it lies beside it."""
    config = read_config(path.parent) if (path.parent / CONFIG).is_file() else None
    model = model or (config and config.pretrained_model_name_or_path)
    model = model or formats.read_header(path)[0].get("base_model")
    if not model:
        raise ConfigError(f"{path.name} does not say which base model it is for; give it as model.")
    return str(model), config


def certify(
    family: Family, file: str | Path, model: str, dtype: str = "fp32", **stages: str | None
) -> Certificate:
    """Compare a written file with the trained family that it was written from; the JSON lies beside the file.

    family: with the trained adapter on. model: its base, loaded a second time for the comparison.
    """
    trained, wanted = _outputs(family), formats.weights_of_modules(family.trainable)
    like = {"dtype": family.dtype, "device": str(family.device)}
    kind = kind_of(network(family))
    fresh = load_family("auto", model, base_model_precision=kind, **like, **stages)
    return _proved(Path(file), model, dtype, trained, wanted, fresh)


def certify_run(folder: str | Path) -> Certificate:
    """Compare a run's own adapter file with the weights that its newest checkpoint was trained to.

    The base model is loaded twice, one after the other: with the checkpoint's weights in the adapters, and fresh for
    the file. The certificate lies beside the file. Raises CheckpointError if there is no run, checkpoint or file.
    """
    folder, config = Path(folder), read_config(folder)
    saved, file = checkpoint.latest(folder), folder / formats.FILE_NAME
    if saved is None or not file.is_file():
        raise CheckpointError(
            f"There is no {'adapter file' if saved else 'checkpoint'} in {folder}, so nothing to compare; train there."
        )
    load = partial(
        family_of, config, DTYPES[config.mixed_precision or "no"], env.pick_device().name
    )
    family = load()
    adapters.add(family, adapters.named(family, config.lora))
    adapters.load_state(family, run_state.adapter_weights(saved.tensors))
    trained, wanted = _outputs(family), formats.weights_of_modules(family.trainable)
    del family  # only one of the two is in memory
    model = str(config.pretrained_model_name_or_path)
    return _proved(file, model, "fp32", trained, wanted, load())


def _proved(
    file: Path,
    model: str,
    dtype: str,
    trained: Outputs,
    wanted: formats.Weights,
    fresh: Family,
) -> Certificate:
    """The file, read into a fresh base by each reader, against outputs and weights as trained."""
    base = _outputs(fresh)
    pipeline = fresh.pipeline()
    readers = {"lora_nb": lambda: use_adapter(pipeline, file)}
    if hasattr(pipeline, "load_lora_weights") and not _misread(file, fresh):
        readers["diffusers"] = lambda: pipeline.load_lora_weights(
            file.parent, weight_name=file.name
        )
    readings = []
    for name, read in readers.items():
        try:
            with quiet():
                read()
        except (FormatError, ValueError, KeyError, IndexError, RuntimeError) as error:
            readings.append(Reading(name, refused=f"refused: {str(error).splitlines()[0][:200]}"))
        else:
            found = formats.weights_of_modules(fresh.trainable, adapter_names(pipeline)[0])
            readings.append(_compared(name, trained, _outputs(fresh), wanted, found))
        remove_adapter(pipeline)
    modules = tuple(
        (part, layer, pair.rank, pair.alpha, pair.scale)
        for part, pairs in wanted.items()
        for layer, pair in pairs.items()
    )
    effect, output = _apart(trained, base), max(float(v.abs().max()) for v in trained.values())
    certificate = Certificate(
        file=file.name,
        sha256=_sha256(file),
        format=formats.inspect(file).format,
        dtype=dtype,
        base=Path(model).name,
        effect=effect,
        output=output,
        limit=LIMITS[dtype] * (max(1.0, output) if dtype == "fp32" else effect),
        modules=modules,
        readings=tuple(readings),
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    write_atomically(_place(file), certificate.to_json())
    return certificate


def _misread(file: Path, family: Family) -> bool:
    """Whether this diffusers cannot read the file's text encoders: before 0.42 it looks for the file's `text_model`
    in a text encoder from which transformers 5.6 took it out, and stops at an index."""
    if Version(importlib.metadata.version("diffusers")) >= Version("0.42"):
        return False
    flat = any(
        part.startswith("text_encoder") and not hasattr(module, "text_model")
        for part, module in family.trainable.items()
    )
    return flat and any("text_model" in name for name in formats.read_header(file)[1])


def _place(file: Path) -> Path:
    return file.with_suffix(SUFFIX)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def _outputs(family: Family) -> Outputs:
    """The network's prediction and the text states at fixed pictures, noise and timestep, float32 on the CPU."""
    side, n = family.resolution, len(CAPTIONS)
    pixels = rng.normal((3, side, side), SEED, "pixels", range(n)).clamp(-1, 1)
    moments, states = family.moments(pixels), family.picture_states(pixels)
    blank = Batch.of_captions(list(CAPTIONS), side, SEED)
    batch = dataclasses.replace(blank, moments=moments, picture_states=states)
    x_t = rng.normal(moments[0].shape[1:], SEED, "latents", range(n)).to(family.device)
    t = family.objective.sample_t(torch.full((n,), 0.5))
    outputs = {"prediction": family.predict(x_t, t, family.condition(batch))}
    if family.tokenizer is not None:
        outputs |= family.text_states(list(CAPTIONS))
    return {name: value.float().cpu() for name, value in outputs.items()}


def _compared(
    name: str, trained: Outputs, read: Outputs, wanted: formats.Weights, found: formats.Weights
) -> Reading:
    missing, largest = [], 0.0
    for part, pairs in wanted.items():
        for layer, pair in pairs.items():
            other = found.get(part, {}).get(layer)
            if other is None:
                missing.append(f"{part}.{layer}")
            else:
                largest = max(largest, float((pair.delta() - other.delta()).abs().max()))
    return Reading(name, _apart(trained, read), largest, tuple(missing))


def _apart(a: Outputs, b: Outputs) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)
