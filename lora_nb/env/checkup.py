"""The doctor and the setup: what is here, against what the tests ran on, and what to do about the rest."""

import html
import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_nb.env.folders import data_dir, keep_dir, runs_dir
from lora_nb.env.hardware import Device, gpu_count, pick_device
from lora_nb.env.platforms import hand_over_token, headless, where
from lora_nb.env.presets import Preset, fitting, preset

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
_DISK_GB = 2.0  # room that a run with its checkpoints wants
_RAM_GB = 2.0  # what training on the embedded base wants, libraries included


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
            ("runs", self._runs()),
        ]
        rows += [
            (c.name, c.found if c.ok else f"{c.found}: {c.fix}")
            for c in self.checks
            if _in_table(c)
        ]
        return "\n".join(f"{name:<16} {text}" for name, text in rows)

    def _runs(self) -> str:
        """Where runs lie, and whether they outlive the machine."""
        kept = keep_dir()
        if kept is not None:
            return f"{self.runs}, each checkpoint copied to {kept}"
        lost = "; they end with this machine: mount Drive to keep copies"
        return f"{self.runs}{lost if self.where == 'colab' else ''}"

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
    elsewhere the table says how. Takes seconds, and nothing happens twice if it is called again.
    """
    hand_over_token()
    if where() != "local" and not _torchao().ok:
        import subprocess

        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"], check=True
        )
        importlib.invalidate_caches()
    found = Setup(where(), headless(), pick_device(), preset(), data_dir(), runs_dir(), doctor())
    print(found.table())
    return found


def doctor() -> list[Check]:
    """Look at versions, torchao, device, memory and disk; nothing is changed."""
    checks = [_version(name, *window) for name, window in VERSIONS.items()]
    device = pick_device()
    checks += [_torchao(), _device(device), _memory(device)]
    folder = runs_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    checks.append(
        Check("disk", free >= _DISK_GB, f"{free:.1f} GB free for {runs_dir()}", "free some space")
    )
    return checks


def _device(device: Device) -> Check:
    """A GPU that torch names and cannot use is told here, before the first operation would die."""
    stranded = device.name == "cpu" and bool(device.gpu)
    fix = "choose another accelerator (T4, L4), or go on with the embedded base on the CPU"
    return Check("device", not stranded, f"{device.name}, {device.reason}", fix)


def _memory(device: Device) -> Check:
    import psutil

    ram = psutil.virtual_memory()
    found = f"{ram.available / 2**30:.1f} of {ram.total / 2**30:.1f} GB of RAM free"
    if device.name == "cuda":
        gpus = gpu_count()
        fits = ", ".join(["tiny", *fitting(device.memory_gb)])
        many = f"{gpus} GPUs of " if gpus > 1 else ""
        found += f"; {many}{device.memory_gb:.1f} GB, where by prediction fits: {fits}"
    else:
        found += "; fits: tiny"
    fix = f"training wants {_RAM_GB:.0f} GB, so close other notebooks and programs"
    return Check("memory", ram.available / 2**30 >= _RAM_GB, found, fix)


def _version(name: str, low: str, high: str) -> Check:
    from packaging.version import Version

    # On Colab and Kaggle pip must not touch torch, numpy or the kernel for the sake of one package.
    pip = "pip install" if where() == "local" else "pip install --no-deps"
    fix = f'{pip} "{name}>={low}"'
    try:
        version = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", fix)
    loaded = getattr(sys.modules.get(name), "__version__", str(version))
    if Version(loaded) != version:
        return Check(
            name, False, f"{version} on disk, {loaded} in memory", "restart this notebook's kernel"
        )
    window = f"{version} (at least {low}, tested with {high})"
    if version < Version(low):
        return Check(name, False, window, fix)
    newer = version.release > Version(high).release
    return Check(name, True, f"{window}, newer than tested" if newer else window)


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
