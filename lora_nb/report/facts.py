"""The facts of a run in words and numbers, fit to be shown to others. How they look is in `page` and `card`."""

import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nb import inference
from lora_nb.config import TrainConfig
from lora_nb.formats import FILE_NAME, KOHYA_FILE
from lora_nb.redaction import public
from lora_nb.run_folder import read_config, read_history

GALLERY = 4  # prompts whose pictures the card shows
PACKAGES = ("lora_nb", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Python and package versions, as installed now."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # the package itself, run from a checkout
            continue
    return found


@dataclass(frozen=True)
class Licence:
    """What stands beside data or model: the name in its card and the text of its LICENSE file."""

    name: str = ""
    text: str = ""

    @classmethod
    def beside(cls, folder: str | None) -> "Licence":
        """Empty for a Hub name or a folder without licence."""
        place = Path(folder or "")
        if folder is None or not place.is_dir():
            return cls()
        card = place / "README.md"
        named = re.search(r"^license:\s*(\S.*?)\s*$", _read(card), re.MULTILINE)
        texts = [_read(file) for file in sorted(place.glob("LICEN[SC]E*")) if file.is_file()]
        return cls(named[1] if named else "", "\n\n".join(texts).strip())

    @property
    def stated(self) -> str:
        """The licence in words, for a table."""
        if self.name:
            return self.name
        return (
            "in its LICENSE file"
            if self.text
            else "not stated beside it; find out before you share"
        )


@dataclass(frozen=True)
class Run:
    folder: Path
    config: TrainConfig
    history: list[dict[str, Any]]
    samples: dict[str, list[Path]]
    base_licence: Licence
    data_licence: Licence
    certificates: tuple[inference.Certificate, ...]
    repo_id: str | None = None  # where the run is shared; empty means by its folder

    @classmethod
    def read(cls, folder: str | Path, repo_id: str | None = None) -> "Run":
        config = read_config(folder)
        files = (Path(folder) / name for name in (FILE_NAME, KOHYA_FILE))
        kept = [inference.Certificate.beside(file) for file in files if file.is_file()]
        return cls(
            folder=Path(folder),
            config=config,
            history=read_history(folder),
            samples=inference.samples(folder),
            base_licence=Licence.beside(config.pretrained_model_name_or_path),
            data_licence=Licence.beside(config.data.train_data_dir),
            certificates=tuple(c for c in kept if c is not None),
            repo_id=repo_id,
        )

    @property
    def certificate(self) -> inference.Certificate | None:
        """Of the adapter itself."""
        return next((c for c in self.certificates if c.file == FILE_NAME), None)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def base(self) -> str:
        return public(self.config.pretrained_model_name_or_path)

    @property
    def base_is_local(self) -> bool:
        return Path(self.config.pretrained_model_name_or_path or "").is_dir()

    @property
    def data(self) -> str:
        return public(self.config.data.train_data_dir or self.config.data.dataset_name)

    @property
    def seeds(self) -> int:
        return self.config.num_validation_images

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.history if event["event"] == kind]

    @property
    def start(self) -> dict[str, Any]:
        """The run's own description of itself; empty if it never began."""
        return next(iter(self.events("start") + self.events("resume")), {})

    @property
    def steps(self) -> int:
        return max((event["step"] for event in self.events("step")), default=0)

    def what(self) -> str:
        """What was trained on what."""
        parts = " and ".join(
            f"rank {spec.rank} on the {part}" for part, spec in self.config.lora.items()
        )
        pictures = f"{self.start['pictures']} pictures of " if "pictures" in self.start else ""
        planned = self.start.get("max_train_steps", self.steps)
        stopped = f" of {planned}" if self.steps < planned else ""
        return f"A LoRA ({parts}) for {self.base}, trained on {pictures}{self.data} for {self.steps}{stopped} steps."

    def result(self) -> str:
        """The last probe in one sentence, with how far it can be trusted."""
        probes = [probe for probe in self.events("probe") if probe["step"] > 0]
        if not probes:
            return (
                "Not measured: there were no held-out pictures, or training did not reach a probe."
            )
        last = max(probes, key=lambda probe: probe["step"])
        change, error = last["difference"], last["standard_error"]
        direction = "lower" if change < 0 else "higher"
        verdict = (
            "within two standard errors, so it may be chance"
            if abs(change) < 2 * error
            else f"{abs(change) / error:.1f} standard errors"
        )
        return (
            f"On {last['n']} held-out pictures the loss with the adapter is {abs(change):.4f} {direction} than "
            f"the base model's {last['base']:.4f} (standard error {error:.4f}: {verdict}; 95 % interval of the "
            f"difference {change - 1.96 * error:+.4f} to {change + 1.96 * error:+.4f})."
        )

    def trigger(self) -> str:
        """The words with which every caption ends: what a prompt needs to call the adapter."""
        captions = [words for words in self._captions() if words]
        if len(captions) < 2:
            return ""
        shared: list[str] = []
        for words in zip(*(reversed(caption) for caption in captions), strict=False):
            if len(set(words)) > 1:
                break
            shared.insert(0, words[0])
        return " ".join(shared)

    def _captions(self) -> Iterable[list[str]]:
        folder, column = (
            Path(self.config.data.train_data_dir or ""),
            self.config.data.caption_column,
        )
        for place in (folder / "train", folder):
            for line in _read(place / "metadata.jsonl").splitlines():
                caption = json.loads(line).get(column, "") if line.strip() else ""
                yield caption.split() if isinstance(caption, str) else []

    def last_samples(self) -> list[Path]:
        """The newest set that the adapter drew."""
        sets = [files for label, files in self.samples.items() if label != "base"]
        return sets[-1] if sets else []

    def drawn(self, prompt: str, base: bool = False) -> Path | None:
        """The first picture of a prompt in the newest set, or in the base model's; None if there is none."""
        label = "base" if base else next(reversed(self.samples), "base")
        place = self.config.validation_prompts.index(prompt) * self.seeds
        files = self.samples.get(label, [])
        return files[place] if place < len(files) else None

    def gallery(self) -> dict[str, list[Path]]:
        """One picture for each of the first prompts, of the base model and of the last set, by label."""
        ends = [label for label in self.samples if label == "base"] + list(self.samples)[-1:]
        return {
            label: self.samples[label][:: self.seeds][:GALLERY] for label in dict.fromkeys(ends)
        }

    def prompt(self) -> str:
        return (
            self.config.validation_prompts[0]
            if self.config.validation_prompts
            else self.trigger() or "a picture"
        )

    def snippet(self) -> str:
        """Ten lines that draw a picture with the adapter."""
        config = self.config
        rescale = (
            f", guidance_rescale={config.guidance_rescale:g}" if config.guidance_rescale else ""
        )
        base, folder, prompt = (
            json.dumps(t) for t in (self.base, self.repo_id or public(self.folder), self.prompt())
        )
        return "\n".join(
            (
                "import torch",
                "from diffusers import DiffusionPipeline",
                "",
                f"pipeline = DiffusionPipeline.from_pretrained({base})",
                f'pipeline.load_lora_weights({folder}, weight_name="{FILE_NAME}")',
                f"settings = dict(num_inference_steps={config.num_inference_steps}, "
                f"guidance_scale={config.guidance_scale:g}{rescale})",
                "generator = torch.Generator().manual_seed(0)",
                f"picture = pipeline({prompt}, generator=generator, **settings).images[0]",
                'picture.save("picture.png")',
            )
        )

    def _seeds(self) -> str:
        first = self.config.seed or 0
        return f"seed {first}" if self.seeds == 1 else f"seeds {first} to {first + self.seeds - 1}"

    def cost(self) -> dict[str, str]:
        steps = self.events("step")
        seconds = sum(step["seconds"] for step in steps)
        drawing = sum(event["seconds"] for event in self.events("samples"))
        ends = self.events("end") + self.events("stop")
        processor = sum(event.get("cpu_seconds", 0.0) for event in ends)
        rows = {
            "training": f"{seconds:.0f} s for {len(steps)} steps ({seconds / max(len(steps), 1):.2f} s each)",
            "samples": f"{drawing:.0f} s",
            "CPU time": f"{processor:.0f} s, samples included" if processor else "not recorded",
            "energy": "not measured",
            "pictures seen": f"{steps[-1]['images_seen']:,}" if steps else "0",
            "trainable weights": f"{self.start.get('parameters', 0):,}",
            "device": f"{self.start.get('device', 'unknown')}, {self.start.get('dtype', 'unknown')}",
        }
        file = self.folder / FILE_NAME
        return rows | (
            {"adapter file": f"{file.stat().st_size / 1e6:.2f} MB"} if file.is_file() else {}
        )

    def settings(self) -> dict[str, str]:
        """The settings that shape the result."""
        config, rows = self.config, {}
        for part, spec in config.lora.items():
            rate = config.learning_rate if spec.learning_rate is None else spec.learning_rate
            targets = (
                ", ".join(spec.target_modules) if spec.target_modules else "the family's default"
            )
            rows[f"LoRA of {part}"] = (
                f"rank {spec.rank}, alpha {spec.alpha:g}, dropout {spec.lora_dropout:g}, learning rate {rate:g}, "
                f"target modules: {targets}"
            )
        return rows | {
            "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} micro-steps",
            "resolution": f"{config.data.resolution} px",
            "schedule": f"{config.lr_scheduler}, {self.start.get('max_train_steps', self.steps)} steps",
            "precision": config.mixed_precision or "float32",
            "prediction type": config.prediction_type or "the base model's own",
            "Min-SNR gamma": "off" if config.snr_gamma is None else f"{config.snr_gamma:g}",
            "caption dropout": f"{config.data.caption_dropout:g}",
            "seed": str(config.seed),
            "sampling": f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}, "
            f"rescale {config.guidance_rescale:g}, {self._seeds()}",
        }


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
