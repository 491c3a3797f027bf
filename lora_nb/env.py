"""Where we run: platform, device, dtype and its reason, folders, presets, and the doctor.

The only module that knows Colab or Kaggle. Heavy libraries are imported inside functions, so
that importing this is fast.
"""

import dataclasses
import html
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nb.config import DataSpec, LoraSpec, TrainConfig, sampling, unknown_setting
from lora_nb.errors import ConfigError, ModelError

# The floor in pyproject.toml, and the version in constraints/cpu-lock.txt that the tests run on.
VERSIONS = {
    "torch": ("2.6", "2.13.0"),
    "diffusers": ("0.39", "0.42.1"),
    "transformers": ("5.6", "5.23.0"),
    "peft": ("0.18", "0.21.2"),
    "accelerate": ("1.12", "1.15.0"),
    "datasets": ("4.0", "5.2.0"),
    "huggingface_hub": ("1.20", "2.4.0"),
}
TORCHAO_FLOOR = "0.16"  # peft 0.19 and later refuse to add an adapter beside an older torchao
_REPO = Path(__file__).resolve().parents[1]
_DISK_GB = 2.0  # room that a run with its checkpoints wants


def where() -> str:
    """The platform: "colab", "kaggle" or "local"."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def headless() -> bool:
    """True where no person looks on: LORA_NB_HEADLESS=1, CI, Kaggle's batch runs, no kernel."""
    if os.environ.get("LORA_NB_HEADLESS", "0") != "0" or os.environ.get("CI"):
        return True
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return not hasattr(shell, "kernel")


# Device


@dataclass(frozen=True)
class Device:
    """A device name for torch, the dtype for frozen weights, and why."""

    name: str
    dtype: str
    reason: str
    gpu: str
    memory_gb: float


def _runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether torch has kernels for a GPU: same major and no newer minor, or PTX to compile."""
    major, minor = capability
    for arch in architectures:
        kind, _, number = arch.partition("_")
        if not number.isdigit():  # sm_90a and the like bind to one chip
            continue
        built = int(number[:-1]), int(number[-1])
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return False


def pick_device() -> Device:
    """The best device that really runs, with the dtype its hardware supports.

    torch says that a T4 supports bfloat16 (it emulates it) and that a P100 is available (its
    kernels are not in the build), so both are decided by compute capability here.
    """
    import psutil
    import torch

    ram = psutil.virtual_memory().total / 2**30
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        major, minor = torch.cuda.get_device_capability(0)
        if not _runs_on((major, minor), torch.cuda.get_arch_list()):
            why = f"float32: on the CPU, as this torch has no kernels for {gpu} (sm_{major}{minor})"
            return Device("cpu", "float32", why, gpu, ram)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        if major >= 8:
            return Device(
                "cuda",
                "bfloat16",
                f"bfloat16: {gpu} is sm_{major}{minor}, which has it",
                gpu,
                memory,
            )
        why = f"float16: {gpu} is sm_{major}{minor}, and bfloat16 in hardware begins with sm_80"
        return Device("cuda", "float16", why, gpu, memory)
    if torch.backends.mps.is_available():
        return Device(
            "mps",
            "float32",
            "float32: half precision is not reliable on Apple's GPUs",
            "Apple",
            ram,
        )
    return Device("cpu", "float32", "float32: no GPU here, and the CPU is exact in it", "", ram)


# Folders


def data_dir() -> Path:
    """The folder of the embedded base model and pictures; raises ModelError if it is not found.

    Looked for in LORA_NB_DATA, beside the package, and upwards from the working directory.
    """
    if chosen := os.environ.get("LORA_NB_DATA"):
        candidates = [Path(chosen)]
    else:
        here = Path.cwd()
        candidates = [folder / "data" for folder in (_REPO, here, *here.parents)]
    for folder in candidates:
        if (folder / "base" / "model_index.json").is_file():
            return folder
    raise ModelError(
        f"No embedded base model in {candidates[0]}; work in a clone of the repository or set "
        "LORA_NB_DATA to its data folder."
    )


def runs_dir() -> Path:
    """The folder of all runs: LORA_NB_RUNS, mounted Drive, Kaggle's working folder, else runs/."""
    if chosen := os.environ.get("LORA_NB_RUNS"):
        return Path(chosen)
    if where() == "colab":
        drive = Path("/content/drive/MyDrive")
        return drive / "lora_nb" / "runs" if drive.is_dir() else Path("/content/runs")
    if where() == "kaggle":
        return Path("/kaggle/working/runs")
    return (_REPO if (_REPO / "pyproject.toml").is_file() else Path.cwd()) / "runs"


def cache_dir() -> Path:
    """The folder of what can be computed again: LORA_NB_CACHE, else lora_nb in the user's cache folder."""
    return Path(os.environ.get("LORA_NB_CACHE") or Path.home() / ".cache" / "lora_nb")


def run_dir(name: str) -> Path:
    """The folder of one run, not created here; ConfigError on a name that is not one folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(
            f"A run's name is one folder name, not {name!r}; choose one such as 'my-style'."
        )
    return runs_dir() / name


def need(path: Path | str, notebook: str) -> Path:
    """The path, if it exists; else ConfigError with the name of the notebook that makes it."""
    if not Path(path).exists():
        raise ConfigError(f"There is no {path} yet: run {notebook} first, it writes this.")
    return Path(path)


# Presets


@dataclass(frozen=True)
class Preset:
    """The one dial: a base model with pictures, size, steps and precision for the hardware."""

    name: str
    family: str
    model: str
    data: str
    resolution: int
    train_batch_size: int
    max_train_steps: int
    learning_rate: float
    rank: int
    mixed_precision: str | None
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    reason: str
    gradient_checkpointing: bool = False
    adam_weight_decay: float = TrainConfig.adam_weight_decay

    @property
    def sampling(self) -> dict[str, Any]:
        """How a sample is drawn, as keywords of `generate` and of a pipeline."""
        return sampling(self)

    def config(self, run: str, **changes: Any) -> TrainConfig:
        """The training config of this preset for the run of that name.

        `changes` are fields of TrainConfig, DataSpec, or LoraSpec (then of the UNet's LoRA); None
        keeps the preset's value. Raises ConfigError on an unknown field or an impossible value.
        """
        own = {f.name for f in dataclasses.fields(TrainConfig)}
        data = {f.name for f in dataclasses.fields(DataSpec)}
        lora = {f.name for f in dataclasses.fields(LoraSpec)} - own
        for name in changes:
            if name not in own | data | lora:
                raise ConfigError(unknown_setting(name, own | data | lora))
        changes = {name: value for name, value in changes.items() if value is not None}
        spec = {"rank": self.rank} | {k: v for k, v in changes.items() if k in lora}
        config = TrainConfig(
            pretrained_model_name_or_path=self.model,
            family=self.family,
            lora={"unet": LoraSpec(**spec)},
            data=DataSpec(train_data_dir=self.data, resolution=self.resolution),
            output_dir=str(run_dir(run)),
            seed=0,
            train_batch_size=self.train_batch_size,
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            adam_weight_decay=self.adam_weight_decay,
            **self.sampling,
        ).replace(**{k: v for k, v in changes.items() if k not in lora})
        config.validate()
        return config


_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_KANDINSKY = "kandinsky-community/kandinsky-2-2"
# By family: base model, resolution, denoising steps and guidance of a sample, AdamW's weight decay. Learning rate and
# weight decay are the reference scripts' (1e-4 for all), sampling is the pipelines' default or the model card's.
_LARGE = {
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024, 30, 5.0, 1e-2),
    "sd3": ("stabilityai/stable-diffusion-3.5-medium", 1024, 40, 4.5, 1e-4),
    "flux": ("black-forest-labs/FLUX.1-dev", 512, 28, 3.5, 1e-4),
    "z_image": ("Tongyi-MAI/Z-Image", 1024, 50, 5.0, 1e-4),
    "kandinsky_decoder": (f"{_KANDINSKY}-decoder", 512, 30, 4.0, 0.0),
    "kandinsky_prior": (f"{_KANDINSKY}-prior", 224, 30, 4.0, 0.0),  # its image encoder sees 224
    "wuerstchen": ("warp-ai/wuerstchen-prior", 768, 12, 4.0, 0.0),
}
PRESETS = ("tiny", "sd15", *_LARGE)


def preset(name: str = "auto") -> Preset:
    """A preset by name; "auto" picks by hardware and network and says why in `reason`.

    Raises ConfigError on a name that no preset has.
    """
    if name == "auto":
        name, reason = _choose()
    else:
        reason = "chosen by name"
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; choose auto, {', '.join(PRESETS)}.")
    ink = str(data_dir() / "ink")
    if name == "tiny":
        base = str(data_dir() / "base")
        return Preset("tiny", "sd", base, ink, 128, 8, 200, 2e-3, 8, None, 25, 3.0, 0.7, reason)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(pick_device().dtype)
    if name == "sd15":
        return Preset("sd15", "sd", _SD15, ink, 512, 4, 500, 1e-4, 8, half, 30, 7.5, 0.0, reason)
    model, resolution, steps, guidance, decay = _LARGE[name]
    rest = (resolution, 1, 500, 1e-4, 8, half, steps, guidance, 0.0, reason, True, decay)
    return Preset(name, name, model, ink, *rest)


def _choose() -> tuple[str, str]:
    """The preset for this machine and one clause that says why."""
    device = pick_device()
    if device.name != "cuda":
        return (
            "tiny",
            f"the embedded base model, because there is no usable CUDA GPU ({device.reason})",
        )
    if device.memory_gb < 7:
        return (
            "tiny",
            f"the embedded base model, because sd15 wants 8 GB and {device.gpu} has less",
        )
    if not _reachable(_SD15):
        return (
            "tiny",
            f"the embedded base model, because {_SD15} is neither in the cache nor within reach",
        )
    return "sd15", f"{_SD15}, because {device.gpu} has {device.memory_gb:.0f} GB"


def _reachable(model: str) -> bool:
    """Whether a Hub model is in the local cache, or the Hub answers within three seconds."""
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "model_index.json"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return httpx.head(
            f"{constants.ENDPOINT}/{model}", timeout=3, follow_redirects=True
        ).is_success
    except httpx.HTTPError:
        return False


# Doctor and setup


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, if it is fine, what was found, and what to do if not."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Setup:
    """What `setup` found; `table()` is the text that it printed."""

    where: str
    headless: bool
    device: Device
    preset: Preset
    data: Path
    runs: Path
    checks: list[Check]

    def table(self) -> str:
        """The findings as plain text, one line each; problems follow with what to do."""
        device = self.device
        rows = [
            (
                "where",
                f"{self.where}, Python {platform.python_version()}"
                + (", headless" if self.headless else ""),
            ),
            (
                "device",
                f"{device.name}, {device.memory_gb:.1f} GB"
                + (f", {device.gpu}" if device.gpu else ""),
            ),
            ("dtype", device.reason),
            ("preset", f"{self.preset.name}: {self.preset.reason}"),
            ("data", str(self.data)),
            ("runs", str(self.runs)),
        ]
        rows += [
            (c.name, c.found if c.ok else f"{c.found}: {c.fix}")
            for c in self.checks
            if _in_table(c)
        ]
        return "\n".join(f"{name:<16} {text}" for name, text in rows)

    def __repr__(self) -> str:
        bad = [c.name for c in self.checks if not c.ok]
        verdict = f"look at {', '.join(bad)}" if bad else "all checks passed"
        return f"Setup({self.where}, {self.device.name}, {verdict})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"


def _in_table(check: Check) -> bool:
    return not check.ok or check.name in VERSIONS


def setup() -> Setup:
    """Get ready to work: print one table of platform, device, folders and versions, and return it.

    On Colab and Kaggle an old torchao, which stops peft from adding adapters, is uninstalled;
    elsewhere the table says how.
    """
    if where() == "kaggle":
        _kaggle_token()
    if where() != "local" and not _torchao().ok:
        import subprocess

        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"], check=True
        )
    found = Setup(where(), headless(), pick_device(), preset(), data_dir(), runs_dir(), doctor())
    print(found.table())
    return found


def doctor() -> list[Check]:
    """Look at versions, torchao, the device and the disk; nothing is changed."""
    checks = [_version(name, *window) for name, window in VERSIONS.items()]
    device = pick_device()
    stranded = device.name == "cpu" and bool(device.gpu)
    fix = "choose another accelerator (T4, L4), or go on with the embedded base on the CPU"
    checks += [_torchao(), Check("device", not stranded, f"{device.name}, {device.reason}", fix)]
    folder = runs_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    checks.append(
        Check("disk", free >= _DISK_GB, f"{free:.1f} GB free for {runs_dir()}", "free some space")
    )
    return checks


def _version(name: str, low: str, high: str) -> Check:
    from packaging.version import Version

    try:
        version = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f'pip install "{name}>={low}"')
    window = f"{version} (at least {low}, tested with {high})"
    if version < Version(low):
        return Check(name, False, window, f'pip install "{name}>={low}"')
    return Check(
        name,
        True,
        window if version.release <= Version(high).release else f"{window}, newer than tested",
    )


def _torchao() -> Check:
    """An old torchao makes peft refuse every adapter, although nothing here uses it."""
    from packaging.version import Version

    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return Check("torchao", True, "not installed, and not needed")
    old = Version(version) < Version(TORCHAO_FLOOR)
    return Check(
        "torchao",
        not old,
        version,
        "peft refuses to add adapters beside it, so run: pip uninstall -y torchao",
    )


def _kaggle_token() -> None:
    """Hand Kaggle's HF_TOKEN secret to the Hub client, which finds Colab's by itself."""
    from kaggle_secrets import BackendError, UserSecretsClient

    try:
        os.environ.setdefault("HF_TOKEN", UserSecretsClient().get_secret("HF_TOKEN"))
    except BackendError:
        return
