"""Colab as far as it can be had here: its kernel, widgets and libraries, its old torchao, and a machine without us.

`make test-platforms` builds the environment (scripts/platforms.py) and runs these.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from test_notebooks import NOTEBOOKS, SHORT, with_parameters

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


def execute(sources: list[str], name: str, folder: Path) -> list[NotebookNode]:
    """Run cells one after the other in one kernel of that name; the cells with their outputs."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name=name, resources=place).execute()
    return notebook.cells


def run(sources: list[str], name: str, folder: Path) -> list[str]:
    """Run cells; what each printed or showed as text."""
    return [
        "".join(o.get("text") or str(o.get("data", {}).get("text/plain", "")) for o in c.outputs)
        for c in execute(sources, name, folder)
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
config = lora_nb.preset("tiny").config("mine", max_train_steps=2, train_batch_size=1, probe_size=2)
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


def test_the_doctor_names_the_old_torchao_and_nothing_else(fresh):
    """All other versions that Colab has are good enough, and the remedy is one that keeps torch as it is."""
    code = (
        "import lora_nb\n"
        "print([(c.name, c.fix) for c in lora_nb.doctor() if not c.ok and c.name not in ('disk', 'memory')])"
    )
    here = os.environ | {"COLAB_RELEASE_TAG": "release-colab-2026.08", "PYTHONPATH": str(REPO)}
    done = subprocess.run([fresh, "-c", code], env=here, capture_output=True, text=True)
    ((name, fix),) = ast.literal_eval(done.stdout)
    assert name == "torchao"
    assert fix.endswith("run: pip uninstall -y torchao")


def course(stem: str, changes: Mapping[str, str] = {}, keep: tuple[str, ...] = ()) -> list[str]:
    """The code cells of a course notebook, or those of these ids, with other words in them."""
    cells = nbformat.read(REPO / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    sources = [c.source for c in cells if c.cell_type == "code" and (c.id in keep or not keep)]
    for old, new in changes.items():
        assert old in "\n".join(sources)
        sources = [source.replace(old, new) for source in sources]
    return sources


def kinds(cells: list[NotebookNode]) -> set[str]:
    """The kinds of output that cells have."""
    return {key for cell in cells for output in cell.outputs for key in output.get("data", {})}


WIDGET = "application/vnd.jupyter.widget-view+json"


def screen(runs: Path) -> dict[str, str]:
    """The environment of a kernel with those runs, as if a person sat before it."""
    here = {"LORA_NB_HEADLESS": "0", "CI": "", "OMP_NUM_THREADS": "1"}
    return here | {"LORA_NB_RUNS": str(runs)}


@pytest.fixture
def colab(tmp_path, monkeypatch) -> str:
    """A kernel with Colab's versions and a workspace of its own."""
    return kernel(platforms.PYTHON, tmp_path, monkeypatch, **screen(tmp_path / "runs"))


FEW = "max_train_steps=4, probe_size=2, num_inference_steps=1, num_validation_images=1"


def test_setup_panel_and_board_on_colabs_kernel(colab, tmp_path):
    """Notebooks 00 and 02 whole, then those cells of 03 that train with the board; in one kernel, which is quicker."""
    parts = [
        course("00_setup", {
            "sampling = preset.sampling": "sampling = preset.sampling | {'num_inference_steps': 1}",
            "lengths = [1, 2, 4, 8, 25]": "lengths = [1, 2]",
        }),
        course("02_lora_config"),
        course("03_training", {
            "from lora_nb import LiveBoard,": "from lora_nb import train, LiveBoard,",
            "train(config)": f"train(config.replace({FEW}))",
        }, ("setup", "parameters", "config", "train")),
    ]  # fmt: skip
    done = execute(list(chain(*parts)), colab, REPO / "notebooks")
    first, panel, board = (kinds([done.pop(0) for _ in part]) for part in parts)
    assert "image/png" in first
    assert WIDGET in panel
    assert "image/png" in board
    assert WIDGET not in board  # the board needs none, so it works where callbacks do not
    assert (tmp_path / "runs" / "ink" / "pytorch_lora_weights.safetensors").is_file()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("course")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_every_notebook_on_colabs_kernel(path, workspace, tmp_path, monkeypatch):
    """In order, in one folder of runs; the chapters that take minutes as short as in make test."""
    name = kernel(platforms.PYTHON, tmp_path, monkeypatch, **screen(workspace))
    short = with_parameters(path, SHORT.get(path.stem, {}), tmp_path)
    cells = [c for c in nbformat.read(short, as_version=4).cells if c.cell_type == "code"]
    done = execute([cell.source for cell in cells], name, REPO / "notebooks")
    assert kinds(done) & {"image/png", "text/html", WIDGET}


def test_it_is_colabs(tmp_path, monkeypatch):
    """The environment has what the record says, and shares torch."""
    code = "import importlib.metadata as m, sys; print({n: m.version(n) for n in sys.argv[1:]})"
    names = [pin.split("==")[0] for pin in platforms.pins() if "==" in pin]
    printed = subprocess.run(
        [platforms.PYTHON, "-c", code, *names, "torch"], capture_output=True, text=True, check=True
    ).stdout
    found = ast.literal_eval(printed)
    assert found.pop("torch").split("+")[0] == "2.13.0"
    for pin in platforms.pins():
        if "==" in pin:
            name, version = pin.split("==")
            assert found[name].removesuffix(".0") == version.removesuffix(".0")
