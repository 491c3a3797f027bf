"""Colab's versions in an environment of their own, and the course and the tests on them.

python scripts/platforms.py            the setup cell, all notebooks, and all quick tests of the package
python scripts/platforms.py --short    the setup cell, notebooks 00, 02 and the board of 03, and the tests of what meets
                                       other libraries
python scripts/platforms.py --build    the environment only

torch and whatever is not in constraints/colab-*.txt are shared with the environment that runs this. Nothing is
installed into that one.
"""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RECORD = REPO / "constraints" / "colab-2026.08.txt"
PLACE = REPO / "build" / "platforms" / "colab"
PYTHON = PLACE / "bin" / "python"
# Of the record: the kernel with its widgets, the libraries of this project, and what these are made for.
TAKEN = (
    "accelerate datasets diffusers huggingface_hub ipykernel ipython ipywidgets matplotlib numpy peft pillow tornado "
    "traitlets transformers wandb"
).split()
# What those need and the record does not tell, or the newer ones beside them need no longer.
BESIDE = (
    "jupyter_client==7.4.9 tokenizers==0.22.2 backcall decorator entrypoints ipython_genutils nest_asyncio pickleshare "
    "sentry_sdk"
).split()
# The tracker that asks for an older pillow than the lock's, with what it needs to write (no server's extras).
TRACKIO = (
    "trackio==0.43.0 gradio_client==2.7.2 brotli==1.2.1 orjson==3.13.0 python-multipart==0.0.34 starlette==1.10.0 "
    "uvicorn==0.54.0"
).split()
# Adapters, files of every form, pipelines, the doctor, widgets, trackers; and which of these tests cost more than they
# show here.
SHORT = (
    "test_adapters test_formats test_formats_reading test_formats_kohya test_inference test_env test_panel test_board "
    "test_widgets test_trackers"
).split()
COSTLY = "other_families or after_a_kill or tensorboard or wandb or second_loop or does_not_start"


def build() -> None:
    """Make the environment, once for each state of the record."""
    wanted = pins()
    mark, text = PLACE / "pins.txt", "\n".join([*wanted, sys.prefix])
    if mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return
    print(f"Setting up {PLACE.relative_to(REPO)} (once)", flush=True)
    subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(PLACE)], check=True
    )
    pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet"]
    quick = ["--disable-pip-version-check", "--no-deps", "--no-compile"]
    subprocess.run([*pip, *quick, *wanted], check=True)
    shared = [str(REPO), sysconfig.get_paths()["purelib"]]
    (packages() / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    mark.write_text(text, encoding="utf-8")


def pins() -> list[str]:
    """What is installed, as pip takes it."""
    lines = RECORD.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("==")[0] in TAKEN] + BESIDE + TRACKIO


def packages() -> Path:
    """Where the environment's own packages lie."""
    (found,) = PLACE.glob("lib/python*/site-packages")
    return found


def legs(short: bool) -> dict[str, list[str]]:
    """The commands by name: notebooks are run by this environment's pytest on that one's kernel, tests by its own."""
    pytest = ["-m", "pytest", "-p", "no:cacheprovider"]
    quick = "not slow and not long and not property and not platforms"
    colab = "platforms and not slow" if short else "platforms"
    if short:
        files = ["-k", f"not ({COSTLY})", *(f"tests/{name}.py" for name in SHORT)]
    else:
        files = ["tests", "--ignore=tests/browser", "--ignore=tests/test_project.py"]
    return {
        "setup cell and notebooks": [sys.executable, *pytest, "-m", colab, "tests/platforms"],
        "package": [str(PYTHON), *pytest, "-m", quick, *files],
    }


def main() -> int:
    """Build, run the legs, say how long each took; 1 if one has failed."""
    build()
    if "--build" in sys.argv[1:]:
        return 0
    failed = []
    for name, command in legs("--short" in sys.argv[1:]).items():
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=REPO, env=os.environ | {"PYTHONPATH": ""}).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print(f"failed on Colab's versions: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
