"""Colab as far as it can be had here: its kernel, widgets and libraries, its old torchao, and a machine without us.

`make test-platforms` builds the environment (scripts/platforms.py) and runs these.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = [pytest.mark.platforms, pytest.mark.timeout(900)]
REPO = Path(__file__).resolve().parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, REPO / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


platforms, tool = script("platforms"), script("notebooks")


@pytest.fixture(scope="module", autouse=True)
def built():
    if not platforms.PYTHON.exists():
        pytest.skip("Colab's environment is not built: make test-platforms does it")


def kernel(python: Path, folder: Path, monkeypatch, **environment: str) -> str:
    """Register a kernel of that interpreter for this test and return its name."""
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab-like",
        "language": "python",
        "env": environment,
    }
    place = folder / "jupyter" / "kernels" / "colablike"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    return "colablike"


def run(cells: list[str], name: str, folder: Path) -> list[str]:
    """Execute cells in a kernel of that name; what each printed or showed as text."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    client = NotebookClient(
        notebook, timeout=600, kernel_name=name, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return [
        "".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in c.outputs)
        for c in notebook.cells
    ]


VERSIONS = (
    "import importlib.metadata as m\n"
    "print({n: m.version(n) for n in 'torch numpy ipykernel ipywidgets ipython diffusers peft'.split()})"
)


@pytest.fixture
def published(tmp_path) -> Path:
    """The repository as it would be cloned: the working tree's package and data, in a repository of its own."""
    place = tmp_path / "published" / "lora_nb"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "lora_nb", "data/base", "data/ink",
         "pyproject.toml", "README.md", "LICENSE"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (REPO / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, place / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=place, check=True)
    return place


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A machine with Colab's libraries and old torchao, without lora_nb; its interpreter, with pip beside it."""
    place = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (own,) = place.glob("lib/python*/site-packages")
    shared = [str(platforms.packages()), sysconfig.get_paths()["purelib"]]
    (own / "colab.pth").write_text("\n".join(shared))
    info = own / "torchao-0.10.0.dist-info"
    for file, text in {
        own / "torchao" / "__init__.py": "__version__ = '0.10.0'\n",
        info / "METADATA": "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n",
        info / "INSTALLER": "pip\n",
        info / "RECORD": "torchao/__init__.py,,\n"
        + "".join(f"torchao-0.10.0.dist-info/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")),
    }.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    pip = place / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {place / "bin" / "python"} -m pip "$@"\n')
    pip.chmod(0o755)
    return place / "bin" / "python"


TRAIN = """
config = lora_nb.preset("tiny").config("mine", max_train_steps=2, train_batch_size=1)
print([step.step for step in lora_nb.train(config)], lora_nb.runs_dir())
"""


def test_setup_cell_on_a_fresh_machine(published, fresh, tmp_path, monkeypatch):
    """Fetches only us, takes the old torchao away, changes no other version, trains, and can be run again."""
    content = tmp_path / "content"
    content.mkdir()
    name = kernel(
        fresh,
        tmp_path,
        monkeypatch,
        PATH=f"{fresh.parent}:{os.environ['PATH']}",
        COLAB_RELEASE_TAG="release-colab-2026.08",
        LORA_NB_RUNS=str(tmp_path / "runs"),
        PIP_NO_BUILD_ISOLATION="0",  # setuptools is here; the network is not
        OMP_NUM_THREADS="1",
    )
    monkeypatch.setattr(tool, "address", lambda: str(published))
    setup = tool.setup_cell()
    adapt = (
        "from peft import LoraConfig, inject_adapter_in_model\nimport torch\n"
        "net = torch.nn.ModuleDict({'a': torch.nn.Linear(4, 4)})\n"
        "try:\n    inject_adapter_in_model(LoraConfig(target_modules=['a']), net)\n"
        "except ImportError as error:\n    print(error)"
    )
    before, refused, first, after, trained, again = run(
        [VERSIONS, adapt, setup, VERSIONS, TRAIN, setup], name, content
    )
    assert "incompatible version of torchao" in refused  # what stock Colab does to everybody
    assert after == before
    assert "0.39.0" in after
    assert "colab, Python" in first
    assert "[1, 2]" in trained
    for printed in (first, again):
        assert "torchao" not in printed  # nothing left to say about it
        assert "restart" not in printed


def execute(stem: str, name: str, changes: dict[str, str], keep: tuple[str, ...] = ()) -> set[str]:
    """Run a course notebook, or those of its cells, with other parameters; the kinds of output that it has."""
    notebook = nbformat.read(REPO / "notebooks" / f"{stem}.ipynb", as_version=4)
    if keep:
        notebook.cells = [cell for cell in notebook.cells if cell.id in keep]
    text = "\n".join(cell.source for cell in notebook.cells)
    for old, new in changes.items():
        assert old in text
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    place = {"metadata": {"path": str(REPO / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name=name, resources=place).execute()
    return {key for c in notebook.cells for o in c.get("outputs", []) for key in o.get("data", {})}


WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def colab(tmp_path, monkeypatch) -> str:
    """A kernel with Colab's versions and a workspace of its own, as if a person sat before the screen."""
    return kernel(
        platforms.PYTHON,
        tmp_path,
        monkeypatch,
        LORA_NB_RUNS=str(tmp_path / "runs"),
        LORA_NB_HEADLESS="0",
        CI="",
        OMP_NUM_THREADS="1",
    )


def test_panel_and_board_on_colabs_kernel(colab, tmp_path):
    """Notebook 02 whole, and notebook 03's own cells that train with the board."""
    assert WIDGET in execute("02_lora_config", colab, {})
    cells = ("setup", "parameters", "config", "train")
    more = {"from lora_nb import LiveBoard,": "from lora_nb import train, LiveBoard,"}
    steps = {"train(config)": "train(config.replace(max_train_steps=4))"}
    shown = execute("03_training", colab, more | steps, cells)
    assert "image/png" in shown
    assert WIDGET not in shown  # the board needs none, so it works where callbacks do not
    assert (tmp_path / "runs" / "ink" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_training_notebook_on_colabs_kernel(colab, tmp_path):
    """All of notebook 03, with six steps, on the config of notebook 02's cells."""
    execute("02_lora_config", colab, {}, ("setup", "parameters", "layer", "panel", "save"))
    assert "image/png" in execute("03_training", colab, {"STEPS = None": "STEPS = 6"})
    assert (tmp_path / "runs" / "ink" / "report.html").is_file()


def test_it_is_colabs(tmp_path, monkeypatch):
    """The environment has what the record says, and shares torch."""
    code = "import importlib.metadata as m, sys; print({n: m.version(n) for n in sys.argv[1:]})"
    names = [pin.split("==")[0] for pin in platforms.pins() if "==" in pin]
    printed = subprocess.run(
        [platforms.PYTHON, "-c", code, *names, "torch"], capture_output=True, text=True, check=True
    ).stdout
    found = eval(printed)
    assert found.pop("torch").split("+")[0] == "2.13.0"
    for pin in platforms.pins():
        if "==" in pin:
            name, version = pin.split("==")
            assert found[name].removesuffix(".0") == version.removesuffix(".0")
